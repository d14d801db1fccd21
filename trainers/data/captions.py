"""From a record's captions to the texts that are encoded for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ..settings import Settings, choice, number, switch, text
from .records import Record

CAPTIONS, EMPTY = "captions", "empty (unconditional)"


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(Settings):
    """What the model is told about each image while it trains."""

    caption_mode: str = choice(CAPTIONS, (CAPTIONS, EMPTY), "captions: the text beside each image. empty: no text at all, the images alone.")
    trigger: str = text("", "A word put in front of every caption, to call up what was learnt.")
    dropout: float = number(0.0, 0.0, 1.0, "Share of steps that see the empty caption instead; 0.1 keeps guidance working.", step=0.05)
    shuffle: bool = switch(False, "Shuffle the comma-separated tags of each caption, so that their order is not learnt.")
    keep_tokens: int = number(0, 0, 255, "With shuffle: tags that stay at the front, after the trigger.", unit="tags", advanced=True)
    variants: int = number(8, 1, 64, "With shuffle: how many orders of each caption are encoded.", advanced=True)


def variants(record: Record, settings: CaptionSettings, rng: torch.Generator) -> tuple[str, ...]:
    """The different texts that describe this record, at least one. The same rng state gives the same texts."""
    if settings.caption_mode == EMPTY:
        return ("",)
    captions = record.captions or ("",)
    if not settings.shuffle:
        return tuple(dict.fromkeys(with_trigger(caption, settings.trigger) for caption in captions))
    orders = (shuffled(caption, settings, rng) for caption in captions for _ in range(settings.variants))
    return tuple(dict.fromkeys(orders))


def record_rng(record: Record, seed: int) -> torch.Generator:
    """A generator of the record's own: adding an image to a dataset changes no other image's captions."""
    digest = hashlib.blake2b(f"captions/{seed}/{record.id}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def with_trigger(caption: str, trigger: str) -> str:
    """trigger, caption: unless the caption begins with the trigger already."""
    caption, trigger = caption.strip(), trigger.strip()
    begins = caption.startswith(trigger) and not caption[len(trigger) :][:1].isalnum()
    return caption if begins or not trigger else ", ".join(filter(None, (trigger, caption)))


def shuffled(caption: str, settings: CaptionSettings, rng: torch.Generator) -> str:
    tags = [tag for tag in map(str.strip, caption.split(",")) if tag and tag != settings.trigger.strip()]
    kept, rest = tags[: settings.keep_tokens], tags[settings.keep_tokens :]
    order = torch.randperm(len(rest), generator=rng).tolist()
    return with_trigger(", ".join(kept + [rest[i] for i in order]), settings.trigger)
