"""LECO, sliders and differences through a real server: trained, saved, loaded by the host, stopped, continued, and
refused in words."""

import json
import time

import pytest
from PIL import Image
from safetensors import safe_open
from trainyard.tests.toy import shapes, world
from trainyard.tests.workflows.convert import widgets

QUICK = dict(steps=4, learning_rate=1e-3, rank=2, save_every=0, calibrate="off")


@pytest.fixture(scope="module")
def toy(server):
    return server.add_model("checkpoints", world.cached())


@pytest.fixture(scope="module")
def node(server):
    """node(kind, **inputs): a node of a prompt, as the page sends it when nothing else was changed."""
    schemas = server.object_info()

    def made(kind, **inputs):
        shown = {
            name: about
            for group in ("required", "optional")
            for name, about in schemas[kind]["input"].get(group, {}).items()
        }
        defaults = {name: about.get("default", first(*shown[name])) for name, _, about in widgets(schemas[kind])}
        return {"class_type": kind, "inputs": defaults | inputs}

    return made


def first(kind, about=None):
    """The first option of a list, which the page chooses; ComfyUI writes the lists of old nodes in the place of the
    kind."""
    return next(iter(kind if isinstance(kind, list) else (about or {}).get("options", ())), "")


@pytest.fixture(scope="module")
def folders(server):
    """input/pair_more and pair_less: three scenes with a large and with a small shape; pair_odd: one of them under
    another name."""
    for name, size in (("pair_more", "large"), ("pair_less", "small"), ("pair_odd", "small")):
        folder = server.base / "input" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, shape in enumerate(("circle", "square", "cross")):
            stem = f"{'stray' if name == 'pair_odd' and i == 2 else 'scene'}_{i}"
            shapes.draw(shape, "red", size).save(folder / f"{stem}.png")
            (folder / f"{stem}.txt").write_text(shapes.caption(shape, "red"))


@pytest.fixture(scope="module")
def leco(node, toy):
    """leco(**widgets): checkpoint and points -> Train LECO, with words that can be learnt."""

    def graph(**changes):
        return {
            "model": node("CheckpointLoaderSimple", ckpt_name=toy),
            "points": node("TrainyardPoints", sampling_steps=3, ways=2, refresh=2),
            "train": node("TrainyardTrainLeco", model=["model", 0], clip=["model", 1], points=["points", 0], **{
                **QUICK, "target": "a red circle", "neutral": "a circle", "resolution": 64, "run_name": "leco", **changes}),
        }  # fmt: skip

    return graph


@pytest.fixture(scope="module")
def from_pairs(node, toy, folders):
    """from_pairs(kind, **widgets): two folders -> a Train node that learns from images."""

    def graph(kind, negative="input/pair_less", **changes):
        sizes = dict(resolution=64, step=8, min_side=64, max_side=64)
        return {
            "model": node("CheckpointLoaderSimple", ckpt_name=toy),
            "more": node("TrainyardLoadDataset", folder="input/pair_more"),
            "less": node("TrainyardLoadDataset", folder=negative),
            "pairs": node("TrainyardImagePairs", positive=["more", 0], negative=["less", 0]),
            "encode": node(
                "TrainyardEncodeDataset", dataset=["pairs", 0], vae=["model", 2], clip=["model", 1], **sizes
            ),
            "train": node(kind, model=["model", 0], encoded=["encode", 0], **{**QUICK, "run_name": "pairs", **changes}),
        }

    return graph


def ran(server, prompt, **how):
    run = server.run(prompt, **how)
    assert run.ok, run.why
    return run


def said(run, key="train"):
    return json.dumps(run.outputs[key])


def folder_of(server, name):
    (folder,) = (server.base / "output" / "loras" / "trainyard").glob(f"{name}-*")
    return folder


def read(path):
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys()}, file.metadata()


# -- trained, saved, loaded --------------------------------------------------------------------------------------------


def test_a_leco_is_trained_saved_swept_and_taken_by_the_hosts_own_loader(server, node, leco):
    prompt = leco(run_name="leco_whole", calibrate="after training", learning_rate=1e-2) | {
        "save": node("TrainyardSaveLora", lora=["train", 0], name="leco/whole", model=["model", 0]),
        "ask": node("CLIPTextEncode", text="a red circle", clip=["model", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "sweep": node("TrainyardStrengthSweep", model=["model", 0], lora=["train", 0], vae=["model", 2], positive=["ask", 0], negative=["empty", 0],
                      strengths="-1, 1", pictures=2, resolution=64, steps=2, guidance=2.0),
        "images": node("SaveImage", images=["sweep", 1], filename_prefix="sweep/images"),
    }  # fmt: skip
    run = ran(server, prompt)
    assert "4 steps" in said(run) and "forwards per step" in said(run) and "effect" in said(run)
    (shown,) = run.outputs["sweep"]["images"]
    with Image.open(server.base / shown["type"] / shown["subfolder"] / shown["filename"]) as sheet:
        assert sheet.width > 3 * 192 and sheet.height > 2 * 192
    assert len(run.outputs["images"]["images"]) == 6, "two seeds at -1, 0 and 1"
    tensors, metadata = read(server.output("loras", "leco", "whole.safetensors"))
    assert json.loads(metadata["trainyard.curve"])["strengths"] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert json.loads(metadata["prompt"])["train"]["class_type"] == "TrainyardTrainLeco" and tensors

    look = {key: prompt[key] for key in ("model", "ask", "empty")} | {
        "lora": node(
            "LoraLoader",
            model=["model", 0],
            clip=["model", 1],
            lora_name="leco/whole.safetensors",
            strength_model=1.0,
            strength_clip=1.0,
        ),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    }
    for side, model in (("without", ["model", 0]), ("with", ["lora", 0])):
        look[f"{side}_s"] = node(
            "KSampler",
            model=model,
            positive=["ask", 0],
            negative=["empty", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=2,
        )
        look[f"{side}_d"] = node("VAEDecode", samples=[f"{side}_s", 0], vae=["model", 2])
        look[side] = node("SaveImage", images=[f"{side}_d", 0], filename_prefix=f"sweep/{side}")
    before = len(server.logs())  # another test's runs may have had something to say
    run = ran(server, look)
    pictures = [
        Image.open(server.output("sweep", run.outputs[side]["images"][0]["filename"])).tobytes()
        for side in ("without", "with")
    ]
    assert pictures[0] != pictures[1], "the host's loader must change the image"
    assert "lora key not loaded" not in server.logs()[before:]


def test_a_leco_that_is_run_twice_is_trained_once_also_when_the_cache_is_gone(server, leco):
    ran(server, leco(run_name="leco_twice"))
    file = folder_of(server, "leco_twice") / "leco_twice.safetensors"
    made = file.stat().st_mtime_ns
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    assert "already trained" in said(ran(server, leco(run_name="leco_twice", save_every=100)))
    assert file.stat().st_mtime_ns == made


def test_a_leco_that_is_stopped_and_continued_is_the_one_that_was_not_stopped(server, leco):
    """The ways that were walked before the stop, and what the frozen model said there, are part of the state."""
    stopped = server.run(leco(run_name="leco_stopped", steps=16), watch=stop_after(server, 4))
    assert stopped.ending == "execution_interrupted", stopped.why
    about = json.loads((folder_of(server, "leco_stopped") / "run.json").read_text())
    assert 0 < about["step"] < 16
    ran(server, leco(run_name="leco_stopped", steps=16))
    ran(server, leco(run_name="leco_unstopped", steps=16))
    one, other = (
        read(folder_of(server, name) / f"{name}.safetensors")[0] for name in ("leco_stopped", "leco_unstopped")
    )
    assert one == other


def stop_after(server, step):
    """Press Cancel when the progress bar of the Train node has reached `step`."""

    def watch(event):
        data = event.get("data") or {}
        if event["type"] == "progress" and data.get("node") == "train" and data["value"] >= step:
            server.interrupt()

    return watch


def slider(prompt, node, **inputs):
    """Train Text Slider in the place of Train LECO."""
    links = {name: prompt["train"]["inputs"][name] for name in ("model", "clip", "points")}
    return node(
        "TrainyardTrainTextSlider", **links, **{**QUICK, "resolution": 64, "run_name": "refused_pairs", **inputs}
    )


@pytest.mark.parametrize("kind", ["TrainyardTrainImageSlider", "TrainyardTrainDifference"])
def test_two_folders_become_a_lora_of_what_differs(server, from_pairs, kind):
    run = ran(server, from_pairs(kind, run_name=kind[14:].lower()))
    assert "4 steps" in said(run) and "student" in said(run)


def test_a_slider_is_trained_from_rows_of_a_file_and_its_settings_nodes_count(server, node, leco):
    file = server.base / "input" / "size.yaml"
    file.write_text("- {target: a circle, positive: a large circle, unconditional: a small circle, guidance: 2, "
                    "preserve: a red square}\n"
                    "- {target: a square, positive: a large square, unconditional: a small square, weight: "
                    "2}\n")  # fmt: skip
    prompt = leco() | {
        "rows": node("TrainyardLoadPrompts", file="input/size.yaml"),
        "about": node("PreviewAny", source=["rows", 1]),
        "adapter": node("TrainyardAdapter", targets="attention"),
        "noise": node("TrainyardNoiseAndLoss", min_time=0.4),
    }
    prompt["train"] = slider(
        prompt, node, prompts=["rows", 0], adapter=["adapter", 0], noise=["noise", 0], run_name="rows"
    )
    run = ran(server, prompt)
    assert "a large circle" in said(run, "about") and "weight 2" in said(run, "about")
    tensors, _ = read(folder_of(server, "rows") / "rows.safetensors")
    assert tensors and not any("_mlp_" in key for key in tensors)


# -- trouble: a clear word before any training -------------------------------------------------------------------------


def words(**inputs):
    return lambda prompt, node, server: prompt["train"]["inputs"].update(inputs)


def settings(kind, slot, **inputs):
    def change(prompt, node, server):
        prompt["settings"] = node(kind, **inputs)
        prompt["train"]["inputs"][slot] = ["settings", 0]

    return change


def prompt_text(text):
    def change(prompt, node, server):
        (server.base / "input" / "wrong.yaml").write_text(text)
        prompt["rows"] = node("TrainyardLoadPrompts", file="input/wrong.yaml")
        prompt["train"]["inputs"] |= {"prompts": ["rows", 0], "target": ""}

    return change


def rows_and_words(prompt, node, server):
    prompt["rows"] = node("TrainyardLoadPrompts", text="a red square")
    prompt["train"]["inputs"]["prompts"] = ["rows", 0]


def slider_of(rows="", **inputs):
    def change(prompt, node, server):
        prompt["rows"] = node("TrainyardLoadPrompts", text=rows)
        prompt["train"] = slider(prompt, node, **inputs, **({"prompts": ["rows", 0]} if rows else {}))

    return change


def linked_guidance(prompt, node, server):
    prompt["number"] = node("PrimitiveFloat", value=500.0)
    prompt["train"]["inputs"]["guidance"] = ["number", 0]


def no_text_encoder(prompt, node, server):
    prompt["model"]["inputs"]["ckpt_name"] = server.install("sd3_noclip")


LECO_TROUBLE = {
    "a checkpoint without text encoder": (no_text_encoder, "CLIP is empty: this checkpoint holds no text encoder"),
    "no target": (words(target="  "), "target is empty. Write the words of the concept"),
    "positive equal to unconditional": (words(positive="a dog", unconditional="a dog"), "positive and unconditional "
                                                                                        "are both 'a dog'"),
    "nothing to replace": (words(action="replace"), "action is replace and positive is None; write what 'a red circle' "
                                                    "is to become"),
    "a goal that is there already": (words(action="enhance", neutral=""), "nothing would be learnt. Raise guidance "
                                                                          "above 1"),
    "guidance beyond its widget": (words(guidance=0.0), "Value 0.0 smaller than min of 0.01"),
    "guidance beyond its range from a link": (linked_guidance, "guidance is 500.0; it must lie between 0.01 and 100.0"),
    "a prompt longer than the text encoder takes": (words(positive="red " * 90), "takes at once: it would be cut into "
                                                                                 "2 pieces. Shorten it."),
    "an empty range of noise levels": (settings("TrainyardNoiseAndLoss", "noise", min_time=0.8, max_time=0.2),
                                       "min_time is 0.8 and max_time is 0.2; min_time must be the smaller one"),
    "a text encoder that is to be trained": (settings("TrainyardAdapter", "adapter", text_encoder=True), "Switch it "
                                                                                                         "off in Adapter Settings"),
    "points on images that are not there": (settings("TrainyardPoints", "points", points="pictures"), "no encoded "
                                                                                                        "dataset is "
                                                                                                        "connected"),
    "a wrong key in a prompt file": (prompt_text("- {target: cat, guidence: 4}\n"),
                                     "wrong.yaml: Row 1: there is no key 'guidence'. Did you mean 'guidance'?"),
    "no guidance in a prompt file": (prompt_text("- {target: cat, guidance: 0}\n"), "guidance is 0; it must be above "
                                                                                    "0"),
    "prompts of two places": (rows_and_words, "target is 'a red circle', and prompts are connected too"),
    "a slider with one end": (slider_of(target="cat", positive="old cat", negative="old cat"), "positive and negative "
                                                                                               "are both 'old cat'"),
    "a slider that is to replace": (slider_of("cat -> dog"), "'cat' -> 'dog' replaces, and a slider has two ends"),
    "a run name that leaves its folder": (words(run_name="../../evil"), "The run name is '../../evil'"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", LECO_TROUBLE)
def test_trouble_with_prompts_is_told_before_any_training(server, node, leco, trouble):
    change, message = LECO_TROUBLE[trouble]
    prompt = leco(run_name="refused_pairs")
    change(prompt, node, server)
    refused(server, prompt, message)


def test_pictures_without_a_partner_are_named(server, from_pairs):
    refused(server, from_pairs("TrainyardTrainImageSlider", "input/pair_odd", run_name="refused_pairs"),
            "2 have no partner, scene_2 (only positive), stray_2 (only negative)")  # fmt: skip


def test_one_folder_chosen_twice_is_no_difference(server, from_pairs):
    refused(
        server,
        from_pairs("TrainyardTrainImageSlider", "input/pair_more", run_name="refused_pairs"),
        "Both images of every pair are the same",
    )


def test_pictures_that_were_never_paired_are_refused_with_the_node_that_pairs_them(server, from_pairs):
    prompt = from_pairs("TrainyardTrainDifference", run_name="refused_pairs")
    prompt["encode"]["inputs"]["dataset"] = ["more", 0]
    refused(server, prompt, "belongs to no pair. Put Image Pairs between Load Dataset and Encode Dataset")


def refused(server, prompt, message):
    run = server.run(prompt)
    assert not run.ok
    assert message in run.why.replace('\\"', '"'), run.why
    assert not list((server.base / "output" / "loras" / "trainyard").glob("refused_pairs-*"))
