"""How far a LoRA goes: images at rising strengths, with the curve of its effect under them."""

from __future__ import annotations

import dataclasses

import torch
from comfy_api.latest import io, ui

from ...trainers.data.encoded import content_hash, split_conditioning
from ...trainers.data.images import image_to_batch_tensor
from ...trainers.files import LoraFile, as_lora_file, rescale_lora
from ...trainers.monitor.plots import draw_sweep_sheet
from ...trainers.monitor.strength_curve import (
    RAW_EFFECT_UNIT,
    diffusion_classifier_score,
    make_axis_projection,
    measure_strength_curve,
)
from ...trainers.settings import Settings, number_field, text_field
from .. import host
from ..fields import CATEGORY, LoraModelType, settings_from_widgets, settings_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """What is drawn, and at which strengths."""

    strengths: str = text_field(
        "-2, -1, 0, 1, 2", "The strengths to compare, separated by commas; 0 is always included."
    )
    pictures: int = number_field(3, 1, 64, "Seeds per strength.", unit="images")
    seed: int = number_field(0, 0, 2**63 - 1, "The first seed; all images of a row share one seed.")
    resolution: int = number_field(512, 16, 8192, "Width and height of the images.", unit="px", step=8)
    steps: int = number_field(20, 1, 1000, "Sampling steps of each image.")
    guidance: float = number_field(
        7.0, 1.0, 30.0, "Classifier-free guidance (CFG); 1 for guidance-distilled models.", step=0.5
    )
    asked_effect: float = number_field(
        0.0,
        -100.0,
        100.0,
        "Rescale the LoRA so that strength 1 has this effect, where 1 is the effect of `toward` itself. 0 leaves "
        "it unchanged.",
        step=0.25,
    )

    def values(self) -> tuple[float, ...]:
        """The strengths, sorted, with 0. Raises ValueError for what is no number."""
        try:
            found = {float(part) for part in self.strengths.split(",") if part.strip()}
        except ValueError:
            raise ValueError(
                f"strengths is {self.strengths!r}; write numbers separated by commas, such as -2, -1, 0, 1, 2."
            ) from None
        if not found - {0.0} or not all(abs(value) <= 100 for value in found):
            raise ValueError(f"strengths is {self.strengths!r}; write at least one number besides 0, from -100 to 100.")
        return tuple(sorted(found | {0.0}))


class StrengthSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardStrengthSweep",
            display_name="Strength Sweep",
            category=CATEGORY,
            description="Samples any LoRA at several strengths on fixed seeds: a sheet of images, and below it "
            "how much each unit of strength does and how far other things drift.",
            search_aliases=["xy plot", "lora strength grid", "slider calibration", "lora tester", "strength curve"],
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRA."),
                LoraModelType.Input("lora", tooltip="From a Train node or Load LoRA File."),
                io.Vae.Input("vae", tooltip="The VAE of the model, to decode the images."),
                io.Conditioning.Input("positive", tooltip="The prompt of the samples."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; usually the empty text."),
                *settings_inputs(SweepSettings),
                io.Combo.Input(
                    "sampler",
                    options=list(host.sampling.SAMPLERS),
                    default="euler",
                    advanced=True,
                    tooltip="As in KSampler; euler is fine.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(host.sampling.SCHEDULERS),
                    default="normal",
                    advanced=True,
                    tooltip="As in KSampler; normal is fine.",
                ),
                io.Conditioning.Input(
                    "toward",
                    optional=True,
                    tooltip="A prompt for what +1 should look like, such as 'old person'. With `away`, the model "
                    "itself measures the effect.",
                ),
                io.Conditioning.Input(
                    "away", optional=True, tooltip="A prompt for what -1 should look like, or for what +1 removes."
                ),
                io.Conditioning.Input(
                    "preserve",
                    optional=True,
                    tooltip="A prompt that the LoRA must not change: drift is measured on it.",
                ),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="All images with the curve below them."),
                io.Image.Output(
                    "images", display_name="images", tooltip="The images, seed by seed, in order of strength."
                ),
                LoraModelType.Output(
                    "lora",
                    display_name="lora",
                    tooltip="The LoRA with its curve in the metadata, rescaled if asked_effect is set.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Effect per unit, monotonicity, drift, and any rescaling.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, lora, vae, positive, negative, sampler, scheduler, toward=None, away=None, preserve=None, **widgets
    ):
        settings = settings_from_widgets(SweepSettings, widgets)
        if (toward is None) != (away is None):
            raise ValueError(
                "Only one of toward and away is connected. Connect both, so that there is a direction to measure, or "
                "neither."
            )
        sweep = StrengthSweepRun(model, lora, positive, negative, settings, sampler, scheduler, cls.hidden.unique_id)
        curve = sweep.curve(toward, away, preserve)
        images = sweep.decoded(vae)
        sheet = image_to_batch_tensor(
            draw_sweep_sheet(
                arrange_sweep_rows(images, len(curve.strengths)),
                sweep.labels(),
                curve.strengths,
                curve.effect,
                curve.drift,
                curve.unit,
            )
        )
        left_out = host.lora_keys.describe_unused(model, None, sweep.lora, sweep.left_out)
        lora, line = calibrate_lora(lora, curve, settings.asked_effect)
        line = "\n".join(filter(None, (line, left_out)))
        host.progress.show_node_text(line, cls.hidden.unique_id)
        return io.NodeOutput(sheet, images, lora, line, ui=ui.PreviewImage(sheet, cls=cls))


class StrengthSweepRun:
    """Latents at every strength, drawn once."""

    def __init__(self, model, lora, positive, negative, settings, sampler, scheduler, node_id):
        self.model, self.lora, self.negative, self.settings = model, as_lora_file(lora), negative, settings
        self.left_out = host.lora_keys.find_unloadable_layers(model, None, self.lora)
        self.conds = {"scene": positive}
        self.how = dict(steps=settings.steps, guidance=settings.guidance, sampler=sampler, scheduler=scheduler)
        self.shape = host.checks.square_latent_shapes(model, settings.resolution)[0]
        self.seeds = [settings.seed + i for i in range(settings.pictures)]
        self.strengths, self.latents = settings.values(), {}
        self.report, self.done = host.progress.ItemProgressReporter(node_id), 0

    def patch_model(self, strength):
        if strength == 0:
            return self.model
        return host.lora_keys.apply_lora(self.model, None, self.lora, strength, self.left_out)[0]

    def draw(self, name, strength):
        """x0 in model space; the scene's latents are kept for the sheet, and drawn once."""
        if name != "scene" or strength not in self.latents:
            host.progress.raise_if_interrupted()
            patched = self.patch_model(strength)
            latent = host.sampling.sample_latents(
                patched, self.conds[name], self.negative, self.shape, self.seeds, **self.how
            )
            self.latents |= {strength: latent} if name == "scene" else {}
            self.done += 1
            self.report(self.done, max(self.done, len(self.strengths)), f"strength {strength:g}")
        else:
            latent = self.latents[strength]
        return self.model.model.process_latent_in(latent).float().cpu()

    def curve(self, toward, away, preserve):
        self.conds |= {
            name: cond
            for name, cond in (("toward", toward), ("away", away), ("preserve", preserve))
            if cond is not None
        }
        kept = ("preserve",) if preserve is not None else ()
        if toward is None:
            end = max(self.strengths, key=lambda strength: (abs(strength), strength))
            effect = make_axis_projection(2 * (self.draw("scene", end) - self.draw("scene", 0.0)))
            return measure_strength_curve(
                self.draw, "scene", effect, preserve=kept, strengths=self.strengths, unit=f"the change at {end:g}"
            )
        same = content_hash(split_conditioning(toward)) == content_hash(split_conditioning(self.conds["scene"]))
        reference, unit = (None, RAW_EFFECT_UNIT) if same else ("toward", "what `toward` itself looks like")
        return measure_strength_curve(
            self.draw, "scene", self.asked, reference=reference, preserve=kept, strengths=self.strengths, unit=unit
        )

    def asked(self, x0):
        with host.session.open_frozen_model(self.model, self.conds) as frozen:
            return diffusion_classifier_score(
                frozen, x0.to(frozen.denoiser.device), "toward", "away", self.settings.seed
            ).cpu()

    def decoded(self, vae):
        """(images * strengths, H, W, 3), seed by seed."""
        grid = torch.stack([vae.decode(self.latents[s]).flatten(0, -4).cpu() for s in self.strengths], dim=1)
        return grid.flatten(0, 1)

    def labels(self):
        return [f"seed {seed}" for seed in self.seeds]


def arrange_sweep_rows(images, columns):
    from PIL import Image

    samples = [Image.fromarray((image.clamp(0, 1) * 255).round().byte().numpy()) for image in images]
    return [samples[i : i + columns] for i in range(0, len(samples), columns)]


def calibrate_lora(lora, curve, asked: float):
    """(LORA_MODEL with the curve in its metadata, rescaled when an effect is asked, a line for the person)."""
    lora = as_lora_file(lora)
    notes, line = {"trainyard.curve": curve.to_json()}, curve.line()
    if not asked:
        return LoraFile(lora, {**lora.metadata, **notes}, lora.steps), line
    factor = curve.strength_for(asked)
    return rescale_lora(
        lora, factor, {**notes, "trainyard.rescaled": f"{factor:.6g}"}
    ), f"{line}; rescaled by {factor:.3g}: strength 1 has the effect {asked:g}"


NODES = [StrengthSweep]
