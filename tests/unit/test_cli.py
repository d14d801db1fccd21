"""python -m trainers, from its arguments to its files, on a checkpoint of random numbers and drawn images."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from trainyard.tests import fakes_engine as fakes
from trainyard.trainers import __main__ as cli
from trainyard.trainers.engines import text as words
from trainyard.trainers.files import read_safetensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAST = ["--steps", "6", "--rank", "4", "--batch", "2", "--learning-rate", "0.01", "--save-every", "0", "--device", "cpu",
        "--resolution", "64", "--step", "16"]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    """[--model, --images, --out] of a tiny checkpoint and four drawn images of 32 px."""
    path = fakes.vocabulary(tmp_path)
    monkeypatch.setattr(words, "find_clip_vocabulary", lambda: path)
    fakes.sd3_file(tmp_path / "tiny.safetensors")
    images = tmp_path / "images"
    images.mkdir()
    for i, colour in enumerate(("red", "blue", "red", "blue")):
        Image.new("RGB", (32, 32 + 32 * (i == 3)), colour).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"{colour} star")
    return ["--model", str(tmp_path / "tiny.safetensors"), "--images", str(images), "--out", str(tmp_path / "out")]


def with_value(files, name, value):
    return [*files[: files.index(name) + 1], str(value), *files[files.index(name) + 2 :]]


def test_one_command_trains_plots_and_draws_the_difference(files, tmp_path, capsys):
    samples = ["--samples", "red star", "blue star", "--sample-seeds", "2", "--sample-steps", "2"]
    assert cli.main(["lora", *files, *FAST, *samples, "--name", "my lora"]) == 0
    out = tmp_path / "out"
    tensors, metadata = read_safetensors(out / "my lora.safetensors")
    assert any(v.any() for k, v in tensors.items() if k.endswith("lora_B.weight"))
    assert (
        metadata["ss_steps"] == "6"
        and metadata["ss_num_train_images"] == "4"
        and metadata["modelspec.prediction_type"] == "flow"
    )
    assert json.loads(metadata["trainyard"])["AdapterSettings"]["rank"] == 4
    with Image.open(out / "my lora-loss.png") as plot, Image.open(out / "my lora-samples.png") as sheet:
        assert plot.width > 300
        last = sheet.convert("RGB").crop((sheet.width - 190, sheet.height - 190, sheet.width - 10, sheet.height - 10))
    assert len(last.getcolors(180 * 180)) > 10, "the sheet's last cell is blank"
    said = capsys.readouterr().out
    assert "4 images" in said and "step 6/6 · loss" in said and "my lora.safetensors: 6 steps" in said


def test_the_sheet_shows_the_model_without_and_with_the_lora(files, tmp_path, monkeypatch):
    """Rows alternate: base, LoRA. The base rows are what the untouched model draws."""
    shown = []
    monkeypatch.setattr(
        cli, "draw_image_grid", lambda rows, left, top: shown.append((rows, left, top)) or Image.new("RGB", (1, 1))
    )
    assert (
        cli.main(
            [
                "lora",
                *files,
                *FAST,
                "--learning-rate",
                "0.5",
                "--samples",
                "red star",
                "--sample-seeds",
                "1",
                "--sample-steps",
                "2",
            ]
        )
        == 0
    )
    ((base,), (changed,)), left, top = shown[0]
    assert left == ["red star", "red star + LoRA"] and top == ["seed 0"] and base.size == (32, 32)
    from trainyard.trainers.engines.diffusers import load_engine

    untouched = load_engine(files[1], "cpu").sample(["red star"], 0, (32, 32), steps=2)[0]
    assert base.tobytes() == cli.tensor_to_image(untouched, "sample").tobytes() != changed.tobytes()


def test_the_placeholder_in_samples_is_the_trigger_and_without_one_it_is_refused(files, capsys):
    samples = ["lora", *files, *FAST, "--samples", "a [trigger] star"]
    assert cli.main(samples) == cli.EXIT_MISTAKE
    assert "--samples says [trigger], and --trigger is empty" in capsys.readouterr().err
    args = cli.make_argument_parser().parse_args([*samples, "--trigger", "sks"])
    assert cli.CommandLineJob(args, cli.ConsoleOutput(), cli.InterruptHandler()).sample_prompts == ["a sks star"]


def test_three_and_three_steps_are_six(files, tmp_path):
    once, twice = (with_value(files, "--out", tmp_path / name) for name in ("once", "twice"))
    assert cli.main(["lora", *once, *FAST]) == 0
    assert cli.main(["lora", *twice, *FAST, "--steps", "3"]) == 0
    three = (tmp_path / "twice" / "lora.safetensors").read_bytes()
    assert cli.main(["lora", *twice, *FAST]) == 0
    six = (tmp_path / "twice" / "lora.safetensors").read_bytes()
    assert three != six == (tmp_path / "once" / "lora.safetensors").read_bytes()


def test_ctrl_c_keeps_the_work_and_the_same_command_goes_on(files, tmp_path, monkeypatch, capsys):
    whole, broken = (with_value(files, "--out", tmp_path / name) for name in ("whole", "broken"))
    assert cli.main(["lora", *whole, *FAST]) == 0
    line = cli.ConsoleOutput.update_line
    train = cli.train
    monkeypatch.setattr(cli, "train", lambda *a, **k: train(*a, **k, interval=0))
    monkeypatch.setattr(cli.ConsoleOutput, "update_line", lambda self, text, force=False: (
        line(self, text, force), signal.raise_signal(signal.SIGINT) if text.startswith("step 3/6") else None))  # fmt: skip
    handler = signal.getsignal(signal.SIGINT)
    assert cli.main(["lora", *broken, *FAST]) == 130
    assert "the same command continues from there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    (run,) = (tmp_path / "broken" / ".runs").glob("lora-*")
    assert json.loads((run / "run.json").read_text())["step"] == 3
    monkeypatch.undo()
    monkeypatch.setattr(words, "find_clip_vocabulary", lambda: tmp_path / words.CLIP_VOCABULARY_NAME)
    assert cli.main(["lora", *broken, *FAST]) == 0
    assert (tmp_path / "broken" / "lora.safetensors").read_bytes() == (
        tmp_path / "whole" / "lora.safetensors"
    ).read_bytes()


def test_a_finished_run_is_not_trained_twice(files, tmp_path, monkeypatch, capsys):
    assert cli.main(["lora", *files, *FAST]) == 0
    before = (tmp_path / "out" / "lora.safetensors").read_bytes()
    (tmp_path / "out" / "lora.safetensors").unlink()
    monkeypatch.setattr(cli, "train", lambda *_, **__: pytest.fail("it was trained again"))
    assert cli.main(["lora", *files, *FAST]) == 0
    assert (tmp_path / "out" / "lora.safetensors").read_bytes() == before
    assert "nothing was trained again" in capsys.readouterr().out


def test_other_settings_are_another_run(files, tmp_path):
    assert cli.main(["lora", *files, *FAST]) == 0
    first = read_safetensors(tmp_path / "out" / "lora.safetensors")[0]
    assert cli.main(["lora", *files, *FAST, "--seed", "1"]) == 0
    second = read_safetensors(tmp_path / "out" / "lora.safetensors")[0]
    assert len(list((tmp_path / "out" / ".runs").glob("lora-*"))) == 2
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_the_text_encoder_learns_too_when_asked(files, tmp_path):
    assert cli.main(["lora", *files, *FAST, "--text-encoder", "--text-encoder-lr", "0.01"]) == 0
    tensors = read_safetensors(tmp_path / "out" / "lora.safetensors")[0]
    learnt = [k for k, v in tensors.items() if k.startswith("lora_te1_") and k.endswith("lora_up.weight") and v.any()]
    assert learnt and any(k.startswith("transformer.") for k in tensors)


@pytest.mark.parametrize("narrowing", (["--blocks", "to_q: rank=2"], ["--targets", "regex", "--pattern", "to_q"]))
def test_rules_for_the_models_layers_do_not_apply_to_the_text_encoder(files, tmp_path, narrowing):
    """`to_q` is a layer of the transformer; CLIP calls its own q_proj."""
    assert cli.main(["lora", *files, *FAST, "--text-encoder", *narrowing]) == 0
    tensors, _ = read_safetensors(tmp_path / "out" / "lora.safetensors")
    ranks = {len(v) for k, v in tensors.items() if k.startswith("lora_te") and k.endswith("lora_down.weight")}
    assert ranks == {4}


def test_every_setting_has_an_argument_and_its_default(files):
    args = cli.make_argument_parser().parse_args(["lora", *files])
    names = [
        cli.settings_option_name(record, f.name) for record in cli.SETTINGS_RECORDS for f in dataclasses.fields(record)
    ]
    assert len(names) == len(set(names)), "two records share a name, and their arguments would too"
    for record in cli.SETTINGS_RECORDS:
        assert cli.settings_from_arguments(args, record) == record()


def test_settings_arrive_where_they_belong(files):
    values = [
        "--beta1",
        "0.8",
        "--conv",
        "--targets",
        "all linear",
        "--trigger",
        "sks",
        "--no-shuffle",
        "--step",
        "8",
        "--min-time",
        "0.25",
    ]
    args = cli.make_argument_parser().parse_args(["lora", *files, *values])
    made = {record.__name__: cli.settings_from_arguments(args, record) for record in cli.SETTINGS_RECORDS}
    assert (
        made["OptimizerSettings"].beta1 == 0.8
        and made["AdapterSettings"].conv
        and made["AdapterSettings"].targets == "all linear"
    )
    assert (
        made["CaptionSettings"].trigger == "sks"
        and made["BucketSettings"].step == 8
        and made["NoiseSettings"].min_time == 0.25
    )


@pytest.mark.parametrize("change, says", [
    (["--rank", "0"], "rank is 0; it must lie between 1 and 4096"),
    (["--learning-rate", "nan"], "learning_rate is nan"),
    (["--rank", "129"], "Choose a rank of at most"),
    (["--name", "../out"], "use letters, digits"),
    (["--images", "nowhere"], "nowhere does not exist"),
    (["--model", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    (["--targets", "regex", "--pattern", "nothing_like_this"], "No layer matches"),
    (["--out", __file__], "is a file. Give --out a folder"),
    (["--batch", "0"], "batch is 0, which leaves it to the planner"),
])  # fmt: skip
def test_a_mistake_is_one_plain_line(files, capsys, change, says):
    assert cli.main(["lora", *files, *FAST, *change]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and "Traceback" not in said


def test_missing_captions_are_named_before_the_model_is_loaded(files, tmp_path, capsys, monkeypatch):
    (tmp_path / "images" / "2.txt").unlink()
    monkeypatch.setattr(cli.CommandLineJob, "load_engine", lambda self: pytest.fail("the model was loaded first"))
    assert cli.main(["lora", *files, *FAST]) == 2
    assert "Captions are asked for, and 1 of 4 images have none: 2.png" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, says", [
    (["lora", "--rank", "many"], "--rank: 'many' is not a whole number"),
    (["lora", "--min-time", "early"], "--min-time: 'early' is not a number"),
    (["lora"], "required: --model, --images, --out"),
    (["lora", "--optimizer", "AdamV"], "invalid choice: 'AdamV'"),
    (["lora", "--modl", "x"], "required"),
    ([], "required: METHOD"),
])  # fmt: skip
def test_a_wrong_argument_is_one_plain_line(capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and said.count("\n") == 1


def test_a_traceback_comes_only_when_asked(files):
    with pytest.raises(ValueError, match="rank is 0"):
        cli.main(["lora", *files, "--rank", "0", "--debug"])


def test_unreadable_images_are_named_and_left_out(files, tmp_path, capsys):
    (tmp_path / "images" / "torn.png").write_bytes(b"\x89PNG")
    assert cli.main(["lora", *files, *FAST, "--steps", "1"]) == 0
    assert "left out" in capsys.readouterr().out


def test_the_module_runs_from_the_roots_folder():
    """python -m trainers, outside the package that the tests import it as."""
    done = subprocess.run(
        [sys.executable, "-m", "trainers", "lora", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "--learning-rate" in done.stdout and done.stderr == ""
