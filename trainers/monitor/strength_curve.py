"""How far an adapter moves images for each unit of strength, and what else moves: the curve of a slider.

Images are drawn at several strengths from the same noise. How much of an attribute they have is asked of the frozen
model itself: how much better it predicts their noise under one prompt than under another (diffusion classifiers, Li et
al. 2023), or, where pairs of images show the attribute, how far they lie along the mean difference of those pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..data.concept_prompts import PromptRow
from ..diffusion import native_error, rollout, sigmas_at_levels, sum_tensors
from ..methods.rollouts import StudentTeacherModel

CURVE_STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
RAW_EFFECT_UNIT = "in the measure's own unit"
MIN_REFERENCE_EFFECT = 0.02  # a reference that moves the measure less than this is no unit: ratios to it would be noise
CLASSIFIER_NOISE_LEVELS = (
    0.3,
    0.5,
    0.7,
    0.9,
)  # where the frozen model is asked; cleaner images tell little about their prompt


@dataclass(frozen=True)
class SliderAxis:
    """What is measured: images of `scene`, which at +1 should have more of `toward` and less of `away`. `reference`:
    the prompt whose images have the effect that counts as 1. `preserve`: prompts whose images should not move."""

    scene: str
    toward: str
    away: str
    reference: str | None = None
    preserve: tuple[str, ...] = ()
    unconditional: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        found = (self.scene, self.toward, self.away, self.reference, self.unconditional, *self.preserve)
        return tuple(dict.fromkeys(text for text in found if text is not None))


@dataclass(frozen=True)
class StrengthCurve:
    """effect[i] and drift[i] at strengths[i]. Effect 0 is without the adapter; 1 is what `unit` names. Drift is the
    distance to the same image without the adapter, where 1 is the distance between two different images."""

    strengths: tuple[float, ...]
    effect: tuple[float, ...]
    drift: tuple[float, ...]
    unit: str

    @property
    def per_unit(self) -> float:
        """Effect per unit of strength: the slope of the least squares line through the effect at 0."""
        return sum(s * e for s, e in zip(self.strengths, self.effect, strict=True)) / sum(s * s for s in self.strengths)

    @property
    def monotone(self) -> float:
        """Spearman's rank correlation of effect and strength; 1 for a slider that always goes on in its direction."""
        return spearman_correlation(self.strengths, self.effect)

    def strength_for(self, effect: float) -> float:
        """The strength with this effect, on straight lines between the measured ones. Raises ValueError when none of
        them reaches it."""
        ordered = sorted(zip(self.strengths, self.effect, strict=True))
        for (a, low), (b, high) in zip(ordered, ordered[1:], strict=False):
            if min(low, high) <= effect <= max(low, high) and low != high:
                return a + (b - a) * (effect - low) / (high - low)
        raise ValueError(
            f"No measured strength has the effect {effect:g}: from {ordered[0][0]:g} to {ordered[-1][0]:g} it goes "
            f"from {min(self.effect):.3g} to {max(self.effect):.3g}. Ask for less, measure further, or train longer."
        )

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "per_unit": self.per_unit, "monotone": self.monotone})

    def line(self) -> str:
        """A sentence for a person."""
        drift = (
            f", drift at 1 {self.drift[self.strengths.index(1.0)]:.2f}" if self.drift and 1.0 in self.strengths else ""
        )
        return f"effect per unit {self.per_unit:.2f} ({self.unit}), monotone {self.monotone:.2f}{drift}"


def spearman_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation in [-1, 1], equal values sharing their mean rank; 0 when one of them never changes."""
    x, y = torch.tensor(mid_ranks(a)), torch.tensor(mid_ranks(b))
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 1e-12 else 0.0


def mid_ranks(values: Sequence[float]) -> list[float]:
    return [(sum(v < value for v in values) + sum(v <= value for v in values) - 1) / 2 for value in values]


# -- drawing and asking ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_from_noise(
    model: StudentTeacherModel, prompt: str, away: str, noise: Tensor, strength: float, steps: int, guidance: float
) -> Tensor:
    """x0 (B, C, ...) of images drawn from this noise by Euler steps."""
    levels = torch.linspace(1, 0, steps + 1)[:-1, None].expand(-1, len(noise))
    sigmas = sigmas_at_levels(model.denoiser, levels).to(noise)
    with model.adapters.at_strength(strength):
        *_, (x, sigma) = rollout(model.denoiser, noise, sigmas, model.conds[prompt], model.conds[away], guidance)
        return model.denoiser.denoise(x, sigma, [model.conds[prompt]] * len(x))


@torch.no_grad()
def diffusion_classifier_score(model: StudentTeacherModel, x0: Tensor, toward: str, away: str, seed: int = 0) -> Tensor:
    """(B,) how much better the frozen model predicts the noise on these images under `toward` than under `away`, in
    [-1, 1]."""
    rng, advantages = torch.Generator().manual_seed(seed), []
    for level in CLASSIFIER_NOISE_LEVELS:
        sigma = model.denoiser.sigma_at(torch.full((len(x0),), level)).to(x0)
        x = model.denoiser.noised(x0, torch.randn(x0.shape, generator=rng).to(x0), sigma)
        answers = model.predict_teacher(x, sigma, list(dict.fromkeys((toward, away))))
        error = {prompt: native_error(model.denoiser, answer, x0, sigma) for prompt, answer in answers.items()}
        advantages.append((error[away] - error[toward]) / (error[away] + error[toward]).clamp(min=1e-12))
    return sum_tensors(advantages) / len(CLASSIFIER_NOISE_LEVELS)


def make_axis_projection(axis: Tensor) -> Callable[[Tensor], Tensor]:
    """x0 (B, C, ...) -> (B,): how far images lie along a difference of images (1 or B, C, ...), in halves of that
    difference."""
    return lambda x0: 2 * (x0 * axis).flatten(1).sum(1) / axis.square().flatten(1).sum(1)


@torch.no_grad()
def measure_strength_curve(
    draw: Callable[[str, float], Tensor],
    scene: str,
    effect: Callable[[Tensor], Tensor],
    *,
    reference: str | None = None,
    preserve: Sequence[str] = (),
    strengths: Sequence[float] = CURVE_STRENGTHS,
    unit: str = RAW_EFFECT_UNIT,
) -> StrengthCurve:
    """The curve of an adapter. `draw(prompt, strength) -> x0 (B, C, ...)` draws from the same noise every time;
    `effect(x0) -> (B,)`. With a `reference`, effect 1 is what its images have at strength 0, and `unit` says so."""
    still = draw(scene, 0.0)
    zero = effect(still).mean()
    whole = torch.ones(()) if reference is None else effect(draw(reference, 0.0)).mean() - zero
    if abs(float(whole)) < MIN_REFERENCE_EFFECT:  # the reference looks like the scene: nothing to compare with
        whole, unit = torch.ones(()), RAW_EFFECT_UNIT
    moved = [still if s == 0 else draw(scene, s) for s in strengths]
    kept = {prompt: draw(prompt, 0.0) for prompt in preserve}
    drifts = [
        relative_drift([(kept[p], draw(p, s)) for p in preserve] or [(still, x0)])
        for s, x0 in zip(strengths, moved, strict=True)
    ]
    effects = tuple(float((effect(x0).mean() - zero) / whole) for x0 in moved)
    return StrengthCurve(tuple(map(float, strengths)), effects, tuple(drifts), unit)


def relative_drift(couples) -> float:
    """Mean distance between two versions of the same images, as a share of what two independent images of the same
    spread differ by."""
    shares = [math.sqrt(float((b - a).square().mean()) / max(2 * float(a.var()), 1e-12)) for a, b in couples]
    return sum(shares) / len(shares)


def row_slider_axis(row: PromptRow, slider: bool = False) -> SliderAxis:
    """What a row changes, for the curve of its adapter: from where to where, and whose images have effect 1."""
    first = row.attributes[0] if row.attributes else ""
    said = lambda prompt: f"{first} {prompt}".strip()
    ends = {
        "slider": (row.effective_positive, row.unconditional, row.effective_positive),
        "erase": (row.effective_neutral, row.effective_positive, row.effective_neutral),
        "enhance": (
            row.effective_positive,
            row.unconditional,
            row.effective_positive if row.effective_positive != row.target else None,
        ),
        "replace": (row.effective_positive, row.target, row.effective_positive),
    }
    toward, away, reference = ends["slider" if slider else row.action]
    return SliderAxis(
        said(row.target), said(toward), said(away), None if reference is None else said(reference), row.preserve
    )
