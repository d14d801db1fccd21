"""What a link may bring to every input of every node: the node refuses it in words, or works with it."""

import asyncio
import math
import pathlib
import traceback

import numpy as np
import pytest
import torch
from comfy_api.latest import io
from trainyard import nodes as pack
from trainyard.nodes.input_checks import check_value
from trainyard.nodes.paths import NamesOnDisk
from trainyard.nodes.train.leco_score import LecoScoreSettings, WatchSettings

ROOT = pathlib.Path(pack.__file__).parents[1]
NODES = {node.__name__: node for node in asyncio.run(pack.TrainyardExtension().get_node_list())}
NUMBERS = [-1, 0, 3.5, 1e308, -(10**30), 10**400, np.float64(2.5), np.int64(3)]
NO_NUMBERS = [math.nan, math.inf, -math.inf, np.float64("nan")]
TEXTS = ["", " ", "no such option", "../..", "input/../../etc", "a\0b", "\ud800", "x" * 100_000, "1", "nan", "=:|->,;["]
OTHERS = [None, True, [], {}, [1.0], ["a"], (), b"a", torch.zeros(2)]
HOSTILE = [*NUMBERS, *NO_NUMBERS, *TEXTS, *OTHERS]


class ReachedError(Exception):
    """All widgets passed: the node began to work with what is connected."""


class Untouched:
    """Stands for a model or a dataset."""

    def reached(self, *_):
        raise ReachedError

    __getattr__ = __len__ = __iter__ = __getitem__ = __call__ = reached


CONNECTED = {
    "IMAGE": torch.zeros(1, 8, 8, 3),
    "MASK": torch.ones(1, 8, 8),
    "LATENT": {"samples": torch.zeros(1, 4, 8, 8)},
    "CONDITIONING": [[torch.zeros(1, 3, 4), {}]],
    "LORA_MODEL": {"a.lora_up.weight": torch.ones(2, 2)},
    "LOSS_MAP": {"loss": [1.0, 0.5]},
    "TRAINYARD_PROMPTS": (),
    "TRAINYARD_SIGNED_PROMPTS": (),
    "TRAINYARD_SCORE_MIX": (),
    "TRAINYARD_LECO_SCORE": (LecoScoreSettings(), WatchSettings()),
}


def proper_value(one):
    """What the page would send for a node that was just made, with everything connected."""
    if not isinstance(one, io.WidgetInput):
        return CONNECTED.get(one.get_io_type(), Untouched())
    if isinstance(one, io.Combo.Input):
        return one.default if one.default is not None else one.options[0]
    return one.default if one.default is not None else {"STRING": "", "INT": 1, "FLOAT": 1.0}.get(one.get_io_type())


def run_as_the_host_does(node, values):
    clone = node.PREPARE_CLASS_CLONE(
        {"hidden_inputs": {io.Hidden.unique_id: "1", io.Hidden.prompt: {}, io.Hidden.extra_pnginfo: {}}}
    )
    return clone.EXECUTE_NORMALIZED(**values)


def complaint(node, values):
    """The words in which the node refuses these values, None where it works. Fails for any other error."""
    try:
        run_as_the_host_does(node, values)
    except ReachedError:
        return None
    except ValueError as error:
        place = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert place.is_relative_to(ROOT) and not isinstance(error, UnicodeError), f"raised in {place}: {error!r}"
        return str(error)
    return None


def inputs_of(node):
    return (node.SCHEMA or node.GET_SCHEMA()).inputs


def is_wrong_kind(one, value):
    if isinstance(one, (io.Int.Input, io.Float.Input)):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            return True
        return not math.isfinite(float(value) if abs(value) < 1e308 else 0.0 if value == value else value)
    if isinstance(one, io.Boolean.Input):
        return not isinstance(value, bool)
    return not isinstance(value, str)


@pytest.mark.parametrize("name", NODES)
def test_whatever_a_link_brings_is_refused_in_words_or_taken(name, folders):
    node = NODES[name]
    lists = node.SCHEMA.is_input_list if node.SCHEMA else node.GET_SCHEMA().is_input_list
    proper = {one.id: proper_value(one) for one in inputs_of(node)}
    for one in inputs_of(node):
        for value in [*HOSTILE, *([object()] if isinstance(one, io.WidgetInput) else [])]:
            values = {**proper, one.id: value}
            said = complaint(node, {key: [v] for key, v in values.items()} if lists else values)
            if isinstance(one, io.WidgetInput) and is_wrong_kind(one, value):
                assert said and said.startswith(f"{one.id} is "), f"{one.id} = {value!r}: {said}"
        if lists and not one.optional:
            values = {key: [v] for key, v in proper.items()} | {one.id: []}
            assert f"{one.id} is an empty list" in complaint(node, values)


def test_the_page_may_send_every_default(folders):
    """Nodes without a socket that must be connected run with what the page sends."""
    plain = [node for node in NODES.values() if all(isinstance(one, io.WidgetInput) for one in inputs_of(node))]
    assert len(plain) >= 5
    for node in plain:
        for one in inputs_of(node):
            if not isinstance(getattr(one, "options", None), NamesOnDisk):
                check_value(one, proper_value(one))


@pytest.mark.parametrize("name", [name for name, node in NODES.items() if "fingerprint_inputs" in vars(node)])
def test_what_a_link_has_not_brought_yet_makes_a_node_run_anew(name, folders):
    """The host asks for fingerprints with None, or with (None,), in the place of what is linked."""
    node = NODES[name]
    for one in inputs_of(node):
        if isinstance(one, io.WidgetInput):
            for missing in (None, (None,)):
                fingerprint = node.fingerprint_inputs(
                    **{other.id: "x" for other in inputs_of(node)} | {one.id: missing}
                )
                assert math.isnan(fingerprint)


def test_a_fingerprint_is_that_of_the_node_where_nothing_is_linked(folders):
    (folders / "input" / "a.txt").write_text("cat")
    fingerprint = lambda: NODES["LoadPrompts"].fingerprint_inputs(file="input/a.txt", text="", format="auto")
    before = fingerprint()
    assert before == fingerprint()
    (folders / "input" / "a.txt").write_text("cat and dog")
    assert fingerprint() != before


def test_numbers_come_as_pythons_own():
    whole, real = io.Int.Input("a", min=0, max=9), io.Float.Input("b", min=0.0, max=9.0)
    for one, value, kind in (
        (whole, 3.0, int),
        (whole, np.int64(3), int),
        (real, 3, float),
        (real, np.float32(3), float),
    ):
        assert check_value(one, value) == 3 and type(check_value(one, value)) is kind


def test_an_unknown_option_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="mode is 'fast'; choose one of off, on."):
        check_value(io.Combo.Input("mode", options=["off", "on"]), "fast")
    assert check_value(io.Combo.Input("file", options=NamesOnDisk(["a"])), "b") == "b", "its opener checks it"


@pytest.mark.parametrize(("kind", "value"), [
    ("MODEL", "text"), ("MODEL", None), ("VAE", {}), ("CLIP", "text"), ("TRAINYARD_DATASET", [1]), ("IMAGE", [1]), ("LATENT", torch.ones(1)),
    ("CONDITIONING", "text"), ("LORA_MODEL", [1]), ("TRAINYARD_PROMPTS", "text"),
])  # fmt: skip
def test_a_value_of_another_kind_on_a_socket_is_refused(kind, value):
    with pytest.raises(ValueError, match=f"one holds .*; connect an output of the type {kind}"):
        check_value(io.Custom(kind).Input("one"), value)
    if value is None:
        assert check_value(io.Custom(kind).Input("one", optional=True), value) is None


@pytest.mark.parametrize("kind", ["CLIP", "VAE"])
def test_what_a_checkpoint_lacks_is_said(kind):
    with pytest.raises(ValueError, match=f"{kind} is empty: this checkpoint holds no"):
        check_value(io.Custom(kind).Input("one"), None)


def test_an_unknown_way_of_checkpointing_is_refused_before_anything_is_loaded(folders):
    node = NODES["TrainLora"]
    values = {one.id: [proper_value(one)] for one in inputs_of(node)} | {"checkpointing": ["quickly"]}
    assert complaint(node, values).startswith("checkpointing is 'quickly'; choose one of off, ")
