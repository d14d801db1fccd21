"""DoRA, LoHa and LoKr: the formula, the file, and what each costs; rules by layer name, dropout, and starting from a
file."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from trainyard.tests.unit.test_adapters import ConvNet, seeded, settings
from trainyard.tests.unit.toy import Net, rng
from trainyard.trainers.adapters.adapters import Adapters, group_tensors_by_layer
from trainyard.trainers.adapters.layers import LohaLayer, LoraLayer, factorize_dimension
from trainyard.trainers.files import LoraFile, rescale_lora
from trainyard.trainers.loop import parameter_groups
from trainyard.trainers.optimizers import make_optimizer
from trainyard.trainers.settings import ADAPTER_ALGORITHMS, AdapterSettings, OptimizerSettings, parse_block_rules

NEW = [name for name in ADAPTER_ALGORITHMS if name != "LoRA"]
X = torch.randn(2, 3, 8, 8, generator=rng())


def shaken(network, seed=1, size=0.3, **values):
    """Attached adapters with every number away from its start."""
    adapters = Adapters(network, settings(**values), rng(seed))
    draw = rng(seed + 1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * size)
    adapters.attach()
    return adapters


def change(tensors, weight):
    """dW of a file's layer, as loaders build it (LyCORIS, ComfyUI): dense."""
    t = tensors
    if "hada_w1_a" in t:
        rank, wide = len(t["hada_w1_b"]), (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    elif "lokr_w1" in t:
        rank = len(t["lokr_w2_b"]) if "lokr_w2_b" in t else None
        wide = torch.kron(t["lokr_w1"], t["lokr_w2"] if rank is None else t["lokr_w2_a"] @ t["lokr_w2_b"])
    else:
        rank, wide = len(t["lora_down.weight"]), t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)
    scale = float(t["alpha"]) / rank if rank and "alpha" in t else 1.0
    return wide.reshape(weight.shape) * scale


def merged(network, tensors, strength):
    """The network with the file in its weights. DoRA is ComfyUI's: the row norm is that of W alone."""
    for base, parts in group_tensors_by_layer(tensors).items():
        merge(network.get_submodule(base.removeprefix("lora_unet_")).weight, parts, strength)
    return network


def merge(weight, parts, strength):
    new = weight + change(parts, weight)
    if "dora_scale" in parts:
        norms = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        new = new * parts["dora_scale"] / norms
    weight.copy_(weight + strength * (new - weight))


@pytest.mark.parametrize("strength", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("algorithm", ADAPTER_ALGORITHMS)
def test_the_file_merged_into_the_weights_gives_the_trained_output(algorithm, rank, strength):
    """Linear, strided 3x3 and 1x1 convolution; at rank 2 the matrices of LoKr are whole, at rank 1 of some layers
    products."""
    network = seeded(ConvNet())
    with torch.no_grad():
        adapters = shaken(
            network, algorithm=algorithm, rank=rank, conv_rank=rank, conv=True, alpha=3.0, conv_alpha=0.5, factor=2
        )
        with adapters.at_strength(strength):
            trained = network(X)
        tensors = adapters.export_tensors()[0]
        adapters.detach()
        loaded = merged(network, tensors, strength)(X)
    assert torch.allclose(trained, loaded, rtol=1e-4, atol=1e-4), (trained - loaded).abs().max()


@pytest.mark.parametrize("algorithm", ADAPTER_ALGORITHMS)
def test_every_algorithm_starts_as_no_change_and_every_number_learns(algorithm):
    network = seeded(ConvNet())
    before = network(X)
    adapters = Adapters(network, settings(algorithm=algorithm, conv=True, factor=2), rng())
    with adapters.attached():
        assert torch.allclose(network(X), before, rtol=1e-6, atol=1e-5)
        assert adapters.export_tensors() == ({}, ["emb", "op", "skip"])
        params, optimizer = list(adapters.parameters()), torch.optim.SGD(adapters.parameters(), 1e-3)
        start = [p.detach().clone() for p in params]
        for _ in range(3):
            network(X).square().mean().backward()
            optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(start, params, strict=True))
    assert all(p.grad is None for p in network.parameters())


def test_dora_by_hand():
    """W = [[3, 4]], B A = [[3, -4]], s = 1, so W + BA = [[6, 0]]; |W| = 5, |W + BA| = 6; magnitude 0.2 -> gain 1.2 * 5
    / 6 = 1. x = (1, 1): W x = 7, W' x = 6 * 1 = 6, at strength 2: 7 + 2 * (6 - 7) = 5. The bias of 10 is not scaled."""
    network = nn.Sequential(nn.Linear(2, 1))
    network[0].weight.data, network[0].bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([10.0])
    adapters = Adapters(network, settings(algorithm="DoRA", rank=1))
    low = adapters.adapter_for("0")
    low.down.data, low.up.data, low.magnitude.data = (
        torch.tensor([[3.0, -4.0]]),
        torch.tensor([[1.0]]),
        torch.tensor([0.2]),
    )
    with adapters.attached():
        assert network(torch.ones(1, 2)).item() == pytest.approx(16.0)
        with adapters.at_strength(2.0):
            assert network(torch.ones(1, 2)).item() == pytest.approx(15.0)
    assert adapters.export_tensors()[0]["lora_unet_0.dora_scale"].tolist() == [[pytest.approx(5.0)]], (
        "ComfyUI: dora_scale / |W| = 1"
    )


def test_loha_by_hand():
    """rank 1: w1 = [[1], [2]] [[1, 3]] = [[1, 3], [2, 6]], w2 = [[1], [1]] [[2, 1]] = [[2, 1], [2, 1]]; product [[2,
    3], [4, 6]]; x = (1, 1): (5, 10)."""
    low = LohaLayer(nn.Linear(2, 2), 1, 1.0)
    low.w1_a.data, low.w1_b.data = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 3.0]])
    low.w2_a.data, low.w2_b.data = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0, 1.0]])
    assert low(torch.ones(1, 2)).tolist() == [[5.0, 10.0]]


def test_lokr_by_hand():
    """kron([[1, 2], [3, 4]], [[0, 1], [1, 0]]) = [[0,1,0,2],[1,0,2,0],[0,3,0,4],[3,0,4,0]]; x = (1, 2, 3, 4): (10, 7,
    22, 15)."""
    adapters = Adapters(nn.Sequential(nn.Linear(4, 4)), settings(algorithm="LoKr", rank=2, factor=2))
    low = adapters.adapter_for("0")
    low.w1.data, low.w2.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert low(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[10.0, 7.0, 22.0, 15.0]]


def test_a_lokr_of_whole_matrices_has_an_alpha_and_is_rescaled_without_it():
    """LyCORIS converts alpha to a number whatever the matrices are; no loader uses it where both are whole."""
    network = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        lora = LoraFile(shaken(network, algorithm="LoKr", rank=2, factor=2, alpha=3.0).export_tensors()[0])
    assert sorted(key.split(".")[1] for key in lora) == ["alpha", "lokr_w1", "lokr_w2"]
    parts, half = ({k.split(".")[1]: v for k, v in f.items()} for f in (lora, rescale_lora(lora, 0.5, {})))
    weight = network[0].weight
    assert float(parts["alpha"]) == float(half["alpha"]) == 1
    assert torch.allclose(change(half, weight), 0.5 * change(parts, weight))


@pytest.mark.parametrize(
    "count, factor, expected",
    [(128, 8, (8, 16)), (128, 0, (8, 16)), (360, 8, (8, 45)), (360, 0, (18, 20)), (127, 8, (1, 127))],
)
def test_lokr_splits_a_width_into_two_factors(count, factor, expected):
    assert factorize_dimension(count, factor) == expected


@pytest.mark.parametrize("rank", [2, 6])
def test_loha_gives_the_same_with_and_without_the_dense_matrix(rank):
    layer = seeded(nn.Linear(40, 30))
    low = LohaLayer(layer, rank, 1.0, rng=rng())
    with torch.no_grad():
        low.w2_a.copy_(torch.randn(low.w2_a.shape, generator=rng(1)))
    x = torch.randn(5, 40, generator=rng(2))
    assert low.uses_low_rank == (rank == 2)
    answers = []
    for low.uses_low_rank in (True, False):
        answers.append(low(x))
    assert torch.allclose(*answers, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("algorithm", NEW)
def test_the_formulas_are_those_of_peft(algorithm):
    """Oracle: peft's DoRA, LoHa and LoKr on a linear layer and a 3x3 convolution, with our numbers copied in."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

    network = seeded(ConvNet())
    theirs = copy.deepcopy(network)
    ours = shaken(network, algorithm=algorithm, rank=1, alpha=3.0, conv=True, conv_rank=1, conv_alpha=3.0, factor=2)
    names = dict(target_modules=["emb", "op", "skip"])
    config = {
        "DoRA": lambda: LoraConfig(r=1, lora_alpha=3, use_dora=True, **names),
        "LoHa": lambda: LoHaConfig(r=1, alpha=3, **names),
        "LoKr": lambda: LoKrConfig(r=1, alpha=3, decompose_factor=2, **names),
    }[algorithm]()
    inject_adapter_in_model(config, theirs)
    with torch.no_grad():
        for name, layer in ours.layers.items():
            copy_to_peft(theirs.get_submodule(name), ours.adapter_for(name), layer)
        assert torch.allclose(network(X), theirs(X), rtol=1e-4, atol=1e-4), (network(X) - theirs(X)).abs().max()


def copy_to_peft(theirs, low, layer):
    if isinstance(low, LohaLayer):
        for part in ("w1_a", "w1_b", "w2_a", "w2_b"):
            getattr(theirs, f"hada_{part}")["default"].copy_(getattr(low, part))
        return
    if hasattr(low, "w1"):
        theirs.lokr_w1["default"].copy_(low.w1)
        for part in ("w2",) if low.has_full_w2 else ("w2_a", "w2_b"):
            there = getattr(theirs, f"lokr_{part}")["default"]
            there.copy_(getattr(low, part).view(there.shape))
        return
    theirs.lora_A["default"].weight.copy_(low.down)
    theirs.lora_B["default"].weight.copy_(low.up)
    there = theirs.lora_magnitude_vector["default"].weight
    there.copy_(((1 + low.magnitude) * layer.weight.flatten(1).norm(dim=1)).view(there.shape))


# -- costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, most", [("LoRA", 0.05), ("DoRA", 0.06), ("LoHa", 0.25), ("LoKr", 0.25)])
def test_what_an_algorithm_costs_beside_the_layer_itself(algorithm, most):
    """FLOPs of forward and backward over those of the frozen layer alone, 512 wide, 1024 tokens, rank 4. A dense
    gradient would be 0.5."""
    network, x = nn.Sequential(nn.Linear(512, 512)).requires_grad_(False), torch.randn(1024, 512)

    def flops():
        with FlopCounterMode(display=False) as counter:
            network(x.clone().requires_grad_()).sum().backward()
        return counter.get_total_flops()

    alone = flops()
    adapters = shaken(network, algorithm=algorithm, rank=4)
    more = flops() / alone - 1
    adapters.detach()
    assert more <= most, f"{algorithm}: {more:.1%} more"


# -- rules by layer name -----------------------------------------------------------------------------------------------


def test_rules_give_layers_their_own_rank_alpha_and_rate():
    """ff.up: rank 2 of 4 keeps the scale 0.5; to_q: alpha 8 of rank 8; to_out is left out; the rest is as the node
    says."""
    text = "ff.up: rank=2 lr=0.5   # a remark\n\nto_q: rank=8 alpha=8\nto_out: rank=0"
    adapters = Adapters(Net(), AdapterSettings(rank=4, alpha=2.0, blocks=text))
    found = {
        name.rsplit(".", 1)[1]: (low.rank, low.scale, low.up.rate)
        for name, low in ((n, adapters.adapter_for(n)) for n in adapters.layers)
    }
    assert found == {"to_q": (8, 1.0, 1.0), "up": (2, 0.5, 0.5), "down": (4, 0.5, 1.0)}


def test_lora_plus_and_rules_reach_the_optimizer():
    """LoRA+ 16 and a rule of 0.5 on one layer: rates of 1e-3 * (1, 16, 0.5, 8)."""
    adapters = Adapters(Net(), AdapterSettings(rank=2, up_rate=16.0, blocks="to_q: lr=0.5"))
    optimizer = make_optimizer(parameter_groups(adapters, {"model": 1e-3}), OptimizerSettings())
    rates = {round(group["lr"], 9): len(group["params"]) for group in optimizer.param_groups}
    assert rates == {1e-3: 3, 16e-3: 3, 0.5e-3: 1, 8e-3: 1}


def test_without_rules_the_optimizer_has_one_group():
    assert (
        len(
            make_optimizer(
                parameter_groups(Adapters(Net(), AdapterSettings()), {"model": 1e-3}), OptimizerSettings()
            ).param_groups
        )
        == 1
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("ff: rank=4\nattn rank=4", r"line 2: 'attn rank=4' is not a rule"),
        ("attn: rank=4.5", r"line 1: .* rank is '4.5'; it must be a whole number from 0 to 4096"),
        ("attn: lr=nan", r"line 1: .* lr is 'nan'; it must be a number from 1e-06 to 1000"),
        ("attn: dim=4", r"'dim=4' is none of rank=, alpha= and lr="),
        ("(attn: rank=4", r"line 1: .* is not a regular expression"),
    ],
)
def test_a_rule_that_is_none_is_refused_with_its_line(text, message):
    with pytest.raises(ValueError, match=message):
        AdapterSettings(blocks=text)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "attn2: rank=4",
            r"blocks, line 1: 'attn2: rank=4' matches none of the 4 layers that targets chooses, such as blocks.0.attn.to_q",
        ),
        ("attn: rank=4\nto_q: rank=2", r"line 2: 'to_q: rank=2' comes too late"),
        ("blocks: rank=0", "leaves out every layer"),
    ],
)
def test_a_rule_that_decides_nothing_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Adapters(Net(), AdapterSettings(blocks=text))


def test_no_text_is_no_rule():
    assert parse_block_rules(" \n# only a remark\n") == ()


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_is_of_the_step_alone_and_can_be_had_again():
    network, x = seeded(nn.Sequential(nn.Linear(64, 32))), torch.randn(50, 64, generator=rng())
    adapters = shaken(network, rank=16, dropout=0.5)
    whole = network(x)
    with adapters.dropout_active(rng(1)):
        dropped, again, later = network(x), network(x), adapters.capture_context()
    with adapters.dropout_active(rng(2)):
        other = network(x)
    assert torch.equal(dropped, again) and not torch.equal(dropped, other) and not torch.equal(dropped, whole)
    assert torch.equal(network(x), whole)
    with adapters.at_strength(0.3), later():
        assert torch.equal(network(x), dropped), (
            "a block that is computed again drops the same, at the strength of then"
        )
    assert adapters.strength == 1.0 and adapters.dropout_seed is None


def ranks_seen(shape, **dropout):
    """What a layer of zeros says of ones when its adapter passes all 64 ranks on as they are: its inner values, which
    are all 1."""
    network = nn.Sequential(nn.Linear(64, 64, bias=False)).requires_grad_(False)
    network[0].weight.zero_()
    adapters = Adapters(network, settings(rank=64, **dropout))
    low = adapters.adapter_for("0")
    low.down.data, low.up.data = torch.eye(64), torch.eye(64)
    adapters.attach()
    with adapters.dropout_active(rng()), torch.no_grad():
        return network(torch.ones(*shape, 64))


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    """With 0.25 left out, the rest becomes 4 / 3."""
    seen = ranks_seen((1000,), dropout=0.25)
    assert {round(v, 4) for v in seen.unique().tolist()} == {0.0, 1.3333}
    assert seen.mean().item() == pytest.approx(1, abs=0.01)


def test_rank_dropout_leaves_out_whole_ranks_for_each_picture_and_keeps_the_mean():
    """A rank is there for all tokens of an image or for none, and images differ."""
    seen = ranks_seen((200, 5), rank_dropout=0.25)
    assert {round(v, 4) for v in seen.unique().tolist()} == {0.0, 1.3333} and seen.mean().item() == pytest.approx(
        1, abs=0.02
    )
    assert torch.equal(seen, seen[:, :1].expand_as(seen)) and not torch.equal(seen[0], seen[1])


def test_rank_dropout_of_a_convolution_is_along_its_channels():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False)).requires_grad_(False)
    adapters = Adapters(network, settings(rank=3, conv=True, conv_rank=3, rank_dropout=0.5))
    low = adapters.adapter_for("0")
    low.down.data.fill_(0.1), low.up.data.zero_()
    low.up.data[:3, :, 0, 0] = torch.eye(3)
    network[0].weight.zero_(), adapters.attach()
    with adapters.dropout_active(rng(4)), torch.no_grad():
        seen = network(torch.ones(20, 3, 6, 6))[:, :3]
    there = seen.flatten(2).ne(0)
    assert torch.equal(there.all(2), there.any(2)) and 0.3 < there.all(2).float().mean() < 0.7


def test_module_dropout_leaves_out_whole_layers_and_gradients_still_flow():
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
    adapters = shaken(network, rank=1, module_dropout=0.3)
    x = torch.ones(1, 4)
    with adapters.dropout_active(rng()):
        left_out = [bool(torch.equal(layer(x), nn.Linear.forward(layer, x))) for layer in network]
        network[left_out.index(True)](x).sum().backward()
    assert 0.2 < sum(left_out) / 200 < 0.4


def test_without_dropout_a_step_draws_nothing():
    draw = rng(3)
    with Adapters(Net(), settings()).dropout_active(draw):
        assert torch.equal(draw.get_state(), rng(3).get_state())


@pytest.mark.parametrize("algorithm", ["LoHa", "LoKr"])
@pytest.mark.parametrize("name", ["dropout", "rank_dropout"])
def test_dropout_of_inner_values_is_refused_where_there_are_none(algorithm, name):
    with pytest.raises(
        ValueError, match=f"{name} is 0.1 and algorithm is {algorithm}.*module_dropout, or set {name} to 0"
    ):
        AdapterSettings(algorithm=algorithm, **{name: 0.1})


# -- starting from a file ----------------------------------------------------------------------------------------------


def from_file(tensors):
    return {base.removeprefix("lora_unet_"): parts for base, parts in group_tensors_by_layer(tensors).items()}


@pytest.mark.parametrize("algorithm", ADAPTER_ALGORITHMS)
def test_adapters_that_start_from_a_file_give_what_the_file_gives(algorithm):
    """The file has alpha 3, here it is 1: what is taken over is the effect."""
    network = seeded(ConvNet())
    how = dict(algorithm=algorithm, conv=True, rank=2, conv_rank=1, factor=2)
    first = shaken(network, **how, alpha=3.0)
    wanted, tensors = network(X), first.export_tensors()[0]
    first.detach()
    second = Adapters(network, settings(**how, alpha=1.0), rng(9))
    second.load(from_file(tensors))
    with second.attached():
        assert torch.allclose(network(X), wanted, rtol=1e-4, atol=1e-4), (network(X) - wanted).abs().max()


def test_a_file_in_the_names_of_peft_is_taken_over_too():
    network = seeded(nn.Sequential(nn.Linear(6, 5)))
    adapters = Adapters(network, settings(rank=2))
    down, up = torch.randn(2, 6, generator=rng()), torch.randn(5, 2, generator=rng())
    adapters.load({"0": {"lora_A.weight": down, "lora_B.weight": up}})
    assert torch.equal(adapters.adapter_for("0").down, down) and torch.equal(adapters.adapter_for("0").up, up)


@pytest.mark.parametrize(
    "file, here, message",
    [
        (
            dict(rank=1),
            dict(rank=2),
            r"start_from does not fit at layer emb: .*the file has rank 1, so set rank to that",
        ),
        (
            dict(algorithm="LoHa"),
            {},
            r"layer emb: it has no lora_down.weight, but alpha, hada_w1_a.*choose the algorithm of the file",
        ),
        ({}, dict(algorithm="DoRA"), r"layer emb: it has no dora_scale.*choose the algorithm of the file"),
        (
            dict(conv=True),
            dict(conv=False),
            r"start_from has 1 layers that are not trained here, such as op.*would be lost",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_layer(file, here, message):
    network = seeded(ConvNet())
    tensors = shaken(network, **file).export_tensors()[0]
    with pytest.raises(ValueError, match=message):
        Adapters(network, settings(**here)).load(from_file(tensors))


def test_the_layer_of_every_kind_of_key_is_found():
    keys = [
        "a.lora_up.weight",
        "a.lora_down.weight",
        "a.alpha",
        "b.hada_w1_a",
        "b.alpha",
        "c.lokr_w2_b",
        "a.dora_scale",
        "d.e.lora_A.weight",
    ]
    found = group_tensors_by_layer({key: torch.zeros(1) for key in keys})
    assert {base: sorted(parts) for base, parts in found.items()} == {
        "a": ["alpha", "dora_scale", "lora_down.weight", "lora_up.weight"], "b": ["alpha", "hada_w1_a"], "c": ["lokr_w2_b"],
        "d.e": ["lora_A.weight"],
    }  # fmt: skip


def test_the_first_matrix_of_a_lora_is_drawn_as_before():
    """Runs from before the other algorithms begin with the very same numbers."""
    low = LoraLayer(nn.Linear(6, 5), 2, 2.0, rng=rng(4))
    wanted = torch.empty(2, 6)
    nn.init.kaiming_uniform_(wanted, a=math.sqrt(5), generator=rng(4))
    assert torch.equal(low.down, wanted)


def test_half_precision_keeps_a_gain_that_is_nearly_1():
    """W x = 100 in bf16, whose next numbers are 99.5 and 100.5; a magnitude of 0.004 is 0.4 more, and counts in the
    mean of many rows."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False)).requires_grad_(False)
    network[0].weight.fill_(1.0)
    adapters = Adapters(network, settings(algorithm="DoRA", rank=1))
    adapters.adapter_for("0").magnitude.data.fill_(0.004)
    network.to(torch.bfloat16)
    x = torch.full((1, 1), 100.0, dtype=torch.bfloat16)
    change = adapters.adapter_for("0").output_change(network[0], x, network(x), 1.0)
    assert change.item() == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize(
    "algorithm, more, message",
    [
        ("LoRA", {"dora_scale": torch.ones(16, 1)}, "its dora_scale would be lost: .*Choose DoRA"),
        ("LoHa", {"dora_scale": torch.ones(16, 1)}, "its dora_scale would be lost: .*apply the file to model"),
        ("LoRA", {"diff_b": torch.ones(16)}, "its diff_b would be lost: no adapter here changes a bias; apply the"),
        ("DoRA", {"diff": torch.ones(16, 16)}, "its diff would be lost: no adapter here adds a whole matrix; apply"),
        ("LoRA", {"reshape_weight": torch.tensor([16, 16])}, "its reshape_weight would be lost: apply the file"),
        (
            "DoRA",
            {"dora_scale": torch.ones(1, 16)},
            r"its dora_scale is \(1, 16\), and 16 numbers, .*A scale of the in",
        ),
    ],
)
def test_parts_of_a_file_that_would_be_lost_are_refused(algorithm, more, message):
    """The layer is square, so that a scale of its inputs has as many numbers as one of its outputs."""
    network = nn.Sequential(nn.Linear(16, 16))
    adapters = shaken(network, algorithm=algorithm, rank=2)
    with torch.no_grad():
        parts = {k.removeprefix("lora_unet_0."): v for k, v in adapters.export_tensors()[0].items()}
    with pytest.raises(ValueError, match=f"start_from does not fit at layer 0: {message}"):
        adapters.load({"0": parts | more})
