"""LoRA files for other programs, loaded by these programs: the changed weights are those of ComfyUI's own loader.

The oracle of diffusers is its own conversion of whole checkpoints, which shares nothing with the names that are written
here: ComfyUI's patched weights, converted, must be the weights that diffusers has after loading the file.
"""

import inspect
import types

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.host.lora_export import export_lora
from trainyard.nodes.train import lora as nodes
from trainyard.tests.comfy import families
from trainyard.tests.comfy.more_families import MORE
from trainyard.tests.comfy.test_host import as_loader_gives, shake
from trainyard.tests.comfy.test_oracle import sdxl_shape, unet
from trainyard.tests.toy import sampling, world
from trainyard.trainers.engines import single_file
from trainyard.trainers.files import LoraFile, read_lora, write_lora
from trainyard.trainers.rng import make_generator
from trainyard.trainers.settings import DIFFUSERS, LYCORIS, WEBUI, AdapterSettings

CORE, OTHERS = 2e-6, 5e-6  # the largest error of a weight, of weights about 0.1


@pytest.fixture(scope="module", autouse=True)
def more_families():
    """The rows of more_families, while this module runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "TABLE", families.TABLE | MORE)
        yield


def trained(model, algorithm="LoRA", **more):
    """A LoRA file of a tiny model with adapters of random numbers."""
    settings = AdapterSettings(**{"rank": 2, "alpha": 1.0, "algorithm": algorithm, "conv_rank": 3, **more})
    with torch.inference_mode(), host.session.open_training_session(model, settings) as session:
        shake(session.adapters)
        return LoraFile(session.tensors()[0], {"ss_base_model_version": session.family.base_version})


def exported(lora, model, target, rank=0, clip=None):
    with torch.inference_mode():
        return export_lora(lora, model, clip, target, rank)


def weights(patcher, prefix="diffusion_model."):
    """{name: weight with its patches}, as the host loads them."""
    found = {}
    for key, (weight, *patches) in patcher.get_key_patches(prefix).items():
        with torch.inference_mode():
            value = comfy.lora.calculate_weight(patches, weight[0].float().clone(), key)
        found[key.removeprefix(prefix)] = value.clone()
    return found


def loaded_weights(model, tensors, strength=1.0):
    return weights(comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)[0])


def furthest(found, wanted):
    return max(float((found[name] - value).abs().max()) for name, value in wanted.items() if name in found)


def check_comfyui(model, lora, out):
    """ComfyUI loads both files alike, at plus and minus one, and skips nothing of them."""
    assert host.lora_keys.find_unloadable_layers(model, None, out) == []
    assert host.lora_keys.find_skipped_parts(model, None, out) == []
    for strength in (1.0, -1.0):
        error = furthest(loaded_weights(model, out, strength), loaded_weights(model, lora, strength))
        assert error <= CORE, f"{error:.1e} at {strength:+}"


# -- diffusers ---------------------------------------------------------------------------------------------------------


def flux_shape(**more):
    return dict(in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
                joint_attention_dim=64) | more  # fmt: skip


def krea_shape(state):
    return dict(
        num_layers=2, attention_head_dim=64, num_attention_heads=2, num_key_value_heads=1, timestep_embed_dim=32, text_hidden_dim=64,
        intermediate_size=len(state["blocks.0.mlp.gate.weight"]), num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=len(state["txtfusion.layerwise_blocks.0.mlp.gate.weight"]),
        axes_dims_rope=(16, 24, 24))  # fmt: skip


def unet_from(convert, state, module):
    return convert({f"model.diffusion_model.{name}": value for name, value in state.items()}, module.config)


# family: (class and shape by the host's weights, its conversion of a checkpoint, its loader)
TWINS = {
    "sd15": (lambda s: unet({"use_linear_in_transformer": False}, attention_head_dim=2), "ldm_unet", "StableDiffusion"),
    "sdxl": (lambda s: unet({"use_linear_in_transformer": True}, **sdxl_shape()), "ldm_unet", "StableDiffusionXL"),
    "sd3": (lambda s: ("SD3Transformer2DModel", single_file.read_sd3_config(s)), "sd3_transformer", "SD3"),
    "flux": (lambda s: ("FluxTransformer2DModel", flux_shape(pooled_projection_dim=32, guidance_embeds=True)),
             "flux_transformer", "Flux"),
    "chroma": (lambda s: ("ChromaTransformer2DModel", flux_shape(
        approximator_num_channels=64, approximator_hidden_dim=64, approximator_layers=2)), "chroma_transformer", "Flux"),
    "flux2": (lambda s: ("Flux2Transformer2DModel", flux_shape(in_channels=128, axes_dims_rope=(32, 32, 32, 32), mlp_ratio=3.0)),
              "flux2_transformer", "Flux2"),
    "zimage": (lambda s: ("ZImageTransformer2DModel", dict(
        dim=288, n_layers=2, n_refiner_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=64, axes_dims=[32, 32, 32],
        axes_lens=[1536, 512, 512])), "z_image_transformer", "ZImage"),
    "qwen": (lambda s: ("QwenImageTransformer2DModel", dict(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12))), None, "QwenImage"),
    "wan": (lambda s: ("WanTransformer3DModel", dict(
        num_attention_heads=1, attention_head_dim=128, ffn_dim=256, num_layers=2, freq_dim=256, text_dim=64)), "wan_transformer",
        "Wan"),
    "auraflow": (lambda s: ("AuraFlowTransformer2DModel", dict(
        in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=128, pos_embed_max_size=64)), "auraflow_transformer", "AuraFlow"),
    "krea2": (lambda s: ("Krea2Transformer2DModel", krea_shape(s)), "krea2_transformer", "Krea2"),
    "ltxv": (lambda s: ("LTXVideoTransformer3DModel", dict(
        cross_attention_dim=64, attention_head_dim=32, num_attention_heads=2, caption_channels=64, num_layers=2)),
        "ltx_transformer", "LTXVideo"),
}  # fmt: skip


def twin(family, state):
    """(diffusers' model, what converts a checkpoint of ComfyUI's names to it, its loader of LoRA files)."""
    import diffusers
    from diffusers.loaders import lora_pipeline, single_file_utils

    make, name, loader = TWINS[family]
    made = make(state)
    module = made if isinstance(made, torch.nn.Module) else getattr(diffusers, made[0])(**made[1])
    found = [f for n, f in vars(single_file_utils).items() if name and n.startswith(f"convert_{name}")]
    convert = at_width(found[0], state) if found else lambda state: state
    if name == "ldm_unet":
        return module, lambda s: unet_from(found[0], s, module), lora_pipeline.StableDiffusionLoraLoaderMixin
    return module, lambda s: convert(dict(s)), getattr(lora_pipeline, f"{loader}LoraLoaderMixin")


def at_width(convert, state):
    """diffusers' conversion of a checkpoint. Those of Flux and Chroma are written for 3072 numbers, and for norms whose
    weights are called scales."""
    source = inspect.getsource(convert)
    if "inner_dim = 3072" not in source:
        return convert
    made = dict(convert.__globals__)
    exec(source.replace("inner_dim = 3072", f"inner_dim = {len(state['img_in.weight'])}"), made)  # noqa: S102  diffusers' own code
    scales = lambda s: {name.removesuffix("weight") + "scale": value for name, value in s.items() if value.ndim == 1}
    return lambda s: made[convert.__name__](s | scales(s))


def load_in_diffusers(module, loader, path):
    """The module's weights with the file, at strength 1."""
    found = loader.lora_state_dict(str(path))
    state, alphas = found if isinstance(found, tuple) else (found, None)
    load = getattr(loader, "load_lora_into_unet", None) or loader.load_lora_into_transformer
    given = {"network_alphas": alphas} if "network_alphas" in inspect.signature(load).parameters else {}
    load(state, **given, adapter_name="ours", **{"unet" if "unet" in load.__name__ else "transformer": module})
    module.fuse_lora()
    module.unload_lora()
    return module.state_dict()


CASES = [(family, "LoRA") for family in TWINS]
CASES += [("sd15", "DoRA"), ("sd15", "LoHa"), ("sd15", "LoKr"), ("sdxl", "DoRA"), ("flux", "DoRA"), ("flux", "LoHa"),
          ("flux", "LoKr"), ("sd3", "DoRA"), ("zimage", "LoKr"), ("qwen", "DoRA"), ("flux2", "DoRA"), ("wan", "DoRA")]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # of diffusers' own Chroma
@pytest.mark.parametrize(("family", "algorithm"), CASES)
def test_diffusers_has_the_weights_of_comfyui_after_loading_a_file(family, algorithm, tmp_path):
    model = as_loader_gives(family)
    lora = trained(model, algorithm, conv=family == "sd15")
    out, lost = exported(lora, model, DIFFUSERS)
    assert lost == 0
    check_comfyui(model, lora, out)
    write_lora(tmp_path / "lora.safetensors", out)
    base, wanted = weights(model), loaded_weights(model, lora)
    module, convert, loader = twin(family, base)
    sizes = {name: value.shape for name, value in module.state_dict().items()}  # the time embedders' are fixed
    start = {name: value for name, value in convert(base).items() if sizes.get(name) == value.shape}
    module.load_state_dict(start, strict=False)
    found, goal = load_in_diffusers(module, loader, tmp_path / "lora.safetensors"), convert(wanted)
    goal = {name: goal[name] for name in start}
    changed = [name for name in goal if not torch.equal(goal[name], start[name])]
    error = furthest(found, goal)
    print(
        f"{family} {algorithm}: {len(changed)} weights changed by up to {furthest(start, goal):.2g}, apart by {error:.1e}"
    )
    assert len(changed) >= len({key.split(".")[0] for key in lora})
    assert error <= OTHERS


def test_ranks_and_alphas_that_differ_are_scaled_alike_in_diffusers(tmp_path):
    """Rules by layer give ranks 1, 2 and 6; zeros fill them up to one."""
    model = as_loader_gives("qwen")
    lora = trained(model, blocks="transformer_blocks.0.attn: rank=6\n_mlp: rank=1")
    out, _ = exported(lora, model, DIFFUSERS)
    assert {len(value) for key, value in out.items() if "lora_A" in key} == {6}
    check_comfyui(model, lora, out)
    write_lora(tmp_path / "lora.safetensors", out)
    module, convert, loader = twin("qwen", weights(model))
    module.load_state_dict(weights(model))
    found = load_in_diffusers(module, loader, tmp_path / "lora.safetensors")
    assert furthest(found, loaded_weights(model, lora)) <= OTHERS


def text_file(clip, rank=2):
    """A LoRA of two layers of CLIP-L, in kohya's names."""
    draw, tensors = make_generator(1), {}
    for name in ("self_attn_q_proj", "mlp_fc1"):
        key = f"lora_te1_text_model_encoder_layers_0_{name}"
        path = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})[key]
        outputs, inputs = comfy.utils.get_attr(clip.cond_stage_model, path).shape
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, inputs, generator=draw)
        tensors[f"{key}.lora_up.weight"] = torch.randn(outputs, rank, generator=draw) * 0.1
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return LoraFile(tensors)


@pytest.fixture(scope="module")
def toy(comfy):
    with torch.inference_mode():
        return sampling.load(world.cached())


def test_diffusers_has_the_text_encoder_of_comfyui_after_loading_a_file(toy, tmp_path):
    from diffusers.loaders.lora_pipeline import SD3LoraLoaderMixin
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    lora = text_file(toy.clip)
    with pytest.raises(ValueError, match="2 of 2 layers of this LoRA are not in MODEL; connect its CLIP"):
        exported(lora, toy.model, DIFFUSERS)
    out, _ = exported(lora, toy.model, DIFFUSERS, clip=toy.clip)
    write_lora(tmp_path / "text.safetensors", out)
    prefix = "clip_l.transformer."
    base = weights(toy.clip.patcher, prefix)
    wide, inner = base["text_model.encoder.layers.0.mlp.fc1.weight"].T.shape
    config = CLIPTextConfig(
        hidden_size=wide, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    module = CLIPTextModelWithProjection(config)
    ours = {name: base[name] for name in module.state_dict() if ".layers.0." in name}
    assert module.load_state_dict(ours, strict=False).unexpected_keys == [] and len(ours) > 10
    SD3LoraLoaderMixin.load_lora_into_text_encoder(
        SD3LoraLoaderMixin.lora_state_dict(str(tmp_path / "text.safetensors")), None, module, prefix="text_encoder"
    )
    found = {name: layer.merge() or layer.weight for name, layer in module.named_modules() if hasattr(layer, "merge")}
    _, patched = comfy.sd.load_lora_for_models(None, toy.clip, dict(lora), 0, 1.0)
    wanted = weights(patched.patcher, prefix)
    assert len(found) == 2
    for name, weight in found.items():
        assert not torch.allclose(weight, base[f"{name}.weight"], atol=1e-3)
        assert torch.allclose(weight, wanted[f"{name}.weight"], atol=OTHERS)


def test_what_diffusers_does_not_know_is_refused_before_anything_is_computed():
    video = as_loader_gives("hunyuan_video")
    with pytest.raises(
        ValueError, match=r"LoRAs of HunyuanVideo are not written for diffusers. These are: Stable Diff"
    ):
        exported(trained(video), video, DIFFUSERS)
    flux2 = as_loader_gives("flux2")
    with pytest.raises(ValueError, match=r"layers have no name in diffusers that is known: .*Train with targets"):
        exported(trained(flux2, targets="all linear"), flux2, DIFFUSERS)
    with pytest.raises(ValueError, match=r"are not in MODEL; connect its CLIP .*: lora_unet_double_blocks"):
        exported(trained(as_loader_gives("flux")), as_loader_gives("sd3"), DIFFUSERS)


# -- A1111, Forge, kohya and LyCORIS -----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr"])
def test_kohyas_names_and_adapters_stay_as_they_are(algorithm):
    model = as_loader_gives("sdxl")
    lora = trained(model, algorithm)
    out, lost = exported(lora, model, WEBUI)
    assert lost == 0 and out.keys() == lora.keys() and all(torch.equal(out[key], lora[key]) for key in lora)
    assert all(key.startswith("lora_unet_") for key in out)


def test_a_file_of_diffusers_gets_kohyas_names_again():
    model = as_loader_gives("flux")
    lora = trained(model)
    back, _ = exported(exported(lora, model, DIFFUSERS)[0], model, WEBUI)
    assert {key.split(".")[0] for key in back} == {key.split(".")[0] for key in lora}
    check_comfyui(model, lora, back)


def test_a_dora_for_a1111_is_the_change_itself_or_a_lora_near_it():
    model = as_loader_gives("sd15")
    lora = trained(model, "DoRA", conv=True)
    out, lost = exported(lora, model, WEBUI)
    assert lost == 0 and all(key.endswith(".diff") for key in out)
    check_comfyui(model, lora, out)
    near, lost = exported(lora, model, WEBUI, rank=24)
    assert 0.01 < lost < 0.9 and {len(value) for key, value in near.items() if "down.weight" in key} <= set(range(25))
    base, wanted, found = weights(model), loaded_weights(model, lora), loaded_weights(model, near)
    off = [float((found[k] - wanted[k]).norm() / (wanted[k] - base[k]).norm()) for k in base if k[-6:] == "weight" and
           not torch.equal(wanted[k], base[k])]  # fmt: skip
    assert max(off) == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["LoRA", "DoRA", "LoHa", "LoKr"])
def test_lycoris_makes_the_weights_of_comfyui_of_a_file(algorithm):
    lycoris = pytest.importorskip(
        "lycoris.modules", reason="lycoris_lora is not installed: nothing was loaded in LyCORIS"
    )
    model = as_loader_gives("sd15")
    lora = trained(model, algorithm, conv=True)
    out, _ = exported(lora, model, LYCORIS)
    base, wanted = weights(model), loaded_weights(model, lora)
    keys = host.lora_keys.unet_lora_keys(
        model.model, [name.removesuffix(".weight") for name in base if base[name].ndim > 1]
    )
    tried = 0
    for path, key in keys.items():
        if not any(name.startswith(f"{key}.") for name in out):
            continue
        weight = base[f"{path}.weight"]
        layer = (
            torch.nn.Linear(*weight.T.shape)
            if weight.ndim == 2
            else torch.nn.Conv2d(*weight.shape[1::-1], weight.shape[2:])
        )
        layer.weight.data.copy_(weight)
        kind, params = lycoris.get_module(out, key)
        module = lycoris.make_module(kind, params, key, layer)
        x = torch.randn(2, weight.shape[1], *[5] * (weight.ndim - 2))
        with torch.no_grad():
            found, ran = module.get_merged_weight(multiplier=1.0, shape=weight.shape)[0], module(x)
            layer.weight.data.copy_(wanted[f"{path}.weight"])
            assert torch.allclose(ran, layer(x), atol=1e-5), f"{algorithm} at {key}, as it runs"
        error = float((found - wanted[f"{path}.weight"]).abs().max())
        assert error <= OTHERS, f"{algorithm} at {key}: {error:.1e}"
        assert not torch.equal(weight, wanted[f"{path}.weight"])
        tried += 1
    assert tried == len({name.split(".")[0] for name in out})


# -- the node ----------------------------------------------------------------------------------------------------------


def test_save_lora_writes_for_a_program_and_says_where_it_loads(folders, monkeypatch):
    hidden = types.SimpleNamespace(prompt=None, extra_pnginfo=None, unique_id=None)
    monkeypatch.setattr(nodes.SaveLora, "hidden", hidden)
    model = as_loader_gives("sd15")
    lora = trained(model, "LoHa", rank=2)
    lora.metadata |= {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2"}
    with pytest.raises(ValueError, match="target is diffusers: connect the MODEL that the LoRA was trained on"):
        nodes.SaveLora.execute(lora, "portable", target=DIFFUSERS)
    with torch.inference_mode():
        saved = nodes.SaveLora.execute(lora, "portable", model, target=DIFFUSERS)
        less = nodes.SaveLora.execute(lora, "portable_small", model, target=DIFFUSERS, rank=1)
        plain = nodes.SaveLora.execute(lora, "plain", model)
    found = read_lora(saved.result[0])
    assert (
        found.damage == ""
        and found.metadata["ss_network_dim"] == "4"
        and found.metadata["ss_network_module"] == "networks.lora"
    )
    assert saved.ui.as_dict()["text"][0].endswith("read back and equal. Loads in diffusers, ComfyUI.")
    assert "Converting it lost at most " in less.ui.as_dict()["text"][0]
    assert plain.ui.as_dict()["text"][0].endswith("Loads in ComfyUI, Forge, A1111, LyCORIS.")
