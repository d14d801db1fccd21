"""Captions become the texts that are encoded."""

import pytest
from trainyard.trainers.data.caption_variants import (
    CAPTION_MODE_EMPTY,
    CaptionSettings,
    caption_variants,
    make_record_rng,
)
from trainyard.trainers.data.records import ImageRecord

TAGS = "a, b, c, d, e"


def told(*captions, seed=0, id="x", **settings):
    record = ImageRecord(id, "x.png", (1, 1), captions=captions)
    return caption_variants(record, CaptionSettings(**settings), make_record_rng(record, seed))


def test_captions_pass_through():
    assert told("a red ball") == ("a red ball",)


def test_empty_mode_forgets_captions_and_trigger():
    assert told("a red ball", caption_mode=CAPTION_MODE_EMPTY, trigger="sks") == ("",)


FRONT = {"a ball": "sks, a ball", "": "sks", "sks": "sks", "sks ball": "sks ball", "sksy ball": "sks, sksy ball"}


@pytest.mark.parametrize("caption, expected", FRONT.items())
def test_the_trigger_stands_in_front_once(caption, expected):
    assert told(caption, trigger=" sks ") == (expected,)


PLACED = {
    "photo of [trigger], smile": "photo of sks, smile",
    "[Trigger] and [trigger]": "sks and sks",
    "[trigger]": "sks",
    "sks beside [trigger]": "sks beside sks",
    "[triggers]": "sks, [triggers]",
}


@pytest.mark.parametrize("caption, expected", PLACED.items())
def test_the_trigger_stands_where_a_caption_says_so_and_not_in_front_as_well(caption, expected):
    assert told(caption, trigger=" sks ") == (expected,)


def test_a_tag_with_the_placeholder_is_shuffled_and_never_dropped():
    orders = told("a, photo of [trigger], b, c", shuffle=True, tag_dropout=0.9, variants=64, trigger="sks")
    assert all(order.split(", ").count("photo of sks") == 1 for order in orders) and len(orders) > 1
    assert {order.split(", ")[0] for order in orders} != {"sks"}


def test_a_placeholder_that_is_a_tag_of_its_own_is_the_trigger_in_front():
    """as the trigger itself among the tags: it stays in front, and is never dropped"""
    orders = told("a, b, [trigger], c", shuffle=True, tag_dropout=0.5, variants=64, trigger="sks")
    assert {order.split(", ")[0] for order in orders} == {"sks"} and len(orders) > 1
    assert told("a ||| b, [trigger]", trigger="sks") == ("sks, a, b",)


def test_a_placeholder_stands_in_a_wildcard_too():
    assert told("{[trigger]|a man} in rain", wildcards=True, trigger="sks") == ("sks in rain", "sks, a man in rain")


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


@pytest.mark.parametrize(
    "bad",
    [dict(dropout=1.1), dict(variants=0), dict(caption_mode="none"), dict(keep_tokens=-1), dict(dropout=float("nan"))],
)
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CaptionSettings(**bad)


# -- what is fixed and what is free ------------------------------------------------------------------------------------

ALL = dict(variants=64)


def test_what_stands_between_two_bars_is_free_and_the_rest_stays():
    texts = told("a, b ||| c, d ||| e, f", shuffle=True, **ALL)
    assert set(texts) == {"a, b, c, d, e, f", "a, b, d, c, e, f"}


def test_bars_say_it_instead_of_keep_tokens():
    assert {t[0] for t in told("a ||| b, c", shuffle=True, keep_tokens=3, **ALL)} == {"a"}
    assert len(told("a ||| b, c", shuffle=True, keep_tokens=3, **ALL)) == 2


def test_what_is_joined_stays_together_and_is_dropped_together():
    texts = told("a, red dress;;;red shoes, b", shuffle=True, **ALL)
    assert len(texts) == 6 and all("red dress, red shoes" in t for t in texts)
    dropped = told("red dress;;;red shoes, b", tag_dropout=0.5, **ALL)
    assert set(dropped) == {"", "b", "red dress, red shoes", "red dress, red shoes, b"}


def test_the_signs_never_reach_the_text_encoder():
    assert told("a ||| b, c;;;d") == ("a, b, c, d",)
    assert told("a, b", "a ||| b") == ("a, b",)


def test_tag_dropout_leaves_kept_tags_and_the_trigger():
    texts = told("a, b, c, d", tag_dropout=1.0, keep_tokens=2, trigger="sks", **ALL)
    assert texts == ("sks, a, b",)


def test_tag_dropout_drops_its_share():
    tags = ", ".join(f"t{i}" for i in range(200))
    texts = told(tags, tag_dropout=0.25, **ALL)
    kept = sum(t.count("t") for t in texts) / len(texts) / 200
    assert kept == pytest.approx(0.75, abs=0.02) and all(
        t.split(", ") == sorted(t.split(", "), key=tags.index) for t in texts
    )


def test_few_wildcards_are_all_encoded_and_none_twice():
    assert told("a {red|blue} {hat|cap}", wildcards=True) == ("a red hat", "a red cap", "a blue hat", "a blue cap")


def test_many_wildcards_are_drawn_as_often_as_there_are_variants():
    many = "{a|b|c|d} {e|f|g|h} {i|j|k|l}"
    texts = told(many, wildcards=True, variants=16)
    assert 10 < len(texts) <= 16 and texts == told(many, wildcards=True, variants=16) != told(
        many, wildcards=True, variants=16, seed=1
    )
    assert not any(set(t) & set("{|}") for t in texts)


def test_wildcards_go_with_shuffle_and_may_be_empty():
    texts = told("a, {b|}, c", wildcards=True, shuffle=True, **ALL)
    assert {tuple(sorted(t.split(", "))) for t in texts} == {("a", "b", "c"), ("a", "c")}


def test_braces_without_a_choice_and_doubled_ones_stay():
    assert told("{hat} {{a|b}}", wildcards=True) == ("{hat} {a|b}",)


def test_without_the_switch_braces_are_text():
    assert told("a {red|blue} hat") == ("a {red|blue} hat",)


def test_shuffles_of_before_are_the_same_texts():
    """Cached conditionings of earlier releases are found again."""
    assert told("a, b, c, d", shuffle=True, variants=3) == ("b, c, a, d", "c, b, a, d", "d, b, c, a")
