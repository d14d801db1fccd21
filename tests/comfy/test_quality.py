"""Check and Deduplicate as nodes of ComfyUI, with a real (tiny) CLIP vision encoder, and on the real server."""

import json

import comfy.clip_vision
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from trainyard.nodes.data import image_features
from trainyard.nodes.data.quality import CheckDataset, DeduplicateDataset
from trainyard.tests.drawn import jpeg, softened, texture
from trainyard.trainers.data.quality.checks import QualitySettings
from trainyard.trainers.data.quality.duplicates import DuplicateSettings
from trainyard.trainers.data.readers import read_folder

TINY = dict(model_type="clip_vision_model", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, hidden_act="quick_gelu",
            num_channels=3, patch_size=16, image_size=64, projection_dim=24)  # fmt: skip


def encoder(**changed):
    """ComfyUI's own class with weights from a seed."""
    with torch.inference_mode():
        made = comfy.clip_vision.ClipVisionModel({**TINY, **changed})
        rng = torch.Generator().manual_seed(0)
        for name, weight in made.model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng) * 0.1 + ("norm" in name and name.endswith("weight")))
    return made


def node(kind):
    return kind.PREPARE_CLASS_CLONE(None)  # what the executor calls: the class with its hidden inputs


def drawn_folder(place):
    """a good, b blurred, c a copy of a, d too small; a caption beside each but b."""
    place.mkdir(parents=True)
    images = dict(
        a=texture((320, 320), 0),
        b=softened(texture((320, 320), 1), 3),
        c=jpeg(texture((320, 320), 0), 60),
        d=texture((64, 64), 2),
    )
    for name, image in images.items():
        image.save(place / f"{name}.png")
        if name != "b":
            (place / f"{name}.txt").write_text(f"sks number {name}", encoding="utf-8")


@pytest.fixture
def dataset(folders):
    drawn_folder(folders / "input" / "set")
    return read_folder(folders / "input" / "set")


SMALL = dict(resolution=256, reject_below=128, warn_below=256, contrast=False)


def names(dataset):
    return "".join(record.path.rpartition("/")[2][0] for record in dataset)


def test_check_gives_the_dataset_a_sheet_a_report_and_figures(dataset):
    out, sheet, report, figures = node(CheckDataset).execute(dataset, **QualitySettings(**SMALL).to_dict()).args
    assert names(out) == "abc"
    assert [flag.split(" (")[0] for record in out for flag in record.flags] == [
        "blur",
        "enlarged",
        "caption",
        "duplicate",
    ]
    assert "64 px < 128" in dict(out.skipped)[dataset[3].path]
    assert sheet.ndim == 4 and sheet.shape[3] == 3 and 0 <= float(sheet.min()) < float(sheet.max()) <= 1
    assert report.startswith("4 images checked: 1 rejected (dropped), 2 with warnings (flagged), 1 good")
    assert len(json.loads(figures)["pictures"]) == 4
    assert names(dataset) == "abcd" and not any(record.flags for record in dataset)


def test_deduplicate_keeps_one_of_each(dataset):
    out, sheet, report = node(DeduplicateDataset).execute(dataset, **DuplicateSettings().to_dict()).args
    assert sorted(names(out)) == ["a", "b", "d"]
    assert report.startswith("1 copies of 1 images found; 3 images go on.")
    assert sheet.shape[2] > 200


def test_without_copies_there_is_an_empty_page(dataset):
    _, sheet, report = node(DeduplicateDataset).execute(dataset[1:2], **DuplicateSettings().to_dict()).args
    assert sheet.shape == (1, 64, 64, 3)
    assert report.startswith("0 copies")


def test_a_clip_counts_tokens_without_loading_weights(dataset):
    class Clip:
        def tokenize(self, text, return_word_ids=False):
            """77-token chunks with a begin and an end, as ComfyUI makes them."""
            words = list(enumerate(text.split() * 40, 1))
            chunks = [words[start : start + 75] for start in range(0, len(words), 75)] or [[]]
            return {"l": [[(0, 1.0, 0), *((7, 1.0, i) for i, _ in chunk), (0, 1.0, 0)] for chunk in chunks]}

    out = node(CheckDataset).execute(dataset, clip=Clip(), **QualitySettings(**SMALL, trigger="sks").to_dict()).args[0]
    assert "tokens (CLIP-L 120 > 75: 2 chunks)" in out[0].flags


def test_a_cancelled_check_ends_with_the_interrupt(dataset, monkeypatch):
    from trainyard.nodes.data import quality

    def cancel():
        raise InterruptedError

    monkeypatch.setattr(quality.host.progress, "raise_if_interrupted", cancel)
    with pytest.raises(InterruptedError):
        node(CheckDataset).execute(dataset, **QualitySettings(**SMALL).to_dict())


# -- what a vision model sees ------------------------------------------------------------------------------------------


def images():
    return [texture((96, 64), seed, slope=1.3) for seed in range(5)] + [texture((50, 90), 9)]


@pytest.mark.parametrize(
    "kind", [{}, {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}], ids=["clip", "siglip"]
)
def test_features_are_one_unit_row_per_picture_whatever_their_sizes_and_batches(kind, monkeypatch):
    made = encoder(**kind)
    with torch.inference_mode():
        rows = image_features.encode_image_features(made, images())
        monkeypatch.setattr(image_features, "VISION_BATCH_SIZE", 2)
        again = image_features.encode_image_features(made, images())
    assert rows.shape[0] == 6 and rows.ndim == 2
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    assert rows == pytest.approx(again, abs=1e-5)


def test_features_are_those_of_the_hosts_own_node():
    """CLIPVisionEncode with crop 'center', for an image of the encoder's own size"""
    made, image = encoder(), texture((64, 64), 3)
    with torch.inference_mode():
        ours = image_features.encode_image_features(made, [image])[0]
        hosts = made.encode_image(torch.from_numpy(np.asarray(image).copy())[None].float() / 255)["image_embeds"][0]
    assert ours == pytest.approx((hosts / hosts.norm()).numpy(), abs=1e-5)


def test_a_broken_encoder_is_named_instead_of_giving_nonsense():
    made = encoder()
    with torch.inference_mode():
        made.model.visual_projection.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="gives NaN features"):
            image_features.encode_image_features(made, images()[:1])


def test_an_interrupt_is_heard_between_batches():
    def cancel():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        image_features.encode_image_features(encoder(), images(), check_interrupt=cancel)


def test_the_check_with_a_vision_model_says_so(dataset):
    with torch.inference_mode():
        out = node(CheckDataset).execute(dataset, clip_vision=encoder(), **QualitySettings(**SMALL).to_dict())
    assert "from features of the vision model" in out.args[2]


# -- the real server ---------------------------------------------------------------------------------------------------


def test_the_server_checks_and_deduplicates_a_folder(server):
    place = server.base / "input" / "to_check"
    drawn_folder(place)
    ImageOps.mirror(Image.open(place / "a.png")).save(place / "e.png")
    widgets = server.object_info()["TrainyardLoadDataset"]["input"]["required"]
    load = {
        name: about[1]["default"] for name, about in widgets.items() if len(about) > 1 and "default" in about[1]
    } | {"folder": "input/to_check"}
    run = server.run({
        "1": {"class_type": "TrainyardLoadDataset", "inputs": load},
        "2": {"class_type": "TrainyardDeduplicateDataset", "inputs": {"dataset": ["1", 0], **DuplicateSettings().to_dict()}},
        "3": {"class_type": "TrainyardCheckDataset", "inputs": {"dataset": ["2", 0], **QualitySettings(**SMALL).to_dict()}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 2]}},
    })  # fmt: skip
    assert run.ok, run.why
    assert run.outputs["4"]["text"][0].startswith(
        "3 images checked: 1 rejected (dropped), 1 with warnings (flagged), 1 good"
    )
    assert run.outputs["2"]["images"] and run.outputs["3"]["images"]
