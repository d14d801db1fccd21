"""Signed prompts for LECO by score: the weight 1 raises the score of a prompt's images, -1 lowers it, 0 preserves them.

One per line, `weight | prompt | negative` or the bare prompt; or a table with a column named prompt, such as
PartiPrompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .metadata import MAX_TABLE_BYTES, read_text_file
from .tables import find_table_separator, parse_decimal, read_text_table


@dataclass(frozen=True)
class SignedPrompt:
    """A prompt whose weight has the direction as its sign and, as its size, how often the prompt is drawn relative to
    the others; a weight of 0 is drawn as often as 1."""

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
    delimiter = find_table_separator(text, "prompt")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    rows = (
        [parse_signed_line(number, line) for number, line in lines if line and not line.startswith("#")]
        if delimiter is None
        else parse_signed_table(text, delimiter)
    )
    if not rows:
        raise ValueError(
            "There are no prompts. Write one a line, for example: a photo of a street, or: -1 | an ugly street"
        )
    return tuple(rows)


def read_signed_prompt_file(path: Path) -> tuple[SignedPrompt, ...]:
    try:
        return read_signed_prompts(read_text_file(path, "prompt file", MAX_TABLE_BYTES))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def parse_signed_line(number: int, line: str) -> SignedPrompt:
    parts = [part.strip() for part in line.split("|")]
    if len(parts) == 1:
        return SignedPrompt(line)
    if len(parts) > 3:
        raise ValueError(f"Line {number} has {len(parts)} parts: {line!r}. Write weight | prompt | negative.")
    return make_signed_prompt(f"Line {number}", parts[1], parts[0], parts[2] if len(parts) == 3 else "")


def parse_signed_table(text: str, delimiter: str) -> list[SignedPrompt]:
    """The rows of a CSV or TSV text. Other columns, such as PartiPrompts' Category and Challenge, are ignored."""
    table = read_text_table(text, delimiter, has_quotes=delimiter != "\t")  # a TSV may hold single quotation marks
    if table.error:
        raise ValueError(f"The table cannot be read: {table.error}. Mend that line.")
    return [
        make_signed_prompt(
            row.where.capitalize(), row.cells["prompt"], row.cells.get("weight") or "1", row.cells.get("negative", "")
        )
        for row in table.rows
        if row.cells.get("prompt")
    ]


def make_signed_prompt(where: str, prompt: str, weight: str, negative: str) -> SignedPrompt:
    try:
        number = parse_decimal(weight)
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
    """`count` of the prompts, drawn by seed, in their own order; all of them where count is 0 or there are no more."""
    if not 0 < count < len(prompts):
        return tuple(prompts)
    chosen = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:count]
    return tuple(prompts[i] for i in sorted(chosen.tolist()))
