"""How a distilled model keeps drawing in few steps while an adapter learns from images.

The plain target of a step is the velocity of one image. A model whose guidance is distilled into its weights predicts
something further from the empty caption, and loses that under the plain target. Three remedies:

contrastive: the target is u + g (v - u), with v the velocity of the image and u the frozen model's own prediction under
the empty caption: the target under guidance g (Ho and Salimans 2022), in training. ai-toolkit (ostris) trains so too.
drift: at the noise levels of the model's own few steps, on its own trajectories, the model with its adapter should
predict what it predicts without.
assistant: a LoRA that makes the model an ordinary one is at work while another is trained, and is taken off afterwards
(ostris' training adapters). Nothing of it is here: the session brings it (nodes/host/session.py).

A sum of predictions whose weights add up to 1 is the same sum in x0 and in the velocity, so x0 serves every family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.encoded import EncodedDataset, image_conditioning
from ..diffusion import cpu_randn_like, native_error, per_sample, sigmas_at_levels, slope
from ..memory.transfer import copy_like
from ..settings import CONTRASTIVE, CONTRASTIVE_DRIFT, DRIFT, FAMILY_DEFAULT, PLAIN_TARGET, NoiseSettings

DEFAULT_STEPS = 4
FEW_STEP_DEFAULT = PLAIN_TARGET  # of families that are known to be distilled, where nobody chose


@dataclass(frozen=True)
class FewStepPlan:
    """What is done in one run. contrast: the g above, 1 is the plain target; drift: weight, 0 is none; steps: of one of
    the model's own trajectories."""

    contrast: float = 1.0
    drift: float = 0.0
    steps: int = DEFAULT_STEPS
    by_family: bool = False  # nobody chose it

    @property
    def is_plain(self) -> bool:
        return self.contrast == 1 and not self.drift

    def describe(self) -> str:
        """For a person, such as: contrastive target, guidance 2.5."""
        parts = [f"contrastive target, guidance {self.contrast:g}"] if self.contrast != 1 else []
        parts += [f"drift at {self.steps} steps, weight {self.drift:g}"] if self.drift else []
        why = " (default of a few-step model; see distilled in Noise and Loss Settings)" if self.by_family else ""
        return f"{' and '.join(parts)}{why}" if parts else ""


def plan_few_steps(noise: NoiseSettings, family_steps: int = 0) -> FewStepPlan:
    """What the settings ask for; left open, the default of a family that draws in `family_steps` steps, or the plain
    target for 0, which is every other family."""
    kind, steps = noise.distilled, noise.few_steps or family_steps or DEFAULT_STEPS
    open_ = kind == FAMILY_DEFAULT
    if open_:
        kind = FEW_STEP_DEFAULT if family_steps else PLAIN_TARGET
    return FewStepPlan(
        noise.contrast if kind in (CONTRASTIVE, CONTRASTIVE_DRIFT) else 1.0,
        noise.drift_weight if kind in (DRIFT, CONTRASTIVE_DRIFT) else 0.0,
        steps,
        open_ and kind != PLAIN_TARGET,
    )


def check_empty_caption(data: EncodedDataset) -> None:
    """ValueError where nobody encoded the empty caption."""
    if data.empty_key is None:
        raise ValueError(
            "distilled in Noise and Loss Settings needs the empty caption, and these images came without one. Connect "
            "encoded, from Encode Dataset with CLIP, or set distilled to plain."
        )


def make_retarget(method, sigma, empty: list[dict], dropped: list[bool]) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(x, x0) -> the contrastive target as an x0, for `denoising_loss`; None for the plain one. `empty`: conditionings
    of the empty caption."""
    if method.few_step.contrast == 1:
        return None
    return lambda x, x0: contrastive_target(method, x, x0, sigma, empty, dropped)


@torch.no_grad()
def contrastive_target(method, x, x0, sigma, empty: list[dict], dropped: list[bool]) -> Tensor:
    """x0 that stands for u + g (v - u). Images whose caption was dropped keep their own: there guidance changes
    nothing."""
    with method.adapters.at_strength(0):
        unconditional = method.denoiser.denoise(x, sigma, empty)
    g = torch.tensor([1.0 if gone else method.few_step.contrast for gone in dropped])
    return unconditional + per_sample(copy_like(g, x0), x0) * (x0 - unconditional)


def drift_loss(method, x0, batch, plan: FewStepPlan, rng) -> Tensor:
    """A number: the mean native error against the frozen model at one step of its own trajectories, one trajectory per
    image of the batch. Under the class prompts of Prior Preservation, or under the empty caption: under the captions
    themselves the frozen model knows nothing of what is learnt."""
    conds = drift_conds(method, batch, rng)
    last = int(torch.randint(plan.steps, (1,), generator=rng))
    x, sigma, teacher = frozen_step(method, cpu_randn_like(x0, rng), conds, plan.steps, last)
    with method.adapters.dropout_active(rng):
        student = method.denoiser.denoise(x, sigma, conds)
    return native_error(method.denoiser, student, teacher, sigma).mean()


def drift_conds(method, batch, rng) -> list[dict]:
    prior = method.prior.conds if method.prior else {}
    if not prior:
        return method.data.empty_conds(batch)
    picks = torch.randint(len(prior), (len(batch.conds),), generator=rng).tolist()
    return [{**image_conditioning(cond), **list(prior.values())[i]} for i, cond in zip(picks, batch.conds, strict=True)]


@torch.no_grad()
def frozen_step(method, noise, conds, steps: int, last: int):
    """(x, sigma, x0) of step `last`, counted from 0, of `steps` Euler steps that the frozen model makes from noise."""
    levels = 1 - torch.arange(steps) / steps
    sigmas = copy_like(sigmas_at_levels(method.denoiser, levels), noise)
    x = method.denoiser.noised(torch.zeros_like(noise), noise, sigmas[:1].expand(len(noise)))
    with method.adapters.at_strength(0):
        for number in range(last + 1):
            sigma = sigmas[number].expand(len(x))
            x0 = method.denoiser.denoise(x, sigma, conds)
            if number < last:
                x = x + slope(x, sigma, x0) * (sigmas[number + 1] - sigmas[number])
    return x, sigma, x0
