# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN, VIOLET
from ..workflow_parts import RUN_AGAIN, loss_plot, save_lora, without_and_with

RESULT = "teaches an edit model one edit, from before and after"
NOTE = (
    """# Teach an edit model your edit

An edit model (here Flux Kontext) is shown a picture and told what to do with it. This teaches it one edit that it does not know: your line art, your relighting, your product on a shelf.

1. **Pictures.** Make a folder *my_edits* inside ComfyUI's *input* folder, and in it *before* and *after*. Both pictures of a pair carry the **same file name**. Ten to fifty pairs are usual. Beside each picture in *after* lies a text file that says what to do: *make it line art*. Press **R**, then choose *after* as `folder` and *before* as `controls`.

2. **Model.** The files are those of ComfyUI's own Kontext template; the page offers to download what is missing. Qwen-Image-Edit, Flux.2 and OmniGen2 work the same: load them instead.

3. **Run.** Training shows the model the picture from *before* exactly as sampling does, and it learns to make the one from *after*. *Validation and Previews* draws edits of your own pictures on the way.

4. **Look.** Choose a picture that was not trained on: the same edit and seed without and with the LoRA."""
    + RUN_AGAIN
)
NOTE_SIZE = (400, 900)
HUGGING_FACE = "https://huggingface.co"
UNET = "flux1-dev-kontext_fp8_scaled.safetensors"
UNET_URL = f"{HUGGING_FACE}/Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/{UNET}"
CLIP_L, T5 = "clip_l.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors"
TEXT_URL = f"{HUGGING_FACE}/comfyanonymous/flux_text_encoders/resolve/main"
VAE = "ae.safetensors"
VAE_URL = f"{HUGGING_FACE}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/{VAE}"


def download(directory, *urls):
    return {"models": [{"name": url.rsplit("/", 1)[1], "directory": directory, "url": url} for url in urls]}


def build(workflow):
    workflow.add_group("1 · Model and pairs of pictures", BLUE, 450, -80,
        (340, [("model", "UNETLoader", 90, {"unet_name": UNET, "weight_dtype": "default"}, {}, None, download("diffusion_models", UNET_URL)),
               ("clip", "DualCLIPLoader", 130, {"clip_name1": CLIP_L, "clip_name2": T5, "type": "flux", "device": "default"}, {}, None,
                download("text_encoders", f"{TEXT_URL}/{CLIP_L}", f"{TEXT_URL}/{T5}")),
               ("vae", "VAELoader", 60, {"vae_name": VAE}, {}, None, download("vae", VAE_URL)),
               ("load", "TrainyardLoadDataset", 280, {"folder": "input/my_edits/after", "controls": "input/my_edits/before"}),
               ("found", "PreviewAny", 140, {}, {"source": "load.about"}, "What was found")]),
        (340, [("encode", "TrainyardEncodeDataset", 520, {"resolution": 1024, "dropout": 0.05},
                {"dataset": "load.dataset", "vae": "vae.VAE", "clip": "clip.CLIP"})]))  # fmt: skip
    workflow.add_group("2 · Train", GREEN, 1250, -80,
        (380, [("watch", "TrainyardValidation", 720, {}, {"vae": "vae.VAE"})]),
        (420, [("train", "TrainyardTrainLora", 1120, {"run_name": "my_edit", "steps": 1000},
                {"model": "model.MODEL", "encoded": "encode.encoded", "validation": "watch.validation"})]),
        (360, [save_lora("my_edit"), loss_plot()]))  # fmt: skip
    sampler = lambda source: {
        "model": source,
        "positive": "guided.CONDITIONING",
        "negative": "nothing.CONDITIONING",
        "latent_image": "latent.LATENT",
        "seed": "seed.INT",
    }
    steps = {"steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    workflow.add_group("3 · Look: without and with", VIOLET, 2550, -80,
        (320, [("picture", "LoadImage", 320, {"image": "example.png"}, {}, "A picture to edit"),
               ("scaled", "FluxKontextImageScale", 40, {}, {"image": "picture.IMAGE"}),
               ("latent", "VAEEncode", 60, {}, {"pixels": "scaled.IMAGE", "vae": "vae.VAE"}),
               ("seed", "PrimitiveInt", 90, {"value": 7}, {}, "Seed of both pictures")]),
        (300, [("told", "CLIPTextEncode", 130, {"text": "make it line art"}, {"clip": "clip.CLIP"}, "What to do"),
               ("shown", "ReferenceLatent", 60, {}, {"conditioning": "told.CONDITIONING", "latent": "latent.LATENT"}),
               ("guided", "FluxGuidance", 60, {"guidance": 2.5}, {"conditioning": "shown.CONDITIONING"}),
               ("nothing", "ConditioningZeroOut", 40, {}, {"conditioning": "told.CONDITIONING"})]),
        *without_and_with(workflow, steps, sampler, "model.MODEL", "train.model", "vae.VAE"))  # fmt: skip
