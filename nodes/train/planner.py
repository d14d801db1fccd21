"""Before a run: one step is counted and one is taken, to choose how activations are kept and to say what the run will
cost."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ...trainers.loop import fork_rng_state, load_method_state, method_state, step_rng
from ...trainers.memory.plan import (
    CHECKPOINTING_PLANS,
    PLAN_AUTO,
    PLAN_OFFLOADED,
    RunForecast,
    StepMemory,
    choose_checkpointing_plan,
    largest_fitting_batch,
    largest_fitting_microbatch,
    make_run_forecast,
    next_cheaper_plan,
)
from .. import host

if TYPE_CHECKING:
    from ..host.session import TrainingSession
    from .job import BuiltMethod, TrainingJob

CHECKPOINTING_TOOLTIP = (
    "How activations are stored for the backward pass. 'per block' needs much less memory and about half as much "
    "time again; 'per block + CPU' still less memory; 'offloaded blocks' the least, and the model's weights are "
    "transferred for every block. 'auto' measures a step and chooses; if nothing else fits, it splits the batch."
)
MIN_MEASURED_STEPS = 50  # runs of fewer steps are not measured first: they would be half done by then


def checkpointing_input(**more):
    return io.Combo.Input(
        "checkpointing",
        options=list(host.session.CHECKPOINTING_MODES),
        default=PLAN_AUTO,
        tooltip=CHECKPOINTING_TOOLTIP,
        **more,
    )


def retry_cheaper_input():
    """At the end of a node's inputs: it came after the first release."""
    return io.Boolean.Input(
        "retry_cheaper",
        default=False,
        optional=True,
        advanced=True,
        tooltip="If memory runs out during a run, continue from the last step with the next checkpointing mode "
        "that needs less memory. Happens at most once; the result is the same.",
    )


def compile_blocks_input():
    """At the end of a node's inputs, as above."""
    return io.Boolean.Input(
        "compile_blocks",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Compile the model's blocks with torch.compile: takes minutes at the start and often makes steps "
        "faster. If compiling is impossible, the node says so and trains without it.",
    )


@dataclass(frozen=True)
class BatchSizing:
    """What the planner may still decide about the batch."""

    is_open: bool = False  # it is left open, and the run has not begun
    can_split: bool = False  # what is asked for need not go through the model at once


FIXED_BATCH = BatchSizing()


def resolve_batch_size(job, folder):
    """(job, BatchSizing) with batch and accumulate as an earlier part of the run had them; a batch that is left open is
    one image until it is chosen."""
    resumed, left_open = folder.load_batch_sizes(), job.run.batch == 0
    batch = folder.batch_sizes.get("batch", job.run.batch or 1)
    accumulate = folder.batch_sizes.get("accumulate", job.optimizing.accumulate)
    sizing = FIXED_BATCH if resumed else BatchSizing(is_open=left_open, can_split=not left_open)
    return job.with_batch(batch, accumulate), sizing


@dataclass(frozen=True)
class RunPlan:
    """How a run goes on: the job with the batch that was chosen, the method built for it, and what is to be expected
    (None for short runs that leave nothing open)."""

    job: TrainingJob
    built: BuiltMethod
    forecast: RunForecast | None = None


@dataclass(frozen=True)
class StepProbe:
    """The model with a method built on it, of which one step is measured."""

    session: TrainingSession
    job: TrainingJob
    prompts: dict[str, dict]
    sizing: BatchSizing
    built: BuiltMethod

    def with_batch(self, batch: int) -> StepProbe:
        """The same with another batch; a batch that is split keeps its images a step."""
        job, before = self.job, self.job.run.batch
        accumulate = job.optimizing.accumulate * (before // batch if self.sizing.can_split else 1)
        job = job.with_batch(batch, accumulate)
        return replace(self, job=job, built=job.task.build(job, self.session, self.prompts))


def list_plans(session, checkpointing: str) -> tuple[str, ...]:
    """Plans that the run may have, as it was asked for."""
    return device_checkpointing_plans(session.denoiser.device) if checkpointing == PLAN_AUTO else (checkpointing,)


def plan_run(session, job, prompts, sizing: BatchSizing, checkpointing: str, plans: tuple[str, ...] = ()) -> RunPlan:
    """The plan is chosen of `plans` (all where none are given) where that is left open, and the batch, where it is left
    open or fits under no plan. Nothing else that the run depends on is changed: parameters, draw order and the RNG
    state of others are as before."""
    built = job.task.build(job, session, prompts)
    if not (checkpointing == PLAN_AUTO or sizing.is_open or job.run.steps >= MIN_MEASURED_STEPS):
        return RunPlan(job, built)
    probe = StepProbe(session, job, prompts, sizing, built)
    plans = plans or list_plans(session, checkpointing)
    measured = count_with_room(probe, plans if checkpointing == PLAN_AUTO else ())
    if measured is None:
        has_choice = next_cheaper_plan(session.blocks.plan, plans) is not None
        return run_trial_step(probe, None, plans) if has_choice else RunPlan(job, built)
    free = host.memory.available_device_memory(session)
    plan = session.blocks.plan = choose_checkpointing_plan(measured, free, plans)
    batch = choose_batch_size(measured, free, plan, probe)
    probe, measured = rebuild_with_batch(probe, measured, batch)
    if plan == PLAN_OFFLOADED and checkpointing == PLAN_AUTO:
        measured = offload_missing_weights(probe, measured)
    if plan != PLAN_OFFLOADED or checkpointing == PLAN_AUTO:
        measured = load_fitting_weights(probe, measured)
    return run_trial_step(probe, measured, plans)


def count_with_room(probe: StepProbe, plans: tuple[str, ...]) -> StepMemory | None:
    """count_step_memory; where not even a single block has room beside the weights, once they have left, if that is one
    of the plans to choose from."""
    session = probe.session
    try:
        return count_or_refuse(probe, session.blocks.plan)
    except host.memory.StepDoesNotFit:
        if PLAN_OFFLOADED not in plans:
            raise
    host.memory.release_cached_memory()
    host.memory.offload_weights(session)
    return count_or_refuse(probe, PLAN_OFFLOADED)


def count_or_refuse(probe: StepProbe, plan: str) -> StepMemory | None:
    """count_step_memory; raises StepDoesNotFit, which names this plan, where it has no room."""
    free = host.memory.available_device_memory(probe.session)
    try:
        return count_step_memory(probe)
    except Exception as error:
        if not host.memory.is_out_of_memory_error(error):
            raise
        raise refuse_step(probe, plan, free) from error


def refuse_step(probe: StepProbe, plan: str, free: int, measured: StepMemory | None = None):
    """The error for a step that has no room under the plan. `free`: bytes, before it."""
    need = measured.peak_bytes(plan) if measured else 0
    return host.memory.StepDoesNotFit(probe.job.run, plan, probe.session.denoiser.device, need, free)


def offload_missing_weights(probe: StepProbe, measured: StepMemory) -> StepMemory:
    """What a step takes once so many weights have left that it fits, or all of them. It is counted again, because
    layers outside the blocks keep what they fetch until backward."""
    session = probe.session
    while missing := measured.missing_bytes(PLAN_OFFLOADED, host.memory.available_device_memory(session)):
        if not host.memory.offload_weights(session, missing):
            break
        measured = count_offloaded_step(probe) or measured
    return measured


def load_fitting_weights(probe: StepProbe, measured: StepMemory) -> StepMemory:
    """What a step takes once the weights that have room beside it lie on the device. When the model was loaded, only
    the host's rough figure of a step was known, which can be several times too high."""
    session, plan = probe.session, probe.session.blocks.plan
    while host.session.load_fitting_weights(session, measured.least_free_bytes(plan)):
        again = count_offloaded_step(probe) if plan == PLAN_OFFLOADED else count_step_memory(probe)
        measured = again or measured
    return measured


def count_offloaded_step(probe: StepProbe) -> StepMemory | None:
    """count_step_memory where weights have left already: those that are fetched are counted."""
    measured = count_step_memory(probe)
    return measured and replace(measured, largest_block_weights=0)


def rebuild_with_batch(probe: StepProbe, measured: StepMemory, batch: int):
    """(probe, measured) with that batch."""
    before = probe.job.run.batch
    if batch == before:
        return probe, measured
    probe = probe.with_batch(batch)
    accumulated = probe.job.optimizing.accumulate > 1
    return probe, replace(measured.scaled(batch / before), has_accumulated_gradients=accumulated)


def choose_batch_size(measured: StepMemory, free: float, plan: str, probe: StepProbe) -> int:
    """The batch. One that is left open is as large as fits under the plan of a single image, where that makes a device
    busier. One that is asked for is split where no plan has room for it: it makes the same steps of other images, so it
    comes last."""
    job, sizing = probe.job, probe.sizing
    if sizing.is_open:
        is_busier = device_checkpointing_plans(probe.session.denoiser.device) == CHECKPOINTING_PLANS
        return largest_fitting_batch(measured, free, plan) if is_busier else 1
    if sizing.can_split and job.checkpointing == PLAN_AUTO and not measured.fits(plan, free):
        return largest_fitting_microbatch(measured, free, plan, job.run.batch)
    return job.run.batch


def device_checkpointing_plans(device) -> tuple[str, ...]:
    """Plans that make a difference on this device."""
    return CHECKPOINTING_PLANS if device.type != "cpu" else CHECKPOINTING_PLANS[:2]


@contextlib.contextmanager
def preserve_method_state(method):
    draws = method_state(method)
    try:
        with fork_rng_state(method.parameters()):
            yield
    finally:
        load_method_state(method, draws)
        for p in method.parameters():
            p.grad = None


def count_step_memory(probe: StepProbe) -> StepMemory | None:
    """What a step of the largest images would keep and take at most, found without keeping it; None for losses that
    look back by themselves. Raises what a device says that has no room for a single block."""
    from ...trainers.memory.checkpointing import ActivationCounter

    session, job, method = probe.session, probe.job, probe.built.method
    tally = session.blocks.counter = ActivationCounter(
        [*session.denoiser.model.parameters(), *method.parameters()], session.denoiser.device
    )
    session.denoiser.max_batch_numel = 0
    try:
        with preserve_method_state(method), tally:
            method.loss(step_rng(job.run.seed, 0))
    except Exception as error:
        if host.memory.is_out_of_memory_error(error):
            raise
        logging.info(
            "Trainyard: the need for memory could not be counted (%s); training goes on without a forecast", error
        )
        return None
    finally:
        session.blocks.counter = None
    asked = job.task.largest_numel(job) * job.run.batch
    measured = tally.step_memory(count_adapter_bytes(method)).scaled(
        max(1.0, asked / max(1, session.denoiser.max_batch_numel))
    )
    measured = replace(measured, has_accumulated_gradients=job.optimizing.accumulate > 1).with_uncounted_tables()
    return add_block_weights(measured, session.denoiser.model.diffusion_model, session.denoiser.device)


def count_adapter_bytes(method) -> int:
    from ...trainers.memory.block_peak import allocated_bytes

    return sum(allocated_bytes(p.nbytes) for p in method.parameters())


def add_block_weights(measured, network, device) -> StepMemory:
    """With the weights that could leave the device."""
    weights, heaviest = host.memory.block_weight_bytes(network, device)
    return replace(measured, weights=weights, largest_block_weights=heaviest)


def run_trial_step(probe: StepProbe, measured: StepMemory | None, plans) -> RunPlan:
    """The plan after a real step under it. When it does not fit after all: a batch that is the planner's own is halved,
    else the next of these plans has to do. `measured`: None where nothing could be counted."""
    session = probe.session
    adapters = count_adapter_bytes(probe.built.method)
    while True:
        free, plan = host.memory.available_device_memory(session), session.blocks.plan
        job, built = probe.job, probe.built
        try:
            with (
                preserve_method_state(built.method),
                host.memory.hold_bytes(session.denoiser.device, 2 * adapters),  # the optimizer's, later
            ):
                if session.blocks.compiler:
                    measure_step_cost(session, built.method, job)  # in which programs are made
                seconds, peak = measure_step_cost(session, built.method, job)
            if measured is None:
                return RunPlan(job, built)
            extra = max(0, peak - (measured.peak_bytes(plan) - 2 * adapters)) if peak else 0
            seconds *= job.optimizing.accumulate
            away = host.memory.waiting_weight_bytes(session)
            forecast = make_run_forecast(measured, plan, free, job.run.batch, seconds, extra, away)
            return RunPlan(job, built, forecast)
        except Exception as error:
            halved, further = measured and probe.sizing.is_open and job.run.batch // 2, next_cheaper_plan(plan, plans)
            if not host.memory.is_out_of_memory_error(error):
                raise
            if not (halved or further):
                raise refuse_step(probe, plan, free, measured) from error
        del built
        host.memory.release_cached_memory()
        if halved:
            probe, measured = rebuild_with_batch(probe, measured, halved)
            continue
        session.blocks.plan = further
        if further == PLAN_OFFLOADED:
            host.memory.offload_weights(session)


def measure_step_cost(session, method, job) -> tuple[float, int]:
    """(seconds, bytes that the device took at most, 0 where it does not say) of a forward and backward pass."""
    gauge = host.memory.PeakMemoryMeter(session.denoiser.device)
    began = time.perf_counter()
    method.loss(step_rng(job.run.seed, 0)).mean().backward()
    peak = gauge.peak()
    return time.perf_counter() - began, peak
