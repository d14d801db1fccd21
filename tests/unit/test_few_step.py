"""Distilled models: contrastive targets, drift at the model's own few steps, and what is done when nobody chose."""

import dataclasses

import pytest
import torch
from trainyard.tests.unit.toy import Denoiser, Net, Perfect, adapters, dataset, rng
from trainyard.trainers.methods import few_step
from trainyard.trainers.methods.few_step import FewStepPlan, contrastive_target, drift_loss, frozen_step, plan_few_steps
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.methods.prior import PriorData, PriorSettings
from trainyard.trainers.settings import DISTILLED_MODES, NoiseSettings


def lora(plan=FewStepPlan(), denoiser=None, network=None, dropout=0.0, **more):  # noqa: B008
    network = network or Net()
    data = dataset(dropout=dropout)
    return LoraTraining(denoiser or Denoiser(network), adapters(network), data, batch=2, few_step=plan, **more)


def test_the_contrastive_target_by_hand():
    """x0 3, the frozen model's own 1 under the empty caption, g 2: 1 + 2 * (3 - 1) = 5; a dropped caption keeps 3. As
    velocities at sigma 0.5 from x = 4: v = 2, u = 6, u + 2 * (v - u) = -2, and 4 - 0.5 * -2 = 5."""
    method = lora(FewStepPlan(contrast=2.0), Perfect(torch.ones(1, 2, 4, 4)))
    x, x0, sigma = torch.full((2, 2, 4, 4), 4.0), torch.full((2, 2, 4, 4), 3.0), torch.full((2,), 0.5)
    goal = contrastive_target(method, x, x0, sigma, [], [False, True])
    assert goal[0].unique().tolist() == [5.0] and goal[1].unique().tolist() == [3.0]


def test_contrast_1_without_drift_is_the_plain_loss():
    assert torch.equal(lora().loss(rng(3)), lora(FewStepPlan(contrast=1.0)).loss(rng(3)))
    assert not torch.equal(lora().loss(rng(3)), lora(FewStepPlan(contrast=2.0)).loss(rng(3)))


def test_the_empty_caption_is_asked_without_the_adapters():
    method, asked = lora(FewStepPlan(contrast=2.0)), []
    denoise = method.denoiser.denoise
    method.denoiser.denoise = lambda x, sigma, conds: (
        asked.append((method.adapters.strength, conds)) or denoise(x, sigma, conds)
    )
    method.loss(rng(1))
    (off, empty), (on, told) = asked
    assert (off, on) == (0, 1) and not any(cond["cross_attn"].any() for cond in empty)
    assert all(cond["cross_attn"].any() for cond in told)


def test_nothing_drifts_before_the_first_step_and_what_changed_is_pulled_back():
    method = lora(FewStepPlan(drift=1.0))
    batch = method.data.make_batch([0, 1], rng())
    drift = lambda: drift_loss(method, batch.x0, batch, method.few_step, rng(2))
    assert drift().item() == 0
    with torch.no_grad():
        for p in method.parameters():
            p.copy_(torch.randn(p.shape, generator=rng(4)) * 0.2)
    loss = drift()
    loss.backward()
    assert loss.item() > 0 and all(p.grad is not None for p in method.parameters())


def test_the_last_of_four_steps_is_where_four_euler_steps_of_the_frozen_model_lead():
    method, noise = lora(), torch.randn(2, 2, 4, 4, generator=rng(5))
    conds = [method.data.store.load("empty")] * 2
    x = noise
    for level in (1.0, 0.75, 0.5):
        x0 = method.denoiser.denoise(x, torch.full((2,), level), conds)
        x = x - 0.25 * (x - x0) / level
    seen, sigma, _ = frozen_step(method, noise, conds, 4, 3)
    assert torch.allclose(seen, x, atol=1e-5) and sigma.tolist() == [0.25, 0.25]


def test_drift_is_measured_under_the_class_prompts_where_there_are_some():
    cond = {"cross_attn": torch.full((1, 1, 6), 7.0)}
    prior = PriorData(PriorSettings(class_prompt="cat"), {"cat": cond})
    method, asked = lora(FewStepPlan(drift=1.0), prior=prior), []
    batch = method.data.make_batch([0, 1], rng())
    denoise = method.denoiser.denoise
    method.denoiser.denoise = lambda x, sigma, conds: asked.extend(conds) or denoise(x, sigma, conds)
    drift_loss(method, batch.x0, batch, method.few_step, rng(2))
    assert asked and all(torch.equal(one["cross_attn"], cond["cross_attn"]) for one in asked)


@pytest.mark.parametrize("kind", DISTILLED_MODES[2:])
def test_images_without_an_empty_caption_are_refused(kind):
    with pytest.raises(ValueError, match="needs the empty caption.*set distilled to plain"):
        lora(plan_few_steps(NoiseSettings(distilled=kind)), dropout=None)


@pytest.mark.parametrize("kind, contrast, drift", [
    ("plain", 1.0, 0.0), ("contrastive", 3.0, 0.0), ("drift", 1.0, 0.5), ("contrastive and drift", 3.0, 0.5),
])  # fmt: skip
def test_what_was_chosen_wins_over_the_family(kind, contrast, drift):
    noise = NoiseSettings(distilled=kind, contrast=3.0, drift_weight=0.5)
    for family_steps in (0, 4):
        plan = plan_few_steps(noise, family_steps)
        assert (plan.contrast, plan.drift, plan.by_family) == (contrast, drift, False)


def test_left_open_a_few_step_family_has_its_own_default_and_others_train_plainly(monkeypatch):
    monkeypatch.setattr(few_step, "FEW_STEP_DEFAULT", "contrastive and drift")
    assert plan_few_steps(NoiseSettings()) == FewStepPlan()
    plan = plan_few_steps(NoiseSettings(), 8)
    assert not plan.is_plain and plan.by_family and "default of a few-step model" in plan.describe()
    assert plan_few_steps(NoiseSettings(few_steps=2), 8).steps == 2


def test_a_plan_is_told_in_words():
    both = FewStepPlan(2.5, 1.0, 4)
    assert both.describe() == "contrastive target, guidance 2.5 and drift at 4 steps, weight 1"
    assert FewStepPlan().describe() == "" and "default" in dataclasses.replace(both, by_family=True).describe()
