"""The check of an unknown family's gradients: models of the host with right ones, and with in-place updates that are
left as they are."""

import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import CoreModelPatcher
from trainyard.nodes import host
from trainyard.nodes.host import out_of_place
from trainyard.nodes.host.gradient_check import GradientProblem, differences_in_fp32, halves_error
from trainyard.tests.comfy import families
from trainyard.tests.comfy.more_families import MORE
from trainyard.tests.comfy.test_host import RANK_4, Problem, captions
from trainyard.tests.comfy.test_train_lora import job, result
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.memory.plan import (
    CHECKPOINTING_PLANS,
    PLAN_OFF,
    PLAN_OFFLOADED,
    PLAN_PER_BLOCK,
    PLAN_PER_BLOCK_CPU,
)

PIXELDIT, LTXV = MORE["pixeldit"], MORE["ltxv"]


@pytest.fixture
def method_updates(monkeypatch):
    """`x.addcmul_(y, z)` stays in the code of a model: PixelDiT's gradients are then off by 12 % in all and by 20 to
    40 % in single layers, and by 1 % along the gradient; LTX-Video's are right under checkpointing alone."""
    monkeypatch.setattr(out_of_place, "is_update", lambda node: False)
    out_of_place.compile_out_of_place.cache_clear()
    yield
    out_of_place.compile_out_of_place.cache_clear()


def build(row, dtype=torch.float32):
    with torch.inference_mode():
        model = families.base_model(row, dtype)
        families.fill(model.diffusion_model, 0)
    return CoreModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def inputs(session, row):
    rng = torch.Generator().manual_seed(3)
    x0 = session.denoiser.model_space(torch.randn(1, *row.latent, generator=rng))
    cross = torch.randn(1, 7, row.context, generator=rng) * 0.5
    return x0, [{"cross_attn": cross, "attention_mask": torch.ones(1, 7)}]


def check(row, plan, dtype=torch.float32, model=None):
    model = model or build(row, dtype)
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4, checkpointing=plan) as session:
        return host.checks.check_gradients(session, *inputs(session, row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_whose_error_is_not_along_them_are_refused(dtype, method_updates):
    with pytest.raises(RuntimeError, match="does not know PixelDiTT2I.* off by .* random halves of the layers"):
        check(PIXELDIT, PLAN_PER_BLOCK, dtype)


@pytest.mark.parametrize("row", [PIXELDIT, LTXV], ids=["PixelDiT", "LTXV"])
def test_updates_by_methods_leave_every_plan_right(row):
    with torch.inference_mode(), host.session.open_training_session(build(row), RANK_4) as session:
        plans = host.checks.find_right_plans(session, *inputs(session, row), CHECKPOINTING_PLANS)
        assert plans == CHECKPOINTING_PLANS
        session.blocks.plan = PLAN_OFF
        assert host.checks.check_gradients(session, *inputs(session, row)) < 1e-3


@pytest.mark.parametrize("family", families.FAMILIES)
def test_right_gradients_show_no_error_in_random_halves(family):
    row = families.TABLE[family]
    with torch.inference_mode(), host.session.open_training_session(build(row), RANK_4) as session:
        problem = GradientProblem(session, Problem(session, family).x0, captions(family))
        with problem.shaken():
            error = halves_error(problem, problem.gradient())
    assert error < 0.01, f"{family}: {error:.1e}"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_gradients_in_bf16_are_held_against_fp32(family):
    with (
        torch.inference_mode(),
        host.session.open_training_session(build(families.TABLE[family], torch.bfloat16), RANK_4) as session,
    ):
        problem = GradientProblem(session, Problem(session, family).x0, captions(family))
        layers = [m for m in problem.session.denoiser.model.modules() if hasattr(m, "comfy_cast_weights")]
        before = [layer.comfy_cast_weights for layer in layers]
        with problem.shaken():
            error = differences_in_fp32(problem)
        assert [layer.comfy_cast_weights for layer in layers] == before
        assert session.denoiser.model.get_dtype_inference() == torch.bfloat16
    assert error is not None and error < 0.1, f"{family}: {error}"


def test_one_layer_with_half_its_gradient_is_refused():
    """1 of 20 layers: the slope along the gradient is hardly off."""
    row = families.TABLE["flux"]
    with torch.inference_mode(), host.session.open_training_session(build(row), RANK_4) as session:
        problem = Problem(session, "flux")
        name = next(n for n, _ in session.adapters.named_parameters() if "double_blocks/1/img_attn/proj" in n)
        dict(session.adapters.named_parameters())[name].register_hook(lambda grad: grad * 0.5)
        with pytest.raises(RuntimeError, match="off by .* random halves"):
            host.checks.check_gradients(session, problem.x0, problem.conds)


def test_auto_has_only_plans_whose_gradients_are_right_and_a_refusal_names_one_that_works(method_updates):
    with torch.inference_mode(), host.session.open_training_session(build(LTXV), RANK_4) as session:
        given = inputs(session, LTXV)
        plans = host.checks.find_right_plans(session, *given, CHECKPOINTING_PLANS)
        assert plans == (PLAN_PER_BLOCK, PLAN_PER_BLOCK_CPU, PLAN_OFFLOADED)
        assert session.blocks.plan == PLAN_PER_BLOCK
        with pytest.raises(RuntimeError, match="LTXV.*cannot be differentiated.*Under checkpointing 'per block' its"):
            host.checks.find_right_plans(session, *given, (PLAN_OFF,))


def test_a_model_without_a_right_plan_is_refused_with_these_words(method_updates):
    with torch.inference_mode(), host.session.open_training_session(build(PIXELDIT), RANK_4) as session:
        given = inputs(session, PIXELDIT)
        with pytest.raises(RuntimeError, match="PixelDiTT2I.*random halves.*No other kind of checkpointing works"):
            host.checks.find_right_plans(session, *given, (PLAN_OFF, PLAN_PER_BLOCK))


def test_auto_trains_a_model_that_no_plan_but_per_block_can(folders, method_updates):
    with torch.inference_mode():
        latents = [{"samples": torch.randn(1, *LTXV.latent)}]
        data = EncodedDataset.from_core(latents, [[[torch.randn(1, 7, 64), {"attention_mask": torch.ones(1, 7)}]]])
    lora, losses, _ = result(
        job("sd3", model=build(LTXV), encoded=data, name="ltxv-auto", checkpointing="auto", steps=2)
    )
    assert lora and len(losses) == 2
