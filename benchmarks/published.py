"""Model families at the size in which they were published, as ComfyUI would find them in a checkpoint: configurations,
latents of one image of the usual size, and captions of the usual length.

`PUBLISHED` holds shapes.Shape records; `tokens` counts the caption's tokens."""

from __future__ import annotations

from ..tests.comfy.families import Family, flux, lumina, without
from .shapes import SHAPES, Shape, sd3


def flux2(**changes):
    return dict(
        image_model="flux2", in_channels=128, out_channels=128, patch_size=1, axes_dim=[32, 32, 32, 32], mlp_ratio=3.0, theta=2000,
        global_modulation=True, mlp_silu_act=True, qkv_bias=False, ops_bias=False, default_ref_method="index", ref_index_scale=10.0,
        txt_ids_dims=[3], vec_in_dim=None) | changes  # fmt: skip


def sd35(depth, positions, dual_attention):
    """`positions`: side of the grid of position embeddings; `dual_attention`: so many first blocks attend to the image
    once more."""
    return sd3(depth, 4096, 2048, positions) | dict(qk_norm="rms", x_block_self_attn_layers=list(range(dual_attention)))


def wan(**changes):
    return dict(
        image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True,
        cross_attn_norm=True, eps=1e-6, in_dim=16, out_dim=16) | changes  # fmt: skip


CHROMA = without("guidance_embed", flux(
    image_model="chroma", in_channels=64, out_channels=64, in_dim=64, hidden_dim=5120, out_dim=3072, n_layers=5, vec_in_dim=None,
    hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, context_in_dim=4096))  # fmt: skip
Z_IMAGE = lumina(dim=3840, cap_feat_dim=2560, n_layers=30, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48],
                 axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0,
                 pad_tokens_multiple=32)  # fmt: skip
LUMINA_2 = lumina(dim=2304, cap_feat_dim=2304, n_layers=26, n_heads=24, n_kv_heads=8, axes_dims=[32, 32, 32],
                  ffn_dim_multiplier=4.0)  # fmt: skip
HUNYUAN_VIDEO = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, patch_size=[1, 2, 2], hidden_size=3072, num_heads=24, mlp_ratio=4.0,
    depth=20, depth_single_blocks=40, context_in_dim=4096, vec_in_dim=768, axes_dim=[16, 56, 56], theta=256, qkv_bias=True,
    guidance_embed=True, meanflow=False, meanflow_sum=False, byt5=False, use_cond_type_embedding=False, vision_in_dim=None)  # fmt: skip
HUNYUAN_VIDEO_15 = HUNYUAN_VIDEO | dict(
    in_channels=65, out_channels=32, patch_size=[1, 1, 1], hidden_size=2048, num_heads=16, depth=54, depth_single_blocks=0,
    context_in_dim=3584, vec_in_dim=None, guidance_embed=False, meanflow_sum=True, byt5=True, use_cond_type_embedding=True,
    vision_in_dim=1152)  # fmt: skip
KREA_2 = dict(
    image_model="krea2", features=6144, channels=16, patch=2, layers=28, heads=48, kvheads=12, txtlayers=12, txtdim=2560
)
QWEN_IMAGE = dict(image_model="qwen_image", in_channels=64, num_layers=60)
AURAFLOW = dict(max_seq=9216, cond_seq_dim=2048, n_double_layers=4, n_layers=36, n_heads=12, dim=3072)
ANIMA = dict(
    image_model="anima", in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=2048, num_blocks=28,
    num_heads=16, crossattn_emb_channels=1024, concat_padding_mask=True, max_img_h=240, max_img_w=240, max_frames=128,
    pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30, use_adaln_lora=True,
    adaln_lora_dim=256, extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0,
    rope_t_extrapolation_ratio=1.0)  # fmt: skip
RANK = 16

PUBLISHED = {
    **{name: SHAPES[name, "real"] for name in ("sd15", "sdxl", "sd3", "flux")},
    "chroma": Shape(Family("Chroma", CHROMA, 4096, latent=(16, 128, 128)), RANK, 512, "Chroma at 1024 px"),
    "zimage": Shape(Family("ZImage", Z_IMAGE, 2560, latent=(16, 128, 128)), RANK, 256, "Z-Image at 1024 px"),
    "lumina2": Shape(Family("Lumina2", LUMINA_2, 2304, latent=(16, 128, 128)), RANK, 256, "Lumina 2 at 1024 px"),
    "sd35_medium": Shape(Family("SD3", sd35(24, 384, 13), 4096, 2048, (16, 128, 128)), RANK, 154, "SD3.5 medium at 1024 px"),
    "sd35_large": Shape(Family("SD3", sd35(38, 192, 0), 4096, 2048, (16, 128, 128)), RANK, 154, "SD3.5 large at 1024 px"),
    "qwen": Shape(Family("QwenImage", QWEN_IMAGE, 3584, latent=(16, 1, 128, 128)), RANK, 256, "Qwen-Image at 1024 px"),
    "qwen_edit": Shape(Family("QwenImage", QWEN_IMAGE, 3584, latent=(16, 1, 128, 128)), RANK, 512,
                       "Qwen-Image-Edit at 1024 px, one reference of 1024 px", reference=(16, 1, 128, 128)),
    "krea2": Shape(Family("Krea2", KREA_2, 12 * 2560, latent=(16, 1, 128, 128)), RANK, 256, "Krea 2 at 1024 px"),
    "ernie": Shape(Family("ErnieImage", dict(image_model="ernie"), 3072, latent=(128, 64, 64)), RANK, 256, "Ernie-Image at 1024 px"),
    "flux2": Shape(Family("Flux2", flux2(hidden_size=6144, num_heads=48, depth=8, depth_single_blocks=48, context_in_dim=15360,
                                         guidance_embed=True), 15360, latent=(128, 64, 64)), RANK, 512, "Flux.2 dev at 1024 px"),
    "klein4b": Shape(Family("Flux2", flux2(hidden_size=3072, num_heads=24, depth=5, depth_single_blocks=20, context_in_dim=7680,
                                           guidance_embed=False), 7680, latent=(128, 64, 64)), RANK, 512, "Flux.2 Klein 4B at 1024 px"),
    "klein9b": Shape(Family("Flux2", flux2(hidden_size=4096, num_heads=32, depth=8, depth_single_blocks=24, context_in_dim=12288,
                                           guidance_embed=False), 12288, latent=(128, 64, 64)), RANK, 512, "Flux.2 Klein 9B at 1024 px"),
    "auraflow": Shape(Family("AuraFlow", AURAFLOW, 2048, latent=(4, 128, 128)), RANK, 256, "AuraFlow at 1024 px"),
    "anima": Shape(Family("Anima", ANIMA, 1024, latent=(16, 1, 128, 128)), RANK, 256, "Anima at 1024 px"),
    "hunyuan_video": Shape(Family("HunyuanVideo", HUNYUAN_VIDEO, 4096, 768, (16, 1, 120, 120)), RANK, 256,
                           "HunyuanVideo, one frame of 960 px"),
    "hunyuan_video_1.5": Shape(Family("HunyuanVideo15", HUNYUAN_VIDEO_15, 3584, latent=(32, 1, 60, 60)), RANK, 256,
                               "HunyuanVideo 1.5, one frame of 960 px"),
    "wan_1.3b": Shape(Family("WAN21_T2V", wan(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30), 4096, latent=(16, 1, 104, 60)),
                      RANK, 512, "Wan 2.1 1.3B, one frame of 480 x 832 px"),
    "wan_14b": Shape(Family("WAN21_T2V", wan(dim=5120, num_heads=40, ffn_dim=13824, num_layers=40), 4096, latent=(16, 1, 104, 60)),
                     RANK, 512, "Wan 2.1 / 2.2 14B, one frame of 480 x 832 px"),
    "wan_5b": Shape(Family("WAN22_T2V", wan(dim=3072, num_heads=24, ffn_dim=14336, num_layers=30, in_dim=48, out_dim=48), 4096,
                           latent=(48, 1, 44, 80)), RANK, 512, "Wan 2.2 5B, one frame of 704 x 1280 px"),
}  # fmt: skip
