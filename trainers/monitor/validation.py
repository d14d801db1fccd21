"""Whether a run learns what it should: the loss on images that it does not train on, at fixed noise, while it trains.

The training loss of a LoRA is mostly chance: which image, which noise level. Here the same images are measured at the
same noise levels under the same noise every time, so that two measurements differ by what was learnt and by nothing
else. Validation never changes the training: it has random generators of its own, and the weights of the next step are
those of a run without validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.encoded import Batch, EncodedDataset
from ..diffusion import Denoiser, NoiseLevelDensity, cpu_randn_like, native_error, stratified_sigmas
from ..protocols import NamedValidationLoss, ValidationLoss
from ..rng import derive_generator
from ..settings import NoiseSettings, Settings, choice_field, compute_fingerprint, number_field, switch_field

if TYPE_CHECKING:
    from ..methods.lora import LoraTraining

BEST_CHOICES = KEEP_BEST_FILE, RESTORE_BEST, BEST_OFF = ("keep a file", "restore at the end", "off")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(Settings):
    """What is measured while a run trains, and what follows from it. Nothing of it changes a step."""

    every: int = number_field(
        100,
        0,
        1_000_000,
        "Measure the validation loss every this many steps, and at the end. 0 never measures.",
        unit="optimizer steps",
    )
    images: int = number_field(
        8, 1, 10_000, "Maximum number of images to measure, each at every noise level.", unit="images"
    )
    levels: int = number_field(
        8,
        2,
        64,
        "Number of noise levels, spread evenly over those that are trained. Each costs one forward pass per image.",
        advanced=True,
    )
    best: str = choice_field(
        KEEP_BEST_FILE,
        BEST_CHOICES,
        "'keep a file' saves the LoRA with the lowest validation loss beside the last one; 'restore at the end' "
        "makes it the result.",
    )
    patience: int = number_field(
        0,
        0,
        100_000,
        "Early stopping: stop after this many measurements without improvement; all work is kept. 0 never stops early.",
        unit="measurements",
    )
    least_gain: float = number_field(
        0.0,
        0.0,
        0.5,
        "For patience: the smallest relative decrease that counts as an improvement.",
        step=0.001,
        advanced=True,
    )
    name_worst: int = number_field(
        50,
        0,
        100_000,
        "At the end, measure this many training images one by one and list the worst. 0 lists none.",
        unit="images",
        advanced=True,
    )
    tensorboard: bool = switch_field(
        False, "Also write TensorBoard event files into the run's folder. Needs the package tensorboard.", advanced=True
    )

    def ending(self) -> dict:
        """What decides which weights a run ends with; a finished run counts as finished only under the same."""
        out = {"best": self.best} if self.every and self.best == RESTORE_BEST else {}
        return (
            {**out, "patience": self.patience, "least_gain": self.least_gain} if self.every and self.patience else out
        )


# -- what is measured
# -----------------------------------------------------------------------------------------------------


def validation_rng(*what) -> torch.Generator:
    """A generator that depends on its name alone, and on no step."""
    return derive_generator("validation", *what)


@dataclass
class ImageValidationLoss:
    """The loss on images at fixed noise levels under fixed noise. Nothing is kept between two measurements but the list
    of images."""

    denoiser: Denoiser
    data: EncodedDataset
    picks: list[int]
    density: NoiseLevelDensity
    noise: NoiseSettings = NoiseSettings()
    levels: int = 8
    batch: int = 1
    encode: Callable[[Batch], list[dict]] | None = (
        None  # -> one conditioning per sample, when the text encoder learns too
    )
    method: LoraTraining | None = None  # whose target is measured; None for the images' own
    noun, where = "pictures", "on fixed training pictures"  # for people

    def __post_init__(self):
        self.data = replace(self.data, dropout=0.0)

    @property
    def key(self) -> str:
        """Changes with what is measured: losses of different keys are not to be compared."""
        return compute_fingerprint(
            self.data.fingerprint,
            self.picks,
            self.levels,
            self.noise,
            self.density.fingerprint(),
            *([self.method.few_step.contrast] if self.method and self.method.few_step.contrast != 1 else []),
        )

    @torch.no_grad()
    def losses(self, tick: Callable[[], None] = lambda: None) -> Tensor:
        """(images, levels) native losses, unweighted, on the CPU. `tick()` is called before each forward and may
        raise."""
        return torch.stack([self.image_losses(pick, tick) for pick in self.picks])

    def image_losses(self, pick: int, tick) -> Tensor:
        """(levels,) of one image."""
        item = self.data.items[pick]
        batch = self.data.make_batch([pick], validation_rng("picture", item.id))
        x0 = self.denoiser.model_space(batch.x0)
        conds = self.encode(batch) if self.encode else batch.conds
        mask = None if batch.mask is None else batch.mask.to(x0)
        sigmas = self.sigmas(x0)
        noise = torch.cat([cpu_randn_like(x0, validation_rng("noise", item.id, level)) for level in range(self.levels)])
        parts = []
        for at in torch.arange(self.levels).split(self.batch):
            tick()
            many = x0.expand(len(at), *x0.shape[1:])
            sigma, chosen = sigmas[at.to(sigmas.device)], noise[at.to(noise.device)]
            x = self.denoiser.noised(many, chosen, sigma)
            answer = self.denoiser.denoise(x, sigma, conds * len(at))
            goal = self.goal(x, many, sigma, batch)
            parts.append(
                native_error(
                    self.denoiser, answer, goal, sigma, None if mask is None else mask.expand(len(at), *mask.shape[1:])
                )
            )
        return torch.cat(parts).float().cpu()

    def goal(self, x, x0, sigma, batch: Batch) -> Tensor:
        """What the prediction at x (N, ...) of one image is compared with."""
        if self.method is None or self.method.few_step.contrast == 1:
            return x0
        from ..methods.few_step import contrastive_target

        empty, dropped = self.data.empty_conds(batch) * len(x), batch.dropped * len(x)
        return contrastive_target(self.method, x, x0, sigma, empty, dropped)

    def describe_sample(self, pick: int) -> dict:
        """What a person knows the image by."""
        item = self.data.items[pick]
        return {"image": item.path or item.id, "caption": item.captions[0] if item.captions else ""}

    def sigmas(self, x0) -> Tensor:
        return stratified_sigmas(self.denoiser, self.density, x0, self.levels, self.noise.min_time, self.noise.max_time)

    def first_sigmas(self) -> list[float]:
        """The noise levels of the first image, for people; other sizes may have others."""
        item = self.data.items[self.picks[0]]
        return self.sigmas(
            self.denoiser.model_space(self.data.make_batch(self.picks[:1], validation_rng("picture", item.id)).x0)
        ).tolist()


def pick_validation_images(data: EncodedDataset, count: int) -> list[int]:
    """At most `count` images, spread over the dataset in its own order."""
    return take_evenly([i for i, item in enumerate(data.items) if item.repeats] or list(range(len(data.items))), count)


def take_evenly(values, count: int) -> list:
    """At most `count` of them, evenly."""
    return [values[i * len(values) // min(count, len(values))] for i in range(min(count, len(values)))]


def relative_losses(losses: Tensor) -> Tensor:
    """(images, levels) -> (images,): each image's loss as a multiple of the mean at the same noise level; 1 is
    average."""
    return (losses / losses.mean(0, keepdim=True).clamp(min=1e-12)).mean(1)


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- what follows ------------------------------------------------------------------------------------------------------


def finite_measurements(history: list[dict]) -> list[dict]:
    """The entries of trained weights whose loss is a number: step 0 is the model alone, for comparison."""
    return [entry for entry in history if entry["step"] and entry["loss"] is not None]


def best_measurement(history: list[dict]) -> dict | None:
    return min(finite_measurements(history), key=lambda entry: entry["loss"], default=None)


def measurements_without_gain(history: list[dict], least_gain: float) -> int:
    """How many measurements there are after the last one that was better than all before it by more than this share."""
    low, since = math.inf, 0
    for entry in history:
        if not entry["step"]:
            continue
        loss = math.inf if entry["loss"] is None else entry["loss"]
        wanted = low - abs(low) * least_gain if math.isfinite(low) else low  # a score taken negative is below zero
        low, since = (loss, 0) if loss < wanted else (low, since + 1)
    return since


@dataclass
class ValidationMonitor:
    """What happens between two steps: validation losses, sample images, and early stopping.

    `check_interrupt()` may raise the host's interrupt, `show_status(text)` shows what goes on, `on_event(kind, entry)`
    is called for each measurement ("validation"), sample ("sample") and failure ("trouble"). `draw_samples(step)` gives
    the record of a sheet of samples, or None."""

    settings: ValidationSettings = ValidationSettings()
    losses_by_name: Mapping[str, ValidationLoss] = field(default_factory=dict)  # "validation" or not, and "training"
    per_image_loss: NamedValidationLoss | None = None  # of single training images, measured at the end
    draw_samples: Callable[[int], dict | None] | None = None
    preview_every: int = 0
    check_interrupt: Callable[[], None] = lambda: None
    show_status: Callable[[str], None] = lambda text: None
    on_event: Callable[[str, dict], None] = lambda kind, entry: None
    history: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    worst: list[dict] = field(default_factory=list)
    best: dict | None = None  # {"step", "params"}: kept when it is to be restored

    # -- when ----------------------------------------------------------------------------------------------------------

    def measurement_due(self, step: int, steps: int) -> bool:
        due = (
            bool(self.losses_by_name) and self.settings.every > 0 and (step % self.settings.every == 0 or step == steps)
        )
        return due and all(entry["step"] != step for entry in self.history)

    def preview_due(self, step: int, steps: int) -> bool:
        due = (
            self.draw_samples is not None
            and self.preview_every > 0
            and (step % self.preview_every == 0 or step == steps)
        )
        return due and step > 0 and all(sample["step"] != step for sample in self.samples)

    def due(self, step: int, steps: int) -> bool:
        return self.measurement_due(step, steps) or self.preview_due(step, steps)

    @property
    def should_stop(self) -> bool:
        """Whether the run should end here. It follows from the history alone, so a resumed run decides the same."""
        s = self.settings
        return bool(s.every and s.patience and measurements_without_gain(self.history, s.least_gain) >= s.patience)

    # -- what ----------------------------------------------------------------------------------------------------------

    def run_checks(self, step: int, steps: int, params: list[Tensor]) -> bool:
        """Measure and draw what is due with the weights as they are. True when they are the best so far."""
        better = self.measurement_due(step, steps) and self.measure(step, params)
        if self.preview_due(step, steps):
            self.sample(step)
        return better

    def measure(self, step: int, params) -> bool:
        losses = {}
        for name, loss in self.losses_by_name.items():
            self.show_status(f"step {step}: measuring {len(loss.picks)} {name} {loss.noun}")
            losses[name] = loss.losses(self.check_interrupt)
        name = next(iter(losses))  # the held-out images, where there are any
        entry = {
            "step": step,
            "loss": finite_or_none(float(losses[name].mean())),
            "bins": [finite_or_none(v) for v in losses[name].mean(0).tolist()],
            "sigmas": self.losses_by_name[name].first_sigmas(),
            "held_out": name == "validation",
            "noun": self.losses_by_name[name].noun,
            "where": self.losses_by_name[name].where,
        }
        if len(losses) > 1:
            entry |= {
                "training": finite_or_none(float(losses["training"].mean())),
                "training_bins": [finite_or_none(v) for v in losses["training"].mean(0).tolist()],
            }
        return self.record_measurement(entry, params)

    def record_measurement(self, entry: dict, params) -> bool:
        """One more measurement. Whether its weights are to be kept as the best so far."""
        self.history.append(entry)
        self.on_event("validation", entry)
        better = best_measurement(self.history) is entry
        if better and self.settings.best == RESTORE_BEST:
            self.best = {"step": entry["step"], "params": [p.detach().to("cpu", copy=True) for p in params]}
        return better and self.settings.best != BEST_OFF

    def sample(self, step: int) -> None:
        """An exception inside a preview loses that preview, never the run."""
        try:
            self.show_status(f"step {step}: drawing samples")
            if self.draw_samples is not None and (sample := self.draw_samples(step)) is not None:
                self.samples.append(sample)
                self.on_event("sample", sample)
        except Exception as error:
            self.on_event("trouble", {"step": step, "text": f"No samples at step {step}: {error}"})

    def finish(self) -> None:
        """Name the training images with the highest loss, with the weights as they are."""
        if self.per_image_loss is None:
            return
        self.show_status(f"measuring {len(self.per_image_loss.picks)} training {self.per_image_loss.noun} one by one")
        losses = self.per_image_loss.losses(self.check_interrupt)
        found = [
            {**self.per_image_loss.describe_sample(pick), "loss": ratio, "bins": row}
            for pick, ratio, row in zip(
                self.per_image_loss.picks, relative_losses(losses).tolist(), losses.tolist(), strict=True
            )
        ]
        self.worst = sorted(found, key=lambda one: -one["loss"])

    # -- the state -----------------------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        return compute_fingerprint({name: loss.key for name, loss in self.losses_by_name.items()})

    def state(self) -> dict:
        """Copies: what was saved does not change when the run goes on."""
        best = self.best and {"step": self.best["step"], "params": list(self.best["params"])}
        return {
            "key": self.key,
            "history": list(self.history),
            "samples": list(self.samples),
            "best": best,
            "worst": list(self.worst),
        }

    def load_state(self, state: dict) -> None:
        """Measurements of another key are left behind; the samples stay."""
        same = state["key"] == self.key
        self.samples = list(state["samples"])
        self.history = list(state["history"]) if same else []
        self.best = state["best"] if same and self.settings.best == RESTORE_BEST else None

    # -- for people ----------------------------------------------------------------------------------------------------

    def line(self) -> str:
        """One phrase on how it went; nothing when nothing was measured."""
        best = best_measurement(self.history)
        parts = [] if best is None else [format_validation_summary(best, self.history[-1])]
        if self.worst:
            names = ", ".join(
                f"{one['image'].replace(chr(92), '/').split('/')[-1]} ({one['loss']:.2f} x)" for one in self.worst[:3]
            )
            parts.append(f"highest loss: {names}")
        return "; ".join(parts)


def format_validation_summary(best: dict, last: dict) -> str:
    figure = last.get("figure", "validation loss")
    if last["loss"] is None:
        return f"the last {figure} is no number; best {best['loss']:.4f} at step {best['step']}"
    gap = (
        f", {last['loss'] / last['training'] - 1:+.0%} against training {last.get('noun', ImageValidationLoss.noun)}"
        if last.get("training")
        else ""
    )
    here = "" if last is best else f" (best {best['loss']:.4f} at step {best['step']})"
    return f"{figure} {last['loss']:.4f}{here}{gap}" + (
        "" if last["held_out"] else f" {last.get('where', ImageValidationLoss.where)}"
    )
