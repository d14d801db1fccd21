"""From an image's captions to the texts that are encoded for it: shuffled tags, tag dropout, wildcards and the trigger.

A caption may say which tags are fixed: `sks, 1girl ||| hat, red dress;;;red shoes ||| masterpiece` keeps the tags
before the first ||| and after the second in place, and keeps tags together that ;;; joins. `{red|blue} hat` is a
wildcard: one of its options. `photo of [trigger]` says where the trigger stands, which is in front otherwise.
Everything is drawn before encoding, into as many texts as the settings say, so that text encodings can be cached.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import torch

from ..rng import derive_generator
from ..settings import Settings, choice_field, number_field, switch_field, text_field
from .records import ImageRecord

CAPTION_MODE_TEXT, CAPTION_MODE_EMPTY = "captions", "empty (unconditional)"
KEEP_TOKENS_SEPARATOR, SECONDARY_SEPARATOR = "|||", ";;;"  # what sd-scripts' options of these names usually are
WILDCARD_PATTERN = re.compile(r"\{([^{}]*\|[^{}]*)\}")
PRECISION_AS_ENCODED, PRECISION_BF16 = "as encoded", "bf16"
TRIGGER_PLACEHOLDER = "[trigger]"  # as in ai-toolkit
TRIGGER_PLACEHOLDER_PATTERN = re.compile(re.escape(TRIGGER_PLACEHOLDER), re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(Settings):
    """How captions become the prompts that the model is trained with."""

    caption_mode: str = choice_field(
        CAPTION_MODE_TEXT,
        (CAPTION_MODE_TEXT, CAPTION_MODE_EMPTY),
        "captions: the caption of each image. empty: no text at all.",
    )
    trigger: str = text_field(
        "",
        "A word put in front of every caption, to activate the LoRA in prompts. Where a caption says [trigger], it "
        "stands there instead.",
    )
    dropout: float = number_field(
        0.0, 0.0, 1.0, "Share of steps that use the empty caption instead; 0.1 keeps guidance working.", step=0.05
    )
    shuffle: bool = switch_field(
        False, "Shuffle the comma-separated tags of each caption, so that their order is not learnt."
    )
    keep_tokens: int = number_field(
        0,
        0,
        255,
        "With shuffle and tag dropout: how many tags stay at the front, after the trigger. Captions can mark this"
        " with |||.",
        unit="tags",
        advanced=True,
    )
    variants: int = number_field(
        8,
        1,
        64,
        "With shuffle, tag dropout and wildcards: how many versions of each caption are encoded.",
        advanced=True,
    )
    tag_dropout: float = number_field(
        0.0,
        0.0,
        1.0,
        "Share of the tags dropped from each text, so that the LoRA does not depend on any single tag. Kept tags "
        "and the trigger stay.",
        step=0.05,
        advanced=True,
        later=True,
    )
    wildcards: bool = switch_field(
        False,
        "{red|blue} in a caption stands for one of its choices; {{ and }} are literal braces.",
        advanced=True,
        later=True,
    )
    text_precision: str = choice_field(
        PRECISION_AS_ENCODED,
        (PRECISION_AS_ENCODED, PRECISION_BF16),
        "How encoded texts are kept on disk. bf16: half the bytes, and the same training for models that run in bf16.",
        advanced=True,
        later=True,
    )

    @property
    def tags(self) -> bool:
        """Whether captions are split into tags."""
        return self.shuffle or self.tag_dropout > 0


def caption_variants(record: ImageRecord, settings: CaptionSettings, rng: torch.Generator) -> tuple[str, ...]:
    """The different texts made of this image's captions, at least one. The same RNG state gives the same texts."""
    if settings.caption_mode == CAPTION_MODE_EMPTY:
        return ("",)
    texts = (text for caption in record.captions or ("",) for text in expand_caption(caption, settings, rng))
    return tuple(dict.fromkeys(texts))


def expand_caption(caption: str, settings: CaptionSettings, rng: torch.Generator) -> list[str]:
    """The texts of one caption: all combinations of its wildcards when nothing else varies and they are few enough,
    else as many draws as the settings say."""
    combinations = math.prod(map(len, wildcard_options(caption))) if settings.wildcards else 1
    if not settings.tags and combinations <= settings.variants:
        picks = itertools.product(*map(range, map(len, wildcard_options(caption)))) if settings.wildcards else [()]
        return [augment_caption(fill_wildcards(caption, pick, settings), settings, rng) for pick in picks]
    return [
        augment_caption(fill_wildcards(caption, sample_wildcards(caption, settings, rng), settings), settings, rng)
        for _ in range(settings.variants)
    ]


def make_record_rng(record: ImageRecord, seed: int) -> torch.Generator:
    """A generator for this image alone, so that adding an image to a dataset changes no other image's captions."""
    return derive_generator("captions", seed, record.id)


def has_trigger_placeholder(text: str) -> bool:
    return bool(TRIGGER_PLACEHOLDER_PATTERN.search(text))


def fill_trigger(text: str, trigger: str) -> str:
    """The text with the trigger in place of each [trigger]; as it is where there is no trigger."""
    return TRIGGER_PLACEHOLDER_PATTERN.sub(lambda _: trigger.strip(), text) if trigger.strip() else text


def place_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger where it says [trigger], or else in front."""
    if has_trigger_placeholder(caption):
        return fill_trigger(caption, trigger).strip()
    return prepend_trigger(caption, trigger)


def prepend_trigger(caption: str, trigger: str) -> str:
    """`trigger, caption`, or the caption where it begins with the trigger already."""
    caption, trigger = caption.strip(), trigger.strip()
    begins = caption.startswith(trigger) and not caption[len(trigger) :][:1].isalnum()
    return caption if begins or not trigger else ", ".join(filter(None, (trigger, caption)))


# -- wildcards ---------------------------------------------------------------------------------------------------------


def wildcard_options(caption: str) -> list[list[str]]:
    """The options of each wildcard, in order."""
    return [found.split("|") for found in WILDCARD_PATTERN.findall(hide_escaped_braces(caption))]


def sample_wildcards(caption: str, settings, rng) -> tuple[int, ...]:
    if not settings.wildcards:
        return ()
    return tuple(int(torch.randint(len(options), (1,), generator=rng)) for options in wildcard_options(caption))


def fill_wildcards(caption: str, pick: tuple[int, ...], settings) -> str:
    """The caption with option pick[i] in place of wildcard i, and single braces for doubled ones."""
    if not settings.wildcards:
        return caption
    picks = iter(pick)
    return (
        WILDCARD_PATTERN.sub(lambda found: found[1].split("|")[next(picks)].strip(), hide_escaped_braces(caption))
        .replace("\0", "{")
        .replace("\1", "}")
    )


def hide_escaped_braces(caption: str) -> str:
    """The caption with control characters in place of doubled braces, which are no wildcards."""
    return caption.replace("{{", "\0").replace("}}", "\1")


# -- tags --------------------------------------------------------------------------------------------------------------


def augment_caption(caption: str, settings: CaptionSettings, rng: torch.Generator) -> str:
    """One text: free tags dropped and shuffled as the settings say, separators removed, the trigger in front."""
    if not settings.tags:
        if KEEP_TOKENS_SEPARATOR in caption or SECONDARY_SEPARATOR in caption:
            caption = join_caption_tags(list_caption_tags(caption, settings))
        return place_trigger(caption, settings.trigger)
    front, free, back = split_kept_tags(caption, settings)
    if settings.tag_dropout:
        draws = torch.rand(len(free), generator=rng).tolist()
        kept = [
            draw >= settings.tag_dropout or has_trigger_placeholder(tag) for tag, draw in zip(free, draws, strict=True)
        ]
        free = list(itertools.compress(free, kept))
    if settings.shuffle:
        free = [free[i] for i in torch.randperm(len(free), generator=rng).tolist()]
    return place_trigger(join_caption_tags(front + free + back), settings.trigger)


def split_kept_tags(caption: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """(fixed, free, fixed) tags: split at |||, or by keep_tokens where a caption has none. Tags joined by ;;; count as
    one."""
    if KEEP_TOKENS_SEPARATOR not in caption:
        tags = list_caption_tags(caption, settings)
        return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []
    front, free, *back = (list_caption_tags(part, settings) for part in caption.split(KEEP_TOKENS_SEPARATOR))
    return front, free, [tag for part in back for tag in part]


def list_caption_tags(caption: str, settings) -> list[str]:
    """The caption's tags without the trigger, which is put in front later."""
    words = map(str.strip, caption.replace(KEEP_TOKENS_SEPARATOR, ",").split(","))
    return [tag for tag in words if tag and tag != settings.trigger.strip() and tag.lower() != TRIGGER_PLACEHOLDER]


def join_caption_tags(tags: list[str]) -> str:
    """The tags as text, those joined by ;;; separated again."""
    return ", ".join(word.strip() for tag in tags for word in tag.split(SECONDARY_SEPARATOR) if word.strip())
