"""What a MODEL is given beside a caption, and which MODELs cannot be trained at all.

Decided by the host's own class (comfy/model_base.py) and by the channels that its network takes beside the latent's.
Where a conditioning lacks one of these, the host puts in zeros or nothing, and the training would be that of another
model. `tests/comfy/test_conditions.py` holds the tables against all classes of the host.
"""

from __future__ import annotations

from collections.abc import Iterable

import comfy.model_base
import torch

from ...trainers.data.encoded import CONCAT_IMAGE as IMAGE
from ...trainers.data.encoded import CONCAT_MASK as MASK
from .denoiser import joins_references_to_noise, place_references

# Key of a conditioning -> what it is, for a person. The keys are the host's own.
CONDITION_NAMES = {
    IMAGE: "its image (the first frame, or the image to edit, to fill or to follow)",
    MASK: "the mask of what it paints or which frames it makes",
    "clip_vision_output": "its image as CLIP vision sees it",
    "unclip_conditioning": "an image as CLIP vision sees it",
    "concat_image": "the small image that it enlarges",
    "stable_cascade_prior": "the latent of stage C",
    "lq_latent": "the latent of the image that it refines",
    "condition": "the clip that it restores",
    "reference_latents": "the latent of a reference image",
    "vace_frames": "the frames that it follows",
    "camera_conditions": "the path of its camera",
    "audio_embed": "the sound that it follows",
    "pose_video_latent": "the latent of the poses that it follows",
    "driving_mask_28ch": "the masks of who moves",
    "embeds": "the embedding of an image",
}
# By the host's class: what it is given beside what its input channels show. An empty tuple: nothing.
CLASS_CONDITIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        "ACEStep ACEStep15 Anima AuraFlow BaseModel Boogu Chroma ChromaRadiance CogVideoX CosmosPredict2 CosmosVideo "
        "ErnieImage Flux Flux2 GenmoMochi HiDream HiDreamO1 Hunyuan3Dv2 Hunyuan3Dv2_1 HunyuanDiT HunyuanImage21 "
        "HunyuanImage21Refiner HunyuanVideo HunyuanVideo15 HunyuanVideo15_SR_Distilled HunyuanVideoI2V "
        "HunyuanVideoSkyreelsI2V Ideogram4 JoyImage Kandinsky5 Kandinsky5Image Krea2 LTXAV LTXV Lens LongCatImage "
        "Lumina2 MageFlow MiniMaxH3 MiniMaxMusic3 Omnigen2 PixArt PixelDiTT2I QwenImage SD15_instructpix2pix SD3 SDXL "
        "SDXLRefiner SDXL_instructpix2pix StableAudio1 StableAudio3 StableCascade_C WAN21 WAN21_CausalAR WAN22 "
        "ZImagePixelSpace".split(),
        (),
    ),
    "PiD": ("lq_latent",),
    "SD21UNCLIP": ("unclip_conditioning",),
    "SD_X4Upscaler": ("concat_image",),
    "SeedVR2": ("condition",),
    "StableCascade_B": ("stable_cascade_prior",),
    "Stable_Zero123": (IMAGE,),
    "Trellis2": ("embeds",),
    "TripoSplat": ("reference_latents",),
    "WAN21_Camera": ("camera_conditions",),
    "WAN21_HuMo": ("audio_embed",),
    "WAN21_SCAIL": ("reference_latents", "pose_video_latent"),
    "WAN21_SCAIL2": ("reference_latents", "pose_video_latent", "driving_mask_28ch"),
    "WAN21_Vace": ("vace_frames",),
    "WAN22_Animate": ("pose_video_latent",),
    "WAN22_S2V": ("audio_embed",),
    "WAN22_WanDancer": ("audio_embed",),
    "WAN_Animate2": ("pose_video_latent",),
}
# Their extra channels may be empty: the same checkpoint makes videos and sounds from text alone, and then the host's
# zeros are what it was trained with. HuMo's are replaced by the host, whatever the conditioning holds.
OPTIONAL_CHANNELS = {"HunyuanVideo15", "Kandinsky5", "StableAudio3", "WAN21_HuMo"}
FRAMES_IN_A_BATCH = "it makes the frames of one clip as a batch of images, and a batch here is of separate images"
STEPS_FROM_IMAGE = (
    "it goes from an image to its result with the image in the place of noise, and has no noise to train on"
)
NO_DIFFUSION = "it reads images and does not draw them"
REFUSED_CLASSES = {
    **dict.fromkeys(("SVD_img2vid", "SV3D_u", "SV3D_p"), FRAMES_IN_A_BATCH),
    **dict.fromkeys(("Lotus", "WAN21_FlowRVS"), STEPS_FROM_IMAGE),
    **dict.fromkeys(("RT_DETR_v4", "DepthAnything3", "SAM3"), NO_DIFFUSION),
}


def host_class(model) -> type:
    """The class of comfy.model_base that a BaseModel is of, or is made from by another node."""
    return next(cls for cls in type(model).__mro__ if cls.__module__ == comfy.model_base.__name__)


def model_name(model) -> str:
    """As the host's configuration class calls it (comfy/supported_models.py)."""
    return type(model.model_config).__name__


def count_joined_channels(model) -> int:
    """Channels that the host joins to the latent's own at the network's input, asked of the host itself."""
    latent = model.latent_format
    noise = torch.zeros(1, latent.latent_channels, *(1, 2, 2)[-latent.latent_dimensions :])
    joined = model.concat_cond(noise=noise, latent_image=noise, device=noise.device)
    return 0 if joined is None else joined.shape[1]


def channel_conditions(model) -> tuple[str, ...]:
    """What its input channels are for. The host's Flux unfolds a mask to 64 channels, Wan's has 4, others' have 1."""
    name = host_class(model).__name__
    if name in OPTIONAL_CHANNELS:
        return ()
    if joined := set(model.concat_keys):
        images = joined & {"masked_image", "concat_image"}
        return (*((IMAGE,) if images else ()), *((MASK,) if joined - images else ()))
    channels, own = count_joined_channels(model), model.latent_format.latent_channels
    if channels < own:
        return ()
    if name == "HunyuanVideo15_SR_Distilled":  # one tensor holds the first frame, its mask and the small clip
        return (IMAGE,)
    has_mask = channels > own if isinstance(model, comfy.model_base.Flux) else channels % own != 0
    return (IMAGE, MASK) if has_mask else (IMAGE,)


def required_conditions(model) -> tuple[str, ...]:
    """Keys that every conditioning of this BaseModel must have beside its text, in the host's words. A class that this
    Trainyard does not know needs what its input channels show."""
    keys = [*channel_conditions(model), *CLASS_CONDITIONS.get(host_class(model).__name__, ())]
    if isinstance(model, comfy.model_base.WAN21) and getattr(model.diffusion_model, "img_emb", None) is not None:
        keys.append("clip_vision_output")
    return tuple(dict.fromkeys(keys))


def fills_holes(model) -> bool:
    """Whether this BaseModel paints the white part of a mask, as the host's InpaintModelConditioning tells it. (The
    masks of models that make videos say which frames are given.)"""
    is_of_images = model.latent_format.latent_dimensions == 2
    return is_of_images and set(required_conditions(model)) == {IMAGE, MASK}


def check_holes(model, data):
    """Raises ValueError for an EncodedDataset with inpaint masks where the MODEL has no use for them."""
    if any(item.holes for item in data.items) and not fills_holes(model.model):
        raise ValueError(
            f"The dataset was encoded with inpaint masks, and {model_name(model.model)} takes none: it would be "
            "trained as if they were not there. Load an inpainting model (Flux Fill, SD or SDXL inpainting), or set "
            "inpaint_masks of Encode Dataset to none."
        )


def refusal(model) -> str:
    """Why a BaseModel cannot be trained, or ''."""
    name = host_class(model).__name__
    if name in REFUSED_CLASSES:
        return REFUSED_CLASSES[name]
    if is_mean_flow(model):
        return (
            "it is a mean-flow model: it is told the noise level of the next step, too, and predicts the mean way "
            "between both, which the loss of a single noise level does not teach. Train the model that it was "
            "distilled from, and use that LoRA here"
        )
    if getattr(model, "image_to_video", False) and isinstance(
        model, (comfy.model_base.CosmosVideo, comfy.model_base.CosmosPredict2)
    ):
        return (
            "its first frame stands in the noised clip itself, and Trainyard would put noise on it. Train the model "
            "that makes clips from text"
        )
    return ""


def is_mean_flow(model) -> bool:
    """Whether the network reads `sample_sigmas` (Geng et al. 2025, u(x, t, r)). HunyuanImage's refiner has the layer
    and is told to leave it."""
    has_layer = getattr(model.diffusion_model, "time_r_in", None) is not None
    return has_layer and host_class(model).__name__ != "HunyuanImage21Refiner"


def check_trainable(model):
    """Raises ValueError for a MODEL that no dataset can train."""
    if why := refusal(model.model):
        raise ValueError(f"{model_name(model.model)} cannot be trained: {why}.")


def check_conditions(model, named_conds: Iterable[tuple[str, dict]]):
    """Raises ValueError for the first of these (name, cond) that lacks what the MODEL needs. Loads none of them where
    it needs nothing but text."""
    needed = required_conditions(model.model)
    if not needed:
        return
    advice = "Connect"
    if needed == (IMAGE,) and joins_references_to_noise(model.model):
        advice = "Give every image a control image in Load Dataset; or connect"
    elif fills_holes(model.model):
        advice = "Choose inpaint_masks in Encode Dataset; or connect"
    for name, cond in named_conds:
        cond = place_references(model.model, cond)
        if missing := [key for key in needed if cond.get(key) is None]:
            raise ValueError(
                f"{format_needs(model.model, needed)}, and {name} has no {' and no '.join(missing)}. Trained "
                f"without, it would become another model. {advice} latents and conditioning in place of encoded, "
                "with the conditioning from the node that you draw with this model (such as WanImageToVideo, "
                "HunyuanImageToVideo, InpaintModelConditioning or InstructPixToPixConditioning), one for each latent."
            )


def check_text_is_enough(model):
    """Raises ValueError for a MODEL that needs more than prompts, where there is nothing else."""
    if needed := required_conditions(model.model):
        raise ValueError(
            f"{format_needs(model.model, needed)}, and this node trains on prompts alone. Train LoRA takes it, with "
            "latents and conditioning; or connect a MODEL that draws from text."
        )


def format_needs(model, keys) -> str:
    parts = [f"{CONDITION_NAMES[key]} ({key})" for key in keys]
    return f"{model_name(model)} needs more than a caption: {' and '.join(parts)}"
