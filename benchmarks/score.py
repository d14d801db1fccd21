"""Score models on the toy world, where the true score of every image is known: how well each backbone orders images
that it never saw, clean and at rising noise, beside the same network trained on clean latents only and an oracle.

    .venv/bin/python benchmarks/score.py                        # everything, about 15 minutes on one core
    .venv/bin/python benchmarks/score.py brightness --kind "latent ViT"   # some of it; the file keeps what it has of
    the others

1500 drawn images are learnt from, 300 others are asked about. The oracle knows the true scores of the same 1500
images and how noise
is made: it says the mean score of all of them, each weighted by how likely it is to have become the noised latent at
hand (Bayes' rule). At little noise that is one neighbour and a scorer that generalises does better; at much noise it is
near the best that can be known.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time

import pack

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-21-score.json"
# where noise has a standard deviation of 0.9 in a latent of unit size: b / sqrt(a^2 + b^2) with a = 1 - level, b =
# level
UNIT = 0.674
LEVELS = (0.0, 0.3, 0.6, UNIT, 0.9)
LEARNT, ASKED = 1500, 300
KINDS = {
    "latent ResNet": dict(backbone="latent ResNet", width=32, depth=1),
    "latent ResNet, clean only": dict(backbone="latent ResNet", width=32, depth=1, noisy=False),
    "latent ViT": dict(backbone="latent ViT", width=32, depth=1),
}
HOW = dict(members=3, steps=1000, batch=32, learning_rate=2e-3)


def images(toy, count, seed, px=64):
    """Latents and true scores, drawn once and kept beside the tests' small models: measuring shapes takes longer than
    learning them."""
    import torch
    from trainyard.tests.cache import cached_file
    from trainyard.tests.toy import scores as known

    name = f"known_scores_{count}_{seed}{'' if px == 64 else f'_{px}'}.pt"
    path = cached_file(name, [known.__file__], lambda draft: torch.save(known.latents(toy, count, seed, px), draft))
    return torch.load(path)


def noised(schedule, x0, level, seed=7):
    """(x, levels) as a scorer sees them."""
    import torch
    from trainyard.trainers.scores.networks import level_to_sigma
    from trainyard.trainers.scores.objective import noised_scorer_input

    levels = torch.full((len(x0),), level)
    return noised_scorer_input(
        schedule, x0, level_to_sigma(schedule, levels), levels > 0, torch.Generator().manual_seed(seed)
    )


def asked(model, schedule, x0, scores) -> dict:
    """SRCC by level of noise, with its interval."""
    import torch
    from trainyard.trainers.scores.metrics import bootstrap_interval, srcc

    found = {}
    with torch.no_grad():
        for level in LEVELS:
            x, levels = noised(schedule, x0, level)
            said = torch.cat([model.mean_score(a, b) for a, b in zip(x.split(50), levels.split(50), strict=True)])
            figure = bootstrap_interval(srcc, said.numpy(), scores)
            found[str(level)] = [round(v, 3) for v in (figure.value, figure.low, figure.high)]
    return found


def oracle(schedule, x0, scores, known, known_scores) -> dict:
    import torch
    from trainyard.trainers.scores.metrics import srcc

    found = {}
    truth = torch.tensor(known_scores)
    for level in LEVELS[1:]:
        x, _ = noised(schedule, x0, level)
        a, b = (1 - level), level  # the toy world is a flow model
        scale = (a * a + b * b) ** 0.5
        apart = torch.cdist((x * scale).flatten(1), (a * known).flatten(1)).square()
        said = (-apart / (2 * b * b)).softmax(1) @ truth
        found[str(level)] = round(srcc(said.numpy(), scores), 3)
    return found


def figures(schedule, kind, data, x0, scores) -> dict:
    import torch
    from trainyard.trainers.scores.networks import ScorerSettings
    from trainyard.trainers.scores.objective import ScoreSettings
    from trainyard.trainers.scores.training import train_score_model

    start = time.process_time()
    made = train_score_model(data, schedule, ScorerSettings(**KINDS[kind]), ScoreSettings(**HOW), latent_format="SD3")
    size = sum(p.numel() for p in made.model.networks[0].parameters())
    return {
        "SRCC by noise": asked(made.model, schedule, x0, scores),
        "folds": made.model.info.metrics,
        "parameters": size,
        "seconds of one core": round(time.process_time() - start),
        "threads": torch.get_num_threads(),
    }


def main(names, kinds, px):
    import torch

    torch.set_num_threads(1)
    from trainyard.nodes.scores.latents import NoiseSchedule
    from trainyard.tests.toy import scores as known

    toy = pack.toy_world()
    schedule = NoiseSchedule(toy.model)
    z, truth = images(toy, LEARNT, 3, px)
    others, asked_truth = images(toy, ASKED, 2, px)
    x0, crowd = schedule.model_space(others), schedule.model_space(z)
    for name in names:
        kept(px, name, "oracle", {"SRCC by noise": oracle(schedule, x0, asked_truth[name], crowd, truth[name])})
        for kind in kinds:
            kept(px, name, kind, figures(schedule, kind, known.encoded(z, truth[name]), x0, asked_truth[name]))


def kept(px, name, kind, row):
    """Into the file, which is read late: parts may run side by side."""
    print(f"{px} px", name, kind, row["SRCC by noise"], flush=True)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result |= {"command": "benchmarks/score.py", "settings": HOW, "kinds": KINDS, "learnt": LEARNT, "asked": ASKED}
    table = result if px == 64 else result.setdefault(f"{px} px", {})
    table.setdefault(name, {})[kind] = row
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument(
        "--px",
        type=int,
        default=64,
        help="width and height of the pictures; larger ones show the same (default: %(default)s)",
    )
    asked_for = parser.parse_args()
    pack.boot()
    import torch
    from trainyard.tests.toy.scores import SCORES

    with torch.inference_mode(False):
        main(asked_for.names or SCORES, asked_for.kind or KINDS, asked_for.px)
