"""The adapter at a strength learns to predict what the frozen model predicts under other prompts: LECO, sliders from
text, replacement.

Every kind is a list of targets. All predictions are x0; a sum of predictions whose weights add up to 1 is the same sum
in x0, the noise, v and the velocity, so one formula serves every family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.concept_prompts import PromptRow
from ..diffusion import native_error, per_sample, slope
from ..protocols import PointSource
from .rollouts import LatentPoint, PromptTarget, PromptTask, StudentTeacherModel


@dataclass
class TargetProgress:
    """How far the student has come from the frozen model's prediction to its goal, at the last points that it had not
    been trained on: the moves along that way over its length, in the network's own terms. It costs no forward.

    Noise levels at which the prompts hardly differ hardly count."""

    window: int = 32  # predictions
    recent: list[Tensor] = field(default_factory=list)  # (2,) each: along the way, and its squared length

    def add(self, moved: Tensor, way: Tensor) -> None:
        """Both (B, ...): what the student changed, and what it should."""
        self.recent = [*self.recent, torch.stack([(moved * way).sum(), way.square().sum()]).float()][-self.window :]

    @property
    def reached(self) -> float | None:
        """0 before training, 1 at the goal; None until half of the window is filled."""
        if len(self.recent) < self.window // 2:
            return None
        along, length = torch.stack(self.recent).sum(0).tolist()
        return along / max(length, 1e-12)


@dataclass
class PromptDifferenceTraining:
    """`points.draw(rng)` gives states and the frozen model's predictions there."""

    model: StudentTeacherModel
    tasks: list[PromptTask]
    points: PointSource[LatentPoint]
    renormalise: bool = False
    progress: TargetProgress = field(default_factory=TargetProgress)

    def parameters(self):
        return list(self.model.adapters.parameters())

    def state(self):
        return {**self.points.state(), "progress": list(self.progress.recent)}

    def load_state(self, state):
        self.points.load_state(state)
        self.progress.recent = [self.model.to_device(pair) for pair in state.get("progress", ())]

    def loss(self, rng):
        """(targets * B,) native error between the student and its goal."""
        point = self.points.draw(rng)
        with self.model.adapters.dropout_active(rng):
            return torch.cat([self.training_loss(target, point) for target in self.tasks[point.task].targets])

    def training_loss(self, target: PromptTarget, point):
        """`target_loss`, whose prediction also tells how far the student has come, where it was not trained before and
        the goal needs the frozen model's prediction under the target itself, so that it costs no forward."""
        goal, student = self.goal(target, point), self.predict_target(target, point)
        if target.prompt in point.answers and not (point.trained or target.is_preserved):
            scale = per_sample(self.model.denoiser.native_scale(point.sigma), point.x)
            before = point.answers[target.prompt]
            self.progress.add((student.detach() - before) / scale, (goal - before) / scale)
        return target.weight * native_error(self.model.denoiser, student, goal, point.sigma)

    def target_loss(self, target: PromptTarget, point):
        student = self.predict_target(target, point)
        return target.weight * native_error(self.model.denoiser, student, self.goal(target, point), point.sigma)

    def predict_target(self, target: PromptTarget, point):
        return self.model.predict_student(point.x, point.sigma, target.prompt, target.strength)

    def goal(self, target: PromptTarget, point):
        goal = sum(weight * point.answers[prompt] for weight, prompt in target.weighted_prompts)
        if self.renormalise:
            goal = match_slope_statistics(point.answers[target.weighted_prompts[0][1]], goal, point)
        return goal


def match_slope_statistics(answer, goal, point):
    """The goal with the mean and deviation of the prediction's slope, per sample: large guidance then changes the
    direction and does not oversaturate."""
    want, have = slope(point.x, point.sigma, answer), slope(point.x, point.sigma, goal)
    axes = tuple(range(1, want.ndim))
    mean, std = want.mean(axes, keepdim=True), want.std(axes, keepdim=True)
    turned = (have - have.mean(axes, keepdim=True)) / have.std(axes, keepdim=True).clamp(min=1e-12) * std + mean
    return point.x - turned * per_sample(point.sigma, point.x)


# -- the kinds ---------------------------------------------------------------------------------------------------------


def make_leco_targets(
    target, positive, neutral, unconditional, action="erase", guidance=1.0, weight=1.0
) -> tuple[PromptTarget, ...]:
    """target -> neutral - g * (positive - unconditional) to erase, + to enhance (Gandikota et al. 2023;
    p1atdev/LECO)."""
    return (
        PromptTarget(
            target,
            combine_guided_prompts(neutral, action_sign(action) * guidance, positive, unconditional),
            1.0,
            weight,
        ),
    )


def make_slider_targets(target, positive, negative, guidance=1.0, weight=1.0) -> tuple[PromptTarget, ...]:
    """target at +1 -> target + g * (positive - negative); at -1 the other way (Gandikota et al. 2024, Concept
    Sliders)."""
    return tuple(
        PromptTarget(target, combine_guided_prompts(target, sign * guidance, positive, negative), sign, weight)
        for sign in (1.0, -1.0)
    )


def make_preserve_targets(prompt, strengths=(1.0,), weight=1.0) -> tuple[PromptTarget, ...]:
    """What must not change: the prompt stays at the frozen model's own prediction."""
    return tuple(PromptTarget(prompt, ((1.0, prompt),), strength, weight) for strength in strengths)


def make_replacement_targets(target, positive, weight=1.0) -> tuple[PromptTarget, ...]:
    """target -> positive: one concept becomes another."""
    return (PromptTarget(target, ((1.0, positive),), 1.0, weight),)


def action_sign(action: str) -> float:
    return {"enhance": 1.0, "erase": -1.0}[action]


def combine_guided_prompts(base, factor, plus, minus) -> tuple[tuple[float, str], ...]:
    """base + factor * (plus - minus), with the weights of equal prompts added up; the base comes first, also at weight
    0."""
    weights = {base: 1.0}
    for prompt, weight in ((plus, factor), (minus, -factor)):
        weights[prompt] = weights.get(prompt, 0.0) + weight
    return tuple((weight, prompt) for prompt, weight in weights.items() if weight or prompt == base)


# -- from rows of prompts ----------------------------------------------------------------------------------------------


def build_prompt_tasks(
    rows: Sequence[PromptRow], shapes: Callable, slider: bool = False, preserve_weight: float = 1.0
) -> list[PromptTask]:
    """The tasks of prompt rows. `shapes(row)` gives the latent shapes of a row. A row with attributes becomes one task
    for each of them. What a row preserves is drawn `preserve_weight` times as often as the row itself, at
    points of its own.

    Raises ValueError when a row's goal is what the model predicts already."""
    tasks = []
    for row in rows:
        make_targets = slider_targets_of_row if slider else leco_targets_of_row
        row_shapes = tuple(shapes(row))
        for attribute in row.attributes or ("",):
            with_attribute = lambda prompt, attribute=attribute: f"{attribute} {prompt}".strip()
            found = make_targets(row, with_attribute)
            check_targets_change(found, row)
            tasks.append(
                PromptTask(
                    found,
                    with_attribute(row.target),
                    row.unconditional if not slider else "",
                    row.weight / max(1, len(row.attributes)),
                    row_shapes,
                    row.batch,
                )
            )
        strengths = sorted({target.strength for target in found}, reverse=True)
        tasks += [
            PromptTask(
                make_preserve_targets(p, strengths),
                p,
                "",
                preserve_weight * row.weight / len(row.preserve),
                row_shapes,
                row.batch,
            )
            for p in row.preserve
        ]
    return tasks


def leco_targets_of_row(row: PromptRow, with_attribute) -> tuple[PromptTarget, ...]:
    if row.action == "replace":
        return make_replacement_targets(with_attribute(row.target), with_attribute(row.effective_positive))
    return make_leco_targets(
        with_attribute(row.target),
        with_attribute(row.effective_positive),
        with_attribute(row.effective_neutral),
        with_attribute(row.unconditional),
        row.action,
        row.guidance,
    )


def slider_targets_of_row(row: PromptRow, with_attribute) -> tuple[PromptTarget, ...]:
    return make_slider_targets(
        with_attribute(row.target),
        with_attribute(row.effective_positive),
        with_attribute(row.unconditional),
        row.guidance,
    )


def check_targets_change(targets, row):
    if all(target.is_preserved for target in targets):
        raise ValueError(
            f"{row.target!r}: with action {row.action}, positive {row.effective_positive!r}, neutral "
            f"{row.effective_neutral!r}, unconditional {row.unconditional!r} and guidance {row.guidance:g} the "
            "target equals the model's current prediction, so nothing would be learnt. Raise guidance above 1, or "
            "change one of the prompts."
        )
