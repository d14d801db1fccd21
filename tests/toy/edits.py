"""The toy world's edit model: a Flux of ComfyUI's own class with 2.3 M parameters that is shown a drawing and told to
paint its shape in another colour, or to leave it (train_edits.py). A LoRA teaches it what it never saw: another ground.

    toy = edits.load(sampling.load(world.cached()))
    lora = edits.learn(toy, folder, "black", seed=1)
    marks = edits.exam(toy, lora, "black")
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file

from ...nodes import host
from ...nodes.train.previews import to_comfy_conditioning
from ...trainers.data.buckets import BucketSettings
from ...trainers.data.caption_variants import CaptionSettings
from ...trainers.data.encode import encode_dataset
from ...trainers.data.encoded import REFERENCE_LATENTS
from ...trainers.data.readers import read_folder
from ...trainers.loop import train
from ...trainers.methods.lora import LoraTraining
from ...trainers.settings import AdapterSettings, OptimizerSettings, RunSettings
from ..comfy import families
from . import shapes, world

WORDS, WIDTH, POOLED = 8, 64, 32  # tokens of a text, and what they are wide
FAMILY = families.Family("Flux", families.flux(guidance_embed=False, depth=2, depth_single_blocks=4, num_heads=2, axes_dim=[16, 24, 24]),
                         WIDTH, POOLED, (world.CHANNELS, 8, 8))  # fmt: skip
WEIGHTS = world.WEIGHTS / "edits.safetensors"
GROUNDS = tuple(shapes.GROUNDS)
COLOURS = tuple(shapes.COLOURS)
PAIRS, QUESTIONS = 192, 24
HELD_PX = 4 / 255  # what the same drawing differs by at most where nothing was to change


class SeededTexts:
    """trainers.data's text door: each text is random numbers of its own."""

    identity, image_reader = "texts of the toy world's edit model", ""

    def encode(self, texts):
        return [self.cond(text) for text in texts]

    def encode_with_images(self, text, images):
        raise ValueError("This text encoder reads captions alone.")

    def cond(self, text):
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
        rng = torch.Generator().manual_seed(seed)
        return {
            "cross_attn": torch.randn(1, WORDS, WIDTH, generator=rng),
            "pooled_output": torch.randn(1, POOLED, generator=rng),
        }

    def count_tokens(self, text):
        return {"words": len(text.split())}

    def on_device(self):
        return contextlib.nullcontext()


def untrained():
    """ComfyUI's ModelPatcher of the edit model."""
    families.TABLE.setdefault("toy edits", FAMILY)
    return families.make("toy edits")


def load(toy):
    """`toy`'s VAE with the trained edit model."""
    model = untrained()
    model.model.diffusion_model.load_state_dict(world.unpack(load_file(str(WEIGHTS))))
    return SimpleNamespace(model=model, vae=toy.vae, texts=SeededTexts())


# -- taught: the ground becomes another --------------------------------------------------------------------------------


def caption(ground):
    return f"put it on a {ground} ground"


def draw_pair(rng, shape, colour, ground, wanted):
    """(the drawing, the same one on the wanted ground)"""
    low, high = shapes.SIZES["small"][0], shapes.SIZES["large"][1]
    radius = low + (high - low) * float(torch.rand((), generator=rng))
    drift = (6 * (torch.rand(2, generator=rng) - 0.5)).tolist()
    centre = shapes.inside(shape, radius, drift)
    return [shapes.draw(shape, colour, ground=name, radius=radius, centre=centre) for name in (ground, wanted)]


def questions(rng, wanted, count):
    """[(shape, colour, ground)] in mixed order; the ground is never the wanted one."""
    others = [name for name in GROUNDS if name != wanted]
    every = list(itertools.product(shapes.SEEN, COLOURS, others))
    order = torch.randperm(len(every), generator=rng).tolist()
    return [every[order[number % len(every)]] for number in range(count)]


def write_pairs(folder, wanted, seed, count=PAIRS):
    """after/00.png with its text, before/00.png, ..."""
    rng = torch.Generator().manual_seed(seed)
    for side in ("after", "before"):
        (Path(folder) / side).mkdir(parents=True)
    for number, about in enumerate(questions(rng, wanted, count)):
        before, after = draw_pair(rng, *about, wanted)
        before.save(Path(folder) / "before" / f"{number:02}.png")
        after.save(Path(folder) / "after" / f"{number:02}.png")
        (Path(folder) / "after" / f"{number:02}.txt").write_text(caption(wanted))


def learn(toy, folder, wanted, seed, steps=600, rate=5e-3, rank=32, batch=16):
    """The LoRA of so many steps on drawn pairs, read and encoded as the nodes do."""
    write_pairs(folder, wanted, seed)
    dataset = read_folder(Path(folder) / "after", controls=Path(folder) / "before")
    buckets = BucketSettings(resolution=shapes.PX, step=8, min_side=shapes.PX, max_side=shapes.PX)
    with torch.inference_mode(), host.context.enable_gradients():
        data = encode_dataset(
            dataset, CaptionSettings(dropout=0.0), buckets, False, host.encoders.VaeEncoder(toy.vae), toy.texts,
            Path(folder) / "cache",
        )  # fmt: skip
    adapter = AdapterSettings(rank=rank, targets="all linear")
    run = RunSettings(steps=steps, learning_rate=rate, batch=batch, seed=seed, save_every=0)
    with torch.inference_mode(), host.session.open_training_session(toy.model, adapter, seed=seed) as session:
        method = LoraTraining(session.denoiser, session.adapters, data, density=session.family.density, batch=batch)
        train(method, run, OptimizerSettings(schedule="cosine"))
        return host.lora_keys.LoraFile(session.tensors()[0])


# -- examined ----------------------------------------------------------------------------------------------------------


def edit(toy, model, latents, texts, seed, steps=8):
    """(N, 64, 64, 3): the drawings behind these unscaled latents, edited by the host's ordinary sampler."""
    edited = []
    for number, (latent, text) in enumerate(zip(latents, texts, strict=True)):
        known = {**toy.texts.cond(text), REFERENCE_LATENTS: [latent[None]]}
        shown = to_comfy_conditioning(model.model, known)
        drawn = host.sampling.sample_latents(
            model, shown, shown, latent.shape, [seed + number], steps=steps, guidance=1.0, sampler="euler",
            scheduler="simple",
        )  # fmt: skip
        edited.append(toy.vae.decode(drawn)[0])
    return torch.stack(edited).float().cpu()


def exam(toy, lora, wanted, first_seed=90_000, count=QUESTIONS) -> dict:
    """On drawings that no training saw. error: squared, of the pixels, as a share of what no edit would leave; held: of
    pixels inside the shape, the mean change from the drawing as the VAE alone gives it back (0 to 1)."""
    rng = torch.Generator().manual_seed(first_seed)
    about = questions(rng, wanted, count)
    pairs = [[pixels(image) for image in draw_pair(rng, *one, wanted)] for one in about]
    before, after = (torch.stack(side) for side in zip(*pairs, strict=True))
    model = toy.model if lora is None else host.lora_keys.apply_lora(toy.model, None, lora)[0]
    with torch.inference_mode():
        latents = toy.vae.encode(before).float().cpu()
        plain = toy.vae.decode(latents).float().cpu()
        edited = edit(toy, model, latents, [caption(wanted)] * count, first_seed)
    unchanged = ((before - after).abs().amax(-1, keepdim=True) < HELD_PX).expand_as(before)
    errors = (edited - after).square().mean((1, 2, 3)) / (before - after).square().mean((1, 2, 3))
    return {
        "error, mean": round(float(errors.mean()), 4),
        "error, worst": round(float(errors.max()), 4),
        "change where nothing was to change": round(float((edited - plain).abs()[unchanged].mean()), 4),
    }


def pixels(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).float() / 255
