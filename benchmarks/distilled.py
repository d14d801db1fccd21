"""A LoRA on a few-step model, on the toy world's distilled transformer: how much of the new shape is learnt, and how much
of the four-step quality is kept, for each way of training; and what Transfer LoRA moves from the base.

.venv/bin/python benchmarks/distilled.py                              # about twenty minutes of one core
.venv/bin/python benchmarks/distilled.py plain drift --shapes star    # some of it; the file keeps what it has of the others
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import tempfile
import time

import pack

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-30-distilled.json"
BASE, TRANSFER = "no LoRA", "transfer"


def run_row(row, shape, seed, toys, folder) -> dict:
    """{steps: marks} of one way of training."""
    from trainyard.tests.toy import distilled

    toy = toys[distilled.world.DISTILLED]
    if row == BASE:
        return {"0": distilled.exam(toy, None, shape)}
    if row == TRANSFER:
        return run_transfer(toys["transformer"], toy, folder, shape, seed)
    assistant = distilled.make_assistant(toy, folder) if row == "assistant" else None
    start = time.process_time()
    loras = distilled.learn(toy, folder, shape, seed, row, assistant=assistant)
    seconds = round(time.process_time() - start, 1)
    return {str(step): distilled.exam(toy, lora, shape) for step, lora in loras.items()} | {"seconds": seconds}


def run_transfer(base, toy, folder, shape, seed) -> dict:
    """The base's LoRA as it is (0 steps), and after so many steps of transfer."""
    from trainyard.tests.toy import distilled, sampling

    lora = distilled.learn(base, folder, shape, seed, "plain", checked=())[distilled.STEPS]
    found = {"on the base": distilled.exam(base, lora, shape, sampling.STEPS, sampling.CFG)}
    found["0"] = distilled.exam(toy, lora, shape)
    for steps in (30, distilled.STEPS // 5):
        found[str(steps)] = distilled.exam(toy, distilled.move(base, toy, lora, shape, seed, steps), shape)
    return found


def main():
    rows = [BASE, "plain", "assistant", "contrastive", "drift", "contrastive and drift", TRANSFER]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(rows)} (default: all)")
    parser.add_argument("--shapes", nargs="*", default=["star", "ring"], help="(default: %(default)s)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2], help="(default: %(default)s)")
    parser.add_argument(
        "--json", type=pathlib.Path, default=RESULTS, help="where figures are kept (default: %(default)s)"
    )
    asked = parser.parse_args()
    pack.boot()
    import torch
    from trainyard.tests.toy import distilled

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if unknown := sorted(set(asked.rows) - set(rows)):
        parser.error(f"there is no row {', '.join(unknown)}; there are {', '.join(rows)}")
    chosen = asked.rows or rows
    toys = {
        name: distilled.load(name) for name in ("distilled", "transformer") if name == "distilled" or TRANSFER in chosen
    }
    with tempfile.TemporaryDirectory() as work:
        for shape, seed, row in itertools.product(asked.shapes, asked.seeds, chosen):
            found = run_row(row, shape, seed, toys, pathlib.Path(work) / str(seed))
            print(f"{row}, {shape}, seed {seed}: {found}", flush=True)
            known = json.loads(asked.json.read_text()) if asked.json.exists() else {}
            known.setdefault(row, {})[f"{shape} {seed}"] = found
            asked.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
