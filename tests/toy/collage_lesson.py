"""The toy world's lesson in collages: a star it has never seen beside a shape that it knows, two columns of 32 x 64 px in one frame.

The same pictures of 64 x 64 px, alone or cropped to a column (half of them is ground). The toy model was made for one shape a frame, and
every model that people train has seen two things side by side: `seen_pairs` is what it is shown first, of known shapes only.
The proof and the benchmark count how often the new shape is drawn afterwards. ComfyUI must be importable, as for sampling.py.
"""

from __future__ import annotations

from dataclasses import dataclass
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
WORDS = 24  # text tokens of the longest caption here; the other 53 of 77 are padding, and half of a step's work
TWO = dict(width=shapes.PX, height=shapes.PX, layout="columns", per_frame=2, max_crop=0.5, contrast="off", trim=False)
EXAM = [wanted | {"size": "small"} for wanted in lesson.EXAM]


class ShortClip:
    """A CLIP whose answers end after WORDS tokens, for training and sampling alike, and are given twice without thinking twice."""

    def __init__(self, clip):
        self.clip, self.told = clip, {}

    def __getattr__(self, name):
        return getattr(self.clip, name)

    def encode_from_tokens_scheduled(self, tokens, show_pbar=False):  # the bar is not wanted here
        key = repr(tokens)
        if key not in self.told:
            self.told[key] = [(context[:, :WORDS].clone(), extras) for context, extras in self.clip.encode_from_tokens_scheduled(tokens)]
        return [[context, dict(extras)] for context, extras in self.told[key]]


@dataclass(frozen=True)
class Taught:
    """ComfyUI's model with the LoRA, loaded by the host's own loader; the LoRA; one loss per step."""

    model: object
    lora: LoraFile
    losses: list


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


def seen_pairs(folder, count=80, uses=4, seed=100) -> Dataset:
    """Frames of two known shapes, with the default share of pictures alone: what a model has seen before it is trained on stars."""
    known = pictures(folder, count, seed)[1]
    return build_collages(known, CollageSettings(**TWO, uses=uses, mix=0.3, seed=seed), Path(folder) / "collages").dataset


def pairs(stars: Dataset, known: Dataset, folder, captions="positional", mix=0.0) -> Dataset:
    """One star and one known shape in every frame, the star on either side."""
    made = []
    for seed, couple in enumerate(zip(stars, known, strict=True)):
        settings = CollageSettings(**TWO, uses=1, mix=mix, captions=captions, seed=seed)
        made += build_collages(Dataset(couple), settings, Path(folder) / "collages").dataset
    return Dataset(tuple(made))


def taught(toy, dataset: Dataset, folder, *, steps: int, seed: int, empty=False, rank=lesson.TRAIN["rank"], batch=BATCH, report=None) -> Taught:
    """What this dataset teaches the model of `toy`."""
    from ...nodes import host

    captions = CaptionSettings(caption_mode=NO_CAPTIONS if empty else CAPTIONS, dropout=0.0 if empty else 0.1)
    doors = host.PictureEncoder(toy.vae), host.TextEncoder(toy.clip)
    with torch.inference_mode(), host.gradients():
        data = encode(dataset, captions, BucketSettings(**lesson.ENCODE), False, *doors, Path(folder) / "cache")
    run = RunSettings(steps=steps, learning_rate=lesson.TRAIN["learning_rate"], batch=batch, seed=seed, save_every=0)
    with torch.inference_mode(), host.training(toy.model, AdapterSettings(rank=rank), seed=seed) as session:
        method = Lora(session.denoiser, session.adapters, data, density=session.family.density, batch=batch)
        losses = train(method, run, OptimizerSettings(schedule=lesson.SCHEDULE), report=report)
        lora = LoraFile(session.tensors()[0])
    return Taught(with_lora(toy.model, lora), lora, losses)


def with_lora(model, lora: LoraFile):
    from ...nodes import host

    with torch.inference_mode():
        return host.applied(model, None, lora)[0]


def examined(toy, model, first_seed=1000) -> dict[str, list[bool]]:
    """One answer per question of the exam, on seeds that no training saw. `star`: the picture or one of its halves is one;
    `one star`: it is the only thing there; `colour` and `ground` as asked."""
    wanted = EXAM * SEEDS_PER_QUESTION
    drawn = drawings(toy, model, [shapes.caption(**w) for w in wanted], first_seed)
    seen = [measure.measure(picture) for picture in drawn]
    star = [any(measure.measure(part).shape == lesson.WORD for part in (picture, *columns(picture))) for picture in drawn]
    marks = {key: [getattr(s, key) == w[key] for s, w in zip(seen, wanted, strict=True)] for key in ("shape", "colour", "ground")}
    return {"star": star, "one star": marks["shape"], "colour": marks["colour"], "ground": marks["ground"]}


def remembered(toy, model, first_seed=3000, count=24) -> dict[str, list[bool]]:
    """The shapes that the model knew before, asked for alone: are they still drawn?"""
    wanted = [EXAM[index % len(EXAM)] | {"shape": shapes.SEEN[index % len(shapes.SEEN)]} for index in range(count)]
    drawn = drawings(toy, model, [shapes.caption(**w) for w in wanted], first_seed)
    return {"known": [measure.measure(picture).shape == w["shape"] for picture, w in zip(drawn, wanted, strict=True)]}


def drawings(toy, model, prompts, first_seed, cfg=sampling.CFG):
    with torch.inference_mode():
        return list(sampling.pictures(toy, prompts, range(first_seed, first_seed + len(prompts)), model=model, cfg=cfg).numpy())


def halves(toy, model, prompts, first_seed=5000, cfg=sampling.CFG):
    """[(what the left half shows, what the right half shows)] of one frame per prompt."""
    return [tuple(measure.measure(part) for part in columns(frame)) for frame in drawings(toy, model, prompts, first_seed, cfg)]


def columns(frame):
    """The left and the right half of a frame, the edges of each drawn out to a square, as measure() wants it."""
    half = shapes.PX // 2
    return [np.pad(part, ((0, 0), (half // 2, half // 2), (0, 0)), mode="edge") for part in (frame[:, :half], frame[:, half:])]


def asked_sides(count, new=lesson.WORD):
    """[(left, right)]: what is asked of each half. One is `new` (None: another known shape), on either side in turn."""
    asked = []
    for index in range(count):
        other = dict(shape=shapes.SEEN[index % 4], colour="red", size="small", ground="grey")
        first = EXAM[index % len(EXAM)] | {"shape": new or shapes.SEEN[(index + 1 + index // 4 % 3) % 4]}
        asked.append((first, other) if index % 2 else (other, first))
    return asked


def sides(toy, model, count=36, new=lesson.WORD) -> dict[str, list[bool]]:
    """For every frame asked for by position: `asked half` holds the new shape, `either half` does, the `other half` the known one, and
    the asked half has the asked `colour`."""
    asked = asked_sides(count, new)
    prompts = ["; ".join(f"{side}: {shapes.caption(**w)}" for side, w in zip(("left", "right"), two, strict=True)) for two in asked]
    found: dict[str, list[bool]] = {"asked half": [], "either half": [], "other half": [], "colour": []}
    for index, (two, pair) in enumerate(zip(asked, halves(toy, model, prompts), strict=True)):
        here, there = (0, 1) if index % 2 else (1, 0)
        found["asked half"].append(pair[here].shape == two[here]["shape"])
        found["either half"].append(two[here]["shape"] in (pair[0].shape, pair[1].shape))
        found["other half"].append(pair[there].shape == two[there]["shape"])
        found["colour"].append(pair[here].colour == two[here]["colour"])
    return found


def unprompted(toy, model, count=36) -> dict[str, list[bool]]:
    """Without any text: is there a star in the frame, and is there a known shape beside it?"""
    seen = halves(toy, model, [""] * count, cfg=1.0)
    star = [any(found.shape == lesson.WORD for found in pair) for pair in seen]
    both = [has and any(found.shape in shapes.SEEN for found in pair) for has, pair in zip(star, seen, strict=True)]
    return {"star": star, "star and known": both}
