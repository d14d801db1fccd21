"""Two engines, one arithmetic: the same weights, latents, noise and captions give the same loss in ComfyUI and in
diffusers.

Relative differences reached in fp32 on two CPU cores: losses of the tiny UNets 0 (equal to the last bit), of the tiny
transformers 3e-7, of an SD3-shaped file with its own text and images 7e-7; conditionings 3e-6; the gradient that
reaches the captions 2e-5.
"""

import logging
import types

import comfy.sd
import comfy.utils
import pytest
import torch
from trainyard.nodes import host
from trainyard.tests.comfy.families import cond, latent_shape, make
from trainyard.trainers.adapters.adapters import Adapters
from trainyard.trainers.diffusion import denoising_loss, loss_weight
from trainyard.trainers.engines import diffusers as engine_module
from trainyard.trainers.engines import single_file
from trainyard.trainers.engines import text as words
from trainyard.trainers.engines.diffusers import (
    DiffusersEngine,
    FluxDenoiser,
    Sd3Denoiser,
    UnetDenoiser,
    load_engine,
    scheduler_sigmas,
)
from trainyard.trainers.settings import AdapterSettings, NoiseSettings

LOSS, GRADIENT, WORDS = 1e-5, 1e-4, 1e-5
CAPTIONS = ["a small red circle on a white ground", "", "Two stars; it's 12:30 - naïve " + "blue ring " * 60]
LEVELS = {True: (0.02, 0.3, 0.7, 0.99), False: (0.0, 0.25, 0.6, 0.999)}  # u, flow or not


# -- ComfyUI's tiny models, rewritten as diffusers' --------------------------------------------------------------------


def taken(state, target):
    """One tensor of ComfyUI's, by its own map to diffusers' names: a name, or (name, slice) or (name, None,
    function)."""
    if isinstance(target, str):
        return state[target]
    name, where, *change = target
    value = state[name] if where is None else state[name].narrow(*where)
    return change[0](value) if change else value


def rewritten(module, names, state):
    """A diffusers module with ComfyUI's weights; every one of its parameters must be in the map."""
    wanted = module.state_dict()
    module.load_state_dict({k: taken(state, names[k]).clone() for k in wanted})
    return module.eval().requires_grad_(False)


def unet(config, **changes):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, use_linear_projection=config["use_linear_in_transformer"],
        **{"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2} | changes,
    )  # fmt: skip


def sdxl_shape():
    """As tests/comfy/families.py has it: two transformers per block, going up on the upper level."""
    return dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2), transformer_layers_per_block=(2, 2), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1280 + 6 * 256,
    )  # fmt: skip


UNETS = {
    "sd15": (dict(attention_head_dim=2), 0.18215, {}),
    "sd2_v": (dict(attention_head_dim=(1, 2)), 0.18215, {"prediction_type": "v_prediction"}),
    "sdxl": (sdxl_shape(), 0.13025, {}),
    "sdxl_v": (sdxl_shape(), 0.13025, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
}


def twin(family, model):
    """diffusers' denoiser with the weights of ComfyUI's tiny model."""
    network, config = model.model.diffusion_model, model.model.model_config.unet_config
    state = network.state_dict()
    if family in UNETS:
        shape, scale, scheduler = UNETS[family]
        names = comfy.utils.unet_to_diffusers(config)
        module = rewritten(unet(config, **shape), names, state)
        return UnetDenoiser(
            module, scale, sigmas=scheduler_sigmas(scheduler), prediction=scheduler.get("prediction_type", "epsilon")
        )
    if family == "sd3":
        from diffusers import SD3Transformer2DModel

        module = SD3Transformer2DModel(**single_file.read_sd3_config(state))
        return Sd3Denoiser(rewritten(module, comfy.utils.mmdit_to_diffusers(config), state), 1.5305, 0.0609)
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=64,
        pooled_projection_dim=32, guidance_embeds=config["guidance_embed"],
    )  # fmt: skip
    return FluxDenoiser(rewritten(module, comfy.utils.flux_to_diffusers(config), flux_norms(state)), 0.3611, 0.1159)


def flux_norms(state):
    """Older and newer ComfyUI call the scale of an RMS norm `scale` and `weight`."""
    return state | {k.removesuffix("scale") + "weight": v for k, v in state.items() if k.endswith("_norm.scale")}


def conds_of(family):
    sizes = dict(width=900, height=700, crop_w=16, crop_h=8, target_width=128, target_height=120)
    return [{"cross_attn": c, **extras, **sizes} for c, extras in (cond(family, seed)[0] for seed in range(2))]


def loss_and_pull(denoiser, latent, u, conds):
    """((B,) losses, gradient of their mean with respect to the captions' conditionings)."""
    rng = torch.Generator().manual_seed(5)
    conds = [{**c, "cross_attn": c["cross_attn"].clone().requires_grad_()} for c in conds]
    x0 = denoiser.model_space(latent)
    noise = torch.randn(x0.shape, generator=rng)
    sigma = denoiser.sigma_at(torch.full((len(x0),), u))
    losses = denoising_loss(denoiser, x0, noise, sigma, conds)
    weight = loss_weight(denoiser, sigma, NoiseSettings(weighting="min-SNR"))
    (losses / losses.detach()).mean().backward()
    return losses.detach(), weight, torch.cat([c["cross_attn"].grad for c in conds])


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("family", [*UNETS, "sd3", "flux", "schnell"])
def test_a_tiny_model_has_the_same_loss_and_gradient_in_both_engines(family):
    model = make(family)
    mine, conds = twin(family, model), conds_of(family)
    latent = torch.randn(latent_shape(family, 2), generator=torch.Generator().manual_seed(1))
    with host.session.open_training_session(model, AdapterSettings(rank=2)) as session:
        theirs = session.denoiser
        assert theirs.flow == mine.flow
        assert relative(mine.model_space(latent), theirs.model_space(latent)) < 1e-6
        for u in LEVELS[mine.flow]:
            here, there = (loss_and_pull(d, latent, u, conds) for d in (mine, theirs))
            figures = [relative(a, b) for a, b in zip(here, there, strict=True)]
            print(
                f"{family} u {u}: loss {here[0].tolist()} apart by {figures[0]:.1e}, weight {figures[1]:.1e}, gradient "
                f"{figures[2]:.1e}"
            )
            assert there[0].min() > 1e-3 and there[2].abs().max() > 1e-6, "nothing to compare"
            assert figures[0] < LOSS and figures[1] < LOSS and figures[2] < GRADIENT


@pytest.mark.parametrize("family", [*UNETS, "sd3", "flux"])
def test_a_lora_of_the_embedded_engine_does_the_same_in_comfyui(family, caplog):
    model, conds = make(family), conds_of(family)
    denoiser = twin(family, model)
    engine = DiffusersEngine("", denoiser, None, None)
    adapters = Adapters(
        denoiser.network, AdapterSettings(rank=4, targets="all linear"), torch.Generator().manual_seed(0)
    )
    shake(adapters, 1)
    tensors, untouched = engine.lora_tensors(adapters)
    assert not untouched
    with caplog.at_level(logging.WARNING):
        patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)
    assert not [r.message for r in caplog.records if "not loaded" in r.message]

    x, sigma = (
        torch.randn(latent_shape(family, 2), generator=torch.Generator().manual_seed(2)),
        denoiser.sigma_at(torch.tensor([0.3, 0.8])),
    )
    with adapters.attached(), torch.no_grad():
        mine = denoiser.denoise(x, sigma, conds)
        with adapters.at_strength(0):
            base = denoiser.denoise(x, sigma, conds)
    with host.session.open_training_session(patched, AdapterSettings(rank=2)) as session, torch.no_grad():
        theirs = session.denoiser.denoise(x, sigma, conds)
    print(f"{family}: change {(mine - base).abs().max():.3g}, apart by {relative(mine, theirs):.1e}")
    assert (mine - base).abs().max() > 1e-3
    assert relative(mine, theirs) < 1e-4


def shake(adapters, seed, size=0.05):
    """Every adapter away from zero, as after training."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for low in adapters.lows.values():
            low.up.copy_(torch.randn(low.up.shape, generator=rng) * size)


# -- the toy checkpoint, through both loaders --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    """The toy world's file loaded twice: `.model`, `.clip`, `.vae` of ComfyUI, `.engine` of diffusers."""
    from trainyard.tests.toy import world

    path = world.cached()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)
    patch = pytest.MonkeyPatch()
    if not has_vocabulary():  # then ComfyUI's own copy stands in, and the token ids prove little
        folder = f"{comfy.sd.__file__.rsplit('/', 1)[0]}/sd1_tokenizer"
        patch.setattr(engine_module, "load_clip_tokenizer", lambda *_, **__: words.load_clip_tokenizer(folder))
    yield types.SimpleNamespace(model=model, clip=clip, vae=vae, engine=load_engine(path, "cpu"), path=path)
    patch.undo()


def has_vocabulary():
    try:
        return words.find_clip_vocabulary().exists()
    except RuntimeError:
        return False


def test_both_engines_read_the_same_tokens(toy):
    if not has_vocabulary():
        pytest.skip("CLIP's vocabulary is not installed: pip install --no-deps open_clip_torch")
    for caption in [*CAPTIONS, "UPPER, case! 1girl ☃ don't <|x|>", "a\nnew   line"]:
        theirs = [[token for token, _ in chunk] for chunk in toy.clip.tokenize(caption)["l"]]
        assert toy.engine.text.encoders["l"].tokens(caption) == theirs, caption


PROMPT_SYNTAX = ["miku (vocaloid), smile", r"miku \(vocaloid\), smile", "a (red:1.6) ball", "embedding:style (old) \\"]


def test_both_engines_give_the_same_conditionings(toy):
    captions = CAPTIONS + PROMPT_SYNTAX
    for caption, mine in zip(captions, toy.engine.text.encode(captions), strict=True):
        theirs = host.encoders.encode_caption(toy.clip, caption)
        assert mine["cross_attn"].shape == theirs["cross_attn"].shape
        for key in ("cross_attn", "pooled_output"):
            print(key, (mine[key] - theirs[key]).abs().max().item())
            assert relative(mine[key], theirs[key]) < WORDS


def test_both_engines_see_and_draw_the_same_pictures(toy):
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    mine, spread = toy.engine.vae.encode(images)
    theirs = toy.vae.encode(images)
    assert spread is None and relative(mine, theirs) < 1e-5
    assert relative(toy.engine.vae.decode(theirs), toy.vae.decode(theirs)) < 1e-5


def test_the_toy_checkpoint_has_the_same_loss_in_both_engines(toy):
    """Images, captions, sigma and noise the same; each engine encodes, scales, mixes and predicts on its own."""
    from trainyard.tests.toy import shapes

    rng = torch.Generator().manual_seed(3)
    drawn = [shapes.sample(rng) for _ in range(4)]
    images = torch.stack([pixels(image) for image, *_ in drawn])
    captions = [caption for _, caption, *_ in drawn]
    mine = toy.engine.text.encode(captions)
    with torch.inference_mode():
        theirs = [host.encoders.encode_caption(toy.clip, c) for c in captions]
        latent = toy.vae.encode(images)
    with host.session.open_training_session(toy.model, AdapterSettings(rank=4)) as session:
        for u in LEVELS[True]:
            here, _, _ = loss_and_pull(toy.engine.denoiser, toy.engine.vae.encode(images)[0], u, mine)
            there, _, _ = loss_and_pull(
                session.denoiser,
                *host.context.clone_inference_tensors([latent]),
                u,
                host.context.clone_inference_tensors(theirs),
            )
            print(f"u {u}: losses {here.tolist()} apart by {relative(here, there):.1e}")
            assert relative(here, there) < 1e-4


def pixels(image):
    import numpy as np

    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)


def test_a_text_encoder_lora_of_the_embedded_engine_does_the_same_in_comfyui(toy, caplog):
    """To 2 % of the change: ComfyUI rounds patched weights to the file's fp16."""
    text = Adapters(toy.engine.text.trainable_models(), AdapterSettings(rank=4), torch.Generator().manual_seed(0))
    model = Adapters(toy.engine.network, AdapterSettings(rank=4), torch.Generator().manual_seed(1))
    shake(text, 2, 0.02)
    shake(model, 3)
    tensors, _ = toy.engine.lora_tensors(model, text)
    with caplog.at_level(logging.WARNING):
        _, clip = comfy.sd.load_lora_for_models(toy.model, toy.clip, tensors, 1.0, 1.0)
    assert not [r.message for r in caplog.records if "not loaded" in r.message]
    (base,) = toy.engine.text.encode(CAPTIONS[:1])
    with text.attached():
        (mine,) = toy.engine.text.encode(CAPTIONS[:1])
    theirs = host.encoders.encode_caption(clip, CAPTIONS[0])
    change = (mine["cross_attn"] - base["cross_attn"]).abs().max()
    assert change > 0.01 and (mine["cross_attn"] - theirs["cross_attn"]).abs().max() < 0.02 * change


# -- the autoencoder of real SD3 and Flux files ------------------------------------------------------------------------


def test_a_kl_autoencoder_of_comfyui_is_read_the_same():
    """A narrow one of the same layout: four channels counts, no convolutions around the latent."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    shape = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
                 attn_resolutions=[], dropout=0.0)  # fmt: skip
    theirs = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer", "params": {"sample": False}},
        encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": shape},
        decoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": shape},
    ).eval()  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.05))
    mine, tiny = single_file.load_autoencoder({f"first_stage_model.{k}": v for k, v in theirs.state_dict().items()})
    images = torch.rand(1, 3, 32, 32, generator=rng) * 2 - 1
    with torch.no_grad():
        latent = theirs.encode(images)
        assert not tiny and latent.std() > 0.01
        assert relative(mine.encode(images).latent_dist.mean, latent) < 1e-4
        assert relative(mine.decode(latent).sample, theirs.decode(latent)) < 1e-4
