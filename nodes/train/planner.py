"""Before a run: one step is counted and one is taken, to choose how activations are kept and to say what the run will
cost."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import replace

from comfy_api.latest import io

from ...trainers.loop import fork_rng_state, load_method_state, method_state, step_rng
from ...trainers.memory.checkpointing import ActivationCounter
from ...trainers.memory.plan import (
    CHECKPOINTING_PLANS,
    PLAN_AUTO,
    PLAN_OFF,
    PLAN_OFFLOADED,
    StepMemory,
    choose_checkpointing_plan,
    largest_fitting_batch,
    largest_fitting_microbatch,
    make_run_forecast,
    next_cheaper_plan,
)
from .. import host

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
        default=PLAN_OFF,
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


def plan_run(session, job, checkpointing: str):
    """(method, what is to be expected). The plan is chosen where that is left open, and the batch, where it is left
    open or fits under no plan. None in place of a forecast for short runs that leave nothing open. Nothing else that
    the run depends on is changed: parameters, draw order and the chance of others are as before."""
    method = job.method(session)
    if not (checkpointing == PLAN_AUTO or job.auto_batch or job.run.steps >= MIN_MEASURED_STEPS):
        return method, None
    with preserve_method_state(method):
        measured = count_step_memory(session, method, job)
    if measured is None:
        return method, None
    plans, free = (
        device_checkpointing_plans(session.denoiser.device) if checkpointing == PLAN_AUTO else (checkpointing,),
        host.memory.available_device_memory(session),
    )
    plan = session.blocks.plan = choose_checkpointing_plan(measured, free, plans)
    batch = choose_batch_size(measured, free, plan, job, session.denoiser.device)
    method, measured = rebuild_with_batch(session, method, job, measured, batch)
    if plan == PLAN_OFFLOADED and checkpointing == PLAN_AUTO:
        host.memory.offload_weights(session, measured.missing_bytes(plan, free))
    return run_trial_step(session, method, job, measured, plans)


def rebuild_with_batch(session, method, job, measured, batch: int):
    """(method, measured) with that batch."""
    before = job.run.batch
    if batch == before:
        return method, measured
    job.take(batch, job.optimizing.accumulate * (before // batch if job.can_split_batch else 1))
    return job.method(session), replace(
        measured.scaled(batch / before), has_accumulated_gradients=job.optimizing.accumulate > 1
    )


def choose_batch_size(measured, free, plan, job, device) -> int:
    """The batch. One that is left open is as large as fits under the plan of a single picture, where that makes a
    device busier. One that is asked
    for is split where no plan has room for it: it makes the same steps of other pictures, so it comes last."""
    if job.auto_batch:
        return (
            largest_fitting_batch(measured, free, plan)
            if device_checkpointing_plans(device) == CHECKPOINTING_PLANS
            else 1
        )
    if job.can_split_batch and job.checkpointing == PLAN_AUTO and not measured.fits(plan, free):
        return largest_fitting_microbatch(measured, free, plan, job.run.batch)
    return job.run.batch


def device_checkpointing_plans(device) -> tuple[str, ...]:
    """Plans that make a difference on this device."""
    return CHECKPOINTING_PLANS if device.type != "cpu" else CHECKPOINTING_PLANS[:2]


@contextlib.contextmanager
def preserve_method_state(method):
    draws = method_state(method)
    try:
        with fork_rng_state():
            yield
    finally:
        load_method_state(method, draws)
        for p in method.parameters():
            p.grad = None


def count_step_memory(session, method, job) -> StepMemory | None:
    """What a step of the largest pictures would keep, found without keeping it; None for losses that look back by
    themselves."""
    tally = session.blocks.counter = ActivationCounter([*session.denoiser.model.parameters(), *method.parameters()])
    session.denoiser.max_batch_numel = 0
    try:
        with tally:
            method.loss(step_rng(job.run.seed, 0))
    except Exception as error:
        logging.info(
            "Trainyard: the need for memory could not be counted (%s); training goes on without a forecast", error
        )
        return None
    finally:
        session.blocks.counter = None
    asked = math.prod(job.largest()) * job.run.batch
    adapters = sum(p.numel() * p.element_size() for p in method.parameters())
    measured = tally.step_memory(adapters).scaled(max(1.0, asked / max(1, session.denoiser.max_batch_numel)))
    measured = add_block_weights(measured, session.denoiser.model.diffusion_model, session.denoiser.device)
    return replace(measured, has_accumulated_gradients=job.optimizing.accumulate > 1)


def add_block_weights(measured, network, device) -> StepMemory:
    """With the weights that could leave the device."""
    weights, heaviest = host.memory.block_weight_bytes(network, device)
    return replace(measured, weights=weights, largest_block_weights=heaviest)


def run_trial_step(session, method, job, measured, plans):
    """(method, forecast) after a real step under the plan. When it does not fit after all: a batch that is the
    planner's own is halved, else the next of these plans has to do."""
    while True:
        free, plan = host.memory.available_device_memory(session), session.blocks.plan
        try:
            with preserve_method_state(method):
                if session.blocks.compiler:
                    measure_step_cost(session, method, job)  # in which programs are made
                seconds, peak = measure_step_cost(session, method, job)
            extra = (
                max(0, peak - (measured.peak_bytes(plan) - 2 * measured.adapter_bytes)) if peak else 0
            )  # the optimizer has no numbers of its own yet
            return method, make_run_forecast(
                measured, plan, free, job.run.batch, seconds * job.optimizing.accumulate, extra, session.away
            )
        except Exception as error:
            halved, further = job.auto_batch and job.run.batch // 2, next_cheaper_plan(plan, plans)
            if not (halved or further) or not host.memory.is_out_of_memory_error(error):
                raise
        host.memory.release_cached_memory()
        if halved:
            method, measured = rebuild_with_batch(session, method, job, measured, halved)
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
