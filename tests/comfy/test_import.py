"""What ComfyUI waits for when it starts: the import of the pack and the schemas of its nodes."""

import json
import subprocess
import sys

import pytest
from trainyard.tools import env

OWN_MODULES = 145  # 137 were there when this was written
# Part of no schema: what these do is done in a run.
IMPORTED_IN_A_RUN = (
    "trainers.captioners.taggers",
    "trainers.data.captions.manual_edits",
    "trainers.data.collage.build",
    "trainers.engines",
    "trainers.monitor.score_monitor",
    "trainers.scores.training",
    "nodes.host.checks",
    "nodes.scores.feature_extractors",
)
SCRIPT = """
import importlib, json, sys, types
package = types.ModuleType("trainyard")
package.__path__ = [sys.argv[1]]
sys.modules["trainyard"] = package
from trainyard.tests.comfy import boot
boot.boot()
import nodes, server
before = set(sys.modules)
import asyncio
from trainyard.nodes import TrainyardExtension
for node in asyncio.run(TrainyardExtension().get_node_list()):
    node.define_schema()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def modules(comfy, tmp_path_factory):
    """What the pack's import adds to the modules of ComfyUI itself, in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(env.ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path_factory.mktemp("import"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_pack_brings_no_library_that_comfyui_has_not_imported_itself(modules):
    """Pillow's decoder of AVIF tells whether there is one, and its door to colour profiles is small"""
    foreign = [name for name in modules if name.split(".")[0] != "trainyard"]
    assert set(foreign) <= {"PIL.AvifImagePlugin", "PIL._avif", "PIL.ImageCms", "PIL._imagingcms"}, foreign


def test_what_only_a_run_needs_is_not_imported_at_the_start(modules):
    own = [name.removeprefix("trainyard.") for name in modules if name.startswith("trainyard.")]
    assert len(own) <= OWN_MODULES, f"{len(own)} modules; import what no schema needs in the functions that need it"
    assert not set(own) & set(IMPORTED_IN_A_RUN), set(own) & set(IMPORTED_IN_A_RUN)
