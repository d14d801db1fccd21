"""LoRA files for other programs: the same change of the weights, in the kinds of adapters that each of them reads.

dW is a layer's change without DoRA, its scale included. DoRA makes W' = dora_scale / norm * (W + dW), and what is
normed differs: in ComfyUI and Forge the rows of W (comfy/weight_adapter/base.py, backend/patcher/lora.py), in LyCORIS,
peft and diffusers the rows of W + dW (lycoris/functional/general.py, peft/tuners/lora/dora.py), in A1111 its columns
alone (extensions-builtin/Lora/network.py). A scale of the columns is read alike by ComfyUI, Forge and A1111.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import DIFFUSERS, DORA, LOHA, LOKR, LORA, LYCORIS, WEBUI
from .layers import lora_file_scale

FULL, OTHER = "whole matrices", "other"
UNPORTABLE = "only LoRA, DoRA, LoHa, LoKr and whole matrices are written for other programs; save it for ComfyUI"
DORA_SCALE, MAGNITUDE = "dora_scale", "lora_magnitude_vector"  # ComfyUI's name for a DoRA's norms, and peft's
NORM_EPS = torch.finfo(torch.float32).eps  # that loaders add


@dataclass(frozen=True)
class ExportedLayer:
    """A layer as a program reads it: tensors by kohya suffix, and the share of its change that was lost."""

    tensors: dict[str, Tensor]
    lost: float = 0.0


def adapter_kind(tensors: Iterable[str]) -> str:
    """LoRA, DoRA, LoHa, LoKr or whole matrices, by the suffixes of one layer. Raises ValueError for anything else."""
    suffixes = set(tensors) - {"alpha"}
    if DORA_SCALE in suffixes:
        return DORA
    for kind, known in KNOWN_SUFFIXES.items():
        if suffixes and suffixes <= known:
            return kind
    raise ValueError(f"it holds {', '.join(sorted(suffixes)) or 'nothing'}, and {UNPORTABLE}")


KNOWN_SUFFIXES = {
    LORA: {"lora_down.weight", "lora_up.weight"},
    LOHA: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    LOKR: {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
    FULL: {"diff"},
}


def factor_change(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(up (outputs, rank), down (rank, inputs * kernel)) with up @ down = dW, exactly: LoHa at the rank squared, LoKr
    at the rank of w2 times the smaller side of w1. Raises ValueError for other adapters."""
    kind = adapter_kind(key for key in tensors if key != DORA_SCALE)
    parts = {key: value.float().flatten(1) for key, value in tensors.items() if value.ndim > 1}
    if kind == LORA:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        up = up * lora_file_scale(tensors, len(down))
    elif kind == LOHA:
        up = (parts["hada_w1_a"][:, :, None] * parts["hada_w2_a"][:, None]).flatten(1)
        down = (parts["hada_w1_b"][:, None] * parts["hada_w2_b"][None]).flatten(0, 1)
        up = up * lora_file_scale(tensors, len(parts["hada_w1_b"]))
    elif kind == LOKR:
        factored = [parts[key] for key in ("lokr_w1_b", "lokr_w2_b") if key in parts]
        scale = lora_file_scale(tensors, len(factored[-1])) if factored else 1.0  # loaders know no alpha without
        (up_1, down_1), (up_2, down_2) = (factor_lokr(parts, name) for name in ("lokr_w1", "lokr_w2"))
        up, down = torch.kron(up_1, up_2) * scale, torch.kron(down_1, down_2)
    else:
        up, down = factor_matrix(parts["diff"])
    return (up, down) if up.shape[1] <= min(len(up), down.shape[1]) else factor_matrix(up @ down)


def factor_lokr(parts: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return factor_matrix(parts[name]) if name in parts else (parts[f"{name}_a"], parts[f"{name}_b"])


def factor_matrix(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(matrix, identity) or (identity, matrix), whichever is of the lower rank."""
    rows, columns = matrix.shape
    return (matrix, torch.eye(columns)) if columns <= rows else (torch.eye(rows), matrix)


def cut_rank(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(up, down, lost) at this rank or less, the nearest there is (Eckart and Young 1936). lost: the norm of what is
    cut off over that of the whole. rank 0: as it is."""
    if not rank or up.shape[1] <= rank:
        return up, down, 0.0
    if len(up) > down.shape[1]:
        down, up, lost = cut_rank(down.T, up.T, rank)
        return up.T, down.T, lost
    basis, rest = torch.linalg.qr(up.double())
    core = rest @ down.double()  # (min(outputs, rank), inputs), of the same singular values
    energy, directions = torch.linalg.eigh(core @ core.T)  # their squares, rising
    kept = directions[:, -rank:]
    lost = float((energy[:-rank].clamp(min=0).sum() / energy.sum().clamp(min=1e-30)).sqrt())
    return (basis @ kept).float(), (kept.T @ core).float(), lost


# -- DoRA --------------------------------------------------------------------------------------------------------------


def row_norms(weight: Tensor) -> Tensor:
    """(outputs,)"""
    return weight.flatten(1).norm(dim=1) + NORM_EPS


def scales_rows(tensors: dict[str, Tensor], weight: Tensor) -> bool:
    """Whether a DoRA's scale is one of the outputs, as ComfyUI decides it."""
    return tensors[DORA_SCALE].shape[0] == len(weight)


def changed_weight(tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The weight with the adapter at strength 1, as ComfyUI's loader makes it."""
    up, down = factor_change(tensors)
    merged = weight + (up @ down).view(weight.shape)
    if DORA_SCALE not in tensors:
        return merged
    scale = tensors[DORA_SCALE].float()
    if scales_rows(tensors, weight):
        return merged * (scale.flatten() / row_norms(weight)).view(-1, *[1] * (weight.ndim - 1))
    columns = row_norms(merged.transpose(0, 1)).view(1, -1, *[1] * (weight.ndim - 2))
    return merged * (scale.view(columns.shape) / columns)


def merged_row_scale(tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """(outputs,) the row norms of the changed weight: the dora_scale of programs that norm W + dW, and of a layer
    without DoRA the one that does nothing."""
    return row_norms(changed_weight(tensors, weight))


# -- one layer for each program ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportPlan:
    """target: one of EXPORT_TARGETS. rank: the most that a converted adapter may have; 0: what it takes. dora: whether
    diffusers is to read a DoRA in the network of the layer."""

    target: str
    rank: int = 0
    dora: bool = False


def export_layer(
    tensors: dict[str, Tensor], shape: tuple[int, ...], weight: Callable[[], Tensor], plan: ExportPlan
) -> ExportedLayer:
    """The layer for a program. `shape`: of the model's weight, which `weight` gives in fp32 and which is asked for DoRA
    only. Raises ValueError for what the program cannot read."""
    kind = adapter_kind(tensors)
    if kind != DORA:
        if plan.target == DIFFUSERS:
            return export_for_diffusers(tensors, shape, weight, plan)
        return ExportedLayer(fold_scale(tensors, kind, shape) if plan.target == LYCORIS else tensors)
    base = weight()
    if plan.target == DIFFUSERS and plan.dora and scales_rows(tensors, base):
        return export_for_diffusers(tensors, shape, lambda: base, plan)
    if plan.target == LYCORIS:
        if not scales_rows(tensors, base):
            raise ValueError(f"its dora_scale is one of the inputs, and {LYCORIS} reads one of the outputs")
        return ExportedLayer(tensors | {DORA_SCALE: merged_row_scale(tensors, base).view(tensors[DORA_SCALE].shape)})
    if plan.target == WEBUI and not scales_rows(tensors, base):  # read alike everywhere
        return ExportedLayer(tensors)
    change = changed_weight(tensors, base) - base
    if plan.target == WEBUI and not plan.rank:
        return ExportedLayer({"diff": change})
    return as_lora(*factor_matrix(change.flatten(1)), shape, plan.rank)


def fold_scale(tensors: dict[str, Tensor], kind: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A LoHa or LoKr of scale 1 with the kernel of a whole second matrix in axes of its own: LyCORIS 4.1 scales twice
    where it merges one into a weight (get_diff_weight), and takes its matrices by their shapes."""
    if kind not in (LOHA, LOKR):
        return tensors
    last = next((key for key in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in tensors), None)
    first = next(key for key in ("hada_w1_a", "lokr_w1", "lokr_w1_a") if key in tensors)
    rank = len(tensors[last]) if last else 1
    scale = lora_file_scale(tensors, rank) if last else 1.0  # loaders know no alpha of two whole matrices
    folded = tensors | {first: tensors[first].float() * scale, "alpha": torch.tensor(float(rank))}
    if "lokr_w2" in folded and len(shape) > 2:
        folded["lokr_w2"] = folded["lokr_w2"].reshape(len(folded["lokr_w2"]), -1, *shape[2:])
    return folded


def export_for_diffusers(tensors, shape, weight, plan: ExportPlan) -> ExportedLayer:
    """A LoRA of scale 1, with the row norms of a DoRA where its network has one."""
    found = as_lora(*factor_change(tensors), shape, 0 if "lora_down.weight" in tensors else plan.rank)
    if not plan.dora:
        return found
    both = {key: tensors[key] for key in (DORA_SCALE,) if key in tensors}  # for ComfyUI; diffusers leaves it out
    return ExportedLayer(found.tensors | both | {MAGNITUDE: merged_row_scale(tensors, weight())}, found.lost)


def as_lora(up: Tensor, down: Tensor, shape: tuple[int, ...], rank: int) -> ExportedLayer:
    """A LoRA of the change up @ down, at no more than `rank` if it is not 0."""
    up, down, lost = cut_rank(up, down, rank)
    tensors = {
        "lora_down.weight": down.reshape(-1, *shape[1:]),
        "lora_up.weight": up.reshape(*up.shape, *[1] * (len(shape) - 2)),
        "alpha": torch.tensor(float(up.shape[1])),
    }
    return ExportedLayer({key: value.contiguous() for key, value in tensors.items()}, lost)


def pad_to_rank(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A LoRA of scale 1 with zeros up to this rank. Older versions of diffusers take one alpha for all layers of a
    file, and only equal ranks are then scaled alike."""
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    more = rank - len(down)
    return tensors | {
        "lora_down.weight": F.pad(down, (0, 0) * (down.ndim - 1) + (0, more)),
        "lora_up.weight": F.pad(up, (0, 0) * (up.ndim - 2) + (0, more)),
        "alpha": torch.tensor(float(rank)),
    }


def slice_rows(tensors: dict[str, Tensor], take: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The LoRA of some of a layer's rows, in the order that `take` gives them."""
    parts = ("lora_up.weight", MAGNITUDE, DORA_SCALE)
    return {key: take(value).contiguous() if key in parts else value for key, value in tensors.items()}


# -- what a file says of itself ----------------------------------------------------------------------------------------

# Programs that read kohya's names: their families by ss_base_model_version, and the adapters that they read as they are
# saved for ComfyUI. '' stands for any family.
READERS = {
    "ComfyUI": ("", {LORA, DORA, LOHA, LOKR, FULL, OTHER}),
    "Forge": (("sd_v1", "sd_v2", "sdxl", "flux1"), {LORA, DORA, LOHA, LOKR, FULL}),
    "A1111": (("sd_v1", "sd_v2", "sdxl", "sd3"), {LORA, LOHA, LOKR, FULL}),
    "kohya's sd-scripts": (("sd_v1", "sd_v2", "sdxl", "sd3", "flux1", "chroma", "lumina2", "anima"), {LORA}),
    "LyCORIS": (("sd_v1", "sd_v2", "sdxl", "sd3", "flux1"), {LORA, LOHA, LOKR}),
}
IMPLEMENTATIONS = {  # modelspec.implementation; Forge knows a LoRA for Flux by it
    "flux1": "https://github.com/black-forest-labs/flux",
    DIFFUSERS: "https://github.com/huggingface/diffusers",
}


KIND_MARKS = {
    LORA: re.compile(r"lora[._](up|down|[AB])\b|lora_linear_layer"),
    DORA: re.compile(rf"\.({DORA_SCALE}|{MAGNITUDE})"),
    LOHA: re.compile(r"\.hada_w"),
    LOKR: re.compile(r"\.lokr_w"),
    FULL: re.compile(r"\.diff$"),
}


def list_kinds(keys: Iterable[str]) -> set[str]:
    """The kinds of adapters in a file."""
    keys = [key for key in keys if not key.endswith(".alpha")]
    return {next((kind for kind, mark in KIND_MARKS.items() if mark.search(key)), OTHER) for key in keys}


def list_readers(target: str, kinds: set[str], base: str) -> list[str]:
    """The programs that load a file saved for `target`, of layers of these kinds, for this base version."""
    if target == DIFFUSERS:
        return ["diffusers", "ComfyUI"]
    if target == LYCORIS and DORA in kinds:
        return ["LyCORIS"]
    return [name for name, (bases, reads) in READERS.items() if base.startswith(bases) and kinds <= reads]


def export_metadata(metadata: dict[str, str], target: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The metadata of a file for another program: the network that it holds now, and the layout of its names."""
    flux = metadata.get("ss_base_model_version") == "flux1"
    layout = IMPLEMENTATIONS.get(target) or (IMPLEMENTATIONS["flux1"] if flux else None)
    told = {"modelspec.implementation": layout} if layout and "modelspec.implementation" in metadata else {}
    if "ss_network_module" in metadata and all(key.endswith(PLAIN_LORA_SUFFIXES) for key in tensors):
        ranks = [len(value) for key, value in tensors.items() if key.endswith(("down.weight", "lora_A.weight"))]
        if target == DIFFUSERS or metadata["ss_network_module"] != "networks.lora":
            told |= {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
            told |= {key: str(max(ranks)) for key in ("ss_network_dim", "ss_network_alpha")}
    return {**metadata, **told, "trainyard.saved_for": target}


PLAIN_LORA_SUFFIXES = ("down.weight", "up.weight", "lora_A.weight", "lora_B.weight", ".alpha")
