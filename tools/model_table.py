"""MODELS.md: every model class of ComfyUI, with the recipe it is trained with and what the tests have tried.

Asks the ComfyUI of this process; a class is named as trained only when a test trains it (tests/comfy/families.py and
more_families.py hold those models).
"""

from __future__ import annotations

import pathlib
import warnings

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / "MODELS.md"
HEAD = """# Models

Every model class that ComfyUI {version} loads (`comfy.supported_models`), in its order. `make refresh` makes this table
again, and a test checks that it is current.

- **tested**: at toy size with random weights, the gradients equal finite differences and an out-of-place reference, with
  and without checkpointing; the file, in ComfyUI's own loader, gives the trained output
  ([tests/comfy/test_host.py](tests/comfy/test_host.py)).
- **trains**: at toy size, with what it needs beside a caption, the gradients equal finite differences, a batch of two equals
  two batches of one, and the file, in ComfyUI's own loader, gives the trained output at +1 and -1
  ([tests/comfy/test_more_families.py](tests/comfy/test_more_families.py)). Each run checks the gradients of the full-size
  model first.
- **not tried**: no test trains it. Each run checks the gradients first and refuses a model that fails.
- **refused**: Trainyard says why before a run, as here (nodes/host/conditions.py).

*Needs* is what each conditioning must hold beside its caption; a dataset without it is refused before the run, in these
words. Control images of Load Dataset are such images where ComfyUI joins them to the noise (InstructPix2Pix and its like);
others come from ComfyUI's own nodes, as latents and conditioning of Train LoRA. The inpainting models of SD and SDXL are
of the classes SD15, SD20 and SDXL and need their image and mask.

Nobody has trained a good LoRA on a full-size model for this table. Guidance: what the model is told
while it is trained, if it takes guidance as an input. Noise levels: *shift* moves them towards noise by
s*t / (1 + (s - 1)*t); "by size" counts the tokens of a latent.

| class | base model in the file | noise levels | guidance | tests | needs |
|---|---|---|---|---|---|
"""


def describe_noise(density, flow: bool) -> str:
    """The density in words."""
    if density.kind == "uniform":
        return "uniform"
    width = f" of width {density.std:g}" if density.std != 1 else ""
    if density.shift == "resolution":
        return f"logit-normal{width}, shifted by size"
    if density.shift == "model":
        return f"logit-normal{width}, ComfyUI's own shift"
    return f"logit-normal{width}" + (f", shift {density.shift:.3g}" if flow and density.shift != 1 else "")


def describe_tests(name: str, refusal: str) -> str:
    from trainyard.nodes.host.families import TESTED_CLASSES
    from trainyard.tests.comfy.more_families import INPAINTING, MORE, WHY_NOT

    if refusal:
        return f"refused: {refusal}"
    if name in TESTED_CLASSES:
        fills = name in {MORE[key].supported for key in INPAINTING}
        return "tested" + ("; its inpainting model trains" if fills else "")
    if name in {row.supported for row in MORE.values()}:
        return "trains"
    return f"not tried: {WHY_NOT[name]}" if name in WHY_NOT else "not tried"


def describe_needs(keys) -> str:
    from trainyard.nodes.host.conditions import CONDITION_NAMES

    return ", ".join(CONDITION_NAMES[key].split(" (")[0] for key in keys)


def examine_tiny_model(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(why a class is refused or "", what it needs), asked of its tiny model; None where tests have none."""
    from trainyard.nodes.host.conditions import refusal, required_conditions
    from trainyard.tests.comfy.families import TABLE, base_model
    from trainyard.tests.comfy.more_families import MORE, REFUSED

    row = next((row for row in (*TABLE.values(), *MORE.values(), *REFUSED.values()) if row.supported == name), None)
    if row is None:
        return None
    model = base_model(row, torch.float32)
    return refusal(model), required_conditions(model)


def examine_class(config):
    """(the host's noise schedule for a class, why it is refused or "", what it needs), without building the network;
    None, "" and () where that needs more than the class."""
    import comfy.model_base
    from trainyard.nodes.host.conditions import CLASS_CONDITIONS, REFUSED_CLASSES, host_class

    refusal, needs, made, original = "", (), [], comfy.model_base.model_sampling
    comfy.model_base.model_sampling = lambda *about: made.append(original(*about)) or made[-1]
    try:
        model = config.get_model({"cc_projection.weight": torch.zeros(1, 1), "cc_projection.bias": torch.zeros(1)})
        name = host_class(model).__name__
        refusal, needs = REFUSED_CLASSES.get(name, ""), CLASS_CONDITIONS.get(name, ())
    except (
        AttributeError,
        KeyError,
        RuntimeError,
        ValueError,
    ):  # of weights that are asked for after the schedule, or before it
        pass
    finally:
        comfy.model_base.model_sampling = original
    return (made[0] if made else None), refusal, needs


def format_row(supported) -> str:
    from trainyard.nodes.host.families import find_model_family, is_flow

    config = supported({"in_channels": 4, "hidden_size": 0, **supported.unet_config})
    config.unet_config["disable_unet_model_creation"] = True
    sampling, refusal, needs = examine_class(config)
    refusal, needs = examine_tiny_model(supported.__name__) or (refusal, needs)
    family = find_model_family(config, sampling)
    flow = sampling is None or is_flow(sampling)
    noise = "" if refusal else describe_noise(family.density, flow)
    guidance = "" if refusal or family.guidance is None else f"{family.guidance:g}"
    tests, needed = describe_tests(supported.__name__, refusal), "" if refusal else describe_needs(needs)
    return f"| {supported.__name__} | {family.base_version} | {noise} | {guidance} | {tests} | {needed} |\n"


def format_table() -> str:
    import comfy.supported_models
    import comfyui_version

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's own, of numpy and torch
        rows = [format_row(supported) for supported in comfy.supported_models.models]
    return HEAD.format(version=comfyui_version.__version__) + "".join(rows)


def write_table() -> list[pathlib.Path]:
    """[MODELS.md] when it changed."""
    text = format_table()
    if PATH.is_file() and PATH.read_text("utf-8") == text:
        return []
    PATH.write_text(text, encoding="utf-8")
    return [PATH]
