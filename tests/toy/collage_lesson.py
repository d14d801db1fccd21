"""The toy world's lesson in collages: a star it has never seen beside a shape that it knows, in one frame of 128 x 64 px.

The same pictures, alone or in pairs; the proof and the benchmark count how often the new shape is drawn afterwards. ComfyUI must be
importable, as for sampling.py.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...trainers.data.buckets import BucketSettings
from ...trainers.data.captions import CAPTIONS, CaptionSettings
from ...trainers.data.captions import EMPTY as NO_CAPTIONS
from ...trainers.data.collage import build_collages
from ...trainers.data.collage_plan import CollageSettings
from ...trainers.data.encode import encode
from ...trainers.data.readers import read_folder
from ...trainers.data.records import Dataset
from ...trainers.files import LoraFile
from ...trainers.loop import train
from ...trainers.methods.lora import Lora
from ...trainers.settings import AdapterSettings, OptimizerSettings, RunSettings
from . import lesson, measure, sampling, shapes, world

FRAME = (2 * shapes.PX, shapes.PX)
BATCH = 8  # pictures of 64 x 64 px per step; half as many frames show as many pixels
SEEDS_PER_QUESTION = 2


def pictures(folder, count=48, seed=0) -> tuple[Dataset, Dataset]:
    """(stars, known shapes), `count` of each, with captions."""
    stars = read_folder(lesson.pictures(Path(folder) / "stars", count, seed))
    rng, known = torch.Generator().manual_seed(seed + 1), Path(folder) / "known"
    known.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture, caption, _ = shapes.sample(rng)
        picture.save(known / f"{index:02d}.png")
        (known / f"{index:02d}.txt").write_text(caption, encoding="utf-8")
    return stars, read_folder(known)


def pairs(stars: Dataset, known: Dataset, folder, captions="positional", mix=0.0) -> Dataset:
    """One star and one known shape in every frame, the star on either side."""
    made = []
    for seed, couple in enumerate(zip(stars, known, strict=True)):
        settings = CollageSettings(
            width=FRAME[0], height=FRAME[1], uses=1, mix=mix, captions=captions, contrast="off", trim=False, seed=seed
        )
        made += build_collages(Dataset(couple), settings, Path(folder) / "collages").dataset
    return Dataset(tuple(made))


def taught(toy, dataset: Dataset, folder, *, batch: int, steps: int, seed: int, empty=False):
    """ComfyUI's model with the LoRA that this dataset taught it, loaded by the host's own loader; and the losses."""
    from ...nodes import host

    captions = CaptionSettings(caption_mode=NO_CAPTIONS if empty else CAPTIONS, dropout=0.0 if empty else 0.1)
    doors = host.PictureEncoder(toy.vae), host.TextEncoder(toy.clip)
    with torch.inference_mode(), host.gradients():
        data = encode(dataset, captions, BucketSettings(**lesson.ENCODE), False, *doors, Path(folder) / "cache")
    run = RunSettings(steps=steps, learning_rate=lesson.TRAIN["learning_rate"], batch=batch, seed=seed, save_every=0)
    with torch.inference_mode(), host.training(toy.model, AdapterSettings(rank=lesson.TRAIN["rank"]), seed=seed) as session:
        method = Lora(session.denoiser, session.adapters, data, density=session.family.density, batch=batch)
        losses = train(method, run, OptimizerSettings(schedule=lesson.SCHEDULE))
        tensors = session.tensors()[0]
    with torch.inference_mode():
        return host.applied(toy.model, None, LoraFile(tensors))[0], losses


def examined(toy, model, first_seed=1000) -> dict[str, float]:
    """Share of single pictures with the asked shape, colour and ground: every question of the exam on seeds that no training saw."""
    wanted = lesson.EXAM * SEEDS_PER_QUESTION
    with torch.inference_mode():
        drawn = sampling.pictures(toy, [shapes.caption(**w) for w in wanted], range(first_seed, first_seed + len(wanted)), model=model)
    return {name: round(share, 3) for name, share in lesson.marks(list(drawn), wanted).items()}


def halves(toy, model, prompts, first_seed=5000, cfg=sampling.CFG):
    """[(what the left half shows, what the right half shows)] of one frame of 128 x 64 px per prompt."""
    import comfy.sample

    seeds = range(first_seed, first_seed + len(prompts))
    shape = (1, world.CHANNELS, FRAME[1] // 8, FRAME[0] // 8)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with torch.inference_mode():
        told = [sampling.conditioning(toy.clip, texts) for texts in (prompts, [""] * len(prompts))]
        latents = comfy.sample.sample(model, noise, sampling.STEPS, cfg, "euler", "simple", *told, torch.zeros_like(noise), disable_pbar=True)
        drawn = toy.vae.decode(latents)
    return [(measure.measure(frame[:, : shapes.PX]), measure.measure(frame[:, shapes.PX :])) for frame in drawn]


def sides(toy, model, count=24) -> dict[str, float]:
    """Share of frames whose asked half shows the asked shape, the star's half and the other one's."""
    prompts, wanted = [], []
    for index in range(count):
        star, other = lesson.EXAM[index % len(lesson.EXAM)], dict(shape=shapes.SEEN[index % 4], colour="red", size="large", ground="grey")
        two = (star, other) if index % 2 else (other, star)
        prompts.append("; ".join(f"{side}: {shapes.caption(**w)}" for side, w in zip(("left", "right"), two, strict=True)))
        wanted.append(two)
    seen = halves(toy, model, prompts)
    right = [(want["shape"] == "star", found.shape == want["shape"]) for two, pair in zip(wanted, seen, strict=True)
             for want, found in zip(two, pair, strict=True)]
    return {name: round(sum(hit for star, hit in right if star == new) / count, 3) for name, new in (("star", True), ("known", False))}


def unprompted(toy, model, count=24) -> dict[str, float]:
    """Without any text: share of frames with a star in them, and with a known shape beside it."""
    seen = halves(toy, model, [""] * count, cfg=1.0)
    star = [pair for pair in seen if any(found.shape == "star" for found in pair)]
    both = [pair for pair in star if any(found.shape in shapes.SEEN for found in pair)]
    return {"star": round(len(star) / count, 3), "star and known": round(len(both) / count, 3)}
