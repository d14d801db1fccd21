"""Work on a score model that may be stopped at any time: the networks that are done, and the state of the one at hand,
in a folder of its own.

The folder is called after everything that the model depends on, so what is found in it is always the same work.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..files import read_state_tree, write_state_tree
from ..loop import NoStore

CHECKPOINT_SECONDS = 180  # seconds of work that a power cut may cost


@dataclass
class ResumeFolder:
    """Without a folder nothing is kept."""

    folder: Path | None = None
    saved: str = ""  # what is safe, in words
    last_write: float = field(default_factory=time.monotonic)

    def done(self, number: int) -> dict | None:
        """What `finish` was given for this network, or None."""
        return self.read(f"network{number}.state")

    def finish(self, number: int, tree: dict) -> None:
        self.write(f"network{number}.state", tree, f"network {number + 1}")
        if self.folder:
            (self.folder / "now.state").unlink(missing_ok=True)

    def load_current(self, number: int) -> dict | None:
        """What `keep` was given last, if it was for this network."""
        tree = self.read("now.state")
        return tree if tree and tree["number"] == number else None

    def keep(self, number: int, tree: dict, step: int) -> None:
        self.write("now.state", {**tree, "number": number}, f"network {number + 1}, step {step}")

    def due(self, why: str) -> bool:
        """Whether the state of the network at hand should be written: when the work stops, and every few minutes."""
        return self.folder is not None and (why == "stopped" or time.monotonic() - self.last_write > CHECKPOINT_SECONDS)

    def clear(self) -> None:
        """The work is done and kept elsewhere."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, name: str) -> dict | None:
        if self.folder is None or not (self.folder / name).exists():
            return None
        try:
            return read_state_tree(self.folder / name)
        except ValueError as error:
            raise ValueError(
                f"{error}. Delete the folder {self.folder}, which holds the unfinished work, to begin it anew."
            ) from error

    def write(self, name: str, tree: dict, words: str) -> None:
        if self.folder:
            write_state_tree(self.folder / name, tree)
            self.saved, self.last_write = words, time.monotonic()


class SingleNetworkStore(NoStore):
    """The store of a training of one network: it goes on where it was stopped."""

    def __init__(self, work: ResumeFolder):
        self.work = work

    def load(self):
        at_hand = self.work.load_current(0)
        return at_hand and at_hand["run"]

    def save(self, state, why):
        if why != "finished" and self.work.due(why):
            self.work.keep(0, {"run": state}, state["step"])
