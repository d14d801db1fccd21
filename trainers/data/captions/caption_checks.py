"""What is wrong with captions: empty, all alike, without the trigger word, longer than the text encoder reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from ..findings import SEVERITY_WARN, Finding
from ..records import ImageRecord

CountCaptionTokens = Callable[[str], dict[str, int]]
CLIP_ENCODERS = ("l", "g", "h", "clip_l", "clip_g", "clip_h")  # as ComfyUI names the encoders that read in chunks


class CaptionLimits(Protocol):
    trigger: str
    max_identical: float
    max_clip_tokens: int
    max_tokens: int


def check_record_captions(
    record: ImageRecord, limits: CaptionLimits, tokens: CountCaptionTokens | None = None
) -> list[Finding]:
    """Of one record. Every alternative of a caption counts, because training draws any of them."""
    captions = [caption.strip() for caption in record.captions]
    if not any(captions):
        return [Finding(SEVERITY_WARN, "caption", "empty")]
    found = []
    if "" in captions:
        found.append(Finding(SEVERITY_WARN, "caption", f"{captions.count('')} of {len(captions)} alternatives empty"))
    trigger = limits.trigger.strip().casefold()
    without = sum(trigger not in caption.casefold() for caption in captions if caption)
    if without:
        found.append(
            Finding(
                SEVERITY_WARN,
                "trigger",
                f"{limits.trigger.strip()!r} is missing{format_alternatives_share(without, captions)}",
            )
        )
    return found + (check_token_lengths(captions, limits, tokens) if tokens else [])


def format_alternatives_share(count: int, captions) -> str:
    return f" in {count} of {len(captions)} alternatives" if len(captions) > 1 else ""


def check_token_lengths(captions, limits: CaptionLimits, tokens: CountCaptionTokens) -> list[Finding]:
    longest = {}
    for caption in captions:
        for encoder, count in tokens(caption).items():
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
    records: Iterable[ImageRecord], limits: CaptionLimits, tokens: CountCaptionTokens | None = None
) -> list[str]:
    """Sentences about all captions together."""
    texts = [caption.strip() for record in records for caption in (record.captions or ("",))]
    full = [text for text in texts if text]
    notes = [f"captions: {len(full)} of {len(texts)} filled, {len(set(full))} different"] if texts else []
    if len(full) > 1:
        caption, count = Counter(full).most_common(1)[0]
        if count > 1 and count / len(texts) > limits.max_identical:
            notes.append(
                f"identical captions: {count / len(texts):.0%} > {limits.max_identical:.0%} read "
                f"{shorten_caption(caption)!r}"
            )
    if full and tokens:
        counted = [tokens(text) for text in full]
        notes.append(
            "tokens: " + ", ".join(f"{name} at most {max(c[name] for c in counted)}" for name in sorted(counted[0]))
        )
    return notes


def shorten_caption(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[:most].rstrip() + "..."
