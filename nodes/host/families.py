"""What a model family needs on top of what ComfyUI's model says of itself: one short row each.

Sources: sigma densities and guidance from kohya-ss sd-scripts' and musubi-tuner's training docs, Esser et al. 2024
(SD3) and Black Forest Labs' shift for Flux; the key styles are those that kohya's, ComfyUI's and Forge's loaders share.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...trainers.diffusion import NoiseLevelDensity

UNIFORM_DENSITY = NoiseLevelDensity("uniform")
LOGIT_NORMAL_DENSITY = NoiseLevelDensity("logit-normal", 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class ModelFamily:
    """`names`: 'diffusers' writes lora_unet_down_blocks_..., 'original' the model's own module paths."""

    label: str
    density: NoiseLevelDensity
    base: str  # ss_base_model_version
    architecture: str  # modelspec
    guidance: float | None = None
    names: str = "original"
    known: bool = True
    guidance_distilled: bool = False  # guidance is part of the weights: it draws at guidance 1


MODEL_FAMILIES = {
    "SD15": ModelFamily("Stable Diffusion 1.5", UNIFORM_DENSITY, "sd_v1", "stable-diffusion-v1", names="diffusers"),
    "SD20": ModelFamily("Stable Diffusion 2", UNIFORM_DENSITY, "sd_v2", "stable-diffusion-v2", names="diffusers"),
    "SDXL": ModelFamily("SDXL", UNIFORM_DENSITY, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "SD3": ModelFamily("Stable Diffusion 3", LOGIT_NORMAL_DENSITY, "sd3_m", "stable-diffusion-3"),
    "FluxSchnell": ModelFamily(
        "Flux schnell",
        NoiseLevelDensity("logit-normal", 0.0, 1.0, 1.0),
        "flux1",
        "flux-1-schnell",
        guidance_distilled=True,
    ),
    "Flux": ModelFamily(
        "Flux",
        NoiseLevelDensity("logit-normal", 0.0, 1.0, "resolution"),
        "flux1",
        "flux-1-dev",
        guidance=1.0,
        guidance_distilled=True,
    ),
    "Chroma": ModelFamily("Chroma", LOGIT_NORMAL_DENSITY, "chroma", "chroma", guidance=0.0),
    "ZImage": ModelFamily("Z-Image", NoiseLevelDensity("logit-normal", 0.0, 1.0, 2.0), "zimage", "z-image"),
    "Lumina2": ModelFamily("Lumina 2", LOGIT_NORMAL_DENSITY, "lumina2", "lumina-2"),
    "QwenImage": ModelFamily(
        "Qwen-Image", NoiseLevelDensity("logit-normal", 0.0, 1.0, 2.2), "qwen_image", "qwen-image"
    ),
    "AuraFlow": ModelFamily("AuraFlow", LOGIT_NORMAL_DENSITY, "auraflow", "auraflow"),
    "HunyuanVideo": ModelFamily(
        "HunyuanVideo",
        NoiseLevelDensity("logit-normal", 0.0, 1.0, 7.0),
        "hunyuan_video",
        "hunyuan-video",
        guidance=1.0,
        guidance_distilled=True,
    ),
    "WAN21_T2V": ModelFamily("Wan", NoiseLevelDensity("logit-normal", 0.0, 1.0, 3.0), "wan", "wan"),
}
UNKNOWN_FAMILY = ModelFamily("unknown family", LOGIT_NORMAL_DENSITY, "unknown", "unknown", known=False)


def find_model_family(model_config) -> ModelFamily:
    """The row of the host's configuration class or its nearest ancestor; the generic row (which is checked at run time)
    otherwise."""
    for cls in type(model_config).__mro__:
        if cls.__name__ in MODEL_FAMILIES:
            return MODEL_FAMILIES[cls.__name__]
    return UNKNOWN_FAMILY
