"""Memory of the device: what a step needs, what is free, and weights that leave for the CPU."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING

import comfy.model_management as mm
import torch

from ...trainers.memory.plan import (
    PLAN_AUTO,
    PLAN_OFF,
    PLAN_OFFLOADED,
    PLAN_PER_BLOCK,
    PLAN_PER_BLOCK_CPU,
    next_cheaper_plan,
)
from .context import find_block_classes, move_bare_parameters

if TYPE_CHECKING:
    from .session import TrainingSession

UNLIMITED_BYTES = 1e32  # bytes: what the host says where it means all


def estimate_training_memory(model, area, batch: int, checkpointing: str) -> float:
    """A rough first figure, in bytes, of what a step needs beside the weights: the host's own estimate for sampling,
    times what autograd keeps. The host offloads weights when it does not fit. `area`: the largest latent (C, ..., h,
    w)."""
    kept = {PLAN_OFF: 12.0, PLAN_PER_BLOCK: 3.0, PLAN_PER_BLOCK_CPU: 2.0, PLAN_OFFLOADED: 2.0, PLAN_AUTO: 2.0}[
        checkpointing
    ]
    return kept * model.model.memory_required([batch, *area])


class OutOfMemory(RuntimeError):
    """Memory ran out in the middle of a run. `cheaper`: the plan to try next, or None."""

    def __init__(self, run, plan: str, device):
        super().__init__(format_memory_advice(run, plan, device))
        self.plan, self.cheaper_plan = plan, next_cheaper_plan(plan)


class StepDoesNotFit(OutOfMemory):
    """A single step has no room, which is found before the run. `need`, `free`: bytes, beside the weights; 0 where the
    need is not known."""

    def __init__(self, run, plan: str, device, need: int, free: int):
        super().__init__(run, plan, device)
        takes = f"about {need / 2**30:.1f} GiB" if need else "more"
        self.args = (
            f"This training does not fit on {device}: a step takes {takes} beside the weights, "
            f"and {free / 2**30:.1f} GiB are free, with checkpointing {plan!r} and batch {run.batch}. Nothing was "
            f"trained. To need less: {'; '.join(list_memory_options(run, plan))}.",
        )


def format_memory_advice(run, plan: str, device) -> str:
    """What to say when memory ran out in the middle of a run on this device."""
    need = f"{measure_peak_memory(device) / 2**30:.1f} GiB were in use"
    return (
        f"Out of memory: {need} when the step failed, with checkpointing {plan!r}. The run is saved and continues "
        f"after a change of memory settings. To need less: {'; '.join(list_memory_options(run, plan))}."
    )


def list_memory_options(run, plan: str) -> list[str]:
    further = next_cheaper_plan(plan)
    return [
        f"set checkpointing to {further!r}" if further else "train at a smaller resolution (Encode Dataset)",
        f"lower batch from {run.batch} and raise accumulate instead"
        if run.batch > 1
        else "use an 8-bit optimizer (AdamW8bit)",
        "lower rank, or train attention layers only",
        "close what else uses the device's memory",
    ]


@contextlib.contextmanager
def hold_bytes(device, count: int):
    """So much of a device's memory is taken inside, but on the CPU, where what is not written to costs nothing."""
    held = torch.empty(0 if device.type == "cpu" else count, dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del held


def measure_peak_memory(device) -> int:
    """Bytes: the peak of this device, or what the process has where the device does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def available_device_memory(session: TrainingSession) -> int:
    """Bytes that the device of a session could still give."""
    return int(mm.get_free_memory(session.denoiser.device))


def block_weight_bytes(network, device) -> tuple[int, int]:
    """(bytes of the blocks' weights that lie on the device, of the block that has most of them there)."""
    classes = tuple(find_block_classes(network))
    blocks = [module.parameters() for module in network.modules() if isinstance(module, classes)]
    here = [sum(p.nbytes for p in block if p.device == device) for block in blocks]
    return sum(here), max(here, default=0)


def offload_weights(session: TrainingSession, count: float = UNLIMITED_BYTES) -> int:
    """At least so many bytes of the model's weights leave the device for the CPU's memory, or all of them; returns how
    many did. (The host's own offload device is the card itself under --gpu-only and --highvram.) The host fetches each
    again when its layer is called, and under checkpointing nothing keeps it longer than its block."""
    patcher = session.denoiser.patcher
    left = patcher.partially_unload(torch.device("cpu"), count)
    move_bare_parameters(patcher)
    return left


def waiting_weight_bytes(session: TrainingSession) -> int:
    """Bytes of the model's weights that wait in the CPU's memory."""
    patcher = session.denoiser.patcher
    return max(0, patcher.model_size() - patcher.loaded_size())


def offload_surplus_weights(session: TrainingSession, allowed: int):
    """Weights beyond so many bytes on the device leave it again. The host's sampler loads what fits beside a sampling
    step, which is less than what a training step needs."""
    patcher = session.denoiser.patcher
    surplus = patcher.loaded_size() - allowed
    if surplus > 0:
        offload_weights(session, surplus)


class PeakMemoryMeter:
    """How much a device takes from now on."""

    def __init__(self, device):
        self.device = device if device.type == "cuda" else None
        if self.device:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.bytes_before = torch.cuda.memory_allocated(device)

    def peak(self) -> int:
        """Bytes beyond what was taken at the start, once all work is done; 0 for a device that does not say."""
        if not self.device:
            return 0
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.bytes_before


def release_cached_memory():
    """What a failed step held is given back to the device."""
    gc.collect()
    mm.soft_empty_cache()


def is_out_of_memory_error(error: BaseException) -> bool:
    """Of a device, or of the machine itself: torch's CPU allocator says so in words only."""
    return mm.is_oom(error) or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
