"""Train a score model on rated images: a cross-validated ensemble whose metrics come from held-out images only.

The rated images are split into as many folds as there are members, near-duplicates in one fold. Each member trains on
the other folds (a seventh of them is its validation set for early stopping), then predicts its own fold. The metrics
come from these out-of-fold predictions, and the same members are the model: what is saved is what was measured. One
more fit on all images might be a little better, and nobody could say how good it is.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
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
    Scorer,
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

REPORTED_NOISE_LEVELS = (0.3, 0.6, 0.9)  # at which a noise-conditioned model is measured too
VALIDATION_FOLDS = 7  # one part in so many of a member's training images is its validation set
MIN_VALIDATION_IMAGES = 8  # fewer would stop it by chance
MAX_RATING_PAIRS = 20_000
MAX_RATING_CLASSES = 100
MIN_ISOTONIC_RATINGS = 100


@dataclass
class ScoreTrainingResult:
    """A score model with its losses and report."""

    model: ScorerEnsemble
    losses: list[float]  # of the first member
    lines: list[str]  # of the report
    # by index of the rated images: out-of-fold ratings, on the user's scale
    predictions: list[float] = field(default_factory=list)

    @property
    def report(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class RatingTask:
    """What is learnt: images with ratings, or (better, worse) pairs of them."""

    data: EncodedDataset  # the rated images only
    info: ScoreModelInfo
    scores: tuple[float, ...]  # ratings; 0 for images that are only compared in pairs
    pairs: tuple[tuple[int, int], ...]  # (better, worse) indices
    unrated_names: tuple[str, ...]  # of images without a rating, which are left out


class ScorerEarlyStop(Exception):
    """The validation score of a member has not improved for `patience` checks."""


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
    resume: ResumeFolder | None = None,
    device="cpu",
    report: Callable[[int, int, str], None] | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> ScoreTrainingResult:
    """Train `settings.members` networks, one per fold, and measure each on its own fold.

    `groups`: names of near-duplicate groups by index of the data; a group never spans two folds. `pairs`: (better,
    worse) indices for the pairwise task; without them every two images of different rating are a pair. `trunk(info)`
    builds the trunk of backbones on a loaded model. `pretrained`: a model whose trunk is the starting point. `resume`:
    where finished networks and the current one are saved, so that the same call continues a stopped training as if it
    had never stopped.

    Raises ValueError for too few ratings, ratings that are all the same or do not suit the task, and a pretrained model
    that does not fit."""
    task, groups = build_rating_task(
        data, scorer, settings, latent_format, pairs, groups or [item.id for item in data.items], pretrained
    )
    folds = metrics.grouped_folds(fold_groups(groups, task, settings), settings.members, settings.seed)
    networks, losses, held_out = [], [], []
    for fold in range(settings.members):
        network = call_with_seed(
            settings.seed * 1009 + fold, lambda: build_scorer(task.info, trunk and trunk(task.info))
        ).to(device)
        if pretrained is not None:
            load_pretrained_trunk(network, pretrained, fold)
        member = EnsembleMember(task, denoiser, network, scorer, settings, fold)
        progress = make_progress_callback(
            report,
            check_interrupt,
            first_step=fold * settings.steps,
            total=settings.members * settings.steps,
            prefix=f"network {fold + 1} of {settings.members}, ",
        )
        losses.append(member.train_member(np.flatnonzero(folds != fold), groups, progress, resume or ResumeFolder()))
        held_out.append(member.predict_held_out(np.flatnonzero(folds == fold), check_interrupt))
        networks.append(network.cpu().eval().requires_grad_(False))
    outputs = merge_fold_outputs(held_out, len(task.data))
    return build_score_result(task, settings, networks, losses[0], outputs, folds, groups)


def make_progress_callback(report, check_interrupt, first_step: int = 0, total: int = 0, prefix: str = ""):
    """A callback for the training loop: asks for interrupts, then reports (steps done, steps in all, words)."""

    def on_progress(progress):
        check_interrupt()
        if report:
            report(first_step + progress.step, total or progress.steps, prefix + progress.format_line())

    return on_progress


# -- the task ----------------------------------------------------------------------------------------------------------


def build_rating_task(data, scorer, settings, latent_format, pairs, groups, pretrained) -> tuple[RatingTask, list]:
    """(the task, the duplicate groups of its images). ValueError for too few or unsuitable ratings."""
    by_pairs = bool(pairs) and settings.task == "pairwise"
    compared = {index for pair in pairs for index in pair}
    chosen = [i for i, item in enumerate(data.items) if (i in compared if by_pairs else item.score is not None)]
    names = [item.path or item.id for item in data.items]
    if by_pairs:
        check_rated_count(len(chosen), settings.few)
    else:
        check_ratings(names, [item.score for item in data.items], settings.few)
    position = {index: place for place, index in enumerate(chosen)}
    scores = tuple(float(data.items[i].score or 0.0) for i in chosen)
    task_pairs = (
        tuple((position[a], position[b]) for a, b in pairs) if by_pairs else pairs_from_ratings(scores, settings)
    )
    info = build_score_model_info(data, scorer, settings, latent_format, scores, pretrained)
    unrated_names = tuple(names[i] for i in range(len(data)) if i not in position)
    subset = replace(data, items=[data.items[i] for i in chosen])
    return RatingTask(subset, info, scores, task_pairs, unrated_names), [groups[i] for i in chosen]


def pairs_from_ratings(scores, settings) -> tuple[tuple[int, int], ...]:
    """(better, worse) indices of every two images of different rating, at most MAX_RATING_PAIRS of them, for the
    pairwise task; no pairs for other tasks."""
    if settings.task != "pairwise":
        return ()
    scores = np.asarray(scores)
    pairs = np.argwhere(scores[:, None] > scores[None])
    if len(pairs) > MAX_RATING_PAIRS:
        pairs = pairs[np.random.default_rng(settings.seed).choice(len(pairs), MAX_RATING_PAIRS, replace=False)]
    return tuple((better, worse) for better, worse in pairs.tolist())


def build_score_model_info(data, scorer, settings, latent_format, scores, pretrained) -> ScoreModelInfo:
    """What is known of the score model before it is trained; with `pretrained`, its trunk is as in that model."""
    classes = rating_classes(scores, settings.task)
    standardised = settings.task in ("regression", "distribution")
    info = ScoreModelInfo(
        backbone=scorer.backbone,
        task=settings.task,
        latent_format=latent_format,
        channels=data.channels,
        width=scorer.width,
        depth=scorer.depth,
        noisy=scorer.noisy,
        outputs=head_output_size(settings.task, len(classes)),
        classes=classes,
        mean=float(np.mean(scores)) if standardised else 0.0,
        std=float(np.std(scores)) if standardised else 1.0,
        low=float(min(scores)),
        high=float(max(scores)),
        members=settings.members,
        resolution=median_resolution(data),
        dataset=compute_fingerprint(data.fingerprint, list(scores)),
        rank=scorer.rank,
    )
    return info if pretrained is None else adopt_pretrained_trunk(info, pretrained.info)


def rating_classes(scores, task) -> tuple[str, ...]:
    """The different ratings in ascending order, for the classification tasks; () for others. ValueError for too few or
    too many of them."""
    found = sorted(set(scores))
    if task == "binary" and len(found) != 2:
        raise ValueError(
            f"The task binary needs two different ratings, such as 0 and 1, and there are {len(found)}. Choose "
            "regression, or rate so."
        )
    if task == "multiclass" and len(found) > MAX_RATING_CLASSES:
        raise ValueError(
            f"The task multiclass takes at most {MAX_RATING_CLASSES} different ratings, and there are {len(found)}. "
            "Choose regression."
        )
    return tuple(f"{score!r}" for score in found) if task in ("binary", "multiclass") else ()


def median_resolution(data) -> int:
    """Side in pixels of the square with the median image's area; 0 where the sizes are not known."""
    areas = [item.bucket[0] * item.bucket[1] for item in data.items if item.bucket]
    return round(float(np.median(areas)) ** 0.5) if areas else 0


def adopt_pretrained_trunk(info: ScoreModelInfo, pretrained: ScoreModelInfo) -> ScoreModelInfo:
    """`info` with the architecture of a pretrained trunk. ValueError where that trunk reads another latent format."""
    if (pretrained.channels, pretrained.latent_format or info.latent_format) != (
        info.channels,
        info.latent_format or pretrained.latent_format,
    ):
        raise ValueError(
            f"The pretrained backbone sees latents of {pretrained.latent_format or 'an unnamed format'} "
            f"({pretrained.channels} channels), and these are of {info.latent_format or 'an unnamed format'} "
            f"({info.channels} channels). Pretrain one on this kind of latent."
        )
    return replace(
        info, backbone=pretrained.backbone, width=pretrained.width, depth=pretrained.depth, rank=pretrained.rank
    )


def load_pretrained_trunk(network: Scorer, pretrained: ScorerEnsemble, fold: int) -> None:
    """Start this fold's network from the trunk of a pretrained one; with several, each fold takes another."""
    source = pretrained.networks[fold % len(pretrained.networks)]
    assert isinstance(source, Scorer)  # what has no trunk of its own was refused before
    network.trunk.load_state_dict(source.trunk.state_dict())


def fold_groups(groups, task: RatingTask, settings) -> list:
    """The group of each image; a group stays in one fold. Near-duplicates are a group, and so are both sides of a pair,
    unless the pairs tie (nearly) everything to everything: then pairs across folds are neither trained on nor
    measured."""
    if task.info.task != "pairwise":
        return list(groups)
    tied = metrics.merge_paired_groups(groups, task.pairs)
    sizes = Counter(tied)
    fits = max(sizes.values()) <= 1.5 * len(tied) / settings.members and len(sizes) >= settings.members
    return tied if fits else list(groups)


# -- one member --------------------------------------------------------------------------------------------------------


@dataclass
class EnsembleMember:
    """One network of the ensemble: trained without its fold, then asked about it."""

    task: RatingTask
    denoiser: Denoiser
    network: Scorer
    scorer: ScorerSettings
    settings: ScoreSettings
    fold: int

    def train_member(self, index, groups, progress, resume: ResumeFolder) -> list[float]:
        """The losses. Afterwards the network holds the EMA weights of the best validation score."""
        if finished := resume.load_finished(self.fold):
            self.network.load_state_dict(finished["network"])
            return finished["losses"].tolist()
        index, validation = self.split_validation(index, groups)
        settings = self.settings
        method = ScoreTraining(
            self.denoiser,
            self.network,
            replace(self.task.data, items=[self.task.data.items[i] for i in index]),
            self.task.info,
            score_targets([self.task.scores[i] for i in index], self.task.info),
            self.pairs_within(index, local=True),
            settings,
            self.scorer.dropout,
        )
        run = RunSettings(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            seed=settings.seed * 1009 + self.fold,
            save_every=settings.check_every,
        )
        optimizer = OptimizerSettings(
            schedule="cosine", weight_decay=settings.weight_decay, warmup=settings.steps // 20
        )
        store = EarlyStoppingStore(
            method,
            lambda: self.validation_score(validation),
            settings.patience if len(validation) else 0,
            resume,
            self.fold,
        )
        with contextlib.suppress(ScorerEarlyStop):
            train(method, run, optimizer, report=progress, store=store)
        method.load_weights(store.best_average)
        resume.save_finished(self.fold, {"network": self.network.state_dict(), "losses": torch.tensor(store.losses)})
        return store.losses

    def split_validation(self, index, groups):
        """(training indices, validation indices); groups stay whole. With too few images there is no validation set."""
        names = [groups[i] for i in index]
        if (
            not self.settings.patience
            or len(set(names)) < VALIDATION_FOLDS
            or len(index) // VALIDATION_FOLDS < MIN_VALIDATION_IMAGES
        ):
            return index, index[:0]
        held_out = metrics.grouped_folds(names, VALIDATION_FOLDS, self.settings.seed + 1) == 0
        enough = self.task.info.task != "pairwise" or len(self.pairs_within(index[held_out])) >= MIN_VALIDATION_IMAGES
        return (index[~held_out], index[held_out]) if enough else (index, index[:0])

    def pairs_within(self, index, local=False) -> list[tuple[int, int]]:
        """The pairs with both sides among these images; `local`: as positions in index."""
        position = {int(i): place for place, i in enumerate(index)}
        return [
            (position[a], position[b]) if local else (a, b)
            for a, b in self.task.pairs
            if a in position and b in position
        ]

    def validation_score(self, index) -> float:
        """How well the predictions for these images agree with their ratings: the mean over clean latents and, for a
        noise-conditioned model, latents at noise level 0.5."""
        levels = (0.0, 0.5) if self.task.info.noisy else (0.0,)
        return float(np.mean([self.target_agreement(index, self.predict_outputs(index, level)) for level in levels]))

    def target_agreement(self, index, outputs) -> float:
        """Accuracy (multiclass), pairwise accuracy, AUROC (binary) or SRCC of the outputs for these images."""
        info, ratings = self.task.info, np.array([self.task.scores[i] for i in index])
        if info.task == "multiclass":
            return metrics.accuracy(outputs.argmax(1).numpy(), score_targets(ratings, info).numpy())
        predictions = score_from_outputs(outputs, info).numpy()
        if info.task == "pairwise":
            return float(np.mean(pair_outcomes(dict(zip(index, predictions, strict=True)), self.pairs_within(index))))
        return (
            metrics.auroc(predictions, ratings > ratings.mean())
            if info.task == "binary"
            else metrics.srcc(predictions, ratings)
        )

    @torch.no_grad()
    def predict_outputs(self, index, level: float, check_interrupt=lambda: None) -> torch.Tensor:
        """(len(index), outputs) at one noise level, batched by latent shape. The noise is the same at every call."""
        items, rows = [self.task.data.items[i] for i in index], {}
        for batch in batch_indices_by_shape([item.shape for item in items]):
            check_interrupt()
            rows |= zip(batch, self.network(*self.scorer_input([items[i] for i in batch], level)).cpu(), strict=True)
        return torch.stack([rows[i] for i in range(len(items))])

    def scorer_input(self, items, level):
        """(x, level) for the network: the latents' means, noised to this level with a fixed seed."""
        rng = torch.Generator().manual_seed(1)
        means = torch.stack([self.task.data.store.load(item.latent)["mean"].float() for item in items])
        sigma = level_to_sigma(self.denoiser, torch.full((len(items),), level))
        return noised_scorer_input(
            self.denoiser, self.denoiser.model_space(means), sigma, torch.full((len(items),), level > 0), rng
        )

    def predict_held_out(self, index, check_interrupt) -> dict[float, dict[int, torch.Tensor]]:
        """{noise level: {image index: outputs}} for the images of this member's own fold."""
        levels = (0.0, *REPORTED_NOISE_LEVELS) if self.task.info.noisy else (0.0,)
        return {
            level: dict(zip(index.tolist(), self.predict_outputs(index, level, check_interrupt), strict=True))
            for level in levels
        }


class EarlyStoppingStore(NoStore):
    """Early stopping as a store of the training loop: keeps the EMA weights of the best validation score, and raises
    ScorerEarlyStop when it has not improved for `patience` checks.

    It hangs on the loop's saves, which come at fixed steps; reports come by the clock, and a run stopped by them could
    not be repeated. A run that is interrupted at a step to check is checked then, because it will not pass that step
    again."""

    def __init__(
        self,
        method: ScoreTraining,
        measure_score: Callable[[], float],
        patience: int,
        resume: ResumeFolder,
        number: int,
    ):
        self.method, self.measure_score, self.patience = method, measure_score, patience
        self.resume, self.number = resume, number  # of the network
        self.best_average, self.best_score, self.checks_without_gain, self.last_checked_step, self.losses = (
            method.average,
            -math.inf,
            0,
            0,
            [],
        )
        self.ended = False

    def load(self):
        """The saved state of the loop, or None; the state of the early stopping is taken from beside it."""
        saved = self.resume.load_current(self.number)
        if saved is None:
            return None
        self.best_average = [v.to(p) for v, p in zip(saved["best"], self.method.parameters(), strict=True)]
        self.best_score, self.checks_without_gain, self.last_checked_step, self.losses = (
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
        if (
            step
            and step != self.last_checked_step
            and (why == "finished" or step % self.method.settings.check_every == 0)
        ):
            self.check_average(step)
        if step and not self.ended and why != "finished" and self.resume.save_due(why):
            self.resume.save_current(self.number, self.state(state), step)
        if why == "step":
            self.stop_if_stalled()

    def state(self, run) -> dict:
        """What is written to disk, so its keys stay: the loop's state, that of the early stopping, and the buffers
        (such as fitted feature statistics), which the optimizer's state does not hold."""
        buffers = dict(self.method.network.named_buffers())
        fixed = {name: value for name, value in self.method.network.state_dict().items() if name in buffers}
        return {
            "run": run,
            "best": self.best_average,
            "height": self.best_score,
            "since": self.checks_without_gain,
            "asked": self.last_checked_step,
            "fixed": fixed,
        }

    def check_average(self, step: int):
        """Measure the current EMA weights, and keep them if they are the best so far. Without patience the latest are
        kept."""
        self.last_checked_step = step
        if not self.patience:
            self.best_average = self.method.average
            return
        now = [p.detach().clone() for p in self.method.parameters()]
        self.method.load_weights(self.method.average)
        score = self.measure_score()
        self.method.load_weights(now)
        if score > self.best_score:
            self.best_average, self.best_score, self.checks_without_gain = self.method.average, score, 0
        else:
            self.checks_without_gain += 1

    def stop_if_stalled(self):
        if self.patience and self.checks_without_gain >= self.patience:
            self.ended = True
            raise ScorerEarlyStop


# -- metrics and report ------------------------------------------------------------------------------------------------


def merge_fold_outputs(held_out, count) -> dict[float, torch.Tensor]:
    """{noise level: (N, outputs)} from each member's outputs for its own fold."""
    return {
        level: torch.stack([next(fold[level][i] for fold in held_out if i in fold[level]) for i in range(count)])
        for level in held_out[0]
    }


def build_score_result(task: RatingTask, settings, networks, losses, outputs, folds, groups) -> ScoreTrainingResult:
    """The score model with its calibration, metrics and report, from the out-of-fold outputs {noise level: (N,
    outputs)}."""
    info = fit_calibration(task, settings, outputs[0.0])
    name, chance = primary_metric(task)
    clean = compute_level_metrics(task, info, outputs[0.0], folds, groups, settings.seed)
    noisy = {
        f"{name} at noise {level:g}": compute_level_metrics(task, info, out, folds, groups, settings.seed, only=name)[
            name
        ]
        for level, out in outputs.items()
        if level
    }
    rounded = {n: [round(v, 4) for v in (e.value, e.low, e.high)] for n, e in (clean | noisy).items()}
    info = replace(info, trained=bool(clean[name].low > chance), metrics=rounded)
    predictions = to_rating_scale(score_from_outputs(outputs[0.0], info), info).tolist()
    lines = [
        *format_score_training_lines(task, info, name, chance, clean[name], rounded),
        *format_rating_disagreements(task, info, predictions),
    ]
    return ScoreTrainingResult(ScorerEnsemble(networks, info), losses, lines, predictions)


def primary_metric(task: RatingTask) -> tuple[str, float]:
    """(name of the metric that decides whether anything was learnt, its value by chance)."""
    if task.info.task == "multiclass":
        share = max(Counter(task.scores).values()) / len(task.scores)
        return "accuracy", share
    return {"binary": ("AUROC", 0.5), "pairwise": ("pairwise accuracy", 0.5)}.get(task.info.task, ("SRCC", 0.0))


def fit_calibration(task: RatingTask, settings, outputs) -> ScoreModelInfo:
    """The task's info with a calibration line or curve fitted to the out-of-fold outputs."""
    info = task.info
    if info.task not in ("regression", "distribution") or settings.calibration == "off":
        return info
    predictions = (score_from_outputs(outputs, info) * info.std + info.mean).numpy()
    if settings.calibration == "isotonic" and len(predictions) >= MIN_ISOTONIC_RATINGS:
        return replace(info, curve=metrics.fit_isotonic_curve(predictions, task.scores))
    return replace(info, line=metrics.fit_calibration_line(predictions, task.scores))


def compute_level_metrics(
    task: RatingTask, info: ScoreModelInfo, outputs, folds, groups, seed, only: str = ""
) -> dict[str, MetricEstimate]:
    """{name: estimate} of the metrics at one noise level; `only`: of this one alone. The intervals resample duplicate
    groups as a whole."""
    if info.task == "pairwise":
        pairs = [(a, b) for a, b in task.pairs if folds[a] == folds[b]]
        if not pairs:
            raise ValueError(
                f"None of the {len(task.pairs)} pairs has both sides in one of the {folds.max() + 1} parts that the "
                "images are divided into. Give more pairs, or fewer members."
            )
        right = np.array(pair_outcomes(score_from_outputs(outputs, info).numpy(), pairs))
        better = [groups[a] for a, _ in pairs]  # pairs that share their better image are no independent evidence
        return {"pairwise accuracy": metrics.bootstrap_hit_rate(right, seed, better)}
    return {
        name: bootstrap_interval(metric, predictions, truth, seed, groups=groups)
        for name, (metric, predictions, truth) in metric_inputs(info, outputs, np.array(task.scores)).items()
        if not only or name == only
    }


def metric_inputs(info: ScoreModelInfo, outputs, ratings) -> dict[str, tuple]:
    """{name: (metric, predictions, ground truth)}"""
    predictions = score_from_outputs(outputs, info).numpy()
    if info.task == "multiclass":
        return {
            "accuracy": (metrics.accuracy, outputs.argmax(1).numpy(), score_targets(ratings, info).numpy()),
            "SRCC": (metrics.srcc, predictions, ratings),
        }
    if info.task == "binary":
        label = score_targets(ratings, info).numpy()
        return {"AUROC": (metrics.auroc, predictions, label), "F1": (metrics.f1_score, predictions, label)}
    calibrated = to_rating_scale(score_from_outputs(outputs, info), info).numpy()
    return {
        "SRCC": (metrics.srcc, predictions, ratings),
        "PLCC": (metrics.plcc, predictions, ratings),
        "MAE": (metrics.mae, calibrated, ratings),
        "pairwise accuracy": (metrics.pairwise_accuracy, predictions, ratings),
    }


def pair_outcomes(predictions, pairs) -> list[float]:
    """1 for each (better, worse) pair that is predicted in order, 0 for one that is not, 0.5 for a tie."""
    return [0.5 + 0.5 * float(np.sign(predictions[a] - predictions[b])) for a, b in pairs]


def format_score_training_lines(
    task: RatingTask, info: ScoreModelInfo, name, chance, estimate: MetricEstimate, figures
) -> list[str]:
    """The report: whether the model beats chance by the metric `name`, every other figure, and what was left out."""
    count = (
        f"{len(task.pairs)} pairs of {len(task.data)} images"
        if info.task == "pairwise"
        else f"{len(task.data)} rated images"
    )
    if info.trained:
        lines = [f"Trained on {count}: {name} {estimate} on images that were not learnt from."]
    else:
        lines = [
            f"NOT TRAINED: {name} is {estimate} on images that were not learnt from, and chance gives {chance:g}. "
            "What it says cannot be told from chance. Rate more images, rate them more evenly (the same image "
            "twice should get the same number), or ask for something that can be seen in an image. It can be tried, "
            "and Save Score Model does not save it."
        ]
    lines += [f"{n}: {v:.3f} ({low:.3f} to {high:.3f})" for n, (v, low, high) in figures.items() if n != name]
    lines.append(
        f"{info.members} networks ({info.backbone}), each measured on its own share of the images. The brackets "
        "hold 95 of 100 bootstrap draws."
    )
    if task.unrated_names:
        lines.append(
            f"{len(task.unrated_names)} images without a rating were left out: "
            f"{', '.join(task.unrated_names[:5])}{', ...' * (len(task.unrated_names) > 5)}"
        )
    return lines


def format_rating_disagreements(
    task: RatingTask, info: ScoreModelInfo, predictions: list[float], most: int = 5
) -> list[str]:
    """One line naming the images whose prediction is furthest from their rating: a mistaken rating, or a weakness of
    the model."""
    if info.task not in ("regression", "distribution") or not info.trained:
        return []
    worst = sorted(range(len(predictions)), key=lambda i: -abs(predictions[i] - task.scores[i]))[:most]
    names = [Path(task.data.items[i].path or task.data.items[i].id).name for i in worst]
    named = [
        f"{name} (rated {task.scores[i]:g}, said {predictions[i]:.3g})" for i, name in zip(worst, names, strict=True)
    ]
    return [f"Look again at the ratings of {', '.join(named)}."]


def rate_latents(
    model: ScorerEnsemble, latents: Sequence[torch.Tensor], device="cpu", report=None, check_interrupt=lambda: None
):
    """(ratings on the user's scale, standard deviations between members) of clean latents (C, ..., h, w) in model
    space, as two lists in their order."""
    rated: dict[int, tuple[float, float]] = {}
    try:
        model.to(device)
        for batch in batch_indices_by_shape([tuple(x.shape) for x in latents]):
            check_interrupt()
            ratings, spreads = model.ratings(torch.stack([latents[i] for i in batch]).to(device, torch.float32))
            rated |= zip(batch, zip(ratings.tolist(), spreads.tolist(), strict=True), strict=True)
            if report:
                report(len(rated), len(latents), "scored")
    finally:
        model.to("cpu")
    return [rated[i][0] for i in range(len(latents))], [rated[i][1] for i in range(len(latents))]
