"""What the parts of a training run promise each other: model, method, monitor and store.

Nothing needs to inherit from these classes: whatever has the members fits. In shapes, B counts samples, C channels, and
`...` stands for the spatial dimensions of a latent (with frames first, for video).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

PointT_co = TypeVar("PointT_co", covariant=True)


class Denoiser(Protocol):
    """A frozen diffusion model. Shapes: x (B, C, ...), sigma (B,), conds a list of B conditionings."""

    flow: bool  # x = (1 - sigma) * x0 + sigma * noise, rather than x0 + sigma * noise

    def model_space(self, latent: Tensor) -> Tensor:
        """x0 for a latent as the VAE gives it: scaled as the model was trained, fp32, on the model's device."""
        ...

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor: ...

    def denoise(self, x: Tensor, sigma: Tensor, conds: list) -> Tensor:
        """x0, differentiable in adapters, conds and x."""
        ...

    def sigma_at(self, u: Tensor) -> Tensor:
        """(B,) -> (B,): the model's own schedule; u = 0 is clean, u = 1 is noise, finite at both ends."""
        ...

    def native_scale(self, sigma: Tensor) -> Tensor:
        """(B,) -> (B,): |d x0 / d network output|; dividing an x0 error by it gives the error of the network's own
        target."""
        ...


class TensorTreeStore(Protocol):
    """Where latents, conditionings and masks lie, each a dict under its key."""

    def load(self, key: str) -> dict: ...


@runtime_checkable
class ReadingAhead(Protocol):
    """A store that can read before it is asked, so that a step does not wait for the disk."""

    def read_ahead(self, keys: Iterable[str]) -> None: ...


# -- what is trained ---------------------------------------------------------------------------------------------------


@runtime_checkable
class Resumable(Protocol):
    """What remembers something between two steps. A method that remembers nothing but its parameters has no need of
    it."""

    def state(self) -> dict:
        """A tree of tensors, numbers and strings. Together with the parameters it must make a resumed run equal to an
        uninterrupted one, bit for bit. Later steps must not change what was returned: the loop keeps it until the next
        step is complete."""
        ...

    def load_state(self, state: dict) -> None:
        """Go on from there: in a resumed run, and after a step that failed, to undo its draws."""
        ...


class Method(Protocol):
    """What is trained, and how wrong it is now. It owns its data and its parameters; the loop owns steps, gradients and
    seeds."""

    def parameters(self) -> Iterable[Tensor]:
        """Every trained tensor, always in the same order: a resumed run finds them again by their position."""
        ...

    def loss(self, rng: torch.Generator) -> Tensor:
        """(B,) one number per sample, differentiable in `parameters()`. All randomness comes from rng, which the loop
        makes anew for each step from the seed and the step. Called `accumulate` times per optimizer step."""
        ...


@runtime_checkable
class GroupedParameters(Protocol):
    """A method whose parameters learn at several rates."""

    def groups(self) -> Mapping[str, Iterable[Tensor]]:
        """All parameters, by the name of their learning rate: "model" or "text encoder"."""
        ...


class BatchElement(Protocol):
    """One image, or one pair of them, as batches are made of."""

    @property
    def shape(self) -> tuple:
        """Equal for all elements of a batch."""
        ...

    @property
    def repeats(self) -> int:
        """How often it comes in one epoch."""
        ...


class BatchElements(Protocol):
    """What batches are sampled from, such as an encoded dataset."""

    @property
    def items(self) -> Sequence[BatchElement]: ...


class PointSource(Resumable, Protocol[PointT_co]):
    """Where a method that learns from the frozen model is trained: latents x at noise levels sigma, such as the steps
    of the student's own rollouts."""

    def draw(self, rng: torch.Generator) -> PointT_co:
        """The points of one batch, with the frozen model's predictions that the loss needs. All randomness comes from
        rng."""
        ...


# -- what happens between two steps ------------------------------------------------------------------------------------


class Monitor(Resumable, Protocol):
    """What is measured and sampled between two steps. It must leave parameters alone; the loop gives it the weights to
    use (the average, where there is one) and restores the training weights and torch's RNG state afterwards.

    Before every step, and once after the last, the loop calls `due`, if that says so `run_checks`, and then reads
    `should_stop`. At the end it calls `finish` and reads `best`. A monitor may have a `note`, which is shown beside
    step and loss."""

    @property
    def should_stop(self) -> bool:
        """Whether the run ends here, as complete as after its last step. It must follow from `state()` alone, so that a
        resumed run decides the same."""
        ...

    @property
    def best(self) -> dict | None:
        """{"step", "params"}: the weights to deliver in place of the last ones, or None."""
        ...

    def due(self, step: int, steps: int) -> bool:
        """Whether there is something to do after `step` of `steps` steps; step 0 is before the first. False for what
        was done already, as after a resume."""
        ...

    def run_checks(self, step: int, steps: int, params: list[Tensor]) -> bool:
        """Measure and sample what is due. True when these weights are to be saved as the best so far."""
        ...

    def finish(self) -> None:
        """The last measurements of a complete run, with the weights that are delivered."""
        ...


class ValidationLoss(Protocol):
    """The loss on fixed samples at fixed noise levels under fixed noise, so that two measurements differ by what was
    learned and by nothing else."""

    noun: str  # what the samples are, in the plural, for people
    where: str  # the same as a phrase, where nothing was held out

    @property
    def picks(self) -> Sequence[int]:
        """The samples, as indices into the data of the loss."""
        ...

    @property
    def key(self) -> str:
        """Changes with everything that the losses depend on but the weights: only losses of equal keys may be
        compared."""
        ...

    def losses(self, tick: Callable[[], None] = ...) -> Tensor:
        """(samples, levels), unweighted, on the CPU. `tick()` is called before each forward and may raise."""
        ...

    def first_sigmas(self) -> list[float]:
        """The noise levels of the first sample, for people."""
        ...


class NamedValidationLoss(ValidationLoss, Protocol):
    """One whose samples a person can look up."""

    def describe_sample(self, pick: int) -> dict:
        """{"image": path or id, "caption"} of one of `picks`."""
        ...


class Store(Protocol):
    """Keeps a run, so that it can go on after any stop."""

    def load(self) -> dict | None:
        """The state of this very run that was saved last, or None to begin."""
        ...

    def save(self, state: dict, why: str) -> None:
        """`why`: "step" (every save_every steps), "auto" (a safety copy every few minutes), "stopped" or "finished".
        While it runs, the parameters hold the weights to use."""
        ...

    def save_best(self, step: int) -> None:
        """The parameters of now are the best so far."""
        ...
