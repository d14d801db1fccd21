"""CONTRIBUTING.md tells the truth: its recipe is followed in a copy of the pack, with a method that is thrown away."""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from trainyard.tools import cards, env

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
LEFT_OUT = (".*", "__pycache__", "node_modules", "demo-out", "shots", "failures", "shared", "runs", "build", "dist")
NAMES = {"<name>": "throw_away", "<NN_name>": "99_throw_away", "<NodeId>": "TrainyardTrainThrowAway"}
METHOD = '''
"""ADDifT under another name."""

from typing import ClassVar

from .image_pairs import AddiftTraining


class ThrowAwayTraining(AddiftTraining):
    fingerprint_name: ClassVar[str] = "ThrowAway"
'''
NODE = '''
"""Train Throw-Away."""

from comfy_api.latest import io

from ...trainers.methods.throw_away import ThrowAwayTraining
from .image_pairs import PairTask, TrainDifference
from .widgets import make_job, run_difference_node


class TrainThrowAway(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        schema = TrainDifference.define_schema()
        schema.node_id = "TrainyardTrainThrowAway"
        schema.display_name = "Train Throw-Away"
        schema.description = "Learn what changed between two images. Nobody needs it."
        next(widget for widget in schema.inputs if widget.id == "steps").default = 3
        next(widget for widget in schema.inputs if widget.id == "calibrate").default = "off"
        return schema

    @classmethod
    def execute(cls, model, encoded, strength, adapter=None, optimizer=None, noise=None, validation=None, **widgets):
        task = PairTask(data=encoded, method_class=ThrowAwayTraining, strength=strength)
        return run_difference_node(make_job(cls, task, model, widgets, adapter, optimizer, noise, validation))


NODES = [TrainThrowAway]
'''
SOURCE = """
from ..workflow_parts import add_pair_training

RESULT = "what changed, to be thrown away"
NOTE = "# Learn what changed"
NOTE_SIZE = (380, 400)


def build(workflow):
    add_pair_training(workflow, "TrainyardTrainThrowAway", "mine", ("after", "After"), ("before", "Before"))
"""
IMPORT = "from trainyard.trainers.methods.throw_away import ThrowAwayTraining\n"
ROW = 'METHODS = {\n    "throw_away": method_row(make_pairs, ThrowAwayTraining, "eps", strength=0.5, curve=CURVE),\n'


def listed(section, pattern):
    """Files of a list in a section of the page, with the names of the throw-away method."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.findall(pattern, text, re.M)
    for place, name in NAMES.items():
        found = [path.replace(place, name) for path in found]
    return set(found)


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def changed(before, after):
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def call(copy, *command):
    quiet = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COMFYUI_PATH": str(env.find_comfyui())}
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=os.environ | quiet, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def write_by_hand(copy):
    """What a person writes: four files and a row."""
    difference = (ROOT / "web" / "docs" / "TrainyardTrainDifference" / "en.md").read_text("utf-8")
    page = re.sub(r"(\*\*`steps`\*\* \(default )[^,)]+", r"\g<1>3", difference)
    files = {
        "trainers/methods/throw_away.py": METHOD,
        "nodes/train/throw_away.py": NODE,
        "tools/sources/99_throw_away.py": SOURCE,
        "web/docs/TrainyardTrainThrowAway/en.md": page,
    }
    for name, text in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text.lstrip("\n"), encoding="utf-8")
    table = copy / "tests" / "unit" / "test_methods.py"
    text = table.read_text("utf-8")
    curve = re.search(r'"change": method_row\(.*?curve=(\[[^]]*\])', text, re.S).group(1)  # the same method
    text = text.replace("METHODS = {\n", ROW.replace("CURVE", curve), 1)
    first = text.index("from trainyard.trainers.methods")
    table.write_text(text[:first] + IMPORT + text[first:], encoding="utf-8")


@pytest.mark.slow
def test_a_method_is_the_files_that_the_page_lists_and_one_command(comfy, tmp_path):
    copy = tmp_path / "pack"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    untouched = digests(copy)
    write_by_hand(copy)
    written = digests(copy)
    assert changed(untouched, written) == listed("A method", r"^\d\. `([^`]+)`")

    said = call(copy, "tools/refresh.py")
    refreshed = digests(copy)
    assert changed(written, refreshed) == listed("A method", r"^- `([^`]+)`"), said
    assert "[shown in English]" in said and "[to decide]" not in said and "[to write]" not in said

    call(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_methods.py", "-k", "throw_away")
    about_it = (
        "throw or Throw or ids_inputs or english or every_text or every_node_has_its_row or without_a_node or gone"
    )
    tests = ("tests/unit/test_locales.py", "tests/workflows")
    call(
        copy,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *tests,
        "-k",
        f"({about_it}) and not headless and not recipe",
    )
    assert changed(refreshed, digests(copy)) == set(), "a test needed, or wrote, something that the page does not list"


def test_the_rooms_of_the_page_exist():
    rooms = [
        room
        for row in re.findall(r"^\| (`[^|]+) \|", PAGE.split("## Map")[1], re.M)
        for room in re.findall(r"`([^`]+)`", row)
    ]
    assert len(rooms) > 15 and [room for room in rooms if not (ROOT / room).is_dir()] == []


@pytest.mark.parametrize("count", [1, 2, 5, 64, 70])
def test_a_card_shows_every_image_that_there_is_room_for(count):
    card = cards.contact_card("mine", [Image.new("RGB", (64, 48), (255, 0, index)) for index in range(count)])
    seen = {colour for _, colour in card.getcolors(768 * 768)}
    assert {(255, 0, index) for index in range(min(count, 64))} <= seen
