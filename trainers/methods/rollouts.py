"""Where a difference between prompts is learnt: states x on sampling trajectories, and the frozen model's predictions
there.

LECO (p1atdev/LECO) samples a trajectory for every update and uses one of its states. Here every state of a trajectory
is a point, the frozen model's predictions at a point are computed once and kept, and the oldest trajectory is resampled
by the current student every so often, so that the points stay near those that the student itself would reach.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapters.adapters import Adapters
from ..data.cache import map_tensors
from ..data.encoded import BucketBatchSampler, EncodedDataset
from ..diffusion import (
    Denoiser,
    NoiseLevelDensity,
    cpu_randn_like,
    resolve_noise_density,
    rollout,
    sample_sigmas,
    sigmas_at_levels,
)
from ..memory.transfer import copy_like, copy_to_device
from ..settings import NoiseSettings, PointSettings


@dataclass(frozen=True)
class PromptTarget:
    """The student under `prompt` at `strength` should predict the sum of weight * the frozen model's prediction; the
    weights sum to 1."""

    prompt: str
    weighted_prompts: tuple[tuple[float, str], ...]
    strength: float = 1.0
    weight: float = 1.0

    @property
    def is_preserved(self) -> bool:
        """Whether the goal is what the frozen model predicts under this prompt already."""
        weights = {prompt: weight for weight, prompt in self.weighted_prompts if abs(weight) > 1e-9}
        return weights == {self.prompt: 1.0}


@dataclass(frozen=True)
class PromptTask:
    """Targets that are learnt at the same points. `rollout_prompt` is the prompt of the trajectories, `negative_prompt`
    what guidance avoids on them."""

    targets: tuple[PromptTarget, ...]
    rollout_prompt: str
    negative_prompt: str = ""
    weight: float = 1.0  # how often it is drawn, against the other tasks
    shapes: tuple[tuple[int, ...], ...] = ()  # latent shapes (C, ..., h, w), one of which each trajectory has
    batch: int = 1

    @property
    def teacher_prompts(self) -> tuple[str, ...]:
        """The prompts of the frozen model's predictions, each once."""
        return tuple(dict.fromkeys(prompt for target in self.targets for _, prompt in target.weighted_prompts))

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """Every prompt that must be encoded."""
        return tuple(
            dict.fromkeys(
                (
                    *self.teacher_prompts,
                    *(target.prompt for target in self.targets),
                    self.rollout_prompt,
                    self.negative_prompt,
                )
            )
        )


class NoAdapters:
    """In the place of adapters, where only the frozen model predicts."""

    def at_strength(self, strength):
        return contextlib.nullcontext()


@dataclass
class StudentTeacherModel:
    """The student and the frozen model in one: adapters at some strength, and at none. Counts forwards, one per
    sample."""

    denoiser: Denoiser
    adapters: Adapters
    conds: dict  # prompt -> conditioning
    forward_counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("rollout", "frozen", "student"), 0))

    def to_device(self, tensor: Tensor) -> Tensor:
        return copy_to_device(tensor, next(self.adapters.parameters()).device)

    def predict_teacher(self, x, sigma, prompts) -> dict[str, Tensor]:
        """prompt -> x0 (B, ...) without the adapters: all prompts in one call."""
        self.forward_counts["frozen"] += len(prompts) * len(x)
        conds = [self.conds[prompt] for prompt in prompts for _ in range(len(x))]
        with torch.no_grad(), self.adapters.at_strength(0):
            answers = self.denoiser.denoise(torch.cat([x] * len(prompts)), torch.cat([sigma] * len(prompts)), conds)
        return dict(zip(prompts, answers.chunk(len(prompts)), strict=True))

    def predict_student(self, x, sigma, prompt, strength) -> Tensor:
        """x0 (B, ...) with the adapters at this strength, with gradient."""
        self.forward_counts["student"] += len(x)
        with self.adapters.at_strength(strength):
            return self.denoiser.denoise(x, sigma, [self.conds[prompt]] * len(x))

    @torch.no_grad()
    def rollout_student(self, noise, sigmas, task: PromptTask, strength, guidance):
        """[(x, sigma)]: the current student's trajectory from noise (B, ...) along sigmas (S, B)."""
        self.forward_counts["rollout"] += len(noise) * (len(sigmas) - 1) * (1 if guidance == 1 else 2)
        with self.adapters.at_strength(strength):
            return list(
                rollout(
                    self.denoiser,
                    noise,
                    sigmas,
                    self.conds[task.rollout_prompt],
                    self.conds[task.negative_prompt],
                    guidance,
                )
            )


@dataclass(frozen=True)
class LatentPoint:
    """x (B, C, ...) at sigma (B,), and the frozen model's predictions there so far, by prompt."""

    task: int
    x: Tensor
    sigma: Tensor
    answers: dict[str, Tensor] = field(default_factory=dict)
    after: Tensor | None = None  # (B,) the next noise level on the trajectory
    trained: bool = False  # whether an update has used it

    def state(self) -> dict:
        return {
            "task": self.task,
            "x": self.x,
            "sigma": self.sigma,
            "answers": dict(self.answers),
            "after": self.after,
            "trained": self.trained,
        }


def add_teacher_predictions(model: StudentTeacherModel, point: LatentPoint, task: PromptTask) -> LatentPoint:
    """The point with every prediction that its task needs; those it holds already are not computed again."""
    missing = [prompt for prompt in task.teacher_prompts if prompt not in point.answers]
    if not missing:
        return point
    return replace(point, answers={**point.answers, **model.predict_teacher(point.x, point.sigma, missing)})


def sample_task_index(tasks: list[PromptTask], rng) -> int:
    """The number of a task, drawn by weight."""
    return int(torch.multinomial(torch.tensor([task.weight for task in tasks], dtype=torch.float64), 1, generator=rng))


def sample_element(values, rng):
    return values[int(torch.randint(len(values), (1,), generator=rng))]


INITIAL_ROLLOUTS = 2
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def order_by_kind(tasks: list[PromptTask]) -> list[int]:
    """The numbers of the tasks: those of rows, then the first preserved prompt of each row, the second, and so on.

    Dealt in this order each kind gets its share in every part of a run. In the order of the rows the golden ratio may
    meet a multiple of their number: with 48 rows of three preserved prompts each, only one of the three was met."""
    kinds: list[int] = []
    for task in tasks:
        is_preserved = all(target.is_preserved for target in task.targets)
        kinds.append(kinds[-1] + 1 if is_preserved and kinds else 0)
    return sorted(range(len(tasks)), key=kinds.__getitem__)


class RolloutPoints:
    """Points on trajectories that the student samples from noise. It begins with two; every `refresh` updates one more
    is sampled, and of more than `ways` the oldest goes. (All at once at the beginning would cost as much as forty
    updates, and soon be off-policy.)

    `dealt`: tasks come evenly by weight, the first update is of the first one; otherwise each is drawn at random."""

    def __init__(
        self,
        model: StudentTeacherModel,
        tasks: list[PromptTask],
        settings: PointSettings,
        noise: NoiseSettings,
        guidance: float,
        dealt: bool = False,
    ):
        self.model, self.tasks, self.settings, self.guidance = model, tasks, settings, guidance
        self.dealt = dealt and len(tasks) > 1
        self.deal_order = order_by_kind(tasks)
        self.low, self.high = noise.min_time, noise.max_time
        self.rollouts: list[list[LatentPoint]] = []
        self.updates = 0
        self.task_position: float | None = None  # in [0, 1), of the last trajectory's task among all by weight

    def draw(self, rng) -> LatentPoint:
        """A random point with every prediction that its task needs."""
        if not self.rollouts:
            self.rollouts = [self.rollout_sampled_task(rng) for _ in range(min(INITIAL_ROLLOUTS, self.settings.ways))]
        elif self.updates % self.settings.refresh == 0:
            self.rollouts = [*self.rollouts, self.rollout_sampled_task(rng)][-self.settings.ways :]
        self.updates += 1
        trajectory = int(torch.randint(len(self.rollouts), (1,), generator=rng))
        if self.dealt and self.updates == 1:
            trajectory = 0  # of the first row: on a preserved prompt an adapter that is still zero learns nothing
        step = int(torch.randint(len(self.rollouts[trajectory]), (1,), generator=rng))
        point = self.rollouts[trajectory][step]
        point = add_teacher_predictions(self.model, point, self.tasks[point.task])
        kept = replace_element(self.rollouts[trajectory], step, replace(point, trained=True))
        self.rollouts = replace_element(self.rollouts, trajectory, kept)
        return point

    def rollout_sampled_task(self, rng) -> list[LatentPoint]:
        """The points of a new trajectory whose noise levels are trained."""
        number = self.deal_task_index(rng) if self.dealt else sample_task_index(self.tasks, rng)
        task = self.tasks[number]
        strength = sample_element(sorted({target.strength for target in task.targets}), rng)
        return self.rollout_from_noise(
            number,
            sample_latent_noise((task.batch, *sample_element(task.shapes, rng)), self.model.denoiser, rng),
            strength,
            rng,
        )

    def deal_task_index(self, rng) -> int:
        """Tasks by weight, dealt evenly: a run has few trajectories, and drawn at random some runs would see a third
        of them on what matters. Steps of the golden ratio through the cumulated weights, from a random start
        within the first task (an additive recurrence; Kronecker sequence), in the order of `order_by_kind`."""
        edges = torch.tensor([self.tasks[number].weight for number in self.deal_order], dtype=torch.float64).cumsum(0)
        if self.task_position is None:
            self.task_position = float(torch.rand((), generator=rng, dtype=torch.float64) * edges[0] / edges[-1])
        else:
            self.task_position = (self.task_position + GOLDEN_RATIO) % 1
        place = torch.tensor(self.task_position, dtype=torch.float64) * edges[-1]
        return self.deal_order[min(int(torch.searchsorted(edges, place, right=True)), len(self.tasks) - 1)]

    def rollout_from_noise(self, number: int, noise: Tensor, strength: float, rng) -> list[LatentPoint]:
        """The same from given noise (B, ...), for one task; rng draws the noise levels."""
        task = self.tasks[number]
        levels, wanted = sample_rollout_levels(self.settings.sampling_steps, len(noise), self.low, self.high, rng)
        sigmas, after = (
            copy_like(sigmas_at_levels(self.model.denoiser, u), noise)
            for u in (levels, (levels - 1 / self.settings.sampling_steps).clamp(min=0))
        )
        trajectory = self.model.rollout_student(noise, sigmas, task, strength, self.guidance)
        return [
            LatentPoint(number, x, sigma, after=then)
            for (x, sigma), then, good in zip(trajectory, after, wanted, strict=True)
            if good
        ]

    def state(self) -> dict:
        return {
            "updates": self.updates,
            "task_position": self.task_position,
            "ways": [[point.state() for point in trajectory] for trajectory in self.rollouts],
            "spent": dict(self.model.forward_counts),
        }

    def load_state(self, state: dict) -> None:
        self.updates, self.model.forward_counts = state["updates"], dict(state["spent"])
        self.task_position = state.get("task_position")
        self.rollouts = [
            [LatentPoint(**map_tensors(point, self.model.to_device)) for point in trajectory]
            for trajectory in state["ways"]
        ]


def count_planned_forwards(
    settings: PointSettings,
    tasks: list[PromptTask],
    noise: NoiseSettings,
    guidance: float,
    updates: int,
    batch: int = 1,
) -> dict[str, float]:
    """Forwards that so many updates are expected to cost, by the keys of `StudentTeacherModel.forward_counts`. `batch`:
    of image points; other points have that of their task. Images and noise are new each time, and so are the frozen
    model's predictions.

    A rollout costs steps - 1 forwards a sample, twice that under guidance. Of its points, only those that are drawn
    while it is kept cost the frozen model's predictions, once each."""
    total = sum(task.weight for task in tasks)
    size = lambda task: batch if settings.points == "pictures" else task.batch
    mean = lambda count: sum(task.weight * size(task) * count(task) for task in tasks) / total
    if settings.points != "rollout":
        return {
            "frozen": updates * mean(lambda task: len(task.teacher_prompts)),
            "student": updates * mean(lambda task: len(task.targets)),
        }
    points = sum(
        sample_rollout_levels(
            settings.sampling_steps, 1, noise.min_time, noise.max_time, torch.Generator().manual_seed(0)
        )[1]
    )
    lives = rollout_lifetimes(settings.ways, settings.refresh, updates)
    missed = lambda life: math.prod((1 - 1 / (ways * points)) ** draws for ways, draws in life)
    return {
        "rollout": len(lives) * (settings.sampling_steps - 1) * (1 if guidance == 1 else 2) * mean(lambda task: 1),
        "frozen": sum(points * (1 - missed(life)) for life in lives) * mean(lambda task: len(task.teacher_prompts)),
        "student": updates * mean(lambda task: len(task.targets)),
    }


def rollout_lifetimes(ways, refresh, updates) -> list[list[tuple[int, int]]]:
    """For each trajectory sampled in so many updates: [(trajectories at the same time, draws)] while it is kept."""
    first = min(INITIAL_ROLLOUTS, ways)
    eras = [
        (min(ways, first + era), min(refresh, updates - era * refresh)) for era in range(math.ceil(updates / refresh))
    ]
    born = [0] * first + list(range(1, len(eras)))
    gone = born[ways:] + [len(eras)] * ways
    return [eras[a:b] for a, b in zip(born, gone, strict=False)]


def sample_rollout_levels(steps, batch, low, high, rng):
    """((S, B) levels from 1, pure noise, down to `low`; [S] whether each is at most `high`). Each level lies anywhere
    in its own interval, so that in time every level is met; the last one is always trained, however narrow the band."""
    edges = 1 - (1 - low) * torch.arange(steps) / (steps - 1)
    upper, lower = edges[:-1].clone(), edges[1:]
    upper[-1] = min(float(upper[-1]), high)
    inner = lower[:, None] + (upper - lower)[:, None] * torch.rand(steps - 1, batch, generator=rng)
    return torch.cat([torch.ones(1, batch), inner]), [high == 1, *(float(top) <= high + 1e-6 for top in upper)]


def sample_latent_noise(shape, denoiser, rng) -> Tensor:
    """(B, C, ..., h, w) normal noise as the model sees latents of this shape."""
    return cpu_randn_like(denoiser.model_space(torch.zeros(shape)), rng)


class ImagePoints:
    """Points on images of a dataset, freshly noised: no trajectory is sampled, and nothing is kept."""

    def __init__(
        self,
        model: StudentTeacherModel,
        tasks: list[PromptTask],
        data: EncodedDataset,
        noise: NoiseSettings,
        density: NoiseLevelDensity,
        batch: int,
    ):
        self.model, self.tasks, self.data, self.noise = model, tasks, data, noise
        self.density, self.deck = resolve_noise_density(noise, density), BucketBatchSampler(data, batch)

    def draw(self, rng) -> LatentPoint:
        x0 = self.model.denoiser.model_space(self.data.make_batch(self.deck.next_batch(rng), rng).x0)
        sigma = sample_sigmas(self.model.denoiser, self.density, x0, rng, self.noise.min_time, self.noise.max_time)
        number = sample_task_index(self.tasks, rng)
        x = self.model.denoiser.noised(x0, cpu_randn_like(x0, rng), sigma)
        return add_teacher_predictions(self.model, LatentPoint(number, x, sigma), self.tasks[number])

    def state(self) -> dict:
        return {"deck": self.deck.state(), "spent": dict(self.model.forward_counts)}

    def load_state(self, state: dict) -> None:
        self.deck.load_state(state["deck"])
        self.model.forward_counts = dict(state["spent"])


class NoisePoints:
    """Points of fresh pure noise: the cheapest, and only right at high noise levels (iLECO of hako-mikan's
    sd-webui-traintrain, which draws its noise once and uses it at every level)."""

    def __init__(self, model: StudentTeacherModel, tasks: list[PromptTask], noise: NoiseSettings):
        self.model, self.tasks, self.noise = model, tasks, noise

    def draw(self, rng) -> LatentPoint:
        number = sample_task_index(self.tasks, rng)
        task = self.tasks[number]
        noise = sample_latent_noise((task.batch, *sample_element(task.shapes, rng)), self.model.denoiser, rng)
        low, high = self.noise.min_time, self.noise.max_time
        levels = low + (high - low) * torch.rand(task.batch, generator=rng)
        sigma = copy_like(self.model.denoiser.sigma_at(levels), noise)
        return add_teacher_predictions(
            self.model,
            LatentPoint(number, self.model.denoiser.noised(torch.zeros_like(noise), noise, sigma), sigma),
            task,
        )

    def state(self) -> dict:
        return {"spent": dict(self.model.forward_counts)}

    def load_state(self, state: dict) -> None:
        self.model.forward_counts = dict(state["spent"])


def replace_element(values: list, index: int, value) -> list:
    """A new list; states that were taken before keep theirs."""
    return [*values[:index], value, *values[index + 1 :]]
