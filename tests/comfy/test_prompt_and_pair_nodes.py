"""Train LECO, sliders and differences as nodes, on tiny models of ComfyUI's own classes and on the real server."""

import dataclasses
import json

import pytest
import torch
from trainyard.nodes import host, paths
from trainyard.nodes.train import image_pairs, widgets
from trainyard.nodes.train.job import TrainingJob
from trainyard.nodes.train.run import format_forward_counts, run_training
from trainyard.tests.comfy.families import cond, latent_shape, make
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.methods.image_pairs import AddiftTraining, ImageSlider
from trainyard.trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings


def pairs(family, count=2):
    rng = torch.Generator().manual_seed(5)
    latents = [{"samples": torch.randn(latent_shape(family), generator=rng)} for _ in range(2 * count)]
    data = EncodedDataset.from_core(latents, [cond(family, seed // 2) for seed in range(2 * count)])
    data.items = [
        dataclasses.replace(item, pair=str(i // 2), strength=(1.0, -1.0)[i % 2]) for i, item in enumerate(data.items)
    ]
    return data


def pair_job(method, family="sd3", name="pairs", calibrate="off", **run):
    task = image_pairs.PairTask(data=pairs(family), method_class=method, strength=0.25)
    return TrainingJob(
        task=task, model=make(family, inference=True), adapter=AdapterSettings(rank=4),
        run=RunSettings(**{"steps": 4, "learning_rate": 1e-3, "batch": 1, "seed": 1, "save_every": 0, **run}), optimizing=OptimizerSettings(),
        noise=NoiseSettings(), name=name, checkpointing="off", graph={}, node_id=None, calibrate=calibrate,
    )  # fmt: skip


@pytest.mark.parametrize("method", [ImageSlider, AddiftTraining])
def test_a_run_of_pairs_ends_in_a_file_is_found_again_and_counts_its_forwards(folders, method):
    with torch.inference_mode():
        done = run_training(pair_job(method))
        lora = done.lora
        assert lora and len(done.losses) == 4 and "4 steps" in done.line
        spent = {"ImageSlider": "2.0 (2.0 student)", "Change": "4.0 (2.0 frozen + 2.0 student)"}[
            method.fingerprint_name
        ]
        assert format_forward_counts(done) == f"; forwards per step: {spent}, {spent[:3]} planned"
        again = run_training(pair_job(method))
    assert "already trained" in again.line and format_forward_counts(again) == ""
    assert all(torch.equal(again.lora[k], lora[k]) for k in lora)
    assert len(list(paths.runs_folder().glob("[!.]*"))) == 1


def test_the_curve_of_a_run_is_in_its_file_and_training_is_the_same_with_and_without_it(folders):
    with torch.inference_mode():
        plain = run_training(pair_job(ImageSlider, name="plain")).lora
        done = run_training(pair_job(ImageSlider, name="curve", calibrate="after training"))
    lora = done.lora
    assert (
        json.loads(lora.metadata["trainyard.curve"])["strengths"] == [-2.0, -1.0, 0.0, 1.0, 2.0]
        and "trainyard.curve" not in plain.metadata
    )
    assert done.curve.effect[2] == 0.0 and done.curve.unit == "half the difference of the pairs"
    assert all(torch.equal(plain[k], lora[k]) for k in lora)


def test_pictures_that_are_no_pairs_are_refused_before_the_long_work(folders):
    job = pair_job(ImageSlider)
    job.task.data.items = [dataclasses.replace(item, pair=None) for item in job.task.data.items]
    with pytest.raises(ValueError, match="Put Image Pairs between Load Dataset and Encode Dataset"):
        run_training(job)


@pytest.mark.parametrize(
    ("family", "resolution", "shape"), [("sd15", 64, (4, 8, 8)), ("sd3", 80, (16, 10, 10)), ("flux", 64, (16, 8, 8))]
)
def test_latent_shapes_are_the_models_own(family, resolution, shape):
    model = make(family)
    assert host.checks.square_latent_shapes(model, resolution) == (shape,)
    sizes = {s[-2:] for s in host.checks.square_latent_shapes(model, 256, dynamic=True)}
    assert sizes == {(h, w) for h in (16, 24, 32) for w in (16, 24, 32)}


def test_a_text_encoder_that_is_trained_is_refused():
    with pytest.raises(ValueError, match="Switch it off in Adapter Settings"):
        widgets.check_difference_adapter(AdapterSettings(text_encoder=True))


def test_adapters_that_are_not_odd_in_strength_are_refused_for_sliders_with_the_reason():
    with pytest.raises(ValueError, match="algorithm is DoRA, whose effect at -1 is not the opposite of that at \\+1"):
        widgets.check_difference_adapter(AdapterSettings(algorithm="DoRA"))
    for algorithm in ("LoRA", "LoHa", "LoKr"):
        assert widgets.check_difference_adapter(AdapterSettings(algorithm=algorithm)).algorithm == algorithm


@pytest.mark.parametrize(
    "idle",
    [
        dict(weighting="min-SNR"),
        dict(loss="Huber"),
        dict(noise_offset=0.1),
        dict(pyramid_levels=4),
        dict(perturbation=0.1),
    ],
)
def test_noise_settings_that_would_do_nothing_are_refused(idle):
    ((name, value),) = idle.items()
    with pytest.raises(
        ValueError, match=f"{name} is {value} in Noise and Loss Settings, and it does nothing here: because"
    ):
        widgets.check_unused_noise_settings(NoiseSettings(**idle), "because")
    widgets.check_unused_noise_settings(NoiseSettings(min_time=0.2, density="uniform"), "because")
