"""A LoRA as examples/text_to_image/train_text_to_image_lora(_sdxl).py of huggingface/diffusers trains it (state of
2024-25), told in our own words: diffusers' own UNet in the host model's shape, peft's adapters on it, the noise
prediction's mean squared error, AdamW, gradients clipped at 1.

The scripts' targets are the attention's to_q, to_k, to_v and to_out.0, a good part of our default; SAME adds proj_in,
proj_out and the feed-forward layers and is the same work as ours. Under --mixed_precision bf16 the scripts leave the
LoRA in the dtype in which peft makes it; that is what happens here (the table says how many numbers are trained, not in
what).

Left out, in their favour: accelerate and its autocast, which computes norms in fp32 and keeps more; the learning rate
scheduler; the VAE and the text encoders, which the scripts run in every step.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F

OWN = ("to_k", "to_q", "to_v", "to_out.0")
SAME = (*OWN, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")


# -- the same network --------------------------------------------------------------------------------------------------


def shape_of(config: dict) -> dict:
    """What diffusers' UNet2DConditionModel is told, from what ComfyUI knows about a UNet."""
    widths, counts = [config["model_channels"] * m for m in config["channel_mult"]], config["num_res_blocks"]
    down = every(counts[0], config["transformer_depth"])
    up = every(
        counts[0] + 1, config["transformer_depth_output"][::-1]
    )  # ComfyUI lists them from the top, and takes them from the end
    kind = lambda depth, name: f"CrossAttn{name}" if depth else name
    heads = config["num_heads"]
    return dict(
        in_channels=config["in_channels"], out_channels=config["out_channels"], block_out_channels=widths, layers_per_block=counts[0],
        down_block_types=[kind(depth, "DownBlock2D") for depth in down], up_block_types=[kind(depth, "UpBlock2D") for depth in up],
        transformer_layers_per_block=[max(depth, 1) for depth in down], reverse_transformer_layers_per_block=[max(depth, 1) for depth in up],
        cross_attention_dim=config["context_dim"], use_linear_projection=config["use_linear_in_transformer"],
        # a number of heads, by its wrong name
        attention_head_dim=heads if heads > 0 else [width // config["num_head_channels"] for width in widths],
        **with_pooled(config.get("adm_in_channels")),
    )  # fmt: skip


def every(n: int, values) -> list:
    """The first of each n."""
    return list(values[::n])


def with_pooled(width) -> dict:
    """SDXL's pooled text and six numbers."""
    if not width:
        return {}
    return dict(
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=width
    )


def network(config: dict, dtype, device, state=None):
    """Frozen and in training mode, with ComfyUI's weights when they are given."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        made = UNet2DConditionModel(**shape_of(config))
    made = torch.nn.Module.to(made, dtype).requires_grad_(False).train()  # diffusers' own `to` logs advice
    if state is not None:
        import comfy.utils

        names = comfy.utils.unet_to_diffusers(config)
        made.load_state_dict({name: state[names[name]].detach().clone() for name in made.state_dict()}, assign=True)
        made.requires_grad_(False)
    return made.to(device)


def adapted(unet, rank: int, targets, checkpointing: bool) -> list:
    """The parameters to train, once peft's layers are in."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets)))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return [p for p in unet.parameters() if p.requires_grad]


# -- a step ------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Latents, their captions, and for SDXL the pooled text and six numbers about size and crop."""

    latents: torch.Tensor
    context: torch.Tensor
    added: dict | None = None


def batch_of(latents, context, pooled=None) -> Batch:
    if pooled is None:
        return Batch(latents, context)
    height, width = (8 * n for n in latents.shape[-2:])
    sizes = torch.tensor(
        [[height, width, 0, 0, height, width]] * len(latents), dtype=context.dtype, device=context.device
    )
    return Batch(latents, context, {"text_embeds": pooled, "time_ids": sizes})


class Script:
    """The scripts' step; `scheduler` is None where there are no values to be noised."""

    def __init__(self, unet, params, batch: Batch):
        self.unet, self.params, self.batch = unet, params, batch
        self.optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=1e-2)
        self.scheduler = None if batch.latents.is_meta else noise_scheduler()

    def loss(self):
        latents = self.batch.latents
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy = latents + noise if self.scheduler is None else self.scheduler.add_noise(latents, noise, t)
        answer = self.unet(
            noisy.to(self.unet.dtype), t, self.batch.context, added_cond_kwargs=self.batch.added, return_dict=False
        )[0]
        return F.mse_loss(answer.float(), noise.float())

    def __call__(self):
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def noise_scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@contextlib.contextmanager
def attention_of_a_gpu():
    """On meta tensors torch's own choice would be the attention that writes out the whole (T, T) matrix."""

    def flash(q, k, v, attn_mask=None, **_):
        assert attn_mask is None, "no mask in these models"
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", flash):
        yield
