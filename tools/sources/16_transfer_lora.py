# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN, VIOLET
from ..workflow_parts import RUN_AGAIN, loss_plot, save_lora, without_and_with

RESULT = "moves a LoRA from a base model to its Turbo, without pictures"
NOTE = (
    """# Move a LoRA to a sibling model

You have a LoRA of one model and want it on another of the same family: from a base to its Turbo or Lightning version, or to a fine-tune. *Transfer LoRA* teaches the other model the change that the LoRA makes in its own. No pictures are needed.

1. **Models.** *Source* is the model that the LoRA was trained on, *target* the one that gets the new LoRA. Both need the same VAE and text encoder. Here: SDXL and SDXL Turbo.

2. **LoRA.** Choose the file in *Load LoRA File*.

3. **Prompts** in *Transfer LoRA*: what the LoRA is used for, one a line, with its trigger word. Lines without the word keep the rest as it is.

4. **Steps of the target.** Set *few_steps* to the steps that the target is made for (4 here). 0 for an ordinary model.

5. **Run.** First the models are asked, one after the other, so that both need not fit into memory. Then the new LoRA is trained.

6. **Look.** The same prompt and seed on the target, without and with the new LoRA. The old LoRA put on the target as it is may be enough already: compare it with *Apply LoRA*."""
    + RUN_AGAIN
)
NOTE_SIZE = (400, 900)
HUGGING_FACE = "https://huggingface.co/stabilityai"
SOURCE, TARGET = "sd_xl_base_1.0.safetensors", "sd_xl_turbo_1.0_fp16.safetensors"
SOURCE_URL = f"{HUGGING_FACE}/stable-diffusion-xl-base-1.0/resolve/main/{SOURCE}"
TARGET_URL = f"{HUGGING_FACE}/sdxl-turbo/resolve/main/{TARGET}"
PROMPTS = """my_word, a photo
my_word, a photo {outdoors|in a room}
a photo"""


def checkpoint(key, name, url, title):
    download = {"models": [{"name": name, "directory": "checkpoints", "url": url}]}
    return key, "CheckpointLoaderSimple", 100, {"ckpt_name": name}, {}, title, download


def build(workflow):
    workflow.add_group("1 · Models and the LoRA", BLUE, 450, -80,
        (340, [checkpoint("source", SOURCE, SOURCE_URL, "Source: the LoRA's own model"),
               checkpoint("model", TARGET, TARGET_URL, "Target: gets the new LoRA"),
               ("old", "TrainyardLoadLora", 110, {"file": "my_lora.safetensors"})]))  # fmt: skip
    workflow.add_group("2 · Move it", GREEN, 860, -80,
        (420, [("train", "TrainyardTransferLora", 1120, {"prompts": PROMPTS, "run_name": "my_transfer", "few_steps": 4},
                {"model": "model.MODEL", "source": "source.MODEL", "lora": "old.lora", "clip": "source.CLIP"})]),
        (360, [save_lora("my_transfer"), loss_plot()]))  # fmt: skip
    sampler = lambda source: {
        "model": source,
        "positive": "positive.CONDITIONING",
        "negative": "negative.CONDITIONING",
        "latent_image": "size.LATENT",
        "seed": "seed.INT",
    }
    steps = {"steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal"}
    workflow.add_group("3 · Look: without and with", VIOLET, 1730, -80,
        (300, [("positive", "CLIPTextEncode", 130, {"text": "my_word, a photo"}, {"clip": "model.CLIP"}),
               ("negative", "CLIPTextEncode", 110, {"text": ""}, {"clip": "model.CLIP"}, "Negative")]),
        (275, [("size", "EmptyLatentImage", 120, {"width": 512, "height": 512}), ("seed", "PrimitiveInt", 90, {"value": 7}, {}, "Seed of both pictures")]),
        *without_and_with(workflow, steps, sampler, "model.MODEL", "train.model", "model.VAE"))  # fmt: skip
