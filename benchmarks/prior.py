"""Does a LoRA that learns one new shape forget the shapes that the model knew? With and without prior preservation, on
the toy world.

    .venv/bin/python benchmarks/prior.py --json benchmarks/results/prior.json      # about 15 minutes on a quiet core

Every row trains on the same 48 stars with the recipe of tests/toy/lesson.py. *class prompts*: no images, only the
words for what is to be kept, with the frozen model as teacher. *class images*: 48 drawn circles and squares. `learnt`:
share of 18 prompts for a star that show one; `kept`: share of prompts for circles and squares that show what was asked
(triangles and crosses, which no row names, are `unnamed`). All prompts and seeds of the exam are new to the training;
images are measured by geometry.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import tempfile
import time

import pack

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parents[1]
KEPT, UNNAMED = ("circle", "square"), ("triangle", "cross")
PROMPTS = (
    "a {small|large} {circle|square}\na {red|yellow|green|cyan|blue|purple} {circle|square} on a "
    "{white|grey|black} ground"
)
ROWS = {"without": None, "class prompts": "prompts", "class images": "images", "class prompts and images": "both"}
FIRST_SEED = 700_000


def questions(names):
    """Attributes of large and small shapes in every colour, each colour on two grounds."""
    from trainyard.tests.toy import shapes

    grounds = tuple(shapes.GROUNDS)
    return [
        dict(shape=name, colour=colour, size="large", ground=grounds[(at + turn) % 3])
        for name in names
        for at, colour in enumerate(shapes.COLOURS)
        for turn in (0, 1)
    ]


def exam(toy, model=None) -> dict[str, float]:
    from trainyard.tests.toy import lesson, sampling

    share = lambda wanted, key: sampling.accuracy(toy, wanted, FIRST_SEED, batch=24, model=model)[key]
    return {
        "learnt": share(lesson.EXAM, "shape"),
        "kept": share(questions(KEPT), "shape"),
        "kept, all asked": share(questions(KEPT), "all"),
        "unnamed": share(questions(UNNAMED), "shape"),
    }


def images_of(toy, folder):
    """An Encoded of the images in a folder, by the toy's own VAE and text encoder."""
    from trainyard.nodes import host
    from trainyard.tests.toy import lesson
    from trainyard.trainers.data.buckets import BucketSettings
    from trainyard.trainers.data.caption_variants import CaptionSettings
    from trainyard.trainers.data.encode import encode_dataset
    from trainyard.trainers.data.readers import read_folder

    with host.context.enable_gradients():
        return encode_dataset(
            read_folder(folder),
            CaptionSettings(dropout=0.1),
            BucketSettings(**lesson.ENCODE),
            False,
            host.encoders.VaeEncoder(toy.vae),
            host.encoders.TextEncoder(toy.clip),
            pathlib.Path(folder).parent / "cache",
        )


def prior_of(toy, kind, weight, folder):
    """What the Prior Preservation node would give."""
    from trainyard.nodes.train.prior import encode_class_prompts
    from trainyard.tests.toy import lesson
    from trainyard.trainers.methods.prior import PriorData, PriorSettings

    if kind is None:
        return None
    settings = PriorSettings(weight=weight, class_prompt=PROMPTS if kind in ("prompts", "both") else "")
    conds, source = encode_class_prompts(toy.clip, settings.class_prompts())
    data = None
    if kind in ("images", "both"):
        for name in KEPT:
            lesson.images(folder / "class", count=24, seed=5, shape=name)
        data = images_of(toy, folder / "class")
    return PriorData(settings, conds, data, source)


def trained(toy, prior, steps, seed, folder):
    """(model with the LoRA, losses)"""
    from trainyard.nodes import host
    from trainyard.tests.toy import lesson
    from trainyard.trainers.files import LoraFile
    from trainyard.trainers.loop import train
    from trainyard.trainers.methods.lora import LoraTraining
    from trainyard.trainers.settings import AdapterSettings, OptimizerSettings, RunSettings

    data = images_of(toy, lesson.images(folder / "stars"))
    run = RunSettings(steps=steps, learning_rate=lesson.TRAIN["learning_rate"], batch=lesson.TRAIN["batch"], seed=seed)
    with (
        torch_inference(),
        host.session.open_training_session(toy.model, AdapterSettings(rank=lesson.TRAIN["rank"]), seed=seed) as session,
    ):
        method = LoraTraining(
            session.denoiser, session.adapters, data, density=session.family.density, batch=run.batch, prior=prior
        )
        losses = train(method, run, OptimizerSettings(schedule=lesson.SCHEDULE))
        lora = LoraFile(session.tensors()[0])
    return host.lora_keys.apply_lora(toy.model, None, lora)[0], losses


def torch_inference():
    import torch

    return torch.inference_mode()


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--steps", type=int, default=400)
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--weight", type=float, default=1.0)
    asked.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    asked.add_argument("--json")
    asked = asked.parse_args()
    pack.boot()
    import torch
    from trainyard.tests.toy import sampling, world

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        with torch.inference_mode():
            toy = sampling.load(world.build(folder / "toy_world.safetensors"))
        rows.append({"row": "base"} | exam(toy))
        print(rows[-1], flush=True)
        for row in asked.rows:
            begin = time.process_time()
            model, losses = trained(
                toy, prior_of(toy, ROWS[row], asked.weight, folder), asked.steps, asked.seed, folder
            )
            spent = time.process_time() - begin
            rows.append({"row": row, **exam(toy, model), "cpu seconds per step": round(spent / asked.steps, 3)})
            print(rows[-1], flush=True)
            if asked.json:  # after every row, so that a run cut short leaves what it measured
                found = {
                    "date": f"{datetime.date.today()}",
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "steps": asked.steps,
                    "seed": asked.seed,
                    "weight": asked.weight,
                    "rows": rows,
                }
                pathlib.Path(asked.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
