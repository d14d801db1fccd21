"""Every plan of keeping activations against ComfyUI's own Train LoRA, in one run: FLOPs, bytes, seconds, and how far
the forecast is off.

    .venv/bin/python benchmarks/plans.py --shapes sd15 sdxl --json benchmarks/results/plans.json
    .venv/bin/python benchmarks/plans.py --shapes sdxl --real         # real size with random weights, on a CUDA GPU

Our targets, AdamW. `forecast` is what the planner says before the run, from a forward pass that keeps nothing; on a CPU
the copies that wait beside the device are not counted as the device's. meta: real size without memory, where plans with
copies have no bytes but the forecast's. `away` in the file: bytes of weights that `offloaded blocks` takes off the
device beside that.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import pathlib
import statistics
import sys
from functools import partial

from ..trainers.rng import make_generator

ROOT = pathlib.Path(__file__).resolve().parents[1]


def rows_of(plan, meta):
    """name -> row, core's first."""
    from trainyard.benchmarks import contenders
    from trainyard.benchmarks.train_lora import core_row, row
    from trainyard.trainers.memory.plan import CHECKPOINTING_PLANS, PLAN_OFFLOADED, PLAN_PER_BLOCK

    core = contenders.meta_core if meta else contenders.core
    ours = contenders.meta_ours if meta else contenders.ours
    targets = contenders.DEFAULT_TARGETS
    rows = {}
    for name, depth in (("core, default", 1), ("core, no checkpointing", None)):
        rows[name] = core_row(partial(core, targets=contenders.EVERY_LAYER, depth=depth), plan)
        gc.collect()
    count = counted(plan, meta)
    moments = 2 * count.adapter_bytes  # of the optimizer: born in the first step, and the ledger keeps the second
    for name in CHECKPOINTING_PLANS:
        if meta and name in CHECKPOINTING_PLANS[2:]:  # a copy of a tensor without values has no values either
            rows[name] = {
                **rows[PLAN_PER_BLOCK],
                "peak": count.peak_bytes(name) - moments,
                "saved": 0,
                "counted": False,
            }
        else:
            with beside_the_device():
                rows[name] = row(*ours(plan, targets=targets, checkpointing=name))
        rows[name] |= {
            "forecast": count.peak_bytes(name) - moments,
            "away": count.weights if name == PLAN_OFFLOADED else 0,
        }
        gc.collect()
    return rows


def counted(plan, meta):
    """trainers.memory.plan.StepMemory of one step."""
    import torch
    from trainyard.benchmarks import contenders, shapes
    from trainyard.nodes import host
    from trainyard.nodes.train.planner import add_block_weights
    from trainyard.trainers.memory.checkpointing import ActivationCounter, CheckpointPolicy, checkpoint_blocks
    from trainyard.trainers.methods.lora import LoraTraining

    adapter = plan.adapter(contenders.DEFAULT_TARGETS)
    if meta:
        it = contenders.Meta(plan, to_input=False)
        adapters, blocks = contenders.Adapters(it.network, adapter).to("meta"), CheckpointPolicy()
        blocks.counter = ActivationCounter([*it.network.parameters(), *adapters.parameters()], torch.device("meta"))
        with (
            host.out_of_place.disable_inplace_updates(it.network),
            checkpoint_blocks(host.context.find_block_classes(it.network), adapters, blocks),
            adapters.attached(),
        ):
            with host.context.set_training_flag(), host.context.use_differentiable_rope(), blocks.counter:
                it.loss()
        return add_block_weights(blocks.counter.step_memory(bytes_of(adapters)), it.network, torch.device("meta"))
    with host.session.open_training_session(shapes.make(plan.shape, plan.dtype), adapter) as session:
        method = LoraTraining(
            session.denoiser,
            session.adapters,
            contenders.encoded(plan),
            density=session.family.density,
            batch=plan.batch,
        )
        session.blocks.counter = tally = ActivationCounter(
            [*session.denoiser.model.parameters(), *method.parameters()], session.denoiser.device
        )
        with tally:
            method.loss(make_generator(0))
        return add_block_weights(
            tally.step_memory(bytes_of(session.adapters)),
            session.denoiser.model.diffusion_model,
            session.denoiser.device,
        )


def bytes_of(module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@contextlib.contextmanager
def beside_the_device():
    """Copies that wait in the CPU's memory are not in the ledger of the device, also where the device is the CPU."""
    from torch.utils._python_dispatch import _disable_current_modes
    from trainyard.trainers.memory.checkpointing import OffloadedTensor

    original = OffloadedTensor.__init__

    def unseen(self, tensor):
        with _disable_current_modes():
            original(self, tensor)

    OffloadedTensor.__init__ = unseen
    try:
        yield
    finally:
        OffloadedTensor.__init__ = original


def shown(family, size, plan, rows) -> str:
    head = (
        f"{family} {size}: {plan.shape.about}; rank {plan.shape.rank}, batch {plan.batch}, "
        f"{str(plan.dtype).removeprefix('torch.')}"
    )
    lines = [
        head,
        f"{'':28}{'GFLOP':>11}{'/core':>7}{'peak MiB':>10}{'/core':>7}{'forecast':>10}{'off by':>8}{'s median':>10}{'/core':>7}",
    ]
    return "\n".join([*lines, *(line(name, row, rows["core, default"]) for name, row in rows.items())])


def line(name, row, core) -> str:
    from trainyard.benchmarks.train_lora import flops, peak

    if "error" in row:
        return f"{name:28}{row['error']}"
    seconds = statistics.median(row["seconds"]) if row["seconds"] else None
    against = lambda figure: f"{figure(row) / figure(core):.2f}" if "flops" in core else "-"
    slower = f"{seconds / statistics.median(core['seconds']):.2f}" if seconds and core.get("seconds") else "-"
    told = row.get("forecast")
    off = f"{told / peak(row) - 1:+.0%}" if told and row.get("counted", True) else "-"
    return (f"{name + ('*' if 'alone' in row else ''):28}{flops(row) / 1e9:11.2f}{against(flops):>7}{peak(row) / 2**20:10.1f}{against(peak):>7}"
            f"{f'{told / 2**20:.1f}' if told else '-':>10}{off:>8}{f'{seconds:.3f}' if seconds else '-':>10}{slower:>7}")  # fmt: skip


def arguments(families):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=families, default=list(families))
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "mid", "meta"), default=["mid", "meta"])
    parser.add_argument("--real", action="store_true", help="real size with random weights; needs a CUDA GPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--timed", type=int, default=3)
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def main():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import pack
    import train_lora

    asked = arguments(train_lora.FAMILIES)
    import torch

    cuda = asked.real and torch.cuda.is_available()
    pack.boot(cuda)
    from trainyard.benchmarks.contenders import Plan
    from trainyard.benchmarks.shapes import SHAPES

    tables = []
    for family in asked.shapes:
        for size in ["real"] if cuda else asked.sizes:
            shape, small = SHAPES[family, "real" if size == "meta" else size], size in ("tiny", "mid")
            more = {} if small else dict(dtype=torch.bfloat16, core_dtype="bf16", device="cuda" if cuda else "meta")
            plan = Plan(shape, batch=asked.batch, timed=asked.timed, **more)
            rows = rows_of(plan, size == "meta")
            tables.append(
                {
                    "family": family,
                    "size": size,
                    "about": shape.about,
                    "rank": shape.rank,
                    "batch": asked.batch,
                    "rows": rows,
                }
            )
            print(shown(family, size, plan, rows), end="\n\n", flush=True)
            if asked.json:
                pathlib.Path(asked.json).write_text(
                    json.dumps({"machine": train_lora.machine(cuda), "tables": tables}, indent=1) + "\n"
                )
    if asked.real and not cuda:
        print("--real: no CUDA GPU here. Seconds, device memory and transfers at real size were NOT measured.")


if __name__ == "__main__":
    main()
