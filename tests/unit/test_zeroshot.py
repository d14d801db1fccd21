"""Zero-shot tags with a space made by hand: every word is an axis, an image lies where its colours put it."""

import pytest
import torch
from PIL import Image
from trainyard.trainers.captioners.tags import TaggerSettings
from trainyard.trainers.captioners.zeroshot import (
    DEFAULT_VOCABULARY,
    NEUTRAL_WORDS,
    SENTENCE_TEMPLATES,
    VocabularyGroup,
    ZeroShotTagger,
    encode_words,
    normalise_features,
    read_vocabulary,
)

AXES = {"red": 0, "green": 1, "blue": 2}


def words_near_axes(texts):
    """Sentences point along the axis of the colour they name, those about nothing along the diagonal; wording adds a
    little of the fourth."""
    out = []
    for text in texts:
        feature = torch.tensor([0.0, 0.0, 0.0, 0.1 * (len(text) % 3)])
        named = [axis for word, axis in AXES.items() if word in text]
        feature[named or [0, 1, 2]] = 1.0
        out.append(feature * 7)  # of any length
    return torch.stack(out)


def mean_colours(images):
    means = [torch.tensor(image.resize((1, 1)).getpixel((0, 0))) / 255 for image in images]
    return torch.stack([torch.cat([mean, torch.zeros(1)]) for mean in means])


def painted(*colour):
    return Image.new("RGB", (8, 8), colour)


def asked(text, **settings):
    return ZeroShotTagger(
        mean_colours,
        words_near_axes,
        read_vocabulary(text),
        TaggerSettings(**{f"zero_shot_{name}": value for name, value in settings.items()}),
    )


@pytest.mark.parametrize(("word", "colour"), [("red", (255, 0, 0)), ("green", (10, 240, 10)), ("blue", (30, 20, 200))])
def test_a_picture_gets_the_word_that_it_lies_nearest_to(word, colour):
    said = asked("red, green, blue").caption(painted(*colour), "a prompt that is left aside")
    assert said.tags == (word,) and said.text == word


def test_a_picture_of_nothing_in_particular_gets_no_word():
    assert asked("red, green, blue").caption(painted(120, 120, 120)).tags == ()


def test_a_line_with_a_colon_gives_one_word_where_several_would_pass():
    orange = painted(250, 160, 0)
    assert asked("blue, green, red", certainty=0.0).caption(orange).tags == ("red", "green", "blue")
    assert asked("colour: blue, green, red", certainty=0.0).caption(orange).tags == ("red",)


def test_lines_that_pick_come_first_in_their_own_order_then_the_surest_words():
    found = {"photo": 0.7, "sketch": 0.2, "day": 0.9, "night": 0.8, "cat": 0.75, "dog": 0.95, "fish": 0.3}
    asker = asked("fish, cat\nmedium: sketch, photo\nlight: night, day\ndog")
    assert asker.pick_tags(found) == ("photo", "day", "dog", "cat")
    assert asked("fish, cat\nmedium: sketch, photo\ndog", words=1).pick_tags(found) == ("photo", "dog")
    assert asked("fish, cat\nmedium: sketch, photo\ndog", certainty=0.9).pick_tags(found) == ("dog",)


def test_probability_by_hand():
    """cos(red) = 1 on a red image, cos(nothing) = 1/sqrt(3) = 0.577: sigmoid(100 * 0.423) = 1; on grey both are 0.577
    and 1."""
    red = asked("red").probabilities(painted(255, 0, 0))["red"]
    grey = asked("red").probabilities(painted(90, 90, 90))["red"]
    assert red == pytest.approx(1.0, abs=1e-6) and grey == pytest.approx(0.0, abs=1e-6)


def test_a_word_exactly_as_near_as_nothing_has_half_a_chance():
    same = ZeroShotTagger(
        lambda p: torch.ones(1, 3), lambda texts: torch.ones(len(texts), 3), (VocabularyGroup(("a",)),)
    )
    assert same.probabilities(painted(0, 0, 0))["a"] == pytest.approx(0.5, abs=1e-5)


def test_the_sentences_of_a_word_are_averaged_as_directions():
    """Two sentences of lengths 1 and 9 along x and y: their mean direction is the diagonal, not nearly y."""
    told = {SENTENCE_TEMPLATES[0].format("w"): torch.tensor([1.0, 0.0])}
    features = encode_words(
        ["w"], lambda texts: torch.stack([told.get(text, torch.tensor([0.0, 9.0])) for text in texts])
    )
    count = len(SENTENCE_TEMPLATES)
    torch.testing.assert_close(features[0], normalise_features(torch.tensor([1.0, count - 1.0])))


def test_words_are_asked_once_for_all_pictures_and_in_small_batches():
    calls = []

    def counted(texts):
        calls.append(len(texts))
        return words_near_axes(texts)

    asker = ZeroShotTagger(mean_colours, counted, read_vocabulary(", ".join(f"red {n}" for n in range(40))))
    asker.caption(painted(255, 0, 0))
    asker.caption(painted(0, 255, 0))
    assert sum(calls) == (40 + len(NEUTRAL_WORDS)) * len(SENTENCE_TEMPLATES) and max(calls) <= 32


def test_the_vocabulary_is_read_line_by_line():
    groups = read_vocabulary("# remark\ncat,  black   dog ,cat,\n\ncolour: red, blue # two\n")
    assert groups == (VocabularyGroup(("cat", "black dog")), VocabularyGroup(("red", "blue"), True, "colour"))


def test_an_empty_vocabulary_means_the_one_that_comes_along_in_which_no_word_stands_twice():
    groups = read_vocabulary("  \n")
    words = [word for group in groups for word in group.words]
    assert groups == read_vocabulary(DEFAULT_VOCABULARY) and len(words) == len(set(words)) > 80
    assert {group.name for group in groups if group.exclusive} >= {"medium", "light", "framing"}


@pytest.mark.parametrize(
    ("text", "told"),
    [("colour: red", "offers 1 words"), ("# only a remark", "holds no words"), (" , ,", "holds no words")],
)
def test_a_vocabulary_that_says_nothing_is_an_error_that_shows_how(text, told):
    with pytest.raises(ValueError, match=told):
        read_vocabulary(text)


def test_two_models_of_different_width_are_no_pair():
    asker = ZeroShotTagger(
        lambda p: torch.ones(1, 5), lambda texts: torch.ones(len(texts), 3), (VocabularyGroup(("a",)),)
    )
    with pytest.raises(ValueError, match="features are 5 numbers and the words' 3: CLIP_VISION and CLIP do not match"):
        asker.caption(painted(0, 0, 0))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_features_that_are_no_directions_are_refused(value):
    with pytest.raises(ValueError, match="zero or not finite"):
        normalise_features(torch.full((1, 4), value))


def test_the_identity_changes_with_words_settings_and_models():
    identities = {asked("red, blue").identity, asked("red").identity, asked("c: red, blue").identity, asked("red, blue", words=2).identity,
                  ZeroShotTagger(mean_colours, words_near_axes, read_vocabulary("red, blue"), name="other").identity}  # fmt: skip
    assert len(identities) == 5 and asked("red, blue").identity in identities
