"""Captions: what is asked, what is said, what is kept, and that no network is needed for any of it."""

import json
import socket

import pytest
import torch
from PIL import Image
from trainyard.tests import tiny_vlm
from trainyard.trainers.captioners import CaptionResult, known_captioners, template_captioner, vlm
from trainyard.trainers.captioners.caption_dataset import WRITE_MODES, CaptionCache, caption_dataset
from trainyard.trainers.captioners.caption_prompts import (
    CAPTION_LENGTHS,
    CAPTION_STYLES,
    TEMPLATE_FIELDS,
    PromptSettings,
    apply_wording_rules,
    build_caption_prompt,
    fill_caption_template,
)
from trainyard.trainers.captioners.vlm import CaptionerSettings
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, ImageRecord

SHORT = CaptionerSettings(max_tokens=6)
FREE = PromptSettings()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test here opens a connection, whatever it loads."""

    def refuse(self, address, *_):
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **_: refuse(None, a[0]))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """kind -> folder of a random model, built when first asked for."""
    folder, built = tmp_path_factory.mktemp("zoo"), {}
    return lambda kind: (
        built.setdefault(kind, None) or built.update({kind: tiny_vlm.build(kind, folder)}) or built[kind]
    )


@pytest.fixture(scope="module")
def colour_blip(tmp_path_factory):
    return tiny_vlm.taught_blip(tmp_path_factory.mktemp("blip") / "colours")


@pytest.fixture
def images(tmp_path):
    """red, blue and green, and a file that changes after it was read."""
    folder = tmp_path / "set"
    folder.mkdir()
    for colour in tiny_vlm.COLOURS:
        tiny_vlm.plain_image(colour).save(folder / f"{colour}.png")
    return folder


class Counting:
    """Says the colour of an image, remembers what it was asked, and fails where it is told to."""

    identity = "counting"

    def __init__(self, fails=()):
        self.asked, self.fails = [], fails

    def caption(self, image, prompt):
        name = min(
            tiny_vlm.COLOURS,
            key=lambda c: sum(abs(a - b) for a, b in zip(tiny_vlm.COLOURS[c], image.getpixel((0, 0)), strict=True)),
        )
        self.asked.append((name, prompt))
        if name in self.fails:
            raise ValueError(f"{name} hurts")
        return CaptionResult(f"a {name} square")


def record(name="cat.png", **more):
    return ImageRecord(id="0" * 40, path=f"/sets/pets/{name}", size=(8, 8), **more)


def told(dataset):
    return [r.captions for r in dataset]


# -- models that see ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # transformers' own, in PaliGemma's processor
@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_every_family_describes_a_picture_from_a_local_folder(zoo, kind):
    captioner = vlm.load_vlm_captioner(zoo(kind), SHORT, FREE)
    said = captioner.caption(
        tiny_vlm.plain_image("red", (60, 44)), "What is here?" if captioner.follows_instructions else ""
    )
    assert isinstance(said.text, str)
    assert "What is here" not in said.text and "assistant" not in said.text, "the prompt is no part of the caption"


@pytest.mark.parametrize(
    "kind, manner",
    [("llava", "chat"), ("old_llava", "beside"), ("blip", "onward"), ("florence2", "task"), ("blip2", "beside")],
)
def test_each_family_is_asked_in_its_own_manner(zoo, kind, manner):
    assert vlm.load_vlm_captioner(zoo(kind), SHORT, FREE).manner == manner


@pytest.mark.parametrize("kind", ["blip", "git", "blip2", "llava", "qwen25_vl", "gemma3", "internvl"])
def test_a_caption_begins_with_the_given_words_and_they_are_said_once(zoo, kind):
    captioner = vlm.load_vlm_captioner(zoo(kind), SHORT, PromptSettings(begin="a red"))
    said = captioner.caption(tiny_vlm.plain_image("red"), "")
    assert said.text.startswith("a red") and said.text.count("a red") == 1


def test_a_model_that_has_learnt_colours_names_the_colour_it_sees(colour_blip):
    captioner = vlm.load_vlm_captioner(colour_blip, CaptionerSettings(), FREE)
    said = [captioner.caption(tiny_vlm.plain_image(colour, (200, 120)), "").text for colour in ("red", "blue", "green")]
    assert said == ["red sky", "blue sky", "green sky"], "and no mark such as [DEC] leaks into it"


def test_a_forbidden_word_is_not_said_by_the_model_itself(colour_blip):
    captioner = vlm.load_vlm_captioner(colour_blip, CaptionerSettings(), PromptSettings(forbidden="sky"))
    assert "sky" not in captioner.caption(tiny_vlm.plain_image("red"), "").text


def test_temperature_varies_by_seed_repeats_by_seed_and_leaves_the_global_chance_alone(zoo):
    image, before = tiny_vlm.plain_image("blue"), torch.random.get_rng_state()
    said = [
        vlm.load_vlm_captioner(zoo("llava"), CaptionerSettings(max_tokens=12, temperature=1.5, top_p=1.0, seed=s), FREE)
        .caption(image, "x")
        .text
        for s in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_model_sees_at_most_max_res_and_never_an_enlarged_picture():
    assert vlm.downscale_to_max_side(Image.new("RGB", (3000, 1500)), 768).size == (768, 384)
    assert vlm.downscale_to_max_side(Image.new("RGB", (300, 200)), 768).size == (300, 200)
    assert vlm.downscale_to_max_side(Image.new("RGB", (5000, 3)), 64).size == (64, 1)


@pytest.mark.parametrize(
    "out, asked, new", [([1, 2, 3, 4], [[1, 2]], [3, 4]), ([3, 4], [[1, 2]], [3, 4]), ([3, 4, 5], [[1, 2]], [3, 4, 5])]
)
def test_the_prompt_is_cut_only_where_the_model_gives_it_back(out, asked, new):
    assert vlm.strip_prompt_tokens(torch.tensor(out), torch.tensor(asked)).tolist() == new


@pytest.mark.parametrize(
    "prompt, length, task",
    [
        ("<OCR>", "any", "<OCR>"),
        ("", "short", "<CAPTION>"),
        ("", "medium", "<DETAILED_CAPTION>"),
        ("What?", "any", "<MORE_DETAILED_CAPTION>"),
    ],
)
def test_florence_is_given_a_task_by_name_or_by_length(prompt, length, task):
    assert vlm.choose_florence_task(prompt, length) == task


def test_the_identity_changes_with_whatever_changes_the_words(zoo):
    ids = [
        vlm.load_vlm_captioner(zoo("llava"), settings, wording, dtype).identity
        for settings, wording, dtype in [
            (SHORT, FREE, torch.float32), (CaptionerSettings(max_tokens=7), FREE, torch.float32), (SHORT, PromptSettings(begin="a"), torch.float32),
            (SHORT, PromptSettings(forbidden="a"), torch.float32), (SHORT, FREE, torch.bfloat16),
        ]
    ]  # fmt: skip
    assert len(set(ids)) == 5
    assert ids[0] == vlm.load_vlm_captioner(zoo("llava"), SHORT, PromptSettings(forced="b"), torch.float32).identity, (
        "added afterwards, not by the model"
    )


def test_the_hosts_interrupt_stops_a_caption_in_the_middle(zoo):
    class Stop(BaseException):
        pass

    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    captioner = vlm.load_vlm_captioner(zoo("llava"), CaptionerSettings(max_tokens=50), FREE, check_interrupt=interrupt)
    with pytest.raises(Stop):
        captioner.caption(tiny_vlm.plain_image("red"), "x")
    assert len(calls) == 3


# -- folders that are refused ------------------------------------------------------------------------------------------


def changed(folder, tmp_path, **values):
    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text()) | values
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_folder_that_wants_to_run_its_own_code_is_refused_and_the_converted_one_named(zoo, tmp_path):
    folder = changed(zoo("florence2"), tmp_path, auto_map={"AutoModelForCausalLM": "modeling_florence2.Florence2"})
    (folder / "modeling_florence2.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ValueError, match="own Python code, which is never run here.*florence-community/Florence-2"):
        vlm.load_vlm_captioner(folder, SHORT, FREE)


def test_missing_weights_are_an_error_and_not_random_words(zoo, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = changed(zoo("llava"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "self_attn.q_proj" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights.*q_proj.*meaningless"):
        vlm.load_vlm_captioner(folder, SHORT, FREE)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(quantization_config={"quant_method": "bitsandbytes"}), "quantised .bitsandbytes.*16 bits"),
        (dict(model_type="no_such_model"), "'no_such_model'.*cannot be loaded"),
        (dict(model_type="bert"), "cannot be loaded as a model that describes images"),
    ],
)
def test_other_folders_are_refused_with_the_reason(zoo, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        vlm.load_vlm_captioner(changed(zoo("llava"), tmp_path, **values), SHORT, FREE)


def test_weights_that_can_run_code_are_refused(zoo, tmp_path):
    folder = changed(zoo("llava"), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no .safetensors file.*can run code"):
        vlm.load_vlm_captioner(folder, SHORT, FREE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="config.json is missing"):
        vlm.load_vlm_captioner(tmp_path / "empty", SHORT, FREE)


def test_a_processor_that_is_missing_is_named(zoo, tmp_path):
    folder = changed(zoo("llava"), tmp_path)
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="processor or tokenizer cannot be loaded"):
        vlm.load_vlm_captioner(folder, SHORT, FREE)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_template_is_filled_with_the_pictures_own_words():
    image = record("red_cat_003.png", tags=("1girl", "red hair"), captions=("a cat",))
    assert (
        fill_caption_template("{name} / {folder} / {tags} / {caption} / {{}} {1+1}", image)
        == "red cat / pets / 1girl, red hair / a cat / {{}} {1+1}"
    )
    assert fill_caption_template("{tags}|{caption}", record()) == "|"


def test_a_field_that_no_picture_has_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"\{colour\}.*\{tags\}, \{name\}, \{folder\}, \{caption\}"):
        fill_caption_template("the {colour} one", record())
    with pytest.raises(ValueError, match=r"\{nme\}"):
        PromptSettings(extra="call it {nme}")
    assert fill_caption_template(" ".join(f"{{{name}}}" for name in TEMPLATE_FIELDS), record()).startswith(" cat")


@pytest.mark.parametrize("style", CAPTION_STYLES)
@pytest.mark.parametrize("length", CAPTION_LENGTHS)
def test_every_style_and_length_gives_one_request_without_holes(style, length):
    asked = build_caption_prompt(PromptSettings(style=style, length=length, words=42))
    assert asked.startswith(CAPTION_STYLES[style]) and asked.endswith(".")
    assert ("42" in asked) == (length == "number of words") and "{" not in asked and "  " not in asked


def test_the_request_tells_of_forced_and_forbidden_words_and_ends_with_the_extra():
    asked = build_caption_prompt(PromptSettings(forced="sks, dog", forbidden="watermark", extra="It shows {name}."))
    assert "Mention: sks, dog." in asked and "watermark" in asked and asked.endswith("It shows {name}.")


@pytest.mark.parametrize(
    "wording, said, text",
    [
        (dict(begin="A photo of"), "a cat", "A photo of a cat"),
        (dict(begin="a photo of"), "A photo of a cat", "A photo of a cat"),
        (dict(forbidden="watermark"), "a cat, watermark, a dog", "a cat, a dog"),
        (dict(forbidden="cat"), "a cat in a category", "a in a category"),
        (dict(forbidden="The picture shows"), "The picture shows a cat.", "a cat."),
        (dict(forced="sks"), "a cat", "a cat, sks"),
        (dict(forced="SKS"), "a sks cat", "a sks cat"),
        ({}, "<think>hm, a cat?</think>\n\nA  cat.", "A cat."),
        ({}, "<think>never ends", ""),
        (dict(begin="a"), "", ""),
    ],
)
def test_an_answer_is_held_to_the_wording(wording, said, text):
    assert apply_wording_rules(PromptSettings(**wording), CaptionResult(said)).text == text


def test_tags_are_held_to_the_wording_one_by_one():
    said = apply_wording_rules(
        PromptSettings(begin="sks", forbidden="blurry", forced="solo"),
        CaptionResult("1girl, blurry, hat", ("1girl", "blurry", "hat")),
    )
    assert said == CaptionResult("sks, 1girl, hat, solo", ("sks", "1girl", "hat", "solo"))


def test_a_word_cannot_be_forbidden_and_forced():
    with pytest.raises(ValueError, match="cat is both forbidden and forced"):
        PromptSettings(forbidden="dog, cat", forced="Cat")


@pytest.mark.parametrize(
    "name, words",
    [("red_cat-(3).png", "red cat"), ("IMG_0042.jpg", "IMG"), ("0042.png", "0042"), ("blue-sky.webp", "blue-sky"), ("cat copy 2.png", "cat"),
     ("a.b c__d.png", "a.b c d"), ("dog-12.png", "dog"), ("Zoë_01.png", "Zoë"), (".png", ".png"), ("route_66_sign.png", "route 66 sign")],
)  # fmt: skip
def test_a_file_name_becomes_words(name, words):
    assert template_captioner.clean_file_name(name) == words


# -- the work ----------------------------------------------------------------------------------------------------------


def by(captioner, dataset, mode="fill", **more):
    return caption_dataset(dataset, captioner, lambda r: "what?", mode, **more)


def test_every_picture_gets_its_own_caption_and_the_dataset_that_came_in_is_as_it_was(images, colour_blip):
    dataset = read_folder(images)
    before = dataset.to_json()
    done = caption_dataset(dataset, vlm.load_vlm_captioner(colour_blip, CaptionerSettings(), FREE), lambda r: "")
    assert told(done.dataset) == [("blue sky",), ("green sky",), ("red sky",)]
    assert dataset.to_json() == before and done.generated == 3


def test_a_second_run_asks_nothing_again_and_a_changed_prompt_everything(images, tmp_path):
    dataset, cache, first, second = read_folder(images), CaptionCache(tmp_path / "words"), Counting(), Counting()
    a, b = by(first, dataset, cache=cache), by(second, dataset, cache=cache)
    assert told(a.dataset) == told(b.dataset) and (a.generated, b.cached) == (3, 3) and second.asked == []
    caption_dataset(dataset, second, lambda r: "and now?", "fill", cache)
    assert len(second.asked) == 3


def test_a_run_that_was_stopped_goes_on_where_it_was(images, tmp_path):
    class Stop(BaseException):
        pass

    dataset, cache, captioner, rounds = read_folder(images), CaptionCache(tmp_path / "words"), Counting(), []

    def interrupt():
        rounds.append(1)
        if len(rounds) == 3:
            raise Stop

    with pytest.raises(Stop):
        by(captioner, dataset, cache=cache, check_interrupt=interrupt)
    done = by(captioner, dataset, cache=cache)
    assert [name for name, _ in captioner.asked] == ["blue", "green", "red"], "each once"
    assert (done.cached, done.generated) == (2, 1)


def test_a_damaged_cache_file_is_said_again(images, tmp_path):
    dataset, cache = read_folder(images), CaptionCache(tmp_path / "words")
    by(Counting(), dataset, cache=cache)
    for file in (tmp_path / "words").rglob("*.json"):
        file.write_text('{"text": ')
    done = by(Counting(), dataset, cache=cache)
    assert (done.generated, done.cached) == (3, 0)


def test_one_bad_picture_keeps_its_caption_is_flagged_and_reported_and_the_rest_go_on(images):
    (images / "green.txt").write_text("my own words")
    done = by(Counting(fails=("green",)), read_folder(images), "replace")
    assert told(done.dataset) == [("a blue square",), ("my own words",), ("a red square",)]
    assert done.dataset[1].flags == ("caption failed (green hurts)",)
    assert done.failed == ((str(images / "green.png"), "green hurts"),)
    again = by(Counting(), done.dataset, "replace")
    assert again.dataset[1].flags == () and again.dataset[1].captions == ("a green square",)


def test_a_file_that_has_changed_since_is_a_failure_of_its_own(images):
    dataset = read_folder(images)
    (images / "red.png").write_bytes(b"no picture any more")
    done = by(Counting(), dataset)
    assert [why for _, why in done.failed] == [
        f"{images / 'red.png'} has changed since the dataset was loaded. Load the dataset again."
    ]


def test_when_all_pictures_fail_it_is_an_error(images):
    with pytest.raises(RuntimeError, match="all 3 failed. The first, blue.png: blue hurts"):
        by(Counting(fails=tuple(tiny_vlm.COLOURS)), read_folder(images))


def test_a_model_that_fails_on_its_first_pictures_is_not_asked_a_thousand_times(images):
    dataset, captioner = read_folder(images), Counting(fails=tuple(tiny_vlm.COLOURS))
    many = ImageDataset(dataset.records * 100)
    with pytest.raises(RuntimeError, match="failed on the first 5 images"):
        by(captioner, many)
    assert len(captioner.asked) == 5


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("MPS backend out of memory")]
)
def test_memory_that_runs_out_stops_the_run_with_advice_and_keeps_what_was_said(images, tmp_path, error):
    class Greedy(Counting):
        def caption(self, image, prompt):
            if len(self.asked) == 1:
                raise error
            return super().caption(image, prompt)

    cache = CaptionCache(tmp_path / "words")
    with pytest.raises(RuntimeError, match="Out of memory at green.png, after 1 captions.*lower max_res"):
        by(Greedy(), read_folder(images), cache=cache)
    assert by(Counting(), read_folder(images), cache=cache).cached == 1


class Tags:
    identity = "tags"

    def caption(self, image, prompt):
        return CaptionResult("hat, red hair", ("hat", "red hair"))


BARE, CAPTIONED, TAGGED = {}, dict(captions=("a girl",)), dict(captions=("a girl",), tags=("girl",))


@pytest.mark.parametrize(
    "mode, start, captions, tags",
    [
        ("fill", BARE, "hat, red "
                       "hair", ("hat", "red hair")), ("fill", CAPTIONED, "a girl", ("hat", "red hair")), ("fill", TAGGED, "a girl", ("girl",)),
        ("skip", BARE, "hat, red "
                       "hair", ("hat", "red hair")), ("skip", CAPTIONED, "a girl", ()), ("skip", TAGGED, "a girl", ("girl",)),
        ("replace", TAGGED, "hat, red hair", ("hat", "red hair")),
        ("add", TAGGED, "a girl, hat, red hair", ("girl", "hat", "red hair")),
        ("add", dict(captions=("a girl, Hat",), tags=("hat",)), "a girl, Hat, red "
                                                                "hair", ("hat", "red hair")), ("add", BARE, "hat, red hair", ("hat", "red hair")),
    ],
)  # fmt: skip
def test_each_write_mode_does_what_it_says(images, mode, start, captions, tags):
    from dataclasses import replace

    dataset = read_folder(images)[:1]
    done = by(Tags(), ImageDataset((replace(dataset[0], **start),)), mode, gives_tags=True)
    assert (done.dataset[0].captions, done.dataset[0].tags) == ((captions,), tags)


def test_prose_is_added_as_a_sentence_and_not_twice(images):
    (images / "blue.txt").write_text("Sea.")
    (images / "red.txt").write_text("fire")
    done = by(Counting(), read_folder(images), "add")
    assert told(done.dataset) == [("Sea. a blue square",), ("a green square",), ("fire, a red square",)]
    assert told(by(Counting(), done.dataset, "add").dataset) == told(done.dataset)


def test_with_nothing_missing_the_captioner_is_not_asked(images):
    for colour in tiny_vlm.COLOURS:
        (images / f"{colour}.txt").write_text("words")
    captioner = Counting()
    done = by(captioner, read_folder(images))
    assert captioner.asked == [] and done.unchanged == 3


def test_names_and_fixed_texts_never_open_a_picture(images):
    dataset = read_folder(images)
    for file in images.glob("*.png"):
        file.unlink()
    done = caption_dataset(
        dataset, template_captioner.TemplateCaptioner(), lambda r: fill_caption_template("{folder}: {name}", r)
    )
    assert told(done.dataset) == [("set: blue",), ("set: green",), ("set: red",)]


def test_progress_names_the_picture_and_what_was_said(images):
    lines = []
    by(Counting(), read_folder(images), report=lambda done, total, text: lines.append((done, total, text)))
    assert lines[0] == (1, 3, "blue.png: a blue square") and lines[-1][:2] == (3, 3)


def test_modes_are_the_four_that_the_help_page_explains():
    assert WRITE_MODES == ("fill", "replace", "add", "skip")


# -- models that are not here ------------------------------------------------------------------------------------------


def test_a_missing_model_is_told_with_every_folder_the_command_the_size_and_the_way_without(tmp_path):
    text = known_captioners.format_missing_captioner(
        "Qwen/Qwen3-VL-4B-Instruct",
        [tmp_path / "VLM", tmp_path / "LLM"],
        tmp_path / "captioners",
        known_captioners.LOCAL_MODEL,
    )
    assert str(tmp_path / "VLM") in text and str(tmp_path / "LLM") in text
    assert (
        "(8.9 GB): hf download Qwen/Qwen3-VL-4B-Instruct --local-dir "
        f"{tmp_path / 'captioners' / 'Qwen3-VL-4B-Instruct'}" in text
    )
    assert "'loaded CLIP'" in text and "'file name'" in text and "allow_download" in text


def test_a_name_that_nobody_knows_is_answered_with_one_that_can_be_had(tmp_path):
    text = known_captioners.format_missing_captioner("VLM/mine", [tmp_path], tmp_path, known_captioners.WD_TAGGER)
    assert "'VLM/mine'" in text and "hf download SmilingWolf/" in text


def test_a_download_reports_bytes_can_be_stopped_and_appears_only_when_whole(tmp_path, monkeypatch):
    import huggingface_hub

    seen, stop = [], []

    def snapshot_download(repo, local_dir, allow_patterns, tqdm_class):
        assert repo == "owner/name" and not any("bin" in p or ".py" in p for p in allow_patterns)
        local_dir.mkdir(exist_ok=True)
        with tqdm_class(total=10, unit="B", unit_scale=True, name="huggingface_hub.snapshot_download") as bar:
            bar.update(4)
            (local_dir / "half").write_text("")
            bar.update(6)

    def interrupt():
        if stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    stop.append(1)
    with pytest.raises(KeyboardInterrupt):
        known_captioners.download_captioner("owner/name", tmp_path / "name", lambda *a: seen.append(a), interrupt)
    assert not (tmp_path / "name").exists()
    stop.clear()
    assert (
        known_captioners.download_captioner("owner/name", tmp_path / "name", lambda *a: seen.append(a), interrupt)
        == tmp_path / "name"
    )
    assert (tmp_path / "name" / "half").exists() and seen[-1] == (10, 10, "bytes of owner/name")


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    import huggingface_hub

    def fails(*_, **__):
        raise OSError("404 Client Error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(ValueError, match="owner/name could not be downloaded.*404 Client Error"):
        known_captioners.download_captioner("owner/name", tmp_path / "name", print, lambda: None)


def test_known_captioners_name_a_backend_and_a_size():
    assert {entry.backend for entry in known_captioners.KNOWN_CAPTIONERS.values()} == {
        known_captioners.LOCAL_MODEL,
        known_captioners.WD_TAGGER,
    }
    assert all(0 < entry.gigabytes < 100 and entry.description for entry in known_captioners.KNOWN_CAPTIONERS.values())
    assert all(
        known_captioners.KNOWN_CAPTIONERS[name].backend == backend
        for backend, name in known_captioners.SMALLEST_CAPTIONERS.items()
    )
