"""Clips through the nodes: cut, encoded by a video VAE of ComfyUI's own class, trained on, drawn as previews; first
frames as ComfyUI's own nodes give them."""

import dataclasses

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file
from trainyard.nodes import host
from trainyard.nodes.data.dataset import format_dataset_summary
from trainyard.nodes.data.encode import CutClips
from trainyard.nodes.host.first_frames import FirstFrames
from trainyard.nodes.train.previews import SamplePrompt, decode_latent_with_vae, preview_latent_shape, show_images
from trainyard.nodes.train.settings_nodes import NoiseAndLoss
from trainyard.nodes.train.train_lora import check_clips
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import TABLE, make
from trainyard.tests.comfy.test_host import RANK_4
from trainyard.tests.comfy.test_train_lora import job
from trainyard.tests.fakes_data import FakeText, image
from trainyard.tests.videos import write_video
from trainyard.trainers.data.buckets import BucketSettings, ClipSettings
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.data.clips import cut_clips
from trainyard.trainers.data.encode import encode_dataset
from trainyard.trainers.data.images import image_to_batch_tensor
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.videos import open_clip_frames
from trainyard.trainers.monitor.previews import PreviewSettings
from trainyard.trainers.rng import make_generator

I2V = dataclasses.replace(
    TABLE["wan"], supported="WAN21_I2V", config=TABLE["wan"].config | dict(model_type="i2v", in_dim=36)
)


class WideTexts(FakeText):
    """Conditionings as wide as the tiny Wan reads them."""

    def cond(self, value):
        return {"cross_attn": torch.full((1, 3, 64), value / 50)}


@pytest.fixture(scope="module")
def wan_vae():
    """ComfyUI's VAE of Wan 2.1 at toy width, from its own loader."""
    with torch.inference_mode():
        vae = comfy.sd.VAE(sd=load_file(tiny.build("wan_vae")))
    vae.throw_exception_if_invalid()
    return vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clips")
    for number in range(2):
        write_video(place / f"{number}.mkv", frames=12, size=(32, 32))
        (place / f"{number}.txt").write_text(f"clip {number}")
    image(place / "still.png", (32, 32))
    (place / "still.txt").write_text("a picture")
    return place


def encode(folder, vae, cache, frames=5, first_frame=None, flip=False):
    dataset = cut_clips(read_folder(folder, videos="read"), ClipSettings(frames=frames, fps=10.0))
    with torch.inference_mode(), host.context.enable_gradients():
        return encode_dataset(
            dataset, CaptionSettings(), BucketSettings(resolution=32, step=16), flip, host.encoders.VaeEncoder(vae),
            WideTexts(), cache, first_frame=first_frame,
        )  # fmt: skip


def test_the_vae_says_which_lengths_its_latents_hold(wan_vae):
    encoder = host.encoders.VaeEncoder(wan_vae)
    assert [encoder.fit_frames(frames) for frames in (1, 4, 5, 32, 33, 81)] == [1, 1, 5, 29, 33, 81]


def test_cut_clips_tells_what_it_made(folder):
    dataset = read_folder(folder, videos="read")
    assert format_dataset_summary(dataset).startswith("2 videos and 1 image, 3 with captions")
    assert "2 videos, for Cut Clips: 0.mkv (12 frames, 10 fps, 1.2 s)" in format_dataset_summary(dataset)
    CutClips.hidden = type("Hidden", (), {"unique_id": None})
    clips, about = CutClips.execute(dataset, frames=5, fps=10.0, sampling="chunks", clips=1, short_videos="error").args
    assert len(clips) == 5 and "4 clips of 5 frames, 10 fps, 0.5 s" in about


def test_a_clip_becomes_the_latent_that_the_hosts_own_node_makes(folder, wan_vae, tmp_path):
    import nodes

    data = encode(folder, wan_vae, tmp_path)
    assert [item.shape for item in data.items] == [(16, 2, 4, 4), (16, 2, 4, 4), (16, 1, 4, 4)]
    record = cut_clips(read_folder(folder, videos="read"), ClipSettings(frames=5, fps=10.0))[0]
    frames = torch.cat([image_to_batch_tensor(frame) for frame in open_clip_frames(record)])
    with torch.inference_mode():
        hosts = nodes.VAEEncode().encode(wan_vae, frames)[0]["samples"]
    assert torch.equal(data.make_batch([0], make_generator(0)).x0, hosts.float())


def test_clips_and_images_train_together_and_a_preview_shows_a_clip(folder, wan_vae, tmp_path):
    data, model = encode(folder, wan_vae, tmp_path), make("wan")
    a_job = job("sd3", model=model, encoded=data, name="clips and images")
    a_job.check()
    assert preview_latent_shape(model, PreviewSettings(), data, 512) == (16, 2, 4, 4)
    assert preview_latent_shape(model, PreviewSettings(width=64, height=32), data, 512) == (16, 2, 4, 8)
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
        for picks in ([0, 1], [2]):
            batch = data.make_batch(picks, make_generator(0))
            x = session.denoiser.model_space(batch.x0)
            assert host.checks.check_gradients(session, x, batch.conds) < 1e-3
    with torch.inference_mode():
        assert decode_latent_with_vae(wan_vae, torch.randn(1, 16, 2, 4, 4)).size == (3 * 32, 32)


def test_a_model_that_makes_images_refuses_clips_with_words(folder, wan_vae, tmp_path):
    data = encode(folder, wan_vae, tmp_path)
    with pytest.raises(ValueError, match="has 2 clips, and Anima makes single images"):
        check_clips(make("anima"), data)


# -- first frames ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["WanImageToVideo", "HunyuanImageToVideo"])
def test_a_first_frame_is_given_bit_for_bit_as_the_hosts_own_node_gives_it(folder, wan_vae, tmp_path, node):
    from comfy_extras.nodes_hunyuan import HunyuanImageToVideo
    from comfy_extras.nodes_wan import WanImageToVideo

    with torch.inference_mode():
        data = encode(folder, wan_vae, tmp_path, first_frame=FirstFrames(node, wan_vae))
    record = cut_clips(read_folder(folder, videos="read"), ClipSettings(frames=5, fps=10.0))[0]
    first, empty = image_to_batch_tensor(next(open_clip_frames(record))), [[torch.zeros(1, 1, 1), {}]]
    with torch.inference_mode():
        if node == "WanImageToVideo":
            made = WanImageToVideo.execute(empty, empty, wan_vae, 32, 32, 5, 1, start_image=first)
        else:
            made = HunyuanImageToVideo.execute(empty, wan_vae, 32, 32, 5, 1, "v1 (concat)", start_image=first)
    ((_, wanted),) = made.args[0]
    (cond,) = data.make_batch([0], make_generator(0)).conds
    assert wanted.keys() <= cond.keys()
    assert all(torch.equal(cond[key], value) for key, value in wanted.items())


def test_an_image_to_video_model_trains_on_first_frames_and_needs_them(folder, wan_vae, tmp_path, monkeypatch):
    monkeypatch.setitem(TABLE, "wan i2v", I2V)
    model, bare = make("wan i2v"), encode(folder, wan_vae, tmp_path)
    model.model.diffusion_model.img_emb = None  # as Wan 2.2's, which has no CLIP_VISION
    with pytest.raises(ValueError, match="needs more than a caption: its image"):
        job("sd3", model=model, encoded=bare, name="i2v without").check()
    with torch.inference_mode():
        data = encode(folder, wan_vae, tmp_path, first_frame=FirstFrames("WanImageToVideo", wan_vae), flip=True)
    assert data.fingerprint != bare.fingerprint
    job("sd3", model=model, encoded=data, name="i2v with").check()
    with pytest.raises(ValueError, match="makes clips from text"):
        check_clips(make("wan"), data)
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session, torch.no_grad():
        batch = data.make_batch([0, 1], make_generator(0))
        x, sigma = session.denoiser.model_space(batch.x0), torch.tensor([0.6, 0.6])
        images = [cond["concat_latent_image"] for cond in batch.conds]
        swapped = [{**cond, "concat_latent_image": -images[i]} for i, cond in enumerate(batch.conds)]
        assert (
            session.denoiser.denoise(x, sigma, batch.conds) - session.denoiser.denoise(x, sigma, swapped)
        ).abs().max() > 1e-4
    prompts = show_images([SamplePrompt("mine", {"cross_attn": torch.zeros(1, 3, 64)})], data, model.model)
    assert prompts[0].cond["concat_latent_image"].shape == (1, 16, 2, 4, 4)


def test_what_clip_vision_saw_is_kept_on_disk_and_given_back_as_the_host_reads_it(folder, wan_vae, tmp_path):
    class Eyes:
        patcher = make("wan")

        def encode_image(self, pixels, crop):
            import comfy.clip_vision

            output = comfy.clip_vision.Output()
            output["penultimate_hidden_states"] = pixels.mean() * torch.ones(1, 2, 1280)
            return output

    with torch.inference_mode():
        data = encode(folder, wan_vae, tmp_path, first_frame=FirstFrames("WanImageToVideo", wan_vae, Eyes()))
    (cond,) = data.make_batch([0], make_generator(0)).conds
    placed = host.denoiser.place_references(make("wan").model, cond)
    assert placed["clip_vision_output"].penultimate_hidden_states.shape == (1, 2, 1280)


# -- two experts -------------------------------------------------------------------------------------------------------


def test_an_experts_range_is_the_part_of_the_noise_that_it_draws():
    defaults = {name: value for name, value in dataclasses.asdict(host_noise()).items()}
    noise = lambda expert, **changes: NoiseAndLoss.execute(expert=expert, **{**defaults, **changes}).args[0]
    high, low = (noise(f"Wan 2.2 text to video, {side} noise") for side in ("high", "low"))
    assert (low.min_time, low.max_time, high.min_time, high.max_time) == (0.0, 0.875, 0.875, 1.0)
    assert noise("whole range") == host_noise()
    with pytest.raises(ValueError, match="also set by hand: min_time 0.2"):
        noise("Wan 2.2 image to video, low noise", min_time=0.2)


def host_noise():
    from trainyard.trainers.settings import NoiseSettings

    return NoiseSettings()
