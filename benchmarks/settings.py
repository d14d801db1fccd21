"""What each setting of Train LoRA does to a step: FLOPs, memory beside the weights, and seconds, as ratios to the
defaults.

    nice .venv/bin/python benchmarks/settings.py --json benchmarks/results/settings.json     # about 10 minutes on a
    quiet core

`real` is SD1.5 at 512 px and SDXL at 1024 px in bf16 on meta tensors: FLOPs and bytes of a real step, without memory,
and without seconds. `mid` is the same models at a tenth of the width with weights, in fp32 on this machine: the loop
behind the node, with the seconds of one CPU core (of the process, so that other work on the machine counts little).
Memory is what is born in a step at its worst moment, plus adapters, optimizer state and average; the model's weights
are not in it, and no more what waits in the CPU's memory. A row that cannot run (a package that is not installed, a
setting that needs values) says why.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import pathlib
import time
from functools import partial
from unittest import mock

from ..trainers.rng import make_generator

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """What differs from the defaults."""

    adapter: dict = dataclasses.field(default_factory=dict)
    optimizing: dict = dataclasses.field(default_factory=dict)
    noise: dict = dataclasses.field(default_factory=dict)
    checkpointing: str = "off"
    batch: int = 1
    rank: float = 1.0  # times the shape's own: 16 at real size
    full: bool = False  # the model in fp32
    masked: bool = False
    prior: bool = False
    compiled: bool = False
    exam: bool = False  # a measurement of the validation loss in place of a step


DEFAULT = "defaults (LoRA rank 16, AdamW, batch 1)"
ROWS = {
    DEFAULT: Row(),
    "rank 4": Row(rank=0.25),
    "rank 64": Row(rank=4),
    "targets attention": Row(adapter={"targets": "attention"}),
    "targets all linear, conv": Row(adapter={"targets": "all linear", "conv": True}),
    "algorithm DoRA": Row(adapter={"algorithm": "DoRA"}),
    "algorithm LoHa": Row(adapter={"algorithm": "LoHa"}),
    "algorithm LoKr": Row(adapter={"algorithm": "LoKr"}),
    "dropout 0.1": Row(adapter={"dropout": 0.1}),
    "rank_dropout 0.1": Row(adapter={"rank_dropout": 0.1}),
    "module_dropout 0.1": Row(adapter={"module_dropout": 0.1}),
    "ema 0.99": Row(optimizing={"ema": 0.99}),
    "ema 0.99, ema_on_cpu": Row(optimizing={"ema": 0.99, "ema_on_cpu": True}),
    **{f"optimizer {name}": Row(optimizing={"optimizer": name}) for name in
       ("AdamW8bit", "Prodigy", "ScheduleFreeAdamW", "Lion", "CAME", "Adafactor", "RAdam", "Adan", "SGD")},
    "accumulate 4": Row(optimizing={"accumulate": 4}),
    "checkpointing per block": Row(checkpointing="per block"),
    "checkpointing per block + CPU": Row(checkpointing="per block + CPU"),
    "batch 2": Row(batch=2),
    "batch 4": Row(batch=4),
    "batch 4, checkpointing per block": Row(batch=4, checkpointing="per block"),
    "the model in fp32": Row(full=True),
    "masks": Row(masked=True),
    "prior preservation by prompts": Row(prior=True),
    "loss Huber, noise_offset, pyramid_levels "
    "6": Row(noise={"loss": "Huber", "noise_offset": 0.05, "pyramid_levels": 6}),
    "compile_blocks": Row(compiled=True),
    "one validation: 8 pictures, 8 levels": Row(exam=True),
}  # fmt: skip
NEEDS_VALUES = ("dropout", "rank_dropout", "module_dropout")


@dataclasses.dataclass
class Cost:
    """flops and bytes of a step; `held` between two steps: adapters, optimizer, average on the device."""

    flops: int
    peak: int
    held: int
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def memory(self) -> int:
        return self.peak + self.held


def adapter_of(row, shape):
    from trainyard.trainers.settings import AdapterSettings

    rank = max(1, round(shape.rank * row.rank))
    return AdapterSettings(**{"rank": rank, "conv_rank": max(1, shape.rank // 2), **row.adapter})


# -- real size, without values -----------------------------------------------------------------------------------------


def real(row: Row, family: str) -> Cost:
    import torch
    from trainyard.benchmarks import contenders, shapes
    from trainyard.nodes import host
    from trainyard.trainers.memory.checkpointing import checkpoint_blocks
    from trainyard.trainers.memory.plan import PLAN_OFF, PLAN_PER_BLOCK_CPU
    from trainyard.trainers.optimizers import make_optimizer
    from trainyard.trainers.settings import OptimizerSettings

    refuse_on_meta(row)
    shape = shapes.SHAPES[family, "real"]
    plan = contenders.Plan(shape, row.batch, dtype=torch.float32 if row.full else torch.bfloat16, device="meta")
    it = contenders.Meta(plan, to_input=False)
    adapters = contenders.Adapters(it.network, adapter_of(row, shape)).to("meta")
    params = list(adapters.parameters())
    optimizing = OptimizerSettings(**row.optimizing)
    optimizer = make_optimizer([{"params": params, "lr": 1e-4}], optimizing)
    classes = host.context.find_block_classes(it.network) if row.checkpointing != PLAN_OFF else ()
    with (
        host.out_of_place.disable_inplace_updates(it.network),
        checkpoint_blocks(classes, adapters),
        adapters.attached(),
    ):
        cost = it.measured(plan, lambda: steps(it, optimizer, params, optimizing))
    away = (
        row.checkpointing == PLAN_PER_BLOCK_CPU
    )  # a copy of a tensor without values has none either: what the planner would say
    peak = counted(plan, row).peak_bytes(PLAN_PER_BLOCK_CPU) - 2 * size(params) if away else cost.peak
    return Cost(cost.flops, peak, size(params) + size(state_of(optimizer)))


def refuse_on_meta(row):
    unfit = [name for name in NEEDS_VALUES if row.adapter.get(name)]
    optimizer = row.optimizing.get("optimizer", "AdamW")
    if unfit or row.masked or row.prior or row.noise or row.compiled or row.exam or row.optimizing.get("ema_on_cpu"):
        raise ValueError("needs values: measured at mid size only")
    if optimizer not in ("AdamW", "SGD", "RAdam"):
        raise ValueError("reads its own numbers: measured at mid size only")


def counted(plan, row):
    """trainers.memory.plan.StepMemory, from which the bytes of activations that wait in the CPU's memory are told."""
    import torch
    from trainyard.benchmarks import contenders
    from trainyard.nodes import host
    from trainyard.trainers.memory.checkpointing import ActivationCounter, CheckpointPolicy, checkpoint_blocks

    it = contenders.Meta(plan, to_input=False)
    adapters, blocks = contenders.Adapters(it.network, adapter_of(row, plan.shape)).to("meta"), CheckpointPolicy()
    blocks.counter = ActivationCounter([*it.network.parameters(), *adapters.parameters()], torch.device("meta"))
    with (
        host.out_of_place.disable_inplace_updates(it.network),
        checkpoint_blocks(host.context.find_block_classes(it.network), adapters, blocks),
        adapters.attached(),
    ):
        with host.context.set_training_flag(), host.context.use_differentiable_rope(), blocks.counter:
            it.loss()
    return blocks.counter.step_memory(size(adapters.parameters()))


def steps(it, optimizer, params, optimizing):
    """As trainers.loop does them."""
    import torch

    for _ in range(optimizing.accumulate):
        (it.loss().mean() / optimizing.accumulate).backward()
    torch.nn.utils.clip_grad_norm_(params, optimizing.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def state_of(optimizer) -> list:
    """Its tensors, and those of an average that lies beside them."""
    from trainyard.benchmarks.meters import tensors

    found = tensors(getattr(optimizer, "optimizer", optimizer).state_dict()["state"])
    return [*found, *getattr(optimizer, "ema_params", [])]


# -- mid size, the real loop -------------------------------------------------------------------------------------------


def mid(row: Row, family: str, timed: int) -> Cost:
    from trainyard.benchmarks import contenders, shapes
    from trainyard.nodes import host
    from trainyard.trainers import loop
    from trainyard.trainers.methods.lora import LoraTraining
    from trainyard.trainers.settings import NoiseSettings, OptimizerSettings, RunSettings

    if row.full:
        raise ValueError("the model is in fp32 at mid size anyway")
    shape = shapes.SHAPES[family, "mid"]
    plan = contenders.Plan(shape, row.batch, timed)
    model, said = shapes.make(shape, plan.dtype), []
    laps, optimizing = own_time(model, timed), OptimizerSettings(**row.optimizing)
    made = []
    original = loop.make_optimizer
    remember = lambda *args: made.append(original(*args)) or made[-1]
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(
            host.session.open_training_session(
                model,
                adapter_of(row, shape),
                checkpointing=row.checkpointing,
                compiling=said.append if row.compiled else None,
            )
        )
        stack.enter_context(contextlib.closing(laps))
        stack.enter_context(mock.patch.object(loop, "make_optimizer", remember))
        method = LoraTraining(
            session.denoiser,
            session.adapters,
            data_of(row, plan),
            NoiseSettings(**row.noise),
            session.family.density,
            row.batch,
            prior=prior_of(row, plan),
        )
        if row.compiled:
            method.loss(make_generator(0)).mean().backward()  # programs are made
        if row.exam:
            return examined(session, method, laps, plan)
        run = RunSettings(steps=laps.steps + 1, batch=row.batch)
        with contextlib.suppress(contenders.Finished):
            loop.train(Stepped(method, laps, optimizing.accumulate), run, optimizing, interval=math.inf)
        if said:
            raise ValueError(said[0])
        on_device = state_of(made[0])[: None if not row.optimizing.get("ema_on_cpu") else -len(made[0].ema_params)]
        return Cost(
            laps.cost.flops, laps.cost.peak, size(session.adapters.parameters()) + size(on_device), laps.cost.seconds
        )


def own_time(model, timed):
    """Laps whose seconds are those that this process itself was at work: others on the machine do not count."""
    from trainyard.benchmarks.meters import Laps

    laps = Laps(model.model.diffusion_model.parameters(), timed)
    laps.now = time.process_time
    return laps


@dataclasses.dataclass
class Stepped:
    """A method whose optimizer steps, of several batches each, begin a new lap until there is none left."""

    method: object
    laps: object
    batches: int
    asked: int = 0

    def parameters(self):
        return self.method.parameters()

    def loss(self, rng):
        from trainyard.benchmarks.contenders import Finished

        if self.asked % self.batches == 0 and not self.laps():
            raise Finished
        self.asked += 1
        return self.method.loss(rng)


def examined(session, method, laps, plan) -> Cost:
    """A measurement of 8 images at 8 levels; the laps are measurements."""
    from trainyard.benchmarks import contenders
    from trainyard.trainers.monitor.validation import ImageValidationLoss, pick_validation_images

    data = contenders.encoded(dataclasses.replace(plan, batch=8))
    exam = ImageValidationLoss(session.denoiser, data, pick_validation_images(data, 8), method.density, batch=1)
    while laps():
        exam.losses()
    return Cost(laps.cost.flops, laps.cost.peak, 0, laps.cost.seconds)


def data_of(row, plan):
    import torch
    from trainyard.benchmarks import contenders

    data = contenders.encoded(plan)
    if row.masked:
        masks = {f"mask {i}": {"mask": torch.ones(1, *item.shape[-2:])} for i, item in enumerate(data.items)}
        data.items = [dataclasses.replace(item, mask=key) for item, key in zip(data.items, masks, strict=True)]
        data.store = With(data.store, masks)
    return data


@dataclasses.dataclass
class With:
    """A store with a few things more."""

    store: object
    more: dict

    def load(self, key):
        return self.more[key] if key in self.more else self.store.load(key)


def prior_of(row, plan):
    from trainyard.benchmarks import shapes
    from trainyard.trainers.methods.prior import PriorData, PriorSettings

    if not row.prior:
        return None
    _, conditioning = shapes.dataset(plan.shape, 1)
    ((tensor, extras),) = conditioning
    return PriorData(PriorSettings(class_prompt="a class"), {"a class": {"cross_attn": tensor, **extras}}, None)


# -- the table ---------------------------------------------------------------------------------------------------------


def measured(ask) -> dict:
    try:
        cost = ask()
        return {**dataclasses.asdict(cost), "memory": cost.memory}
    except (ValueError, RuntimeError, NotImplementedError, ImportError) as error:
        return {"error": str(error).splitlines()[0][:160]}
    finally:
        gc.collect()


def figures(cost, base) -> list[str]:
    """FLOPs, memory and seconds, against those of the defaults."""
    if "error" in cost:
        return ["-", "-", "-"]
    ratio = lambda name: f"{cost[name] / base[name]:.2f}" if base.get(name) else "-"
    clock = lambda row: min(row["seconds"], default=0)
    return [ratio("flops"), ratio("memory"), f"{clock(cost) / clock(base):.2f}" if clock(cost) and clock(base) else "-"]


def markdown(tables) -> str:
    """One line per setting: FLOPs and memory at real size, seconds at mid size, each as a ratio to the defaults."""
    families = list(tables)
    head = (
        "| setting | "
        + " | ".join(f"{f} FLOPs | {f} memory | {f} mid memory | {f} mid seconds" for f in families)
        + " |"
    )
    lines = [head, "|---" * (1 + 4 * len(families)) + "|"]
    lines += [
        f"| {name} | " + " | ".join(cell for sizes in tables.values() for cell in cells(name, sizes)) + " |"
        for name in ROWS
    ]
    return "\n".join(lines)


def cells(name, sizes) -> list[str]:
    big, small = (
        figures(sizes[where].get(name, {"error": "not measured"}), sizes[where].get(DEFAULT, {}))
        for where in ("real", "mid")
    )
    return [big[0] if big[0] != "-" else f"{small[0]}*" if small[0] != "-" else "-", big[1], small[1], small[2]]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=("sd15", "sdxl"), default=["sd15", "sdxl"])
    parser.add_argument("--sizes", nargs="+", choices=("mid", "real"), default=["real", "mid"])
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=list(ROWS),
        metavar="NAME",
        help="only these rows; the defaults come along",
    )
    parser.add_argument("--timed", type=int, default=3, help="steps that are timed, after two that carry the meters")
    parser.add_argument("--json", help="file for the figures; rows that it already holds are kept")
    return parser.parse_args()


def main():
    import pack

    asked = arguments()
    pack.boot()
    import train_lora

    file = pathlib.Path(asked.json) if asked.json else None
    tables = json.loads(file.read_text())["tables"] if file and file.exists() else {}
    for family in asked.shapes:
        sizes = tables.setdefault(family, {"real": {}, "mid": {}})
        for where in asked.sizes:
            for name in dict.fromkeys([DEFAULT, *asked.rows]):
                ask = (
                    partial(real, ROWS[name], family)
                    if where == "real"
                    else partial(mid, ROWS[name], family, asked.timed)
                )
                cost = sizes[where][name] = measured(ask)
                print(
                    f"{family} {where} {name}: {cost.get('error') or ' '.join(figures(cost, sizes[where][DEFAULT]))}",
                    flush=True,
                )
                if file:
                    file.write_text(
                        json.dumps({"machine": train_lora.machine(False), "tables": tables}, indent=1) + "\n"
                    )
    print(
        "\n"
        + markdown(tables)
        + "\n\nFLOPs with * are those of the mid size. Ratios to the defaults; a dash: see the file for why."
    )


if __name__ == "__main__":
    main()
