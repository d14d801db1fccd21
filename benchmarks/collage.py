"""Does a LoRA learn a new shape from collages as well as from single pictures? On the toy world, at equal pixels seen.

    .venv/bin/python benchmarks/collage.py --seeds 1 2 3 --json benchmarks/results/collage.json      # 3 minutes per row and seed

Every row trains for the same steps on as many frames of 64 x 64 px, so on as many pixels, made of the same 48 stars and 48 known shapes.
The exam: 36 prompts for a single star on seeds that no training saw, measured by geometry. `halves`: frames asked for as
"left: ...; right: ...". A star in either half counts: what learnt from pairs draws pairs. `unprompted`: frames from the empty prompt.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = ("stars alone", "stars and known, alone", "collages", "collages + 30 % alone", "collages, empty captions")
CLAIM = 0.05  # collages may draw the star in this much fewer of the pictures


def boot():
    """The pack as `trainyard`, and ComfyUI on the CPU."""
    if "trainyard" not in sys.modules:
        package = types.ModuleType("trainyard")
        package.__path__ = [str(ROOT)]
        sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]  # our `nodes` would hide ComfyUI's
        sys.modules["trainyard"] = package
    from trainyard.tests.comfy import boot as comfy

    comfy.boot()


def dataset_of(row: str, stars, known, folder):
    """What a row is trained on."""
    from trainyard.tests.toy import collage_lesson as lesson
    from trainyard.trainers.data.records import Dataset

    if row == "stars alone":
        return stars
    if row == "stars and known, alone":
        return Dataset((*stars, *known))
    mix = 0.3 if "30 %" in row else 0.0
    return lesson.pairs(stars, known, folder, "empty" if "empty" in row else "positional", mix)


def measured(toy, row: str, seed: int, steps: int, folder) -> dict:
    from trainyard.tests.toy import collage_lesson as lesson

    stars, known = lesson.pictures(folder / f"pictures{seed}", seed=seed)
    data = dataset_of(row, stars, known, folder / f"pictures{seed}")
    begin, empty = time.perf_counter(), "empty" in row
    model, losses = lesson.taught(toy, data, folder, steps=steps, seed=seed, empty=empty)
    found = {"row": row, "seed": seed, "seconds": round(time.perf_counter() - begin, 1), "loss": round(statistics.mean(losses[-50:]), 4)}
    found["exam"] = None if empty else lesson.examined(toy, model)
    found["halves"] = lesson.sides(toy, model) if "collages" in row and not empty else None
    found["unprompted"] = lesson.unprompted(toy, model) if empty else None
    return found


def summary(results) -> dict:
    """Means over the seeds, and whether collages keep up with single pictures."""
    def mean(row, part, name):
        values = [r[part][name] for r in results if r["row"] == row and r[part]]
        return round(statistics.mean(values), 3) if values else None

    means = {row: {"exam": {name: mean(row, "exam", name) for name in ("star", "one star", "colour", "ground")},
                   "halves": {name: mean(row, "halves", name) for name in ("star", "known")},
                   "unprompted": {name: mean(row, "unprompted", name) for name in ("star", "star and known")}} for row in ROWS}
    single, collages = means["stars alone"]["exam"]["star"], means["collages"]["exam"]["star"]
    holds = None if None in (single, collages) else collages >= single - CLAIM
    claim = f"collages draw the star at most {CLAIM} less often than single pictures of it do"
    return {"means": means, "claim": {"text": claim, "holds": holds}}


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    asked.add_argument("--steps", type=int, default=1200)
    asked.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    asked.add_argument("--json")
    asked = asked.parse_args()
    boot()
    import torch
    from trainyard.tests.toy import collage_lesson as lesson
    from trainyard.tests.toy import sampling, world

    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        with torch.inference_mode():
            toy = sampling.load(world.build(folder / "toy_world.safetensors"))
        base = {"exam": lesson.examined(toy, toy.model), "unprompted": lesson.unprompted(toy, toy.model)}
        print("base", base, flush=True)
        for seed in asked.seeds:
            for row in asked.rows:
                results.append(measured(toy, row, seed, asked.steps, folder))
                print(results[-1], flush=True)
                found = {"date": f"{datetime.date.today()}", "python": platform.python_version(), "torch": torch.__version__,
                         "steps": asked.steps, "frames per step": lesson.BATCH, "base": base, **summary(results), "runs": results}
                if asked.json:  # after every row, so that a run cut short leaves what it measured
                    pathlib.Path(asked.json).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
