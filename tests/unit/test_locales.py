"""Texts for translators: every one of a node is found, and a translation's gaps are named."""

import json
import re

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
    assert locales.differences(english, translated) == (
        ["Train/inputs/more/name", "Train/inputs/more/tooltip"],
        ["Train/inputs/old/name"],
    )


def named(**texts):
    return {"Train": {"inputs": {name: {"name": name, "tooltip": text} for name, text in texts.items()}}}


def test_a_text_that_changed_loses_its_translation_and_a_sentence_that_moved_takes_it_along():
    before, now = (
        named(model="The model.", steps="How long.", old="Kept."),
        named(model="Another model.", steps="How long.", new="Kept."),
    )
    translated = named(model="Das Modell.", steps="Wie lange.", old="Behalten.")
    left = locales.flat(locales.carried(before, now, translated))
    assert left == {
        "Train/inputs/model/name": "model", "Train/inputs/steps/name": "steps", "Train/inputs/steps/tooltip": "Wie lange.",
        "Train/inputs/new/tooltip": "Behalten.",
    }  # fmt: skip
    assert locales.differences(now, locales.tree(left)) == (["Train/inputs/model/tooltip", "Train/inputs/new/name"], [])


def test_a_label_is_not_carried_to_another_node():
    """`words` may be how many, or which."""
    before, now = {"Long": named(words="How many.")["Train"]}, {"Match": named(words="Which ones.")["Train"]}
    assert locales.carried(before, now, {"Long": named(words="Wie viele.")["Train"]}) == {}


def test_translations_are_filled_in_by_english_text_or_by_path_and_what_is_there_stays():
    english = named(clip="Clips.", model="The model.", more="The model.")
    words = {"The model.": "Das Modell.", "clip": "CLIP", "Train/inputs/clip/name": "Abschneiden", "Clips.": ""}
    done = locales.flat(locales.filled(english, named(more="Ein Modell."), words))
    assert done["Train/inputs/model/tooltip"] == "Das Modell."
    assert done["Train/inputs/more/tooltip"] == "Ein Modell."
    assert done["Train/inputs/clip/name"] == "Abschneiden"
    assert "Train/inputs/clip/tooltip" not in done


def test_a_translation_of_a_text_that_no_node_says_is_refused():
    with pytest.raises(KeyError, match="'The modell.'.*`todo`"):
        locales.filled(named(model="The model."), {}, {"The modell.": "Das Modell."})


@pytest.mark.parametrize("language", locales.languages())
def test_a_translation_holds_no_text_that_no_node_says_any_more(language):
    """What it lacks is shown in English, and is no fault: `tools/locales.py` names it."""
    assert locales.differences(locales.read("en"), locales.read(language))[1] == []


def test_what_has_no_translation_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(locales, "LOCALES", tmp_path)
    locales.write("en", named(model="The model.", steps="How long."))
    locales.write("de", named(model="Das Modell."))
    (tmp_path / "de" / "main.json").write_text(json.dumps({"trainyard": {word: "" for word in locales.page_words()}}))
    (line,) = locales.report_missing()
    assert line.startswith("de: 2 texts of nodes and 0 words") and "Train/inputs/steps/tooltip" in line


# -- the page's own words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", locales.languages())
def test_a_translated_word_is_one_of_the_page_and_keeps_its_placeholders(language):
    given = locales.read_page_words(language)
    assert given and sorted(given.keys() - locales.page_words()) == []
    places = lambda text: sorted(re.findall(r"\{\d\}", text))
    assert {english: text for english, text in given.items() if places(english) != places(text)} == {}


def test_the_words_that_depend_on_the_run_are_those_that_the_server_sends():
    """Each is somewhere in the code as it is written here."""
    code = "\n".join(
        file.read_text("utf-8")
        for folder in ("nodes", "trainers", "web")
        for file in (locales.ROOT / folder).rglob("*.*")
        if file.suffix in (".py", ".js", ".mjs")
    )
    nouns = {word.split()[-1] for word in locales.CHOSEN if word.startswith(("fixed ", "trained "))}
    spoken = {word for word in locales.CHOSEN if not word.startswith(("fixed ", "trained "))} | nouns
    assert [word for word in sorted(spoken) if not re.search(rf"""['"]{re.escape(word)}['"]""", code)] == []
