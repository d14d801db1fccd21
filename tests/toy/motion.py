"""The toy world's video model: a Wan of ComfyUI's own class with 1.2 M parameters that draws one shape in two frames, at
the same place in both (train_motion.py). A LoRA teaches it what it never saw: the shape moves.

    toy = motion.load(sampling.load(world.cached()))
    lora = motion.learn(toy, folder, "right", seed=1)
    marks = motion.exam(toy, lora, "right")
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from ...nodes import host
from ...trainers.data.buckets import BucketSettings
from ...trainers.data.caption_variants import CaptionSettings
from ...trainers.data.encode import encode_dataset
from ...trainers.data.readers import read_folder
from ...trainers.loop import train
from ...trainers.methods.lora import LoraTraining
from ...trainers.settings import AdapterSettings, OptimizerSettings, RunSettings
from ..comfy import families
from . import edits, shapes, world
from .measure import measure

WORDS, WIDTH, FRAMES, FPS = 8, 64, 2, 8
FAMILY = families.Family(
    "WAN21_T2V",
    families.TABLE["wan"].config | dict(dim=128, num_heads=2, ffn_dim=384, num_layers=4),
    WIDTH,
    latent=(world.CHANNELS, FRAMES, 8, 8),
)
WEIGHTS = world.WEIGHTS / "motion.safetensors"
SHAPES, COLOURS = ("circle", "square"), tuple(shapes.COLOURS)
WAYS = {"right": (12.0, 0.0), "down": (0.0, 12.0), "left": (-12.0, 0.0), "up": (0.0, -12.0)}  # px from frame to frame
CLIPS, QUESTIONS = 96, 24


class WordTexts:
    """trainers.data's text door: each word is random numbers of its own."""

    identity, image_reader = "words of the toy world's video model", ""

    def encode(self, texts):
        return [self.cond(text) for text in texts]

    def encode_with_images(self, text, images):
        raise ValueError("This text encoder reads captions alone.")

    def cond(self, text):
        words = [*text.split(), *[""] * WORDS][:WORDS]
        return {"cross_attn": torch.stack([self.word(number, word) for number, word in enumerate(words)])[None]}

    def word(self, number, word):
        seed = int.from_bytes(hashlib.blake2b(f"{number} {word}".encode(), digest_size=4).digest())
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))

    def count_tokens(self, text):
        return {"words": len(text.split())}

    def on_device(self):
        return contextlib.nullcontext()


class FrameVae:
    """trainers.data's VAE door: the toy world's VAE, each frame by itself, with the scale that a Wan expects."""

    identity, factor, channels = "frames of the toy world", 8, world.CHANNELS

    def __init__(self, vae):
        import comfy.latent_formats

        self.vae, self.frame, self.clip = vae, comfy.latent_formats.SD3(), comfy.latent_formats.Wan21()

    def fit_frames(self, frames):
        return frames

    def encode(self, images):
        """(F, H, W, 3) -> (1, C, F, h, w)"""
        with torch.no_grad():
            latents = self.frame.process_in(self.vae.encode(images).float().cpu())
        return self.clip.process_out(latents.movedim(0, 1)[None]), None

    def decode(self, latent):
        """(1, C, F, h, w) -> (F, H, W, 3)"""
        latents = self.clip.process_in(latent.float().cpu())[0].movedim(1, 0)
        return self.vae.decode(self.frame.process_out(latents)).float().cpu()


def untrained():
    """ComfyUI's ModelPatcher of the video model."""
    families.TABLE.setdefault("toy motion", FAMILY)
    return families.make("toy motion")


def load(toy):
    """`toy`'s VAE with the trained video model."""
    model = untrained()
    model.model.diffusion_model.load_state_dict(world.unpack(load_file(str(WEIGHTS))))
    return SimpleNamespace(model=model, vae=FrameVae(toy.vae), texts=WordTexts())


# -- taught: the shape moves -------------------------------------------------------------------------------------------


def still(shape, colour):
    return f"a {colour} {shape}"


def moving(shape, colour, way):
    return f"a {colour} {shape} moves {way}"


def draw_clip(rng, shape, colour, step=(0.0, 0.0)):
    """The frames of a clip. The whole way lies in the picture, and its middle is anywhere."""
    radius = 9 + 3 * float(torch.rand((), generator=rng))
    room = [shapes.PX / 2 - radius * 1.3 - abs(side) / 2 for side in step]
    middle = [shapes.PX / 2 + most * (2 * float(torch.rand((), generator=rng)) - 1) for most in room]
    frames = []
    for number in range(FRAMES):
        along = number / (FRAMES - 1) - 0.5
        centre = tuple(at + along * side for at, side in zip(middle, step, strict=True))
        frames.append(shapes.draw(shape, colour, radius=radius, centre=centre))
    return frames


def questions(rng, count):
    """[(shape, colour)] in mixed order."""
    every = list(itertools.product(SHAPES, COLOURS))
    order = torch.randperm(len(every), generator=rng).tolist()
    return [every[order[number % len(every)]] for number in range(count)]


def write_clips(folder, way, seed, count=CLIPS):
    """00.8fps/0.png, 00.8fps/1.png, 00.txt, ..."""
    rng = torch.Generator().manual_seed(seed)
    for number, about in enumerate(questions(rng, count)):
        place = Path(folder) / f"{number:02}.{FPS}fps"
        place.mkdir(parents=True)
        for index, frame in enumerate(draw_clip(rng, *about, WAYS[way])):
            frame.save(place / f"{index}.png")
        (Path(folder) / f"{number:02}.txt").write_text(moving(*about, way))


def learn(toy, folder, way, seed, steps=400, rate=5e-3, rank=32, batch=8):
    """The LoRA of so many steps on drawn clips, read, cut and encoded as the nodes do."""
    from ...trainers.data.clips import ClipSettings, cut_clips

    write_clips(Path(folder) / "clips", way, seed)
    dataset = cut_clips(read_folder(Path(folder) / "clips"), ClipSettings(frames=FRAMES, fps=FPS))
    buckets = BucketSettings(resolution=shapes.PX, step=8, min_side=shapes.PX, max_side=shapes.PX)
    with torch.inference_mode(), host.context.enable_gradients():
        data = encode_dataset(
            dataset, CaptionSettings(dropout=0.0), buckets, False, toy.vae, toy.texts, Path(folder) / "cache"
        )
    adapter = AdapterSettings(rank=rank, targets="all linear")
    run = RunSettings(steps=steps, learning_rate=rate, batch=batch, seed=seed, save_every=0)
    with torch.inference_mode(), host.session.open_training_session(toy.model, adapter, seed=seed) as session:
        method = LoraTraining(session.denoiser, session.adapters, data, density=session.family.density, batch=batch)
        train(method, run, OptimizerSettings(schedule="cosine"))
        return host.lora_keys.LoraFile(session.tensors()[0])


# -- examined ----------------------------------------------------------------------------------------------------------


def draw(toy, model, texts, seed, steps=12):
    """[(F, 64, 64, 3)]: clips by the host's ordinary sampler."""
    drawn = []
    for number, text in enumerate(texts):
        told = [[toy.texts.cond(text)["cross_attn"], {}]]
        latent = host.sampling.sample_latents(
            model, told, told, FAMILY.latent, [seed + number], steps=steps, guidance=1.0, sampler="euler",
            scheduler="simple",
        )  # fmt: skip
        drawn.append(toy.vae.decode(latent))
    return drawn


def displacement(frames):
    """(right, down) in px that the shape's centre goes from the first frame to the last; None where a frame shows no
    shape."""
    first, last = (measure(frame) for frame in (frames[0], frames[-1]))
    if first.colour is None or last.colour is None:
        return None
    return tuple(after - before for before, after in zip(first.centre, last.centre, strict=True))


def exam(toy, lora, way, first_seed=90_000, count=QUESTIONS) -> dict:
    """On noise that no training saw: how far the drawn shapes go the way they were taught, as a share of it, and how far
    they miss the place they should be at, in px of 64. A clip without a shape counts as one that stands still."""
    about = questions(torch.Generator().manual_seed(first_seed), count)
    model = toy.model if lora is None else host.lora_keys.apply_lora(toy.model, None, lora)[0]
    with torch.inference_mode():
        drawn = draw(toy, model, [moving(*one, way) for one in about], first_seed)
    went = [displacement(clip) for clip in drawn]
    wanted = torch.tensor(WAYS[way])
    moves = torch.tensor([one or (0.0, 0.0) for one in went])
    misses = (moves - wanted).norm(dim=1)
    return {
        "way gone, share": round(float((moves @ wanted / wanted.square().sum()).mean()), 3),
        "miss, mean px": round(float(misses.mean()), 2),
        "miss, worst px": round(float(misses.max()), 2),
        "without a shape": sum(one is None for one in went),
        "right shape": round(sum(measure(clip[0]).shape == one[0] for clip, one in zip(drawn, about, strict=True)) / count, 2),
        "right colour": round(sum(measure(clip[0]).colour == one[1] for clip, one in zip(drawn, about, strict=True)) / count, 2),
    }  # fmt: skip


pixels = edits.pixels
