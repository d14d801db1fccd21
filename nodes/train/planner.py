"""Before a run: one step is counted and one is taken, to choose how activations are kept and to say what the run will cost."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import replace

from comfy_api.latest import io

from ...trainers.loop import load_method_state, method_state, own_chance, step_rng
from ...trainers.memory.checkpointing import Tally
from ...trainers.memory.plan import AUTO, OFF, OFFLOADED, PLANS, Measured, cheaper, chosen, forecast, largest_batch, split
from .. import host

WAYS = ("'per block' needs much less memory and half as much time again; 'per block + CPU' still less; 'offloaded blocks' least, and the model's weights "
        "travel for every block. 'auto' measures a step and chooses; where nothing else fits, it splits the batch.")
SHORT = 50  # runs of fewer steps are not measured first: they would be half done by then


def checkpointing_input(**more):
    return io.Combo.Input("checkpointing", options=list(host.session.CHECKPOINTING), default=OFF, tooltip=WAYS, **more)


def retry_input():
    """At the end of a node's inputs: it came after the first release."""
    return io.Boolean.Input("retry_cheaper", default=False, optional=True, advanced=True, tooltip="When memory runs out in the middle of a run, go "
                            "on from the last step with the next checkpointing that needs less. Once; the result is the same.")


def compile_input():
    """At the end of a node's inputs, as above."""
    return io.Boolean.Input("compile_blocks", default=False, optional=True, advanced=True, tooltip="Let torch.compile make faster programs of the "
                            "model's blocks: minutes at the start, often for less time a step. Where that is impossible, it says so and trains without.")


def prepared(session, job, checkpointing: str):
    """(method, what is to be expected). The plan is chosen where that is left open, and the batch, where it is left open or fits under no plan.
    None in place of a forecast for short runs that leave nothing open. Nothing else that the run depends on is changed: parameters,
    draw order and the chance of others are as before."""
    method = job.method(session)
    if not (checkpointing == AUTO or job.chooses_batch or job.run.steps >= SHORT):
        return method, None
    with untouched(method):
        measured = counted(session, method, job)
    if measured is None:
        return method, None
    plans, free = offered(session.denoiser.device) if checkpointing == AUTO else (checkpointing,), host.memory.free_memory(session)
    plan = session.blocks.plan = chosen(measured, free, plans)
    batch = sized(measured, free, plan, job, session.denoiser.device)
    method, measured = resized(session, method, job, measured, batch)
    if plan == OFFLOADED and checkpointing == AUTO:
        host.memory.offload(session, measured.missing(plan, free))
    return tried(session, method, job, measured, plans)


def resized(session, method, job, measured, batch: int):
    """(method, measured) with that batch."""
    before = job.run.batch
    if batch == before:
        return method, measured
    job.take(batch, job.optimizing.accumulate * (before // batch if job.may_split else 1))
    return job.method(session), replace(measured.scaled(batch / before), accumulated=job.optimizing.accumulate > 1)


def sized(measured, free, plan, job, device) -> int:
    """The batch. One that is left open is as large as fits under the plan of a single picture, where that makes a device busier. One that is asked
    for is split where no plan has room for it: it makes the same steps of other pictures, so it comes last."""
    if job.chooses_batch:
        return largest_batch(measured, free, plan) if offered(device) == PLANS else 1
    if job.may_split and job.checkpointing == AUTO and not measured.fits(plan, free):
        return split(measured, free, plan, job.run.batch)
    return job.run.batch


def offered(device) -> tuple[str, ...]:
    """Plans that make a difference on this device."""
    return PLANS if device.type != "cpu" else PLANS[:2]


@contextlib.contextmanager
def untouched(method):
    draws = method_state(method)
    try:
        with own_chance():
            yield
    finally:
        load_method_state(method, draws)
        for p in method.parameters():
            p.grad = None


def counted(session, method, job) -> Measured | None:
    """What a step of the largest pictures would keep, found without keeping it; None for losses that look back by themselves."""
    tally = session.blocks.tally = Tally([*session.denoiser.model.parameters(), *method.parameters()])
    session.denoiser.widest = 0
    try:
        with tally:
            method.loss(step_rng(job.run.seed, 0))
    except Exception as error:
        logging.info("Trainyard: the need for memory could not be counted (%s); training goes on without a forecast", error)
        return None
    finally:
        session.blocks.tally = None
    asked = math.prod(job.largest()) * job.run.batch
    adapters = sum(p.numel() * p.element_size() for p in method.parameters())
    measured = tally.measured(adapters).scaled(max(1.0, asked / max(1, session.denoiser.widest)))
    measured = weighed(measured, session.denoiser.model.diffusion_model, session.denoiser.device)
    return replace(measured, accumulated=job.optimizing.accumulate > 1)


def weighed(measured, network, device) -> Measured:
    """With the weights that could leave the device."""
    weights, heaviest = host.memory.block_weights(network, device)
    return replace(measured, weights=weights, heaviest=heaviest)


def tried(session, method, job, measured, plans):
    """(method, forecast) after a real step under the plan. When it does not fit after all: a batch that is the planner's own is halved, else the
    next of these plans has to do."""
    while True:
        free, plan = host.memory.free_memory(session), session.blocks.plan
        try:
            with untouched(method):
                if session.blocks.compiler:
                    one_step(session, method, job)  # in which programs are made
                seconds, peak = one_step(session, method, job)
            extra = max(0, peak - (measured.peak(plan) - 2 * measured.adapters)) if peak else 0  # the optimizer has no numbers of its own yet
            return method, forecast(measured, plan, free, job.run.batch, seconds * job.optimizing.accumulate, extra, session.away)
        except Exception as error:
            halved, further = job.chooses_batch and job.run.batch // 2, cheaper(plan, plans)
            if not (halved or further) or not host.memory.out_of_memory(error):
                raise
        host.memory.let_go()
        if halved:
            method, measured = resized(session, method, job, measured, halved)
            continue
        session.blocks.plan = further
        if further == OFFLOADED:
            host.memory.offload(session)


def one_step(session, method, job) -> tuple[float, int]:
    """(seconds, bytes that the device took at most, 0 where it does not say) of a forward and backward pass."""
    gauge = host.memory.Gauge(session.denoiser.device)
    began = time.perf_counter()
    method.loss(step_rng(job.run.seed, 0)).mean().backward()
    peak = gauge.peak()
    return time.perf_counter() - began, peak
