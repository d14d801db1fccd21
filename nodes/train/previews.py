"""Samples of a run that is at work: the live adapter through the host's ordinary sampler, decoded and written to the
run's folder."""

from __future__ import annotations

import collections
import contextlib
import io
import types
from pathlib import Path
from typing import NamedTuple

import comfy.model_management as mm
import numpy as np
import torch
from PIL import Image

from ...trainers.data.encoded import REFERENCE_LATENTS, image_conditioning
from ...trainers.files import write_bytes_atomically
from ...trainers.monitor.previews import PreviewSettings, draw_samples_sheet
from .. import host


@contextlib.contextmanager
def switch_to_sampling(session, memory: float):
    """The patcher of the training model, for the ordinary sampler: without the assistant, as the result will be used.
    Sampling clears `current_patcher`, and a VAE may
    push the model out: on every way out it is loaded and ready for the next step again, with no more of its weights on
    the device than before."""
    patcher = session.denoiser.patcher
    resident = patcher.loaded_size()
    before, mm.in_training = mm.in_training, False
    try:
        with torch.no_grad():
            yield session.plain_patcher or patcher
    finally:
        mm.in_training = before
        host.session.load_for_training(patcher, memory, session.text_patcher)
        host.memory.offload_surplus_weights(session, resident)
        host.context.replace_inference_parameters(patcher.model)


class SamplePrompt(NamedTuple):
    """What a sample shows. With a `caption` (read literally) or a `prompt` (read with weights) it is encoded again
    while the text encoder is trained; a conditioning that the user brought stays as it is."""

    label: str
    cond: dict
    caption: str | None = None
    prompt: str | None = None
    avoided: dict | None = None  # its own negative conditioning, where that is not the one of all samples


def to_comfy_conditioning(model, cond: dict) -> list:
    cond = host.denoiser.place_references(model, cond)
    return [[cond["cross_attn"], {k: v for k, v in cond.items() if k != "cross_attn"}]]


class PreviewRenderer:
    """Samples of a run for its validation monitor. `negative`: what is avoided, None for guidance 1."""

    def __init__(
        self,
        session,
        settings: PreviewSettings,
        prompts: list[SamplePrompt],
        negative: SamplePrompt | None,
        shape,
        folder: Path,
        *,
        vae=None,
        sampler="euler",
        scheduler="normal",
        memory=0.0,
    ):
        self.session, self.settings, self.prompts = session, settings, prompts
        self.negative_prompt, self.shape = negative, shape
        self.folder, self.vae, self.sampler, self.scheduler, self.memory = Path(folder), vae, sampler, scheduler, memory
        self.sample_specs = [
            (prompt, settings.preview_seed + i) for prompt in prompts for i in range(settings.pictures)
        ]

    @property
    def guidance(self) -> float:
        asked = self.settings.guidance or (1.0 if self.session.family.guidance_distilled else 5.0)
        has_negative = self.negative_prompt is not None or any(prompt.avoided for prompt in self.prompts)
        return asked if has_negative else 1.0

    def write_sample_sheet(self, step: int) -> dict:
        """Draws and writes samples/step000100.jpg; {"step", "file"} of it."""
        base = self.load_base_images()
        now = self.render_images(self.settings.strength)
        titles = ["before training", f"step {step}"]
        rows = [
            (f"{prompt.label}  ·  seed {seed}", pair)
            for (prompt, seed), *pair in zip(self.sample_specs, base, now, strict=True)
        ]
        file = self.folder / f"step{step:06d}.jpg"
        write_bytes_atomically(file, encode_jpeg(draw_samples_sheet(rows, titles)))
        return {"step": step, "file": f"{self.folder.name}/{file.name}"}

    def load_base_images(self) -> list[Image.Image]:
        """What the model draws without the adapter: drawn once, read from the run's folder afterwards."""
        files = [self.folder / f"base_{i:02d}.png" for i in range(len(self.sample_specs))]
        if not all(file.exists() for file in files):
            for file, image in zip(files, self.render_images(0.0), strict=True):
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                write_bytes_atomically(file, buffer.getvalue())
        return [Image.open(io.BytesIO(file.read_bytes())).convert("RGB") for file in files]

    def render_images(self, strength: float) -> list[Image.Image]:
        with switch_to_sampling(self.session, self.memory) as patcher, contextlib.ExitStack() as stack:
            for adapters in (self.session.adapters, self.session.text_adapters):
                if adapters is not None:
                    stack.enter_context(adapters.at_strength(strength))
            # All texts first: the sampler may push the text encoder out.
            conds = [self.refresh_conditioning(prompt) for prompt, _ in self.sample_specs]
            negative = self.negative_prompt and self.refresh_conditioning(self.negative_prompt)
            latents = [
                self.sample_one_latent(patcher, cond, negative or prompt.avoided or cond, seed)
                for cond, (prompt, seed) in zip(conds, self.sample_specs, strict=True)
            ]
            return [self.decode_latent(latent) for latent in latents]

    def sample_one_latent(self, patcher, cond, negative, seed):
        host.progress.raise_if_interrupted()
        references = {k: v for k, v in cond.items() if k == REFERENCE_LATENTS}  # what is avoided is shown the same
        return host.sampling.sample_latents(
            patcher,
            to_comfy_conditioning(patcher.model, cond),
            to_comfy_conditioning(patcher.model, {**negative, **references}),
            self.shape,
            [seed],
            steps=self.settings.sampling_steps,
            guidance=self.guidance,
            sampler=self.sampler,
            scheduler=self.scheduler,
        )

    def refresh_conditioning(self, shown: SamplePrompt) -> dict:
        """The conditioning to sample with: while the text encoder is trained, texts are encoded again each time."""
        session = self.session
        if session.text_adapters is None:
            return shown.cond
        if shown.caption is not None:
            batch = types.SimpleNamespace(captions=[shown.caption], conds=[shown.cond])
            return session.encode_captions(batch)[0]
        if shown.prompt is not None:
            return {**image_conditioning(shown.cond), **session.encode_prompt(shown.prompt)}
        return shown.cond

    def decode_latent(self, latent) -> Image.Image:
        return (
            decode_latent_with_vae(self.vae, latent)
            if self.vae is not None
            else decode_latent_roughly(self.session.denoiser.patcher.model, latent)
        )


def show_references(prompts: list[SamplePrompt], data) -> list[SamplePrompt]:
    """The prompts of an edit model with the control images of a dataset, one image after the other, where they have
    none of their own."""
    items = [item for item in data.items if item.controls] if data else []
    if not items:
        return prompts
    shown = [data.load_controls(items[number % len(items)]) for number in range(len(prompts))]
    return [prompt._replace(cond={**more, **prompt.cond}) for prompt, more in zip(prompts, shown, strict=True)]


def decode_latent_with_vae(vae, latent) -> Image.Image:
    pixels = vae.decode(latent)
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0]  # the first frame, where there are several
    return Image.fromarray((pixels[..., :3].float().clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8))


def decode_latent_roughly(model, latent) -> Image.Image:
    """The latents' own colours, as the host's fast preview shows them: no VAE is connected."""
    import latent_preview

    shape = model.latent_format
    if shape.latent_rgb_factors is None:
        raise ValueError(
            "No VAE is connected, and this model's latents have no known colours. Connect VAE to Validation and "
            "Previews."
        )
    previewer = latent_preview.Latent2RGBPreviewer(
        shape.latent_rgb_factors, shape.latent_rgb_factors_bias, shape.latent_rgb_factors_reshape
    )
    image = previewer.decode_latent_to_preview(model.process_latent_in(latent))
    return image.resize((image.width * 8, image.height * 8), Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def preview_latent_shape(model, settings: PreviewSettings, data, side: int) -> tuple[int, ...]:
    """(C, ..., h, w) of the samples: the size that is asked, else the dataset's commonest, else `side` px."""
    if not settings.width and not settings.height:
        shapes = collections.Counter(item.shape for item in data.items) if data else {}
        return shapes.most_common(1)[0][0] if shapes else host.checks.square_latent_shapes(model, side)[0]
    (shape,) = host.checks.square_latent_shapes(model, 512)
    cells = [
        max(
            1,
            (pixels or settings.width or settings.height)
            // int(model.model.latent_format.spacial_downscale_ratio)
            // 2
            * 2,
        )
        for pixels in (settings.height, settings.width)
    ]
    return (*shape[:-2], *cells)
