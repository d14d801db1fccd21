"""Blocks that keep less than autograd would: they compute the rest again during backward, or fetch their inputs from
the CPU.

A model's block classes are changed as long as `checkpoint_blocks` is open; `CheckpointPolicy.plan` may change between
two steps."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from dataclasses import dataclass, field

import torch
from torch.utils.checkpoint import checkpoint

from .block_peak import LiveByteCounter, allocated_bytes, measure_block_peak, storage_key
from .compile import BlockCompiler
from .plan import PLAN_OFF, PLAN_OFFLOADED, PLAN_PER_BLOCK, PLAN_PER_BLOCK_CPU, BlockMemory, StepMemory
from .prefetch import FORWARD, RECOMPUTATION, Arrival, BlockPrefetcher, TransferStream
from .transfer import supports_async_copies

MIN_OFFLOAD_BYTES = 64 * 1024  # bytes; less is not worth a trip


@dataclass
class CheckpointPolicy:
    """How the blocks of one network behave now."""

    plan: str = PLAN_PER_BLOCK
    counter: ActivationCounter | None = None  # counts in place of keeping
    compiler: BlockCompiler | None = None  # calls the blocks, where they are to be compiled
    prefetcher: BlockPrefetcher | None = None  # fetches what waits in the CPU's memory before it is asked for

    def calling_block(self, module, phase: str):
        """A compiled block reads its weights in a way of its own."""
        if self.prefetcher is None or self.compiler is not None:
            return contextlib.nullcontext()
        return self.prefetcher.calling_block(module, phase)

    def saving_inputs(self):
        """Around a checkpoint: what becomes of its inputs."""
        if self.plan not in (PLAN_PER_BLOCK_CPU, PLAN_OFFLOADED):
            return contextlib.nullcontext()
        if self.prefetcher is None:
            return CpuOffloadHooks()
        self.prefetcher.last_saved = CpuOffloadHooks(self.prefetcher.stream, self.prefetcher.last_saved)
        return self.prefetcher.last_saved


@contextlib.contextmanager
def checkpoint_blocks(classes, adapters, blocks: CheckpointPolicy | None = None):
    """Blocks keep only their inputs and compute the rest again during backward (Chen et al. 2016), as `blocks` says."""
    blocks = blocks or CheckpointPolicy()
    before = [(cls, cls.forward) for cls in classes]
    try:
        for cls, forward in before:
            cls.forward = wrap_block_forward(forward, adapters, blocks)
        yield blocks
    finally:
        for cls, forward in before:
            cls.forward = forward


def wrap_block_forward(forward, adapters, blocks: CheckpointPolicy):
    def run(module, *args, **kwargs):
        if blocks.counter is not None and torch.is_grad_enabled():
            return count_block_call(blocks.counter, blocks.prefetcher, forward, module, args, kwargs)
        call = forward if blocks.compiler is None else blocks.compiler.bind_program(forward)
        if not torch.is_grad_enabled() or blocks.plan == PLAN_OFF:
            with blocks.calling_block(module, FORWARD):
                return call(module, *args, **kwargs)
        tensors, restored = split_tensor_arguments(args, kwargs)
        again = adapters.capture_context()  # backward comes when another strength may be set, and another dropout
        phases = itertools.chain([FORWARD], itertools.repeat(RECOMPUTATION))

        def block(*tensors):
            args, kwargs = restored(tensors)
            with again(), blocks.calling_block(module, next(phases)):
                return call(module, *args, **kwargs)

        with blocks.saving_inputs():
            return checkpoint(block, *tensors, use_reentrant=False, preserve_rng_state=False)

    return run


def count_block_call(counter: ActivationCounter, prefetcher: BlockPrefetcher | None, forward, module, args, kwargs):
    """The block's output. The counter knows afterwards what it would keep and what it takes at most."""
    tensors, restored = split_tensor_arguments(args, kwargs)

    def call(tensors):
        args, kwargs = restored(tensors)
        with prefetcher.holding_weights(module) if prefetcher else contextlib.nullcontext():
            return forward(module, *args, **kwargs)

    with counter.count_block(module, tensors) as is_whole:
        out = forward(module, *args, **kwargs)
    if is_whole:
        counter.measure_block(call, tensors, describe_block_call(module, tensors))
        if prefetcher:
            waiting = sum(allocated_bytes(weight.nbytes) for weight in prefetcher.list_weights(module))
            counter.calls[-1].waiting_weights = waiting
            counter.has_prefetch = True
    return out


def describe_block_call(module, tensors) -> tuple:
    """Equal for calls that cost the same."""
    weights = [(p.shape, p.dtype, p.device) for p in module.parameters()]
    given = [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors]
    return type(module), torch.is_autocast_enabled(), tuple(weights), tuple(given)


def split_tensor_arguments(args, kwargs):
    """(tensors, function(tensors) -> (args, kwargs)). Only what is a tensor by itself is seen by those who store a
    checkpoint's inputs.
    Dicts are copied each time: the host writes the current block's number into its options, and recomputation must see
    those of this call."""
    values = [*args, *kwargs.values()]
    positions = [i for i, value in enumerate(values) if torch.is_tensor(value)]
    others = [dict(v) if isinstance(v, dict) else None if torch.is_tensor(v) else v for v in values]
    count, names = len(args), tuple(kwargs)  # and not args and kwargs: `restored` lives until backward

    def restored(tensors):
        now = [dict(v) if isinstance(v, dict) else v for v in others]
        for position, tensor in zip(positions, tensors, strict=True):
            now[position] = tensor
        return now[:count], dict(zip(names, now[count:], strict=True))

    return [values[i] for i in positions], restored


# -- by storage --------------------------------------------------------------------------------------------------------


class LiveStorageDict(dict):
    """Values by storage, forgotten when the storage dies: its address is used again."""

    def store(self, tensor, key, value):
        self[key] = value
        weakref.finalize(tensor.untyped_storage(), self.pop, key, None)


class CpuOffloadHooks(torch.autograd.graph.saved_tensors_hooks):
    """What is saved under it waits in the CPU's memory. One that several blocks are given makes one trip. With a
    `stream`, what was saved under `before` is fetched as soon as this is: its backward comes next."""

    copies = LiveStorageDict()  # (storage, place in it, version) -> weak reference to its copy

    def __init__(self, stream: TransferStream | None = None, before: CpuOffloadHooks | None = None):
        super().__init__(self.pack, self.unpack)
        self.stream, self.before = stream, before
        self.saved: weakref.WeakSet[OffloadedTensor] = weakref.WeakSet()

    def pack(self, tensor):
        if tensor.numel() * tensor.element_size() < MIN_OFFLOAD_BYTES or isinstance(tensor, torch.nn.Parameter):
            return tensor
        key = (
            storage_key(tensor),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor._version,
        )
        known = self.copies.get(key)
        if known is None or (waiting := known()) is None:
            waiting = OffloadedTensor(tensor)
            self.copies.store(tensor, key, weakref.ref(waiting))
        self.saved.add(waiting)
        return waiting

    def unpack(self, saved):
        if not isinstance(saved, OffloadedTensor):
            return saved
        tensor = saved.fetch(self.stream)
        if self.stream is not None and self.before is not None:
            for waiting in self.before.saved:
                waiting.prefetch(self.stream)
            self.before = None
        return tensor


class OffloadedTensor:
    """A tensor's copy in the CPU's memory, page-locked where the device can fetch it faster so."""

    def __init__(self, tensor):
        self.device, fast = tensor.device, supports_async_copies(tensor.device)
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=fast)
        self.copy.copy_(tensor, non_blocking=fast)  # in the stream's order: before the device's memory is used again
        self.arrival: Arrival | None = None

    def prefetch(self, stream: TransferStream):
        self.arrival = stream.fetch([self.copy])

    def fetch(self, stream: TransferStream | None):
        arrival, self.arrival = self.arrival, None
        if stream is not None and arrival in stream.arrivals:
            return stream.receive(arrival)[0]
        return self.copy.to(
            self.device, non_blocking=supports_async_copies(self.device), copy=self.device.type == "cpu"
        )


# -- counting ----------------------------------------------------------------------------------------------------------


class CountedPassError(RuntimeError):
    """A backward was tried through a pass that was only counted."""


@dataclass
class BlockCall:
    outside_before: int = 0  # of what was kept outside, when the call began
    inputs: int = 0
    inside: int = 0
    passing: int = 0
    fetched: int = 0
    waiting_weights: int = 0
    saved_storages: LiveStorageDict = field(default_factory=LiveStorageDict)


class ActivationCounter(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd would keep and keeps none of it: a forward pass under it needs no memory for activations,
    whatever the model's size, and has no backward. Each block is run once more by itself, to see what it takes at
    most."""

    def __init__(self, weights, device: torch.device):
        super().__init__(self.pack, self.unpack)
        self.live = LiveByteCounter(device)  # of what is there although autograd does not keep it
        self.weights = {storage_key(w) for w in weights}
        self.saved_storages, self.block_inputs, self.outside_storages = (
            LiveStorageDict(),
            LiveStorageDict(),
            LiveStorageDict(),
        )  # apart: kept by what is no block
        self.total = self.outside_blocks = self.largest_tensor = 0
        self.calls: list[BlockCall] = []
        self.modules: set = set()  # blocks that were called
        self.kept_at_block_end = 0  # bytes that are there after the last block and counted as kept
        self.block_peaks: dict[tuple, int] = {}  # calls that cost the same -> bytes
        self.current_call: BlockCall | None = None
        self.has_prefetch = False

    def __enter__(self):
        super().__enter__()
        self.live.__enter__()

    def __exit__(self, *error):
        self.live.__exit__(*error)
        super().__exit__(*error)

    def pack(self, tensor):
        key, size = storage_key(tensor), allocated_bytes(tensor.untyped_storage().nbytes())
        if key in self.weights:
            return None
        if key not in self.saved_storages:
            self.saved_storages.store(tensor, key, size)
            self.total += size
        if self.current_call is None and key not in self.outside_storages:
            self.outside_storages.store(tensor, key, size)
            self.outside_blocks += size
            self.largest_tensor = max(self.largest_tensor, size)
            if call := self.block_inputs.get(key):  # it stays, whether the block is given it or not
                call.inputs -= size
        if (
            self.current_call is not None
            and key not in self.current_call.saved_storages
            and key not in self.block_inputs
            and key not in self.outside_storages
        ):
            self.current_call.saved_storages.store(tensor, key, size)
            self.current_call.inside += size
        return None

    @staticmethod
    def unpack(_):
        raise CountedPassError("nothing was kept for a backward pass")

    @contextlib.contextmanager
    def count_block(self, module, tensors):
        """Yields whether it is one by itself: a block within a block is part of it."""
        if self.current_call is not None:
            yield False
            return
        self.current_call = BlockCall(self.outside_blocks)
        self.modules.add(module)
        for tensor in tensors:
            key = storage_key(tensor)
            self.current_call.fetched += allocated_bytes(tensor.nbytes)
            if key not in self.block_inputs and key not in self.outside_storages and key not in self.weights:
                self.block_inputs.store(tensor, key, self.current_call)
                self.current_call.inputs += allocated_bytes(tensor.untyped_storage().nbytes())
        self.calls.append(self.current_call)
        try:
            yield True
        finally:
            self.current_call = None

    def measure_block(self, call, tensors, kind: tuple):
        """The last block, run alone. `kind`: equal for those that need not be run again."""
        counted = self.calls[-1]
        if kind not in self.block_peaks:
            self.current_call = counted  # blocks within it are not looked at
            try:
                self.block_peaks[kind] = measure_block_peak(call, tensors)
            finally:
                self.current_call = None
        counted.passing = max(0, self.block_peaks[kind] - counted.inside)
        self.live.peak = self.live.live  # from here on what comes after the block
        self.kept_at_block_end = sum(size for key, size in self.live.sizes.items() if self.is_kept(key))

    def is_kept(self, key: int) -> bool:
        return key in self.saved_storages or key in self.block_inputs

    def step_memory(self, adapter_bytes: int) -> StepMemory:
        """To be asked for when the pass is over."""
        before = [0, *(call.outside_before for call in self.calls)]
        blocks = tuple(
            BlockMemory(
                call.inputs, call.inside, call.outside_before - b, call.passing, call.fetched, call.waiting_weights
            )
            for b, call in zip(before[:-1], self.calls, strict=True)
        )
        return StepMemory(
            total=self.total,
            outside_blocks=self.outside_blocks,
            blocks=blocks,
            ending=max(2 * self.largest_tensor, self.live.peak - self.kept_at_block_end),
            held=self.live.live,
            different_blocks=len(self.modules),
            adapter_bytes=adapter_bytes,
            has_prefetch=self.has_prefetch,
        )
