"""A person with another language sees Train LoRA in it: title, labels, outputs and a tooltip, and the sidebar of runs,
in both renderers.

Screenshots go to tests/browser/shots; they show letters only where the machine has a font for them.
"""

import json
import pathlib

import pytest
from trainyard.tools import locales

HERE = pathlib.Path(__file__).parent
NODE = "TrainyardTrainLora"


@pytest.fixture(params=locales.languages())
def language(request):
    return request.param


@pytest.mark.parametrize("flags", [[], ["--nodes2"]], ids=["classic", "nodes2"])
def test_the_page_shows_a_node_in_the_persons_language(server, driver, tmp_path, language, flags):
    texts = locales.read(language)[NODE]
    rank = texts["inputs"]["rank"]
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps(
            {"language": language, "label": rank["name"], "tooltip": rank["tooltip"], "shots": str(HERE / "shots")}
        )
    )
    seen = driver("languages.mjs", server.url, plan, *flags)
    assert seen.get("error") is None, seen["error"]
    assert seen["node"]["title"] == texts["display_name"]
    inputs = {name: about["name"] for name, about in texts["inputs"].items()}
    assert {name: seen["node"]["inputs"].get(name) for name in inputs} == inputs
    assert list(seen["node"]["outputs"].values()) == [about["name"] for about in texts["outputs"].values()]
    assert seen["tooltip"], f"no tooltip {rank['tooltip']!r} over the widget rank"
    words = json.loads((locales.LOCALES / language / "main.json").read_text("utf-8"))["trainyard"]
    assert seen["sidebar"] == {"title": words["Training Runs"], "again": words["Refresh"]}
    assert seen["troubles"] == []
