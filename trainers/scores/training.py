"""From rated pictures to a score model with honest figures: each network is measured on pictures that it never saw.

The rated pictures are divided into as many folds as there are members, near-duplicates in one fold. Each member learns
from the other folds (and holds back a seventh of those to know when to stop), then scores its own fold. The figures
come from these scores, and the
same members are the model: what is saved is what was measured. One more fit on all pictures would know a little more,
and nobody would know how good it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..data.encoded import EncodedDataset
from ..data.ratings import check_rated_count, check_ratings
from ..diffusion import Denoiser
from ..loop import NoStore, train
from ..settings import OptimizerSettings, RunSettings, compute_fingerprint
from . import metrics
from .metrics import MetricEstimate, bootstrap_interval
from .networks import (
    ScoreModelInfo,
    ScorerEnsemble,
    ScorerSettings,
    batch_indices_by_shape,
    build_scorer,
    call_with_seed,
    head_output_size,
    level_to_sigma,
    score_from_outputs,
    to_rating_scale,
)
from .objective import ScoreSettings, ScoreTraining, noised_scorer_input, score_targets
from .resume import ResumeFolder

REPORTED_NOISE_LEVELS = (0.3, 0.6, 0.9)  # of noise, at which a noise-conditioned model is measured too
VALIDATION_FOLDS = 7  # one part in so many of what a member learns from tells it when to stop
MIN_VALIDATION_IMAGES = 8  # pictures; fewer would stop it by chance
MAX_RATING_PAIRS = 20_000
MAX_RATING_CLASSES = 100
MIN_ISOTONIC_RATINGS = 100


@dataclass
class ScoreTrainingResult:
    """A score model and how it came about."""

    model: ScorerEnsemble
    losses: list[float]  # of the first member
    lines: list[str]  # for the person
    said: list[float] = field(
        default_factory=list
    )  # by index of the data: what the member that never saw it said, in the user's scale

    @property
    def report(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class RatingTask:
    """What is to be learnt: pictures with ratings, or pairs of them."""

    data: EncodedDataset  # only what is learnt from
    about: ScoreModelInfo
    scores: tuple[float, ...]  # 0 for pictures that only pairs know
    pairs: tuple[tuple[int, int], ...]
    left_out: tuple[str, ...]  # names of pictures without a rating


class ScorerEarlyStop(Exception):
    """A member scores held back pictures no better than before."""


def train_score_model(
    data: EncodedDataset,
    denoiser: Denoiser,
    scorer: ScorerSettings,
    settings: ScoreSettings,
    *,
    latent_format: str = "",
    groups: Sequence[Hashable] | None = None,
    pairs: Sequence[tuple[int, int]] = (),
    trunk: Callable[[ScoreModelInfo], torch.nn.Module] | None = None,
    pretrained: ScorerEnsemble | None = None,
    work: ResumeFolder | None = None,
    device="cpu",
    report: Callable[[int, int, str], None] | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> ScoreTrainingResult:
    """`groups`: names of near-duplicates by index of the data; nothing is measured on a copy. `pairs`: (better, worse)
    indices for the pairwise task; without them every two pictures of different rating are a pair. `trunk(about)` makes
    the trunk of backbones that come from a loaded model. `pretrained`: a model whose trunk is learnt on. `work`: keeps
    what is done when the training is stopped, so that the same call goes on with it, as if it had never been stopped.

    Raises ValueError for too few ratings, ratings that are all the same or do not suit the task, and a pretrained model
    that does not fit."""
    task, groups = build_rating_task(
        data, scorer, settings, latent_format, pairs, groups or [item.id for item in data.items], pretrained
    )
    folds = metrics.grouped_folds(fold_groups(groups, task, settings), settings.members, settings.seed)
    networks, losses, held = [], [], []
    for fold in range(settings.members):
        tell = make_fold_progress_callback(report, check_interrupt, fold, settings)
        network = call_with_seed(
            settings.seed * 1009 + fold, lambda: build_scorer(task.about, trunk and trunk(task.about))
        ).to(device)
        if pretrained is not None:
            load_pretrained_trunk(network, pretrained, fold)
        member = EnsembleMember(task, denoiser, network, scorer, settings, fold)
        losses.append(member.train_member(np.flatnonzero(folds != fold), groups, tell, work or ResumeFolder()))
        held.append(member.predict_held_out(np.flatnonzero(folds == fold), check_interrupt))
        networks.append(network.cpu().eval().requires_grad_(False))
    return build_score_result(
        task, settings, networks, losses[0], merge_fold_outputs(held, len(task.data)), folds, groups
    )


def make_fold_progress_callback(report, check_interrupt, fold, settings):
    total = settings.members * settings.steps

    def tell(progress):
        check_interrupt()
        if report:
            report(
                fold * settings.steps + progress.step,
                total,
                f"network {fold + 1} of {settings.members}, {progress.line()}",
            )

    return tell


# -- what is learnt ----------------------------------------------------------------------------------------------------


def build_rating_task(data, scorer, settings, latent_format, pairs, groups, pretrained) -> tuple[RatingTask, list]:
    """(the task, the groups of its pictures)."""
    by_pairs = bool(pairs) and settings.task == "pairwise"
    compared = {index for pair in pairs for index in pair}
    chosen = [i for i, item in enumerate(data.items) if (i in compared if by_pairs else item.score is not None)]
    names = [item.path or item.id for item in data.items]
    if by_pairs:
        check_rated_count(len(chosen), settings.few)
    else:
        check_ratings(names, [item.score for item in data.items], settings.few)
    at = {index: place for place, index in enumerate(chosen)}
    scores = tuple(float(data.items[i].score or 0.0) for i in chosen)
    some = tuple((at[a], at[b]) for a, b in pairs) if by_pairs else pairs_from_ratings(scores, settings)
    about = build_score_model_info(data, scorer, settings, latent_format, scores, pretrained)
    left_out = tuple(names[i] for i in range(len(data)) if i not in at)
    subset = replace(data, items=[data.items[i] for i in chosen])
    return RatingTask(subset, about, scores, some, left_out), [groups[i] for i in chosen]


def pairs_from_ratings(scores, settings) -> tuple[tuple[int, int], ...]:
    if settings.task != "pairwise":
        return ()
    scores = np.asarray(scores)
    found = np.argwhere(scores[:, None] > scores[None])
    if len(found) > MAX_RATING_PAIRS:
        found = found[np.random.default_rng(settings.seed).choice(len(found), MAX_RATING_PAIRS, replace=False)]
    return tuple(map(tuple, found.tolist()))


def build_score_model_info(data, scorer, settings, latent_format, scores, pretrained) -> ScoreModelInfo:
    classes = rating_classes(scores, settings.task)
    ordinary = settings.task in ("regression", "distribution")
    about = ScoreModelInfo(
        backbone=scorer.backbone,
        task=settings.task,
        latent_format=latent_format,
        channels=data.channels,
        width=scorer.width,
        depth=scorer.depth,
        noisy=scorer.noisy,
        outputs=head_output_size(settings.task, len(classes)),
        classes=classes,
        mean=float(np.mean(scores)) if ordinary else 0.0,
        std=float(np.std(scores)) if ordinary else 1.0,
        low=float(min(scores)),
        high=float(max(scores)),
        members=settings.members,
        resolution=median_resolution(data),
        dataset=compute_fingerprint(data.fingerprint, list(scores)),
        rank=scorer.rank,
    )
    return about if pretrained is None else adopt_pretrained_trunk(about, pretrained.about)


def rating_classes(scores, task) -> tuple[str, ...]:
    """The different ratings in order, for tasks that tell them apart."""
    found = sorted(set(scores))
    if task == "binary" and len(found) != 2:
        raise ValueError(
            f"The task binary wants two different ratings, such as 0 and 1, and there are {len(found)}. Choose "
            "regression, or rate so."
        )
    if task == "multiclass" and len(found) > MAX_RATING_CLASSES:
        raise ValueError(
            f"The task multiclass takes at most {MAX_RATING_CLASSES} different ratings, and there are {len(found)}. "
            "Choose regression."
        )
    return tuple(f"{score!r}" for score in found) if task in ("binary", "multiclass") else ()


def median_resolution(data) -> int:
    """The side of the square that has the median picture's area, in pixels."""
    areas = [item.bucket[0] * item.bucket[1] for item in data.items if item.bucket]
    return round(float(np.median(areas)) ** 0.5) if areas else 0


def adopt_pretrained_trunk(about: ScoreModelInfo, before: ScoreModelInfo) -> ScoreModelInfo:
    """`about` with the trunk of a pretrained model. ValueError where that trunk sees other latents."""
    if (before.channels, before.latent_format or about.latent_format) != (
        about.channels,
        about.latent_format or before.latent_format,
    ):
        raise ValueError(
            f"The pretrained backbone sees latents of {before.latent_format or 'an unnamed format'} ({before.channels} "
            f"channels), and these are of {about.latent_format or 'an unnamed format'} ({about.channels} channels). "
            "Pretrain one on this kind of latent."
        )
    return replace(about, backbone=before.backbone, width=before.width, depth=before.depth, rank=before.rank)


def load_pretrained_trunk(network, pretrained: ScorerEnsemble, fold: int) -> None:
    source = pretrained.networks[fold % len(pretrained.networks)].trunk.state_dict()
    network.trunk.load_state_dict(source)


def fold_groups(groups, task: RatingTask, settings) -> list:
    """What stays in one fold: near-duplicates, and both sides of a pair. Where pairs tie (nearly) everything to
    everything, each picture stands for itself, and pairs between folds are neither learnt from nor measured on."""
    if task.about.task != "pairwise":
        return list(groups)
    tied = metrics.merge_paired_groups(groups, task.pairs)
    largest = max(tied.count(name) for name in set(tied))
    return (
        tied if largest <= 1.5 * len(tied) / settings.members and len(set(tied)) >= settings.members else list(groups)
    )


# -- one member --------------------------------------------------------------------------------------------------------


@dataclass
class EnsembleMember:
    task: RatingTask
    denoiser: Denoiser
    network: torch.nn.Module
    scorer: ScorerSettings
    settings: ScoreSettings
    fold: int

    def train_member(self, index, groups, tell, work: ResumeFolder) -> list[float]:
        """The losses. The network holds the best average of its weights afterwards."""
        if done := work.done(self.fold):
            self.network.load_state_dict(done["network"])
            return done["losses"].tolist()
        index, watched = self.split_validation(index, groups)
        settings = self.settings
        method = ScoreTraining(
            self.denoiser,
            self.network,
            replace(self.task.data, items=[self.task.data.items[i] for i in index]),
            self.task.about,
            score_targets([self.task.scores[i] for i in index], self.task.about),
            self.inside(index, local=True),
            settings,
            self.scorer.dropout,
        )
        run = RunSettings(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            seed=settings.seed * 1009 + self.fold,
            save_every=settings.check_every,
        )
        how = OptimizerSettings(schedule="cosine", weight_decay=settings.weight_decay, warmup=settings.steps // 20)
        watch = EarlyStoppingStore(
            method, lambda: self.mark(watched), settings.patience if len(watched) else 0, work, self.fold
        )
        with contextlib.suppress(ScorerEarlyStop):
            train(method, run, how, report=tell, store=watch)
        method.keep(watch.best)
        work.finish(self.fold, {"network": self.network.state_dict(), "losses": torch.tensor(watch.losses)})
        return watch.losses

    def split_validation(self, index, groups):
        """(to learn from, to watch): groups stay whole. Nothing is held back of too few."""
        names = [groups[i] for i in index]
        if (
            not self.settings.patience
            or len(set(names)) < VALIDATION_FOLDS
            or len(index) // VALIDATION_FOLDS < MIN_VALIDATION_IMAGES
        ):
            return index, index[:0]
        apart = metrics.grouped_folds(names, VALIDATION_FOLDS, self.settings.seed + 1) == 0
        enough = self.task.about.task != "pairwise" or len(self.inside(index[apart])) >= MIN_VALIDATION_IMAGES
        return (index[~apart], index[apart]) if enough else (index, index[:0])

    def inside(self, index, local=False) -> list[tuple[int, int]]:
        """The pairs with both sides among these pictures; local: as places in index."""
        at = {int(i): place for place, i in enumerate(index)}
        return [(at[a], at[b]) if local else (a, b) for a, b in self.task.pairs if a in at and b in at]

    def mark(self, index) -> float:
        """How well these pictures are scored, clean and half way to noise."""
        levels = (0.0, 0.5) if self.task.about.noisy else (0.0,)
        return float(np.mean([self.target_agreement(index, self.out(index, level)) for level in levels]))

    def target_agreement(self, index, out) -> float:
        about, rated = self.task.about, np.array([self.task.scores[i] for i in index])
        if about.task == "multiclass":
            return metrics.accuracy(out.argmax(1).numpy(), score_targets(rated, about).numpy())
        said = score_from_outputs(out, about).numpy()
        if about.task == "pairwise":
            return float(np.mean(pair_outcomes(dict(zip(index, said, strict=True)), self.inside(index))))
        return metrics.auroc(said, rated > rated.mean()) if about.task == "binary" else metrics.srcc(said, rated)

    @torch.no_grad()
    def out(self, index, level: float, check_interrupt=lambda: None) -> torch.Tensor:
        """(len(index), outputs) at one level of noise, the noise of each picture always the same. Pictures go one size
        at a time."""
        items, rows = [self.task.data.items[i] for i in index], {}
        for part in batch_indices_by_shape([item.shape for item in items]):
            check_interrupt()
            rows |= zip(part, self.network(*self.view([items[i] for i in part], level)).cpu(), strict=True)
        return torch.stack([rows[i] for i in range(len(items))])

    def view(self, items, level):
        rng = torch.Generator().manual_seed(1)
        means = torch.stack([self.task.data.store.load(item.latent)["mean"].float() for item in items])
        sigma = level_to_sigma(self.denoiser, torch.full((len(items),), level))
        return noised_scorer_input(
            self.denoiser, self.denoiser.model_space(means), sigma, torch.full((len(items),), level > 0), rng
        )

    def predict_held_out(self, index, check_interrupt) -> dict[float, dict[int, torch.Tensor]]:
        """{level: {picture: what is said}} of pictures that were not learnt from."""
        levels = (0.0, *REPORTED_NOISE_LEVELS) if self.task.about.noisy else (0.0,)
        return {
            level: dict(zip(index.tolist(), self.out(index, level, check_interrupt), strict=True)) for level in levels
        }


class EarlyStoppingStore(NoStore):
    """Asked every few steps: keeps the best average of the weights, and ends the run when there has been none better
    for long.

    The loop's saves come at fixed steps, its reports by the clock; only the first make a run that can be repeated. A
    run that is stopped at such a step is asked then, for it will not come by again."""

    def __init__(
        self, method: ScoreTraining, mark: Callable[[], float], patience: int, work: ResumeFolder, number: int
    ):
        self.method, self.mark, self.patience, self.work, self.number = method, mark, patience, work, number
        self.best, self.height, self.since, self.asked, self.losses = method.average, -math.inf, 0, 0, []
        self.ended = False

    def load(self):
        saved = self.work.load_current(self.number)
        if saved is None:
            return None
        self.best = [v.to(p) for v, p in zip(saved["best"], self.method.parameters(), strict=True)]
        self.height, self.since, self.asked, self.losses = (
            saved["height"],
            saved["since"],
            saved["asked"],
            saved["run"]["losses"].tolist(),
        )
        self.method.network.load_state_dict(saved["fixed"], strict=False)
        self.stop_if_stalled()
        return saved["run"]

    def save(self, state, why):
        step, self.losses = state["step"], state["losses"].tolist()
        if step and step != self.asked and (why == "finished" or step % self.method.settings.check_every == 0):
            self.ask(step)
        if step and not self.ended and why != "finished" and self.work.due(why):
            self.work.keep(self.number, self.state(state), step)
        if why == "step":
            self.stop_if_stalled()

    def state(self, run) -> dict:
        buffers = dict(self.method.network.named_buffers())
        fixed = {name: value for name, value in self.method.network.state_dict().items() if name in buffers}
        return {
            "run": run,
            "best": self.best,
            "height": self.height,
            "since": self.since,
            "asked": self.asked,
            "fixed": fixed,
        }

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

    def stop_if_stalled(self):
        if self.patience and self.since >= self.patience:
            self.ended = True
            raise ScorerEarlyStop


# -- what came of it ---------------------------------------------------------------------------------------------------


def merge_fold_outputs(held, count) -> dict[float, torch.Tensor]:
    """{level: (N, outputs)} from what each member said of its own fold."""
    return {
        level: torch.stack([next(h[level][i] for h in held if i in h[level]) for i in range(count)])
        for level in held[0]
    }


def build_score_result(task: RatingTask, settings, networks, losses, out, folds, groups) -> ScoreTrainingResult:
    about = fit_calibration(task, settings, out[0.0])
    name, chance = primary_metric(task)
    figures = compute_level_metrics(task, about, out[0.0], folds, groups, settings.seed)
    first = figures[name]
    noisy = {
        f"{name} at noise {level:g}": compute_level_metrics(task, about, o, folds, groups, settings.seed, only=name)[
            name
        ]
        for level, o in out.items()
        if level
    }
    flat = {n: [round(v, 4) for v in (f.value, f.low, f.high)] for n, f in (figures | noisy).items()}
    about = replace(about, trained=bool(first.low > chance), metrics=flat)
    said = to_rating_scale(score_from_outputs(out[0.0], about), about).tolist()
    lines = [
        *format_score_training_lines(task, about, name, chance, first, flat),
        *format_rating_disagreements(task, about, said),
    ]
    return ScoreTrainingResult(ScorerEnsemble(networks, about), losses, lines, said)


def primary_metric(task: RatingTask) -> tuple[str, float]:
    """(the figure that tells whether anything was learnt, what chance gives)."""
    if task.about.task == "multiclass":
        share = max(task.scores.count(score) for score in set(task.scores)) / len(task.scores)
        return "accuracy", share
    return {"binary": ("AUROC", 0.5), "pairwise": ("pairwise accuracy", 0.5)}.get(task.about.task, ("SRCC", 0.0))


def fit_calibration(task: RatingTask, settings, out) -> ScoreModelInfo:
    about = task.about
    if about.task not in ("regression", "distribution") or settings.calibration == "off":
        return about
    said = (score_from_outputs(out, about) * about.std + about.mean).numpy()
    if settings.calibration == "isotonic" and len(said) >= MIN_ISOTONIC_RATINGS:
        return replace(about, curve=metrics.fit_isotonic_curve(said, task.scores))
    return replace(about, line=metrics.fit_calibration_line(said, task.scores))


def compute_level_metrics(
    task: RatingTask, about: ScoreModelInfo, out, folds, groups, seed, only: str = ""
) -> dict[str, MetricEstimate]:
    """The figures of one level of noise, or only one of them. Copies of a picture count as one when it is asked how
    sure they are."""
    if about.task == "pairwise":
        inside = [(a, b) for a, b in task.pairs if folds[a] == folds[b]]
        if not inside:
            raise ValueError(
                f"None of the {len(task.pairs)} pairs has both sides in one of the {folds.max() + 1} parts that the "
                "pictures are divided into. Give more pairs, or fewer members."
            )
        return {
            "pairwise accuracy": bootstrap_pair_accuracy(score_from_outputs(out, about).numpy(), inside, groups, seed)
        }
    asked = metric_inputs(about, out, np.array(task.scores))
    return {
        name: bootstrap_interval(metric, said, rated, seed, groups=groups)
        for name, (metric, said, rated) in asked.items()
        if not only or name == only
    }


def metric_inputs(about: ScoreModelInfo, out, rated) -> dict[str, tuple]:
    """{figure: (metric, what was said, what is true)}"""
    said = score_from_outputs(out, about).numpy()
    if about.task == "multiclass":
        return {
            "accuracy": (metrics.accuracy, out.argmax(1).numpy(), score_targets(rated, about).numpy()),
            "SRCC": (metrics.srcc, said, rated),
        }
    if about.task == "binary":
        label = score_targets(rated, about).numpy()
        return {"AUROC": (metrics.auroc, said, label), "F1": (metrics.f1_score, said, label)}
    user = to_rating_scale(score_from_outputs(out, about), about).numpy()
    return {
        "SRCC": (metrics.srcc, said, rated),
        "PLCC": (metrics.plcc, said, rated),
        "MAE": (metrics.mae, user, rated),
        "pairwise accuracy": (metrics.pairwise_accuracy, said, rated),
    }


def pair_outcomes(said, pairs) -> list[float]:
    """1 for each pair in order, 0 for one that is not, .5 for a tie."""
    return [0.5 + 0.5 * float(np.sign(said[a] - said[b])) for a, b in pairs]


def bootstrap_pair_accuracy(said, pairs, groups, seed) -> MetricEstimate:
    """Drawn again by the better picture: pairs that share one are no independent evidence."""
    right = np.array(pair_outcomes(said, pairs))
    return bootstrap_interval(lambda a, _: float(a.mean()), right, right, seed, groups=[groups[a] for a, _ in pairs])


def format_score_training_lines(
    task: RatingTask, about: ScoreModelInfo, name, chance, first: MetricEstimate, flat
) -> list[str]:
    count = (
        f"{len(task.pairs)} pairs of {len(task.data)} pictures"
        if about.task == "pairwise"
        else f"{len(task.data)} rated pictures"
    )
    if about.trained:
        lines = [f"Trained on {count}: {name} {first} on pictures that were not learnt from."]
    else:
        lines = [
            f"NOT TRAINED: {name} is {first} on pictures that were not learnt from, and chance gives {chance:g}. What "
            "it says cannot be told from chance. Rate more pictures, rate them more evenly (the same picture twice "
            "should get the same number), or ask for something that can be seen in a picture. It can be tried, and "
            "Save Score Model does not save it."
        ]
    lines += [f"{n}: {v:.3f} ({low:.3f} to {high:.3f})" for n, (v, low, high) in flat.items() if n != name]
    lines.append(
        f"{about.members} networks ({about.backbone}), each measured on its own share of the pictures. The brackets "
        "hold 95 of 100 bootstrap draws."
    )
    if task.left_out:
        lines.append(
            f"{len(task.left_out)} pictures without a rating were left out: "
            f"{', '.join(task.left_out[:5])}{', ...' * (len(task.left_out) > 5)}"
        )
    return lines


def format_rating_disagreements(task: RatingTask, about: ScoreModelInfo, said: list[float], most: int = 5) -> list[str]:
    """Where the model and the person differ most: a slip of the hand, or what the model has not understood."""
    if about.task not in ("regression", "distribution") or not about.trained:
        return []
    order = sorted(range(len(said)), key=lambda i: -abs(said[i] - task.scores[i]))[:most]
    names = [Path(task.data.items[i].path or task.data.items[i].id).name for i in order]
    apart = [f"{name} (rated {task.scores[i]:g}, said {said[i]:.3g})" for i, name in zip(order, names, strict=True)]
    return [f"Look again at the ratings of {', '.join(apart)}."]


def rate_latents(
    model: ScorerEnsemble, latents: Sequence[torch.Tensor], device="cpu", report=None, check_interrupt=lambda: None
):
    """(ratings, spreads between members) of clean latents (C, ..., h, w) in model space, as two lists in their
    order."""
    found: dict[int, tuple[float, float]] = {}
    try:
        model.to(device)
        for part in batch_indices_by_shape([tuple(x.shape) for x in latents]):
            check_interrupt()
            rated, spread = model.ratings(torch.stack([latents[i] for i in part]).to(device, torch.float32))
            found |= zip(part, zip(rated.tolist(), spread.tolist(), strict=True), strict=True)
            if report:
                report(len(found), len(latents), "scored")
    finally:
        model.to("cpu")
    return [found[i][0] for i in range(len(latents))], [found[i][1] for i in range(len(latents))]
