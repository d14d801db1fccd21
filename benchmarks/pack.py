"""What every benchmark script begins with: `import pack`, then pack.boot() before anything of the pack or of ComfyUI is
imported."""

from __future__ import annotations

import atexit
import importlib
import os
import pathlib
import shutil
import sys
import tempfile
import types
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]


def name_package():
    """The pack can be imported as `trainyard`. Imports nothing else."""
    if "trainyard" in sys.modules:
        return
    package = types.ModuleType("trainyard")
    package.__path__ = [str(ROOT)]
    # our `nodes` would hide ComfyUI's
    sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
    sys.modules["trainyard"] = package


def boot(cuda: bool = False, flags: Sequence[str] = ()):
    """The pack as package `trainyard`, and ComfyUI importable, on the CPU or as it would start by itself with these
    arguments: on the card, with the allocator that its main.py chooses, which must be before torch is imported."""
    name_package()
    from trainyard.tests.comfy import boot as on_cpu

    if not cuda:
        return on_cpu.boot()
    if on_cpu.COMFYUI is None:
        raise RuntimeError("ComfyUI not found. Set COMFYUI_PATH to its folder.")
    sys.path.insert(0, str(on_cpu.COMFYUI))
    sys.argv[1:] = flags
    importlib.import_module("comfy.options").enable_args_parsing()
    args = importlib.import_module("comfy.cli_args").args
    args.base_directory = tempfile.mkdtemp(prefix="trainyard-bench-")
    atexit.register(shutil.rmtree, args.base_directory, ignore_errors=True)
    if args.cuda_device not in (None, "all"):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = str(args.cuda_device)
    if "torch" not in sys.modules:
        importlib.import_module("cuda_malloc")


def toy_world():
    """The toy world as ComfyUI's own loader gives it: `.model`, `.clip`, `.vae`."""
    from trainyard.tests.toy import sampling
    from trainyard.tests.toy import world as toy

    with tempfile.TemporaryDirectory() as folder:
        return sampling.load(toy.build(pathlib.Path(folder) / "toy_world.safetensors"))
