"""What a training step needs under each plan of keeping activations, and which plan to take. Arithmetic only: bytes and
seconds in, a plan out.

A plan says what happens to the values inside a model's blocks between forward and backward: they are kept (off),
computed again (per block; Chen et al. 2016), or computed again from inputs that wait in the CPU's memory (per block +
CPU), where the model's own weights may wait, too (offloaded blocks). All give the same gradients. Where none of them
fits, the batch is split, which is the same training in another order.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from ..loop import format_duration

PLAN_OFF, PLAN_PER_BLOCK, PLAN_PER_BLOCK_CPU, PLAN_OFFLOADED, PLAN_AUTO = (
    "off",
    "per block",
    "per block + CPU",
    "offloaded blocks",
    "auto",
)
CHECKPOINTING_PLANS = (
    PLAN_OFF,
    PLAN_PER_BLOCK,
    PLAN_PER_BLOCK_CPU,
    PLAN_OFFLOADED,
)  # fastest first, each needing less of the device's memory than the one before
CPU_PLANS = (PLAN_PER_BLOCK_CPU, PLAN_OFFLOADED)  # under which blocks' inputs wait in the CPU's memory
USABLE_MEMORY_SHARE = 0.9  # of the free memory may be planned with: kernels take workspaces, and allocators leave gaps
UNCOUNTED_SHARE = 0.001  # tables that a network makes in a step: up to 0.07 % of it (benchmarks/card.py, Chroma)
SMALL_PIECES_BYTES = 32 * 1024  # noise levels, weights of losses, sums: at most 9 KiB were seen (tests/card/)
MAX_AUTO_BATCH = 8  # images in a batch that is chosen; more is a decision about the training and not about memory


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block's call: what it is given, and what autograd would keep of its inside. Each piece of memory
    counts once."""

    inputs: int  # those that nothing before it kept already
    inside: int
    outside_before: int = 0  # kept by what is no block, between the block before and this one
    passing: int = 0  # beside these, at the worst moment of the block's own backward pass
    fetched: int = 0  # all that it is given, which comes back for it where inputs wait in the CPU's memory
    waiting_weights: int = 0  # of its own, which are fetched while the block whose backward comes before is at work

    def scaled(self, factor: float) -> BlockMemory:
        return replace(
            self,
            inputs=round(self.inputs * factor),
            inside=round(self.inside * factor),
            outside_before=round(self.outside_before * factor),
            passing=round(self.passing * factor),
            fetched=round(self.fetched * factor),
        )


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one step would keep for backward, with nothing checkpointed; weights and adapters are not in them."""

    total: int  # each piece of memory once
    outside_blocks: int  # kept by what is no block, all through the pass
    blocks: tuple[BlockMemory, ...]
    ending: int = 0  # what comes and goes after the last block
    held: int = 0  # what the method keeps from one step to the next, and tables that nobody counts
    different_blocks: int = 0  # where a step predicts several times, there are more calls than blocks
    adapter_bytes: int = 0  # bytes of the trained numbers; their gradients and the optimizer's two numbers come on top
    has_accumulated_gradients: bool = False  # gradients of the batch before are there all the time
    has_prefetch: bool = False  # what the next block needs from the CPU's memory comes while one is at work
    weights: int = 0  # bytes of the blocks' weights that lie on the device
    largest_block_weights: int = 0  # bytes of the weights that lie on the device, of the block that has most there

    def scaled(self, factor: float) -> StepMemory:
        """The same for a batch or an image that is `factor` times as large."""
        return replace(
            self,
            total=round(self.total * factor),
            outside_blocks=round(self.outside_blocks * factor),
            blocks=tuple(block.scaled(factor) for block in self.blocks),
            ending=round(self.ending * factor),
            held=round(self.held * factor),
        )

    def backward_profile(self, plan: str) -> list[tuple[int, float]]:
        """(bytes that are there, share of the gradients that are there) in backward, which goes from the last block to
        the first, and last in the optimizer's step: what came after a block is free when its turn comes."""
        given, outside, inside, found = 0, 0, 0, []
        for number, (before, block) in enumerate(zip((None, *self.blocks), self.blocks, strict=False), 1):
            given = block.fetched if plan in CPU_PLANS else given + block.inputs
            inside = inside + block.inside if plan == PLAN_OFF else block.inside
            outside += block.outside_before
            kept = outside + given + inside
            kept = min(self.total, kept) if plan == PLAN_OFF else kept
            behind = min(1.0, (len(self.blocks) - number) / (self.different_blocks or len(self.blocks)))
            found.append((kept + block.passing + self.prefetched_bytes(before, plan), behind))
        kept = self.total if plan == PLAN_OFF or not self.blocks else self.outside_blocks + given
        return [(kept + self.ending, 0.0), *found, (self.adapter_bytes, 1.0)]

    def prefetched_bytes(self, block: BlockMemory | None, plan: str) -> int:
        """What has come for this block, whose backward is next."""
        if block is None or not self.has_prefetch:
            return 0
        return block.waiting_weights + (block.fetched if plan in CPU_PLANS else 0)

    def peak_bytes(self, plan: str) -> int:
        """Bytes beside the weights at the worst moment of a step."""
        made = lambda share: self.adapter_bytes * (1 if self.has_accumulated_gradients else share)
        worst = max(there + made(share) for there, share in self.backward_profile(plan))
        return round(worst) + self.held + self.constant_bytes(plan) + SMALL_PIECES_BYTES

    def with_uncounted_tables(self) -> StepMemory:
        """With room for what no block keeps and nobody counts."""
        return replace(self, held=self.held + math.ceil(UNCOUNTED_SHARE * self.peak_bytes(PLAN_PER_BLOCK)))

    def constant_bytes(self, plan: str) -> int:
        """Those of them that are the same for every batch and moment: the optimizer's numbers, and the weights of a
        block that were away and of the next one, which is fetched meanwhile."""
        return 2 * self.adapter_bytes + (2 * self.largest_block_weights if plan == PLAN_OFFLOADED else 0)

    def least_free_bytes(self, plan: str) -> int:
        """Bytes that must be free beside the weights for the plan to fit."""
        return math.ceil(self.peak_bytes(plan) / USABLE_MEMORY_SHARE)

    def missing_bytes(self, plan: str, free: int) -> int:
        """Bytes that must become free beside those that are, before the plan fits."""
        return max(0, math.ceil(self.least_free_bytes(plan) - free))

    def fits(self, plan: str, free: int) -> bool:
        return self.missing_bytes(plan, free) <= (self.weights if plan == PLAN_OFFLOADED else 0)


@dataclass(frozen=True)
class RunForecast:
    """What is said before the run."""

    plan: str
    peak_bytes: int  # bytes beside the weights
    free_bytes: int  # bytes, before the step
    seconds: float | None = None  # per step
    max_batch: int = 0  # the largest batch that would fit under this plan, 0 when not even this one does
    batch: int = 1
    offloaded_bytes: int = 0  # bytes of the model's weights that wait in the CPU's memory

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= USABLE_MEMORY_SHARE * self.free_bytes

    def format_line(self, steps: int, now: float | None = None) -> str:
        """per block, batch 2: 1.3 of 8.0 GiB free, 0.42 s a step, 7 min, until 14:32"""
        parts = [
            f"{self.plan}, batch {self.batch}: {format_gib(self.peak_bytes)} of {format_gib(self.free_bytes)} GiB free"
        ]
        if self.offloaded_bytes:
            parts.append(f"{format_gib(self.offloaded_bytes)} GiB of weights wait in the CPU's memory")
        if self.seconds is not None:
            left = self.seconds * steps
            until = time.strftime("%H:%M", time.localtime((time.time() if now is None else now) + left))
            parts += [f"{self.seconds:.2g} s a step", f"{format_duration(left)}, until {until}"]
        if not self.fits:
            parts.append("this is tight: lower batch or resolution if it stops")
        elif self.max_batch > self.batch:
            parts.append(f"batch up to {self.max_batch} fits")
        return ", ".join(parts)


def format_gib(count: int) -> str:
    return f"{count / 2**30:.2g}" if count < 10 * 2**30 else f"{count / 2**30:.0f}"


def next_cheaper_plan(plan: str, plans=CHECKPOINTING_PLANS) -> str | None:
    """The next plan that needs less memory, or None."""
    later = plans[plans.index(plan) + 1 :] if plan in plans else ()
    return later[0] if later else None


def choose_checkpointing_plan(measured: StepMemory, free: int, plans=CHECKPOINTING_PLANS) -> str:
    """The fastest plan that fits, else the one that needs least."""
    return next((plan for plan in plans if measured.fits(plan, free)), plans[-1])


def largest_fitting_batch(one: StepMemory, free: int, plan: str, most: int = MAX_AUTO_BATCH) -> int:
    """The most images that fit in a step, at least 1. `one` is measured with a single one."""
    return next((batch for batch in range(most, 1, -1) if one.scaled(batch).fits(plan, free)), 1)


def largest_fitting_microbatch(measured: StepMemory, free: int, plan: str, batch: int) -> int:
    """The largest part of the batch, equal to the others, that fits; at least 1. `measured` is of the whole batch."""
    parts = (part for part in range(batch, 1, -1) if batch % part == 0)
    return next((part for part in parts if measured.scaled(part / batch).fits(plan, free)), 1)


def make_run_forecast(
    measured: StepMemory,
    plan: str,
    free: int,
    batch: int = 1,
    seconds: float | None = None,
    extra: int = 0,
    away: int = 0,
) -> RunForecast:
    """`measured` is of this batch; `extra`: bytes that a real step took beyond what was counted; `away`: of weights
    that left before."""
    each = max(1, measured.scaled(1 / batch).peak_bytes(plan) - measured.constant_bytes(plan))
    room = (USABLE_MEMORY_SHARE * free - extra - measured.constant_bytes(plan)) / each
    return RunForecast(plan, measured.peak_bytes(plan) + extra, free, seconds, max(0, int(room)), batch, away)
