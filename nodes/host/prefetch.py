"""The host's layers take weights that were fetched ahead, where the host itself would fetch each when its layer is
called."""

from __future__ import annotations

import contextlib

import comfy.model_management as mm
import comfy.ops
import torch

from ...trainers.memory.prefetch import BlockPrefetcher, TransferStream
from ...trainers.memory.transfer import supports_async_copies
from .frozen_casts import CAST_METHOD


@contextlib.contextmanager
def prefetch_offloaded(network, device):
    """A BlockPrefetcher for the network's blocks, or None where the host transfers on no stream beside the computing
    one (its default but on NVIDIA and AMD cards, or by --disable-async-offload)."""
    if not (mm.NUM_STREAMS and supports_async_copies(device) and mm.device_supports_non_blocking(device)):
        yield None
        return
    prefetcher = BlockPrefetcher(TransferStream(device), lambda block: list_waiting_weights(block, device))
    hooks = (
        network.register_forward_pre_hook(lambda *_: prefetcher.begin_pass()),
        network.register_forward_hook(lambda *_: prefetcher.begin_pass(), always_call=True),
    )
    before, mm.cast_to = mm.cast_to, take_before_casting(prefetcher, mm.cast_to)
    try:
        yield prefetcher
    finally:
        mm.cast_to = before
        for hook in hooks:
            hook.remove()
        prefetcher.begin_pass()


def list_waiting_weights(block, device) -> list[torch.Tensor]:
    """Parameters of the block's layers that are elsewhere, where the host's own method fetches them. Layers of other
    nodes (GGUF, say) fetch theirs in ways of their own."""
    layers = [
        module
        for module in block.modules()
        if isinstance(module, comfy.ops.CastWeightBiasOp)
        and getattr(getattr(module, CAST_METHOD, None), "__module__", None) == comfy.ops.__name__
    ]
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    return [p for p in dict.fromkeys(parameters) if p.device != device]


def take_before_casting(prefetcher: BlockPrefetcher, cast_to):
    """The host's cast_to, which gives out what was fetched ahead where it would fetch."""

    def take_or_cast(weight, dtype=None, device=None, non_blocking=False, copy=False, stream=None, r=None):
        is_fetching = device == prefetcher.stream.device and weight.device != device and stream is None and r is None
        fetched = prefetcher.take_weight(weight) if is_fetching else None
        if fetched is None:
            return cast_to(weight, dtype, device, non_blocking, copy, stream, r)
        return fetched if dtype is None else fetched.to(dtype)

    return take_or_cast
