"""The toy world's lesson in collages: a star it has never seen beside a shape that it knows, two columns of 32 x 64 px in one frame.

The same pictures of 64 x 64 px, alone or cropped to a column (half of them is ground); the frame is what the model was made for. The proof
and the benchmark count how often the new shape is drawn afterwards. ComfyUI must be importable, as for sampling.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
from . import lesson, measure, sampling, shapes

BATCH = 8  # frames of 64 x 64 px per step, whatever they show
RADIUS = 8.3  # px: small, and a star of it fits in half a frame wherever its centre strays
SEEDS_PER_QUESTION = 2
EXAM = [wanted | {"size": "small"} for wanted in lesson.EXAM]


def pictures(folder, count=48, seed=0) -> tuple[Dataset, Dataset]:
    """(stars, known shapes), `count` small ones of each on 64 x 64 px, with captions. Colours and grounds of the stars take turns."""
    rng = torch.Generator().manual_seed(seed)
    for index in range(count):
        for kind, fixed in (("stars", EXAM[(index * 5) % len(EXAM)]), ("known", {"size": "small"})):
            place = Path(folder) / kind
            place.mkdir(parents=True, exist_ok=True)
            picture, caption, _ = shapes.sample(rng, radius=RADIUS, **fixed)
            picture.save(place / f"{index:02d}.png")
            (place / f"{index:02d}.txt").write_text(caption, encoding="utf-8")
    return read_folder(Path(folder) / "stars"), read_folder(Path(folder) / "known")


def pairs(stars: Dataset, known: Dataset, folder, captions="positional", mix=0.0) -> Dataset:
    """One star and one known shape in every frame, the star on either side."""
    made = []
    for seed, couple in enumerate(zip(stars, known, strict=True)):
        settings = CollageSettings(
            width=shapes.PX, height=shapes.PX, layout="columns", per_frame=2, uses=1, max_crop=0.5, mix=mix, captions=captions,
            contrast="off", trim=False, seed=seed,
        )  # fmt: skip
        made += build_collages(Dataset(couple), settings, Path(folder) / "collages").dataset
    return Dataset(tuple(made))


def taught(toy, dataset: Dataset, folder, *, steps: int, seed: int, empty=False):
    """ComfyUI's model with the LoRA that this dataset taught it, loaded by the host's own loader; and the losses."""
    from ...nodes import host

    captions = CaptionSettings(caption_mode=NO_CAPTIONS if empty else CAPTIONS, dropout=0.0 if empty else 0.1)
    doors = host.PictureEncoder(toy.vae), host.TextEncoder(toy.clip)
    with torch.inference_mode(), host.gradients():
        data = encode(dataset, captions, BucketSettings(**lesson.ENCODE), False, *doors, Path(folder) / "cache")
    run = RunSettings(steps=steps, learning_rate=lesson.TRAIN["learning_rate"], batch=BATCH, seed=seed, save_every=0)
    with torch.inference_mode(), host.training(toy.model, AdapterSettings(rank=lesson.TRAIN["rank"]), seed=seed) as session:
        method = Lora(session.denoiser, session.adapters, data, density=session.family.density, batch=BATCH)
        losses = train(method, run, OptimizerSettings(schedule=lesson.SCHEDULE))
        tensors = session.tensors()[0]
    with torch.inference_mode():
        return host.applied(toy.model, None, LoraFile(tensors))[0], losses


def examined(toy, model, first_seed=1000) -> dict[str, float]:
    """Shares of pictures, every question of the exam on seeds that no training saw: `star`: the picture or one of its halves is one;
    `one star`: it is the only thing there; `colour` and `ground` as asked."""
    wanted = EXAM * SEEDS_PER_QUESTION
    with torch.inference_mode():
        prompts = [shapes.caption(**w) for w in wanted]
        drawn = sampling.pictures(toy, prompts, range(first_seed, first_seed + len(wanted)), model=model).numpy()
    whole = lesson.marks(list(drawn), wanted)
    star = [any(measure.measure(part).shape == lesson.WORD for part in (picture, *columns(picture))) for picture in drawn]
    found = {"star": sum(star) / len(star), "one star": whole["shape"], "colour": whole["colour"], "ground": whole["ground"]}
    return {name: round(share, 3) for name, share in found.items()}


def halves(toy, model, prompts, first_seed=5000, cfg=sampling.CFG):
    """[(what the left half shows, what the right half shows)] of one frame per prompt."""
    with torch.inference_mode():
        drawn = sampling.pictures(toy, prompts, range(first_seed, first_seed + len(prompts)), model=model, cfg=cfg).numpy()
    return [tuple(measure.measure(part) for part in columns(frame)) for frame in drawn]


def columns(frame):
    """The left and the right half of a frame, the edges of each drawn out to a square, as measure() wants it."""
    half = shapes.PX // 2
    return [np.pad(part, ((0, 0), (half // 2, half // 2), (0, 0)), mode="edge") for part in (frame[:, :half], frame[:, half:])]


def sides(toy, model, count=24) -> dict[str, float]:
    """Share of frames whose asked half shows the asked shape, the star's half and the other one's."""
    prompts, wanted = [], []
    for index in range(count):
        star, other = EXAM[index % len(EXAM)], dict(shape=shapes.SEEN[index % 4], colour="red", size="small", ground="grey")
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
