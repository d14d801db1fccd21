"""A dynamic loss scale for models that compute in fp16 (Micikevicius et al. 2018, section 3.2).

Gradients of a LoRA are small: below 6e-8 they are zero in fp16. So the loss is multiplied before it goes backward, and
the gradients are divided afterwards. The scale is halved when a gradient no longer fits, and doubled again when all
went well for long."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_SCALE, LEAST_SCALE, MOST_SCALE = 2.0**12, 1.0, 2.0**24
STEPS_UNTIL_DOUBLED = 1000  # good steps in a row


@dataclass
class LossScale:
    """Its state belongs to a run: what a step computes depends on it by rounding."""

    scale: float = FIRST_SCALE
    good_steps: int = 0

    def state(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: dict) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]

    def find_gradients(
        self, params: list[Tensor], compute: Callable[[float], Tensor], restart: Callable[[], None]
    ) -> Tensor:
        """The loss of a step, with its gradients in the parameters, all finite where that can be. `compute(scale)` goes
        backward with the loss times the scale; `restart` undoes a try. Waits for the device: whether the gradients are
        finite decides what comes next."""
        while True:
            loss = compute(self.scale)
            if divide_gradients(params, self.scale) or self.scale <= LEAST_SCALE or not math.isfinite(float(loss)):
                return loss
            self.scale, self.good_steps = max(LEAST_SCALE, self.scale / 2), 0
            restart()

    def count_step(self) -> None:
        """A step is done under this scale."""
        self.good_steps += 1
        if self.good_steps >= STEPS_UNTIL_DOUBLED:
            self.scale, self.good_steps = min(MOST_SCALE, self.scale * 2), 0


def divide_gradients(params: list[Tensor], scale: float) -> bool:
    """Divide the gradients in place; whether all of them are finite."""
    for p in params:
        if p.grad is not None:
            p.grad.div_(scale)
    return math.isfinite(float(torch.nn.utils.clip_grad_norm_(params, math.inf)))  # which clips nothing
