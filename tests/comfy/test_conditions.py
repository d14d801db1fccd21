"""What a MODEL needs beside a caption: the host's own classes, each with what it is given, and those that are refused."""

import ast
import dataclasses
import functools
import inspect
import re

import comfy.clip_vision
import comfy.model_base
import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import CoreModelPatcher
from trainyard.nodes import host
from trainyard.tests.comfy import families
from trainyard.tests.comfy.families import TABLE, Family, flux
from trainyard.tests.comfy.test_host import RANK_4, shake
from trainyard.tests.comfy.test_train_lora import job, with_task
from trainyard.trainers.data.encoded import EncodedDataset, split_conditioning
from trainyard.trainers.settings import AdapterSettings

conditions = host.conditions
SDXL, VIDEO, WAN = TABLE["sdxl"], TABLE["hunyuan_video"], TABLE["wan"]
IMAGE, MASK = conditions.IMAGE, conditions.MASK


def changed(row, name, **config):
    return dataclasses.replace(row, supported=name, config=row.config | config)


# kind -> (row, what the host needs of it)
KINDS = {
    "sd15 inpainting": (changed(TABLE["sd15"], "SD15", in_channels=9), (IMAGE, MASK)),
    "sdxl inpainting": (changed(SDXL, "SDXL", in_channels=9), (IMAGE, MASK)),
    "sd15 ip2p": (changed(TABLE["sd15"], "SD15_instructpix2pix", in_channels=8), (IMAGE,)),
    "sdxl ip2p": (changed(SDXL, "SDXL_instructpix2pix", in_channels=8), (IMAGE,)),
    "flux fill": (Family("FluxInpaint", flux(in_channels=96), 64, 32), (IMAGE, MASK)),
    "flux canny": (Family("Flux", flux(in_channels=32), 64, 32), (IMAGE,)),
    "hunyuan i2v": (changed(VIDEO, "HunyuanVideoI2V", in_channels=33), (IMAGE, MASK)),
    "skyreels i2v": (changed(VIDEO, "HunyuanVideoSkyreelsI2V", in_channels=32), (IMAGE,)),
    "wan 2.1 i2v": (changed(WAN, "WAN21_I2V", model_type="i2v", in_dim=36), (IMAGE, MASK, "clip_vision_output")),
    "wan fun control": (changed(WAN, "WAN21_FunControl2V", in_dim=48), (IMAGE,)),
}
MEAN_FLOW = changed(VIDEO, "HunyuanVideo", meanflow=True)


def build(row):
    with torch.inference_mode():
        model = families.base_model(row, torch.float32)
        families.fill(model.diffusion_model, 0)
    return CoreModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda kind: made.setdefault(kind, build(KINDS[kind][0]))


def conditioning(row, needed, seed=0):
    """As the host's nodes give it, under inference mode."""
    rng, (frames, height, width) = torch.Generator().manual_seed(seed), ((1, 1, *row.latent[1:])[-3:])
    time = (frames,) if len(row.latent) == 4 else ()
    cross = torch.randn(1, 7, row.context, generator=rng) * 0.5
    extras = {"guidance": 3.0}
    if row.pooled:
        extras["pooled_output"] = torch.randn(1, row.pooled, generator=rng) * 0.5
    if IMAGE in needed:
        channels = 2 * row.latent[0] if row.supported == "WAN21_FunControl2V" else row.latent[0]
        extras[IMAGE] = torch.randn(1, channels, *time, height, width, generator=rng)
    if MASK in needed:
        extras[MASK] = (torch.rand(1, 1, *time, height, width, generator=rng) > 0.5).float()
    if "clip_vision_output" in needed:
        extras["clip_vision_output"] = seen = comfy.clip_vision.Output()
        seen.penultimate_hidden_states, seen.mm_projected = torch.randn(1, 257, 1280, generator=rng), None
    return [[cross, extras]]


def dataset(row, needed, count=2):
    rng = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        latents = [{"samples": torch.randn(1, *row.latent, generator=rng)} for _ in range(count)]
        return EncodedDataset.from_core(latents, [conditioning(row, needed, seed) for seed in range(count)])


def denoised_by_host(patcher, cond, x, sigma):
    """x0 as a sampler of the host asks for it, on an empty latent."""
    positive = {"positive": comfy.sampler_helpers.convert_cond(cond)}
    latent = torch.zeros_like(x)
    made = comfy.samplers.process_conds(patcher.model, x, positive, x.device, latent, None, 0)["positive"]
    options = {"transformer_options": {"sample_sigmas": sigma}}
    return comfy.samplers.calc_cond_batch(patcher.model, [made], x, sigma, options)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_given_what_the_host_gives_it(kind, models):
    """Two rows with images of their own, each as the host's sampler predicts it. The conditionings stay as they are."""
    row, needed = KINDS[kind]
    patcher = models(kind)
    conds = [conditioning(row, needed, seed) for seed in range(2)]
    rows = [split_conditioning(cond)[0] for cond in conds]
    x, sigma = torch.randn(2, *row.latent, generator=torch.Generator().manual_seed(2)), torch.tensor([0.6, 0.6])
    with torch.inference_mode(), host.session.open_training_session(patcher, RANK_4) as session, torch.no_grad():
        got = session.denoiser.denoise(x, sigma, rows)
        again = session.denoiser.denoise(x, sigma, rows)
        wanted = torch.cat([denoised_by_host(patcher, c, x[i : i + 1], sigma[:1]) for i, c in enumerate(conds)])
        other = session.denoiser.denoise(x, sigma, [rows[0], {**rows[1], IMAGE: rows[0][IMAGE]}])
    error = float((got - wanted).abs().max())
    assert error < 1e-4, f"{kind}: {error:.1e}"
    assert torch.equal(got, again), "the first call has written into the conditionings"
    assert not torch.allclose(other[1], got[1], atol=1e-4), "the image must matter"


@pytest.mark.parametrize("kind", ["hunyuan i2v", "skyreels i2v", "sd15 inpainting"])
def test_without_an_image_a_model_sees_the_hosts_empty_one_and_not_the_noised_latent(kind, models):
    """Such as in a preview of a prompt. It was 0.5 away from the host's for HunyuanVideo's."""
    row, patcher = KINDS[kind][0], models(kind)
    cond, x = conditioning(row, ()), torch.randn(1, *row.latent, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), host.session.open_training_session(patcher, RANK_4) as session, torch.no_grad():
        got = session.denoiser.denoise(x, torch.tensor([0.6]), split_conditioning(cond))
        error = float((got - denoised_by_host(patcher, cond, x, torch.tensor([0.6]))).abs().max())
    assert error < 1e-4, f"{kind}: {error:.1e}"


def test_a_conditioning_with_what_clip_vision_saw_trains_and_has_one_fingerprint(models):
    row, needed = KINDS["wan 2.1 i2v"]
    data = dataset(row, needed)
    assert data.fingerprint == dataset(row, needed).fingerprint
    every = AdapterSettings(rank=4, targets="regex", pattern="img_emb")
    with torch.inference_mode(), host.session.open_training_session(models("wan 2.1 i2v"), every) as session:
        shake(session.adapters)
        batch = data.make_batch([0, 1], torch.Generator().manual_seed(0))
        x = session.denoiser.model_space(batch.x0)
        session.denoiser.denoise(x, torch.tensor([0.5, 0.5]), batch.conds).square().mean().backward()
        gradients = [p.grad for p in session.adapters.parameters()]
        assert len(gradients) == 4 and all(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dataset_lacks_is_said_before_the_run_and_what_has_it_passes(kind, models):
    row, needed = KINDS[kind]
    assert conditions.required_conditions(models(kind).model) == needed
    a_job = job("sd3", model=models(kind), encoded=dataset(row, needed), name="conditions")
    a_job.check()
    for key in needed:
        without = dataset(row, [each for each in needed if each != key])
        words = rf"{row.supported} needs more than a caption.*the conditioning of latent 1 has no {key}\."
        with pytest.raises(ValueError, match=words):
            with_task(a_job, data=without).check()


def test_prompts_alone_are_not_enough_for_a_model_that_fills(models):
    with pytest.raises(ValueError, match="FluxInpaint needs more than a caption.*trains on prompts alone"):
        conditions.check_text_is_enough(models("flux fill"))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_model_that_draws_from_text_needs_nothing_more(family):
    model = families.make(family)
    conditions.check_trainable(model)
    conditions.check_text_is_enough(model)


def test_a_mean_flow_model_is_refused_before_the_run():
    """Its layers for the next step's noise level were given the level of another picture of the batch."""
    row = MEAN_FLOW
    with pytest.raises(ValueError, match="HunyuanVideo cannot be trained: it is a mean-flow model.*distilled from"):
        job("sd3", model=build(row), encoded=dataset(row, ()), name="mean flow").check()


# -- over all classes of the host --------------------------------------------------------------------------------------
HOST_CLASSES = {
    name: cls
    for name, cls in vars(comfy.model_base).items()
    if inspect.isclass(cls) and issubclass(cls, comfy.model_base.BaseModel) and cls.__module__ == "comfy.model_base"
}
# Keys of a conditioning that the host reads and no model of it needs: text, sizes, numbers, and images and references
# that the same checkpoint draws without.
OPTIONAL_KEYS = set(
    "aesthetic_score area aspect_ratio attention_mask attention_mask_img_shape attention_mask_mt5xl audio_codes "
    "audio_inject_scale augmentation_level azimuth clip_vision_output_pose clip_vision_output_ref clip_vision_outputs "
    "concat_mask_index conditioning_byt5small conditioning_llama3 conditioning_lyrics conditioning_mt5xl "
    "context_latents control_video crop_h crop_w cross_attn cross_attn_controlnet cross_attn_pose degrade_sigma "
    "denoise_mask elevation face_video_pixels fps frame_rate generated_keyframes guidance guide_attention_entries "
    "guiding_frame_index height keyframe_idxs latent_image latent_shapes lyrics_strength minimax_audio_cond_noise_aug "
    "minimax_keyframes minimax_refs minimax_token_tags minimax_visual_cond_noise_aug motion_bucket_id noise "
    "noise_augmentation noise_concat ofs pooled_output pose_strength prompt_type ref_audio ref_latent ref_mask_28ch "
    "ref_mask_flag reference_audio_timbre_latents reference_latents_method reference_latents_text_embeds "
    "reference_motion reference_strength seconds_start seconds_total seed t5xxl_ids t5xxl_weights target_height "
    "target_width text_input_ids time_dim_concat time_dim_replace unclip_noise_augment_merge unprocessed_ltxav_embeds "
    "vace_mask vace_strength width".split()
)


def test_every_class_of_the_host_is_in_the_tables():
    """A class that comes new is looked at by a person: what is it given beside its text?"""
    known = set(conditions.CLASS_CONDITIONS) | set(conditions.REFUSED_CLASSES)
    assert known == set(HOST_CLASSES)
    assert not set(conditions.CLASS_CONDITIONS) & set(conditions.REFUSED_CLASSES)
    assert conditions.OPTIONAL_CHANNELS <= set(HOST_CLASSES)


def test_every_configuration_of_the_host_makes_a_class_of_the_tables():
    for config in comfy.supported_models.models:
        made = set(re.findall(r"model_base\.(\w+)\(self", inspect.getsource(config.get_model))) or {"BaseModel"}
        assert made <= set(HOST_CLASSES), config.__name__


@functools.cache
def class_trees():
    """Name -> syntax tree of each class of comfy.model_base; inspect would read the whole file for every one."""
    nodes = ast.parse(inspect.getsource(comfy.model_base)).body
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def keys_read(cls):
    """Keys that the methods of a class ask their conditioning for."""
    calls = (
        n
        for n in ast.walk(class_trees()[cls.__name__])
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    )
    return {
        n.args[0].value
        for n in calls
        if n.func.attr == "get" and getattr(n.func.value, "id", "") in ("kwargs", "args") and isinstance(n.args[0], ast.Constant)
    }  # fmt: skip


def test_every_key_that_the_host_reads_is_needed_or_known_to_be_optional():
    read = set().union(*map(keys_read, HOST_CLASSES.values()))
    needed = set(conditions.CONDITION_NAMES)
    assert read - needed == OPTIONAL_KEYS
    asked = {key for keys in conditions.CLASS_CONDITIONS.values() for key in keys}
    assert asked | {IMAGE, MASK, "clip_vision_output"} == needed
    for name, keys in conditions.CLASS_CONDITIONS.items():
        chain = (c for c in HOST_CLASSES[name].__mro__ if c.__module__ == "comfy.model_base")
        assert set(keys) <= set().union(*map(keys_read, chain)), name


def test_a_subclass_of_another_node_needs_what_the_hosts_class_needs(models):
    patcher = models("hunyuan i2v")

    class Patched(type(patcher.model)):
        pass

    patcher.model.__class__, before = Patched, type(patcher.model)
    try:
        assert conditions.required_conditions(patcher.model) == (IMAGE, MASK)
    finally:
        patcher.model.__class__ = before
