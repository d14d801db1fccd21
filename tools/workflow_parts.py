"""Nodes and groups that several of the bundled workflows share."""

from __future__ import annotations

from .workflow_builder import BLUE, GREEN, VIOLET

IMAGE_FOLDER, RATED_FOLDER = {"folder": "input/my_pictures"}, {"folder": "input/my_ratings", "ratings": "folder names"}
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
CHECKPOINT_URL = f"https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{CHECKPOINT}"
RUN_AGAIN = """

Pressing **Run** again on an unchanged graph never trains twice; Cancel keeps the work, and the next Run goes on. The LoRA lies in *output/loras*; press **R** to see it in LoRA loaders."""


# -- nodes, for a column of add_group ----------------------------------------------------------------------------------
def load_checkpoint():
    """`model`: the page offers to download the file when it is missing."""
    download = {"models": [{"name": CHECKPOINT, "directory": "checkpoints", "url": CHECKPOINT_URL}]}
    return "model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT}, {}, None, download


def save_lora(name, lora="train.lora"):
    return "save", "TrainyardSaveLora", 220, {"name": name}, {"lora": lora, "model": "model.MODEL"}


def loss_plot():
    return "plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"}


# -- groups ------------------------------------------------------------------------------------------------------------
def add_pair_training(workflow, node_id, run_name, positive, negative):
    """Two folders and the Train node that learns from their pairs. `positive`, `negative`: (folder, title)."""
    folder = lambda key, side: (key, "TrainyardLoadDataset", 280, {"folder": f"input/{side[0]}"}, {}, side[1])
    workflow.add_group("1 · Model and pairs of pictures", BLUE, 430, -80,
        (320, [load_checkpoint(), folder("positive", positive), folder("negative", negative)]),
        (320, [("pairs", "TrainyardImagePairs", 100, {}, {"positive": "positive.dataset", "negative": "negative.dataset"}),
               ("encode", "TrainyardEncodeDataset", 484, {"trigger": "a photo of a person", "dropout": 0.1},
                {"dataset": "pairs.dataset", "vae": "model.VAE", "clip": "model.CLIP"})]))  # fmt: skip
    workflow.add_group("2 · Train", GREEN, 1190, -80,
        (360, [("train", node_id, 850, {"run_name": run_name}, {"model": "model.MODEL", "encoded": "encode.encoded"})]),
        (360, [save_lora(run_name), loss_plot()]))  # fmt: skip


def add_strength_sweep(workflow, title, left, widgets, prompt, *more, **prompts):
    """Strength Sweep of what was trained, on one prompt. `prompts`: further ones by input, (text, title)."""
    encode = lambda key, text, name: (key, "CLIPTextEncode", 130, {"text": text}, {"clip": "model.CLIP"}, name)
    prompts = {"positive": (prompt, "Prompt"), "negative": ("", "Negative prompt"), **prompts}
    links = {key: f"{key}_words.CONDITIONING" for key in prompts}
    workflow.add_group(title, VIOLET, left, -80,
        (320, [encode(f"{key}_words", *about) for key, about in prompts.items()]),
        (560, [("sweep", "TrainyardStrengthSweep", 840, widgets, {"model": "model.MODEL", "lora": "train.lora", "vae": "model.VAE", **links})]),
        (360, [*more, ("sheet", "SaveImage", 400, {"filename_prefix": f"{workflow.name[3:]}/sheet"}, {"images": "sweep.sheet"}, "The sheet"),
               ("told", "PreviewAny", 160, {}, {"source": "sweep.report"}, "In words")]))  # fmt: skip


def add_comparison(workflow, title, left, top, model, trained, prompt="my_word, a photo"):
    """Two images of one prompt and seed: without and with what was trained."""
    sampler = lambda source: {"model": source, "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING",
                              "latent_image": "size.LATENT", "seed": "seed.INT"}  # fmt: skip
    steps = {"steps": 25, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
    workflow.add_group(title, VIOLET, left, top,
        (300, [("positive", "CLIPTextEncode", 130, {"text": prompt}, {"clip": f"{model}.CLIP"}),
               ("negative", "CLIPTextEncode", 110, {"text": ""}, {"clip": f"{model}.CLIP"}, "Negative")]),
        (275, [("size", "EmptyLatentImage", 120, {"width": 512, "height": 512}), ("seed", "PrimitiveInt", 90, {"value": 7}, {}, "Seed of both pictures")]),
        *without_and_with(workflow, steps, sampler, f"{model}.MODEL", trained, f"{model}.VAE"))  # fmt: skip


def without_and_with(workflow, steps, sampler, model, trained, vae):
    """Columns of add_group: the same samples of two models, decoded and saved. `steps`: widgets of KSampler;
    `sampler(model)`: its links."""
    name = workflow.name.split("_", 1)[1]
    return (
        (300, [("without", "KSampler", 270, steps, sampler(model), "Without"), ("with", "KSampler", 270, steps, sampler(trained), "With")]),
        (225, [("decode_without", "VAEDecode", 60, {}, {"samples": "without.LATENT", "vae": vae}),
               ("decode_with", "VAEDecode", 60, {}, {"samples": "with.LATENT", "vae": vae})]),
        (300, [("save_without", "SaveImage", 300, {"filename_prefix": f"{name}_without"}, {"images": "decode_without.IMAGE"}, "Without"),
               ("save_with", "SaveImage", 300, {"filename_prefix": f"{name}_with"}, {"images": "decode_with.IMAGE"}, "With")]))  # fmt: skip
