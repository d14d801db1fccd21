"""What was found out about files by reading all of them, kept while the files stay the same: in a folder of 20 000
images one that is new costs one reading."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar
from weakref import WeakSet

from .folder_listing import SETTLED_NS

FactT = TypeVar("FactT")
MAX_KNOWN_FILES = 200_000
ALL_FACTS: WeakSet[FileFacts] = WeakSet()


class FileFacts(Generic[FactT]):
    """The fact that `find(file)` tells of each file. A file counts as unchanged while its size, its times and its place
    on the disk are; one that was written a moment ago is read again, because a second writing may leave all of them."""

    def __init__(self, find: Callable[[Path], FactT], most: int = MAX_KNOWN_FILES):
        self.find, self.most = find, most
        self.known: OrderedDict[str, tuple[tuple[int, ...], FactT]] = OrderedDict()
        self.lock = threading.Lock()
        ALL_FACTS.add(self)

    def get(self, file: Path) -> FactT:
        """The fact. What `find` raises is raised again each time."""
        stamp, name = read_file_stamp(file), os.path.abspath(file)
        with self.lock:
            known = self.known.get(name)
        if known and known[0] == stamp:
            return known[1]
        fact = self.find(file)
        if stamp and time.time_ns() - max(stamp[1:3]) > SETTLED_NS and read_file_stamp(file) == stamp:
            self.put(name, stamp, fact)
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


def forget_file(file) -> None:
    """A file turned out to be another one, though nothing told so."""
    for facts in list(ALL_FACTS):
        facts.forget(file)


def read_file_stamp(file: Path) -> tuple[int, ...]:
    """(size, mtime and ctime in ns, inode, device); empty where there is no such file."""
    try:
        stat = os.stat(file)
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev
