"""Frozen layers whose weight is cast for every call, with the cast made again in backward.

Where a weight is stored in 8 bits, or in another precision than the one that is computed in, autograd keeps the cast
copy of every layer from forward to backward: a second model, 24 GB for Flux in bf16. The gradient of a frozen layer's
input needs the weight and nothing else, and a cast costs little beside the product, so here neither the copy nor the
input is kept. Forward and backward call the kernels that torch would call, so results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CastParameters = Callable[[], "tuple[Tensor, Tensor | None]"]  # makes (weight, bias) as the layer computes with them


def apply_frozen_linear(x: Tensor, cast: CastParameters) -> Tensor:
    """x W^T + b for x (..., inputs) of at least two axes, with a gradient for x alone. `cast` is called once in forward
    and once in backward."""
    return FrozenLinear.apply(x, cast)  # pyright: ignore[reportReturnType]


def apply_frozen_convolution(x: Tensor, cast: CastParameters, geometry: dict) -> Tensor:
    """The convolution of x with a gradient for x alone. `geometry`: stride, padding and dilation as tuples, and
    groups."""
    return FrozenConvolution.apply(x, cast, geometry)  # pyright: ignore[reportReturnType]


class FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cast):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, bias = cast()
        ctx.cast, ctx.shape, ctx.is_folded = cast, x.shape, can_fold(x)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear_input_gradient(grad, ctx.cast()[0], ctx.is_folded).view(ctx.shape), None


def can_fold(x: Tensor) -> bool:
    """Whether all rows of x lie at one distance in memory. torch then multiplies them as one matrix, and otherwise as a
    batch of matrices."""
    try:
        x.view(-1, x.shape[-1])
    except RuntimeError:
        return False
    return True


def linear_input_gradient(grad: Tensor, weight: Tensor, is_folded: bool) -> Tensor:
    """grad W, by the kernel that torch's own backward calls."""
    if is_folded:
        return grad.reshape(-1, grad.shape[-1]).mm(weight)
    batches = grad.reshape(-1, *grad.shape[-2:])
    return batches.bmm(weight.expand(len(batches), *weight.shape))


class FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cast, geometry):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, bias = cast()
        ctx.cast, ctx.geometry, ctx.layout = cast, geometry, (x.shape, x.stride(), x.dtype, x.device)
        return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim](x, weight, bias, **geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, stride, dtype, device = ctx.layout
        geometry, like_x = ctx.geometry, torch.empty_strided(shape, stride, dtype=dtype, device=device)
        found, _, _ = torch.ops.aten.convolution_backward(
            grad,
            like_x,  # its values are not read: they matter for the weight's gradient
            ctx.cast()[0],
            None,
            geometry["stride"],
            geometry["padding"],
            geometry["dilation"],
            False,
            [0] * len(geometry["stride"]),
            geometry["groups"],
            [True, False, False],
        )
        return found, None, None
