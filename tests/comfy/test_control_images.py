"""Edit models see control images while they are trained as the host shows them when it samples."""

import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.train.previews import SamplePrompt, show_references, to_comfy_conditioning
from trainyard.nodes.train.train_lora import check_references
from trainyard.tests.comfy.families import SD1, TABLE, Family, cond, latent_shape, make
from trainyard.tests.comfy.test_host import RANK_4
from trainyard.tests.fakes_data import encoded, image
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.cache import MemoryStore
from trainyard.trainers.data.encoded import REFERENCE_LATENTS, EncodedDataset, EncodedItem

IP2P = Family(
    "SD15_instructpix2pix", SD1 | {"in_channels": 8}, 64, latent=(4, 16, 16),
    overrides={"num_heads": 2, "num_head_channels": -1},
)  # fmt: skip
EDIT_FAMILIES = ("flux", "qwen", "ip2p")


@pytest.fixture(autouse=True)
def ip2p(monkeypatch):
    monkeypatch.setitem(TABLE, "ip2p", IP2P)


def edit_cond(family, seed, sides=(16, 16)):
    ((cross, extras),) = cond(family, seed)
    shape = (*latent_shape(family)[:-2], *sides)
    reference = torch.randn(shape, generator=torch.Generator().manual_seed(10 + seed))
    return {"cross_attn": cross, **extras, REFERENCE_LATENTS: [reference]}


def hosts_own(session, known, x, sigma):
    """x0 as the host's sampler predicts it under one conditioning at guidance 1."""
    denoiser = session.denoiser
    extras = {**known} if denoiser.family.guidance is None else {"guidance": denoiser.family.guidance, **known}
    shown = comfy.sampler_helpers.convert_cond(to_comfy_conditioning(denoiser.model, extras))
    zero = torch.zeros_like(x)
    done = comfy.samplers.process_conds(denoiser.model, x, {"positive": shown}, x.device, zero, None, 0)
    options = {"transformer_options": denoiser._make_transformer_options()}
    return comfy.samplers.calc_cond_batch(denoiser.model, [done["positive"]], x, sigma, options)[0]


@pytest.mark.parametrize("family", EDIT_FAMILIES)
def test_a_step_predicts_what_the_hosts_sampler_predicts(family):
    with torch.inference_mode(), host.session.open_training_session(make(family), RANK_4) as session, torch.no_grad():
        known = edit_cond(family, 1)
        x = session.denoiser.model_space(torch.randn(latent_shape(family), generator=torch.Generator().manual_seed(2)))
        sigma = session.denoiser.sigma_at(torch.tensor([0.6])).to(x)
        ours = session.denoiser.denoise(x, sigma, [known])
        plain = {name: value for name, value in known.items() if name != REFERENCE_LATENTS}
        assert torch.allclose(ours, hosts_own(session, known, x, sigma), atol=1e-5)
        assert (ours - session.denoiser.denoise(x, sigma, [plain])).abs().max() > 1e-3


@pytest.mark.parametrize("family", EDIT_FAMILIES)
def test_control_images_of_two_sizes_go_in_one_batch_and_gradients_are_right(family):
    with torch.inference_mode(), host.session.open_training_session(make(family), RANK_4) as session:
        conds = [edit_cond(family, 1), edit_cond(family, 2, (8, 24))]
        x0 = session.denoiser.model_space(torch.randn(latent_shape(family, 2)))
        sigma = session.denoiser.sigma_at(torch.tensor([0.6, 0.3])).to(x0)
        with torch.no_grad():
            both = session.denoiser.denoise(x0, sigma, conds)
            alone = [session.denoiser.denoise(x0[i : i + 1], sigma[i : i + 1], conds[i : i + 1]) for i in range(2)]
        assert torch.allclose(both, torch.cat(alone), atol=1e-5)
        assert host.checks.check_gradients(session, x0, conds) < 1e-3


def dataset_with_controls(family):
    ((cross, extras),) = cond(family, 1)
    shape = latent_shape(family)[1:]
    posterior = {"mean": torch.zeros(shape), "std": None}
    store = MemoryStore({"latent": posterior, "control": posterior, "cond": {"cross_attn": cross, **extras}})
    items = [
        EncodedItem("0", "plain.png", "latent", shape, ("cond",), ("a",)),
        EncodedItem("1", "edited.png", "latent", shape, ("cond",), ("a",), controls=("control",)),
    ]
    return EncodedDataset(items, store, shape[0], "one")


@pytest.mark.parametrize("family", EDIT_FAMILIES)
def test_edit_models_take_control_images(family):
    check_references(make(family), dataset_with_controls(family))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_a_model_that_would_not_look_at_them_is_refused(family):
    with pytest.raises(ValueError, match=f"{TABLE[family].supported} takes none"):
        check_references(make(family), dataset_with_controls(family))


def test_samples_of_prompts_are_edits_of_the_datasets_control_images(tmp_path):
    for number in range(2):
        image(tmp_path / "in" / f"{number}.png", seed=number)
        image(tmp_path / "in" / f"{number}.control.png", seed=9 + number)
        (tmp_path / "in" / f"{number}.txt").write_text("make it red")
    data = encoded(tmp_path, buckets=BucketSettings(resolution=16, step=8))
    own = torch.ones(1)
    prompts = [SamplePrompt("a", {}), SamplePrompt("b", {REFERENCE_LATENTS: [own]}), SamplePrompt("c", {})]
    shown = [prompt.cond[REFERENCE_LATENTS][0] for prompt in show_references(prompts, data)]
    controls = [data.load_controls(item)[REFERENCE_LATENTS][0] for item in data.items]
    assert torch.equal(shown[0], controls[0]) and shown[1] is own and torch.equal(shown[2], controls[0])
