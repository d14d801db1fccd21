"""Fixed questions of methods that learn differences: held-out pairs of pictures, and points where the frozen model's answers are the goal.

As with pictures (validation.py), the same is asked at the same noise levels under the same noise each time. The forwards spent here are no
cost of the training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data.encoded import Batch, Encoded
from ..diffusion import Denoiser, Density, fixed_sigmas, randn_like
from ..methods.rollouts import Model, Point, Rollouts, Task, answered, noise_of
from ..settings import NoiseSettings, PointSettings, fingerprint
from .validation import chance, spread


def plainly(noise: NoiseSettings) -> NoiseSettings:
    """The noise levels of these settings, without weights and other noise."""
    return NoiseSettings(min_time=noise.min_time, max_time=noise.max_time)


# -- pairs --------------------------------------------------------------------------------------------------------------------------


@dataclass
class PairExam:
    """Pairs that are asked as a method of pairs (methods/pairs.py) asks them. `picks` are numbers of its pairs."""

    method: object  # over the pairs that are asked: see pair_exam
    picks: list[int]
    levels: int = 8
    batch: int = 1
    noun, where = "pairs", "on fixed training pairs"

    @property
    def key(self) -> str:
        m = self.method
        density = [m.density.kind, m.density.mean, m.density.std, m.density.shift]
        return fingerprint(type(m).__name__, m.data.fingerprint, self.picks, self.levels, m.noise, density, getattr(m, "strength", 0.0))

    @torch.no_grad()
    def losses(self, tick: Callable[[], None] = lambda: None) -> Tensor:
        """(pairs, levels) native losses, the mean over the sides, unweighted, on the CPU."""
        return torch.stack([self.of(self.method.items[pick], tick) for pick in self.picks])

    def of(self, pair, tick) -> Tensor:
        return torch.stack([self.graded(pair, size, tick) for size in pair.sizes]).mean(0)

    def graded(self, pair, size, tick) -> Tensor:
        """(levels,) of the two sides at one size of strength."""
        sides = self.sides(pair, size)
        x0 = [self.method.denoiser.model_space(batch.x0) for _, batch in sides]
        sigmas = self.sigmas(x0[0])
        noise = torch.cat([randn_like(x0[0], chance("noise", pair.name, level)) for level in range(self.levels)])
        parts = []
        for at in torch.arange(self.levels).split(self.batch):
            tick()
            wide = [(strength, widened(batch, len(at))) for strength, batch in sides]
            many = [clean.expand(len(at), *clean.shape[1:]) for clean in x0]
            losses = self.method.compared(wide, many, noise[at.to(noise.device)], sigmas[at.to(sigmas.device)])
            parts.append(losses.view(len(sides), len(at)).mean(0))
        return torch.cat(parts).float().cpu()

    def sides(self, pair, size) -> list[tuple[float, Batch]]:
        """[(strength, batch of one)], all with the same luck."""
        strengths = [strength for strength in pair.strengths if abs(strength) == size]
        return [(s, self.method.data.batch([pair.at[s]], chance("pair", pair.name))) for s in strengths]

    def sigmas(self, x0) -> Tensor:
        return fixed_sigmas(self.method.denoiser, self.method.density, x0, self.levels, self.method.noise.min_time, self.method.noise.max_time)

    def sigmas_of_first(self) -> list[float]:
        pair = self.method.items[self.picks[0]]
        return self.sigmas(self.method.denoiser.model_space(self.sides(pair, pair.sizes[0])[0][1].x0)).tolist()

    def named(self, pick: int) -> dict:
        """What a person knows the pair by: its positive side."""
        pair = self.method.items[pick]
        item = self.method.data.items[pair.at[pair.strengths[0]]]
        return {"image": item.path or pair.name, "caption": item.captions[0] if item.captions else ""}


def pair_exam(method, data: Encoded, count: int, levels: int, batch: int) -> PairExam:
    """At most `count` pairs of `data`, asked as `method` asks its own."""
    asking = replace(method, data=replace(data, dropout=0.0), noise=plainly(method.noise), batch=1)
    return PairExam(asking, spread(range(len(asking.items)), count), levels, batch)


def widened(batch: Batch, count: int) -> Batch:
    """One sample as a batch of so many."""
    mask = None if batch.mask is None else batch.mask.expand(count, *batch.mask.shape[1:])
    return replace(batch, x0=batch.x0.expand(count, *batch.x0.shape[1:]), conds=batch.conds * count, mask=mask)


# -- points -------------------------------------------------------------------------------------------------------------------------


@dataclass
class PointExam:
    """The pulls of a Difference (methods/difference.py) at points that never change. `points(row)` gives those of one row, from clean to
    noisy; what the frozen model says there is asked once and kept."""

    method: object  # with a Model whose counts are nobody's: see asking
    points: Callable[[int], Point]  # (row) -> x (levels, C, ...) at sigma (levels,)
    picks: list[int]
    key: str
    batch: int = 1
    noun, where = "points", "at fixed points"
    known: dict[int, list[Point]] = field(default_factory=dict)

    @torch.no_grad()
    def losses(self, tick: Callable[[], None] = lambda: None) -> Tensor:
        """(rows, levels) the mean over the pulls, on the CPU."""
        return torch.stack([torch.cat([self.of(point, tick) for point in self.row(row, tick)]) for row in self.picks])

    def of(self, point: Point, tick) -> Tensor:
        tick()
        pulls = self.method.tasks[point.task].pulls
        return torch.stack([self.method.pulled(pull, point) for pull in pulls]).mean(0).float().cpu()

    def row(self, row: int, tick) -> list[Point]:
        if row not in self.known:
            tick()
            self.known[row] = [self.asked(part, tick) for part in parts(self.points(row), self.batch)]
        return self.known[row]

    def asked(self, point: Point, tick) -> Point:
        tick()
        return answered(self.method.model, point, self.method.tasks[point.task])

    @torch.no_grad()
    def sigmas_of_first(self) -> list[float]:
        return torch.cat([point.sigma for point in self.row(self.picks[0], lambda: None)]).tolist()


def parts(point: Point, batch: int) -> list[Point]:
    return [replace(point, x=x, sigma=sigma) for x, sigma in zip(point.x.split(batch), point.sigma.split(batch), strict=True)]


def asking(method):
    """The same Difference, whose forwards are not counted with those of the training."""
    return replace(method, model=replace(method.model, spent=dict(method.model.spent)), points=None)


def point_exam(method, points, rows: int, batch: int, *about) -> PointExam:
    """`about`: what the points depend on, besides the prompts."""
    pulls = [[pull.prompt, pull.goal, pull.strength, pull.weight] for task in method.tasks for pull in task.pulls]
    return PointExam(method, points, list(range(rows)), fingerprint(pulls, method.renormalise, rows, *about), batch)


def task_of(row: int, tasks: list[Task]) -> int:
    return row % len(tasks)


def on_ways(model: Model, tasks: list[Task], settings: PointSettings, noise: NoiseSettings, guidance: float, levels: int):
    """points(row) on a way of the frozen model from noise that belongs to the row."""
    ways = Rollouts(model, [replace(task, batch=1) for task in tasks], settings, noise, guidance)

    @torch.no_grad()
    def points(row):
        number = task_of(row, tasks)
        shapes = tasks[number].shapes
        start = noise_of((1, *shapes[row // len(tasks) % len(shapes)]), model.denoiser, chance("way", row))
        way = spread(ways.way(number, start, 0.0, chance("levels")), levels)[::-1]
        return Point(number, torch.cat([point.x for point in way]), torch.cat([point.sigma for point in way]))

    return points


def on_pictures(denoiser: Denoiser, tasks: list[Task], data: Encoded, density: Density, noise: NoiseSettings, levels: int, picks):
    """points(row) on a picture, noised."""
    data = replace(data, dropout=0.0)

    def points(row):
        item = data.items[picks[row]]
        x0 = denoiser.model_space(data.batch([picks[row]], chance("picture", item.id)).x0)
        sigma = fixed_sigmas(denoiser, density, x0, levels, noise.min_time, noise.max_time)
        seen = torch.cat([randn_like(x0, chance("noise", item.id, level)) for level in range(levels)])
        return Point(task_of(row, tasks), denoiser.noised(x0.expand_as(seen), seen, sigma), sigma)

    return points


def on_noise(denoiser: Denoiser, tasks: list[Task], noise: NoiseSettings, levels: int):
    """points(row) of pure noise."""

    def points(row):
        number = task_of(row, tasks)
        one = noise_of((1, *tasks[number].shapes[0]), denoiser, chance("way", row))
        low, high = noise.min_time, noise.max_time
        sigma = denoiser.sigma_at(low + (high - low) * (torch.arange(levels) + 0.5) / levels).to(one)
        seen = one.expand(levels, *one.shape[1:])
        return Point(number, denoiser.noised(torch.zeros_like(seen), seen, sigma), sigma)

    return points
