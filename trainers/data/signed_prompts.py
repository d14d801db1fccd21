"""Prompts with a direction: 1 makes their pictures better, -1 worse, and 0 leaves them as they are.

One a line, `weight | prompt | negative` or the bare prompt; or a table with a column named prompt, such as
PartiPrompts.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass

import torch

from .concept_prompts import read_utf8_text

COLUMNS = ("prompt", "weight", "negative")


@dataclass(frozen=True)
class SignedPrompt:
    """The sign of `weight` is the direction, its size how often the prompt is drawn against the others; one of 0 is
    drawn like one of 1."""

    prompt: str
    weight: float = 1.0
    negative: str = ""

    def __post_init__(self):
        if not math.isfinite(self.weight) or abs(self.weight) > 1000:
            raise ValueError(f"the weight is {self.weight:g}; it must lie between -1000 and 1000.")

    @property
    def sign(self) -> float:
        return float((self.weight > 0) - (self.weight < 0))


def read_signed_prompts(text: str) -> tuple[SignedPrompt, ...]:
    """The prompts of a text: lines, or a CSV or TSV table whose header has a column `prompt`. Raises ValueError naming
    the line."""
    mark = detect_table_delimiter(text)
    rows = parse_signed_lines(text) if mark is None else parse_signed_table(text, mark)
    if not rows:
        raise ValueError(
            "There are no prompts. Write one a line, for example: a photo of a street, or: -1 | an ugly street"
        )
    return tuple(rows)


def read_signed_prompt_file(path) -> tuple[SignedPrompt, ...]:
    try:
        return read_signed_prompts(read_utf8_text(path))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def detect_table_delimiter(text: str) -> str | None:
    """What parts the columns, where the first line is a header with `prompt` in it."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    for mark in ("\t", ","):
        if mark in first and "prompt" in [cell.strip().strip('"').lower() for cell in first.split(mark)]:
            return mark
    return None


def parse_signed_lines(text: str) -> list[SignedPrompt]:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [parse_signed_line(number, line) for number, line in lines if line and not line.startswith("#")]


def parse_signed_line(number: int, line: str) -> SignedPrompt:
    parts = [part.strip() for part in line.split("|")]
    if len(parts) == 1:
        return SignedPrompt(line)
    if len(parts) > 3:
        raise ValueError(f"Line {number} has {len(parts)} parts: {line!r}. Write weight | prompt | negative.")
    return make_signed_prompt(f"Line {number}", parts[1], parts[0], parts[2] if len(parts) == 3 else "")


def parse_signed_table(text: str, mark: str) -> list[SignedPrompt]:
    """Other columns, such as PartiPrompts' Category and Challenge, are left alone."""
    quoting = csv.QUOTE_NONE if mark == "\t" else csv.QUOTE_MINIMAL  # a TSV may hold single quotation marks
    reader = csv.DictReader(io.StringIO(text), delimiter=mark, skipinitialspace=True, quoting=quoting)
    found = []
    for number, values in enumerate(reader, 2):
        row = {
            (key or "").strip().strip('"').lower(): (value or "").strip()
            for key, value in values.items()
            if isinstance(value, str)
        }
        if row.get("prompt"):
            found.append(
                make_signed_prompt(f"Line {number}", row["prompt"], row.get("weight") or "1", row.get("negative", ""))
            )
    return found


def make_signed_prompt(where: str, prompt: str, weight: str, negative: str) -> SignedPrompt:
    try:
        number = float(weight)
    except ValueError:
        raise ValueError(
            f"{where}: the weight is {weight!r}; it must be a number: 1 for better, -1 for worse, 0 to keep. Write "
            "weight | prompt | negative."
        ) from None
    try:
        return SignedPrompt(prompt, number, negative)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def sample_signed_prompts(prompts, count: int, seed: int) -> tuple[SignedPrompt, ...]:
    """`count` of the prompts in their own order, drawn by seed; all of them where count is 0 or there are no more."""
    if not 0 < count < len(prompts):
        return tuple(prompts)
    chosen = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:count]
    return tuple(prompts[i] for i in sorted(chosen.tolist()))
