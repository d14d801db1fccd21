"""A LoRA as kohya-ss/sd-scripts trains it (networks/lora.py, library/sdxl_original_unet.py, flux_models.py; state of
2025), told in our own words and on our own model, data and loop, as a peer to be measured against.

Every chosen layer has its forward replaced by one that asks the old forward and adds up(down(x)) * multiplier * scale.
On UNets the layers are sd-scripts' own default: all that is linear or a 1x1 convolution inside a spatial transformer,
which is our default too. On Flux and SD3 it would also train the blocks' modulation; here it has our layers, so that
the work is the same.

Emulated: fp32 LoRA weights in a bf16 model, cast where autocast would cast them; alpha = rank; its checkpoints:
residual and transformer blocks of a UNet (re-entrant, so that captions take a gradient that nobody reads), the blocks
of a transformer (not re-entrant), both keeping the state of the random numbers. Left out, in its favour: autocast's
norms and loss in fp32, which keep more; checkpoints around single convolutions and the embedders, which save next to
nothing; accelerate. Its loss weighting is ours.
"""

from __future__ import annotations

import contextlib
import warnings

import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...trainers.adapters.adapters import select_target_layers
from ...trainers.adapters.layers import is_linear


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Conv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), None)


class Lora(nn.Module):
    """What stands in for one layer's forward."""

    def __init__(self, layer, rank: int, multiplier: float = 1.0):
        super().__init__()
        self.down, self.up = linear_pair(layer, rank) if is_linear(layer) else convolution_pair(layer, rank)
        nn.init.zeros_(self.up.weight)
        self.original, self.multiplier, self.scale = layer.forward, multiplier, 1.0

    def forward(self, x):
        return self.original(x) + self.up(self.down(x)) * self.multiplier * self.scale


def linear_pair(layer, rank):
    return Linear(layer.in_features, rank, bias=False), Linear(rank, layer.out_features, bias=False)


def convolution_pair(layer, rank):
    down = Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
    return down, Conv2d(rank, layer.out_channels, 1, bias=False)


class Loras(nn.ModuleDict):
    """Those of a network, by layer path with slashes; fp32, wherever the network is. Behaves like our Adapters for a
    method of ours."""

    def __init__(self, network, settings):
        self.__dict__["layers"] = select_target_layers(network, settings)
        super().__init__({name.replace(".", "/"): Lora(layer, settings.rank) for name, layer in self.layers.items()})

    @contextlib.contextmanager
    def installed(self):
        for layer, lora in zip(self.layers.values(), self.values(), strict=True):
            layer.forward = lora.forward
        try:
            yield self
        finally:
            for layer in self.layers.values():
                del layer.forward

    def dropout_active(self, rng):
        return contextlib.nullcontext()


@contextlib.contextmanager
def checkpointed(classes):
    """The blocks of these classes keep their inputs and compute the rest again. A first block that needs no gradient
    says so each time."""
    before = [(cls, cls.forward) for cls in classes]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        try:
            for cls, forward in before:
                cls.forward = recomputed(forward, reentrant=of_unet(cls))
            yield
        finally:
            for cls, forward in before:
                cls.forward = forward


def of_unet(cls) -> bool:
    return cls.__name__ in ("BasicTransformerBlock", "ResBlock")


def recomputed(forward, reentrant):
    def run(block, *args, **kwargs):
        names, count = list(kwargs), len(args)

        def body(*values):
            return forward(block, *values[:count], **dict(zip(names, values[count:], strict=True)))

        return checkpoint(body, *args, *kwargs.values(), use_reentrant=reentrant)

    return run


def asking(cond: dict) -> dict:
    """A caption whose tensors take a gradient, without which a re-entrant checkpoint would pass none to what is inside
    it."""
    return {
        name: value.detach().requires_grad_() if name in ("cross_attn", "pooled_output") else value
        for name, value in cond.items()
    }
