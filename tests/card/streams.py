"""Streams and events of the pretend card, and who may touch which memory when.

What is asked of one stream is done in order; between two streams nothing is certain but what an event says. Every op
is one tick of its stream's clock, and a stream knows how far the others are (vector clocks, as in torch's own CUDA
sanitizer, which needs a real card). A race is a read of what another stream may still be writing, a write over what
it may still be reading, and memory that goes back to the allocator while another stream is still at it."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field


class CardEvent:
    def __init__(self, known: dict[int, int]):
        self.known = known


class CardStream:
    numbers = itertools.count()
    current: CardStream

    def __init__(self, device=None):
        self.number = next(self.numbers)
        self.known = {self.number: 0}  # stream -> ticks that are done before what this one is asked next

    def tick(self) -> tuple[int, int]:
        self.known[self.number] += 1
        return self.number, self.known[self.number]

    def has_seen(self, access: tuple[int, int]) -> bool:
        return self.known.get(access[0], 0) >= access[1]

    def record_event(self) -> CardEvent:
        return CardEvent(dict(self.known))

    def wait_event(self, event: CardEvent):
        for stream, ticks in event.known.items():
            self.known[stream] = max(self.known.get(stream, 0), ticks)

    def wait_stream(self, stream: CardStream):
        self.wait_event(stream.record_event())


COMPUTING = CardStream.current = CardStream()


def current_stream(device=None) -> CardStream:
    return CardStream.current


@contextlib.contextmanager
def stream(chosen: CardStream):
    before, CardStream.current = CardStream.current, chosen
    try:
        yield
    finally:
        CardStream.current = before


@dataclass
class MemoryUse:
    """Of one storage: the last write, the reads since then, and the stream that its memory was taken on."""

    home: CardStream
    written: tuple[int, int]
    reads: dict[int, int] = field(default_factory=dict)  # stream -> its last tick that reads

    @classmethod
    def of_new_memory(cls, home: CardStream) -> MemoryUse:
        """Whoever had the memory before may be at it until here."""
        return cls(home, home.tick())

    def find_race(self, access: tuple[int, int], stream: CardStream, is_write: bool) -> str:
        """Notes the access, and says what is wrong with it."""
        if not stream.has_seen(self.written):
            return f"{'overwrites' if is_write else 'reads'} what is still being written"
        if is_write:
            if not all(map(stream.has_seen, self.reads.items())):
                return "overwrites what is still being read"
            self.written, self.reads = access, {}
        else:
            self.reads[access[0]] = access[1]
        return ""

    def is_free_too_early(self) -> bool:
        """Its memory may be given to the next who asks on its home stream."""
        return not all(map(self.home.has_seen, [*self.reads.items(), self.written]))
