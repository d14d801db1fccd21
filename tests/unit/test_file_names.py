"""Paths that Windows does not take are told before the work whose end would be lost on them."""

import sys
import types
from pathlib import Path

import pytest
from PIL import Image
from trainyard.tests.unit.test_runs import folder
from trainyard.trainers import file_names
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.writers import SaveSettings, save_dataset
from trainyard.trainers.file_names import check_path_length
from trainyard.trainers.monitor.tensorboard import longest_event_path

TOO_LONG = r"would have \d+ characters, and Windows takes 259 while long paths are off. Choose a shorter name, move"


def set_long_paths(monkeypatch, value):
    """A registry that says so; None for one without the entry."""

    class Key:
        __enter__ = lambda self: self
        __exit__ = lambda *_: None

    def query(key, name):
        if value is None:
            raise FileNotFoundError(name)
        return value, 4

    registry = types.SimpleNamespace(HKEY_LOCAL_MACHINE=0, OpenKey=lambda root, path: Key(), QueryValueEx=query)
    monkeypatch.setitem(sys.modules, "winreg", registry)


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(file_names, "PLATFORM", "win32")
    set_long_paths(monkeypatch, 0)


def path_of(length, letter="x"):
    return Path("/" + "/".join([letter * 99] * 2) + "/" + letter * (length - 201))


def test_259_characters_are_the_most(windows):
    assert len(str(path_of(259))) == 259
    check_path_length(path_of(259))
    with pytest.raises(ValueError, match=r"xxx would have 260 characters, and Windows takes 259"):
        check_path_length(path_of(260))


def test_characters_count_as_windows_counts_them(windows):
    """あ is one of them, though three bytes; 🦆 is two."""
    check_path_length(path_of(259, "あ"))
    with pytest.raises(ValueError, match=TOO_LONG):
        check_path_length("/" + "/".join(["🦆" * 70] * 2))


@pytest.mark.parametrize("value, is_taken", [(1, True), (0, False), (None, False)])
def test_windows_takes_more_when_long_paths_are_on(windows, monkeypatch, value, is_taken):
    set_long_paths(monkeypatch, value)
    if is_taken:
        check_path_length(path_of(300))
    else:
        with pytest.raises(ValueError, match=TOO_LONG):
            check_path_length(path_of(300))


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_other_systems_take_long_paths(monkeypatch, platform):
    monkeypatch.setattr(file_names, "PLATFORM", platform)
    check_path_length(path_of(300))


@pytest.mark.parametrize("name, longest", [("x" * 40, "step000002.safetensors"), ("x", r"samples/\..*\.part")])
def test_the_longest_file_of_a_run_is_checked_before_any_training(windows, tmp_path, name, longest):
    """A LoRA of a step where the name is long, and a preview while it is being written where it is short."""
    with pytest.raises(ValueError, match=f"{longest} would have 26[01] characters"):
        for length in range(1, 200):
            folder(tmp_path / ("r" * length), None, 3, name=name).check_writable()
    assert not list(tmp_path.iterdir())


def test_the_files_of_tensorboard_are_checked_too(windows, tmp_path):
    """Where everything else of the run would fit."""
    board = lambda run: [longest_event_path(run.folder / "tensorboard")]
    runs = [folder(tmp_path / ("r" * length), None, 3, name="x") for length in range(1, 200)]
    run = next(run for run in runs if len(str(board(run)[0])) > 259)
    run.check_writable()
    with pytest.raises(ValueError, match=r"events\.out\.tfevents\..* would have 260 characters"):
        run.check_writable(board(run))


def test_a_dataset_is_checked_before_anything_is_written(windows, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / f"{'x' * 90}.png")
    data = read_folder(tmp_path)
    save_dataset(data, tmp_path / "saved", SaveSettings())
    deep = tmp_path / ("y" * (165 - len(str(tmp_path))))
    with pytest.raises(ValueError, match=TOO_LONG):
        save_dataset(data, deep, SaveSettings())
    assert not deep.exists()
