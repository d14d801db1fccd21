"""The dataset nodes inside ComfyUI: from the graph's own images to a dataset, to a folder and back, in process and on
the server."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.nodes import paths
from trainyard.nodes.data import dataset as nodes
from trainyard.trainers.data.readers import read_folder

KIT = {"class_type": "KitImages", "inputs": {"seed": 3, "count": 3, "width": 48, "height": 32}}


def node(kind, **inputs):
    return {"class_type": f"Trainyard{kind}", "inputs": inputs}


def drawn(folder, names, size=(12, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(
            folder / name
        )
    return folder


def images(count=2, size=(8, 12), seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.float32) / 255)


def bare(cls):
    """The node as the executor makes it, without an id."""
    return cls.PREPARE_CLASS_CLONE(None)


def run(cls, **inputs):
    with torch.inference_mode():
        return bare(cls).execute(**inputs).result


def test_pictures_of_the_graph_become_a_dataset_and_come_back_bit_for_bit(folders):
    given = [images(2), images(1, (6, 6), 1)]
    (made,) = run(
        nodes.DatasetFromImages,
        images=given,
        captions=["both", "one"],
        masks=[torch.ones(1, 4, 6), torch.ones(1, 6, 6)],
    )
    assert [r.captions for r in made] == [("both",), ("both",), ("one",)]
    restored, captions, masks = run(nodes.DatasetToImages, dataset=made)
    assert all(torch.equal(a, b[None]) for a, b in zip(restored, [*given[0], *given[1]], strict=True))
    assert captions == ["both", "both", "one"] and [m.shape for m in masks] == [(1, 8, 12), (1, 8, 12), (1, 6, 6)]


def test_a_picture_is_written_once_whatever_comes_again(folders):
    for _ in range(2):
        (made,) = run(nodes.DatasetFromImages, images=[images(2), images(2)])
    files = sorted(paths.image_cache_folder().iterdir())
    assert len(files) == 2 and len(made) == 4 and {r.path for r in made} == set(map(str, files))
    assert {f.stem for f in files} == {r.id for r in made}, "each is called after its content"


@pytest.mark.parametrize(("inputs", "message"), [
    (dict(captions=["a", "b", "c"]), "There are 4 images in 2 batches, and 3 captions. Give none, one for all"),
    (dict(masks=[torch.zeros(64, 64)]), "Mask 1 is black everywhere .*Load Image gives a black mask"),
    (dict(masks=[torch.ones(5, 5)]), "Mask 1 is 5x5 px and its image 12x8 px"),
    (dict(images=[torch.full((1, 4, 4, 3), float("nan"))]), "image 1 holds NaN"),
    (dict(images=[torch.zeros(1, 4, 4, 2)]), "image 1 has the shape"),
    (dict(images=[]), "no images"),
])  # fmt: skip
def test_pictures_that_make_no_dataset_are_refused(folders, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(nodes.DatasetFromImages, **{"images": [images(2), images(2)], **inputs})


def test_a_saved_dataset_is_in_the_list_of_folders_and_loads_equal(folders):
    drawn(folders / "input" / "set", ["a.png", "b.png"])
    (folders / "input" / "set" / "a.txt").write_text("a ball")
    dataset, _ = run(nodes.LoadDataset, folder="input/set", repeats=2)
    for place, name, choice in (("output/datasets", "cats/one", "output/cats/one"), ("input", "saved", "input/saved")):
        _, text = run(nodes.SaveDataset, dataset=dataset, name=name, place=place)
        assert text.startswith("2 images saved to") and choice in paths.list_dataset_folders()
        back, about = run(nodes.LoadDataset, folder=choice, repeats=1)
        assert [(r.id, r.captions, r.repeats) for r in back] == [(r.id, r.captions, r.repeats) for r in dataset]
        assert about == "2 images, 1 with captions, 4 per epoch"


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/x", "a/../b", "a|b", ".hidden", "a/b/c/d", "a/ /b", "a\n", "a\tb/c",
                                  "nul", "a/COM1.x", "a./b", "あ" * 80])  # fmt: skip
def test_a_dataset_is_saved_below_its_root_or_not_at_all(folders, name):
    for place in paths.DATASET_SAVE_PLACES:
        if name == "/etc/x":
            assert paths.new_dataset_folder(place, name).is_relative_to(folders), "a leading slash means nothing"
        else:
            with pytest.raises(ValueError, match="The dataset's name is"):
                paths.new_dataset_folder(place, name)
    with pytest.raises(ValueError, match="place is 'models'"):
        paths.new_dataset_folder("models", "a")


def test_a_link_does_not_lead_a_dataset_out_of_its_root(folders, tmp_path_factory):
    (folders / "input" / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(ValueError, match="leads out of"):
        paths.new_dataset_folder("input", "link/x")


def test_masks_and_metadata_of_the_users_choice_are_read_and_noticed_when_they_change(folders):
    drawn(folders / "input" / "set", ["a.png"])
    drawn(folders / "input" / "masks", ["a.png"])
    (folders / "input" / "set" / "tags.csv").write_text('file,tags\na.png,"red, ball"\n')
    choice = dict(folder="input/set", masks="input/masks")
    before = nodes.LoadDataset.fingerprint_inputs(**choice)
    (record,), about = run(nodes.LoadDataset, repeats=1, metadata="tags.csv", **choice)
    assert record.tags == ("red", "ball") and record.mask.endswith("masks/a.png") and "1 with masks" in about
    (folders / "input" / "masks" / "b.png").write_bytes(b"")
    assert nodes.LoadDataset.fingerprint_inputs(**choice) != before
    for wrong in ("../masks/a.png", "none.csv"):
        with pytest.raises(ValueError, match="leads out of|There is no file 'none.csv'"):
            run(nodes.LoadDataset, folder="input/set", repeats=1, metadata=wrong)


def test_joining_says_what_comes_twice(folders):
    drawn(folders / "input" / "one", ["a.png", "b.png"])
    drawn(folders / "input" / "two", ["c.png"])
    one, two = (run(nodes.LoadDataset, folder=f"input/{name}", repeats=1)[0] for name in ("one", "two"))
    whole, about = run(nodes.JoinDatasets, dataset_1=one, dataset_3=two, dataset_2=None, weights="1, 0.5")
    assert [r.repeats for r in whole] == [2, 2, 1]
    assert "5 per epoch" in about and f"the same image twice: {one[0].path} and {two[0].path}" in about


def test_the_preview_shows_pages_and_says_when_there_is_none(folders):
    drawn(folders / "input" / "set", [f"{i}.png" for i in range(5)])
    dataset, _ = run(nodes.LoadDataset, folder="input/set", repeats=1)
    sheet, _ = run(nodes.PreviewDataset, dataset=dataset, page=2, per_page=4, cell=64)
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3
    with pytest.raises(ValueError, match="page is 3, and 5 images at 4 a page fill 2 pages"):
        run(nodes.PreviewDataset, dataset=dataset, page=3, per_page=4)
    (folders / "input" / "set" / "0.png").unlink()
    run(nodes.PreviewDataset, dataset=dataset, page=1, per_page=4, cell=64)


def test_a_graph_splits_shows_and_saves_generated_pictures(server):
    """lists in, lists out, on the real executor: images -> dataset -> two sets -> page and folder -> images"""
    done = server.run({
        "1": KIT,
        "2": node("DatasetFromImages", images=["1", 0], captions=["9", 0]),
        "3": node("SplitDataset", dataset=["2", 0], share=0.1, pictures=1, by="picture", seed=0, similar=True),
        "4": node("PreviewDataset", dataset=["3", 0], page=1, per_page=24, cell=64),
        "5": node("SaveDataset", dataset=["3", 0], name="drawn", place="output/datasets", layout="metadata.jsonl", image_format="keep",
                  quality=95, concept="images", overwrite=True),
        "6": node("DatasetToImages", dataset=["5", 0], first=1, most=10),
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["5", 1]}},
        "9": {"class_type": "PrimitiveString", "inputs": {"value": "noise"}},
    })  # fmt: skip
    assert done.ok, done.why
    saved = server.output("datasets", "drawn")
    rows = [json.loads(line) for line in (saved / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and {row["text"] for row in rows} == {"noise"}
    assert [r.size for r in read_folder(saved)] == [(48, 32)] * 2
    assert len(done.outputs["7"]["images"]) == 2 and len(done.outputs["4"]["images"]) == 1
    assert "2 images saved to" in done.outputs["8"]["text"][0]


def test_a_broken_caption_file_ends_in_words_and_not_in_a_traceback(server):
    folder = drawn(server.output("..", "input", "words"), ["a.png"])
    (folder / "a.txt").write_bytes(b"\xe4")
    done = server.run({"1": node("LoadDataset", folder="input/words", repeats=1, alpha_mask=False),
                       "2": node("PreviewDataset", dataset=["1", 0], page=1, per_page=4, cell=64)})  # fmt: skip
    assert not done.ok and "a.txt is not UTF-8" in done.why
