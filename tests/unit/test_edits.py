"""Every operation on captions by hand, what holds for all captions, and what is said of a line that is not
understood."""

import dataclasses
import random
from collections import Counter

import pytest
from trainyard.trainers.data.captions import edits
from trainyard.trainers.data.captions.edits import (
    EDIT_OPERATIONS,
    apply_edits,
    format_edit_preview,
    parse_edits,
    split_tags,
)
from trainyard.trainers.data.records import ImageDataset, ImageRecord


def record(*captions, tags=(), id="a" * 40, path="/set/cat.png"):
    return ImageRecord(id=id, path=path, size=(8, 8), captions=captions, tags=tags)


def words(text):
    """A text encoder to whom a word is a token."""
    return {"l": len(text.split())}


def edit(lines, caption, seed=0, tokens=words, **about):
    """The caption after these lines; '' when none is left."""
    after = edits.edit_record(record(*filter(None, [caption]), **about), parse_edits(lines), seed, tokens)
    return after.captions[0] if after.captions else ""


BY_HAND = [
    # trigger
    ("trigger: sks", "a cat", "sks, a cat"),
    ("trigger: sks", "", "sks"),
    ("trigger: sks", "sks, a cat", "sks, a cat"),
    ("trigger: sks", "a cat, SKS, mat", "sks, a cat, mat"),
    ("trigger: sks", "a photo of sks dog", "a photo of sks dog"),
    ("trigger: cat", "a catalogue", "cat, a catalogue"),
    ("trigger: sks", "猫、犬", "sks、猫、犬"),
    ("trigger: 🐈", "a cat", "🐈, a cat"),
    # prefix, suffix
    ("prefix: masterpiece,", "a cat", "masterpiece, a cat"),
    ('prefix: "a photo of-"', "cat", "a photo of-cat"),
    ("suffix: , 8k", "a cat", "a cat, 8k"),
    ("suffix: on a mat", "a cat", "a cat on a mat"),
    ('suffix: "!"', "a cat", "a cat!"),
    # replace
    ("replace: man -> person", "a man and a woman", "a person and a woperson"),
    ("replace: very ->", "a very red ball", "a  red ball"),
    ('replace: " -> " -> "=>"', "a -> b", "a=>b"),
    # regex
    (r"s/\bman\b/person/", "a man and a woman, man", "a person and a woman, person"),
    ("s/A/x/i1", "banana", "bxnana"),
    (r"s|(\w+) cat|\1 dog|", "red cat, blue cat", "red dog, blue dog"),
    (r"s/a\/b/c/", "a/b", "c"),
    (r"s/\\/x/", "a\\(b", "ax(b"),
    ("s#猫#犬#", "黒い猫", "黒い犬"),
    # tags
    ("remove: cat, long hair", "Cat, long_hair, mat, catalogue", "mat, catalogue"),
    ("remove: hat (red)", r"hat \(red\), mat", "mat"),
    ("remove: dog", "a,b", "a,b"),
    ("remove: 猫", "猫、犬、鳥", "犬、鳥"),
    ("remove: b", "a, b\nb, c", "a\nc"),
    ("blacklist: hair", "long hair, hair_ribbon, chair, hairy", "chair, hairy"),
    ("blacklist: 髪", "長い髪，帽子", "帽子"),
    ("keep: cat, mat", "cat, dog, mat", "cat, mat"),
    ("swap: 1girl -> woman; 1boy -> man", "1girl, 1boy, 2girls", "woman, man, 2girls"),
    ("swap: couple -> man", "couple, dog", "man, dog"),
    ("dedupe", "a cat, A_Cat, mat, a cat,, mat", "a cat, mat"),
    ("sort", "mat, Cat, b", "b, Cat, mat"),
    ("sort: keep 1", "sks, mat, cat", "sks, cat, mat"),
    # merge
    ("merge: tags, prose", "a red cat on a mat.", "outdoors, a red cat on a mat."),
    ("merge: prose, tags", "a red cat on a mat", "a red cat on a mat, outdoors"),
    # strip
    ("strip: boilerplate", "This image shows a photo of a cat", "A cat"),
    ("strip: boilerplate", "arafed image of a cat sitting", "a cat sitting"),
    ("strip: boilerplate", "there is a cat, araffe, on a mat", "a cat, on a mat"),
    ("strip: boilerplate", "In this picture, we can see a dog", "A dog"),
    ("strip: boilerplate", "a painting of a cat", "a painting of a cat"),
    ("strip: boilerplate", "the imagery is fine", "the imagery is fine"),
    ("strip: best quality", "best quality, a photo of a cat", "a photo of a cat"),
    ("strip: boilerplate, 4k", "a photo of a cat, 4k, mat", "a cat, mat"),
    # truncate
    ("truncate: 3", "a cat, a mat, a hat", "a cat"),
    ("truncate: 4", "a cat, a mat, a hat", "a cat, a mat"),
    ("truncate: 5 words", "a cat, that sits on a very long mat", "a cat, that sits on"),
    ("truncate: 2 tags", "a, b, c", "a, b"),
    ("truncate: 2", "one two three", "one two"),
    ("truncate: 9", "one two three", "one two three"),
    # letters
    ("lower", "A Cat", "a cat"),
    ("underscores: to spaces", "long_hair, ^_^, score_9_up, (o)_(o)", "long hair, ^_^, score_9_up, (o)_(o)"),
    ("escape: parentheses", r"hat (red), \(blue\)", r"hat \(red\), \(blue\)"),
    ("unescape: parentheses", r"hat \(red\)", "hat (red)"),
    # conditions, comments
    ("only: cat, dog\nsuffix: , animal\nonly:\nsuffix: , end", "a cat", "a cat, animal, end"),
    ("only: cat\nsuffix: , animal\nonly:\nsuffix: , end", "a car", "a car, end"),
    ("unless: cat\nsuffix: , thing", "a car", "a car, thing"),
    ("unless: cat\nsuffix: , thing", "a cat", "a cat"),
    ("# trigger: sks\n\n   \n  lower  ", "A", "a"),
    ("TRIGGER : sks", "a", "sks, a"),
]


@pytest.mark.parametrize(("lines", "before", "after"), BY_HAND, ids=lambda text: repr(text)[:40])
def test_by_hand(lines, before, after):
    assert edit(lines, before, tags=("red", "cat", "outdoors")) == after


def test_every_operation_has_an_example():
    used = {line.split(":")[0].strip().lower() for lines, _, _ in BY_HAND for line in lines.split("\n")}
    assert set(EDIT_OPERATIONS) - used == {"shuffle"}, "shuffle has a test of its own"


# -- what holds for every caption --------------------------------------------------------------------------------------

PIECES = (
    "cat",
    "Cat",
    "long_hair",
    "long hair",
    "a cat on a mat",
    "hat (red)",
    r"hat \(red\)",
    "^_^",
    "🐈",
    "猫",
    "長い髪",
    "",
    " ",
    "sks",
)


def captions(number=300):
    rng = random.Random(0)
    for _ in range(number):
        yield rng.choice((", ", ",", "，", "、", ", \n")).join(rng.choices(PIECES, k=rng.randrange(8)))


TWICE = ("trigger: sks", "prefix: oh,", "suffix: , end", "remove: cat", "blacklist: hair", "keep: cat, "
                                                                                           "sks", "dedupe", "sort", "sort: keep 1",
         "merge: tags, prose", "merge: prose, tags", "strip: boilerplate", "truncate: 4", "lower", "underscores: to "
                                                                                                   "spaces", "escape: parentheses")  # fmt: skip


@pytest.mark.parametrize("line", TWICE)
def test_doing_it_twice_is_doing_it_once(line):
    for caption in captions():
        once = edit(line, caption.strip(), tags=("cat", "red"))
        assert edit(line, once, tags=("cat", "red")) == once, caption


@pytest.mark.parametrize("line", ["sort", "shuffle", "shuffle: keep 2"])
def test_another_order_loses_and_adds_no_tag(line):
    for caption in captions():
        before, after = caption.strip(), edit(line, caption.strip())
        assert Counter(split_tags(before.replace("\n", ","))) == Counter(split_tags(after.replace("\n", ","))), caption


def test_dedupe_leaves_each_tag_once():
    for caption in captions():
        for line in edit("dedupe", caption.strip()).split("\n"):
            assert len(set(map(edits.caption_tag_key, split_tags(line)))) == len(split_tags(line)), caption


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_truncated_caption_never_exceeds_its_length_and_ends_between_words(most):
    def letters(text):  # an encoder to whom each letter is a token
        return {"l": len(text.split()), "t5xxl": len(text)}

    for caption in captions():
        caption = caption.strip()
        by_words, by_letters = (
            edit(f"truncate: {most} words", caption),
            edit(f"truncate: {most}", caption, tokens=letters),
        )
        assert len(by_words.split()) <= most
        assert len(by_letters) <= most, "the encoder that counts most decides"
        assert caption.startswith(by_words) and caption.startswith(by_letters)
        assert not (caption + " ")[len(by_words)].isascii() or not (caption + " ")[len(by_words)].isalnum(), (
            "between words"
        )


def test_a_shuffle_follows_the_seed_and_the_picture_alone():
    tags = ", ".join("abcdefgh")
    alone = edit("shuffle", tags)
    assert alone != tags
    assert edit("shuffle", tags) == alone
    assert edit("shuffle", tags, seed=1) != alone
    assert edit("shuffle", tags, id="b" * 40) != alone
    data = ImageDataset((record("x, y, z", id="c" * 40), record(tags)))
    assert apply_edits(data, parse_edits("shuffle"))[1].captions == (alone,)
    assert edit("shuffle: keep 3", tags).startswith("a, b, c, ")


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_alternatives_are_edited_each_and_equal_or_empty_ones_are_dropped():
    assert edits.edit_record(record("cat, b", "b, cat", "cat"), parse_edits("remove: cat")).captions == ("b",)


def test_a_dataset_is_not_changed_and_nothing_but_captions_differs():
    data = ImageDataset((record("a"), record("b", path="/set/b.png")), skipped=(("x", "why"),))
    after = apply_edits(data, parse_edits("trigger: sks"))
    assert data[0].captions == ("a",)
    assert [dataclasses.replace(r, captions=()) for r in after] == [dataclasses.replace(r, captions=()) for r in data]
    assert after.skipped == data.skipped


def test_the_preview_shows_the_first_changes_and_counts_all():
    data = ImageDataset(
        tuple(record(*caption, path=f"/set/{i}.png") for i, caption in enumerate([["a"], ["sks, b"], [], ["c"]]))
    )
    text = format_edit_preview(data, apply_edits(data, parse_edits("trigger: sks")), show=2)
    assert text.splitlines() == [
        "3 of 4 images "
        "changed", "", "0.png", "- a", "+ sks, a", "", "2.png", "- (no caption)", "+ sks", "", "... and 1 "
                                                                                               "more"]  # fmt: skip


def test_progress_is_told_and_an_interrupt_goes_through():
    seen, data = [], ImageDataset((record("a"), record("b")))
    apply_edits(data, parse_edits("lower"), report=lambda *step: seen.append(step))
    assert seen == [(1, 2, "cat.png"), (2, 2, "cat.png")]
    with pytest.raises(KeyboardInterrupt):
        apply_edits(data, parse_edits("lower"), check_interrupt=lambda: (_ for _ in ()).throw(KeyboardInterrupt))


# -- what is said of a line that is not understood ---------------------------------------------------------------------

WRONG = [
    ("triger: sks", "there is no operation 'triger'. Did you mean 'trigger'?"),
    ("hello", r"there is no operation 'hello'.*There are: .*trigger.*only, unless, s/a/b/"),
    ("trigger:", "write 'trigger: sks'"),
    ("remove: ,", "write 'remove: tag, tag'"),
    ("replace: a b", "it needs an arrow; write 'replace: a -> b'"),
    ('replace: "" -> b', "nothing stands before the arrow"),
    ("swap: a -> b; c", "it needs an arrow"),
    ("dedupe: all", "nothing is expected after the colon"),
    ("shuffle: two", "keep 2"),
    ("merge: tags", "merge: tags, prose"),
    ("truncate: 0", "'0' is not a length"),
    ("truncate: 3 apples", "'3 apples' is not a length"),
    ("underscores: to dots", "underscores: to spaces"),
    ("escape: all", "escape: parentheses"),
    ("s/a(b/c/", "not a regular expression at character 4"),
    ("s/a/b", "s/pattern/replacement/"),
    ("s//b/", "s/pattern/replacement/"),
    (r"s/a/\2/", "not a regular expression"),
    ("s/a/b/q", "the flags 'q' are unknown"),
    ("unless:", "write 'unless: word'"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_line_is_named_with_what_is_possible(line, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_edits(f"lower\n\n{line}")
    assert str(error.value).startswith(f"Line 3 of the edits, {line!r}: ")


def test_tokens_without_a_text_encoder_are_an_error_that_offers_words():
    with pytest.raises(
        ValueError,
        match="Line 1 of the edits, 'truncate: 2', on cat.png: .*Connect CLIP, or write 'truncate: 40 words'",
    ):
        edit("truncate: 2", "one two three", tokens=None)


def test_a_pattern_that_would_never_end_is_stopped(monkeypatch):
    monkeypatch.setattr(edits, "REGEX_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(ValueError, match="took more than 0.05 s"):
        edit("s/(a|aa)+$/b/", "a" * 60 + "c")
