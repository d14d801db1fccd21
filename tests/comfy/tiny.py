"""Small checkpoint files that ComfyUI's real loader nodes accept, made on demand and kept in a cache folder.

    path = tiny.build("sd15_noclip")      # 37 MB, seconds the first time; a path afterwards

Key names and shapes come from ComfyUI's own modules on the meta device, so they cannot drift from the host; weights are
drawn from a seed. They prove wiring, not quality (tests/toy/ is the world with trained weights).
Built files are kept in the tests' cache; a change of this file makes new ones.
"""

import math

import torch
from safetensors.torch import save_file
from trainyard.tests.cache import cached_file

VAE_SCALES = {
    "sd15": (0.18215, 0.0),
    "sd3": (1.5305, 0.0609),
}  # (scale, shift) of the latents a small VAE inside a checkpoint is read with
UNET = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1], channel_mult=[1], transformer_depth=[1],
            transformer_depth_output=[1, 0], transformer_depth_middle=-2, context_dim=768, use_linear_in_transformer=False,
            adm_in_channels=None, num_heads=8, num_head_channels=-1, use_checkpoint=False, use_spatial_transformer=True, legacy=False,
            use_temporal_resblock=False, use_temporal_attention=False)  # fmt: skip  # the fewest layers that are still detected as SD1.5


# -- weights -----------------------------------------------------------------------------------------------------------
def weights(module, seed, dtype):
    """state_dict of a module on the meta device, with values drawn from a seed."""
    rng = torch.Generator().manual_seed(seed)
    return {name: value(name, tuple(empty.shape), rng, dtype) for name, empty in module.state_dict().items()}


def value(name, shape, rng, dtype):
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).expand(shape).contiguous()
    if name.endswith("logit_scale"):
        return torch.tensor(4.6055, dtype=dtype)
    drawn = torch.randn(shape, generator=rng)
    if "embedding.weight" in name:
        return (drawn * 0.02).to(dtype)
    if len(shape) >= 2:
        return (drawn / math.sqrt(math.prod(shape[1:]))).to(dtype)
    return ((1 + 0.05 * drawn) if name.endswith(("weight", "scale")) else 0.01 * drawn).to(dtype)


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def on_meta(make, **config):
    """A host module without values: made for its names and shapes only."""
    import comfy.ops

    return make(device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)


# -- parts -------------------------------------------------------------------------------------------------------------
def unet_sd15(dtype):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return under("model.diffusion_model.", weights(on_meta(UNetModel, **UNET), 0, dtype))


def transformer_sd3(dtype, depth=2):
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    module = on_meta(OpenAISignatureMMDITWrapper, in_channels=16, out_channels=16, patch_size=2, depth=depth, input_size=None,
                     num_patches=4096, adm_in_channels=2048, context_embedder_config=embedder, pos_embed_max_size=64,
                     pos_embed_scaling_factor=None)  # fmt: skip
    return under("model.diffusion_model.", weights(module, 1, dtype))


def transformer_flux(dtype):
    """Two blocks of each kind; its text widths are CLIP-L's, so that a plain CLIP-L file conditions it."""
    from comfy.ldm.flux.model import Flux

    module = on_meta(Flux, image_model="flux", in_channels=16, out_channels=16, patch_size=2, hidden_size=128, num_heads=1, mlp_ratio=4.0,
                     depth=2, depth_single_blocks=2, context_in_dim=768, vec_in_dim=768, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
                     guidance_embed=True, txt_ids_dims=[])  # fmt: skip
    return weights(module, 2, dtype)


def transformer_wan(dtype):
    """Two blocks of one head; the width of its texts is fixed in the host's detection."""
    from comfy.ldm.wan.model import WanModel

    return weights(
        on_meta(WanModel, model_type="t2v", dim=128, num_heads=1, ffn_dim=256, num_layers=2, in_dim=16, out_dim=16),
        6,
        dtype,
    )


def vae_wan(dtype):
    """Wan 2.1's VAE with 8 channels in place of 96."""
    from comfy.ldm.wan.vae import WanVAE

    with torch.device("meta"):
        module = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                        temperal_downsample=[False, True, True], dropout=0.0)  # fmt: skip
    return weights(module, 7, dtype)


def text_encoder_clip_l(dtype):
    """CLIP-L as ComfyUI names it: 123 M parameters, the smallest text encoder whose size the host lets nobody
    change."""
    from comfy.sd1_clip import SD1ClipModel

    return weights(SD1ClipModel(device="meta", dtype=torch.float32), 3, dtype)


def vae(family, channels, dtype):
    """A TAESD inside a checkpoint: 2.4 M parameters, decoding and encoding in 0.03 s."""
    from comfy.taesd.taesd import TAESD

    tensors = weights(TAESD(latent_channels=channels), 4, dtype)
    tensors["vae_scale"], tensors["vae_shift"] = (torch.tensor(number) for number in VAE_SCALES[family])
    return under("first_stage_model.", tensors)


# -- files -------------------------------------------------------------------------------------------------------------
def sd15_noclip(dtype=torch.float16):
    return unet_sd15(dtype) | vae("sd15", 4, dtype)


def sd15(dtype=torch.float16):
    """With CLIP-L, its matrices stored as fp8 (160 MB instead of 283)."""
    from comfy.supported_models import SD15

    clip = SD15(dict(UNET)).process_clip_state_dict_for_saving(text_encoder_clip_l(dtype))
    return sd15_noclip(dtype) | {name: stored_small(tensor) for name, tensor in clip.items()}


def stored_small(tensor):
    return tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 and tensor.is_floating_point() else tensor


def sd3_noclip(dtype=torch.float16):
    return transformer_sd3(dtype) | vae("sd3", 16, dtype)


def flux(dtype=torch.bfloat16):
    return transformer_flux(dtype)


def wan(dtype=torch.float32):
    return transformer_wan(dtype)


def wan_vae(dtype=torch.float32):
    return vae_wan(dtype)


def clip_l(dtype=torch.float16):
    prefix = "clip_l.transformer."
    found = {
        name[len(prefix) :]: tensor for name, tensor in text_encoder_clip_l(dtype).items() if name.startswith(prefix)
    }
    return {name: stored_small(tensor) for name, tensor in found.items()}


FILES = {  # name -> (folder below models/, what makes the tensors)
    "sd15": ("checkpoints", sd15),
    "sd15_noclip": ("checkpoints", sd15_noclip),
    "sd3_noclip": ("checkpoints", sd3_noclip),
    "flux": ("diffusion_models", flux),
    "wan": ("diffusion_models", wan),
    "wan_vae": ("vae", wan_vae),
    "clip_l": ("text_encoders", clip_l),
}


def kind(name):
    """The folder below ComfyUI's models/ that a file belongs in."""
    return FILES[name][0]


def build(name):
    """Path of a small model file, made if it is not in the cache. ComfyUI must be importable (fixture `comfy`)."""
    if name not in FILES:
        raise KeyError(f"No small model is called {name!r}. There are: {', '.join(FILES)}.")
    return cached_file(f"tiny_{name}.safetensors", [__file__], lambda path: save_file(tensors(name), path))


def tensors(name):
    return {key: tensor.contiguous() for key, tensor in FILES[name][1]().items()}
