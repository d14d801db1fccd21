"""Every model family of ComfyUI at toy size, without a file: the host's own classes, latent formats and noise
schedules.

    model = make("flux")                       # comfy.model_patcher.ModelPatcher with 0.1-6 M seeded parameters
    positive = cond("flux", seed=1)            # CONDITIONING: [[cross attention (1, T, D), {"pooled_output": ...}]]
    latent = torch.randn(latent_shape("flux"))

Only widths and depths are small. Transformers have two blocks of each kind, because a wrong in-place residual
shows in the gradients of a second block only.
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Family:
    """`config` is what ComfyUI's model detection would have found in a checkpoint of this family."""

    supported: str  # name of the class in comfy.supported_models
    config: dict
    context: int  # width of the text embedding
    pooled: int = 0  # width of the pooled text embedding, 0: the family has none
    latent: tuple = (16, 16, 16)  # (C, H, W), or (C, T, H, W) for video
    hints: dict = field(default_factory=dict)  # tensors of a checkpoint that change its prediction type
    overrides: dict = field(default_factory=dict)  # of what the class adds to the config by itself


def unet(**changes):
    return dict(image_size=32, in_channels=4, out_channels=4, use_checkpoint=False, use_spatial_transformer=True, legacy=False,
                use_temporal_resblock=False, use_temporal_attention=False, adm_in_channels=None) | changes  # fmt: skip


def flux(**changes):
    return dict(image_model="flux", in_channels=16, out_channels=16, patch_size=2, hidden_size=128, num_heads=1, mlp_ratio=4.0, depth=2,
                depth_single_blocks=2, context_in_dim=64, vec_in_dim=32, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, txt_ids_dims=[],
                guidance_embed=True) | changes  # fmt: skip


def lumina(**changes):
    return dict(image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=64, n_layers=2, n_refiner_layers=2, qk_norm=True,
                n_heads=2, n_kv_heads=1, axes_dims=[16, 16, 16], axes_lens=[300, 512, 512], rope_theta=10000.0,
                ffn_dim_multiplier=1.0) | changes  # fmt: skip


def without(name, config):
    return {key: value for key, value in config.items() if key != name}


TWO_LEVELS = unet(model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2], transformer_depth=[1, 1],
                  transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, context_dim=64)  # fmt: skip
SD1 = TWO_LEVELS | dict(use_linear_in_transformer=False)
SD2 = TWO_LEVELS | dict(use_linear_in_transformer=True)
SDXL = TWO_LEVELS | dict(use_linear_in_transformer=True, transformer_depth=[0, 2], transformer_depth_output=[2, 2, 0, 0],
                         transformer_depth_middle=2, adm_in_channels=1280 + 6 * 256, num_classes="sequential")  # fmt: skip
HEADS_OF_32 = {"num_heads": -1, "num_head_channels": 32}
SD2_V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # a spread above 0.09 marks a v-prediction model

TABLE = {
    "sd15": Family("SD15", SD1, 64, latent=(4, 16, 16), overrides={"num_heads": 2, "num_head_channels": -1}),
    "sd2_v": Family("SD20", SD2, 64, latent=(4, 16, 16), overrides=HEADS_OF_32, hints={SD2_V_BIAS: torch.tensor([-0.5, 0.5])}),
    "sdxl": Family("SDXL", SDXL, 64, 1280, (4, 16, 16), overrides=HEADS_OF_32),
    "sdxl_v": Family("SDXL", SDXL, 64, 1280, (4, 16, 16), {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, HEADS_OF_32),
    "sd3": Family("SD3", dict(
        in_channels=16, out_channels=16, patch_size=2, depth=2, input_size=None, adm_in_channels=32, num_patches=1024,
        pos_embed_max_size=32, pos_embed_scaling_factor=None,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}), 64, 32),
    "flux": Family("Flux", flux(), 64, 32),
    "schnell": Family("FluxSchnell", flux(guidance_embed=False), 64, 32),
    "chroma": Family("Chroma", without("guidance_embed", flux(
        image_model="chroma", in_channels=64, out_channels=64, in_dim=64, hidden_dim=64, out_dim=128, n_layers=2, vec_in_dim=None)), 64),
    "lumina2": Family("Lumina2", lumina(), 64),
    "zimage": Family("ZImage", lumina(
        dim=288, n_heads=3, n_kv_heads=3, axes_dims=[32, 32, 32], axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8 / 3,
        z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32), 64),
    "qwen": Family("QwenImage", dict(
        image_model="qwen_image", patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(8, 12, 12)), 64, latent=(16, 1, 16, 16)),
    "auraflow": Family("AuraFlow", dict(
        max_seq=64, cond_seq_dim=64, n_double_layers=2, n_layers=4, n_heads=2, dim=128), 64, latent=(4, 16, 16)),
    "hunyuan_video": Family("HunyuanVideo", dict(
        image_model="hunyuan_video", in_channels=16, out_channels=16, patch_size=[1, 2, 2], hidden_size=128, num_heads=1, mlp_ratio=4.0,
        depth=2, depth_single_blocks=2, context_in_dim=64, vec_in_dim=32, axes_dim=[16, 56, 56], theta=256, qkv_bias=True,
        guidance_embed=True, meanflow=False, meanflow_sum=False, byt5=False, use_cond_type_embedding=False, vision_in_dim=None),
        64, 32, (16, 2, 8, 8)),
    "wan": Family("WAN21_T2V", dict(
        image_model="wan2.1", model_type="t2v", dim=128, num_heads=1, ffn_dim=256, num_layers=2, patch_size=(1, 2, 2), freq_dim=256,
        window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6, text_dim=64, text_len=512, in_dim=16, out_dim=16),
        64, latent=(16, 2, 8, 8)),
    "anima": Family("Anima", dict(
        image_model="anima", in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=128, num_blocks=2,
        num_heads=1, crossattn_emb_channels=64, concat_padding_mask=True, max_img_h=240, max_img_w=240, max_frames=128,
        pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30, use_adaln_lora=True,
        adaln_lora_dim=16, extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0,
        rope_t_extrapolation_ratio=1.0), 64, latent=(16, 1, 16, 16)),
}  # fmt: skip
FAMILIES = list(TABLE)


def make(family, dtype=torch.float32, seed=0, inference=False):
    """ComfyUI's ModelPatcher of a family, with weights drawn from a seed. `inference`: made under inference mode, as
    loader nodes do."""
    from comfy import model_management
    from comfy.model_patcher import CoreModelPatcher

    with torch.inference_mode(inference):
        model = base_model(TABLE[family], dtype)
        fill(model.diffusion_model, seed)
    load, offload = model_management.get_torch_device(), model_management.unet_offload_device()
    patcher = CoreModelPatcher(model, load_device=load, offload_device=offload)
    patcher.cached_patcher_init = (remake, (family, dtype, seed, inference))  # what clone(force_deepcopy=True) calls
    return patcher


def remake(family, dtype, seed, inference, disable_dynamic=False):
    return make(family, dtype, seed, inference)


def base_model(row, dtype):
    """comfy.model_base.BaseModel with uninitialised weights of the given dtype."""
    from comfy import supported_models

    config = getattr(supported_models, row.supported)(dict(row.config))
    config.unet_config.update(row.overrides)
    config.set_inference_dtype(dtype, None)
    model = config.get_model(dict(row.hints), "", device=torch.device("cpu")).eval()
    if hasattr(model.diffusion_model, "llm_adapter"):
        shrink_adapter(model, row.context, dtype)
    return model


def shrink_adapter(model, width, dtype):
    """Anima's text adapter in two narrow layers: its 135 M parameters are fixed in the host's code."""
    from comfy import ops

    adapter = type(model.diffusion_model.llm_adapter)
    model.diffusion_model.llm_adapter = adapter(width, width, width, num_layers=2, num_heads=2, dtype=dtype, device=torch.device("cpu"),
                                                operations=ops.disable_weight_init).eval()  # fmt: skip


def fill(module, seed):
    """Draws every parameter, and every buffer that holds no values yet (the positions of SD3), at a scale that keeps
    activations sane."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
            if isinstance(tensor, torch.nn.Parameter) or name.endswith("pos_embed"):
                tensor.copy_(draw(name, tensor.shape, rng))


def draw(name, shape, rng):
    """Matrices with variance 1/fan-in, norm weights about 1, biases about 0."""
    values = torch.randn(shape, generator=rng)
    if len(shape) >= 2:
        return values / math.sqrt(math.prod(shape[1:]))
    return 1 + values * 0.05 if name.endswith(("weight", "scale")) else values * 0.05


def latent_shape(family, batch=1):
    """(B, C, H, W), or (B, C, T, H, W) for families whose latents have time."""
    return (batch, *TABLE[family].latent)


def cond(family, seed=0, tokens=7):
    """One caption as CONDITIONING, as CLIPTextEncode would give it."""
    row, rng = TABLE[family], torch.Generator().manual_seed(seed)
    cross = torch.randn(1, tokens, row.context, generator=rng) * 0.5
    rest = {"pooled_output": torch.randn(1, row.pooled, generator=rng) * 0.5} if row.pooled else {}
    if family == "anima":  # its text encoder also hands over T5 tokens, (T,) without a batch axis
        rest |= {"t5xxl_ids": torch.randint(0, 32128, (tokens,), generator=rng), "t5xxl_weights": torch.ones(tokens)}
    return [[cross, rest]]
