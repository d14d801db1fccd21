"""The steps of one run on a card, whoever runs it: warmed up, counted, timed."""

from __future__ import annotations

import contextlib
import time

from trainyard.benchmarks.contenders import Finished
from trainyard.benchmarks.meters import Crossings, Laps
from trainyard.benchmarks.on_card.cases import WARM_STEPS
from trainyard.trainers import loop

MIN_TIMED_STEPS = 3
ENOUGH_S = 12.0  # of timed steps; more would say little more


class CardLaps(Laps):
    """Steps without a meter, one whose copies are counted, and at most `timed` that are timed. Raises Finished at the
    start of a step when there is none left, or no time for it.

    `bytes_before`: on the card when the first step begins. `peak_bytes`: (allocated, reserved) at most from then on.
    `deadline`: on the clock of time.monotonic. `count_flops`: in the first step, which keeps all activations alive."""

    def __init__(self, card, timed: int, deadline: float, count_flops: bool = False):
        super().__init__((), timed, cuda=card.is_real)
        self.card, self.deadline, self.crossed = card, deadline, Crossings()
        self.bytes_before, self.peak_bytes = None, (0, None)
        warm = [self.flops if count_flops else contextlib.nullcontext, *[contextlib.nullcontext] * (WARM_STEPS - 1)]
        self.plan = iter([*warm, self.crossings, *[self.clock] * timed])
        self.steps = WARM_STEPS + 1 + timed

    def __call__(self):
        if self.bytes_before is None:
            self.begin()
        self.close()
        if self.is_time_up() or not super().__call__():
            raise Finished
        return True

    def begin(self):
        self.card.synchronize()
        self.bytes_before = self.card.allocated_bytes()
        self.card.reset_peak()

    def is_time_up(self) -> bool:
        seconds = self.cost.seconds
        enough = len(seconds) >= MIN_TIMED_STEPS and sum(seconds) >= ENOUGH_S
        return enough or (bool(seconds) and time.monotonic() > self.deadline)

    def close(self):
        super().close()
        if self.bytes_before is not None:
            self.peak_bytes = self.card.peak_bytes()

    @contextlib.contextmanager
    def crossings(self):
        with self.crossed:
            yield


@contextlib.contextmanager
def follow_loop(laps: CardLaps):
    """Laps over the steps of this pack's own loop: from the draw of a step's chance to its last gradient's use."""
    rng, add, last = loop.step_rng, loop.PendingLosses.add, None

    def begin_step(seed, step):
        nonlocal last
        if step != last:  # and not once more under a smaller loss scale
            last = step
            laps()
        return rng(seed, step)

    def end_step(pending, loss, norm):
        add(pending, loss, norm)
        laps.close()

    loop.step_rng, loop.PendingLosses.add = begin_step, end_step
    try:
        yield
    finally:
        loop.step_rng, loop.PendingLosses.add = rng, add
