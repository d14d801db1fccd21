"""TensorBoard event files of a run, for those who compare runs there."""

from __future__ import annotations

import math
import socket
from pathlib import Path

FOLDER_NAME = "tensorboard"  # in the run's folder


def longest_event_path(folder) -> Path:
    """The longest path that TensorBoard may write in this folder: time, computer, process (up to 10 digits on Windows)
    and number are in the name, as its EventFileWriter composes them."""
    return Path(folder) / f"events.out.tfevents.{'0' * 10}.{socket.gethostname()}.{'0' * 10}.000"


def create_tensorboard_log(folder, first_step: int):
    """A Board that writes below `folder`; what an earlier attempt wrote after `first_step` is taken back. Raises
    RuntimeError with the pip line when the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            f"tensorboard is on in Validation and Previews, and the package cannot be imported ({error}). Run: pip "
            "install tensorboard\n"
            "Or switch it off: the chart in the node needs none."
        ) from error
    return TensorBoardLog(SummaryWriter(str(folder), purge_step=first_step + 1), first_step)


class TensorBoardLog:
    """Scalars of one run, by optimizer step."""

    def __init__(self, writer, written_steps: int):
        self.writer, self.written_steps = writer, written_steps

    def report(self, progress):
        """Every loss that was not written yet."""
        for index in range(self.written_steps, len(progress.losses)):
            self.add("loss/training step", progress.losses[index], index + 1)
        self.written_steps = max(self.written_steps, len(progress.losses))
        self.add("learning rate", progress.learning_rate, progress.step)

    def notice(self, kind: str, entry: dict):
        if kind != "validation":
            return
        fixed = entry.get("where", "on fixed training pictures").partition(" ")[2]
        self.add(f"loss/{'validation' if entry['held_out'] else fixed}", entry["loss"], entry["step"])
        if entry.get("training") is not None:
            self.add("loss/fixed training pictures", entry["training"], entry["step"])
        for sigma, value in zip(entry["sigmas"], entry["bins"], strict=True):
            self.add(f"loss by noise level/{sigma:.3g}", value, entry["step"])

    def add(self, name, value, step):
        if value is not None and math.isfinite(value):
            self.writer.add_scalar(name, value, step)

    def close(self):
        self.writer.close()
