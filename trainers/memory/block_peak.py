"""What one block takes of a device at most while its gradient is computed: it is run alone, forward and backward, and
every piece of memory that is taken is counted. Kept values alone say too little: gradients in flight, the two halves of
a sum and casts of weights are there at the same time."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

ALLOCATION_STEP = 512  # bytes: kMinBlockSize of torch's CUDACachingAllocator


class LiveByteCounter(TorchDispatchMode):
    """Bytes of a device's memory that were taken while it is on and not given back: `live` now, `peak` at most. What a
    kernel takes for itself is not among them."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self.sizes: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage_key(t) for t in list_tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in list_tensors(out):
            key = storage_key(tensor)
            if tensor.device == self.device and key not in given and key not in self.sizes:
                self.count_storage(key, tensor.untyped_storage())
        return out

    def count_storage(self, key: int, storage):
        self.sizes[key] = allocated_bytes(storage.nbytes())
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget_storage, key)

    def forget_storage(self, key: int):
        self.live -= self.sizes.pop(key)


def list_tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def allocated_bytes(size: int) -> int:
    """What torch's allocator for CUDA takes for so many bytes: adapters are many small tensors."""
    return math.ceil(size / ALLOCATION_STEP) * ALLOCATION_STEP


class GradientSource(torch.autograd.Function):
    """Stands for all that comes after a block: a number, whose gradient is one of zeros for each output. The outputs
    are free meanwhile, as they are when a real backward pass reaches the block."""

    @staticmethod
    def forward(ctx, *outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layouts = [(out.shape, out.dtype, out.device) for out in outputs]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.layouts)


class GradientEnd(torch.autograd.Function):
    """Stands for what comes before a block: takes the gradient of an input. At a leaf it would be copied."""

    @staticmethod
    def forward(ctx, tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


def measure_block_peak(call: Callable, inputs: list[Tensor]) -> int:
    """Bytes beside its inputs that a block takes at most when it is computed again and its gradient found, while the
    gradient of what comes after it waits. `call(inputs)` computes it. Gradients are added to those of its
    parameters."""
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor, lambda tensor: tensor
        ),  # whoever counts outside
        LiveByteCounter(inputs[0].device) as counter,
    ):
        alone = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        given = [GradientEnd.apply(tensor) if tensor.requires_grad else tensor for tensor in alone]
        outputs = checkpoint(lambda *given: call(list(given)), *given, use_reentrant=False, preserve_rng_state=False)
        outputs = [out for out in list_tensors(outputs) if out.requires_grad]
        if outputs:  # else nothing before it is trained
            source = GradientSource.apply(*outputs)
            del outputs
            source.backward()  # pyright: ignore[reportOptionalMemberAccess]
        return counter.peak
