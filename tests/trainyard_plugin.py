"""Lets pytest run from anywhere: the pack's root is a plain folder to it, and the pack is the package `trainyard`.

pytest 8 imports `<root>/__init__.py` as a package, which is ComfyUI's business and not ours. And the root must never be
on sys.path, because its folder `nodes` would hide ComfyUI's `nodes.py`. So the pack gets a name of its own, whatever
its folder is called: `from trainyard.trainers.loop import train`.
"""

import pathlib
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def register(name="trainyard", root=ROOT):
    """The pack as an empty package with the given name. Its `__init__.py` is not run."""
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(root)]
        sys.modules[name] = package
    return sys.modules[name]


def pytest_configure(config):
    """Takes tests/ off sys.path again, where this file was found: its folder `comfy` would be taken for ComfyUI's."""
    tests = str(ROOT / "tests")
    sys.path[:] = [entry for entry in sys.path if entry != tests]


def pytest_collect_directory(path, parent):
    """A plain folder for the pack's root; None (pytest's own choice) for every other."""
    return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


register()
