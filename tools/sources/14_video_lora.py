# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN, VIOLET
from ..workflow_parts import RUN_AGAIN, loss_plot

RESULT = "teaches a video model a motion or a style, from short videos"
NOTE = (
    """# Teach a video model your motion

A video model (here Wan 2.2) learns a motion, an effect or a look from short videos. Wan 2.2 has **two experts**: one draws the coarse motion out of strong noise, the other the details. This trains a LoRA for each, on the noise that it draws.

1. **Videos.** Put ten to fifty videos (.mp4, .webm, .mov, .gif ...) into a folder *my_clips* inside ComfyUI's *input* folder, each with a text file of the same name that says what happens: *a cat jumps onto a chair*. Frames as images work too, in a folder such as *jump.24fps*; images beside the videos are trained as clips of one frame. Press **R**, then choose the folder.

2. **Clips.** *Cut Clips* takes 33 frames at 16 frames a second from each video: two seconds. *Preview Dataset* shows them.

3. **Model.** The files are those of ComfyUI's own Wan 2.2 template; the page offers to download what is missing. For HunyuanVideo, LTX or Wan 2.1 remove one expert, and set its `expert` to *whole range*.

4. **Run.** Both experts train one after the other. For one expert alone, bypass the other's Train node: motion is mostly in the high-noise one, looks in the low-noise one.

5. **Look.** One prompt and seed without and with the LoRAs."""
    + RUN_AGAIN
)
NOTE_SIZE = (400, 1040)
WAN_22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
WAN_21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
HIGH, LOW = (f"wan2.2_t2v_{side}_noise_14B_fp8_scaled.safetensors" for side in ("high", "low"))
TEXT, VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
STEPS, SWITCH = 20, 10


def download(directory, url):
    return {"models": [{"name": url.rsplit("/", 1)[1], "directory": directory, "url": url}]}


def expert(side, file):
    return (f"{side}_model", "UNETLoader", 90, {"unet_name": file, "weight_dtype": "default"}, {}, f"Expert for {side} noise",
            download("diffusion_models", f"{WAN_22}/diffusion_models/{file}"))  # fmt: skip


def training(side):
    return (f"{side}_train", "TrainyardTrainLora", 1120, {"run_name": f"my_motion_{side}", "steps": 1000},
            {"model": f"{side}_model.MODEL", "encoded": "encode.encoded", "noise": f"{side}_noise.noise", "validation": "watch.validation"},
            f"Train the {side}-noise expert")  # fmt: skip


def noise(side):
    return (f"{side}_noise", "TrainyardNoiseAndLoss", 440, {"expert": f"Wan 2.2 text to video, {side} noise"}, {},
            f"Noise of the {side}-noise expert")  # fmt: skip


def save(side):
    return (f"{side}_save", "TrainyardSaveLora", 220, {"name": f"my_motion_{side}"},
            {"lora": f"{side}_train.lora", "model": f"{side}_model.MODEL"})  # fmt: skip


def samplers(name, high, low):
    """A column: both experts in turn, as ComfyUI's template runs them."""
    shared = {"positive": "told.CONDITIONING", "negative": "avoided.CONDITIONING", "noise_seed": "seed.INT"}
    steps = {"steps": STEPS, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"}
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": SWITCH, "return_with_leftover_noise": "enable"}
    second = {
        "add_noise": "disable",
        "start_at_step": SWITCH,
        "end_at_step": 10_000,
        "return_with_leftover_noise": "disable",
    }
    return (300, [(f"{name}_high", "KSamplerAdvanced", 340, steps | first, shared | {"model": high, "latent_image": "size.LATENT"}, f"{name.title()}: high noise"),
                  (f"{name}_low", "KSamplerAdvanced", 340, steps | second, shared | {"model": low, "latent_image": f"{name}_high.LATENT"}, f"{name.title()}: low noise")])  # fmt: skip


def shown(name):
    return [(f"{name}_frames", "VAEDecode", 60, {}, {"samples": f"{name}_low.LATENT", "vae": "vae.VAE"}),
            (f"{name}_save", "SaveAnimatedWEBP", 400, {"filename_prefix": f"video_lora_{name}", "fps": 16.0, "lossless": False}, {"images": f"{name}_frames.IMAGE"}, name.title())]  # fmt: skip


def build(workflow):
    workflow.add_group("1 · Model and clips", BLUE, 450, -80,
        (340, [expert("high", HIGH), expert("low", LOW),
               ("clip", "CLIPLoader", 110, {"clip_name": TEXT, "type": "wan", "device": "default"}, {}, None, download("text_encoders", f"{WAN_21}/text_encoders/{TEXT}")),
               ("vae", "VAELoader", 60, {"vae_name": VAE}, {}, None, download("vae", f"{WAN_22}/vae/{VAE}")),
               ("load", "TrainyardLoadDataset", 280, {"folder": "input/my_clips"})]),
        (340, [("cut", "TrainyardCutClips", 200, {"frames": 33, "fps": 16.0}, {"dataset": "load.dataset"}),
               ("sheet", "TrainyardPreviewDataset", 420, {}, {"dataset": "cut.dataset"})]),
        (340, [("encode", "TrainyardEncodeDataset", 560, {"resolution": 480, "step": 16, "dropout": 0.05},
                {"dataset": "cut.dataset", "vae": "vae.VAE", "clip": "clip.CLIP"})]))  # fmt: skip
    workflow.add_group("2 · Train both experts", GREEN, 1590, -80,
        (360, [noise("high"), noise("low")]),
        (380, [("watch", "TrainyardValidation", 720, {}, {"vae": "vae.VAE"})]),
        (420, [training("high")]),
        (420, [training("low")]),
        (360, [save("high"), save("low"), ("plot", *loss_plot()[1:4], {"losses": "low_train.losses"})]))  # fmt: skip
    workflow.add_group("3 · Look: without and with", VIOLET, 3700, -80,
        (320, [("told", "CLIPTextEncode", 130, {"text": "a cat jumps onto a chair"}, {"clip": "clip.CLIP"}, "Prompt"),
               ("avoided", "CLIPTextEncode", 110, {"text": ""}, {"clip": "clip.CLIP"}, "Negative prompt"),
               ("size", "EmptyHunyuanLatentVideo", 130, {"width": 640, "height": 384, "length": 33}),
               ("seed", "PrimitiveInt", 90, {"value": 7}, {}, "Seed of both videos")]),
        samplers("without", "high_model.MODEL", "low_model.MODEL"),
        samplers("with", "high_train.model", "low_train.model"),
        (320, shown("without")),
        (320, shown("with")))  # fmt: skip
