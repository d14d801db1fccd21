"""What says something about a picture: models that see, taggers, file names, a fixed text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class CaptionResult:
    """What a captioner says of one picture."""

    text: str = ""  # prose, or the tags joined
    tags: tuple[str, ...] = ()


class Captioner(Protocol):
    """Anything that looks at one picture and says something."""

    identity: str  # the model and every setting that changes the words: part of the cache's key

    def caption(self, picture: Image.Image, prompt: str) -> CaptionResult:
        """What it says of an RGB picture; taggers and file names leave the prompt aside."""
        ...
