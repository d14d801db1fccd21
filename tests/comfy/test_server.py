"""The harness itself: small files in real loader nodes, a real server, and how runs end."""

import time

import pytest
import torch

from . import tiny
from .server import PACKS, Server

KIT = PACKS["trainyard_kit"]


def txt2img(checkpoint, width=768, pooled=0, latent="EmptyLatentImage"):
    """Two steps from random conditioning to a PNG, for checkpoints without a text encoder."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "KitConditioning", "inputs": {"seed": 1, "tokens": 77, "width": width, "pooled": pooled}},
        "3": {"class_type": latent, "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 7, "steps": 2, "cfg": 1.0,
            "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "kit"}},
    }  # fmt: skip


def wait(seconds):
    return {"1": {"class_type": "KitWait", "inputs": {"seconds": seconds}}}


SD3_SIZES = {"width": 4096, "pooled": 2048, "latent": "EmptySD3LatentImage"}


@pytest.mark.parametrize("name, sizes", [("sd15_noclip", {}), ("sd3_noclip", SD3_SIZES)])
def test_a_small_checkpoint_runs_from_the_loader_node_to_a_picture(server, name, sizes):
    run = server.run(txt2img(server.install(name), **sizes))
    assert run.ok, run.why
    assert server.output(run.outputs["6"]["images"][0]["filename"]).is_file()
    assert run.of("progress")[-1]["value"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["sd15", "flux"])
def test_a_small_text_encoder_conditions_a_small_model(server, loader):
    if loader == "sd15":
        prompt = txt2img(server.install("sd15"))
        clip = ["1", 1]
    else:
        prompt = txt2img(server.install("sd3_noclip"), latent="EmptySD3LatentImage")  # its VAE has flux's 16 channels
        prompt["7"] = {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": server.install("flux"), "weight_dtype": "default"},
        }
        prompt["8"] = {
            "class_type": "CLIPLoader",
            "inputs": {"clip_name": server.install("clip_l"), "type": "stable_diffusion"},
        }
        prompt["4"]["inputs"]["model"], clip = ["7", 0], ["8", 0]
    prompt["2"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": clip}}
    run = server.run(prompt)
    assert run.ok, run.why


def test_a_built_file_is_taken_from_the_cache_and_has_finite_weights(comfy):
    from safetensors.torch import load_file

    path = tiny.build("sd3_noclip")
    made = path.stat().st_mtime_ns
    assert tiny.build("sd3_noclip").stat().st_mtime_ns == made
    assert all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.dtype == torch.float16)


def test_an_unknown_small_model_is_refused_with_the_names_there_are():
    with pytest.raises(KeyError, match="'sd9'.*sd15_noclip"):
        tiny.build("sd9")


def test_a_prompt_that_the_server_refuses_is_no_success(server):
    run = server.run(wait("soon"))
    assert (run.ok, run.status) == (False, 400)
    assert "seconds" in run.why


def test_an_interrupt_ends_a_run_and_the_next_one_works(server):
    begin = time.monotonic()
    run = server.run(wait(60.0), watch=lambda event: event["type"] == "executing" and server.interrupt())
    assert run.ending == "execution_interrupted"
    assert time.monotonic() - begin < 30
    assert server.run(wait(0.01)).ok


@pytest.mark.slow
def test_a_killed_server_ends_the_transcript_and_starts_again_on_the_same_folder(comfy, tmp_path):
    server = Server(tmp_path, packs={"trainyard_kit": KIT})
    with server:
        run = server.run(wait(60.0), watch=lambda event: event["type"] == "executing" and server.kill())
        assert (run.ok, run.ending) == (False, None)
        assert server.start().run(wait(0.01)).ok


@pytest.mark.slow
def test_a_pack_that_cannot_be_imported_is_told_from_one_that_can(comfy, tmp_path):
    for name, code in {
        "kit": "async def comfy_entrypoint(): raise ValueError",
        "kit_bad": "import nothing_of_that_name",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    packs = {"fine": KIT, "kit": tmp_path / "kit", "kit_bad": tmp_path / "kit_bad"}
    with Server(tmp_path / "base", packs=packs) as server:
        assert server.import_errors("fine") == []
        assert "comfy_entrypoint" in server.import_errors("kit")[0]
        assert all("kit_bad" not in line for line in server.import_errors("kit"))
        assert "nothing_of_that_name" in server.import_errors("kit_bad")[0]
