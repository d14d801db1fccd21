"""What a training step needs under each plan of keeping activations, and which plan to take. Arithmetic only: bytes and seconds in, a plan out.

A plan says what happens to the values inside a model's blocks between forward and backward: they are kept (off), computed again (per block;
Chen et al. 2016), or computed again from inputs that wait in the CPU's memory (per block + CPU), where the model's own weights may wait, too
(offloaded blocks). All give the same gradients. Where none of them fits, the batch is split, which is the same training in another order.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

OFF, PER_BLOCK, PER_BLOCK_CPU, OFFLOADED, AUTO = "off", "per block", "per block + CPU", "offloaded blocks", "auto"
PLANS = (OFF, PER_BLOCK, PER_BLOCK_CPU, OFFLOADED)  # fastest first, each needing less of the device's memory than the one before
ROOM = 0.9  # of the free memory may be planned with: kernels take workspaces, and allocators leave gaps
MOST = 8  # pictures in a batch that is chosen; more is a decision about the training and not about memory


@dataclass(frozen=True)
class Block:
    """Bytes of one block's call: what it is given, and what autograd would keep of its inside. Each piece of memory counts once."""

    inputs: int  # those that nothing before it kept already
    inside: int
    before: int = 0  # kept by what is no block, between the block before and this one


@dataclass(frozen=True)
class Measured:
    """Bytes that one step would keep for backward, with nothing checkpointed; weights and adapters are not in them."""

    total: int  # each piece of memory once
    outside: int  # kept by what is no block, all through the pass
    blocks: tuple[Block, ...]
    largest: int = 0  # the largest single piece: gradients of that size come and go
    adapters: int = 0  # bytes of the trained numbers; their gradients and the optimizer's two numbers come on top
    accumulated: bool = False  # gradients of the batch before are there all the time
    weights: int = 0  # bytes of the blocks' weights that lie on the device
    heaviest: int = 0  # bytes of the weights of the block that has most, wherever they lie

    def scaled(self, factor: float) -> Measured:
        """The same for a batch or a picture that is `factor` times as large."""
        blocks = tuple(Block(round(b.inputs * factor), round(b.inside * factor), round(b.before * factor)) for b in self.blocks)
        return replace(self, total=round(self.total * factor), outside=round(self.outside * factor), blocks=blocks,
                       largest=round(self.largest * factor))  # fmt: skip

    def moments(self, plan: str) -> list[tuple[int, float]]:
        """(bytes kept, share of the gradients that are there) in backward, which goes from the last block to the first: what came after a block is free
        when its turn comes."""
        if plan == OFF or not self.blocks:
            return [(self.total, 0.0), (0, 1.0)]
        given, outside, found = 0, 0, []
        for number, block in enumerate(self.blocks, 1):
            given, outside = given + block.inputs if plan == PER_BLOCK else block.inputs, outside + block.before
            found.append((min(self.total, outside + given + block.inside), 1 - number / len(self.blocks)))
        return [(min(self.total, self.outside + given), 0.0), *found, (0, 1.0)]

    def peak(self, plan: str) -> int:
        """Bytes beside the weights at the worst moment of a step."""
        made = lambda share: self.adapters * (1 if self.accumulated else share)
        return round(max(kept + made(share) for kept, share in self.moments(plan))) + 2 * self.largest + self.constant(plan)

    def constant(self, plan: str) -> int:
        """Those of them that are the same for every batch and moment: the optimizer's numbers, and the weights of a block that were away."""
        return 2 * self.adapters + (self.heaviest if plan == OFFLOADED else 0)

    def missing(self, plan: str, free: int) -> int:
        """Bytes that must become free beside those that are, before the plan fits."""
        return max(0, math.ceil(self.peak(plan) / ROOM - free))

    def fits(self, plan: str, free: int) -> bool:
        return self.missing(plan, free) <= (self.weights if plan == OFFLOADED else 0)


@dataclass(frozen=True)
class Forecast:
    """What is said before the run."""

    plan: str
    peak: int  # bytes beside the weights
    free: int  # bytes, before the step
    seconds: float | None = None  # per step
    room: int = 0  # the largest batch that would fit under this plan, 0 when not even this one does
    batch: int = 1
    away: int = 0  # bytes of the model's weights that wait in the CPU's memory

    @property
    def fits(self) -> bool:
        return self.peak <= ROOM * self.free

    def line(self, steps: int, now: float | None = None) -> str:
        """per block, batch 2: 1.3 of 8.0 GiB free, 0.42 s a step, 7 min, until 14:32"""
        parts = [f"{self.plan}, batch {self.batch}: {gib(self.peak)} of {gib(self.free)} GiB free"]
        if self.away:
            parts.append(f"{gib(self.away)} GiB of weights wait in the CPU's memory")
        if self.seconds is not None:
            left = self.seconds * steps
            until = time.strftime("%H:%M", time.localtime((time.time() if now is None else now) + left))
            parts += [f"{self.seconds:.2g} s a step", f"{spoken(left)}, until {until}"]
        if not self.fits:
            parts.append("this is tight: lower batch or resolution if it stops")
        elif self.room > self.batch:
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
    return next((plan for plan in plans if measured.fits(plan, free)), plans[-1])


def largest_batch(one: Measured, free: int, plan: str, most: int = MOST) -> int:
    """The most pictures that fit in a step, at least 1. `one` is measured with a single one."""
    return next((batch for batch in range(most, 1, -1) if one.scaled(batch).fits(plan, free)), 1)


def split(measured: Measured, free: int, plan: str, batch: int) -> int:
    """The largest part of the batch, equal to the others, that fits; at least 1. `measured` is of the whole batch."""
    parts = (part for part in range(batch, 1, -1) if batch % part == 0)
    return next((part for part in parts if measured.scaled(part / batch).fits(plan, free)), 1)


def forecast(measured: Measured, plan: str, free: int, batch: int = 1, seconds: float | None = None, extra: int = 0, away: int = 0) -> Forecast:
    """`measured` is of this batch; `extra`: bytes that a real step took beyond what was counted; `away`: of weights that left before."""
    each = max(1, measured.scaled(1 / batch).peak(plan) - measured.constant(plan))
    room = (ROOM * free - extra - measured.constant(plan)) / each
    return Forecast(plan, measured.peak(plan) + extra, free, seconds, max(0, int(room)), batch, away)
