"""The one training loop. It knows parameters, gradients, seeds and time; it knows no images and no prompts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch

from .optimizers import apply_eval_weights, eval_weights_applied, lr_schedule_factor, make_optimizer
from .rng import derive_generator
from .settings import OptimizerSettings, RunSettings


def step_rng(seed: int, step: int) -> torch.Generator:
    """The chance of one step: a resumed run is the same run, bit for bit."""
    return derive_generator(seed, step)


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass
class TrainingProgress:
    """What a report sees: `losses` holds one raw number per finished step."""

    step: int
    steps: int
    losses: list[float] = field(repr=False)
    rate: float
    seconds_left: float
    note: str = ""  # what was seen last

    def line(self) -> str:
        """step 12/100 · loss 0.1234 · 3 min left · what was seen last"""
        loss = sum(self.losses[-20:]) / max(1, len(self.losses[-20:]))
        return (
            f"step {self.step}/{self.steps} · loss {loss:.4f} · {format_time_left(self.seconds_left)} "
            f"left{self.note and f' · {self.note}'}"
        )


def format_time_left(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class TrainingState:
    """One training in memory: what a step changes, and what a resume needs."""

    method: object
    optimizer: torch.optim.Optimizer
    params: list
    step: int = 0
    losses: list = field(default_factory=list)
    watch: object = None  # what happens between two steps: trainers.validation.Watch
    watched: dict | None = None  # what an earlier run saw, carried on while nobody looks
    whole: bool = True  # False while the optimizer is at work: parameters of two steps, worth nothing

    def state(self) -> dict:
        """Everything the next step depends on, as a tree of tensors, numbers and strings."""
        return {
            "step": self.step,
            "losses": torch.tensor(self.losses, dtype=torch.float32),
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "method": method_state(self.method),
            **({"watch": seen} if (seen := self.watch.state() if self.watch else self.watched) else {}),
        }

    def best_state(self) -> dict | None:
        """{"step", "params"} that are to be delivered in place of the last ones, or None."""
        best = self.watch.best if self.watch else None
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
        self.watched = state.get("watch")
        if self.watch and self.watched:
            self.watch.load_state(self.watched)


def method_state(method):
    return method.state() if hasattr(method, "state") else {}


def load_method_state(method, state):
    if hasattr(method, "load_state"):
        method.load_state(state)


def parameter_groups(method, rates: dict[str, float]) -> list[dict]:
    """Optimizer groups. A method with several kinds of parameters names them in `groups()`."""
    named = method.groups() if hasattr(method, "groups") else {"model": list(method.parameters())}
    return [{"params": list(params), "lr": rates.get(name, rates["model"])} for name, params in named.items() if params]


class NoStore:
    """Keeps nothing."""

    def load(self):
        return None

    def save(self, state, why): ...

    def save_best(self, step): ...


def train(
    method,
    run: RunSettings,
    optimizing: OptimizerSettings | None = None,
    *,
    report=None,
    store=None,
    interval=0.4,
    watch=None,
):
    """The losses of all steps, one number each. `report(Progress)` is called at most every `interval` seconds and may
    raise to stop. `store.load() / save(state, why)` keeps the run; why is "step" (every save_every steps), "auto" (a
    safety copy every few minutes), "stopped" or "finished". Whatever stops the run, its last complete step is saved
    first. After the last step the parameters are the ones to use. `watch` (trainers.validation.Watch) measures and
    draws between two steps, changes none of them, and may end the run early; then it is as finished as one that did all
    its steps.

    Raises Diverged when the loss is no longer finite; the last good state is the one kept."""
    optimizing, store, report = optimizing or OptimizerSettings(), store or NoStore(), report or (lambda progress: None)
    te_rate = optimizing.text_encoder_lr or run.learning_rate / 10
    groups = parameter_groups(method, {"model": run.learning_rate, "text encoder": te_rate})
    params = [p for g in groups for p in g["params"]]
    now = TrainingState(method, make_optimizer(groups, optimizing), params, watch=watch)
    rates = [g["lr"] for g in now.optimizer.param_groups]
    if (saved := store.load()) is not None:
        now.load(saved)
    pending, clock = PendingLosses(), TrainingClock(now.step, run.steps, interval)
    draws = method_state(method)
    try:
        while True:
            if watch and watch.due(now.step, run.steps):
                now.losses += pending.fetch(now.step)
                run_monitor_checks(now, store, run.steps)
            ended = now.step >= run.steps or bool(watch and watch.should_stop)
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
            now.whole = False
            apply_optimizer_step(now.optimizer)
            pending.add(loss, norm)
            now.step, draws, now.whole = now.step + 1, method_state(method), True
            if clock.due(now.step):
                now.losses += pending.fetch(now.step)
                report(clock.progress(now))
    except BaseException as stop:  # the host's interrupt is no Exception
        save_before_exit(now, store, pending, draws, stop)
        raise


def accumulate_gradients(method, params, rng, optimizing):
    """(loss, gradient norm), both still on the device: reading them here would wait for the GPU at every step."""
    total = 0.0
    for _ in range(optimizing.accumulate):
        loss = method.loss(rng).mean() / optimizing.accumulate
        loss.backward()
        total = total + loss.detach()
    return total, torch.nn.utils.clip_grad_norm_(params, optimizing.clip or math.inf)


def apply_optimizer_step(optimizer):
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def run_monitor_checks(now, store, steps):
    """Measure and draw with the weights to use, and leave everything as it was: parameters, optimizer, and the chance
    of others."""
    with eval_weights_applied(now.optimizer, now.params), fork_rng_state():
        if now.watch.look(now.step, steps, now.params):
            store.save_best(now.step)


def fork_rng_state():
    """Samplers and networks may draw from torch's global generators; training must not notice."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


def save_training_state(now, store, why):
    """The state is that of training, so that more steps go on from there; what is exported are the weights to use."""
    state, best = now.state(), now.best_state() if why == "finished" else None
    state["params"] = [p.clone() for p in state["params"]]
    with eval_weights_applied(now.optimizer, now.params):
        before = [p.detach().clone() for p in now.params] if best else None
        copy_into_parameters(now.params, best and best["params"])
        try:
            if why == "finished" and now.watch:
                with fork_rng_state():
                    now.watch.finish()
                state["watch"] = now.watch.state()
            store.save({**state, "delivered": best["step"]} if best else state, why)
        finally:
            copy_into_parameters(now.params, before)


def copy_into_parameters(params, values):
    """Write these values into the parameters; None leaves them."""
    with torch.no_grad():
        for p, value in zip(params, values or (), strict=False):
            p.copy_(value)


def save_before_exit(now, store, pending, draws, stop):
    """Save the last complete step before an exception goes on; a second failure must not hide the first. What is on
    disk stays when the loss is no number, and when the optimizer itself was cut short (out of memory in its first step,
    for example)."""
    try:
        now.optimizer.zero_grad(set_to_none=True)
        load_method_state(now.method, draws)
        if isinstance(stop, Diverged) or not now.whole:
            return
        now.losses += pending.fetch(now.step)
        save_training_state(now, store, "stopped")
    except Exception as second:
        stop.add_note(f"The state of step {now.step} could not be saved: {second}") if hasattr(
            stop, "add_note"
        ) else None


class PendingLosses:
    """Losses that wait on the device until a report fetches them."""

    def __init__(self):
        self.values = []

    def add(self, loss, norm):
        self.values.append(torch.stack([loss.float(), norm.float().to(loss.device)]))

    def fetch(self, step) -> list[float]:
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

    def __init__(self, first, steps, interval):
        self.first, self.steps, self.interval = first, steps, interval
        self.start = self.last = self.saved = time.monotonic()

    def save_due(self, step, every) -> str | None:
        """Why the state should be saved before this step, or None."""
        if step == self.steps:
            return "finished"
        if step == self.first:
            return None
        why = (
            "step"
            if every and step % every == 0
            else "auto"
            if time.monotonic() - self.saved > self.autosave_seconds
            else None
        )
        if why:
            self.saved = time.monotonic()
        return why

    def due(self, step) -> bool:
        if time.monotonic() - self.last < self.interval and step > self.first + 1:
            return False
        self.last = time.monotonic()
        return True

    def progress(self, now) -> TrainingProgress:
        done = now.step - self.first
        pace = (time.monotonic() - self.start) / done if done else math.inf
        left = pace * (self.steps - now.step)
        return TrainingProgress(
            now.step, self.steps, now.losses, now.optimizer.param_groups[0]["lr"], left, getattr(now.watch, "note", "")
        )
