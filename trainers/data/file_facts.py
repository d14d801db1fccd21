"""What was found out about files by reading all of them, kept while the files stay the same: in a folder of 20 000
images one that is new costs one reading, also after a restart."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakSet

from .folder_listing import SETTLED_NS

if TYPE_CHECKING:
    from .fact_store import FactStore

FactT = TypeVar("FactT")
MAX_KNOWN_FILES = 200_000
ALL_FACTS: WeakSet[FileFacts] = WeakSet()


class FileFacts(Generic[FactT]):
    """The fact that `find(file)` tells of each file. A file counts as unchanged while its size, its times and its place
    on the disk are; one that was written a moment ago is read again, because a second writing may leave all of them.
    to_text and from_text: a fact as a FactStore keeps it, and back."""

    def __init__(
        self,
        find: Callable[[Path], FactT],
        to_text: Callable[[FactT], str] = json.dumps,
        from_text: Callable[[str], FactT] = json.loads,
        most: int = MAX_KNOWN_FILES,
    ):
        self.find, self.to_text, self.from_text, self.most = find, to_text, from_text, most
        self.known: OrderedDict[str, tuple[tuple[int, ...], FactT]] = OrderedDict()
        self.forgotten: set[str] = set()  # what a store says of these is not true
        self.lock = threading.Lock()
        ALL_FACTS.add(self)

    def get(self, file: Path, store: FactStore | None = None) -> FactT:
        """The fact, which is kept in the open store too. What `find` raises is raised again each time."""
        stamp, name = read_file_stamp(file), os.path.abspath(file)
        with self.lock:
            known = self.known.get(name)
        if known and known[0] == stamp:
            return known[1]
        kept = store.read(name, format_stamp(stamp)) if store and stamp and name not in self.forgotten else None
        if kept is not None:
            fact = self.from_text(kept)
            self.put(name, stamp, fact)
            return fact
        fact = self.find(file)
        if stamp and time.time_ns() - max(stamp[1:3]) > SETTLED_NS and read_file_stamp(file) == stamp:
            self.put(name, stamp, fact)
            if store:
                store.write(name, format_stamp(stamp), self.to_text(fact))
                self.forgotten.discard(name)
        return fact

    def put(self, name: str, stamp: tuple[int, ...], fact: FactT) -> None:
        with self.lock:
            self.known[name] = stamp, fact
            self.known.move_to_end(name)
            while len(self.known) > self.most:
                self.known.popitem(last=False)

    def forget(self, file) -> None:
        with self.lock:
            self.known.pop(os.path.abspath(file), None)
            self.forgotten.add(os.path.abspath(file))


def forget_file(file) -> None:
    """A file turned out to be another one, though nothing told so."""
    for facts in list(ALL_FACTS):
        facts.forget(file)


def read_file_stamp(file: Path) -> tuple[int, ...]:
    """(size, mtime and ctime in ns, inode); empty where there is no such file."""
    try:
        stat = os.stat(file)
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def format_stamp(stamp: tuple[int, ...]) -> str:
    return " ".join(map(str, stamp))
