"""Pre-train a latent backbone on images without ratings, and report what its features are worth.

Two probes run on held-out images before and after: retrieval (is the nearest neighbour of one crop another crop of the
same image) and a linear probe (ridge regression of ratings or classes from the features).
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
from .training import make_progress_callback

HOLDOUT_ONE_IN = 6  # one image in so many is held out
MIN_HOLDOUT_IMAGES = 12
MIN_PROBE_LABELS = 20
RIDGE_FOLDS = 5
RIDGE_STRENGTHS = tuple(10.0**power for power in range(-2, 6))
PROBE_BATCH_SIZE = 32


@dataclass
class PretrainingResult:
    """A pre-trained backbone with its losses and report."""

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
    resume: ResumeFolder | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> PretrainingResult:
    """Train `settings.backbone` on the views of the images and probe it. `labels`: class names by image, None where
    there is none. `resume`: where a stopped training is saved and continued from. ValueError for too few images, or a
    weight on classes where there are none."""
    labels = list(labels) or [None] * len(views)
    names, numbers = index_class_labels(labels)
    check_pretraining_data(views, settings, names)
    info = ScoreModelInfo(
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
    network = call_with_seed(settings.seed, lambda: build_scorer(info))
    heads = call_with_seed(
        settings.seed + 1, lambda: build_pretext_heads(network.trunk, views.shape, settings, len(names))
    ).to(device)
    network.to(device)
    train_index, held_out = split_holdout(len(views), settings.seed)
    before = probe_backbone(network.trunk, views, denoiser, held_out, labels, check_interrupt)
    method = PretextTraining(denoiser, network.trunk, heads, views, train_index, settings, scorer.noisy, numbers)
    losses = train(
        method,
        RunSettings(steps=settings.steps, learning_rate=settings.learning_rate, seed=settings.seed, save_every=0),
        OptimizerSettings(schedule="cosine", weight_decay=0.05, warmup=settings.steps // 20),
        report=make_progress_callback(report, check_interrupt),
        store=SingleNetworkStore(resume or ResumeFolder()),
    )
    after = probe_backbone(network.trunk, views, denoiser, held_out, labels, check_interrupt)
    network.cpu().eval().requires_grad_(False)
    zero_head(network.head)
    estimates = after | {f"{name}, untrained": estimate for name, estimate in before.items()}
    rounded = {name: [round(v, 4) for v in (e.value, e.low, e.high)] for name, e in estimates.items()}
    model = ScorerEnsemble([network], replace(info, metrics=rounded))
    return PretrainingResult(
        model, losses, format_pretraining_lines(len(train_index), held_out, settings, before, after)
    )


def check_pretraining_data(views: ViewDataset, settings: PretextSettings, names) -> None:
    """ValueError for too few images, or a weight on classes with fewer than two of them."""
    if len(views) < 2:
        raise ValueError(
            f"There is {len(views)} image to learn from; two are the least, and some hundred are recommended."
        )
    if settings.classes and len(names) < 2:
        raise ValueError(
            f"classes is {settings.classes:g}, and the images have {len(names)} classes. Put them into folders "
            "named after their classes, name a file with labels, or set classes to 0."
        )


def index_class_labels(labels) -> tuple[list[str], list[int | None]]:
    """(class names in order, the class number of each image or None)."""
    names = sorted({label for label in labels if label is not None})
    numbers = {name: number for number, name in enumerate(names)}
    return names, [None if label is None else numbers[label] for label in labels]


def split_holdout(count: int, seed: int) -> tuple[list[int], list[int]]:
    """(training indices, held-out indices). With few images both are all of them."""
    held_out = count // HOLDOUT_ONE_IN
    if held_out < MIN_HOLDOUT_IMAGES:
        return list(range(count)), list(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def zero_head(head) -> None:
    """Make the head predict 0: it is trained later, on ratings."""
    with torch.no_grad():
        head[-1].weight.zero_()
        head[-1].bias.zero_()


# -- probes ------------------------------------------------------------------------------------------------------------


def probe_backbone(
    trunk, views: ViewDataset, denoiser, held_out, labels, check_interrupt=lambda: None
) -> dict[str, MetricEstimate]:
    """{probe: estimate} of the features of clean latents: retrieval on the held-out images, ridge regression on all
    that have a rating or a class."""
    features = lambda index, crop: embed_crops(trunk, views, denoiser, index, crop, check_interrupt)
    hits = retrieval_hits(features(held_out, 0), features(held_out, 1))
    found = {"same picture found": metrics.bootstrap_hit_rate(hits.double().numpy())}
    scores = {i: record.score for i, record in enumerate(views.dataset) if record.score is not None}
    if len(scores) >= MIN_PROBE_LABELS and len(set(scores.values())) > 1:
        ratings = torch.tensor(list(scores.values()))
        predictions = predict_out_of_fold(features(list(scores), 0), ratings[:, None])[:, 0]
        found["ridge SRCC"] = metrics.bootstrap_interval(metrics.srcc, predictions.numpy(), ratings.numpy())
    names, numbers = index_class_labels(labels)
    classes = {i: number for i, number in enumerate(numbers) if number is not None}
    if len(classes) >= MIN_PROBE_LABELS and len(names) > 1:
        truth = torch.tensor(list(classes.values()))
        one_hot = torch.nn.functional.one_hot(truth, len(names)).float()
        hits = predict_out_of_fold(features(list(classes), 0), one_hot).argmax(1) == truth
        found["ridge class accuracy"] = metrics.bootstrap_hit_rate(hits.double().numpy())
    return found


@torch.no_grad()
def embed_crops(trunk, views: ViewDataset, denoiser, index, crop: int, check_interrupt) -> Tensor:
    """(n, size) features of one crop of each image, from clean latents."""
    parts, device = [], next(trunk.parameters()).device
    for start in range(0, len(index), PROBE_BATCH_SIZE):
        check_interrupt()
        latents = torch.stack(
            [
                views.load_latent(views.views_by_image[i][CROP_VIEW][crop])
                for i in index[start : start + PROBE_BATCH_SIZE]
            ]
        )
        parts.append(
            trunk(denoiser.model_space(latents).to(device), torch.zeros(len(latents), device=device)).float().cpu()
        )
    return torch.cat(parts)


def retrieval_hits(queries: Tensor, answers: Tensor) -> Tensor:
    """(n,) whether the answer nearest to each query is its own, by cosine after both are standardised."""
    mean, std = answers.mean(0), answers.std(0, unbiased=False).clamp(min=1e-6)
    a, b = (torch.nn.functional.normalize((rows - mean) / std, dim=1) for rows in (queries, answers))
    return (a @ b.T).argmax(1) == torch.arange(len(a))


def predict_out_of_fold(rows: Tensor, targets: Tensor, folds: int = RIDGE_FOLDS, seed: int = 0) -> Tensor:
    """(n, k) out-of-fold predictions of ridge regression; its strength is chosen within each training part."""
    fold = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)) % folds
    predictions = torch.zeros_like(targets)
    for number in range(folds):
        held_out = fold == number
        if bool(held_out.any()) and not bool(held_out.all()):
            predictions[held_out] = ridge_regression(rows[~held_out], targets[~held_out], rows[held_out])
    return predictions


def ridge_regression(rows: Tensor, targets: Tensor, others: Tensor) -> Tensor:
    """(m, k) predictions for `others`, by ridge regression with the strength of least leave-one-out error (Allen
    1974)."""
    mean, std, target_mean = rows.mean(0), rows.std(0, unbiased=False).clamp(min=1e-6), targets.mean(0)
    x, z = ((part - mean).double() / std for part in (rows, others))
    values, vectors = torch.linalg.eigh(x @ x.T)
    y = (targets - target_mean).double()

    def weights(strength):
        inverse = (vectors / (values.clamp(min=0) + strength * x.shape[1])) @ vectors.T
        return inverse @ y, inverse.diagonal()[:, None]

    def error(strength):
        alpha, diagonal = weights(strength)
        return float((alpha / diagonal).square().mean())

    return (z @ x.T @ weights(min(RIDGE_STRENGTHS, key=error))[0]).to(targets) + target_mean


def format_pretraining_lines(trained: int, held_out, settings: PretextSettings, before, after) -> list[str]:
    """The report, from the number of training images, the held-out indices and both probes."""
    tasks = ", ".join(f"{name} {weight:g}" for name, weight in settings.tasks() if weight)
    lines = [f"{settings.backbone}, {settings.steps} steps on {trained} images ({tasks})."]
    lines += [f"{name}: {estimate}, untrained {before[name]}" for name, estimate in after.items()]
    where = (
        "images that were held back"
        if len(held_out) < trained
        else "the very images that were learnt from: there are too few to hold some back"
    )
    lines.append(
        f"Likeness of crops was asked of {len(held_out)} {where}. Connect the model to Train Score Model as pretrained."
    )
    if after["same picture found"].value < before["same picture found"].value + 0.02 and "ridge SRCC" not in after:
        lines.append("It tells crops no better than an untrained one: train longer, or on more images.")
    if trained < 2000:
        lines.append(
            "With fewer than 2000 images DINOv2 or DINOv3 as CLIP_VISION often knows more than any backbone that is "
            "trained on them."
        )
    return lines
