"""The state of runs in the server's memory: new values are sent to the page at once, the full state to a page that is
opened later."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...trainers.runs import to_finite_json

RUN_EVENT = "trainyard.run"  # web/runs.mjs has the same
MAX_LIVE_RUNS = 64  # runs in memory
MAX_CURVE_POINTS = 2000  # of a curve, when all of it is sent
SEND_INTERVAL = 0.3  # seconds between two messages
MONITOR_LISTS = ("validation", "samples", "troubles")
TRAINING, FINISHED, STOPPED, FAILED = "training", "finished", "stopped", "failed"


@dataclass
class LiveRun:
    """One run of one Train node. `workflow` and `node` say where the page shows it."""

    node: str
    workflow: str
    prompt: str  # id of the prompt that it is part of
    name: str
    folder: str
    steps: int
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: str = TRAINING
    text: str = ""
    losses: list = field(default_factory=list)  # one per step
    rates: list = field(default_factory=list)  # [step, learning rate] at each report
    validation: list = field(default_factory=list)
    samples: list = field(default_factory=list)
    troubles: list = field(default_factory=list)
    sent_counts: dict = field(default_factory=dict)  # how much of each list the page has been told
    last_sent: float = 0.0  # when it was told last

    def header(self) -> dict:
        names = ("node", "workflow", "prompt", "name", "folder", "steps", "run", "status", "text")
        return {**{name: getattr(self, name) for name in names}, "step": len(self.losses)}

    def full_state(self) -> dict:
        """Everything, with long curves downsampled."""
        return to_finite_json({**self.header(), "first": 0, **self.updates_since({}, MAX_CURVE_POINTS)})

    def updates_since(self, sent: dict, points: int) -> dict:
        """The entries after the first `sent[name]` of each list, with long curves downsampled."""
        new = {name: getattr(self, name)[sent.get(name, 0) :] for name in ("losses", "rates", *MONITOR_LISTS)}
        first = sent.get("losses", 0)
        return {
            **new,
            "losses": downsample_losses(new["losses"], first, points),
            "rates": subsample_values(new["rates"], points),
        }

    def report(self, progress):
        """Takes over the losses since the last report."""
        self.losses.extend(progress.losses[len(self.losses) :])
        self.rates.append([progress.step, progress.learning_rate])
        self.set_text(progress.format_line())

    def add_event(self, kind: str, entry: dict):
        """A measurement, a sheet of samples, or trouble with one."""
        getattr(self, {"validation": "validation", "sample": "samples", "trouble": "troubles"}[kind]).append(entry)
        self.publish()

    def set_text(self, text: str):
        self.text = text
        self.publish()

    def set_ended(self, status: str, text: str):
        self.status, self.text = status, text
        self.publish(at_once=True)

    def restore_finished(self, losses, seen: dict, text: str):
        """A run that was finished before: its chart is complete, nothing is trained."""
        self.losses, self.validation, self.samples = (
            list(losses),
            list(seen.get("history", ())),
            list(seen.get("samples", ())),
        )
        self.set_ended(FINISHED, text)

    def mark_broken_off(self, error: BaseException):
        """The host's interrupt is no Exception; everything else is a failure."""
        if isinstance(error, Exception):
            self.set_ended(FAILED, (str(error).strip() or type(error).__name__).splitlines()[0])
        elif self.losses:
            self.set_ended(STOPPED, f"stopped at step {len(self.losses)} of {self.steps}; Run goes on from there")
        else:
            self.set_ended(STOPPED, "stopped before its first step")

    @contextlib.contextmanager
    def ending_with_work(self) -> Iterator[None]:
        """However the work inside ends, the page is told, and nobody takes the run for one that is training."""
        try:
            yield
        except BaseException as error:
            self.mark_broken_off(error)
            raise
        finally:
            if self.status == TRAINING:
                self.set_ended(FINISHED, self.text)

    def publish(self, at_once=False):
        """All that is new, to the page; a flood of messages would freeze it, so what comes too early goes with the
        next."""
        from server import PromptServer

        server, now = getattr(PromptServer, "instance", None), time.monotonic()
        if server is None or (now - self.last_sent < SEND_INTERVAL and not at_once):
            return
        news = {
            "first": self.sent_counts.get("losses", 0),
            "before": {name: self.sent_counts.get(name, 0) for name in MONITOR_LISTS},
            **self.updates_since(self.sent_counts, MAX_CURVE_POINTS // 10),
        }
        self.sent_counts = {name: len(getattr(self, name)) for name in ("losses", "rates", *MONITOR_LISTS)}
        self.last_sent = now
        server.send_sync(RUN_EVENT, to_finite_json({**self.header(), **news}), server.client_id)


LIVE_RUNS: collections.OrderedDict[tuple[str, str], LiveRun] = (
    collections.OrderedDict()
)  # by (workflow, node): the last run of each node


def start_live_run(node, graph: dict, name: str, folder: str, steps: int) -> LiveRun:
    """The record of a run that begins now, in the place of the node's last one."""
    live = LiveRun(str(node), read_workflow_id(graph), current_prompt_id(), name, folder, steps)
    LIVE_RUNS.pop((live.workflow, live.node), None)
    LIVE_RUNS[live.workflow, live.node] = live
    while len(LIVE_RUNS) > MAX_LIVE_RUNS:
        LIVE_RUNS.popitem(last=False)
    return live


def find_last_run(node: str, workflow: str) -> LiveRun | None:
    """The last run of a node. A prompt that was queued without its workflow is found by its node alone."""
    return LIVE_RUNS.get((workflow, node)) or LIVE_RUNS.get(("", node))


def find_active_run(folder: str) -> LiveRun | None:
    """The run that is writing into this folder now."""
    return next((live for live in LIVE_RUNS.values() if live.folder == folder and live.status == TRAINING), None)


def read_workflow_id(graph: dict) -> str:
    """The id the page gives a workflow, empty without one."""
    workflow = json.loads(graph.get("workflow") or "{}")
    return str(workflow.get("id") or "") if isinstance(workflow, dict) else ""


MODEL_WIDGETS = ("ckpt_name", "unet_name", "model_name", "gguf_name")


def find_model_file(graph: dict, node) -> str:
    """The file behind a node's `model` input, as far as the prompt tells; empty otherwise."""
    prompt = json.loads(graph.get("prompt") or "{}")
    todo, seen = [str(node)], set()
    while todo:
        here = todo.pop(0)
        inputs = prompt.get(here, {}).get("inputs", {}) if here not in seen else {}
        seen.add(here)
        for name in MODEL_WIDGETS:
            if isinstance(inputs.get(name), str):
                return inputs[name]
        links = {name: value for name, value in inputs.items() if isinstance(value, list) and len(value) == 2}
        todo += [str(links["model"][0])] if "model" in links else []
    return ""


def current_prompt_id() -> str:
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return context.prompt_id if context else ""


def downsample_losses(losses, first: int, count: int) -> list[list]:
    """[[step, loss], ...]: of many losses the means of neighbours, at their last step. Losses that are no number are
    left out."""
    width = max(1, math.ceil(len(losses) / count))
    out = []
    for start in range(0, len(losses), width):
        good = [v for v in losses[start : start + width] if math.isfinite(v)]
        if good:
            out.append([first + min(start + width, len(losses)), sum(good) / len(good)])
    return out


def subsample_values(values, count: int) -> list:
    width = max(1, math.ceil(len(values) / count))
    return values if width == 1 else [*values[::width], values[-1]]
