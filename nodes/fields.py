"""Widgets from settings records: a default, a range and a hint are written once, in the record."""

from __future__ import annotations

import json
from dataclasses import fields

from comfy_api.latest import io

DatasetType = io.Custom("TRAINYARD_DATASET")
EncodedType = io.Custom("TRAINYARD_ENCODED")
ScoreModelType = io.Custom("TRAINYARD_SCORE_MODEL")  # holds trainers.scores.networks.ScorerEnsemble
LoraModelType = io.Custom("LORA_MODEL")
LossMapType = io.Custom("LOSS_MAP")
CATEGORY = "model/training/trainyard"


def settings_inputs(record, *, only=(), without=(), optional=False):
    """The record's fields as inputs, in its own order; `only` keeps the named ones, `without` leaves some out.
    `optional`: prompts that were saved before the fields existed still run, with the defaults."""
    chosen = [f for f in fields(record) if (f.name in only if only else f.name not in without)]
    return [make_settings_widget(f, optional) for f in chosen]


def latent_score_inputs():
    """Inputs of image scores that may score latents too: see latents.to_score."""
    return [
        io.Model.Input(
            "model",
            optional=True,
            tooltip="To score latents too: the model that the latents belong to. It is not loaded.",
        ),
        io.Vae.Input(
            "vae", optional=True, tooltip="To score latents too: decodes them. TAESD needs a tenth of the memory."
        ),
    ]


def make_settings_widget(f, optional=False):
    meta = f.metadata
    about = dict(default=f.default, tooltip=format_tooltip(meta), advanced=meta.get("advanced") or None)
    about["optional"] = optional or meta.get("later", False)
    if "options" in meta:
        return io.Combo.Input(f.name, options=list(meta["options"]), **about)
    if meta.get("switch"):
        return io.Boolean.Input(f.name, **about)
    if meta.get("text"):
        return io.String.Input(f.name, multiline=meta.get("multiline", False), **about)
    if isinstance(f.default, int):
        control = dict(control_after_generate=io.ControlAfterGenerate.fixed) if f.name == "seed" else {}
        return io.Int.Input(f.name, min=meta["lo"], max=meta["hi"], step=meta["step"] or 1, **control, **about)
    return io.Float.Input(f.name, min=meta["lo"], max=meta["hi"], step=meta["step"] or 0.01, round=False, **about)


def format_tooltip(meta):
    """The hint, with the unit and the range that a person would ask for."""
    if "lo" not in meta:
        return meta["hint"]
    unit = f" {meta['unit']}" if meta.get("unit") else ""
    return f"{meta['hint']} ({format_range_number(meta['lo'])} to {format_range_number(meta['hi'])}{unit})"


def format_range_number(number) -> str:
    """As a person writes it: 1000000 and not 1e+06, 10 and not 10.0."""
    return f"{number:g}" if isinstance(number, float) else str(number)


def settings_from_widgets(kind, values):
    """The settings record of these widget values; re-checked here, because links bypass widget limits."""
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in values.items() if k in names})


def graph_metadata(hidden) -> dict[str, str]:
    """The graph that made a file, under the keys ComfyUI reads when a file is dropped on it."""
    graph = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {k: json.dumps(v, sort_keys=True) for k, v in graph.items() if v is not None}
