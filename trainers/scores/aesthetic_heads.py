"""Published aesthetic heads: a few linear layers that turn a CLIP or SigLIP image embedding into a rating.

LAION's predictors (Schuhmann 2022: one linear layer or five, in reluMSE with ReLU between them) and Aesthetic
Predictor V2.5 (discus0434) are such layers on embeddings of unit length. SigLIP's own embedding comes from a pooling
layer that ComfyUI leaves out; `SiglipPooler` is that layer.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODER_NAMES = {
    512: "CLIP ViT-B/32 or B/16",
    768: "CLIP ViT-L/14 (clip_vision of openai/clip-vit-large-patch14)",
    1024: "CLIP ViT-H/14",
    1152: "SigLIP so400m (sigclip_vision_patch14_384)",
    1280: "CLIP ViT-bigG/14",
}
# A file names each linear layer by its place in its nn.Sequential; activations and dropout have places and no tensors.
LAION_LINEAR_PLACES = (0, 2, 4, 6, 7)  # dropout at 1, 3 and 5; ReLU would leave no 6 and 7 side by side
LAION_RELU_PLACES = (0, 3, 6, 9, 11)  # ReLU and dropout at 1-2, 4-5 and 7-8, ReLU at 10
V25_PLACES, V25_SIZES = (0, 2, 4, 6, 8), (1152, 1024, 128, 64, 16, 1)  # dropout between them
POOLER_PREFIX = "vision_model.head."
SIGLIP_ATTENTION_HEADS = {768: 12, 1024: 16, 1152: 16}  # of SigLIP base, large and so400m: a file's shapes do not tell


class AestheticMLP(nn.Module):
    """Linear layers in sequence on the normalised embedding: (B, width) -> (B,) ratings. `relu`: each but the last is
    followed by ReLU. The dropout that some were trained with is left out, as it does nothing at inference."""

    def __init__(self, layers: list[tuple[Tensor, Tensor | None]], relu: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(linear_from_tensors(*layer) for layer in layers)
        self.relu = relu
        if relu:  # in state_dict, whose hash identifies the model: the same layers without ReLU are another one
            self.register_buffer("has_relu", torch.ones(1))
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        return self.layers[0].in_features  # pyright: ignore[reportReturnType]  a ModuleList yields Modules

    def forward(self, embedding: Tensor) -> Tensor:
        h = F.normalize(embedding.float(), dim=-1)
        for number, layer in enumerate(self.layers, 1):
            h = layer(h)
            if self.relu and number < len(self.layers):
                h = F.relu(h)
        return h[:, 0]


def linear_from_tensors(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


class SiglipPooler(nn.Module):
    """SigLIP's attention pooling: (B, tokens, width) -> (B, width) (Zhai et al. 2023)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.float()
        h = self.attention(self.probe.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)[0]
        return (h + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layernorm(h)), approximate="tanh")))[:, 0]


class AestheticHead(nn.Module):
    """The output of an image encoder -> (B,) ratings: embeddings (B, width), or tokens (B, T, width) where there is a
    pooler."""

    def __init__(self, chain: AestheticMLP, pooler: SiglipPooler | None = None):
        super().__init__()
        self.chain, self.pooler = chain, pooler  # the names are keys of state_dict, whose hash identifies the model
        if pooler is not None and pooler.probe.shape[-1] != chain.width:
            raise ValueError(
                f"The head needs {chain.width} numbers an image and the pooler gives {pooler.probe.shape[-1]}. "
                f"Choose the SigLIP file that the head was trained on: {describe_encoder(chain.width)}."
            )

    @property
    def width(self) -> int:
        return self.chain.width

    def forward(self, encoded: Tensor) -> Tensor:
        return self.chain(encoded if self.pooler is None else self.pooler(encoded))


def describe_encoder(width: int) -> str:
    """The image encoders whose embedding has this width, in words."""
    return ENCODER_NAMES.get(width, f"one that gives {width} numbers an image")


def check_embedding_width(head: AestheticHead, width: int) -> None:
    """ValueError unless the encoder's embedding has the width that the head was trained on."""
    if head.width != width:
        raise ValueError(
            f"This head needs embeddings of {head.width} features, and the connected CLIP_VISION gives {width} "
            f"({describe_encoder(width)}). It needs {describe_encoder(head.width)}."
        )


# -- files -------------------------------------------------------------------------------------------------------------


def read_aesthetic_head(path, pooler_path=None) -> AestheticHead:
    """The head in a .safetensors, .pth, .pt or .ckpt file, with SigLIP's pooler from a file that holds
    `vision_model.head.*`. Only tensors are read; a file that would run code is refused."""
    chain = build_aesthetic_mlp(read_head_tensors(path), Path(path).name)
    return AestheticHead(chain, None if pooler_path is None else read_siglip_pooler(pooler_path))


def read_head_tensors(path) -> dict[str, Tensor]:
    """The named tensors in a file. ValueError for a pickle that holds anything else."""
    path = Path(path)
    if path.suffix in (".safetensors", ".sft"):
        from ..files import read_safetensors

        return read_safetensors(path)[0]
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(
            f"{path.name} holds more than weights, or is damaged ({reason}); it is not opened, because it could run "
            "code. Save its state_dict as .safetensors, or get it from its author's page."
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"{path.name} holds {type(found).__name__} and not a plain list of named tensors. It is not an "
            "aesthetic head."
        )
    return found


def build_aesthetic_mlp(tensors: dict[str, Tensor], name: str) -> AestheticMLP:
    """The linear layers in the order of the numbers in their names, with what the numbers say lay between them.
    ValueError for anything else."""
    weights = sorted((key for key in tensors if key.endswith("weight")), key=layer_sort_key)
    biases = [key.removesuffix("weight") + "bias" for key in weights]
    layers = [
        (tensors[weight].float(), tensors[bias].float() if bias in tensors else None)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    others = set(tensors) - set(weights) - set(biases)
    if not layers or others or any(weight.ndim != 2 for weight, _ in layers):
        found = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(tensors.items())[:4]) or "nothing"
        raise ValueError(
            f"{name} is not an aesthetic head, which is made of linear layers and nothing else; it holds {found}."
        )
    sizes = [tuple(weight.shape) for weight, _ in layers]
    if sizes[-1][0] != 1 or any(a[0] != b[1] for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(
            f"The layers of {name} do not follow on each other to one rating: "
            f"{' -> '.join(f'{b} to {a}' for a, b in sizes)}."
        )
    return AestheticMLP(layers, relu=has_relu_between(weights, (sizes[0][1], *(a for a, _ in sizes)), name))


def has_relu_between(weights: list[str], sizes: tuple[int, ...], name: str) -> bool:
    """Whether ReLU follows every layer but the last, by the layers' places in their nn.Sequential. ValueError where the
    places leave it open: a wrong guess would give other ratings in another order."""
    if len(weights) == 1:
        return False
    found = [re.fullmatch(r"((?:.*\.)?)(\d+)\.weight", key) for key in weights]
    prefixes = {match[1] if match else None for match in found}
    places = tuple(int(match[2]) for match in found if match)
    if len(prefixes) == 1 and None not in prefixes:
        if places == LAION_RELU_PLACES:
            return True
        if places == LAION_LINEAR_PLACES or (places, sizes) == (V25_PLACES, V25_SIZES):
            return False
        if places == tuple(range(places[0], places[0] + len(places))):
            return False  # nothing between them
    raise ValueError(
        f"{name} does not say what lies between its layers {', '.join(weights)}: an activation such as ReLU or only "
        "dropout, and the ratings depend on it. Known are the numbers of LAION's heads "
        f"({', '.join(map(str, LAION_LINEAR_PLACES))} without ReLU, {', '.join(map(str, LAION_RELU_PLACES))} with it) "
        "and of Aesthetic Predictor V2.5. If only dropout lies between, rename the layers to 0, 1, 2, ... without gaps."
    )


def layer_sort_key(key: str) -> list:
    """Natural order: layers.2 before layers.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def read_siglip_pooler(path) -> SiglipPooler:
    """SigLIP's pooling layer from the file of the whole model; nothing else of it is read."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        tensors = {
            key.removeprefix(POOLER_PREFIX): file.get_tensor(key).float()
            for key in file.keys()
            if key.startswith(POOLER_PREFIX)
        }
    if "probe" not in tensors:
        raise ValueError(
            f"{Path(path).name} holds no pooling layer ({POOLER_PREFIX}*), as the files that ComfyUI's makers share do "
            "not. Put model.safetensors of google/siglip-so400m-patch14-384 (3.5 GB, of which 61 MB are read) into "
            "models/clip_vision and choose it here."
        )
    width, hidden = tensors["probe"].shape[-1], tensors["mlp.fc1.weight"].shape[0]
    pooler = SiglipPooler(width, SIGLIP_ATTENTION_HEADS.get(width, max(1, width // 64)), hidden)
    pooler.load_state_dict(tensors)
    return pooler
