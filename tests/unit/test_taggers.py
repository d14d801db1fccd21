"""Taggers: the right tags for drawn images through timm and onnxruntime, and every rule between a probability and a
word by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.tests import tiny_tagger
from trainyard.trainers.captioners import taggers
from trainyard.trainers.captioners.taggers import load_tagger, pad_to_white_square
from trainyard.trainers.captioners.tags import (
    TAGGER_KAOMOJI,
    TaggerSettings,
    TagLabel,
    mcut,
    parse_replacements,
    select_tags,
)


def picked(probabilities, **settings):
    """Tags for {name or (name, category): probability}."""
    labels = [TagLabel(*(name if isinstance(name, tuple) else (name,))) for name in probabilities]
    return select_tags(labels, probabilities.values(), TaggerSettings(**settings))


# -- from probabilities to words ---------------------------------------------------------------------------------------


def test_ordinary_tags_and_characters_have_thresholds_of_their_own():
    found = {
        "solo": 0.35,
        "hat": 0.34,
        ("ann", "character"): 0.85,
        ("bob", "character"): 0.84,
        ("general", "rating"): 0.99,
    }
    assert picked(found) == ("ann", "solo")
    assert picked(found, general_threshold=0.3, character_threshold=0.5) == ("ann", "bob", "solo", "hat")


def test_mcut_by_hand():
    """0.9 0.8 | 0.3 0.25 0.1: the largest gap is 0.5, its middle 0.55."""
    assert mcut([0.3, 0.9, 0.1, 0.8, 0.25], 0.35) == pytest.approx(0.55)
    assert picked({"a": 0.3, "b": 0.9, "c": 0.1, "d": 0.8, "e": 0.25}, mcut=True) == ("b", "d")


def test_mcut_without_a_gap_keeps_the_threshold_that_was_set():
    assert mcut([], 0.35) == mcut([0.9], 0.35) == mcut([0.5, 0.5, 0.5], 0.35) == 0.35


def test_mcut_names_no_character_below_its_floor():
    """0.12 and 0.02: the middle of the gap is 0.07, and a character at 0.12 is a guess."""
    assert picked({("ann", "character"): 0.12, ("bob", "character"): 0.02}, mcut=True) == ()
    assert picked({("ann", "character"): 0.4, ("bob", "character"): 0.02}, mcut=True) == ("ann",)


def test_a_tag_that_a_longer_one_ends_with_is_left_out():
    found = {"long_hair": 0.9, "very_long_hair": 0.8, "hair": 0.7, "cat_ears": 0.6, "cat": 0.5, "fair": 0.4}
    assert picked(found, drop_overlaps=True) == ("very long hair", "cat ears", "cat", "fair")
    assert len(picked(found)) == 6


def test_undesired_tags_are_found_in_any_spelling():
    assert picked({"long_hair": 0.9, "Solo": 0.8, "hat": 0.7}, undesired="Long Hair, solo,") == ("hat",)


@pytest.mark.parametrize(
    "text", ["long_hair -> lange haare; hat -> cap, headwear; solo ->", "long hair,lange haare;hat,cap"]
)
def test_tags_are_replaced_in_our_spelling_and_in_kohyas(text):
    names = parse_replacements(text)
    assert names["long_hair"] == ("lange haare",) and "cap" in names["hat"]


def test_a_replaced_tag_stands_where_the_old_one_stood_and_never_twice():
    found = {"hat": 0.9, "solo": 0.8, "cap": 0.7}
    assert picked(found, replacements="hat -> cap") == ("cap", "solo")
    assert picked(found, replacements="solo ->; hat -> red hat, wool") == ("red hat", "wool", "cap")


@pytest.mark.parametrize("text", ["hat", "a -> b; hat", "a,b,c", "-> b", "a,"])
def test_a_replacement_that_is_no_pair_is_told_at_once(text):
    with pytest.raises(ValueError, match="is not a pair; write a -> b; c -> d"):
        TaggerSettings(replacements=text)


def test_a_character_expands_into_name_and_series():
    found = {("saber_(alter)_(fate)", "character"): 0.9, ("plain", "character"): 0.88, "hat_(food)": 0.9}
    assert picked(found, expand_characters=True) == ("saber (alter)", "fate", "plain", "hat (food)")
    assert picked(found) == ("saber (alter) (fate)", "plain", "hat (food)")


def test_orders_by_hand():
    found = {
        "sky": 0.9,
        ("ann", "character"): 0.87,
        ("wolf", "species"): 0.8,
        ("monet", "artist"): 0.7,
        ("lore_x", "lore"): 0.95,
    }
    assert picked(found, order="probability") == ("lore x", "sky", "ann", "wolf", "monet")
    assert picked(found, order="characters first") == ("ann", "lore x", "sky", "wolf", "monet")
    assert picked(found, order="category") == ("ann", "monet", "wolf", "sky", "lore x")


def test_always_first_moves_what_was_found_and_adds_nothing():
    found = {"sky": 0.9, "solo": 0.6, "1girl": 0.5, ("ann", "character"): 0.9}
    assert picked(found, always_first="1girl, 1boy, solo") == ("1girl", "solo", "ann", "sky")


def test_the_most_probable_ones_are_kept():
    assert picked({"a": 0.5, "b": 0.9, "c": 0.7}, max_tags=2) == ("b", "c")


def test_the_best_rating_is_written_where_it_is_wanted():
    found = {("general", "rating"): 0.2, ("sensitive", "rating"): 0.3, "sky": 0.9}
    assert picked(found) == ("sky",)
    assert picked(found, ratings="first") == ("sensitive", "sky")
    assert picked(found, ratings="last") == ("sky", "sensitive")


def test_underscores_become_spaces_except_in_faces():
    assert len(TAGGER_KAOMOJI) == 19
    assert picked({"long_hair": 0.9, "^_^": 0.8, "||_||": 0.7}) == ("long hair", "^_^", "||_||")
    assert picked({"long_hair": 0.9}, spaces=False) == ("long_hair",)


def test_parentheses_are_escaped_only_when_asked():
    found = {"ann_(book)": 0.9}
    assert picked(found) == ("ann (book)",)
    assert picked(found, escape_parentheses=True) == (r"ann \(book\)",)


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 32), (31, 64), (32, 32), (33, 200)])
def test_pictures_are_prepared_as_the_slow_version_does_to_the_last_bit(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    fast = pad_to_white_square(image, tiny_tagger.SIZE)[:, :, ::-1].astype(np.float32)
    assert np.array_equal(fast, tiny_tagger.slowly_prepared(image))


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert (pad_to_white_square(image, 32) == 255).all()


def test_pictures_for_timm_equal_timms_own_transform(timm_folder):
    timm = pytest.importorskip("timm")
    tagger = load_tagger(timm_folder, TaggerSettings(channels="RGB"))
    image = tiny_tagger.drawn("red", size=(48, 48))
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=tagger.module))
    assert np.array_equal(tagger.preprocess(image), transform(image).numpy())


# -- taggers that were trained on three colours ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    pytest.importorskip("timm")
    return tiny_tagger.timm_folder(tmp_path_factory.mktemp("taggers") / "wd-tiny-tagger-v3")


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    return tiny_tagger.onnx_folder(tmp_path_factory.mktemp("taggers") / "wd-tiny-onnx")


@pytest.fixture(scope="module", params=["timm_folder", "onnx_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


WORDS = {"red": ("rosa", "red"), "green": ("green",), "blue": ("bluebell", "blue")}


@pytest.mark.parametrize("colour", WORDS)
def test_a_picture_gets_the_tag_of_its_colour_and_no_other(folder, colour):
    said = load_tagger(folder).caption(tiny_tagger.drawn(colour, shift=2), "a prompt that taggers leave aside")
    others = set(tiny_tagger.COLOURS) - {colour}
    assert colour in said.tags and not others & set(said.tags)
    assert said.text == ", ".join(said.tags)


def test_characters_and_ratings_come_out_of_a_real_list_of_tags(folder):
    told = (
        load_tagger(folder, TaggerSettings(expand_characters=True, ratings="last", drop_overlaps=True))
        .caption(tiny_tagger.drawn("red"))
        .tags
    )
    assert (
        set(told) == {"rosa", "toy story", "red", "red square", "bright"} and told[0] == "rosa" and told[-1] == "bright"
    )


def test_blue_and_red_change_places_for_a_tagger_that_is_told_the_wrong_order_of_colours(folder):
    assert "blue" in load_tagger(folder, TaggerSettings(channels="RGB")).caption(tiny_tagger.drawn("red")).tags


def test_a_batch_answers_as_its_pictures_do_one_by_one(folder):
    tagger = load_tagger(folder)
    batch = np.stack([tagger.preprocess(tiny_tagger.drawn(colour)) for colour in WORDS])
    together = tagger.run(batch)
    assert together.shape == (3, len(tiny_tagger.TAGS)) and together.dtype == np.float32
    np.testing.assert_allclose(together, np.concatenate([tagger.run(one[None]) for one in batch]), atol=1e-6)


def test_the_network_may_be_moved_by_its_host_and_follows_its_dtype(timm_folder):
    tagger = load_tagger(timm_folder)
    assert isinstance(tagger.module, torch.nn.Module)
    tagger.module.to(torch.bfloat16)
    assert "green" in tagger.caption(tiny_tagger.drawn("green")).tags


def test_an_onnx_file_that_ends_without_a_sigmoid_says_the_same(onnx_folder, tmp_path):
    bare = tiny_tagger.onnx_folder(tmp_path / "bare", sigmoid=False)
    one, other = load_tagger(onnx_folder), load_tagger(bare)
    image = one.preprocess(tiny_tagger.drawn("blue"))[None]
    np.testing.assert_allclose(one.run(image), other.run(image), atol=1e-5)


def test_the_identity_changes_with_the_settings_and_with_the_weights(onnx_folder, tmp_path):
    copy = shutil.copytree(onnx_folder, tmp_path / onnx_folder.name)
    before = load_tagger(onnx_folder).identity
    assert load_tagger(copy).identity == before
    assert load_tagger(copy, TaggerSettings(general_threshold=0.4)).identity != before
    with (copy / "model.onnx").open("r+b") as file:
        file.seek(-40, 2)
        byte = file.read(1)
        file.seek(-40, 2)
        file.write(bytes([byte[0] ^ 1]))
    assert taggers.hash_file_samples(copy / "model.onnx") != taggers.hash_file_samples(onnx_folder / "model.onnx")


# -- folders that are not what they should be --------------------------------------------------------------------------


def test_e621_lists_and_other_names_of_lists_are_read(onnx_folder, tmp_path):
    """Z3D-E621-Convnext ships tags-selected.csv; its categories are e621's."""
    folder = tmp_path / "z3d"
    folder.mkdir()
    shutil.copy(onnx_folder / "model.onnx", folder)
    tiny_tagger.write_tags(folder, [("wolf", 5), *tiny_tagger.TAGS[1:]], "tags-selected.csv")
    assert load_tagger(folder).labels[0] == TagLabel("wolf", "species")
    (folder / "tags-selected.csv").rename(folder / "anything.csv")
    assert load_tagger(folder).labels[0] == TagLabel("wolf", "species")


def test_a_folder_that_is_missing_or_holds_no_tagger_says_what_to_download(tmp_path):
    with pytest.raises(ValueError, match="no tagger folder .*hf download SmilingWolf"):
        load_tagger(tmp_path / "nowhere")
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(ValueError, match=r"0 lists of tags .* but readme\.md; .*hf download"):
        load_tagger(tmp_path)
    tiny_tagger.write_tags(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds no tagger that can be run, but readme\.md, selected_tags\.csv.*needs model\.onnx"
    ):
        load_tagger(tmp_path)


def test_a_list_that_does_not_belong_to_the_model_is_refused_with_both_counts(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tiny_tagger.write_tags(copy, tiny_tagger.TAGS[:-1])
    with pytest.raises(ValueError, match="answers 8 tags and its list names 7"):
        load_tagger(copy)


def test_a_package_that_is_missing_is_named_with_the_line_to_type(timm_folder, onnx_folder, monkeypatch):
    monkeypatch.setattr(taggers, "is_package_installed", lambda package: False)
    for folder, package in ((timm_folder, "timm"), (onnx_folder, "onnxruntime")):
        with pytest.raises(ImportError, match=f"python -m pip install {package}"):
            load_tagger(folder)


def test_with_both_files_the_one_that_can_be_run_is_chosen(timm_folder, onnx_folder, tmp_path, monkeypatch):
    both = shutil.copytree(timm_folder, tmp_path / "both")
    shutil.copy(onnx_folder / "model.onnx", both)
    assert load_tagger(both).module is not None
    monkeypatch.setattr(taggers, "is_package_installed", lambda package: package == "onnxruntime")
    assert load_tagger(both).module is None


class Session:
    """What onnxruntime's session answers about a model whose pixels come first."""

    def __init__(self, shape):
        self.shape = shape

    def get_inputs(self):
        return [type("Input", (), {"name": "image", "shape": self.shape})]


def test_an_onnx_file_with_pixels_first_is_normalised_as_its_config_says():
    config = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    network = taggers.make_onnx_network("model.onnx", config, Session(["n", 3, 8, 8]))
    assert network.preprocess(np.full((8, 8, 3), 255, np.uint8)).tolist() == np.full((3, 8, 8), 2.0).tolist()
    with pytest.raises(ValueError, match="no config.json beside it names mean and std"):
        taggers.make_onnx_network("model.onnx", {}, Session(["n", 3, 8, 8]))
    with pytest.raises(ValueError, match=r"of shape \['n', 9\]; a tagger needs"):
        taggers.make_onnx_network("model.onnx", {}, Session(["n", 9]))


def test_a_damaged_config_is_named(timm_folder, tmp_path):
    copy = shutil.copytree(timm_folder, tmp_path / "copy")
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_tagger(copy)


def test_weights_that_do_not_fit_the_architecture_are_an_error_with_its_name(timm_folder, tmp_path):
    copy = shutil.copytree(timm_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_args": {**config["model_args"], "embed_dim": 64}}))
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224'. cannot be loaded with timm"):
        load_tagger(copy)
