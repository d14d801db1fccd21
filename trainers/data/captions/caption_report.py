"""Statistics of a dataset's captions: which are missing, repeated or too long, and how often each tag is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..caption_variants import TRIGGER_PLACEHOLDER, has_trigger_placeholder
from ..records import ImageDataset
from .caption_lengths import CLIP_CHUNK_TOKENS, MAX_TEXT_TOKENS, describe_excess_length
from .edits import CLIP_ENCODERS, CountTokens, caption_tag_key, mentions_phrase, split_tags

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
    too_long = list_too_long_captions(captions, count_tokens, check_interrupt)
    readable = [(name, caption) for name, caption in captions if name not in too_long]
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
        "tokens": count_tokens_by_encoder(readable, count_tokens, check_interrupt) if count_tokens else {},
        "too long": too_long,
        "trigger missing": list_missing_trigger(dataset, trigger),
        "trigger unset": [] if trigger.strip() else list_trigger_placeholders(dataset),
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
        encoder: summarise_encoder_tokens(encoder, [(name, counts.get(encoder, 0)) for name, counts in counted])
        for encoder in dict.fromkeys(encoder for _, counts in counted for encoder in counts)
    }


def list_too_long_captions(captions, count_tokens: CountTokens | None, check_interrupt=None) -> dict[str, str]:
    """Name -> figures of each caption that is too long to be trained with."""
    found = {}
    for name, caption in captions:
        if check_interrupt:
            check_interrupt()
        if excess := describe_excess_length(caption, count_tokens):
            found[name] = excess
    return found


def summarise_encoder_tokens(encoder: str, counts: list[tuple[str, int]]) -> dict:
    clip = encoder in CLIP_ENCODERS
    longest, most = max(counts, key=lambda one: one[1])
    limit = CLIP_CHUNK_TOKENS if clip else T5_TOKEN_LIMIT if encoder.startswith("t5") else None
    over = [name for name, count in counts if limit and count > limit]
    chunks = {"chunks": -(-most // CLIP_CHUNK_TOKENS)} if clip else {}
    return {
        "mean": round(sum(count for _, count in counts) / len(counts), 1),
        "most": most,
        "longest": longest,
        "limit": limit,
        "over": over,
        **chunks,
    }


def list_missing_trigger(dataset: ImageDataset, trigger: str) -> list[str]:
    """Names of images with a caption, or an alternative of it, that contains neither the trigger nor its
    placeholder."""
    if not trigger.strip():
        return []
    return [
        Path(r.path).name
        for r in dataset
        if not r.captions
        or not all(mentions_phrase(caption, trigger) or has_trigger_placeholder(caption) for caption in r.captions)
    ]


def list_trigger_placeholders(dataset: ImageDataset) -> list[str]:
    """Names of images with a caption that says [trigger]."""
    return [Path(r.path).name for r in dataset if any(map(has_trigger_placeholder, r.captions))]


def format_caption_warnings(figures: dict, trigger: str) -> list[str]:
    """One sentence for each thing that is likely to harm the training."""
    total, same = figures["pictures"], figures["pictures with the same caption"]
    found = [
        f"{len(names)} of {total} images {what}: {join_first_names(names)}"
        for names, what in (
            (figures["without caption"], "have no caption"),
            (figures["trigger missing"], f"do not say the trigger {trigger.strip()!r}"),
            (
                figures["trigger unset"],
                f"say {TRIGGER_PLACEHOLDER}, which Encode Dataset replaces with its trigger; set one there",
            ),
        )
        if names
    ]
    if same > MAX_IDENTICAL_SHARE * total:
        found.append(
            f"{same} of {total} images share their caption with another ({same / total:.0%} > "
            f"{MAX_IDENTICAL_SHARE:.0%}); equal words teach no difference"
        )
    found += [
        f"the caption of {name} is too long to be trained with (at most {MAX_TEXT_TOKENS} tokens): {excess}"
        for name, excess in figures["too long"].items()
    ]
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
        f"{figures['pictures']} images, {figures['captioned']} with captions, {figures['with alternatives']} with "
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
