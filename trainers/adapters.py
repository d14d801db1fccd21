"""Low-rank adapters beside a frozen network, with a strength that may change between two calls of one step.

An adapter adds to its layer's output (Hu et al. 2021: W x + s * alpha/rank * B A x). It never builds a changed weight: that
would cost a dense weight gradient per layer, and would not work on quantised or offloaded weights.
"""

from __future__ import annotations

import contextlib
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import AdapterSettings

# Layer names over all families that ComfyUI loads: UNet attn1/attn2 and their proj_in/out, Flux and HunyuanVideo's fused
# single-stream linear1/2, and the attention and feed-forward names of the other transformers, of T5 and of diffusers too. Diffusers keeps whole
# transformers under `attentions.`, and a proj_out at the top is a model's last layer: neither makes a layer attention.
ATTENTION = re.compile(r"(^|\.)\w*(attn|[aA]ttention(?!s\.))\w*\.|\.(proj_in|proj_out)$|(^|\.)single_blocks\.\d+\.linear[12]$")
MLP = re.compile(r"(^|\.)(ff|ff_context|ffn|feed_forward|DenseReluDense|\w*mlp[CX]?)\.|\.proj_mlp$")
# Modulation, time and guidance embedders steer the whole network.
STEERING = re.compile(r"mod(ulation)?s?\b|adaLN|embed|time_|(^|\.)norm|(^|\.)\w*norm\w*\.|\bllm_adapter\b", re.IGNORECASE)
NEVER = "distilled_guidance"  # Chroma's distilled modulation breaks when it is trained
# The first and last convolution of a UNet (four channels on one side) and a transformer's patch embedding.
STEM = re.compile(r"^(conv_in|conv_out|input_blocks\.0\.0|out\.\d+)$|embed|^img_in\.")


def wanted(settings: AdapterSettings):
    """name -> bool for linear layers and 1x1 convolutions."""
    if settings.targets == "regex":
        pattern = re.compile(settings.pattern)
        return lambda name: bool(pattern.search(name))
    if settings.targets == "all linear":
        return lambda name: True
    groups = (ATTENTION,) if settings.targets == "attention" else (ATTENTION, MLP)
    return lambda name: not STEERING.search(name) and any(group.search(name) for group in groups)


def is_pointwise(layer) -> bool:
    return layer.weight.ndim == 2 or all(k == 1 for k in layer.kernel_size)


def adaptable(network: nn.Module) -> dict[str, nn.Module]:
    """Every linear and convolution layer that may be trained, found by what it has: quantised layers are no subclass of nn.Linear."""
    return {name: m for name, m in network.named_modules() if name and NEVER not in name and (is_linear(m) or is_convolution(m))}


def is_linear(m) -> bool:
    weight = getattr(m, "weight", None)
    return hasattr(m, "in_features") and hasattr(m, "out_features") and weight is not None and weight.ndim == 2


def is_convolution(m) -> bool:
    weight = getattr(m, "weight", None)
    plain = getattr(m, "groups", 0) == 1 and not getattr(m, "transposed", False)
    return hasattr(m, "kernel_size") and plain and weight is not None and weight.ndim in (4, 5)


def select(network: nn.Module, settings: AdapterSettings) -> dict[str, nn.Module]:
    """Layers that get an adapter, in the network's own order. Raises ValueError when there are none."""
    want = wanted(settings)
    layers = adaptable(network)
    chosen = {n: m for n, m in layers.items() if (want(n) if is_pointwise(m) else settings.conv and not STEM.search(n))}
    if not chosen:
        some = ", ".join(list(layers)[:6])
        raise ValueError(
            f"No layer matches targets = {settings.targets!r}"
            + (f", pattern = {settings.pattern!r}" if settings.pattern else "")
            + f"; nothing would be trained. The model has {len(layers)} layers such as {some}."
        )
    return chosen


def size(layer) -> tuple[int, int]:
    """(inputs, outputs) of a layer."""
    return (layer.in_features, layer.out_features) if is_linear(layer) else (layer.in_channels, layer.out_channels)


def scale_of(rank, alpha, rslora) -> float:
    """The factor a loader applies is alpha / rank; rsLoRA (Kalajdzievski 2023) wants alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class Low(nn.Module):
    """One LoRA (Linear, 1x1) or LoCon (k x k) adapter in fp32; `up` starts at zero, so that attaching changes nothing."""

    def __init__(self, layer, rank: int, alpha: float, rslora: bool = False, rng: torch.Generator | None = None):
        super().__init__()
        inputs, outputs = size(layer)
        tail = () if is_linear(layer) else tuple(layer.kernel_size)
        self.down = nn.Parameter(torch.empty(rank, inputs, *tail))
        self.up = nn.Parameter(torch.zeros(outputs, rank, *(1 for _ in tail)))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=rng)
        self.rank, self.scale = rank, scale_of(rank, alpha, rslora)
        self.geometry = None if is_linear(layer) else dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)

    def forward(self, x: Tensor, strength: float = 1.0) -> Tensor:
        """What the layer's output changes by, computed in the dtype of x. Scaled between the two products, where it is rank wide."""
        down, up, factor = self.down.to(x.dtype), self.up.to(x.dtype), self.scale * strength
        if self.geometry is None:
            inner = F.linear(x, down)
            return F.linear(inner if factor == 1 else inner * factor, up)
        conv = F.conv2d if down.ndim == 4 else F.conv3d
        inner = conv(x, down, **self.geometry)
        return conv(inner if factor == 1 else inner * factor, up)

    def tensors(self) -> dict[str, Tensor]:
        """By file suffix. alpha is what a loader divides by the rank, rsLoRA's scale included, so every loader agrees."""
        alpha = torch.tensor(self.scale * self.rank, dtype=torch.float32)
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": alpha}


class Adapters(nn.Module):
    """The adapters of one network: `layers` by module path, and one strength for all of them."""

    def __init__(self, network: nn.Module, settings: AdapterSettings, rng: torch.Generator | None = None):
        super().__init__()
        self.layers = select(network, settings)
        self.lows = nn.ModuleDict()
        for name, layer in self.layers.items():
            rank, alpha = (settings.rank, settings.alpha) if is_pointwise(layer) else (settings.conv_rank, settings.conv_alpha)
            refuse_oversized(name, layer, rank)
            self.lows[name.replace(".", "/")] = Low(layer, rank, alpha or rank, settings.rslora, rng)
        self.strength = 1.0
        self._hooks: list = []

    def low(self, name: str) -> Low:
        return self.lows[name.replace(".", "/")]

    def attach(self):
        """Start adding to the layers' outputs; `detach` takes every hook off again. Attaching twice adds nothing twice."""
        self.detach()
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(self._hook(self.low(name)), with_kwargs=True))

    def _hook(self, low):
        def add(_, args, kwargs, out):
            if self.strength == 0:
                return out
            x = args[0] if args else kwargs["input"]
            return out + low(x, self.strength).to(out.dtype)

        return add

    def detach(self):
        while self._hooks:
            self._hooks.pop().remove()

    @contextlib.contextmanager
    def attached(self):
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    @contextlib.contextmanager
    def at(self, strength: float):
        """The same adapters at another strength; the previous one comes back, after errors too."""
        before, self.strength = self.strength, strength
        try:
            yield self
        finally:
            self.strength = before

    def tensors(self, key=None) -> tuple[dict[str, Tensor], list[str]]:
        """(file tensors, names of untouched layers). `key` maps a layer's path to its name in the file. Adapters whose output
        is still zero (layers the model never calls) are left out: loading them would change nothing."""
        key = key or (lambda name: kohya("lora_unet", name))
        out, untouched = {}, []
        for name in self.layers:
            low = self.low(name)
            if not low.up.any():
                untouched.append(name)
                continue
            for suffix, value in low.tensors().items():
                out[f"{key(name)}.{suffix}"] = value.detach().to("cpu", torch.float32).clone().contiguous()
        return out, untouched


def refuse_oversized(name, layer, rank):
    if rank > min(size(layer)):
        inputs, outputs = size(layer)
        raise ValueError(
            f"rank is {rank}, but layer {name} has only {inputs} inputs and {outputs} outputs; "
            f"choose a rank of at most {min(inputs, outputs)}, or narrow the adapter's targets."
        )


def kohya(prefix: str, name: str) -> str:
    """The key every tool loads: lora_unet_double_blocks_0_img_attn_qkv (kohya-ss sd-scripts, networks/lora.py)."""
    return f"{prefix}_{name.replace('.', '_')}"
