"""What files beside the images say about them, which of them counts, and what is said of wrong ones."""

import json
import pathlib
import re

import pytest
from PIL import Image
from trainyard.trainers.data.readers import hash_folder_state, read_folder


def image(folder, name, size=(8, 6), mode="RGB", colour=7):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if mode == "L" else (1, 2, 3, 4)[: len(mode)]).save(folder / name)
    return folder / name


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        image(tmp_path / "set", name)
    return tmp_path / "set"


def put(folder, **files):
    """Files by name, two underscores for the dot: a__txt="..."; what is no text is written as JSON."""
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(
            value if isinstance(value, str) else json.dumps(value), encoding="utf-8"
        )


def captions(dataset):
    return [r.captions for r in dataset]


def reasons(dataset):
    return {pathlib.Path(path).name: reason for path, reason in dataset.skipped}


# -- what is read ------------------------------------------------------------------------------------------------------


SAYING = {"caption": "a ball", "tags": "red, round ,red", "score": 7.5, "repeats": 3, "split": "val", "mood": "glad"}


def tell(folder, how):
    """SAYING about a.png, in each way that is read; the last line of each way is all that differs."""
    if how == "sidecar":
        put(folder, a__json=SAYING)
    if how == "kohya":
        put(folder, metadata__json={"a": SAYING})
    if how == "kohya path":
        put(folder, metadata__json={"C:\\sets\\cats\\a.png": {**SAYING, "train_resolution": [512, 512]}})
    if how == "list":
        put(folder, metadata__json=[{"image": "a.png", **SAYING}])
    if how == "jsonl":
        put(folder, metadata__jsonl=json.dumps({"file_name": "./a.png", **SAYING}) + "\n\n")
    if how == "csv":
        put(
            folder,
            metadata__csv='File,caption,tags,score,repeats,split,extra\r\na.png,a ball,"red, round '
            ',red",7.5,3,val,x\r\n',
        )
    if how == "semicolons":
        put(
            folder,
            metadata__csv="path;text;tags;score;repeats;split\na.png;a ball;red, round;7.5;3;validation\nb.png\n",
        )
    if how == "probabilities":
        put(folder, a__json={**SAYING, "tags": {"red": 0.9, "round": 0.4}})


@pytest.mark.parametrize(
    "how", ["sidecar", "kohya", "kohya path", "list", "jsonl", "csv", "semicolons", "probabilities"]
)
def test_every_way_of_telling_tells_the_same(folder, how):
    tell(folder, how)
    dataset = read_folder(folder, repeats=2)
    told, other = dataset
    assert (told.captions, told.tags, told.score, told.repeats, told.split) == (
        ("a ball",),
        ("red", "round"),
        7.5,
        6,
        "validation",
    )
    assert (other.captions, other.tags, other.score, other.repeats, other.split) == ((), (), None, 2, "train")
    assert all(" not read: " in reason for _, reason in dataset.skipped)


@pytest.mark.parametrize(("value", "expected"), [
    ("a ball", ("a ball",)),
    ({"text": " a ball "}, ("a ball",)),
    ({"captions": ["a ball", "a sphere", "a ball"]}, ("a ball", "a sphere")),
    ({"captions": [], "tags": ["x"]}, ()),
    ({"tags": ["a", "b"]}, ("a, b",)),
    ({"caption": None, "text": ""}, ()),
    ({"prompt": 5}, ()),
])  # fmt: skip
def test_json_beside_a_picture_may_be_text_or_an_object(folder, value, expected):
    put(folder, a__json=json.dumps(value))
    assert captions(read_folder(folder)) == [expected, ()]


def test_lines_are_alternatives_only_when_asked_for(folder):
    put(folder, a__txt="one\n\n two \none", b__json={"text": "x\ny"})
    assert captions(read_folder(folder)) == [("one\n\n two \none",), ("x\ny",)]
    assert captions(read_folder(folder, caption_lines="alternatives")) == [("one", "two"), ("x", "y")]
    with pytest.raises(ValueError, match="caption_lines is 'many'; choose one of one, alternatives"):
        read_folder(folder, caption_lines="many")


def test_the_nearest_source_of_each_fact_counts(tmp_path):
    """.txt, then .json, then the folder's jsonl, csv, json, then those above, then the folder's name"""
    root, folder = tmp_path, tmp_path / "2_cat"
    for name in "abcdefg":
        image(folder, f"{name}.png")
    row = lambda names, text, **more: [{"file_name": f"{n}.png", "text": f"{text} {n}", **more} for n in names]
    put(root, metadata__csv="file,text\n" + "\n".join(f"2_cat/{n}.png,root {n}" for n in "abcdef"))
    put(
        folder,
        metadata__json={n: f"json {n}" for n in "abcde"},
        metadata__csv="file,text,tags\n" + "\n".join(f"{n}.png,csv {n},t" for n in "abcd"),
    )
    put(folder, metadata__jsonl="\n".join(map(json.dumps, row("abc", "jsonl", score=1))))
    put(
        folder, a__txt="txt a", a__caption="no", a__json={"caption": "no", "score": 2}, b__json={"caption": "sidecar b"}
    )
    dataset = read_folder(root)
    assert captions(dataset) == [
        (text,) for text in ("txt a", "sidecar b", "jsonl c", "csv d", "json e", "root f", "cat")
    ]
    assert [r.score for r in dataset] == [2, 1, 1, None, None, None, None]
    assert [r.tags for r in dataset] == [("t",)] * 4 + [()] * 3


def test_an_empty_caption_file_says_that_there_is_none(tmp_path):
    image(tmp_path / "1_cat", "a.png")
    put(tmp_path / "1_cat", a__txt="\n", metadata__json={"a": "no"})
    assert captions(read_folder(tmp_path)) == [()]


def test_repeats_of_a_row_take_the_place_of_the_folders_and_none_leaves_the_picture_out(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / "5_cat", name)
    put(tmp_path / "5_cat", metadata__csv="file,repeats\na.png,2\nb.png,0\n")
    dataset = read_folder(tmp_path, repeats=3)
    assert [r.repeats for r in dataset] == [6, 15]
    assert "metadata asks for 0 repeats" in reasons(dataset)["b.png"]


def test_a_table_of_another_name_is_read_when_asked_for_and_the_usual_ones_are_not(folder):
    put(folder, metadata__csv="file,text\na.png,no\n", tags__tsv="image\ttext\na.png\tyes, this\n")
    assert captions(read_folder(folder, metadata=folder / "tags.tsv")) == [("yes, this",), ()]
    for name, message in (
        ("none.csv", "does not exist"),
        ("a.png", r"a\.png is not a \.json, \.jsonl, \.csv or \.tsv file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_folder(folder, metadata=folder / name)


def test_pairs_and_their_strength_can_be_told(folder):
    put(folder, metadata__jsonl=json.dumps({"file": "a.png", "pair": "one", "strength": -1}))
    assert [(r.pair, r.strength) for r in read_folder(folder)] == [("one", -1.0), (None, None)]


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), [
    ({"score": "high"}, "line 1: score is 'high'; it must be a finite number"),
    ({"score": float("nan")}, "score is nan; it must be a finite"),
    ({"score": True}, "score is True"),
    ({"score": 10**400}, "score is 1000"),
    ({"caption": 5}, "caption is 5; it must be text or a list of texts"),
    ({"captions": ["a", 1]}, "captions is"),
    ({"caption": "a\0b"}, "holds NUL characters"),
    ({"caption": "\ud800"}, "holds a broken character"),
    ({"tags": 1}, "tags is 1"),
    ({"repeats": 1.5}, "repeats is 1.5; it must be a whole number from 0 to 10000"),
    ({"repeats": -1}, "repeats is -1"),
    ({"repeats": "many"}, "repeats is 'many'"),
    ({"split": "left"}, "split is 'left'; it must be train, validation or test"),
    ({"mask": "../c.png"}, "leads out of"),
    ({"mask": "/etc/passwd"}, "leads out of"),
    ({"mask": 3}, "mask is 3; it must be the path of an image"),
    ({"mask": "none.png"}, "No such file"),
    ({"pair": 1}, "pair is 1; it must be text"),
    ({"strength": "inf"}, "strength is 'inf'"),
])  # fmt: skip
def test_a_row_with_a_wrong_value_takes_its_picture_out_and_says_why(folder, row, message):
    put(folder, metadata__jsonl=json.dumps({"file_name": "a.png", **row}))
    dataset = read_folder(folder)
    assert [pathlib.Path(r.path).name for r in dataset] == ["b.png"]
    assert message in reasons(dataset)["a.png"]
    with pytest.raises((ValueError, OSError), match=message.split()[0]):
        read_folder(folder, strict=True)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("metadata.json", "{", "is not JSON"),
    ("metadata.json", "5", "holds a number; it must be an object of images or a list of rows"),
    ("metadata.json", "[" * 100_000, "is not JSON"),
    ("metadata.json", '{"z": "text"}', "no single image here for 1 row of metadata.json: z"),
    ("metadata.json", '{"a": 5}', None),
    ("metadata.json", '[{"text": "x"}]', "entry 1 names no image; it needs file_name, file, image or path"),
    ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name"', "line 2 is not JSON"),
    ("metadata.jsonl", "[1]\n", "line 1 names no image"),
    ("metadata.jsonl", '{"file": "a.png"}\n{"file": "a.png"}\n{"file": "A"}', "1 row of metadata.jsonl for an image "
                                                                              "that had one; the first counts: a.png"),
    ("metadata.csv", "a.png,a ball\n", "has no column named file_name, file, image or path; its first line holds "
                                       "a.png, a ball"),
    ("metadata.csv", "file,text,text\n", "two columns named text"),
    ("metadata.csv", "file,text\na.png,one,two\n", None),
    ("metadata.csv", 'file,text\na.png,"one\nb.png,two\n', "cannot be read as CSV"),
    ("metadata.csv", "file,text\n,one\n", "line 2 names no image"),
    ("metadata.csv", "", "is empty. Write a first line such as file_name,text"),
])  # fmt: skip
def test_wrong_tables_are_reported_and_the_pictures_are_read(folder, name, content, message):
    (folder / name).write_text(content)
    dataset = read_folder(folder)
    if message is None:
        assert re.search(
            "entry 'a' is 5; it must be an object|line 2 has more cells than the header. Put texts",
            reasons(dataset)["a.png"],
        )
        assert len(dataset) == 1
    else:
        assert len(dataset) == 2 and any(message in reason for _, reason in dataset.skipped), dataset.skipped


def test_a_name_that_fits_several_pictures_is_reported(folder):
    image(folder, "a.jpg")
    put(folder, metadata__json={"a": "which?", "a.jpg": "this one"})
    dataset = read_folder(folder)
    assert captions(dataset) == [("this one",), (), ()]
    assert "a (several)" in reasons(dataset)["metadata.json"]


@pytest.mark.parametrize(("data", "message"), [
    ("beetle".encode("utf-16-le"), "holds NUL characters"),
    (b"\xff\xfea", "is not UTF-8"),
    (b"a" * (2**20 + 1), "is larger than 1 MiB. Is it the right file"),
])  # fmt: skip
def test_a_caption_that_is_no_text_takes_its_picture_out(folder, data, message):
    (folder / "a.txt").write_bytes(data)
    assert message in reasons(read_folder(folder))["a.png"]


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masks_come_from_beside_then_metadata_then_their_folder_then_alpha(tmp_path):
    folder, masks = tmp_path / "set", tmp_path / "masks"
    for name in ("a.png", "b.png", "c.png", "d.png"):
        image(folder, name, mode="RGBA")
        image(masks, name.replace("png", "bmp"), mode="L") if name != "d.png" else None
    image(folder, "a.mask.png", mode="L")
    image(folder / "other", "m.png", mode="L")
    put(folder, metadata__csv="file,mask\na.png,other/m.png\nb.png,other/m.png\n")
    dataset = read_folder(folder, masks=masks, alpha_mask=True)
    assert [str(pathlib.Path(r.mask).relative_to(tmp_path)) for r in dataset] == [
        "set/a.mask.png",
        "set/other/m.png",
        "masks/c.bmp",
        "set/d.png",
    ]


def test_masks_of_kohya_folders_may_lie_in_folders_of_the_same_names(tmp_path):
    for place in ("set/1_a", "set/2_b", "masks/1_a"):
        image(tmp_path / place, "x.png", mode="L")
    image(tmp_path / "masks", "x.png", mode="L", colour=9)
    dataset = read_folder(tmp_path / "set", masks=tmp_path / "masks")
    assert [pathlib.Path(r.mask).parent.name for r in dataset] == ["1_a", "masks"]


def test_masks_inside_the_folder_are_no_folder_to_complain_about(tmp_path):
    image(tmp_path, "a.png")
    image(tmp_path / "masks", "a.png", mode="L")
    assert read_folder(tmp_path, masks=tmp_path / "masks").skipped == ()


def test_masks_that_do_not_fit_are_said(tmp_path):
    folder, masks = tmp_path / "set", tmp_path / "masks"
    for name in ("a.png", "b.png"):
        image(folder, name)
    image(masks, "a.png", mode="L", size=(8, 8))
    image(masks, "z.png", mode="L")
    dataset = read_folder(folder, masks=masks)
    assert "is 8x8 px and its image 8x6 px. Make the mask as large" in reasons(dataset)["a.png"]
    assert "no image for 1 mask: z.png" in reasons(dataset)["masks"]
    (masks / "a.png").rename(masks / "y.png")
    with pytest.raises(
        ValueError, match=r"No mask in .*masks has the name of an image in .*set; it holds y\.png, z\.png"
    ):
        read_folder(folder, masks=masks)
    with pytest.raises(ValueError, match="is the folder of the images themselves"):
        read_folder(folder, masks=folder)


@pytest.mark.parametrize(
    "change",
    [
        "a.txt",
        "a.json",
        "metadata.csv",
        "tags.csv",
        "a.mask.png",
        "deep/er/m.png",
        "1_x/b.txt",
        "../masks/a.png",
        "../linked/c.txt",
    ],
)
def test_every_file_that_is_read_is_noticed_when_it_changes(tmp_path, change):
    folder, masks = tmp_path / "set", tmp_path / "masks"
    for place in (folder, masks, tmp_path / "linked"):
        image(place, "c.png")
    (folder / "1_linked").symlink_to(tmp_path / "linked")
    before = hash_folder_state(folder, masks)
    assert hash_folder_state(folder, masks) == before
    (folder / change).parent.mkdir(parents=True, exist_ok=True)
    (folder / change).write_text("x")
    assert hash_folder_state(folder, masks) != before


def test_a_link_that_leads_back_is_not_read_twice(folder):
    (folder / "10_again").symlink_to(folder)
    dataset = read_folder(folder)
    assert len(dataset) == 2 and "leads back" in reasons(dataset)["10_again"]
