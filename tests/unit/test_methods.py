"""The contract that every method keeps, in one table: a new method is one more row in METHODS.

Loss falls on unseen seeds · only owned parameters move · resume is exact · files load back equal · an interrupt leaves
no trace · the same seed gives the same bytes · a reference curve.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from trainyard.tests.unit.test_adapter_layers import merge
from trainyard.tests.unit.toy import (
    CHANNELS,
    SHAPE,
    SIDE,
    WORDS,
    Denoiser,
    Net,
    Stop,
    adapters,
    dataset,
    folder,
    pairs,
    prompts,
    rng,
    shaken,
)
from trainyard.trainers.adapters.adapters import Adapters, group_tensors_by_layer
from trainyard.trainers.data.cache import MemoryStore
from trainyard.trainers.data.signed_prompts import SignedPrompt
from trainyard.trainers.data.views import CROP_VIEW, GREY_VIEW, ROTATED_VIEW, SHUFFLED_VIEW, EncodedView, ViewDataset
from trainyard.trainers.diffusion import NoiseLevelDensity, denoising_loss
from trainyard.trainers.files import read_safetensors
from trainyard.trainers.loop import step_rng, train
from trainyard.trainers.methods.few_step import plan_few_steps
from trainyard.trainers.methods.image_pairs import AddiftTraining, ImageSlider
from trainyard.trainers.methods.leco_score import (
    LecoScoreSettings,
    LecoScoreTraining,
    NoisedImageStates,
    RolloutStates,
    build_score_tasks,
)
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.methods.prior import PriorData, PriorSettings
from trainyard.trainers.methods.prompts import (
    PromptDifferenceTraining,
    make_leco_targets,
    make_preserve_targets,
    make_replacement_targets,
    make_slider_targets,
)
from trainyard.trainers.methods.rollouts import (
    ImagePoints,
    NoAdapters,
    NoisePoints,
    PromptTask,
    RolloutPoints,
    StudentTeacherModel,
)
from trainyard.trainers.methods.transfer import (
    TransferPoints,
    make_transfer_tasks,
    predict_at_points,
    sample_transfer_points,
    with_goals,
)
from trainyard.trainers.scores.networks import (
    LatentResNet,
    ScoreModelInfo,
    Scorer,
    ScorerEnsemble,
    build_scorer,
    call_with_seed,
    head_output_size,
)
from trainyard.trainers.scores.objective import ScoreSettings, ScoreTraining, score_targets
from trainyard.trainers.scores.pretext import PretextSettings, PretextTraining, build_pretext_heads
from trainyard.trainers.settings import (
    AdapterSettings,
    NoiseSettings,
    OptimizerSettings,
    PointSettings,
    RunSettings,
    TransferSettings,
)

TESTS = Path(__file__).resolve().parents[1]
RATE = 0.01


@dataclasses.dataclass
class Made:
    """A method with all that it borrows. `output`: what the trained network says to fixed inputs; `loaded(tensors)`:
    the same said by a network that knows only the file, as another program would load it."""

    method: object
    frozen: list  # tensors that training must leave alone
    export: Callable  # () -> tensors of the file
    output: Callable  # () -> Tensor
    loaded: Callable  # tensors -> Tensor


def fixed_inputs():
    draw = rng(77)
    return (
        torch.randn(3, CHANNELS, SIDE, SIDE, generator=draw),
        torch.rand(3, generator=draw),
        torch.randn(3, WORDS, generator=draw),
    )


def make_lora(prediction="flow", seed=0, prior=None, adapter=None, **settings):
    network, data = Net(), dataset(dropout=0.2 if "distilled" in settings else None)
    added = adapters(network, seed, **{"alpha": 2.0, **(adapter or {})})
    noise = NoiseSettings(**settings)
    method = LoraTraining(
        Denoiser(network, prediction),
        added,
        data,
        noise,
        NoiseLevelDensity("logit-normal"),
        batch=2,
        prior=prior,
        few_step=plan_few_steps(noise),
    )
    latents = [data.store.load(item.latent)["mean"] for item in data.items]
    return Made(
        method,
        [
            *network.parameters(),
            *latents,
            *(data.store.load(item.caption_keys[0])["cross_attn"] for item in data.items),
        ],
        lambda: added.export_tensors()[0],
        lambda: network(*fixed_inputs()),
        lambda tensors: merged(Net(), tensors)(*fixed_inputs()),
    )


def merged(network, tensors):
    """The file in the weights, as a loader puts it there."""
    parts = group_tensors_by_layer(tensors)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and (found := parts.get("lora_unet_" + name.replace(".", "_"))):
            merge(layer.weight, found, 1.0)
    return network


def make_difference(pulls, batch=1, prediction="flow", points="rollout", seed=0, **rest):
    network = Net()
    added = adapters(network, seed, alpha=2.0)
    model = StudentTeacherModel(Denoiser(network, prediction), added, prompts())
    tasks = [PromptTask(pulls, "cat", shapes=(SHAPE,), batch=batch)]
    noise = NoiseSettings(min_time=0.8) if points == "noise" else NoiseSettings()
    source = {
        "rollout": lambda: RolloutPoints(model, tasks, PointSettings(sampling_steps=4, ways=2, refresh=2), noise, 2.0),
        "pictures": lambda: ImagePoints(model, tasks, dataset(), noise, NoiseLevelDensity(), batch),
        "noise": lambda: NoisePoints(model, tasks, noise),
    }[points]()
    return made_of(PromptDifferenceTraining(model, tasks, source, **rest), network, added)


def make_transfer(prediction="flow", seed=0):
    """A source of other weights and a random LoRA of it; goals are made before."""
    source, changed, network = Net(seed=4), Net(seed=4), Net()
    shaken(changed)
    frozen = lambda net: StudentTeacherModel(Denoiser(net, prediction), NoAdapters(), prompts())
    settings, tasks = TransferSettings(trajectories=4, sampling_steps=3), make_transfer_tasks(["cat", "dog"], SHAPE, 2)
    points = sample_transfer_points(frozen(changed), Denoiser(None, prediction), tasks, settings, 1.0, 0, lambda: None)
    before, after, target = (
        predict_at_points(frozen(net), points, tasks, 1.0, lambda: None) for net in (source, changed, network)
    )
    added = adapters(network, seed, alpha=2.0)
    student = StudentTeacherModel(Denoiser(network, prediction), added, prompts())
    places = TransferPoints(student, with_goals(points, tasks, before, after, target))
    return made_of(PromptDifferenceTraining(student, tasks, places), network, added)


def make_on_adapters(build, prediction="flow", seed=0):
    """A method that trains adapters and nothing else: `build(denoiser, adapters)`."""
    network = Net()
    added = adapters(network, seed, alpha=2.0)
    return made_of(build(Denoiser(network, prediction), added), network, added)


def make_pairs(kind, prediction="flow", seed=0, **rest):
    return make_on_adapters(
        lambda denoiser, added: kind(denoiser, added, pairs(), NoiseSettings(), NoiseLevelDensity(), **rest),
        prediction,
        seed,
    )


def make_leco_score(prediction="flow", seed=0, **settings):
    """A score model of random weights, held by a weak anchor."""
    network = Net()
    added = adapters(network, seed, alpha=2.0)
    chosen = LecoScoreSettings(**{"sampling_steps": 5, "ways": 2, "refresh": 2, "anchor": 0.1, **settings})
    model = StudentTeacherModel(Denoiser(network, prediction), added, prompts())
    judge = ScorerEnsemble(
        [call_with_seed(1, lambda: random_scorer()).requires_grad_(False)], ScoreModelInfo(channels=CHANNELS)
    )
    tasks = build_score_tasks(
        [SignedPrompt("cat"), SignedPrompt("dog", -1.0)], [SHAPE], 1 if chosen.slider else 2, chosen
    )
    places = (
        NoisedImageStates(model, dataset(), chosen, 2)
        if chosen.target == "direct_align"
        else RolloutStates(model, tasks, chosen, 2.0)
    )
    made = made_of(LecoScoreTraining(model, [(judge, 1.0)], places, chosen), network, added)
    made.frozen += list(judge.networks[0].parameters())
    return made


def random_scorer():
    scorer = Scorer(LatentResNet(CHANNELS, 8, 1), 1)
    torch.nn.init.normal_(scorer.head[-1].weight, std=0.3)
    for block in scorer.trunk.blocks:
        torch.nn.init.normal_(block.second.weight, std=0.1)
    return scorer


def made_of(method, network, added):
    output = lambda: network(*fixed_inputs())
    loaded = lambda tensors: merged(Net(), tensors)(*fixed_inputs())
    return Made(method, list(network.parameters()), lambda: added.export_tensors()[0], output, loaded)


def make_score(task="regression", backbone="latent ResNet", prediction="flow", seed=0):
    """Scores of four random latents; the file is the network itself."""
    data, about = (
        dataset(),
        ScoreModelInfo(
            backbone=backbone,
            task=task,
            channels=CHANNELS,
            width=8,
            depth=1,
            outputs=head_output_size(task),
            high=3.0,
            mean=1.5,
        ),
    )
    network = call_with_seed(seed, lambda: build_scorer(about))
    settings = ScoreSettings(batch=2)
    pairs = [(0, 1), (2, 1), (3, 0), (2, 3)]
    method = ScoreTraining(
        Denoiser(None, prediction), network, data, about, score_targets([0.0, 1.0, 2.0, 3.0], about), pairs, settings
    )
    x, level = fixed_inputs()[:2]

    def loaded(tensors):
        other = build_scorer(about)
        other.load_state_dict(tensors)
        return other(x, level)

    return Made(
        method,
        [data.store.load(item.latent)["mean"] for item in data.items],
        lambda: dict(network.state_dict()),
        lambda: network(x, level),
        loaded,
    )


def make_pretext(backbone="latent ResNet", prediction="flow", seed=0):
    """All tasks on six views of four images, views of one image being alike; the file is the trunk itself."""
    draw, store, images = rng(9), MemoryStore(), []
    for number in range(4):
        middle = torch.randn(SHAPE, generator=draw)
        views = [EncodedView(f"{number}/{i}", i) for i in range(6)]
        store.update(
            {view.key: {"mean": middle + 0.3 * torch.randn(SHAPE, generator=draw), "std": None} for view in views}
        )
        images.append({CROP_VIEW: views[:2], ROTATED_VIEW: views[:4], SHUFFLED_VIEW: views[2:5], GREY_VIEW: views[4:]})
    views = ViewDataset(tuple(images), (), store, SHAPE, "")
    settings = PretextSettings(backbone=backbone, batch=2, rotation=0.5, jigsaw=0.5, colours=1.0, classes=0.5)
    make = lambda: build_scorer(ScoreModelInfo(backbone=backbone, channels=CHANNELS, width=8, depth=1)).trunk
    trunk = call_with_seed(seed, make)
    method = PretextTraining(Denoiser(None, prediction), trunk, call_with_seed(seed, lambda: build_pretext_heads(trunk, SHAPE, settings, 2)), views, range(4), settings,
                     labels=[0, 1, 0, None])  # fmt: skip
    x, level = fixed_inputs()[:2]

    def loaded(tensors):
        other = make()
        other.load_state_dict(tensors)
        return other(x, level)

    return Made(
        method,
        [value["mean"] for value in store.values()],
        lambda: dict(trunk.state_dict()),
        lambda: trunk(x, level),
        loaded,
    )


@dataclasses.dataclass(frozen=True)
class MethodRow:
    make: Callable  # seed -> Made
    curve: list[float]  # losses of steps 1 to 8 with seed 0, fp32 on a CPU; relative tolerance 1e-4


def method_row(make, *args, curve=(), **settings):
    """A row of the table: `make(*args, seed=..., **settings)` makes the method anew. Without a curve, the test of the
    curve prints the one to write here."""
    return MethodRow(lambda seed=0: make(*args, seed=seed, **settings), list(curve))


METHODS = {
    "lora": method_row(make_lora, curve=[5.99861, 7.21818, 6.10578, 6.45998, 4.31287, 6.7283, 3.85358, 6.83958]),
    "lora, eps, min-SNR": method_row(
        make_lora,
        "eps",
        weighting="min-SNR",
        curve=[4.20972, 5.98353, 5.12524, 4.65772, 3.90156, 5.30313, 4.34837, 4.76823],
    ),
    "lora, v": method_row(
        make_lora, "v", curve=[5.03254, 6.05629, 5.71036, 5.21649, 3.9899, 6.47365, 4.21229, 6.25366]
    ),
    "lora, v, soft-min-SNR, Huber, offset": method_row(
        make_lora,
        "v",
        weighting="soft-min-SNR",
        loss="scheduled Huber",
        noise_offset=0.1,
        pyramid_levels=2,
        perturbation=0.1,
        curve=[0.36869, 0.35963, 0.11799, 0.2994, 0.31689, 0.29627, 0.15897, 0.23988],
    ),
    "lora, DoRA": method_row(
        make_lora,
        "flow",
        adapter={"algorithm": "DoRA"},
        curve=[5.99861, 7.17466, 5.98825, 6.23682, 4.07751, 6.26159, 3.5771, 6.29029],
    ),
    "lora, LoHa, module dropout": method_row(
        make_lora,
        "flow",
        adapter={"algorithm": "LoHa", "module_dropout": 0.1},
        curve=[5.99861, 7.2239, 6.09006, 6.46772, 4.31602, 6.70779, 4.1702, 6.98436],
    ),
    "lora, LoKr": method_row(
        make_lora,
        "flow",
        adapter={"algorithm": "LoKr", "rank": 2, "factor": 4},
        curve=[5.99861, 7.25067, 6.21451, 6.84863, 4.80868, 7.60216, 4.81094, 8.63576],
    ),
    "lora, rank dropout": method_row(
        make_lora,
        "flow",
        adapter={"rank_dropout": 0.3},
        curve=[5.99861, 7.2273, 6.1718, 6.57851, 4.35351, 6.9463, 4.11454, 7.18009],
    ),
    "lora, dropout, LoRA+": method_row(
        make_lora,
        "flow",
        adapter={"dropout": 0.2, "up_rate": 4.0},
        curve=[5.99861, 7.10434, 5.90477, 5.46487, 3.01984, 4.60093, 2.65345, 3.78374],
    ),
    "lora, contrastive and drift": method_row(
        make_lora,
        "flow",
        distilled="contrastive and drift",
        few_steps=3,
        curve=[17.2545, 29.9653, 38.5208, 6.66164, 30.8306, 23.351, 29.3165, 27.6199],
    ),
    "transfer": method_row(
        make_transfer, curve=[0.152423, 0.22117, 0.213355, 0.193829, 0.108628, 0.114802, 0.101701, 0.117052]
    ),
    "lora, prior by prompts and images": method_row(
        lambda seed=0: make_lora(
            "flow",
            seed,
            prior=PriorData(
                PriorSettings(class_prompt="cat", weight=0.5), {"cat": prompts()["cat"]}, dataset(3, seed=9)
            ),
        ),
        curve=[9.73604, 10.61272, 8.659, 9.31583, 7.12894, 9.28876, 6.49275, 9.48541],
    ),
    "leco": method_row(
        make_difference,
        make_leco_targets("cat", "cat", "", "", "erase", 1.0),
        2,
        curve=[2.77621, 1.11738, 2.46141, 2.16992, 1.17001, 1.94532, 1.54065, 1.26565],
    ),
    "leco, eps": method_row(
        make_difference,
        make_leco_targets("cat", "red cat", "cat", "dog", "enhance", 2.0),
        2,
        "eps",
        curve=[0.0113274, 0.00637765, 0.018444, 0.00830176, 0.0027884, 0.00723061, 0.00727573, 0.00452141],
    ),
    "leco on images": method_row(
        make_difference,
        make_leco_targets("cat", "old", "", "young"),
        2,
        points="pictures",
        curve=[0.664553, 0.602657, 0.62084, 0.719327, 0.546203, 0.334985, 0.291591, 0.13506],
    ),
    "text slider": method_row(
        make_difference,
        make_slider_targets("cat", "old", "young", 2.0),
        curve=[3.05613, 2.40986, 3.34941, 2.50481, 2.81077, 2.00483, 1.04389, 1.43952],
    ),
    "text slider, renormalised, v": method_row(
        make_difference,
        make_slider_targets("cat", "old", "young", 3.0),
        1,
        "v",
        renormalise=True,
        curve=[1.50504, 1.4591, 0.14541, 2.03106, 0.108602, 0.128597, 1.17551, 0.63253],
    ),
    "replace from noise, and keep": method_row(
        make_difference,
        make_replacement_targets("cat", "dog") + make_preserve_targets("old"),
        points="noise",
        curve=[0.16826, 0.155784, 0.134742, 0.133613, 0.0500118, 0.11709, 0.0516586, 0.0479043],
    ),
    "image slider": method_row(
        make_pairs, ImageSlider, curve=[8.21598, 4.38116, 5.54212, 6.72977, 4.52745, 5.96505, 4.9573, 6.13157]
    ),
    "change": method_row(
        make_pairs,
        AddiftTraining,
        "eps",
        strength=0.5,
        curve=[0.63082, 0.257082, 0.131713, 0.457188, 0.180297, 0.061341, 0.392228, 0.0562054],
    ),
    "leco score": method_row(
        make_leco_score, curve=[-0.322, 1.4262, 0.0384772, 0.8181, 1.03703, -0.27954, 0.34155, 1.46123]
    ),
    "leco score, next step, eps": method_row(
        make_leco_score,
        "eps",
        target="next_step",
        curve=[-2.08426, 1.67308, -0.60631, 6.05005, 5.80378, 0.79566, 0.28716, 3.76837],
    ),
    "leco score, direct align, v": method_row(
        make_leco_score,
        "v",
        target="direct_align",
        curve=[-1.67565, -1.37575, -1.56007, -1.57623, -1.24099, -0.50099, 1.11943, -1.12745],
    ),
    "leco score, draft lv": method_row(
        make_leco_score,
        target="draft_lv",
        curve=[-1.9606, -0.31323, -0.32213, 0.76068, 0.64279, 1.46385, 0.66332, 1.49726],
    ),
    "score": method_row(
        make_score, curve=[0.714025, 0.881642, 0.117647, 0.64713, 3.76583, 0.632257, 0.604367, 0.701345]
    ),
    "score in bins, ViT, eps": method_row(
        make_score,
        "distribution",
        "latent ViT",
        "eps",
        curve=[0.435602, 0.435191, 0.400849, 0.381977, 0.441026, 0.373144, 0.373079, 0.251352],
    ),
    "score of pairs": method_row(
        make_score, "pairwise", curve=[0.894296, 0.568794, 0.722693, 0.224413, 1.12099, 0.137407, 0.505674, 0.165359]
    ),
    "pretext": method_row(make_pretext, curve=[4.79645, 4.54743, 4.49082, 4.02746, 4.0872, 4.44912, 3.82323, 4.09397]),
    "pretext, ViT, eps": method_row(
        make_pretext, "latent ViT", "eps", curve=[5.42999, 4.9534, 3.90823, 4.20676, 3.60109, 4.20597, 3.26158, 3.29216]
    ),
}


def run(steps, seed=0, save_every=0):
    return RunSettings(steps=steps, learning_rate=RATE, seed=seed, save_every=save_every)


def trained(made, steps, where=None, *, report=None, seed=0, save_every=0):
    """(losses, run folder) of a run that is kept in the folder `where`; `interval` 0 so that a report may stop any
    step."""
    store = folder(where, made.export, steps) if where else None
    losses = train(
        made.method, run(steps, seed, save_every), OptimizerSettings(warmup=2), report=report, store=store, interval=0
    )
    return losses, store


def kept(store):
    """(bytes of resume.state, bytes of the LoRA) of a run."""
    return store.state_path.read_bytes(), store.lora_path(store.steps).read_bytes()


def unseen_loss(made, count=40):
    """Mean loss over steps that no run of these tests draws; the method's own order of draws is put back."""
    before = made.method.state() if hasattr(made.method, "state") else None
    with torch.no_grad():
        mean = torch.cat([made.method.loss(step_rng(987654321, i)) for i in range(count)]).mean().item()
    if before is not None:
        made.method.load_state(before)
    return mean


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_on_unseen_seeds(name):
    made = METHODS[name].make()
    before = unseen_loss(made)
    trained(made, 80)
    after = unseen_loss(made)
    assert after < 0.9 * before, f"{before:.4f} -> {after:.4f}"


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_one_number_per_sample(name):
    losses = METHODS[name].make().method.loss(step_rng(0, 0))
    assert losses.shape == (2,) and losses.requires_grad and losses.isfinite().all() and losses.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_only_owned_parameters_move_and_all_of_them_do(name):
    made = METHODS[name].make()
    owned = list(made.method.parameters())
    frozen, start = [t.detach().clone() for t in made.frozen], [p.detach().clone() for p in owned]
    trained(made, 3)
    assert all(torch.equal(a, b) for a, b in zip(made.frozen, frozen, strict=True))
    assert all(t.grad is None for t in made.frozen)
    assert not any(torch.equal(a, b) for a, b in zip(owned, start, strict=True))
    assert {id(p) for p in owned}.isdisjoint(id(t) for t in made.frozen)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_same_run(name, tmp_path):
    """3 + 3 steps through the disk, with every object made anew, equal 6: losses, resume state and LoRA, byte for
    byte."""
    whole, whole_store = trained(METHODS[name].make(), 6, tmp_path / "whole")
    trained(METHODS[name].make(), 3, tmp_path / "parts")
    parts, parts_store = trained(METHODS[name].make(), 6, tmp_path / "parts")
    assert parts == whole
    assert kept(parts_store) == kept(whole_store)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(name, tmp_path):
    first, same, other = (
        kept(trained(METHODS[name].make(seed), 4, tmp_path / where, seed=seed)[1])
        for where, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == same
    assert first[1] != other[1]


@pytest.mark.parametrize("name", METHODS)
def test_the_file_loads_back_equal(name, tmp_path):
    """Tensors bit for bit, and the network that another program merges from the file says what the trained one says."""
    made = METHODS[name].make()
    plain = made.output().clone()
    _, store = trained(made, 20, tmp_path)
    tensors, metadata = read_safetensors(store.lora_path(20))
    assert tensors.keys() == made.export().keys() and all(torch.equal(tensors[k], v) for k, v in made.export().items())
    assert metadata["ss_steps"] == "20"
    gap, change = (made.loaded(tensors) - made.output()).abs().max().item(), (made.output() - plain).abs().max().item()
    assert change > 0.01 and gap < 1e-5, f"change {change}, gap {gap}"


def interrupted_in_report(made, where):
    def report(progress):
        if progress.step == 4:
            raise Stop

    trained(made, 6, where, report=report)


def interrupted_in_loss(made, where):
    real, calls = made.method.loss, []

    def loss(generator):
        calls.append(1)
        out = real(generator)  # the method has drawn its batch, and its order of draws has moved on
        if len(calls) == 5:
            raise Stop
        return out

    made.method.loss = loss
    trained(made, 6, where)


@pytest.mark.parametrize("interrupted", [interrupted_in_report, interrupted_in_loss])
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupt_leaves_no_trace(name, interrupted, tmp_path):
    """Stopped after 4 of 6 steps, or in the middle of the fifth: the work is kept, and the run goes on as if nothing
    had happened."""
    whole, whole_store = trained(METHODS[name].make(), 6, tmp_path / "whole")
    made = METHODS[name].make()
    with pytest.raises(Stop):
        interrupted(made, tmp_path / "cut")
    cut = folder(tmp_path / "cut", made.export, 6)
    assert (
        cut.load()["step"] == 4
        and cut.lora_path(4).exists()
        and not cut.lora_path(6).exists()
        and cut.load_finished() is None
    )
    losses, store = trained(METHODS[name].make(), 6, tmp_path / "cut")
    assert losses == whole and kept(store) == kept(whole_store)


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_curve_has_not_changed(name):
    """A change that should not alter results leaves these numbers alone; a change that should comes with new ones and
    says why."""
    losses, _ = trained(METHODS[name].make(), 8)
    assert losses == pytest.approx(METHODS[name].curve, rel=1e-4), f"curve={[float(f'{loss:.6g}') for loss in losses]}"


# -- killed ------------------------------------------------------------------------------------------------------------


def victim(where, moment):
    """A run of 6 steps, saved every 2, that kills its own process in step 4's loss or while the state of step 4 is
    being replaced."""
    torch.set_num_threads(1)
    made, count = make_lora(), []
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if moment == "in a step":
        real_loss = made.method.loss
        made.method.loss = lambda generator: (count.append(1), real_loss(generator), len(count) == 4 and die())[1]
    else:
        real_replace = os.replace
        os.replace = lambda part, path: (
            str(path).endswith(".state") and count.append(1),
            len(count) == 2 and die(),
            real_replace(part, path),
        )
    trained(made, 6, Path(where), save_every=2)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
@pytest.mark.parametrize("moment", ["in a step", "in a save"])
def test_a_run_killed_with_signal_9_goes_on_from_its_last_save(moment, tmp_path):
    """A real process, killed in step 4 or with the new state written but not yet in place: step 2 is what is left of
    both."""
    lines = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import trainyard_plugin"
    lines += f"; from trainyard.tests.unit.test_methods import victim; victim({str(tmp_path / 'cut')!r}, {moment!r})"
    died = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    whole, whole_store = trained(make_lora(), 6, tmp_path / "whole")
    made = make_lora()
    assert folder(tmp_path / "cut", made.export, 6).load()["step"] == 2
    losses, store = trained(made, 6, tmp_path / "cut")
    assert losses == whole and kept(store) == kept(whole_store)


# -- what is particular to the LoRA ------------------------------------------------------------------------------------


def lora(data, batch=1, network=None, **rest):
    network = network or Net()
    return LoraTraining(Denoiser(network), adapters(network), data, batch=batch, **rest)


def test_a_batch_of_two_captions_equals_two_batches_of_one():
    """The same images, noise and noise levels: the losses per sample agree, and so does the gradient of their
    mean."""
    data = dataset()
    method = lora(data)
    batch = data.make_batch([0, 1], rng())
    noise, sigma = torch.randn(batch.x0.shape, generator=rng(1)), torch.tensor([0.3, 0.8])
    both = denoising_loss(method.denoiser, batch.x0, noise, sigma, batch.conds)
    each = [
        denoising_loss(method.denoiser, batch.x0[i : i + 1], noise[i : i + 1], sigma[i : i + 1], batch.conds[i : i + 1])
        for i in (0, 1)
    ]
    assert torch.allclose(both, torch.cat(each), atol=1e-6)
    params = method.parameters()
    first, second = torch.autograd.grad(both.mean(), params), torch.autograd.grad(torch.cat(each).mean(), params)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))


def test_what_the_mask_hides_is_not_learnt():
    """A network that does not look at x, so that pixels behind the mask could only reach the loss through the mask:
    they do not."""

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.final = nn.Linear(WORDS, CHANNELS * SIDE * SIDE)
            nn.init.normal_(self.final.weight, generator=rng())

        def forward(self, x, sigma, words):
            return self.final(words).view_as(x)

    data = dataset(count=1, masks=True)
    network = Blind()
    method = lora(data, network=network)
    hidden = data.store.load(data.items[0].mask)["mask"][0] == 0
    assert 0 < hidden.sum() < hidden.numel()
    before = method.loss(rng()).item()
    latent = data.store.load(data.items[0].latent)["mean"]
    latent[:, hidden] += 100
    assert method.loss(rng()).item() == pytest.approx(before, rel=1e-5)
    latent[:, ~hidden] += 1
    assert method.loss(rng()).item() != pytest.approx(before, rel=1e-2)


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_the_noise_range_of_the_settings_is_kept(prediction):
    seen = []

    class Listening(Denoiser):
        def denoise(self, x, sigma, conds):
            seen.append(sigma)
            return super().denoise(x, sigma, conds)

    network = Net()
    model = Listening(network, prediction)
    method = LoraTraining(model, adapters(network), dataset(), NoiseSettings(min_time=0.4, max_time=0.6), batch=4)
    for step in range(50):
        method.loss(step_rng(0, step))
    low, high = model.sigma_at(torch.tensor([0.4, 0.6]))
    assert torch.cat(seen).min() >= low - 1e-6 and torch.cat(seen).max() <= high + 1e-6


def test_a_text_encoder_learns_beside_the_model_at_its_own_rate():
    """`encode` gives conditionings with gradients. AdamW's first step is the rate itself: 0.01 for the model, a tenth
    for the encoder."""
    network, words = Net(), nn.Sequential(nn.Linear(WORDS, WORDS))
    text = Adapters(words.requires_grad_(False), AdapterSettings(rank=2, targets="all linear"), rng())
    text.attach()
    encode = lambda batch: [{"cross_attn": words(c["cross_attn"])} for c in batch.conds]
    method = LoraTraining(
        Denoiser(network), adapters(network), dataset(), batch=2, text_adapters=text, encode_batch=encode
    )
    assert list(method.groups()) == ["model", "text encoder"]
    assert {id(p) for p in method.parameters()} == {id(p) for ps in method.groups().values() for p in ps}
    train(method, run(1))
    owners = {"model": method.adapters, "text": text}
    moved = {name: max(low.up.abs().max().item() for low in owner.lows.values()) for name, owner in owners.items()}
    assert moved["model"] == pytest.approx(RATE, rel=0.01) and moved["text"] == pytest.approx(RATE / 10, rel=0.01), (
        moved
    )
