"""The one training loop. It knows parameters, gradients, seeds and time; it knows no images and no prompts."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .loss_scale import LossScale
from .optimizers import (
    EmaOptimizer,
    GroupRateOptimizer,
    apply_eval_weights,
    eval_weights_applied,
    lr_schedule_factor,
    make_optimizer,
)
from .protocols import GroupedParameters, Method, Monitor, Resumable, Store
from .rng import derive_generator
from .settings import OptimizerSettings, RunSettings


def step_rng(seed: int, step: int) -> torch.Generator:
    """All randomness of one step. It follows from seed and step alone, so that a resumed run is the same run, bit for
    bit."""
    return derive_generator(seed, step)


MAX_SKIPPED_IN_A_ROW = 10  # steps; fp16 overflows pass after one or two, and what does not pass has diverged


class Diverged(RuntimeError):
    """The loss or its gradient was no finite number for many steps in a row."""


@dataclass
class TrainingProgress:
    """What a report gets: `losses` holds the unsmoothed loss of every finished step."""

    step: int
    steps: int
    losses: list[float] = field(repr=False)
    learning_rate: float
    seconds_left: float
    note: str = ""  # the monitor's last measurement, in words
    skipped: int = 0  # steps so far whose gradient was not finite and counted as zero

    def format_line(self) -> str:
        """step 12/100 · loss 0.1234 · 3 min left · 1 step skipped: … · the monitor's last measurement"""
        notes = "".join(f" · {note}" for note in (format_skipped_steps(self.skipped), self.note) if note)
        return (
            f"step {self.step}/{self.steps} · loss {mean_recent_loss(self.losses):.4f} · "
            f"{format_duration(self.seconds_left)} left{notes}"
        )


def mean_recent_loss(losses: list[float]) -> float:
    """The mean of the last 20 losses. Those of skipped steps may be no finite numbers, and do not count."""
    recent = [loss for loss in losses[-20:] if math.isfinite(loss)]
    return sum(recent) / max(1, len(recent))


def format_skipped_steps(count: int) -> str:
    """2 steps skipped: the gradient was not finite; nothing for none."""
    return f"{count} step{'s' * (count > 1)} skipped: the gradient was not finite" if count else ""


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
    optimizer: torch.optim.Optimizer | EmaOptimizer | GroupRateOptimizer
    params: list[Tensor]
    step: int = 0  # steps that are done
    losses: list[float] = field(default_factory=list)
    learning_rate: float = 0.0  # of the last step; a group's own may be a share of it
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0  # of these, the last ones
    monitor: Monitor | None = None
    saved_monitor_state: dict | None = None  # of an earlier part of the run; kept when this part has no monitor
    loss_scale: LossScale | None = None  # for models that compute in fp16
    is_consistent: bool = True  # False during the optimizer's step, when parameters of two steps are mixed

    def state(self) -> dict:
        """Everything the next step depends on, as a tree of tensors, numbers and strings."""
        return {
            "step": self.step,
            "losses": torch.tensor(self.losses, dtype=torch.float32),
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "method": method_state(self.method),
            **({"skipped": [self.skipped, self.skipped_in_a_row]} if self.skipped else {}),
            **({"watch": monitor_state} if (monitor_state := self.monitor_state()) else {}),
            **({"loss_scale": self.loss_scale.state()} if self.loss_scale else {}),
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
        self.skipped, self.skipped_in_a_row = state.get("skipped", (0, 0))
        if self.loss_scale and "loss_scale" in state:
            self.loss_scale.load_state(state["loss_scale"])
        self.saved_monitor_state = state.get("watch")
        if self.monitor and self.saved_monitor_state:
            self.monitor.load_state(self.saved_monitor_state)

    def record_losses(self, values: list[tuple[float, float]], steps: int) -> None:
        """Take over (loss, gradient norm) of the last steps. Raises Diverged when too many in a row, or all of a short
        run, are not finite."""
        for index, (loss, norm) in enumerate(values, self.step - len(values) + 1):
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
            self.skipped += not is_finite
            if self.skipped_in_a_row >= min(MAX_SKIPPED_IN_A_ROW, steps):
                raise Diverged(
                    f"The loss became {loss} with gradient norm {norm} at step {index}, the last of "
                    f"{self.skipped_in_a_row} in a row that could not be used. The last saved state is kept. Lower the "
                    "learning rate, add warmup steps, or lower clip; with an fp16 model, load it as bf16 or fp32."
                )
            self.losses.append(loss)


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
    loss_scale: LossScale | None = None,
) -> list[float]:
    """The losses of all steps, one number each. After the last step the parameters hold the weights to use.

    `report` is called at most every `interval` seconds and may raise to stop the run. `store` keeps the run: whatever
    stops it, its last complete step is saved first. `monitor` measures and samples between two steps, changes none of
    them, and may end the run early; such a run is as finished as one that did all its steps. `loss_scale` is for models
    that compute in fp16. See protocols.py.

    A step whose gradient is not finite is skipped: its gradient counts as zero. Raises Diverged after
    MAX_SKIPPED_IN_A_ROW of them; the state that was saved last is the one that is kept."""
    optimizing, store, report = optimizing or OptimizerSettings(), store or NoStore(), report or (lambda progress: None)
    te_rate = optimizing.text_encoder_lr or run.learning_rate / 10
    groups = parameter_groups(method, {"model": run.learning_rate, "text encoder": te_rate})
    params = [p for g in groups for p in g["params"]]
    now = TrainingState(
        method,
        make_optimizer(groups, optimizing),
        params,
        learning_rate=run.learning_rate,
        monitor=monitor,
        loss_scale=loss_scale,
    )
    rates = [g["lr"] for g in now.optimizer.param_groups]
    if (saved := store.load()) is not None:
        now.load(saved)
    pending, clock = PendingLosses(), TrainingClock(now.step, run.steps, interval)
    step_state = method_state(method)
    try:
        while True:
            if monitor and monitor.due(now.step, run.steps):
                now.record_losses(pending.fetch(), run.steps)
                run_monitor_checks(monitor, now, store, run.steps)
            ended = now.step >= run.steps or bool(monitor and monitor.should_stop)
            if why := "finished" if ended else clock.save_due(now.step, run.save_every):
                now.record_losses(pending.fetch(), run.steps)
                if ended or now.skipped_in_a_row < 2:  # where it may have diverged, the state from before stays
                    save_training_state(now, store, why)
                report(clock.progress(now))
            if ended:
                apply_eval_weights(now.optimizer)
                copy_into_parameters(now.params, (now.best_state() or {}).get("params"))
                return now.losses
            factor = lr_schedule_factor(now.step, run.steps, optimizing)
            now.learning_rate = run.learning_rate * factor
            for group, rate in zip(now.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss, norm = compute_step_gradients(now, run.seed, step_state, optimizing)
            now.is_consistent = False
            now.optimizer.step()
            now.optimizer.zero_grad(set_to_none=True)
            if loss_scale:
                loss_scale.count_step()
            pending.add(loss, norm)
            now.step, step_state, now.is_consistent = now.step + 1, method_state(method), True
            if clock.report_due(now.step):
                now.record_losses(pending.fetch(), run.steps)
                report(clock.progress(now))
    except BaseException as stop:  # the host's interrupt is no Exception
        save_before_exit(now, store, pending, step_state, stop, run.steps)
        raise


def compute_step_gradients(now: TrainingState, seed: int, step_state: dict, optimizing: OptimizerSettings):
    """(loss, gradient norm) of a step, both still on the device: reading them here would wait for the GPU at every
    step. `step_state`: the method's state before it, for a second try under a smaller loss scale. A norm that is not
    finite leaves gradients of zero."""

    def accumulate(scale: float = 1.0):
        return accumulate_gradients(now.method, now.params, step_rng(seed, now.step), optimizing.accumulate, scale)

    def restart():
        now.optimizer.zero_grad(set_to_none=True)
        load_method_state(now.method, step_state)

    loss = now.loss_scale.find_gradients(now.params, accumulate, restart) if now.loss_scale else accumulate()
    norm = torch.nn.utils.clip_grad_norm_(now.params, optimizing.clip or math.inf)
    zero_gradients_unless(torch.isfinite(norm), [p.grad for p in now.params if p.grad is not None])
    return loss, norm


def accumulate_gradients(
    method: Method, params: list[Tensor], rng: torch.Generator, count: int, scale: float
) -> Tensor:
    """The mean loss of so many batches, on the device. Its gradients, times `scale`, are added to the parameters'.

    Every sample counts the same, in a short last batch too: a batch is weighted by its size relative to the first one,
    and the sum is brought to the number of samples that there were."""
    losses, counts = [], []
    for _ in range(count):
        per_sample = method.loss(rng)
        counts.append(per_sample.numel())
        loss = per_sample.mean() / count
        loss = loss if counts[-1] == counts[0] else loss * (counts[-1] / counts[0])
        (loss if scale == 1.0 else loss * scale).backward()
        losses.append(loss.detach())
    loss = functools.reduce(torch.add, losses)
    if (correction := count * counts[0] / sum(counts)) == 1:
        return loss
    grads = [p.grad for p in params if p.grad is not None]
    torch._foreach_mul_(grads, correction)  # pyright: ignore[reportPrivateImportUsage]
    return loss * correction


BIT_TYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> what its bits are read as


@torch.no_grad()
def zero_gradients_unless(keep: Tensor, grads: list[Tensor]) -> None:
    """Zeros in all gradients where `keep`, a truth value on the device, is false; otherwise they stay as they are, bit
    for bit. NaN times 0 is NaN, so it is the bits that are multiplied with 0 or 1; the device is not waited for, and
    few kernels do it for all."""
    alike: dict[tuple, list[Tensor]] = {}
    for grad in grads:
        alike.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, dtype), some in alike.items():
        bits = BIT_TYPES[dtype.itemsize]
        kept = keep.to(device, bits)
        views = [grad.view(bits) for grad in some]
        torch._foreach_mul_(views, kept)  # pyright: ignore[reportPrivateImportUsage]


def run_monitor_checks(monitor: Monitor, now: TrainingState, store: Store, steps: int) -> None:
    """Measure and sample with the weights to use, and leave everything as it was: parameters, optimizer, and torch's
    global RNG state."""
    with eval_weights_applied(now.optimizer, now.params), fork_rng_state(now.params):
        if monitor.run_checks(now.step, steps, now.params):
            store.save_best(now.step)


def fork_rng_state(params: Iterable[Tensor]):
    """Samplers and networks may draw from torch's global generators, those of the parameters' devices and of the
    current one; while inside, training does not notice."""
    return torch.random.fork_rng(devices=list_cuda_devices(params))


def list_cuda_devices(params: Iterable[Tensor]) -> list[int]:
    """Indices of the GPUs that parameters lie on, and of the current one."""
    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.current_device(), *(p.device.index for p in params if p.device.type == "cuda")})


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
                with fork_rng_state(now.params):
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
    now: TrainingState, store: Store, pending: PendingLosses, step_state: dict, stop: BaseException, steps: int
) -> None:
    """Save the last complete step before an exception goes on; a second failure must not hide the first. `step_state`:
    the method's state after that step. What is on disk stays when the run diverged, and when the optimizer itself was
    interrupted (out of memory in its first step, for example)."""
    try:
        now.optimizer.zero_grad(set_to_none=True)
        load_method_state(now.method, step_state)
        if isinstance(stop, Diverged) or not now.is_consistent:
            return
        now.record_losses(pending.fetch(), steps)
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

    def fetch(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each step since the last call."""
        if not self.values:
            return []
        values, self.values = torch.stack(self.values).tolist(), []
        return [(loss, norm) for loss, norm in values]


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
            now.learning_rate,
            left,
            getattr(now.monitor, "note", ""),
            now.skipped,
        )
