"""Which model family a MODEL of ComfyUI is."""

from __future__ import annotations

from ...trainers.families import MODEL_FAMILIES, UNKNOWN_FAMILY, ModelFamily

# By the name of ComfyUI's configuration class (comfy/supported_models.py).
FAMILY_KEYS = {
    "SD15": "sd15",
    "SD20": "sd2",
    "SDXL": "sdxl",
    "SD3": "sd3",
    "FluxSchnell": "schnell",
    "Flux": "flux",
    "Chroma": "chroma",
    "ZImage": "zimage",
    "Lumina2": "lumina2",
    "QwenImage": "qwen_image",
    "AuraFlow": "auraflow",
    "HunyuanVideo": "hunyuan_video",
    "WAN21_T2V": "wan",
}


def find_model_family(model_config) -> ModelFamily:
    """The family of the host's configuration class or its nearest ancestor; the generic one (which is checked at run
    time) otherwise."""
    for cls in type(model_config).__mro__:
        if cls.__name__ in FAMILY_KEYS:
            return MODEL_FAMILIES[FAMILY_KEYS[cls.__name__]]
    return UNKNOWN_FAMILY
