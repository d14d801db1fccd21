"""LoRAs of parts of a layer, such as q, k and v, as one LoRA of the whole layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layers import APPLY_INSTEAD, lora_file_scale

Slice = tuple[str, tuple[int, int, int] | None, Callable[[Tensor], Tensor] | None, dict[str, Tensor]]


def merge_lora_slices(slices: Sequence[Slice], outputs: int, source: str = "start_from") -> dict[str, Tensor]:
    """lora_down.weight and lora_up.weight of the whole layer, at scale 1 (no alpha). Each slice is (name, (0, first
    row, rows) or None for all rows, a reordering of its rows or None, its tensors by kohya suffix).

    dW is block by block B_i A_i, so the A lie below each other and each B stands in its own rows and columns: exact, at
    the sum of the ranks. Parts with one A in common (a fused LoRA that was split) share its columns, and keep its rank.
    Raises ValueError for what is no plain LoRA."""
    downs: list[Tensor] = []
    starts: list[int] = []
    placed: list[tuple[int, int, Tensor]] = []
    for name, rows, reorder, tensors in slices:
        if tensors.keys() - {"alpha"} != {"lora_down.weight", "lora_up.weight"}:
            raise ValueError(
                f"{source} holds {name}, a part of a layer that is one here. Plain LoRA parts are put together, but "
                f"this one has {', '.join(sorted(tensors))}; {APPLY_INSTEAD}."
            )
        down, up = tensors["lora_down.weight"].float(), tensors["lora_up.weight"].float()
        up = up * lora_file_scale(tensors, len(down))
        up = up if reorder is None else reorder(up)
        axis, first, count = rows or (0, 0, len(up))
        if axis != 0 or count != len(up):
            raise ValueError(
                f"{source} does not fit at {name}: its lora_up.weight has {len(up)} rows, and the part of the layer "
                f"has {count} {'outputs' if axis == 0 else 'inputs'}."
            )
        same = next((i for i, other in enumerate(downs) if torch.equal(other, down)), None)
        if same is None:
            same = len(downs)
            starts.append(sum(len(other) for other in downs))
            downs.append(down)
        placed.append((first, starts[same], up))
    joined = torch.cat(downs)
    whole = joined.new_zeros(outputs, len(joined), *placed[0][2].shape[2:])
    for first, start, up in placed:
        whole[first : first + len(up), start : start + up.shape[1]] += up
    return {"lora_down.weight": joined, "lora_up.weight": whole}
