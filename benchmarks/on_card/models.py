"""Models at published size with random weights: made in the dtype that they stay in, in main memory, as a loader
does it, and never twice. ComfyUI's memory manager takes them to the card."""

from __future__ import annotations

import math
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import CoreModelPatcher
from trainyard.benchmarks import published, shapes
from trainyard.tests.comfy import families

GIB = 2**30
STEP_ROOM = 2 * GIB  # bytes beside the weights, without which a card is not said to hold them
MEMORY_ROOM = 1 * GIB  # of main memory, beside the weights
DRAWN = 1_000_003  # values that are drawn, and repeated: a prime, so that no two rows of a matrix are alike


class DoesNotFit(Exception):
    """The weights have no room in main memory; the message says so."""


def find_shape(case) -> shapes.Shape:
    if case.is_tiny:
        return shapes.Shape(families.TABLE[case.model], rank=4, tokens=7, about="toy size")
    return published.PUBLISHED[case.model]


@dataclass(frozen=True)
class WeightChoice:
    """What weights are stored in, what the card computes in, and why."""

    stored: torch.dtype
    computed: torch.dtype
    why: str = ""

    @property
    def cast_to(self):
        """What base_model is told: None where nothing is cast."""
        return None if self.stored == self.computed else self.computed


def find_compute_dtype(device) -> torch.dtype:
    """What ComfyUI computes in on this card: Turing and older have no bf16."""
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def count_weights(shape: shapes.Shape) -> int:
    """Numbers in the whole network."""
    return sum(p.numel() for p in shapes.base_model(shape, torch.bfloat16, "meta").parameters())


def choose_weights(count: int, computed: torch.dtype, card_bytes: float, memory_bytes: float) -> WeightChoice:
    """In the dtype of the computation where card and main memory hold that, else in fp8, whose weights are cast layer by
    layer. Raises DoesNotFit where main memory holds neither."""
    size = count * computed.itemsize
    is_held = size + min(size, STEP_ROOM) <= card_bytes
    if is_held and size + MEMORY_ROOM <= memory_bytes:
        return WeightChoice(computed, computed)
    if count + MEMORY_ROOM > memory_bytes:
        raise DoesNotFit(
            f"its weights take {count / GIB:.1f} GiB even in fp8, and {memory_bytes / GIB:.1f} GiB of main memory are free"
        )
    where, held = ("main memory has free", memory_bytes) if is_held else ("the card has", card_bytes)
    why = f"stored in fp8: {size / GIB:.1f} GiB of weights in {name_dtype(computed)}, and {where} {held / GIB:.1f} GiB"
    return WeightChoice(torch.float8_e4m3fn, computed, why)


def name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_model(shape: shapes.Shape, weights: WeightChoice, values: bool = True, inference: bool = True):
    """A MODEL as a loader gives it. `values`: fill it; without them its memory is never touched. `inference`: made under
    inference mode, as ComfyUI's executor runs loaders."""
    with torch.inference_mode(inference):
        model = shapes.base_model(shape, weights.stored, "cpu", weights.cast_to)
        if values:
            fill_weights(model.diffusion_model)
    patcher = CoreModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    patcher.set_model_optimized_attention(attention_pytorch)  # which ComfyUI takes on a card, pretended or not
    return patcher


def fill_weights(network, seed: int = 0):
    """Values at the scale of families.draw, in place: drawn once and copied, because drawing 12 billion takes minutes."""
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(seed))
    scaled: dict[tuple, torch.Tensor] = {}
    with torch.no_grad():
        for name, value in network.state_dict(keep_vars=True).items():
            if isinstance(value, torch.nn.Parameter) or name.endswith("pos_embed"):
                kind = value.dtype, *find_scale(name, value.shape)
                if kind not in scaled:
                    scaled[kind] = (drawn * kind[1] + kind[2]).to(value.dtype)
                repeat_into(value, scaled[kind])


def find_scale(name: str, shape) -> tuple[float, float]:
    """(deviation, mean): matrices with variance 1/fan-in, norm weights about 1, biases about 0."""
    if len(shape) >= 2:
        return 1 / math.sqrt(math.prod(shape[1:])), 0.0
    return 0.05, 1.0 if name.endswith(("weight", "scale")) else 0.0


def repeat_into(value, source):
    flat = value.view(-1)
    for start in range(0, len(flat), len(source)):
        part = flat[start : start + len(source)]
        part.copy_(source[: len(part)])
