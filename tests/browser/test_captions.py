"""A person edits captions in the grid: types, replaces, takes back, filters, reloads the page; in both renderers, in a
subgraph, at size.

Screenshots go to tests/browser/shots; look at them after a change of the grid.
"""

import json
import pathlib
import subprocess

import pytest
from PIL import Image

HERE = pathlib.Path(__file__).parent
CAPTION = "a star number {}, on a ground of a colour, drawn with a thick line"
EDITED = ["a crimson star", CAPTION.format(1) + ", on a mat", ""]
RENDERERS = ["classic", "nodes2"]


def images(folder, count, side):
    """Plain images, portrait and landscape; every fourth has no caption."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new(
            "RGB", (side, side * 3 // 4 if i % 3 else side * 3 // 2), (37 * i % 256, 91 * i % 256, 53 * i % 256)
        ).save(folder / f"{i}.png")
        if i % 4 != 2:
            (folder / f"{i}.txt").write_text(CAPTION.format(i))


@pytest.fixture(scope="module")
def plan(server, tmp_path_factory):
    for name, count, side in (("grid", 9, 300), ("many", 500, 48)):
        images(server.base / "input" / name, count, side)
    file = tmp_path_factory.mktemp("browser") / "plan.json"
    file.write_text(json.dumps({"folder": "input/grid", "many": "input/many", "shots": str(HERE / "shots")}))
    return file


@pytest.fixture(scope="module")
def classic(server, driver, plan):
    return driver("captions.mjs", server.url, plan)


@pytest.fixture(scope="module")
def nodes2(server, driver, plan):
    return driver("captions.mjs", server.url, plan, "--nodes2")


@pytest.fixture(params=RENDERERS)
def seen(request):
    found = request.getfixturevalue(request.param)
    assert found.get("error") is None, found["error"]
    assert found["troubles"] == []
    return found


def test_the_state_of_the_grid_keeps_its_promises(driver):
    done = subprocess.run(
        ["node", "--test", str(HERE / "caption_edits.test.mjs")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_the_grid_says_what_to_do_and_shows_every_picture_after_a_run(seen):
    assert seen["before"]["empty"] == "Run to see the pictures."
    assert seen["shown"]["cards"] == 9
    assert seen["shown"]["pictures"] >= 6, "thumbnails in sight are loaded"
    assert seen["shown"]["captions"][:3] == [CAPTION.format(0), CAPTION.format(1), ""]
    assert seen["shown"]["line"] == "9 pictures · 0 edited"


@pytest.mark.slow
def test_the_toolbar_fits_and_the_grid_fills_its_node(seen):
    assert (seen["box"]["outside"], seen["box"]["overlaps"]) == (0, 0)
    assert seen["box"]["width"] > 700 and seen["box"]["height"] > 500, seen["box"]


@pytest.mark.slow
def test_what_is_typed_is_marked_and_lies_in_the_workflow_alone(seen):
    grid, node = seen["typed"]
    assert grid["captions"][:3] == EDITED
    assert grid["changed"] == 2
    assert list(json.loads(node["edits"]).values()) == EDITED[:2]
    assert node["saved"] == [node["edits"], False], "the pictures themselves are not saved with the workflow"


@pytest.mark.slow
def test_find_and_replace_is_one_step_that_undo_takes_back_without_touching_the_graph(seen):
    assert seen["found"].endswith("found in 7")
    assert seen["replaced"]["captions"][0] == "a crimson circle"
    assert seen["replaced"]["changed"] == 7
    assert seen["undone"][0]["captions"][:3] == EDITED
    assert seen["redone"] == {**seen["replaced"], "line": seen["redone"]["line"]}
    assert seen["undone2"][0]["captions"][1] == CAPTION.format(1), (
        "one step further back, also after a click on a button"
    )
    assert seen["undone"][1]["nodes"] == seen["undone2"][1]["nodes"] == 4
    assert seen["entered"] == 1, "Enter goes to the next picture"


@pytest.mark.slow
def test_the_edited_captions_arrive_at_the_nodes_behind(seen):
    report, preview = seen["second"]["texts"]
    assert "1 a crimson star\n" in report and "1 on a mat\n" in report
    assert "1 a star number 0" not in report
    assert preview.splitlines()[:5] == [
        "1 of 9 images changed",
        "",
        "3.png",
        "- " + CAPTION.format(3),
        "+ sks, " + CAPTION.format(3),
    ]


@pytest.mark.slow
def test_pressing_run_again_keeps_the_grid(seen):
    assert seen["again"]["kind"] == "execution_success"
    assert seen["cached"]["captions"] == seen["after"]["captions"]
    assert seen["cached"]["captions"][:3] == EDITED


@pytest.mark.slow
def test_the_wheel_scrolls_the_grid_and_not_the_canvas(seen):
    assert seen["wheel"]["scrolled"] > 0
    assert seen["wheel"]["still"]


@pytest.mark.slow
def test_filters_show_what_matches(seen):
    assert seen["filtered"]["captions"] == ["a crimson star"]
    assert seen["edited"]["captions"] == EDITED[:2]
    assert seen["bare"]["captions"] == ["", ""]


@pytest.mark.slow
def test_one_edit_or_all_are_reverted(seen):
    assert seen["reverted"]["captions"][:2] == [CAPTION.format(0), EDITED[1]]
    grid, node = seen["revertedAll"]
    assert grid["changed"] == 0
    assert node["edits"] == ""


@pytest.mark.slow
def test_a_reloaded_page_has_the_edits_and_shows_them_after_a_run(seen):
    grid, node = seen["reloaded"]
    assert grid["empty"] == "Run to see the pictures."
    assert grid["line"] == "2 edited captions are kept in the workflow"
    assert list(json.loads(node["edits"]).values()) == EDITED[:2]
    assert seen["back"]["captions"][:3] == EDITED


@pytest.mark.slow
def test_five_hundred_pictures_scroll_and_take_keys_at_once(seen):
    """A software-rendered browser on a busy machine: a frame in a third of a second, a key in a tenth."""
    many = seen["many"]
    assert many["first"] == 100, "cards are made as they are scrolled to"
    assert many["cards"] > 100
    assert many["median"] < 333, many
    assert many["key"] < 100, many


@pytest.mark.slow
def test_the_grid_works_inside_a_subgraph(seen):
    assert seen["nestedRun"]["kind"] == seen["nestedAgain"]["kind"] == "execution_success"
    assert seen["nested"]["cards"] == 9
    assert "inside a subgraph" in seen["nestedReport"]


@pytest.mark.slow
def test_the_graphs_own_undo_and_another_tab_bring_the_grid_back_as_it_was(seen):
    for step, caption in (("graphUndo", "before the undo"), ("graphUndo2", CAPTION.format(0))):
        grid, node = seen[step]
        assert (grid["cards"], grid["captions"][0], node["nodes"]) == (9, caption, 4), step
        assert grid["changed"] == len(json.loads(node["edits"] or "{}"))
    assert seen["tab"]["cards"] == 9
    assert seen["tab"]["captions"][0] == CAPTION.format(0)
