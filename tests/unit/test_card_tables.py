"""Tables of what fits on which card: made of the rows, and the same in both READMEs."""

import json

import pytest
from trainyard.benchmarks import card_tables as tables

PUBLISHED_ROWS = json.loads((tables.ROOT / "benchmarks" / "results" / "pretend-card.json").read_text())
GIB = tables.GIB


def row(model, card, plan="per block", error="", on_card=4, dtype="bfloat16", method="lora"):
    scene = {"family": model, "gib": card - tables.CONTEXT_GIB, "plan": "auto", "dtype": dtype, "method": method}
    figures = dict(
        weights=4 * GIB,
        weights_on_card=on_card * GIB,
        card_peak=6 * GIB,
        peak=2 * GIB,
        forecast=2.1 * GIB,
        up=0,
        down=0,
    )
    return {"scene": scene, "error": error, "plan": plan, **figures}


ROWS = {
    "a": row("one", 8, error="OutOfMemoryError: no room"),
    "b": row("one", 12, on_card=2.5),
    "c": row("one", 16, plan="off"),
    "d": row("one", 12, dtype="float8_e4m3fn", plan="off"),
    "e": row("two", 24, error="ValueError: odd"),
}
NAMES = {"one": "One at 512 px", "two": "Two"}


def test_the_short_table_says_what_each_card_takes_and_what_was_not_rehearsed():
    one, fp8, two = tables.format_short_table(ROWS, NAMES).splitlines()[2:]
    assert one == "| One at 512 px | 4.0 | does not fit | per block, 1.5 away | all kept | all kept | all kept |"
    assert fp8 == "| One at 512 px, fp8 | 4.0 | ? | all kept | all kept | all kept | all kept |"
    assert two == "| Two | 4.0 | ? | ? | ? | fails | ? |"


def test_a_larger_card_is_as_one_on_which_everything_is_kept_and_no_other():
    assert tables.find_row(ROWS, "one", 80) is ROWS["c"]
    assert tables.find_row({"b": ROWS["b"]}, "one", 80) is None
    assert tables.find_row({"p": row("one", 16, plan="off", on_card=3)}, "one", 80) is None, "some weights were away"


def test_the_smallest_card_is_the_first_that_ends_well():
    assert tables.smallest_card(ROWS, "one") == 12
    assert tables.smallest_card(ROWS, "two") is None


def test_the_full_table_has_the_figures_of_every_row():
    lines = tables.format_full_table(ROWS, NAMES).splitlines()
    assert "| One at 512 px | 4.0 | 12 | per block | 2.5 | 6.0 | 2.00 | +5.0% | 0.00 | 0.00 | 12 |" in lines
    assert "| One at 512 px | 4.0 | 8 | does not fit | | | | | | | 12 |" in lines
    assert len(lines) == 2 + len(ROWS)


def test_a_table_takes_the_place_between_its_marks_and_nothing_else():
    start, end = (tables.MARK.format(side, "x") for side in ("start", "end"))
    assert tables.replace_between_marks(f"a\n{start}\nold\n{end}\nb", "x", "new") == f"a\n{start}\n\nnew\n\n{end}\nb"
    with pytest.raises(ValueError, match="no place for the table 'y'"):
        tables.replace_between_marks(f"{start}\n{end}", "y", "new")


def test_both_readmes_show_the_rows_that_are_there():
    from trainyard.benchmarks.published import PUBLISHED

    names = {model: shape.about for model, shape in PUBLISHED.items()}
    for path, text in tables.make_documents(PUBLISHED_ROWS, names).items():
        assert path.read_text("utf-8") == text, "make it again: .venv/bin/python benchmarks/card.py --show"


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_a_row_of_published_size_ended_and_its_forecast_is_what_a_step_took_and_never_less(name):
    """Or it was refused before the first step. Nothing is read, copied behind the back or left behind."""
    found = PUBLISHED_ROWS[name]
    if found["error"]:
        assert tables.describe_result(found) == tables.DOES_NOT_FIT and "StepDoesNotFit" in found["error"]
        return
    if found["forecast"]:
        assert 0 <= tables.forecast_error(found) <= 0.1
    reads = [place for place in found["reads"] if "loss_scale.py" not in place]
    assert (reads, found["implicit_copies"], found["left_on_card"], found["locked_afterwards"]) == ([], [], 0, 0)
    assert found["freed_while_locked"] == 0


# Bytes of SD3's tables of positions (side ** 2 x width, bf16), which wait in main memory; the part that an image needs
# is cut out there and goes up.
POSITION_TABLES = {"sd3": 192**2 * 1536 * 2, "sd35_medium": 384**2 * 1536 * 2, "sd35_large": 192**2 * 2432 * 2}


@pytest.mark.parametrize("name", [name for name, found in PUBLISHED_ROWS.items() if not found["error"]])
def test_weights_that_are_away_come_up_twice_in_a_step_and_nothing_else_of_size_does(name):
    """Once for forward, once for backward. Of a LoRA; other methods predict more than once. What went down comes up
    again, and what all blocks share comes up for each."""
    found = PUBLISHED_ROWS[name]
    away = found["weights"] - found["weights_on_card_at_last"] - POSITION_TABLES.get(found["scene"]["family"], 0)
    if found["scene"].get("method", tables.LORA) == tables.LORA:
        assert 1.95 * away <= found["up"] <= 2 * away + 2 * found["down"] + 0.05 * GIB
    assert found["down"] == 0 or found["plan"] in ("per block + CPU", "offloaded blocks")
