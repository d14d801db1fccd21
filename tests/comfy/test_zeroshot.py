"""Zero-shot tags and taggers with the real ComfyUI: its text encoders, its CLIP_VISION, its server."""

import dataclasses
import json
import shutil
import types

import comfy.clip_vision
import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from PIL import Image
from trainyard.nodes.data import captioning, image_features, loaded_models, tagger_settings, zeroshot
from trainyard.tests import tiny_tagger
from trainyard.tests.comfy import tiny
from trainyard.trainers.captioners import taggers
from trainyard.trainers.captioners.tags import TaggerSettings
from trainyard.trainers.captioners.vlm import CaptionerSettings
from trainyard.trainers.captioners.zeroshot import encode_words
from trainyard.trainers.data.readers import read_folder

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220)}
EYES = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_channels=3,
            hidden_act="quick_gelu", image_size=28, patch_size=14, projection_dim=768)  # fmt: skip
SENTENCES = ["a photo of a red car", "(blue:1.4) sky", "something", "a very long sentence " * 30]


@pytest.fixture(scope="module")
def clip_l():
    with torch.inference_mode():
        return comfy.sd.load_clip([str(tiny.build("clip_l"))])


def plain(colour):
    return Image.new("RGB", (40, 30), COLOURS[colour])


@pytest.fixture(scope="module")
def eyes(clip_l):
    """A small CLIP_VISION whose projection leads images of three colours to what the text encoder says of them."""
    torch.manual_seed(0)
    with torch.inference_mode():
        seer = comfy.clip_vision.ClipVisionModel(EYES)
        seer.model.load_state_dict({name: torch.randn(p.shape) * 0.2 for name, p in seer.model.state_dict().items()})
        words = encode_words(list(COLOURS), lambda texts: zeroshot.encode_text_features(clip_l, texts, "clip_l"))
        told = encode_words(["something"], lambda texts: zeroshot.encode_text_features(clip_l, texts, "clip_l"))
        pixels = [torch.tensor(COLOURS[c]).div(255).expand(1, 28, 28, 3) for c in COLOURS]
        seer.model.visual_projection = torch.nn.Identity()
        pooled = torch.cat([seer.encode_image(p)["image_embeds"] for p in pixels])  # (3, 32)
        seer.model.visual_projection = torch.nn.Linear(32, 768, bias=False)
        seer.model.visual_projection.weight.copy_(
            (torch.linalg.pinv(pooled) @ (words - told)).T
        )  # away from nothing, toward the word
    return seer


# -- one space for images and words ----------------------------------------------------------------------------------


def test_words_have_the_features_that_transformers_gives_them(clip_l):
    """The same weights in CLIPTextModelWithProjection: projected, at the end token, weights of prompts left aside."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    prefix = "clip_l.transformer."
    weights = {
        k.removeprefix(prefix): v.float()
        for k, v in clip_l.cond_stage_model.state_dict().items()
        if k.startswith(prefix)
    }
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
                            eos_token_id=49407, bos_token_id=49406, pad_token_id=49407)  # fmt: skip
    oracle = CLIPTextModelWithProjection(config).eval()
    missing = oracle.load_state_dict(weights, strict=False).missing_keys
    assert [name for name in missing if "position_ids" not in name] == []
    rows = [[token for token, _ in clip_l.tokenize(text, disable_weights=True)["l"][0]] for text in SENTENCES]
    with torch.no_grad():
        wanted = oracle(torch.tensor(rows)).text_embeds
        ours = zeroshot.encode_text_features(clip_l, SENTENCES, "clip_l")
    torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=2e-3)


def test_asking_for_words_leaves_the_text_encoder_as_it_was(clip_l):
    encode = lambda: clip_l.encode_from_tokens(clip_l.tokenize("a red car"), return_pooled=True)
    with torch.inference_mode():
        before = encode()
        zeroshot.encode_text_features(clip_l, ["a red car"], "clip_l")
        assert all(torch.equal(one, other) for one, other in zip(before, encode(), strict=True))
        assert (
            clip_l.cond_stage_model.clip_l.return_projected_pooled is clip_l.cond_stage_model.clip_l.options_default[2]
        )


def test_a_picture_is_called_by_its_colour_through_real_encoders(clip_l, eyes):
    with torch.inference_mode():
        asker = zeroshot.make_zero_shot_tagger(
            eyes, clip_l, "colour: red, green, blue", TaggerSettings(zero_shot_certainty=0.9)
        )
        assert {colour: asker.caption(plain(colour)).tags for colour in COLOURS} == {
            colour: (colour,) for colour in COLOURS
        }


def test_the_identity_changes_with_the_models_and_the_words(clip_l, eyes):
    with torch.inference_mode():
        before = zeroshot.make_zero_shot_tagger(eyes, clip_l, "red, green").identity
        assert (
            zeroshot.make_zero_shot_tagger(eyes, clip_l, "red, green").identity
            == before
            != zeroshot.make_zero_shot_tagger(eyes, clip_l, "red").identity
        )
        other = comfy.clip_vision.ClipVisionModel(EYES)
        other.model.load_state_dict({k: v + 1 for k, v in eyes.model.state_dict().items()})
        assert zeroshot.make_zero_shot_tagger(other, clip_l, "red, green").identity != before


# -- who belongs to whom -----------------------------------------------------------------------------------------------


def test_an_sd15_checkpoint_is_refused_because_its_file_has_no_projection(eyes):
    with torch.inference_mode():
        clip = comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd15")))[1]
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.normal_(
            std=0.036
        )  # what lay in memory may look right
        with pytest.raises(ValueError, match="came without its text_projection.*openai/clip-vit-large-patch14"):
            zeroshot.make_zero_shot_tagger(eyes, clip, "cat, dog")


def test_without_a_file_to_ask_the_values_of_the_projection_decide(clip_l):
    weight = clip_l.cond_stage_model.clip_l.transformer.text_projection.weight
    assert zeroshot.is_plausible_projection(weight)
    for odd in (
        torch.zeros(8, 8),
        torch.eye(8),
        torch.full((8, 8), float("nan")),
        torch.randn(8, 8) * 1e30,
        torch.randn(8, 8) * 1e-20,
    ):
        assert not zeroshot.is_plausible_projection(odd)
    assert (
        zeroshot.has_projection_in_files([], 768) is None
        and zeroshot.has_projection_in_files([str(tiny.build("clip_l"))], 768) is True
    )
    assert zeroshot.has_projection_in_files([str(tiny.build("clip_l"))], 1280) is False


def stand_in(width, kind="clip_vision_model"):
    """What is asked of a CLIP_VISION before it looks; the large ones do not fit a test."""
    projection = torch.nn.Linear(4, width, bias=False, device="meta") if width else torch.nn.Identity()
    return types.SimpleNamespace(model_type=kind, model=types.SimpleNamespace(visual_projection=projection))


@pytest.mark.parametrize(
    ("seer", "told"),
    [
        (stand_in(1280), "needs CLIP-bigG as its partner .*holds clip_l.*the CLIP of an SDXL checkpoint"),
        (stand_in(1024), "needs CLIP-H as its partner .*the CLIP of an SD2.1 checkpoint"),
        (stand_in(1024, "dinov3"), "is a dinov3 model; ComfyUI has no text encoder that belongs to it"),
        (stand_in(1152, "siglip_vision_model"), "is a siglip_vision_model model"),
        (
            stand_in(None),
            "has no projection, and no text encoder here fits that. These pairs do: CLIP-ViT-L/14 with CLIP-L",
        ),
        (stand_in(512), "has 512 numbers an image"),
    ],
)
def test_models_that_are_no_pair_are_told_which_ones_are(clip_l, seer, told):
    with pytest.raises(ValueError, match=told):
        zeroshot.find_partner_encoder(seer, clip_l)


# -- through the nodes -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(folders, monkeypatch):
    monkeypatch.setattr("folder_paths.models_dir", str(folders / "models"))
    monkeypatch.setenv("HF_HOME", str(folders / "hf"))
    monkeypatch.setattr(captioning.CaptionImages, "hidden", types.SimpleNamespace(unique_id=None))
    (folders / "input" / "set").mkdir()
    for colour in COLOURS:
        tiny_tagger.drawn(colour).save(folders / "input" / "set" / f"{colour}.png")
    return folders


def caption(machine, **given):
    widgets = {f.name: f.default for f in dataclasses.fields(CaptionerSettings)}
    values = (
        dict(backend="WD tagger", model="wd14_tagger/tiny", text="", write="fill", allow_download=False)
        | widgets
        | given
    )
    with torch.inference_mode():
        return captioning.CaptionImages.execute(read_folder(machine / "input" / "set"), **values).args[0]


def test_zero_shot_tags_become_tags_and_captions_of_the_dataset(machine, clip_l, eyes):
    for colour in COLOURS:
        plain(colour).save(machine / "input" / "set" / f"{colour}.png")
    found = caption(machine, backend="zero-shot tags", text="colour: red, green, blue", clip=clip_l, clip_vision=eyes)
    assert [record.tags for record in found] == [("blue",), ("green",), ("red",)]
    assert [record.captions for record in found] == [("blue",), ("green",), ("red",)]


@pytest.fixture(scope="module", params=["timm", "onnxruntime"])
def tagger_folder(request, tmp_path_factory):
    pytest.importorskip(request.param)
    pytest.importorskip("onnx" if request.param == "onnxruntime" else "timm")
    make = tiny_tagger.timm_folder if request.param == "timm" else tiny_tagger.onnx_folder
    return make(tmp_path_factory.mktemp(request.param) / "tiny")


def test_a_tagger_fills_tags_and_captions_by_the_connected_settings(machine, tagger_folder):
    shutil.copytree(tagger_folder, machine / "models" / "wd14_tagger" / "tiny")
    settings = tagger_settings.TaggerSettingsNode.execute(
        undesired="red square", replacements="green -> grass", ratings="last"
    ).args[0]
    found = {record.path.split("/")[-1]: record for record in caption(machine, tagger=settings)}
    assert found["green.png"].tags == ("grass", "bright")
    assert found["red.png"].captions == (", ".join(found["red.png"].tags),) and set(found["red.png"].tags) == {
        "rosa (toy story)",
        "red",
        "bright",
    }


def test_the_network_is_in_the_hosts_list_while_it_works_and_gone_afterwards(tmp_path):
    pytest.importorskip("timm")
    folder = tiny_tagger.timm_folder(tmp_path / "tiny")
    with torch.inference_mode(), loaded_models.managed_captioner(taggers.load_tagger(folder)) as held:
        assert "blue" in held.caption(tiny_tagger.drawn("blue"), "").tags
        mm.unload_all_models()  # another node needs the memory
        assert "red" in held.caption(tiny_tagger.drawn("red"), "").tags
        assert any(loaded.model is held.patcher for loaded in mm.current_loaded_models)
    assert not any(loaded.model is held.patcher for loaded in mm.current_loaded_models)


def test_the_settings_node_gives_the_records_defaults():
    assert tagger_settings.TaggerSettingsNode.execute().args[0] == TaggerSettings()


def test_on_the_server_a_folder_is_tagged_with_the_settings_of_their_node(server, tmp_path):
    pytest.importorskip("timm")
    folder = server.base / "input" / "tagging"
    folder.mkdir(parents=True)
    for colour in COLOURS:
        tiny_tagger.drawn(colour).save(folder / f"{colour}.png")
    shutil.copytree(tiny_tagger.timm_folder(tmp_path / "tiny"), server.base / "models" / "wd14_tagger" / "tiny")
    widgets = {f.name: f.default for f in dataclasses.fields(CaptionerSettings)}
    settings = {f.name: f.default for f in dataclasses.fields(TaggerSettings)} | {
        "always_first": "red, blue",
        "undesired": "red square",
    }
    run = server.run({
        "1": {"class_type": "TrainyardLoadDataset", "inputs": {"folder": "input/tagging", "repeats": 1, "alpha_mask": False}},
        "2": {"class_type": "TrainyardTagger", "inputs": settings},
        "3": {"class_type": "TrainyardCaptionImages",
              "inputs": dict(dataset=["1", 0], tagger=["2", 0], backend="WD tagger", model="wd14_tagger/tiny", text="", write="fill",
                             allow_download=False) | widgets},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
    })  # fmt: skip
    assert run.ok, run.why
    told = json.dumps(run.outputs["4"])
    assert "red.png: red, rosa (toy story)" in told and "blue.png: blue, bluebell (toy)" in told


def test_pictures_of_any_shape_have_one_row_of_features_each(eyes):
    with torch.inference_mode():
        seen = image_features.encode_image_features(eyes, [plain("red"), Image.new("RGB", (64, 128)), plain("blue")])
    assert seen.shape == (3, 768)
