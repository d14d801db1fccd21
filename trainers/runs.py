"""One folder per run: what a resume needs, and the LoRAs on the way.

star-3f2a91c0/
    resume.state            parameters, optimizer, draw order, losses and step, in one atomic file
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

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .files import LoraFile, read_safetensors, read_state_tree, write_bytes_atomically, write_lora, write_state_tree
from .loop import mean_recent_loss

RUN_NAME_PATTERN = re.compile(r"[^\W_][\w .+-]{0,99}")


def check_run_name(name: str) -> str:
    """A run name that is one plain folder name. Raises ValueError otherwise."""
    name = name.strip()
    if not RUN_NAME_PATTERN.fullmatch(name) or name.endswith("."):
        raise ValueError(
            f"The run name is {name!r}; use letters, digits, spaces, '.', '+', '-' and '_', at most 100, beginning "
            "with a letter or digit."
        )
    return name


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

    @property
    def folder(self) -> Path:
        return Path(self.root) / f"{self.name}-{self.fingerprint[:8]}"

    @property
    def state_path(self) -> Path:
        return self.folder / "resume.state"

    def lora_path(self, step: int) -> Path:
        finished = step >= self.steps
        return self.folder / (f"{self.name}.safetensors" if finished else f"{self.name}-step{step:06d}.safetensors")

    @property
    def best_path(self) -> Path:
        return self.folder / f"{self.name}-best.safetensors"

    @property
    def samples_folder(self) -> Path:
        return self.folder / "samples"

    def check_writable(self):
        """Raises OSError when nothing could be saved here: better known before the long work than after it. Leaves
        nothing behind."""
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

    def load(self):
        """The saved state of this very run, or None. Raises ValueError when the file is damaged or belongs to another
        recipe."""
        if not self.state_path.exists():
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
        if not self.state_path.exists():
            return False
        self.batch_sizes = self.read_state().get("sizes", {})
        return True

    def read_state(self) -> dict:
        try:
            state = read_state_tree(self.state_path)
            if not isinstance(state, dict):
                raise ValueError(f"{self.state_path} holds no run")
            return state
        except ValueError as error:
            raise ValueError(
                f"{error}. Move the folder {self.folder} away, or choose another run name, to start over."
            ) from error

    def save(self, state, why):
        self.save_reason = why
        write_state_tree(self.state_path, {**state, "fingerprint": self.fingerprint, "sizes": self.batch_sizes})
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
        write_json_file(self.folder / "run.json", about)

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
        last: while it tells of fewer steps, the LoRA may be that of a shorter run."""
        path, about = self.lora_path(self.steps), self.folder / "run.json"
        if not all(p.exists() for p in (path, about, self.state_path)) or not self.is_complete(
            json.loads(about.read_text("utf-8"))
        ):
            return None
        state = self.read_state()
        if state["fingerprint"] != self.fingerprint or state["step"] > self.steps:
            return None
        tensors, metadata = read_safetensors(path)
        return LoraFile(tensors, metadata, state.get("delivered", state["step"])), state["losses"].tolist()

    def is_complete(self, about: dict) -> bool:
        """Whether the run that this tells of did all its steps, or had enough before, under the ending that is asked
        now."""
        whole = about["step"] == self.steps or (
            about["why"] == "finished" and about.get("early", False) and about["step"] < self.steps
        )
        return whole and about.get("ending", {}) == self.ending_rules


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


# -- all runs ----------------------------------------------------------------------------------------------------------


def list_run_records(root) -> list[dict]:
    """What run.json says of every run below root, with "folder", "bytes" and "changed" (seconds), the newest first."""
    found = [
        about for folder in sorted(Path(root).glob("*/run.json")) if (about := read_run_record(folder)) is not None
    ]
    return sorted(found, key=lambda about: -about["changed"])


def read_run_record(path: Path) -> dict | None:
    """One run; None for a file that is none."""
    try:
        about = json.loads(path.read_text("utf-8"))
        files = [file for file in path.parent.rglob("*") if file.is_file()]
        latest = max((f for f in files if f.suffix == ".safetensors"), key=lambda f: f.stat().st_mtime, default=None)
        return {
            **about,
            "folder": path.parent.name,
            "bytes": sum(f.stat().st_size for f in files),
            "changed": path.stat().st_mtime,
            "lora": latest.name if latest else None,
        }
    except (OSError, ValueError, TypeError):
        return None


def find_run_folder(root, name: str) -> Path:
    """The folder of one run directly below root. Raises ValueError for every other name."""
    folder = Path(root) / name
    if not RUN_NAME_PATTERN.fullmatch(name) or folder.is_symlink() or folder.resolve().parent != Path(root).resolve():
        raise ValueError(f"{name!r} is not a run. Choose one that is listed.")
    if not any((folder / file).is_file() for file in ("run.json", "resume.state")):
        raise ValueError(
            f"There is no run in {folder.name!r}: it has neither run.json nor resume.state, so it is left alone."
        )
    return folder


def delete_run_folder(root, name: str) -> int:
    """Delete one run with all its files, and give the bytes that are free now. Raises ValueError for what is no run
    below root."""
    folder = find_run_folder(root, name)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    shutil.rmtree(folder)
    return size
