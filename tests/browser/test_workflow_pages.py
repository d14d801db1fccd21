"""Every bundled workflow in ComfyUI's real page, both renderers: whole, tidy, and the same prompt as its API twin.

Screenshots go to tests/browser/shots; look at them after a change of the nodes or of a workflow.
"""

import json
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
RENDERERS = ("classic", "nodes2")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    file = tmp_path_factory.mktemp("pages") / "plan.json"
    file.write_text(json.dumps({"pack": "trainyard", "workflows": NAMES, "shots": str(HERE / "shots")}))
    return file


@pytest.fixture(scope="module")
def classic(server, driver, plan):
    return driver("workflows.mjs", server.url, plan)


@pytest.fixture(scope="module")
def nodes2(server, driver, plan):
    return driver("workflows.mjs", server.url, plan, "--nodes2")


@pytest.mark.slow
@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_workflow_opens_whole_and_nothing_lies_on_anything(renderer, request):
    seen = request.getfixturevalue(renderer)
    assert seen.get("error") is None, seen["error"]
    assert seen["troubles"] == [] and set(seen["opened"]) == set(NAMES)
    wrong = {
        name: {key: found[key] for key in ("missing", "overlaps", "spilling", "grown") if found[key]}
        for name, found in seen["opened"].items()
    }
    assert not any(wrong.values()), {name: found for name, found in wrong.items() if found}


@pytest.mark.slow
@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_workflow_sends_what_its_api_twin_says(renderer, request):
    opened = request.getfixturevalue(renderer)["opened"]
    for name, found in opened.items():
        twin = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
        assert found["prompt"] == twin, name


@pytest.mark.slow
def test_a_workflow_saved_before_an_input_was_added_opens_with_all_its_values(classic):
    for name, found in classic["older"].items():
        assert found["then"].keys() == found["now"].keys(), name
        for node, now in found["now"].items():
            assert found["then"][node][: len(now) - 1] == now[:-1], (name, node)
            assert len(found["then"][node]) == len(now), "the added input is there, with a value of its own"
