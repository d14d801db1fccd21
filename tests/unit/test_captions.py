"""Captions become the texts that are encoded."""

import pytest
from trainyard.trainers.data.captions import EMPTY, CaptionSettings, record_rng, variants
from trainyard.trainers.data.records import Record

TAGS = "a, b, c, d, e"


def told(*captions, seed=0, id="x", **settings):
    record = Record(id, "x.png", (1, 1), captions=captions)
    return variants(record, CaptionSettings(**settings), record_rng(record, seed))


def test_captions_pass_through():
    assert told("a red ball") == ("a red ball",)


def test_empty_mode_forgets_captions_and_trigger():
    assert told("a red ball", caption_mode=EMPTY, trigger="sks") == ("",)


FRONT = {"a ball": "sks, a ball", "": "sks", "sks": "sks", "sks ball": "sks ball", "sksy ball": "sks, sksy ball"}


@pytest.mark.parametrize("caption, expected", FRONT.items())
def test_the_trigger_stands_in_front_once(caption, expected):
    assert told(caption, trigger=" sks ") == (expected,)


def test_a_record_without_captions_is_the_trigger_alone():
    assert told(trigger="sks") == ("sks",)


def test_several_captions_are_several_variants_without_doubles():
    assert told("a ball", "a sphere", "a ball") == ("a ball", "a sphere")


def test_shuffles_are_different_orders_of_the_same_tags():
    orders = told(TAGS, shuffle=True, variants=16)
    assert 8 < len(orders) == len(set(orders)) <= 16
    assert {tuple(sorted(order.split(", "))) for order in orders} == {("a", "b", "c", "d", "e")}


def test_kept_tags_and_the_trigger_stay_in_front():
    orders = told("a, b, sks, c, d", shuffle=True, variants=16, keep_tokens=2, trigger="sks")
    assert {order[:9] for order in orders} == {"sks, a, b"} and len(orders) == 2


def test_one_tag_has_one_order():
    assert told("ball", shuffle=True, variants=64) == ("ball",)


def test_shuffles_depend_on_seed_and_record_only():
    assert told(TAGS, shuffle=True) == told(TAGS, shuffle=True)
    assert told(TAGS, shuffle=True) != told(TAGS, shuffle=True, seed=1)
    assert told(TAGS, shuffle=True) != told(TAGS, shuffle=True, id="y")


@pytest.mark.parametrize("bad", [dict(dropout=1.1), dict(variants=0), dict(caption_mode="none"), dict(keep_tokens=-1), dict(dropout=float("nan"))])
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CaptionSettings(**bad)
