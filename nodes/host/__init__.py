"""ComfyUI, as the trainers see it: the only door to comfy.* for training. Used as `host.memory.free_memory(...)`.

The modules are imported when they are first used, because ComfyUI waits for the import of the pack when it starts."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import (
        checks,
        conditions,
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
    "conditions",
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


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
