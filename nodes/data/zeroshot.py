"""CLIP_VISION and CLIP as one space for zero-shot tags: which text encoder belongs to which image encoder, and its
projected features.

ComfyUI asks a text encoder for token states; its projection into the joint space is often missing from the file, and
the host then leaves that matrix as uninitialised memory. Such a CLIP is refused here, because its words would be drawn
at random.
"""

from __future__ import annotations

import torch
from safetensors import safe_open

from ...trainers.captioners.tags import TaggerSettings
from ...trainers.captioners.zeroshot import ZeroShotTagger, read_vocabulary
from .. import host
from . import image_features

# width of the joint space -> (the host's name of the text encoder, what it is, where it lies with its projection)
CLIP_PARTNERS = {
    768: (
        "clip_l",
        "CLIP-L",
        "model.safetensors of openai/clip-vit-large-patch14 (1.7 GB, Load CLIP and Load CLIP Vision both read it)",
    ),
    1024: ("clip_h", "CLIP-H", "the CLIP of an SD2.1 checkpoint"),
    1280: ("clip_g", "CLIP-bigG", "the CLIP of an SDXL checkpoint"),
}
PROJECTION_KEYS = ("text_projection", "text_projection.weight")  # as OpenCLIP and as transformers name it
PROJECTION_STD_RANGE = (1e-3, 1.0)  # standard deviation of a trained projection lies near width ** -0.5, 0.03 to 0.04


def make_zero_shot_tagger(clip_vision, clip, vocabulary: str, settings=None) -> ZeroShotTagger:
    """A captioner that picks words of the vocabulary. Raises ValueError when the two models are no pair."""
    groups = read_vocabulary(vocabulary)
    encoder = find_partner_encoder(clip_vision, clip)
    name = (
        f"{host.identity.hash_patched_weights(clip_vision.patcher)} {host.identity.hash_patched_weights(clip.patcher)}"
    )
    return ZeroShotTagger(
        lambda images: torch.from_numpy(image_features.encode_image_features(clip_vision, images)),
        lambda texts: encode_text_features(clip, texts, encoder),
        groups,
        settings or TaggerSettings(),
        name,
    )


def encode_text_features(clip, texts, encoder: str) -> torch.Tensor:
    """(N, D), in the joint space; each text is one sentence of at most 75 tokens, the rest is cut off."""
    host.progress.raise_if_interrupted()
    tokens = [clip.tokenize(text, disable_weights=True) for text in texts]
    rows = [[token for token, _ in row[encoder.removeprefix("clip_")][0]] for row in tokens]
    clip.load_model(tokens[0])
    model = getattr(clip.cond_stage_model, encoder)
    model.set_clip_options({"projected_pooled": True, "execution_device": clip.patcher.load_device})
    try:
        with torch.no_grad():
            return model.encode(rows)[1].float().cpu()
    finally:
        model.reset_clip_options()


# -- who belongs to whom -----------------------------------------------------------------------------------------------


def find_partner_encoder(clip_vision, clip) -> str:
    """The name of the text encoder inside `clip` whose words lie in clip_vision's space. Raises ValueError when there
    is none."""
    width = joint_embedding_width(clip_vision)
    encoder, called, where = CLIP_PARTNERS[width]
    model = getattr(clip.cond_stage_model, encoder, None)
    if model is None:
        held = (
            ", ".join(sorted(name for name, part in clip.cond_stage_model.named_children() if part is not None))
            or "none"
        )
        raise ValueError(
            f"The connected CLIP_VISION needs {called} as its partner ({width} numbers a word), and the connected CLIP "
            f"holds {held}. Connect {where}; or another CLIP_VISION: {known_clip_pairs()}."
        )
    if model.transformer.text_projection.weight.shape[0] != width or not has_trained_projection(clip, model, width):
        raise ValueError(
            f"The connected {called} came without its text_projection (checkpoints and the usual clip_l.safetensors "
            f"leave it out), so its words cannot be compared with images. Connect {where}."
        )
    return encoder


def joint_embedding_width(clip_vision) -> int:
    kind = getattr(clip_vision, "model_type", "")
    if kind != "clip_vision_model":
        raise ValueError(
            f"The connected CLIP_VISION is a {kind} model; ComfyUI has no text encoder that belongs to it. These pairs "
            f"do: {known_clip_pairs()}."
        )
    weight = getattr(clip_vision.model.visual_projection, "weight", None)
    if weight is None or weight.shape[0] not in CLIP_PARTNERS:
        width = "no projection" if weight is None else f"{weight.shape[0]} numbers an image"
        raise ValueError(
            f"The connected CLIP_VISION has {width}, and no text encoder here fits that. These pairs do: "
            f"{known_clip_pairs()}."
        )
    return weight.shape[0]


def known_clip_pairs() -> str:
    return "CLIP-ViT-L/14 with CLIP-L, CLIP-ViT-H/14 with the CLIP of SD2.1, CLIP-ViT-bigG/14 with the CLIP of SDXL"


def has_trained_projection(clip, model, width: int) -> bool:
    """Whether the projection is one that was loaded: it stands in the file that the host read, and its values are those
    of a matrix."""
    return has_projection_in_files(clip_source_files(clip), width) is not False and is_plausible_projection(
        model.transformer.text_projection.weight
    )


def clip_source_files(clip) -> list[str]:
    """The files that core's loaders read this CLIP from; none when another node made it."""
    made = getattr(clip.patcher, "cached_patcher_init", None)
    paths = made[1][0] if made and made[1] else []
    return [
        str(path)
        for path in ([paths] if isinstance(paths, str) else paths)
        if str(path).endswith((".safetensors", ".sft"))
    ]


def has_projection_in_files(paths: list[str], width: int) -> bool | None:
    """Whether one of the files holds a projection of this width; None without files to ask."""
    found = None
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(PROJECTION_KEYS)]
            found = found or any(file.get_slice(name).get_shape() == [width, width] for name in names)
    return found


def is_plausible_projection(weight: torch.Tensor) -> bool:
    """False for what uninitialised memory and placeholders look like: not finite, empty, identity, of another size by
    magnitudes."""
    values = weight.detach().float().cpu()
    low, high = PROJECTION_STD_RANGE
    if not values.isfinite().all() or not low < float(values.std()) < high:
        return False
    return bool((values - torch.diag(values.diagonal())).abs().max() > 0)
