"""Adapters written as others: factors by hand, what a lower rank loses, and what a file says of itself."""

import pytest
import torch
from trainyard.trainers.adapters.exports import (
    MAGNITUDE,
    ExportPlan,
    adapter_kind,
    changed_weight,
    cut_rank,
    export_layer,
    export_metadata,
    factor_change,
    list_kinds,
    list_readers,
    pad_to_rank,
    row_norms,
    slice_rows,
)
from trainyard.trainers.settings import COMFYUI, DIFFUSERS, LYCORIS, WEBUI

DRAW = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(shape, generator=DRAW)


def lora(outputs=6, inputs=4, rank=2, alpha=1.0):
    return {
        "lora_down.weight": drawn(rank, inputs),
        "lora_up.weight": drawn(outputs, rank),
        "alpha": torch.tensor(alpha),
    }


def never():
    raise AssertionError("the model's weight must not be asked for")


ADAPTERS = {  # (tensors, dW by the formula of its paper, rank of the factors)
    "LoRA": (t := lora(), 0.5 * t["lora_up.weight"] @ t["lora_down.weight"], 2),
    "LoCon": (
        t := {"lora_down.weight": drawn(2, 3, 3, 3), "lora_up.weight": drawn(40, 2, 1, 1)},
        t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1),
        2,
    ),
    "LoHa": (
        t := {"hada_w1_a": drawn(9, 2), "hada_w1_b": drawn(2, 8), "hada_w2_a": drawn(9, 2), "hada_w2_b": drawn(2, 8),
              "alpha": torch.tensor(3.0)},
        1.5 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
        4,
    ),
    "LoHa of a rank above its layer": (
        t := {"hada_w1_a": drawn(5, 3), "hada_w1_b": drawn(3, 7), "hada_w2_a": drawn(5, 3), "hada_w2_b": drawn(3, 7)},
        (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
        5,
    ),
    "LoKr": (
        t := {"lokr_w1": drawn(2, 3), "lokr_w2_a": drawn(8, 2), "lokr_w2_b": drawn(2, 6), "alpha": torch.tensor(1.0)},
        0.5 * torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
        4,
    ),
    "LoKr of whole matrices, whose alpha nobody reads": (
        t := {"lokr_w1": drawn(3, 2), "lokr_w2": drawn(5, 4), "alpha": torch.tensor(7.0)},
        torch.kron(t["lokr_w1"], t["lokr_w2"]),
        8,
    ),
    "LoKr of factors on both sides": (
        t := {"lokr_w1_a": drawn(4, 1), "lokr_w1_b": drawn(1, 3), "lokr_w2_a": drawn(5, 2), "lokr_w2_b": drawn(2, 4)},
        torch.kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
        2,
    ),
    "whole matrices": (t := {"diff": drawn(6, 4)}, t["diff"], 4),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_factors_are_the_change_exactly_and_of_the_least_rank(name):
    tensors, change, rank = ADAPTERS[name]
    up, down = factor_change(tensors)
    assert up.shape[1] == len(down) == rank
    assert torch.allclose(up @ down, change, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_lower_rank_loses_what_singular_values_say(shape):
    """All but the two largest singular values, as a share of the norm."""
    up, down = drawn(shape[0], 5), drawn(5, shape[1])
    values = torch.linalg.svdvals(up @ down)
    less_up, less_down, lost = cut_rank(up, down, 2)
    assert less_up.shape == (shape[0], 2) and less_down.shape == (2, shape[1])
    assert lost == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
    assert float((less_up @ less_down - up @ down).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-4)
    assert cut_rank(up, down, 5)[2] == cut_rank(up, down, 0)[2] == 0.0


def test_zeros_fill_up_a_rank_and_change_nothing():
    tensors = export_layer(lora(), (6, 4), never, ExportPlan(DIFFUSERS)).tensors
    more = pad_to_rank(tensors, 5)
    assert len(more["lora_down.weight"]) == more["lora_up.weight"].shape[1] == float(more["alpha"]) == 5
    assert torch.equal(
        factor_change(more)[0] @ factor_change(more)[1], factor_change(tensors)[0] @ tensors["lora_down.weight"]
    )


def dora(weight):
    tensors = lora(*weight.shape)
    return tensors | {"dora_scale": row_norms(weight)[:, None] * torch.linspace(0.9, 1.2, len(weight))[:, None]}


def test_a_dora_keeps_its_change_in_each_program_by_that_programs_own_norm():
    """By hand: ComfyUI divides by |W|, LyCORIS and peft by |W + dW|, A1111 gets the change itself."""
    weight = drawn(6, 4)
    tensors = dora(weight)
    merged = weight + 0.5 * tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    wanted = merged * tensors["dora_scale"] / weight.norm(dim=1, keepdim=True)
    assert torch.allclose(changed_weight(tensors, weight), wanted, rtol=1e-5)

    plan = lambda target, **more: export_layer(tensors, (6, 4), lambda: weight, ExportPlan(target, **more)).tensors
    theirs = plan(LYCORIS)["dora_scale"]
    assert theirs.shape == (6, 1) and torch.allclose(
        merged * theirs / merged.norm(dim=1, keepdim=True), wanted, rtol=1e-5
    )
    peft = plan(DIFFUSERS, dora=True)
    assert torch.allclose(merged * (peft[MAGNITUDE] / merged.norm(dim=1))[:, None], wanted, rtol=1e-5)
    assert torch.allclose(weight + plan(WEBUI)["diff"], wanted, rtol=1e-5)
    less = export_layer(tensors, (6, 4), lambda: weight, ExportPlan(WEBUI, rank=3))
    up, down = factor_change(less.tensors)
    assert len(down) == 3 and float((weight + up @ down - wanted).norm() / (wanted - weight).norm()) == pytest.approx(
        less.lost, rel=1e-3
    )


def test_a_layer_without_dora_in_a_network_with_dora_is_left_as_it_is_by_its_norms():
    weight, tensors = drawn(6, 4), lora()
    found = export_layer(tensors, (6, 4), lambda: weight, ExportPlan(DIFFUSERS, dora=True)).tensors
    assert torch.allclose(found[MAGNITUDE], changed_weight(tensors, weight).norm(dim=1), rtol=1e-5)


def test_a_scale_of_the_inputs_stays_for_a1111_and_is_refused_for_lycoris():
    weight = drawn(6, 4)
    tensors = lora() | {"dora_scale": drawn(1, 4).abs()}
    assert export_layer(tensors, (6, 4), lambda: weight, ExportPlan(WEBUI)).tensors is tensors
    with pytest.raises(ValueError, match="its dora_scale is one of the inputs"):
        export_layer(tensors, (6, 4), lambda: weight, ExportPlan(LYCORIS))
    merged = weight + 0.5 * tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    up, down = factor_change(export_layer(tensors, (6, 4), lambda: weight, ExportPlan(DIFFUSERS)).tensors)
    assert torch.allclose(weight + up @ down, merged * tensors["dora_scale"] / merged.norm(dim=0), atol=1e-5)


def test_rows_of_a_layer_take_their_rows_of_everything():
    tensors = {
        "lora_down.weight": drawn(2, 4),
        "lora_up.weight": drawn(6, 2),
        MAGNITUDE: drawn(6),
        "dora_scale": drawn(6, 1),
    }
    part = slice_rows(tensors, lambda rows: rows[2:4])
    assert torch.equal(part["lora_up.weight"], tensors["lora_up.weight"][2:4])
    assert (len(part[MAGNITUDE]), len(part["dora_scale"]), len(part["lora_down.weight"])) == (2, 2, 2)


def test_other_adapters_are_refused_by_what_they_hold():
    with pytest.raises(ValueError, match=r"it holds a1\.weight, b1\.weight, and only LoRA, DoRA"):
        adapter_kind(["a1.weight", "b1.weight", "alpha"])


@pytest.mark.parametrize(
    ("target", "kinds", "base", "readers"),
    [
        (COMFYUI, {"LoRA"}, "sd_v1", ["ComfyUI", "Forge", "A1111", "kohya's sd-scripts", "LyCORIS"]),
        (COMFYUI, {"LoRA", "DoRA"}, "sdxl_base_v1-0", ["ComfyUI", "Forge"]),
        (WEBUI, {"LoKr"}, "flux1", ["ComfyUI", "Forge", "LyCORIS"]),
        (WEBUI, {"LoRA"}, "wan", ["ComfyUI"]),
        (LYCORIS, {"LoRA", "DoRA"}, "sd_v1", ["LyCORIS"]),
        (DIFFUSERS, {"LoRA"}, "flux1", ["diffusers", "ComfyUI"]),
        (COMFYUI, {"other"}, "sd_v1", ["ComfyUI"]),
    ],
)
def test_the_programs_that_load_a_file_are_told(target, kinds, base, readers):
    assert list_readers(target, kinds, base) == readers


def test_kinds_are_told_by_names():
    assert list_kinds(["a.lora_up.weight", "a.alpha", "a.dora_scale"]) == {"LoRA", "DoRA"}
    assert list_kinds(["a.hada_w1_a", "b.lokr_w2", "c.diff", "d.oft_blocks"]) == {
        "LoHa",
        "LoKr",
        "whole matrices",
        "other",
    }
    assert list_kinds(["unet.a.processor.to_q_lora.up.weight", "t.lora_A.weight"]) == {"LoRA"}


def test_metadata_tells_the_network_that_is_in_the_file_now():
    before = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "4", "ss_network_args": '{"algo": "loha"}',
              "ss_base_model_version": "flux1", "modelspec.implementation": "x", "ss_steps": "7"}  # fmt: skip
    after = export_metadata(before, DIFFUSERS, {"t.lora_A.weight": drawn(16, 4), "t.lora_B.weight": drawn(6, 16)})
    assert (after["ss_network_module"], after["ss_network_dim"], after["ss_network_alpha"]) == (
        "networks.lora",
        "16",
        "16",
    )
    assert after["ss_network_args"] == "{}" and after["ss_steps"] == "7" and after["trainyard.saved_for"] == DIFFUSERS
    assert after["modelspec.implementation"] == "https://github.com/huggingface/diffusers"
    kept = export_metadata(before, WEBUI, {"t.hada_w1_a": drawn(4, 4)})
    assert kept["ss_network_module"] == "lycoris.kohya"
    assert kept["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "LoKr of whole matrices, whose alpha nobody reads"])
def test_lycoris_gets_loha_and_lokr_of_scale_one(name):
    """It scales them twice where it merges them."""
    tensors, change, _ = ADAPTERS[name]
    found = export_layer(tensors, tuple(change.shape), never, ExportPlan(LYCORIS)).tensors
    rank = next((len(found[key]) for key in ("hada_w1_b", "lokr_w2_b") if key in found), 1)
    assert float(found["alpha"]) == rank
    up, down = factor_change(found)
    assert torch.allclose(up @ down, change, atol=1e-5)


def test_a_whole_matrix_of_a_convolution_has_its_kernel_in_axes_of_its_own():
    tensors = {"lokr_w1": drawn(2, 2), "lokr_w2": drawn(3, 4 * 9)}
    found = export_layer(tensors, (6, 8, 3, 3), never, ExportPlan(LYCORIS)).tensors
    assert found["lokr_w2"].shape == (3, 4, 3, 3)
    assert torch.equal(
        factor_change(found)[0] @ factor_change(found)[1], factor_change(tensors)[0] @ factor_change(tensors)[1]
    )
