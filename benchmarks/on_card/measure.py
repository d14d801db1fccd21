"""One case on one card, in a process of its own: who trains what, and what a step of it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform

import comfy.cli_args as cli_args
import comfy.memory_management
import comfy.model_management as mm
import comfy_extras.nodes_train as core_nodes
import psutil
import torch
from trainyard.benchmarks import contenders, shapes
from trainyard.benchmarks.on_card import check, flops, models
from trainyard.benchmarks.on_card.cases import CARD, CHECK, CORE, LECO, OURS, SCORE, Case
from trainyard.benchmarks.on_card.laps import CardLaps, follow_loop
from trainyard.benchmarks.train_lora import machine
from trainyard.nodes import host
from trainyard.nodes.scores.latents import NoiseSchedule
from trainyard.nodes.train import planner, run
from trainyard.tests.card import rehearsal
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.scores.networks import ScorerSettings
from trainyard.trainers.scores.objective import ScoreSettings
from trainyard.trainers.scores.training import train_score_model
from trainyard.trainers.settings import PointSettings

PRETEND_STEPS = 1  # where seconds mean nothing
TIMED_STEPS = {OURS: 10, CORE: 10, LECO: 24, SCORE: 20}  # LECO's steps differ: one in six samples a trajectory
MEASURED, NO_ROOM, FAILED = "measured", "does not fit", "failed"
RATED_IMAGES = 64


def measure_case(case: Case, card, deadline: float) -> dict:
    """The row of a case. What does not fit is a result; every other error is one, too, with the place where it was."""
    try:
        with card.plugged_in():
            return {"status": MEASURED, **MEASURES[case.kind](case, card, deadline)}
    except models.DoesNotFit as error:
        return {"status": NO_ROOM, "why": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"status": NO_ROOM, "why": describe_out_of_memory(error)}
        return {"status": FAILED, "why": rehearsal.describe_error(error)}


def is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, host.memory.OutOfMemory) or host.memory.is_out_of_memory_error(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_out_of_memory(error: BaseException) -> str:
    """What the allocator said, and under which checkpointing."""
    plan = f" with checkpointing {error.plan!r}" if isinstance(error, host.memory.OutOfMemory) else ""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"out of memory{plan}: {str(error).splitlines()[0][:300]}"


def measure_card(case: Case, card, deadline) -> dict:
    about = card.describe()
    computed = models.find_compute_dtype(card.device)
    about["computes_in"] = models.name_dtype(computed)
    if card.is_real:
        about["matmul_flops"] = card.measure_matmul_rate(computed)
        about["copy_bytes_per_s"] = card.measure_copy_rate()
    return {"card": about}


def describe_machine() -> dict:
    """What the figures depend on beside the card. `flags`: arguments of ComfyUI that are not its defaults."""
    defaults = vars(cli_args.parser.parse_args([]))
    chosen = {name: value for name, value in vars(cli_args.args).items() if name != "base_directory" and value}
    changed = {name: str(value) for name, value in chosen.items() if value != defaults.get(name)}
    return {
        **machine(cuda=False),
        "os": platform.platform(),
        "memory": psutil.virtual_memory().total,
        "free_memory": psutil.virtual_memory().available,
        "dynamic_vram": comfy.memory_management.aimdo_enabled,
        "vram_state": mm.vram_state.name,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "flags": changed,
    }


def measure_check(case: Case, card, deadline) -> dict:
    names = case.model.split() if case.is_tiny else [case.model]
    return {"checks": check.check_models(names, card)}


# -- trainers ----------------------------------------------------------------------------------------------------------


def measure_ours(case: Case, card, deadline) -> dict:
    """What the Train node runs, from its checks to the file, with checkpointing left open."""
    shape, weights, model = make_model(case, card)
    useful = flops.count_useful_flops(shape, case.batch)
    laps = PlannedLaps(card, count_steps(case, card), deadline, model)
    with follow_planner(laps), follow_loop(laps), torch.inference_mode():
        with contextlib.suppress(contenders.Finished):
            run.run_training(make_job(case, model, laps.steps))
    return {**describe_steps(laps, weights), **laps.about, **count_work(case, laps, useful)}


def make_job(case: Case, model, steps: int):
    """That of tests/card/rehearsal.py; LECO with the node's own defaults."""
    scene = rehearsal.Scene(
        family=case.model,
        size="tiny" if case.is_tiny else "published",
        method="leco" if case.kind == LECO else "lora",
        batch=case.batch,
        steps=steps,
        monitored=False,
    )
    job = rehearsal.make_job(scene, model, f"gpu {case.name}")
    if case.kind != LECO:
        return job
    task = dataclasses.replace(job.task, points=PointSettings())
    object.__setattr__(task, "scene", scene)
    return dataclasses.replace(job, task=task)


class PlannedLaps(CardLaps):
    """Laps of a Train node's run: `about` tells what the planner decided, and where the weights are when the first step
    begins. `forwards`: model calls by kind, when the first timed step begins."""

    def __init__(self, card, timed: int, deadline: float, model):
        super().__init__(card, timed, deadline)
        self.model, self.about, self.student, self.forwards = model, {}, None, {}

    def begin(self):
        super().begin()
        parameters = list(self.model.model.parameters())
        self.about["weights"] = sum(p.nbytes for p in parameters)
        self.about["weights_on_card"] = sum(p.nbytes for p in parameters if p.device.type == self.card.device.type)

    def clock(self):
        if not self.cost.seconds and self.student:
            self.forwards = dict(self.student.forward_counts)
        return super().clock()

    def forwards_per_step(self) -> dict[str, float]:
        now = self.student.forward_counts if self.student else {}
        return {kind: (count - self.forwards[kind]) / len(self.cost.seconds) for kind, count in now.items()}


@contextlib.contextmanager
def follow_planner(laps: PlannedLaps):
    plan = planner.plan_run

    def plan_run(session, *rest):
        planned = plan(session, *rest)
        laps.student = getattr(planned.built, "student", None)
        laps.about |= {
            "checkpointing": session.blocks.plan,
            "microbatch": planned.job.run.batch,
            "accumulate": planned.job.optimizing.accumulate,
            "computed": models.name_dtype(session.denoiser.model.get_dtype_inference()),
            "forecast": planned.forecast.peak_bytes if planned.forecast else None,
        }
        return planned

    planner.plan_run = plan_run
    try:
        yield
    finally:
        planner.plan_run = plan


def count_work(case: Case, laps: PlannedLaps, useful: tuple[int, int]) -> dict:
    """Useful FLOPs of a step; for LECO those of its model calls in the mean of the timed steps."""
    forward, step = useful
    if case.kind != LECO:
        return {"useful_flops": step}
    calls = laps.forwards_per_step()
    return {
        "useful_flops": calls["student"] * step + (calls["rollout"] + calls["frozen"]) * forward,
        "forwards": calls,
    }


def measure_core(case: Case, card, deadline) -> dict:
    """ComfyUI's own node, with its defaults. The copy of the model that it trains on is the model itself here."""
    shape, weights, model = make_model(case, card, inference=False)
    model.cached_patcher_init = (lambda disable_dynamic=False: model, ())
    plan = contenders.Plan(shape, case.batch, dtype=weights.computed, core_dtype=core_adapter_dtype(weights))
    laps = CardLaps(card, count_steps(case, card), deadline)
    inputs = contenders.core_inputs(plan, model, *shapes.dataset(shape, case.batch), laps.steps, case.depth, False)
    with contenders.core_laps(laps), contextlib.suppress(contenders.Finished):
        core_nodes.TrainLoraNode.execute(**inputs)
    checkpointing = f"depth {case.depth}"
    return {**describe_steps(laps, weights), "checkpointing": checkpointing, "weights": model.model_size()}


def core_adapter_dtype(weights) -> str:
    """The node's default, but for fp16, where only fp32 has its losses scaled."""
    return "fp32" if weights.computed == torch.float16 else "bf16"


def measure_score(case: Case, card, deadline) -> dict:
    """The first member of a score model on latents, as Train Score Model trains it."""
    weights = models.WeightChoice(torch.bfloat16, models.find_compute_dtype(card.device))
    model = models.make_model(models.find_shape(case), weights, values=False)  # it is asked for its noise levels alone
    laps = CardLaps(card, count_steps(case, card), deadline, count_flops=True)
    settings = ScoreSettings(steps=laps.steps + 1, members=2, batch=case.batch, check_every=10 * laps.steps, patience=0)
    with host.context.enable_gradients(), follow_loop(laps), contextlib.suppress(contenders.Finished):
        train_score_model(rated_dataset(case), NoiseSchedule(model), ScorerSettings(), settings, device=card.device)
    return {**describe_steps(laps), "checkpointing": "off", "useful_flops": laps.cost.flops}


def rated_dataset(case: Case) -> EncodedDataset:
    latent, conditioning = shapes.dataset(models.find_shape(case), RATED_IMAGES)
    data = EncodedDataset.from_core([latent], [conditioning])
    data.items = [dataclasses.replace(item, score=float(number % 7)) for number, item in enumerate(data.items)]
    return data


def count_steps(case: Case, card) -> int:
    """Of those that are timed, at most."""
    return TIMED_STEPS[case.kind] if card.is_real else PRETEND_STEPS


def make_model(case: Case, card, inference: bool = True):
    """(shape, weights, MODEL)."""
    shape = models.find_shape(case)
    memory = psutil.virtual_memory().available if card.is_real else math.inf  # there, no page is ever touched
    computed = models.find_compute_dtype(card.device)
    weights = models.choose_weights(models.count_weights(shape), computed, mm.get_total_memory(card.device), memory)
    return shape, weights, models.make_model(shape, weights, values=card.is_real, inference=inference)


def describe_steps(laps: CardLaps, weights=None) -> dict:
    """What every trainer's row holds. Bytes; `step_bytes` are those beside what lay on the card before."""
    laps.close()
    if not laps.cost.seconds:
        raise RuntimeError("The run ended before a step was timed.")
    allocated, reserved = laps.peak_bytes
    return {
        "seconds": laps.cost.seconds,
        "peak_allocated": allocated,
        "peak_reserved": reserved,
        "step_bytes": allocated - laps.bytes_before,
        "up": laps.crossed.up,
        "down": laps.crossed.down,
        "stored": models.name_dtype(weights.stored) if weights else None,
        "note": weights.why if weights else "",
    }


MEASURES = {
    CARD: measure_card,
    CHECK: measure_check,
    OURS: measure_ours,
    LECO: measure_ours,
    CORE: measure_core,
    SCORE: measure_score,
}
