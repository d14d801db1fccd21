"""Further families at toy size: trained for a few steps each by tests/comfy/test_more_families.py, and not run through
every other test as those of tests/comfy/families.py are."""

import torch

from .families import SDXL, TABLE, Family, flux


def changed(name, supported, latent=None, **changes):
    """A relative of a tiny family of tests/comfy/families.py."""
    row = TABLE[name]
    return Family(
        supported, row.config | changes, row.context, row.pooled, latent or row.latent, overrides=dict(row.overrides)
    )


def flux2(**changes):
    return flux(image_model="flux2", in_channels=128, out_channels=128, patch_size=1, axes_dim=[32, 32, 32, 32], mlp_ratio=3.0,
                theta=2000, global_modulation=True, mlp_silu_act=True, qkv_bias=False, ops_bias=False, default_ref_method="index",
                ref_index_scale=10.0, txt_ids_dims=[3], vec_in_dim=None) | changes  # fmt: skip


ONE_FRAME = (16, 1, 8, 8)
PREDICT2 = TABLE["anima"].config | dict(image_model="cosmos_predict2", model_channels=128, in_channels=16)
MORE = {
    "flux2": Family("Flux2", flux2(), 64, latent=(128, 8, 8)),
    "klein": Family("Flux2", flux2(guidance_embed=False), 64, latent=(128, 8, 8)),
    "longcat": Family("LongCatImage", flux(guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2]), 64),
    "fill": changed("flux", "FluxInpaint", in_channels=96),
    "sd15_inpaint": changed("sd15", "SD15", in_channels=9),
    "sdxl_inpaint": changed("sdxl", "SDXL", in_channels=9),
    "krea2": Family("Krea2", dict(image_model="krea2", features=128, tdim=32, txtdim=64, heads=2, kvheads=1, layers=2, txtlayers=2,
                                  txtheads=2, txtkvheads=2), 128, latent=(16, 1, 16, 16)),
    "hunyuan_video_15": changed(
        "hunyuan_video", "HunyuanVideo15", (32, 1, 8, 8), in_channels=65, out_channels=32, patch_size=[1, 1, 1],
        depth_single_blocks=0, vec_in_dim=None, guidance_embed=False, meanflow_sum=True, use_cond_type_embedding=True,
        vision_in_dim=64),
    "hunyuan_image": changed("hunyuan_video", "HunyuanImage21", (64, 8, 8), in_channels=64, out_channels=64, patch_size=[1, 1],
                             axes_dim=[64, 64], vec_in_dim=None, guidance_embed=False),
    "kandinsky5": Family("Kandinsky5", dict(
        image_model="kandinsky5", in_visual_dim=16, out_visual_dim=16, in_text_dim=64, in_text_dim2=32, time_dim=64, model_dim=128,
        ff_dim=256, visual_embed_dim=132, num_text_blocks=1, num_visual_blocks=2), 64, 32, ONE_FRAME),
    "ltxv": Family("LTXV", dict(image_model="ltxv", in_channels=128, cross_attention_dim=64, attention_head_dim=32,
                                num_attention_heads=2, caption_channels=64, num_layers=2), 64, latent=(128, 1, 8, 8)),
    "ideogram4": Family("Ideogram4", dict(image_model="ideogram4", in_channels=128, num_layers=2), 64, latent=(128, 8, 8),
                        overrides=dict(num_attention_heads=2, attention_head_dim=64, intermediate_size=128, adaln_dim=32,
                                       llm_features_dim=64, mrope_section=[12, 10, 10])),
    "predict2": Family("CosmosT2IPredict2", PREDICT2, 64, latent=ONE_FRAME),
    "pixart_alpha": Family("PixArtAlpha", dict(image_model="pixart_alpha", input_size=16, hidden_size=64, depth=2, num_heads=2,
                                               caption_channels=64, micro_condition=False), 64, latent=(4, 64, 64)),
    "pixart_sigma": Family("PixArtSigma", dict(image_model="pixart_sigma", input_size=16, hidden_size=64, depth=2, num_heads=2,
                                               caption_channels=64, micro_condition=False), 64, latent=(4, 64, 64)),
    "cogvideox": Family("CogVideoX_T2V", dict(
        image_model="cogvideox", num_attention_heads=2, attention_head_dim=64, time_embed_dim=32, text_embed_dim=64, num_layers=2,
        use_rotary_positional_embeddings=True), 64, latent=(16, 2, 8, 8)),
    "ernie": Family("ErnieImage", dict(image_model="ernie", hidden_size=128, num_attention_heads=1, num_layers=2,
                                       ffn_hidden_size=256, text_in_dim=64), 64, latent=(128, 8, 8)),
    "lens": Family("Lens", dict(image_model="lens", num_layers=2, num_attention_heads=2, enc_hidden_dim=32,
                                selected_layer_index=(0, 1)), 64, latent=(128, 8, 8)),
    "mage_flow": Family("MageFlow", dict(image_model="mage_flow", num_layers=2, num_attention_heads=1, joint_attention_dim=64),
                        64, latent=(128, 8, 8)),
    "joyimage": Family("JoyImage", dict(image_model="joyimage", hidden_size=128, num_attention_heads=1, text_dim=64, num_layers=2),
                       64, latent=ONE_FRAME),
    "omnigen2": Family("Omnigen2", dict(
        image_model="omnigen2", hidden_size=96, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=32, axes_dim_rope=(16, 16, 16), text_feat_dim=64), 64),
    "ssd1b": Family("SSD1B", SDXL, 64, 1280, (4, 16, 16), overrides=dict(num_heads=-1, num_head_channels=32)),
    "vega": Family("Segmind_Vega", SDXL, 64, 1280, (4, 16, 16), overrides=dict(num_heads=-1, num_head_channels=32)),
    "koala_700m": Family("KOALA_700M", SDXL, 64, 1280, (4, 16, 16), overrides=dict(num_heads=-1, num_head_channels=32)),
    "koala_1b": Family("KOALA_1B", SDXL, 64, 1280, (4, 16, 16), overrides=dict(num_heads=-1, num_head_channels=32)),
    "wan22_5b": changed("wan", "WAN22_T2V", (48, 2, 8, 8), in_dim=48, out_dim=48),
    "wan_i2v": changed("wan", "WAN21_I2V", model_type="i2v", in_dim=36),
}  # fmt: skip

MASK = {"attention_mask": torch.ones(1, 7, dtype=torch.long)}  # as their text encoders give it
PER_BLOCK = {"ltxv"}  # the host overwrites a tensor between its blocks: it trains only with checkpointing per block
WITHOUT_IMAGE = {"wan_i2v"}  # tried without the image or mask that they take: zeros in its place
INPAINTING = ("fill", "sd15_inpaint", "sdxl_inpaint")


def hole(name, seed=0):
    """An image with a hole and its mask, for the conditioning of an inpainting family."""
    rng, (channels, height, width) = torch.Generator().manual_seed(seed), MORE[name].latent
    mask = (torch.rand(1, 1, 8 * height, 8 * width, generator=rng) > 0.5).float()
    return {"concat_latent_image": torch.randn(1, channels, height, width, generator=rng), "concat_mask": mask}


# What the conditioning of a family holds beside the text.
ASKED_FOR = {"ltxv": MASK, "omnigen2": MASK, **{name: hole(name) for name in INPAINTING}}
