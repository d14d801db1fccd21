"""What waits in the CPU's memory is fetched before it is asked for: the weights of the next block, and the saved inputs
of the block whose backward comes next, while the device computes the present one.

The order of the two streams is the whole of it. Memory for a copy is taken, and given back, on the computing stream.
The copy begins once that stream has done all that was asked of it before, so whoever used the memory before is done
with it; and the computing stream waits for the copy before it reads it, or before the memory goes back. So the
allocator sees one stream alone. record_stream, in its place, would keep each block's memory until the device has
caught up with the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FORWARD, RECOMPUTATION = "forward", "recomputation"


@dataclass(eq=False)
class Arrival:
    """Copies on their way to the device."""

    sources: Sequence[Tensor]
    copies: list[Tensor]
    done: Any  # the event after the last of them


class TransferStream:
    """A second stream of a device, for copies from the CPU's memory."""

    def __init__(self, device: torch.device):
        self.device, self.backend = device, torch.get_device_module(device)
        self.stream = self.backend.Stream(device=device)
        self.arrivals: list[Arrival] = []  # what nobody has received; kept here, since its memory is being written

    def fetch(self, sources: Sequence[Tensor]) -> Arrival:
        """Begin to copy these tensors of the CPU."""
        with torch.no_grad():
            copies = [torch.empty_like(source, device=self.device, requires_grad=False) for source in sources]
            self.stream.wait_stream(self.backend.current_stream(self.device))
            with self.backend.stream(self.stream):
                for copy, source in zip(copies, sources, strict=True):
                    copy.copy_(source, non_blocking=True)
                arrival = Arrival(sources, copies, self.stream.record_event())
        self.arrivals.append(arrival)
        return arrival

    def receive(self, arrival: Arrival) -> list[Tensor]:
        """The copies, to be used by what is asked of the device from now on."""
        self.backend.current_stream(self.device).wait_event(arrival.done)
        self.arrivals.remove(arrival)
        return arrival.copies

    def drop_arrivals(self) -> None:
        """Give back the memory of what nobody has received."""
        if self.arrivals:
            self.backend.current_stream(self.device).wait_stream(self.stream)
            self.arrivals.clear()


class BlockPrefetcher:
    """Fetches the weights of one block ahead. It learns the order of the blocks as they are called, in forward and in
    recomputation; a pass whose order is another one takes no harm, since a layer whose weight has not been fetched
    fetches it itself. `list_weights(block)`: its weights that wait elsewhere and are asked for by `take_weight`."""

    def __init__(self, stream: TransferStream, list_weights: Callable[[nn.Module], list[Tensor]]):
        self.stream, self.list_weights = stream, list_weights
        self.next_blocks: dict[tuple[str, nn.Module], nn.Module] = {}
        self.previous: tuple[str, nn.Module] | None = None
        self.expected: tuple[nn.Module, Arrival] | None = None
        self.weights: dict[int, Tensor] = {}  # of the block that is being called: id of a weight -> its copy
        self.is_inside = False
        self.last_saved: Any = None  # CpuOffloadHooks of the block that was called last in this pass

    def begin_pass(self) -> None:
        """The network is called, or was: nothing on its way is of use any more."""
        self.previous = self.expected = self.last_saved = None
        self.stream.drop_arrivals()

    @contextlib.contextmanager
    def calling_block(self, block: nn.Module, phase: str):
        """Inside, the block is called: its weights have arrived, and those of the next one are on their way."""
        if self.is_inside:  # a block within a block is part of it
            yield
            return
        self.learn_order(block, phase)
        self.weights = self.receive_weights(block)
        self.is_inside = True
        try:
            if following := self.next_blocks.get((phase, block)):
                self.expected = following, self.stream.fetch(self.list_weights(following))
            yield
        finally:
            self.is_inside, self.weights = False, {}

    @contextlib.contextmanager
    def holding_weights(self, block: nn.Module):
        """Inside, the block's weights are there as in `calling_block`, without those of a next one: to measure it."""
        sources = self.list_weights(block)
        copies = self.stream.receive(self.stream.fetch(sources))
        self.weights = {id(source): copy for source, copy in zip(sources, copies, strict=True)}
        del copies
        try:
            yield
        finally:
            self.weights = {}

    def learn_order(self, block: nn.Module, phase: str) -> None:
        if self.previous is not None and self.previous[0] == phase:
            self.next_blocks[self.previous] = block
        self.previous = phase, block

    def receive_weights(self, block: nn.Module) -> dict[int, Tensor]:
        expected, self.expected = self.expected, None
        if expected is None:
            return {}
        copies = self.stream.receive(expected[1])
        if expected[0] is not block:
            return {}
        return {id(source): copy for source, copy in zip(expected[1].sources, copies, strict=True)}

    def take_weight(self, weight: Tensor) -> Tensor | None:
        """The copy of a weight of the block that is being called, once: it is the caller's."""
        return self.weights.pop(id(weight), None)
