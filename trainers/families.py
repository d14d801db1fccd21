"""What a model family needs on top of what a loaded model says of itself: one record each.

Sources: sigma densities and guidance from kohya-ss sd-scripts' and musubi-tuner's training docs, Esser et al. 2024
(SD3) and Black Forest Labs' shift for Flux; the key styles are those that kohya's, ComfyUI's and Forge's loaders share.
"""

from __future__ import annotations

from dataclasses import dataclass

from .diffusion import NoiseLevelDensity

UNIFORM_DENSITY = NoiseLevelDensity("uniform")
LOGIT_NORMAL_DENSITY = NoiseLevelDensity("logit-normal", 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """How a family is trained by default, and what its LoRA files say of it."""

    label: str
    base_version: str  # ss_base_model_version
    architecture: str  # modelspec.architecture
    density: NoiseLevelDensity = LOGIT_NORMAL_DENSITY
    guidance: float | None = None  # what the model is told while it is trained, where it takes guidance as an input
    sampling_guidance: float = 1.0  # classifier-free guidance of the command line's samples; 1 is none
    guidance_distilled: bool = False  # guidance is part of the weights: it draws at guidance 1
    key_style: str = "original"  # 'diffusers' writes lora_unet_down_blocks_..., 'original' the model's own module paths
    is_unet: bool = False
    known: bool = True  # False: the adapters' gradients are checked before the run


def shifted_logit_normal(shift: float | str) -> NoiseLevelDensity:
    return NoiseLevelDensity("logit-normal", 0.0, 1.0, shift)


MODEL_FAMILIES = {
    "sd15": ModelFamily(
        label="Stable Diffusion 1.5",
        base_version="sd_v1",
        architecture="stable-diffusion-v1",
        density=UNIFORM_DENSITY,
        sampling_guidance=7.0,
        key_style="diffusers",
        is_unet=True,
    ),
    "sd2": ModelFamily(
        label="Stable Diffusion 2",
        base_version="sd_v2",
        architecture="stable-diffusion-v2",
        density=UNIFORM_DENSITY,
        sampling_guidance=7.0,
        key_style="diffusers",
        is_unet=True,
    ),
    "sdxl": ModelFamily(
        label="SDXL",
        base_version="sdxl_base_v1-0",
        architecture="stable-diffusion-xl-v1-base",
        density=UNIFORM_DENSITY,
        sampling_guidance=6.0,
        is_unet=True,
    ),
    "sd3": ModelFamily(
        label="Stable Diffusion 3", base_version="sd3_m", architecture="stable-diffusion-3", sampling_guidance=4.0
    ),
    "schnell": ModelFamily(
        label="Flux schnell",
        base_version="flux1",
        architecture="flux-1-schnell",
        sampling_guidance=1.0,
        guidance_distilled=True,
    ),
    "flux": ModelFamily(
        label="Flux",
        base_version="flux1",
        architecture="flux-1-dev",
        density=shifted_logit_normal("resolution"),
        guidance=1.0,
        sampling_guidance=1.0,
        guidance_distilled=True,
    ),
    "chroma": ModelFamily(label="Chroma", base_version="chroma", architecture="chroma", guidance=0.0),
    "zimage": ModelFamily(
        label="Z-Image", base_version="zimage", architecture="z-image", density=shifted_logit_normal(2.0)
    ),
    "lumina2": ModelFamily(label="Lumina 2", base_version="lumina2", architecture="lumina-2"),
    "qwen_image": ModelFamily(
        label="Qwen-Image", base_version="qwen_image", architecture="qwen-image", density=shifted_logit_normal(2.2)
    ),
    "auraflow": ModelFamily(label="AuraFlow", base_version="auraflow", architecture="auraflow"),
    "hunyuan_video": ModelFamily(
        label="HunyuanVideo",
        base_version="hunyuan_video",
        architecture="hunyuan-video",
        density=shifted_logit_normal(7.0),
        guidance=1.0,
        guidance_distilled=True,
    ),
    "wan": ModelFamily(label="Wan", base_version="wan", architecture="wan", density=shifted_logit_normal(3.0)),
}
UNKNOWN_FAMILY = ModelFamily(label="unknown family", base_version="unknown", architecture="unknown", known=False)
