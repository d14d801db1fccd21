"""ComfyUI's own Train LoRA, two peers and ours on the same model, data, rank and dtype, in one run: a table with
ratios, and claims.

    .venv/bin/python benchmarks/train_lora.py --shapes sd15 sdxl sd3 flux --json benchmarks/results/today.json
    nice .venv/bin/python benchmarks/train_lora.py --shapes sd15 sdxl --sizes meta mid --peers --process-time --timed 5
    # peers/ against ours .venv/bin/python benchmarks/train_lora.py --shapes sdxl --real        # real size with random
    weights, on a CUDA GPU

Sizes: tiny and mid run both trainers on this machine; meta runs their parts at real size without memory (FLOPs and
bytes only).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
FAMILIES = ("sd15", "sdxl", "sd3", "flux")
OURS, PER_BLOCK = "ours, our targets", "ours, our targets, per block"
PEERS = ("kohya-style", "diffusers script")


@dataclasses.dataclass(frozen=True)
class Claim:
    """`value(rows)` is a ratio of figures of the named rows; it holds when it is at most, or at least, its limit."""

    text: str
    value: object
    rows: tuple[str, str]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def limit(self) -> str:
        return f"<= {self.at_most}" if self.at_most is not None else f">= {self.at_least}"

    def holds(self, value) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= self.at_least


def claim(what, figure, above, below, **limit) -> Claim:
    return Claim(
        f"{what}: {above} / {below}", lambda rows: figure(rows[above]) / figure(rows[below]), (above, below), **limit
    )


def flops(row):
    return row["flops"]


def peak(row):
    """Bytes: the CUDA allocator's where there is one."""
    return row["device_peak"] or row["peak"]


CLAIMS = (  # "all layers": the layers that core trains
    claim("FLOPs", flops, "ours, our targets", "bare model", at_most=1.05),
    claim("FLOPs", flops, "ours, all layers", "bare model", at_most=1.05),
    claim("FLOPs", flops, "core, no checkpointing", "ours, all layers", at_least=1.25),
    claim("FLOPs", flops, "core, default", "ours, all layers", at_least=1.8),
    claim("FLOPs", flops, "core, default", "ours, our targets", at_least=1.8),
    claim("peak bytes", peak, "ours, all layers, per block", "core, default", at_most=0.5),
)


# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(plan, meta=False, only=None, peers=False) -> dict:
    """name -> row. Where core's trainer fails, its row carries the error, and the figures of a second try with our
    out-of-place blocks."""
    from trainyard.benchmarks.contenders import contenders

    rows = {}
    for name, contender in contenders(plan, meta).items():
        if (not only or name in only) and (not peers or name.startswith((*PEERS, OURS))):
            rows[name] = core_row(contender, plan) if name.startswith("core") else row(*contender(plan))
            gc.collect()
    return rows


def row(cost, trained) -> dict:
    return {**dataclasses.asdict(cost), "trained": trained}


def core_row(contender, plan) -> dict:
    try:
        return row(*contender(plan))
    except RuntimeError as error:
        failure = said(error)
    try:
        return {**row(*contender(plan, mended=True)), "alone": failure}
    except RuntimeError as error:
        return {"error": said(error)}


def said(error) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def table(family, size, plan, rows) -> dict:
    return {"family": family, "size": size, "about": plan.shape.about, "rank": plan.shape.rank, "batch": plan.batch,
            "dtype": str(plan.dtype).removeprefix("torch."), "core_adapter_dtype": plan.core_dtype, "rows": rows,
            "claims": [] if size == "tiny" else judged(rows)}  # fmt: skip


def judged(rows) -> list[dict]:
    """The claims whose rows were measured. `ceiling`: what an adapter that costs nothing would reach against core."""
    result = []
    for claim in CLAIMS:
        if all("flops" in rows.get(name, {}) for name in claim.rows):
            value = claim.value(rows)
            verdict = {"claim": claim.text, "value": round(value, 4), "limit": claim.limit, "holds": claim.holds(value)}
            free = claim.at_least is not None and "bare model" in rows
            result.append(
                verdict
                | ({"ceiling": round(flops(rows[claim.rows[0]]) / flops(rows["bare model"]), 4)} if free else {})
            )
    return result


def machine(cuda) -> dict:
    import comfyui_version
    import torch

    return {
        "date": datetime.date.today().isoformat(), "cpu": find_cpu_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None, "torch": torch.__version__, "comfyui": comfyui_version.__version__,
        "python": platform.python_version(), "commit": find_commit(),
    }  # fmt: skip


def find_cpu_name(about=pathlib.Path("/proc/cpuinfo")) -> str:
    """The model; where that file is missing or names none, as on ARM, what Python calls it."""
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def find_commit() -> str:
    """The short hash of the pack's commit; nothing where git or its history is not there."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


# -- showing -----------------------------------------------------------------------------------------------------------


def shown(result) -> str:
    rows = result["rows"]
    head = (
        f"{result['family']} {result['size']}: {result['about']}; rank {result['rank']}, batch {result['batch']}, "
        f"{result['dtype']}"
    )
    lines = [
        head,
        f"{'':38}{'GFLOP':>10}{'/bare':>7}{'saved MiB':>11}{'peak MiB':>10}{'/core':>7}{'s median':>10}{'s min':>8}{'reads':>7}{'trained':>10}",
    ]
    lines += [row_line(name, row, rows) for name, row in rows.items()]
    lines += [f"  core alone fails ({name}): {row['alone']}" for name, row in rows.items() if "alone" in row]
    for claim in result["claims"]:
        ceiling = (
            f"; an adapter that costs nothing would reach {claim['ceiling']:.3f}"
            if "ceiling" in claim and not claim["holds"]
            else ""
        )
        lines.append(
            f"  {'PASS' if claim['holds'] else 'MISSED':7}{claim['claim']}: {claim['value']:.3f} "
            f"({claim['limit']}{ceiling})"
        )
    return "\n".join(lines)


def markdown(results) -> str:
    """One line per peer: FLOPs and peak bytes at real size, least seconds at a tenth of the width, each as a ratio to
    ours: those with checkpoints to ours per block."""
    families = list(dict.fromkeys(result["family"] for result in results))
    rows = {(result["family"], result["size"]): result["rows"] for result in results}
    names = list(dict.fromkeys(name for found in rows.values() for name in found if name.startswith(PEERS)))
    head = [
        "| | " + " | ".join(f"{family} FLOPs | peak | seconds" for family in families) + " |",
        "|---" * (1 + 3 * len(families)) + "|",
    ]
    cells = lambda name, family: [to_ours(rows.get((family, size), {}), name, figure) for size, figure in FIGURES]
    return "\n".join(
        head
        + [f"| {name} | " + " | ".join(c for family in families for c in cells(name, family)) + " |" for name in names]
    )


FIGURES = (("meta", flops), ("meta", peak), ("mid", lambda row: min(row["seconds"], default=0)))


def to_ours(rows, name, figure) -> str:
    own = rows.get(PER_BLOCK if name.endswith("checkpointing") else OURS)
    return f"{figure(rows[name]) / figure(own):.3f}" if own and name in rows and figure(own) else "-"


def row_line(name, row, rows) -> str:
    if "error" in row:
        return f"{name:38}{row['error']}"
    seconds = row["seconds"]
    clock = f"{statistics.median(seconds):10.3f}{min(seconds):8.3f}" if seconds else f"{'-':>10}{'-':>8}"
    of_bare, of_core = (
        against(rows, reference, figure, row) for reference, figure in (("bare model", flops), ("core, default", peak))
    )
    mark = "*" if "alone" in row else ""
    return (f"{name + mark:38}{row['flops'] / 1e9:10.2f}{of_bare:>7}{row['saved'] / 2**20:11.1f}{peak(row) / 2**20:10.1f}{of_core:>7}"
            f"{clock}{row['reads']:7}{row['trained']:10}")  # fmt: skip


def against(rows, reference, figure, row) -> str:
    return f"{figure(row) / figure(rows[reference]):.2f}" if "flops" in rows.get(reference, {}) else "-"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "mid", "meta"), default=["tiny", "mid", "meta"])
    parser.add_argument("--real", action="store_true", help="real size with random weights; needs a CUDA GPU")
    parser.add_argument("--timed", type=int, default=3, help="steps that are timed, after two that carry the meters")
    parser.add_argument(
        "--batch", type=int, default=1, help="core predicts every latent under every caption of a batch"
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows of the table")
    parser.add_argument(
        "--peers", action="store_true", help="only the peers' rows and ours with the same targets, and their ratios"
    )
    parser.add_argument(
        "--process-time",
        action="store_true",
        help="seconds that this process was at work, on a machine that has other work too",
    )
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def main():
    asked = arguments()
    import torch

    cuda = asked.real and torch.cuda.is_available()
    import pack

    pack.boot(cuda)
    from trainyard.benchmarks.contenders import Plan
    from trainyard.benchmarks.shapes import SHAPES

    common = dict(
        batch=asked.batch, timed=asked.timed, clock=time.process_time if asked.process_time else time.perf_counter
    )
    big = dict(dtype=torch.bfloat16, core_dtype="bf16", device="cuda" if cuda else "meta")
    results = []
    for family in asked.shapes:
        for size in ["real"] if cuda else asked.sizes:
            shape = SHAPES[family, "real" if size == "meta" else size]
            plan = Plan(shape, **common, **({} if size in ("tiny", "mid") else big))
            results.append(table(family, size, plan, measured(plan, size == "meta", asked.rows, asked.peers)))
            print(shown(results[-1]), end="\n\n", flush=True)
            if asked.json:  # after every table, so that a run cut short leaves what it measured
                about = {
                    "machine": machine(cuda),
                    "seconds": "of the process" if asked.process_time else "of the clock",
                }
                pathlib.Path(asked.json).write_text(json.dumps({**about, "tables": results}, indent=1) + "\n")
    if asked.peers:
        print(markdown(results), end="\n\n")
    if asked.real and not cuda:
        print("--real: no CUDA GPU here. Seconds, device memory and device syncs at real size were NOT measured.")
    print(
        "* core's row needs our out-of-place blocks to run at all. Bytes: storages born in the step (meta: sizes that "
        "a GPU would allocate)."
    )


if __name__ == "__main__":
    main()
