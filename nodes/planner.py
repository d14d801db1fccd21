"""Before a run: one step is counted and one is taken, to choose how activations are kept and to say what the run will cost."""

from __future__ import annotations

import contextlib
import logging
import math
import time

from comfy_api.latest import io

from ..trainers import plan
from ..trainers.loop import load_method_state, method_state, own_chance, step_rng
from ..trainers.plan import AUTO, Forecast, Measured
from ..trainers.recompute import Tally
from . import host

WAYS = "'per block' needs much less memory and half as much time again; 'per block + CPU' still less. 'auto' measures a step and chooses."
SHORT = 50  # runs of fewer steps are not measured first: they would be half done by then


def checkpointing_input(**more):
    return io.Combo.Input("checkpointing", options=list(host.CHECKPOINTING), default=plan.OFF, tooltip=WAYS, **more)


def retry_input():
    """At the end of a node's inputs: it came after the first release."""
    return io.Boolean.Input("retry_cheaper", default=False, optional=True, advanced=True, tooltip="When memory runs out in the middle of a run, go "
                            "on from the last step with the next checkpointing that needs less. Once; the result is the same.")


def compile_input():
    """At the end of a node's inputs, as above."""
    return io.Boolean.Input("compile_blocks", default=False, optional=True, advanced=True, tooltip="Let torch.compile make faster programs of the "
                            "model's blocks: minutes at the start, often for less time a step. Where that is impossible, it says so and trains without.")


def settled(session, method, job, checkpointing: str) -> Forecast | None:
    """Chooses the plan where that is left open, and gives what is to be expected; None for short runs with a plan of their own.
    Nothing that the run depends on is changed: parameters, draw order and the chance of others are as before."""
    if checkpointing != AUTO and job.run.steps < SHORT:
        return None
    with untouched(method):
        measured = counted(session, method, job)
        if measured is None:
            return None
        plans = offered(session) if checkpointing == AUTO else (checkpointing,)
        session.blocks.plan = plan.chosen(measured, host.free_memory(session), plans)
        return tried(session, method, job, measured, plans)


def offered(session) -> tuple[str, ...]:
    """Plans that make a difference on this device."""
    return plan.PLANS if session.denoiser.device.type != "cpu" else plan.PLANS[:2]


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
    return tally.measured(adapters).scaled(max(1.0, asked / max(1, session.denoiser.widest)))


def tried(session, method, job, measured, plans) -> Forecast:
    """A real step under the plan; when it does not fit after all, under the next of these plans."""
    while True:
        free, further = host.free_memory(session), None
        try:
            if session.blocks.compiler:
                one_step(session, method, job)  # in which programs are made
            seconds, peak = one_step(session, method, job)
        except Exception as error:
            further = plan.cheaper(session.blocks.plan, plans)
            if further is None or not host.out_of_memory(error):
                raise
        if further is None:
            extra = max(0, peak - measured.peak(session.blocks.plan)) if peak else 0
            return plan.forecast(measured, session.blocks.plan, free, job.run.batch, seconds * job.optimizing.accumulate, extra)
        session.blocks.plan = further
        host.let_go()


def one_step(session, method, job) -> tuple[float, int]:
    """(seconds, bytes that the device took at most, 0 where it does not say) of a forward and backward pass."""
    gauge = host.Gauge(session.denoiser.device)
    began = time.perf_counter()
    method.loss(step_rng(job.run.seed, 0)).mean().backward()
    peak = gauge.peak()
    return time.perf_counter() - began, peak
