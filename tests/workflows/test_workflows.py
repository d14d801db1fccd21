"""The files that a user opens: complete, tidy, and they run."""

import json
import pathlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from trainyard.tests.toy import shapes
from trainyard.tests.videos import write_video
from trainyard.tests.workflows.convert import DRAWN, to_api
from trainyard.trainers.scores.files import write_score_model
from trainyard.trainers.scores.networks import ScoreModelInfo, ScorerEnsemble, build_scorer

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
TITLE = 30  # px above a node's position
SMALL_BY_NAME = {"steps": 2, "resolution": 64, "calibrate": "off"}  # of nodes that are not in SMALL
SMALL = {  # what makes a workflow run in seconds on a small checkpoint and drawn images of 64 px
    "TrainyardEncodeDataset": {"resolution": 64, "step": 8},
    "TrainyardBucketDataset": {"resolution": 64, "step": 8},
    "TrainyardCheckDataset": {"resolution": 64, "reject_below": 16, "warn_below": 32},
    "TrainyardCaptionImages": {"backend": "file name"},
    "TrainyardBuildCollages": {"width": 128, "height": 64, "frames": ""},
    "TrainyardTrainLora": {"steps": 3, "rank": 4, "learning_rate": 1e-2},
    "TrainyardTrainImageSlider": {"steps": 2, "calibrate": "off"},
    "TrainyardTrainDifference": {"steps": 2, "calibrate": "off"},
    "TrainyardTrainLeco": {"steps": 2, "resolution": 64, "calibrate": "off"},
    "TrainyardTrainTextSlider": {"steps": 2, "resolution": 64, "calibrate": "off"},
    "TrainyardPoints": {"sampling_steps": 3, "ways": 1},
    "TrainyardStrengthSweep": {"resolution": 64, "steps": 2, "guidance": 1.0, "pictures": 1},
    "TrainyardSplitDataset": {"pictures": 1, "similar": False},
    "TrainyardValidation": {
        "every": 2,
        "images": 1,
        "preview_every": 2,
        "sampling_steps": 2,
        "width": 64,
        "height": 64,
    },
    "TrainyardTrainScoreModel": {"steps": 2, "members": 2, "width": 8, "depth": 1},
    "TrainyardSaveScoreModel": {"untrained": True},  # two steps teach nothing, and the node would not keep such a score
    "TrainyardPretrainScoreBackbone": {"steps": 2, "size": 64, "batch": 4, "width": 8, "depth": 1, "crops": 2},
    "TrainyardLecoScoreSettings": {"sampling_steps": 3, "ways": 1, "watch_every": 2},
    "TrainyardTransferLora": {"steps": 3, "learning_rate": 1e-2, "resolution": 64, "trajectories": 2, "few_steps": 2},
    "TrainyardTrainLecoScore": {"steps": 2, "resolution": 64, "calibrate": "off"},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2, "cfg": 1.0},
    "KSamplerAdvanced": {"steps": 2, "cfg": 1.0},
    "EmptyHunyuanLatentVideo": {"width": 64, "height": 64, "length": 5},
    "TrainyardCutClips": {"frames": 5, "fps": 8.0},
}
SLIDER = {"TrainyardSaveLora", "TrainyardLossPlot", "TrainyardStrengthSweep", "SaveImage", "PreviewAny"}
MADE = {  # nodes that must have shown something; of workflows that are not named: Train nodes and those of SLIDER
    "01_first_lora": {"TrainyardTrainLora", "TrainyardSaveLora", "TrainyardLossPlot", "SaveImage"},
    "01b_lora_with_validation": {"TrainyardTrainLora", "TrainyardSaveLora", "TrainyardLossPlot"},
    "02_caption_a_folder": {
        "TrainyardEditCaptions",
        "TrainyardEditCaptionsByHand",
        "TrainyardCaptionReport",
        "PreviewAny",
    },
    "03_check_and_clean": {
        "TrainyardCheckDataset",
        "TrainyardDeduplicateDataset",
        "TrainyardPreviewDataset",
        "PreviewAny",
    },
    "04_collage_lora": {"TrainyardBuildCollages", "TrainyardTrainLora", "TrainyardSaveLora", "SaveImage"},
    "05_image_pair_slider": {"TrainyardTrainImageSlider", *SLIDER},
    "06_leco": {"TrainyardTrainLeco", *SLIDER},
    "07_text_slider": {"TrainyardTrainTextSlider", *SLIDER},
    "08_difference": {"TrainyardTrainDifference", *SLIDER},
    "09_train_aesthetic_score": {"TrainyardTrainScoreModel", "TrainyardSaveScoreModel", "TrainyardScoreImages"},
    "10_leco_score": {"TrainyardTrainLecoScore", "TrainyardSaveLora", "TrainyardStrengthSweep"},
    "11_pretrain_on_my_art": {"TrainyardPretrainScoreBackbone", "TrainyardTrainScoreModel"},
    "12_score_and_filter": {"TrainyardScoreImages", "TrainyardRankAndFilter"},
    "13_edit_pairs": {"TrainyardTrainLora", "TrainyardSaveLora", "TrainyardLossPlot", "SaveImage"},
    "14_video_lora": {"TrainyardTrainLora", "TrainyardSaveLora", "TrainyardPreviewDataset", "SaveAnimatedWEBP"},
    "16_transfer_lora": {"TrainyardTransferLora", "TrainyardSaveLora", "TrainyardLossPlot", "SaveImage"},
}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def named(files):
    return pytest.mark.parametrize("file", files, ids=[file.stem for file in files])


@pytest.fixture(scope="module")
def schemas(server):
    return server.object_info()


def test_there_are_workflows():
    assert [file.stem for file in FILES][:1] == ["01_first_lora"]


@named(FILES)
def test_the_nodes_of_a_workflow_exist(file, schemas):
    assert [
        node["type"] for node in load(file)["nodes"] if node["type"] not in schemas and node["type"] not in DRAWN
    ] == []


@named(FILES)
def test_a_workflow_explains_itself_and_has_a_card(file):
    assert any(node["type"] in DRAWN for node in load(file)["nodes"])
    with Image.open(file.with_suffix(".jpg")) as card:
        assert card.format == "JPEG" and 500 <= min(card.size) and max(card.size) <= 1024, card.size
    assert file.with_suffix(".jpg").stat().st_size < 300_000


def box(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@named(FILES)
def test_no_node_lies_on_another_and_every_node_lies_in_one_group(file):
    workflow = load(file)
    nodes = workflow["nodes"]
    assert [(a["id"], b["id"]) for i, a in enumerate(nodes) for b in nodes[i + 1 :] if overlap(box(a), box(b))] == []
    groups = [
        (x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in workflow["groups"])
    ]
    for node in nodes:
        homes = sum(
            g[0] <= box(node)[0] and g[1] <= box(node)[1] and box(node)[2] <= g[2] and box(node)[3] <= g[3]
            for g in groups
        )
        assert homes == (node["type"] not in DRAWN), f"node {node['id']} ({node['type']}) lies in {homes} groups"


@named(FILES)
def test_the_api_twin_is_the_same_graph(file, schemas):
    twin = FOLDER / "api" / file.name
    assert load(twin) == to_api(load(file), schemas), f"workflows/api/{twin.name}: run `make refresh`"


@named(FILES)
def test_a_workflow_runs_headless_on_a_small_checkpoint(file, server):
    prompt = load(FOLDER / "api" / file.name)
    for node in prompt.values():
        by_name = {name: value for name, value in SMALL_BY_NAME.items() if name in node["inputs"]}
        node["inputs"] |= SMALL.get(node["class_type"], by_name)
        if node["class_type"] == "CheckpointLoaderSimple":
            node["inputs"]["ckpt_name"] = server.install("sd15")
        if node["class_type"] == "TrainyardLoadDataset":
            for folder in {node["inputs"]["folder"], node["inputs"]["controls"]} - {"(none)"}:
                (videos if "clips" in folder else images)(server, folder)
        if node["class_type"] == "TrainyardLoadRatedPictures":
            rated_pictures(server, node["inputs"]["folder"])
        if node["class_type"] == "TrainyardLoadLora":
            random_lora(server, node["inputs"]["file"])
        if node["class_type"] == "TrainyardLoadScoreModel":
            score_model(server, node["inputs"]["file"])
    use_small_parts(prompt, server)
    run = server.run(prompt)
    assert run.ok, run.why
    produced = {prompt[node]["class_type"] for node in run.outputs}
    showing = {node["class_type"] for node in prompt.values()}
    showing = {name for name in showing if name in SLIDER or name.startswith("TrainyardTrain")}
    assert MADE.get(file.stem, showing) and MADE.get(file.stem, showing) <= produced
    saved = [node["inputs"]["filename_prefix"] for node in prompt.values() if node["class_type"] == "SaveImage"]
    if len(saved) == 2:
        first, second = (Image.open(sorted(server.output().glob(f"{prefix}_*.png"))[-1]).tobytes() for prefix in saved)
        assert first != second, "with and without the LoRA the picture is the same"


def use_small_parts(prompt, server):
    """Files of a model that comes in parts: a small Flux with CLIP-L alone, and the VAE of another checkpoint; for Wan
    a small one with its own VAE, and CLIP-L as wide as SD3 reads it, which is what Wan reads."""
    is_wan = any(node["inputs"].get("vae_name") == "wan_2.1_vae.safetensors" for node in prompt.values())
    for number, node in prompt.items():
        if node["class_type"] == "UNETLoader":
            node["inputs"]["unet_name"] = server.install("wan" if is_wan else "flux")
        if node["class_type"] == "CLIPLoader":
            node["inputs"] = {"clip_name": server.install("clip_l"), "type": "sd3"}
        if node["class_type"] == "DualCLIPLoader":
            node["class_type"] = "CLIPLoader"
            node["inputs"] = {"clip_name": server.install("clip_l"), "type": "stable_diffusion"}
        if is_wan and node["class_type"] == "VAELoader":
            node["inputs"]["vae_name"] = server.install("wan_vae")
        elif node["class_type"] == "VAELoader":
            node["class_type"], node["inputs"] = "CheckpointLoaderSimple", {"ckpt_name": server.install("sd3_noclip")}
            for other in prompt.values():
                links = [name for name, value in other["inputs"].items() if value == [number, 0]]
                other["inputs"] |= {name: [number, 2] for name in links}
        if node["class_type"] == "LoadImage":
            shapes.draw("circle", "blue").save(server.base / "input" / node["inputs"]["image"])
        if node["class_type"] == "FluxKontextImageScale":  # to a megapixel
            node["class_type"] = "ImageScale"
            node["inputs"] |= {"upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"}


def images(server, name):
    """Four captioned drawings, small ones where the folder's name says so."""
    folder = server.base / name
    folder.mkdir(parents=True, exist_ok=True)
    for index, (colour, shape) in enumerate((c, s) for c in ("red", "blue") for s in ("circle", "square")):
        wanted = {"colour": colour, "shape": shape, "size": "small" if folder.name in ("less", "before") else "large"}
        shapes.draw(**wanted, degrees=20.0 * index).save(folder / f"{colour}_{shape}.png")
        (folder / f"{colour}_{shape}.txt").write_text(shapes.caption(**wanted))


def videos(server, name):
    """Three captioned videos of three seconds."""
    folder = server.base / name
    for colour in ("red", "blue", "green"):
        draw = lambda number, size, colour=colour: shapes.draw("circle", colour, centre=(20 + number / 2, 32))
        write_video(folder / f"{colour}.mkv", 49, 16, (64, 64), draw=draw)
        (folder / f"{colour}.txt").write_text(f"a {colour} circle moves right")


def rated_pictures(server, name):
    """24 drawings in three folders named by their rating: the larger the shape, the better."""
    for rating, radius in (("2_small", 6.0), ("5_middle", 12.0), ("8.5_large", 18.0)):
        folder = server.base / name / rating
        folder.mkdir(parents=True, exist_ok=True)
        for index, (colour, shape) in enumerate((c, s) for c in ("red", "blue") for s in shapes.SEEN):
            shapes.draw(shape, colour, radius=radius, degrees=11.0 * index).save(folder / f"{colour}_{shape}.png")


def random_lora(server, file):
    """A LoRA of random numbers on the small SD1.5's cross-attention, where the server looks for LoRAs."""
    rng, tensors = torch.Generator().manual_seed(0), {}
    checkpoint = server.base / "models" / "checkpoints" / server.install("sd15")
    for key, weight in load_file(checkpoint).items():
        if key.endswith("attn2.to_q.weight"):
            name = "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=rng)
            tensors[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=rng)
    path = server.base / "models" / "loras" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def score_model(server, file):
    """A score of random numbers for SD1.5's latents, where the server looks for score models."""
    about = ScoreModelInfo(latent_format="SD15", channels=4, width=8, depth=1, trained=True)
    path = server.base / "models" / "score_models" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_score_model(path, ScorerEnsemble([build_scorer(about)], about))
