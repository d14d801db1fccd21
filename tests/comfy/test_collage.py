"""The node in ComfyUI: images in a folder, collages in the graph."""

import numpy as np
import pytest
from PIL import Image
from trainyard.nodes.data.collage import BuildCollages
from trainyard.trainers.data.collage.plan import CollageSettings
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import open_mask


@pytest.fixture
def dataset(folders):
    place = folders / "input" / "set"
    place.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (128, 48 + 16 * (index % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")
        (place / f"{index}.txt").write_text(f"sks, number {index}", encoding="utf-8")
    return read_folder(place)


def node():
    return BuildCollages.PREPARE_CLASS_CLONE(None)  # what the executor calls: the class with its hidden inputs


def widgets(**changed):
    return CollageSettings(**dict(width=128, height=128, contrast="off") | changed).to_dict()


def test_a_dataset_becomes_collages_with_masks_captions_a_sheet_and_a_report(dataset, folders):
    out, sheet, report = node().execute(dataset, **widgets()).args
    collages = [record for record in out if record.bucket]
    assert {record.size for record in collages} == {(128, 128)} and len(out) == len(collages) + 6
    assert all(
        record.captions[0].startswith("sks, left: number ") and "; right: number " in record.captions[0]
        for record in collages
    )
    assert all(open_mask(record).size == (128, 128) for record in collages)
    assert sheet.ndim == 4 and sheet.shape[3] == 3 and 0 <= float(sheet.min()) < float(sheet.max()) <= 1
    assert report.splitlines()[0].endswith(
        "collages of 6 images, each used twice; 0 fit in no frame, 0 cannot be used."
    )
    assert all(str(folders / "datasets" / "trainyard_cache" / "collages") in record.path for record in collages)


def test_the_same_widgets_give_the_same_dataset_again(dataset):
    first, again = (node().execute(dataset, **widgets()).args[0] for _ in range(2))
    assert first == again and first.fingerprint() == again.fingerprint()


def test_a_value_from_a_link_is_checked_as_a_widget_is(dataset):
    with pytest.raises(ValueError, match="per_frame is 9; it must lie between 2 and 4 images"):
        node().execute(dataset, **CollageSettings().to_dict() | {"per_frame": 9})


def test_the_node_shows_at_most_ten_widgets():
    shown = [i.id for i in BuildCollages.define_schema().inputs if i.id not in ("dataset", "clip") and not i.advanced]
    assert len(shown) <= 10, shown


def test_a_cancelled_build_keeps_what_it_has_drawn(dataset, folders, monkeypatch):
    from trainyard.nodes.data import collage as room

    calls = []

    def cancel():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    monkeypatch.setattr(room.host.progress, "raise_if_interrupted", cancel)
    with pytest.raises(InterruptedError):
        node().execute(dataset, **widgets(trim=False))
    drawn = {file: file.stat().st_mtime_ns for file in (folders / "datasets").rglob("*.png")}
    assert len(drawn) == 4
    node().execute(dataset, **widgets(trim=False))
    assert {file: file.stat().st_mtime_ns for file in drawn} == drawn


def test_the_real_server_runs_it_from_folder_to_picture(server):
    place = server.base / "input" / "collage_set"
    place.mkdir(parents=True)
    for index in range(4):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (128, 64, 3), dtype=np.uint8)).save(
            place / f"{index}.png"
        )
    graph = {
        "load": {
            "class_type": "TrainyardLoadDataset",
            "inputs": {"folder": "input/collage_set", "repeats": 1, "alpha_mask": False},
        },
        "build": {
            "class_type": "TrainyardBuildCollages",
            "inputs": {"dataset": ["load", 0], **widgets(contrast="warn")},
        },
        "save": {"class_type": "SaveImage", "inputs": {"images": ["build", 1], "filename_prefix": "sheet"}},
    }
    run = server.run(graph)
    assert run.ok, run.why
    assert server.output(run.outputs["save"]["images"][0]["filename"]).is_file()
