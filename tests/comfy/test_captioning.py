"""Caption Images with the real ComfyUI: its memory manager, its text encoders, its server."""

import dataclasses
import json
import shutil
import socket
import types

import comfy.model_management as mm
import pytest
import torch
from trainyard.nodes import paths
from trainyard.nodes.data import captioning, loaded_models
from trainyard.tests import tiny_vlm
from trainyard.tests.comfy import tiny
from trainyard.trainers.captioners import CaptionResult, taggers, vlm
from trainyard.trainers.captioners.caption_prompts import PromptSettings
from trainyard.trainers.captioners.vlm import CaptionerSettings
from trainyard.trainers.data.readers import read_folder

WIDGETS = {f.name: f.default for f in dataclasses.fields(CaptionerSettings)}


@pytest.fixture(scope="module")
def colour_blip(tmp_path_factory):
    return tiny_vlm.taught_blip(tmp_path_factory.mktemp("blip") / "colours")


@pytest.fixture
def machine(folders, monkeypatch):
    """ComfyUI's folders and an empty cache of Hugging Face below one throw-away folder; a dataset of three colours in
    input/set."""
    monkeypatch.setattr("folder_paths.models_dir", str(folders / "models"))
    monkeypatch.setenv("HF_HOME", str(folders / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(captioning.CaptionImages, "hidden", types.SimpleNamespace(unique_id=None))
    (folders / "input" / "set").mkdir()
    for colour in tiny_vlm.COLOURS:
        tiny_vlm.plain_image(colour).save(folders / "input" / "set" / f"{colour}.png")
    return folders


@pytest.fixture
def no_network(monkeypatch):
    def refuse(self, address, *_):
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def install(machine, folder, name="VLM/colours"):
    shutil.copytree(folder, machine / "models" / name)
    return name


def caption(machine, **given):
    """(dataset, preview) of the node as ComfyUI runs it: in inference mode."""
    values = (
        dict(backend="local model", model="VLM/colours", text="", write="fill", allow_download=False) | WIDGETS | given
    )
    with torch.inference_mode():
        return captioning.CaptionImages.execute(read_folder(machine / "input" / "set"), **values).args


def told(dataset):
    return [" | ".join(r.captions) for r in dataset]


# -- a model from a folder, under the host's memory manager ------------------------------------------------------------


def test_a_local_model_writes_what_it_sees_without_any_connection(machine, colour_blip, no_network):
    install(machine, colour_blip)
    dataset, preview = caption(machine)
    assert told(dataset) == ["blue sky", "green sky", "red sky"]
    assert preview.splitlines() == ["3 captioned", "blue.png: blue sky", "green.png: green sky", "red.png: red sky"]
    again, preview = caption(machine)
    assert told(again) == told(dataset) and preview.startswith("3 found in the cache")


def test_while_it_works_the_model_is_in_the_hosts_list_can_be_evicted_and_comes_back(colour_blip):
    captioner = vlm.load_vlm_captioner(colour_blip, CaptionerSettings(), PromptSettings())
    mine = lambda: [m for m in mm.current_loaded_models if m.model is holder.patcher]
    with loaded_models.managed_captioner(captioner) as holder:
        assert holder.caption(tiny_vlm.plain_image("red"), "") == CaptionResult("red sky")
        assert len(mine()) == 1 and holder.patcher.current_loaded_device() == mm.get_torch_device()
        mm.unload_all_models()
        assert mine() == []
        assert holder.caption(tiny_vlm.plain_image("blue"), "") == CaptionResult("blue sky"), "it is loaded again"
        assert len(mine()) == 1
    assert mine() == []


def test_the_model_leaves_the_hosts_list_after_an_interrupt_too(colour_blip):
    captioner = vlm.load_vlm_captioner(
        colour_blip, CaptionerSettings(), PromptSettings(), check_interrupt=mm.throw_exception_if_processing_interrupted
    )
    with pytest.raises(mm.InterruptProcessingException), loaded_models.managed_captioner(captioner) as holder:
        holder.load()
        mm.interrupt_current_processing()
        holder.caption(tiny_vlm.plain_image("red"), "")
    assert not [m for m in mm.current_loaded_models if m.model is holder.patcher]


def test_an_interrupt_stops_the_node_and_the_next_run_goes_on(machine, colour_blip, monkeypatch):
    install(machine, colour_blip)
    before, calls = vlm.VlmCaptioner.caption, []

    def once(self, image, prompt):
        calls.append(1)
        if len(calls) == 2:
            mm.interrupt_current_processing()
        return before(self, image, prompt)

    monkeypatch.setattr(vlm.VlmCaptioner, "caption", once)
    with pytest.raises(mm.InterruptProcessingException):
        caption(machine)
    monkeypatch.setattr(vlm.VlmCaptioner, "caption", before)
    assert "1 found in the cache" in caption(machine)[1]


# -- the CLIP of the graph ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3_vl():
    """ComfyUI's real Qwen3-VL: loader, tokenizer, vision tower and generate, with every width small."""
    import comfy.sd
    import comfy.text_encoders.llama as llama
    import comfy.text_encoders.qwen3vl as qwen

    @dataclasses.dataclass
    class Small(llama.Qwen3VL_8BConfig):
        hidden_size: int = 64
        intermediate_size: int = 64
        num_hidden_layers: int = 2
        num_attention_heads: int = 2
        num_key_value_heads: int = 2
        lm_head: bool = False

    eyes = dict(hidden_size=32, intermediate_size=64, depth=2, deepstack_visual_indexes=[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(qwen.QWEN3VL_CONFIGS, "qwen3vl_8b", Small)
        patch.setitem(qwen.QWEN3VL_VISION, "qwen3vl_8b", eyes)
        patch.setitem(qwen.QWEN3VL_VISION_COMMON, "num_heads", 2)
        import comfy.ops

        shape = qwen._make_qwen3vl_model("qwen3vl_8b")({}, torch.float32, "meta", comfy.ops.disable_weight_init)
        weights = {
            f"model.{name}" if name.startswith("visual") else name: w
            for name, w in tiny.weights(shape, 3, torch.float32).items()
        }
        with torch.inference_mode():
            yield comfy.sd.load_text_encoder_state_dicts([weights], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


@pytest.fixture(scope="module")
def clip_l():
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_clip([str(tiny.build("clip_l"))])


def test_the_loaded_clip_describes_pictures_through_the_hosts_own_generate(machine, qwen3_vl):
    small = dict(max_tokens=4, max_res=64)
    dataset, preview = caption(machine, backend="loaded CLIP", clip=qwen3_vl, text="What colour?", **small)
    assert preview.startswith("3 captioned") and all(told(dataset))
    assert told(caption(machine, backend="loaded CLIP", clip=qwen3_vl, text="What colour?", **small)[0]) == told(
        dataset
    )
    other = caption(machine, backend="loaded CLIP", clip=qwen3_vl, text="What else is there?", **small)
    assert other[1].startswith("3 captioned"), "another prompt is another question"


def test_the_loaded_clip_sees_the_picture_and_not_only_the_question(qwen3_vl):
    tokens = [
        loaded_models.tokenize_with_image(qwen3_vl, "What?", loaded_models.pixels(tiny_vlm.plain_image(c, (64, 64))))
        for c in ("red", "blue")
    ]
    images = [
        [t["data"] for t in loaded_models.iterate_tokens(each) if loaded_models.is_image_token(t)] for each in tokens
    ]
    assert [len(p) for p in images] == [1, 1] and not torch.equal(images[0][0], images[1][0])
    with torch.inference_mode():
        states = [qwen3_vl.encode_from_tokens(t) for t in tokens]
    assert not torch.allclose(states[0], states[1])


def test_a_clip_that_cannot_see_is_refused_with_those_that_can_and_the_other_ways(machine, clip_l):
    with pytest.raises(ValueError, match=r"does not accept images.*Qwen3-VL.*Gemma 3.*'local model'"):
        caption(machine, backend="loaded CLIP", clip=clip_l)
    with pytest.raises(ValueError, match="'loaded CLIP' needs clip, and nothing is connected"):
        caption(machine, backend="loaded CLIP")


# -- models on this machine --------------------------------------------------------------------------------------------


def test_models_are_found_where_other_packs_keep_them_and_in_the_hub_cache(machine, colour_blip, monkeypatch):
    install(machine, colour_blip, "VLM/colours")
    install(machine, colour_blip, "LLM/someone/else")
    tagger = machine / "models" / "wd14_tagger" / "wd"
    tagger.mkdir(parents=True)
    (tagger / "selected_tags.csv").write_text("tag_id,name,category\n")
    (machine / "models" / "LLM" / "llama").mkdir()
    (machine / "models" / "LLM" / "llama" / "config.json").write_text('{"model_type": "llama"}')
    extra = machine / "elsewhere" / "pali"
    shutil.copytree(colour_blip, extra)
    monkeypatch.setitem(
        paths.folder_paths.folder_names_and_paths, "LLavacheckpoints", ([str(machine / "elsewhere")], set())
    )
    snapshot = machine / "hf" / "hub" / "models--Salesforce--blip-image-captioning-large" / "snapshots" / "abc"
    shutil.copytree(colour_blip, snapshot)
    names = paths.captioner_names()
    assert names == [
        "VLM/colours",
        "LLM/someone/else",
        "LLavacheckpoints/pali",
        "wd14_tagger/wd",
        "Salesforce/blip-image-captioning-large",
    ]
    assert [paths.resolve_captioner_folder(n) for n in names[2:]] == [extra, tagger, snapshot]
    assert (
        paths.resolve_captioner_folder("another/else") is None and paths.resolve_captioner_folder("VLM/nothing") is None
    )
    assert paths.resolve_captioner_folder("owner/colours") == machine / "models" / "VLM" / "colours", (
        "downloaded by hand, under its own name"
    )
    assert captioning.list_captioner_models()[: len(names)] == names


@pytest.mark.parametrize("name", ["VLM/../../../etc", "a/../../..", "../x", "captioners/../../../x"])
def test_a_name_cannot_leave_the_model_folders(machine, name):
    try:
        assert paths.resolve_captioner_folder(name) is None
    except ValueError as error:
        assert "leads out of" in str(error)
    with pytest.raises(ValueError):
        paths.new_captioner_folder(name)


def test_a_missing_model_is_answered_with_where_how_and_what_instead(machine, no_network):
    with pytest.raises(ValueError) as told:
        caption(machine, model="Qwen/Qwen3-VL-4B-Instruct")
    for part in (
        "Qwen/Qwen3-VL-4B-Instruct",
        str(machine / "models" / "VLM"),
        str(machine / "hf" / "hub"),
        "hf download",
        "8.9 GB",
        "'loaded CLIP'",
    ):
        assert part in str(told.value)


def test_only_with_the_box_ticked_a_missing_model_is_downloaded(machine, colour_blip, monkeypatch):
    import huggingface_hub

    def snapshot_download(repo, local_dir, **_):
        assert repo == "owner/colours"
        shutil.copytree(colour_blip, local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="not on this machine"):
        caption(machine, model="owner/colours")
    assert told(caption(machine, model="owner/colours", allow_download=True)[0]) == ["blue sky", "green sky", "red sky"]
    assert (machine / "models" / "captioners" / "colours" / "config.json").is_file()
    monkeypatch.delattr(huggingface_hub, "snapshot_download")
    caption(machine, model="owner/colours", allow_download=True)


def test_a_model_of_the_other_kind_is_refused(machine, colour_blip):
    install(machine, colour_blip)
    with pytest.raises(ValueError, match="VLM/colours belongs to the backend 'local model', and 'WD tagger' is chosen"):
        caption(machine, backend="WD tagger")


# -- taggers -----------------------------------------------------------------------------------------------------------


def test_a_taggers_tags_fill_what_is_missing_and_serve_the_next_captioner(machine, monkeypatch):
    """Tags first, then a caption that is asked for with them."""
    tagger = machine / "models" / "wd14_tagger" / "wd"
    tagger.mkdir(parents=True)
    (tagger / "selected_tags.csv").write_text("tag_id,name,category\n")

    class Tags:
        identity, module = "tags", None
        caption = staticmethod(lambda image, prompt: CaptionResult("hat, solo", ("hat", "solo")))

    monkeypatch.setattr(taggers, "load_tagger", lambda folder, settings: Tags())
    tagged, _ = caption(machine, backend="WD tagger", model="wd14_tagger/wd")
    assert [(r.captions, r.tags) for r in tagged] == [(("hat, solo",), ("hat", "solo"))] * 3
    values = (
        dict(backend="fixed text", model="", text="{name} with {tags}", write="replace", allow_download=False) | WIDGETS
    )
    assert told(captioning.CaptionImages.execute(tagged, **values).args[0])[0] == "blue with hat, solo"


def test_settings_of_the_other_kind_of_tags_are_refused(machine):
    (machine / "models" / "wd14_tagger" / "wd").mkdir(parents=True)
    (machine / "models" / "wd14_tagger" / "wd" / "selected_tags.csv").write_text("tag_id,name,category\n")
    with pytest.raises(ValueError, match="holds PromptSettings, and 'WD tagger' needs Tagger Settings"):
        caption(machine, backend="WD tagger", model="wd14_tagger/wd", tagger=PromptSettings())
    with pytest.raises(ValueError, match="'zero-shot tags' needs clip_vision"):
        caption(machine, backend="zero-shot tags")


# -- plain captions and wording ----------------------------------------------------------------------------------------


def test_names_and_fixed_texts_need_no_model(machine):
    assert told(caption(machine, backend="file name")[0]) == ["blue", "green", "red"]
    assert told(caption(machine, backend="file name", text="a {name} thing")[0]) == [
        "a blue thing",
        "a green thing",
        "a red thing",
    ]
    assert told(caption(machine, backend="fixed text", text="sks, {folder}")[0]) == ["sks, set"] * 3
    with pytest.raises(ValueError, match="'fixed text' and text is empty"):
        caption(machine, backend="fixed text")
    with pytest.raises(ValueError, match=r"\{colour\}, which no image has"):
        caption(machine, backend="file name", text="{colour}")


def test_the_wording_reaches_the_captions(machine, colour_blip):
    install(machine, colour_blip)
    wording = captioning.CaptionPromptNode.execute(begin="a picture of", forced="sks").args[0]
    assert told(caption(machine, prompt=wording)[0])[0].startswith("a picture of")
    assert all(each.endswith(", sks") for each in told(caption(machine, prompt=wording)[0]))


def test_the_prompt_node_knows_what_the_record_knows():
    assert captioning.CaptionPromptNode.execute().args[0] == PromptSettings()
    with pytest.raises(ValueError, match="both forbidden and forced"):
        captioning.CaptionPromptNode.execute(forbidden="a", forced="a")


# -- on the real server ------------------------------------------------------------------------------------------------


def graph(**given):
    values = dict(backend="file name", model="not/here", text="", write="fill", allow_download=False) | WIDGETS | given
    return {
        "1": {
            "class_type": "TrainyardLoadDataset",
            "inputs": {"folder": "input/captioning", "repeats": 1, "alpha_mask": False},
        },
        "2": {
            "class_type": "TrainyardCaptionPrompt",
            "inputs": {f.name: f.default for f in dataclasses.fields(PromptSettings)},
        },
        "3": {"class_type": "TrainyardCaptionImages", "inputs": {"dataset": ["1", 0], "prompt": ["2", 0], **values}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
    }


def test_on_the_server_a_folder_is_captioned_by_a_model_with_progress(server, colour_blip):
    folder = server.base / "input" / "captioning"
    folder.mkdir(parents=True)
    for colour in tiny_vlm.COLOURS:
        tiny_vlm.plain_image(colour).save(folder / f"{colour}.png")
    shutil.copytree(colour_blip, server.base / "models" / "VLM" / "colours")
    run = server.run(graph(backend="local model", model="VLM/colours"))
    assert run.ok, run.why
    assert "red.png: red sky" in json.dumps(run.outputs["4"])
    assert sorted(p.name for p in folder.iterdir()) == ["blue.png", "green.png", "red.png"], (
        "nothing is written beside the images"
    )
    missing = server.run(graph(backend="local model", model="not/here"))
    assert missing.status == 200 and "is not on this machine. Searched:" in missing.why, (
        "the node answers, not the list of the widget"
    )
