"""Models at published size on cards that are not there: what was foretold is what a step takes, and what stands in the
table is what comes out."""

import json
import subprocess
import sys

import pytest
from trainyard.benchmarks import card_tables as tables

ROWS = [("sdxl", 8, "per block"), ("flux", 24, "per block + CPU"), ("wan_14b", 12, "offloaded blocks")]


@pytest.mark.parametrize(("model", "card", "plan"), ROWS)
def test_a_published_size_runs_as_foretold(tmp_path, model, card, plan):
    made = tmp_path / "rows.json"
    script = tables.ROOT / "benchmarks" / "card.py"
    command = [sys.executable, str(script), "--models", model, "--cards", str(card), "--json", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    (row,) = json.loads(made.read_text()).values()
    assert row["error"] == ""
    print(
        f"{model} on {card} GB: {row['plan']}, {row['peak'] / tables.GIB:.2f} GiB a step beside the weights, "
        f"forecast {tables.forecast_error(row):+.1%}, {row['up'] / tables.GIB:.1f} GiB up"
    )
    assert row["plan"] == plan
    assert 0 <= tables.forecast_error(row) <= 0.1
    assert row["card_peak"] <= row["scene"]["gib"] * tables.GIB
