"""Few-step models inside ComfyUI, on tiny models of its own classes: an assistant that is no part of the result."""

import dataclasses

import pytest
import torch
from trainyard.nodes import host, paths
from trainyard.nodes.train import widgets
from trainyard.nodes.train.job import NoiseWithAssistant
from trainyard.tests.comfy.families import make
from trainyard.tests.comfy.test_previews import looking, seen_job
from trainyard.tests.comfy.test_train_lora import FAMILY, data, job, result, run
from trainyard.trainers.files import LoraFile
from trainyard.trainers.methods import few_step
from trainyard.trainers.settings import NoiseSettings

LAYER = "joint_blocks.0.x_block.attn.qkv"


def random_lora() -> LoraFile:
    """Random numbers on one layer of the tiny SD3."""
    weight = dict(make(FAMILY).model.diffusion_model.named_parameters())[f"{LAYER}.weight"]
    rng, name = torch.Generator().manual_seed(3), "lora_unet_" + LAYER.replace(".", "_")
    return LoraFile(
        {
            f"{name}.lora_down.weight": torch.randn(2, weight.shape[1], generator=rng) * 0.3,
            f"{name}.lora_up.weight": torch.randn(weight.shape[0], 2, generator=rng) * 0.3,
        }
    )


@pytest.fixture(scope="module")
def assistant(comfy):
    return random_lora()


def weights(model):
    return {name: p.detach().clone() for name, p in model.model.diffusion_model.named_parameters()}


def test_an_assistant_trains_as_a_lora_in_the_model_does_and_is_taken_off(folders, assistant):
    model = make(FAMILY, inference=True)
    before = weights(model)
    lora, losses, line = result(dataclasses.replace(job(model=model, name="assisted"), assistant=assistant))
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "assistant" in line
    active, _ = host.lora_keys.apply_lora(make(FAMILY, inference=True), None, assistant)
    same, same_losses, _ = result(job(model=active, name="in_the_model"))
    plain, plain_losses, _ = result(job(name="plain"))
    assert losses == same_losses != plain_losses
    assert lora.keys() == plain.keys() and all(torch.equal(lora[key], same[key]) for key in lora)


def test_the_patches_that_a_model_carries_stay_under_the_assistant(folders, assistant):
    """The assistant twice, once as a patch of the MODEL: as a single one at strength 2."""
    patched, _ = host.lora_keys.apply_lora(make(FAMILY, inference=True), None, assistant)
    twice, _ = host.lora_keys.apply_lora(make(FAMILY, inference=True), None, assistant, 2.0)
    _, losses, _ = result(dataclasses.replace(job(model=patched, name="once_more"), assistant=assistant))
    assert losses == pytest.approx(result(job(model=twice, name="at_two"))[1], rel=1e-4)
    assert len(patched.patches[f"diffusion_model.{LAYER}.weight"]) == 1


def test_samples_are_drawn_without_the_assistant(folders, assistant):
    """What the model draws before training is the same file with and without it, and the training goes on unmoved."""
    look = looking(every=0)
    run(seen_job(look=look, name="shown"))
    run(dataclasses.replace(seen_job(look=look, name="shown_assisted"), assistant=assistant))
    plain, assisted = (sorted(paths.runs_folder().glob(f"{name}-*/samples/base_00.png")) for name in ("shown", "shown_assisted"))  # fmt: skip
    assert plain[0].read_bytes() == assisted[0].read_bytes()
    unseen = result(dataclasses.replace(job(name="unseen"), assistant=assistant))[1]
    assert unseen == run(dataclasses.replace(seen_job(look=look, name="shown_assisted"), assistant=assistant)).losses


def test_an_assistant_of_another_model_is_refused(folders, assistant):
    with pytest.raises(ValueError, match="assistant of Noise and Loss Settings does not fit the MODEL: 1 of its 1"):
        run(dataclasses.replace(job(family="sd15", name="wrong"), assistant=assistant))


def test_nodes_that_learn_from_the_model_itself_take_no_assistant(assistant):
    noise = NoiseWithAssistant(NoiseSettings(), assistant)
    with pytest.raises(ValueError, match="only Train LoRA can use one"):
        widgets.make_job(None, None, None, {"rank": 4}, None, None, noise)


def test_a_plain_choice_and_an_assistant_win_over_the_default_of_a_few_step_family(folders, assistant, monkeypatch):
    monkeypatch.setattr(few_step, "FEW_STEP_DEFAULT", "contrastive")
    captioned = dataclasses.replace(data(), empty_key="cond/0")
    told = job(encoded=captioned)
    plan = lambda a_job: a_job.task.few_step_plan(a_job)
    few = dataclasses.replace(told, model=make("schnell", inference=True))
    assert plan(told).is_plain and not plan(few).is_plain and plan(few).by_family
    assert plan(dataclasses.replace(few, noise=NoiseSettings(distilled="plain"))).is_plain
    assert plan(dataclasses.replace(few, assistant=assistant)).is_plain
    bare = dataclasses.replace(few, task=dataclasses.replace(few.task, data=data()))
    assert plan(bare).is_plain, "nobody encoded the empty caption"
