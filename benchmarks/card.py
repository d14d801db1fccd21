"""What fits on which card: every family at published size, trained for two steps on cards that are not there.

    .venv/bin/python benchmarks/card.py                                  # all rows: an hour or two of one core
    .venv/bin/python benchmarks/card.py --models sdxl flux --cards 12 24
    .venv/bin/python benchmarks/card.py --show                           # the tables in both READMEs, of the rows that are there

A LoRA of rank 16 on all layers of the defaults, batch 1, AdamW, weights in bf16, checkpointing auto unless --plan says
another. Sizes, dtypes, placement and traffic are real, since ComfyUI's own loader and this pack's own run are at work;
numbers are not, and seconds, kernel workspaces and gaps between the allocator's pieces are missing (tests/card/).
CONTEXT_GIB of each card are left to the driver. Rows are kept in the file as they are made, and not made again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
from collections import Counter

from card_tables import CARDS, CONTEXT_GIB, LORA

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pretend-card.json"
MODELS = ("sd15", "sdxl", "sd3", "flux", "chroma", "zimage", "lumina2", "qwen", "flux2", "klein4b", "klein9b", "auraflow", "anima",
          "hunyuan_video", "hunyuan_video_1.5", "sd35_medium", "sd35_large", "qwen_edit", "krea2", "ernie", "wan_1.3b", "wan_14b", "wan_5b")  # fmt: skip
MONITORED_CARD = 24  # GiB: on it a run also measures validation and draws a sample before, between and after the steps
METHODS = (LORA, "image slider", "difference", "leco", "leco-score", "score")


def row_key(model, card, plan, dtype, method) -> str:
    return ", ".join([model, f"{card} GiB", plan, dtype, *([method] if method != LORA else [])])


def read_rows(path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def make_scene(model, card, plan, dtype, method) -> dict:
    """tests/card/rehearsal.py: Scene."""
    return dict(
        family=model,
        gib=card - CONTEXT_GIB,
        plan=plan,
        dtype=dtype,
        size="published",
        monitored=method == LORA and card == MONITORED_CARD,
        steps=2,
        method=method,
    )


def rehearse_scenes(scenes: list[dict]):
    """tests/card/rehearsal.py: Rehearsal of each, as it is made, in one process. Where that dies, the last one has an
    error and there are fewer."""
    command = [sys.executable, str(ROOT / "tests" / "card" / "rehearsal.py"), *map(json.dumps, scenes)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT) as run,
    ):
        count = 0
        for line in run.stdout or ():
            if line.startswith("{"):
                count += 1
                yield json.loads(line)
        if count < len(scenes):
            log.seek(0)
            yield {"scene": scenes[count], "error": f"the process died: {log.read()[-1000:]}"}


def count_places(row: dict) -> dict:
    """The row with each of its lists of places in the code as "place x times", in place of one entry for each time."""
    places = {name: Counter(value) for name, value in row.items() if isinstance(value, list)}
    counted = {name: [f"{place} x {times}" for place, times in found.items()] for name, found in places.items()}
    return {**row, **counted}


def describe_making() -> dict[str, str]:
    """When a row was made, and on which commit."""
    commit = subprocess.check_output(["git", "rev-parse", "--short=9", "HEAD"], cwd=ROOT, text=True).strip()
    return {"date": datetime.date.today().isoformat(), "commit": commit}


def write_tables(rows: dict):
    import card_tables
    import pack

    pack.boot()
    from trainyard.benchmarks.published import PUBLISHED

    names = {model: shape.about for model, shape in PUBLISHED.items()}
    for path, text in card_tables.make_documents(rows, names).items():
        path.write_text(text, encoding="utf-8")
    print(card_tables.format_full_table(rows, names))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS), metavar="GIB")
    parser.add_argument("--plan", default="auto", help="a checkpointing mode")
    parser.add_argument("--dtype", default="bfloat16", help="that the weights are stored in")
    parser.add_argument("--method", default=LORA, choices=METHODS)
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="file for the rows")
    parser.add_argument(
        "--show", action="store_true", help="write the tables of the rows that are there into the READMEs"
    )
    asked = parser.parse_args()
    rows = read_rows(asked.json)
    for model in asked.models if not asked.show else ():
        subjects = {
            row_key(*(about := (model, card, asked.plan, asked.dtype, asked.method))): about for card in asked.cards
        }
        missing = {key: make_scene(*about) for key, about in subjects.items() if key not in rows}
        for key, row in zip(missing, rehearse_scenes(list(missing.values())) if missing else (), strict=False):
            rows[key] = count_places(row) | describe_making()
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{key}: {row['error'] or row['plan']}", flush=True)
    if asked.show:
        write_tables(rows)


if __name__ == "__main__":
    main()
