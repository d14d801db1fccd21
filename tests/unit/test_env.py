"""tools/env.py finds ComfyUI where people keep it, and never writes into its environment."""

import pathlib
import sys

import pytest
from trainyard.tools import env


def comfyui(folder):
    """An empty folder that looks like ComfyUI's."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy" / "cli_args.py").touch()
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without ComfyUI, and the pack in a folder of its own."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(env, "ROOT", tmp_path / "alone" / "trainyard" / "pack")
    return tmp_path


def test_without_comfyui_nothing_is_found(nowhere):
    assert env.find_comfyui() is None


def test_the_named_folder_comes_before_every_other(nowhere, monkeypatch):
    comfyui(nowhere / "home" / "comfy" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui(nowhere / "named")))
    assert env.find_comfyui() == nowhere / "named"


def test_a_named_folder_without_comfyui_is_refused_with_what_to_do(nowhere, monkeypatch):
    comfyui(nowhere / "home" / "comfy" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", str(nowhere))
    with pytest.raises(SystemExit, match="holds no ComfyUI.*Correct it or unset it"):
        env.find_comfyui()


def test_a_pack_below_custom_nodes_finds_the_comfyui_around_it_before_the_one_at_home(nowhere, monkeypatch):
    comfyui(nowhere / "home" / "comfy" / "ComfyUI")
    around = comfyui(nowhere / "around")
    monkeypatch.setattr(env, "ROOT", around / "custom_nodes" / "trainyard")
    assert env.find_comfyui() == around


def test_the_environment_inside_comfyui_runs_it(nowhere):
    home = comfyui(nowhere / "home" / "comfy" / "ComfyUI")
    python = env.python_of(home / "venv")
    python.parent.mkdir(parents=True)
    python.touch()
    assert env.host_python(home) == python


def test_a_comfyui_without_an_environment_is_run_by_the_python_around_this_one(nowhere, monkeypatch):
    home = comfyui(nowhere / "home" / "comfy" / "ComfyUI")
    monkeypatch.setattr(env, "answer", lambda python, code: True)
    monkeypatch.setattr(sys, "prefix", str(nowhere / "conda"))
    assert env.host_python(home) == pathlib.Path(sys.executable)
    monkeypatch.setattr(sys, "prefix", str(env.VENV))
    assert env.host_python(home) is None, "the pack's own environment is layered over another, not over itself"


def test_a_layer_only_points_at_the_hosts_packages(nowhere, monkeypatch):
    host, own = nowhere / "host" / "site-packages", nowhere / "own"
    host.mkdir(parents=True)
    own.mkdir()
    monkeypatch.setattr(env, "site_packages", lambda: own)
    env.layer([str(host)])
    assert str(host) in (own / env.LAYER).read_text()
    assert list(host.iterdir()) == []


def test_another_requirement_another_host_or_another_python_is_another_environment(nowhere, monkeypatch):
    env.ROOT.mkdir(parents=True)
    for path in env.requirements(host=[]):
        path.write_text("one\n")
    first = env.fingerprint(sys.executable, ["host"])
    assert env.fingerprint(sys.executable, ["host"]) == first
    assert env.fingerprint(sys.executable, ["elsewhere"]) != first
    (env.ROOT / "requirements.txt").write_text("one\ntwo\n")
    assert env.fingerprint(sys.executable, ["host"]) != first
