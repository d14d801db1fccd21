"""What a training step needs under each plan of keeping activations, and which plan to take. Arithmetic only: bytes and seconds in, a plan out.

A plan says what happens to the values inside a model's blocks between forward and backward: they are kept (off), computed again (per block;
Chen et al. 2016), or computed again from inputs that wait in the CPU's memory (per block + CPU). All give the same gradients.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

OFF, PER_BLOCK, PER_BLOCK_CPU, AUTO = "off", "per block", "per block + CPU", "auto"
PLANS = (OFF, PER_BLOCK, PER_BLOCK_CPU)  # fastest first, each needing less of the device's memory than the one before
ROOM = 0.9  # of the free memory may be planned with: kernels take workspaces, and allocators leave gaps
PASSES = {OFF: 2.0, PER_BLOCK: 3.0, PER_BLOCK_CPU: 3.0}  # forward, backward to the inputs, forward again; frozen weights get no gradient
TRANSFER = 12e9  # bytes per second between device and CPU memory, each way: PCIe 3 x16


@dataclass(frozen=True)
class Block:
    """Bytes of one block's call: what it is given, and what autograd would keep of its inside."""

    inputs: int  # those that no earlier block was given already
    inside: int


@dataclass(frozen=True)
class Measured:
    """Bytes that one step would keep for backward, with nothing checkpointed; weights and adapters are not in them."""

    total: int  # each piece of memory once
    outside: int  # kept by what is no block
    blocks: tuple[Block, ...]
    largest: int = 0  # the largest single piece: gradients of that size come and go
    adapters: int = 0  # bytes of the trained numbers; their gradients and two moments come on top

    def scaled(self, factor: float) -> Measured:
        """The same for a batch or a picture that is `factor` times as large."""
        blocks = tuple(Block(round(b.inputs * factor), round(b.inside * factor)) for b in self.blocks)
        return replace(self, total=round(self.total * factor), outside=round(self.outside * factor), blocks=blocks,
                       largest=round(self.largest * factor))  # fmt: skip

    @property
    def inputs(self) -> int:
        return sum(b.inputs for b in self.blocks)

    def kept(self, plan: str) -> int:
        """Bytes on the device at the worst block. Backward goes from the last block to the first: what later blocks were given is free then."""
        if plan == OFF or not self.blocks:
            return self.total
        given, worst = 0, 0
        for block in self.blocks:
            given = given + block.inputs if plan == PER_BLOCK else block.inputs
            worst = max(worst, given + block.inside)
        return min(self.total, self.outside + worst)

    def peak(self, plan: str) -> int:
        """Bytes beside the weights at the worst moment of a step."""
        return self.kept(plan) + 2 * self.largest + 3 * self.adapters

    def carried(self, plan: str) -> int:
        """Bytes that travel to the CPU and back in a step, one way."""
        return self.inputs if plan == PER_BLOCK_CPU else 0


@dataclass(frozen=True)
class Forecast:
    """What is said before the run."""

    plan: str
    peak: int  # bytes beside the weights
    free: int  # bytes, before the step
    seconds: float | None = None  # per step
    room: int = 0  # the largest batch that would fit under this plan, 0 when not even this one does

    @property
    def fits(self) -> bool:
        return self.peak <= ROOM * self.free

    def line(self, steps: int, now: float | None = None) -> str:
        """per block: 1.3 of 8.0 GiB, 0.42 s a step, 7 min, until 14:32"""
        parts = [f"{self.plan}: {gib(self.peak)} of {gib(self.free)} GiB free"]
        if self.seconds is not None:
            left = self.seconds * steps
            until = time.strftime("%H:%M", time.localtime((time.time() if now is None else now) + left))
            parts += [f"{self.seconds:.2g} s a step", f"{spoken(left)}, until {until}"]
        if not self.fits:
            parts.append("this is tight: lower batch or resolution if it stops")
        elif self.room > 1:
            parts.append(f"batch up to {self.room} fits")
        return ", ".join(parts)


def gib(count: int) -> str:
    return f"{count / 2**30:.2g}" if count < 10 * 2**30 else f"{count / 2**30:.0f}"


def spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cheaper(plan: str, plans=PLANS) -> str | None:
    """The next plan that needs less memory, or None."""
    later = plans[plans.index(plan) + 1 :] if plan in plans else ()
    return later[0] if later else None


def chosen(measured: Measured, free: int, plans=PLANS) -> str:
    """The fastest plan that fits, else the one that needs least."""
    return next((plan for plan in plans if measured.peak(plan) <= ROOM * free), plans[-1])


def forecast(measured: Measured, plan: str, free: int, batch: int = 1, seconds: float | None = None, extra: int = 0) -> Forecast:
    """`measured` is of this batch; `extra`: bytes that a real step took beyond what was counted."""
    one, fixed = measured.scaled(1 / batch), extra + 3 * measured.adapters
    each = max(1, one.peak(plan) - 3 * measured.adapters)
    return Forecast(plan, measured.peak(plan) + extra, free, seconds, max(0, int((ROOM * free - fixed) / each)))


def seconds_of(plan: str, known: str, seconds: float, measured: Measured) -> float:
    """A step's time under another plan than the one it was measured with."""
    moved = lambda name: 2 * measured.carried(name) / TRANSFER
    return (seconds - moved(known)) * PASSES[plan] / PASSES[known] + moved(plan)
