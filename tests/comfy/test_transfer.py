"""Transfer LoRA on tiny models of ComfyUI's own classes: a LoRA moves to a sibling, and both models stay as they were."""

import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.train import transfer
from trainyard.nodes.train.job import TrainingJob
from trainyard.tests.comfy.families import cond, make
from trainyard.tests.comfy.test_distilled import random_lora, weights
from trainyard.tests.comfy.test_train_lora import FAMILY, run
from trainyard.trainers.data.encoded import split_conditioning
from trainyard.trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings, TransferSettings


@pytest.fixture(scope="module")
def lora(comfy):
    return random_lora()


@pytest.fixture
def texts(monkeypatch):
    """Prompts without a text encoder."""
    told = lambda clip, texts: {text: split_conditioning(cond(FAMILY, len(text)))[0] for text in texts}
    monkeypatch.setattr(host.encoders, "encode_prompts_once", told)
    monkeypatch.setattr(host.encoders, "check_clip", lambda clip: None)
    monkeypatch.setattr(host.checks, "check_prompt_lengths", lambda clip, texts: None)
    monkeypatch.setattr(transfer, "hash_clip", lambda clip: "none")


def transfer_job(source, target, lora, steps=8, name="moved", **settings):
    chosen = TransferSettings(**{"resolution": 64, "trajectories": 4, "sampling_steps": 3, **settings})
    task = transfer.TransferTask(
        source=source, lora=lora, words=transfer.TransferWords(prompts="a {cat|dog}\na photo"), settings=chosen
    )
    return TrainingJob(
        task=task, model=target, adapter=AdapterSettings(rank=4, targets="all linear"), clip=None,
        run=RunSettings(steps=steps, learning_rate=1e-2, batch=2, seed=1, save_every=0), optimizing=OptimizerSettings(),
        noise=NoiseSettings(), name=name, checkpointing="off", graph={}, node_id=None,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [
    {"trajectory": "target", "few_steps": 2, "trajectories": 10},
    {"source_guidance": 2.0},  # 12 points, too few to tell how much was reached
])  # fmt: skip
def test_a_lora_moves_to_a_sibling_and_both_models_stay_what_they_were(folders, texts, lora, settings):
    source, target = make(FAMILY, inference=True), make(FAMILY, seed=1, inference=True)
    before = [weights(source), weights(target)]
    done = run(transfer_job(source, target, lora, steps=40, **settings))
    assert sum(done.losses[-8:]) < 0.8 * sum(done.losses[:8]) and ("reached" in done.line) == ("few_steps" in settings)
    for old, model in zip(before, (source, target), strict=True):
        assert all(torch.equal(old[name], new) for name, new in weights(model).items())


def test_a_transfer_that_goes_on_asks_the_models_no_second_time(folders, texts, lora, monkeypatch):
    models = make(FAMILY, inference=True), make(FAMILY, seed=1, inference=True)
    whole = run(transfer_job(*models, lora, steps=6, name="whole"))
    run(transfer_job(*models, lora, steps=3, name="parts"))
    monkeypatch.setattr(transfer.TransferTask, "make_points", None)
    parts = run(transfer_job(*models, lora, steps=6, name="parts"))
    assert parts.losses == whole.losses and all(torch.equal(parts.lora[key], whole.lora[key]) for key in whole.lora)


def test_models_that_are_no_siblings_and_loras_of_others_are_refused(folders, texts, lora):
    sd3, sd15 = make(FAMILY, inference=True), make("sd15", inference=True)
    with pytest.raises(ValueError, match="a LoRA can move between models that share a VAE"):
        run(transfer_job(sd15, sd3, lora))
    with pytest.raises(ValueError, match="Connect the source that it was trained on"):
        run(transfer_job(sd15, sd15, lora))
    with pytest.raises(ValueError, match="prompts is empty"):
        transfer.TransferWords().lines()
