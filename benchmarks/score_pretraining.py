"""What a latent backbone learns from images without ratings, and how far a score gets by looking through models that
exist, on the toy world, where the true score of every image is known.

    .venv/bin/python benchmarks/score_pretraining.py                 # all three parts
    .venv/bin/python benchmarks/score_pretraining.py pretraining     # or some of: pretraining, model, decode

pretraining: 400 images without ratings; then ridge regression from the features on 64 ratings, asked about 300 other
images, mean of five draws of the 64. model: a score on the frozen states of the toy's own transformer. decode: a
score on a small CLIP_VISION that looks at the decoded latent; that encoder learnt to tell how images are drawn
(tests/toy/train_eyes.py) and was never told a score.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

import pack
import score as common  # benchmarks/score.py: the world and how it is asked

RESULTS = common.ROOT / "benchmarks" / "results" / "2026-11-21-score-pretraining.json"
PARTS = ("pretraining", "model", "decode")
PICTURES, LABELS, DRAWS = 400, 64, 5
STEPS = 300
TASKS = {
    "none": {},
    "rotation": dict(rotation=1.0),
    "jigsaw": dict(jigsaw=1.0),
    "colours": dict(colours=1.0),
    "simclr": dict(simclr=1.0),
    "inpaint": dict(inpaint=1.0),
    "inpaint 1 + simclr 0.5 (default)": dict(inpaint=1.0, simclr=0.5),
}
OFF = dict(inpaint=0.0, simclr=0.0)
NETWORK = dict(width=24, depth=1)


def timed(make):
    start = time.process_time()
    return make(), round(time.process_time() - start)


# -- pre-training ------------------------------------------------------------------------------------------------------


def pretraining(toy, schedule, place, tasks, steps):
    import torch
    from trainyard.tests.toy import scores as known
    from trainyard.trainers.data.readers import read_folder
    from trainyard.trainers.data.views import GREY_VIEW, ROTATED_VIEW, SHUFFLED_VIEW, encode_views

    rng, folder = torch.Generator().manual_seed(11), place / "pictures"
    folder.mkdir()
    for number in range(PICTURES):
        known.drawn(rng).save(folder / f"{number:03d}.png")
    from trainyard.nodes import host

    views = encode_views(
        read_folder(folder),
        (ROTATED_VIEW, SHUFFLED_VIEW, GREY_VIEW),
        size=64,
        crops=4,
        seed=0,
        vae=host.encoders.VaeEncoder(toy.vae),
        cache_dir=place / "cache",
    )
    z, truth = common.images(toy, LABELS * DRAWS, 12)
    others, asked = common.images(toy, common.ASKED, 2)
    rows = {}
    for name in tasks:
        rows[name] = pretrained_row(
            views, schedule, TASKS[name], steps, (schedule.model_space(z), truth), (schedule.model_space(others), asked)
        )
        print(name, rows[name], flush=True)
    return rows


def pretrained_row(views, schedule, weights, steps, labelled, asked) -> dict:
    from trainyard.trainers.scores.networks import ScoreModelInfo, ScorerSettings, build_scorer, call_with_seed
    from trainyard.trainers.scores.pretext import PretextSettings
    from trainyard.trainers.scores.pretraining import pretrain_backbone

    row = {"seconds of one core": 0}
    if weights:
        settings = PretextSettings(**{**OFF, **weights}, steps=steps, batch=32, size=64)
        made, row["seconds of one core"] = timed(
            lambda: pretrain_backbone(views, schedule, ScorerSettings(**NETWORK), settings, latent_format="SD3")
        )
        trunk, row["same picture found"] = made.model.networks[0].trunk, made.model.info.metrics["same picture found"]
    else:
        trunk = call_with_seed(0, lambda: build_scorer(ScoreModelInfo(channels=16, **NETWORK))).trunk
    return row | {f"SRCC of {name} from {LABELS} ratings": probe(trunk, labelled, asked, name) for name in asked[1]}


def probe(trunk, labelled, asked, name) -> float:
    import numpy as np
    import torch
    from trainyard.trainers.scores.metrics import srcc
    from trainyard.trainers.scores.pretraining import ridge_regression

    with torch.no_grad():
        rows, others = (
            torch.cat([trunk(part, torch.zeros(len(part))) for part in x.split(100)]) for x in (labelled[0], asked[0])
        )
    truth = torch.tensor(labelled[1][name])
    said = [
        ridge_regression(rows[at : at + LABELS], truth[at : at + LABELS, None], others)[:, 0]
        for at in range(0, LABELS * DRAWS, LABELS)
    ]
    return round(float(np.mean([srcc(s.numpy(), np.array(asked[1][name])) for s in said])), 3)


# -- through models that exist -----------------------------------------------------------------------------------------


def through(toy, schedule, backbone, clip_vision=None, noisy=True) -> dict:
    from trainyard.nodes.scores import feature_extractors
    from trainyard.tests.toy import scores as known
    from trainyard.trainers.scores.backbones import cache_frozen_features
    from trainyard.trainers.scores.networks import ScorerSettings
    from trainyard.trainers.scores.objective import ScoreSettings
    from trainyard.trainers.scores.training import train_score_model

    z, truth = common.images(toy, common.LEARNT, 1)
    others, asked = common.images(toy, common.ASKED, 2)
    rows, trunk = {}, feature_extractors.make_trunk_factory(toy.model, toy.vae, clip_vision)
    data, few, trunk = cache_frozen_features(
        known.encoded(z, truth[known.SCORES[0]]), schedule, trunk
    )  # the same images under every score
    for name in known.SCORES:
        made, seconds = timed(lambda name=name: train_score_model(rated(data, truth[name]), few, ScorerSettings(backbone=backbone, width=64, noisy=noisy),
                                                        ScoreSettings(**common.HOW), latent_format="SD3", trunk=trunk))  # fmt: skip
        found = common.asked(made.model, schedule, schedule.model_space(others), asked[name])
        rows[name] = {"SRCC by noise": found if noisy else {"0.0": found["0.0"]}, "seconds of one core": seconds}
        print(backbone, name, rows[name], flush=True)
    return rows


def rated(data, scores):
    from dataclasses import replace

    return replace(data, items=[replace(item, score=score) for item, score in zip(data.items, scores, strict=True)])


def main(names, tasks, steps):
    import torch

    torch.set_num_threads(1)
    from trainyard.nodes.scores.latents import NoiseSchedule
    from trainyard.tests.toy import sampling
    from trainyard.trainers.scores.networks import DECODED_IMAGE, MODEL_FEATURES

    toy = pack.toy_world()
    schedule = NoiseSchedule(toy.model)
    parts = {
        "pretraining": lambda: pretraining(toy, schedule, place, tasks, steps),
        "model": lambda: through(toy, schedule, MODEL_FEATURES),
        "decode": lambda: through(toy, schedule, DECODED_IMAGE, sampling.clip_vision(), noisy=False),
    }
    about = {"command": "benchmarks/score_pretraining.py", "network": NETWORK, "pictures without ratings": PICTURES}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder)
            found, seconds = timed(parts[name])
        key = f"{name}, {steps} steps" if name == "pretraining" else name
        result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # read late: parts may run side by side
        RESULTS.write_text(
            json.dumps({**result, **about, key: found, f"{key}, seconds of one core in all": seconds}, indent=1) + "\n"
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of pre-training")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training (default: %(default)s)")
    wanted = parser.parse_args()
    if unknown := [part for part in wanted.parts if part not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    pack.boot()
    import torch

    with torch.inference_mode(False):
        main(wanted.parts or PARTS, wanted.tasks, wanted.steps)
