"""What fits on which card: every family at published size, trained for two steps on cards that are not there.

    .venv/bin/python benchmarks/card.py                                  # all rows: an hour or two of one core
    .venv/bin/python benchmarks/card.py --models sdxl flux --cards 12 24
    .venv/bin/python benchmarks/card.py --show                           # the table of the rows that are there

A LoRA of rank 16 on all layers of the defaults, batch 1, AdamW, weights in bf16, checkpointing auto unless --plan says
another. Sizes, dtypes, placement and traffic are real, since ComfyUI's own loader and this pack's own run are at work;
numbers are not, and seconds, kernel workspaces and gaps between the allocator's pieces are missing (tests/card/).
CONTEXT_GIB of each card are left to the driver. Rows are kept in the file as they are made, and not made again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pretend-card.json"
CARDS = (8, 12, 16, 24, 80)  # GiB
CONTEXT_GIB = 0.5  # of a card are the driver's and the desktop's
MODELS = ("sd15", "sdxl", "sd3", "flux", "chroma", "zimage", "lumina2", "qwen", "flux2", "klein4b", "klein9b", "auraflow", "anima",
          "hunyuan_video", "wan_1.3b", "wan_14b", "wan_5b")  # fmt: skip
GIB = 2**30


def row_key(model, card, plan, dtype) -> str:
    return f"{model}, {card} GiB, {plan}, {dtype}"


def read_rows(path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def rehearse_row(model, card, plan, dtype) -> dict:
    """tests/card/rehearsal.py: Rehearsal, of a process of its own."""
    scene = dict(
        family=model, gib=card - CONTEXT_GIB, plan=plan, dtype=dtype, size="published", monitored=False, steps=2
    )
    command = [sys.executable, str(ROOT / "tests" / "card" / "rehearsal.py"), json.dumps(scene)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[0]) if lines else {"scene": scene, "error": f"the process died: {done.stderr[-1000:]}"}


def format_table(rows: dict) -> str:
    lines = [
        "| model | weights, GiB | card, GiB | checkpointing | weights on it, GiB | peak, GiB | step beside the weights, GiB | forecast | up in a step, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(format_row(row) for row in rows.values())])


def format_row(row: dict) -> str:
    from trainyard.benchmarks.published import PUBLISHED

    scene = row["scene"]
    head = (
        f"| {PUBLISHED[scene['family']].about} | {row.get('weights', 0) / GIB:.1f} | {scene['gib'] + CONTEXT_GIB:.0f} |"
    )
    if row["error"]:
        what = "does not fit" if "OutOfMemory" in row["error"] else "fails"
        return f"{head} {what} | | | | | |"
    return (
        f"{head} {row['plan']} | {row['weights_on_card'] / GIB:.1f} | {row['card_peak'] / GIB:.1f} | {row['peak'] / GIB:.2f} | "
        f"{row['forecast'] / max(1, row['peak']) - 1:+.0%} | {row['up'] / GIB:.2f} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS), metavar="GIB")
    parser.add_argument("--plan", default="auto", help="a checkpointing mode")
    parser.add_argument("--dtype", default="bfloat16", help="that the weights are stored in")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="file for the rows")
    parser.add_argument("--show", action="store_true", help="print the table of the rows that are there")
    asked = parser.parse_args()
    rows = read_rows(asked.json)
    for model in asked.models if not asked.show else ():
        for card in asked.cards:
            key = row_key(model, card, asked.plan, asked.dtype)
            if key in rows:
                continue
            rows[key] = rehearse_row(model, card, asked.plan, asked.dtype)
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{key}: {rows[key]['error'] or rows[key]['plan']}", flush=True)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import pack

    pack.boot()
    print(format_table(rows))


if __name__ == "__main__":
    main()
