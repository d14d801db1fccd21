"""What a model family needs on top of what ComfyUI's model says of itself: one short row each.

Sources: sigma densities and guidance from kohya-ss sd-scripts' and musubi-tuner's training docs, Esser et al. 2024 (SD3) and Black
Forest Labs' shift for Flux; the key styles are those that kohya's, ComfyUI's and Forge's loaders share.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...trainers.diffusion import Density

UNIFORM = Density("uniform")
LOGIT_NORMAL = Density("logit-normal", 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Family:
    """`names`: 'diffusers' writes lora_unet_down_blocks_..., 'original' the model's own module paths."""

    label: str
    density: Density
    base: str  # ss_base_model_version
    architecture: str  # modelspec
    guidance: float | None = None
    names: str = "original"
    known: bool = True
    distilled: bool = False  # guidance is part of the weights: it draws at guidance 1


FAMILIES = {
    "SD15": Family("Stable Diffusion 1.5", UNIFORM, "sd_v1", "stable-diffusion-v1", names="diffusers"),
    "SD20": Family("Stable Diffusion 2", UNIFORM, "sd_v2", "stable-diffusion-v2", names="diffusers"),
    "SDXL": Family("SDXL", UNIFORM, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "SD3": Family("Stable Diffusion 3", LOGIT_NORMAL, "sd3_m", "stable-diffusion-3"),
    "FluxSchnell": Family("Flux schnell", Density("logit-normal", 0.0, 1.0, 1.0), "flux1", "flux-1-schnell", distilled=True),
    "Flux": Family("Flux", Density("logit-normal", 0.0, 1.0, "resolution"), "flux1", "flux-1-dev", guidance=1.0, distilled=True),
    "Chroma": Family("Chroma", LOGIT_NORMAL, "chroma", "chroma", guidance=0.0),
    "ZImage": Family("Z-Image", Density("logit-normal", 0.0, 1.0, 2.0), "zimage", "z-image"),
    "Lumina2": Family("Lumina 2", LOGIT_NORMAL, "lumina2", "lumina-2"),
    "QwenImage": Family("Qwen-Image", Density("logit-normal", 0.0, 1.0, 2.2), "qwen_image", "qwen-image"),
    "AuraFlow": Family("AuraFlow", LOGIT_NORMAL, "auraflow", "auraflow"),
    "HunyuanVideo": Family("HunyuanVideo", Density("logit-normal", 0.0, 1.0, 7.0), "hunyuan_video", "hunyuan-video", guidance=1.0, distilled=True),
    "WAN21_T2V": Family("Wan", Density("logit-normal", 0.0, 1.0, 3.0), "wan", "wan"),
}
GENERIC = Family("unknown family", LOGIT_NORMAL, "unknown", "unknown", known=False)


def family_of(model_config) -> Family:
    """The row of the host's configuration class or its nearest ancestor; the generic row (which is checked at run time) otherwise."""
    for cls in type(model_config).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    return GENERIC
