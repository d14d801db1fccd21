"""One checkpoint file of ComfyUI's layout as diffusers and transformers modules; sizes are read off the tensors,
nothing is fetched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MODEL_PREFIX, TEXT_ENCODERS_PREFIX, VAE_PREFIX = "model.diffusion_model.", "text_encoders.", "first_stage_model."
CONVERT_REMEDY = (
    "Convert it to a diffusers folder (diffusers' pipeline.save_pretrained) and give that folder, or train inside "
    "ComfyUI."
)


def tensors_with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it, fp32."""
    return {k[len(prefix) :]: v.float() for k, v in tensors.items() if k.startswith(prefix)}


def is_sd3_checkpoint(tensors) -> bool:
    return f"{MODEL_PREFIX}joint_blocks.0.x_block.attn.qkv.weight" in tensors


def count_numbered_parts(tensors, prefix: str) -> int:
    """How many numbered parts follow a prefix, such as joint_blocks."""
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in tensors if k.startswith(prefix))


def build_frozen_module(make, tensors, what):
    """The module that make() builds, with these weights, frozen. It is built without memory, which saves the time of
    inventing weights.

    Raises ValueError naming what is missing or unknown."""
    with torch.device("meta"):
        module = make()
    missing, unknown = module.load_state_dict(tensors, strict=False, assign=True)
    if missing or unknown:
        some = ", ".join([*missing, *unknown][:4])
        counts = f"{len(missing)} tensors missing, {len(unknown)} unknown"
        raise ValueError(f"The {what} of this checkpoint does not fit: {counts} ({some}). {CONVERT_REMEDY}")
    for part_ in module.modules():
        if "position_ids" in part_._buffers:  # CLIP's own numbering, which no file needs to hold
            part_.position_ids = torch.arange(part_.position_ids.shape[-1])[None]
    return module.eval().requires_grad_(False)


# -- SD3's transformer -------------------------------------------------------------------------------------------------


def read_sd3_config(t: dict[str, Tensor]) -> dict:
    """SD3Transformer2DModel's arguments. ComfyUI fixes heads = depth and 64 channels a head; diffusers takes both."""
    width, channels, patch, _ = t["x_embedder.proj.weight"].shape
    grid = round(t["pos_embed"].shape[1] ** 0.5)
    norm = next((k for k in t if k.endswith("x_block.attn.ln_q.weight")), None)
    return dict(
        sample_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        out_channels=t["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=count_numbered_parts(t, "joint_blocks."),
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=t["context_embedder.weight"].shape[1],
        caption_projection_dim=t["context_embedder.weight"].shape[0],
        pooled_projection_dim=t["y_embedder.mlp.0.weight"].shape[1],
        pos_embed_max_size=grid,
        dual_attention_layers=tuple(
            i
            for i in range(count_numbered_parts(t, "joint_blocks."))
            if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in t
        ),
        qk_norm="rms_norm" if norm else None,
    )


def load_sd3_transformer(tensors):
    from diffusers import SD3Transformer2DModel  # pyright: ignore[reportPrivateImportUsage]  loaded lazily
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    t = tensors_with_prefix(tensors, MODEL_PREFIX)
    return build_frozen_module(
        lambda: SD3Transformer2DModel(**read_sd3_config(t)),
        convert_sd3_transformer_checkpoint_to_diffusers(dict(t)),
        "transformer",
    )


# -- text encoders -----------------------------------------------------------------------------------------------------


def read_clip_config(t: dict[str, Tensor]) -> dict:
    """CLIPTextConfig's arguments; CLIP-L (width 768) uses quick GELU, the larger OpenCLIP ones GELU."""
    words, width = t["embeddings.token_embedding.weight"].shape
    return dict(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=t["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count_numbered_parts(t, "encoder.layers."),
        num_attention_heads=width // 64,
        max_position_embeddings=t["embeddings.position_embedding.weight"].shape[0],
        hidden_act="quick_gelu" if width == 768 else "gelu",
        projection_dim=width,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1 if width == 768 else 0,
    )


def load_clip_model(tensors, name: str):
    """The CLIP text model `clip_l` or `clip_g` of the file, or None. Pooled states are projected for CLIP-G only, as in
    ComfyUI's SD3."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    t = tensors_with_prefix(tensors, f"{TEXT_ENCODERS_PREFIX}{name}.transformer.")
    if not t:
        return None
    bare = {k.removeprefix("text_model."): v for k, v in t.items() if not k.endswith("position_ids")}
    kind = CLIPTextModelWithProjection if name == "clip_g" else CLIPTextModel
    if kind is CLIPTextModel:
        bare.pop("text_projection.weight", None)
    prefix = clip_key_prefix(kind)
    return build_frozen_module(
        lambda: kind(CLIPTextConfig(**read_clip_config(bare))),
        {add_clip_prefix(k, prefix): v for k, v in bare.items()},
        name,
    )


def clip_key_prefix(kind) -> str:
    """ "text_model." where this version of transformers names CLIP's layers so; version 5 dropped it from
    CLIPTextModel."""
    from transformers import CLIPTextConfig

    with torch.device("meta"):
        names = kind(CLIPTextConfig(num_hidden_layers=1)).state_dict()
    return "text_model." if any(k.startswith("text_model.") for k in names) else ""


def add_clip_prefix(key, prefix):
    return key if key.startswith("text_projection.") else prefix + key


# -- autoencoders ------------------------------------------------------------------------------------------------------


def load_tiny_autoencoder(t: dict[str, Tensor]):
    """TAESD as diffusers' AutoencoderTiny; ComfyUI's decoder counts one more layer, the clamp."""
    from diffusers import AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]  loaded lazily

    encoder = {f"encoder.layers.{k}": v for k, v in tensors_with_prefix(t, "taesd_encoder.").items()}
    decoder = {}
    for key, value in tensors_with_prefix(t, "taesd_decoder.").items():
        index, rest = key.split(".", 1)
        decoder[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    channels = t["taesd_decoder.1.weight"].shape[1]
    return build_frozen_module(lambda: AutoencoderTiny(latent_channels=channels), {**encoder, **decoder}, "autoencoder")


def load_kl_autoencoder(t: dict[str, Tensor]):
    """The autoencoder of SD3 and Flux files: AutoencoderKL without the two 1x1 convolutions around its latent, where
    the file has none."""
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  loaded lazily
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = count_numbered_parts(t, "encoder.down.")
    widths = tuple(t[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels))
    config: dict[str, Any] = dict(
        latent_channels=t["decoder.conv_in.weight"].shape[1],
        block_out_channels=widths,
        layers_per_block=count_numbered_parts(t, "encoder.down.0.block."),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv="quant_conv.weight" in t,
        use_post_quant_conv="post_quant_conv.weight" in t,
    )
    return build_frozen_module(
        lambda: AutoencoderKL(**config), convert_ldm_vae_checkpoint(dict(t), config), "autoencoder"
    )


def load_autoencoder(tensors):
    """(model, is it a tiny one). Raises ValueError for a file without one."""
    t = tensors_with_prefix(tensors, VAE_PREFIX)
    if not t:
        raise ValueError(f"This checkpoint has no VAE inside, so it cannot encode images. {CONVERT_REMEDY}")
    tiny = "taesd_decoder.1.weight" in t
    return (load_tiny_autoencoder(t) if tiny else load_kl_autoencoder(t)), tiny


def read_latent_scaling(tensors, default: tuple[float, float]) -> tuple[float, float]:
    """(scale, shift) of a tiny autoencoder as the file states them."""
    named = [tensors.get(f"{VAE_PREFIX}{k}") for k in ("vae_scale", "vae_shift")]
    scale, shift = (float(v) if isinstance(v, torch.Tensor) else d for v, d in zip(named, default, strict=True))
    return scale, shift
