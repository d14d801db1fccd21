"""Captions as words: nothing in a caption is a command.

ComfyUI's prompts have a syntax of their own: `(red)` and `(red:1.6)` weigh, `\\(` is a bracket, `embedding:name` loads
a file. People write `miku (vocaloid)` into a caption and `miku \\(vocaloid\\)` into a prompt, and mean the same words;
so does a caption that is escaped already.
"""

from __future__ import annotations

import re

EMBEDDING_WORD = "embedding:"
ESCAPED_BRACKET_PATTERN = re.compile(r"\\([()])")


def unescape_brackets(caption: str) -> str:
    """The words that a caption means, whether its brackets are escaped or not."""
    return ESCAPED_BRACKET_PATTERN.sub(r"\1", caption)


def escape_brackets(words: str) -> str:
    """The prompt that means these words, each with weight 1."""
    return words.replace("(", "\\(").replace(")", "\\)")


def has_prompt_syntax(caption: str) -> bool:
    """Whether a text encoder that weighs words would read the caption otherwise than it is written."""
    return "(" in caption or ")" in caption or EMBEDDING_WORD in caption
