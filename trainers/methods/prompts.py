"""The adapter at a strength is pulled to what the same frozen model says under other prompts: LECO, sliders from text, replacement.

Every kind is a list of pulls. All answers are x0; a sum of answers whose weights add up to 1 is the same statement about x0, the noise,
v and the velocity, so one formula serves every family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data.prompts import PromptRow
from ..diffusion import native_error, per_sample, slope
from .rollouts import Model, Pull, Task


@dataclass
class Difference:
    """`points.draw(rng)` gives states and the frozen model's answers there."""

    model: Model
    tasks: list[Task]
    points: object
    renormalise: bool = False

    def parameters(self):
        return list(self.model.adapters.parameters())

    def state(self):
        return self.points.state()

    def load_state(self, state):
        self.points.load_state(state)

    def loss(self, rng):
        """(pulls * B,) native error between the student and its goal."""
        point = self.points.draw(rng)
        with self.model.adapters.dropping(rng):
            return torch.cat([self.pulled(pull, point) for pull in self.tasks[point.task].pulls])

    def pulled(self, pull: Pull, point):
        goal = sum(weight * point.answers[prompt] for weight, prompt in pull.goal)
        if self.renormalise:
            goal = as_strong_as(point.answers[pull.goal[0][1]], goal, point)
        student = self.model.student(point.x, point.sigma, pull.prompt, pull.strength)
        return pull.weight * native_error(self.model.denoiser, student, goal, point.sigma)


def as_strong_as(answer, goal, point):
    """The goal with the mean and deviation of the answer's slope, per sample: large guidance then turns, and does not oversaturate."""
    want, have = slope(point.x, point.sigma, answer), slope(point.x, point.sigma, goal)
    axes = tuple(range(1, want.ndim))
    mean, std = want.mean(axes, keepdim=True), want.std(axes, keepdim=True)
    turned = (have - have.mean(axes, keepdim=True)) / have.std(axes, keepdim=True).clamp(min=1e-12) * std + mean
    return point.x - turned * per_sample(point.sigma, point.x)


# -- the kinds --------------------------------------------------------------------------------------------------------------


def leco(target, positive, neutral, unconditional, action="erase", guidance=1.0, weight=1.0) -> tuple[Pull, ...]:
    """target -> neutral - g * (positive - unconditional) to erase, + to enhance (Gandikota et al. 2023; p1atdev/LECO)."""
    return (Pull(target, expression(neutral, side(action) * guidance, positive, unconditional), 1.0, weight),)


def text_slider(target, positive, negative, guidance=1.0, weight=1.0) -> tuple[Pull, ...]:
    """target at +1 -> target + g * (positive - negative); at -1 the other way (Gandikota et al. 2024, Concept Sliders)."""
    return tuple(Pull(target, expression(target, sign * guidance, positive, negative), sign, weight) for sign in (1.0, -1.0))


def keep(prompt, strengths=(1.0,), weight=1.0) -> tuple[Pull, ...]:
    """What must not move: the prompt stays at the frozen model's own answer."""
    return tuple(Pull(prompt, ((1.0, prompt),), strength, weight) for strength in strengths)


def replace(target, positive, weight=1.0) -> tuple[Pull, ...]:
    """target -> positive: one concept becomes another."""
    return (Pull(target, ((1.0, positive),), 1.0, weight),)


def side(action: str) -> float:
    return {"enhance": 1.0, "erase": -1.0}[action]


def expression(base, factor, plus, minus) -> tuple[tuple[float, str], ...]:
    """base + factor * (plus - minus), with the weights of equal prompts added up; the base comes first, also at weight 0."""
    weights = {base: 1.0}
    for prompt, weight in ((plus, factor), (minus, -factor)):
        weights[prompt] = weights.get(prompt, 0.0) + weight
    return tuple((weight, prompt) for prompt, weight in weights.items() if weight or prompt == base)


# -- from rows of prompts ------------------------------------------------------------------------------------------------------


def tasks_of(rows: Sequence[PromptRow], shapes: Callable, slider: bool = False, kept: float = 1.0) -> list[Task]:
    """The tasks of prompt rows. `shapes(row)` gives the latent shapes of a row. A row with attributes becomes one task for each of them.
    What a row preserves is drawn `kept` times as often as the row itself, at states of its own.

    Raises ValueError when a row's goal is what the model says already."""
    tasks = []
    for row in rows:
        pulls, drawn = (slider_pulls if slider else row_pulls), dict(shapes=tuple(shapes(row)), batch=row.batch)
        for attribute in row.attributes or ("",):
            said = lambda prompt, attribute=attribute: f"{attribute} {prompt}".strip()
            found = pulls(row, said)
            refuse_idle(found, row)
            tasks.append(Task(found, said(row.target), row.unconditional if not slider else "", row.weight / max(1, len(row.attributes)), **drawn))
        strengths = sorted({pull.strength for pull in found}, reverse=True)
        tasks += [Task(keep(p, strengths), p, "", kept * row.weight / len(row.preserve), **drawn) for p in row.preserve]
    return tasks


def row_pulls(row: PromptRow, said) -> tuple[Pull, ...]:
    if row.action == "replace":
        return replace(said(row.target), said(row.plus))
    return leco(said(row.target), said(row.plus), said(row.base), said(row.unconditional), row.action, row.guidance)


def slider_pulls(row: PromptRow, said) -> tuple[Pull, ...]:
    return text_slider(said(row.target), said(row.plus), said(row.unconditional), row.guidance)




def refuse_idle(pulls, row):
    if all(dict((prompt, weight) for weight, prompt in pull.goal if abs(weight) > 1e-9) == {pull.prompt: 1.0} for pull in pulls):
        raise ValueError(
            f"{row.target!r}: with action {row.action}, positive {row.plus!r}, neutral {row.base!r}, unconditional {row.unconditional!r} and "
            f"guidance {row.guidance:g} the goal is what the model says already, and nothing would be learnt. Raise guidance above 1, or "
            "change one of the prompts."
        )
