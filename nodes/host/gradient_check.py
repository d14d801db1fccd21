"""Whether the gradients of a model that no test covers are right: against finite differences, and under every plan of
checkpointing that its run may choose.

The slope along the gradient itself is not enough: in-place updates that a rewrite does not reach make gradients whose
error is orthogonal to them. So the signs of the gradient's numbers are also drawn anew, for random halves of the
layers; the slope along such a direction is off by as much of its usual size as the gradient is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ...trainers.memory.plan import CHECKPOINTING_PLANS, PLAN_OFF
from ...trainers.rng import make_generator
from .memory import is_out_of_memory_error, release_cached_memory
from .session import TrainingSession

SHAKE = 0.02  # standard deviation of the noise on the adapters; untrained ones are zero, and have half a gradient
GRADIENT_STEPS = (3e-2, 1e-2, 3e-3)  # norms of the steps along the gradient
HALVES_STEPS = (1e-1, 3e-2)  # as shares of the shake: many small numbers move at once
LEAST_NORM = 1e-3  # of a parameter's gradient, as a share of the largest; smaller ones are left out
SPLITS = 3  # of the layers into two random halves
PLAN_TOLERANCE = 0.01  # relative, between two plans in fp32: they do the same arithmetic
FP32_TOLERANCE, LOW_PRECISION_TOLERANCE = 0.03, 0.2


@dataclass
class GradientProblem:
    """One fixed loss of the adapters."""

    session: TrainingSession
    x0: torch.Tensor
    conds: list[dict]
    rng: torch.Generator = field(default_factory=lambda: make_generator(0))

    def __post_init__(self):
        denoiser = self.session.denoiser
        self.params = list(self.session.adapters.parameters())
        self.x0, self.conds = self.x0[:1], self.conds[:1]
        noise = torch.randn(self.x0.shape, generator=self.rng).to(self.x0)
        self.sigma = denoiser.sigma_at(torch.tensor([0.5])).to(self.x0)
        self.x = denoiser.noised(self.x0, noise, self.sigma)

    @property
    def low_precision(self) -> bool:
        return self.session.denoiser.model.get_dtype_inference() in (torch.float16, torch.bfloat16)

    def loss(self):
        return (self.session.denoiser.denoise(self.x, self.sigma, self.conds) - self.x0).square().mean()

    @contextlib.contextmanager
    def shaken(self):
        """Adapters shaken off zero; they are put back."""
        before, rng = [p.detach().clone() for p in self.params], make_generator(1)
        try:
            with torch.no_grad():
                for p in self.params:
                    p.add_(torch.randn(p.shape, generator=rng).to(p) * SHAKE)
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.params, before, strict=True):
                    p.copy_(value)
                    p.grad = None

    def gradient(self) -> list[torch.Tensor]:
        """One tensor per parameter. Raises RuntimeError where there is none, or no number."""
        for p in self.params:
            p.grad = None
        norm, direction = gradient_norm_and_direction(self.loss, self.params)
        return [d * norm for d in direction]

    def layers(self) -> list[list[int]]:
        """Indices of the parameters of each layer."""
        found: dict[str, list[int]] = {}
        for index, (name, _) in enumerate(self.session.adapters.named_parameters()):
            found.setdefault(name.rpartition(".")[0], []).append(index)
        return list(found.values())

    def slope(self, direction, step: float) -> float:
        """Of the loss along a direction."""
        return central_difference(self.loss, self.params, direction, step)


def check_gradients(session: TrainingSession, x0, conds, tolerance=None) -> float:
    """The error of the slope along the gradient under the plan that is set. For families that no test covers.

    Raises RuntimeError when the model's gradients cannot be had or are wrong: training would run and learn nonsense."""
    problem = GradientProblem(session, x0, conds)
    try:
        with problem.shaken():
            exact = differences_in_fp32(problem, tolerance) if problem.low_precision else None
            return exact if exact is not None else compare_with_differences(problem, tolerance)
    except RuntimeError as error:
        if isinstance(error, GradientsDiffer) or is_out_of_memory_error(error):
            raise
        raise RuntimeError(
            f"{format_failed_gradient_check(session.denoiser)}: its forward pass cannot be differentiated ({error}). "
            "It is not trained."
        ) from error


class GradientsDiffer(RuntimeError):
    """The gradients are wrong."""


def differences_in_fp32(problem: GradientProblem, tolerance=None) -> float | None:
    """The error of the gradient that the model has in its own precision against the one that it has in fp32, which is
    held against finite differences itself; None for models that do not compute in fp32, or have no room for it."""
    own = problem.gradient()
    try:
        with computing_in_fp32(problem.session.denoiser.model):
            wanted = problem.gradient()
            compare_with_differences(problem, tolerance and min(tolerance, FP32_TOLERANCE), wanted)
    except GradientsDiffer:
        raise
    except RuntimeError as error:
        if is_out_of_memory_error(error):
            release_cached_memory()
        elif "type" not in str(error):  # layers that will not be mixed
            raise
        return None
    error = norm_of([a - b for a, b in zip(own, wanted, strict=True)]) / norm_of(wanted)
    require_small(problem, error, tolerance or LOW_PRECISION_TOLERANCE, "the same gradients in fp32")
    return error


@contextlib.contextmanager
def computing_in_fp32(model):
    """Each layer casts its weights to fp32 when it is called, as the host does for a compute precision of its own."""
    layers = [m for m in model.diffusion_model.modules() if getattr(m, "comfy_cast_weights", None) is False]
    before = model.manual_cast_dtype
    try:
        model.manual_cast_dtype = torch.float32
        for layer in layers:
            layer.comfy_cast_weights = True
        yield
    finally:
        model.manual_cast_dtype = before
        for layer in layers:
            layer.comfy_cast_weights = False


def compare_with_differences(problem: GradientProblem, tolerance=None, grads=None) -> float:
    """The error of the slope along the gradient. Raises GradientsDiffer."""
    in_low_precision = problem.low_precision
    tolerance = tolerance or (LOW_PRECISION_TOLERANCE if in_low_precision else FP32_TOLERANCE)
    grads = problem.gradient() if grads is None else grads
    norm = norm_of(grads)
    direction = [g / norm for g in grads]
    error = min(abs(problem.slope(direction, step) / norm - 1) for step in GRADIENT_STEPS)
    require_small(problem, error, tolerance, "finite differences")
    if not in_low_precision:  # rounding would hide such slopes
        halves = halves_error(problem, grads)
        require_small(problem, halves, tolerance, "finite differences in random halves of the layers")
    return error


def halves_error(problem: GradientProblem, grads) -> float:
    """The relative error of the gradient, as far as random halves of the layers show it: the root of the mean square of
    their slopes' errors, each as a share of the slope's usual size."""
    layers, errors = problem.layers(), []
    for _ in range(SPLITS):
        order = torch.randperm(len(layers), generator=problem.rng).tolist()
        middle = -(-len(order) // 2)
        for half in filter(None, (order[:middle], order[middle:])):
            errors.append(half_error(problem, grads, [i for layer in half for i in layers[layer]]))
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def half_error(problem: GradientProblem, grads, indices: list[int]) -> float:
    """Of the slope along a direction in which each of these parameters weighs the same, however small its gradient is,
    and each number of a gradient has a random sign. What two sizes of the step differ by is no error."""
    norms = [float(g.norm()) for g in grads]
    direction = [torch.zeros_like(g) for g in grads]
    expected = variance = 0.0
    moved = [i for i in indices if norms[i] > LEAST_NORM * max(norms)]
    for i in moved:
        signs = torch.randint(0, 2, grads[i].shape, generator=problem.rng).to(grads[i]) * 2 - 1
        direction[i] = signs * grads[i] / norms[i] ** 2
        expected += float((direction[i] * grads[i]).sum())
        variance += float((grads[i] / norms[i]).square().square().sum())
    if not moved:
        return 0.0
    unit = norm_of(direction)
    size = SHAKE * math.sqrt(sum(grads[i].numel() for i in moved))
    slopes = [problem.slope([d / unit for d in direction], size * share) * unit for share in HALVES_STEPS]
    differences = [abs(slope - expected) for slope in slopes]
    return max(0.0, min(differences) - abs(slopes[0] - slopes[1])) / math.sqrt(variance)


def require_small(problem: GradientProblem, error: float, tolerance: float, against: str):
    if not error <= tolerance:
        raise GradientsDiffer(
            f"{format_failed_gradient_check(problem.session.denoiser)}: its gradients are off by {error:.0%} against "
            f"{against} (at most {tolerance:.0%} is allowed). Training would go wrong, so it is refused."
        )


def find_right_plans(
    session: TrainingSession, x0, conds, plans: Sequence[str], check: Callable = check_gradients
) -> tuple[str, ...]:
    """Those of the plans under which the gradients are right; the session has the first of them, in the order that is
    tried. A plan that has no room is none. Raises RuntimeError when there is none, which names a plan that works."""
    errors = {}
    for plan in first_tried(plans):
        session.blocks.plan = plan
        try:
            check(session, x0, conds)
        except RuntimeError as error:
            errors[plan] = error
            continue
        others = [other for other in plans if other != plan and other not in errors]
        right = {plan, *(other for other in others if has_same_gradient(session, x0, conds, plan, other))}
        session.blocks.plan = plan
        return tuple(other for other in plans if other in right)
    raise name_working_plan(session, x0, conds, errors)


def first_tried(plans: Sequence[str]) -> list[str]:
    """'off' comes last, because it needs the most memory and fails on updates in place."""
    return sorted(plans, key=lambda plan: plan == PLAN_OFF)


def name_working_plan(session: TrainingSession, x0, conds, errors: dict) -> RuntimeError:
    """The first of these errors, with what to set `checkpointing` to where another plan is right."""
    error = next(iter(errors.values()))
    if is_out_of_memory_error(error):
        return error
    for plan in first_tried([plan for plan in CHECKPOINTING_PLANS if plan not in errors]):
        session.blocks.plan = plan
        try:
            check_gradients(session, x0, conds)
        except RuntimeError:
            continue
        return RuntimeError(f"{error} Under checkpointing {plan!r} its gradients are right: set checkpointing to that.")
    return RuntimeError(f"{error} No other kind of checkpointing works.")


def has_same_gradient(session: TrainingSession, x0, conds, right: str, other: str) -> bool:
    """Whether a plan gives the gradients of one that is right, in every layer."""
    problem, grads = GradientProblem(session, x0, conds), []
    try:
        with problem.shaken():
            for plan in (right, other):
                session.blocks.plan = plan
                grads.append(problem.gradient())
    except RuntimeError:
        return False
    tolerance = LOW_PRECISION_TOLERANCE if problem.low_precision else PLAN_TOLERANCE
    pairs = list(zip(*grads, strict=True))
    floor = 1e-3 * norm_of(grads[0]) / math.sqrt(len(pairs))  # of tensors whose gradient is rounding
    return all(float((a - b).norm()) <= tolerance * max(float(a.norm()), floor) for a, b in pairs)


def format_failed_gradient_check(denoiser):
    return (
        f"Trainyard does not know {type(denoiser.model.model_config).__name__}, so its gradients were checked first, "
        "and the check failed"
    )


def gradient_norm_and_direction(loss, params):
    """(norm, unit direction) of the loss gradient over all params."""
    loss().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in params]
    if not math.isfinite(norm := norm_of(grads)) or norm == 0:
        raise RuntimeError(f"the gradient norm is {norm}")
    return norm, [g / norm for g in grads]


def norm_of(tensors) -> float:
    return math.sqrt(sum(float(t.float().square().sum()) for t in tensors))


@torch.no_grad()
def central_difference(loss, params, direction, step):
    """Central difference of the loss along a direction."""
    values, before = [], [p.detach().clone() for p in params]
    for sign in (+1, -1):
        for p, value, d in zip(params, before, direction, strict=True):
            p.copy_(value + d * (sign * step))
        values.append(float(loss()))
    for p, value in zip(params, before, strict=True):
        p.copy_(value)
    return (values[0] - values[1]) / (2 * step)
