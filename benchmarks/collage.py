"""Does a LoRA learn a new shape from collages as well as from single images? On the toy world, at equal pixels seen.

    .venv/bin/python benchmarks/collage.py --seeds 1 2 3 --json benchmarks/results/collage.json

The model knows frames of two shapes (tests/toy/train_pairs.py) and has never seen a star. Every row trains on as many
pixels, of the same 48 stars and, but for the first row, the same 48 known shapes; frames of two are 128 x 64 px, so
that a star is as large as alone. What is asked,
each image on its own seed and measured by geometry: `exam`: 36 single stars. `sides`: 36 frames as "left: ...; right:
...". `known`: 24 known shapes alone. `unprompted`: 36 frames from the empty prompt.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from functools import partial

import pack

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parents[1]
ALONE, BOTH, COLLAGES, MIXED, EMPTY = ROWS = (
    "stars alone", "stars and known, alone", "collages", "collages + 30 % alone", "collages, empty captions",
)  # fmt: skip
CLAIM = (
    "of single stars, collages draw as many as the same pictures shown alone do: their share lies in or above the "
    "95 % interval of the latter"
)


def dataset_of(row: str, seed: int, folder):
    """What a row is trained on."""
    from trainyard.tests.toy import collage_lesson as lesson

    stars, known = lesson.images(folder / f"pictures{seed}", seed=seed)
    if row in (ALONE, BOTH):
        return stars if row == ALONE else lesson.together(stars, known)
    return lesson.pairs(
        stars,
        known,
        folder / f"pictures{seed}",
        "empty" if row == EMPTY else "positional",
        0.3 if row == MIXED else 0.0,
        seed,
    )


def measured(toy, row: str, seed: int, steps: int, folder) -> dict:
    from trainyard.tests.toy import collage_lesson as lesson

    begin = time.perf_counter()
    taught = lesson.taught(toy, dataset_of(row, seed, folder), folder, steps=steps, seed=seed, empty=row == EMPTY)
    found = {
        "row": row,
        "seed": seed,
        "steps": len(taught.losses),
        "pixels": taught.pixels,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if row == EMPTY:
        return found | {"unprompted": lesson.unprompted(toy, taught.model)}
    asked = {"exam": lesson.examined, "sides": lesson.sides, "known": lesson.remembered}
    return found | {part: ask(toy, taught.model) for part, ask in asked.items()}


def shares(answers: dict) -> dict:
    return {name: round(statistics.mean(hits), 3) for name, hits in answers.items()}


def interval(hits) -> list[float]:
    """95 % interval of a share (Wilson 1927), which is no point even where every answer is right."""
    from scipy.stats import binomtest

    found = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return [round(float(found.low), 3), round(float(found.high), 3)]


def pooled(runs, row, part, name) -> list[bool]:
    return [hit for run in runs if run["row"] == row and part in run for hit in run[part][name]]


def summary(runs) -> dict:
    """Shares over all seeds with their intervals, and whether collages keep up with single images."""
    means = {}
    for row in ROWS:
        parts = {
            part: answers
            for run in runs
            if run["row"] == row
            for part, answers in run.items()
            if isinstance(answers, dict)
        }
        told = {(part, name): pooled(runs, row, part, name) for part, answers in parts.items() for name in answers}
        means[row] = {
            f"{part}: {name}": [round(statistics.mean(hits), 3), *interval(hits)] for (part, name), hits in told.items()
        }
    verdicts = {
        f"{row} / {single}": keeps_up(runs, row, single) for row in (COLLAGES, MIXED) for single in (BOTH, ALONE)
    }
    return {
        "share, and its 95 % interval": {row: found for row, found in means.items() if found},
        "claim": {"text": CLAIM, "holds": verdicts},
    }


def keeps_up(runs, row, alone) -> bool | None:
    """None while a row is missing."""
    single, pairs = pooled(runs, alone, "exam", "star"), pooled(runs, row, "exam", "star")
    return statistics.mean(pairs) >= interval(single)[0] if single and pairs else None


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seeds", type=int, nargs="+", default=[1])
    asked.add_argument("--steps", type=int, default=400)
    asked.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    asked.add_argument("--json")
    asked = asked.parse_args()
    pack.boot()
    import torch
    from trainyard.tests.toy import collage_lesson as lesson
    from trainyard.tests.toy import sampling, world

    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        with torch.inference_mode():
            toy = sampling.load(world.build(folder / "toy_pairs.safetensors", lesson.MODEL))
        toy.clip = lesson.ShortClip(toy.clip)
        found = {
            "exam": lesson.examined,
            "sides of known shapes": partial(lesson.sides, new=None),
            "known": lesson.remembered,
        }
        base = {part: shares(ask(toy, toy.model)) for part, ask in found.items()}
        print("base", base, flush=True)
        for seed in asked.seeds:
            for row in asked.rows:
                runs.append(measured(toy, row, seed, asked.steps, folder))
                print({k: shares(v) if isinstance(v, dict) else v for k, v in runs[-1].items()}, flush=True)
                setup = {
                    "date": f"{datetime.date.today()}",
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "pixels per step": lesson.PIXELS,
                    "base": base,
                }
                if asked.json:  # after every row, so that a run cut short leaves what it measured
                    pathlib.Path(asked.json).write_text(
                        json.dumps({**setup, **summary(runs), "runs": [tidy(run) for run in runs]}, indent=1) + "\n"
                    )
    print(json.dumps(summary(runs), indent=1))


def tidy(run) -> dict:
    """Answers as a line of 0 and 1, a question each."""
    return {
        part: {name: "".join("01"[hit] for hit in hits) for name, hits in answers.items()}
        if isinstance(answers, dict)
        else answers
        for part, answers in run.items()
    }


if __name__ == "__main__":
    main()
