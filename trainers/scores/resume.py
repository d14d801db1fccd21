"""Resuming the training of a score model: a folder with the finished networks and the state of the current one.

The folder is named after a fingerprint of everything that the model depends on, so what is found in it always belongs
to the same training.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..files import read_state_tree, write_state_tree
from ..loop import NoStore

CHECKPOINT_SECONDS = 180  # between saves; a power cut costs at most so much
UNFINISHED = ".unfinished"  # how the name of such a folder ends
ABANDONED_SECONDS = 30 * 24 * 3600.0  # after so long nobody is expected to go on


def remove_abandoned_work(root: Path) -> None:
    """Remove the folders of unfinished trainings below root whose model is there, because a process died between saving
    it and cleaning up, and those that nobody has gone on with for a month."""
    for folder in root.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            latest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            is_finished = folder.with_suffix(".safetensors").is_file()
            if is_finished or time.time() - latest > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@dataclass
class ResumeFolder:
    """Where the training is saved. Without a folder nothing is saved and nothing is found."""

    folder: Path | None = None
    saved_progress: str = ""  # the last thing saved, such as "network 2, step 75"
    last_write: float = field(default_factory=time.monotonic)

    def load_finished(self, number: int) -> dict | None:
        """What `save_finished` was given for this network, or None."""
        return self.read(f"network{number}.state")

    def save_finished(self, number: int, tree: dict) -> None:
        self.write(f"network{number}.state", tree, f"network {number + 1}")
        if self.folder:
            (self.folder / "now.state").unlink(missing_ok=True)

    def load_current(self, number: int) -> dict | None:
        """What `save_current` was given last, if it was for this network."""
        tree = self.read("now.state")
        return tree if tree and tree["number"] == number else None

    def save_current(self, number: int, tree: dict, step: int) -> None:
        self.write("now.state", {**tree, "number": number}, f"network {number + 1}, step {step}")

    def save_due(self, why: str) -> bool:
        """Whether the state of the current network should be saved: when training stops, and every few minutes."""
        return self.folder is not None and (why == "stopped" or time.monotonic() - self.last_write > CHECKPOINT_SECONDS)

    def clear(self) -> None:
        """Delete the folder: training is done and the model is saved elsewhere."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, name: str) -> dict | None:
        if self.folder is None or not (self.folder / name).exists():
            return None
        try:
            tree = read_state_tree(self.folder / name)
        except ValueError as error:
            raise ValueError(
                f"{error}. Delete the folder {self.folder}, which holds the unfinished work, to start it over."
            ) from error
        assert isinstance(tree, dict)  # as save_finished and save_current wrote it
        return tree

    def write(self, name: str, tree: dict, progress: str) -> None:
        if self.folder:
            write_state_tree(self.folder / name, tree)
            self.saved_progress, self.last_write = progress, time.monotonic()


class SingleNetworkStore(NoStore):
    """The store of the training loop where only one network is trained: continues where it was stopped."""

    def __init__(self, resume: ResumeFolder):
        self.resume = resume

    def load(self):
        saved = self.resume.load_current(0)
        return saved and saved["run"]

    def save(self, state, why):
        if why != "finished" and self.resume.save_due(why):
            self.resume.save_current(0, {"run": state}, state["step"])
