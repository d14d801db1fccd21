"""From a record's captions to the texts that are encoded for it.

A caption may say what is fixed and what is free: `sks, 1girl ||| hat, red dress;;;red shoes ||| masterpiece` keeps what
stands before the first ||| and after the second, and holds together what ;;; joins. `{red|blue} hat` is one of its
choices. All of it is drawn before encoding, into as many texts as the settings say, so that nothing is lost to the
cache.
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
KEEP_TOKENS_SEPARATOR, SECONDARY_SEPARATOR = (
    "|||",
    ";;;",
)  # kohya-ss sd-scripts' usual keep_tokens_separator and secondary_separator
WILDCARD_PATTERN = re.compile(r"\{([^{}]*\|[^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(Settings):
    """What the model is told about each image while it trains."""

    caption_mode: str = choice_field(
        CAPTION_MODE_TEXT,
        (CAPTION_MODE_TEXT, CAPTION_MODE_EMPTY),
        "captions: the caption of each image. empty: no text at all.",
    )
    trigger: str = text_field("", "A word put in front of every caption, to activate the LoRA in prompts.")
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

    @property
    def tags(self) -> bool:
        """Whether captions are taken apart into tags."""
        return self.shuffle or self.tag_dropout > 0


def caption_variants(record: ImageRecord, settings: CaptionSettings, rng: torch.Generator) -> tuple[str, ...]:
    """The different texts that describe this record, at least one. The same rng state gives the same texts."""
    if settings.caption_mode == CAPTION_MODE_EMPTY:
        return ("",)
    texts = (told for caption in record.captions or ("",) for told in expand_caption(caption, settings, rng))
    return tuple(dict.fromkeys(texts))


def expand_caption(caption: str, settings: CaptionSettings, rng: torch.Generator):
    """Texts of one caption: all there are when only wildcards decide and they are few enough, else as many draws as the
    settings say."""
    ways = math.prod(map(len, wildcard_options(caption))) if settings.wildcards else 1
    if not settings.tags and ways <= settings.variants:
        picks = itertools.product(*map(range, map(len, wildcard_options(caption)))) if settings.wildcards else [()]
        return [augment_caption(fill_wildcards(caption, pick, settings), settings, rng) for pick in picks]
    return [
        augment_caption(fill_wildcards(caption, sample_wildcards(caption, settings, rng), settings), settings, rng)
        for _ in range(settings.variants)
    ]


def make_record_rng(record: ImageRecord, seed: int) -> torch.Generator:
    """A generator of the record's own: adding an image to a dataset changes no other image's captions."""
    return derive_generator("captions", seed, record.id)


def prepend_trigger(caption: str, trigger: str) -> str:
    """trigger, caption: unless the caption begins with the trigger already."""
    caption, trigger = caption.strip(), trigger.strip()
    begins = caption.startswith(trigger) and not caption[len(trigger) :][:1].isalnum()
    return caption if begins or not trigger else ", ".join(filter(None, (trigger, caption)))


# -- wildcards ---------------------------------------------------------------------------------------------------------


def wildcard_options(caption: str) -> list[list[str]]:
    """The options of every wildcard."""
    return [found.split("|") for found in WILDCARD_PATTERN.findall(hide_escaped_braces(caption))]


def sample_wildcards(caption: str, settings, rng) -> tuple[int, ...]:
    if not settings.wildcards:
        return ()
    return tuple(int(torch.randint(len(options), (1,), generator=rng)) for options in wildcard_options(caption))


def fill_wildcards(caption: str, pick: tuple[int, ...], settings) -> str:
    """The caption with option pick[i] in place of wildcard i."""
    if not settings.wildcards:
        return caption
    picks = iter(pick)
    return (
        WILDCARD_PATTERN.sub(lambda found: found[1].split("|")[next(picks)].strip(), hide_escaped_braces(caption))
        .replace("\0", "{")
        .replace("\1", "}")
    )


def hide_escaped_braces(caption: str) -> str:
    """The caption with doubled braces out of sight: they are no wildcards."""
    return caption.replace("{{", "\0").replace("}}", "\1")


# -- tags --------------------------------------------------------------------------------------------------------------


def augment_caption(caption: str, settings: CaptionSettings, rng: torch.Generator) -> str:
    """One text: free tags dropped and shuffled as the settings say, the signs gone, the trigger in front."""
    if not settings.tags:
        return prepend_trigger(
            caption if not has_separators(caption) else join_caption_tags(list_caption_tags(caption, settings)),
            settings.trigger,
        )
    front, free, back = split_kept_tags(caption, settings)
    if settings.tag_dropout:
        luck = torch.rand(len(free), generator=rng).tolist()
        free = [tag for tag, number in zip(free, luck, strict=True) if number >= settings.tag_dropout]
    if settings.shuffle:
        free = [free[i] for i in torch.randperm(len(free), generator=rng).tolist()]
    return prepend_trigger(join_caption_tags(front + free + back), settings.trigger)


def has_separators(caption: str) -> bool:
    return KEEP_TOKENS_SEPARATOR in caption or SECONDARY_SEPARATOR in caption


def split_kept_tags(caption: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """(fixed, free, fixed) tags: by |||, or by keep_tokens where a caption has none. What ;;; joins is one tag."""
    if KEEP_TOKENS_SEPARATOR not in caption:
        tags = list_caption_tags(caption, settings)
        return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []
    front, free, *back = (list_caption_tags(part, settings) for part in caption.split(KEEP_TOKENS_SEPARATOR))
    return front, free, [tag for part in back for tag in part]


def list_caption_tags(caption: str, settings) -> list[str]:
    """Its tags without the trigger, which is put in front again."""
    words = caption.replace(KEEP_TOKENS_SEPARATOR, ",").split(",")
    return [tag for tag in map(str.strip, words) if tag and tag != settings.trigger.strip()]


def join_caption_tags(tags: list[str]) -> str:
    return ", ".join(word.strip() for tag in tags for word in tag.split(SECONDARY_SEPARATOR) if word.strip())
