"""Does a LoRA learn a new shape from collages as well as from single pictures? On the toy world, at equal pixels seen.

    .venv/bin/python benchmarks/collage.py --base /tmp/base --json benchmarks/results/collage.json

The toy model knows one shape a frame, which no model that people train is limited to: so it is first shown pairs of known shapes (never a
star), the same for all rows; `--base` keeps what that taught. Every row then trains for the same steps on as many frames of 64 x 64 px, so
on as many pixels, made of the same 48 stars and 48 known shapes. What is asked, each picture on its own seed and measured by geometry:
`exam`: 36 single stars; a star in either half of the frame counts. `sides`: 36 frames as "left: ...; right: ...". `known`: 24 known shapes
alone. `unprompted`: 36 frames from the empty prompt.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import statistics
import tempfile
import time

import pack

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parents[1]
ALONE, COLLAGES, MIXED, EMPTY = ROWS = ("stars alone", "collages", "collages + 30 % alone", "collages, empty captions")
RANK = 64  # of what is shown first
CLAIM = "of 36 single stars, collages draw as many as single pictures do: their share lies in or above the 95 % interval of the latter"


def made_ready(toy, kept, folder, rounds) -> dict:
    """Gives `toy` a model that knows pairs of known shapes, and says how well it does. A round is a LoRA on top of the one before, of so
    many steps; `kept` is the folder where they lie or will lie."""
    from trainyard.tests.toy import collage_lesson as lesson
    from trainyard.trainers.files import LoraFile, read_safetensors, write_safetensors

    for number, steps in enumerate(rounds, 1):
        file = kept / f"{number}.safetensors"
        if file.exists():
            toy.model = lesson.with_lora(toy.model, LoraFile(read_safetensors(file)[0]))
        else:
            taught = lesson.taught(toy, lesson.seen_pairs(folder / "seen"), folder, steps=steps, seed=99 + number, rank=RANK)
            toy.model = taught.model
            write_safetensors(file, dict(taught.lora), {})
    found = {"sides of known shapes": lesson.sides(toy, toy.model, new=None), "known": lesson.remembered(toy, toy.model)}
    return {name: shares(part) for name, part in found.items()}


def dataset_of(row: str, seed: int, folder):
    """What a row is trained on."""
    from trainyard.tests.toy import collage_lesson as lesson

    stars, known = lesson.pictures(folder / f"pictures{seed}", seed=seed)
    if row == ALONE:
        return stars
    return lesson.pairs(stars, known, folder / f"pictures{seed}", "empty" if row == EMPTY else "positional", 0.3 if row == MIXED else 0.0)


def measured(toy, row: str, seed: int, steps: int, folder) -> dict:
    from trainyard.tests.toy import collage_lesson as lesson

    begin = time.perf_counter()
    taught = lesson.taught(toy, dataset_of(row, seed, folder), folder, steps=steps, seed=seed, empty=row == EMPTY)
    tenth = max(1, steps // 10)
    found = {"row": row, "seed": seed, "steps": steps, "seconds": round(time.perf_counter() - begin, 1),
             "loss by tenths": [round(statistics.mean(taught.losses[i:i + tenth]), 4) for i in range(0, steps, tenth)]}
    if row == EMPTY:
        return found | {"unprompted": lesson.unprompted(toy, taught.model)}
    asked = {"exam": lesson.examined, "sides": lesson.sides, "known": lesson.remembered}
    return found | {part: ask(toy, taught.model) for part, ask in asked.items()}


def shares(answers: dict) -> dict:
    return {name: round(statistics.mean(hits), 3) for name, hits in answers.items()}


def interval(hits, draws=4000) -> list[float]:
    """95 % of the shares that as many questions, drawn from these with replacement, would give."""
    luck = random.Random(0)
    means = sorted(statistics.mean(luck.choices(hits, k=len(hits))) for _ in range(draws))
    return [round(means[int(draws * 0.025)], 3), round(means[int(draws * 0.975)], 3)]


def pooled(runs, row, part, name) -> list[bool]:
    return [hit for run in runs if run["row"] == row and part in run for hit in run[part][name]]


def summary(runs) -> dict:
    """Shares over all seeds with their intervals, and whether collages keep up with single pictures."""
    means = {}
    for row in ROWS:
        parts = {part: answers for run in runs if run["row"] == row for part, answers in run.items() if isinstance(answers, dict)}
        told = {(part, name): pooled(runs, row, part, name) for part, answers in parts.items() for name in answers}
        means[row] = {f"{part}: {name}": [round(statistics.mean(hits), 3), *interval(hits)] for (part, name), hits in told.items()}
    verdicts = {row: keeps_up(runs, row) for row in (COLLAGES, MIXED)}
    return {"share, and its 95 % interval": {row: found for row, found in means.items() if found}, "claim": {"text": CLAIM, "holds": verdicts}}


def keeps_up(runs, row) -> bool | None:
    """None while a row is missing."""
    single, pairs = pooled(runs, ALONE, "exam", "star"), pooled(runs, row, "exam", "star")
    return statistics.mean(pairs) >= interval(single)[0] if single and pairs else None


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seeds", type=int, nargs="+", default=[1])
    asked.add_argument("--steps", type=int, default=400)
    asked.add_argument("--rounds", type=int, nargs="*", default=[1000], help="steps of what the model is shown first; none: the toy model as it is")
    asked.add_argument("--base", type=pathlib.Path, help="a folder that keeps what the model is shown first")
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
            toy = sampling.load(world.build(folder / "toy_world.safetensors"))
        toy.clip = lesson.ShortClip(toy.clip)
        base = made_ready(toy, asked.base or folder, folder, asked.rounds)
        print("base", base, flush=True)
        for seed in asked.seeds:
            for row in asked.rows:
                runs.append(measured(toy, row, seed, asked.steps, folder))
                print({k: shares(v) if isinstance(v, dict) else v for k, v in runs[-1].items()}, flush=True)
                setup = {"date": f"{datetime.date.today()}", "python": platform.python_version(), "torch": torch.__version__,
                         "frames per step": lesson.BATCH, "base": {"rounds": asked.rounds, "rank": RANK, **base}}
                if asked.json:  # after every row, so that a run cut short leaves what it measured
                    pathlib.Path(asked.json).write_text(json.dumps({**setup, **summary(runs), "runs": [tidy(run) for run in runs]}, indent=1) + "\n")
    print(json.dumps(summary(runs), indent=1))


def tidy(run) -> dict:
    """Answers as a line of 0 and 1, a question each."""
    return {part: {name: "".join("01"[hit] for hit in hits) for name, hits in answers.items()} if isinstance(answers, dict) else answers
            for part, answers in run.items()}


if __name__ == "__main__":
    main()
