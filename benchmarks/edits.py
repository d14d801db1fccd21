"""An edit model of the toy world learns an edit that it does not know from pairs: each ground from three seeds.

.venv/bin/python benchmarks/edits.py                   # about twenty minutes of one core
.venv/bin/python benchmarks/edits.py black --seeds 1   # some of it; the file keeps what it has of the others
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

import pack

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-30-edits.json"


def run_edit(toy, ground, seed) -> dict:
    from trainyard.tests.toy import edits

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        lora = edits.learn(toy, folder, ground, seed)
    seconds = round(time.process_time() - start, 1)
    return {"base": edits.exam(toy, None, ground), **edits.exam(toy, lora, ground), "seconds of one core": seconds}


def format_edits(found) -> str:
    lines = [
        "| put it on a ... ground | runs | error without the LoRA | with it: mean, worst image of any run | change where "
        "nothing was to change: mean, worst run | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for ground, runs in found.items():
        rows, mean = list(runs.values()), lambda values: sum(values) / len(values)
        of = lambda name, rows=rows: [row[name] for row in rows]
        held = of("change where nothing was to change")
        lines.append(
            f"| {ground} | {len(rows)} | {mean([row['base']['error, mean'] for row in rows]):.2f} | "
            f"{mean(of('error, mean')):.3f}, {max(of('error, worst')):.3f} | {mean(held):.3f}, {max(held):.3f} | "
            f"{mean(of('seconds of one core')):.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grounds", nargs="*", help="white, grey or black (default: all)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3], help="(default: %(default)s)")
    parser.add_argument(
        "--json", type=pathlib.Path, default=RESULTS, help="where figures are kept (default: %(default)s)"
    )
    asked = parser.parse_args()
    pack.boot()
    import torch
    from trainyard.tests.toy import edits

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if unknown := sorted(set(asked.grounds) - set(edits.GROUNDS)):
        parser.error(f"there is no ground {', '.join(unknown)}; there are {', '.join(edits.GROUNDS)}")
    with torch.inference_mode():
        toy = edits.load(pack.toy_world())
        for ground in asked.grounds or edits.GROUNDS:
            for seed in asked.seeds:
                made = run_edit(toy, ground, seed)
                print(f"{ground}, seed {seed}: {made}", flush=True)
                known = json.loads(asked.json.read_text()) if asked.json.exists() else {}
                known.setdefault(ground, {})[str(seed)] = made
                asked.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(format_edits(json.loads(asked.json.read_text())))


if __name__ == "__main__":
    main()
