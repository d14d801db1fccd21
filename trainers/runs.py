"""One folder per run: what a resume needs, and the LoRAs on the way.

star-3f2a91c0/
    resume.state            parameters, optimizer, draw order, losses and step, in one atomic file
    resume.previous.state   the one before it, for the day that it cannot be read
    run.json                the recipe in readable form, and how far it got
    star-step000250.safetensors ...
    star-best.safetensors   the LoRA of the lowest validation loss
    star.safetensors        the finished LoRA
    graph.json              the workflow and the prompt that trained it
    validation.json         every measurement, by noise level
    images.json             the training images, those with the highest loss first
    samples/step000100.jpg  sheets of images drawn on the way
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .file_names import MAX_NAME_BYTES, check_path_length, find_name_problem
from .files import (
    LoraFile,
    new_part_path,
    read_lora,
    read_state_tree,
    write_bytes_atomically,
    write_lora,
    write_state_tree,
)
from .loop import mean_recent_loss
from .run_records import (
    NEXT_STATE_FILE,
    PREVIOUS_STATE_FILE,
    RECORD_FILE,
    STATE_FILE,
    lock_run_folder,
    read_run_record,
)

RUN_NAME_PATTERN = re.compile(r"[^\W_][\w .+-]{0,99}")
LONGEST_SUFFIX = "-step0000000.safetensors"  # of a run's files


def check_run_name(name: str) -> str:
    """A run name that is one plain folder name, with room for the names of the run's files. Raises ValueError
    otherwise."""
    plain = name.strip(" ")
    if not RUN_NAME_PATTERN.fullmatch(plain) or plain.endswith("."):
        raise ValueError(
            f"The run name is {name!r}; use letters, digits, spaces, '.', '+', '-' and '_', at most 100, beginning "
            "with a letter or digit."
        )
    if problem := find_name_problem(plain, LONGEST_SUFFIX):
        raise ValueError(f"The run name {plain!r} {problem}. Choose another one.")
    return plain


@dataclass
class RunFolder:
    """The store of one run. Runs of the same name but another recipe live in another folder, so neither harms the
    other."""

    root: Path
    name: str
    fingerprint: str  # of everything that changes the result but the number of steps
    recipe: dict  # readable settings for run.json
    steps: int
    export_lora: Callable[[int], LoraFile | None] | None = None  # (step) -> the LoRA with the weights of now
    saved_step: int = 0  # the last step that is safe on disk
    ending_rules: dict = field(
        default_factory=dict
    )  # what decides which weights the run ends with: ValidationSettings.ending()
    graph: dict = field(default_factory=dict)  # "workflow" and "prompt" as JSON texts
    save_reason: str = ""  # of the save at work, for the export
    batch_sizes: dict = field(
        default_factory=dict
    )  # what a run that goes on must take from its beginning: "batch" and "accumulate"
    notify: Callable[[str], object] = logging.warning  # told when a damaged state is passed over
    last_notice: str = ""
    is_newest_state_whole: bool = False  # whether STATE_FILE was read or written here, so that it is worth keeping

    @property
    def folder(self) -> Path:
        return Path(self.root) / f"{self.name}-{self.fingerprint[:8]}"

    @property
    def state_path(self) -> Path:
        return self.folder / STATE_FILE

    def saved_states(self) -> list[Path]:
        """The saved states that are there, the newest first. Between two renamings at the end of a save there is none
        of the usual name."""
        paths = [self.folder / name for name in (NEXT_STATE_FILE, STATE_FILE, PREVIOUS_STATE_FILE)]
        return [path for path in paths if os.path.lexists(path)]

    def lora_path(self, step: int) -> Path:
        finished = step >= self.steps
        return self.folder / (f"{self.name}.safetensors" if finished else f"{self.name}-step{step:06d}.safetensors")

    @property
    def best_path(self) -> Path:
        return self.folder / f"{self.name}-best.safetensors"

    @property
    def samples_folder(self) -> Path:
        return self.folder / "samples"

    def check_writable(self, others: Sequence[Path] = ()):
        """Raises OSError when nothing could be saved here, and ValueError when only some of it: better known before the
        long work than after it. Leaves nothing behind. others: files in it that something else will write."""
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=existing) as probe:
                probe.write(bytes(4096))
        except OSError as error:
            raise OSError(
                error.errno,
                f"The run cannot be saved in {self.folder} ({error.strerror}), so nothing was trained. Let ComfyUI "
                f"write to {existing}, free some space there, or start it with another --output-directory.",
            ) from error
        self.check_file_names(existing)
        for path in (self.lora_path(self.steps - 1), new_part_path(self.samples_folder), *others):  # the longest of all
            check_path_length(path)

    def check_file_names(self, existing: Path):
        """ValueError for names that this very disk does not take, and for folders and pipes in the place of files."""
        longest = self.lora_path(self.steps - 1).name
        size, most = len(longest.encode()), read_longest_name(existing)
        if size > most:
            raise ValueError(
                f"The run name {self.name!r} is too long for this disk: the file {longest} would have a name of "
                f"{size} bytes, and {most} are allowed in {existing}. Choose a shorter one."
            )
        files = [self.folder / RECORD_FILE, *self.saved_states(), self.lora_path(self.steps)]
        if wrong := [path for path in files if os.path.lexists(path) and not path.is_file()]:
            raise ValueError(
                f"{wrong[0]} is no regular file, so the run cannot be saved there. Delete or move it, or choose "
                "another run name."
            )

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, nobody else trains into this folder and nobody deletes it. Raises RunInUse."""
        with lock_run_folder(self.root, self.folder.name):
            for folder in (self.folder, self.samples_folder):
                for part in folder.glob(".*.part"):  # whoever was writing it is gone
                    with contextlib.suppress(OSError):
                        part.unlink()
            yield

    def load(self):
        """The saved state of this very run, or None. Raises ValueError when every saved state is damaged, or belongs to
        another recipe."""
        if not self.saved_states():
            return None
        state = self.read_state()
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.state_path} belongs to another recipe; choose another run name, or move that folder away."
            )
        if state["step"] > self.steps:
            raise ValueError(
                f"Run {self.name!r} has already done {state['step']} steps, and {self.steps} are asked for. Ask for "
                "more steps to continue it, or choose another run name."
            )
        self.saved_step = state["step"]
        return state

    def load_batch_sizes(self) -> bool:
        """Whether there is something to go on from; `batch_sizes` are those of its beginning then."""
        if not self.saved_states():
            return False
        self.batch_sizes = self.read_state().get("sizes", {})
        return True

    def read_state(self) -> dict:
        """The newest saved state that is whole; `notify` is told when that is not the last one. Raises ValueError when
        none is."""
        problems = []
        for path in self.saved_states():
            try:
                state = read_run_state(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            self.is_newest_state_whole = path == self.state_path
            if problems:
                self.tell_once(f"{problems[0]}. The run goes on from the save before it, step {state['step']}.")
            return state
        raise ValueError(
            f"{'. '.join(problems)}. Move the folder {self.folder} away, or choose another run name, to start over."
        )

    def tell_once(self, notice: str):
        if notice != self.last_notice:
            self.last_notice = notice
            self.notify(notice)

    def write_state(self, state: dict):
        """Write the newest state. The one before stays under another name, and at every moment one of them is
        whole."""
        newest = self.folder / NEXT_STATE_FILE
        write_state_tree(newest, state)
        if self.is_newest_state_whole and self.state_path.exists():
            os.replace(self.state_path, self.folder / PREVIOUS_STATE_FILE)
        os.replace(newest, self.state_path)
        self.is_newest_state_whole = True

    def save(self, state, why):
        self.save_reason = why
        self.write_state({**state, "fingerprint": self.fingerprint, "sizes": self.batch_sizes})
        self.saved_step = state["step"]
        if why in ("step", "stopped", "finished") and state["step"] and self.export_lora:
            lora = self.export_lora(state.get("delivered", state["step"]))
            if lora:
                write_lora(self.lora_path(self.steps if why == "finished" else state["step"]), lora)
        self.write_monitor_files(state.get("watch") or {})
        about = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "step": state["step"],
            "steps": self.steps,
            "why": why,
            "ending": self.ending_rules,
            "early": why == "finished" and state["step"] < self.steps,
            **summarize_run_outcome(state),
            **self.recipe,
            **self.batch_sizes,
        }
        write_json_file(self.folder / RECORD_FILE, about)

    def write_monitor_files(self, seen: dict):
        """What a person may want to read of what the run saw."""
        for name, what in (("validation.json", seen.get("history")), ("images.json", seen.get("worst"))):
            if what:
                write_json_file(self.folder / name, what)
        if self.graph and not (self.folder / "graph.json").exists():
            write_json_file(self.folder / "graph.json", {key: json.loads(text) for key, text in self.graph.items()})

    def save_best(self, step: int):
        """Write the LoRA of now as the best so far."""
        self.save_reason = "best"
        if self.export_lora and (lora := self.export_lora(step)):
            write_lora(self.best_path, lora)

    def load_finished(self) -> tuple[LoraFile, list[float]] | None:
        """(LoRA, losses) of this very run if it has been done before, also by another process. run.json is written
        last: while it tells of fewer steps, or is damaged, the LoRA may be that of a shorter run. A damaged LoRA is
        made again from the state."""
        path, about = self.lora_path(self.steps), read_run_record(self.folder)
        if not (path.exists() and self.saved_states() and self.is_complete(about)):
            return None
        try:
            state, lora = self.read_state(), read_lora(path)
        except FileNotFoundError:  # deleted in this moment
            return None
        except ValueError:  # told by `load`, which can do something about it
            return None
        if lora.damage or state["fingerprint"] != self.fingerprint or state["step"] != about["step"]:
            return None
        return LoraFile(lora, lora.metadata, state.get("delivered", state["step"])), state["losses"].tolist()

    def is_complete(self, about: dict) -> bool:
        """Whether the run that this tells of did all its steps, or had enough before, under the ending that is asked
        now."""
        whole = about["step"] == self.steps or (
            about["why"] == "finished" and about.get("early", False) and about["step"] < self.steps
        )
        return whole and not about["damage"] and about.get("ending", {}) == self.ending_rules


def read_longest_name(folder: Path) -> int:
    """Bytes that a name may have in this folder: fewer than usual on encrypted disks."""
    try:
        return min(os.pathconf(folder, "PC_NAME_MAX"), MAX_NAME_BYTES)
    except (AttributeError, OSError, ValueError):  # no such question here
        return MAX_NAME_BYTES


STATE_FIELDS = {
    "step": int,
    "fingerprint": str,
    "losses": torch.Tensor,
    "params": list,
    "optimizer": dict,
    "method": dict,
}


def read_run_state(path: Path) -> dict:
    """A saved state. Raises ValueError for a file that is none or is damaged."""
    try:
        state = read_state_tree(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if not isinstance(state, dict) or any(not isinstance(state.get(k), kind) for k, kind in STATE_FIELDS.items()):
        raise ValueError(f"{path} holds no run")
    return state


def summarize_run_outcome(state: dict) -> dict:
    """What run.json tells of how a run goes."""
    losses, seen = state["losses"].tolist(), state.get("watch") or {}
    out: dict = {"loss": mean_recent_loss(losses) if losses else None}
    if seen.get("history"):
        last = seen["history"][-1]
        out["validation"] = {key: last.get(key) for key in ("step", "loss", "training", "held_out", "noun", "figure")}
    if seen.get("samples"):
        out["sample"] = seen["samples"][-1]["file"]
    return out


def write_json_file(path, what):
    write_bytes_atomically(
        path, json.dumps(to_finite_json(what), indent=1, ensure_ascii=False, allow_nan=False).encode()
    )


def to_finite_json(what):
    """The same value with null for numbers that JSON does not have: one NaN makes a whole message unreadable."""
    if isinstance(what, dict):
        return {key: to_finite_json(value) for key, value in what.items()}
    if isinstance(what, (list, tuple)):
        return [to_finite_json(value) for value in what]
    return None if isinstance(what, float) and not math.isfinite(what) else what
