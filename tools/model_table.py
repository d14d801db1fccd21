"""MODELS.md: every model class of ComfyUI, with the recipe it is trained with and what the tests have tried.

Asks the ComfyUI of this process; a class is named as trained only when a test trains it (tests/comfy/families.py and
more_families.py hold those models).
"""

from __future__ import annotations

import inspect
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
- **trains**: at toy size, the gradients equal finite differences, steps lower the loss, and ComfyUI's own loader knows
  every layer of the file ([tests/comfy/test_more_families.py](tests/comfy/test_more_families.py)). Each run checks the
  gradients of the full-size model first.
- **not tried**: no test trains it. Each run checks the gradients first and refuses a model that fails. That a model needs
  another input, such as an image or a mask, is not checked by this table. Inpainting models of images are tried with
  theirs ([tests/comfy/test_inpaint.py](tests/comfy/test_inpaint.py)).
- **refused**: Trainyard says why before a run, as here (nodes/host/conditions.py).
- **makes no images**: its latents have no height and width.

Nobody has trained a good LoRA on a full-size model for this table. Guidance: what the model is told
while it is trained, if it takes guidance as an input. Noise levels: *shift* moves them towards noise by
s*t / (1 + (s - 1)*t); "by size" counts the tokens of a latent.

| class | base model in the file | noise levels | guidance | tests |
|---|---|---|---|---|
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


def describe_tests(name: str, dimensions: int, refusal: str) -> str:
    from trainyard.nodes.host.families import TESTED_CLASSES
    from trainyard.tests.comfy.more_families import INPAINTING, MORE, PER_BLOCK, WITHOUT_IMAGE

    found = {row.supported: key for key, row in MORE.items()}
    if refusal:
        return f"refused: {refusal}"
    if name in TESTED_CLASSES:
        return "tested" + ("; its inpainting model trains" if found.get(name) in INPAINTING else "")
    if found.get(name) in WITHOUT_IMAGE:
        return "trains, tried without its image or mask"
    if name in found:
        return "trains, checkpointed per block" if found[name] in PER_BLOCK else "trains"
    return "makes no images" if dimensions == 1 else "not tried"


def examine_class(config):
    """(the host's noise schedule for a class, why it is refused or ""), without building the network; None and "" where
    that needs more than the class."""
    import comfy.model_base
    from trainyard.nodes.host.conditions import REFUSED_CLASSES, host_class

    refusal, made, original = "", [], comfy.model_base.model_sampling
    comfy.model_base.model_sampling = lambda *about: made.append(original(*about)) or made[-1]
    try:
        model = config.get_model({"cc_projection.weight": torch.zeros(1, 1), "cc_projection.bias": torch.zeros(1)})
        refusal = REFUSED_CLASSES.get(host_class(model).__name__, "")
    except (
        AttributeError,
        KeyError,
        RuntimeError,
        ValueError,
    ):  # of weights that are asked for after the schedule, or before it
        pass
    finally:
        comfy.model_base.model_sampling = original
    return (made[0] if made else None), refusal


def format_row(supported) -> str:
    from trainyard.nodes.host.families import find_model_family, is_flow

    config = supported({"in_channels": 4, "hidden_size": 0, **supported.unet_config})
    config.unet_config["disable_unet_model_creation"] = True
    sampling, refusal = examine_class(config)
    family = find_model_family(config, sampling)
    latent = config.latent_format() if inspect.isclass(config.latent_format) else config.latent_format
    flow = sampling is None or is_flow(sampling)
    noise = "" if refusal else describe_noise(family.density, flow)
    guidance = "" if refusal or family.guidance is None else f"{family.guidance:g}"
    tests = describe_tests(supported.__name__, latent.latent_dimensions, refusal)
    return f"| {supported.__name__} | {family.base_version} | {noise} | {guidance} | {tests} |\n"


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
