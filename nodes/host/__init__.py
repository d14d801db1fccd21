"""ComfyUI, as the trainers see it: the only door to comfy.* for training. Used as `host.memory.free_memory(...)`."""

from . import (
    checks,
    context,
    denoiser,
    encoders,
    families,
    frozen_casts,
    identity,
    lora_keys,
    memory,
    out_of_place,
    progress,
    sampling,
    session,
)

__all__ = [
    "checks",
    "context",
    "denoiser",
    "encoders",
    "families",
    "frozen_casts",
    "identity",
    "lora_keys",
    "memory",
    "out_of_place",
    "progress",
    "sampling",
    "session",
]
