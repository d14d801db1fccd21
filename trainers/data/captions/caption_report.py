"""Statistics of a dataset's captions: which are missing, repeated or too long, and how often each tag is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..records import ImageDataset
from .edits import CLIP_ENCODERS, CountTokens, caption_tag_key, mentions_phrase, split_tags

CLIP_TOKEN_LIMIT = 75  # CLIP reads 75 tokens at a time
T5_TOKEN_LIMIT = 512  # what Flux and SD3 were trained with
MAX_IDENTICAL_SHARE = 0.3  # a larger share of identical captions gets a warning
MAX_TAG_WORDS = 4  # a piece between two commas counts as a tag up to this many words


def build_caption_report(
    dataset: ImageDataset,
    trigger: str = "",
    count_tokens: CountTokens | None = None,
    check_interrupt: Callable[[], None] | None = None,
) -> dict:
    """The figures as JSON values, with the `warnings` as sentences."""
    captions = [(Path(r.path).name, caption) for r in dataset for caption in r.captions if caption.strip()]
    missing = [Path(r.path).name for r in dataset if not any(map(str.strip, r.captions))]
    firsts = Counter(" ".join(r.captions[0].split()) for r in dataset if r.captions)
    repeated = {text: count for text, count in firsts.items() if count > 1}
    lengths = [len(caption.split()) for _, caption in captions]
    figures = {
        "pictures": len(dataset),
        "captioned": len(dataset) - len(missing),
        "without caption": missing,
        "with alternatives": sum(len(r.captions) > 1 for r in dataset),
        "captions": len(captions),
        "different captions": len({caption for _, caption in captions}),
        "pictures with the same caption": sum(repeated.values()),
        "most repeated": dict(Counter(repeated).most_common(3)),
        "words": {"mean": round(sum(lengths) / len(lengths), 1), "most": max(lengths)} if lengths else {},
        "longest": max(captions, key=lambda one: len(one[1]))[0] if captions else None,
        "tags": count_tags(dataset),
        "tokens": count_tokens_by_encoder(captions, count_tokens, check_interrupt) if count_tokens else {},
        "trigger missing": list_missing_trigger(dataset, trigger),
    }
    return {**figures, "warnings": format_caption_warnings(figures, trigger)}


def count_tags(dataset: ImageDataset) -> dict[str, int]:
    """Tag -> number of images that have it, the most frequent first. Longer pieces of a caption are prose and do not
    count."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for record in dataset:
        pieces = [tag for caption in record.captions for line in caption.split("\n") for tag in split_tags(line)]
        pieces += record.tags
        tags = {caption_tag_key(tag): tag for tag in reversed(pieces) if len(tag.split()) <= MAX_TAG_WORDS}
        names = {**tags, **names}
        counts.update(tags.keys())
    return {names[k]: count for k, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))}


def count_tokens_by_encoder(captions, count_tokens: CountTokens, check_interrupt=None) -> dict[str, dict]:
    """Text encoder -> {mean, most, longest, limit, over}, from (name, caption) pairs. CLIP reads longer texts in
    several chunks; T5 was not trained with them."""
    counted = []
    for name, caption in captions:
        if check_interrupt:
            check_interrupt()
        counted.append((name, count_tokens(caption)))
    return {
        encoder: summarise_encoder_tokens(encoder, [(name, counts[encoder]) for name, counts in counted])
        for encoder in (counted[0][1] if counted else ())
    }


def summarise_encoder_tokens(encoder: str, counts: list[tuple[str, int]]) -> dict:
    clip = encoder in CLIP_ENCODERS
    longest, most = max(counts, key=lambda one: one[1])
    limit = CLIP_TOKEN_LIMIT if clip else T5_TOKEN_LIMIT if encoder.startswith("t5") else None
    over = [name for name, count in counts if limit and count > limit]
    chunks = {"chunks": -(-most // CLIP_TOKEN_LIMIT)} if clip else {}
    return {
        "mean": round(sum(count for _, count in counts) / len(counts), 1),
        "most": most,
        "longest": longest,
        "limit": limit,
        "over": over,
        **chunks,
    }


def list_missing_trigger(dataset: ImageDataset, trigger: str) -> list[str]:
    """Names of images with a caption, or an alternative of it, that does not contain the trigger."""
    if not trigger.strip():
        return []
    return [
        Path(r.path).name
        for r in dataset
        if not r.captions or not all(mentions_phrase(caption, trigger) for caption in r.captions)
    ]


def format_caption_warnings(figures: dict, trigger: str) -> list[str]:
    """One sentence for each thing that is likely to harm the training."""
    total, same = figures["pictures"], figures["pictures with the same caption"]
    found = [
        f"{len(names)} of {total} images {what}: {join_first_names(names)}"
        for names, what in (
            (figures["without caption"], "have no caption"),
            (figures["trigger missing"], f"do not say the trigger {trigger.strip()!r}"),
        )
        if names
    ]
    if same > MAX_IDENTICAL_SHARE * total:
        found.append(
            f"{same} of {total} images share their caption with another ({same / total:.0%} > "
            f"{MAX_IDENTICAL_SHARE:.0%}); equal words teach no difference"
        )
    for encoder, counts in figures["tokens"].items():
        if counts["over"]:
            effect = (
                f"read in up to {counts['chunks']} chunks" if "chunks" in counts else "more than it was trained with"
            )
            found.append(
                f"{len(counts['over'])} captions have more than {counts['limit']} tokens in {encoder} ({effect}): "
                f"{join_first_names(counts['over'])}"
            )
    return found


def join_first_names(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def format_caption_report(figures: dict, tags: int = 30) -> str:
    """The report as text, with the `tags` most frequent tags."""
    words, counts = figures["words"], figures["tags"]
    lines = [
        f"{figures['pictures']} pictures, {figures['captioned']} with captions, {figures['with alternatives']} with "
        "alternatives",
        f"{figures['captions']} captions, {figures['different captions']} different",
    ]
    if words:
        lines.append(f"words: {words['mean']:g} on average, {words['most']} at most; longest: {figures['longest']}")
    lines += [
        f"tokens in {name}: {c['mean']:g} on average, {c['most']} at most ({c['longest']})"
        + (f", limit {c['limit']}" if c["limit"] else "")
        for name, c in figures["tokens"].items()
    ]
    lines += [f"! {warning}" for warning in figures["warnings"]]
    if figures["most repeated"]:
        lines += ["", "most repeated captions"] + [
            f"{count:5} {text[:100]}" for text, count in figures["most repeated"].items()
        ]
    if counts and tags:
        lines += ["", f"{len(counts)} tags (images that have them)"] + [
            f"{count:5} {tag}" for tag, count in list(counts.items())[:tags]
        ]
        lines += [f"  ... {len(counts) - tags} more"] * (len(counts) > tags)
    return "\n".join(lines)
