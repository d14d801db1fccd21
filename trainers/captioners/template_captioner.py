"""Captions that need no model: the file's name, or one text for all."""

from __future__ import annotations

import re
from pathlib import Path

from . import CaptionResult

FILE_NUMBER_PATTERN = re.compile(r"(?:^|\s)\(?\d+\)?$")  # img 0012, cat (3)
COPY_MARK_PATTERN = re.compile(r"\s+(?:copy|kopie)$", re.IGNORECASE)


class TemplateCaptioner:
    """The filled template is the caption; the image is never opened."""

    needs_image = False
    identity = "spoken"

    def caption(self, image, prompt: str) -> CaptionResult:
        return CaptionResult(" ".join(prompt.split()))


def clean_file_name(path) -> str:
    """The file's name as words, without its extension, underscores, numbering and copy marks: `red_cat-(3).png` -> red
    cat. A name that is nothing but a number stays as it is."""
    stem = Path(path).stem
    words = " ".join(re.sub(r"[_+]+|(?<!\w)-+|-+(?!\w)|-(?=\d+$)", " ", stem).split())
    bare = words
    for mark in (FILE_NUMBER_PATTERN, COPY_MARK_PATTERN, FILE_NUMBER_PATTERN):
        bare = mark.sub("", bare).strip()
    return bare or words or stem
