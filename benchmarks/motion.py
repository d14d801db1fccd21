"""A video model of the toy world learns a motion that it cannot draw from clips of two frames: each way from three seeds.

.venv/bin/python benchmarks/motion.py                   # about half an hour of one core
.venv/bin/python benchmarks/motion.py right --seeds 1   # some of it; the file keeps what it has of the others
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
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-30-motion.json"


def run_motion(toy, way, seed) -> dict:
    from trainyard.tests.toy import motion

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        lora = motion.learn(toy, folder, way, seed)
    seconds = round(time.process_time() - start, 1)
    return {"base": motion.exam(toy, None, way), **motion.exam(toy, lora, way), "seconds of one core": seconds}


def format_motion(found) -> str:
    lines = [
        "| moves | runs | way gone without the LoRA | with it: mean, least | miss at the end: mean, worst run, worst clip "
        "| seconds |",
        "|---|---|---|---|---|---|",
    ]
    for way, runs in found.items():
        rows, mean = list(runs.values()), lambda values: sum(values) / len(values)
        of = lambda name, rows=rows: [row[name] for row in rows]
        gone, miss = of("way gone, share"), of("miss, mean px")
        lines.append(
            f"| {way} | {len(rows)} | {mean([row['base']['way gone, share'] for row in rows]):.2f} | "
            f"{mean(gone):.2f}, {min(gone):.2f} | {mean(miss):.1f}, {max(miss):.1f}, {max(of('miss, worst px')):.1f} px | "
            f"{mean(of('seconds of one core')):.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", help="right, down, left or up (default: all)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3], help="(default: %(default)s)")
    parser.add_argument(
        "--json", type=pathlib.Path, default=RESULTS, help="where figures are kept (default: %(default)s)"
    )
    asked = parser.parse_args()
    pack.boot()
    import torch
    from trainyard.tests.toy import motion

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if unknown := sorted(set(asked.ways) - set(motion.WAYS)):
        parser.error(f"there is no way {', '.join(unknown)}; there are {', '.join(motion.WAYS)}")
    with torch.inference_mode():
        toy = motion.load(pack.toy_world())
        for way in asked.ways or motion.WAYS:
            for seed in asked.seeds:
                made = run_motion(toy, way, seed)
                print(f"{way}, seed {seed}: {made}", flush=True)
                known = json.loads(asked.json.read_text()) if asked.json.exists() else {}
                known.setdefault(way, {})[str(seed)] = made
                asked.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(format_motion(json.loads(asked.json.read_text())))


if __name__ == "__main__":
    main()
