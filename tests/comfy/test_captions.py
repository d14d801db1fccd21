"""The caption nodes as ComfyUI runs them: captions, tokens, thumbnails, files."""

import io
import json
import urllib.error

import pytest
from PIL import Image
from trainyard.nodes.host.encoders import TokenCounter

NAMES = "abc"


@pytest.fixture
def folder(server, request):
    """A folder in the server's input of its own for each test, with three images."""
    place = server.base / "input" / request.node.originalname
    place.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (64, 48), (40 * number, 9, len(place.name))).save(place / f"{name}.png")
    (place / "a.txt").write_text("a red ball")
    (place / "b.txt").write_text("a blue ball, watermark")
    return place


def prompt(folder, node, **inputs):
    return {
        "1": {
            "class_type": "TrainyardLoadDataset",
            "inputs": {"folder": f"input/{folder.name}", "repeats": 1, "alpha_mask": False},
        },
        "2": {"class_type": node, "inputs": {"dataset": ["1", 0], **inputs}},
        "3": {"class_type": "TrainyardCaptionReport", "inputs": {"dataset": ["2", 0], "trigger": "", "tags": 30}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
    }


def ran(server, *args, **inputs):
    run = server.run(prompt(*args, **inputs))
    assert run.ok, run.why
    return run


def tags(run):
    return json.loads(run.outputs["4"]["text"][0])["tags"]


def cards(run):
    return run.outputs["2"]["trainyard_captions"]


def test_rules_change_captions_and_the_node_shows_how(server, folder):
    run = ran(server, folder, "TrainyardEditCaptions", edits="remove: watermark\ntrigger: sks", seed=0, show=1)
    assert tags(run) == {"sks": 3, "a blue ball": 1, "a red ball": 1}
    assert run.outputs["2"]["text"] == [
        "3 of 3 images changed\n\na.png\n- a red ball\n+ sks, a red ball\n\n... and 2 more"
    ]
    assert (folder / "a.txt").read_text() == "a red ball"


def test_a_wrong_rule_stops_the_run_with_its_line(server, folder):
    run = server.run(prompt(folder, "TrainyardEditCaptions", edits="lower\ntriger: sks", seed=0, show=1))
    assert "Line 2 of the edits, 'triger: sks': there is no operation 'triger'. Did you mean 'trigger'?" in run.why


def test_truncate_and_the_report_count_the_tokens_of_the_clip(server, folder):
    (folder / "a.txt").write_text("red " * 100)
    graph = prompt(folder, "TrainyardEditCaptions", edits="truncate: 75", seed=0, show=1, clip=["5", 1])
    graph["5"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": server.install("sd15")}}
    graph["3"]["inputs"]["clip"] = ["5", 1]
    run = server.run(graph)
    assert run.ok, run.why
    (counts,) = json.loads(run.outputs["4"]["text"][0])["tokens"].values()
    assert (counts["most"], counts["limit"], counts["chunks"], counts["over"]) == (75, 75, 1, [])


def test_the_grid_gets_names_captions_and_thumbnails_that_the_page_can_fetch(server, folder):
    shown = cards(ran(server, folder, "TrainyardEditCaptionsByHand", edits="", save_to_files=False))
    assert [(card["name"], card["captions"]) for card in shown] == [
        ("a.png", ["a red ball"]),
        ("b.png", ["a blue ball, watermark"]),
        ("c.png", []),
    ]
    for card in shown:
        thumb = card["thumb"]
        image = server.get(f"/view?filename={thumb['filename']}&subfolder={thumb['subfolder']}&type={thumb['type']}")
        assert image[:4] == b"RIFF" and image[8:12] == b"WEBP"


def test_thumbnails_after_the_first_page_are_made_when_the_page_shows_them(server):
    """101 images: 100 thumbnails are made at Run"""
    many = server.base / "input" / "grid-of-many"
    many.mkdir(exist_ok=True)
    for number in range(101):
        Image.new("RGB", (9, 6), (number, 0, 0)).save(many / f"{number}.png")
    shown = cards(ran(server, many, "TrainyardEditCaptionsByHand", edits="", save_to_files=False))
    assert ["type" in card["thumb"] for card in shown] == [True] * 100 + [False]
    made = server.base / "temp" / "trainyard_thumbs" / shown[-1]["thumb"]["filename"]
    assert not made.exists()
    with Image.open(io.BytesIO(server.get(f"/trainyard/thumbnails/{made.name}"))) as image:
        assert image.format == "WEBP" and image.size == (9, 6)
    assert made.exists()
    for name in ("nothing.webp", "..%2f..%2finput%2fgrid-of-many%2f0.png"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.get(f"/trainyard/thumbnails/{name}")


def test_edits_from_the_grid_reach_the_next_node_and_files_only_when_asked(server, folder):
    first = cards(ran(server, folder, "TrainyardEditCaptionsByHand", edits="", save_to_files=False))
    edits = json.dumps({first[0]["id"]: "a green ball", first[2]["id"]: "new", "f" * 40: "gone"})
    run = ran(server, folder, "TrainyardEditCaptionsByHand", edits=edits, save_to_files=False)
    assert tags(run) == {"a blue ball": 1, "a green ball": 1, "new": 1, "watermark": 1}
    assert cards(run)[0]["captions"] == ["a red ball"], "the grid knows what it edits"
    assert run.outputs["2"]["trainyard_about"][0].startswith(
        "2 of 3 captions edited by hand\n1 edits are of images that are not in this dataset"
    )
    assert not (folder / "c.txt").exists()

    run = ran(server, folder, "TrainyardEditCaptionsByHand", edits=edits, save_to_files=True)
    assert "2 caption files written" in run.outputs["2"]["trainyard_about"][0]
    assert [(folder / f"{name}.txt").read_text() for name in NAMES] == [
        "a green ball\n",
        "a blue ball, watermark",
        "new\n",
    ]
    (kept,) = (folder / ".trainyard-replaced").iterdir()
    assert kept.read_text() == "a red ball"
    again = ran(server, folder, "TrainyardEditCaptionsByHand", edits=edits, save_to_files=True)
    assert tags(again) == tags(run)
    assert [file.name for file in (folder / ".trainyard-replaced").iterdir()] == [kept.name], "nothing is written twice"


def test_edits_that_are_no_json_stop_the_run_with_the_remedy(server, folder):
    run = server.run(prompt(folder, "TrainyardEditCaptionsByHand", edits="{", save_to_files=False))
    assert "The edits are not JSON" in run.why and "Clear the field" in run.why


# -- counting tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(comfy):
    import comfy.sd
    import torch
    from trainyard.tests.comfy import tiny

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd15")))[1]


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("a red ball", 3), ("red, ball!", 4), ("(red:1.2) ball", 8), ("red " * 75, 75), ("red " * 180, 180)],
)
def test_tokens_are_counted_without_begin_end_and_padding(clip, text, count):
    assert TokenCounter(clip)(text) == {"l": count}


def test_a_template_around_the_text_is_not_counted():
    class Templated:
        """As the tokenizers of language models: words of a template around the text, no padding."""

        def tokenize(self, text, return_word_ids=False):
            return {"qwen": [[(0, 1.0, i + 1) for i, _ in enumerate(f"describe this : {text} now".split())]]}

    assert TokenCounter(Templated())("a red ball") == {"qwen": 3}
