"""The nodes as ComfyUI shows them: nothing changes by accident, everything explains itself."""

import dataclasses
import json
import pathlib
import re

import pytest
from trainyard.tests.workflows import snapshot
from trainyard.tests.workflows.convert import WIDGETS, widgets
from trainyard.tests.workflows.snapshot import AS_IN_KSAMPLER, READ_FROM_DISK
from trainyard.trainers.captioners.tags import TaggerSettings
from trainyard.trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, PointSettings

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
IDS = tuple(snapshot.known_promises())


@pytest.fixture(scope="module")
def schemas(server):
    return {name: schema for name, schema in server.object_info().items() if name.startswith("Trainyard")}


def test_ids_inputs_and_outputs_are_those_that_saved_workflows_know(schemas):
    found, known = snapshot.all_promises(schemas), snapshot.known_promises()
    if changed := snapshot.changed_nodes(known, found):
        pytest.fail(
            f"The schema of {', '.join(changed)} changed, and saved workflows depend on it (widget values are saved by "
            "position: append, never insert). If it is meant: `make refresh ARGS=--accept`, see `git diff` of "
            "tests/workflows/nodes.json, and tell users in CHANGELOG.md."
        )
    assert list(found) == list(known), "run `make refresh`"


def test_memory_is_measured_before_a_run_unless_somebody_says_otherwise():
    """In every new Train node and in every template, which its API twin says too."""
    defaults = {
        name: about["default"]
        for name, promises in snapshot.known_promises().items()
        for about in promises["inputs"]
        if about["name"] == "checkpointing"
    }
    in_templates = {
        path.stem: node["inputs"]["checkpointing"]
        for path in sorted((ROOT / "workflows" / "api").glob("*.json"))
        for node in json.loads(path.read_text(encoding="utf-8")).values()
        if "checkpointing" in node["inputs"]
    }
    assert len(defaults) == 7 and set(defaults.values()) == {"auto"}, defaults
    assert len(in_templates) == 11 and set(in_templates.values()) == {"auto"}, in_templates


def test_help_promises_equal_bytes_where_a_seed_gives_them():
    """On the CPU: kernels of graphics cards may add in another order from run to run."""
    said = {path.parent.name: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").glob("*/en.md")}
    seeds = {name: line for name, text in said.items() for line in text.splitlines() if line.startswith("- **`seed`**")}
    trains = [name for name in seeds if re.match("Trainyard(Train|Distill|Pretrain)", name)]
    vague = [name for name in trains if "bit for bit on the CPU, nearly so on a GPU" not in seeds[name]]
    assert len(trains) == 9 and not vague, vague


def test_help_says_how_texts_are_surely_read_as_they_were_written():
    """Short texts in GBK may be valid UTF-8 by chance, and nothing in the file tells."""
    text = (ROOT / "web" / "docs" / "TrainyardLoadDataset" / "en.md").read_text(encoding="utf-8")
    assert re.search(r"GBK can be valid UTF-8 by chance.*save tables and captions as \*UTF-8 with BOM\*", text)


def every_input(schema):
    for group in ("required", "optional"):
        for name, (kind, *about) in schema["input"].get(group, {}).items():
            yield name, "COMBO" if isinstance(kind, list) else kind, about[0] if about else {}


@pytest.mark.parametrize("node", IDS)
def test_every_input_says_what_it_is_for_and_every_number_its_range(schemas, node):
    for name, kind, about in every_input(schemas[node]):
        tooltip = about.get("tooltip", "")
        assert len(tooltip.split()) >= 3 and tooltip.endswith((".", ")")), (
            f"{node}.{name}: {tooltip!r} explains nothing"
        )
        if kind in ("INT", "FLOAT"):
            low, high = re.search(r"\(([-\d.e+]+) to ([-\d.e+]+)", tooltip).groups()
            assert (float(low), float(high)) == (float(about["min"]), float(about["max"])), (
                f"{node}.{name}: {tooltip!r}"
            )
            assert "e+" not in tooltip, f"{node}.{name}: {tooltip!r} is no number for people"


@pytest.mark.parametrize("node", IDS)
def test_every_node_describes_itself_and_can_be_found_by_other_words(schemas, node):
    schema = schemas[node]
    assert len(schema["description"].split()) >= 6
    other = [alias for alias in schema["search_aliases"] if alias.lower() not in schema["display_name"].lower()]
    assert len(other) >= 2, f"{node} is found by its name only: {schema['search_aliases']}"
    assert schema["category"].startswith("model/training/trainyard")
    assert all(schema["output_tooltips"]), f"an output of {node} has no tooltip"


def test_a_train_node_shows_at_most_eight_widgets(schemas):
    trains = [name for name in schemas if name.startswith("TrainyardTrain")]
    assert trains
    for name in trains:
        shown = [widget for widget, _, about in widgets(schemas[name]) if not about.get("advanced")]
        assert len(shown) <= 8, f"{name} shows {len(shown)}: {shown}"


@pytest.mark.parametrize(
    ("node", "record", "elsewhere"),
    [
        ("TrainyardAdapter", AdapterSettings, {"rank"}),
        ("TrainyardOptimizer", OptimizerSettings, set()),
        ("TrainyardNoiseAndLoss", NoiseSettings, set()),
        ("TrainyardPoints", PointSettings, set()),
        ("TrainyardTagger", TaggerSettings, set()),
    ],
)
def test_a_settings_node_shows_its_whole_record_with_the_records_defaults(schemas, node, record, elsewhere):
    expected = {f.name: f.default for f in dataclasses.fields(record) if f.name not in elsewhere}
    expected |= {"expert": "whole range"} if node == "TrainyardNoiseAndLoss" else {}  # sets fields of the record
    assert {name: about["default"] for name, _, about in widgets(schemas[node])} == expected
    sockets = {"assistant"} if node == "TrainyardNoiseAndLoss" else set()
    assert {name for name, kind, _ in every_input(schemas[node]) if kind not in WIDGETS} == sockets


def test_no_seed_changes_by_itself_between_two_runs(schemas):
    """The page adds 'randomize' to a seed that says nothing, and pressing Run again would train again."""
    seeds = [(node, about) for node in schemas for name, _, about in every_input(schemas[node]) if name == "seed"]
    assert seeds
    for node, about in seeds:
        assert about.get("control_after_generate") == "fixed", node


# -- help pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", IDS)
def test_the_help_page_names_every_input_output_and_choice(schemas, node):
    page = (DOCS / node / "en.md").read_text(encoding="utf-8")
    names = [name for name, _, _ in every_input(schemas[node])] + schemas[node]["output_name"]
    absent = [name for name in names if f"`{name}`" not in page]
    assert not absent, f"web/docs/{node}/en.md does not name {', '.join(absent)}"
    options = [
        o
        for name, _, about in every_input(schemas[node])
        if name not in READ_FROM_DISK + AS_IN_KSAMPLER
        for o in about.get("options", ())
    ]
    assert all(option in page for option in options), f"web/docs/{node}/en.md leaves out one of {options}"


@pytest.mark.parametrize("node", IDS)
def test_defaults_in_the_help_page_are_the_nodes_own(schemas, node):
    """Lines such as: - **`name`** (default 16, 1 to 4096): what it does."""
    rows = dict(
        re.findall(r"^- \*\*`(\w+)`\*\* \(default ([^,)]+)", (DOCS / node / "en.md").read_text(encoding="utf-8"), re.M)
    )
    for name, kind, about in every_input(schemas[node]):
        if kind in ("INT", "FLOAT"):
            assert float(rows[name]) == about["default"], (
                f"{node}.{name}: the page says {rows[name]}, the node {about['default']}"
            )
        if kind == "BOOLEAN":
            assert rows[name] == ("on" if about["default"] else "off"), f"{node}.{name}"


def test_every_picture_of_a_help_page_exists():
    """They are looked up from docs/, not from the page's own folder."""
    images = [
        (page, name)
        for page in DOCS.rglob("*.md")
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert images
    for page, name in images:
        assert (DOCS / name).is_file(), f"{page} shows {name}, and there is no {DOCS / name}"


def test_help_pages_use_lists_and_no_tables():
    """The panel is 200 to 350 px wide: a table's columns are squeezed or out of sight."""
    tables = [
        (page.parent.name, line)
        for page in DOCS.rglob("*.md")
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    assert tables == []


def test_there_is_no_help_page_without_a_node(schemas):
    assert {page.parent.name for page in DOCS.rglob("en.md")} == set(schemas)
