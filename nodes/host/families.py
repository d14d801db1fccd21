"""Which model family a MODEL of ComfyUI is."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_sampling

from ...trainers.families import MODEL_FAMILIES, ModelFamily, unlisted_family

# By the name of ComfyUI's configuration class (comfy/supported_models.py).
FAMILY_KEYS = {
    "SD15": "sd15",
    "SD20": "sd2",
    "SDXL": "sdxl",
    "SSD1B": "ssd_1b",
    "Segmind_Vega": "segmind_vega",
    "KOALA_700M": "koala_700m",
    "KOALA_1B": "koala_1b",
    "SD3": "sd3",
    "FluxSchnell": "schnell",
    "Flux": "flux",
    "Flux2": "flux2",
    "Krea2": "krea2",
    "Chroma": "chroma",
    "ZImage": "zimage",
    "Lumina2": "lumina2",
    "QwenImage": "qwen_image",
    "AuraFlow": "auraflow",
    "HunyuanVideo": "hunyuan_video",
    "HunyuanVideo15": "hunyuan_video_15",
    "HunyuanVideo15_SR_Distilled": "hunyuan_video_15",
    "HunyuanImage21": "hunyuan_image",
    "HunyuanImage21Refiner": "hunyuan_image_refiner",
    "WAN21_T2V": "wan",
    "Anima": "anima",
    "Kandinsky5": "kandinsky5",
    "Kandinsky5Image": "kandinsky5_image",
    "LTXV": "ltxv",
    "LTXAV": "ltxav",
    "Ideogram4": "ideogram4",
    "HiDream": "hidream",
    "HiDreamO1": "hidream_o1",
    "CosmosT2IPredict2": "cosmos_predict2",
    "PixArtAlpha": "pixart_alpha",
    "PixArtSigma": "pixart_sigma",
    "HunyuanDiT": "hunyuan_dit",
    "CogVideoX_T2V": "cogvideox",
}
# Classes whose gradients and files tests check, under every plan (tests/comfy/test_host.py). A subclass is not its
# parent: one that is not here has its gradients checked before each run.
TESTED_CLASSES = frozenset(
    "SD15 SD20 SDXL SD3 Flux FluxSchnell Chroma Lumina2 ZImage QwenImage AuraFlow HunyuanVideo WAN21_T2V Anima".split()
)
# Of those with a time axis in their latents, these make single images.
IMAGE_CLASSES = frozenset("QwenImage Anima Krea2 CosmosT2IPredict2 JoyImage HunyuanImage21Refiner".split())
KLEIN_SIZES = {3072: "flux2_klein_4b", 4096: "flux2_klein_9b"}  # hidden width -> row


def find_model_family(model_config, sampling=None) -> ModelFamily:
    """The family of the host's configuration class, or of its nearest ancestor that has one. `sampling`: the host's
    noise schedule, for families whose recipe is the host's own."""
    name = type(model_config).__name__
    key = next((FAMILY_KEYS[c.__name__] for c in type(model_config).__mro__ if c.__name__ in FAMILY_KEYS), None)
    config = model_config.unet_config
    if key == "flux2":
        key = KLEIN_SIZES.get(config.get("hidden_size"), key)
    family = MODEL_FAMILIES[key] if key else unlisted_family(name, sampling is None or is_flow(sampling))
    if family.guidance is not None and family.guidance_distilled and config.get("guidance_embed") is False:
        family = replace(family, guidance=None, guidance_distilled=False)  # of the same family, before distillation
    if sampling is not None and family.density.shift == "model":
        family = replace(family, density=replace(family.density, shift=host_shift(sampling)))
    return replace(family, known=name in TESTED_CLASSES)


def makes_video(patcher) -> bool:
    """Whether a MODEL makes clips: its latents have a time axis, which single images of some families have too."""
    names = {cls.__name__ for cls in type(patcher.model.model_config).__mro__}
    return patcher.model.latent_format.latent_dimensions == 3 and not names & IMAGE_CLASSES


def find_patcher_family(patcher) -> ModelFamily:
    """The family of a MODEL, with the schedule that a ModelSampling node may have given it."""
    return find_model_family(patcher.model.model_config, patcher.get_model_object("model_sampling"))


def is_flow(sampling) -> bool:
    """Whether noise levels are times t in (0, 1), also where the host writes sigma = t / (1 - t)."""
    return isinstance(sampling, (comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW))


def host_shift(sampling) -> float:
    """The factor by which the host shifts noise levels when it samples: s / (1 + s) is its level half way."""
    if not isinstance(sampling, comfy.model_sampling.CONST):
        return 1.0
    level = float(sampling.percent_to_sigma(0.5))
    return level / (1 - level)
