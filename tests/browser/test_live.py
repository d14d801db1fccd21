"""A person watches a run: the chart in the node, a reload in the middle, two runs in one graph, a subgraph, and the
sidebar of runs.

In both renderers. Screenshots go to tests/browser/shots; look at them after a change of the chart or the sidebar.
"""

import json
import pathlib
import re
import subprocess

import pytest
from trainyard.tests.toy import lesson, world

HERE = pathlib.Path(__file__).parent
STEPS, EVERY, PREVIEW, FIRST = 20, 4, 10, 6
RENDERERS = ["classic", "nodes2"]


@pytest.fixture(scope="module")
def plan(server, tmp_path_factory):
    lesson.images(server.base / "input" / "live_stars", count=8)
    checkpoint = server.add_model("checkpoints", world.cached())
    plan = {"checkpoint": checkpoint, "folder": "input/live_stars", "steps": STEPS, "every": EVERY, "preview": PREVIEW, "first": FIRST,
            "prompts": "a large red star on a white ground\na small blue "
                       "circle", "shots": str(HERE / "shots")}  # fmt: skip
    file = tmp_path_factory.mktemp("browser") / "plan.json"
    file.write_text(json.dumps(plan))
    return file


@pytest.fixture(scope="module")
def classic(server, driver, plan):
    return driver("live.mjs", server.url, plan, seconds=1500)


@pytest.fixture(scope="module")
def nodes2(server, driver, plan):
    return driver("live.mjs", server.url, plan, "--nodes2", seconds=1500)


def judge(file):
    """A score model for the toy world's latents that says different things of different images, and always something
    above zero."""
    import torch
    from trainyard.trainers.scores.files import write_score_model
    from trainyard.trainers.scores.networks import LatentResNet, ScoreModelInfo, Scorer, ScorerEnsemble, call_with_seed

    def drawn():
        scorer = Scorer(LatentResNet(world.CHANNELS, 8, 1), 1)
        for block in scorer.trunk.blocks:
            torch.nn.init.normal_(block.second.weight, std=0.1)
        torch.nn.init.constant_(scorer.head[1].bias, 3.0)
        return scorer

    file.parent.mkdir(parents=True, exist_ok=True)
    write_score_model(
        file,
        ScorerEnsemble(
            [call_with_seed(1, drawn)], ScoreModelInfo(channels=world.CHANNELS, latent_format="SD3", width=8, depth=1)
        ),
    )


@pytest.fixture(scope="module", params=RENDERERS)
def scores(request, server, driver, tmp_path_factory):
    """{name of a run: (its chart, what the server told of it)} of Train LECO-Score and Train LECO, with validation."""
    checkpoint = server.add_model("checkpoints", world.cached())
    judge(server.base / "models" / "score_models" / "live_judge.safetensors")
    plan = {"checkpoint": checkpoint, "judge": "live_judge.safetensors", "steps": 12, "every": EVERY, "preview": 6, "prompts": "a circle",
            "parts": ["scores"], "shots": str(HERE / "shots")}  # fmt: skip
    file = tmp_path_factory.mktemp("browser") / "scores.json"
    file.write_text(json.dumps(plan))
    found = driver("live.mjs", server.url, file, *(["--nodes2"] if request.param == "nodes2" else []), seconds=900)
    assert found.get("error") is None, found["error"]
    assert found["troubles"] == [] and found["scoresKind"] == "execution_success"
    told = {one["name"]: one for one in found["told"]}
    return {chart["name"].partition("_")[2]: (chart, told[chart["name"]]) for chart in found["scores"]}


@pytest.fixture(params=RENDERERS)
def seen(request):
    found = request.getfixturevalue(request.param)
    assert found.get("error") is None, found["error"]
    assert found["troubles"] == []
    return found


def whole(chart, name, steps=STEPS):
    """Whether a chart shows every step of this very run."""
    return chart["name"].endswith(name) and int(chart["points"]) == int(chart["step"]) <= steps


def test_the_arithmetic_of_the_chart_keeps_its_promises():
    done = subprocess.run(["node", "--test", str(HERE / "curve.test.mjs")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_page_and_the_server_call_the_event_alike():
    named = [
        re.search(r"EVENT = ['\"](.+?)['\"]", (HERE.parents[1] / file).read_text())[1]
        for file in ("nodes/page/live.py", "web/runs.mjs")
    ]
    assert named == ["trainyard.run"] * 2


@pytest.mark.slow
def test_before_a_run_there_is_no_chart_and_then_one_in_its_node(seen):
    assert seen["before"]["charts"] == 0
    (chart,) = seen["running"]
    assert whole(chart, ("one", "two")) and chart["status"] == "training" and chart["text"].startswith("step ")
    assert chart["ink"] > 1000 and "fixed pictures" in chart["legend"] and "learning rate" in chart["legend"]


@pytest.mark.slow
def test_the_chart_fits_and_nothing_in_it_overlaps(seen):
    for chart in [*seen["running"], *seen["reloaded"], *seen["finished"], *seen["nested"]]:
        assert (chart["outside"], chart["overlaps"]) == (0, 0), chart
        assert chart["width"] > 250 and chart["plot"] >= 100, chart


@pytest.mark.slow
def test_a_reload_in_the_middle_brings_the_whole_chart_back(seen):
    charts = [chart for chart in seen["reloaded"] if chart["name"] == seen["running"][0]["name"]]
    assert charts and whole(charts[0], ("one", "two")) and int(charts[0]["step"]) >= FIRST, (
        "points from before the reload"
    )


@pytest.mark.slow
def test_two_runs_in_one_graph_do_not_mix_and_end_whole_with_their_samples(seen):
    one, two = sorted(seen["finished"], key=lambda chart: chart["name"])
    assert whole(one, "one") and whole(two, "two") and one["run"] != two["run"]
    for chart in (one, two):
        assert (int(chart["step"]), int(chart["measured"])) == (STEPS, STEPS // EVERY + 1)
        assert (
            chart["picture"] > 300 and "validation loss" in chart["text"] or "fixed training pictures" in chart["text"]
        )


@pytest.mark.slow
def test_the_chart_is_no_part_of_workflow_or_prompt(seen):
    assert [node["values"] for node in seen["saved"]] == [node["values"] for node in seen["before"]["saved"]]
    assert seen["prompt"] == [False, False]


@pytest.mark.slow
def test_run_pressed_again_keeps_the_charts(seen):
    assert seen["againKind"] == "execution_success"
    assert sorted(c["name"][-3:] for c in seen["again"]) == ["one", "two"] and all(
        int(c["points"]) == STEPS for c in seen["again"]
    )


@pytest.mark.slow
def test_the_sidebar_lists_runs_with_what_they_are(seen):
    card = next(card for card in seen["cards"] if "_one" in card["text"])
    for words in ("finished", f"step {STEPS} of {STEPS}", "toy_world", "MiB", "loss ", "fixed pictures "):
        assert words in card["text"], (words, card["text"])
    assert card["picture"] > 0 and not card["wide"] and card["seen"], card
    assert card["buttons"] == ["Open workflow", "Use LoRA", "Delete"]


@pytest.mark.slow
def test_the_sidebar_uses_opens_and_deletes_and_asks_first(seen):
    (used,) = seen["used"]
    assert used.endswith("_one.safetensors") and used.startswith("trainyard")
    assert [name[-3:] for name in seen["opened"]] == ["one", "two"]
    assert all(int(chart["points"]) == STEPS for chart in seen["openedCharts"])
    assert seen["kept"], "Cancel deletes nothing"
    assert not any("_two" in card["text"] for card in seen["deleted"]) and any(
        "_one" in card["text"] for card in seen["deleted"]
    )


@pytest.mark.slow
def test_the_sidebar_stops_a_run_and_resumes_it(seen):
    assert (
        "training" in seen["busy"]["text"]
        and seen["busy"]["buttons"][0] == "Stop"
        and "Delete" not in seen["busy"]["buttons"]
    )
    assert seen["stopKind"] == "execution_interrupted"
    assert seen["stopped"]["buttons"] == ["Resume", "Open workflow", "Use LoRA", "Delete"]
    (chart,) = seen["stoppedChart"]
    assert chart["status"] == "stopped" and "Run goes on from there" in chart["text"]
    resumed = next(c for c in seen["resumed"] if c["name"].endswith("long"))
    assert int(resumed["points"]) == int(resumed["step"]), "the losses from before the stop are there"


@pytest.mark.slow
def test_the_chart_works_inside_a_subgraph(seen):
    assert seen["nestedKind"] == "execution_success"
    (chart,) = (c for c in seen["nested"] if c["name"].endswith("nested"))
    assert whole(chart, "nested") and int(chart["step"]) == STEPS


@pytest.mark.slow
def test_the_axis_holds_losses_below_zero_and_every_measurement(scores):
    assert set(scores) == {"score", "leco"}
    for chart, told in scores.values():
        for axis, shown in (
            ("range", [value for _, value in told["losses"]]),
            ("beside", [entry["loss"] for entry in told["validation"]]),
        ):
            low, high = json.loads(chart[axis])
            assert low < min(shown) and max(shown) < high, (axis, chart, told)
    assert min(value for _, value in scores["score"][1]["losses"]) < 0, "minus a score that is above zero"


@pytest.mark.slow
def test_a_figure_that_is_no_loss_has_its_own_scale_and_its_own_name(scores):
    (score, _), (leco, _) = scores["score"], scores["leco"]
    assert "minus the score (right)" in score["legend"] and score["range"] != score["beside"]
    assert "fixed points" in leco["legend"] and leco["range"] == leco["beside"]
    assert not any("fixed pictures" in chart["legend"] for chart in (score, leco)), (
        "neither looks at pictures of a dataset"
    )


@pytest.mark.slow
def test_a_look_at_a_score_has_no_noise_levels_and_the_chart_fits_all_the_same(scores):
    chart, told = scores["score"]
    assert len(told["validation"]) == int(chart["measured"]) == 4 and all(
        entry["bins"] == [] for entry in told["validation"]
    )
    assert all(entry["bins"] for entry in scores["leco"][1]["validation"])
    for chart, _ in scores.values():
        assert (chart["outside"], chart["overlaps"]) == (0, 0) and chart["ink"] > 1000 and chart["plot"] >= 100, chart
