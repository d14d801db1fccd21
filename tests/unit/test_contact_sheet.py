"""Contact sheets: what a person sees of a dataset."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageColor
from trainyard.trainers.data.contact_sheet import (
    BAD_COLOUR,
    NEUTRAL_COLOUR,
    WARN_COLOUR,
    SheetTile,
    draw_contact_sheet,
    draw_dataset_sheet,
    make_dataset_tile,
)
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset


@pytest.fixture
def dataset(tmp_path):
    for i in range(5):
        Image.new("RGB", (40, 20), (0, 40 * i, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("a green field, and so on and on and on for many words and then some more of them")
    (tmp_path / "metadata.csv").write_text("file,repeats,score,split\n0.png,3,7.5,val\n")
    return read_folder(tmp_path)


def test_a_tile_tells_name_size_repeats_score_split_and_the_beginning_of_the_caption(dataset):
    tile = make_dataset_tile(dataset[0], 192)
    assert tile.lines == (
        "0.png",
        "40x20 x3 score 7.5 validation",
        "a green field, and so on",
        "and on and on for many ...",
    )
    assert tile.colour == NEUTRAL_COLOUR and make_dataset_tile(dataset[1], 192).lines[2] == "(no caption)"


def test_flags_frame_their_picture_and_a_lost_file_says_why(dataset):
    flagged = make_dataset_tile(dataclasses.replace(dataset[0], flags=("blur (FFT share 0.003 < 0.007)",)), 192)
    assert flagged.colour == WARN_COLOUR and flagged.lines[-1] == "blur (FFT share 0.003 < 0.007)"
    lost = make_dataset_tile(dataclasses.replace(dataset[0], path="/gone.png"), 192)
    assert lost.colour == BAD_COLOUR and " ".join(lost.lines).startswith("gone.png Cannot read /gone.png")


def test_each_page_shows_its_own_pictures(dataset):
    """two pages of three: greens 0, 40, 80 on the first, 120 and 160 on the second"""
    for page, greens in ((1, {0, 40, 80}), (2, {120, 160})):
        pixels = np.asarray(draw_dataset_sheet(dataset, page, per_page=3, cell=64))
        seen = {int(g) for r, g, b in np.unique(pixels.reshape(-1, 3), axis=0) if r == b == 0}
        assert seen == greens


@pytest.mark.parametrize(
    ("page", "images", "words"),
    [(3, 5, "page is 3, and 5 images at 3 a page fill 2 pages"), (0, 5, "page is 0"), (1, 0, "fill 0 pages")],
)
def test_a_page_that_is_not_there_is_refused(dataset, page, images, words):
    with pytest.raises(ValueError, match=words):
        draw_dataset_sheet(dataset[:images], page, per_page=3)


def test_a_long_line_ends_in_dots_and_no_tiles_are_refused():
    page = draw_contact_sheet([SheetTile(Image.new("RGB", (8, 8)), ("word " * 50,), WARN_COLOUR)], cell=64)
    assert page.width < 100 and ImageColor.getrgb(WARN_COLOUR) in set(
        map(tuple, np.asarray(page).reshape(-1, 3).tolist())
    )
    with pytest.raises(ValueError, match="no images to show"):
        draw_contact_sheet([])


def test_odd_names_are_shown(dataset):
    assert isinstance(
        draw_dataset_sheet(ImageDataset((dataclasses.replace(dataset[0], captions=("käfer 🙂\ud800",)),))), Image.Image
    )
