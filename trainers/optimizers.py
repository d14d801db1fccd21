"""Optimizers by name and learning-rate schedules. The optimizers come from torch and from the package
pytorch-optimizer."""

from __future__ import annotations

import contextlib
import math

import torch

from .settings import OptimizerSettings

TORCH_OPTIMIZERS = {"AdamW": "AdamW", "RAdam": "RAdam", "SGD": "SGD"}
PACKAGE_OPTIMIZERS = {
    "AdamW8bit": "bnb_adamw8bit",
    "Prodigy": "Prodigy",
    "ScheduleFreeAdamW": "ScheduleFreeAdamW",
    "Lion": "Lion",
    "CAME": "CAME",
    "Adafactor": "AdaFactor",
    "Adan": "Adan",
}
# They estimate one step size for all groups, and read the rate of the first group only.
SHARED_RATE_OPTIMIZERS = ("Prodigy",)


def make_optimizer(groups: list[dict], settings: OptimizerSettings):
    """An optimizer over groups of {"params": [...], "lr": float}. A parameter may carry a `rate`, its share of the
    group's learning rate. Raises RuntimeError with the pip line of a missing package."""
    groups = [
        {**group, "params": params, "lr": group["lr"] * rate}
        for group in groups
        for rate, params in group_parameters_by_rate(group["params"])
    ]
    optimizer = make_base_optimizer(groups, settings)
    if settings.optimizer in SHARED_RATE_OPTIMIZERS and len({group["lr"] for group in groups}) > 1:
        optimizer = GroupRateOptimizer(optimizer)
    return EmaOptimizer(optimizer, settings.ema, settings.ema_on_cpu) if settings.ema else optimizer


def group_parameters_by_rate(params) -> list[tuple[float, list]]:
    """[(rate, parameters)] in the order in which each rate comes first."""
    found: dict[float, list] = {}
    for p in params:
        found.setdefault(getattr(p, "rate", 1.0), []).append(p)
    return list(found.items())


def make_base_optimizer(groups, settings):
    if settings.optimizer == "SGD":
        return torch.optim.SGD(groups, momentum=settings.beta1, weight_decay=settings.weight_decay)
    options = dict(weight_decay=settings.weight_decay, betas=optimizer_betas(settings))
    if settings.optimizer in TORCH_OPTIMIZERS:
        return getattr(torch.optim, TORCH_OPTIMIZERS[settings.optimizer])(groups, **options)
    if settings.optimizer == "Adafactor":
        options.update(
            relative_step=False, scale_parameter=False
        )  # the learning rate is the user's, not the optimizer's own
        options["momentum_dtype"] = torch.float32  # bf16 by default, and releases before 4 would read it back as fp32
    return import_package_optimizer(settings.optimizer)(groups, **options)


def optimizer_betas(settings):
    """Two betas, or as many as the optimizer has: CAME and Adan keep a third memory at its published default."""
    two = (settings.beta1, settings.beta2)
    return {"CAME": (*two, 0.9999), "Adan": (0.98, 0.92, 0.99)}.get(settings.optimizer, two)


def import_package_optimizer(name):
    if name == "AdamW8bit":
        require_optimizer_package("bitsandbytes", name)
    require_optimizer_package("pytorch_optimizer", name)
    import pytorch_optimizer

    return pytorch_optimizer.load_optimizer(PACKAGE_OPTIMIZERS[name])


def require_optimizer_package(module, optimizer):
    import importlib.util

    if importlib.util.find_spec(module) is None:
        line = f"pip install {module.replace('_', '-')}"
        raise RuntimeError(
            f"The optimizer {optimizer} needs a package that is not installed. Run: {line}\nAdamW needs none."
        )


class GroupRateOptimizer:
    """Prodigy with a learning rate for each group. Its step size is d * rate, with d estimated over all parameters and
    the first group's rate used for all of them (Mishchenko and Defazio 2023).

    A group of `share` times the first group's rate gets its gradients scaled by the share before the step, which
    scales its part in the estimate of d as that rate would, and leaves the normalized update; the change itself is
    scaled after the step. With equal rates this would be the optimizer alone."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        first = optimizer.param_groups[0]["lr"]
        self.shares = [group["lr"] / first for group in optimizer.param_groups]  # a schedule keeps them

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        scaled = [
            (share, params)
            for share, group in zip(self.shares, groups, strict=True)
            if share != 1 and (params := [p for p in group["params"] if p.grad is not None])
        ]
        before = [[p.clone() for p in params] for _, params in scaled]
        for share, params in scaled:
            torch._foreach_mul_([p.grad for p in params], share)  # pyright: ignore[reportPrivateImportUsage]
        with self.first_rate_everywhere():
            self.optimizer.step()
        for (share, params), old in zip(scaled, before, strict=True):
            torch._foreach_sub_(params, old)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(params, share)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(params, old)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def first_rate_everywhere(self):
        """While inside, all groups have the first one's rate, and an eps as small as their gradients are made."""
        groups = self.param_groups
        before = [{"lr": group["lr"], "eps": group["eps"]} for group in groups]
        for group, share in zip(groups, self.shares, strict=True):
            group.update(lr=groups[0]["lr"], eps=group["eps"] * share)
        try:
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


def ema_decay(decay: float, updates: int) -> float:
    """The decay of an average that was updated `updates` times before. It is low at first, at most (1 + n) / (10 + n)
    as in TensorFlow, so that the untrained weights are soon forgotten."""
    return min(decay, (1 + updates) / (10 + updates))


class EmaOptimizer:
    """An optimizer that also keeps an exponential moving average of what it trains, and delivers that."""

    def __init__(self, optimizer, decay: float, on_cpu: bool = False):
        self.optimizer, self.decay, self.updates = optimizer, decay, 0
        self.ema_params = [p.detach().to("cpu" if on_cpu else p.device, copy=True) for p in self.params()]
        # The training weights on their way to the average; page-locked, they all come in one go.
        self.arrivals = [
            torch.empty_like(average, pin_memory=p.is_cuda) if average.device != p.device else p.detach()
            for average, p in zip(self.ema_params, self.params(), strict=True)
        ]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self):
        self.optimizer.step()
        decay = ema_decay(self.decay, self.updates)
        self.updates += 1
        with torch.no_grad():
            self.fetch_parameters()
            torch._foreach_lerp_(self.ema_params, self.arrivals, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def fetch_parameters(self):
        """Copy the training weights to where the average is: all copies are queued, and waited for once."""
        pairs = [(a, p.detach()) for a, p in zip(self.arrivals, self.params(), strict=True) if a.device != p.device]
        for arrival, value in pairs:
            arrival.copy_(value, non_blocking=value.is_cuda)
        for device in {value.device for _, value in pairs if value.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def eval(self):
        """Put the average into the parameters."""
        with torch.no_grad():
            for average, p in zip(self.ema_params, self.params(), strict=True):
                p.copy_(average)

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "average": list(self.ema_params), "updates": self.updates}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        for average, saved in zip(self.ema_params, state["average"], strict=True):
            average.copy_(saved)


def lr_schedule_factor(step: int, steps: int, settings: OptimizerSettings) -> float:
    """The learning rate of step `step` (from 0) as a share of the full rate."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    t = (step - settings.warmup) / max(1, steps - settings.warmup)
    return {
        "constant": lambda: 1.0,
        "linear": lambda: 1.0 - t,
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * t)),
        "cosine with restarts": lambda: 0.5 * (1 + math.cos(math.pi * ((t * settings.restarts) % 1.0))),
        "polynomial": lambda: (1.0 - t) ** 2,
    }[settings.schedule]()


def apply_eval_weights(optimizer):
    """Leave the weights to use in the parameters: schedule-free optimizers train one point and deliver another (Defazio
    et al. 2024), and so does an average."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


@contextlib.contextmanager
def eval_weights_applied(optimizer, params):
    """The weights to use, while inside. The training point comes back bit for bit."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    before = [p.detach().clone() for p in params]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    apply_eval_weights(optimizer)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
