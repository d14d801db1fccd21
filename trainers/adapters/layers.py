"""The algorithms that an adapter can have, each as an addition to its layer's output.

LoRA (Hu et al. 2021), DoRA (Liu et al. 2024), LoHa (Hyeon-Woo et al. 2022) and LoKr (Yeh et al. 2024, LyCORIS). All
start as no change at all, hold their numbers in fp32 and compute in the dtype of what flows through the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..settings import DORA, LOHA, LOKR, LORA


def is_linear(m) -> bool:
    weight = getattr(m, "weight", None)
    return hasattr(m, "in_features") and hasattr(m, "out_features") and weight is not None and weight.ndim == 2


def layer_features(layer) -> tuple[int, int]:
    """(inputs, outputs) of a layer."""
    return (layer.in_features, layer.out_features) if is_linear(layer) else (layer.in_channels, layer.out_channels)


def conv_kernel_size(layer) -> tuple[int, ...]:
    return () if is_linear(layer) else tuple(layer.kernel_size)


def conv_arguments(layer) -> dict | None:
    return None if is_linear(layer) else dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)


def adapter_scale(rank, alpha, rslora) -> float:
    """The factor a loader applies is alpha / rank; rsLoRA (Kalajdzievski 2023) wants alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def apply_weight(x: Tensor, weight: Tensor, geometry: dict | None) -> Tensor:
    """What a layer with this weight and no bias answers."""
    if geometry is None:
        return F.linear(x, weight)
    return (F.conv2d if weight.ndim == 4 else F.conv3d)(x, weight, **geometry)


def apply_low_rank(
    x: Tensor, down: Tensor, up: Tensor, factor: float, geometry: dict | None, drop: Callable | None = None
) -> Tensor:
    """factor * up(down(x)), scaled between the two products, where it is rank wide. `drop` leaves some of the inner
    values out."""
    inner = apply_weight(x, down, geometry)
    inner = inner if drop is None else drop(inner, -1 if geometry is None else 1)
    return apply_weight(inner if factor == 1 else inner * factor, up, None if geometry is None else {})


APPLY_INSTEAD = "apply the file to model instead, and train a second LoRA on top"
LOST_PART_REMEDIES = {
    "dora_scale": "only DoRA of LoRA matrices is trained here. Choose DoRA if the file has lora_down.weight, otherwise "
    + APPLY_INSTEAD,
    "diff_b": f"no adapter here changes a bias; {APPLY_INSTEAD}",
    "diff": f"no adapter here adds a whole matrix; {APPLY_INSTEAD}",
}


class LoraLayer(nn.Module):
    """One LoRA (Linear, 1x1) or LoCon (k x k) adapter; `up` starts at zero, so that attaching changes nothing."""

    file_suffixes = {
        "lora_down.weight": "down",
        "lora_up.weight": "up",
    }  # file suffix -> tensor here; the last one starts at zero
    fast_parts = ("up",)  # what LoRA+ teaches faster
    further_suffixes: tuple[str, ...] = ()  # what else `load` takes over

    def __init__(self, layer, rank: int, alpha: float, rslora: bool = False, rng: torch.Generator | None = None):
        super().__init__()
        inputs, outputs = layer_features(layer)
        check_adapter_rank(layer, rank)
        tail = conv_kernel_size(layer)
        self.down = nn.Parameter(torch.empty(rank, inputs, *tail))
        self.up = nn.Parameter(torch.zeros(outputs, rank, *(1 for _ in tail)))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=rng)
        self.rank, self.scale, self.geometry = rank, adapter_scale(rank, alpha, rslora), conv_arguments(layer)

    def forward(self, x: Tensor, strength: float = 1.0, drop: Callable | None = None) -> Tensor:
        """What the layer's output changes by, computed in the dtype of x."""
        return apply_low_rank(x, self.down.to(x.dtype), self.up.to(x.dtype), self.scale * strength, self.geometry, drop)

    def output_change(self, layer, x: Tensor, out: Tensor, strength: float, drop: Callable | None = None) -> Tensor:
        """The same, for adapters that must know what the layer answered."""
        return self(x, strength, drop).to(out.dtype)

    @property
    def zero_initialized(self) -> Tensor:
        """What starts at zero, and learns first."""
        return getattr(self, list(self.file_suffixes.values())[-1])

    def is_zero(self) -> bool:
        """True while the adapter changes nothing."""
        return not self.zero_initialized.any()

    @torch.no_grad()
    def reset_to_zero(self):
        """Change nothing from now on."""
        self.zero_initialized.zero_()

    def export_tensors(self, layer) -> dict[str, Tensor]:
        """By file suffix. alpha is what a loader divides by the rank, rsLoRA's scale included, so every loader
        agrees."""
        alpha = 1.0 if self.scale is None else self.scale * self.rank  # unread then, but LyCORIS fails without one
        tensors = {suffix: getattr(self, name) for suffix, name in self.file_suffixes.items()}
        return tensors | {"alpha": torch.tensor(alpha, dtype=torch.float32)}

    @torch.no_grad()
    def load(self, layer, tensors: dict[str, Tensor]):
        """Take over what a file holds for this layer, brought to the scale of here. Raises ValueError for another
        algorithm or size."""
        if missing := [suffix for suffix in self.file_suffixes if suffix not in tensors]:
            raise ValueError(
                f"it has no {missing[0]}, but {', '.join(sorted(tensors))}; choose the algorithm of the file"
            )
        self.check_nothing_lost(tensors)
        for suffix, name in self.file_suffixes.items():
            own, given = getattr(self, name), tensors[suffix]
            if own.numel() != given.numel() or len(own) != len(given):
                raise ValueError(
                    f"its {suffix} is {tuple(given.shape)}, and {tuple(own.shape)} is expected here; "
                    f"{self.size_remedy(tensors)}"
                )
            own.copy_(given.reshape(own.shape))
        if self.scale is not None and abs((factor := lora_file_scale(tensors, self.rank) / self.scale) - 1) > 1e-6:
            self.zero_initialized.mul_(factor)

    def pad_rank(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's LoRA of a lower rank at the rank of here, with the same effect: the further rows of A are those of
        here, and those of B are zero, so that they can learn. Anything else as it is."""
        down, up = tensors.get("lora_down.weight"), tensors.get("lora_up.weight")
        own = self._parameters.get("down")
        if down is None or up is None or own is None or len(down) >= self.rank:
            return tensors
        more = own.detach()[len(down) :].to(down)
        return tensors | {
            "lora_down.weight": torch.cat([down, more.reshape(len(more), *down.shape[1:])]),
            "lora_up.weight": torch.cat([up, up.new_zeros(len(up), len(more), *up.shape[2:])], dim=1),
            "alpha": torch.tensor(lora_file_scale(tensors, len(down)) * self.rank),
        }

    def check_nothing_lost(self, tensors: dict[str, Tensor]):
        """Raises ValueError for parts of a file's layer that these adapters have no place for."""
        if lost := sorted(tensors.keys() - self.file_suffixes.keys() - {"alpha", *self.further_suffixes}):
            remedy = LOST_PART_REMEDIES.get(lost[0], APPLY_INSTEAD)
            raise ValueError(f"its {', '.join(lost)} would be lost: {remedy}")

    def size_remedy(self, tensors) -> str:
        """What to do about a size that does not fit."""
        return f"the file has rank {len(tensors['lora_down.weight'])}, so set rank to that, or it is from another model"


class DoraLayer(LoraLayer):
    """Weight-decomposed LoRA: W' = (1 + magnitude) * |W| * (W + s B A) / |W + s B A|, row by row. `magnitude` is
    relative to the row's own norm and starts at zero, so that weight decay pulls toward the model, and steps are as
    large for every layer.

    The norms of W are read once; those of W + s B A come from W A^T, as cheap as `rank` more tokens, and are taken as
    constants by the gradient (section 4.3 of the paper)."""

    further_suffixes = ("dora_scale",)

    def __init__(self, layer, rank, alpha, rslora=False, rng=None):
        super().__init__(layer, rank, alpha, rslora, rng)
        self.magnitude = nn.Parameter(torch.zeros(layer_features(layer)[1]))
        self.squared_row_norms: Tensor | None = None  # (outputs,) squared row norms of W, once the layer is loaded

    def output_change(self, layer, x, out, strength, drop=None):
        more = self.broadcast_rows(self.row_gain(layer) - 1).to(
            out.dtype
        )  # half precision would round a gain of 1.001 to 1
        bias = effective_parameter(layer, "bias")
        own = out if bias is None else out - self.broadcast_rows(bias.to(out))
        low = self(x, 1.0, drop).to(out.dtype)
        return strength * (more * (own + low) + low)

    def row_gain(self, layer) -> Tensor:
        """(outputs,) what the rows of W + s B A are multiplied with."""
        return (1 + self.magnitude) * self.compare_row_norms(layer)[1]

    @torch.no_grad()
    def compare_row_norms(self, layer) -> tuple[Tensor, Tensor]:
        """(outputs,) |W|^2 and |W| / |W + s B A|, by |W|^2 + 2 s <W, B A> + s^2 |B A|^2."""
        weight = dense_weight(layer, self.down.device).flatten(1)
        if (squares := self.squared_row_norms) is None:
            squares = self.squared_row_norms = weight.float().square().sum(1)
        down, up = self.down.flatten(1), self.up.flatten(1)
        crossed = ((weight @ down.T.to(weight.dtype)).float() * up).sum(1)
        own = ((up @ (down @ down.T)) * up).sum(1)
        merged = squares + 2 * self.scale * crossed + self.scale**2 * own
        return squares, torch.where((squares > 0) & (merged > 0), (squares / merged).sqrt(), 1.0)

    def broadcast_rows(self, rows: Tensor) -> Tensor:
        """(outputs,) so that it multiplies the layer's output."""
        return rows if self.geometry is None else rows.view(-1, *[1] * (self.down.ndim - 2))

    def is_zero(self):
        return super().is_zero() and not self.magnitude.any()

    @torch.no_grad()
    def reset_to_zero(self):
        super().reset_to_zero()
        self.magnitude.zero_()

    def export_tensors(self, layer):
        """dora_scale as ComfyUI reads it: it multiplies W + s B A by dora_scale over the row norm of W alone, where
        other tools and the paper take that of W + s B A. Rows are the output axis."""
        squares, ratio = self.compare_row_norms(layer)
        gain, norms = (1 + self.magnitude) * ratio, squares.sqrt() + torch.finfo(torch.float32).eps
        return super().export_tensors(layer) | {"dora_scale": (gain * norms).view(-1, *[1] * (self.down.ndim - 1))}

    @torch.no_grad()
    def load(self, layer, tensors):
        if "dora_scale" not in tensors:
            raise ValueError("it has no dora_scale, so it is a LoRA and no DoRA; choose the algorithm of the file")
        rows, shape = layer_features(layer)[1], tuple(tensors["dora_scale"].shape)
        if not shape or shape[0] != rows:  # what decides in ComfyUI's loader too
            raise ValueError(
                f"its dora_scale is {shape}, and {rows} numbers, one for each output, are expected here. A scale of "
                f"the inputs cannot be trained further here; {APPLY_INSTEAD}"
            )
        super().load(layer, tensors)
        squares, shrinkage = self.compare_row_norms(layer)
        norms = squares.sqrt() + torch.finfo(torch.float32).eps
        if tensors["dora_scale"].numel() != len(norms):
            raise ValueError(
                f"its dora_scale is {tuple(tensors['dora_scale'].shape)}, and {len(norms)} numbers are expected here"
            )
        self.magnitude.copy_(tensors["dora_scale"].flatten().to(norms) / norms / shrinkage - 1)


class LohaLayer(LoraLayer):
    """LoHa: dW = s * (w1_a w1_b) * (w2_a w2_b) elementwise, rank up to rank^2. Where it is cheaper, dW is never built:
    its rows are those of a LoRA of rank^2, the products of every row of w1_b with every row of w2_b. Starting sizes as
    in LyCORIS."""

    file_suffixes = {"hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_b": "w2_b", "hada_w2_a": "w2_a"}
    fast_parts = ("w1_a", "w2_a")
    w1_a: nn.Parameter
    w1_b: nn.Parameter
    w2_b: nn.Parameter

    def __init__(self, layer, rank, alpha, rslora=False, rng=None):
        nn.Module.__init__(self)
        inputs, outputs = layer_features(layer)
        check_adapter_rank(layer, rank)
        self.kernel, self.geometry = conv_kernel_size(layer), conv_arguments(layer)
        wide = inputs * math.prod(self.kernel)
        for name, shape, std in (
            ("w1_a", (outputs, rank), 0.1),
            ("w1_b", (rank, wide), 1.0),
            ("w2_b", (rank, wide), 1.0),
        ):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=rng) * std))
        self.w2_a = nn.Parameter(torch.zeros(outputs, rank))
        self.rank, self.scale, self.inputs = rank, adapter_scale(rank, alpha, rslora), inputs
        self.uses_low_rank = rank**2 * (wide + outputs) < wide * outputs

    def forward(self, x, strength=1.0, drop=None):
        (w1_a, w1_b), (w2_a, w2_b) = (
            (a.to(x.dtype), b.to(x.dtype)) for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b))
        )
        factor = self.scale * strength
        if not self.uses_low_rank:
            weight = (w1_a @ w1_b) * (w2_a @ w2_b) * factor
            return apply_weight(x, weight.view(-1, self.inputs, *self.kernel), self.geometry)
        down = (w1_b[:, None] * w2_b[None]).view(-1, self.inputs, *self.kernel)  # (rank^2, inputs, ...)
        up = (w1_a[:, :, None] * w2_a[:, None]).flatten(1)  # (outputs, rank^2)
        return apply_low_rank(x, down, up.view(*up.shape, *(1 for _ in self.kernel)), factor, self.geometry)

    def size_remedy(self, tensors):
        return f"the file has rank {len(tensors['hada_w1_b'])}, so set rank to that, or it is from another model"


class LokrLayer(LoraLayer):
    """LoKr: dW = s * kron(w1, w2), with w1 small and w2 = w2_a w2_b of the given rank, or whole where that is no
    larger. The layer's inputs are seen as a table that w2 multiplies from one side and w1 from the other, so dW is
    never built. w2 of a convolution holds its kernel in its columns."""

    fast_parts = ("w2_a",)

    def __init__(self, layer, rank, alpha, rslora=False, rng=None, factor=8):
        nn.Module.__init__(self)
        inputs, outputs = layer_features(layer)
        self.kernel, self.geometry = conv_kernel_size(layer), conv_arguments(layer)
        (rows, tall), (columns, wide) = factorize_dimension(outputs, factor), factorize_dimension(inputs, factor)
        self.input_shape = (columns, wide)
        self.w1 = nn.Parameter(torch.empty(rows, columns))
        nn.init.kaiming_uniform_(self.w1, a=math.sqrt(5), generator=rng)
        self.rank, self.flat_inputs = rank, wide * math.prod(self.kernel)
        self.has_full_w2 = rank >= max(tall, wide) / 2
        if self.has_full_w2:
            self.file_suffixes = {"lokr_w1": "w1", "lokr_w2": "w2"}
            self.w2, self.scale = (
                nn.Parameter(torch.zeros(tall, self.flat_inputs)),
                None,
            )  # loaders know no alpha for these: the scale is 1
            return
        self.file_suffixes = {"lokr_w1": "w1", "lokr_w2_b": "w2_b", "lokr_w2_a": "w2_a"}
        self.w2_a, self.w2_b = nn.Parameter(torch.zeros(tall, rank)), nn.Parameter(torch.empty(rank, self.flat_inputs))
        nn.init.kaiming_uniform_(self.w2_b, a=math.sqrt(5), generator=rng)
        self.scale = adapter_scale(rank, alpha, rslora)

    def forward(self, x, strength=1.0, drop=None):
        factor = (self.scale or 1.0) * strength
        w1 = self.w1.to(x.dtype)
        w1 = w1 if factor == 1 else w1 * factor
        if self.geometry is None:
            return (w1 @ self.apply_w2(x.unflatten(-1, self.input_shape))).flatten(-2)
        table = self.apply_w2(x.unflatten(1, self.input_shape).flatten(0, 1)).unflatten(
            0, (len(x), self.input_shape[0])
        )
        return torch.einsum("lm,bmk...->blk...", w1, table).flatten(1, 2)

    def apply_w2(self, x):
        """w2 on the last axis, or as a convolution."""
        if self.has_full_w2:
            return apply_weight(x, self.w2.to(x.dtype).view(-1, self.input_shape[1], *self.kernel), self.geometry)
        down = self.w2_b.to(x.dtype).view(-1, self.input_shape[1], *self.kernel)
        up = self.w2_a.to(x.dtype)
        return apply_low_rank(x, down, up.view(*up.shape, *(1 for _ in self.kernel)), 1.0, self.geometry)

    def size_remedy(self, tensors):
        return "set rank and factor to those of the file, or it is from another model"


def factorize_dimension(count: int, factor: int) -> tuple[int, int]:
    """(small, large) with small * large = count: the largest divisor that is no more than `factor` (0: no such limit)
    and the root."""
    most = min(factor or count, math.isqrt(count))
    small = next(d for d in range(most, 0, -1) if count % d == 0)
    return small, count // small


def check_adapter_rank(layer, rank: int):
    if rank > min(layer_features(layer)):
        raise ValueError("rank is {}, but it has only {} inputs and {} outputs".format(rank, *layer_features(layer)))


def lora_file_scale(tensors: dict[str, Tensor], rank: int) -> float:
    return float(tensors["alpha"]) / rank if "alpha" in tensors else 1.0


def effective_parameter(layer, name: str) -> Tensor | None:
    """The weight or bias as the layer uses it: with the host's patches that are applied at every call, and unpacked
    where it is quantised."""
    value = getattr(layer, name, None)
    return None if value is None else apply_host_patches(layer, name, value)


def apply_host_patches(layer, name: str, value: Tensor) -> Tensor:
    """What `effective_parameter` makes of a weight or bias that is there."""
    if hasattr(value, "dequantize") and type(value.data) is not Tensor:
        value = value.dequantize()
    for patch in getattr(layer, f"{name}_function", ()):
        value = patch(value)
    return value.detach()


def dense_weight(layer, device) -> Tensor:
    """The layer's weight where it can be multiplied with: fp32, or half precision as it is."""
    weight = apply_host_patches(layer, "weight", layer.weight).to(device)
    return weight if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else weight.float()


ADAPTER_LAYERS = {LORA: LoraLayer, DORA: DoraLayer, LOHA: LohaLayer, LOKR: LokrLayer}
