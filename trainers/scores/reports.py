"""Score models and scores in words, as the nodes show them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.records import ImageDataset
from .networks import PRETRAINING_TASK, ScoreModelInfo


def format_score_model_summary(info: ScoreModelInfo) -> str:
    """What a score model judges, how good it is, and what it was trained on, a line each."""
    facts = [
        "" if info.trained else "NOT TRAINED: what it says cannot be told from chance.",
        f"{describe_score_model_kind(info)} on {info.latent_format or 'latents'} of {info.channels} channels",
        "at any noise level" if info.noisy else "of clean images only",
        f"figures on images that were not learnt from: {format_score_metrics(info)}",
        f"ratings from {info.low:g} to {info.high:g}, mean {info.mean:g}"
        if info.task in ("regression", "distribution")
        else "",
        f"trained at about {info.resolution}x{info.resolution} px" if info.resolution else "",
    ]
    return "\n".join(fact for fact in facts if fact)


def describe_score_model_kind(info: ScoreModelInfo) -> str:
    """Task, ensemble and backbone of a score model, in words."""
    if info.task == PRETRAINING_TASK:
        return (
            f"a pre-trained backbone without a head ({info.backbone}), for the input pretrained of Train Score Model,"
        )
    lora = f" with a LoRA of rank {info.rank}" if info.rank else ""
    return f"{info.task} by {info.members} networks ({info.backbone}{lora})"


def format_score_metrics(info: ScoreModelInfo) -> str:
    """The metrics of a score model with their intervals, on one line."""
    return (
        ", ".join(f"{name} {value:.3f} ({low:.3f} to {high:.3f})" for name, (value, low, high) in info.metrics.items())
        or "it was not measured"
    )


def format_rating_summary(dataset: ImageDataset) -> str:
    """How many images are rated, and between which ratings."""
    scores = [r.score for r in dataset if r.score is not None]
    if not scores:
        return f"none of {len(dataset)} images is rated"
    return (
        f"{len(scores)} of {len(dataset)} images are rated, from {min(scores):g} to {max(scores):g}, "
        f"{len(set(scores))} different ratings"
    )


def format_score_report(
    info: ScoreModelInfo, scores: Sequence[float], spreads: Sequence[float], names: Sequence[str]
) -> str:
    """Mean and range of the scores, then every image from the best to the worst."""
    head = f"{len(scores)} images scored: mean {np.mean(scores):.3f}, from {min(scores):.3f} to {max(scores):.3f}"
    warning = [] if info.trained else ["This score model cannot be told from chance; its scores say nothing."]
    best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
    return "\n".join([head, *warning, *(f"{scores[i]:.3f} +-{spreads[i]:.3f} {names[i]}" for i in best_first)])


def format_selection(kept: ImageDataset, removed: ImageDataset) -> str:
    """How many images stay and how many go, with the range of their scores."""
    return f"{format_scored_count(kept, 'stay')}\n{format_scored_count(removed, 'go')}"


def format_scored_count(dataset: ImageDataset, what: str) -> str:
    """The number of images and the range of their scores, where there are any."""
    scores = [record.score for record in dataset if record.score is not None]
    span = f", scores from {min(scores):g} to {max(scores):g}" if scores else ""
    return f"{len(dataset)} images {what}{span}"
