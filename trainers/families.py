"""What a model family needs on top of what a loaded model says of itself: one record each.

Sources: sigma densities and guidance from kohya-ss sd-scripts' and musubi-tuner's training docs (as of 2026-06), Esser
et al. 2024 (SD3) and Black Forest Labs' shift for Flux, or as said at a row; the key styles are those that kohya's,
ComfyUI's and Forge's loaders share. Base versions and architectures are those that these trainers write, where they
write one. Where no recipe is known, noise levels are logit-normal with the shift that the host samples with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .diffusion import NoiseLevelDensity, TokenShift

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
    few_steps: int = 0  # sampling steps that it is distilled to; 0 for models that draw in many
    key_style: str = "original"  # 'diffusers' writes lora_unet_down_blocks_..., 'original' the model's own module paths
    diffusers: str = ""  # how a LoRA's names begin that diffusers loads; '' where none is known
    is_unet: bool = False
    known: bool = True  # False: the adapters' gradients are checked before the run


def shifted_logit_normal(shift: float | str, tokens: TokenShift = TokenShift(), std: float = 1.0) -> NoiseLevelDensity:  # noqa: B008
    return NoiseLevelDensity("logit-normal", 0.0, std, shift, tokens)


HOST_SHIFT = shifted_logit_normal("model")
# FLUX.2's latents are one token per cell (Black Forest Labs; musubi-tuner's flux2_shift).
FLUX_2 = shifted_logit_normal("resolution", TokenShift(patch=1))
# Krea 2 samples with mu from 0.5 at 256 px to 1.15 at 1280 px (musubi-tuner's krea2_shift): 2.5 at 1024 px.
KREA_2 = shifted_logit_normal("resolution", TokenShift(high=(6400, 1.15)))
# LTX-Video's scheduler: mu from 0.95 at 1024 tokens to 2.05 at 4096, every frame counted (Lightricks; ComfyUI's own
# ModelSamplingLTXV). Capped at 2.37, with which ComfyUI samples any length.
LTX = shifted_logit_normal("resolution", TokenShift(1, (1024, 0.95), (4096, 2.05), 2.37, frames=True))
# Ideogram 4: logit-normal of width 1.5 whose mean is half the logarithm of the pixels over 512 x 512 (musubi-tuner's
# ideogram4_shift); its tokens are 16 px, 1024 of them at 512 px, and a mean of mu is a shift of exp(mu).
IDEOGRAM_4 = shifted_logit_normal(
    "resolution", TokenShift(1, (1024, 0.0), (4096, 0.6931471805599453), logarithmic=True), std=1.5
)


# Noise levels of which each of two experts draws: Wan 2.2's A14B models hand over at a level of 0.875 (text to video)
# and 0.9 (image to video), as Wan-Video's wan/configs (boundary) say. Each is trained on its own side.
WHOLE_RANGE = "whole range"
EXPERT_RANGES = {
    WHOLE_RANGE: (0.0, 1.0),
    "Wan 2.2 text to video, high noise": (0.875, 1.0),
    "Wan 2.2 text to video, low noise": (0.0, 0.875),
    "Wan 2.2 image to video, high noise": (0.9, 1.0),
    "Wan 2.2 image to video, low noise": (0.0, 0.9),
}


MODEL_FAMILIES = {
    "sd15": ModelFamily(
        label="Stable Diffusion 1.5",
        base_version="sd_v1",
        architecture="stable-diffusion-v1",
        density=UNIFORM_DENSITY,
        sampling_guidance=7.0,
        key_style="diffusers",
        is_unet=True,
        diffusers="unet",
    ),
    "sd2": ModelFamily(
        label="Stable Diffusion 2",
        base_version="sd_v2",
        architecture="stable-diffusion-v2",
        density=UNIFORM_DENSITY,
        sampling_guidance=7.0,
        key_style="diffusers",
        is_unet=True,
        diffusers="unet",
    ),
    "sdxl": ModelFamily(
        label="SDXL",
        base_version="sdxl_base_v1-0",
        architecture="stable-diffusion-xl-v1-base",
        density=UNIFORM_DENSITY,
        sampling_guidance=6.0,
        is_unet=True,
        diffusers="unet",
    ),
    "sd3": ModelFamily(
        label="Stable Diffusion 3",
        base_version="sd3_m",
        architecture="stable-diffusion-3",
        sampling_guidance=4.0,
        diffusers="transformer",
    ),
    "schnell": ModelFamily(
        label="Flux schnell",
        base_version="flux1",
        architecture="flux-1-schnell",
        sampling_guidance=1.0,
        guidance_distilled=True,
        few_steps=4,
        diffusers="transformer",
    ),
    "flux": ModelFamily(
        label="Flux",
        base_version="flux1",
        architecture="flux-1-dev",
        density=shifted_logit_normal("resolution"),
        guidance=1.0,
        sampling_guidance=1.0,
        guidance_distilled=True,
        diffusers="transformer",
    ),
    "chroma": ModelFamily(
        label="Chroma", base_version="chroma", architecture="chroma", guidance=0.0, diffusers="transformer"
    ),
    "zimage": ModelFamily(
        label="Z-Image",
        base_version="zimage",
        architecture="z-image",
        density=shifted_logit_normal(2.0),
        diffusers="transformer",
    ),
    "lumina2": ModelFamily(label="Lumina 2", base_version="lumina2", architecture="lumina-2"),
    "qwen_image": ModelFamily(
        label="Qwen-Image",
        base_version="qwen_image",
        architecture="qwen-image",
        density=shifted_logit_normal(2.2),
        diffusers="transformer",
    ),
    "auraflow": ModelFamily(
        label="AuraFlow", base_version="auraflow", architecture="auraflow", diffusers="transformer"
    ),
    "hunyuan_video": ModelFamily(
        label="HunyuanVideo",
        base_version="hunyuan_video",
        architecture="hunyuan-video",
        density=shifted_logit_normal(7.0),
        guidance=1.0,
        guidance_distilled=True,
    ),
    "wan": ModelFamily(
        label="Wan",
        base_version="wan",
        architecture="wan",
        density=shifted_logit_normal(3.0),
        diffusers="diffusion_model",
    ),
    # sd-scripts: sigmoid without a shift
    "anima": ModelFamily(label="Anima", base_version="anima", architecture="anima", sampling_guidance=4.0),
    "flux2": ModelFamily(
        label="Flux.2",
        base_version="flux_2_dev",
        architecture="Flux.2-dev",
        density=FLUX_2,
        guidance=1.0,
        guidance_distilled=True,
        diffusers="transformer",
    ),
    # The base models draw with guidance 4. The distilled ones look the same from inside: a preview's guidance is then
    # set to 1 by hand.
    "flux2_klein_4b": ModelFamily(
        label="Flux.2 Klein 4B",
        base_version="flux_2_klein_4b",
        architecture="Flux.2-klein-4b",
        density=FLUX_2,
        diffusers="transformer",
    ),
    "flux2_klein_9b": ModelFamily(
        label="Flux.2 Klein 9B",
        base_version="flux_2_klein_9b",
        architecture="Flux.2-klein-9b",
        density=FLUX_2,
        diffusers="transformer",
    ),
    "krea2": ModelFamily(
        label="Krea 2", base_version="krea2", architecture="Krea-2", density=KREA_2, diffusers="transformer"
    ),
    "hunyuan_video_15": ModelFamily(
        label="HunyuanVideo 1.5",
        base_version="hunyuan_video_1_5",
        architecture="hunyuan-video-1.5",
        density=shifted_logit_normal(2.0),
        guidance=1.0,
        guidance_distilled=True,
    ),
    "hunyuan_image": ModelFamily(
        label="HunyuanImage 2.1",
        base_version="hunyuan-image-2.1",
        architecture="hunyuan-image-2.1",
        density=shifted_logit_normal(5.0),
        guidance=1.0,
        guidance_distilled=True,
    ),
    "hunyuan_image_refiner": ModelFamily(
        label="HunyuanImage 2.1 refiner",
        base_version="hunyuan-image-2.1-refiner",
        architecture="hunyuan-image-2.1-refiner",
        density=HOST_SHIFT,
        guidance=1.0,
        guidance_distilled=True,
    ),
    "kandinsky5": ModelFamily(
        label="Kandinsky 5", base_version="kandinsky5", architecture="Kandinsky-5", density=shifted_logit_normal(5.0)
    ),
    # musubi-tuner's recipe is for the video models; this one has another shift in the host
    "kandinsky5_image": ModelFamily(
        label="Kandinsky 5 Image", base_version="kandinsky5", architecture="Kandinsky-5", density=HOST_SHIFT
    ),
    "ltxv": ModelFamily(
        label="LTX-Video", base_version="ltxv", architecture="ltx-video", density=LTX, diffusers="diffusion_model"
    ),
    "ltxav": ModelFamily(label="LTX-2", base_version="ltx2", architecture="ltx-2", density=LTX),
    "ideogram4": ModelFamily(
        label="Ideogram 4", base_version="ideogram4", architecture="Ideogram-4", density=IDEOGRAM_4
    ),
    # musubi-tuner, after HiDream's paper: uniform
    "hidream_o1": ModelFamily(
        label="HiDream-O1",
        base_version="hidream_o1_image",
        architecture="HiDream-O1-Image",
        density=UNIFORM_DENSITY,
    ),
    # HiDream-I1-Full's own scheduler; the host samples it without a shift
    "hidream": ModelFamily(
        label="HiDream-I1", base_version="hidream_i1", architecture="hidream-i1", density=shifted_logit_normal(3.0)
    ),
    # ln(sigma) is normal (NVIDIA 2025, Cosmos), and so t = sigma / (1 + sigma) logit-normal
    "cosmos_predict2": ModelFamily(
        label="Cosmos Predict2", base_version="cosmos_predict2", architecture="cosmos-predict2"
    ),
    # trained on 1000 discrete timesteps, evenly (Chen et al. 2023, Li et al. 2024, Yang et al. 2024)
    "pixart_alpha": ModelFamily(
        label="PixArt-alpha", base_version="pixart_alpha", architecture="pixart-alpha", density=UNIFORM_DENSITY
    ),
    "pixart_sigma": ModelFamily(
        label="PixArt-sigma", base_version="pixart_sigma", architecture="pixart-sigma", density=UNIFORM_DENSITY
    ),
    "hunyuan_dit": ModelFamily(
        label="HunyuanDiT", base_version="hunyuan_dit", architecture="hunyuan-dit", density=UNIFORM_DENSITY
    ),
    "cogvideox": ModelFamily(
        label="CogVideoX", base_version="cogvideox", architecture="cogvideox", density=UNIFORM_DENSITY
    ),
}
MODEL_FAMILIES |= {  # SDXL's recipe, with fewer layers
    key: replace(MODEL_FAMILIES["sdxl"], label=label, base_version=name.replace("-", "_"), architecture=name)
    for key, label, name in (
        ("ssd_1b", "SSD-1B", "ssd-1b"),
        ("segmind_vega", "Segmind Vega", "segmind-vega"),
        ("koala_700m", "KOALA 700M", "koala-700m"),
        ("koala_1b", "KOALA 1B", "koala-1b"),
    )
}


def unlisted_family(class_name: str, flow: bool = True) -> ModelFamily:
    """A family without a row, named after the host's class: the host's own shift for flow models, even noise levels
    otherwise."""
    name = class_name.replace("_", "-").lower()
    density = HOST_SHIFT if flow else UNIFORM_DENSITY
    return ModelFamily(
        label=class_name, base_version=name.replace("-", "_"), architecture=name, density=density, known=False
    )
