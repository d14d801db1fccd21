"""Layer names in LoRA files: the ones that every tool loads, and what the host's own loader makes of them."""

from __future__ import annotations

import math
import re

import comfy.lora
import comfy.lora_convert
import torch

from ...trainers.adapters.adapters import kohya_lora_key
from ...trainers.data.metadata import format_first_names
from ...trainers.files import LoraFile, as_lora_file
from .context import clone_inference_tensors
from .families import find_model_family

# What follows a layer's name in the files that the host loads, peft's and diffusers' among them.
LAYER_SUFFIX = re.compile(
    r"(\.lora_(up|down|mid|A|B)(\.default)?(\.weight)?|[._]lora\.(up|down|mid)\.weight|"
    r"\.lora_linear_layer\.(up|down)\.weight|\.(hada_\w+|lokr_\w+|oft_blocks|rescale|alpha|dora_scale|lora_magnitude_vector)|"
    r"\.(diff(_b)?|w_norm|b_norm|set_weight|reshape_weight|[ab][12]\.weight))$"
)
# The spellings of one matrix -> ours, for the part of a key that LAYER_SUFFIX finds.
LORA_MATRIX = re.compile(r"^(lora[._](?P<kohya>up|down|mid)|lora_linear_layer\.(?P<old>up|down)|lora_(?P<peft>[AB]))\b")
PEFT_MATRICES = {"A": "down", "B": "up"}
BIAS_CHANGE = ".diff_b"
MAGNITUDE = "lora_magnitude_vector"  # peft's, of a DoRA
TEXT_ENCODER_LAYER = re.compile(r"(lora_te\d?_|lora_prior_te_|text_encoder|text_model|te\d?_)")


def unet_lora_keys(model, layers) -> dict[str, str]:
    """Layer path -> file name that the host's own loader maps back to that layer."""
    known = comfy.lora.model_lora_keys_unet(model, {})
    diffusers = {}
    if find_model_family(model.model_config).key_style == "diffusers":
        for name, path in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items():
            if name.endswith(".weight"):
                diffusers[path.removesuffix(".weight")] = kohya_lora_key("lora_unet", name.removesuffix(".weight"))
    keys = {name: diffusers.get(name) or kohya_lora_key("lora_unet", name) for name in layers}
    return check_loadable_keys(keys, known, "diffusion_model.")


def clip_lora_keys(network, layers) -> dict[str, str]:
    """Layer path -> lora_te..., as the host's loader maps it back: lora_te for a single CLIP-L, lora_te1/2/3 for
    several encoders."""
    known = comfy.lora.model_lora_keys_clip(network, {})
    several = sum(1 for name, child in network.named_children() if any(True for _ in child.parameters())) > 1
    keys = {}
    for name in layers:
        options = [k for k, target in known.items() if target == f"{name}.weight" and k.startswith("lora_te")]
        options.sort(key=lambda k: (k.startswith("lora_te_") == several, k))
        keys[name] = options[0] if options else f"text_encoders.{name}"
    return check_loadable_keys(keys, known, "")


def check_loadable_keys(keys, known, prefix):
    """Every key must lead back to its own layer, or the file would load with holes."""
    for name, key in keys.items():
        target = known.get(key)
        if (target[0] if isinstance(target, tuple) else target) != f"{prefix}{name}.weight":
            raise ValueError(
                f"Layer {name} has no key that ComfyUI's LoRA loader knows ({key} leads to {target}); choose other "
                "adapter targets."
            )
    return keys


def apply_lora(model, clip, lora, strength=1.0, left_out: list[str] | None = None):
    """(MODEL, CLIP) with the LoRA as patches on clones; the inputs stay as they were. left_out: what
    `find_unloadable_layers` found, if it was asked. Raises ValueError for keys that do not fit."""
    lora = as_lora_file(lora)
    if not lora:
        raise ValueError("This LoRA is empty: no layer has learnt anything yet. Train it for more steps.")
    misfits = find_unloadable_layers(model, clip, lora) if left_out is None else left_out
    if len(misfits) == len(list_lora_layers(lora)):
        raise ValueError(
            f"This LoRA fits neither MODEL nor CLIP: none of its {len(misfits)} layers is known, for example "
            f"{misfits[0]}."
        )
    with torch.inference_mode(False):
        tensors = {k: clone_inference_tensors(v) for k, v in lora.items()}
        patched = comfy.sd.load_lora_for_models(model, clip, tensors, strength, strength)
        if patched[0] is not None:
            patched[0].add_patches(find_split_bias_patches(model, tensors), strength)
        return patched


def find_bias_targets(lora, known: dict) -> dict[str, tuple]:
    """Key of a bias change -> the bias in the host's model, (name, slice (axis, start, length) and function, if any).
    `lora` in the host's own spelling."""
    found = {}
    for key in lora:
        target = known.get(key.removesuffix(BIAS_CHANGE)) if key.endswith(BIAS_CHANGE) else None
        if target is not None:
            name, *part = target if isinstance(target, tuple) else (target,)
            found[key] = (name.removesuffix(".weight") + ".bias", *part)
    return found


def find_split_bias_patches(model, lora) -> dict:
    """The host's patches for the biases of layers that are parts of a fused one here (q, k and v of diffusers): its
    loader reads them and gives them to no layer."""
    tensors = comfy.lora_convert.convert_lora(dict(lora))
    targets = find_bias_targets(tensors, comfy.lora.model_lora_keys_unet(model.model, {}))
    return {target: ("diff", (tensors[key],)) for key, target in targets.items() if len(target) > 1}


def check_assistant(model, assistant) -> None:
    """ValueError for an assistant that is not for this model, or not in whole."""
    if left_out := find_unloadable_layers(model, None, assistant):
        raise ValueError(
            f"The assistant of Noise and Loss Settings does not fit the MODEL: {len(left_out)} of its "
            f"{len(list_lora_layers(assistant))} layers are not in it, such as {left_out[0]}. Load the training "
            "adapter that was made for this very model."
        )


def list_lora_layers(lora) -> list[str]:
    """The layers in a LoRA, as the host's loader names them."""
    return sorted({layer_of_key(key) for key in comfy.lora_convert.convert_lora(dict(lora))})


def find_unloadable_layers(model, clip, lora) -> list[str]:
    """Layers of the file that the host's loader would skip, sorted."""
    known = comfy.lora.model_lora_keys_unet(model.model, {}) if model is not None else {}
    if clip is not None:
        known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, known)
    tensors = comfy.lora_convert.convert_lora(dict(lora))
    return sorted({layer_of_key(key) for key in tensors} - set(map(layer_of_key, find_loaded_keys(tensors, known))))


def find_loaded_keys(tensors: dict[str, torch.Tensor], known: dict) -> set[str]:
    """The keys that the host's loader reads, given the layers it knows, and those that `find_split_bias_patches`
    adds."""
    names = {id(value): key for key, value in tensors.items()}
    loaded = {key for key, target in find_bias_targets(tensors, known).items() if len(target) > 1}
    for patch in comfy.lora.load_lora(tensors, known, log_missing=False).values():
        if isinstance(patch, tuple):  # ("diff", (tensor,)) or ("set", (tensor,))
            loaded.update(names[id(value)] for value in patch[1] if id(value) in names)
        else:
            loaded.update(patch.loaded_keys)
    return loaded


def find_skipped_parts(model, clip, lora) -> list[str]:
    """What the host's loader drops of layers that it knows, sorted: keys that it does not read, biases of a layer
    without one, and layers of another size, of which it tells its log alone."""
    known, networks = comfy.lora.model_lora_keys_unet(model.model, {}), [model.model]
    if clip is not None:
        known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, known)
        networks.append(clip.cond_stage_model)
    shapes = {name: tuple(value.shape) for network in networks for name, value in network.state_dict().items()}
    tensors = comfy.lora_convert.convert_lora(dict(lora))
    loaded = find_loaded_keys(tensors, known)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if (base := layer_of_key(key)) in known:
            layers.setdefault(base, {})[key[len(base) + 1 :]] = value
    skipped = []
    for base, parts in layers.items():
        name, rows = (*known[base][:2],) if isinstance(known[base], tuple) else (known[base], None)
        bias = f"{name.removesuffix('.weight')}.bias" in shapes
        has_bias = {"diff_b": bias, "b_norm": bias and rows is None}
        skipped += [f"{base}.{suffix}" for suffix in parts if not has_bias.get(suffix, True)]
        if MAGNITUDE in parts and "dora_scale" not in parts:
            skipped.append(f"{base}.{MAGNITUDE}")
        shape = list(shapes.get(name, ()))
        if rows is not None and shape:
            shape[rows[0]] = rows[2]
        changed = count_changed_numbers({kohya_suffix(suffix): value for suffix, value in parts.items()})
        if changed is not None and changed != math.prod(shape):
            skipped.append(base)
    unread = [key for key in tensors if layer_of_key(key) in known and key not in loaded and MAGNITUDE not in key]
    return sorted({*skipped, *unread})


def count_changed_numbers(parts: dict[str, torch.Tensor]) -> int | None:
    """How many numbers of a weight an adapter changes, by its tensors' kohya suffixes; None for kinds that may change
    any number."""
    if parts.keys() & {"reshape_weight", "lora_mid.weight", "hada_t1", "lokr_t2", "set_weight"}:
        return None
    for up, down in (("lora_up.weight", "lora_down.weight"), ("hada_w1_a", "hada_w1_b")):
        if up in parts and down in parts:
            return len(parts[up]) * math.prod(parts[down].shape[1:])
    factors = [
        parts[name].numel() if name in parts else len(parts[f"{name}_a"]) * math.prod(parts[f"{name}_b"].shape[1:])
        for name in ("lokr_w1", "lokr_w2")
        if name in parts or {f"{name}_a", f"{name}_b"} <= parts.keys()
    ]
    if len(factors) == 2:
        return math.prod(factors)
    return parts["diff"].numel() if "diff" in parts else None


def layer_of_key(key: str) -> str:
    return LAYER_SUFFIX.sub("", key)


def kohya_suffix(suffix: str) -> str:
    """What follows a layer's name in kohya's files: lora_down.weight for peft's lora_A.default.weight."""
    found = LORA_MATRIX.match(suffix)
    if found is None:
        return suffix
    matrix = found["kohya"] or found["old"] or PEFT_MATRICES[found["peft"]]
    return f"lora_{matrix}.weight"


def group_lora_by_target(
    lora, known: dict, outputs: dict[str, int], source: str = "start_from"
) -> tuple[dict[str, dict[str, torch.Tensor]], bool]:
    """({weight of the host's model: tensors by kohya suffix}, whether a layer was put together of several).

    `outputs`: those of the layers that are trained, by weight. Takes every spelling that the host's loader takes.
    Layers that are parts of a fused one here (q, k and v of diffusers) become one LoRA of it. Layers that `known` (of
    comfy.lora) lacks keep their name in the file. `source`: the input that errors name. Raises ValueError for parts
    that cannot be put together."""
    from ...trainers.adapters.slices import merge_lora_slices

    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in comfy.lora_convert.convert_lora(dict(lora)).items():
        base = layer_of_key(key)
        suffix = kohya_suffix(key[len(base) + 1 :])
        if suffix in layers.setdefault(base, {}):
            raise ValueError(f"{source} holds {suffix} of {base} twice, in two spellings; one would be lost.")
        layers[base][suffix] = value
    whole: dict[str, dict[str, torch.Tensor]] = {}
    parts: dict[str, list] = {}
    for base, tensors in layers.items():
        target = known.get(base, base)
        name = str(target[0] if isinstance(target, tuple) else target)
        rows, change = (*target[1:], None)[:2] if isinstance(target, tuple) else (None, None)
        if rows is None and change is None and name not in whole:
            whole[name] = tensors
        else:
            parts.setdefault(name, []).append((base, rows, change, tensors))
    for name, slices in parts.items():
        if name in whole or len({rows for _, rows, _, _ in slices}) < len(slices):
            raise ValueError(f"{source} holds {name} twice, once as {slices[0][0]}; one would be lost.")
        if name not in outputs:  # a layer that is not trained: refused by its name
            whole[name] = slices[0][3]
            continue
        whole[name] = merge_lora_slices(slices, outputs[name], source)
    return whole, bool(parts)


def describe_unused(model, clip, lora, left_out: list[str]) -> str:
    """What of a LoRA the host's loader does not use, in words; "" when it uses all. left_out: what
    `find_unloadable_layers` found."""
    parts = find_skipped_parts(model, clip, lora)
    told = parts and (
        f"{len(parts)} parts of this LoRA have no effect, because ComfyUI does not read them or the layer has another "
        f"size: {format_first_names(parts, 10)}."
    )
    return "\n".join(filter(None, (describe_left_out_layers(clip, lora, left_out), told)))


def describe_left_out_layers(clip, lora, left_out: list[str]) -> str:
    """How many layers of a LoRA the host's loader skips, and which, of what `find_unloadable_layers` found; "" for
    none."""
    if not left_out:
        return ""
    total = len(list_lora_layers(lora))
    if clip is None and all(TEXT_ENCODER_LAYER.match(name) for name in left_out):
        remedy = "They belong to the text encoder: connect CLIP to use them."
    else:
        remedy = "Is it a LoRA for another model?"
    return (
        f"{len(left_out)} of {total} layers of this LoRA have no effect, because "
        f"{'MODEL has' if clip is None else 'MODEL and CLIP have'} no such layers: {format_first_names(left_out, 10)}. "
        f"{remedy}"
    )


def check_lora_loads(model, clip, lora: LoraFile):
    """The self-check after training: the host's own loader must take every layer of the file. Raises RuntimeError with
    those it skips."""
    misfits = find_unloadable_layers(model, clip, lora)
    if misfits:
        raise RuntimeError(
            f"ComfyUI's loader would skip {len(misfits)} of {len(list_lora_layers(lora))} trained layers, for example "
            f"{misfits[0]}. Please report this model."
        )
