"""The embedded engine on diffusers folders and files made here, at random and tiny."""

import json

import pytest
import torch
from trainyard.tests import fakes_engine as fakes
from trainyard.trainers.adapters.adapters import Adapters
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.diffusion import denoising_loss, slope
from trainyard.trainers.engines import text as words
from trainyard.trainers.engines.diffusers import load_engine, pack_flux_latents, scheduler_sigmas, unpack_flux_latents
from trainyard.trainers.loop import train
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.settings import AdapterSettings, RunSettings

FAMILIES = list(fakes.FOLDERS)
CAPTIONS = ["red star", "a very blue star, and " + "blue " * 90]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they give at this size, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """family -> Engine, each folder made and loaded once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = load_engine(fakes.folder(family, tmp_path_factory.mktemp(family)), "cpu")
        return made[family]

    return get


@pytest.fixture
def short_vocabulary(tmp_path, monkeypatch):
    path = fakes.vocabulary(tmp_path)
    monkeypatch.setattr(words, "find_clip_vocabulary", lambda: path)


def problem(engine, seed=0):
    """(x, sigma, conds, x0, noise) of two samples with captions of different length."""
    rng = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(2, engine.vae.channels, 8, 8, generator=rng) for _ in range(2))
    sigma = engine.denoiser.sigma_at(torch.tensor([0.3, 0.8]))
    sizes = dict(width=640, height=480, crop_w=8, crop_h=4, target_width=64, target_height=64)
    conds = [{**c, **sizes} for c in engine.text.encode(CAPTIONS)]
    return engine.denoiser.noised(x0, noise, sigma), sigma, conds, x0, noise


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_two_captions_equals_two_batches_of_one(engines, family):
    engine = engines(family)
    x, sigma, conds, _, _ = problem(engine)
    with torch.no_grad():
        both = engine.denoiser.denoise(x, sigma, conds)
        alone = torch.cat([engine.denoiser.denoise(x[i : i + 1], sigma[i : i + 1], conds[i : i + 1]) for i in range(2)])
        crossed = engine.denoiser.denoise(x, sigma, conds[::-1])
    assert (both - alone).abs().max() < 1e-4
    assert (both - crossed).abs().max() > 1e-3, "the captions change nothing, so this test proves nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_scale_is_how_far_x0_moves_with_the_networks_output(engines, family, monkeypatch):
    engine = engines(family)
    x, sigma, conds, _, _ = problem(engine)
    name = "velocity" if engine.denoiser.flow else "network_output"
    answers = []
    for value in (0.0, 1.0):
        monkeypatch.setattr(engine.denoiser, name, lambda x, *_, v=value: torch.full_like(x, v), raising=False)
        answers.append(engine.denoiser.denoise(x, sigma, conds))
    moved = (answers[1] - answers[0]).abs().flatten(1).mean(1)
    assert torch.allclose(moved, engine.denoiser.native_scale(sigma), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_answer_has_no_loss(engines, family, monkeypatch):
    """The network's target is the noise for eps and noise - x0 for flow; answering it must give x0 back."""
    engine = engines(family)
    _, sigma, conds, x0, noise = problem(engine)
    conds = conds[:1] * 2  # of one length, so that both are answered at once
    perfect = noise - x0 if engine.denoiser.flow else noise
    monkeypatch.setattr(
        engine.denoiser, "velocity" if engine.denoiser.flow else "network_output", lambda *_: perfect, raising=False
    )
    assert denoising_loss(engine.denoiser, x0, noise, sigma, conds).max() < 1e-6
    x = engine.denoiser.noised(x0, noise, sigma)
    assert torch.allclose(slope(x, sigma, engine.denoiser.denoise(x, sigma, conds)), perfect, atol=1e-4)


def test_a_perfect_v_prediction_has_no_loss(tmp_path, monkeypatch):
    """v = (noise - sigma x0) / sqrt(1 + sigma^2) in these coordinates (Salimans & Ho 2022), also at zero terminal
    SNR."""
    (tmp_path / "model_index.json").write_text("{}")
    fakes.sdxl(tmp_path, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    engine = load_engine(tmp_path, "cpu")
    assert engine.prediction == "v" and engine.denoiser.sigmas[-1] == pytest.approx(4518.8, rel=1e-3)
    _, _, conds, x0, noise = problem(engine)
    sigma = engine.denoiser.sigma_at(torch.tensor([0.1, 1.0]))
    s = sigma.view(-1, 1, 1, 1)
    monkeypatch.setattr(
        engine.denoiser, "network_output", lambda *_: (noise - s * x0) / (1 + s**2).sqrt(), raising=False
    )
    assert denoising_loss(engine.denoiser, x0[:1], noise[:1], sigma[:1], conds[:1]).max() < 1e-6


def test_the_noise_levels_of_stable_diffusion_by_hand():
    """First and last of beta 0.00085 ... 0.012 in square roots over 1000 steps: 0.0292 and 14.6146."""
    sigmas = scheduler_sigmas({})
    assert sigmas[0] == pytest.approx((0.00085 / (1 - 0.00085)) ** 0.5)
    assert sigmas[-1] == pytest.approx(14.6146, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_schedule_is_finite_and_rises_from_clean_to_noise(engines, family):
    sigma = engines(family).denoiser.sigma_at(torch.linspace(0, 1, 50))
    assert torch.isfinite(sigma).all() and (sigma.diff() > 0).all()


def test_a_discrete_model_finds_the_timestep_of_each_of_its_noise_levels(engines):
    unet = engines("sd15").denoiser
    assert unet.nearest_timestep(unet.sigmas.float()).tolist() == list(range(1000))
    assert unet.sigma_at(torch.tensor([0.5004, 1.0])).tolist() == pytest.approx(
        [unet.sigmas[500].item(), unet.sigmas[999].item()]
    )


def test_flux_tokens_come_back_as_the_latent_they_were():
    """The first token holds the four cells of the upper left corner, channel by channel."""
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert pack_flux_latents(x)[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31, 48, 49, 54, 55]
    assert torch.equal(unpack_flux_latents(pack_flux_latents(x), x.shape), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_latent_format_is_the_familys(engines, family):
    engine = engines(family)
    scale, shift = {"sd15": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}[
        family
    ]
    assert engine.denoiser.model_space(torch.tensor([[[[2.0]]]])).item() == pytest.approx((2.0 - shift) * scale)
    assert engine.denoiser.latent_space(engine.denoiser.model_space(torch.ones(1, 1, 1, 1))).item() == pytest.approx(
        1.0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_trains_and_only_its_adapters_move(engines, family):
    engine = engines(family)
    rng = torch.Generator().manual_seed(1)
    latents = [{"samples": torch.randn(4, engine.vae.channels, 8, 8, generator=rng)}]
    data = EncodedDataset.from_core(latents, [[[c["cross_attn"], {k: v for k, v in c.items() if k != "cross_attn"}]] for c in
                                       engine.text.encode(["red", "blue", "star", "a"])])  # fmt: skip
    before = {k: v.clone() for k, v in engine.network.state_dict().items()}
    adapters = Adapters(engine.network, AdapterSettings(rank=4, targets="all linear", conv=True, conv_rank=4), rng)
    method = LoraTraining(engine.denoiser, adapters, data, density=engine.family.density, batch=2)
    with adapters.attached():
        before_training = loss_on_unseen_seeds(method)
        train(method, RunSettings(steps=20, learning_rate=3e-2))
        after = loss_on_unseen_seeds(method)
    print(f"{family}: {before_training:.4f} -> {after:.4f}")
    assert after < 0.97 * before_training
    assert all(torch.equal(v, before[k]) for k, v in engine.network.state_dict().items())


@torch.no_grad()
def loss_on_unseen_seeds(method):
    return sum(method.loss(torch.Generator().manual_seed(1000 + i)).mean().item() for i in range(6)) / 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_fills_fresh_adapters_with_what_was_saved(engines, family):
    engine = engines(family)
    x, sigma, conds, _, _ = problem(engine)
    first, second = (
        Adapters(engine.network, AdapterSettings(rank=4), torch.Generator().manual_seed(i)) for i in range(2)
    )
    with torch.no_grad():
        for low in list(first.lows.values())[1:]:  # the first layer never learns, and is not in the file
            low.up.normal_(generator=torch.Generator().manual_seed(3))
    tensors, untouched = engine.lora_tensors(first)
    prefix = ("transformer.", "lora_A.weight") if engine.denoiser.flow else ("lora_unet_", "lora_down.weight")
    assert (
        len(untouched) == 1
        and all(k.startswith(prefix[0]) for k in tensors)
        and any(k.endswith(prefix[1]) for k in tensors)
    )
    engine.load_lora(tensors, second)
    answers = []
    for adapters in (first, second):
        with adapters.attached(), torch.no_grad():
            answers.append(engine.denoiser.denoise(x, sigma, conds))
    assert torch.equal(*answers)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_a_text_encoder_gets_gradients_and_kohyas_names(engines, family):
    engine = engines(family)
    text = Adapters(engine.text.trainable_models(), AdapterSettings(rank=2), torch.Generator().manual_seed(0))
    x, sigma, _, x0, noise = problem(engine)
    with text.attached(), torch.no_grad():
        for low in text.lows.values():
            low.up.fill_(0.01)
    with text.attached():
        conds = [engine.text(c) for c in CAPTIONS]
        denoising_loss(engine.denoiser, x0, noise, sigma, conds).mean().backward()
    reached = [
        name
        for name in text.layers
        if text.adapter_for(name).up.grad is not None and text.adapter_for(name).up.grad.any()
    ]
    first_layers = [n for n in text.layers if ".layers.0." in n]
    assert set(first_layers) <= set(reached)
    keys = {
        k.rsplit(".lora_", 1)[0]
        for k in engine.lora_tensors(Adapters(engine.network, AdapterSettings(rank=2)), text)[0]
    }
    prefix = "lora_te_" if family == "sd15" else "lora_te1_"
    assert f"{prefix}text_model_encoder_layers_0_self_attn_q_proj" in keys


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, shape, pooled", [
    ("sd15", (77, 768), None), ("sdxl", (77, 64), 32), ("sd3", (154, 4096), 2048), ("flux", (256, 64), 32),
])  # fmt: skip
def test_conditionings_have_the_shape_that_comfyui_gives(engines, family, shape, pooled):
    (cond,) = engines(family).text.encode(["red star"])
    assert cond["cross_attn"].shape == (1, *shape)
    assert ("pooled_output" in cond) == (pooled is not None) and (
        pooled is None or cond["pooled_output"].shape == (1, pooled)
    )


def test_brackets_are_words_whether_they_are_escaped_or_not(engines):
    text = engines("flux").text
    plain, escaped, bare = text.encode(["red (star)", r"red \(star\)", "red star"])
    assert all(torch.equal(plain[key], escaped[key]) for key in plain)
    assert not torch.equal(plain["cross_attn"], bare["cross_attn"])
    counts = [text.count_tokens(caption) for caption in ("red (star)", r"red \(star\)", "red star", "")]
    assert counts[0] == counts[1] and counts[0]["l"] > counts[2]["l"] > counts[3]["l"] == 0 == counts[3]["t5"]


def test_a_long_caption_is_read_in_chunks_that_each_begin_and_end(engines):
    """90 words of one token and a few letters: 75 in the first chunk, the rest in the second, padded to 77."""
    chunks = engines("sd15").text.encoders["l"].tokens(CAPTIONS[1])
    start, end = fakes.VOCABULARY - 2, fakes.VOCABULARY - 1
    assert [len(c) for c in chunks] == [77, 77] and all(c[0] == start and end in c for c in chunks)
    assert chunks[0][-1] == end and end not in chunks[0][1:-1]


def test_the_empty_caption_is_start_end_and_padding(engines):
    assert engines("sd15").text.encoders["l"].tokens("") == [[fakes.VOCABULARY - 2] + [fakes.VOCABULARY - 1] * 76]


def test_clip_l_alone_leaves_the_rest_of_sd3s_text_at_zero(tmp_path, short_vocabulary):
    engine = load_engine(fakes.sd3_file(tmp_path / "m.safetensors"), "cpu")
    (cond,) = engine.text.encode(["red star"])
    assert (
        cond["cross_attn"].shape == (1, 77, 4096)
        and not cond["cross_attn"][..., 64:].any()
        and cond["cross_attn"][..., :64].any()
    )


def test_encoders_that_differ_have_different_identities(engines, tmp_path):
    again = load_engine(fakes.folder("sdxl", tmp_path), "cpu")
    assert engines("sdxl").text.identity == again.text.identity != engines("sd3").text.identity
    assert engines("sdxl").vae.identity == again.vae.identity != engines("sd3").vae.identity
    with torch.no_grad():
        next(again.network.parameters()).view(-1)[0] += 1
    assert engines("sdxl").identity != again.identity


def test_a_missing_vocabulary_names_the_package(monkeypatch):
    monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps open_clip_torch"):
        words.find_clip_vocabulary()


def test_byte_letters_name_every_byte_once():
    letters = words.byte_to_letter()
    assert len(set(letters)) == 256 and letters[0] == "!" and not any(c.isspace() for c in letters)


# -- images ----------------------------------------------------------------------------------------------------------


def test_a_tiny_autoencoder_speaks_unscaled_latents(tmp_path, short_vocabulary):
    """TAESD's own output is model space, so unscaled = raw / 1.5305 + 0.0609, and model_space gives raw back."""
    engine = load_engine(fakes.sd3_file(tmp_path / "m.safetensors"), "cpu")
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    latent, spread = engine.vae.encode(images)
    with torch.no_grad():
        raw = engine.vae.model.encode(images.movedim(-1, 1) * 2 - 1).latents
    assert spread is None and latent.shape == (2, 16, 4, 4) and engine.vae.factor == 8 and engine.vae.channels == 16
    assert torch.allclose(engine.denoiser.model_space(latent), raw, atol=1e-5)
    drawn = engine.vae.decode(latent)
    assert drawn.shape == images.shape and 0 <= drawn.min() and drawn.max() <= 1


def test_a_full_autoencoder_gives_mean_and_spread(engines):
    mean, spread = engines("sd15").vae.encode(torch.rand(1, 16, 24, 3))
    assert mean.shape == spread.shape == (1, 4, 8, 12) and (spread > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_pictures_that_depend_on_seed_prompt_and_guidance(engines, family):
    engine = engines(family)
    look = lambda prompt, seed, cfg: engine.sample([prompt], seed, (16, 16), steps=2, cfg=cfg)
    first = look("red star", 0, 2.0)
    assert first.shape == (1, 16, 16, 3) and torch.isfinite(first).all()
    assert torch.equal(first, look("red star", 0, 2.0))
    for other in (look("blue star", 0, 2.0), look("red star", 1, 2.0), look("red star", 0, 5.0)):
        assert not torch.equal(first, other)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_folder_and_a_file_of_the_same_weights_give_the_same_model(tmp_path, short_vocabulary):
    engine = load_engine(fakes.sd3_file(tmp_path / "m.safetensors"), "cpu")
    (tmp_path / "model_index.json").write_text("{}")
    engine.network.save_pretrained(tmp_path / "transformer")
    engine.vae.model.save_pretrained(tmp_path / "vae")
    engine.text.encoders["l"].model.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    words.write_clip_vocabulary(words.find_clip_vocabulary(), tmp_path / "tokenizer")
    again = load_engine(tmp_path, "cpu")
    x, sigma, conds, _, _ = problem(engine)
    images = torch.rand(1, 16, 16, 3)
    with torch.no_grad():
        answers = (
            engine.denoiser.denoise(x, sigma, conds),
            again.denoiser.denoise(x, sigma, again.text.encode(CAPTIONS)),
        )
    assert torch.allclose(*answers, atol=1e-4)
    assert torch.allclose(engine.vae.encode(images)[0], again.vae.encode(images)[0], atol=1e-5)


@pytest.mark.parametrize("what, says", [
    ("nothing", "does not exist"),
    ("empty folder", "no model_index.json"),
    ("unknown class", "holds PixArt"),
    ("pickle", "not a .safetensors file"),
    ("not safetensors", "not a readable safetensors file"),
    ("strange tensors", "not a checkpoint that the embedded engine knows"),
    ("no text", "no text encoder inside"),
    ("no vae", "no VAE inside"),
    ("t5", "T5 text encoder inside"),
    ("torn", "does not fit: 1 tensors missing"),
])  # fmt: skip
def test_a_model_that_cannot_be_used_says_why(tmp_path, short_vocabulary, what, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_engine(unusable(tmp_path, what), "cpu")


def unusable(folder, what):
    path = folder / "m.safetensors"
    if what == "empty folder":
        return folder
    if what == "unknown class":
        (folder / "model_index.json").write_text("{}")
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "PixArt"}))
        return folder
    if what in ("pickle", "not safetensors"):
        path = path.with_suffix(".ckpt") if what == "pickle" else path
        path.write_bytes(b"not a checkpoint at all")
    elif what != "nothing":
        tensors = {"strange tensors": lambda: {"a": torch.zeros(1)}, "no text": lambda: fakes.sd3_tensors(clip=False),
                   "no vae": lambda: fakes.sd3_tensors(vae=False)}.get(what, fakes.sd3_tensors)()  # fmt: skip
        if what == "t5":
            tensors["text_encoders.t5xxl.transformer.shared.weight"] = torch.zeros(2, 2)
        if what == "torn":
            del tensors["first_stage_model.taesd_encoder.0.bias"]
        fakes.write_safetensors(path, tensors)
    return path


def test_a_unet_file_whose_family_is_not_described_here_names_the_remedy(tmp_path, monkeypatch):
    """diffusers' description of a family lives on the network; its local cache is empty here."""
    from diffusers.loaders import single_file

    def offline(*_, **__):
        raise OSError("cannot be found in the local cache")

    monkeypatch.setattr(single_file, "snapshot_download", offline, raising=True)
    path = tmp_path / "sd15.safetensors"
    fakes.write_safetensors(path, {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)})
    with pytest.raises(
        ValueError, match="is a UNet checkpoint.*Convert it to a diffusers folder.*or train inside ComfyUI"
    ):
        load_engine(path, "cpu")


def test_conditionings_and_latents_must_be_as_many(engines):
    engine = engines("sd15")
    x, sigma, conds, _, _ = problem(engine)
    with pytest.raises(ValueError, match="2 latents came with 1 conditionings"):
        engine.denoiser.denoise(x, sigma, conds[:1])
