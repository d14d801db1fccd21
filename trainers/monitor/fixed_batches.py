"""Fixed questions of methods that learn differences: held-out pairs of images, and points where the frozen model's
answers are the goal.

As with images (validation.py), the same is asked at the same noise levels under the same noise each time. The
forwards spent here are no cost of the training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data.encoded import Batch, EncodedDataset
from ..diffusion import Denoiser, NoiseLevelDensity, cpu_randn_like, stratified_sigmas
from ..methods.image_pairs import ImagePairTraining
from ..methods.prompts import PromptDifferenceTraining
from ..methods.rollouts import (
    LatentPoint,
    PromptTask,
    RolloutPoints,
    StudentTeacherModel,
    add_teacher_predictions,
    sample_latent_noise,
)
from ..settings import NoiseSettings, PointSettings, compute_fingerprint
from .validation import take_evenly, validation_rng


def strip_noise_weighting(noise: NoiseSettings) -> NoiseSettings:
    """The noise levels of these settings, without weights and other noise."""
    return NoiseSettings(min_time=noise.min_time, max_time=noise.max_time)


# -- pairs -------------------------------------------------------------------------------------------------------------


@dataclass
class PairValidationLoss:
    """Pairs that are asked as a method of pairs (methods/pairs.py) asks them. `picks` are numbers of its pairs."""

    method: ImagePairTraining  # over the pairs that are measured: see build_pair_validation
    picks: list[int]
    levels: int = 8
    batch: int = 1
    noun, where = "pairs", "on fixed training pairs"

    @property
    def key(self) -> str:
        m = self.method
        return compute_fingerprint(
            m.fingerprint_name,
            m.data.fingerprint,
            self.picks,
            self.levels,
            m.noise,
            m.density.fingerprint(),
            getattr(m, "strength", 0.0),
        )

    @torch.no_grad()
    def losses(self, tick: Callable[[], None] = lambda: None) -> Tensor:
        """(pairs, levels) native losses, the mean over the sides, unweighted, on the CPU."""
        return torch.stack([self.pair_losses(self.method.items[pick], tick) for pick in self.picks])

    def pair_losses(self, pair, tick) -> Tensor:
        return torch.stack([self.losses_at_strength(pair, size, tick) for size in pair.magnitudes]).mean(0)

    def losses_at_strength(self, pair, size, tick) -> Tensor:
        """(levels,) of the two sides at one size of strength."""
        sides = self.side_batches(pair, size)
        x0 = [self.method.denoiser.model_space(batch.x0) for _, batch in sides]
        sigmas = self.sigmas(x0[0])
        noise = torch.cat(
            [cpu_randn_like(x0[0], validation_rng("noise", pair.name, level)) for level in range(self.levels)]
        )
        parts = []
        for at in torch.arange(self.levels).split(self.batch):
            tick()
            wide = [(strength, expand_batch(batch, len(at))) for strength, batch in sides]
            many = [clean.expand(len(at), *clean.shape[1:]) for clean in x0]
            losses = self.method.side_losses(wide, many, noise[at.to(noise.device)], sigmas[at.to(sigmas.device)])
            parts.append(losses.view(len(sides), len(at)).mean(0))
        return torch.cat(parts).float().cpu()

    def side_batches(self, pair, size) -> list[tuple[float, Batch]]:
        """[(strength, batch of one)], all drawn with the same noise."""
        strengths = [strength for strength in pair.strengths if abs(strength) == size]
        return [
            (s, self.method.data.make_batch([pair.index_by_strength[s]], validation_rng("pair", pair.name)))
            for s in strengths
        ]

    def sigmas(self, x0) -> Tensor:
        return stratified_sigmas(
            self.method.denoiser,
            self.method.density,
            x0,
            self.levels,
            self.method.noise.min_time,
            self.method.noise.max_time,
        )

    def first_sigmas(self) -> list[float]:
        pair = self.method.items[self.picks[0]]
        return self.sigmas(
            self.method.denoiser.model_space(self.side_batches(pair, pair.magnitudes[0])[0][1].x0)
        ).tolist()

    def describe_sample(self, pick: int) -> dict:
        """What a person knows the pair by: its positive side."""
        pair = self.method.items[pick]
        item = self.method.data.items[pair.index_by_strength[pair.strengths[0]]]
        return {"image": item.path or pair.name, "caption": item.captions[0] if item.captions else ""}


def build_pair_validation(method, data: EncodedDataset, count: int, levels: int, batch: int) -> PairValidationLoss:
    """At most `count` pairs of `data`, asked as `method` asks its own."""
    asking = replace(method, data=replace(data, dropout=0.0), noise=strip_noise_weighting(method.noise), batch=1)
    return PairValidationLoss(asking, take_evenly(range(len(asking.items)), count), levels, batch)


def expand_batch(batch: Batch, count: int) -> Batch:
    """One sample as a batch of so many."""
    mask = None if batch.mask is None else batch.mask.expand(count, *batch.mask.shape[1:])
    return replace(batch, x0=batch.x0.expand(count, *batch.x0.shape[1:]), conds=batch.conds * count, mask=mask)


# -- points ------------------------------------------------------------------------------------------------------------


@dataclass
class PointValidationLoss:
    """The targets of a prompt difference (methods/prompts.py) at points that never change. `points(row)` gives those of
    one row, from clean to noisy; what the frozen model says there is asked once and kept."""

    method: PromptDifferenceTraining  # whose forwards are counted apart: see with_separate_counts
    points: Callable[[int], LatentPoint]  # (row) -> x (levels, C, ...) at sigma (levels,)
    picks: list[int]
    key: str
    batch: int = 1
    noun, where = "points", "at fixed points"
    answered_rows: dict[int, list[LatentPoint]] = field(default_factory=dict)

    @torch.no_grad()
    def losses(self, tick: Callable[[], None] = lambda: None) -> Tensor:
        """(rows, levels) the mean over the targets, on the CPU."""
        return torch.stack(
            [
                torch.cat([self.point_losses(point, tick) for point in self.points_with_answers(row, tick)])
                for row in self.picks
            ]
        )

    def point_losses(self, point: LatentPoint, tick) -> Tensor:
        tick()
        targets = self.method.tasks[point.task].targets
        return torch.stack([self.method.target_loss(target, point) for target in targets]).mean(0).float().cpu()

    def points_with_answers(self, row: int, tick) -> list[LatentPoint]:
        if row not in self.answered_rows:
            tick()
            self.answered_rows[row] = [
                self.answer_point(part, tick) for part in split_point(self.points(row), self.batch)
            ]
        return self.answered_rows[row]

    def answer_point(self, point: LatentPoint, tick) -> LatentPoint:
        tick()
        return add_teacher_predictions(self.method.model, point, self.method.tasks[point.task])

    @torch.no_grad()
    def first_sigmas(self) -> list[float]:
        return torch.cat([point.sigma for point in self.points_with_answers(self.picks[0], lambda: None)]).tolist()


def split_point(point: LatentPoint, batch: int) -> list[LatentPoint]:
    return [
        replace(point, x=x, sigma=sigma)
        for x, sigma in zip(point.x.split(batch), point.sigma.split(batch), strict=True)
    ]


def with_separate_counts(method):
    """The same Difference, whose forwards are not counted with those of the training."""
    return replace(method, model=replace(method.model, forward_counts=dict(method.model.forward_counts)), points=None)


def build_point_validation(method, points, rows: int, batch: int, *about) -> PointValidationLoss:
    """`about`: what the points depend on, besides the prompts."""
    targets = [
        [target.prompt, target.weighted_prompts, target.strength, target.weight]
        for task in method.tasks
        for target in task.targets
    ]
    return PointValidationLoss(
        method, points, list(range(rows)), compute_fingerprint(targets, method.renormalise, rows, *about), batch
    )


def row_task_index(row: int, tasks: list[PromptTask]) -> int:
    return row % len(tasks)


def points_on_rollouts(
    model: StudentTeacherModel,
    tasks: list[PromptTask],
    settings: PointSettings,
    noise: NoiseSettings,
    guidance: float,
    levels: int,
):
    """points(row) on a trajectory of the frozen model from noise that belongs to the row."""
    rollouts = RolloutPoints(model, [replace(task, batch=1) for task in tasks], settings, noise, guidance)

    @torch.no_grad()
    def points(row):
        number = row_task_index(row, tasks)
        shapes = tasks[number].shapes
        start = sample_latent_noise(
            (1, *shapes[row // len(tasks) % len(shapes)]), model.denoiser, validation_rng("way", row)
        )
        trajectory = take_evenly(rollouts.rollout_from_noise(number, start, 0.0, validation_rng("levels")), levels)[
            ::-1
        ]
        return LatentPoint(
            number, torch.cat([point.x for point in trajectory]), torch.cat([point.sigma for point in trajectory])
        )

    return points


def points_on_images(
    denoiser: Denoiser,
    tasks: list[PromptTask],
    data: EncodedDataset,
    density: NoiseLevelDensity,
    noise: NoiseSettings,
    levels: int,
    picks,
):
    """points(row) on an image, noised."""
    data = replace(data, dropout=0.0)

    def points(row):
        item = data.items[picks[row]]
        x0 = denoiser.model_space(data.make_batch([picks[row]], validation_rng("picture", item.id)).x0)
        sigma = stratified_sigmas(denoiser, density, x0, levels, noise.min_time, noise.max_time)
        seen = torch.cat([cpu_randn_like(x0, validation_rng("noise", item.id, level)) for level in range(levels)])
        return LatentPoint(row_task_index(row, tasks), denoiser.noised(x0.expand_as(seen), seen, sigma), sigma)

    return points


def points_on_noise(denoiser: Denoiser, tasks: list[PromptTask], noise: NoiseSettings, levels: int):
    """points(row) of pure noise."""

    def points(row):
        number = row_task_index(row, tasks)
        one = sample_latent_noise((1, *tasks[number].shapes[0]), denoiser, validation_rng("way", row))
        low, high = noise.min_time, noise.max_time
        sigma = denoiser.sigma_at(low + (high - low) * (torch.arange(levels) + 0.5) / levels).to(one)
        seen = one.expand(levels, *one.shape[1:])
        return LatentPoint(number, denoiser.noised(torch.zeros_like(seen), seen, sigma), sigma)

    return points
