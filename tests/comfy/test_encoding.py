"""What a picture becomes on its way to the model: the same latent, in the same scale, whichever way it takes."""

import comfy.ldm.models.autoencoder
import comfy.sd
import nodes as comfy_nodes
import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.nodes import host
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import make
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.captions import CaptionSettings
from trainyard.trainers.data.encode import encode
from trainyard.trainers.data.encoded import Encoded
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.settings import AdapterSettings


class NoText:
    identity = "none"

    def encode(self, texts):
        return [{"cross_attn": torch.zeros(1, 4, 4096), "pooled_output": torch.zeros(1, 2048)} for _ in texts]


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd3_noclip")), output_clip=False)[2]


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "set").mkdir()
    Image.fromarray(pixels).save(tmp_path / "set" / "noise.png")
    return tmp_path / "set"


def test_a_picture_has_one_scale_whichever_way_it_comes(vae, folder, tmp_path):
    """ComfyUI's VAEEncode into its own LATENT, our encoding, and our encoding read back from disk: one x0."""
    pixels = torch.from_numpy(np.asarray(Image.open(folder / "noise.png")).copy())[None].float() / 255
    with torch.inference_mode():
        latent = comfy_nodes.VAEEncode().encode(vae, pixels)[0]
        core = Encoded.from_core([latent], [[[torch.zeros(1, 4, 4096), {}]]])
        sizes = BucketSettings(resolution=64, step=8, min_side=64, max_side=64)
        empty = CaptionSettings(caption_mode="empty (unconditional)")
        ours = lambda: encode(read_folder(folder), empty, sizes, False, host.PictureEncoder(vae), NoText(), tmp_path / "cache")
        with host.training(make("sd3", inference=True), AdapterSettings(rank=4)) as session:
            x0 = [session.denoiser.model_space(data.batch([0], torch.Generator().manual_seed(0)).x0) for data in (core, ours(), ours())]
            wanted = session.denoiser.model.process_latent_in(host.ordinary(latent["samples"]))
    assert torch.equal(x0[1], x0[2]), "read back from disk"
    assert torch.equal(x0[0], wanted), "the host's own scaling"
    assert torch.allclose(x0[0], x0[1], atol=1e-6)


@pytest.fixture(scope="module")
def kl_vae():
    """ComfyUI's VAE class around a KL autoencoder of SD1.5's kind, with random weights."""
    config = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2)
    with torch.device("meta"):
        shapes = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=dict(config, attn_resolutions=[], dropout=0.0), embed_dim=4).state_dict()
    rng = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=rng) * (0.02 if v.ndim > 1 else 0.1) + (k.endswith("norm.weight")) for k, v in shapes.items()}
    with torch.inference_mode():
        return comfy.sd.VAE(sd=state)


def test_a_gaussian_vae_shows_its_mean_and_spread(kl_vae):
    pixels = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = kl_vae.encode(pixels)
    with host.gradients():
        mean, std = host.PictureEncoder(kl_vae).encode(pixels)
    assert torch.allclose(mean, wanted, atol=1e-5), "the mean is what ComfyUI encodes"
    assert std.shape == mean.shape
    assert bool((std > 0).all())
    assert not kl_vae.first_stage_model.regularization._forward_pre_hooks


def test_a_vae_without_posterior_gives_its_latent_alone(vae):
    with host.gradients():
        mean, std = host.PictureEncoder(vae).encode(torch.rand(1, 64, 64, 3))
    assert std is None
    assert mean.shape == (1, 16, 8, 8)


def test_moments_by_hand():
    """mean 1, log-variance 2: std e."""
    mean, std = host.posterior(torch.zeros(1, 1, 2, 2), [torch.cat([torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)], 1)])
    assert mean.unique().tolist() == [1.0]
    assert float(std.mean()) == pytest.approx(np.e)


def test_another_vae_or_another_patch_has_another_identity(vae, kl_vae):
    assert host.PictureEncoder(vae).identity != host.PictureEncoder(kl_vae).identity
    model = make("sd3")
    plain = host.model_identity(model)
    patched = model.clone()
    patched.add_patches({"diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (torch.ones(512, 128),)}, 0.5)
    assert host.model_identity(model.clone()) == plain
    assert host.model_identity(patched) != plain


def test_a_baked_in_lora_does_not_change_the_identity_of_the_clean_model():
    """The host writes patches into the shared weights while a patched clone is loaded."""
    import comfy.model_management as mm

    model = make("sd3")
    plain = host.model_identity(model)
    patched = model.clone()
    key = next(k for k, v in model.model.state_dict().items() if k.endswith("mlp.fc1.weight"))
    patched.add_patches({key: (torch.ones_like(model.model.state_dict()[key]),)}, 0.5)
    mm.load_models_gpu([patched])
    assert host.model_identity(model) == plain
    mm.load_models_gpu([model])


def test_memory_that_the_host_never_filled_is_no_part_of_an_identity():
    """CLIP-L of SD1.5 has no projection in its file: the tensor holds whatever lay in memory, and differs from load to load."""
    with torch.inference_mode():
        clip = comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd15")))[1]
        before = host.TextEncoder(clip).identity
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.fill_(7.0)
        assert host.TextEncoder(clip).identity == before
        clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[3].mlp.fc1.bias.fill_(7.0)
        assert host.TextEncoder(clip).identity != before
