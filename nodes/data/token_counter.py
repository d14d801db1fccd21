"""Counts a caption's tokens in each text encoder of a CLIP."""

from __future__ import annotations

from .. import host


def make_token_counter(clip) -> host.encoders.TokenCounter | None:
    return None if clip is None else host.encoders.TokenCounter(clip)
