"""Two hundred folders in which things are wrong, drawn from a seed: each is read or refused in words, and no file in it
changes.

A word is a ValueError that names a file of the folder and says what to do, or an entry in Dataset.skipped. What the
reader lets through must open afterwards, and save and load again as it was.
"""

import csv
import hashlib
import io
import json
import os
import pathlib
import random
import struct
import sys
import zlib

import pytest
from PIL import Image
from trainyard.trainers.data.readers import hash_folder_state, read_folder
from trainyard.trainers.data.records import ImageDataset, open_image, open_mask
from trainyard.trainers.data.writers import SAVE_LAYOUTS, SaveSettings, save_dataset

CASES = 200
pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # Pillow warns of what it can still read; a user would see a line in the log


# -- odd and broken images -------------------------------------------------------------------------------------------


def image(rng, mode="RGB", size=None):
    size = size or (rng.randint(1, 24), rng.randint(1, 24))
    bands = len(Image.new(mode, (1, 1)).getbands()) * (4 if mode in ("I", "F") else 2 if mode.startswith("I;16") else 1)
    return Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * bands))


def saved(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_header(rng):
    """A PNG of a few bytes that promises 60000 x 60000 px."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def cut(rng):
    data = saved(image(rng, size=(40, 40)), rng.choice(("PNG", "JPEG", "WEBP", "GIF", "TIFF")))
    return data[: rng.randrange(1, len(data))]


def flipped_bytes(rng):
    data = bytearray(saved(image(rng, size=(30, 30)), rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))))
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def wrong_exif(rng):
    exif = rng.choice(
        (
            b"Exif\0\0",
            b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
            b"Exif\0\0" + rng.randbytes(60),
        )
    )
    return saved(image(rng), "JPEG", exif=exif)


def animation(rng):
    return saved(
        image(rng, size=(9, 9)), "GIF", save_all=True, append_images=[image(rng, size=(9, 9)) for _ in range(3)]
    )


def see_through_palette(rng):
    return saved(image(rng).convert("P"), "PNG", transparency=rng.randrange(256))


def of_mode(mode, kind="PNG"):
    return lambda rng: saved(image(rng, mode), kind)


PICTURES = [
    cut, cut, flipped_bytes, flipped_bytes, huge_header, wrong_exif, animation, see_through_palette,
    lambda rng: b"", lambda rng: b"GIF89a", lambda rng: "only a text".encode(), lambda rng: rng.randbytes(rng.randint(1, 400)),
    lambda rng: saved(image(rng), "PDF"), lambda rng: saved(image(rng), "ICO"), lambda rng: saved(image(rng), "PPM"),
    of_mode("I;16"), of_mode("I", "TIFF"), of_mode("F", "TIFF"), of_mode("CMYK", "JPEG"), of_mode("CMYK", "TIFF"), of_mode("LAB", "TIFF"),
    of_mode("LA"), of_mode("L"), of_mode("RGBA", "WEBP"), of_mode("YCbCr", "TIFF"), of_mode("RGB", "BMP"),
]  # fmt: skip


# -- odd and broken texts ----------------------------------------------------------------------------------------------


def caption(rng):
    return rng.choice([
        b"a ball", b"", b"\n \n", b"a\nb\n\nc", "ein Käfer".encode("latin-1"), "ein Käfer".encode("utf-16"), "Käfer".encode("utf-16-le"),
        b"nul\0nul", b"\xff\xfe", b"\xff\xfe\x41", b"\xef\xbb\xbf", rng.randbytes(50), b"word " * 300_000, "🙂，、".encode(), b"\xed\xa0\x80",
    ])  # fmt: skip


def value(rng, depth=0):
    """Anything that JSON can hold, and a few things that only Python reads."""
    simple = [
        None,
        True,
        -1,
        0,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "a ball",
        "x" * 5000,
        "a\0b",
        "\ud800",
        "../../etc/passwd",
        "val",
    ]
    if depth < 2 and rng.random() < 0.3:
        return (
            [value(rng, depth + 1) for _ in range(rng.randint(0, 3))] if rng.random() < 0.5 else row(rng, (), depth + 1)
        )
    return rng.choice(simple)


def row(rng, names, depth=0):
    keys = (
        "caption",
        "captions",
        "text",
        "tags",
        "score",
        "repeats",
        "split",
        "mask",
        "pair",
        "strength",
        "train_resolution",
    )
    facts = {key: value(rng, depth) for key in rng.sample(keys, rng.randint(0, 5))}
    facts |= rng.choice(({}, {"caption": "a ball"}, {"score": 3, "tags": "a, b"}))
    if names and rng.random() < 0.8:
        facts[rng.choice(("file_name", "file", "image", "path"))] = rng.choice(
            (*names, "gone.png", "C:\\x\\a.png", "../a.png", "", 3, None)
        )
    return facts


def as_json(thing):
    return json.dumps(thing).encode()


def broken(rng, data):
    if rng.random() < 0.6:
        return data
    return rng.choice(
        (
            data[: len(data) // 2],
            data + b"}",
            b"\xff\xfe" + data,
            data.replace(b'"', b""),
            b"[" * 50_000,
            b"9" * 5000,
            b"\0" * 10,
        )
    )


def table(rng, names):
    rows = [row(rng, names) for _ in range(rng.randint(0, 5))]
    kind = rng.choice(("json", "json", "jsonl", "csv"))
    if kind == "jsonl":
        return "metadata.jsonl", broken(rng, b"\n".join(map(as_json, rows)))
    if kind == "csv":
        return "metadata.csv", broken(rng, as_csv(rng, rows, names))
    keyed = {
        rng.choice((*names, "gone", "a/b", "", "\ud800")): value(rng) if rng.random() < 0.3 else row(rng, ())
        for _ in range(4)
    }
    return "metadata.json", broken(rng, as_json(rng.choice((keyed, keyed, rows, value(rng)))))


def as_csv(rng, rows, names):
    columns = rng.choice(
        (
            ["file", "text", "score"],
            ["file_name", "tags", "repeats", "mask"],
            ["text"],
            ["file", "file"],
            ["", "path", "split"],
        )
    )
    out = io.StringIO()
    writer = csv.writer(out, delimiter=rng.choice(",;\t"))
    writer.writerow(columns)
    for _ in rows:
        writer.writerow(
            [
                rng.choice((*names, "a ball", "nan", "-1", "1e400", "9" * 5000, "../x", ""))
                for _ in range(rng.randint(0, 5))
            ]
        )
    return out.getvalue().encode("utf-8", "surrogateescape")


# -- a folder in which things are wrong --------------------------------------------------------------------------------

NAMES = [
    "a",
    "b",
    "Ä ö",
    "🙂",
    "a.png",
    "con",
    "x.mask",
    "#%&{}",
    "name " * 20,
    "-rf",
    "'\"`$(x)",
    "1_2",
    "a\tb",
    "a\nb",
    "..a",
]
ENDINGS = [".png", ".jpg", ".PNG", ".webp", ".gif", ".tif", ".bmp"]
FOLDERS = ["1_cat", "0_cat", "10_", "99999999999999999999_huge", "007_x", "nothing", "2_ Ä", "masks", ".hidden", "3_\t"]


def make(root, rng):
    """One folder, with at least one thing wrong or odd in it; the options to read it with."""
    places = [root, *(root / name for name in rng.sample(FOLDERS, rng.randint(0, 3)))]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        names = [rng.choice(NAMES) + rng.choice(ENDINGS) for _ in range(rng.randint(0 if place != root else 1, 4))]
        for name in names:
            put(place / name, rng.choice(PICTURES)(rng) if rng.random() < 0.6 else saved(image(rng)))
            beside(place / name, rng)
        if rng.random() < 0.7:
            name, data = table(rng, names + [pathlib.Path(name).stem for name in names])
            put(place / name, data)
    odd(root, rng)
    masks = root / "masks" if rng.random() < (0.5 if (root / "masks").is_dir() else 0.03) else None
    return {"masks": masks, "alpha_mask": rng.random() < 0.5, "caption_lines": rng.choice(("one", "alternatives"))}


def beside(path, rng):
    """Sidecars and masks of one image."""
    if rng.random() < 0.5:
        put(path.with_suffix(rng.choice((".txt", ".caption"))), caption(rng))
    if rng.random() < 0.3:
        put(path.with_suffix(".json"), broken(rng, as_json(value(rng) if rng.random() < 0.3 else row(rng, ()))))
    if rng.random() < 0.3:
        put(
            path.with_name(path.stem + ".mask.png"),
            rng.choice((rng.choice(PICTURES)(rng), saved(image(rng, "L")))),
        )


def odd(root, rng):
    """Links in circles, folders with the names of files, and names that are no text."""
    links = {
        "loop": "loop",
        "gone.png": "nowhere.png",
        "5_round": ".",
        "a.png": "a.png",
        "circle.txt": "circle.txt",
        "6_up": "..",
    }
    for name, target in rng.sample(sorted(links.items()), rng.randint(0, 3)):
        if not os.path.lexists(root / name):
            (root / name).symlink_to(target)
    folder = root / rng.choice(("folder.png", "a.txt", "metadata.jsonl", "metadata.csv"))
    if rng.random() < 0.1 and not os.path.lexists(folder):
        folder.mkdir()
    if rng.random() < 0.2 and sys.platform == "linux":
        put(root / os.fsdecode(b"caf\xe9.png"), saved(image(rng)))


def put(path, data):
    if not os.path.lexists(path):
        path.write_bytes(data)


def tree(root):
    """Everything that lies there: bytes, links, names, and times."""
    found = {}
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = pathlib.Path(place, name)
            what = (
                os.readlink(path)
                if path.is_symlink()
                else hashlib.sha1(path.read_bytes()).hexdigest()
                if path.is_file()
                else ""
            )
            found[str(path)] = what, path.lstat().st_mtime_ns
    return found


def told(record):
    """What training sees of a record; several spaces are one, because lines of alternatives are."""
    mask = open_mask(record)
    words = tuple(" ".join(caption.split()) for caption in record.captions)
    return repr((words, record.tags, record.score, record.repeats, record.split, record.pair, record.strength, open_image(record).tobytes(),
                 mask and mask.tobytes()))  # fmt: skip


def accounted(root, dataset):
    """Every image directly inside is a record or skipped."""
    known = {r.path for r in dataset} | {path for path, _ in dataset.skipped}
    images = [
        p
        for p in root.iterdir()
        if p.suffix.lower() in ENDINGS and not p.name.lower().endswith(".mask.png") and not p.is_dir()
    ]
    return [p for p in images if not p.name.startswith(".") and str(p) not in known]


@pytest.mark.parametrize("seed", range(CASES))
def test_a_malformed_folder_is_read_or_refused_in_words_and_stays_as_it_was(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(
        os, "fsync", lambda _: None
    )  # what a power cut would leave is not asked here, and waiting for the disk is slow
    rng = random.Random(seed)
    root = tmp_path / "set"
    options = make(root, rng)
    before = tree(root)
    hash_folder_state(root)
    try:
        dataset = read_folder(root, **options)
    except ValueError as error:
        assert "set" in str(error) and str(error).endswith(".") and len(str(error)) > 40, f"says too little: {error}"
        dataset = ImageDataset(())
    else:
        assert accounted(root, dataset) == [], "left out in silence"
        assert not [
            reason for _, reason in dataset.skipped if len(reason) < 20 or "Errno" in reason or " at 0x" in reason
        ]
        assert ImageDataset.from_json(dataset.to_json()) == dataset
    seen = sorted(told(record) for record in dataset)
    if seen:
        settings = SaveSettings(layout=SAVE_LAYOUTS[seed % 3], image_format=("keep", "png")[seed % 2])
        saved_to = save_dataset(dataset, tmp_path / "saved", settings).folder
        back = read_folder(saved_to, caption_lines=options["caption_lines"])
        assert back.skipped == () and sorted(told(record) for record in back) == seen
    assert tree(root) == before


def test_the_malformed_folders_are_worth_their_name(tmp_path):
    """Of the 200, at least 20 are refused as a whole, at least 100 have something to report, at least 100 still give
    images."""
    refused = reported = usable = 0
    for seed in range(CASES):
        root = tmp_path / str(seed)
        options = make(root, random.Random(seed))
        try:
            dataset = read_folder(root, **options)
            usable, reported = usable + 1, reported + bool(dataset.skipped)
        except ValueError:
            refused += 1
    assert refused >= 20 and reported >= 100 and usable >= 100, (refused, reported, usable)
