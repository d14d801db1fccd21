"""Prior preservation through the Train LoRA job, on ComfyUI's own classes."""

import pytest
import torch
from trainyard.nodes.train.prior import PriorPreservation
from trainyard.tests.comfy.families import cond
from trainyard.tests.comfy.test_train_lora import data, job, result, with_task
from trainyard.trainers.methods.prior import PriorData, PriorSettings

KEEP = PriorSettings(class_prompt="dog", weight=2.0)


def dog(family):
    ((tensor, extras),) = cond(family, 7)
    return {"dog": {"cross_attn": tensor, **extras}}


def with_prior(prior, family="sd3", **run):
    return with_task(job(family, steps=3, learning_rate=1e-2, **run), prior=prior)


@pytest.mark.parametrize(
    "family, checkpointing", [("sd3", "off"), ("sd3", "per block"), ("sd15", "off"), ("qwen", "off")]
)
def test_a_prompt_is_preserved_on_real_models(family, checkpointing, folders):
    """The first loss is the same: nothing has drifted yet. Later ones hold the drift, and another LoRA comes out."""
    run = dict(checkpointing=checkpointing)
    alone, losses, _ = result(with_prior(None, family, **run))
    kept, kept_losses, line = result(with_prior(PriorData(KEEP, dog(family)), family, **run))
    assert kept_losses[0] == pytest.approx(losses[0], rel=1e-6) and kept_losses[2] > losses[2]
    assert alone.keys() == kept.keys() and not all(torch.equal(alone[k], kept[k]) for k in alone)
    assert "already trained" not in line, "it is a run of its own"


def test_class_images_change_the_run_and_pressing_run_again_trains_nothing(folders):
    prior = PriorData(PriorSettings(), data=data(count=2))
    first, _, _ = result(with_prior(prior))
    again, _, line = result(with_prior(prior))
    assert "already trained" in line and all(torch.equal(first[k], again[k]) for k in first)


def test_class_images_of_another_vae_are_refused():
    wrong = data("sd15", count=1)
    with pytest.raises(ValueError, match="The latents have 4 channels and this MODEL expects 16"):
        with_prior(PriorData(PriorSettings(), data=wrong)).check()


def test_a_class_prompt_without_a_text_encoder_says_what_to_connect():
    with pytest.raises(ValueError, match="CLIP is empty"):
        PriorPreservation.execute(class_prompt="a dog", weight=1.0)
    with pytest.raises(ValueError, match="nothing to preserve"):
        PriorPreservation.execute(class_prompt="", weight=1.0)
