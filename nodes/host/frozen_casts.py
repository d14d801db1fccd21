"""The host's layers cast their frozen weights again in backward, for as long as a model trains."""

from __future__ import annotations

import contextlib
import functools

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...trainers.memory.frozen_layers import apply_frozen_convolution, apply_frozen_linear

# The host's methods that cast and then call torch's kernel with what they cast. Layers of other nodes (GGUF, say) cast
# in ways of their own and stay as they are.
LINEAR_CASTS = ("disable_weight_init.Linear", "fp8_ops.Linear", "mixed_precision_ops.<locals>.MixedPrecisionOps.Linear")
CONVOLUTION_CASTS = ("disable_weight_init.Conv1d", "disable_weight_init.Conv2d", "disable_weight_init.Conv3d")
CAST_METHOD = "forward_comfy_cast_weights"


@contextlib.contextmanager
def recast_frozen_weights(network):
    """Layers of the network's classes keep no cast copy of a frozen weight for backward, and cast quantised weights in
    every pass. Weights that wait on another device are kept as they came: they would have to make their way twice."""
    before = []
    try:
        for cls in {type(m) for m in network.modules()}:
            if (apply := find_frozen_call(cls)) is not None:
                original = getattr(cls, CAST_METHOD)
                before.append((cls, cls.__dict__.get(CAST_METHOD)))
                setattr(cls, CAST_METHOD, wrap_cast_method(original, apply))
        yield
    finally:
        for cls, own in before:
            if own is None:
                delattr(cls, CAST_METHOD)
            else:
                setattr(cls, CAST_METHOD, own)


def find_frozen_call(cls):
    """What to call in place of a class's method that casts and computes, where it is one of the host's, or None."""
    method = getattr(cls, CAST_METHOD, None)
    steps = [method, *(getattr(cls, name) for name in ("_forward", "_conv_forward") if hasattr(cls, name))]
    if any(getattr(step, "__module__", None) not in (comfy.ops.__name__, "torch.nn.modules.conv") for step in steps):
        return None
    owner = method.__qualname__.removesuffix(f".{CAST_METHOD}")
    return call_linear if owner in LINEAR_CASTS else call_convolution if owner in CONVOLUTION_CASTS else None


def wrap_cast_method(original, apply):
    @functools.wraps(original)
    def forward(layer, x, *args, **kwargs):
        if can_recast(layer, x):
            out = apply(layer, x, *args, **kwargs)
            if out is not None:
                return out
        if apply is call_linear and isinstance(layer.weight, QuantizedTensor):
            return call_dequantised(layer, x)
        return original(layer, x, *args, **kwargs)

    return forward


def can_recast(layer, x) -> bool:
    """Whether autograd would keep a copy of this layer's weight that can be made again."""
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and x.ndim >= 2
        and not torch.compiler.is_compiling()
        and not hasattr(layer, "_v")  # dynamic VRAM
        and not any(p.requires_grad or p.device != x.device for p in parameters)
        and (
            layer.weight.dtype != x.dtype or bool(layer.weight_function) or type(layer.weight.data) is not torch.Tensor
        )
    )


def call_linear(layer, x, compute_dtype=None, want_requant=False, weight_only_quant=False):
    """The layer's output, or None where it takes its weight in another way."""
    if weight_only_quant:
        return None
    more = {"compute_dtype": compute_dtype, "want_requant": want_requant} if compute_dtype or want_requant else {}
    return apply_frozen_linear(x, make_cast(layer, x, more))


def call_dequantised(layer, x):
    """The output of a layer whose quantised weight waits on another device, or that has no gradient. The host would
    multiply in the weight's format wherever its kind has such a product, also on the CPU."""
    weight, bias, _ = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    cast = lambda: (dequantise(weight), bias)
    if torch.is_grad_enabled() and x.requires_grad and x.ndim >= 2 and not torch.compiler.is_compiling():
        return apply_frozen_linear(x, cast)
    return torch.nn.functional.linear(x, *cast())


def dequantise(weight):
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def call_convolution(layer, x, autopad=None):
    """The layer's output, or None where it takes its weight in another way."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or autopad is not None:
        return None
    if layer.weight.ndim == 5 and getattr(comfy.ops, "NVIDIA_MEMORY_CONV_BUG_WORKAROUND", False):
        return None
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return apply_frozen_convolution(x, make_cast(layer, x, {}), geometry)


def make_cast(layer, x, more: dict):
    """A function that gives the layer's (weight, bias) as the host casts them for x."""
    dtype, device = x.dtype, x.device

    def cast():
        weight, bias, _ = comfy.ops.cast_bias_weight(
            layer, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True, **more
        )
        return dequantise(weight), bias

    return cast
