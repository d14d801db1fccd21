"""Further families at toy size: trained for a few steps each by tests/comfy/test_more_families.py, and not run through
every other test as those of tests/comfy/families.py are.

    cond.update(conditions_of("wan_vace", seed=1))    # what the host's nodes put beside a caption
"""

import torch

from .families import HEADS_OF_32, SD1, SD2, SDXL, TABLE, Family, flux


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


def seconds(*names):
    """Tensors of a checkpoint of Stable Audio: how its length becomes a token."""
    rng, sizes = torch.Generator().manual_seed(0), {"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}
    return {f"conditioner.conditioners.seconds_{name}.embedder.embedding.{key}": torch.randn(size, generator=rng) / 16
            for name in names for key, size in sizes.items()}  # fmt: skip


ONE_LEVEL = dict(num_res_blocks=[1], channel_mult=[1], transformer_depth=[1], transformer_depth_output=[1, 1])
SMALL_SD1, SMALL_SD2, SMALL_SDXL = (whole | ONE_LEVEL for whole in (SD1, SD2, SDXL | dict(transformer_depth_middle=1)))
ONE_FRAME = (16, 1, 8, 8)
PIXELDIT = dict(image_model="pixeldit_t2i", num_groups=2, hidden_size=64, pixel_hidden_size=8, pixel_attn_hidden_size=32,
                pixel_num_groups=2, patch_depth=3, pixel_depth=2, patch_size=4, txt_embed_dim=64)  # fmt: skip
KANDINSKY_5 = dict(image_model="kandinsky5", in_visual_dim=16, out_visual_dim=16, in_text_dim=64, in_text_dim2=32, time_dim=64,
                   model_dim=128, ff_dim=256, visual_embed_dim=132, num_text_blocks=1, num_visual_blocks=2)  # fmt: skip
COGVIDEOX = dict(image_model="cogvideox", num_attention_heads=2, attention_head_dim=64, time_embed_dim=32, text_embed_dim=64,
                 num_layers=2, use_rotary_positional_embeddings=True)  # fmt: skip
SOUND = dict(audio_model="dit1.0", io_channels=64, embed_dim=128, cond_token_dim=768, global_cond_dim=1536, project_cond_tokens=True,
             depth=2, num_heads=2, input_concat_dim=0, timestep_features_type="learned")  # fmt: skip
HYDIT = dict(image_model="hydit", depth=4, hidden_size=64, num_heads=2, text_states_dim=64, text_states_dim_t5=48, text_len=7,
             text_len_t5=5)  # fmt: skip
HUNYUAN_3D = dict(image_model="hunyuan3d2", in_channels=64, context_in_dim=64, hidden_size=64, mlp_ratio=4.0, num_heads=2, depth=2,
                  depth_single_blocks=2, qkv_bias=True, guidance_embed=False)  # fmt: skip
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
    "kandinsky5": Family("Kandinsky5", KANDINSKY_5, 64, 32, ONE_FRAME),
    "ltxv": Family("LTXV", dict(image_model="ltxv", in_channels=128, cross_attention_dim=64, attention_head_dim=32,
                                num_attention_heads=2, caption_channels=64, num_layers=2), 64, latent=(128, 2, 4, 4)),
    "pixeldit": Family("PixelDiTT2I", PIXELDIT, 64, latent=(3, 16, 16)),
    "ideogram4": Family("Ideogram4", dict(image_model="ideogram4", in_channels=128, num_layers=2), 64, latent=(128, 8, 8),
                        overrides=dict(num_attention_heads=2, attention_head_dim=64, intermediate_size=128, adaln_dim=32,
                                       llm_features_dim=64, mrope_section=[12, 10, 10])),
    "predict2": Family("CosmosT2IPredict2", PREDICT2, 64, latent=ONE_FRAME),
    "pixart_alpha": Family("PixArtAlpha", dict(image_model="pixart_alpha", input_size=16, hidden_size=64, depth=2, num_heads=2,
                                               caption_channels=64, micro_condition=False), 64, latent=(4, 64, 64)),
    "pixart_sigma": Family("PixArtSigma", dict(image_model="pixart_sigma", input_size=16, hidden_size=64, depth=2, num_heads=2,
                                               caption_channels=64, micro_condition=False), 64, latent=(4, 64, 64)),
    "cogvideox": Family("CogVideoX_T2V", COGVIDEOX, 64, latent=(16, 2, 8, 8)),
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
    "ssd1b": Family("SSD1B", SMALL_SDXL, 64, 1280, (4, 16, 16), overrides=dict(num_heads=-1, num_head_channels=32)),
    "vega": Family("Segmind_Vega", SMALL_SDXL, 64, 1280, (4, 16, 16), overrides=dict(num_heads=-1, num_head_channels=32)),
    "koala_700m": Family("KOALA_700M", SMALL_SDXL, 64, 1280, (4, 16, 16), overrides=dict(num_heads=-1, num_head_channels=32)),
    "koala_1b": Family("KOALA_1B", SMALL_SDXL, 64, 1280, (4, 16, 16), overrides=dict(num_heads=-1, num_head_channels=32)),
    "wan22_5b": changed("wan", "WAN22_T2V", (48, 2, 8, 8), in_dim=48, out_dim=48),
    "wan_i2v": changed("wan", "WAN21_I2V", model_type="i2v", in_dim=36),
    "sd15_ip2p": changed("sd15", "SD15_instructpix2pix", in_channels=8, **ONE_LEVEL),
    "sdxl_ip2p": changed("sdxl", "SDXL_instructpix2pix", in_channels=8, transformer_depth_middle=1, **ONE_LEVEL),
    "zero123": Family("Stable_Zero123", SMALL_SD1 | dict(in_channels=8), 64, latent=(4, 16, 16), overrides=dict(TABLE["sd15"].overrides),
                      hints={"cc_projection.weight": torch.eye(64), "cc_projection.bias": torch.zeros(64)}),
    "unclip_l": Family("SD21UnclipL", SMALL_SD2 | dict(adm_in_channels=1536, num_classes="sequential"), 64, latent=(4, 16, 16),
                       overrides=HEADS_OF_32),
    "unclip_h": Family("SD21UnclipH", SMALL_SD2 | dict(adm_in_channels=2048, num_classes="sequential"), 64, latent=(4, 16, 16),
                       overrides=HEADS_OF_32),
    "sdxl_refiner": Family("SDXLRefiner", SMALL_SDXL | dict(adm_in_channels=2560), 64, 1280, (4, 16, 16), overrides=HEADS_OF_32),
    "x4_upscaler": Family("SD_X4Upscaler", SMALL_SD2 | dict(in_channels=7), 64, latent=(4, 16, 16), overrides=dict(
        disable_self_attentions=[True], num_classes=1000, num_heads=2, num_head_channels=-1)),
    "cascade_c": Family("Stable_Cascade_C", dict(
        stable_cascade_stage="c", c_hidden=[64, 64], nhead=[2, 2], blocks=[[1, 1], [1, 1]], c_cond=64, c_clip_text=64,
        c_clip_text_pooled=32), 64, 32, (16, 8, 8)),
    "cascade_b": Family("Stable_Cascade_B", dict(
        stable_cascade_stage="b", c_hidden=[32, 64], nhead=[-1, 2], blocks=[[1, 1], [1, 1]], block_repeat=[[1, 1], [1, 1]],
        level_config=["CT", "CTA"], dropout=[0, 0], c_cond=64, c_clip=32), 64, 32, (4, 16, 16)),
    "stable_audio": Family("StableAudio", SOUND, 768, latent=(64, 32), hints=seconds("start", "total")),
    "stable_audio_3": Family("StableAudio3", SOUND | dict(
        io_channels=256, global_cond_dim=768, global_cond_shared_embed=True, global_cond_type="adaLN", local_add_cond_dim=257),
        768, latent=(256, 32), hints=seconds("total")),
    "hunyuan_dit": Family("HunyuanDiT", HYDIT, 64, latent=(4, 16, 16)),
    "hunyuan_dit_1": Family("HunyuanDiT1", HYDIT | dict(image_model="hydit1", size_cond=True, use_style_cond=True), 64,
                            latent=(4, 16, 16)),
    "hunyuan_image_refiner": changed("hunyuan_video", "HunyuanImage21Refiner", (32, 1, 8, 8), in_channels=128, out_channels=64,
                                     patch_size=[1, 1, 1], vec_in_dim=None, meanflow=True),
    "skyreels": changed("hunyuan_video", "HunyuanVideoSkyreelsI2V", in_channels=32),
    "hunyuan_i2v": changed("hunyuan_video", "HunyuanVideoI2V", in_channels=33),
    "cosmos": Family("CosmosT2V", dict(
        image_model="cosmos", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
        patch_temporal=1, model_channels=128, num_blocks=2, num_heads=1, crossattn_emb_channels=64, block_config="FA-CA-MLP",
        concat_padding_mask=True, pos_emb_cls="rope3d", pos_emb_learnable=False, pos_emb_interpolation="crop",
        block_x_format="THWBD", affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=16, extra_per_block_abs_pos_emb=True,
        extra_per_block_abs_pos_emb_type="learnable"), 64, latent=(16, 2, 8, 8)),
    "zimage_pixel": Family("ZImagePixelSpace", TABLE["zimage"].config | dict(
        image_model="zimage_pixel", patch_size=4, in_channels=3, decoder_hidden_size=32, decoder_num_res_blocks=2,
        decoder_max_freqs=4, decoder_in_channels=48), 64, latent=(3, 16, 16)),
    "pid": Family("PiD", PIXELDIT | dict(image_model="pid", lq_hidden_dim=32, lq_num_res_blocks=1, latent_spatial_down_factor=2,
                                         sr_scale=2), 64, latent=(3, 16, 16)),
    "wan_causal": changed("wan", "WAN21_CausalAR_T2V", causal_ar=True),
    "wan_fun_control": changed("wan", "WAN21_FunControl2V", model_type="i2v", in_dim=48),
    "wan_vace": changed("wan", "WAN21_Vace", model_type="vace", vace_layers=1, vace_in_dim=96),
    "wan_camera": changed("wan", "WAN21_Camera", model_type="camera", in_dim=32),
    "wan22_camera": changed("wan", "WAN22_Camera", model_type="camera_2.2", in_dim=36),
    "wan_s2v": changed("wan", "WAN22_S2V", model_type="s2v", audio_inject_layers=[0, 1], audio_dim=32),
    "wan_humo": changed("wan", "WAN21_HuMo", model_type="humo", in_dim=36),
    "wan_animate": changed("wan", "WAN22_Animate", model_type="animate", in_dim=36, motion_encoder_dim=32),
    "wan_scail": changed("wan", "WAN21_SCAIL", model_type="scail", in_dim=20),
    "wan_scail_2": changed("wan", "WAN21_SCAIL2", model_type="scail2", in_dim=20),
    "wan_dancer": changed("wan", "WAN22_WanDancer", model_type="wandancer", in_dim=36, audio_inject_layers=[0, 1], music_dim=32,
                          music_latent_dim=32),
    "hunyuan_3d": Family("Hunyuan3Dv2", HUNYUAN_3D, 64, latent=(64, 16)),
    "hunyuan_3d_mini": Family("Hunyuan3Dv2mini", HUNYUAN_3D, 64, latent=(64, 16)),
    "hidream": Family("HiDream", dict(
        image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[64, 48],
        max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1, 1, 1], num_attention_heads=1, num_routed_experts=2,
        num_activated_experts=2, num_layers=2, num_single_layers=2, out_channels=16, patch_size=2, text_emb_dim=32), 64, 32),
    "seedvr2": Family("SeedVR2", dict(
        image_model="seedvr2", vid_dim=128, txt_in_dim=5120, heads=2, head_dim=64, num_layers=2, mm_layers=1, norm_eps=1e-5,
        mlp_type="swiglu", vid_out_norm=True, rope_dim=64), 5120, latent=(16, 2, 8, 8)),
    "chroma_radiance": Family("ChromaRadiance", TABLE["chroma"].config | dict(
        image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=4, nerf_hidden_size=16, nerf_mlp_ratio=2,
        nerf_depth=2, nerf_max_freqs=4, nerf_tile_size=0, nerf_final_head_type="conv", nerf_embedder_dtype=torch.float32,
        use_x0=False, use_sequential_txt_ids=False), 64, latent=(3, 16, 16)),
    "ace": Family("ACEStep", dict(
        audio_model="ace", num_layers=2, attention_head_dim=32, num_attention_heads=2, text_embedding_dim=64,
        lyric_encoder_vocab_size=64, lyric_hidden_size=1024, ssl_latent_dims=[32, 32]), 64, latent=(8, 16, 16)),
    "ace15": Family("ACEStep15", dict(
        audio_model="ace1.5", hidden_size=64, text_hidden_dim=64, num_dit_layers=2, num_lyric_layers=1, num_timbre_layers=1,
        num_tokenizer_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=128, encoder_hidden_size=64,
        encoder_intermediate_size=128, encoder_num_heads=2, fsq_dim=64, sliding_window=8), 64, latent=(64, 20)),
    "boogu": Family("Boogu", dict(
        image_model="boogu", hidden_size=96, num_layers=2, num_double_stream_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=32, axes_dim_rope=(16, 16, 16), instruction_feat_dim=64), 64),
    "cogvideox_i2v": Family("CogVideoX_I2V", COGVIDEOX | dict(in_channels=32), 64, latent=(16, 2, 8, 8)),
    "cogvideox_inpaint": Family("CogVideoX_Inpaint", COGVIDEOX | dict(in_channels=48), 64, latent=(16, 2, 8, 8)),
    "kandinsky5_image": Family("Kandinsky5Image", KANDINSKY_5 | dict(visual_embed_dim=64), 64, 32, (16, 8, 8)),
}  # fmt: skip
REFUSED = {  # see nodes/host/conditions.py
    "hunyuan_video_15_sr": changed(
        "hunyuan_video", "HunyuanVideo15_SR_Distilled", (32, 1, 8, 8), in_channels=98, out_channels=32, patch_size=[1, 1, 1],
        depth_single_blocks=0, vec_in_dim=None, guidance_embed=False, meanflow=True, meanflow_sum=True,
        use_cond_type_embedding=True, vision_in_dim=64),
    "cosmos_i2v": Family("CosmosI2V", MORE["cosmos"].config | dict(in_channels=17), 64, latent=(16, 2, 8, 8)),
    "predict2_i2v": Family("CosmosI2VPredict2", PREDICT2 | dict(in_channels=17), 64, latent=ONE_FRAME),
}  # fmt: skip
# Why a class has no row.
WHY_NOT = {
    "Hunyuan3Dv2_1": "the gradients of a small one have not passed the check yet",
    "WAN_Animate2": "each run refuses it, since its blocks write every frame into one buffer",
    "GenmoMochi": "the sizes of its layers are fixed in ComfyUI's code",
    "LTXAV": "its text connectors (700 M parameters) are fixed in ComfyUI's code",
    "MiniMaxH3": "its latent is of two parts, video and sound",
    "TripoSplat": "its latent is of two parts, splats and camera",
    "Trellis2": "its latent is a list of places in space",
    "MiniMaxMusic3": "its size is fixed in ComfyUI's code",
    "HiDreamO1": "no small one has been made yet",
}

INPAINTING = ("fill", "sd15_inpaint", "sdxl_inpaint")


def hole(name, seed=0):
    """An image with a hole and its mask, for the conditioning of an inpainting family."""
    rng, (channels, height, width) = torch.Generator().manual_seed(seed), MORE[name].latent
    mask = (torch.rand(1, 1, 8 * height, 8 * width, generator=rng) > 0.5).float()
    return {"concat_latent_image": torch.randn(1, channels, height, width, generator=rng), "concat_mask": mask}


def seen_by_clip_vision(rng, tokens=257, width=1280, embedding=768):
    import comfy.clip_vision

    seen = comfy.clip_vision.Output()
    seen.penultimate_hidden_states = seen.last_hidden_state = torch.randn(1, tokens, width, generator=rng)
    seen.image_embeds, seen.mm_projected = torch.randn(1, embedding, generator=rng), None
    return seen


def conditions_of(name, seed=0):
    """What a conditioning of a family holds beside the text, {} for most."""
    row, rng = MORE[name], torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(1, *shape, generator=rng)
    like = lambda channels=row.latent[0]: draw(channels, *row.latent[1:])
    image = lambda: {"concat_latent_image": like()}
    mask = lambda: {"concat_mask": (torch.rand(1, 1, *row.latent[1:], generator=rng) > 0.5).float()}
    seen = lambda: {"clip_vision_output": seen_by_clip_vision(rng)}
    unclip = lambda width: {"unclip_conditioning": [{"clip_vision_output": seen_by_clip_vision(rng, embedding=width),
                                                     "strength": 1.0, "noise_augmentation": 0.0}]}  # fmt: skip
    text_mask = lambda: {"attention_mask": torch.ones(1, 7, dtype=torch.long)}
    hydit = lambda: {
        "attention_mask": torch.ones(1, 7),
        "conditioning_mt5xl": draw(5, 48),
        "attention_mask_mt5xl": torch.ones(1, 5),
    }
    scail = lambda: {"pose_video_latent": draw(16, 2, 4, 4), "reference_latents": [draw(16, 1, 8, 8)], **seen()}
    made = {
        **dict.fromkeys(("sd15_ip2p", "sdxl_ip2p", "zero123", "hunyuan_image_refiner", "skyreels", "cogvideox_i2v"), image),
        **dict.fromkeys(("ltxv", "omnigen2", "boogu"), text_mask),
        **dict.fromkeys(("hunyuan_dit", "hunyuan_dit_1"), hydit),
        **dict.fromkeys(INPAINTING, lambda: hole(name, seed)),
        "hunyuan_i2v": lambda: image() | mask(),
        "wan_i2v": lambda: image() | mask() | seen(),
        "unclip_l": lambda: unclip(768),
        "unclip_h": lambda: unclip(1024),
        "x4_upscaler": lambda: {"concat_image": like(3)},
        "cascade_b": lambda: {"stable_cascade_prior": draw(16, 4, 4)},
        "pid": lambda: {"lq_latent": draw(16, 4, 4), "degrade_sigma": torch.tensor([0.5])},
        "wan_fun_control": lambda: {"concat_latent_image": like(32)} | seen(),
        "wan_vace": lambda: {"vace_frames": [like(32)]},
        "wan_camera": lambda: {"camera_conditions": draw(24, 2, 64, 64)} | image() | seen(),
        "wan22_camera": lambda: {"camera_conditions": draw(24, 2, 64, 64)} | image() | mask(),
        "wan_s2v": lambda: {"audio_embed": draw(25, 32, 8)},
        "wan_humo": lambda: {"audio_embed": draw(2, 8, 5, 1280)},
        "wan_animate": lambda: {"pose_video_latent": draw(16, 1, 8, 8)} | image() | mask() | seen(),
        "wan_scail": scail,
        "wan_scail_2": lambda: scail() | {"driving_mask_28ch": torch.rand(1, 2, 28, 4, 4, generator=rng)},
        "wan_dancer": lambda: {"audio_embed": draw(8, 35), "clip_vision_output_ref": seen_by_clip_vision(rng)} | image() | mask() | seen(),
        "hidream": lambda: {"conditioning_llama3": draw(2, 7, 48)},
        "seedvr2": lambda: {"condition": like(17)},
        "ace": lambda: {"conditioning_lyrics": torch.randint(0, 64, (1, 5), generator=rng)},
        "ace15": lambda: {"conditioning_lyrics": draw(5, 64)},
        "cogvideox_inpaint": lambda: {"concat_latent_image": like(32)},
    }  # fmt: skip
    return made[name]() if name in made else {}
