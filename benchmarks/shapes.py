"""The models and data that are measured, as rows: ComfyUI's own classes with random weights, from toy size to real
size.

tiny: wiring only. Widths are so small that an adapter is no longer small beside its layer.
mid:  the true pattern of layers at 1/k of the width, of the tokens and of the rank, so that weights, activations,
attention and
      adapters keep their proportions; the transformers also have fewer blocks, which changes no ratio.
real: sizes of the published checkpoints. On meta tensors anywhere (FLOPs and bytes without memory), with weights on a
GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..tests.comfy.families import TABLE, Family, fill, flux, unet


@dataclass(frozen=True)
class Shape:
    family: Family
    rank: int
    tokens: int  # of the caption
    about: str
    reference: tuple = ()  # the latent of an image that comes with the caption, of models that edit

    @property
    def has_guidance(self) -> bool:
        return bool(self.family.config.get("guidance_embed"))


# -- rows --------------------------------------------------------------------------------------------------------------


def sd15(channels, heads, context):
    return unet(model_channels=channels, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
                transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, use_linear_in_transformer=False,
                context_dim=context, num_heads=heads, num_head_channels=-1)  # fmt: skip


def sdxl(channels, context, adm):
    return unet(model_channels=channels, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10],
                transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10, use_linear_in_transformer=True,
                context_dim=context, adm_in_channels=adm, num_classes="sequential")  # fmt: skip


def sd3(depth, context, pooled, side):
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": context, "out_features": 64 * depth}}
    return dict(in_channels=16, out_channels=16, patch_size=2, depth=depth, input_size=None, adm_in_channels=pooled, num_patches=side**2,
                pos_embed_max_size=side, pos_embed_scaling_factor=None, context_embedder_config=embedder)  # fmt: skip


def heads(count, width):
    """What ComfyUI's classes of SD1.5 and SDXL set by themselves, for widths other than theirs."""
    return {"num_heads": count, "num_head_channels": width}


ADM = 1280 + 6 * 256  # SDXL: pooled text, and six numbers about the image's size
SHAPES = {
    **{(name, "tiny"): Shape(TABLE[name], 4, 7, "of tests/comfy/families.py") for name in ("sd15", "sdxl", "sd3", "flux")},
    ("sd15", "mid"): Shape(Family("SD15", sd15(32, 1, 96), 96, latent=(4, 16, 24), overrides=heads(1, -1)), 2, 8,
                           "a tenth of SD1.5 at 512 px: 32 channels, latent 24x16"),
    ("sdxl", "mid"): Shape(Family("SDXL", sdxl(32, 224, ADM), 224, 1280, (4, 40, 40), overrides=heads(-1, 32)), 2, 8,
                           "a tenth of SDXL at 1024 px: 32 channels, all 70 transformer blocks, latent 40x40"),
    ("sd3", "mid"): Shape(Family("SD3", sd3(4, 768, 384, 64), 768, 384, (16, 52, 52)), 3, 26,
                          "a sixth of SD3 medium at 1024 px: width 256, 4 of 24 blocks, 676 image tokens"),
    ("flux", "mid"): Shape(Family("Flux", flux(hidden_size=256, num_heads=2, depth=4, depth_single_blocks=8, context_in_dim=336, vec_in_dim=64),
                                  336, 64, (16, 36, 36)), 2, 43, "a twelfth of Flux.1-dev at 1024 px: width 256, 4 + 8 "
                                                                 "of 19 + 38 blocks, 324 image tokens"),
    ("sd15", "real"): Shape(Family("SD15", sd15(320, 8, 768), 768, latent=(4, 64, 64)), 16, 77, "SD1.5 at 512 px"),
    ("sdxl", "real"): Shape(Family("SDXL", sdxl(320, 2048, ADM), 2048, 1280, (4, 128, 128)), 16, 77, "SDXL at 1024 px"),
    ("sd3", "real"): Shape(Family("SD3", sd3(24, 4096, 2048, 192), 4096, 2048, (16, 128, 128)), 16, 154, "SD3 medium "
                                                                                                         "at 1024 px"),
    ("flux", "real"): Shape(Family("Flux", flux(hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, context_in_dim=4096,
                                                vec_in_dim=768), 4096, 768, (16, 128, 128)), 16, 512, "Flux.1-dev at "
                                                                                                      "1024 px"),
}  # fmt: skip


# -- models and data ---------------------------------------------------------------------------------------------------


def base_model(shape: Shape, dtype, device, compute_dtype=None):
    """comfy.model_base.BaseModel with uninitialised weights on a device, "meta" included. `compute_dtype`: where it is
    another than that of the weights."""
    from comfy import supported_models

    config = getattr(supported_models, shape.family.supported)(dict(shape.family.config))
    config.unet_config.update(shape.family.overrides)
    config.set_inference_dtype(dtype, compute_dtype)
    return config.get_model(shape.family.hints, "", device=torch.device(device)).eval()


def make(shape: Shape, dtype=torch.float32, disable_dynamic=False):
    """A loaded MODEL with random weights. Its attention is torch's for every contender: ComfyUI takes that by itself on
    a GPU, and something else on the CPU."""
    from comfy import model_management as mm
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy.model_patcher import CoreModelPatcher

    device = mm.get_torch_device()
    model = base_model(shape, dtype, device)
    randomise(model.diffusion_model)
    patcher = CoreModelPatcher(model, load_device=device, offload_device=mm.unet_offload_device())
    patcher.set_model_optimized_attention(attention_pytorch)
    patcher.cached_patcher_init = (make, (shape, dtype))  # core's node makes a second copy of the model with this
    return patcher


def randomise(network):
    """Seeded values, drawn where the weights are; those of the test families on the CPU."""
    if next(network.parameters()).device.type == "cpu":
        return fill(network, 0)
    with torch.no_grad():
        for name, value in network.state_dict(keep_vars=True).items():
            if value.is_floating_point():
                value.normal_(0, 1 / math.sqrt(math.prod(value.shape[1:]))) if value.ndim > 1 else value.fill_(
                    name.endswith(("weight", "scale"))
                )


def dataset(shape: Shape, count: int):
    """(LATENT, CONDITIONING) of `count` random images, as ComfyUI's own nodes hand them on."""
    rng = torch.Generator().manual_seed(1)
    latent = {"samples": torch.randn((count, *shape.family.latent), generator=rng)}
    return latent, [caption(shape, rng) for _ in range(count)]


def caption(shape: Shape, rng):
    cross = torch.randn(1, shape.tokens, shape.family.context, generator=rng)
    extras = {"pooled_output": torch.randn(1, shape.family.pooled, generator=rng)} if shape.family.pooled else {}
    if shape.reference:
        extras["reference_latents"] = [torch.randn(1, *shape.reference, generator=rng)]
    return [cross, extras]


def empty_inputs(shape: Shape, dtype, batch=1):
    """(x, t, other inputs) of the network on the meta device."""

    def empty(*size, dtype=dtype):
        return torch.empty(size, device="meta", dtype=dtype)

    width = shape.family.config.get("adm_in_channels") or shape.family.pooled
    more = {"context": empty(batch, shape.tokens, shape.family.context)}
    more |= {"y": empty(batch, width)} if width else {}
    more |= {"guidance": empty(batch)} if shape.has_guidance else {}
    return empty(batch, *shape.family.latent), empty(batch, dtype=torch.float32), more
