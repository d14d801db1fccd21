"""Plans of keeping activations on ComfyUI's own classes: the same gradients, the choice by free memory, and a second
try."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.train import planner
from trainyard.nodes.train.run import format_forward_counts, run_training
from trainyard.nodes.train.train_lora import LoraTask
from trainyard.tests.comfy.families import make
from trainyard.tests.comfy.test_host import ADAPTERS, RANK_4, Problem, as_loader_gives, fingerprint, left_behind, shake
from trainyard.tests.comfy.test_prompt_and_pair_nodes import pair_job
from trainyard.tests.comfy.test_train_lora import data, fail_at, job, result, run, state
from trainyard.trainers.memory.checkpointing import ActivationCounter, CpuOffloadHooks
from trainyard.trainers.memory.plan import (
    CHECKPOINTING_PLANS,
    PLAN_AUTO,
    PLAN_OFF,
    PLAN_OFFLOADED,
    PLAN_PER_BLOCK,
    PLAN_PER_BLOCK_CPU,
    USABLE_MEMORY_SHARE,
)
from trainyard.trainers.methods.image_pairs import AddiftTraining, ImageSlider
from trainyard.trainers.settings import RunSettings

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "chroma", "qwen", "wan", "lumina2")
GIB = 2**30


@pytest.mark.parametrize("strength", [1.0, -1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_gives_the_same_gradients_bit_for_bit_and_leaves_the_model_as_it_was(family, strength, monkeypatch):
    """Small inputs are sent to the CPU too here. The strength in backward is another one than in forward."""
    monkeypatch.setattr("trainyard.trainers.memory.checkpointing.MIN_OFFLOAD_BYTES", 0)
    model, found = as_loader_gives(family), {}
    before = fingerprint(model)
    for plan in CHECKPOINTING_PLANS:
        with (
            torch.inference_mode(),
            host.session.open_training_session(model, ADAPTERS.get(family, RANK_4), checkpointing=plan) as session,
        ):
            shake(session.adapters)
            problem = Problem(session, family)
            with session.adapters.at_strength(strength):
                loss = problem.loss().mean()
            loss.backward()
            found[plan] = [p.grad for p in session.adapters.parameters()]
    for plan in CHECKPOINTING_PLANS[1:]:
        assert all(equal(got, wanted) for got, wanted in zip(found[plan], found[PLAN_OFF], strict=True)), plan
    assert fingerprint(model) == before
    assert left_behind(model) == []
    assert not [key for key, waiting in CpuOffloadHooks.copies.items() if waiting() is not None], (
        "no copy waits for a backward that is over"
    )


def equal(a, b):
    return (a is None and b is None) or torch.equal(a, b)


def test_strength_minus_one_has_other_gradients():
    grads = []
    with (
        torch.inference_mode(),
        host.session.open_training_session(as_loader_gives("sd3"), RANK_4, checkpointing=PLAN_PER_BLOCK_CPU) as session,
    ):
        shake(session.adapters)
        for strength in (1.0, -1.0):
            with session.adapters.at_strength(strength):
                grads.append(Problem(session, "sd3").gradient(session.adapters))
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("checkpointing", [PLAN_AUTO, PLAN_PER_BLOCK_CPU, PLAN_OFFLOADED])
def test_a_run_under_another_plan_gives_the_same_file(folders, checkpointing):
    plain = result(job(name="plain"))[0]
    other = result(job(name="other", model=make("sd3", inference=True), checkpointing=checkpointing))[0]
    assert all(torch.equal(plain[k], other[k]) for k in plain)


# -- the choice --------------------------------------------------------------------------------------------------------


def planned(monkeypatch, free, checkpointing=PLAN_AUTO, device=None, **run):
    """(forecast, plan) of a run on a device with so many free bytes."""
    monkeypatch.setattr(host.memory, "available_device_memory", lambda session: int(free))
    a_job = job(steps=run.pop("steps", 60), checkpointing=checkpointing, encoded=run.pop("encoded", None), **run)
    if device:
        monkeypatch.setattr(planner, "device_checkpointing_plans", lambda device: CHECKPOINTING_PLANS)
    sizing = planner.BatchSizing(is_open=a_job.run.batch == 0, can_split=a_job.run.batch > 0)
    a_job = a_job.with_batch(a_job.run.batch or 1, 1)
    with (
        torch.inference_mode(),
        host.session.open_training_session(a_job.model, a_job.adapter, checkpointing=checkpointing) as session,
    ):
        planned = planner.plan_run(session, a_job, {}, sizing, checkpointing)
        assert all(p.grad is None for p in planned.built.method.parameters())
        assert planned.built.method.batch == planned.job.run.batch
        return planned.forecast, session.blocks.plan


def test_auto_keeps_everything_where_there_is_room(monkeypatch, folders):
    forecast, plan = planned(monkeypatch, 100 * GIB)
    assert (forecast.plan, plan) == (PLAN_OFF, PLAN_OFF)
    assert forecast.fits and forecast.max_batch > 1 and forecast.seconds > 0


def test_auto_checkpoints_where_there_is_less_and_goes_to_the_cpu_where_there_is_least(monkeypatch, folders):
    full, _ = planned(monkeypatch, 100 * GIB)
    assert planned(monkeypatch, full.peak_bytes)[1] == PLAN_PER_BLOCK
    assert planned(monkeypatch, 1000, device="cuda")[1] == PLAN_OFFLOADED


def test_on_the_cpu_alone_nothing_is_sent_to_the_cpu(monkeypatch, folders):
    assert planned(monkeypatch, 1000)[1] == PLAN_PER_BLOCK


def test_a_plan_of_the_users_own_is_kept_and_told(monkeypatch, folders):
    forecast, plan = planned(monkeypatch, 1000, checkpointing=PLAN_OFF)
    assert (plan, forecast.fits) == (PLAN_OFF, False)
    assert "this is tight" in forecast.format_line(10)


def test_a_short_run_with_a_plan_of_its_own_is_not_measured(monkeypatch, folders):
    assert planned(monkeypatch, GIB, checkpointing=PLAN_OFF, steps=10) == (None, PLAN_OFF)


def test_the_forecast_is_of_the_largest_pictures_and_the_whole_batch(monkeypatch, folders):
    one, two = (planned(monkeypatch, 100 * GIB, batch=batch)[0] for batch in (1, 2))
    assert one.peak_bytes < two.peak_bytes < 2 * one.peak_bytes


def refuse_trial_steps(monkeypatch, count):
    """The plans that are tried; the first steps, so many, run out of memory."""
    tried, original = [], planner.measure_step_cost

    def one_step(session, *about):
        tried.append(session.blocks.plan)
        if len(tried) <= count:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(session, *about)

    monkeypatch.setattr(planner, "measure_step_cost", one_step)
    return tried


def test_a_plan_that_does_not_fit_after_all_gives_way_to_the_next(monkeypatch, folders):
    tried = refuse_trial_steps(monkeypatch, 2)
    assert planned(monkeypatch, 100 * GIB, device="cuda")[1] == PLAN_PER_BLOCK_CPU
    assert tried == list(CHECKPOINTING_PLANS[:3])


def test_a_run_that_was_measured_first_is_the_same_run(folders, monkeypatch):
    """Draws, adapters and the chance of others are as before: 60 steps with and without a look beforehand."""
    measured = result(job(name="measured", steps=60))[0]
    monkeypatch.setattr(planner, "MIN_MEASURED_STEPS", 1000)
    blind = result(job(name="blind", steps=60, model=make("sd3", inference=True)))[0]
    assert all(torch.equal(measured[k], blind[k]) for k in blind)


@pytest.mark.parametrize("method", [ImageSlider, AddiftTraining])
def test_measuring_is_no_cost_of_a_difference_and_changes_none(folders, monkeypatch, method):
    """Both ends at strengths +s and -s: the pass is counted at two strengths, and its forwards are not the run's."""
    with torch.inference_mode():
        blind = run_training(pair_job(method, name="blind"))
        monkeypatch.setattr(planner, "MIN_MEASURED_STEPS", 1)
        lines = []
        monkeypatch.setattr(host.progress, "show_node_text", lambda line, node_id=None: lines.append(line))
        seen = run_training(pair_job(method, name="seen"))
    assert "GiB free" in lines[0]
    assert all(torch.equal(seen.lora[k], blind.lora[k]) for k in blind.lora)
    assert format_forward_counts(seen) == format_forward_counts(blind)


def test_the_forecast_is_shown_before_the_first_step(folders, monkeypatch):
    shown = []
    monkeypatch.setattr(host.progress, "show_node_text", lambda line, node_id=None: shown.append(line))
    result(job(steps=60, checkpointing=PLAN_AUTO))
    assert "GiB free" in shown[0] and "a step" in shown[0] and "until" in shown[0]


def test_a_loss_that_looks_back_by_itself_trains_without_a_forecast(monkeypatch, folders):
    a_job = job(steps=60)
    with torch.inference_mode(), host.session.open_training_session(a_job.model, a_job.adapter) as session:
        built = a_job.task.build(a_job, session, {})
        plain = built.method.loss

        def looking_back(rng):
            loss = plain(rng)
            loss.sum().backward()
            return loss.detach()

        built.method.loss = looking_back
        monkeypatch.setattr(LoraTask, "build", lambda self, job, session, prompts: built)
        planned = planner.plan_run(session, a_job, {}, planner.FIXED_BATCH, PLAN_OFF)
        assert (planned.built, planned.forecast) == (built, None)
        assert session.blocks.counter is None


def test_where_nothing_can_be_counted_steps_are_tried_until_one_has_room(monkeypatch, folders):
    tried = refuse_trial_steps(monkeypatch, 2)
    monkeypatch.setattr(planner, "count_step_memory", lambda probe: None)
    assert planned(monkeypatch, 100 * GIB) == (None, PLAN_PER_BLOCK) and tried == [], "nothing to choose on the CPU"
    assert planned(monkeypatch, 100 * GIB, device="cuda") == (None, PLAN_OFFLOADED)
    assert tried == list(CHECKPOINTING_PLANS[1:])


# -- weights that travel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_of_the_blocks_leave_and_the_host_brings_them_back_afterwards(family):
    """On the CPU the way is short, but layers are told to fetch their weights as anywhere."""
    model = as_loader_gives(family)
    with (
        torch.inference_mode(),
        host.session.open_training_session(
            model, ADAPTERS.get(family, RANK_4), checkpointing=PLAN_OFFLOADED
        ) as session,
    ):
        network = session.denoiser.model.diffusion_model
        weights, heaviest = host.memory.block_weight_bytes(network, session.denoiser.device)
        assert 0 < heaviest <= weights <= host.memory.waiting_weight_bytes(session)
        assert host.memory.block_weight_bytes(network, torch.device("meta")) == (0, 0), "what is elsewhere"
        layers = [
            m
            for block in network.modules()
            if type(block) in host.context.find_block_classes(network)
            for m in block.modules()
            if hasattr(m, "comfy_cast_weights")
        ]
        assert layers and all(m.comfy_cast_weights for m in layers if any(True for _ in m.parameters(recurse=False)))
        there = model.model.model_loaded_weight_memory
    with torch.inference_mode():
        host.session.mm.load_models_gpu([model], force_full_load=True)
    assert model.model.model_loaded_weight_memory >= there + weights


def test_only_as_many_weights_leave_as_are_missing(monkeypatch, folders):
    full, _ = planned(monkeypatch, 100 * GIB, checkpointing=PLAN_OFFLOADED)
    monkeypatch.setattr(planner, "choose_checkpointing_plan", lambda measured, free, plans: PLAN_OFFLOADED)
    forecast, plan = planned(monkeypatch, full.peak_bytes / USABLE_MEMORY_SHARE - 1000, device="cuda")
    assert (plan, forecast.plan) == (PLAN_OFFLOADED, PLAN_OFFLOADED)
    assert 999 <= forecast.offloaded_bytes < full.offloaded_bytes / 2
    assert "GiB of weights wait in the CPU's memory" in forecast.format_line(60)


def test_weights_leave_first_where_not_even_one_block_has_room_beside_them(monkeypatch, folders):
    asked, measure = [], ActivationCounter.measure_block

    def measure_block(self, *about):
        asked.append(1)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(self, *about)

    left, offload = [], host.memory.offload_weights
    monkeypatch.setattr(ActivationCounter, "measure_block", measure_block)
    monkeypatch.setattr(host.memory, "offload_weights", lambda *about: left.append(offload(*about)))
    forecast, plan = planned(monkeypatch, 100 * GIB, device="cuda")
    assert (plan, forecast.plan) == (PLAN_OFF, PLAN_OFF)
    assert len(left) == 1 and left[0] > 0
    assert forecast.offloaded_bytes == 0, "they have room beside a step, and come back"
    asked.clear()
    with pytest.raises(
        host.memory.StepDoesNotFit, match="takes more beside the weights.*with checkpointing 'per block'"
    ):
        planned(monkeypatch, 100 * GIB, checkpointing=PLAN_PER_BLOCK, device="cuda")


def test_the_trial_step_leaves_room_for_the_optimizers_two_numbers(monkeypatch, folders):
    held = []
    original = host.memory.hold_bytes
    monkeypatch.setattr(host.memory, "hold_bytes", lambda device, count: held.append(count) or original(device, count))
    a_job = job(steps=60)
    planned(monkeypatch, 100 * GIB)
    with torch.inference_mode(), host.session.open_training_session(a_job.model, a_job.adapter) as session:
        numbers = sum(p.numel() for p in session.adapters.parameters())
    assert 2 * 4 * numbers <= held[0] < 2 * 4 * numbers + 2 * 512 * len(list(session.adapters.parameters()))


def test_a_training_that_fits_under_no_plan_is_refused_with_figures_before_it_begins(monkeypatch, folders):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(planner, "measure_step_cost", no_room)
    with pytest.raises(host.memory.StepDoesNotFit) as refused:
        planned(monkeypatch, 3 * GIB, device="cuda")
    words = str(refused.value)
    assert "does not fit on cpu: a step takes about 0.0 GiB beside the weights, and 3.0 GiB are free" in words
    assert (
        f"checkpointing {PLAN_OFFLOADED!r}" in words
        and "Nothing was trained" in words
        and "smaller resolution" in words
    )


def test_a_lora_that_is_active_in_the_model_stays_in_force_while_the_weights_travel(folders):
    """Its patches are merged into weights that are there, and applied at each fetch to those that are not."""
    before, made = result(job(name="active", steps=3))[0], {}
    for checkpointing in (PLAN_PER_BLOCK, PLAN_OFFLOADED):
        patched, _ = host.lora_keys.apply_lora(make("sd3", inference=True), None, before)
        made[checkpointing] = result(job(name=f"on top {checkpointing}", model=patched, checkpointing=checkpointing))[1]
    plain = result(job(name="plain"))[1]
    assert made[PLAN_PER_BLOCK] == pytest.approx(made[PLAN_OFFLOADED], rel=1e-5)
    assert made[PLAN_PER_BLOCK] != pytest.approx(plain, rel=1e-5)


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_left_open_is_as_large_as_fits(monkeypatch, folders):
    one = planned(monkeypatch, 100 * GIB, batch=1, device="cuda")[0]
    eight = planned(monkeypatch, 100 * GIB, batch=0, device="cuda", encoded=data(count=9))[0]
    assert (eight.batch, eight.plan, eight.max_batch >= 8) == (8, PLAN_OFF, True)
    some, plan = planned(monkeypatch, 2.5 * one.peak_bytes, batch=0, device="cuda")
    assert 1 < some.batch < 8 and plan == PLAN_OFF and some.fits
    assert f"off, batch {some.batch}: " in some.format_line(60)


def test_on_the_cpu_an_open_batch_is_one_picture_because_more_would_only_take_longer(monkeypatch, folders):
    assert planned(monkeypatch, 100 * GIB, batch=0)[0].batch == 1


def test_a_batch_that_fits_under_no_plan_is_split_and_the_steps_stay_as_large(monkeypatch, folders):
    least = planned(monkeypatch, 100 * GIB, batch=1, checkpointing=PLAN_PER_BLOCK)[0]
    monkeypatch.setattr(planner, "device_checkpointing_plans", lambda device: CHECKPOINTING_PLANS[:2])
    monkeypatch.setattr(host.memory, "available_device_memory", lambda session: int(least.peak_bytes * 1.6))
    split = job(steps=60, batch=4, checkpointing=PLAN_AUTO, encoded=data(count=4), name="split")
    whole = job(steps=60, batch=1, checkpointing=PLAN_PER_BLOCK, encoded=data(count=4), name="whole")
    done = run(split)
    a, losses = done.lora, done.losses
    b, wanted, _ = result(dataclasses.replace(whole, optimizing=dataclasses.replace(whole.optimizing, accumulate=4)))
    assert (done.built.job.run.batch, done.built.job.optimizing.accumulate) == (1, 4)
    assert losses == wanted
    assert all(torch.equal(a[k], b[k]) for k in b)
    about = state("split")
    assert (about["RunSettings"]["batch"], about["batch"], about["accumulate"]) == (4, 1, 4), (
        "what was asked, and what was done"
    )


def test_a_batch_is_not_split_where_the_plan_is_the_users_own(monkeypatch, folders):
    forecast, _ = planned(monkeypatch, 1000, batch=4, checkpointing=PLAN_PER_BLOCK)
    assert (forecast.batch, forecast.fits) == (4, False)


def test_a_run_that_goes_on_keeps_the_batch_it_began_with(monkeypatch, folders):
    """Whatever memory there is by then."""
    monkeypatch.setattr(planner, "device_checkpointing_plans", lambda device: CHECKPOINTING_PLANS)
    open_one = lambda name: job(name=name, steps=6, batch=0, encoded=data(count=4))
    one = planned(monkeypatch, 100 * GIB, batch=1, checkpointing=PLAN_OFF)[0]
    monkeypatch.setattr(host.memory, "available_device_memory", lambda session: int(2.6 * one.peak_bytes))
    whole = run(open_one("whole"))
    wanted, batch = whole.lora, whole.built.job.run.batch
    assert batch > 1
    fail_at(monkeypatch, batch + 4, KeyboardInterrupt)  # predictions while measuring are counted, too
    with pytest.raises(KeyboardInterrupt):
        result(open_one("stopped"))
    assert 0 < state("stopped")["step"] < 6
    monkeypatch.setattr(host.memory, "available_device_memory", lambda session: 100 * GIB)
    again = run(open_one("stopped"))
    got = again.lora
    assert again.built.job.run.batch == batch
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)


def test_a_chosen_batch_that_does_not_fit_after_all_is_halved(monkeypatch, folders):
    original = planner.measure_step_cost

    def one_step(session, method, job):
        if method.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(session, method, job)

    monkeypatch.setattr(planner, "measure_step_cost", one_step)
    forecast, plan = planned(monkeypatch, 100 * GIB, batch=0, device="cuda", encoded=data(count=9))
    assert (forecast.batch, plan) == (2, PLAN_OFF)


# -- a second try ------------------------------------------------------------------------------------------------------


def test_out_of_memory_says_what_was_needed_and_names_the_next_plan(folders, monkeypatch):
    advice = {plan: f"set checkpointing to {further!r}" for plan, further in pairwise(CHECKPOINTING_PLANS)} | {
        PLAN_OFFLOADED: "smaller resolution"
    }
    for plan, said in advice.items():
        monkeypatch.undo()
        fail_at(monkeypatch, 4, lambda: torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(host.memory.OutOfMemory, match="GiB were in use.*The run is saved and continues") as caught:
            result(job(checkpointing=plan, name=f"oom {plan.replace(' + ', ' ')}"))
        assert said in str(caught.value)


def test_the_memory_that_was_in_use_is_that_of_the_models_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: {None: 1, 1: 3}[device.index] * 2**30)
    words = str(host.memory.OutOfMemory(RunSettings(), PLAN_OFF, torch.device("cuda:1")))
    assert "3.0 GiB were in use" in words


def test_a_run_that_may_try_again_ends_as_if_nothing_had_happened(folders, monkeypatch):
    whole = result(job(name="whole"))[0]
    fail_at(monkeypatch, 4, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    plans = []
    original = host.session.open_training_session
    monkeypatch.setattr(
        host.session, "open_training_session", lambda *a, **k: plans.append(k["checkpointing"]) or original(*a, **k)
    )
    a_job = dataclasses.replace(job(), retry_cheaper=True)
    again = result(a_job)[0]
    assert plans == [PLAN_OFF, PLAN_PER_BLOCK]
    assert all(torch.equal(again[k], whole[k]) for k in whole)
    assert state()["step"] == 6


def test_a_second_failure_is_told_and_the_run_is_kept(folders, monkeypatch):
    original, calls = host.denoiser.ComfyDenoiser.denoise, []

    def denoise(self, x, sigma, conds):
        calls.append(1)
        if len(calls) >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x, sigma, conds)

    monkeypatch.setattr(host.denoiser.ComfyDenoiser, "denoise", denoise)
    a_job = dataclasses.replace(job(), retry_cheaper=True)
    with pytest.raises(host.memory.OutOfMemory, match="per block \\+ CPU"):
        result(a_job)
    assert state()["step"] == 3


def test_memory_of_the_machine_itself_counts_as_memory_too():
    assert host.memory.is_out_of_memory_error(
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not host.memory.is_out_of_memory_error(RuntimeError("shapes do not fit"))


def test_a_failure_of_another_kind_is_not_tried_again(folders, monkeypatch):
    calls = []
    fail_at(monkeypatch, 2, lambda: calls.append(1) or RuntimeError("something else"))
    a_job = dataclasses.replace(job(), retry_cheaper=True)
    with pytest.raises(RuntimeError, match="something else"):
        result(a_job)
    assert calls == [1]
