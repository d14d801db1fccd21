"""From pictures without ratings to a backbone that a score model starts from, with a report of what it is worth.

The probes are asked of pictures that were held back, before and after: does the picture that is nearest to one crop
show the same picture, and how well do ratings (or classes) follow from the features by a straight line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..data.views import CROP_VIEW, ViewDataset
from ..diffusion import Denoiser
from ..loop import train
from ..settings import OptimizerSettings, RunSettings, compute_fingerprint
from . import metrics
from .metrics import MetricEstimate
from .networks import PRETRAINING_TASK, ScoreModelInfo, ScorerEnsemble, ScorerSettings, build_scorer, call_with_seed
from .pretext import PretextSettings, PretextTraining, build_pretext_heads
from .resume import ResumeFolder, SingleNetworkStore

HOLDOUT_ONE_IN = 6  # one picture in so many is held back
MIN_HOLDOUT_IMAGES = 12
MIN_PROBE_LABELS = 20
RIDGE_FOLDS = 5
RIDGE_STRENGTHS = tuple(10.0**power for power in range(-2, 6))
PROBE_BATCH_SIZE = 32


@dataclass
class PretrainingResult:
    model: ScorerEnsemble
    losses: list[float]
    lines: list[str] = field(default_factory=list)

    @property
    def report(self) -> str:
        return "\n".join(self.lines)


def pretrain_backbone(
    views: ViewDataset,
    denoiser: Denoiser,
    scorer: ScorerSettings,
    settings: PretextSettings,
    *,
    latent_format: str = "",
    labels: Sequence[str | None] = (),
    device="cpu",
    report: Callable[[int, int, str], None] | None = None,
    work: ResumeFolder | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> PretrainingResult:
    """`labels`: class names by picture, None where there is none. `work`: keeps what is done when the training is
    stopped. ValueError for too few pictures, or classes where there are none."""
    labels = list(labels) or [None] * len(views)
    names, numbers = index_class_labels(labels)
    check_pretraining_data(views, settings, names)
    about = ScoreModelInfo(
        backbone=settings.backbone,
        task=PRETRAINING_TASK,
        latent_format=latent_format,
        channels=views.shape[0],
        width=scorer.width,
        depth=scorer.depth,
        noisy=scorer.noisy,
        resolution=settings.size,
        dataset=compute_fingerprint(views.fingerprint, settings, labels),
    )
    network = call_with_seed(settings.seed, lambda: build_scorer(about))
    heads = call_with_seed(
        settings.seed + 1, lambda: build_pretext_heads(network.trunk, views.shape, settings, len(names))
    ).to(device)
    network.to(device)
    learnt, held = split_holdout(len(views), settings.seed)
    before = probe_backbone(network.trunk, views, denoiser, held, labels, check_interrupt)
    method = PretextTraining(denoiser, network.trunk, heads, views, learnt, settings, scorer.noisy, numbers)
    losses = train(
        method,
        RunSettings(steps=settings.steps, learning_rate=settings.learning_rate, seed=settings.seed, save_every=0),
        OptimizerSettings(schedule="cosine", weight_decay=0.05, warmup=settings.steps // 20),
        report=make_pretraining_progress_callback(report, check_interrupt),
        store=SingleNetworkStore(work or ResumeFolder()),
    )
    after = probe_backbone(network.trunk, views, denoiser, held, labels, check_interrupt)
    network.cpu().eval().requires_grad_(False)
    zero_head(network.head)
    figures = after | {f"{name}, untrained": figure for name, figure in before.items()}
    about = replace(
        about, metrics={name: [round(v, 4) for v in (f.value, f.low, f.high)] for name, f in figures.items()}
    )
    return PretrainingResult(
        ScorerEnsemble([network], about), losses, format_pretraining_lines(len(learnt), held, settings, before, after)
    )


def make_pretraining_progress_callback(report, check_interrupt):
    def tell(progress):
        check_interrupt()
        if report:
            report(progress.step, progress.steps, progress.line())

    return tell


def check_pretraining_data(views: ViewDataset, settings: PretextSettings, names) -> None:
    if len(views) < 2:
        raise ValueError(
            f"There is {len(views)} picture to learn from; two are the least, and some hundred are wanted."
        )
    if settings.classes and len(names) < 2:
        raise ValueError(
            f"classes is {settings.classes:g}, and the pictures have {len(names)} classes. Put them into folders "
            "called after their classes, name a file with labels, or set classes to 0."
        )


def index_class_labels(labels) -> tuple[list[str], list[int | None]]:
    names = sorted({label for label in labels if label is not None})
    return names, [None if label is None else names.index(label) for label in labels]


def split_holdout(count: int, seed: int) -> tuple[list[int], list[int]]:
    """(to learn from, held back). With few pictures all are learnt from and probed."""
    held = count // HOLDOUT_ONE_IN
    if held < MIN_HOLDOUT_IMAGES:
        return list(range(count)), list(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def zero_head(head) -> None:
    """A head that says 0: it is to be learnt."""
    with torch.no_grad():
        head[-1].weight.zero_()
        head[-1].bias.zero_()


# -- probes ------------------------------------------------------------------------------------------------------------


def probe_backbone(
    trunk, views: ViewDataset, denoiser, held, labels, check_interrupt=lambda: None
) -> dict[str, MetricEstimate]:
    """{what: how well} of clean latents."""
    rows = lambda index, crop: embed_crops(trunk, views, denoiser, index, crop, check_interrupt)
    found = {"same picture found": bootstrap_hit_rate(retrieval_hits(rows(held, 0), rows(held, 1)))}
    rated = [i for i, record in enumerate(views.dataset) if record.score is not None]
    if len(rated) >= MIN_PROBE_LABELS and len({views.dataset[i].score for i in rated}) > 1:
        scores = torch.tensor([views.dataset[i].score for i in rated])
        found["ridge SRCC"] = metrics.bootstrap_interval(
            metrics.srcc, predict_out_of_fold(rows(rated, 0), scores[:, None])[:, 0].numpy(), scores.numpy()
        )
    names, numbers = index_class_labels(labels)
    named = [i for i, number in enumerate(numbers) if number is not None]
    if len(named) >= MIN_PROBE_LABELS and len(names) > 1:
        truth = torch.tensor([numbers[i] for i in named])
        said = predict_out_of_fold(rows(named, 0), torch.nn.functional.one_hot(truth, len(names)).float())
        found["ridge class accuracy"] = bootstrap_hit_rate(said.argmax(1) == truth)
    return found


def bootstrap_hit_rate(right: Tensor) -> MetricEstimate:
    """The share of what is right, with its interval."""
    hits = right.double().numpy()
    return metrics.bootstrap_interval(lambda a, _: float(a.mean()), hits, hits)


@torch.no_grad()
def embed_crops(trunk, views: ViewDataset, denoiser, index, crop: int, check_interrupt) -> Tensor:
    """(n, size) features of one crop of each picture."""
    parts, device = [], next(trunk.parameters()).device
    for start in range(0, len(index), PROBE_BATCH_SIZE):
        check_interrupt()
        latents = torch.stack(
            [views.latent(views.pictures[i][CROP_VIEW][crop]) for i in index[start : start + PROBE_BATCH_SIZE]]
        )
        parts.append(
            trunk(denoiser.model_space(latents).to(device), torch.zeros(len(latents), device=device)).float().cpu()
        )
    return torch.cat(parts)


def retrieval_hits(queries: Tensor, answers: Tensor) -> Tensor:
    """(n,) whether the nearest answer to each row, by cosine after both are centred, is its own."""
    middle, size = answers.mean(0), answers.std(0, unbiased=False).clamp(min=1e-6)
    a, b = (torch.nn.functional.normalize((rows - middle) / size, dim=1) for rows in (queries, answers))
    return (a @ b.T).argmax(1) == torch.arange(len(a))


def predict_out_of_fold(rows: Tensor, wanted: Tensor, folds: int = RIDGE_FOLDS, seed: int = 0) -> Tensor:
    """(n, k) what ridge regression says of rows that it did not learn from; its strength is chosen inside each fold."""
    fold = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)) % folds
    said = torch.zeros_like(wanted)
    for number in range(folds):
        own = fold == number
        if bool(own.any()) and not bool(own.all()):
            said[own] = ridge_regression(rows[~own], wanted[~own], rows[own])
    return said


def ridge_regression(rows: Tensor, wanted: Tensor, others: Tensor) -> Tensor:
    """(m, k) for others, by the strength with the least leave-one-out error (Allen 1974)."""
    middle, size, mean = rows.mean(0), rows.std(0, unbiased=False).clamp(min=1e-6), wanted.mean(0)
    x, z = ((part - middle).double() / size for part in (rows, others))
    values, vectors = torch.linalg.eigh(x @ x.T)
    y = (wanted - mean).double()

    def weights(strength):
        inverse = (vectors / (values.clamp(min=0) + strength * x.shape[1])) @ vectors.T
        return inverse @ y, inverse.diagonal()[:, None]

    def error(strength):
        alpha, diagonal = weights(strength)
        return float((alpha / diagonal).square().mean())

    return (z @ x.T @ weights(min(RIDGE_STRENGTHS, key=error))[0]).to(wanted) + mean


def format_pretraining_lines(learnt: int, held, settings: PretextSettings, before, after) -> list[str]:
    tasks = ", ".join(f"{name} {weight:g}" for name, weight in settings.tasks() if weight)
    lines = [f"{settings.backbone}, {settings.steps} steps on {learnt} pictures ({tasks})."]
    lines += [f"{name}: {figure}, untrained {before[name]}" for name, figure in after.items()]
    where = (
        "pictures that were held back"
        if len(held) < learnt
        else "the very pictures that were learnt from: there are too few to hold some back"
    )
    lines.append(
        f"Likeness of crops was asked of {len(held)} {where}. Connect the model to Train Score Model as pretrained."
    )
    if after["same picture found"].value < before["same picture found"].value + 0.02 and "ridge SRCC" not in after:
        lines.append("It tells crops no better than an untrained one: train longer, or on more pictures.")
    if learnt < 2000:
        lines.append(
            "With fewer than 2000 pictures DINOv2 or DINOv3 as CLIP_VISION often knows more than any backbone that is "
            "trained on them."
        )
    return lines
