"""The toy models are real enough to build tests on: ComfyUI's own sampler runs every one of them."""

import pytest
import torch

from .families import FAMILIES, cond, latent_shape, make


def sample(model, family, caption=1, steps=2):
    """A latent from ComfyUI's own sampler, in the units of a LATENT wire."""
    import comfy.sample

    noise = torch.randn(latent_shape(family), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, steps, 2.0, "euler", "normal", cond(family, caption), cond(family, 0),
                                   torch.zeros_like(noise), disable_pbar=True, seed=0)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_of_every_family_samples_finite_pictures_that_depend_on_the_caption(family, comfy):
    model = make(family, inference=True)
    first, second = sample(model, family, caption=1), sample(model, family, caption=2)
    assert first.shape == latent_shape(family)
    assert first.isfinite().all()
    assert first.std() > 0.01
    assert (first - second).std() > 1e-4 * first.std(), "the caption changes nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_makes_the_same_weights_and_another_seed_others(family, comfy):
    first, same, other = (dict(make(family, seed=seed).model.diffusion_model.named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.parametrize("family, prediction", [("sd15", "EPS"), ("sd2_v", "V_PREDICTION"), ("sdxl", "EPS"), ("sdxl_v", "V_PREDICTION"),
                                                ("sd3", "FLOW"), ("flux", "FLUX")])  # fmt: skip
def test_a_tiny_model_predicts_what_its_family_predicts(family, prediction, comfy):
    model = make(family).model
    assert model.model_type.name == prediction
    assert bool(getattr(model.model_sampling, "zsnr", False)) == (family == "sdxl_v")


def test_weights_made_under_inference_mode_are_inference_tensors_as_from_a_loader_node(comfy):
    assert all(p.is_inference() for p in make("sd3", inference=True).model.diffusion_model.parameters())
    assert not any(p.is_inference() for p in make("sd3").model.diffusion_model.parameters())


def test_a_deep_clone_holds_equal_weights_of_its_own(comfy):
    model = make("sd15")
    clone = model.clone(force_deepcopy=True)
    ours, theirs = (list(m.model.diffusion_model.parameters()) for m in (model, clone))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(ours, theirs, strict=True))
