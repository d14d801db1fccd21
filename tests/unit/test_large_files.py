"""Files of a size that nobody meant: refused, read in turn, or read in time that grows as they do."""

import json
import re
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.trainers import files
from trainyard.trainers.data import contact_sheet, image_files, image_scan, metadata
from trainyard.trainers.data.captions import manual_edits
from trainyard.trainers.data.contact_sheet import make_thumbnail
from trainyard.trainers.data.image_scan import ScanOptions, scan_images
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageRecord, open_image, scale_crop, sha1_hex
from trainyard.trainers.data.similarity.clusters import relabel_by_size
from trainyard.trainers.data.tables import read_text_table
from trainyard.trainers.files import LoraFile, as_lora_file, read_lora, rescale_lora, write_safetensors
from trainyard.trainers.scores.pretraining import index_class_labels


def png_with_notes(file, count, kind=b"zTXt", head=b"note\0\0", size=2**20 - 1, pack=zlib.compress):
    """A PNG with this many texts, which hold 1 MiB each when they are unpacked."""
    Image.new("RGB", (4, 3), (9, 8, 7)).save(file)
    packed = head + pack(bytes(size))
    chunk = struct.pack(">I", len(packed)) + kind + packed + struct.pack(">I", zlib.crc32(kind + packed))
    blob = file.read_bytes()
    file.write_bytes(blob[:33] + chunk * count + blob[33:])  # after the signature and IHDR


def test_a_png_with_thousands_of_notes_is_refused_before_they_are_read(tmp_path):
    png_with_notes(tmp_path / "bomb.png", image_files.MAX_PNG_NOTES)
    png_with_notes(tmp_path / "fine.png", 3)
    start = time.perf_counter()
    data = read_folder(tmp_path)
    assert time.perf_counter() - start < 5
    assert [record.path for record in data] == [str(tmp_path / "fine.png")]
    assert "holds more than 2000 texts or other notes. Save it anew without metadata" in data.skipped[0][1]


@pytest.mark.parametrize(
    ("kind", "head", "count", "size", "told"),
    [
        (b"zTXt", b"note\0\0", 1, 2**24, r"its text \(zTXt, 16\d+ bytes\) unpacks to more than 1 MiB"),
        (b"iTXt", b"note\0\1\0en\0note\0", 1, 2**24, r"its text \(iTXt, 16\d+ bytes\) unpacks to more than 1 MiB"),
        (b"iCCP", b"name\0\0", 1, 2**24, r"its colour profile \(iCCP, 16\d+ bytes\) unpacks to more than 1 MiB"),
        (b"zTXt", b"note\0\0", 70, 2**20 - 1, r"its texts hold more than 64 MiB"),
        (b"tEXt", b"note\0", 2, 2**25, r"its texts hold more than 64 MiB"),
    ],
)
def test_notes_that_unpack_to_more_than_is_read_are_refused_in_words(tmp_path, kind, head, count, size, told):
    png_with_notes(tmp_path / "bomb.png", count, kind, head, size, bytes if kind == b"tEXt" else zlib.compress)
    png_with_notes(tmp_path / "fine.png", 1, kind, head, 2**19, bytes if kind == b"tEXt" else zlib.compress)
    data = read_folder(tmp_path)
    assert [record.path for record in data] == [str(tmp_path / "fine.png")]
    assert re.search(f"{told}. Save it anew without metadata", data.skipped[0][1]), data.skipped


def test_a_text_as_large_as_a_workflow_is_read(tmp_path):
    png_with_notes(tmp_path / "fine.png", 1, b"tEXt", b"workflow\0", 2**22, bytes)
    assert len(read_folder(tmp_path)) == 1


@pytest.mark.parametrize(
    "damage", [lambda blob: blob[:40], lambda blob: blob[:8], lambda blob: blob[:30] + b"\xff" * 9]
)
def test_a_cut_png_is_reported_as_broken(tmp_path, damage):
    png_with_notes(tmp_path / "a.png", 1)
    png_with_notes(tmp_path / "b.png", 1)
    (tmp_path / "a.png").write_bytes(damage((tmp_path / "a.png").read_bytes()))
    data = read_folder(tmp_path)
    assert len(data) == 1 and "cannot be decoded as an image" in data.skipped[0][1]


# -- large images ------------------------------------------------------------------------------------------------------


@pytest.fixture
def eight(tmp_path):
    for number in range(8):
        Image.new("RGB", (20, 10), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return read_folder(tmp_path)


def count_at_once(monkeypatch, module):
    """The most images that are opened at the same time, in a list of one."""
    lock, now, most = threading.Lock(), [0], [0]

    def slowly(*given):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return open_image(*given)

    monkeypatch.setattr(module, "open_image", slowly)
    return most


def scan_all(records):
    return scan_images(records, lambda record, image, mask: image.size, ScanOptions(threads=4))


@pytest.mark.parametrize("large_pixels, most", [(199, 1), (200, 2)], ids=["large", "small"])
@pytest.mark.parametrize("way", ["cards", "scan"])
def test_large_images_are_decoded_one_at_a_time_and_small_ones_together(
    eight, tmp_path, monkeypatch, way, large_pixels, most
):
    """20 x 10 px"""
    monkeypatch.setattr(image_files, "LARGE_PIXELS", large_pixels)
    seen = count_at_once(monkeypatch, contact_sheet if way == "cards" else image_scan)
    if way == "cards":
        cards = manual_edits.build_caption_cards(eight, tmp_path / "thumbs")
        assert all(card.thumb for card in cards)
    else:
        assert scan_all(eight)[0] == [(20, 10)] * 8
    assert seen[0] == 1 if most == 1 else seen[0] >= most, seen


def test_a_jpeg_is_decoded_small_for_a_thumbnail_and_looks_the_same(tmp_path):
    """Four colours in the quarters; the crop shows the lower right one with a rim of the others."""
    page = np.zeros((1200, 1600, 3), np.uint8)
    page[:600, :800], page[:600, 800:], page[600:, :800], page[600:, 800:] = 30, 90, 160, (240, 20, 60)
    Image.fromarray(page).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(page).save(tmp_path / "b.png")
    jpeg, png = read_folder(tmp_path)
    assert open_image(jpeg, scale=0.2).size == (400, 300) and open_image(png, scale=0.2).size == (1600, 1200)
    assert open_image(jpeg).size == (1600, 1200)
    for crop in (None, (700, 500, 1600, 1200)):
        small, full = (
            np.asarray(make_thumbnail(ImageRecord(**{**vars(record), "crop": crop}), 90), np.float32)
            for record in (jpeg, png)
        )
        assert small.shape == full.shape and np.abs(small - full).mean() < 3, (small.shape, full.shape)


def test_a_large_webp_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    for name, width in (("a", 1200), ("b", 1000)):
        Image.new("RGB", (width, 1000)).save(tmp_path / f"{name}.webp", quality=10)
    Image.new("RGB", (1200, 1000)).save(tmp_path / "c.png")
    monkeypatch.setattr(image_files, "MAX_WEBP_PIXELS", 1_000_000)
    data = read_folder(tmp_path)
    assert [record.path for record in data] == [str(tmp_path / "b.webp"), str(tmp_path / "c.png")]
    assert "it has 1.2 megapixels, and a WebP is read up to 1 megapixels, for it takes" in data.skipped[0][1]
    large = tmp_path / "a.webp"
    card = manual_edits.build_caption_card(
        ImageRecord(sha1_hex(large.read_bytes()), str(large), (1200, 1000)), tmp_path
    )
    assert card.thumb is None and "it has 1.2 megapixels" in card.why


def test_a_crop_of_a_reduced_image_is_never_empty():
    assert scale_crop((0, 0, 3, 1600), (1600, 1600), (200, 200)) == (0, 0, 1, 200)
    assert scale_crop((1599, 800, 1600, 801), (1600, 1600), (200, 200)) == (199, 100, 200, 101)
    assert scale_crop((1, 2, 3, 4), (9, 9), (9, 9)) == (1, 2, 3, 4)


# -- many entries ------------------------------------------------------------------------------------------------------


def test_a_lora_of_more_tensors_than_any_is_refused(tmp_path, monkeypatch):
    tensors = {f"lora_unet_{number}.alpha": torch.ones(()) for number in range(4)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert len(read_lora(tmp_path / "a.safetensors")) == 4
    monkeypatch.setattr(files, "MAX_LORA_TENSORS", 3)
    with pytest.raises(ValueError, match="a.safetensors holds 4 tensors, and at most 3 are read. Is it the right file"):
        read_lora(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="lora holds 4 tensors, and at most 3 are read"):
        as_lora_file(tensors)
    assert len(as_lora_file(LoraFile(tensors))) == 4, "what was trained here can be saved"


TABLES = {
    "metadata.csv": ("file_name,text\n", "a.png,x\n"),
    "metadata.jsonl": ("", '{"file_name": "a.png", "text": "x"}\n'),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_a_table_of_more_rows_than_any_is_refused_in_words(tmp_path, monkeypatch, name):
    monkeypatch.setattr(metadata, "MAX_TABLE_ROWS", 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    first, row = TABLES[name]
    (tmp_path / name).write_text(first + 20 * row)
    with pytest.raises(ValueError, match=rf"{name} has 2[01] rows, and at most 10 are read. Write a table that holds"):
        read_folder(tmp_path, metadata=tmp_path / name)
    (told,) = read_folder(tmp_path).skipped
    assert f"{name} has 2" in told[1] and "at most 10 are read" in told[1]


def test_a_json_table_of_more_entries_than_any_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "MAX_TABLE_ROWS", 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.json").write_text("{" + ",".join(f'"{number}.png": "x"' for number in range(11)) + "}")
    assert "has 11 rows, and at most 10 are read" in read_folder(tmp_path).skipped[0][1]


def test_a_json_table_too_large_to_be_parsed_is_refused_in_words(tmp_path, monkeypatch):
    """A metadata.jsonl of the same size is read: its rows are counted before they are parsed."""
    monkeypatch.setattr(metadata, "MAX_JSON_TABLE_BYTES", metadata.BYTES_PER_MIB)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = json.dumps({"file_name": "a.png", "text": "x", "note": "y" * metadata.BYTES_PER_MIB})
    (tmp_path / "metadata.json").write_text(f"[{row}]")
    (told,) = read_folder(tmp_path).skipped
    assert "metadata.json is larger than 1 MiB. Write it as metadata.jsonl, a row in each line" in told[1]
    (tmp_path / "metadata.json").rename(tmp_path / "metadata.jsonl")
    (tmp_path / "metadata.jsonl").write_text(row)
    assert read_folder(tmp_path)[0].captions == ("x",)


@pytest.mark.parametrize("row", ["no JSON\n", '{"text": "names no image"}\n'])
def test_thousands_of_faulty_rows_are_told_in_a_few_lines(tmp_path, row):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(5000 * row)
    told = [reason for _, reason in read_folder(tmp_path).skipped]
    assert len(told) == 21 and told[-1] == "4980 more rows of metadata.jsonl have such faults"


def rescale_many():
    names = [f"lora_unet_{number}" for number in range(20_000)]
    one = torch.ones(1)
    lora = LoraFile({f"{name}.{part}": one for name in names for part in ("lora_up.weight", "alpha")})
    done = rescale_lora(lora, 2.0, {})
    assert done["lora_unet_7.alpha"] == 2 and done["lora_unet_7.lora_up.weight"] == 1


def relabel_many():
    assert relabel_by_size(torch.arange(60_000).flip(0)) == list(range(60_000))


def index_many_labels():
    labels = [f"{number:05}" for number in range(60_000)]
    assert index_class_labels(labels) == (labels, list(range(60_000)))


def read_many_columns():
    assert len(read_text_table(",".join(f"c{number}" for number in range(100_000)) + "\n1,2\n").columns) == 100_000


@pytest.mark.parametrize("work", [rescale_many, relabel_many, index_many_labels, read_many_columns])
def test_time_grows_with_the_entries_and_not_with_their_square(work):
    """fractions of a second; half a minute and more where each entry looks at all others"""
    start = time.process_time()
    work()
    assert time.process_time() - start < 8


def test_an_alpha_counts_for_its_own_layer_and_those_below_it():
    lora = LoraFile({"a.alpha": torch.ones(1), "a.lora_up.weight": torch.ones(1), "ab.lora_up.weight": torch.ones(1)})
    done = rescale_lora(lora, 3.0, {})
    assert [float(done[key]) for key in ("a.alpha", "a.lora_up.weight", "ab.lora_up.weight")] == [3, 1, 3]
