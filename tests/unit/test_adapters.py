"""Adapters beside a frozen network: the formula, which layers get one, and nothing left behind."""

import math

import pytest
import torch
from torch import nn
from trainyard.tests.unit.toy import Net, Stop, rng
from trainyard.trainers.adapters.adapters import (
    Adapters,
    find_adaptable_layers,
    kohya_lora_key,
    make_layer_filter,
    select_target_layers,
)
from trainyard.trainers.adapters.layers import adapter_scale
from trainyard.trainers.settings import AdapterSettings


def settings(**values):
    return AdapterSettings(**{"rank": 2, "targets": "all linear", "conv_rank": 2, **values})


def learnt(network, seed=1, **values):
    """Attached adapters whose output is no longer zero."""
    adapters = Adapters(network, settings(**values), rng(seed))
    draw = rng(seed + 1)
    with torch.no_grad():
        for low in adapters.lows.values():
            low.up.copy_(torch.randn(low.up.shape, generator=draw))
    adapters.attach()
    return adapters


def seeded(module, seed=0):
    draw = rng(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    return module.requires_grad_(False)


class ConvNet(nn.Module):
    """A strided 3x3 and a 1x1 convolution, after a linear layer over the last axis; SD-like names."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(8, 8)
        self.op = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.skip(self.op(self.emb(x)))


def hooks(network):
    return sum(len(m._forward_hooks) for m in network.modules())


# -- the formula -------------------------------------------------------------------------------------------------------


def test_the_formula_by_hand():
    """W = identity, B A = [[1], [2]] [[3, 4]] = [[3, 4], [6, 8]], alpha / rank = 0.5 / 1; x = (1, 1):
    W x + 0.5 * (7, 14) = (4.5, 8); at strength -2: (1 - 7, 1 - 14) = (-6, -13)."""
    network = nn.Sequential(nn.Linear(2, 2, bias=False))
    network[0].weight.data = torch.eye(2)
    adapters = Adapters(network, settings(rank=1, alpha=0.5))
    low = adapters.adapter_for("0")
    low.down.data, low.up.data = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
    x = torch.ones(1, 2)
    with adapters.attached():
        assert network(x).tolist() == [[4.5, 8.0]]
        with adapters.at_strength(-2.0):
            assert network(x).tolist() == [[-6.0, -13.0]]
        with adapters.at_strength(0.0):
            assert network(x).tolist() == [[1.0, 1.0]]


def test_a_fresh_adapter_changes_nothing_and_still_gets_a_gradient():
    network, x = (
        Net(),
        (torch.randn(3, 2, 4, 4, generator=rng()), torch.rand(3, generator=rng()), torch.randn(3, 6, generator=rng())),
    )
    before = network(*x)
    adapters = Adapters(network, settings(), rng())
    with adapters.attached():
        after = network(*x)
        after.square().mean().backward()
    assert torch.equal(before, after)
    assert all(low.up.grad.abs().sum() > 0 for low in adapters.lows.values()), (
        "an adapter at zero that gets no gradient never learns"
    )
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    "rank, alpha, rslora, scale",
    [(4, 0.0, False, 1.0), (4, 2.0, False, 0.5), (4, 0.0, True, 2.0), (16, 8.0, True, 2.0)],
)
def test_alpha_over_rank_and_rslora_by_hand(rank, alpha, rslora, scale):
    """alpha 0 means alpha = rank. rsLoRA divides by sqrt(rank): 4 / 2 = 2 and 8 / 4 = 2."""
    assert adapter_scale(rank, alpha or rank, rslora) == scale
    low = Adapters(nn.Sequential(nn.Linear(16, 16)), settings(rank=rank, alpha=alpha, rslora=rslora)).adapter_for("0")
    assert low.scale == scale


@pytest.mark.parametrize("rslora", [False, True])
def test_a_loader_that_divides_alpha_by_the_rank_gets_the_same_change(rslora):
    """What every loader does: W + (alpha / rank) * up @ down."""
    network = seeded(nn.Sequential(nn.Linear(6, 5)))
    adapters = learnt(network, rank=3, alpha=2.0, rslora=rslora)
    x = torch.randn(4, 6, generator=rng())
    trained = network(x)
    tensors, _ = adapters.export_tensors()
    adapters.detach()
    alpha, up, down = (tensors[f"lora_unet_0.{suffix}"] for suffix in ("alpha", "lora_up.weight", "lora_down.weight"))
    loaded = network(x) + x @ (up @ down * (alpha / len(down))).T
    assert torch.allclose(trained, loaded, atol=1e-5), (trained - loaded).abs().max()


def test_a_convolution_in_the_file_is_the_change_of_its_weight():
    """W + (alpha / rank) * up (o, r, 1, 1) @ down (r, i, k, k), used with the layer's own stride and padding."""
    network = seeded(ConvNet())
    adapters = learnt(network, conv=True, conv_alpha=3.0)
    x = torch.randn(2, 3, 8, 8, generator=rng())
    trained = network.op(x)
    tensors, _ = adapters.export_tensors()
    adapters.detach()
    up, down = tensors["lora_unet_op.lora_up.weight"], tensors["lora_unet_op.lora_down.weight"]
    assert up.shape == (6, 2, 1, 1) and down.shape == (2, 3, 3, 3) and float(tensors["lora_unet_op.alpha"]) == 3.0
    change = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down) * (3.0 / 2)
    network.op.weight += change
    assert torch.allclose(trained, network.op(x), atol=1e-4), (trained - network.op(x)).abs().max()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_the_formula_is_the_one_of_peft(rslora):
    """Oracle: peft's LoraConfig on the same network, with our weights copied in; Linear, strided 3x3 and 1x1
    convolutions."""
    import copy

    from peft import LoraConfig, inject_adapter_in_model

    network = seeded(ConvNet())
    theirs = copy.deepcopy(network)
    ours = learnt(network, rank=2, alpha=3.0, rslora=rslora, conv=True, conv_rank=2, conv_alpha=3.0)
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=3, use_rslora=rslora, target_modules=["emb", "op", "skip"]), theirs
    )
    with torch.no_grad():
        for name in ours.layers:
            layer = theirs.get_submodule(name)
            layer.lora_A["default"].weight.copy_(ours.adapter_for(name).down)
            layer.lora_B["default"].weight.copy_(ours.adapter_for(name).up)
    x = torch.randn(2, 3, 8, 8, generator=rng())
    assert list(ours.layers) == ["emb", "op", "skip"]
    assert torch.allclose(network(x), theirs(x), atol=1e-4, rtol=1e-5), (network(x) - theirs(x)).abs().max()


def test_a_half_precision_layer_stays_half_and_its_adapter_stays_fp32():
    network = seeded(nn.Sequential(nn.Linear(6, 5))).to(torch.bfloat16)
    adapters = learnt(network)
    out = network(torch.randn(3, 6, generator=rng()).to(torch.bfloat16))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in adapters.parameters())


def test_a_layer_called_by_keyword_gets_its_adapter_too():
    network = seeded(nn.Sequential(nn.Linear(6, 5)))
    learnt(network)
    x = torch.randn(3, 6, generator=rng())
    assert torch.equal(network[0](input=x), network[0](x))


def test_the_same_seed_draws_the_same_adapter_and_another_seed_another():
    first, same, other = (Adapters(Net(), settings(), rng(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


# -- borrowed and given back -------------------------------------------------------------------------------------------


def test_the_strength_comes_back_after_an_error_and_an_interrupt():
    adapters = Adapters(Net(), settings())
    for trouble in (ValueError, Stop):
        with pytest.raises(trouble), adapters.at_strength(-1.0), adapters.at_strength(3.0):
            assert adapters.strength == 3.0
            raise trouble
        assert adapters.strength == 1.0


def test_detached_adapters_leave_no_hook_and_the_same_output():
    network, x = seeded(ConvNet()), torch.randn(1, 3, 8, 8, generator=rng())
    before = network(x)
    adapters = learnt(network, conv=True)
    assert hooks(network) == 3 and not torch.equal(network(x), before)
    adapters.detach()
    assert hooks(network) == 0 and torch.equal(network(x), before)
    with pytest.raises(Stop), adapters.attached():
        raise Stop
    assert hooks(network) == 0 and torch.equal(network(x), before)


def test_attaching_twice_adds_once():
    network, x = seeded(ConvNet()), torch.randn(1, 3, 8, 8, generator=rng())
    adapters = learnt(network, conv=True)
    once = network(x)
    adapters.attach()
    assert hooks(network) == 3 and torch.equal(network(x), once)


def test_two_sets_of_adapters_add_up_and_come_off_one_by_one():
    network, x = seeded(nn.Sequential(nn.Linear(6, 5))), torch.randn(2, 6, generator=rng())
    first = learnt(network, seed=1)
    alone = network(x)
    second = learnt(network, seed=7)
    both = network(x)
    second.detach()
    assert torch.equal(network(x), alone) and not torch.equal(both, alone)
    first.detach()
    assert hooks(network) == 0


def test_adapters_that_give_way_to_a_guest_are_back_afterwards_and_a_block_computed_again_meets_the_guest():
    network, x = seeded(nn.Sequential(nn.Linear(6, 5))), torch.randn(2, 6, generator=rng())
    guest = learnt(network, seed=7)
    with_guest = network(x)
    guest.detach()
    host = learnt(network, seed=1)
    own = network(x)
    with host.replaced_by(guest):
        assert torch.allclose(network(x), with_guest)
        again = host.capture_context()
    assert torch.equal(network(x), own) and hooks(network) == 1 and host.replacement is None
    with again():
        assert torch.allclose(network(x), with_guest)
    assert torch.equal(network(x), own) and hooks(network) == 1
    with pytest.raises(Stop), host.replaced_by(guest):
        raise Stop
    assert torch.equal(network(x), own) and hooks(network) == 1
    with host.replaced_by(None):
        assert torch.equal(network(x), network[0](x)) and not torch.equal(network(x), own)


def test_what_is_attached_already_stays_so_after_being_attached_inside():
    network = seeded(ConvNet())
    adapters = learnt(network, conv=True)
    with adapters.attached():
        assert hooks(network) == 3
    assert hooks(network) == 3


def test_adapters_of_some_layers_only():
    network = seeded(ConvNet())
    adapters = Adapters(network, settings(conv=True)).keep_layers({"emb", "skip"})
    assert list(adapters.layers) == list(adapters.lows) == ["emb", "skip"]
    with adapters.attached():
        assert hooks(network) == 2


# -- the file ----------------------------------------------------------------------------------------------------------


def test_layers_that_learnt_nothing_are_left_out_of_the_file_and_named():
    adapters = learnt(seeded(ConvNet()), conv=True)
    with torch.no_grad():
        adapters.adapter_for("skip").up.zero_()
    tensors, untouched = adapters.export_tensors()
    assert untouched == ["skip"]
    assert sorted(tensors) == [
        f"lora_unet_{n}.{s}" for n in ("emb", "op") for s in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    assert all(t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in tensors.values())


def test_the_file_is_a_copy_that_later_steps_do_not_change():
    adapters = learnt(seeded(ConvNet()))
    tensors, _ = adapters.export_tensors()
    before = tensors["lora_unet_emb.lora_up.weight"].clone()
    with torch.no_grad():
        adapters.adapter_for("emb").up.add_(1)
    assert torch.equal(tensors["lora_unet_emb.lora_up.weight"], before)


def test_keys_are_those_of_kohya_or_the_callers_own():
    assert kohya_lora_key("lora_unet", "double_blocks.0.img_attn.qkv") == "lora_unet_double_blocks_0_img_attn_qkv"
    tensors, _ = learnt(seeded(nn.Sequential(nn.Linear(6, 5)))).export_tensors(lambda name: f"diffusion_model.{name}")
    assert sorted(tensors) == [
        "diffusion_model.0.alpha",
        "diffusion_model.0.lora_down.weight",
        "diffusion_model.0.lora_up.weight",
    ]


# -- which layers ------------------------------------------------------------------------------------------------------


class Leaf(nn.Module):
    """A layer as `adaptable` sees it: by what it has, and not by its class."""

    def __init__(self, kernel=None):
        super().__init__()
        if kernel is None:
            self.in_features = self.out_features = 8
            self.weight = nn.Parameter(torch.empty(8, 8, device="meta"))
        else:
            self.in_channels = self.out_channels = 8
            self.kernel_size, self.groups = (kernel, kernel), 1
            self.weight = nn.Parameter(torch.empty(8, 8, kernel, kernel, device="meta"))


def named(names):
    """A module tree with a layer at each of these names; `name*3` is a 3x3 and `name*1` a 1x1 convolution."""
    root = nn.Module()
    for entry in names:
        path, _, kernel = entry.partition("*")
        *parents, last = path.split(".")
        module = root
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.add_module(last, Leaf(int(kernel) if kernel else None))
    return root


# family -> (attention, mlp, steering and ends: chosen by "all linear" only). Names as ComfyUI's classes have them, one
# of each kind.
UNET = (
    [f"input_blocks.1.1.{n}" for n in ("proj_in*1", "proj_out*1")]
    + [
        f"input_blocks.1.1.transformer_blocks.0.{a}.{n}"
        for a in ("attn1", "attn2")
        for n in ("to_q", "to_k", "to_v", "to_out.0")
    ],
    [f"middle_block.1.transformer_blocks.0.ff.net.{n}" for n in ("0.proj", "2")],
    ["time_embed.0", "label_emb.0.0", "input_blocks.1.0.emb_layers.1", "input_blocks.4.0.skip_connection*1"],
)
FLUX = (
    [f"double_blocks.0.{s}_attn.{n}" for s in ("img", "txt") for n in ("qkv", "proj")] + ["single_blocks.11.linear1", "single_blocks.11.linear2"],
    ["double_blocks.0.img_mlp.0", "double_blocks.0.img_mlp.2", "double_blocks.0.txt_mlp.0"],
    ["img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer", "double_blocks.0.img_mod.lin",
     "double_blocks.0.txt_mod.lin", "single_blocks.0.modulation.lin", "final_layer.linear", "final_layer.adaLN_modulation.1"],
)  # fmt: skip
LUMINA = (
    [f"{b}.0.attention.{n}" for b in ("layers", "noise_refiner", "context_refiner") for n in ("qkv", "out")],
    [f"layers.0.feed_forward.w{n}" for n in (1, 2, 3)],
    ["x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "layers.0.adaLN_modulation.1", "final_layer.linear"],
)
FAMILIES = {
    "SD1.5": UNET,
    "SDXL": UNET,
    "SD3": (
        [f"joint_blocks.0.{s}_block.{n}" for s in ("x", "context") for n in ("attn.qkv", "attn.proj", "attn2.qkv")],
        ["joint_blocks.0.x_block.mlp.fc1", "joint_blocks.0.context_block.mlp.fc2"],
        ["t_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder", "joint_blocks.0.x_block.adaLN_modulation.1", "final_layer.linear"],
    ),
    "Flux": FLUX,
    "Chroma": (FLUX[0], FLUX[1], ["img_in", "txt_in", "final_layer.linear"]),
    "Lumina2": LUMINA,
    "Qwen-Image": (
        [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "to_out.0", "to_add_out")],
        [f"transformer_blocks.0.{s}_mlp.net.{n}" for s in ("img", "txt") for n in ("0.proj", "2")],
        ["img_in", "txt_in", "time_text_embed.timestep_embedder.linear_1", "transformer_blocks.0.img_mod.1", "norm_out.linear", "proj_out"],
    ),
    "AuraFlow": (
        [f"{b}.0.attn.{n}" for b in ("double_layers", "single_layers") for n in ("w1q", "w1k", "w1v", "w1o")] + ["double_layers.0.attn.w2q"],
        ["double_layers.0.mlpC.c_fc1", "double_layers.0.mlpX.c_proj", "single_layers.0.mlp.c_fc2"],
        ["t_embedder.mlp.0", "cond_seq_linear", "init_x_linear", "double_layers.0.modC.1", "single_layers.0.modCX.1", "modF.1", "final_linear"],
    ),
    "HunyuanVideo": (
        FLUX[0] + ["txt_in.individual_token_refiner.blocks.0.self_attn.qkv"],
        FLUX[1] + ["txt_in.individual_token_refiner.blocks.0.mlp.0"],
        ["time_in.in_layer", "txt_in.t_embedder.in_layer", "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1", "final_layer.linear"],
    ),
    "Wan": (
        [f"blocks.0.{a}.{n}" for a in ("self_attn", "cross_attn") for n in "qkvo"],
        ["blocks.0.ffn.0", "blocks.0.ffn.2"],
        ["text_embedding.0", "time_embedding.0", "time_projection.1", "head.head"],
    ),
    "CLIP": (
        [f"text_model.encoder.layers.0.self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")],
        ["text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc2"],
        ["text_projection"],
    ),
    "UNet of diffusers": (
        ["down_blocks.0.attentions.0.proj_in*1", "mid_block.attentions.0.proj_out*1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"],
        ["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"],
        ["time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj", "down_blocks.1.resnets.0.conv_shortcut*1"],
    ),
    "SD3 of diffusers": (
        ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.to_add_out"],
        ["transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_context.net.2"],
        ["time_text_embed.timestep_embedder.linear_1", "context_embedder", "transformer_blocks.0.norm1.linear", "norm_out.linear", "proj_out"],
    ),
    "Flux of diffusers": (
        ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_out"],
        ["transformer_blocks.0.ff_context.net.0.proj", "single_transformer_blocks.0.proj_mlp"],
        ["x_embedder", "transformer_blocks.0.norm1_context.linear", "single_transformer_blocks.0.norm.linear", "proj_out"],
    ),
}  # fmt: skip
CONVOLUTIONS = {  # trained by `conv`, never trained
    "SD1.5": (
        ["input_blocks.1.0.in_layers.2*3", "input_blocks.3.0.op*3", "output_blocks.2.1.conv*3"],
        ["input_blocks.0.0*3", "out.2*3"],
    ),
    "UNet of diffusers": (
        ["down_blocks.0.resnets.0.conv1*3", "down_blocks.0.downsamplers.0.conv*3"],
        ["conv_in*3", "conv_out*3"],
    ),
    "SD3": ([], ["x_embedder.proj*2"]),
    "HunyuanVideo": ([], ["img_in.proj*2"]),
    "Wan": ([], ["patch_embedding*2"]),
}
DISTILLED = [
    "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.layers.0.in_layer",
    "distilled_guidance_layer.out_proj",
]


def plain(names):
    return {name.partition("*")[0] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_choose_attention_mlps_or_all_and_leave_modulation_alone(family):
    attention, mlp, rest = FAMILIES[family]
    network = named([*rest, *attention, *mlp])
    chosen = {
        targets: set(select_target_layers(network, settings(targets=targets)))
        for targets in ("attention", "attention+mlp", "all linear")
    }
    assert chosen["attention"] == plain(attention)
    assert chosen["attention+mlp"] == plain(attention + mlp)
    assert chosen["all linear"] == plain(attention + mlp + rest)


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_conv_trains_the_convolutions_of_a_unet_and_never_the_stem_or_the_head(family):
    """The first and the last convolution have 4 channels on one side: a rank of 8 would be refused there."""
    trained, never = CONVOLUTIONS[family]
    network = named([*FAMILIES[family][0], *trained, *never])
    attention = plain(FAMILIES[family][0])
    assert set(select_target_layers(network, settings(targets="attention", conv=True))) == attention | plain(trained)
    assert set(select_target_layers(network, settings(targets="attention", conv=False))) == attention


@pytest.mark.parametrize(
    "values",
    [{"targets": t} for t in ("attention", "attention+mlp", "all linear")] + [{"targets": "regex", "pattern": "."}],
)
def test_chromas_distilled_guidance_layer_is_never_chosen(values):
    network = named([*DISTILLED, *FAMILIES["Chroma"][0]])
    assert set(select_target_layers(network, settings(**values))) == plain(FAMILIES["Chroma"][0])


def test_a_pattern_chooses_by_name():
    network = named([*FAMILIES["SD1.5"][0], *FAMILIES["SD1.5"][1]])
    assert set(select_target_layers(network, settings(targets="regex", pattern=r"attn2\.to_[kv]$"))) == {
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_v",
    }


def test_layers_are_found_by_what_they_have_and_not_by_their_class():
    """Transposed and grouped convolutions and embeddings are no place for an adapter, nor is a layer without a name:
    the root."""
    network = nn.ModuleDict({
        "linear": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 3), "video": nn.Conv3d(4, 4, 3), "quantised": Leaf(), "norm": nn.LayerNorm(4),
        "words": nn.Embedding(4, 4), "up": nn.ConvTranspose2d(4, 4, 2), "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    })  # fmt: skip
    assert list(find_adaptable_layers(network)) == ["linear", "conv", "video", "quantised"]
    assert find_adaptable_layers(nn.Conv2d(4, 4, 1)) == {} and find_adaptable_layers(nn.Linear(4, 4)) == {}


def test_a_rank_beyond_the_layer_is_refused_with_the_largest_one_that_fits():
    with pytest.raises(
        ValueError, match=r"Layer emb: rank is 9, but it has only 8 inputs and 8 outputs. Choose a rank of at most 8"
    ):
        Adapters(ConvNet(), settings(rank=9))
    with pytest.raises(
        ValueError, match=r"Layer op: rank is 4, but it has only 3 inputs and 6 outputs. Choose a rank of at most 3"
    ):
        Adapters(ConvNet(), settings(conv=True, conv_rank=4))


def test_targets_that_match_nothing_say_what_the_model_has():
    with pytest.raises(
        ValueError,
        match=r"No layer matches targets = 'attention'; nothing would be trained. The model has 3 layers such as emb, op",
    ):
        Adapters(ConvNet(), settings(targets="attention"))
    with pytest.raises(ValueError, match=r"targets = 'regex', pattern = 'attn9'; nothing"):
        Adapters(ConvNet(), settings(targets="regex", pattern="attn9"))


def test_an_adapter_starts_with_kaimings_uniform_bound():
    """nn.Linear's own start: uniform in +-1/sqrt(fan-in), 1/sqrt(64) = 0.125."""
    down = Adapters(nn.Sequential(nn.Linear(64, 64)), settings(rank=64), rng()).adapter_for("0").down.detach()
    assert 0.12 < down.abs().max() <= 0.125
    assert float(down.std()) == pytest.approx(0.125 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("targets, names", [
    ("attention", ["blocks.3.q", "blocks.3.attn_out", "audio_injector.injector.0.k", "face_adapter.fuser_blocks.1.linear1_kv"]),
    ("attention+mlp", ["blocks.3.ff_proj", "blocks.3.ff_out", "patch_blocks.0.mlp_x.w12", "blocks.0.mlp_y.w1",
                       "double_stream_layers.2.img_feed_forward.linear_1", "double_stream_blocks.0.block.ff_i.experts.1.w2",
                       "double_stream_blocks.0.block.ff_t.w1", "language_model.layers.0.mlp.up_proj"]),
])  # fmt: skip
def test_the_layer_names_of_rarer_families_are_targets(targets, names):
    """CogVideoX, Wan S2V and Animate, PixelDiT and Mochi, Boogu, HiDream and HiDream-O1."""
    wanted = make_layer_filter(AdapterSettings(targets=targets))
    assert [name for name in names if not wanted(name)] == []
    others = ["blocks.3.norm1.linear", "blocks.0.mod_x", "visual.blocks.0.attn.qkv", "time_embedding.linear_1", "img_emb.proj.1",
              "visual.blocks.0.mlp.linear_fc1", "patch_blocks.0.adaLN_modulation_img.0"]  # fmt: skip
    assert [name for name in others if wanted(name)] == []
