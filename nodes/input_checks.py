"""Holds what reaches a node by a link to the limits of its inputs.

The page and the host check what is typed into a widget; a link brings anything: None, NaN, a text for a number, an
option that does not exist. The check stands between the host and `execute` of every node, so that no node needs its
own.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from comfy_api.latest import io

from ..trainers.data.metadata import format_raw_value
from ..trainers.settings import check_number_value
from .host.encoders import check_clip, check_vae
from .paths import NamesOnDisk

SOCKET_CLASSES = {  # io type -> what its values are; all others are objects of some class
    "IMAGE": torch.Tensor,
    "MASK": torch.Tensor,
    "LATENT": dict,
    "CONDITIONING": list,
    "LORA_MODEL": dict,
    "LOSS_MAP": dict,
    "TRAINYARD_PROMPTS": tuple,
    "TRAINYARD_SIGNED_PROMPTS": tuple,
    "TRAINYARD_SCORE_MIX": tuple,
    "TRAINYARD_LECO_SCORE": tuple,
}
CHECKPOINT_PARTS = {"CLIP": check_clip, "VAE": check_vae}  # a checkpoint may lack them; these say what to do
PLAIN_CLASSES = (bool, int, float, complex, str, bytes, list, tuple, dict, torch.Tensor, np.ndarray, np.generic)
MAX_SHOWN_OPTIONS = 20


def with_checked_inputs(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` gets only what its inputs allow. Raises ValueError, naming input, value and remedy."""

    def execute(cls, **values):
        return node.execute.__func__(cls, **check_inputs(cls.SCHEMA or cls.GET_SCHEMA(), values))

    def fingerprint_inputs(cls, **values):
        """NaN, which is never the same, while a link has not brought its value yet."""
        widgets = {one.id for one in (cls.SCHEMA or cls.GET_SCHEMA()).inputs if isinstance(one, io.WidgetInput)}
        if any(value is None or value in ([None], (None,)) for name, value in values.items() if name in widgets):
            return math.nan
        return node.fingerprint_inputs.__func__(cls, **values)

    members = {"execute": classmethod(execute), "__module__": node.__module__, "__qualname__": node.__qualname__}
    if node.fingerprint_inputs.__func__ is not io.ComfyNode.fingerprint_inputs.__func__:
        members["fingerprint_inputs"] = classmethod(fingerprint_inputs)
    return type(node.__name__, (node,), members)


def check_inputs(schema: io.Schema, values: dict) -> dict:
    """The values by input, numbers as Python's own. Raises ValueError for one that its input does not allow."""
    known = {one.id: one for one in schema.inputs}
    check = check_list if schema.is_input_list else check_value
    return {name: check(known[name], value) if name in known else value for name, value in values.items()}


def check_list(one: io.Input, values) -> list:
    """The same for a node whose inputs come as lists; None on an optional socket is as good as nothing connected."""
    if one.optional and not isinstance(one, io.WidgetInput):
        values = [value for value in values if value is not None]
    if not values and not (one.optional and is_socket(one)):
        raise ValueError(f"{one.id} is an empty list; connect something that gives at least one value.")
    return [check_value(one, value) for value in values]


def is_socket(one: io.Input) -> bool:
    """Whether the input has no widget, so that it may be left open."""
    return not isinstance(one, io.WidgetInput) or bool(one.force_input)


def check_value(one: io.Input, value):
    """The value, if the input allows it. Raises ValueError otherwise."""
    if value is None and one.optional and not isinstance(one, io.WidgetInput):
        return value
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(one, (io.Int.Input, io.Float.Input)):
        limits = dict(lo=-math.inf if one.min is None else one.min, hi=math.inf if one.max is None else one.max)
        return check_number_value(one.id, value, int if isinstance(one, io.Int.Input) else float, limits)
    if isinstance(one, io.Boolean.Input):
        if not isinstance(value, bool):
            raise ValueError(f"{one.id} is {format_raw_value(value)}; it must be true or false.")
    elif isinstance(one, (io.String.Input, io.Combo.Input)):
        if not isinstance(value, str):
            raise ValueError(f"{one.id} is {format_raw_value(value)}; it must be text.")
        if isinstance(one, io.Combo.Input):
            check_option(one, value)
    else:
        check_socket(one, value)
    return value


def check_option(one: io.Combo.Input, value: str) -> None:
    """Raises ValueError for an option that does not exist. What lies on disk may have changed since the options were
    listed; whoever opens it checks its name."""
    options = one.options or []
    if not isinstance(options, NamesOnDisk) and value not in options:
        names = ", ".join(map(str, options[:MAX_SHOWN_OPTIONS])) + (", ..." if len(options) > MAX_SHOWN_OPTIONS else "")
        raise ValueError(f"{one.id} is {format_raw_value(value)}; choose one of {names}.")


def check_socket(one: io.Input, value) -> None:
    """Raises ValueError for a value of another kind than the input's."""
    kind = one.get_io_type()
    if value is None and kind in CHECKPOINT_PARTS:
        CHECKPOINT_PARTS[kind](value)
    expected = SOCKET_CLASSES.get(kind)
    fits = isinstance(value, expected) if expected else value is not None and not isinstance(value, PLAIN_CLASSES)
    if not fits:
        found = "nothing" if value is None else f"a value of the type {type(value).__name__}"
        raise ValueError(f"{one.id} holds {found}; connect an output of the type {kind}.")
