"""Inpainting models see in training what the host's own node shows them when they are sampled, and their files load."""

import dataclasses

import nodes as comfy_nodes
import pytest
import torch
from comfy.sd import VAE
from PIL import Image
from trainyard.nodes import host
from trainyard.nodes.train.previews import SamplePrompt, show_images
from trainyard.nodes.train.validation import MonitorConfig
from trainyard.tests.comfy import families, tiny
from trainyard.tests.comfy.more_families import INPAINTING, MORE, hole
from trainyard.tests.comfy.test_conditions import KINDS, build, dataset, denoised_by_host
from trainyard.tests.comfy.test_host import RANK_4, Problem, loaded_output, shake
from trainyard.tests.comfy.test_previews import run_folder
from trainyard.tests.comfy.test_train_lora import job, result, with_task
from trainyard.tests.fakes_data import FakeText, encoded, image
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.encoded import CONCAT_IMAGE, CONCAT_MASK, image_conditioning
from trainyard.trainers.data.images import image_to_batch_tensor
from trainyard.trainers.files import LoraFile, write_lora
from trainyard.trainers.monitor.previews import PreviewSettings
from trainyard.trainers.monitor.validation import ValidationSettings
from trainyard.trainers.rng import make_generator
from trainyard.trainers.settings import InpaintSettings

STROKES = InpaintSettings(inpaint_masks="boxes and strokes", masks_per_image=2)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    for name in INPAINTING:
        monkeypatch.setitem(families.TABLE, name, MORE[name])


@pytest.fixture(scope="module")
def vaes(comfy):
    """channels -> ComfyUI's VAE of a small file"""
    made = {}

    def make(channels):
        if channels not in made:
            name = "sd15" if channels == 4 else "sd3"
            state = {
                k.removeprefix("first_stage_model."): v for k, v in tiny.vae(name, channels, torch.float32).items()
            }
            made[channels] = VAE(sd=state)
        return made[channels]

    return make


def texts(row):
    """FakeText, as wide as the family reads."""
    text = FakeText()
    pooled = {"pooled_output": torch.ones(1, row.pooled)} if row.pooled else {}
    text.cond = lambda value: {"cross_attn": torch.full((1, 7, row.context), value / 20), **pooled}
    return text


def encode(folder, row, vae, inpaint=STROKES, count=2, size=(128, 128), **rest):
    for number in range(count):
        image(folder / "in" / f"{number}.png", size, seed=number)
        (folder / "in" / f"{number}.txt").write_text(f"caption {number}")
    buckets = BucketSettings(resolution=128, step=8, min_side=64)
    return encoded(folder, buckets=buckets, vae=host.encoders.VaeEncoder(vae), text=texts(row), inpaint=inpaint, **rest)


@pytest.mark.parametrize("name", INPAINTING)
def test_a_step_is_fed_what_the_hosts_own_node_gives_for_the_same_image_and_mask_bit_for_bit(name, vaes, tmp_path):
    """InpaintModelConditioning's latent and mask, what the network's input channels are made of, and the prediction"""
    row = MORE[name]
    vae, patcher = vaes(row.latent[0]), families.make(name, inference=True)
    with torch.inference_mode(), host.context.enable_gradients():
        data = encode(tmp_path, row, vae, size=(128, 112))
    with torch.inference_mode(), host.session.open_training_session(patcher, RANK_4) as session, torch.no_grad():
        for seed in range(3):
            batch = data.make_batch([seed % 2], make_generator(seed))
            (cond,) = batch.conds
            pixels = image_to_batch_tensor(Image.open(data.items[seed % 2].path))
            known = {k: v for k, v in cond.items() if k not in (CONCAT_IMAGE, CONCAT_MASK, "cross_attn")}
            text = [[cond["cross_attn"], known]]
            shown, _, latent = comfy_nodes.InpaintModelConditioning().encode(
                text, text, pixels, vae, cond[CONCAT_MASK][0]
            )
            ((_, extras),) = shown
            assert torch.equal(cond[CONCAT_IMAGE], extras[CONCAT_IMAGE])
            assert torch.equal(cond[CONCAT_MASK], extras[CONCAT_MASK])
            assert torch.equal(batch.x0, latent["samples"]), "the TAESD has no posterior to draw from"
            again = image_conditioning(cond)  # beside a text that is encoded again in each step
            assert again[CONCAT_IMAGE] is cond[CONCAT_IMAGE] and again[CONCAT_MASK] is cond[CONCAT_MASK]
            x, sigma = session.denoiser.model_space(batch.x0), torch.tensor([0.6])
            guided = {"guidance": session.family.guidance, **extras} if session.family.guidance is not None else extras
            ours = session.denoiser._model_inputs(cond, x)["c_concat"].cond
            about = host.denoiser.describe_sampling(x)
            assert torch.equal(ours, patcher.model.extra_conds(**{**about, **guided})["c_concat"].cond)
            assert ours.shape[1] == {"fill": 16 + 64}.get(name, 1 + 4)
            error = session.denoiser.denoise(x, sigma, [cond]) - denoised_by_host(
                patcher, [[cond["cross_attn"], guided]], x, sigma
            )
            assert float(error.abs().max()) < 1e-5


@pytest.mark.parametrize("name", INPAINTING)
def test_a_batch_equals_two_of_one_and_the_file_gives_the_trained_output_at_plus_and_minus_one(name, tmp_path):
    """with two images and two masks; the gradients are checked in test_more_families.py"""
    model = families.make(name, inference=True)
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
        shake(session.adapters, size=0.02)
        problem = Problem(session, name)
        for seed, cond in enumerate(problem.conds):
            cond.update(hole(name, seed))
        with torch.no_grad():
            together, apart = problem.loss(), torch.cat([problem.loss(slice(i, i + 1)) for i in range(2)])
            assert torch.allclose(together, apart, rtol=1e-5), f"{together.tolist()} against {apart.tolist()}"
            problem.conds[0] |= {CONCAT_MASK: hole(name, 5)[CONCAT_MASK]}
            assert not torch.allclose(problem.loss()[:1], together[:1], rtol=1e-5), "the mask must matter"
            trained = {}
            for strength in (1.0, -1.0):
                with session.adapters.at_strength(strength):
                    trained[strength] = problem.denoiser.denoise(problem.x0, problem.sigma, problem.conds).clone()
        tensors, _ = session.tensors()
    write_lora(tmp_path / "lora.safetensors", LoraFile(tensors))
    for strength, wanted in trained.items():
        got = loaded_output(model, tmp_path / "lora.safetensors", strength, problem)
        assert float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)) <= 1e-5
    assert not torch.allclose(trained[1.0], trained[-1.0], atol=1e-4)


def test_samples_fill_a_hole_of_a_training_image_and_the_sheet_shows_it(folders, vaes, tmp_path):
    """also where only prompts were given; and a run with validation ends as one without"""
    row = MORE["sd15_inpaint"]
    with torch.inference_mode(), host.context.enable_gradients():
        data = encode(tmp_path, row, vaes(4))
    made = {name: job("sd15_inpaint", encoded=data, name=f"inpaint_{name}", steps=2) for name in ("plain", "seen")}
    look = MonitorConfig(
        ValidationSettings(every=2, images=1, levels=2),
        PreviewSettings(preview_every=2, sampling_steps=1),
        vae=vaes(4),
        positive=[[torch.ones(1, 7, row.context), {}]],
    )
    made["seen"] = dataclasses.replace(made["seen"], monitoring=look)
    losses = {name: result(a_job)[1] for name, a_job in made.items()}
    assert losses["seen"] == losses["plain"]
    files = sorted((run_folder("inpaint_seen") / "samples").iterdir())
    assert [file.name for file in files] == ["base_00.png", "shown_00.png", "step000002.jpg"]
    with Image.open(files[2]) as sheet, Image.open(files[1]) as shown:
        assert sheet.width > 3 * 384 and shown.size == (128, 128)


def test_prompts_are_shown_the_datasets_images_one_after_the_other_and_none_is_all_hole(vaes, tmp_path):
    row = MORE["fill"]
    with torch.inference_mode(), host.context.enable_gradients():
        data = encode(tmp_path, row, vaes(16), InpaintSettings(inpaint_masks="boxes", full_masks=1.0))
    model, own = families.make("fill").model, torch.ones(1)
    prompts = [SamplePrompt("a", {}), SamplePrompt("b", {CONCAT_IMAGE: own, CONCAT_MASK: own}), SamplePrompt("c", {})]
    shown = [prompt.cond for prompt in show_images(prompts, data, model)]
    holes = [data.load_images(item) for item in data.items]
    assert torch.equal(shown[0][CONCAT_MASK], holes[0][CONCAT_MASK]) and not shown[0][CONCAT_MASK].all()
    assert shown[1][CONCAT_IMAGE] is own and set(shown[0]) == {CONCAT_IMAGE, CONCAT_MASK}
    assert torch.equal(shown[2][CONCAT_IMAGE], holes[0][CONCAT_IMAGE])


def test_prompts_of_an_image_to_video_model_are_shown_the_first_frame_of_a_conditioning():
    """a blank one was drawn before, where the conditioning came from the host's own nodes"""
    row, needed = KINDS["hunyuan i2v"]
    data = dataset(row, needed)
    (shown,) = show_images([SamplePrompt("a", {})], data, build(row).model)
    assert set(shown.cond) == set(needed)
    assert torch.equal(shown.cond[CONCAT_IMAGE], data.load_shown(data.items[0])[CONCAT_IMAGE])


def test_inpaint_masks_are_enough_for_a_model_that_fills_and_too_much_for_one_that_does_not(vaes, tmp_path):
    row = MORE["sd15_inpaint"]
    with torch.inference_mode(), host.context.enable_gradients():
        holes = encode(tmp_path, row, vaes(4))
        plain = encode(tmp_path, row, vaes(4), InpaintSettings())
    a_job = job("sd15_inpaint", encoded=holes, name="inpaint_check")
    a_job.check()
    with pytest.raises(ValueError, match=r"SD15 needs more than a caption.*Choose inpaint_masks in Encode Dataset; or"):
        with_task(a_job, data=plain).check()
    with pytest.raises(ValueError, match="encoded with inpaint masks, and SD15 takes none"):
        job("sd15", encoded=holes, name="inpaint_check").check()
