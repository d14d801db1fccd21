"""The lesson that the demo, the proof and the browser test share: a LoRA that draws stars, a shape the toy world has
never seen."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ...trainers.settings import OptimizerSettings
from . import measure, shapes

WORD = "star"
TRAIN = dict(steps=400, learning_rate=4e-3, rank=32, batch=8, seed=1)
SCHEDULE = "cosine"
ENCODE = dict(resolution=64, step=8, min_side=64, max_side=128)
EXAM = [dict(shape=WORD, colour=c, size="large", ground=g) for c in shapes.COLOURS for g in shapes.GROUNDS if c != g]


def images(folder, count=48, seed=0, shape=WORD) -> Path:
    """A dataset folder: drawn stars with captions beside them. Colours and grounds take turns; place and size are
    drawn."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    for index in range(count):
        wanted = EXAM[(index * 5) % len(EXAM)] | {"shape": shape}
        image, caption, _ = shapes.sample(rng, **wanted)
        image.save(folder / f"{shape}_{index:02d}.png")
        (folder / f"{shape}_{index:02d}.txt").write_text(caption, encoding="utf-8")
    return folder


def marks(images, wanted) -> dict[str, float]:
    """Share of images that show the asked attribute: {"shape": 0.9, "colour": ..., "ground": ...}."""
    seen = [measure.measure(p) for p in images]
    return {
        key: sum(getattr(s, key) == w[key] for s, w in zip(seen, wanted, strict=True)) / len(seen)
        for key in ("shape", "colour", "ground")
    }


def graph(checkpoint, folder, *, exam=(), run_name="stars", sampling_steps=20, cfg=2.5, **train):
    """An API prompt: checkpoint + folder -> LoRA, loss plot, and one image per exam question without (b...) and with
    (l...) it."""
    widgets = {**TRAIN, "save_every": 0, "run_name": run_name, "checkpointing": "off", **train}
    captions = dict(
        caption_mode="captions",
        trigger="",
        dropout=0.1,
        shuffle=False,
        keep_tokens=0,
        variants=1,
        upscale=False,
        flip=False,
        seed=0,
    )
    nodes = {
        "model": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "data": node("TrainyardLoadDataset", folder=folder, repeats=1, alpha_mask=False),
        "encode": node(
            "TrainyardEncodeDataset", dataset=["data", 0], vae=["model", 2], clip=["model", 1], **captions, **ENCODE
        ),
        "recipe": node("TrainyardOptimizer", **(OptimizerSettings(schedule=SCHEDULE).to_dict())),
        "train": node(
            "TrainyardTrainLora", model=["model", 0], encoded=["encode", 0], optimizer=["recipe", 0], **widgets
        ),
        "save": node("TrainyardSaveLora", lora=["train", 0], name=run_name, model=["model", 0]),
        "plot": node("TrainyardLossPlot", losses=["train", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "latent": node("EmptySD3LatentImage", width=shapes.PX, height=shapes.PX, batch_size=1),
    }
    for index, wanted in enumerate(exam):
        nodes[f"ask{index}"] = node("CLIPTextEncode", text=shapes.caption(**wanted), clip=["model", 1])
        for side, model in (("b", ["model", 0]), ("l", ["train", 2])):
            links = dict(model=model, positive=[f"ask{index}", 0], negative=["empty", 0], latent_image=["latent", 0])
            how = dict(
                seed=1000 + index, steps=sampling_steps, cfg=cfg, sampler_name="euler", scheduler="simple", denoise=1.0
            )
            nodes[f"{side}{index}s"] = node("KSampler", **links, **how)
            nodes[f"{side}{index}d"] = node("VAEDecode", samples=[f"{side}{index}s", 0], vae=["model", 2])
            nodes[f"{side}{index}"] = node(
                "SaveImage", images=[f"{side}{index}d", 0], filename_prefix=f"{side}{index:02d}"
            )
    return json.loads(json.dumps(nodes))


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}
