"""Prior preservation: what a LoRA must not forget while it learns.

Two ways, alone or together. Class images: images of the class are learnt beside the subject's (Ruiz et al. 2023,
DreamBooth). Class
prompts: no images at all; under each of these prompts the model with its adapter should answer what it answers
without, at the very latents of the step (the frozen model as teacher, as in ai-toolkit's differential output
preservation).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from ..data.caption_variants import TRIGGER_PLACEHOLDER, CaptionSettings, expand_caption, has_trigger_placeholder
from ..data.encoded import BucketBatchSampler, EncodedDataset
from ..diffusion import native_error
from ..settings import Settings, number_field, text_field

MAX_CLASS_PROMPTS = 64


@dataclass(frozen=True, kw_only=True)
class PriorSettings(Settings):
    """What is kept, and how firmly."""

    class_prompt: str = text_field(
        "",
        "What the model must keep drawing as before, without images: one prompt per line, such as: a photo of a "
        "dog. {a|b} stands for both.",
        multiline=True,
    )
    weight: float = number_field(
        1.0, 0.0, 1000.0, "Weight of the preservation loss relative to the training loss.", step=0.1
    )

    def class_prompts(self) -> list[str]:
        """Every prompt once. Raises ValueError when there are more than can be kept in memory, and for a prompt with
        the trigger, which no class knows."""
        if has_trigger_placeholder(self.class_prompt):
            raise ValueError(
                f"class_prompt says {TRIGGER_PLACEHOLDER}, and a class prompt says what the model knew before: "
                "'a photo of a dog' where the captions say 'a photo of sks dog'. Remove it."
            )
        every = CaptionSettings(wildcards=True, variants=MAX_CLASS_PROMPTS)
        lines = [line.strip() for line in self.class_prompt.splitlines() if line.strip()]
        found = list(
            dict.fromkeys(
                told for line in lines for told in expand_caption(line, every, torch.Generator().manual_seed(0))
            )
        )
        if len(found) > MAX_CLASS_PROMPTS:
            raise ValueError(
                f"class_prompt stands for {len(found)} prompts and {MAX_CLASS_PROMPTS} is the most. Use fewer lines or "
                "choices."
            )
        return found


@dataclass
class PriorData:
    """What the Prior Preservation node gives: `conds` by prompt, images, or both."""

    settings: PriorSettings
    conds: dict[str, dict] = field(default_factory=dict)
    data: EncodedDataset | None = None
    encoder_identity: str = ""  # identity of the text encoder

    def __post_init__(self):
        if not self.conds and self.data is None:
            raise ValueError(
                "There is nothing to preserve. Write a class_prompt (and connect CLIP), or connect class images as "
                "encoded."
            )

    def fingerprint_parts(self) -> tuple:
        """What the result of a run depends on."""
        return self.settings, self.encoder_identity, "" if self.data is None else self.data.fingerprint


class PriorLoss:
    """A Prior at work in one run: `loss` is asked once per step, after the step's own draws."""

    def __init__(self, prior: PriorData, batch: int):
        self.prior, self.prompts = prior, list(prior.conds)
        self.deck = None if prior.data is None else BucketBatchSampler(prior.data, batch)

    def state(self) -> dict:
        return {} if self.deck is None else self.deck.state()

    def load_state(self, state: dict):
        if self.deck is not None:
            self.deck.load_state(state)

    def loss(self, method, x, sigma, rng):
        """A number: weight times the mean error on class images, plus that against the frozen model at x (B, ...)."""
        total = torch.zeros((), device=x.device)
        if self.deck is not None and self.prior.data is not None:
            batch = self.prior.data.make_batch(self.deck.next_batch(rng), rng)
            total = total + method.denoise_batch(batch, rng, self.prior.data)[0].mean()
        if self.prompts:
            total = total + self.teacher_error(method, x, sigma, rng).mean()
        return self.prior.settings.weight * total

    def teacher_error(self, method, x, sigma, rng):
        """(B,) native error between the model with and without its adapters, one class prompt per sample."""
        told = [self.prompts[i] for i in torch.randint(len(self.prompts), (len(x),), generator=rng).tolist()]
        conds = [self.prior.conds[prompt] for prompt in told]
        with torch.no_grad(), method.adapters.at_strength(0):
            teacher = method.denoiser.denoise(x, sigma, conds)
        asked = method.encode_batch(SimpleNamespace(captions=told, conds=conds)) if method.encode_batch else conds
        with method.adapters.dropout_active(rng):
            student = method.denoiser.denoise(x, sigma, asked)
        return native_error(method.denoiser, student, teacher, sigma)
