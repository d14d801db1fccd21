"""What one training step costs: FLOPs, bytes saved for backward, peak bytes, reads of device results, seconds.

`Laps` follows the steps of a run, whoever runs it: the runner calls it at the start of every step. Meters disturb a
step (torch's FLOP counter keeps activations alive, all of them take time), so each step carries one kind, and the timed
steps carry none.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ATEN = torch.ops.aten
READS = {
    getattr(torch.Tensor, name) for name in "item tolist cpu numpy nonzero __bool__ __float__ __int__ __index__".split()
}


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def attention_matmul(query, key):
    """FLOPs of Q K^T, for shapes (B, H, T, D)."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * width


def cpu_attention(query, key, value, *args, out_shape=None, **kwargs):
    """torch counts its GPU attention kernels and not the CPU one; forward is two matmuls."""
    return 2 * attention_matmul(query, key)


def cpu_attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs):
    """Five matmuls: four gradients' and Q K^T once more, as torch counts its GPU kernel."""
    return 5 * attention_matmul(query, key)


CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """Matmuls, convolutions and attention; element-wise work and the optimizer's are no FLOPs to it."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


# -- bytes -------------------------------------------------------------------------------------------------------------


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def key_of(tensor):
    return tensor.untyped_storage()._cdata


class Ledger(TorchDispatchMode):
    """Bytes of the storages that were born while it is on: `live` now, `peak` at most, on every device and on none
    (meta).

    Weights, adapters and optimizer state that existed before are not in it; neither is what a kernel allocates for
    itself. `derived` holds storages computed from the given weights: on a GPU those live there, so reading one waits
    for it."""

    def __init__(self, weights):
        super().__init__()
        self.sizes, self.live, self.peak = {}, 0, 0
        self.derived = {key_of(w) for w in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {key_of(t) for t in tensors((args, kwargs))}
        derived = not given.isdisjoint(self.derived)
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            key = key_of(tensor)
            if derived:
                self.derived.add(key)
            if key not in given and key not in self.sizes:
                self.born(key, tensor.untyped_storage())
        return out

    def born(self, key, storage):
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.died, key)

    def died(self, key):
        self.live -= self.sizes.pop(key)
        self.derived.discard(key)


class Crossings(TorchDispatchMode):
    """Bytes that are copied from the CPU's memory to a device (`up`) and back (`down`) while it is on, backward
    included. An index that a kernel takes along by itself is not seen."""

    COPIES = {ATEN.copy_.default, ATEN._to_copy.default}

    def __init__(self):
        super().__init__()
        self.up, self.down = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.COPIES:
            source = args[1] if func is ATEN.copy_.default else args[0]
            self.count(source, out)
        return out

    def count(self, source, target):
        if source.device.type == "cpu" != target.device.type:
            self.up += source.nbytes
        elif target.device.type == "cpu" != source.device.type:
            self.down += target.nbytes


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for backward, each storage once, without those older than the ledger (weights,
    adapters).

    What torch's checkpoint keeps or computes again does not pass here: with checkpointing, look at the peak."""

    def __init__(self, ledger):
        self.ledger, self.storages = ledger, {}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        key = key_of(tensor)
        if key in self.ledger.sizes:
            self.storages[key] = self.ledger.sizes[key]
        return tensor.detach()

    @property
    def bytes(self):
        return sum(self.storages.values())


class Reads(TorchFunctionMode):
    """How often Python asks for the value of a tensor that the network computed."""

    def __init__(self, ledger):
        super().__init__()
        self.ledger, self.count = ledger, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS and (args[0].is_cuda or key_of(args[0]) in self.ledger.derived):
            self.count += 1
        return func(*args, **(kwargs or {}))


# -- a lap per step ----------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """One contender's step. Bytes are those born in the step; `device_peak` is the CUDA allocator's own figure."""

    flops: int = 0
    saved: int = 0
    peak: int = 0
    device_peak: int = 0
    reads: int = 0
    seconds: list[float] = field(default_factory=list)


class Laps:
    """Call it at the start of every step: the first counts FLOPs and warms up, the second keeps the ledger, then come
    `timed` bare steps. One more call, or `close`, ends the last."""

    def __init__(self, weights, timed: int, cuda: bool = False, clock=time.perf_counter):
        self.weights, self.cuda, self.time, self.cost = list(weights), cuda, clock, Cost()
        self.plan = iter([self.flops, self.bytes, *[self.clock] * timed])
        self.steps = 2 + timed
        self.lap = contextlib.ExitStack()

    def __call__(self) -> bool:
        """False when there is no lap left."""
        self.close()
        meter = next(self.plan, None)
        if meter is not None:
            self.lap.enter_context(meter())
        return meter is not None

    def close(self):
        self.lap.close()

    @contextlib.contextmanager
    def flops(self):
        with flop_counter() as counter:
            yield
        self.cost.flops = counter.get_total_flops()

    @contextlib.contextmanager
    def bytes(self):
        before, ledger = self.reset_device_peak(), Ledger(self.weights)
        saved, reads = Saved(ledger), Reads(ledger)
        with ledger, saved, reads:
            yield
        self.cost.saved, self.cost.peak, self.cost.reads = saved.bytes, ledger.peak, reads.count
        if self.cuda:
            self.cost.device_peak = torch.cuda.max_memory_allocated() - before

    def reset_device_peak(self) -> int:
        if not self.cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    @contextlib.contextmanager
    def clock(self):
        start = self.now()
        yield
        self.cost.seconds.append(self.now() - start)

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return self.time()
