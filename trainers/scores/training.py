"""From rated pictures to a score model with honest figures: each network is measured on pictures that it never saw.

The rated pictures are divided into as many folds as there are members, near-duplicates in one fold. Each member learns from the other
folds (and holds back a seventh of those to know when to stop), then scores its own fold. The figures come from these scores, and the
same members are the model: what is saved is what was measured. One more fit on all pictures would know a little more, and nobody would
know how good it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..data.encoded import Encoded
from ..data.ratings import check_enough, check_ratings
from ..diffusion import Denoiser
from ..loop import NoStore, train
from ..settings import OptimizerSettings, RunSettings, fingerprint
from . import metrics
from .metrics import Figure, interval
from .networks import About, ScoreModel, ScorerSettings, by_shape, in_user_scale, network_of, outputs_of, seeded, sigma_of_level, value
from .objective import Score, ScoreSettings, seen, targets
from .resume import Unfinished

LEVELS = (0.3, 0.6, 0.9)  # of noise, at which a noise-conditioned model is measured too
VALIDATION = 7  # one part in so many of what a member learns from tells it when to stop
LEAST_VALIDATION = 8  # pictures; fewer would stop it by chance
MOST_PAIRS = 20_000
MOST_CLASSES = 100
LEAST_ISOTONIC = 100


@dataclass
class Trained:
    """A score model and how it came about."""

    model: ScoreModel
    losses: list[float]  # of the first member
    lines: list[str]  # for the person
    said: list[float] = field(default_factory=list)  # by index of the data: what the member that never saw it said, in the user's scale

    @property
    def report(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Task:
    """What is to be learnt: pictures with ratings, or pairs of them."""

    data: Encoded  # only what is learnt from
    about: About
    scores: tuple[float, ...]  # 0 for pictures that only pairs know
    pairs: tuple[tuple[int, int], ...]
    left_out: tuple[str, ...]  # names of pictures without a rating


class Enough(Exception):
    """A member scores held back pictures no better than before."""


def trained(
    data: Encoded,
    denoiser: Denoiser,
    scorer: ScorerSettings,
    settings: ScoreSettings,
    *,
    latent_format: str = "",
    groups: Sequence[Hashable] | None = None,
    pairs: Sequence[tuple[int, int]] = (),
    trunk: Callable[[About], torch.nn.Module] | None = None,
    pretrained: ScoreModel | None = None,
    work: Unfinished | None = None,
    device="cpu",
    report: Callable[[int, int, str], None] | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Trained:
    """`groups`: names of near-duplicates by index of the data; nothing is measured on a copy. `pairs`: (better, worse) indices for the
    pairwise task; without them every two pictures of different rating are a pair. `trunk(about)` makes the trunk of backbones that come from
    a loaded model. `pretrained`: a model whose trunk is learnt on. `work`: keeps what is done when the training is stopped, so that the same call
    goes on with it, as if it had never been stopped.

    Raises ValueError for too few ratings, ratings that are all the same or do not suit the task, and a pretrained model that does not fit."""
    task, groups = task_of(data, scorer, settings, latent_format, pairs, groups or [item.id for item in data.items], pretrained)
    folds = metrics.grouped_folds(fold_groups(groups, task, settings), settings.members, settings.seed)
    networks, losses, held = [], [], []
    for fold in range(settings.members):
        tell = telling(report, check_interrupt, fold, settings)
        network = seeded(settings.seed * 1009 + fold, lambda: network_of(task.about, trunk and trunk(task.about))).to(device)
        if pretrained is not None:
            start_from(network, pretrained, fold)
        member = Member(task, denoiser, network, scorer, settings, fold)
        losses.append(member.learn(np.flatnonzero(folds != fold), groups, tell, work or Unfinished()))
        held.append(member.judged(np.flatnonzero(folds == fold), check_interrupt))
        networks.append(network.cpu().eval().requires_grad_(False))
    return concluded(task, settings, networks, losses[0], merged(held, len(task.data)), folds, groups)


def telling(report, check_interrupt, fold, settings):
    total = settings.members * settings.steps

    def tell(progress):
        check_interrupt()
        if report:
            report(fold * settings.steps + progress.step, total, f"network {fold + 1} of {settings.members}, {progress.line()}")

    return tell


# -- what is learnt ----------------------------------------------------------------------------------------------------------------------


def task_of(data, scorer, settings, latent_format, pairs, groups, pretrained) -> tuple[Task, list]:
    """(the task, the groups of its pictures)."""
    by_pairs = bool(pairs) and settings.task == "pairwise"
    compared = {index for pair in pairs for index in pair}
    chosen = [i for i, item in enumerate(data.items) if (i in compared if by_pairs else item.score is not None)]
    names = [item.path or item.id for item in data.items]
    if by_pairs:
        check_enough(len(chosen), settings.few)
    else:
        check_ratings(names, [item.score for item in data.items], settings.few)
    at = {index: place for place, index in enumerate(chosen)}
    scores = tuple(float(data.items[i].score or 0.0) for i in chosen)
    some = tuple((at[a], at[b]) for a, b in pairs) if by_pairs else pairs_by_score(scores, settings)
    about = described(data, scorer, settings, latent_format, scores, pretrained)
    left_out = tuple(names[i] for i in range(len(data)) if i not in at)
    subset = replace(data, items=[data.items[i] for i in chosen])
    return Task(subset, about, scores, some, left_out), [groups[i] for i in chosen]


def pairs_by_score(scores, settings) -> tuple[tuple[int, int], ...]:
    if settings.task != "pairwise":
        return ()
    scores = np.asarray(scores)
    found = np.argwhere(scores[:, None] > scores[None])
    if len(found) > MOST_PAIRS:
        found = found[np.random.default_rng(settings.seed).choice(len(found), MOST_PAIRS, replace=False)]
    return tuple(map(tuple, found.tolist()))


def described(data, scorer, settings, latent_format, scores, pretrained) -> About:
    classes = classes_of(scores, settings.task)
    ordinary = settings.task in ("regression", "distribution")
    about = About(
        backbone=scorer.backbone, task=settings.task, latent_format=latent_format, channels=data.channels, width=scorer.width,
        depth=scorer.depth, noisy=scorer.noisy, outputs=outputs_of(settings.task, len(classes)), classes=classes,
        mean=float(np.mean(scores)) if ordinary else 0.0, std=float(np.std(scores)) if ordinary else 1.0, low=float(min(scores)),
        high=float(max(scores)), members=settings.members, resolution=resolution(data), dataset=fingerprint(data.fingerprint, list(scores)),
        rank=scorer.rank,
    )  # fmt: skip
    return about if pretrained is None else like(about, pretrained.about)


def classes_of(scores, task) -> tuple[str, ...]:
    """The different ratings in order, for tasks that tell them apart."""
    found = sorted(set(scores))
    if task == "binary" and len(found) != 2:
        raise ValueError(f"The task binary wants two different ratings, such as 0 and 1, and there are {len(found)}. Choose regression, or rate so.")
    if task == "multiclass" and len(found) > MOST_CLASSES:
        raise ValueError(f"The task multiclass takes at most {MOST_CLASSES} different ratings, and there are {len(found)}. Choose regression.")
    return tuple(f"{score!r}" for score in found) if task in ("binary", "multiclass") else ()


def resolution(data) -> int:
    """The side of the square that has the median picture's area, in pixels."""
    areas = [item.bucket[0] * item.bucket[1] for item in data.items if item.bucket]
    return round(float(np.median(areas)) ** 0.5) if areas else 0


def like(about: About, before: About) -> About:
    """`about` with the trunk of a pretrained model. ValueError where that trunk sees other latents."""
    if (before.channels, before.latent_format or about.latent_format) != (about.channels, about.latent_format or before.latent_format):
        raise ValueError(f"The pretrained backbone sees latents of {before.latent_format or 'an unnamed format'} ({before.channels} channels), and these "
                         f"are of {about.latent_format or 'an unnamed format'} ({about.channels} channels). Pretrain one on this kind of latent.")
    return replace(about, backbone=before.backbone, width=before.width, depth=before.depth, rank=before.rank)


def start_from(network, pretrained: ScoreModel, fold: int) -> None:
    source = pretrained.networks[fold % len(pretrained.networks)].trunk.state_dict()
    network.trunk.load_state_dict(source)


def fold_groups(groups, task: Task, settings) -> list:
    """What stays in one fold: near-duplicates, and both sides of a pair. Where pairs tie (nearly) everything to everything, each picture
    stands for itself, and pairs between folds are neither learnt from nor measured on."""
    if task.about.task != "pairwise":
        return list(groups)
    tied = metrics.tied(groups, task.pairs)
    largest = max(tied.count(name) for name in set(tied))
    return tied if largest <= 1.5 * len(tied) / settings.members and len(set(tied)) >= settings.members else list(groups)


# -- one member --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Member:
    task: Task
    denoiser: Denoiser
    network: torch.nn.Module
    scorer: ScorerSettings
    settings: ScoreSettings
    fold: int

    def learn(self, index, groups, tell, work: Unfinished) -> list[float]:
        """The losses. The network holds the best average of its weights afterwards."""
        if done := work.done(self.fold):
            self.network.load_state_dict(done["network"])
            return done["losses"].tolist()
        index, watched = self.held_back(index, groups)
        settings = self.settings
        method = Score(self.denoiser, self.network, replace(self.task.data, items=[self.task.data.items[i] for i in index]), self.task.about,
                       targets([self.task.scores[i] for i in index], self.task.about), self.inside(index, local=True), settings,
                       self.scorer.dropout)  # fmt: skip
        run = RunSettings(steps=settings.steps, learning_rate=settings.learning_rate, seed=settings.seed * 1009 + self.fold,
                          save_every=settings.check_every)  # fmt: skip
        how = OptimizerSettings(schedule="cosine", weight_decay=settings.weight_decay, warmup=settings.steps // 20)
        watch = Watch(method, lambda: self.mark(watched), settings.patience if len(watched) else 0, work, self.fold)
        with contextlib.suppress(Enough):
            train(method, run, how, report=tell, store=watch)
        method.keep(watch.best)
        work.finish(self.fold, {"network": self.network.state_dict(), "losses": torch.tensor(watch.losses)})
        return watch.losses

    def held_back(self, index, groups):
        """(to learn from, to watch): groups stay whole. Nothing is held back of too few."""
        names = [groups[i] for i in index]
        if not self.settings.patience or len(set(names)) < VALIDATION or len(index) // VALIDATION < LEAST_VALIDATION:
            return index, index[:0]
        apart = metrics.grouped_folds(names, VALIDATION, self.settings.seed + 1) == 0
        enough = self.task.about.task != "pairwise" or len(self.inside(index[apart])) >= LEAST_VALIDATION
        return (index[~apart], index[apart]) if enough else (index, index[:0])

    def inside(self, index, local=False) -> list[tuple[int, int]]:
        """The pairs with both sides among these pictures; local: as places in index."""
        at = {int(i): place for place, i in enumerate(index)}
        return [(at[a], at[b]) if local else (a, b) for a, b in self.task.pairs if a in at and b in at]

    def mark(self, index) -> float:
        """How well these pictures are scored, clean and half way to noise."""
        levels = (0.0, 0.5) if self.task.about.noisy else (0.0,)
        return float(np.mean([self.agreement(index, self.out(index, level)) for level in levels]))

    def agreement(self, index, out) -> float:
        about, rated = self.task.about, np.array([self.task.scores[i] for i in index])
        if about.task == "multiclass":
            return metrics.accuracy(out.argmax(1).numpy(), targets(rated, about).numpy())
        said = value(out, about).numpy()
        if about.task == "pairwise":
            return float(np.mean(outcomes(dict(zip(index, said, strict=True)), self.inside(index))))
        return metrics.auroc(said, rated > rated.mean()) if about.task == "binary" else metrics.srcc(said, rated)

    @torch.no_grad()
    def out(self, index, level: float, check_interrupt=lambda: None) -> torch.Tensor:
        """(len(index), outputs) at one level of noise, the noise of each picture always the same. Pictures go one size at a time."""
        items, rows = [self.task.data.items[i] for i in index], {}
        for part in by_shape([item.shape for item in items]):
            check_interrupt()
            rows |= zip(part, self.network(*self.view([items[i] for i in part], level)).cpu(), strict=True)
        return torch.stack([rows[i] for i in range(len(items))])

    def view(self, items, level):
        rng = torch.Generator().manual_seed(1)
        means = torch.stack([self.task.data.store.load(item.latent)["mean"].float() for item in items])
        sigma = sigma_of_level(self.denoiser, torch.full((len(items),), level))
        return seen(self.denoiser, self.denoiser.model_space(means), sigma, torch.full((len(items),), level > 0), rng)

    def judged(self, index, check_interrupt) -> dict[float, dict[int, torch.Tensor]]:
        """{level: {picture: what is said}} of pictures that were not learnt from."""
        levels = (0.0, *LEVELS) if self.task.about.noisy else (0.0,)
        return {level: dict(zip(index.tolist(), self.out(index, level, check_interrupt), strict=True)) for level in levels}


class Watch(NoStore):
    """Asked every few steps: keeps the best average of the weights, and ends the run when there has been none better for long.

    The loop's saves come at fixed steps, its reports by the clock; only the first make a run that can be repeated. A run that is stopped at such
    a step is asked then, for it will not come by again."""

    def __init__(self, method: Score, mark: Callable[[], float], patience: int, work: Unfinished, number: int):
        self.method, self.mark, self.patience, self.work, self.number = method, mark, patience, work, number
        self.best, self.height, self.since, self.asked, self.losses = method.average, -math.inf, 0, 0, []
        self.ended = False

    def load(self):
        saved = self.work.at_hand(self.number)
        if saved is None:
            return None
        self.best = [v.to(p) for v, p in zip(saved["best"], self.method.parameters(), strict=True)]
        self.height, self.since, self.asked, self.losses = saved["height"], saved["since"], saved["asked"], saved["run"]["losses"].tolist()
        self.method.network.load_state_dict(saved["fixed"], strict=False)
        self.end_if_enough()
        return saved["run"]

    def save(self, state, why):
        step, self.losses = state["step"], state["losses"].tolist()
        if step and step != self.asked and (why == "finished" or step % self.method.settings.check_every == 0):
            self.ask(step)
        if step and not self.ended and why != "finished" and self.work.due(why):
            self.work.keep(self.number, self.state(state), step)
        if why == "step":
            self.end_if_enough()

    def state(self, run) -> dict:
        buffers = dict(self.method.network.named_buffers())
        fixed = {name: value for name, value in self.method.network.state_dict().items() if name in buffers}
        return {"run": run, "best": self.best, "height": self.height, "since": self.since, "asked": self.asked, "fixed": fixed}

    def ask(self, step: int):
        """Whether the average of now is the best so far."""
        self.asked = step
        if not self.patience:
            self.best = self.method.average
            return
        now = [p.detach().clone() for p in self.method.parameters()]
        self.method.keep(self.method.average)
        height = self.mark()
        self.method.keep(now)
        if height > self.height:
            self.best, self.height, self.since = self.method.average, height, 0
        else:
            self.since += 1

    def end_if_enough(self):
        if self.patience and self.since >= self.patience:
            self.ended = True
            raise Enough


# -- what came of it ---------------------------------------------------------------------------------------------------------------------


def merged(held, count) -> dict[float, torch.Tensor]:
    """{level: (N, outputs)} from what each member said of its own fold."""
    return {level: torch.stack([next(h[level][i] for h in held if i in h[level]) for i in range(count)]) for level in held[0]}


def concluded(task: Task, settings, networks, losses, out, folds, groups) -> Trained:
    about = calibrated(task, settings, out[0.0])
    name, chance = primary(task)
    figures = measured(task, about, out[0.0], folds, groups, settings.seed)
    first = figures[name]
    noisy = {f"{name} at noise {level:g}": measured(task, about, o, folds, groups, settings.seed, only=name)[name] for level, o in out.items() if level}
    flat = {n: [round(v, 4) for v in (f.value, f.low, f.high)] for n, f in (figures | noisy).items()}
    about = replace(about, trained=bool(first.low > chance), metrics=flat)
    said = in_user_scale(value(out[0.0], about), about).tolist()
    lines = [*lines_of(task, about, name, chance, first, flat), *disagreements(task, about, said)]
    return Trained(ScoreModel(networks, about), losses, lines, said)


def primary(task: Task) -> tuple[str, float]:
    """(the figure that tells whether anything was learnt, what chance gives)."""
    if task.about.task == "multiclass":
        share = max(task.scores.count(score) for score in set(task.scores)) / len(task.scores)
        return "accuracy", share
    return {"binary": ("AUROC", 0.5), "pairwise": ("pairwise accuracy", 0.5)}.get(task.about.task, ("SRCC", 0.0))


def calibrated(task: Task, settings, out) -> About:
    about = task.about
    if about.task not in ("regression", "distribution") or settings.calibration == "off":
        return about
    said = (value(out, about) * about.std + about.mean).numpy()
    if settings.calibration == "isotonic" and len(said) >= LEAST_ISOTONIC:
        return replace(about, curve=metrics.fitted_curve(said, task.scores))
    return replace(about, line=metrics.fitted_line(said, task.scores))


def measured(task: Task, about: About, out, folds, groups, seed, only: str = "") -> dict[str, Figure]:
    """The figures of one level of noise, or only one of them. Copies of a picture count as one when it is asked how sure they are."""
    if about.task == "pairwise":
        inside = [(a, b) for a, b in task.pairs if folds[a] == folds[b]]
        if not inside:
            raise ValueError(f"None of the {len(task.pairs)} pairs has both sides in one of the {folds.max() + 1} parts that the pictures are divided "
                             "into. Give more pairs, or fewer members.")
        return {"pairwise accuracy": pair_figure(value(out, about).numpy(), inside, groups, seed)}
    asked = questions(about, out, np.array(task.scores))
    return {name: interval(metric, said, rated, seed, groups=groups) for name, (metric, said, rated) in asked.items() if not only or name == only}


def questions(about: About, out, rated) -> dict[str, tuple]:
    """{figure: (metric, what was said, what is true)}"""
    said = value(out, about).numpy()
    if about.task == "multiclass":
        return {"accuracy": (metrics.accuracy, out.argmax(1).numpy(), targets(rated, about).numpy()), "SRCC": (metrics.srcc, said, rated)}
    if about.task == "binary":
        label = targets(rated, about).numpy()
        return {"AUROC": (metrics.auroc, said, label), "F1": (metrics.f1, said, label)}
    user = in_user_scale(value(out, about), about).numpy()
    return {"SRCC": (metrics.srcc, said, rated), "PLCC": (metrics.plcc, said, rated), "MAE": (metrics.mae, user, rated),
            "pairwise accuracy": (metrics.pairwise, said, rated)}  # fmt: skip


def outcomes(said, pairs) -> list[float]:
    """1 for each pair in order, 0 for one that is not, .5 for a tie."""
    return [0.5 + 0.5 * float(np.sign(said[a] - said[b])) for a, b in pairs]


def pair_figure(said, pairs, groups, seed) -> Figure:
    """Drawn again by the better picture: pairs that share one are no independent evidence."""
    right = np.array(outcomes(said, pairs))
    return interval(lambda a, _: float(a.mean()), right, right, seed, groups=[groups[a] for a, _ in pairs])


def lines_of(task: Task, about: About, name, chance, first: Figure, flat) -> list[str]:
    count = f"{len(task.pairs)} pairs of {len(task.data)} pictures" if about.task == "pairwise" else f"{len(task.data)} rated pictures"
    if about.trained:
        lines = [f"Trained on {count}: {name} {first} on pictures that were not learnt from."]
    else:
        lines = [f"NOT TRAINED: {name} is {first} on pictures that were not learnt from, and chance gives {chance:g}. What it says cannot be told "
                 "from chance. Rate more pictures, rate them more evenly (the same picture twice should get the same number), or ask for "
                 "something that can be seen in a picture. It can be tried, and Save Score Model does not save it."]  # fmt: skip
    lines += [f"{n}: {v:.3f} ({low:.3f} to {high:.3f})" for n, (v, low, high) in flat.items() if n != name]
    lines.append(f"{about.members} networks ({about.backbone}), each measured on its own share of the pictures. The brackets hold 95 of 100 bootstrap draws.")
    if task.left_out:
        lines.append(f"{len(task.left_out)} pictures without a rating were left out: {', '.join(task.left_out[:5])}{', ...' * (len(task.left_out) > 5)}")
    return lines


def disagreements(task: Task, about: About, said: list[float], most: int = 5) -> list[str]:
    """Where the model and the person differ most: a slip of the hand, or what the model has not understood."""
    if about.task not in ("regression", "distribution") or not about.trained:
        return []
    order = sorted(range(len(said)), key=lambda i: -abs(said[i] - task.scores[i]))[:most]
    names = [Path(task.data.items[i].path or task.data.items[i].id).name for i in order]
    apart = [f"{name} (rated {task.scores[i]:g}, said {said[i]:.3g})" for i, name in zip(order, names, strict=True)]
    return [f"Look again at the ratings of {', '.join(apart)}."]


def rated_by(model: ScoreModel, latents: Sequence[torch.Tensor], device="cpu", report=None, check_interrupt=lambda: None):
    """(ratings, spreads between members) of clean latents (C, ..., h, w) in model space, as two lists in their order."""
    found: dict[int, tuple[float, float]] = {}
    try:
        model.to(device)
        for part in by_shape([tuple(x.shape) for x in latents]):
            check_interrupt()
            rated, spread = model.ratings(torch.stack([latents[i] for i in part]).to(device, torch.float32))
            found |= zip(part, zip(rated.tolist(), spread.tolist(), strict=True), strict=True)
            if report:
                report(len(found), len(latents), "scored")
    finally:
        model.to("cpu")
    return [found[i][0] for i in range(len(latents))], [found[i][1] for i in range(len(latents))]


