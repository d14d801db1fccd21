"""What every benchmark script begins with: `import pack`, then pack.boot() before anything of the pack or of ComfyUI is
imported."""

from __future__ import annotations

import pathlib
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]


def boot(cuda: bool = False):
    """The pack as package `trainyard`, and ComfyUI importable, on the CPU or as it would start by itself."""
    if "trainyard" not in sys.modules:
        package = types.ModuleType("trainyard")
        package.__path__ = [str(ROOT)]
        sys.path[:] = [
            p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT
        ]  # our `nodes` would hide ComfyUI's
        sys.modules["trainyard"] = package
    from trainyard.tests.comfy import boot as comfy

    if not cuda:
        return comfy.boot()
    sys.path.insert(0, str(comfy.COMFYUI))
    from comfy.cli_args import args

    args.base_directory = tempfile.mkdtemp(prefix="trainyard-bench-")


def toy_world():
    """The toy world as ComfyUI's own loader gives it: `.model`, `.clip`, `.vae`."""
    from trainyard.tests.toy import sampling
    from trainyard.tests.toy import world as toy

    with tempfile.TemporaryDirectory() as folder:
        return sampling.load(toy.build(pathlib.Path(folder) / "toy_world.safetensors"))
