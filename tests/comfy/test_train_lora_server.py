"""Training through a real server, as people do it: run, stop, resume, sample, wrong inputs."""

import json
import shutil
import time

import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open
from trainyard.tests.comfy.server import Server

STEPS = 6


def image(colour, shape, size=64):
    drawn = Image.new("RGB", (size, size), "white")
    getattr(ImageDraw.Draw(drawn), shape)([16, 16, 48, 48], fill=colour)
    return drawn


@pytest.fixture(scope="module")
def dataset(server):
    """input/shapes: three captioned images."""
    return make_dataset(server)


def make_dataset(server, name="shapes"):
    folder = server.base / "input" / name
    folder.mkdir(parents=True, exist_ok=True)
    for colour, shape in (("red", "ellipse"), ("blue", "rectangle"), ("green", "ellipse")):
        image(colour, shape).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} {shape}")
    return f"input/{name}"


def graph(server, folder, **train):
    """checkpoint + folder -> LoRA."""
    widgets = dict(
        steps=STEPS, learning_rate=1e-3, rank=4, batch=2, seed=1, save_every=0, run_name="test", checkpointing="off"
    )
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": server.install("sd15")}},
        "2": {"class_type": "TrainyardLoadDataset", "inputs": {"folder": folder, "repeats": 1, "alpha_mask": False}},
        "3": {"class_type": "TrainyardEncodeDataset", "inputs": {
            "dataset": ["2", 0], "vae": ["1", 2], "clip": ["1", 1], "caption_mode": "captions", "trigger": "", "dropout": 0.0, "shuffle": False,
            "keep_tokens": 0, "variants": 1, "resolution": 64, "upscale": False, "step": 8, "min_side": 64, "max_side": 128, "flip": False, "seed": 0}},
        "4": {"class_type": "TrainyardTrainLora", "inputs": {"model": ["1", 0], "encoded": ["3", 0], **widgets, **train}},
    }  # fmt: skip


def sampled(model, start="10"):
    """Nodes that sample two steps with a MODEL link."""
    a, b, c = start, f"{start}1", f"{start}2"
    return {
        c: {"class_type": "CLIPTextEncode", "inputs": {"text": "a red ellipse", "clip": ["1", 1]}},
        b: {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        a: {"class_type": "KSampler", "inputs": {
            "model": model, "positive": [c, 0], "negative": [c, 0], "latent_image": [b, 0], "seed": 7, "steps": 2, "cfg": 1.0,
            "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}},
        f"{start}3": {"class_type": "VAEDecode", "inputs": {"samples": [a, 0], "vae": ["1", 2]}},
        f"{start}4": {"class_type": "SaveImage", "inputs": {"images": [f"{start}3", 0], "filename_prefix": f"s{start}"}},
    }  # fmt: skip


def runs(server, name="test"):
    return sorted((server.base / "output" / "loras" / "trainyard").glob(f"{name}-*"))


def the_file(server, name):
    (folder,) = runs(server, name)
    return folder / f"{name}.safetensors"


def test_a_folder_becomes_a_lora_that_is_sampled_saved_and_plotted_in_one_graph(server, dataset):
    prompt = graph(server, dataset, run_name="whole") | sampled(["4", 2], "20") | sampled(["1", 0], "30")
    prompt["5"] = {
        "class_type": "TrainyardSaveLora",
        "inputs": {"lora": ["4", 0], "name": "whole/mine", "model": ["1", 0]},
    }
    prompt["6"] = {"class_type": "TrainyardLossPlot", "inputs": {"losses": ["4", 1]}}
    prompt["7"] = {"class_type": "LossGraphNode", "inputs": {"loss": ["4", 1], "filename_prefix": "core"}}
    prompt["8"] = {
        "class_type": "LoraModelLoader",
        "inputs": {"model": ["1", 0], "lora": ["4", 0], "strength_model": 1.0, "bypass": False},
    }
    prompt |= sampled(["8", 0], "40")
    run = server.run(prompt)
    assert run.ok, run.why
    ours, base, cores = (pixels(server, run, node) for node in ("204", "304", "404"))
    assert ours != base, "the LoRA must change the image"
    assert ours == cores, "core's own loader must make the same picture of our LORA_MODEL"
    saved = server.output("loras", "whole", "mine.safetensors")
    with safe_open(saved, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys
    assert metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert json.loads(metadata["prompt"])["4"]["class_type"] == "TrainyardTrainLora"
    assert run.of("progress")[-1]["max"] >= 1
    assert any("step 6/6" in text for text in progress_texts(run)), progress_texts(run)


def pixels(server, run, node):
    return Image.open(server.output(run.outputs[node]["images"][0]["filename"])).tobytes()


def progress_texts(run):
    """Text lines that the server showed in nodes: binary messages of kind 3."""
    return [blob[4:].decode(errors="replace") for blob in run.binaries if int.from_bytes(blob[:4], "big") == 3]


def test_run_pressed_twice_never_trains_twice_also_after_the_cache_is_gone(server, dataset):
    first = server.run(graph(server, dataset, run_name="twice"))
    assert first.ok, first.why
    path = the_file(server, "twice")
    made = path.stat().st_mtime_ns
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    again = server.run(
        graph(server, dataset, run_name="twice", save_every=100)
    )  # other inputs, same recipe: the node is executed
    assert again.ok, again.why
    assert "already trained" in json.dumps(again.outputs["4"])
    assert path.stat().st_mtime_ns == made


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(server, dataset):
    blobs = []
    for _ in range(2):
        run = server.run(graph(server, dataset, run_name="bytes"))
        assert run.ok, run.why
        blobs.append(the_file(server, "bytes").read_bytes())
        shutil.rmtree(runs(server, "bytes")[0])
        server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)
    assert blobs[0] == blobs[1]
    other = server.run(graph(server, dataset, run_name="bytes", seed=2))
    assert other.ok, other.why
    assert the_file(server, "bytes").read_bytes() != blobs[0]


def test_three_steps_and_three_resumed_ones_are_six(server, dataset):
    whole = server.run(graph(server, dataset, run_name="six"))
    assert whole.ok, whole.why
    half = server.run(graph(server, dataset, run_name="halves", steps=3))
    assert half.ok, half.why
    rest = server.run(graph(server, dataset, run_name="halves", steps=6))
    assert rest.ok, rest.why
    assert tensors(the_file(server, "six")) == tensors(the_file(server, "halves"))


def tensors(path):
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys()}


def test_an_interrupt_keeps_the_work_and_the_next_run_goes_on_exactly(server, dataset):
    steps = 40
    stopped = server.run(graph(server, dataset, run_name="stopped", steps=steps), watch=stop_after(server, 5))
    assert stopped.ending == "execution_interrupted", stopped.why
    (folder,) = runs(server, "stopped")
    about = json.loads((folder / "run.json").read_text())
    assert 0 < about["step"] < steps
    assert (folder / f"stopped-step{about['step']:06d}.safetensors").exists()
    rest = server.run(graph(server, dataset, run_name="stopped", steps=steps))
    assert rest.ok, rest.why
    whole = server.run(graph(server, dataset, run_name="unstopped", steps=steps))
    assert whole.ok, whole.why
    assert tensors(the_file(server, "stopped")) == tensors(the_file(server, "unstopped"))


def stop_after(server, step):
    """Press Cancel when the progress bar of the Train node has reached `step`."""

    def watch(event):
        data = event.get("data") or {}
        if event["type"] == "progress" and data.get("node") == "4" and data["value"] >= step:
            server.interrupt()

    return watch


@pytest.mark.slow
def test_kill_9_in_the_middle_costs_no_more_than_the_last_save(tmp_path):
    with Server(tmp_path / "killed") as mine:
        folder = make_dataset(mine)
        request = graph(mine, folder, run_name="killed", steps=2000, save_every=5)
        mine.post("/prompt", {"prompt": request})
        deadline = time.monotonic() + 120
        while not list(mine.base.glob("output/loras/trainyard/killed-*/killed-step000010.safetensors")):
            assert time.monotonic() < deadline, mine.tail()
            time.sleep(0.05)
        mine.kill()
        (run,) = mine.base.glob("output/loras/trainyard/killed-*")
        state = json.loads((run / "run.json").read_text())
        assert state["step"] >= 5, "the save that was being written may be lost, never the one before it"
        with Server(mine.base) as again:
            rest = again.run(graph(again, folder, run_name="killed", steps=state["step"] + 20, save_every=5))
            assert rest.ok, rest.why
            assert json.loads((run / "run.json").read_text())["step"] == state["step"] + 20


def test_cores_latents_and_conditioning_train_too(server, dataset):
    prompt = graph(server, dataset, run_name="cores")
    prompt["2"] = {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": dataset.removeprefix("input/")}}
    prompt["3"] = {
        "class_type": "MakeTrainingDataset",
        "inputs": {"images": ["2", 0], "texts": ["2", 1], "vae": ["1", 2], "clip": ["1", 1]},
    }
    inputs = prompt["4"]["inputs"]
    del inputs["encoded"]
    inputs |= {"latents": ["3", 0], "conditioning": ["3", 1]}
    run = server.run(prompt)
    assert run.ok, run.why
    assert the_file(server, "cores").exists()


def test_settings_nodes_reach_the_run_and_its_file(server, dataset):
    prompt = graph(server, dataset, run_name="settings", checkpointing="per block")
    prompt["5"] = {
        "class_type": "TrainyardAdapter",
        "inputs": {
            "alpha": 2.0,
            "rslora": False,
            "targets": "attention",
            "pattern": "",
            "conv": True,
            "conv_rank": 2,
            "conv_alpha": 0.0,
            "text_encoder": False,
        },
    }
    prompt["6"] = {
        "class_type": "TrainyardOptimizer",
        "inputs": {
            "optimizer": "AdamW",
            "schedule": "cosine",
            "warmup": 2,
            "restarts": 1,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.99,
            "clip": 1.0,
            "accumulate": 2,
            "text_encoder_lr": 0.0,
        },
    }
    prompt["7"] = {
        "class_type": "TrainyardNoiseAndLoss",
        "inputs": {
            "density": "uniform",
            "mean": 0.0,
            "std": 1.0,
            "shift": 0.0,
            "min_time": 0.1,
            "max_time": 0.9,
            "weighting": "min-SNR",
            "gamma": 5.0,
        },
    }
    prompt["4"]["inputs"] |= {"adapter": ["5", 0], "optimizer": ["6", 0], "noise": ["7", 0]}
    run = server.run(prompt)
    assert run.ok, run.why
    with safe_open(the_file(server, "settings"), "pt") as file:
        metadata = file.metadata()
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert (metadata["ss_network_alpha"], metadata["ss_min_snr_gamma"], metadata["ss_lr_scheduler"]) == (
        "2.0",
        "5.0",
        "cosine",
    )
    assert shapes["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"][1:] == (320, 3, 3), (
        "convolutions are stored as such"
    )
    assert not any("_ff_net_" in key for key in shapes)


def test_the_text_encoder_trains_too(server, dataset):
    prompt = graph(server, dataset, run_name="text", steps=2, batch=1)
    prompt["5"] = {
        "class_type": "TrainyardAdapter",
        "inputs": {
            "alpha": 0.0,
            "rslora": False,
            "targets": "attention",
            "pattern": "",
            "conv": False,
            "conv_rank": 8,
            "conv_alpha": 0.0,
            "text_encoder": True,
        },
    }
    prompt["4"]["inputs"] |= {"adapter": ["5", 0], "clip": ["1", 1]}
    run = server.run(prompt)
    assert run.ok, run.why
    with safe_open(the_file(server, "text"), "pt") as file:
        assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj") for key in file.keys())


# -- trouble: a clear word before the long work ------------------------------------------------------------------------


def empty_folder(server):
    (server.base / "input" / "empty").mkdir(exist_ok=True)
    return "input/empty"


def uncaptioned(server):
    folder = server.base / "input" / "bare"
    folder.mkdir(exist_ok=True)
    image("red", "ellipse").save(folder / "red.png")
    return "input/bare"


def broken(server):
    folder = server.base / "input" / "broken"
    folder.mkdir(exist_ok=True)
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    return "input/broken"


def with_inputs(node, **inputs):
    def change(prompt, server):
        prompt[node]["inputs"] |= {k: v(server) if callable(v) else v for k, v in inputs.items()}

    return change


def no_text_encoder(prompt, server):
    prompt["1"]["inputs"]["ckpt_name"] = server.install("sd15_noclip")


def foreign_vae(prompt, server):
    prompt["9"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": server.install("sd3_noclip")}}
    prompt["3"]["inputs"]["vae"] = ["9", 2]


def nothing_to_train_on(prompt, server):
    del prompt["4"]["inputs"]["encoded"]


def wild_regex(prompt, server):
    prompt["5"] = {
        "class_type": "TrainyardAdapter",
        "inputs": {
            "alpha": 0.0,
            "rslora": False,
            "targets": "regex",
            "pattern": "nothing_like_this",
            "conv": False,
            "conv_rank": 8,
            "conv_alpha": 0.0,
            "text_encoder": False,
        },
    }
    prompt["4"]["inputs"]["adapter"] = ["5", 0]


TROUBLE = {
    "an empty folder": (with_inputs("2", folder=empty_folder), "empty"),
    "no captions where they are asked for": (with_inputs("2", folder=uncaptioned), "Captions are asked for, and 1 of 1 "
                                                                                   "images have none: red.png"),
    "an unreadable image": (with_inputs("2", folder=broken), "bad.png"),
    "a checkpoint without text encoder": (no_text_encoder, "holds no text encoder"),
    "latents of another model": (foreign_vae, "The latents have 16 channels and this MODEL expects 4"),
    "nothing to train on": (nothing_to_train_on, "There is nothing to train on"),
    "a rank larger than a layer": (with_inputs("4", rank=4000), "rank is 4000, but it has only 320 inputs"),
    "a run name that leaves its folder": (with_inputs("4", run_name="../../evil"), "The run name is '../../evil'"),
    "a pattern that fits no layer": (wild_regex, "No layer matches"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_is_told_before_the_long_work(server, dataset, trouble):
    change, words = TROUBLE[trouble]
    prompt = graph(server, dataset, run_name="trouble")
    change(prompt, server)
    run = server.run(prompt)
    assert not run.ok
    assert words in run.why, run.why
    assert not runs(server, "trouble")


def test_a_folder_outside_the_roots_is_refused_by_the_widget_and_inside_execute(server, comfy, folders):
    from trainyard.nodes import paths

    run = server.run(graph(server, "input/../../etc"))
    assert not run.ok
    for name in ("input/../../etc", "etc", "/etc", "datasets/../.."):
        with pytest.raises(ValueError, match="leads out of|must begin with"):
            paths.resolve_dataset_folder(name)


def test_a_nan_from_a_link_is_refused_with_the_setting_named():
    from trainyard.nodes.fields import settings_from_widgets
    from trainyard.trainers.settings import RunSettings

    with pytest.raises(ValueError, match="learning_rate is nan; it must be a finite number"):
        settings_from_widgets(RunSettings, {"learning_rate": float("nan")})


def test_the_same_lora_is_saved_once_under_one_name(server, dataset):
    prompt = graph(server, dataset, run_name="once")
    prompt["5"] = {"class_type": "TrainyardSaveLora", "inputs": {"lora": ["4", 0], "name": "once/mine"}}
    for _ in range(2):
        run = server.run(prompt)
        assert run.ok, run.why
        server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)
    assert [f.name for f in server.output("loras", "once").iterdir()] == ["mine.safetensors"]
    prompt["4"]["inputs"]["seed"] = 9
    assert server.run(prompt).ok
    assert sorted(f.name for f in server.output("loras", "once").iterdir()) == [
        "mine.safetensors",
        "mine_2.safetensors",
    ]
