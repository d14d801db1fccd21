"""All runs below one folder: what each says of itself, which are damaged and why, who is at work in which, and
deletion."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .data.metadata import format_raw_value
from .files import read_json_object

RECORD_FILE, STATE_FILE, PREVIOUS_STATE_FILE, NEXT_STATE_FILE = (
    "run.json",
    "resume.state",
    "resume.previous.state",
    "resume.next.state",
)
RUN_FILES = (RECORD_FILE, STATE_FILE, PREVIOUS_STATE_FILE, NEXT_STATE_FILE)  # one of them makes a folder a run
MAX_STEP = 2**53  # a whole number that the page can still count
DAMAGED = "damaged"  # what `why` says of a run whose record cannot be read

NUMBER = (int, float, type(None))
RECORD_FIELDS = {  # (types, whether it must be there)
    "name": ((str,), True),
    "step": ((int,), True),
    "steps": ((int,), True),
    "why": ((str,), True),
    "fingerprint": ((str,), False),
    "early": ((bool,), False),
    "ending": ((dict,), False),
    "loss": (NUMBER, False),
    "model": ((str, type(None)), False),
    "validation": ((dict, type(None)), False),
    "sample": ((str, type(None)), False),
}
VALIDATION_FIELDS = {
    "step": (NUMBER, False),
    "loss": (NUMBER, False),
    "training": (NUMBER, False),
    "held_out": ((bool, type(None)), False),
    "noun": ((str, type(None)), False),
    "figure": ((str, type(None)), False),
}


# -- one run -----------------------------------------------------------------------------------------------------------


def read_run_record(folder: Path) -> dict:
    """What run.json says, with "folder", "bytes", "changed" (seconds), "lora" (its newest file) and "damage": empty, or
    why the rest is not known."""
    size, lora = measure_run_folder(folder)
    found = {"folder": folder.name, "bytes": size, "changed": read_change_time(folder), "lora": lora}
    try:
        about = read_json_object(folder / RECORD_FILE)
        check_fields(about, RECORD_FIELDS, RECORD_FILE)
        check_fields(about.get("validation") or {}, VALIDATION_FIELDS, f"validation in {RECORD_FILE}")
    except ValueError as error:
        return {"name": folder.name, "step": 0, "steps": 0, "why": DAMAGED, "damage": str(error), **found}
    return {**about, "damage": "", **found}


def check_fields(about: dict, fields: dict, where: str) -> None:
    """ValueError unless every field has one of its types, and whole numbers can be counted."""
    for name, (types, required) in fields.items():
        if name not in about:
            if required:
                raise ValueError(f"{where} does not say {name!r}")
            continue
        value = about[name]
        cannot_be_counted = type(value) is int and not 0 <= value <= MAX_STEP
        if type(value) not in types or cannot_be_counted:
            raise ValueError(f"{where} says {name!r} is {format_raw_value(value)}, which cannot be")


def measure_run_folder(folder: Path) -> tuple[int, str | None]:
    """(bytes of all files, name of the newest LoRA). Files that vanish meanwhile do not count."""
    size, newest = 0, (0, None)
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                about = os.lstat(os.path.join(here, name))
                if stat.S_ISREG(about.st_mode):
                    size += about.st_size
                    if name.endswith(".safetensors") and Path(here) == folder:
                        newest = max(newest, (about.st_mtime_ns, name))
    return size, newest[1]


def read_change_time(folder: Path) -> float:
    """Seconds: when the record was written last, else when the folder was changed."""
    for path in (folder / RECORD_FILE, folder):
        with contextlib.suppress(OSError):
            return os.lstat(path).st_mtime
    return 0.0


# -- all runs ----------------------------------------------------------------------------------------------------------


def list_run_records(root) -> list[dict]:
    """The record of every run below root, the newest first; damaged ones say so."""
    records = [(folder, read_run_record(folder)) for folder in list_run_folders(Path(root))]
    there = [about for folder, about in records if not about["damage"] or is_run_folder(folder)]  # not just deleted
    return sorted(there, key=lambda about: -about["changed"])


def list_run_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [folder for folder in sorted(root.iterdir()) if not folder.name.startswith(".") and is_run_folder(folder)]


def is_run_folder(folder: Path) -> bool:
    return any(os.path.lexists(folder / file) for file in RUN_FILES)


def find_run_folder(root, name: str) -> Path:
    """The folder of one run directly below root. Raises ValueError for every other name."""
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(f"{name!r} is not a run. Choose one that is listed.")
    folder = Path(root) / name
    if folder.is_symlink() or folder.resolve().parent != Path(root).resolve():
        raise ValueError(f"{name!r} is not a run. Choose one that is listed.")
    if not is_run_folder(folder):
        raise ValueError(
            f"There is no run in {folder.name!r}: it has neither {RECORD_FILE} nor {STATE_FILE}, so it is left alone."
        )
    return folder


DELETED_PREFIX = ".deleted-"


def delete_run_folder(root, name: str) -> int:
    """Delete one run with all its files, and give the bytes that are free now. Raises ValueError for what is no run
    below root, and for one that somebody is at work in."""
    root = Path(root)
    find_run_folder(root, name)
    with lock_run_folder(root, name):
        folder = find_run_folder(root, name)  # someone else may have deleted it meanwhile
        size, _ = measure_run_folder(folder)
        # Out of the way at once: nobody meets half of it, and what cannot be deleted now is the next deletion's.
        folder.rename(root / f"{DELETED_PREFIX}{uuid.uuid4().hex[:12]}")
    for left in root.glob(f"{DELETED_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    return size


# -- who is at work ----------------------------------------------------------------------------------------------------

LOCK_FOLDER = ".locks"
LOCK_SECONDS = 2.0  # how long a deletion may take until its run can start again
NO_LOCKS_HERE = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class RunInUse(ValueError):
    """Somebody else trains into this run's folder or deletes it."""


@contextlib.contextmanager
def lock_run_folder(root, name: str) -> Iterator[None]:
    """Inside, no other process and no other thread is at work in the folder `name` below root. The operating system
    ends the lock with its process. Raises RunInUse."""
    folder = Path(root) / LOCK_FOLDER  # not in the run's own folder, which may be deleted
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock", timeout=LOCK_SECONDS, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunInUse(
            f"Run {name!r} is in use: it is being trained, by another ComfyUI on the same output folder or by another "
            "prompt, or it is being deleted. Stop it there, or choose another run name."
        ) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS_HERE:
            raise OSError(
                error.errno,
                f"The lock of run {name!r} cannot be taken ({error.strerror}). Let ComfyUI write to {lock.lock_file}, "
                "or delete that file while nothing trains.",
            ) from error
        logging.warning("Trainyard: %s cannot be locked (%s); do not use it from two ComfyUIs at once.", root, error)
    try:
        yield
    finally:
        lock.release()
