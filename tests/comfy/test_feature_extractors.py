"""Score models that look through a loaded model: nothing of it changes, and gradients reach the latent."""

import contextlib

import comfy.sd
import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.nodes import host
from trainyard.nodes.data import image_features
from trainyard.nodes.scores import feature_extractors, latents
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import TABLE, latent_shape, make
from trainyard.tests.comfy.test_quality import encoder
from trainyard.tests.drawn import texture
from trainyard.trainers.scores.aesthetic_heads import AestheticHead, AestheticMLP
from trainyard.trainers.scores.backbones import (
    FeatureNorm,
    bypass_adapters,
    cache_frozen_features,
)
from trainyard.trainers.scores.files import read_score_model, write_score_model
from trainyard.trainers.scores.networks import (
    DECODED_IMAGE,
    MODEL_FEATURES,
    ScoreModelInfo,
    Scorer,
    ScorerEnsemble,
    call_with_seed,
)
from trainyard.trainers.settings import AdapterSettings

FAMILIES = ("sd15", "sdxl", "sd3", "flux")


def about(model, backbone=MODEL_FEATURES, **more):
    return ScoreModelInfo(
        backbone=backbone,
        latent_format=latents.latent_format_name(model),
        channels=model.model.latent_format.latent_channels,
        width=8,
        **more,
    )


def weights(patcher):
    return {name: value.clone() for name, value in patcher.model.state_dict().items()}


def unchanged(patcher, before):
    after = patcher.model.state_dict()
    return all(torch.equal(before[name], after[name]) for name in before) and not any(
        m._forward_hooks for m in patcher.model.modules()
    )


def sample(family, batch=2, seed=0):
    return torch.randn(latent_shape(family, batch), generator=torch.Generator().manual_seed(seed))


def slope(function, x, step=2e-2):
    """(by autograd, by central differences) of the sum along the direction in which it rises most."""
    with host.context.enable_gradients():
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(x).sum(), x)
    direction = grad / grad.norm()
    with torch.no_grad():
        ends = [function(x.detach() + sign * step * direction).double().sum() for sign in (1, -1)]
    return float(grad.norm()), float((ends[0] - ends[1]) / (2 * step))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_models_states_score_latents_and_pass_gradients_back(family):
    """By autograd and by finite differences, on weights that a loader node made; the MODEL stays as it was, bit for
    bit."""
    model = make(family, inference=True)
    before = weights(model)
    with torch.inference_mode(False):
        network = Scorer(feature_extractors.make_trunk_factory(model)(about(model)), 1)
    x, level = sample(family), torch.tensor([0.0, 0.6])
    auto, finite = slope(lambda x: network(x, level), x)
    assert auto == pytest.approx(finite, rel=0.03, abs=1e-5)
    assert abs(auto) > 1e-5
    assert unchanged(model, before)
    with torch.inference_mode():
        assert torch.allclose(network(x, level), network(x[[1, 0]], level[[1, 0]])[[1, 0]], atol=1e-4), (
            "a row does not depend on its neighbours"
        )


def test_a_unet_is_seen_stage_by_stage_down_to_the_middle_and_no_further():
    model = make("sd15")
    look = feature_extractors.DiffusionFeatureExtractor(model)
    seen, up = [], []
    handle = look.network.output_blocks[0].register_forward_hook(lambda *_: up.append(1))
    try:
        seen = look(sample("sd15"), torch.tensor([0.1, 0.5]))
    finally:
        handle.remove()
    assert seen.shape == (2, 3 * (32 + 64 + 64)), "mean, maximum and spread of both stages and the middle"
    assert not up, "the way up is not walked"


def test_the_real_sd15_would_be_seen_with_lrms_4800_numbers():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4],
                  transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, context_dim=768,
                  use_linear_in_transformer=False, num_heads=8, use_spatial_transformer=True, legacy=False)  # fmt: skip
    import comfy.ops

    network = UNetModel(**config, device="meta", dtype=torch.float16, operations=comfy.ops.disable_weight_init)
    widths = [
        getattr(block, "out_channels", None) or block.in_channels
        for block in feature_extractors.select_feature_blocks(network)
    ]
    assert widths == [320, 640, 1280, 1280, 1280]


@pytest.mark.parametrize("family", FAMILIES)
def test_features_tell_latents_apart_and_change_with_the_level(family):
    look = feature_extractors.DiffusionFeatureExtractor(make(family))
    a = look(sample(family, 3), torch.tensor([0.3, 0.3, 0.8]))
    assert torch.isfinite(a).all()
    again = look(sample(family, 3)[:1], torch.tensor([0.8]))
    assert (a[0] - a[1]).abs().mean() > 1e-3
    assert (a[:1] - again).abs().mean() > 1e-3


@pytest.mark.parametrize("family", [name for name in TABLE if name not in FAMILIES])
def test_every_other_family_can_be_looked_through_too(family):
    seen = feature_extractors.DiffusionFeatureExtractor(make(family))(sample(family), torch.tensor([0.3, 0.3]))
    assert torch.isfinite(seen).all()
    assert (seen[0] - seen[1]).abs().mean() > 0.01


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_lora_on_the_features_learns_and_leaves_the_model_alone(family):
    model = make(family, inference=True)
    before = weights(model)
    with host.context.enable_gradients():
        network = Scorer(feature_extractors.make_trunk_factory(model)(about(model, rank=4)), 1)
        ups = [low.up for low in network.trunk.adapters.lows.values()]
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(2):
            (
                network(sample(family), torch.tensor([0.2, 0.7]))[:, 0] - torch.tensor([1.0, -1.0])
            ).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum(bool(up.any()) for up in ups) > 0.7 * len(ups), (
        "only the query of a UNet's cross attention reads a text of zeros"
    )
    assert not any("output_blocks" in name for name in network.trunk.adapters.layers), "the way up is never walked"
    assert any("adapters" in name for name in network.state_dict()), "saved with the score model"
    assert unchanged(model, before)


def test_the_model_in_a_training_session_is_looked_at_where_it_is():
    """A clone must not be loaded in its place: that would take the session's adapters off."""
    model = make("sd3", inference=True)
    network = Scorer(feature_extractors.make_trunk_factory(model)(about(model)), 1)
    with host.session.open_training_session(model, AdapterSettings(rank=4)) as session:
        attached = len(session.adapters._hooks)
        network(sample("sd3"), torch.tensor([0.2, 0.4]))
        hooks = sum(len(m._forward_hooks) for m in session.denoiser.model.modules())
        assert hooks == attached > 0
        session.denoiser.denoise(
            sample("sd3"),
            torch.tensor([0.5, 0.5]),
            [feature_extractors.zero_conditioning(session.denoiser.model.diffusion_model)] * 2,
        )


@pytest.mark.parametrize("checkpointing", host.session.CHECKPOINTING_MODES[:2])
def test_adapters_in_training_are_not_looked_through(checkpointing):
    """A scorer that saw its own pupil's change would be fooled by it."""
    model, x, level = make("sd3", inference=True), sample("sd3"), torch.tensor([0.2, 0.4])
    score = ScorerEnsemble([Scorer(feature_extractors.make_trunk_factory(model)(about(model)), 1)], ScoreModelInfo())
    with torch.no_grad():
        clean = score.mean_score(x, level)
    with (
        host.session.open_training_session(model, AdapterSettings(rank=4), checkpointing=checkpointing) as session,
        torch.no_grad(),
    ):
        for low in session.adapters.lows.values():
            low.up.normal_()
        assert not torch.allclose(score.mean_score(x, level), clean, atol=1e-3)
        with bypass_adapters(score, session.adapters):
            assert torch.allclose(score.mean_score(x, level), clean, atol=1e-5)
            with torch.enable_grad():
                x = x.requires_grad_()
                (grad,) = torch.autograd.grad(score.mean_score(x, level).sum(), x)
            assert float(grad.norm()) > 0


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_blocks_that_are_computed_again_give_the_lora_the_same_gradients(family, monkeypatch):
    """A look with a LoRA keeps each block's input only; its adapters are off the network when backward asks again."""
    model, found = make(family, inference=True), []
    with host.context.enable_gradients():
        network = call_with_seed(
            0, lambda: Scorer(feature_extractors.make_trunk_factory(model)(about(model, rank=4)), 1)
        )
        for low in network.trunk.adapters.lows.values():
            torch.nn.init.normal_(low.up, std=0.1, generator=torch.Generator().manual_seed(1))
        for kept_whole in (False, True):
            if kept_whole:
                monkeypatch.setattr(feature_extractors, "checkpoint_blocks", lambda *_: contextlib.nullcontext())
            with saved_bytes() as kept:
                out = network(sample(family), torch.tensor([0.2, 0.7]))
            out.sum().backward()
            found.append(([torch.zeros(()) if p.grad is None else p.grad for p in network.parameters()], kept[0]))
            network.zero_grad()
    (again, few), (once, many) = found
    for a, b in zip(again, once, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)
    assert few < 0.7 * many, f"{few} of {many} bytes are kept"


@contextlib.contextmanager
def saved_bytes():
    """[bytes] of what autograd keeps for backward."""
    kept = [0]

    def keep(tensor):
        kept[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_scorers_own_lora_is_looked_through_while_another_is_trained(family):
    """On the very MODEL in training, with blocks that are computed again: the same score and gradient as without any
    training."""
    model, x, level = make(family, inference=True), sample(family), torch.tensor([0.2, 0.4])
    score = ScorerEnsemble(
        [Scorer(feature_extractors.make_trunk_factory(model)(about(model, rank=4)), 1)], ScoreModelInfo()
    )
    for low in score.networks[0].trunk.adapters.lows.values():
        torch.nn.init.normal_(low.up, std=0.1)
    score.networks[0].requires_grad_(False)

    def judged():
        with host.context.enable_gradients():
            at = x.clone().requires_grad_()
            said = score.mean_score(at, level)
            return said.detach(), torch.autograd.grad(said.sum(), at)[0]

    alone = judged()
    with host.session.open_training_session(model, AdapterSettings(rank=4), checkpointing="per block") as session:
        for low in session.adapters.lows.values():
            torch.nn.init.normal_(low.up)
        with bypass_adapters(score, session.adapters):
            beside = judged()
    for a, b in zip(alone, beside, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("rank", [0, 4])
def test_the_file_holds_the_small_layers_and_the_lora_and_loads_onto_the_same_model(tmp_path, rank):
    model, x, level = make("sd15"), sample("sd15"), torch.tensor([0.0, 0.5])
    known = about(model, rank=rank)
    score = ScorerEnsemble([Scorer(feature_extractors.make_trunk_factory(model)(known), 1)], known)
    for low in score.networks[0].trunk.adapters.lows.values() if rank else ():
        torch.nn.init.normal_(low.up, std=0.1)
    write_score_model(tmp_path / "score.safetensors", score)
    assert (tmp_path / "score.safetensors").stat().st_size < 2**20
    loaded = read_score_model(tmp_path / "score.safetensors", feature_extractors.make_trunk_factory(model))
    with torch.no_grad():
        assert torch.allclose(loaded.mean_score(x, level), score.mean_score(x, level), atol=1e-5)


def test_an_error_in_the_middle_takes_every_hook_off():
    model = make("sd3")
    look = feature_extractors.DiffusionFeatureExtractor(model)
    with pytest.raises(Exception, match="."):
        look(torch.zeros(1, 3, 16, 16), torch.zeros(1))
    assert not any(m._forward_hooks for m in model.model.modules())
    assert model.model.current_patcher is None


# -- pixels ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd3_noclip")), output_clip=False)[2]


def test_a_decoded_picture_is_scored_and_passes_gradients_to_the_latent(vae):
    sight = encoder()
    before = weights(vae.patcher), weights(sight.patcher)
    with torch.inference_mode(False):
        network = Scorer(
            feature_extractors.make_trunk_factory(vae=vae, clip_vision=sight)(
                ScoreModelInfo(backbone=DECODED_IMAGE, latent_format="SD3", channels=16, width=8)
            ),
            1,
        )
    x = torch.randn(2, 16, 10, 6, generator=torch.Generator().manual_seed(2)) * 0.3
    auto, finite = slope(lambda x: network(x, torch.zeros(2)), x)
    assert auto == pytest.approx(finite, rel=0.05, abs=1e-6)
    assert abs(auto) > 1e-7
    assert unchanged(vae.patcher, before[0])
    assert unchanged(sight.patcher, before[1])


def test_what_is_decoded_is_what_the_host_decodes_without_its_clamp(vae):
    look = feature_extractors.DecodedFeatureExtractor(
        vae, feature_extractors.DifferentiableClipVision(encoder()), "SD3"
    )
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.3
    with torch.no_grad():
        ours = look.decode_pixels(x)
        hosts = vae.decode(look.format.process_out(x)).movedim(-1, 1)
    assert torch.allclose(ours.clamp(0, 1), hosts, atol=2e-3)


def test_an_image_scorer_sees_what_the_hosts_own_encoder_sees():
    sight, image = encoder(), texture((96, 64), 1)
    head = AestheticHead(
        AestheticMLP([(torch.randn(1, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0]))])
    )
    ours = feature_extractors.ImageScoreModel(head, sight, "test").rate([image])
    with torch.inference_mode():
        hosts = sight.encode_image(torch.from_numpy(np.array(image)).float()[None] / 255)
        wanted = head(image_features.pool_vision_output(hosts)).tolist()
    assert ours == pytest.approx(wanted, abs=0.02), "the host also rounds pixels to 256 levels"


def test_an_aesthetic_head_with_a_vae_rates_latents_as_it_rates_their_pictures(vae):
    head = AestheticHead(
        AestheticMLP([(torch.randn(1, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0]))])
    )
    model = feature_extractors.ImageScoreModel(head, encoder(), "test", vae, "SD3", 16)
    x = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(3)) * 0.3
    with torch.no_grad():
        pixels = vae.decode(model.networks[0].extract.format.process_out(x))[0]
    image = Image.fromarray((pixels.cpu().numpy() * 255).round().astype("uint8"))
    assert model.ratings(x)[0].tolist() == pytest.approx(model.rate([image]), abs=0.03)
    auto, finite = slope(lambda x: model.mean_score(x, torch.zeros(1)), x)
    assert auto == pytest.approx(finite, rel=0.05, abs=1e-6)
    with pytest.raises(ValueError, match="has its own file"):
        write_score_model("never.safetensors", model)
    with pytest.raises(ValueError, match="Connect model and vae to Load Aesthetic Head"):
        feature_extractors.ImageScoreModel(head, encoder(), "test").mean_score(x, torch.zeros(1))


def test_a_head_of_another_width_names_the_encoder_it_wants():
    with pytest.raises(ValueError, match="It needs CLIP ViT-L/14"):
        feature_extractors.ImageScoreModel(
            AestheticHead(AestheticMLP([(torch.zeros(1, 768), None)])), encoder(), "laion"
        )


@pytest.mark.parametrize(
    ("backbone", "wanted"),
    [(MODEL_FEATURES, "connect the MODEL"), (DECODED_IMAGE, "Connect one from Load CLIP Vision")],
)
def test_what_is_not_connected_is_named(backbone, wanted):
    with pytest.raises(ValueError, match=wanted):
        feature_extractors.make_trunk_factory()(ScoreModelInfo(backbone=backbone))


def test_small_numbers_count_as_much_as_large_ones_from_the_first_batch_on():
    """Rows of mean 5 and spread 100, and of mean 1 and spread 0.1: both leave with mean 0 and spread 1, and later rows
    by the same measure."""
    rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 0.1]) + torch.tensor(
        [5.0, 1.0]
    )
    standard = FeatureNorm(2)
    with torch.no_grad():
        assert torch.equal(standard(rows), rows), "nobody is learning yet"
    out = standard(rows)
    assert out.mean(0).abs().max() < 1e-5
    assert out.std(0)[0] == pytest.approx(1, abs=0.01)
    assert out.std(0)[1] > 0.5
    assert torch.equal(standard(rows[:10] + 1)[1], (rows[1] + 1 - standard.middle) / standard.spread)
    other = FeatureNorm(2)
    other.load_state_dict(standard.state_dict())
    assert torch.equal(other(rows * 3), standard(rows * 3)), "what a file says stays, also in training"


def test_frozen_features_are_looked_at_once_per_level_and_noise(monkeypatch):
    from trainyard.tests.comfy.families import cond
    from trainyard.trainers.data.encoded import EncodedDataset
    from trainyard.trainers.scores.objective import noised_scorer_input

    model = make("sd3")
    data = EncodedDataset.from_core([{"samples": sample("sd3", 4)}], [cond("sd3")])
    data, denoiser, trunk = cache_frozen_features(
        data, latents.NoiseSchedule(model), feature_extractors.make_trunk_factory(model)
    )
    network, calls = trunk(about(model)), []
    inner = network.extract.extract
    network.extract.extract = lambda x, level: calls.append(len(x)) or inner(x, level)
    x0 = torch.stack([data.store.load(item.latent)["mean"] for item in data.items])
    for step in range(40):
        rng = torch.Generator().manual_seed(step)
        u = torch.rand(4, generator=rng)
        network(*noised_scorer_input(denoiser, x0, denoiser.sigma_at(u), u > 0.5, rng))
    assert sum(calls) <= 4 * (1 + 5 * 3), "each image: clean, and five levels of three noises"
