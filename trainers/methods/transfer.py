"""A LoRA moves from one model to a sibling: on the target, the new one should change predictions as the old one changes
those of its own model. No images are needed.

At latents x of a sampling trajectory the goal is target(x) + source with LoRA(x) - source(x), all as x0. The difference
of the two predictions of one model leaves out what the models themselves differ by, as in ADDifT (hako-mikan 2025) and
LECO; LoRAs were moved by matching outputs on synthetic inputs by Wang et al. 2024 (Trans-LoRA), for language models.

Goals are computed before the training and kept, so that never more than one model is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion import sigmas_at_levels
from ..memory.transfer import copy_like, copy_to_device
from ..protocols import Denoiser
from ..rng import derive_generator
from ..settings import TransferSettings
from .rollouts import (
    LatentPoint,
    PromptTarget,
    PromptTask,
    StudentTeacherModel,
    sample_latent_noise,
    sample_rollout_levels,
)

GOAL = "goal"  # key of an answer, beside those of prompts


def make_transfer_tasks(prompts: Sequence[str], shape: tuple[int, ...], batch: int) -> list[PromptTask]:
    return [PromptTask((PromptTarget(p, ((1.0, GOAL),)),), p, "", 1.0, (shape,), batch) for p in prompts]


@torch.no_grad()
def sample_transfer_points(
    model: StudentTeacherModel,
    schedule: Denoiser,
    tasks: list[PromptTask],
    settings: TransferSettings,
    guidance: float,
    seed: int,
    tick: Callable[[], None],
) -> list[LatentPoint]:
    """Points on trajectories of this model at noise levels of `schedule`, the target; on the CPU, without answers.
    `tick()` is called before each trajectory and may raise."""
    points = []
    for number in range(settings.trajectories):
        tick()
        rng, task = derive_generator(seed, number), tasks[number % len(tasks)]
        noise = sample_latent_noise((task.batch, *task.shapes[0]), model.denoiser, rng)
        levels = transfer_levels(settings, task.batch, rng)
        sigmas = copy_like(sigmas_at_levels(schedule, levels), noise)
        way = model.rollout_student(noise, sigmas, task, 1.0, guidance)
        points += [LatentPoint(number % len(tasks), x.cpu(), sigma.cpu()) for x, sigma in way]
    return points


def transfer_levels(settings: TransferSettings, batch: int, rng) -> Tensor:
    """(S, B) levels from 1, pure noise, down: those of a few-step model, or anywhere in as many intervals."""
    if settings.few_steps:
        return (1 - torch.arange(settings.few_steps) / settings.few_steps)[:, None].expand(-1, batch)
    return sample_rollout_levels(settings.sampling_steps, batch, 0.0, 1.0, rng)[0]


@torch.no_grad()
def predict_at_points(
    model: StudentTeacherModel, points: list[LatentPoint], tasks: list[PromptTask], guidance: float, tick
) -> list[Tensor]:
    """x0 of this model at each point, under its prompt and this guidance, on the CPU."""
    found = []
    for point in points:
        tick()
        prompt = tasks[point.task].rollout_prompt
        device = model.denoiser.model_space(torch.zeros(1, *tasks[point.task].shapes[0])).device
        x, sigma = copy_to_device(point.x, device), copy_to_device(point.sigma, device)
        asked = (prompt,) if guidance == 1 else (prompt, "")
        answers = model.predict_teacher(x, sigma, tuple(dict.fromkeys(asked)))
        away = answers[asked[-1]]
        found.append((away + guidance * (answers[prompt] - away)).float().cpu())
    return found


def with_goals(points, tasks, before: list[Tensor], after: list[Tensor], target: list[Tensor]) -> list[LatentPoint]:
    """The points with the frozen target's prediction and the goal. before, after: the source without and with its
    LoRA."""
    return [
        replace(point, answers={tasks[point.task].rollout_prompt: own, GOAL: own + (b - a)})
        for point, a, b, own in zip(points, before, after, target, strict=True)
    ]


class TransferPoints:
    """Points that were made before: each comes once in an epoch, in mixed order."""

    def __init__(self, model: StudentTeacherModel, points: list[LatentPoint]):
        self.model, self.points = model, points
        self.seed, self.position, self.epoch = 0, 0, 0

    def draw(self, rng) -> LatentPoint:
        if self.position % len(self.points) == 0:
            self.seed, self.epoch = int(torch.randint(2**62, (1,), generator=rng)), self.epoch + 1
        order = torch.randperm(len(self.points), generator=torch.Generator().manual_seed(self.seed))
        point = self.points[int(order[self.position % len(self.points)])]
        self.position += 1
        move = self.model.to_device
        answers = {name: move(answer) for name, answer in point.answers.items()}
        return LatentPoint(point.task, move(point.x), move(point.sigma), answers, trained=self.epoch > 1)

    def state(self) -> dict:
        return {
            "seed": self.seed,
            "position": self.position,
            "epoch": self.epoch,
            "spent": dict(self.model.forward_counts),
        }

    def load_state(self, state: dict) -> None:
        self.seed, self.position, self.epoch = state["seed"], state["position"], state["epoch"]
        self.model.forward_counts = dict(state["spent"])


# -- kept in the run's folder ------------------------------------------------------------------------------------------


def points_to_tensors(points: list[LatentPoint], tasks: list[PromptTask]) -> dict[str, Tensor]:
    own = [tasks[point.task].rollout_prompt for point in points]
    return {
        "task": torch.tensor([point.task for point in points]),
        "x": torch.stack([point.x for point in points]),
        "sigma": torch.stack([point.sigma for point in points]),
        "target": torch.stack([point.answers[prompt] for point, prompt in zip(points, own, strict=True)]),
        GOAL: torch.stack([point.answers[GOAL] for point in points]),
    }


def points_from_tensors(found: dict[str, Tensor], tasks: list[PromptTask]) -> list[LatentPoint]:
    parts = zip(*(found[name] for name in ("task", "x", "sigma", "target", GOAL)), strict=True)
    return [
        LatentPoint(int(task), x, sigma, {tasks[int(task)].rollout_prompt: own, GOAL: goal})
        for task, x, sigma, own, goal in parts
    ]
