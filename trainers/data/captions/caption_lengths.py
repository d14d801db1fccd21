"""How long a text may be: what makes every step slow is refused before the long work begins.

CLIP reads chunks of 75 tokens and cost grows with each; a transformer's attention grows with the square. Captions of
vision-language models have 100 to 500 tokens; the limit is several times that, 28 chunks of CLIP.
"""

from __future__ import annotations

from .edits import CLIP_ENCODERS, CountTokens

MAX_TEXT_TOKENS = 2048
MAX_TEXT_CHARACTERS = 16 * MAX_TEXT_TOKENS  # words of all languages take fewer than 16 characters a token
CLIP_CHUNK_TOKENS = 75


def describe_excess_length(text: str, count_tokens: CountTokens | None) -> str:
    """The figures of a text that is too long, such as "20003 words, 20003 tokens in l (267 chunks of 75)"; "" for one
    that is not. Tokens are counted only where they could be too many: a token is a byte at least."""
    if len(text) > MAX_TEXT_CHARACTERS:
        return f"{len(text.split())} words, {len(text)} characters"
    if len(text.encode("utf-8", "surrogatepass")) < MAX_TEXT_TOKENS or count_tokens is None:
        return ""
    counts = {name: count for name, count in count_tokens(text).items() if count > MAX_TEXT_TOKENS}
    if not counts:
        return ""
    found = (f"{count} tokens in {name}{format_chunks(name, count)}" for name, count in sorted(counts.items()))
    return f"{len(text.split())} words, {', '.join(found)}"


def format_chunks(encoder: str, count: int) -> str:
    return f" ({-(-count // CLIP_CHUNK_TOKENS)} chunks of {CLIP_CHUNK_TOKENS})" if encoder in CLIP_ENCODERS else ""


def require_readable_length(text: str, owner: str, count_tokens: CountTokens | None, remedy: str) -> None:
    """Raises ValueError for a text that is too long. `owner` names it: "The caption of a.png"."""
    if excess := describe_excess_length(text, count_tokens):
        raise ValueError(
            f"{owner} is too long: {excess}. At most {MAX_TEXT_TOKENS} tokens of one encoder are read. {remedy}"
        )
