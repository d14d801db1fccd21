"""Captioners: vision-language models, taggers, file names and fixed texts behind one protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class CaptionResult:
    """The caption of one image, and its tags where the captioner gives tags."""

    text: str = ""  # prose, or the tags joined
    tags: tuple[str, ...] = ()


class Captioner(Protocol):
    """Anything that gives one image a caption."""

    @property
    def identity(self) -> str:
        """The model and every setting that changes its captions: part of the cache's key."""
        ...

    def caption(self, image: Image.Image, prompt: str) -> CaptionResult:
        """The caption of an RGB image; taggers and file names ignore the prompt."""
        ...
