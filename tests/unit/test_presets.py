"""Presets by hand, and the lines that change them."""

import pytest
from trainyard.trainers.presets import PRESET_FAMILIES, PRESET_PURPOSES, format_preset, make_training_preset


@pytest.mark.parametrize("purpose", PRESET_PURPOSES)
@pytest.mark.parametrize("family", PRESET_FAMILIES)
def test_every_preset_is_whole_keeps_the_familys_scale_and_names_its_source(family, purpose):
    chosen, base = make_training_preset(family, purpose, 20), PRESET_FAMILIES[family]
    assert chosen.adapter.alpha / chosen.adapter.rank == base.alpha / base.rank
    assert chosen.run.learning_rate == base.learning_rate and chosen.resolution == base.resolution
    low, high = base.step_ranges[purpose]
    assert low <= chosen.run.steps <= high
    words = format_preset(chosen)
    assert base.source in words and f"steps {chosen.run.steps}" in words and f"rank {chosen.adapter.rank}" in words


def test_steps_by_hand():
    """100 per image of a character, between 1000 and 3000 on SD 1.5."""
    assert [make_training_preset("SD 1.5", "character", n).run.steps for n in (5, 20, 500)] == [1000, 2000, 3000]


def test_a_style_has_a_larger_rank_and_convolutions_where_there_are_any():
    assert (
        make_training_preset("SDXL", "style", 20).adapter.rank == 64
        and make_training_preset("SDXL", "style", 20).adapter.conv
    )
    assert (
        not make_training_preset("Flux", "style", 20).adapter.conv
        and not make_training_preset("SDXL", "character", 20).adapter.conv
    )


def test_v_prediction_and_flow_are_weighed_as_they_should():
    assert make_training_preset("NoobAI v-pred", "character", 20).noise.weighting == "min-SNR"
    assert all(
        make_training_preset(family, "character", 20).noise.weighting == "none" for family in ("SD 3", "Flux", "Chroma")
    )


def test_every_value_can_be_changed_by_a_line():
    changes = (
        "rank = 4  # smaller\n\nlearning_rate=2e-4\nconv = on\nschedule = linear\nhuber_c = 0.5\nsteps = "
        "12\nresolution = 640\nema=0"
    )
    chosen = make_training_preset("Flux", "style", 20, changes)
    assert (chosen.adapter.rank, chosen.run.learning_rate, chosen.adapter.conv, chosen.optimizer.schedule) == (
        4,
        2e-4,
        True,
        "linear",
    )
    assert (chosen.noise.huber_c, chosen.run.steps, chosen.resolution, chosen.optimizer.ema) == (0.5, 12, 640, 0)
    assert "changed by you: rank, learning_rate, conv, schedule, huber_c, steps, resolution, ema" in format_preset(
        chosen
    )


@pytest.mark.parametrize(
    "line, message",
    [
        ("rank 32", "changes, line 2: 'rank 32' is not a change. Write a name, = and a value"),
        (
            "dim = 32",
            "changes, line 2: 'dim = 32': there is no setting 'dim'. There are: steps, learning_rate, resolution, rank",
        ),
        ("rank = many", "changes, line 2: 'rank = many': rank is 'many'; it must be a number"),
        ("rank = 0", "line 2: .* rank is 0; it must lie between 1 and 4096"),
        ("conv = maybe", "line 2: .* conv is 'maybe'; it must be true or false"),
        ("resolution = 3", "line 2: .* resolution is 3; it must lie between 16 and 8192 px"),
        ("targets = heads", "line 2: .* targets is 'heads'; choose one of attention"),
        ("batch = 4", "line 2: .* there is no setting 'batch'"),
    ],
)
def test_a_line_that_changes_nothing_is_refused_with_its_number(line, message):
    with pytest.raises(ValueError, match=message):
        make_training_preset("SDXL", "character", 20, f"rank = 8\n{line}")
