"""ComfyUI inside the test process: on the CPU, first on sys.path, with a base folder that is not the user's."""

import atexit
import importlib
import shutil
import sys
import tempfile

from trainyard.tools import env

COMFYUI = env.find_comfyui()
BASE = None


def boot():
    """Makes `import comfy...`, `folder_paths`, `nodes` and `server` mean ComfyUI's. Safe to call again; imports no
    torch."""
    global BASE
    if BASE is not None:
        return
    if COMFYUI is None:
        raise RuntimeError("ComfyUI not found. Set COMFYUI_PATH to its folder.")
    sys.path.insert(
        0, str(COMFYUI)
    )  # first: `python -m pytest` puts the pack there, whose `nodes` would be found instead
    args = importlib.import_module("comfy.cli_args").args
    if "comfy.model_management" in sys.modules and not args.cpu:
        raise RuntimeError("comfy.model_management was imported before boot(): it has already looked for a GPU.")
    args.cpu = True
    BASE = args.base_directory = tempfile.mkdtemp(prefix="trainyard-comfyui-")
    atexit.register(shutil.rmtree, BASE, ignore_errors=True)
