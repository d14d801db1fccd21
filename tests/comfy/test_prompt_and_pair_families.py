"""One step of every kind of difference on ComfyUI's own classes at tiny size: finite, with gradients, the same with
recomputed blocks, also at strength -1, and the base weights are what they were."""

import dataclasses

import pytest
import torch
from trainyard.nodes import host
from trainyard.tests.comfy.families import FAMILIES, cond, latent_shape, make
from trainyard.tests.comfy.test_host import RANK_4, fingerprint, shake
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.loop import step_rng
from trainyard.trainers.methods.image_pairs import AddiftTraining, ImageSlider
from trainyard.trainers.methods.prompts import (
    PromptDifferenceTraining,
    make_leco_targets,
    make_preserve_targets,
    make_slider_targets,
)
from trainyard.trainers.methods.rollouts import PromptTask, RolloutPoints, StudentTeacherModel
from trainyard.trainers.settings import NoiseSettings, PointSettings

PROMPTS = ("", "cat", "old cat", "young cat")


def spoken(family):
    """prompt -> conditioning, as host.TextEncoder gives it."""
    entries = {prompt: cond(family, seed)[0] for seed, prompt in enumerate(PROMPTS)}
    return {prompt: {"cross_attn": tensor, **extras} for prompt, (tensor, extras) in entries.items()}


def images(family) -> EncodedDataset:
    """One pair: the image at +1 and the one at -1."""
    rng = torch.Generator().manual_seed(5)
    latents = [{"samples": torch.randn(latent_shape(family), generator=rng)} for _ in range(2)]
    data = EncodedDataset.from_core(latents, [cond(family, seed)[0:1] for seed in range(2)])
    data.items = [
        dataclasses.replace(item, pair="one", strength=s) for item, s in zip(data.items, (1.0, -1.0), strict=True)
    ]
    return data


def rollout_kind(session, family):
    """Two ways of three steps; a pull of LECO at +1, of a slider at +1 and at -1, and one that keeps a prompt."""
    pulls = (
        make_leco_targets("cat", "old cat", "", "", "erase", 2.0)
        + make_slider_targets("cat", "old cat", "young cat", 2.0)
        + make_preserve_targets("young cat")
    )
    model = StudentTeacherModel(session.denoiser, session.adapters, spoken(family))
    task = PromptTask(pulls, "cat", shapes=(latent_shape(family)[1:],))
    return PromptDifferenceTraining(
        model, [task], RolloutPoints(model, [task], PointSettings(sampling_steps=3, ways=2), NoiseSettings(), 2.0)
    )


def pair_kind(kind):
    return lambda session, family: kind(
        session.denoiser, session.adapters, images(family), NoiseSettings(), session.family.density
    )


KINDS = {
    "leco and text slider": rollout_kind,
    "image slider": pair_kind(ImageSlider),
    "change": pair_kind(AddiftTraining),
}


def stepped(kind, family, model, checkpointing):
    """(losses, gradient) of the first step of a run."""
    with (
        torch.inference_mode(),
        host.session.open_training_session(model, RANK_4, checkpointing=checkpointing) as session,
    ):
        shake(session.adapters, size=0.02)
        losses = KINDS[kind](session, family).loss(step_rng(0, 0))
        losses.sum().backward()
        assert session.adapters.strength == 1.0
        gradient = [
            torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in session.adapters.parameters()
        ]
        return losses.detach().clone(), torch.cat(gradient).clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_right_gradients_and_leaves_the_base_alone(family, kind):
    model = make(family, inference=True)
    before = fingerprint(model)
    losses, gradient = stepped(kind, family, model, "off")
    again, recomputed = stepped(kind, family, model, "per block")
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert gradient.norm() > 0, "nothing would be learnt"
    torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-7)
    error = float((recomputed - gradient).norm() / gradient.norm())
    assert error < 1e-5, f"recomputed blocks change the gradient by {error:.1e}"
    assert fingerprint(model) == before, "the base weights have changed"
