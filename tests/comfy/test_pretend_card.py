"""Runs from top to bottom on a graphics card that is not there: what mixes devices, what waits, what is left behind.

The runs are made in one process beside this one, because torch cannot unlearn a device. benchmarks/card.py does the same
at published size."""

import json
import subprocess
import sys

import pytest
from trainyard.tests.card import scenes
from trainyard.tests.conftest import TESTS
from trainyard.trainers.memory.plan import PLAN_AUTO, PLAN_OFF, PLAN_OFFLOADED, PLAN_PER_BLOCK

SCENES = scenes.chosen
TOY_BYTES = 128 * 1024  # latents and the like, which are as large as a toy's activations
EARLY = "memory was given back while another stream was at it"
AWAY = [name for name, scene in SCENES.items() if scene.get("room") or scene["plan"] == PLAN_OFFLOADED]
LOADED_WHOLE = [name for name in SCENES if name not in AWAY]


@pytest.fixture(scope="module")
def rehearsed():
    """Name of a scene -> what happened (tests/card/rehearsal.py: Rehearsal)."""
    command = [sys.executable, str(TESTS / "card" / "rehearsal.py"), *map(json.dumps, SCENES.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(SCENES), done.stderr[-3000:]
    return dict(zip(SCENES, lines, strict=True))


@pytest.mark.parametrize("name", SCENES)
def test_a_run_reaches_its_end_on_a_card(rehearsed, name):
    """An op that mixes devices, or reads what is not there, would have ended it."""
    assert rehearsed[name]["error"] == ""
    assert rehearsed[name]["plan"] == (SCENES[name]["plan"] if SCENES[name]["plan"] != PLAN_AUTO else PLAN_OFF)


@pytest.mark.parametrize("name", SCENES)
def test_a_step_reads_no_value_of_the_card_and_copies_no_index_to_it(rehearsed, name):
    """But one number in fp16, which decides whether the loss scale must be smaller."""
    reads = [place for place in rehearsed[name]["reads"] if "loss_scale.py" not in place]
    assert (reads, rehearsed[name]["implicit_copies"]) == ([], [])
    scale_reads = len(rehearsed[name]["reads"]) - len(reads)
    assert scale_reads == (2 if rehearsed[name]["compute_dtype"] == "float16" else 0), "one a step"


@pytest.mark.parametrize(
    "name", [name for name, scene in SCENES.items() if not scene.get("patched") and scene.get("fp64", True)]
)
def test_no_copy_of_a_step_is_waited_for(rehearsed, name):
    """Neither one that blocks, nor one from memory that is not page-locked. Left out: a LoRA on weights that are not
    on the card, whose matrices the host sends up in each step; and cards without float64, for which it computes
    positions on the CPU."""
    assert rehearsed[name]["waiting_copies"] == []


@pytest.mark.parametrize(
    "name",
    [name for name, scene in SCENES.items() if scene["plan"] in (PLAN_OFF, PLAN_PER_BLOCK) and scene.get("fp64", True)],
)
def test_a_step_waits_for_nothing_that_comes_back_to_the_cpu(rehearsed, name):
    """Saved inputs do under the other plans."""
    assert (rehearsed[name]["down"], rehearsed[name]["down_copies"]) == (0, [])


@pytest.mark.parametrize("name", SCENES)
def test_nothing_stays_on_the_card_or_page_locked(rehearsed, name):
    run = rehearsed[name]
    assert (run["left_on_card"], run["locked_afterwards"]) == (0, 0)


def test_page_locked_weights_are_never_freed_before_they_are_unlocked(rehearsed):
    locked = {name: run["page_locked"] for name, run in rehearsed.items() if run["page_locked"]}
    assert {"sd15, partly loaded", f"flux, {PLAN_OFFLOADED}"} <= set(locked)
    assert {name: run["freed_while_locked"] for name, run in rehearsed.items()} == dict.fromkeys(SCENES, 0)


@pytest.mark.parametrize("name", LOADED_WHOLE)
def test_weights_that_lie_on_the_card_do_not_cross_in_a_step(rehearsed, name):
    """What goes up are a batch and its captions."""
    assert rehearsed[name]["up"] < rehearsed[name]["weights"] / 10


@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if scene.get("estimate")])
def test_weights_that_a_first_estimate_kept_away_come_when_a_step_is_counted(rehearsed, name):
    """As many as the card has room for. After a sample they are there again, but for what the optimizer's numbers take
    meanwhile of the memory that the host keeps free, which is much of a toy."""
    run, room = rehearsed[name], SCENES[name]["room"]
    assert (room - 0.15) * run["weights"] < run["weights_on_card"] < room * run["weights"]
    assert 0.75 * run["weights_on_card"] < run["weights_on_card_at_last"] <= run["weights_on_card"]


@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if not scene.get("fp64", True)])
def test_a_card_without_float64_is_sent_none(rehearsed, name):
    assert rehearsed[name]["float64"] == []


@pytest.mark.parametrize("name", SCENES)
def test_no_stream_touches_what_another_may_be_at(rehearsed, name):
    assert rehearsed[name]["races"] == []


def test_wrong_orders_of_two_streams_are_seen():
    """What the test above would miss otherwise."""
    done = subprocess.run([sys.executable, str(TESTS / "card" / "orders.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {
        "fetch_and_receive": [],
        "fetch_and_drop": [],
        "fetch_what_came_down": [],
        "fetch_without_receiving": ["reads what is still being written", EARLY],
        "fetch_before_the_memory_is_free": ["overwrites what is still being written"],
        "fetch_and_lose": [EARLY],
        "fetch_what_is_still_coming_down": ["reads what is still being written"],
        "overwrite_what_is_being_read": ["overwrites what is still being read"],
    }


@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if scene["plan"] == PLAN_OFFLOADED])
def test_a_weight_comes_up_at_most_once_in_forward_and_once_in_recomputation(rehearsed, name):
    assert rehearsed[name]["up"] < 2.1 * rehearsed[name]["weights"]


@pytest.mark.parametrize("name", [name for name in AWAY if name != "hunyuan video 1.5"])  # it has two blocks
def test_offloaded_weights_come_up_while_the_block_before_them_is_computed(rehearsed, name):
    """But those of the first block in each direction, and of layers that are in no block: much of a toy model."""
    assert rehearsed[name]["up_beside"] > 0.4 * rehearsed[name]["up"]


@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if scene["plan"] == PLAN_OFFLOADED])
def test_offloaded_weights_stay_off_the_card_also_after_samples(rehearsed, name):
    run = rehearsed[name]
    assert run["weights_on_card_at_last"] < run["weights"] / 20
    assert run["up"] > 0.9 * run["weights"], "each is fetched in a step"


@pytest.mark.parametrize("name", [name for name in SCENES if SCENES[name].get("method") not in ("leco-score", "score")])
def test_the_forecast_is_what_a_step_takes_and_never_less(rehearsed, name):
    """Within a tenth, and within TOY_BYTES where a step takes less than that. Weights that leave after a sample make
    the room that they take when they are fetched."""
    run = rehearsed[name]
    least = run["peak"] - (run["weights_on_card"] - run["weights_on_card_at_last"])
    most = 1.1 * run["peak"] + TOY_BYTES
    assert least <= run["forecast"] <= most, f"{run['forecast']} forecast, {run['peak']} taken"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [row for row in (("sd3, fp16 without bf16", "float16"), ("sd3, fp8", "bfloat16")) if row[0] in SCENES],
)
def test_a_card_computes_in_what_it_can(rehearsed, name, dtype):
    assert rehearsed[name]["compute_dtype"] == dtype
