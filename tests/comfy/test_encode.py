"""What an image becomes on its way to the model: the same latent, in the same scale, whichever way it takes."""

import comfy.ldm.models.autoencoder
import comfy.model_management as mm
import comfy.sd
import nodes as comfy_nodes
import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.nodes import host
from trainyard.nodes.data import encode as encode_nodes
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import make
from trainyard.tests.fakes_data import FakeText, captioned, image
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.data.encode import encode_dataset
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.settings import AdapterSettings


class NoText(FakeText):
    def __init__(self):
        super().__init__("none")

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
        core = EncodedDataset.from_core([latent], [[[torch.zeros(1, 4, 4096), {}]]])
        sizes = BucketSettings(resolution=64, step=8, min_side=64, max_side=64)
        empty = CaptionSettings(caption_mode="empty (unconditional)")
        ours = lambda: encode_dataset(
            read_folder(folder), empty, sizes, False, host.encoders.VaeEncoder(vae), NoText(), tmp_path / "cache"
        )
        with host.session.open_training_session(make("sd3", inference=True), AdapterSettings(rank=4)) as session:
            x0 = [
                session.denoiser.model_space(data.make_batch([0], torch.Generator().manual_seed(0)).x0)
                for data in (core, ours(), ours())
            ]
            wanted = session.denoiser.model.process_latent_in(host.context.clone_inference_tensors(latent["samples"]))
    assert torch.equal(x0[1], x0[2]), "read back from disk"
    assert torch.equal(x0[0], wanted), "the host's own scaling"
    assert torch.allclose(x0[0], x0[1], atol=1e-6)


@pytest.fixture(scope="module")
def kl_vae():
    """ComfyUI's VAE class around a KL autoencoder of SD1.5's kind, with random weights."""
    config = dict(
        double_z=True,
        z_channels=4,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=[1, 2, 4, 4],
        num_res_blocks=2,
    )
    with torch.device("meta"):
        shapes = comfy.ldm.models.autoencoder.AutoencoderKL(
            ddconfig=dict(config, attn_resolutions=[], dropout=0.0), embed_dim=4
        ).state_dict()
    rng = torch.Generator().manual_seed(0)
    state = {
        k: torch.randn(v.shape, generator=rng) * (0.02 if v.ndim > 1 else 0.1) + (k.endswith("norm.weight"))
        for k, v in shapes.items()
    }
    with torch.inference_mode():
        return comfy.sd.VAE(sd=state)


def test_a_gaussian_vae_shows_its_mean_and_spread(kl_vae):
    pixels = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = kl_vae.encode(pixels)
    with host.context.enable_gradients():
        mean, std = host.encoders.VaeEncoder(kl_vae).encode(pixels)
    assert torch.allclose(mean, wanted, atol=1e-5), "the mean is what ComfyUI encodes"
    assert std.shape == mean.shape
    assert bool((std > 0).all())
    assert not kl_vae.first_stage_model.regularization._forward_pre_hooks


def test_a_vae_without_posterior_gives_its_latent_alone(vae):
    with host.context.enable_gradients():
        mean, std = host.encoders.VaeEncoder(vae).encode(torch.rand(1, 64, 64, 3))
    assert std is None
    assert mean.shape == (1, 16, 8, 8)


def test_moments_by_hand():
    """mean 1, log-variance 2: std e."""
    mean, std = host.encoders.posterior_mean_std(
        torch.zeros(1, 1, 2, 2), [torch.cat([torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)], 1)]
    )
    assert mean.unique().tolist() == [1.0]
    assert float(std.mean()) == pytest.approx(np.e)


def test_another_vae_or_another_patch_has_another_identity(vae, kl_vae):
    assert host.encoders.VaeEncoder(vae).identity != host.encoders.VaeEncoder(kl_vae).identity
    model = make("sd3")
    plain = host.identity.hash_model_and_schedule(model)
    patched = model.clone()
    patched.add_patches({"diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (torch.ones(512, 128),)}, 0.5)
    assert host.identity.hash_model_and_schedule(model.clone()) == plain
    assert host.identity.hash_model_and_schedule(patched) != plain


def test_a_baked_in_lora_does_not_change_the_identity_of_the_clean_model():
    """The host writes patches into the shared weights while a patched clone is loaded."""
    import comfy.model_management as mm

    model = make("sd3")
    plain = host.identity.hash_model_and_schedule(model)
    patched = model.clone()
    key = next(k for k, v in model.model.state_dict().items() if k.endswith("mlp.fc1.weight"))
    patched.add_patches({key: (torch.ones_like(model.model.state_dict()[key]),)}, 0.5)
    mm.load_models_gpu([patched])
    assert host.identity.hash_model_and_schedule(model) == plain
    mm.load_models_gpu([model])


def test_memory_that_the_host_never_filled_is_no_part_of_an_identity():
    """CLIP-L of SD1.5 has no projection in its file: the tensor holds whatever lay in memory, and differs from load to
    load."""
    with torch.inference_mode():
        clip = comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd15")))[1]
        before = host.encoders.TextEncoder(clip).identity
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.fill_(7.0)
        assert host.encoders.TextEncoder(clip).identity == before
        clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[3].mlp.fc1.bias.fill_(7.0)
        assert host.encoders.TextEncoder(clip).identity != before


# -- the nodes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15():
    """(CLIP, VAE)"""
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd15")))[1:3]


@pytest.fixture
def images(folders):
    """input/set: 5 captioned noise images of 64 px."""
    captioned(folders / "input" / "set", 5, (64, 64))
    return folders / "input" / "set"


def run(node, *args, **widgets):
    """What a node's execute returns, as ComfyUI calls it."""
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).execute(*args, **widgets)


def encode_with(sd15, folder, **widgets):
    clip, vae = sd15
    sizes = dict(resolution=64, step=8, min_side=64, max_side=64)
    return run(encode_nodes.EncodeDataset, read_folder(folder), vae, clip, **{"flip": False, **sizes, **widgets})[0]


def loaded():
    """Weights that ComfyUI holds loaded, by identity."""
    return {id(entry.model.model) for entry in mm.current_loaded_models if entry.model is not None}


def on_device(sd15):
    clip, vae = sd15
    return loaded() & {id(clip.patcher.model), id(vae.patcher.model)}


class Stopped:
    """The third image that the VAE gets raises; until then it works as ever."""

    def __init__(self, monkeypatch, error, sd15):
        self.calls, self.seen = 0, set()
        original = host.encoders.VaeEncoder.encode

        def encode(encoder, images):
            self.calls += 1
            if self.calls == 3:
                self.seen = on_device(sd15)
                raise error
            return original(encoder, images)

        monkeypatch.setattr(host.encoders.VaeEncoder, "encode", encode)


def test_vae_and_text_encoder_are_out_of_memory_after_encoding(sd15, images, monkeypatch):
    during, original = set(), host.encoders.VaeEncoder.encode
    monkeypatch.setattr(
        host.encoders.VaeEncoder, "encode", lambda *args: (original(*args), during.update(on_device(sd15)))[0]
    )
    assert len(encode_with(sd15, images)) == 5
    assert len(during) == 2, "both are loaded while it encodes, or the next line proves nothing"
    assert not on_device(sd15)


@pytest.mark.parametrize("error", [mm.InterruptProcessingException, MemoryError, ValueError])
def test_vae_and_text_encoder_are_out_of_memory_after_an_interrupt_or_an_error(sd15, images, monkeypatch, error):
    with monkeypatch.context() as patched:
        stopped = Stopped(patched, error("stop"), sd15)
        with pytest.raises(error):
            encode_with(sd15, images)
    assert len(stopped.seen) == 2 and not on_device(sd15)


def test_cancel_in_the_middle_keeps_what_was_done_and_the_next_run_does_the_rest(sd15, images, monkeypatch):
    """the host's own flag is set after the 2nd image: it is written, the 3rd is not begun, and 3 are left"""
    calls, original = [], host.encoders.VaeEncoder.encode

    def encode(encoder, pixels):
        calls.append(pixels.shape)
        latent = original(encoder, pixels)
        if len(calls) == 2:
            mm.interrupt_current_processing()
        return latent

    monkeypatch.setattr(host.encoders.VaeEncoder, "encode", encode)
    with pytest.raises(mm.InterruptProcessingException):
        encode_with(sd15, images)
    assert len(calls) == 2 and not mm.processing_interrupted()
    assert len(encode_with(sd15, images)) == 5 and len(calls) == 5


def test_another_model_that_was_loaded_stays_loaded(sd15, images):
    model = make("sd3", inference=True)
    mm.load_models_gpu([model])
    encode_with(sd15, images)
    assert id(model.model) in loaded()


def test_a_half_precision_vae_that_overflows_names_the_picture(sd15, images):
    """one weight of infinity, as fp16 gives where numbers grow too large"""
    clip, vae = sd15
    with torch.inference_mode():
        weight = next(p for name, p in vae.first_stage_model.named_parameters() if "encoder" in name and p.ndim == 4)
        before = weight.clone()
        weight.fill_(float("inf"))
    try:
        with pytest.raises(ValueError, match=r"The VAE turned 0\.png into NaN or infinity.*--fp32-vae"):
            encode_with(sd15, images)
        assert not on_device(sd15)
    finally:
        with torch.inference_mode():
            weight.copy_(before)


def test_bucket_dataset_decides_and_encode_dataset_keeps_to_it(sd15, folders):
    captioned(folders / "input" / "set", 3, (64, 64))
    image(folders / "input" / "set" / "wide.png", (100, 60))
    (folders / "input" / "set" / "wide.txt").write_text("wide", encoding="utf-8")
    dataset, sheet, words = run(
        encode_nodes.BucketDataset, read_folder(folders / "input" / "set"), resolution=32, step=8
    ).args
    assert [record.bucket for record in dataset] == [(32, 32), (32, 32), (32, 32), (40, 24)]
    assert sheet.ndim == 4 and sheet.shape[0] == 1 and sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    assert words.startswith("4 images in 2 buckets") and "wide.png 40x24" in words
    clip, vae = sd15
    encoded = run(encode_nodes.EncodeDataset, dataset, vae, clip, flip=False, resolution=64, step=8)[0]
    assert [item.bucket for item in encoded.items] == [record.bucket for record in dataset]


def test_the_bucket_node_shows_its_page_on_the_server_and_prompts_from_before_it_still_encode(server):
    """the prompt of EncodeDataset names none of the inputs that came later"""
    folder = server.base / "input" / "buckets"
    captioned(folder, 3, (96, 64))
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": server.install("sd15")}},
        "2": {"class_type": "TrainyardLoadDataset", "inputs": {"folder": "input/buckets", "repeats": 1, "alpha_mask": False}},
        "3": {"class_type": "TrainyardBucketDataset", "inputs": {
            "dataset": ["2", 0], "resolution": 64, "upscale": False, "step": 8, "min_side": 64, "max_side": 128, "rules": "tight", "merge": 2,
            "max_crop": 0.12}},
        "4": {"class_type": "TrainyardEncodeDataset", "inputs": {
            "dataset": ["3", 0], "vae": ["1", 2], "clip": ["1", 1], "caption_mode": "captions", "trigger": "", "dropout": 0.0, "shuffle": False,
            "keep_tokens": 0, "variants": 1, "resolution": 64, "upscale": False, "step": 8, "min_side": 64, "max_side": 128, "flip": False, "seed": 0}},
        "5": {"class_type": "TrainyardTrainLora", "inputs": {
            "model": ["1", 0], "encoded": ["4", 0], "steps": 1, "learning_rate": 1e-3, "rank": 2, "batch": 3, "seed": 1, "save_every": 0,
            "run_name": "buckets", "checkpointing": "off"}},
        "6": {"class_type": "TrainyardSaveLora", "inputs": {"lora": ["5", 0], "name": "buckets"}},
    }  # fmt: skip
    done = server.run(prompt)
    assert done.ok, done.why
    (shown,) = done.outputs["3"]["images"]
    assert shown["type"] == "temp"


def test_the_ground_beneath_transparent_pictures_is_a_colour():
    from trainyard.nodes.data.encode import parse_colour

    assert parse_colour("#102030") == (16, 32, 48) and parse_colour(" white ") == (255, 255, 255)
    with pytest.raises(ValueError, match="ground is 'no colour'; write a colour such as #ffffff"):
        parse_colour("no colour")
