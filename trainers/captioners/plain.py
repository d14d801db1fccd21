"""Captions that need no model: the file's name, or one text for all."""

from __future__ import annotations

import re
from pathlib import Path

from . import Said

NUMBERING = re.compile(r"(?:^|\s)\(?\d+\)?$")  # img 0012, cat (3)
COPY = re.compile(r"\s+(?:copy|kopie)$", re.IGNORECASE)


class Spoken:
    """Says what it is told: the filled template is the caption. It never opens the picture."""

    looks = False
    identity = "spoken"

    def caption(self, picture, prompt: str) -> Said:
        return Said(" ".join(prompt.split()))


def cleaned(path) -> str:
    """The file's name as words: without its ending, underscores, numbering and copy marks. `red_cat-(3).png` -> red cat.

    A name that is nothing but a number stays as it is."""
    stem = Path(path).stem
    words = " ".join(re.sub(r"[_+]+|(?<!\w)-+|-+(?!\w)|-(?=\d+$)", " ", stem).split())
    bare = words
    for mark in (NUMBERING, COPY, NUMBERING):
        bare = mark.sub("", bare).strip()
    return bare or words or stem
