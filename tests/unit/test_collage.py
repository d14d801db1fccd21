"""Collages: the claims that the method makes, each as a test, then what the files and captions must be."""

import contextlib
import json
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import Image
from trainyard.tests.fakes_data import Cut, FakeVae, encoded
from trainyard.tests.unit.toy import rng
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.data.collage.build import (
    CollageSource,
    build_collages,
    draw_collages_sheet,
    find_mix_repeats,
    find_trim_box,
)
from trainyard.trainers.data.collage.captions import (
    combine_collage_captions,
    describe_cell_positions,
    find_common_trigger,
)
from trainyard.trainers.data.collage.plan import (
    Collage,
    CollageCell,
    CollagePlan,
    CollageSettings,
    check_collage_plan,
    plan_collages,
)
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, ImageRecord, open_image, open_mask
from trainyard.trainers.diffusion import NoiseLevelDensity
from trainyard.trainers.methods.lora import LoraTraining

BUCKETS = "1024x1024, 1216x832, 832x1216, 1152x896, 896x1152, 1536x640, 640x1536"
SMALL = dict(width=128, height=128, contrast="off", mix=0.0, max_crop=0.12)


def random_sizes(count=200, seed=1, low=600, high=2500):
    draw = random.Random(seed)
    return [(draw.randint(low, high), draw.randint(low, high)) for _ in range(count)]


def cells_of(made):
    return [(collage, cell) for collage in made.collages for cell in collage.cells]


def noise(file, size, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file)
    return file


def images(folder, sizes, captions=None):
    """0.png, 1.png, ... of noise in these sizes, with captions."""
    for index, size in enumerate(sizes):
        noise(folder / f"{index}.png", size, index)
        if captions:
            (folder / f"{index}.txt").write_text(captions[index], encoding="utf-8")
    return read_folder(folder)


def pixels(record):
    return np.asarray(open_image(record))


# -- the nine claims ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", ["", BUCKETS])
@pytest.mark.parametrize("layout", ["auto", "columns", "rows", "single"])
def test_claim_1_a_pattern_is_learnt_relative_to_the_frame_every_cell_spans_one_axis(layout, frames):
    for collage, cell in cells_of(plan_collages(random_sizes(), CollageSettings(layout=layout, frames=frames))):
        assert cell.size[0] == collage.frame[0] or cell.size[1] == collage.frame[1]


def test_claim_1_upright_pictures_become_columns_and_wide_ones_rows():
    sizes = [(512, 1024)] * 4 + [(1024, 512)] * 4
    made = plan_collages(sizes, CollageSettings())
    assert {(collage.layout, sizes[cell.source]) for collage, cell in cells_of(made)} == {
        ("columns", (512, 1024)),
        ("rows", (1024, 512)),
    }


def test_claim_1_a_grid_needs_to_be_asked_for_and_still_has_a_picture_from_end_to_end():
    """One in full height beside two that share the rest."""
    made = plan_collages([(640, 1024), (1024, 1400), (1024, 1400)] * 3, CollageSettings(layout="grid", uses=1))
    grids = [collage for collage in made.collages if collage.layout == "grid"]
    assert len(grids) >= 2
    for collage in grids:
        assert collage.cells[0].size[1] == 1024 and {cell.size[1] < 1024 for cell in collage.cells[1:]} == {True}
        assert collage.fill == 1.0
    with pytest.raises(ValueError, match="spans neither the width nor the height. Only the layout grid allows that"):
        check_collage_plan(made, CollageSettings())


def test_claim_2_two_landscapes_of_1024x512_fill_a_frame_of_1024():
    made = plan_collages([(1024, 512)] * 2, CollageSettings(uses=1))
    (collage,) = made.collages
    assert sorted(cell.frame_box for cell in collage.cells) == [(0, 0, 1024, 512), (0, 512, 1024, 1024)]
    assert {(cell.scale, cell.crop, cell.box) for cell in collage.cells} == {(1.0, 0.0, (0, 0, 1024, 512))}


@pytest.mark.parametrize("layout", ["auto", "columns", "rows", "single", "grid"])
def test_claim_2_pictures_are_cropped_and_never_stretched(layout):
    made = plan_collages(random_sizes(), CollageSettings(layout=layout, frames=BUCKETS))
    for _, cell in cells_of(made):
        left, top, right, bottom = cell.box
        assert (
            abs((right - left) * cell.scale - cell.size[0]) <= 1
            and abs((bottom - top) * cell.scale - cell.size[1]) <= 1
        )
        assert cell.crop <= 0.12 + 1e-6
        width, height = made.sizes[cell.source]
        assert cell.crop == pytest.approx(1 - (right - left) * (bottom - top) / (width * height), abs=1e-6)


def test_claim_3_no_more_pixels_than_exist_small_pictures_are_left_out_and_named():
    sizes = [*random_sizes(60, low=500, high=1400), (700, 500)]
    made = plan_collages(sizes, CollageSettings())
    assert max(cell.scale for _, cell in cells_of(made)) <= 1.0
    out = dict(made.excluded)
    assert out[60] == "is 700x500 px and would be enlarged 1.46 times to span the width of 1024x1024"
    assert not out.keys() & made.count_uses().keys()


def test_claim_3_small_pictures_take_a_smaller_frame_of_the_list_and_large_ones_do_not():
    made = plan_collages([(512, 512)] * 4 + [(2000, 2000)] * 4, CollageSettings(frames="1024x1024, 512x512"))
    assert made.excluded == ()
    assert {collage.frame for collage, cell in cells_of(made) if cell.source < 4} == {(512, 512)}
    assert {collage.frame for collage, cell in cells_of(made) if cell.source >= 4} == {(1024, 1024)}


def test_claim_3_enlarging_is_allowed_up_to_what_was_asked_for():
    made = plan_collages([(700, 500)] * 2, CollageSettings(max_upscale=1.5, uses=1))
    assert made.excluded == () and max(cell.scale for _, cell in cells_of(made)) == pytest.approx(1024 / 700)


def test_claim_4_bars_are_cut_off_and_crops_and_masks_come_first(tmp_path):
    """a letterbox of 20 px above and below; a crop of the right half; a mask that is black on its left"""
    noise(tmp_path / "in" / "bars.png", (256, 168))
    framed = Image.open(tmp_path / "in" / "bars.png")
    framed.paste((0, 0, 0), (0, 0, 256, 20))
    framed.paste((0, 0, 0), (0, 148, 256, 168))
    framed.save(tmp_path / "in" / "bars.png")
    noise(tmp_path / "in" / "half.png", (512, 128), 1)
    mask = Image.new("L", (512, 128), 255)
    mask.paste(0, (256, 0, 384, 128))
    mask.save(tmp_path / "in" / "half.mask.png")
    bars, half = read_folder(tmp_path / "in")
    dataset = ImageDataset((bars, replace(half, crop=(256, 0, 512, 128))))
    built = build_collages(dataset, CollageSettings(**SMALL | dict(width=256, height=256, uses=1)), tmp_path / "out")
    (collage,) = built.dataset
    listed = json.loads((next((tmp_path / "out").glob("*/collages.json"))).read_text())["collages"][0]
    crops = {cell["path"].rsplit("/")[-1]: cell["picture_crop"] for cell in listed["cells"]}
    assert crops == {"bars.png": [0, 20, 256, 148], "half.png": [256, 0, 512, 128]}
    assert (pixels(collage).reshape(-1, 3).sum(1) > 0).mean() > 0.999, "no black bar is left"
    top = next(cell["place"][1] for cell in listed["cells"] if cell["path"].endswith("half.png"))
    seen = np.asarray(open_mask(collage))[top : top + 128]
    assert set(np.unique(seen[:, :128])) == {0} and set(np.unique(seen[:, 128:])) == {255}
    assert "bars cut off: bars.png, 256x168 to 256x128" in built.report


def subject(file, colour, ground):
    """A square of one colour in the middle of another."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 128), ground)
    image.paste(colour, (16, 32, 48, 96))
    image.save(file)


def test_claim_5_low_contrast_is_flagged_with_its_figure_or_dropped(tmp_path):
    """skin on beige cannot be told apart, skin on blue can"""
    subject(tmp_path / "in" / "beige.png", (224, 172, 138), (218, 190, 160))
    subject(tmp_path / "in" / "blue.png", (224, 172, 138), (40, 70, 160))
    dataset = read_folder(tmp_path / "in")
    settings = CollageSettings(**SMALL | dict(uses=1, contrast="warn"))
    built = build_collages(dataset, settings, tmp_path / "out")
    (flag,) = built.dataset[0].flags
    assert flag.startswith("contrast (dE ") and flag.endswith(" < 12, beige.png)")
    assert "- contrast: beige.png (dE " in built.report and "blue.png" not in built.report
    dropped = build_collages(dataset, replace(settings, contrast="drop", mix=0.5), tmp_path / "out")
    assert all("beige" not in record.path for record in dropped.dataset)
    ((path, why),) = dropped.dataset.skipped
    assert path.endswith("beige.png") and "hardly differs from its background" in why
    silent = build_collages(dataset, replace(settings, contrast="off"), tmp_path / "out")
    assert silent.dataset[0].flags == ()


def test_claim_6_the_ground_is_181818_and_there_is_no_gutter_unless_asked_for(tmp_path):
    dataset = images(tmp_path / "in", [(48, 128), (48, 128)])
    (collage,) = build_collages(dataset, CollageSettings(**SMALL | dict(uses=1)), tmp_path / "out").dataset
    shown, mask = pixels(collage), np.asarray(open_mask(collage))
    assert (shown[mask == 0] == 24).all() and (mask == 0).sum() == 32 * 128
    assert (mask[0] == 255).nonzero()[0].tolist() == list(range(16, 112)), "side by side in the middle"
    apart = CollageSettings(**SMALL | dict(uses=1, gutter=16, ground="#ff0000"))
    (collage,) = build_collages(dataset, apart, tmp_path / "out").dataset
    assert (pixels(collage)[:, 56:72] == (255, 0, 0)).all() or (pixels(collage)[:, 48:64] == (255, 0, 0)).all()


def test_claim_7_at_least_one_pattern_goes_end_to_end_or_the_collage_is_refused():
    """four quarters of a frame: none spans it"""
    quarters = [(x, y, x + 512, y + 512) for x in (0, 512) for y in (0, 512)]
    cells = tuple(CollageCell(i, (0, 0, 512, 512), 1.0, place, 0.0) for i, place in enumerate(quarters))
    grid = CollagePlan((Collage((1024, 1024), "grid", cells),), ((512, 512),) * 4)
    with pytest.raises(
        ValueError,
        match=r"Collage 1 \(grid, 1024x1024\): no image spans the frame from end to end.*auto, columns or rows",
    ):
        check_collage_plan(grid, CollageSettings(layout="grid", uses=1))


@pytest.mark.parametrize("uses", [1, 2, 3])
@pytest.mark.parametrize("layout", ["auto", "columns", "rows", "single", "grid"])
def test_claim_8_every_picture_is_used_exactly_as_often_and_never_twice_in_a_frame(layout, uses):
    made = plan_collages(random_sizes(), CollageSettings(layout=layout, uses=uses, per_frame=4))
    kept = set(range(200)) - {source for source, _ in made.excluded}
    assert made.count_uses() == dict.fromkeys(kept, uses)
    for collage in made.collages:
        assert len({cell.source for cell in collage.cells}) == len(collage.cells) <= 4


def test_claim_9_without_captions_the_whole_dataset_is_unconditional(tmp_path):
    dataset = images(tmp_path / "in", [(64, 128)] * 4, ["a cat"] * 4)
    built = build_collages(dataset, CollageSettings(**SMALL | dict(captions="empty", mix=0.3)), tmp_path / "out")
    assert {record.captions for record in built.dataset} == {("",)}
    data = encoded(
        tmp_path,
        built.dataset,
        captions=CaptionSettings(caption_mode="empty (unconditional)"),
        buckets=BucketSettings(resolution=128, step=8),
    )
    assert {item.captions for item in data.items} == {("",)}


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_collages_and_another_seed_others():
    settings = CollageSettings(frames=BUCKETS, seed=3)
    assert plan_collages(random_sizes(), settings) == plan_collages(random_sizes(), settings)
    assert plan_collages(random_sizes(), settings) != plan_collages(random_sizes(), replace(settings, seed=4))


def test_frames_are_well_filled_when_there_are_several_to_choose_from():
    """200 random sizes; the square frame alone leaves ground beside images that fit with nobody"""
    square, several = (
        plan_collages(random_sizes(), CollageSettings()),
        plan_collages(random_sizes(), CollageSettings(frames=BUCKETS)),
    )
    assert square.fill > 0.85 and several.fill > 0.99
    assert sum(several.crops) / len(several.crops) < 0.03
    assert sum(len(collage.cells) > 1 for collage in several.collages) > 0.95 * len(several.collages)


def test_a_thousand_pictures_are_planned_in_seconds():
    """0.2 s alone on this size of list; the limit leaves room for a busy machine"""
    import time

    begin = time.process_time()
    plan_collages(random_sizes(1000), CollageSettings())
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("snap, step", [("auto", 16), ("8", 8), ("16", 16)])
def test_no_latent_cell_shows_two_pictures(snap, step):
    for _, cell in cells_of(plan_collages(random_sizes(), CollageSettings(snap=snap, frames=BUCKETS))):
        assert [edge % step for edge in cell.frame_box] == [0] * 4


def test_neighbours_change_from_use_to_use():
    """eight alike, each used three times: twelve pairs out of 28, none twice"""
    made = plan_collages([(512, 1024)] * 8, CollageSettings(uses=3))
    pairs = Counter(
        frozenset((a.source, b.source)) for collage in made.collages for a, b in combinations(collage.cells, 2)
    )
    assert len(made.collages) == 12 and max(pairs.values()) == 1


def test_two_pictures_change_places_when_they_must_meet_again():
    made = plan_collages([(512, 1024)] * 2, CollageSettings(uses=2))
    assert {tuple(cell.source for cell in collage.cells) for collage in made.collages} == {(0, 1), (1, 0)}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(frame_box=(0, 0, 504, 1024), box=(0, 0, 504, 1024)), "is no multiple of 16 px"),
        (dict(scale=1.5, box=(0, 0, 512 / 1.5, 1024 / 1.5)), "enlarged 1.50 times"),
        (dict(box=(0, 0, 256, 1024)), "stretched by 256.0 px"),
        (dict(crop=0.2), "20% of an image is cut off"),
        (dict(frame_box=(512, 0, 1024, 1024)), "two images overlap"),
        (dict(frame_box=(0, 0, 512, 512), box=(0, 0, 512, 512)), "spans neither"),
        (dict(source=1), "shows one image twice"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused_with_the_figure(change, message):
    good = plan_collages([(512, 1024)] * 2, CollageSettings(uses=1))
    (collage,) = good.collages
    cells = sorted(collage.cells, key=lambda cell: cell.frame_box)
    cells = [replace(cells[0], **({"source": cells[1].source} if "source" in change else change)), cells[1]]
    with pytest.raises(ValueError, match=message):
        check_collage_plan(replace(good, collages=(replace(collage, cells=tuple(cells)),)), CollageSettings(uses=1))


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(frames="1024x1024, wide"), "frames has 'wide'; write sizes"),
        (dict(width=1000, snap="16"), "The frame 1000x1024 is not a multiple of 16 px in both sides. Use 992x1024"),
        (dict(ground="black"), "ground is 'black'; write a colour as #rrggbb"),
        (dict(gutter=8), "gutter is 8 px and borders lie on multiples of 16 px. Choose a gutter of 16 px"),
        (dict(per_frame=1), "per_frame is 1; it must lie between 2 and 4"),
    ],
)
def test_settings_that_make_no_sense_say_so(values, message):
    with pytest.raises(ValueError, match=message):
        CollageSettings(**values)


def test_a_frame_that_is_no_multiple_of_16_is_snapped_to_8():
    assert (CollageSettings(width=1000).step, CollageSettings().step) == (8, 16)


# -- captions ----------------------------------------------------------------------------------------------------------


def columns(count, layout="columns"):
    side = 1200 // count
    places = [
        (i * side, 0, (i + 1) * side, 1200) if layout == "columns" else (0, i * side, 1200, (i + 1) * side)
        for i in range(count)
    ]
    return Collage(
        (1200, 1200),
        layout if count > 1 else "single",
        tuple(CollageCell(i, (0, 0, 1, 1), 1.0, place, 0.0) for i, place in enumerate(places)),
    )


@pytest.mark.parametrize(
    "collage, names",
    [
        (columns(1), ("",)),
        (columns(2), ("left", "right")),
        (columns(3), ("left", "middle", "right")),
        (columns(3, "rows"), ("top", "middle", "bottom")),
        (columns(4, "rows"), ("top", "upper middle", "lower middle", "bottom")),
    ],
)
def test_positions_are_named_as_a_person_would(collage, names):
    assert describe_cell_positions(collage) == names


def test_positions_in_a_grid_say_both_axes():
    cells = [
        CollageCell(i, (0, 0, 1, 1), 1.0, place, 0.0)
        for i, place in enumerate([(512, 0, 1024, 1024), (0, 0, 512, 512), (0, 512, 512, 1024)])
    ]
    assert describe_cell_positions(Collage((1024, 1024), "grid", tuple(cells))) == ("right", "top left", "bottom left")


@pytest.mark.parametrize(
    "mode, wanted",
    [
        ("positional", "sks, left: cat, sitting, indoors; right: dog, indoors"),
        ("joined", "sks, cat, sitting, indoors, dog"),
        ("shared + differences", "sks, indoors, left: cat, sitting; right: dog"),
        ("empty", ""),
    ],
)
def test_captions_are_put_together_and_the_trigger_is_said_once(mode, wanted):
    told = [
        ("sks, cat, sitting, indoors",),
        ("sks, dog, indoors.",) if mode == "positional" else ("sks, dog, indoors",),
    ]
    assert combine_collage_captions(columns(2), told, mode, "sks") == (wanted,)


def test_alternatives_are_paired_and_missing_captions_leave_their_place_out():
    assert combine_collage_captions(columns(2), [("a cat", "one cat"), ("a dog",)], "positional") == (
        "left: a cat; right: a dog",
        "left: one cat; right: a dog",
    )
    assert combine_collage_captions(columns(2), [("a cat",), ()], "positional") == ("left: a cat",)
    assert combine_collage_captions(columns(2), [(), ()], "positional", "sks") == ()


def test_the_trigger_is_the_tag_that_all_captions_begin_with():
    assert find_common_trigger([("sks, cat",), ("sks, dog",)]) == "sks"
    assert find_common_trigger([("sks, cat",), ("a dog",)]) == "" and find_common_trigger([("sks, cat",)]) == ""
    assert combine_collage_captions(columns(2), [("skstyle cat",), ("sks dog",)], "positional", "sks") == (
        "sks, left: skstyle cat; right: dog",
    )


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_picture_at_its_own_size_is_copied_pixel_by_pixel(tmp_path):
    """also with one odd row too many, which is cropped: nothing is resampled"""
    dataset = images(tmp_path / "in", [(64, 128), (65, 128)])
    (collage,) = build_collages(dataset, CollageSettings(**SMALL | dict(uses=1)), tmp_path / "out").dataset
    shown, parts = pixels(collage), [pixels(record)[:, :64] for record in dataset]
    halves = {shown[:, :64].tobytes(), shown[:, 64:].tobytes()}
    assert halves == {part.tobytes() for part in parts}


def test_an_unchanged_request_draws_nothing_and_changed_captions_keep_the_frames(tmp_path, monkeypatch):
    from trainyard.trainers.data.collage import build

    dataset = images(tmp_path / "in", [(64, 128)] * 6, [f"number {i}" for i in range(6)])
    settings = CollageSettings(**SMALL | dict(contrast="warn"))
    first = build_collages(dataset, settings, tmp_path / "out")
    monkeypatch.setattr(build, "open_image", lambda *_: pytest.fail("an image was opened again"))
    again = build_collages(dataset, settings, tmp_path / "out")
    assert again.dataset == first.dataset and again.dataset.fingerprint() == first.dataset.fingerprint()
    joined = build_collages(dataset, replace(settings, captions="joined"), tmp_path / "out")
    assert [record.id for record in joined.dataset] == [record.id for record in first.dataset]
    assert joined.dataset[0].captions != first.dataset[0].captions


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path):
    dataset = images(tmp_path / "in", [(64, 128)] * 12)
    settings, calls = CollageSettings(**SMALL | dict(contrast="warn")), []

    def cut_at(count):
        def check():
            calls.append(1)
            if len(calls) == count:
                raise Cut

        calls.clear()
        return check

    with pytest.raises(Cut):
        build_collages(dataset, settings, tmp_path / "out", check_interrupt=cut_at(5))
    assert len(json.loads((tmp_path / "out" / "survey.json").read_text())) == 4
    with pytest.raises(Cut):
        build_collages(dataset, settings, tmp_path / "out", check_interrupt=cut_at(12 + 4))
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.png")}
    assert len(files) == 2 * 3 and not list((tmp_path / "out").rglob("*.part"))
    seen = []
    built = build_collages(dataset, settings, tmp_path / "out", report=lambda *args: seen.append(args))
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert len(built.dataset) == 12 and seen[-1][:2] == (12, 12) and seen[-1][2].startswith("collage of ")


def test_nothing_of_the_users_is_touched_and_one_picture_is_open_at_a_time(tmp_path, monkeypatch):
    from trainyard.trainers.data.collage import build

    dataset = images(tmp_path / "in", [(64, 128)] * 6)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "in").iterdir()}
    alive = []

    def watched(record, ground):
        import weakref

        image = open_image(record, ground)
        alive.append(weakref.ref(image))
        assert sum(ref() is not None for ref in alive) <= 2, "the last one and the new one"
        return image

    monkeypatch.setattr(build, "open_image", watched)
    build_collages(dataset, CollageSettings(**SMALL | dict(contrast="warn")), tmp_path / "out")
    assert len(alive) == 6 + 12
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "in").iterdir()} == before


def test_a_frame_that_must_come_twice_is_one_file_seen_twice(tmp_path):
    built = build_collages(
        images(tmp_path / "in", [(128, 128)]), CollageSettings(**SMALL | dict(uses=3)), tmp_path / "out"
    )
    assert [record.repeats for record in built.dataset] == [3]


def test_the_feather_rises_over_latent_cells_at_inner_borders_only(tmp_path):
    """two columns of 64 px: 1/3 and 2/3 beside the seam, full elsewhere and at the frame's own edge"""
    dataset = images(tmp_path / "in", [(64, 128)] * 2)
    (collage,) = build_collages(dataset, CollageSettings(**SMALL | dict(uses=1, feather=2)), tmp_path / "out").dataset
    mask = np.asarray(open_mask(collage))
    assert (mask == mask[:1]).all()
    assert mask[0, ::8].tolist() == [255] * 6 + [170, 85, 85, 170] + [255] * 6


def test_the_trainer_honours_the_mask_pixels_on_the_ground_change_nothing_in_the_loss(tmp_path):
    dataset = images(tmp_path / "in", [(48, 128), (32, 128)])
    settings = CollageSettings(**SMALL | dict(uses=1, per_frame=2))
    (plain,), (loud,) = (
        build_collages(dataset, replace(settings, ground=ground), tmp_path / "out").dataset
        for ground in ("#181818", "#ff40ff")
    )
    assert plain.id != loud.id
    assert loss(tmp_path, plain) == loss(tmp_path, loud)
    bare = [replace(record, mask=None, mask_id=None) for record in (plain, loud)]
    assert loss(tmp_path, bare[0]) != loss(tmp_path, bare[1]), "without its mask the ground would be learnt"


class Local:
    """A flow model that looks at each latent cell alone, so that what is seen outside the mask can only count outside
    it."""

    flow, prediction = True, "flow"

    def model_space(self, latent):
        return latent.clone()

    def noised(self, x0, noise, sigma):
        return x0 + sigma.view(-1, 1, 1, 1) * (noise - x0)

    def sigma_at(self, u):
        return u

    def native_scale(self, sigma):
        return sigma

    def denoise(self, x, sigma, conds):
        return 0.5 * x


class NoAdapters:
    def parameters(self):
        return []

    def dropout_active(self, rng):
        return contextlib.nullcontext()


def loss(root, record):
    captions, buckets = CaptionSettings(caption_mode="empty (unconditional)"), BucketSettings(resolution=128, step=8)
    data = encoded(root, ImageDataset((record,)), captions=captions, buckets=buckets, vae=FakeVae())
    return LoraTraining(Local(), NoAdapters(), data, density=NoiseLevelDensity("logit-normal")).loss(rng(3)).item()


def test_the_share_of_pictures_alone_is_kept_with_whole_repeats(tmp_path):
    assert find_mix_repeats(alone=100, together=80, share=0.3) == (1, 3)
    for alone, together in ((10, 7), (100, 100), (3, 50), (500, 2)):
        a, t = find_mix_repeats(alone, together, 0.3)
        assert abs(a * alone / (a * alone + t * together) - 0.3) < 0.05 or max(a, t) == 24
    built = build_collages(
        images(tmp_path / "in", [(64, 128)] * 8), CollageSettings(**SMALL | dict(mix=0.3)), tmp_path / "out"
    )
    alone = sum(record.repeats for record in built.dataset if record.bucket is None)
    assert alone / sum(record.repeats for record in built.dataset) == pytest.approx(0.3, abs=0.04)


def test_few_collages_do_not_have_to_make_up_for_many_pictures_that_fit_nowhere(tmp_path):
    """two images in collages, ten that are too small: those are shown alone, and the collages are not repeated for
    them"""
    dataset = images(tmp_path / "in", [(64, 128)] * 2 + [(50, 50)] * 10)
    built = build_collages(dataset, CollageSettings(**SMALL | dict(mix=0.5)), tmp_path / "out")
    assert [record.repeats for record in built.dataset] == [1] * 14 and built.dataset.skipped == ()
    assert "- shown alone only: 11.png is 50x50 px and would be enlarged 2.56 times" in built.report


def test_a_long_list_in_the_report_ends_with_how_many_more_there_are(tmp_path):
    dataset = images(tmp_path / "in", [(64, 128)] * 2 + [(50, 50)] * 45)
    lines = build_collages(dataset, CollageSettings(**SMALL), tmp_path / "out").report.splitlines()
    assert sum(line.startswith("- left out: ") for line in lines) == 41 and "- left out: 5 more" in lines


def test_pictures_kept_for_validation_stay_out_of_the_frames(tmp_path):
    dataset = images(tmp_path / "in", [(64, 128)] * 5)
    held = replace(dataset[4], split="validation")
    built = build_collages(ImageDataset((*dataset[:4], held)), CollageSettings(**SMALL), tmp_path / "out")
    assert built.dataset[-1] == held and all(record.bucket == (128, 128) for record in built.dataset[:-1])
    assert "4.png" not in next((tmp_path / "out").glob("*/collages.json")).read_text()


def test_provenance_says_where_every_picture_is(tmp_path):
    dataset = images(tmp_path / "in", [(64, 128)] * 4, ["a", "b", "c", "d"])
    built = build_collages(dataset, CollageSettings(**SMALL), tmp_path / "out")
    written = json.loads(next((tmp_path / "out").glob("*/collages.json")).read_text())
    assert CollageSettings.from_dict(written["settings"]) == CollageSettings(**SMALL)
    assert [entry["id"] for entry in written["collages"]] == [record.id for record in built.dataset]
    by_id = {record.id: record for record in dataset}
    for entry, record in zip(written["collages"], built.dataset, strict=True):
        shown = pixels(record)
        for cell in entry["cells"]:
            left, top, right, bottom = cell["place"]
            assert (shown[top:bottom, left:right] == pixels(by_id[cell["id"]])).all()


def test_broken_and_small_pictures_are_reported_and_the_rest_is_built(tmp_path):
    dataset = images(tmp_path / "in", [(64, 128), (64, 128), (40, 60), (64, 128)])
    (tmp_path / "in" / "3.png").write_bytes(b"changed")
    built = build_collages(dataset, CollageSettings(**SMALL | dict(contrast="warn")), tmp_path / "out")
    reasons = {path.rsplit("/")[-1]: why for path, why in built.dataset.skipped}
    assert (
        "has changed since the dataset was loaded" in reasons["3.png"]
        and "would be enlarged 2.13 times" in reasons["2.png"]
    )
    assert "2 collages of 2 images, each used twice; 1 fit in no frame, 1 cannot be used" in built.report


def test_when_nothing_fits_the_message_says_what_to_do(tmp_path):
    dataset = images(tmp_path / "in", [(40, 60)] * 2)
    with pytest.raises(
        ValueError,
        match=r"None of the 2 images can stand in a frame of 128x128: 0\.png is 40x60 px and would be enlarged 2\.13",
    ):
        build_collages(dataset, CollageSettings(**SMALL), tmp_path / "out")
    with pytest.raises(ValueError, match="The dataset has 0 images, none of them for training"):
        build_collages(ImageDataset(()), CollageSettings(**SMALL), tmp_path / "out")


def test_other_frames_are_suggested_when_most_pictures_stay_alone(tmp_path):
    """upright images of 2:3 fit beside nobody in a square"""
    dataset = images(tmp_path / "in", [(86, 128)] * 12)
    built = build_collages(dataset, CollageSettings(**SMALL), tmp_path / "out")
    assert "100% of the frames hold a single image" in built.report and "With frames set to 128x128, " in built.report


def test_long_captions_are_counted(tmp_path):
    dataset = images(tmp_path / "in", [(64, 128)] * 2, ["cat " * 50, "dog " * 50])
    built = build_collages(
        dataset, CollageSettings(**SMALL), tmp_path / "out", tokens=lambda text: {"l": len(text.split()), "t5xxl": 3}
    )
    assert "- captions: 2 of 2 have more than the 75 tokens that l reads at once; the longest has 102." in built.report
    assert "t5xxl" not in built.report


def test_the_sheet_shows_the_collages_flagged_ones_first(tmp_path):
    dataset = images(tmp_path / "in", [(64, 128)] * 4 + [(80, 128)])
    built = build_collages(dataset, CollageSettings(**SMALL | dict(per_frame=2)), tmp_path / "out")
    assert any("fill (0." in flag for record in built.collages for flag in record.flags)
    assert min(draw_collages_sheet(built, limit=3).size) > 256


# -- bars --------------------------------------------------------------------------------------------------------------


def photo(size=(96, 64), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(60, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("quality", [None, 90])
def test_letterbox_bars_are_found_to_the_pixel(tmp_path, quality):
    """in a JPEG the edge is blurred: a line more may go, none may stay"""
    page = Image.new("RGB", (96, 96), (0, 0, 0))
    page.paste(photo(), (0, 16))
    if quality:
        page.save(tmp_path / "a.jpg", quality=quality)
        page = Image.open(tmp_path / "a.jpg")
    left, top, right, bottom = find_trim_box(page)
    assert (left, right) == (0, 96) and 16 <= top <= 17 and 79 <= bottom <= 80


def test_the_ground_around_a_subject_is_no_bar():
    page = Image.new("RGB", (96, 96), "white")
    page.paste(photo((30, 40)), (33, 28))
    assert (
        find_trim_box(page) is None
        and find_trim_box(Image.new("RGB", (64, 64), "white")) is None
        and find_trim_box(photo()) is None
    )


def test_a_single_plain_line_is_no_bar():
    lines = np.asarray(photo((32, 32))).copy()
    lines[0] = 0
    assert find_trim_box(Image.fromarray(lines)) is None


def test_a_source_remembers_the_crop_in_the_whole_picture():
    from trainyard.trainers.data.collage.build import make_collage_source

    record = ImageRecord(id="x", path="x.png", size=(100, 100), crop=(10, 20, 90, 100))
    assert make_collage_source(record, box=[0, 5, 80, 75], dE=None) == CollageSource(
        replace(record, crop=(10, 25, 90, 95)), None, untrimmed_size=(80, 80)
    )


def test_cells_lie_in_reading_order():
    for collage in plan_collages(random_sizes(), CollageSettings(frames=BUCKETS)).collages:
        assert all(
            a.frame_box[:2] < b.frame_box[:2] or a.frame_box[1] < b.frame_box[1] for a, b in pairwise(collage.cells)
        )
