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

from ...trainers.data.encoded import CONCAT_IMAGE, CONCAT_MASK, IMAGE_KEYS, image_conditioning
from ...trainers.files import write_bytes_atomically
from ...trainers.monitor.previews import PreviewSettings, draw_samples_sheet
from .. import host


@contextlib.contextmanager
def switch_to_sampling(session):
    """The patcher of the training model, for the ordinary sampler: without the assistant, as the result will be used.
    Sampling clears `current_patcher`, and a VAE may push the model out: on every way out it is loaded and ready for the
    next step again, with as much of its weights on the device as before, beside the room that was left there."""
    patcher = session.denoiser.patcher
    resident, room = patcher.loaded_size(), host.memory.available_device_memory(session)
    reserved = mm.extra_reserved_memory() + patcher.model.model_offload_buffer_memory  # by the loader, beside the rest
    before, mm.in_training = mm.in_training, False
    try:
        with torch.no_grad():
            yield session.plain_patcher or patcher
    finally:
        mm.in_training = before
        host.session.load_for_training(patcher, max(0, room - reserved), session.text_patcher)
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
    ):
        self.session, self.settings, self.prompts = session, settings, prompts
        self.negative_prompt, self.shape = negative, shape
        self.folder, self.vae, self.sampler, self.scheduler = Path(folder), vae, sampler, scheduler
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
        columns = {
            "shown": self.load_once("shown", self.decode_shown_images) if self.shows_images else None,
            "before training": self.load_once("base", lambda: self.render_images(0.0)),
            f"step {step}": self.render_images(self.settings.strength),
        }
        titles, columns = zip(*((title, images) for title, images in columns.items() if images), strict=True)
        rows = [
            (f"{prompt.label}  ·  seed {seed}", images)
            for (prompt, seed), *images in zip(self.sample_specs, *columns, strict=True)
        ]
        file = self.folder / f"step{step:06d}.jpg"
        write_bytes_atomically(file, encode_jpeg(draw_samples_sheet(rows, titles)))
        return {"step": step, "file": f"{self.folder.name}/{file.name}"}

    @property
    def shows_images(self) -> bool:
        return all(is_image_with_mask(prompt.cond, self.shape) for prompt in self.prompts)

    def load_once(self, name: str, make) -> list[Image.Image]:
        """Images that no step changes, such as what the model draws without the adapter: made once, read from the run's
        folder afterwards."""
        files = [self.folder / f"{name}_{i:02d}.png" for i in range(len(self.sample_specs))]
        if not all(file.exists() for file in files):
            for file, image in zip(files, make(), strict=True):
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                write_bytes_atomically(file, buffer.getvalue())
        return [Image.open(io.BytesIO(file.read_bytes())).convert("RGB") for file in files]

    def decode_shown_images(self) -> list[Image.Image]:
        """The images that the samples are made from: with their hole in grey, or a first frame."""
        with switch_to_sampling(self.session):
            return [self.decode_latent(prompt.cond[CONCAT_IMAGE]) for prompt, _ in self.sample_specs]

    def render_images(self, strength: float) -> list[Image.Image]:
        with switch_to_sampling(self.session) as patcher, contextlib.ExitStack() as stack:
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
        images = (*IMAGE_KEYS, *host.conditions.required_conditions(patcher.model))
        shown = {k: v for k, v in cond.items() if k in images}  # what is avoided is shown the same
        return host.sampling.sample_latents(
            patcher,
            to_comfy_conditioning(patcher.model, cond),
            to_comfy_conditioning(patcher.model, {**negative, **shown}),
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


def show_images(prompts: list[SamplePrompt], data, model, shape=None) -> list[SamplePrompt]:
    """The prompts with what this BaseModel is shown beside a text, where they have none of their own: control images,
    an image with a hole, a first frame. One image of the dataset after the other, those of latents of `shape` (C, ...,
    h, w) first; of clips only those of its length."""
    required = host.conditions.required_conditions(model)
    keys = (*IMAGE_KEYS, *required)
    items = sorted(data.items, key=lambda item: item.shape != shape) if data else []
    items = [item for item in items if item.caption_keys and (required or item.controls or item.first)]
    items = [item for item in items if shape is None or item.shape[:-2] == shape[:-2]]
    if not items:
        return prompts
    shown = [data.load_shown(items[number % len(items)]) for number in range(len(prompts))]
    return [
        prompt._replace(cond={**{key: more[key] for key in keys if key in more}, **prompt.cond})
        for prompt, more in zip(prompts, shown, strict=True)
    ]


def is_image_with_mask(cond: dict, shape) -> bool:
    """Whether a conditioning has a mask, and one image that a VAE of latents of this shape (C, ..., h, w) gave."""
    image = cond.get(CONCAT_IMAGE)
    return image is not None and CONCAT_MASK in cond and image.shape[1] == shape[0]


def decode_latent_with_vae(vae, latent) -> Image.Image:
    """The image; of a clip its first, middle and last frame side by side."""
    pixels = vae.decode(latent)
    frames = pixels.reshape(-1, *pixels.shape[-3:])
    strip = torch.cat([frames[number] for number in pick_shown_frames(len(frames))], dim=1)
    return Image.fromarray((strip[..., :3].float().clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8))


def pick_shown_frames(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})


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
    latent = model.process_latent_in(latent)
    parts = [latent] if latent.ndim < 5 else [latent[:, :, n : n + 1] for n in pick_shown_frames(latent.shape[2])]
    images = [np.asarray(previewer.decode_latent_to_preview(part)) for part in parts]
    image = Image.fromarray(np.concatenate(images, axis=1))
    return image.resize((image.width * 8, image.height * 8), Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def preview_latent_shape(model, settings: PreviewSettings, data, side: int) -> tuple[int, ...]:
    """(C, ..., h, w) of the samples: the size that is asked, else the dataset's commonest, else `side` px."""
    usual = most_common_shape(data.items) if data else ()
    if not settings.width and not settings.height:
        return usual or host.checks.square_latent_shapes(model, side)[0]
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
    return (*shape[:-2], *usual[1:-2], *cells)  # of a clip as many frames as those that are trained on


def most_common_shape(items) -> tuple[int, ...]:
    """Empty without items."""
    shapes = collections.Counter(item.shape for item in items)
    return shapes.most_common(1)[0][0] if shapes else ()
