"""LECO, sliders, replacement and ADDifT measured in pixels on the toy world, and the effect of LECO over forwards
spent, ours and the original's, each over several concepts or pairs, and seeds.

.venv/bin/python benchmarks/differences.py                       # every kind but erase, about an hour on one quiet core
.venv/bin/python benchmarks/differences.py "text slider"         # some; the file keeps what it has of the others
.venv/bin/python benchmarks/differences.py curve                 # effect over forwards, against
benchmarks/peers/leco_original.py
.venv/bin/python benchmarks/differences.py --show                # the tables of what is in the file
.venv/bin/python benchmarks/differences.py --all                 # every colour and shape erased, three seeds each
.venv/bin/python benchmarks/differences.py --all blue square --seeds 1 2    # some of them
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import time

import pack

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-30-differences.json"
ALL_RESULTS = ROOT / "benchmarks" / "results" / "2026-11-30-erased.json"
CASES = {
    "enhance": (("red", 1), ("green", 2), ("purple", 3)),
    "replace": (("square", "circle", 1), ("triangle", "cross", 2), ("circle", "square", 3)),
    "text slider": ((1,), (2,), (3,)),
    "image slider": ((0, 1), (5, 2), (10, 3)),
    "difference": ((0, 1), (5, 2), (10, 3)),
    "curve": (("red", 1), ("blue", 2), ("purple", 3)),
}  # kind -> what `make_lesson` takes, and the seed, of each run
MARKS = {
    "enhance": (
        "of the colour, base",
        "of the colour, after",
        "shape and size kept",
        "named colours unchanged in shape, size and colour",
    ),
    "replace": (
        "new shape, base, when asked",
        "new shape, after",
        "old shape, after",
        "colour and size kept",
        "others unchanged in shape, size and colour",
    ),
    **dict.fromkeys(("text slider", "image slider", "difference"), ("Spearman of mean area", "colour and shape kept")),
}  # what the table shows
LOWER_IS_BETTER = ("old shape, after",)
LEVELS = (0.5, 0.8, 0.9)
CURVES = ("ours", "original")


# -- one run of a kind -------------------------------------------------------------------------------------------------


def make_lesson(kind, *about):
    from trainyard.tests.toy import differences

    makers = {
        "enhance": differences.enhance_lesson,
        "replace": differences.replace_lesson,
        "text slider": lambda: differences.LESSONS["text slider"],
        "image slider": differences.image_slider_lesson,
        "difference": differences.difference_lesson,
    }
    return makers[kind](*about)


def figures(toy, kind, *about, seed) -> dict:
    """Settings, cost and marks of one lesson."""
    from trainyard.tests.toy.differences import learn

    lesson = make_lesson(kind, *about).but(seed=seed)
    taught = learn(toy, lesson)
    start = time.process_time()
    marks = lesson.exam(toy, taught.lora)
    steps = lesson.run.steps
    spent = taught.snapshots[-1].forward_counts
    return {
        "settings": settings_of(lesson),
        "seconds of one core": round(taught.seconds, 1),
        "seconds of the exam": round(time.process_time() - start, 1),
        "forwards per update": {key: round(count / steps, 2) for key, count in spent.items()}
        | {"all": round(sum(spent.values()) / steps, 2)},
        "planned": taught.planned and {key: round(count / steps, 2) for key, count in taught.planned.items()},
        "loss, first and last tenth": [
            round(mean(taught.losses[: steps // 10]), 4),
            round(mean(taught.losses[-steps // 10 :]), 4),
        ],
        "marks": marks,
    }


def settings_of(lesson) -> dict:
    plain = dataclasses.asdict(dataclasses.replace(lesson, make=None, exam=None))
    return {key: value for key, value in plain.items() if value is not None}


def mean(values) -> float:
    return sum(values) / len(values)


# -- effect over forwards ----------------------------------------------------------------------------------------------


def curves(toy, concept, seed) -> dict:
    """Erasing with ours and with the original loop: the same prompts, learning rate, rank, batch and schedule."""
    found = {name: curve(toy, name, concept, seed) for name in CURVES}
    ratios = {}
    for level in LEVELS:
        costs = {name: cost_of(points, level) for name, points in found.items()}
        known = all(costs.values())
        ratios[f"{level:.0%}"] = {
            **costs,
            "original / ours": round(costs["original"] / costs["ours"], 2) if known else None,
        }
    return {"curves": found, "forwards at effect": ratios}


def curve(toy, name, concept, seed) -> list[dict]:
    """[{updates, forwards, seconds, erased, others kept}]"""
    from trainyard.benchmarks.peers.leco_original import Original
    from trainyard.tests.toy import differences

    lesson = differences.curve_lesson(Original if name == "original" else None, concept).but(seed=seed)
    taught = differences.learn(toy, lesson)
    rows = [dict(updates=0, forwards=0, **lesson.exam(toy, None))]
    for snapshot in taught.snapshots:
        rows.append(dict(updates=snapshot.step, forwards=snapshot.forwards, **lesson.exam(toy, snapshot.lora)))
        print(f"  {name}: {rows[-1]}", flush=True)
    return rows


def cost_of(rows, level) -> float | None:
    """Forwards at which the share of erased first reaches a level, by straight lines between the checkpoints; None if
    it never does."""
    for before, after in zip(rows, rows[1:], strict=False):
        if after["erased"] >= level:
            part = (level - before["erased"]) / (after["erased"] - before["erased"])
            return round(before["forwards"] + part * (after["forwards"] - before["forwards"]), 1)
    return None


# -- every concept -----------------------------------------------------------------------------------------------------


def erase_concept(toy, concept, seed) -> dict:
    """Cost and marks of one concept erased from one seed, on 16 images of it and 16 others."""
    from trainyard.tests.toy.differences import OTHERS_KEPT, erase_lesson, learn

    lesson = erase_lesson(concept).but(seed=seed)
    taught = learn(toy, lesson)
    marks = lesson.exam(toy, taught.lora, count=16, steps=8)
    return {
        "erased": marks["erased"],
        "of": marks["of"],
        "others kept": marks[OTHERS_KEPT],
        "steps": len(taught.losses),
        "forwards": taught.snapshots[-1].forwards,
        "reached": taught.reached and round(taught.reached, 3),
    }


def format_concepts(found) -> str:
    """A table of {concept: {seed: what erase_concept gives}}: mean and worst over the seeds, and over all."""
    line = lambda name, runs: (
        f"| {name} | {len(runs)} | {spread(runs, 'erased')} | {spread(runs, 'others kept')} | "
        f"{mean([run['forwards'] for run in runs]):.0f} | {mean([run['reached'] or 0 for run in runs]):.2f} |"
    )
    rows = {concept: list(runs.values()) for concept, runs in found.items()}
    head = [
        "| erased | runs | erased: mean, worst | others kept: mean, worst | forwards | reached |",
        "|---|---|---|---|---|---|",
    ]
    every = [run for runs in rows.values() for run in runs]
    return "\n".join([*head, *(line(*row) for row in rows.items()), line("all", every)])


def spread(runs, name) -> str:
    values = [run[name] for run in runs]
    return f"{mean(values):.2f}, {min(values):.2f}"


def erase_concepts(toy, concepts, seeds, path):
    for concept in concepts:
        for seed in seeds:
            print(f"{concept}, seed {seed}: {(marks := erase_concept(toy, concept, seed))}", flush=True)
            known = read_results(path)
            keep(path, concept, {**known.get(concept, {}), str(seed): marks})
    print(format_concepts(read_results(path)))


# -- tables and the file -----------------------------------------------------------------------------------------------


def format_kinds(found) -> str:
    """A table of {kind: {run: what `figures` gives}}: mean and worst of each mark over the runs."""
    lines = ["| kind | runs | mark | mean | worst | seconds | forwards |", "|---|---|---|---|---|---|---|"]
    for kind, runs in found.items():
        for number, name in enumerate(MARKS.get(kind, ())):
            values = [run["marks"][name] for run in runs.values()]
            worst = max(values) if name in LOWER_IS_BETTER else min(values)
            cost = [mean([run["seconds of one core"] for run in runs.values()]),
                    mean([run["forwards per update"]["all"] for run in runs.values()])]  # fmt: skip
            head = (kind, str(len(runs)), f"{cost[0]:.0f}", f"{cost[1]:.1f}") if not number else ("", "", "", "")
            lines.append(
                f"| {head[0]} | {head[1]} | {name} | {mean(values):.2f} | {worst:.2f} | {head[2]} | {head[3]} |"
            )
    return "\n".join(lines)


def format_curves(runs) -> str:
    """A table of {run: what `curves` gives}. A level that a run never reached is a dash."""
    show = lambda value: "-" if value is None else f"{value:g}"
    lines = ["| run | share erased | original | ours | original / ours |", "|---|---|---|---|---|"]
    for about, run in runs.items():
        for level, costs in run["forwards at effect"].items():
            cells = [show(costs[name]) for name in ("original", "ours", "original / ours")]
            lines.append(f"| {about} | {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show_tables(path):
    found = read_results(path)
    print(format_kinds({kind: runs for kind, runs in found.items() if kind in MARKS}))
    if "curve" in found:
        print("\n" + format_curves(found["curve"]))


def name_run(about) -> str:
    *what, seed = about
    return ", ".join([*map(str, what), f"seed {seed}"])


def run_kinds(toy, kinds, path):
    for kind in kinds:
        for about in CASES[kind]:
            *what, seed = about
            found = curves(toy, *what, seed) if kind == "curve" else figures(toy, kind, *what, seed=seed)
            print(f"{kind}, {name_run(about)}: {found.get('marks') or found['forwards at effect']}", flush=True)
            keep(path, kind, {**read_results(path).get(kind, {}), name_run(about): found})
    show_tables(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--all", nargs="*", metavar="CONCEPT", help="erase these colours and shapes, or every one")
    parser.add_argument("--seeds", nargs="*", type=int, default=[4, 5, 6], help="of --all (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="only the tables of what is in the file")
    parser.add_argument(
        "--json", type=pathlib.Path, help=f"where figures are kept (default: {RESULTS.parent}, by date)"
    )
    asked = parser.parse_args()
    if unknown := [kind for kind in asked.kinds if kind not in CASES]:
        parser.error(f"there is no kind {', '.join(unknown)}; there are {', '.join(CASES)}")
    if asked.show:
        return show_tables(asked.json or RESULTS)
    pack.boot()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with torch.inference_mode():
        toy = pack.toy_world()
        if asked.all is not None:
            from trainyard.tests.toy.differences import COLOURS, SHAPES

            concepts = asked.all or (*COLOURS, *SHAPES)
            return erase_concepts(toy, concepts, asked.seeds, asked.json or ALL_RESULTS)
        run_kinds(toy, asked.kinds or CASES, asked.json or RESULTS)


def keep(path, kind, found):
    path.write_text(json.dumps({**read_results(path), kind: found}, indent=1) + "\n", encoding="utf-8")


def read_results(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    main()
