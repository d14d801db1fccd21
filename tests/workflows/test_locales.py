"""The nodes in other languages: exact where they are translated, and what ComfyUI's page is given.

What a translation lacks, the page shows in English; `tools/locales.py` names it and tells how it is filled in.
"""

import re

import pytest
from trainyard.tools import locales

LANGUAGES = locales.languages()
TERMS = {"960 x 540 px."}  # sentences that are the same in every language
RANGE = re.compile(r"\([-\d.e+]+ to [-\d.e+]+[^()]*\)$")
VERBATIM = (
    r"`[^`]+`",  # names as they are typed
    r"\{[a-z]+\}",  # placeholders
    r"(?<![\w.])\.[a-z]\w+",  # file endings
    r"\w+(?:/\w+)+",  # paths
    r"[a-z]+(?:_[a-z0-9]+)+\.[a-z]+",  # file names
    r"\d+(?:\.\d+)?",
)


@pytest.fixture(scope="module")
def schemas(server):
    return {name: schema for name, schema in server.object_info().items() if name.startswith("Trainyard")}


@pytest.fixture(scope="module")
def english():
    return locales.flat(locales.read("en"))


@pytest.fixture(params=LANGUAGES)
def language(request):
    return request.param


@pytest.fixture
def translated(language):
    return locales.flat(locales.read(language))


@pytest.fixture
def pairs(english, translated):
    """(path, English text, translated text) of what is translated."""
    return [(path, english[path], translated[path]) for path in sorted(english.keys() & translated.keys())]


def verbatim(text):
    """What no translation changes: numbers, file names, paths, placeholders, names in backticks."""
    return {found for pattern in VERBATIM for found in re.findall(pattern, text)}


def quoted_options(schemas):
    """(path of a tooltip, option) for every option of an input that its own tooltip quotes or explains."""
    for node, schema in schemas.items():
        for group in ("required", "optional"):
            for name, (_, *about) in schema["input"].get(group, {}).items():
                about = about[0] if about else {}
                for option in about.get("options") or ():
                    if re.search(
                        rf"(?<!\w){re.escape(str(option))}:|['`]{re.escape(str(option))}['`]", about.get("tooltip", "")
                    ):
                        yield f"{node}/inputs/{name}/tooltip", str(option)


def test_the_english_file_says_what_the_nodes_say(schemas, english):
    said = locales.flat({name: locales.texts(schema) for name, schema in schemas.items()})
    changed = sorted(path for path in said.keys() | english.keys() if said.get(path) != english.get(path))
    assert changed == [], "run `make refresh`"


def test_what_is_called_a_translation_is_one(pairs):
    """A label of one to three words may be a term that stays: LoRA, VAE, top_p."""
    same = [(path, text) for path, english, text in pairs if text == english and text not in TERMS]
    labels = [path for path, _ in same if path.endswith("/name")]
    assert [path for path, text in same if path not in labels or len(text.split()) > 3] == []
    assert len(labels) < len([path for path, _, _ in pairs if path.endswith("/name")]) / 4, (
        f"{len(labels)} labels are the English ones"
    )


def test_a_number_keeps_its_range_at_the_end(pairs):
    ranges = [(path, found[0], text) for path, english, text in pairs if (found := RANGE.search(english))]
    assert len(ranges) > 200
    assert [path for path, numbers, text in ranges if not text.endswith(f" {numbers}")] == []


def test_numbers_files_placeholders_and_names_in_backticks_stay_as_they_are(pairs):
    lost = {path: verbatim(english) - verbatim(text) for path, english, text in pairs}
    assert {path: words for path, words in lost.items() if words} == {}


def test_an_option_that_a_tooltip_explains_is_called_what_the_widget_calls_it(schemas, pairs):
    options = list(quoted_options(schemas))
    assert len(options) > 30
    said = {path: text for path, _, text in pairs}
    assert [(path, option) for path, option in options if option not in said.get(path, option)] == []


def test_no_two_inputs_of_a_node_share_a_name(language):
    for node, texts in locales.read(language).items():
        names = [about["name"] for about in texts.get("inputs", {}).values() if "name" in about]
        assert len(names) == len(set(names)), f"{node}: {sorted(name for name in names if names.count(name) > 1)}"


def test_no_two_nodes_share_a_name(language):
    names = [texts["display_name"] for texts in locales.read(language).values() if "display_name" in texts]
    assert len(names) == len(set(names))


def test_a_translated_folder_of_the_node_menu_is_one_of_the_packs_own(server, schemas, language):
    """model/training is ComfyUI's; what comes after it is ours."""
    folders = {folder for schema in schemas.values() for folder in schema["category"].split("/")} - {
        "model",
        "training",
    }
    assert set(server.get("/i18n")[language].get("nodeCategories", {})) <= folders, f"locales/{language}/main.json"


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_what_the_page_reads_as_a_template_holds_no_template_signs(language):
    """vue-i18n: {x} would be filled in, | parts plurals, @ links. ComfyUI's page reads tooltips raw, and names and
    descriptions not."""
    templates = {
        path: text for path, text in locales.flat(locales.read(language)).items() if not path.endswith("/tooltip")
    }
    assert {path: text for path, text in templates.items() if set("{}|@") & set(text)} == {}


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_server_gives_the_page_every_text(server, language):
    given = server.get("/i18n")[language]["nodeDefs"]
    assert {name: about for name, about in given.items() if name.startswith("Trainyard")} == locales.read(language)
