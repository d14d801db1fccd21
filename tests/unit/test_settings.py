"""Records are checked once, say what is wrong with which value, and load back equal."""

import dataclasses
import json
import math

import pytest
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.settings import (
    AdapterSettings,
    NoiseSettings,
    OptimizerSettings,
    RunSettings,
    Settings,
    choice_field,
    compute_fingerprint,
    number_field,
    switch_field,
    text_field,
)

RECORDS = [AdapterSettings, OptimizerSettings, NoiseSettings, RunSettings, CaptionSettings, BucketSettings]
OTHERS = {  # settings of one record that are only valid together, and texts
    AdapterSettings: {"targets": "regex", "pattern": "attn2|ff"},
    CaptionSettings: {"trigger": "sks"},
    BucketSettings: {"min_side": 256, "max_side": 1536, "resolution": 768},
    NoiseSettings: {"min_time": 0.25, "max_time": 0.5},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oven(Settings):
    """A record with one field of each kind."""

    minutes: int = number_field(10, 1, 120, "How long.", unit="minutes")
    heat: float = number_field(180.0, 20.0, 300.0, "How hot.")
    shelf: str = choice_field("middle", ("low", "middle", "high"), "Where.")
    fan: bool = switch_field(False, "Blow.")
    dish: str = text_field("", "What.")


def another(field):
    """A valid value that is not the default."""
    meta = field.metadata
    if "options" in meta:
        return next(option for option in meta["options"] if option != field.default and option != "regex")
    if meta.get("switch"):
        return not field.default
    if meta.get("text"):
        return None  # no text is valid for every record: OTHERS
    return meta["hi"] if meta["hi"] != field.default else meta["lo"]


def changed(record):
    """Values that differ from the defaults wherever a value may differ on its own, and those of OTHERS."""
    values = {f.name: another(f) for f in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if value is not None} | OTHERS.get(record, {})


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_loads_back_equal_from_json(record):
    for values in ({}, changed(record)):
        made = record(**values)
        back = record.from_dict(json.loads(json.dumps(made.to_dict())))
        assert back == made
        kinds = {f.name: type(f.default) for f in dataclasses.fields(record)}
        assert {name: type(value) for name, value in back.to_dict().items()} == kinds


@pytest.mark.parametrize("record", RECORDS)
def test_every_setting_changes_the_fingerprint(record):
    prints = {compute_fingerprint(record())}
    for field in dataclasses.fields(record):
        if (value := another(field)) is not None and field.name not in OTHERS.get(record, {}):
            prints.add(compute_fingerprint(record(**{field.name: value})))
    alone = [f for f in dataclasses.fields(record) if another(f) is not None and f.name not in OTHERS.get(record, {})]
    assert alone and len(prints) == 1 + len(alone)


@pytest.mark.parametrize("record", RECORDS)
def test_every_setting_has_a_hint_and_a_default_within_its_limits(record):
    for field in dataclasses.fields(record):
        assert field.metadata["hint"].endswith("."), f"{field.name}: {field.metadata['hint']!r} is no sentence"
        if "lo" in field.metadata:
            assert field.metadata["lo"] <= field.default <= field.metadata["hi"]


@pytest.mark.parametrize("record", RECORDS)
def test_a_number_just_outside_its_limits_is_refused_and_at_its_limits_taken(record):
    for field in dataclasses.fields(record):
        if "lo" not in field.metadata or field.name in OTHERS.get(record, {}):
            continue
        lo, hi = field.metadata["lo"], field.metadata["hi"]
        beyond = (
            (lo - 1, hi + 1)
            if isinstance(field.default, int)
            else (math.nextafter(lo, -math.inf), math.nextafter(hi, math.inf))
        )
        for value in beyond:
            with pytest.raises(ValueError, match=rf"^{field.name} is .*; it must lie between"):
                record(**{field.name: value})
        assert [getattr(record(**{field.name: value}), field.name) for value in (lo, hi)] == [lo, hi]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["minutes", "heat"])
def test_nan_and_infinity_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} is (nan|-?inf); it must be a finite number between \d"):
        Oven(**{name: value})


@pytest.mark.parametrize(
    "name, value",
    [("minutes", True), ("heat", False), ("heat", "180"), ("minutes", None), ("heat", [1.0]), ("heat", 1j)],
)
def test_what_is_no_number_is_refused_and_true_is_none(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*; it must be a number\."):
        Oven(**{name: value})


@pytest.mark.parametrize("name, value, message", [
    ("minutes", 0, "minutes is 0; it must lie between 1 and 120 minutes."),
    ("minutes", 1.5, "minutes is 1.5; it must be a whole number of minutes."),
    ("heat", 301, "heat is 301; it must lie between 20.0 and 300.0."),
    ("shelf", "top", "shelf is 'top'; choose one of low, middle, high."),
    ("fan", 1, "fan is 1; it must be true or false."),
    ("dish", 7, "dish is 7; it must be text."),
])  # fmt: skip
def test_messages_show_the_value_and_say_what_to_do(name, value, message):
    with pytest.raises(ValueError) as error:
        Oven(**{name: value})
    assert str(error.value) == message


def test_a_whole_number_beyond_every_float_is_out_of_range_like_any_other():
    with pytest.raises(ValueError, match="it must lie between 1 and 120 minutes"):
        Oven(minutes=10**400)


def test_a_number_takes_the_type_of_its_default():
    oven = Oven(minutes=30.0, heat=200)
    assert (oven.minutes, type(oven.minutes), oven.heat, type(oven.heat)) == (30, int, 200.0, float)


def test_a_setting_that_a_record_does_not_know_is_an_error_that_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Oven has no setting grill, smoke; it knows dish, fan, heat, minutes, shelf\."
    ):
        Oven.from_dict({"heat": 200.0, "smoke": 1, "grill": 2})


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Oven().heat = 300.0


@pytest.mark.parametrize("values, remedy", [
    ({"targets": "regex"}, "pattern is ''; write one, for example"),
    ({"pattern": "attn"}, "pattern is 'attn'; clear it, or set targets to regex"),
    ({"targets": "regex", "pattern": "attn("}, r"pattern is 'attn\(', which is not a regular expression: "),
])  # fmt: skip
def test_a_pattern_goes_with_regex_and_must_be_one(values, remedy):
    with pytest.raises(ValueError, match=remedy):
        AdapterSettings(**values)


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.9, 0.1)])
def test_a_noise_range_that_is_empty_or_upside_down_is_refused(low, high):
    with pytest.raises(ValueError, match=f"min_time is {low} and max_time is {high}; min_time must be the smaller one"):
        NoiseSettings(min_time=low, max_time=high)


def test_fingerprints_are_the_same_in_every_process_and_tell_records_apart():
    """blake2b of [{"Oven": {"dish": "", "fan": false, "heat": 200.0, "minutes": 10, "shelf": "middle"}}], worked out
    apart: by it a finished run is found again after a restart."""
    assert (
        compute_fingerprint(Oven(heat=200))
        == compute_fingerprint(Oven(heat=200.0))
        == "230d62f5a514d151931a169391fcc7ee"
    )
    assert compute_fingerprint(Oven(), {"b": 1, "a": 2}) == compute_fingerprint(Oven(), {"a": 2, "b": 1})
    assert compute_fingerprint("ab", "c") != compute_fingerprint("a", "bc") != compute_fingerprint("a", "b", "c")
    assert compute_fingerprint(Oven().to_dict()) != compute_fingerprint(Oven())
    with pytest.raises(ValueError):
        compute_fingerprint(math.nan)
