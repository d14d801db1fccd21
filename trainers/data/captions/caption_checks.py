"""Checks of captions: empty, identical, without the trigger word, longer than the text encoder reads at once, and too
long to be trained with at all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from ..caption_variants import TRIGGER_PLACEHOLDER, has_trigger_placeholder
from ..findings import SEVERITY_WARN, Finding
from ..records import ImageRecord
from .caption_lengths import MAX_TEXT_TOKENS, describe_excess_length
from .edits import CLIP_ENCODERS, CountTokens


class CaptionLimits(Protocol):
    """The part of the quality settings that is about captions."""

    @property
    def trigger(self) -> str: ...

    @property
    def max_identical(self) -> float: ...

    @property
    def max_clip_tokens(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...


def check_record_captions(
    record: ImageRecord, limits: CaptionLimits, count_tokens: CountTokens | None = None
) -> list[Finding]:
    """What is wrong with the captions of one image. Every alternative is checked, because training may draw any."""
    captions = [caption.strip() for caption in record.captions]
    if not any(captions):
        return [Finding(SEVERITY_WARN, "caption", "empty")]
    found = []
    if "" in captions:
        found.append(Finding(SEVERITY_WARN, "caption", f"{captions.count('')} of {len(captions)} alternatives empty"))
    trigger = limits.trigger.strip().casefold()
    without = sum(
        trigger not in caption.casefold() and not has_trigger_placeholder(caption) for caption in captions if caption
    )
    if without:
        share = f" in {without} of {len(captions)} alternatives" if len(captions) > 1 else ""
        found.append(
            Finding(
                SEVERITY_WARN,
                "trigger",
                f"{limits.trigger.strip()!r} is missing{share}",
            )
        )
    if excess := list_excess_lengths(captions, count_tokens):
        text = f"{excess[0]} > {MAX_TEXT_TOKENS} tokens: Encode Dataset refuses it"
        return [*found, Finding(SEVERITY_WARN, "too long", text)]
    return found + (check_token_lengths(captions, limits, count_tokens) if count_tokens else [])


def list_excess_lengths(captions: Iterable[str], count_tokens: CountTokens | None) -> list[str]:
    """The figures of each text that is too long to be trained with."""
    return list(filter(None, (describe_excess_length(caption, count_tokens) for caption in captions)))


def check_token_lengths(captions: Sequence[str], limits: CaptionLimits, count_tokens: CountTokens) -> list[Finding]:
    """Findings for the longest caption, by each text encoder."""
    longest: dict[str, int] = {}
    for caption in captions:
        for encoder, count in count_tokens(caption).items():
            longest[encoder] = max(count, longest.get(encoder, 0))
    return [
        finding for encoder, count in sorted(longest.items()) for finding in check_encoder_limit(encoder, count, limits)
    ]


def check_encoder_limit(encoder: str, count: int, limits: CaptionLimits) -> Iterable[Finding]:
    if encoder in CLIP_ENCODERS and count > limits.max_clip_tokens:
        chunks = math.ceil(count / limits.max_clip_tokens)
        yield Finding(
            SEVERITY_WARN,
            "tokens",
            f"CLIP-{encoder.removeprefix('clip_').upper()} {count} > {limits.max_clip_tokens}: {chunks} chunks",
        )
    if encoder not in CLIP_ENCODERS and count > limits.max_tokens:
        yield Finding(SEVERITY_WARN, "tokens", f"{encoder} {count} > {limits.max_tokens}")


def format_caption_notes(
    records: Iterable[ImageRecord], limits: CaptionLimits, count_tokens: CountTokens | None = None
) -> list[str]:
    """Lines about all captions together: how many there are, whether too many are identical, how long they get."""
    texts = [caption.strip() for record in records for caption in (record.captions or ("",))]
    full = [text for text in texts if text]
    notes = [f"captions: {len(full)} of {len(texts)} filled, {len(set(full))} different"] if texts else []
    if waiting := sum(map(has_trigger_placeholder, full)):
        notes.append(f"captions: {waiting} say {TRIGGER_PLACEHOLDER}, for which Encode Dataset needs its trigger")
    if len(full) > 1:
        caption, count = Counter(full).most_common(1)[0]
        if count > 1 and count / len(texts) > limits.max_identical:
            shown = caption if len(caption) <= 60 else caption[:60].rstrip() + "..."
            notes.append(f"identical captions: {count / len(texts):.0%} > {limits.max_identical:.0%} read {shown!r}")
    if count_tokens and (counted := [count_tokens(t) for t in full if not describe_excess_length(t, count_tokens)]):
        names = sorted({name for counts in counted for name in counts})
        notes.append("tokens: " + ", ".join(f"{name} at most {max(c.get(name, 0) for c in counted)}" for name in names))
    return notes
