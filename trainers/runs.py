"""One folder per run: what a resume needs, and the LoRAs on the way.

star-3f2a91c0/
    resume.state            parameters, optimizer, draw order, losses and step, in one atomic file
    run.json                the recipe in readable form, and how far it got
    star-step000250.safetensors ...
    star.safetensors        the finished LoRA
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from .files import LoraFile, read_safetensors, read_tree, write_bytes, write_lora, write_tree

NAME = re.compile(r"[^\W_][\w .+-]{0,99}")


def checked_name(name: str) -> str:
    """A run name that is one plain folder name. Raises ValueError otherwise."""
    name = name.strip()
    if not NAME.fullmatch(name) or name.endswith("."):
        raise ValueError(
            f"The run name is {name!r}; use letters, digits, spaces, '.', '+', '-' and '_', at most 100, beginning with a letter or digit."
        )
    return name


@dataclass
class RunFolder:
    """The store of one run. Runs of the same name but another recipe live in another folder, so neither harms the other."""

    root: Path
    name: str
    fingerprint: str  # of everything that changes the result but the number of steps
    recipe: dict  # readable settings for run.json
    steps: int
    export: object = None  # step -> LoraFile with the weights of now
    saved: int = 0  # the last step that is safe on disk

    @property
    def folder(self) -> Path:
        return Path(self.root) / f"{self.name}-{self.fingerprint[:8]}"

    @property
    def state_path(self) -> Path:
        return self.folder / "resume.state"

    def lora_path(self, step: int) -> Path:
        finished = step >= self.steps
        return self.folder / (f"{self.name}.safetensors" if finished else f"{self.name}-step{step:06d}.safetensors")

    def load(self):
        """The saved state of this very run, or None. Raises ValueError when the file is damaged or belongs to another recipe."""
        if not self.state_path.exists():
            return None
        state = self.read()
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(f"{self.state_path} belongs to another recipe; choose another run name, or move that folder away.")
        if state["step"] > self.steps:
            raise ValueError(
                f"Run {self.name!r} has already done {state['step']} steps, and {self.steps} are asked for. "
                "Ask for more steps to continue it, or choose another run name."
            )
        self.saved = state["step"]
        return state

    def read(self) -> dict:
        try:
            return read_tree(self.state_path)
        except ValueError as error:
            raise ValueError(f"{error}. Move the folder {self.folder} away, or choose another run name, to start anew.") from error

    def save(self, state, why):
        write_tree(self.state_path, {**state, "fingerprint": self.fingerprint})
        self.saved = state["step"]
        if why in ("step", "stopped", "finished") and state["step"] and self.export:
            lora = self.export(state["step"])
            if lora:
                write_lora(self.lora_path(state["step"]), lora)
        about = {"name": self.name, "fingerprint": self.fingerprint, "step": state["step"], "steps": self.steps, "why": why, **self.recipe}
        write_bytes(self.folder / "run.json", json.dumps(about, indent=1, ensure_ascii=False).encode())

    def finished(self) -> tuple[LoraFile, list[float]] | None:
        """(LoRA, losses) of this very run if it has been done before, also by another process. run.json is written last: while it tells
        of fewer steps, the LoRA may be that of a shorter run."""
        path, about = self.lora_path(self.steps), self.folder / "run.json"
        if not all(p.exists() for p in (path, about, self.state_path)) or json.loads(about.read_text("utf-8"))["step"] != self.steps:
            return None
        state = self.read()
        if state["fingerprint"] != self.fingerprint or state["step"] != self.steps:
            return None
        tensors, metadata = read_safetensors(path)
        return LoraFile(tensors, metadata, self.steps), state["losses"].tolist()
