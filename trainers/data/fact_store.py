"""Facts about files that outlast the process: one SQLite file, which two processes may use and anybody may delete."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import zlib
from collections.abc import Callable
from pathlib import Path

FACTS_VERSION = 2  # raise it when the same file would give other facts
FACTS_FILE = "image_facts.sqlite3"
MAX_STORED_FACTS = 500_000  # some 100 MB; those that were written first go first
FACTS_PER_WRITE = 1000  # of those that came last a killed process loses as many
SECONDS_FOR_OTHERS = 10.0  # that another process may take for its write

PLACE_ERRORS = ("locked", "readonly", "full", "unable to open", "I/O")  # in SQLite's words; others are damage

CREATE_TABLE = "CREATE TABLE facts (name BLOB PRIMARY KEY, stamp TEXT, fact TEXT, checksum INTEGER)"
READ_FACT = "SELECT fact, checksum FROM facts WHERE name = ? AND stamp = ?"
WRITE_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)"  # a replaced row counts as new
DROP_OLD_FACTS = "DELETE FROM facts WHERE rowid <= (SELECT max(rowid) FROM facts) - ?"


class FactStore:
    """Texts by the name of a file and its stamp. It is open within `with`, and the file is made at the first write.

    A damaged file is made again, and one that cannot be used is left alone; `notify` is told, and the facts are found
    out anew."""

    def __init__(self, file, notify: Callable[[str], object] = logging.warning):
        self.file, self.notify = Path(file), notify
        self.connection: sqlite3.Connection | None = None
        self.is_usable, self.is_remade = True, False
        self.unwritten: dict[str, tuple[str, str]] = {}  # name -> (stamp, fact)

    def __enter__(self) -> FactStore:
        if self.file.exists():
            self.attempt(self.connect)
        return self

    def __exit__(self, *error) -> None:
        self.flush()
        self.close()

    def read(self, name: str, stamp: str) -> str | None:
        """The fact, if the file had this stamp when it was written."""
        if self.connection is None:  # there is no file yet, or it cannot be used
            return None
        return self.attempt(lambda: self.read_row(name, stamp))

    def write(self, name: str, stamp: str, fact: str) -> None:
        """Keep a fact; the file gets many at once, so that no other process waits while they are found out."""
        self.unwritten[name] = stamp, fact
        if len(self.unwritten) >= FACTS_PER_WRITE:
            self.flush()

    def flush(self) -> None:
        if self.unwritten and self.is_usable:
            self.attempt(self.write_rows)
        self.unwritten.clear()

    def connect(self) -> sqlite3.Connection:
        if self.connection is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(self.file, SECONDS_FOR_OTHERS)
            if read_version(self.connection) != FACTS_VERSION:
                self.make_table(self.connection)
        return self.connection

    def make_table(self, connection: sqlite3.Connection) -> None:
        """The table is made anew, unless another process did so meanwhile and has written to it."""
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if read_version(connection) != FACTS_VERSION:
                connection.execute("DROP TABLE IF EXISTS facts")
                connection.execute(CREATE_TABLE)
                connection.execute(f"PRAGMA user_version = {FACTS_VERSION}")

    def read_row(self, name: str, stamp: str) -> str | None:
        row = self.connect().execute(READ_FACT, (os.fsencode(name), stamp)).fetchone()
        if row is None:
            return None
        fact, checksum = row
        if not isinstance(fact, str) or checksum != compute_row_checksum(name, stamp, fact):
            raise sqlite3.DatabaseError("a checksum differs")
        return fact

    def write_rows(self) -> None:
        rows = [
            (os.fsencode(name), stamp, fact, compute_row_checksum(name, stamp, fact))
            for name, (stamp, fact) in self.unwritten.items()
        ]
        connection = self.connect()
        with connection:
            connection.executemany(WRITE_FACT, rows)
            connection.execute(DROP_OLD_FACTS, (MAX_STORED_FACTS,))

    def attempt(self, work: Callable):
        """What the work returns, for a damaged file with a new one; None where the database cannot be used."""
        try:
            return work()
        except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
            self.close()
            is_damaged = not isinstance(error, OSError) and not any(word in str(error) for word in PLACE_ERRORS)
            if is_damaged and not self.is_remade and self.remove_file():
                self.is_remade = True
                self.notify(f"{self.file} is damaged ({error}) and is made again; the images are read anew.")
                return self.attempt(work)
            self.is_usable = False
            self.notify(f"{self.file} cannot be used ({error}), so images are read anew after each start.")
            return None

    def remove_file(self) -> bool:
        """Whether the file is gone."""
        for file in (self.file, self.file.with_name(f"{self.file.name}-journal")):
            with contextlib.suppress(OSError):
                file.unlink()
        return not self.file.exists()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def read_version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def compute_row_checksum(name: str, stamp: str, fact: str) -> int:
    return zlib.crc32(b"\0".join((os.fsencode(name), stamp.encode(), fact.encode())))
