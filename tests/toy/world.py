"""Builds the toy world's checkpoint: one SD3-shaped file that ComfyUI's checkpoint loader takes. Needs torch and
safetensors, not ComfyUI.

    from trainyard.tests.toy import world
    world.build("models/checkpoints/toy_world.safetensors")          # 0.26 GB, most of it the seeded text encoder;
    seconds

Three parts. The transformer and the VAE were trained by train_world.py and lie in weights/ as 8-bit matrices with one
scale per row. The CLIP-L text encoder is never stored: its weights come from a seed. What is always zero (the columns
of text encoders that the toy has not got) or a formula (position table) is not stored either.
"""

import math
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = pathlib.Path(__file__).resolve().parent / "weights"
DEPTH, HEAD = 3, 64  # SD3's rule: width = 64 * depth
WIDTH = DEPTH * HEAD
CHANNELS, PATCH, SIDE = 16, 2, 64  # latent channels; px of latent per token; side of the position table, tokens
CONTEXT, POOLED, CLIP = 4096, 2048, 768
VAE_SCALE, VAE_SHIFT = (
    1.5305,
    0.0609,
)  # SD3's latent format; with them inside the VAE, model-space latents are the encoder's output
TEXT_SEED = 768
DISTILLED = "distilled"  # a low-rank change of the transformer: four steps, guidance built in (train_distilled.py)
EYES = dict(
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=512,
    hidden_act="quick_gelu",
    num_channels=3,
    patch_size=8,
    image_size=64,
    projection_dim=128,
    layer_norm_eps=1e-5,
)  # a CLIP_VISION of ComfyUI's own kind, 0.7 M
LIGHT = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # CLIP's mean and spread of red, green and blue
PADDED = {
    "context_embedder.weight": CONTEXT,
    "y_embedder.mlp.0.weight": POOLED,
}  # stored with CLIP columns, the rest is zero


def build(path, model="transformer"):
    """Write the checkpoint to `path` and return the path. The same bytes' worth of weights every time; the folder is
    made.

    `model` "pairs": the transformer that was also shown frames of two shapes (train_pairs.py). "distilled": the one that
    draws in four steps without guidance (train_distilled.py)."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in checkpoint(model).items()},
        str(path),
        metadata={"modelspec.title": "Trainyard toy world"},
    )
    return path


def cached(model="transformer"):
    """Path of the checkpoint in the tests' cache, built if it is not there."""
    from ..cache import cached_file

    parts = dict.fromkeys((model, "transformer", "vae") if model == DISTILLED else (model, "vae"))
    sources = [__file__, *(WEIGHTS / f"{part}.safetensors" for part in parts)]
    name = "toy_world.safetensors" if model == "transformer" else f"toy_{model}.safetensors"
    return cached_file(name, sources, lambda path: build(path, model))


def checkpoint(model="transformer"):
    """Every tensor of the file, float16, under the names of a single-file SD3."""
    state = {f"model.diffusion_model.{k}": v for k, v in transformer(model).items()}
    state |= {f"first_stage_model.{k}": v for k, v in vae().items()}
    state |= {f"text_encoders.clip_l.{k}": v for k, v in text_encoder().items()}
    return {k: v.to(torch.float16) for k, v in state.items()}


def transformer(name="transformer"):
    """The trained MMDiT with its zero columns and position table put back."""
    state = unpack(load_file(str(WEIGHTS / f"{'transformer' if name == DISTILLED else name}.safetensors")))
    if name == DISTILLED:
        add_low_rank(state, unpack(load_file(str(WEIGHTS / f"{name}.safetensors"))))
    for name, columns in PADDED.items():
        state[name] = torch.nn.functional.pad(state[name], (0, columns - state[name].shape[1]))
    return state | {"pos_embed": position_table(WIDTH, SIDE)}


def add_low_rank(state, factors):
    """Adds up @ down, stored as `name:up` and `name:down`, to the matrices of `state`."""
    for name in [key.removesuffix(":up") for key in factors if key.endswith(":up")]:
        change = factors[f"{name}:up"] @ factors[f"{name}:down"]
        state[name] = state[name] + change.view_as(state[name])


def vae():
    """The trained TAESD with the two numbers that make it answer in SD3's latent space."""
    state = unpack(load_file(str(WEIGHTS / "vae.safetensors")))
    return state | {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(VAE_SHIFT)}


def eyes():
    """The trained CLIP_VISION (train_eyes.py) under the names of a CLIP: it tells how an image of the world was
    drawn."""
    state = unpack(load_file(str(WEIGHTS / "eyes.safetensors")))
    return {name.removeprefix("eyes."): weight for name, weight in state.items() if name.startswith("eyes.")}


# --- 8-bit storage


def pack(state):
    """Matrices as int8 with one float16 scale per output row (largest entry = 127), vectors as float16."""
    packed = {}
    for name, weight in state.items():
        if weight.ndim < 2:
            packed[name] = weight.to(torch.float16)
            continue
        rows = weight.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp_min(1e-7).to(torch.float16).clamp_min(6e-8)
        packed[name] = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).view(weight.shape)
        packed[f"{name}:scale"] = scale
    return packed


def unpack(packed):
    """The float32 weights of a packed file."""
    state = {}
    for name, weight in packed.items():
        if name.endswith(":scale"):
            continue
        scale = packed.get(f"{name}:scale")
        state[name] = (
            weight.float() if scale is None else weight.float() * scale.float().view(-1, *[1] * (weight.ndim - 1))
        )
    return state


# --- what is not stored


def position_table(width, side):
    """(1, side * side, width) sine-cosine table of token positions; first half says the column, second half the row.

    SD3 cuts the h x w tokens of an image out of the middle of the table, so a 64 px image uses rows and columns 30
    to 33.
    """
    where = torch.arange(side, dtype=torch.float64)
    waves = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    line = torch.cat([torch.sin(where[:, None] * waves), torch.cos(where[:, None] * waves)], 1)  # (side, width / 2)
    columns, rows = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], 2).reshape(1, side * side, width).float()


def text_encoder(seed=TEXT_SEED):
    """A CLIP-L (12 layers, 768 wide) of seeded noise, sized so that words stay apart: see text_std."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in text_table().items():
        if name.endswith(("layer_norm1.weight", "layer_norm2.weight", "final_layer_norm.weight")):
            state[name] = torch.ones(shape)
        elif len(shape) == 1:
            state[name] = torch.zeros(shape)
        elif name == "transformer.text_projection.weight":
            state[name] = torch.eye(shape[0])
        else:
            state[name] = torch.randn(shape, generator=rng) * text_std(name, shape)
    return state | {"logit_scale": torch.tensor(4.6055)}


def text_std(name, shape):
    """Spread of one matrix. Tokens 1, positions 0.3; a layer adds little to its input, so a token's own word stays the
    loudest."""
    if "token_embedding" in name:
        return 1.0
    if "position_embedding" in name:
        return 0.3
    small = 0.3 if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0
    return small / math.sqrt(shape[1])


def text_table(layers=12, tokens=49408, length=77):
    """Name -> shape of CLIP-L's weights as SD3 files name them, in the order in which the seed fills them."""
    table = {
        "transformer.text_model.embeddings.token_embedding.weight": (tokens, CLIP),
        "transformer.text_model.embeddings.position_embedding.weight": (length, CLIP),
    }
    for i in range(layers):
        layer = f"transformer.text_model.encoder.layers.{i}"
        for part, (rows, columns) in {
            "self_attn.q_proj": (CLIP, CLIP),
            "self_attn.k_proj": (CLIP, CLIP),
            "self_attn.v_proj": (CLIP, CLIP),
            "self_attn.out_proj": (CLIP, CLIP),
            "mlp.fc1": (4 * CLIP, CLIP),
            "mlp.fc2": (CLIP, 4 * CLIP),
        }.items():
            table |= {f"{layer}.{part}.weight": (rows, columns), f"{layer}.{part}.bias": (rows,)}
        for norm in ("layer_norm1", "layer_norm2"):
            table |= {f"{layer}.{norm}.weight": (CLIP,), f"{layer}.{norm}.bias": (CLIP,)}
    return table | {
        "transformer.text_model.final_layer_norm.weight": (CLIP,),
        "transformer.text_model.final_layer_norm.bias": (CLIP,),
        "transformer.text_projection.weight": (CLIP, CLIP),
    }


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "toy_world.safetensors"))
