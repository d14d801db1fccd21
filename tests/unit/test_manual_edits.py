"""Captions from the grid: what is read, what is refused, what is drawn, and what reaches the files."""

import dataclasses
import hashlib
import json
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image
from trainyard.trainers.data.captions import manual_edits, sidecars
from trainyard.trainers.data.readers import read_folder

NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def folder(tmp_path):
    """input/set with three images; a has a .txt, b a .caption, c nothing."""
    place = tmp_path / "input" / "set"
    place.mkdir(parents=True)
    for number, name in enumerate("abc"):
        Image.new("RGB", (600, 400), (40 * number, 9, 9)).save(place / f"{name}.png")
    (place / "a.txt").write_bytes("\ufeffa rëd ball\r\n".encode())
    (place / "b.caption").write_text("a blue ball")
    return place


def digest(place):
    return {file.name: hashlib.sha1(file.read_bytes()).hexdigest() for file in place.glob("*.png")}


def written(folder, captions, **about):
    """What is written when the images of these names get these captions."""
    data = read_folder(folder, **about)
    edits = {record.id: captions[Path(record.path).stem] for record in data if Path(record.path).stem in captions}
    return sidecars.write_caption_files(manual_edits.apply_manual_edits(data, edits), edits, [folder.parent], now=NOW)


# -- what the grid wrote -----------------------------------------------------------------------------------------------


def test_edits_replace_captions_by_the_pictures_bytes(folder):
    data = read_folder(folder)
    edits = manual_edits.parse_manual_edits(
        json.dumps({data[0].id: " a green ball ", data[2].id: ["one", "two", "one", ""], data[1].id: ""})
    )
    (folder / "a.png").rename(folder / "z.png")
    assert [r.captions for r in manual_edits.apply_manual_edits(read_folder(folder), edits)] == [
        (),
        ("one", "two"),
        ("a green ball",),
    ]
    assert data[0].captions == ("a rëd ball",)


def test_nothing_written_changes_nothing(folder):
    data = read_folder(folder)
    assert manual_edits.apply_manual_edits(data, manual_edits.parse_manual_edits(" \n")) == data


def test_edits_of_pictures_that_are_gone_are_told_and_not_fatal(folder):
    data = read_folder(folder)
    edits = manual_edits.parse_manual_edits(
        json.dumps({data[0].id: "new", data[1].id: "a blue ball", "f" * 40: "gone"})
    )
    assert manual_edits.format_manual_edits(data, manual_edits.apply_manual_edits(data, edits), edits).splitlines() == [
        "1 of 3 captions edited by hand",
        "1 edits are of images that are not in this dataset (ffffffffff); they are kept in case those come back.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'a': 1", r"not JSON \(.*line 1 column 2.*Clear the field"),
        ("[1]", r"must be an object"),
        ('{"abc": 3}', "The edit of image abc is 3; it must be text"),
        ('{"abc": ["x", null]}', "The edit of image abc"),
        ('{"abc": "\\u0000"}', "NUL"),
        ('{"abc": "\\ud800"}', "broken character"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["cut", "list", "number", "null", "nul", "surrogate", "deep"],
)
def test_what_the_grid_would_not_write_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        manual_edits.parse_manual_edits(text)


# -- what the grid is drawn from ---------------------------------------------------------------------------------------


def test_each_picture_has_a_card_with_a_small_picture(folder, tmp_path):
    cards = manual_edits.build_caption_cards(read_folder(folder), tmp_path / "thumbs")
    assert [(card.name, card.captions, card.why) for card in cards] == [
        ("a.png", ("a rëd ball",), ""),
        ("b.png", ("a blue ball",), ""),
        ("c.png", (), ""),
    ]
    with Image.open(tmp_path / "thumbs" / cards[0].thumb) as thumb:
        assert thumb.size == (256, 171)
    assert sorted(file.name for file in (tmp_path / "thumbs").iterdir()) == sorted(card.thumb for card in cards)


def test_thumbnails_beyond_the_first_are_promised_and_made_when_asked_for(folder, tmp_path):
    data, seen = read_folder(folder), []
    cards = manual_edits.build_caption_cards(data, tmp_path / "thumbs", lambda *step: seen.append(step), first=1)
    assert [card.made for card in cards] == [True, False, False] and seen == [(1, 1, "a.png")]
    assert [file.name for file in (tmp_path / "thumbs").iterdir()] == [cards[0].thumb]
    later = manual_edits.build_caption_card(data[1], tmp_path / "thumbs")
    assert dataclasses.replace(later, made=False) == cards[1] and (tmp_path / "thumbs" / later.thumb).is_file()


def test_thumbnails_are_made_once_and_another_crop_has_its_own(folder, tmp_path):
    data = read_folder(folder)
    first = manual_edits.build_caption_cards(data, tmp_path / "thumbs")
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "thumbs").iterdir()}
    assert manual_edits.build_caption_cards(data, tmp_path / "thumbs") == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "thumbs").iterdir()} == made
    cropped = dataclasses.replace(data[0], crop=(0, 0, 100, 100))
    assert manual_edits.build_caption_card(cropped, tmp_path / "thumbs").thumb != first[0].thumb


def test_a_picture_that_cannot_be_opened_has_a_card_that_says_why(folder, tmp_path):
    data = read_folder(folder)
    (folder / "b.png").unlink()
    cards = manual_edits.build_caption_cards(data, tmp_path / "thumbs")
    assert [bool(card.thumb) for card in cards] == [True, False, True]
    assert "Load the dataset again" in cards[1].why


def test_progress_is_told_and_an_interrupt_goes_through(folder, tmp_path):
    seen = []
    manual_edits.build_caption_cards(read_folder(folder), tmp_path / "thumbs", report=lambda *step: seen.append(step))
    assert seen == [(1, 3, "a.png"), (2, 3, "b.png"), (3, 3, "c.png")]
    with pytest.raises(KeyboardInterrupt):
        manual_edits.build_caption_cards(
            read_folder(folder), tmp_path / "others", check_interrupt=lambda: (_ for _ in ()).throw(KeyboardInterrupt)
        )


# -- what reaches the files --------------------------------------------------------------------------------------------


def test_the_file_that_is_read_is_the_one_that_is_written_and_its_bytes_are_kept(folder):
    images = digest(folder)
    before = (folder / "a.txt").read_bytes()
    found = written(folder, {"a": ("a grün ball",), "b": ("blue",), "c": ("new",)})
    assert [(w.path.name, w.backup and w.backup.relative_to(folder).as_posix()) for w in found] == [
        ("a.txt", ".trainyard-replaced/a.20260102-030405-000000.txt"),
        ("b.caption", ".trainyard-replaced/b.20260102-030405-000000.caption"),
        ("c.txt", None),
    ]
    assert found[0].backup.read_bytes() == before
    assert [r.captions for r in read_folder(folder)] == [("a grün ball",), ("blue",), ("new",)]
    assert digest(folder) == images
    assert read_folder(folder).skipped == ()


def test_only_edited_captions_that_differ_are_written(folder):
    assert [w.path.name for w in written(folder, {"a": ("a rëd ball",), "b": ("blue",), "c": ()})] == ["b.caption"]
    assert written(folder, {"b": ("blue",)}) == []
    assert not (folder / "c.txt").exists()


def test_a_caption_taken_away_leaves_an_empty_file(folder):
    written(folder, {"a": ()})
    assert (folder / "a.txt").read_bytes() == b""
    assert read_folder(folder)[0].captions == ()


def test_alternatives_are_written_line_by_line_and_read_back(folder):
    written(folder, {"a": ("one\ntwo", "three")}, caption_lines="alternatives")
    assert read_folder(folder, caption_lines="alternatives")[0].captions == ("one two", "three")


def test_two_pictures_with_one_caption_file_must_agree(folder):
    Image.new("RGB", (8, 8)).save(folder / "a.webp")
    data = read_folder(folder)
    edits = {data[0].id: ("other",)}
    with pytest.raises(ValueError, match="a.png and .*a.webp share the caption file a.txt"):
        sidecars.write_caption_files(manual_edits.apply_manual_edits(data, edits), edits, [folder.parent])
    both = edits | {data[1].id: ("other",)}
    assert len(sidecars.write_caption_files(manual_edits.apply_manual_edits(data, both), both, [folder.parent])) == 1


def test_pictures_outside_the_roots_are_refused_before_anything_is_written(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "x.png")
    (folder.parent / "link").symlink_to(elsewhere, target_is_directory=True)
    data = read_folder(folder.parent / "link")
    edits = {data[0].id: ("new",)}
    with pytest.raises(ValueError, match="lies outside .*Turn save_to_files off"):
        sidecars.write_caption_files(manual_edits.apply_manual_edits(data, edits), edits, [folder.parent])
    with pytest.raises(ValueError, match="was made by Trainyard"):
        sidecars.write_caption_files(manual_edits.apply_manual_edits(data, edits), edits, [tmp_path], [elsewhere])
    assert [file.name for file in elsewhere.iterdir()] == ["x.png"]


def test_a_caption_file_that_is_a_link_out_of_the_roots_is_refused(folder, tmp_path):
    (tmp_path / "outside.txt").write_text("not mine")
    (folder / "c.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ValueError, match="c.txt lies outside"):
        written(folder, {"a": ("new",), "c": ("new",)})
    assert (tmp_path / "outside.txt").read_text() == "not mine"
    assert read_folder(folder)[0].captions == ("a rëd ball",), "nothing is written before all is checked"


def test_what_was_written_is_told(folder):
    lines = sidecars.format_written_captions(written(folder, {"a": ("new",), "c": ("new",)}))
    assert lines[0] == "2 caption files written"
    assert ".trainyard-replaced" in lines[1] and lines[2].endswith("c.txt (new)")
    assert sidecars.format_written_captions(None) == []
    assert sidecars.format_written_captions([]) == ["no caption file needed a change"]
