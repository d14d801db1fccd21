"""What a run that follows a score really does to images: looked at every so many steps, on the same noise each time.

The score that is trained always rises. Whether images became better is told by a second score that no gradient has
seen; when that one falls while the trained one rises, the score model is being fooled, and the run ends with the
adapters of its best moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..diffusion import sum_tensors
from ..methods.leco_score import LecoScoreTraining, predict_member_scores
from ..scores.networks import ScorerEnsemble, to_scorer_input
from .strength_curve import relative_drift
from .validation import ValidationMonitor

COLLAPSE_THRESHOLD = 0.6  # diversity below which images of a prompt look alike
REWARD_HACKING_MARGIN = 0.02  # standard deviations by which the held-out score must fall, and the trained one rise
MAX_KEPT_PREVIEWS = 16  # looks whose images are kept


@dataclass(frozen=True)
class ScoreMeasurement:
    """Scores are in standard deviations of the ratings, as a difference to the frozen model's own images. Drift is
    the distance to those, where 1 is the distance between two different images; diversity is 1 when the images of a
    prompt differ as much as without adapters."""

    step: int
    score: float
    held_out: float | None
    drift: float
    diversity: float
    anchor: float
    step_drift: float  # of single steps, in noise or velocity: what the anchor answers to

    def line(self) -> str:
        held = "" if self.held_out is None else f", held out {self.held_out:+.2f}"
        alarm = " (collapsing)" if self.diversity < COLLAPSE_THRESHOLD else ""
        return (
            f"step {self.step}: score {self.score:+.2f}{held}, drift {self.drift:.2f}, diversity "
            f"{self.diversity:.2f}{alarm}, anchor {self.anchor:.3g} at step drift {self.step_drift:.2f}"
        )


@dataclass
class ScoreMonitor:
    """What trainers.loop.train takes as `watch`. `draw(prompt, strength) -> x0 (B, C, ...)` from the same noise every
    time."""

    method: LecoScoreTraining
    sample_images: Callable[[str, float], Tensor]
    prompts: Sequence[str]
    held_out: ScorerEnsemble | None = None
    every: int = 50  # optimizer steps
    patience: int = 2  # looks
    measurements: list[ScoreMeasurement] = field(default_factory=list)
    previews: dict[int, Tensor] = field(default_factory=dict)  # step -> one image per prompt
    best_params: list[Tensor] | None = None  # adapters of the look with the best held-out score
    baseline_images: list[Tensor] | None = None  # the frozen model's images, one stack per prompt

    def due(self, step: int, steps: int) -> bool:
        return (step % self.every == 0 or step == steps) and not any(look.step == step for look in self.measurements)

    @torch.no_grad()
    def run_checks(self, step: int, steps: int, params) -> bool:
        """Whether this is the best moment so far."""
        if self.baseline_images is None:
            self.baseline_images = [self.sample_images(prompt, 0.0) for prompt in self.prompts]
        now = [self.sample_images(prompt, 1.0) for prompt in self.prompts]
        look = ScoreMeasurement(
            step,
            self.score_gain(self.method.scores, now),
            None if self.held_out is None else self.score_gain([(self.held_out, 1.0)], now),
            relative_drift(list(zip(self.baseline_images, now, strict=True))),
            mean_prompt_diversity(now) / max(mean_prompt_diversity(self.baseline_images), 1e-12),
            float(self.method.anchor),
            float(self.method.drift),
        )
        self.measurements.append(look)
        self.keep_previews(step, torch.cat([stack[:1] for stack in now]).half().cpu())
        if better := look is best_held_out(self.trained_measurements):
            self.best_params = [p.detach().cpu().clone() for p in params]
        return better

    def score_gain(self, scores, now) -> float:
        ask = lambda side: torch.cat(
            [score_latents(self.method.denoiser, scores, *pair) for pair in zip(side, self.prompts, strict=True)]
        ).mean()
        before, after = ask(self.baseline_images), ask(now)
        return float(after - before)

    @property
    def note(self) -> str:
        """The last look, for those who wait."""
        return self.measurements[-1].line() if self.measurements else ""

    @property
    def trained_measurements(self) -> list[ScoreMeasurement]:
        """The looks at adapters that have learnt something."""
        return [look for look in self.measurements if look.step]

    @property
    def should_stop(self) -> bool:
        """Whether `patience` looks in a row lie below the best held-out score while the trained one went on rising."""
        top = best_held_out(self.measurements)
        if top is None or len(self.measurements) - 1 - self.measurements.index(top) < self.patience:
            return False
        now = self.measurements[-1]
        if now.held_out is None or top.held_out is None:
            return False
        return now.held_out < top.held_out - REWARD_HACKING_MARGIN and now.score > top.score + REWARD_HACKING_MARGIN

    @property
    def best(self) -> dict | None:
        """The step and the adapters to deliver in place of the last ones: those of the best moment, when the score
        model was fooled."""
        top = best_held_out(self.trained_measurements)
        return {"step": top.step, "params": self.best_params} if top and self.should_stop else None

    def finish(self) -> None:
        """Nothing: the last look was the last thing to do."""

    def keep_previews(self, step, images):
        """At most PREVIEWS looks, evenly over the run: when there are more, every second one goes."""
        self.previews[step] = images
        if len(self.previews) > MAX_KEPT_PREVIEWS:
            self.previews = {key: self.previews[key] for key in sorted(self.previews)[::2]}

    def preview_strip(self) -> Tensor:
        """(looks * prompts, C, ...) the previews in the order of the run."""
        return torch.cat([self.previews[step] for step in sorted(self.previews)]).float()

    def format_report(self) -> str:
        lines = [look.line() for look in self.measurements]
        top, best = best_held_out(self.measurements), self.best
        if top and best:
            now = self.measurements[-1]
            lines.append(
                f"stopped at step {now.step}: since step {top.step} the trained score went from {top.score:+.2f} to "
                f"{now.score:+.2f} and the held-out one from {top.held_out:+.2f} to {now.held_out:+.2f}; the adapters "
                f"of step {best['step']} are kept"
            )
        return "\n".join(lines)

    def state(self) -> dict:
        return {
            "looks": [asdict(look) for look in self.measurements],
            "previews": dict(self.previews),
            "kept": self.best_params,
        }

    def load_state(self, state: dict) -> None:
        self.measurements = [ScoreMeasurement(**look) for look in state["looks"]]
        self.previews, self.best_params = dict(state["previews"]), state["kept"]


@dataclass
class ScoreAndValidationMonitor:
    """A ScoreWatch and what Validation and Previews asks for beside it: samples, and best weights and early stop by the
    score of its looks, taken negative, so that lower is better as with a loss."""

    score_monitor: ScoreMonitor
    validation_monitor: ValidationMonitor

    @property
    def settings(self):
        return self.validation_monitor.settings

    @property
    def note(self) -> str:
        return self.score_monitor.note

    @property
    def should_stop(self) -> bool:
        return self.score_monitor.should_stop or self.validation_monitor.should_stop

    @property
    def best(self) -> dict | None:
        return self.score_monitor.best or self.validation_monitor.best

    def due(self, step: int, steps: int) -> bool:
        return self.score_monitor.due(step, steps) or self.validation_monitor.preview_due(step, steps)

    def run_checks(self, step: int, steps: int, params) -> bool:
        better = False
        if self.score_monitor.due(step, steps):
            better = self.score_monitor.run_checks(step, steps, params)
            if self.settings.every:
                better = self.validation_monitor.record_measurement(
                    to_history_entry(self.score_monitor.measurements[-1]), params
                )
        if self.validation_monitor.preview_due(step, steps):
            self.validation_monitor.sample(step)
        return better

    def finish(self) -> None:
        """Nothing: the last look was the last thing to do."""

    def line(self) -> str:
        return self.validation_monitor.line()

    def state(self) -> dict:
        return {**self.validation_monitor.state(), **self.score_monitor.state()}

    def load_state(self, state: dict) -> None:
        """Also of a run that was begun without Validation and Previews: what its looks saw is known."""
        self.score_monitor.load_state(state)
        if "key" in state:
            self.validation_monitor.load_state(state)
        if self.settings.every:
            self.validation_monitor.history = [to_history_entry(look) for look in self.score_monitor.measurements]


def to_history_entry(look: ScoreMeasurement) -> dict:
    """A look as a measurement: the held-out score where there is one, else the trained one."""
    held = look.held_out is not None
    loss = -(look.score if look.held_out is None else look.held_out)
    return {
        "step": look.step,
        "loss": loss if math.isfinite(loss) else None,
        "bins": [],
        "sigmas": [],
        "held_out": held,
        "noun": "scores",
        "figure": "minus the held-out score" if held else "minus the score",
        "where": "by the score model that pulls",
    }


def best_held_out(looks) -> ScoreMeasurement | None:
    """The look with the best held-out score, the first of equals; None where none was judged."""
    return max((look for look in looks if look.held_out is not None), key=lambda look: look.held_out, default=None)


@torch.no_grad()
def score_latents(denoiser, scores, x0: Tensor, prompt: str = "") -> Tensor:
    """(B,) what the score models say of clean latents that were drawn for a prompt, their weighted mean."""
    view, level = to_scorer_input(denoiser, x0, torch.zeros(len(x0), device=x0.device))
    said = [weight * predict_member_scores(score, view, level, [prompt] * len(x0)).mean(0) for score, weight in scores]
    return sum_tensors(said) / sum(weight for _, weight in scores)


def mean_prompt_diversity(stacks) -> float:
    """Mean distance between two images of the same prompt."""
    return sum(mean_distance(stack) for stack in stacks) / len(stacks)


def mean_distance(stack: Tensor) -> float:
    flat = stack.flatten(1).float()
    if len(flat) < 2:
        return math.nan
    return float(torch.pdist(flat).mean())
