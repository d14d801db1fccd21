"""Frozen layers that cast again in backward: torch's own numbers, bit for bit, and no copy of the weight kept."""

import functools

import pytest
import torch
import torch.nn.functional as F
from trainyard.tests.unit.toy import rng
from trainyard.trainers.memory.frozen_layers import apply_frozen_convolution, apply_frozen_linear

INPUTS = {  # (..., 13) in the layouts that models give their layers
    "rows": lambda: torch.randn(37, 13, generator=rng()),
    "one row": lambda: torch.randn(1, 13, generator=rng()),
    "columns": lambda: torch.randn(13, 37, generator=rng()).t(),
    "tokens": lambda: torch.randn(2, 37, 13, generator=rng()),
    "some tokens of each": lambda: torch.randn(2, 50, 13, generator=rng())[:, :37],
    "some channels": lambda: torch.randn(2, 37, 26, generator=rng())[..., :13],
    "channels first": lambda: torch.randn(2, 13, 37, generator=rng()).transpose(1, 2),
    "one for all": lambda: torch.randn(1, 37, 13, generator=rng()).expand(3, 37, 13),
    "grid": lambda: torch.randn(2, 3, 7, 13, generator=rng()),
    "image": lambda: torch.randn(2, 13, 5, 7, generator=rng()).permute(0, 2, 3, 1),
}
GRADIENTS = {
    "plain": lambda y: torch.randn(y.shape, generator=rng(1)).to(y.dtype),
    "one number": lambda y: torch.full((1,), 0.3, dtype=y.dtype).expand(y.shape),
    "turned": lambda y: torch.randn(y.mT.shape, generator=rng(1)).to(y.dtype).mT,
}


def stored(shape, storage):
    return (torch.randn(shape, generator=rng(2)) / 4).to(storage)


def casting(weight, bias, dtype):
    """(cast, calls): what casts the stored numbers, and how often it was asked."""
    calls = []

    def cast():
        calls.append(1)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    return cast, calls


def gradient(layer, x, name):
    """(output, gradient of x)."""
    x = x.detach().requires_grad_()
    y = layer(x)
    (found,) = torch.autograd.grad(y, x, GRADIENTS[name](y))
    return y, found


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", INPUTS)
def test_a_frozen_linear_layer_has_torchs_numbers_bit_for_bit(layout, with_bias, gradients):
    for storage, dtype in ((torch.float8_e4m3fn, torch.bfloat16), (torch.float16, torch.float32)):
        x, weight, bias = INPUTS[layout]().to(dtype), stored((11, 13), storage), stored(11, storage)
        cast, calls = casting(weight, bias if with_bias else None, dtype)
        y, found = gradient(lambda x, cast=cast: apply_frozen_linear(x, cast), x, gradients)
        expected, wanted = gradient(lambda x, cast=cast: F.linear(x, *cast()), x, gradients)
        assert torch.equal(y, expected) and torch.equal(found, wanted), f"{storage} as {dtype}"
        assert len(calls) == 3, "once in forward, once in backward, and once by torch"


CONVOLUTIONS = {
    "1d": ((2, 6, 9), (4, 6, 3), dict(stride=(1,), padding=(1,), dilation=(1,), groups=1)),
    "1x1": ((2, 6, 5, 7), (4, 6, 1, 1), dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)),
    "3x3": ((2, 6, 5, 7), (4, 6, 3, 3), dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)),
    "stride 2": ((1, 6, 8, 8), (4, 6, 3, 3), dict(stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1)),
    "dilated": ((1, 6, 9, 9), (4, 6, 3, 3), dict(stride=(1, 1), padding=(2, 2), dilation=(2, 2), groups=1)),
    "grouped": ((2, 6, 5, 5), (6, 2, 3, 3), dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=3)),
    "3d": ((1, 4, 3, 5, 5), (3, 4, 2, 3, 3), dict(stride=(1, 1, 1), padding=(0, 1, 1), dilation=(1, 1, 1), groups=1)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_frozen_convolution_has_torchs_numbers_bit_for_bit(kind, channels_last):
    shape, kernel, geometry = CONVOLUTIONS[kind]
    plain = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    x = torch.randn(shape, generator=rng())
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    cast, _ = casting(stored(kernel, torch.float8_e4m3fn), stored(kernel[0], torch.float8_e4m3fn), torch.float32)
    y, found = gradient(lambda x: apply_frozen_convolution(x, cast, geometry), x, "plain")
    expected, wanted = gradient(lambda x: plain(x, *cast(), **geometry), x, "plain")
    assert torch.equal(y, expected) and torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_neither_the_cast_weight_nor_the_input_is_kept_for_backward(kind):
    if kind == "linear":
        x, weight, bias = torch.randn(5, 13), stored((11, 13), torch.float8_e4m3fn), None
        frozen, plain = apply_frozen_linear, F.linear
    else:
        shape, kernel, geometry = CONVOLUTIONS["3x3"]
        x, weight, bias = torch.randn(shape), stored(kernel, torch.float8_e4m3fn), None
        frozen, plain = functools.partial(apply_frozen_convolution, geometry=geometry), F.conv2d
    cast, _ = casting(weight, bias, torch.float32)
    for layer, is_kept in ((lambda x: frozen(x, cast), False), (lambda x: plain(x, *cast()), True)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(x.requires_grad_())
        assert bool(kept) == is_kept, [tuple(t.shape) for t in kept]
