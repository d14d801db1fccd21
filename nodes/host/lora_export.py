"""LoRA files for other programs: the layers of the host's model under the names that each of them reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import comfy.lora
import comfy.model_base
import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor

from ...trainers.adapters.adapters import find_adaptable_layers
from ...trainers.adapters.exports import (
    DORA_SCALE,
    MAGNITUDE,
    ExportedLayer,
    ExportPlan,
    adapter_kind,
    export_layer,
    export_metadata,
    pad_to_rank,
    slice_rows,
)
from ...trainers.adapters.layers import conv_kernel_size, layer_features
from ...trainers.data.metadata import format_first_names
from ...trainers.families import MODEL_FAMILIES
from ...trainers.files import LoraFile
from ...trainers.settings import DIFFUSERS
from .families import find_model_family
from .lora_keys import clip_lora_keys, find_unloadable_layers, group_lora_by_target, list_lora_layers, unet_lora_keys
from .progress import raise_if_interrupted

UNET, TRANSFORMER, ORIGINAL = "unet", "transformer", "diffusion_model"  # ModelFamily.diffusers: how names begin there
# Flux.2's names for what Flux calls otherwise, in the host's one table for both.
FLUX_2_NAME = re.compile(r"\.(to_qkv_mlp_proj|linear_in|linear_out)$|^transformer\.single_\w+\.\d+\.attn\.to_out$")
UNET_PROJECTION = re.compile(r"(.*attn\d)\.(to_[qkv]|to_out)(\.0)?$")


@dataclass(frozen=True)
class Layer:
    """A layer of the host's model that a LoRA changes: its module's path, its tensors by kohya suffix, its weight."""

    path: str
    is_text: bool
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    weight: Callable[[], Tensor]


@dataclass(frozen=True)
class Part:
    """Some rows of a layer under a name of diffusers."""

    name: str
    take: Callable[[Tensor], Tensor] = lambda rows: rows


def export_lora(lora: LoraFile, model, clip, target: str, rank: int = 0) -> tuple[LoraFile, float]:
    """(the LoRA as another program reads it, the largest share of a layer's change that was lost). Raises ValueError
    for what that program cannot take, before anything is computed."""
    layers = find_layers(lora, model, clip)
    names = name_for_diffusers(model, clip, layers) if target == DIFFUSERS else name_for_kohya(model, clip, layers)
    plans = plan_export(layers, names, target, rank)
    exported = {layer.path: export_one(layer, plan) for layer, plan in zip(layers, plans, strict=True)}
    tensors = (write_for_diffusers if target == DIFFUSERS else write_for_kohya)(exported, names)
    lost = max(found.lost for found in exported.values())
    return LoraFile(tensors, export_metadata(lora.metadata, target, tensors), lora.steps), lost


def write_for_kohya(exported: dict[str, ExportedLayer], names: dict[str, list[Part]]) -> dict[str, Tensor]:
    return {
        f"{names[path][0].name}.{suffix}": value.detach().cpu()
        for path, found in exported.items()
        for suffix, value in found.tensors.items()
    }


def write_for_diffusers(exported: dict[str, ExportedLayer], names: dict[str, list[Part]]) -> dict[str, Tensor]:
    """Parts of a layer share one matrix, and a file holds it for each of them."""
    largest = max(len(found.tensors["lora_down.weight"]) for found in exported.values())
    tensors = {}
    for path, found in exported.items():
        padded = pad_to_rank(found.tensors, largest)
        for part in names[path]:
            tensors |= write_part(part.name, slice_rows(padded, part.take))
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def find_layers(lora: LoraFile, model, clip) -> list[Layer]:
    """The layers that a LoRA changes. Raises ValueError for what MODEL and CLIP lack, or no program but this reads."""
    if strange := find_unloadable_layers(model, clip, lora):
        raise ValueError(
            f"{len(strange)} of {len(list_lora_layers(lora))} layers of this LoRA are not in "
            f"{'MODEL; connect its CLIP if it has text encoder layers' if clip is None else 'MODEL and CLIP'}: "
            f"{format_first_names(strange, 5)}. Their names for another program are taken from there."
        )
    places = {f"diffusion_model.{name}": (m, model, False) for name, m in adaptable(model.model.diffusion_model)}
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        places |= {name: (m, clip.patcher, True) for name, m in adaptable(clip.cond_stage_model)}
        known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, known)
    outputs = {f"{path}.weight": layer_features(m)[1] for path, (m, _, _) in places.items()}
    by_target, _ = group_lora_by_target(lora, known, outputs, "lora")
    layers = []
    for key, tensors in by_target.items():
        path = key.removesuffix(".weight")
        if path not in places:
            raise ValueError(f"{path} is no layer that is written for other programs; save this LoRA for ComfyUI.")
        module, patcher, is_text = places[path]
        try:
            adapter_kind(tensors)
        except ValueError as error:
            raise ValueError(f"Layer {path} cannot be written for another program: {error}.") from None
        layers.append(Layer(path, is_text, weight_shape(module), tensors, WeightReader(patcher, key)))
    return layers


def adaptable(network):
    return find_adaptable_layers(network).items()


def weight_shape(module) -> tuple[int, ...]:
    inputs, outputs = layer_features(module)
    return (outputs, inputs, *conv_kernel_size(module))


@dataclass(frozen=True)
class WeightReader:
    """Gives a weight in fp32 with the LoRAs that are on the model, as the host's loader would make it."""

    patcher: object
    key: str

    def __call__(self) -> Tensor:
        (weight, convert), *patches = self.patcher.get_key_patches(self.key)[self.key]
        weight = weight.dequantize() if hasattr(weight, "dequantize") and type(weight.data) is not Tensor else weight
        weight = mm.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, convert(weight, inplace=True), self.key)


def plan_export(layers: list[Layer], names: dict[str, list[Part]], target: str, rank: int) -> list[ExportPlan]:
    """How each layer is written. Diffusers makes a DoRA of all layers of a network or of none, and reads one under its
    own names only."""
    network = lambda layer: names[layer.path][0].name.split(".")[0]
    dora = {network(layer) for layer in layers if DORA_SCALE in layer.tensors} - {ORIGINAL}
    return [ExportPlan(target, rank, target == DIFFUSERS and network(layer) in dora) for layer in layers]


def export_one(layer: Layer, plan: ExportPlan) -> ExportedLayer:
    raise_if_interrupted()
    try:
        return export_layer(layer.tensors, layer.shape, layer.weight, plan)
    except ValueError as error:
        raise ValueError(f"Layer {layer.path} cannot be written for {plan.target}: {error}.") from None


# -- names -------------------------------------------------------------------------------------------------------------


def name_for_kohya(model, clip, layers: list[Layer]) -> dict[str, list[Part]]:
    """Layer path -> its name in the files of kohya's scripts. T5 is lora_te3 there, beside any number of CLIPs."""
    prefix = "diffusion_model."
    unet = unet_lora_keys(model.model, [layer.path.removeprefix(prefix) for layer in layers if not layer.is_text])
    keys = {prefix + name: key for name, key in unet.items()}
    if clip is not None:
        known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        for path, key in clip_lora_keys(clip.cond_stage_model, [x.path for x in layers if x.is_text]).items():
            third = re.sub(r"^lora_te\d_", "lora_te3_", key)
            is_t5 = path.startswith("t5xxl.") and known.get(third) == f"{path}.weight"
            keys[path] = third if is_t5 else key
    return {path: [Part(key)] for path, key in keys.items()}


def name_for_diffusers(model, clip, layers: list[Layer]) -> dict[str, list[Part]]:
    """Layer path -> its parts in diffusers, where q, k and v are layers of their own. Raises ValueError for families
    and layers that it does not know."""
    family = find_model_family(model.model.model_config)
    if not family.diffusers:
        known = ", ".join(row.label for row in MODEL_FAMILIES.values() if row.diffusers)
        raise ValueError(f"LoRAs of {family.label} are not written for diffusers. These are: {known}.")
    names = {UNET: name_unet, TRANSFORMER: name_transformer, ORIGINAL: name_original}[family.diffusers](model.model)
    if clip is not None:
        known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        names |= {
            target.removesuffix(".weight"): [Part(name)]
            for name, target in known.items()
            if name.startswith(("text_encoder.", "text_encoder_2."))
        }
    if strange := [layer.path for layer in layers if layer.path not in names]:
        raise ValueError(
            f"{len(strange)} layers have no name in diffusers that is known: {format_first_names(strange, 5)}. Train "
            "with targets = attention+mlp, or save this LoRA for ComfyUI."
        )
    return names


def name_unet(model) -> dict[str, list[Part]]:
    found = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    return {
        f"diffusion_model.{path.removesuffix('.weight')}": [Part(f"unet.{name.removesuffix('.weight')}")]
        for name, path in found.items()
        if name.endswith(".weight")
    }


def name_original(model) -> dict[str, list[Part]]:
    """The host's own names, which diffusers converts, and splits where it must."""
    return {
        f"diffusion_model.{name}": [Part(f"diffusion_model.{name}")] for name, _ in adaptable(model.diffusion_model)
    }


def name_transformer(model) -> dict[str, list[Part]]:
    """By the host's own table of diffusers' names, which holds some layers under several."""
    found: dict[str, dict[str, tuple]] = {}
    for name, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        if name.startswith("transformer."):
            path, *where = target if isinstance(target, tuple) else (target,)
            found.setdefault(path.removesuffix(".weight"), {})[name] = (*where, None, None)[:2]
    return {path: choose_names(names, isinstance(model, comfy.model_base.Flux2)) for path, names in found.items()}


def choose_names(names: dict[str, tuple], is_flux_2: bool) -> list[Part]:
    own = {name: where for name, where in names.items() if bool(FLUX_2_NAME.search(name)) == is_flux_2}
    own = {name: where for name, where in (own or names).items() if f"{name}.0" not in names}
    return [Part(name, take_rows(rows, change)) for name, (rows, change) in own.items()]


def take_rows(rows: tuple[int, int, int] | None, change: Callable | None) -> Callable[[Tensor], Tensor]:
    """What makes a part's rows of the whole layer's. `change` of the host swaps two halves, so it is its own
    inverse."""
    if rows is None:
        return change or (lambda whole: whole)
    _, first, count = rows
    return lambda whole: whole[first : first + count]


def write_part(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer in diffusers' names: those of peft, and for UNets the ones before, which ComfyUI reads as well."""
    down, up = "lora_A.weight", "lora_B.weight"
    if name.startswith("unet."):
        down, up = "lora.down.weight", "lora.up.weight"
    key = f"{name}."
    if projection := UNET_PROJECTION.match(name) if name.startswith("unet.") else None:
        name = f"{projection[1]}.processor.{projection[2]}"
        key = f"{name}_"
    out = {f"{key}{down}": tensors["lora_down.weight"], f"{key}{up}": tensors["lora_up.weight"]}
    if MAGNITUDE in tensors:
        magnitude = tensors[MAGNITUDE]
        kernel = tensors["lora_down.weight"].ndim - 2
        out[f"{name}.{MAGNITUDE}"] = magnitude.view(1, -1, *[1] * kernel) if kernel else magnitude
    if DORA_SCALE in tensors:
        out[f"{name}.{DORA_SCALE}"] = tensors[DORA_SCALE]
    return out
