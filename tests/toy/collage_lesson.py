"""The toy world's lesson in collages: a star it has never seen beside a shape that it knows, two columns of 64 x 64 px
in one frame.

The toy model was made for one shape an image, which no model that people train is limited to. The lesson's model is
therefore the one that train_pairs.py went on with: it knows frames of two known shapes by their captions, and has never
seen a star. The proof and the benchmark count how often the star is drawn afterwards. ComfyUI must be importable, as
for sampling.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...trainers.data.buckets import BucketSettings
from ...trainers.data.caption_variants import CAPTION_MODE_EMPTY as NO_CAPTIONS
from ...trainers.data.caption_variants import CAPTION_MODE_TEXT, CaptionSettings
from ...trainers.data.collage.build import build_collages
from ...trainers.data.collage.captions import format_captions_by_position
from ...trainers.data.collage.plan import CollageSettings
from ...trainers.data.encode import encode_dataset
from ...trainers.data.readers import read_folder
from ...trainers.data.records import ImageDataset
from ...trainers.files import LoraFile
from ...trainers.loop import train
from ...trainers.methods.lora import LoraTraining
from ...trainers.settings import AdapterSettings, OptimizerSettings, RunSettings
from . import lesson, measure, sampling, shapes

MODEL = "pairs"  # of world.build
PIXELS = 8 * shapes.PX**2  # per step, whatever they show
SEEDS_PER_QUESTION = 2
WORDS = 28  # text tokens of the longest caption here; the other 49 of 77 are padding, and half of a step's work
WIDE = 2 * shapes.PX
ENCODE = {**lesson.ENCODE, "resolution": 91, "upscale": False}  # a frame's 128 x 64 px stay as they are
TWO = dict(width=WIDE, height=shapes.PX, layout="columns", per_frame=2, contrast="off", trim=False)


class ShortClip:
    """A CLIP whose answers end after WORDS tokens, for training and sampling alike, and are given twice without
    thinking twice."""

    def __init__(self, clip):
        self.clip, self.told = clip, {}

    def __getattr__(self, name):
        return getattr(self.clip, name)

    def encode_from_tokens_scheduled(self, tokens, show_pbar=False):  # the bar is not wanted here
        key = repr(tokens)
        if key not in self.told:
            self.told[key] = [
                (context[:, :WORDS].clone(), extras)
                for context, extras in self.clip.encode_from_tokens_scheduled(tokens)
            ]
        return [[context, dict(extras)] for context, extras in self.told[key]]


@dataclass(frozen=True)
class Taught:
    """ComfyUI's model with the LoRA, loaded by the host's own loader; the LoRA; one loss per step; the pixels that were
    seen."""

    model: object
    lora: LoraFile
    losses: list
    pixels: int


def images(folder, count=48, seed=0) -> tuple[ImageDataset, ImageDataset]:
    """(stars, known shapes), `count` of each on 64 x 64 px, with captions. Colours and grounds of the stars take
    turns."""
    rng = torch.Generator().manual_seed(seed)
    for index in range(count):
        for kind, fixed in (("stars", lesson.EXAM[(index * 5) % len(lesson.EXAM)]), ("known", {})):
            place = Path(folder) / kind
            place.mkdir(parents=True, exist_ok=True)
            image, caption, _ = shapes.sample(rng, **fixed)
            image.save(place / f"{kind}_{index:02d}.png")
            (place / f"{kind}_{index:02d}.txt").write_text(caption, encoding="utf-8")
    return read_folder(Path(folder) / "stars"), read_folder(Path(folder) / "known")


def together(stars: ImageDataset, known: ImageDataset) -> ImageDataset:
    """The same images, each alone."""
    return ImageDataset((*stars, *known))


def pairs(stars: ImageDataset, known: ImageDataset, folder, captions="positional", mix=0.0, seed=0) -> ImageDataset:
    """One star and one known shape in every frame, the star on either side; `mix` of an epoch shows the same images
    alone."""
    made = []
    for number, couple in enumerate(zip(stars, known, strict=True)):
        settings = CollageSettings(**TWO, uses=1, mix=mix, captions=captions, seed=seed * 1000 + number)
        made += build_collages(ImageDataset(couple), settings, Path(folder) / "collages").dataset
    return ImageDataset(tuple(made))


def taught(toy, dataset: ImageDataset, folder, *, steps: int, seed: int, empty=False, report=None) -> Taught:
    """What this dataset teaches the model of `toy` in as many steps of PIXELS as are asked for. Frames of two go in
    half as large a batch; where a dataset holds both, single images fill their batches half, and more steps make up
    for them."""
    from ...nodes import host

    captions = CaptionSettings(caption_mode=NO_CAPTIONS if empty else CAPTION_MODE_TEXT, dropout=0.0 if empty else 0.1)
    doors = host.encoders.VaeEncoder(toy.vae), host.encoders.TextEncoder(toy.clip)
    with torch.inference_mode(), host.context.enable_gradients():
        data = encode_dataset(dataset, captions, BucketSettings(**ENCODE), False, *doors, Path(folder) / "cache")
    sizes = {item.bucket[0] * item.bucket[1] for item in data.items}
    batch = PIXELS // max(sizes)
    mean = sum(item.bucket[0] * item.bucket[1] * item.repeats for item in data.items) / sum(
        item.repeats for item in data.items
    )
    steps = round(steps * PIXELS / (batch * mean))
    run = RunSettings(steps=steps, learning_rate=lesson.TRAIN["learning_rate"], batch=batch, seed=seed, save_every=0)
    with (
        torch.inference_mode(),
        host.session.open_training_session(toy.model, AdapterSettings(rank=lesson.TRAIN["rank"]), seed=seed) as session,
    ):
        method = LoraTraining(session.denoiser, session.adapters, data, density=session.family.density, batch=batch)
        losses = train(method, run, OptimizerSettings(schedule=lesson.SCHEDULE), report=report)
        lora = LoraFile(session.tensors()[0])
    with torch.inference_mode():
        return Taught(host.lora_keys.apply_lora(toy.model, None, lora)[0], lora, losses, round(steps * batch * mean))


# -- exams, on seeds that no training saw ------------------------------------------------------------------------------


def examined(toy, model, first_seed=1000) -> dict[str, list[bool]]:
    """Single stars. One answer per question: `star`, and `colour` and `ground` as asked."""
    wanted = lesson.EXAM * SEEDS_PER_QUESTION
    seen = [measure.measure(image) for image in drawings(toy, model, [shapes.caption(**w) for w in wanted], first_seed)]
    told = {"star": "shape", "colour": "colour", "ground": "ground"}
    return {name: [getattr(s, key) == w[key] for s, w in zip(seen, wanted, strict=True)] for name, key in told.items()}


def remembered(toy, model, first_seed=3000, count=24) -> dict[str, list[bool]]:
    """The shapes that the model knew before, asked for alone: are they still drawn?"""
    wanted = [
        lesson.EXAM[index % len(lesson.EXAM)] | {"shape": shapes.SEEN[index % len(shapes.SEEN)]}
        for index in range(count)
    ]
    drawn = drawings(toy, model, [shapes.caption(**w) for w in wanted], first_seed)
    return {"known": [measure.measure(image).shape == w["shape"] for image, w in zip(drawn, wanted, strict=True)]}


def sides(toy, model, count=36, new=lesson.WORD) -> dict[str, list[bool]]:
    """For every frame asked for by position: `asked half` holds the new shape (None: a known one), the `other half` the
    known one, and the asked half has the asked `colour`."""
    asked = asked_sides(count, new)
    prompts = [format_captions_by_position(("left", "right"), [shapes.caption(**w) for w in two]) for two in asked]
    found: dict[str, list[bool]] = {"asked half": [], "other half": [], "colour": []}
    for index, (two, pair) in enumerate(zip(asked, halves(toy, model, prompts), strict=True)):
        here, there = (0, 1) if index % 2 else (1, 0)
        found["asked half"].append(pair[here].shape == two[here]["shape"])
        found["other half"].append(pair[there].shape == two[there]["shape"])
        found["colour"].append(pair[here].colour == two[here]["colour"])
    return found


def unprompted(toy, model, count=36) -> dict[str, list[bool]]:
    """Without any text: is there a star in the frame, and is there a known shape beside it?"""
    seen = halves(toy, model, [""] * count, cfg=1.0)
    star = [any(found.shape == lesson.WORD for found in pair) for pair in seen]
    both = [has and any(found.shape in shapes.SEEN for found in pair) for has, pair in zip(star, seen, strict=True)]
    return {"star": star, "star and known": both}


def asked_sides(count, new=lesson.WORD):
    """[(left, right)]: what is asked of each half. One is `new` (None: another known shape), on either side in turn."""
    asked = []
    for index in range(count):
        other = dict(shape=shapes.SEEN[index % 4], colour="red", size="small", ground="grey")
        first = lesson.EXAM[index % len(lesson.EXAM)] | {"shape": new or shapes.SEEN[(index + 1 + index // 4 % 3) % 4]}
        asked.append((first, other) if index % 2 else (other, first))
    return asked


def drawings(toy, model, prompts, first_seed, cfg=sampling.CFG, width=None):
    with torch.inference_mode():
        return list(
            sampling.images(
                toy, prompts, range(first_seed, first_seed + len(prompts)), model=model, cfg=cfg, width=width
            ).numpy()
        )


def halves(toy, model, prompts, first_seed=5000, cfg=sampling.CFG):
    """[(what the left half shows, what the right half shows)] of one frame per prompt."""
    return [
        tuple(measure.measure(part) for part in columns(frame))
        for frame in drawings(toy, model, prompts, first_seed, cfg, WIDE)
    ]


def columns(frame):
    """The left and the right half of a frame."""
    return [frame[:, : shapes.PX], frame[:, shapes.PX :]]
