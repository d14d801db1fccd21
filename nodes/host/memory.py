"""Memory of the device: what a step needs, what is free, and weights that leave for the CPU."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import comfy.model_management as mm
import torch

from ...trainers.memory.plan import AUTO, OFF, OFFLOADED, PER_BLOCK, PER_BLOCK_CPU, cheaper
from .context import block_classes

if TYPE_CHECKING:
    from .session import Session

EVERYTHING = 1e32  # bytes: what the host says where it means all


def training_memory(model, area, batch: int, checkpointing: str) -> float:
    """A rough first figure, in bytes, of what a step needs beside the weights: the host's own estimate for sampling, times what
    autograd keeps. The host offloads weights when it does not fit. `area`: the largest latent (C, ..., h, w)."""
    kept = {OFF: 12.0, PER_BLOCK: 3.0, PER_BLOCK_CPU: 2.0, OFFLOADED: 2.0, AUTO: 2.0}[checkpointing]
    return kept * model.model.memory_required([batch, *area])


class OutOfMemory(RuntimeError):
    """Memory ran out in the middle of a run. `cheaper`: the plan to try next, or None."""

    def __init__(self, run, plan: str):
        super().__init__(memory_advice(run, plan))
        self.plan, self.cheaper = plan, cheaper(plan)


def memory_advice(run, plan: str) -> str:
    """What to say when memory ran out in the middle of a run."""
    need = f"{measured_peak() / 2**30:.1f} GiB were in use"
    further = cheaper(plan)
    options = [
        f"set checkpointing to {further!r}" if further else "train at a smaller resolution (Encode Dataset)",
        f"lower batch from {run.batch} and raise accumulate instead" if run.batch > 1 else "use an 8-bit optimizer (AdamW8bit)",
        "lower rank, or train attention layers only",
    ]
    return (f"Out of memory: {need} when the step failed, with checkpointing {plan!r}. The run is saved and continues after a change of memory "
            f"settings. To need less: {'; '.join(options)}.")


def measured_peak() -> int:
    """Bytes: the device's peak, or the process's on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def free_memory(session: Session) -> int:
    """Bytes that the device of a session could still give."""
    return int(mm.get_free_memory(session.denoiser.device))


def block_weights(network, device) -> tuple[int, int]:
    """(bytes of the blocks' weights that lie on the device, all of the block that has most)."""
    classes = tuple(block_classes(network))
    blocks = [list(module.parameters()) for module in network.modules() if isinstance(module, classes)]
    here = sum(p.nbytes for block in blocks for p in block if p.device == device)
    return here, max((sum(p.nbytes for p in block) for block in blocks), default=0)


def offload(session: Session, count: float = EVERYTHING):
    """At least so many bytes of the model's weights leave the device, or all of them. The host fetches each again when its layer is called, and
    under checkpointing nothing keeps it longer than its block."""
    patcher = session.denoiser.patcher
    session.away += patcher.partially_unload(patcher.offload_device, count)


class Gauge:
    """How much a device takes from now on."""

    def __init__(self, device):
        self.device = device if device.type == "cuda" else None
        if self.device:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def peak(self) -> int:
        """Bytes beyond what was taken at the start, once all work is done; 0 for a device that does not say."""
        if not self.device:
            return 0
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before


def let_go():
    """What a failed step held is given back to the device."""
    gc.collect()
    mm.soft_empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Of a device, or of the machine itself: torch's CPU allocator says so in words only."""
    return mm.is_oom(error) or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
