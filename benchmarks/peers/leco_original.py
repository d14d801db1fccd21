"""LECO as p1atdev/LECO trains it (train_lora.py, state of 2023-24), told in our own words and on our own model and
adapters, as the yardstick.

Each update denoises anew: k ~ U[1, 50) of 50 Euler steps with the adapters on, under classifier-free guidance 3 between
target and unconditional. At the one state where it stops, four predictions are asked one after another: positive,
neutral and unconditional without the adapters, target with them. The original asks every one of them as a guidance pair
at scale 1, whose other half is thrown away; here those halves are paid for too, so that the count of forwards is the
original's own. The loss is the error in the network's own terms.

Expected forwards per update at batch 1: 2 * 25 for the way, 2 * 3 for the frozen model, 2 for the student: 58.

Its DDIM is an Euler step on eps models, and so is a flow model's; the schedule is the host's, evenly spaced as the
original's. Its loss on eps models is the same. Not copied: the precision it saves in and the offset between its two
grids of timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...trainers.diffusion import denoise_with_guidance, native_error, per_sample, slope
from ...trainers.methods.rollouts import (
    PromptTask,
    StudentTeacherModel,
    sample_element,
    sample_latent_noise,
    sample_task_index,
)

STEPS = 50
GUIDANCE = 3.0


@dataclass
class Original:
    """A method for trainers.loop: parameters, and the loss of one update. Every task has one pull at strength 1."""

    model: StudentTeacherModel
    tasks: list[PromptTask]

    def parameters(self):
        return list(self.model.adapters.parameters())

    def loss(self, rng):
        task = self.tasks[sample_task_index(self.tasks, rng)]
        (pull,) = task.targets
        x, sigma = self.denoised_in_part(task, rng)
        answers = self.model.predict_teacher(x, sigma, task.teacher_prompts)
        goal = sum(weight * answers[prompt] for weight, prompt in pull.weighted_prompts)
        student = self.model.predict_student(x, sigma, pull.prompt, 1.0)
        self.book(len(x), len(task.teacher_prompts))
        return native_error(self.model.denoiser, student, goal, sigma)

    def book(self, batch, asked):
        """Forwards that the original makes and whose answers change nothing: spared here, and counted."""
        self.model.forward_counts["frozen"] += batch * (2 * 3 - asked)
        self.model.forward_counts["student"] += batch

    @torch.no_grad()
    def denoised_in_part(self, task, rng):
        """(x, sigma) after k of 50 steps of the current student."""
        k = int(torch.randint(1, STEPS, (1,), generator=rng))
        denoiser, conds = self.model.denoiser, self.model.conds
        noise = sample_latent_noise((task.batch, *sample_element(task.shapes, rng)), denoiser, rng)
        sigmas = denoiser.sigma_at(1 - torch.arange(k + 1) / STEPS).to(noise)
        sigma = sigmas[0].expand(len(noise))
        x = denoiser.noised(torch.zeros_like(noise), noise, sigma)
        with self.model.adapters.at_strength(1.0):
            for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
                sigma = here.expand(len(x))
                self.model.forward_counts["rollout"] += 2 * len(x)
                x0 = denoise_with_guidance(
                    denoiser, x, sigma, conds[task.rollout_prompt], conds[task.negative_prompt], GUIDANCE
                )
                x = x + slope(x, sigma, x0) * per_sample((there - here).expand(len(x)), x)
        return x, sigmas[-1].expand(len(x))
