"""The Train LoRA job in this process: what goes wrong in the middle of a run, and what is kept."""

import dataclasses
import errno
import json
import os

import pytest
import torch
from trainyard.nodes import host, paths
from trainyard.nodes.train.job import TrainingJob
from trainyard.nodes.train.run import run_training
from trainyard.nodes.train.train_lora import LoraTask, select_training_data
from trainyard.tests.comfy.families import cond, latent_shape, make
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.loop import Diverged
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings

FAMILY = "sd3"


def data(family=FAMILY, count=3, mask=None):
    rng = torch.Generator().manual_seed(5)
    latents = [{"samples": torch.randn(latent_shape(family), generator=rng)} for _ in range(count)]
    if mask is not None:
        latents = [{**latent, "noise_mask": mask} for latent in latents]
    return EncodedDataset.from_core(latents, [cond(family, seed) for seed in range(count)])


def job(family=FAMILY, model=None, encoded=None, name="test", checkpointing="off", **run):
    settings = RunSettings(**{"steps": 6, "learning_rate": 1e-3, "batch": 2, "seed": 1, "save_every": 0, **run})
    return TrainingJob(
        task=LoraTask(data=encoded or data(family)),
        model=model or make(family, inference=True),
        clip=None,
        run=settings,
        adapter=AdapterSettings(rank=4),
        optimizing=OptimizerSettings(),
        noise=NoiseSettings(),
        name=name,
        checkpointing=checkpointing,
        graph={},
        node_id=None,
    )


def run(a_job):
    with torch.inference_mode():
        return run_training(a_job)


def result(a_job):
    """(LoRA, losses, line)"""
    done = run(a_job)
    return done.lora, done.losses, done.line


def with_task(a_job, **changes):
    """The job with another task: its data, prompts, scores."""
    return dataclasses.replace(a_job, task=dataclasses.replace(a_job.task, **changes))


def state(name="test"):
    (folder,) = paths.runs_folder().glob(f"{name}-*")
    return json.loads((folder / "run.json").read_text())


def fail_at(monkeypatch, step, make_error):
    """The model raises at its step-th prediction."""
    original, calls = host.denoiser.ComfyDenoiser.denoise, []

    def denoise(self, x, sigma, conds):
        calls.append(1)
        if len(calls) == step:
            raise make_error()
        return original(self, x, sigma, conds)

    monkeypatch.setattr(host.denoiser.ComfyDenoiser, "denoise", denoise)


def test_the_loss_falls_on_a_set_that_can_be_learnt_by_heart(folders):
    _, losses, _ = result(job(steps=150, learning_rate=5e-3, encoded=data(count=1)))
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20]), f"{sum(losses[:20]) / 20:.3f} -> {sum(losses[-20:]) / 20:.3f}"


def test_out_of_memory_keeps_the_run_and_names_the_need_and_three_settings(folders, monkeypatch):
    fail_at(monkeypatch, 4, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        result(job())
    words = str(caught.value)
    assert "GiB were in use" in words
    assert "checkpointing to 'per block'" in words
    assert "lower batch from 2" in words
    assert "lower rank" in words
    assert state()["step"] == 3
    monkeypatch.undo()
    resumed = result(job())[0]
    whole = result(job(name="whole"))[0]
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(folders):
    with pytest.raises(Diverged, match="The loss became nan .* at step .*Lower the learning rate"):
        a_job = job(steps=30, save_every=5)
        result(with_task(a_job, data=Poisoned(a_job.task.data, at=12)))
    assert state()["step"] == 10
    (folder,) = paths.runs_folder().glob("test-*")
    assert (folder / "test-step000010.safetensors").exists()


class Poisoned:
    """A dataset whose batches turn NaN from one draw on."""

    def __init__(self, inner, at):
        self.inner, self.at, self.draws = inner, at, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def make_batch(self, picks, rng):
        self.draws += 1
        batch = self.inner.make_batch(picks, rng)
        if self.draws >= self.at:
            batch.x0 = batch.x0 * float("nan")
        return batch


def test_a_full_disk_leaves_the_older_file_whole_and_says_what_is_missing(folders, monkeypatch):
    result(job(steps=3))
    (folder,) = paths.runs_folder().glob("test-*")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"could not be written \(No space left on device\): .* MiB are needed and .* MiB are free"
    ):
        result(job(steps=6))
    monkeypatch.setattr(os, "fsync", real)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert result(job(steps=6))[0].steps == 6


@pytest.fixture
def anima_unknown(monkeypatch):
    """Anima as a family that no test covers."""
    find = host.session.find_patcher_family
    monkeypatch.setattr(host.session, "find_patcher_family", lambda *a: dataclasses.replace(find(*a), known=False))


@pytest.mark.usefixtures("anima_unknown")
def test_an_unknown_family_is_checked_first_and_then_trained(folders, monkeypatch):
    checked = []
    original = host.checks.check_gradients
    monkeypatch.setattr(host.checks, "check_gradients", lambda *args: checked.append(original(*args)))
    lora, _, _ = result(job("anima", steps=2))
    assert len(checked) == 1
    assert lora


@pytest.mark.usefixtures("anima_unknown")
def test_a_failed_self_check_trains_nothing(folders, monkeypatch):
    def refuse(*_):
        raise RuntimeError("its gradients are off by 40%")

    monkeypatch.setattr(host.checks, "check_gradients", refuse)
    with pytest.raises(RuntimeError, match="gradients are off"):
        result(job("anima"))
    assert not list(paths.runs_folder().glob("*/*.safetensors"))


def test_per_block_checkpointing_trains_the_same_lora(folders):
    plain, blocks = (
        result(job(name="plain"))[0],
        result(job(name="blocks", model=make(FAMILY, inference=True), checkpointing="per block"))[0],
    )
    error = max(float((plain[k] - blocks[k]).abs().max()) for k in plain)
    assert error < 1e-6, f"{error:.1e}"


@pytest.mark.parametrize(("mask", "counts"), [(True, False), (False, True)], ids=["masked", "unmasked"])
def test_an_error_where_the_mask_is_0_does_not_count(folders, mask, counts):
    """The prediction is moved by 3 in the right half of the image; a mask that lets only the left half through must
    not see it."""
    left = torch.zeros(1, *latent_shape(FAMILY)[-2:])
    left[..., : left.shape[-1] // 2] = 1

    def loss(moved):
        encoded = data(count=1, mask=left if mask else None)
        with (
            torch.inference_mode(),
            host.session.open_training_session(make(FAMILY, inference=True), AdapterSettings(rank=4)) as session,
        ):
            ask = session.denoiser.denoise
            session.denoiser.denoise = lambda x, sigma, conds: ask(x, sigma, conds) + moved * (1 - left)
            method = LoraTraining(session.denoiser, session.adapters, encoded)
            return method.loss(torch.Generator().manual_seed(0)).item()

    assert (loss(3.0) != loss(0.0)) is counts


def test_encoded_and_latents_together_are_refused():
    with pytest.raises(ValueError, match="Both encoded and latents/conditioning are connected"):
        select_training_data([data()], [{"samples": torch.zeros(1)}], None)


def test_the_text_encoder_without_clip_is_refused(folders):
    a_job = dataclasses.replace(job(), adapter=AdapterSettings(rank=4, text_encoder=True))
    with pytest.raises(ValueError, match="no CLIP is connected"):
        result(a_job)


def test_the_input_model_carries_no_patches_afterwards_and_the_output_does(folders):
    a_job = job(steps=2)
    lora, _, _ = result(a_job)
    patched, _ = host.lora_keys.apply_lora(a_job.model, None, lora)
    assert not a_job.model.patches
    assert len(patched.patches) == len(host.lora_keys.list_lora_layers(lora))
