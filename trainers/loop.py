"""The one training loop. It knows parameters, gradients, seeds and time; it knows no images and no prompts."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .optimizers import EmaOptimizer, apply_eval_weights, eval_weights_applied, lr_schedule_factor, make_optimizer
from .protocols import GroupedParameters, Method, Monitor, Resumable, Store
from .rng import derive_generator
from .settings import OptimizerSettings, RunSettings


def step_rng(seed: int, step: int) -> torch.Generator:
    """All randomness of one step. It follows from seed and step alone, so that a resumed run is the same run, bit for
    bit."""
    return derive_generator(seed, step)


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass
class TrainingProgress:
    """What a report gets: `losses` holds the unsmoothed loss of every finished step."""

    step: int
    steps: int
    losses: list[float] = field(repr=False)
    learning_rate: float
    seconds_left: float
    note: str = ""  # the monitor's last measurement, in words

    def format_line(self) -> str:
        """step 12/100 · loss 0.1234 · 3 min left · the monitor's last measurement"""
        loss = sum(self.losses[-20:]) / max(1, len(self.losses[-20:]))
        return (
            f"step {self.step}/{self.steps} · loss {loss:.4f} · {format_duration(self.seconds_left)} "
            f"left{self.note and f' · {self.note}'}"
        )


def format_duration(seconds: float) -> str:
    """45 s, 12 min or 1.5 h; ? for infinity."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class TrainingState:
    """A run in memory: what a step changes, and what a resume needs."""

    method: Method
    optimizer: torch.optim.Optimizer | EmaOptimizer
    params: list[Tensor]
    step: int = 0  # steps that are done
    losses: list[float] = field(default_factory=list)
    monitor: Monitor | None = None
    saved_monitor_state: dict | None = None  # of an earlier part of the run; kept when this part has no monitor
    is_consistent: bool = True  # False during the optimizer's step, when parameters of two steps are mixed

    def state(self) -> dict:
        """Everything the next step depends on, as a tree of tensors, numbers and strings."""
        return {
            "step": self.step,
            "losses": torch.tensor(self.losses, dtype=torch.float32),
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "method": method_state(self.method),
            **({"watch": monitor_state} if (monitor_state := self.monitor_state()) else {}),
        }

    def monitor_state(self) -> dict | None:
        return self.monitor.state() if self.monitor else self.saved_monitor_state

    def best_state(self) -> dict | None:
        """{"step", "params"} that are to be delivered in place of the last ones, or None."""
        best = self.monitor.best if self.monitor else None
        return best if best and best["step"] != self.step else None

    def load(self, state: dict):
        if len(state["params"]) != len(self.params):
            raise ValueError(
                f"The saved run has {len(state['params'])} trained tensors and this one {len(self.params)}; start a "
                "new run name."
            )
        with torch.no_grad():
            for p, saved in zip(self.params, state["params"], strict=True):
                p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        load_method_state(self.method, state["method"])
        self.step, self.losses = state["step"], state["losses"].tolist()
        self.saved_monitor_state = state.get("watch")
        if self.monitor and self.saved_monitor_state:
            self.monitor.load_state(self.saved_monitor_state)


def method_state(method: Method) -> dict:
    return method.state() if isinstance(method, Resumable) else {}


def load_method_state(method: Method, state: dict) -> None:
    if isinstance(method, Resumable):
        method.load_state(state)


def parameter_groups(method: Method, rates: dict[str, float]) -> list[dict]:
    """Optimizer groups: [{"params", "lr"}], one for each of the method's groups that has parameters."""
    named = method.groups() if isinstance(method, GroupedParameters) else {"model": method.parameters()}
    groups = [{"params": list(params), "lr": rates.get(name, rates["model"])} for name, params in named.items()]
    return [group for group in groups if group["params"]]


class NoStore:
    """A store that keeps nothing."""

    def load(self) -> dict | None:
        return None

    def save(self, state: dict, why: str) -> None: ...

    def save_best(self, step: int) -> None: ...


def train(
    method: Method,
    run: RunSettings,
    optimizing: OptimizerSettings | None = None,
    *,
    report: Callable[[TrainingProgress], object] | None = None,
    store: Store | None = None,
    interval: float = 0.4,
    monitor: Monitor | None = None,
) -> list[float]:
    """The losses of all steps, one number each. After the last step the parameters hold the weights to use.

    `report` is called at most every `interval` seconds and may raise to stop the run. `store` keeps the run: whatever
    stops it, its last complete step is saved first. `monitor` measures and samples between two steps, changes none of
    them, and may end the run early; such a run is as finished as one that did all its steps. See protocols.py.

    Raises Diverged when the loss is no longer finite; the last good state is the one that is kept."""
    optimizing, store, report = optimizing or OptimizerSettings(), store or NoStore(), report or (lambda progress: None)
    te_rate = optimizing.text_encoder_lr or run.learning_rate / 10
    groups = parameter_groups(method, {"model": run.learning_rate, "text encoder": te_rate})
    params = [p for g in groups for p in g["params"]]
    now = TrainingState(method, make_optimizer(groups, optimizing), params, monitor=monitor)
    rates = [g["lr"] for g in now.optimizer.param_groups]
    if (saved := store.load()) is not None:
        now.load(saved)
    pending, clock = PendingLosses(), TrainingClock(now.step, run.steps, interval)
    step_state = method_state(method)
    try:
        while True:
            if monitor and monitor.due(now.step, run.steps):
                now.losses += pending.fetch(now.step)
                run_monitor_checks(monitor, now, store, run.steps)
            ended = now.step >= run.steps or bool(monitor and monitor.should_stop)
            if why := "finished" if ended else clock.save_due(now.step, run.save_every):
                now.losses += pending.fetch(now.step)
                save_training_state(now, store, why)
                report(clock.progress(now))
            if ended:
                apply_eval_weights(now.optimizer)
                copy_into_parameters(now.params, (now.best_state() or {}).get("params"))
                return now.losses
            factor = lr_schedule_factor(now.step, run.steps, optimizing)
            for group, rate in zip(now.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss, norm = accumulate_gradients(method, params, step_rng(run.seed, now.step), optimizing)
            now.is_consistent = False
            now.optimizer.step()
            now.optimizer.zero_grad(set_to_none=True)
            pending.add(loss, norm)
            now.step, step_state, now.is_consistent = now.step + 1, method_state(method), True
            if clock.report_due(now.step):
                now.losses += pending.fetch(now.step)
                report(clock.progress(now))
    except BaseException as stop:  # the host's interrupt is no Exception
        save_before_exit(now, store, pending, step_state, stop)
        raise


def accumulate_gradients(method: Method, params: list[Tensor], rng: torch.Generator, optimizing: OptimizerSettings):
    """(loss, gradient norm), both still on the device: reading them here would wait for the GPU at every step."""
    losses = []
    for _ in range(optimizing.accumulate):
        loss = method.loss(rng).mean() / optimizing.accumulate
        loss.backward()
        losses.append(loss.detach())
    return functools.reduce(torch.add, losses), torch.nn.utils.clip_grad_norm_(params, optimizing.clip or math.inf)


def run_monitor_checks(monitor: Monitor, now: TrainingState, store: Store, steps: int) -> None:
    """Measure and sample with the weights to use, and leave everything as it was: parameters, optimizer, and torch's
    global RNG state."""
    with eval_weights_applied(now.optimizer, now.params), fork_rng_state():
        if monitor.run_checks(now.step, steps, now.params):
            store.save_best(now.step)


def fork_rng_state():
    """Samplers and networks may draw from torch's global generators; while inside, training does not notice."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


def save_training_state(now: TrainingState, store: Store, why: str) -> None:
    """Save the training weights, so that more steps go on from there; while the store works, the parameters hold the
    weights to use, which are the ones to export."""
    state, best = now.state(), now.best_state() if why == "finished" else None
    state["params"] = [p.clone() for p in state["params"]]
    with eval_weights_applied(now.optimizer, now.params):
        before = [p.detach().clone() for p in now.params] if best else None
        copy_into_parameters(now.params, best["params"] if best else None)
        try:
            if why == "finished" and now.monitor:
                with fork_rng_state():
                    now.monitor.finish()
                state["watch"] = now.monitor.state()
            store.save({**state, "delivered": best["step"]} if best else state, why)
        finally:
            copy_into_parameters(now.params, before)


def copy_into_parameters(params: list[Tensor], values: list[Tensor] | None) -> None:
    """Write these values into the parameters; None leaves them."""
    with torch.no_grad():
        for p, value in zip(params, values or (), strict=False):
            p.copy_(value)


def save_before_exit(
    now: TrainingState, store: Store, pending: PendingLosses, step_state: dict, stop: BaseException
) -> None:
    """Save the last complete step before an exception goes on; a second failure must not hide the first. `step_state`:
    the method's state after that step. What is on disk stays when the loss is not finite, and when the optimizer itself
    was interrupted (out of memory in its first step, for example)."""
    try:
        now.optimizer.zero_grad(set_to_none=True)
        load_method_state(now.method, step_state)
        if isinstance(stop, Diverged) or not now.is_consistent:
            return
        now.losses += pending.fetch(now.step)
        save_training_state(now, store, "stopped")
    except Exception as second:
        if add_note := getattr(stop, "add_note", None):  # from Python 3.11 on
            add_note(f"The state of step {now.step} could not be saved: {second}")


class PendingLosses:
    """Losses and gradient norms that wait on the device until a report fetches them."""

    def __init__(self):
        self.values: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.values.append(torch.stack([loss.float(), norm.float().to(loss.device)]))

    def fetch(self, step: int) -> list[float]:
        """The losses since the last call; `step` steps are done. Raises Diverged when one of them is not finite."""
        if not self.values:
            return []
        values, self.values = torch.stack(self.values).tolist(), []
        for index, (loss, norm) in enumerate(values):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                at = step - len(values) + index + 1
                raise Diverged(
                    f"The loss became {loss} with gradient norm {norm} at step {at}. The last good state is kept. "
                    "Lower the learning rate, add warmup steps, or lower clip; with an fp16 model, load it as bf16 or "
                    "fp32."
                )
        return [loss for loss, _ in values]


class TrainingClock:
    """When to report, when to save, and how long is left."""

    autosave_seconds = 180  # how much work a power cut may cost

    def __init__(self, first_step: int, steps: int, interval: float):
        self.first_step, self.steps, self.interval = first_step, steps, interval
        self.start = self.last_report = self.last_save = time.monotonic()

    def save_due(self, step: int, every: int) -> str | None:
        """Why the state should be saved before this step, or None."""
        if step == self.steps:
            return "finished"
        if step == self.first_step:
            return None
        why = (
            "step"
            if every and step % every == 0
            else "auto"
            if time.monotonic() - self.last_save > self.autosave_seconds
            else None
        )
        if why:
            self.last_save = time.monotonic()
        return why

    def report_due(self, step: int) -> bool:
        if time.monotonic() - self.last_report < self.interval and step > self.first_step + 1:
            return False
        self.last_report = time.monotonic()
        return True

    def progress(self, now: TrainingState) -> TrainingProgress:
        done = now.step - self.first_step
        seconds_per_step = (time.monotonic() - self.start) / done if done else math.inf
        left = seconds_per_step * (self.steps - now.step)
        return TrainingProgress(
            now.step,
            self.steps,
            now.losses,
            now.optimizer.param_groups[0]["lr"],
            left,
            getattr(now.monitor, "note", ""),
        )
