"""Diffusers folders and SD3-shaped files of a few thousand random numbers, with a vocabulary of letters: no network, no
weights."""

import gzip
import json
import math

import torch
from trainyard.trainers.engines import text as words
from trainyard.trainers.files import write_safetensors

MERGES = ["r e", "re d</w>", "s t", "st a", "sta r</w>", "b l", "bl u", "blu e</w>"]
VOCABULARY = 2 * 256 + len(MERGES) + 2


def vocabulary(folder):
    """CLIP's packed list of merges, but a short one."""
    path = folder / words.CLIP_VOCABULARY_NAME
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version", *MERGES]))
    return path


def clip_config(width, **changes):
    from transformers import CLIPTextConfig

    ends = dict(bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=VOCABULARY - 1)
    return CLIPTextConfig(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                          projection_dim=width, **ends | changes)  # fmt: skip


def drawn(module, seed):
    """The module with weights that keep activations sane and leave nothing at zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1))
    return module


def save_clip(folder, number="", width=32, seed=1, projected=False):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    drawn(kind(clip_config(width)), seed).save_pretrained(folder / f"text_encoder{number}")
    tokenizer = folder / f"tokenizer{number}"
    tokenizer.mkdir()
    words.write_clip_vocabulary(vocabulary(folder), tokenizer)


def save_t5(folder, number, width=64):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    known = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "blue": 4, "star": 5, "a": 6}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder / f"tokenizer{number}"
    )
    config = T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    drawn(T5EncoderModel(config), 4).save_pretrained(folder / f"text_encoder{number}")


def save_vae(folder, channels=4, **changes):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=32,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **changes)  # fmt: skip
    drawn(vae, 5).save_pretrained(folder / "vae")


def save_scheduler(folder, **changes):
    (folder / "scheduler").mkdir()
    values = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000) | changes
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))


def unet(**changes):
    from diffusers import UNet2DConditionModel

    shape = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    return drawn(UNet2DConditionModel(**shape | changes), 6)


def sd15(folder):
    unet(cross_attention_dim=768).save_pretrained(folder / "unet")
    save_clip(folder, width=768)
    save_vae(folder)
    save_scheduler(folder)


def sdxl(folder, **scheduler):
    added = dict(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8
    )
    unet(cross_attention_dim=64, **added).save_pretrained(folder / "unet")
    save_clip(folder)
    save_clip(folder, "_2", seed=2, projected=True)
    save_vae(folder, scaling_factor=0.13025)
    save_scheduler(folder, **scheduler)


def sd3_transformer(joint=4096, pooled=2048, layers=2):
    from diffusers import SD3Transformer2DModel

    return drawn(SD3Transformer2DModel(sample_size=32, num_layers=layers, attention_head_dim=64, num_attention_heads=layers, in_channels=16,
                                       joint_attention_dim=joint, caption_projection_dim=64 * layers, pooled_projection_dim=pooled,
                                       pos_embed_max_size=16), 7)  # fmt: skip


def sd3(folder):
    sd3_transformer().save_pretrained(folder / "transformer")
    save_clip(folder, width=768, projected=True)
    save_clip(folder, "_2", width=1280, seed=2, projected=True)
    save_t5(folder, "_3", width=4096)
    save_vae(folder, 16, scaling_factor=1.5305, shift_factor=0.0609)


def flux(folder):
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                     joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6))  # fmt: skip
    drawn(network, 8).save_pretrained(folder / "transformer")
    save_clip(folder)
    save_t5(folder, "_2")
    save_vae(folder, 16, scaling_factor=0.3611, shift_factor=0.1159)


FOLDERS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def folder(family, path):
    """A diffusers folder of that family at `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "model_index.json").write_text("{}")
    FOLDERS[family](path)
    return path


# -- an SD3-shaped single file, in ComfyUI's names ---------------------------------------------------------------------


def sd3_tensors(seed=0, clip=True, vae=True):
    """Name -> tensor: two blocks, a one-headed CLIP-L stand-in of 64 channels, TAESD-16."""
    rng = torch.Generator().manual_seed(seed)
    table = {f"model.diffusion_model.{k}": s for k, s in mmdit_table().items()}
    table |= {f"text_encoders.clip_l.transformer.text_model.{k}": s for k, s in clip_table().items()} if clip else {}
    table |= {f"first_stage_model.{k}": s for k, s in taesd_table().items()} if vae else {}
    tensors = {
        k: torch.randn(s, generator=rng) * (1 / math.sqrt(math.prod(s[1:])) if len(s) > 1 else 0.05)
        for k, s in table.items()
    }
    for k in tensors:
        if "norm" in k and k.endswith("weight"):
            tensors[k] += 1.0
    scale = {"first_stage_model.vae_scale": torch.tensor(1.5305), "first_stage_model.vae_shift": torch.tensor(0.0609)}
    return tensors | (scale if vae else {})


def sd3_file(path, **parts):
    write_safetensors(path, sd3_tensors(**parts))
    return path


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def mmdit_table(depth=2, grid=8):
    w = 64 * depth
    table = {"pos_embed": (1, grid * grid, w), "x_embedder.proj.weight": (w, 16, 2, 2), "x_embedder.proj.bias": (w,)}
    table |= linear("t_embedder.mlp.0", w, 256) | linear("t_embedder.mlp.2", w, w) | linear("context_embedder", w, 4096)
    table |= linear("y_embedder.mlp.0", w, 2048) | linear("y_embedder.mlp.2", w, w)
    for i in range(depth):
        for side in ("x_block", "context_block"):
            name, last = f"joint_blocks.{i}.{side}", side == "context_block" and i == depth - 1
            table |= linear(f"{name}.attn.qkv", 3 * w, w) | linear(
                f"{name}.adaLN_modulation.1", (2 if last else 6) * w, w
            )
            if not last:
                table |= (
                    linear(f"{name}.attn.proj", w, w)
                    | linear(f"{name}.mlp.fc1", 4 * w, w)
                    | linear(f"{name}.mlp.fc2", w, 4 * w)
                )
    return table | linear("final_layer.linear", 64, w) | linear("final_layer.adaLN_modulation.1", 2 * w, w)


def clip_table(width=64, layers=2):
    table = {
        "embeddings.token_embedding.weight": (VOCABULARY, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        name = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            table |= linear(f"{name}.self_attn.{part}", width, width)
        table |= linear(f"{name}.mlp.fc1", 2 * width, width) | linear(f"{name}.mlp.fc2", width, 2 * width)
        table |= {f"{name}.layer_norm{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
    return table | {f"final_layer_norm.{part}": (width,) for part in ("weight", "bias")}


def taesd_table(channels=16):
    """TAESD counts its layers in a row: three halvings, three doublings, blocks of three convolutions between."""
    kinds = {
        "encoder": "i bdbbbdbbbdbbb o",
        "decoder": ".i.bbb.dbbb.dbbb.db o",
    }  # i, o ends; b block; d halving; . no weights
    table = {}
    for side, row in kinds.items():
        for index, kind in enumerate(row.replace(" ", "")):
            name = f"taesd_{side}.{index}"
            table |= taesd_layer(name, kind, *((3, channels) if side == "encoder" else (channels, 3)))
    return table


def taesd_layer(name, kind, inputs, outputs):
    if kind == "b":
        return {
            f"{name}.conv.{i}.{end}": s for i in (0, 2, 4) for end, s in (("weight", (64, 64, 3, 3)), ("bias", (64,)))
        }
    if kind == "d":
        return {f"{name}.weight": (64, 64, 3, 3)}
    sizes = {"i": (64, inputs, 3, 3), "o": (outputs, 64, 3, 3)}
    return {f"{name}.weight": sizes[kind], f"{name}.bias": sizes[kind][:1]} if kind in sizes else {}
