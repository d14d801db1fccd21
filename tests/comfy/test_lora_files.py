"""LoRA files in the graph: what does not fit is said, and what is no LoRA is refused in words."""

import logging

import comfy.lora
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from trainyard.nodes import host
from trainyard.nodes.train import lora as nodes
from trainyard.tests.comfy.families import make
from trainyard.trainers import file_names
from trainyard.trainers.files import LoraFile, write_lora

TEXT_LAYERS = [f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1" for i in range(8)]


def pairs(layers, down=".lora_down.weight", up=".lora_up.weight"):
    return {
        layer + suffix: torch.zeros(shape)
        for layer, (inputs, outputs) in layers.items()
        for suffix, shape in ((down, (2, inputs)), (up, (outputs, 2)))
    }


@pytest.fixture(scope="module")
def model(comfy):
    return make("sd3", inference=True)


@pytest.fixture(scope="module")
def layers(model):
    """{name in the file: (inputs, outputs)} of two layers of the model."""
    found = {}
    for name, module in model.model.diffusion_model.named_modules():
        if name.startswith("joint_blocks.0") and hasattr(module, "in_features") and len(found) < 2:
            found[f"lora_unet_{name.replace('.', '_')}"] = (module.in_features, module.out_features)
    return found


def test_layers_without_effect_are_counted_and_named(model, layers, caplog):
    strange = {f"lora_unet_elsewhere_{i}": (4, 4) for i in range(8)}
    with caplog.at_level(logging.WARNING):
        out = nodes.ApplyLora.execute(model, LoraFile(pairs({**layers, **strange})), 1.0)
    said = "8 of 10 layers of this LoRA have no effect, because MODEL has no such layers: lora_unet_elsewhere_0, "
    assert said in caplog.text and said in out.ui.as_dict()["text"][0]
    assert out.ui.as_dict()["text"][0].endswith("lora_unet_elsewhere_7. Is it a LoRA for another model?")
    assert len(out.result[0].patches) == 2


def test_parts_that_the_loader_drops_are_named(model, layers, caplog):
    """A layer of another size, a DoRA of peft's names, a stray tensor; and not a bias of q alone, which is applied."""
    (first, (inputs, outputs)), (second, _) = layers.items()
    parts = {
        f"{first}.lora_magnitude_vector": torch.ones(outputs),
        f"{second}.rescale": torch.ones(1),
    }
    lora = pairs({first: (inputs, outputs), "transformer.transformer_blocks.0.attn.to_q": (128, 128)}) | parts
    lora |= {"transformer.transformer_blocks.0.attn.to_q.diff_b": torch.zeros(128)}
    lora |= pairs({second: (inputs, outputs + 8)})
    with caplog.at_level(logging.WARNING):
        out = nodes.ApplyLora.execute(model, LoraFile(lora), 1.0)
    found = host.lora_keys.find_skipped_parts(model, None, LoraFile(lora))
    assert found == sorted([*parts, second])
    said = "3 parts of this LoRA have no effect, because ComfyUI does not read them or the layer has another size: "
    assert said in caplog.text and out.ui.as_dict()["text"][0].startswith(f"{said}{found[0]}, ")


def test_what_the_loader_uses_is_no_part_without_effect(model, layers):
    lora = pairs(layers)
    lora |= {f"{name}.diff_b": torch.zeros(outputs) for name, (_, outputs) in layers.items()}
    lora |= {f"{name}.dora_scale": torch.ones(outputs, 1) for name, (_, outputs) in layers.items()}
    lora |= {f"{name}.lora_magnitude_vector": torch.ones(outputs) for name, (_, outputs) in layers.items()}
    assert host.lora_keys.find_skipped_parts(model, None, LoraFile(lora)) == []


def test_layers_without_effect_are_looked_for_once(model, layers, monkeypatch):
    asked, find = [], host.lora_keys.find_unloadable_layers
    monkeypatch.setattr(host.lora_keys, "find_unloadable_layers", lambda *given: asked.append(given) or find(*given))
    nodes.ApplyLora.execute(model, LoraFile(pairs({**layers, "lora_unet_elsewhere": (4, 4)})), 1.0)
    assert len(asked) == 1


def split_biases(model):
    """{bias change of q, k or v in a diffusers file: (length, bias of the model, first row of it)}"""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    weight = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    names = {name: target for name, target in known.items() if isinstance(target, tuple) and target[0] == weight}
    parts = {f"{name}.diff_b": target for name, target in names.items() if name.startswith("transformer.")}
    return {key: (length, name[:-6] + "bias", first) for key, (name, (_, first, length), *_) in parts.items()}


def test_the_biases_of_q_k_and_v_in_a_diffusers_file_are_applied(model):
    """ComfyUI's own loader reads them and changes nothing."""
    parts = split_biases(model)
    assert len(parts) == 3
    lora = {key: torch.full((length,), 1.0 + number) for number, (key, (length, _, _)) in enumerate(parts.items())}
    out = nodes.ApplyLora.execute(model, LoraFile(lora), 0.5)
    assert out.ui is None
    (name,) = {name for _, name, _ in parts.values()}
    before = torch.zeros(sum(length for length, _, _ in parts.values()))
    after = comfy.lora.calculate_weight(out.result[0].patches[name], before.clone(), name)
    for key, (length, _, first) in parts.items():
        assert torch.equal(after[first : first + length], 0.5 * lora[key]), key


def test_bias_changes_of_layers_without_a_bias_are_said(model, layers, monkeypatch):
    lora = pairs(layers) | {f"{name}.diff_b": torch.ones(outputs) for name, (_, outputs) in layers.items()}
    assert host.lora_keys.find_skipped_parts(model, None, lora) == []
    state = {name: value for name, value in model.model.state_dict().items() if not name.endswith(".bias")}
    monkeypatch.setattr(model.model, "state_dict", lambda: state)
    assert host.lora_keys.find_skipped_parts(model, None, lora) == sorted(f"{name}.diff_b" for name in layers)


def test_layers_of_the_text_encoder_ask_for_clip(model, layers):
    lora = LoraFile(pairs({**layers, **{name: (4, 4) for name in TEXT_LAYERS}}))
    left_out = host.lora_keys.find_unloadable_layers(model, None, lora)
    assert host.lora_keys.describe_left_out_layers(None, lora, left_out).endswith(
        "They belong to the text encoder: connect CLIP to use them."
    )


@pytest.mark.parametrize(("down", "up"), [
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
])  # fmt: skip
def test_a_lora_that_fits_says_nothing_whatever_its_names(model, layers, down, up):
    lora = LoraFile(pairs(layers, down, up) | {f"{next(iter(layers))}.alpha": torch.tensor(1.0)})
    assert host.lora_keys.find_unloadable_layers(model, None, lora) == []
    assert nodes.ApplyLora.execute(model, lora, 1.0).ui is None


def test_a_lora_of_which_nothing_fits_is_refused(model):
    with pytest.raises(ValueError, match=r"fits neither MODEL nor CLIP: none of its 1 layers is known, .*elsewhere"):
        nodes.ApplyLora.execute(model, LoraFile(pairs({"lora_unet_elsewhere": (4, 4)})), 1.0)


@pytest.mark.parametrize("lora", ["a.safetensors", None, 3, ["x"], {"a": "text"}, {"a": None}, {3: torch.zeros(2)}])
def test_what_is_no_lora_is_refused_in_words(model, folders, lora):
    for use in (
        lambda: nodes.SaveLora.execute(lora, "mine"),
        lambda: nodes.ApplyLora.execute(model, lora, 1.0),
    ):
        with pytest.raises(ValueError, match="connect a LORA_MODEL|Connect a LORA_MODEL"):
            use()


def test_metadata_that_is_no_text_is_saved_as_json(folders, comfy):
    lora = LoraFile({"a": torch.ones(2)}, {"steps": 3, "of": {"x": np.float64(2)}})
    assert lora.metadata == {"steps": "3", "of": '{"x": 2.0}'}


def test_a_file_whose_number_of_steps_is_a_word_loads(folders, comfy, monkeypatch):
    save_file({"a": torch.ones(2)}, folders / "odd.safetensors", {"ss_steps": "many"})
    monkeypatch.setattr(nodes.paths, "lora_path", lambda _: folders / "odd.safetensors")
    lora, about = nodes.LoadLora.execute("odd.safetensors").result
    assert lora.steps == 0 and about == "ss_steps: many"


def test_a_file_whose_metadata_was_changed_loads_and_says_so(folders, comfy, monkeypatch, caplog):
    write_lora(folders / "star.safetensors", LoraFile({"a": torch.ones(2)}, {"ss_steps": "3"}))
    blob = (folders / "star.safetensors").read_bytes()
    (folders / "star.safetensors").write_bytes(blob.replace(b'"ss_steps":"3"', b'"ss_steps":"7"'))
    monkeypatch.setattr(nodes.paths, "lora_path", lambda _: folders / "star.safetensors")
    with caplog.at_level(logging.WARNING):
        lora, about = nodes.LoadLora.execute("star.safetensors").result
    assert lora["a"].tolist() == [1, 1] and "the metadata is not what was saved" in about.splitlines()[0]
    assert "the metadata is not what was saved" in caplog.text


@pytest.mark.parametrize("losses", [None, {}, {"loss": None}, {"loss": ["a"]}, [1.0], {"loss": 3}])
def test_what_is_no_list_of_losses_is_refused_in_words(losses):
    with pytest.raises(ValueError, match="losses holds no list of numbers named loss; connect the LOSS_MAP"):
        nodes.LossPlot.execute(losses)


def test_a_lora_whose_path_windows_does_not_take_is_refused(folders, comfy, monkeypatch):
    monkeypatch.setattr(file_names, "PLATFORM", "win32")
    with pytest.raises(ValueError, match="Windows takes 259 while long paths are off"):
        nodes.SaveLora.execute(LoraFile({"a": torch.ones(2)}), "/".join(["x" * 100] * 3))
