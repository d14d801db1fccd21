"""Texts for translators: every one of a node is found, and a translation's gaps are named."""

import json

import pytest
from trainyard.tools import locales

SCHEMA = {
    "display_name": "Train", "description": "Trains.", "output_name": ["lora", "steps"], "output_tooltips": ["For Save.", None],
    "input": {"required": {"model": ["MODEL", {"tooltip": "The model."}], "bare": ["INT"]}, "optional": {"more": ["INT", {"display_name": "More", "tooltip": "How many."}]}},
}  # fmt: skip


def test_every_text_of_a_node_is_found():
    assert locales.flat(locales.texts(SCHEMA)) == {
        "display_name": "Train", "description": "Trains.", "inputs/model/name": "model", "inputs/model/tooltip": "The model.",
        "inputs/bare/name": "bare", "inputs/more/name": "More", "inputs/more/tooltip": "How many.", "outputs/0/name": "lora",
        "outputs/0/tooltip": "For Save.", "outputs/1/name": "steps",
    }  # fmt: skip


def test_what_a_translation_lacks_and_what_no_node_has_any_more_is_named():
    english = {"Train": locales.texts(SCHEMA)}
    translated = json.loads(json.dumps(english))
    del translated["Train"]["inputs"]["more"]
    translated["Train"]["inputs"]["old"] = {"name": "alt"}
    assert locales.differences(english, translated) == (["Train/inputs/more/name", "Train/inputs/more/tooltip"], ["Train/inputs/old/name"])


@pytest.mark.parametrize("file", sorted(locales.LOCALES.glob("*/nodeDefs.json")), ids=lambda file: file.parent.name)
def test_a_translation_has_every_text_of_the_english_one(file):
    english = json.loads((locales.LOCALES / "en" / "nodeDefs.json").read_text("utf-8"))
    assert locales.differences(english, json.loads(file.read_text("utf-8"))) == ([], [])
