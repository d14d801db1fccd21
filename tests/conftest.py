"""Marks, skipped groups and fixtures for every test: ComfyUI in this process (`comfy`, `folders`) and a real server
(`server`).

Groups by folder: unit/ needs nothing; comfy/, workflows/ and proofs/ need ComfyUI; browser/ needs Chromium and Node as
well. proofs/ holds what takes minutes because it measures an effect, and runs by `make proofs`. A group that cannot run here is not collected, and says so in one loud line at the end.

With several processes (`make test` has three: `pytest -n 3`) a file is the unit of work, and all of browser/ is one: a
module's fixtures are made once, and two browsers never share two cores. Each process has its own ComfyUI and, from the
first test that asks for it, its own server. SECONDS says which units start first.
"""

import importlib.util
import os
import pathlib
import shutil
import types

import pytest
from trainyard.tools import env

TESTS = pathlib.Path(__file__).resolve().parent
HOST_PACKAGES = ("torch", "transformers", "aiohttp", "comfy_kitchen")


def no_comfyui():
    """Why tests with ComfyUI cannot run here, or ''."""
    place = env.find_comfyui()
    if place is None:
        return "ComfyUI not found (set COMFYUI_PATH to its folder)"
    missing = [name for name in HOST_PACKAGES if importlib.util.find_spec(name) is None]
    return (
        f"ComfyUI at {place} needs {', '.join(missing)}, not visible here (run `make env`, then .venv/bin/pytest)"
        if missing
        else ""
    )


def no_browser():
    """Why tests in a browser cannot run here, or ''."""
    tools = {"Chromium (set CHROMIUM to its path)": chromium(), "Node": shutil.which("node")}
    missing = [name for name, path in tools.items() if not path]
    return no_comfyui() or (f"{' and '.join(missing)} not found" if missing else "")


def chromium():
    """Path of a Chromium, or None."""
    return os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


# CPU seconds of the units of work that take longest, to start these first; rough guesses in part.
SECONDS = {
    "tests/browser": 400,
    "tests/workflows/test_workflows.py": 150,
    "tests/comfy/test_pretend_card.py": 50,
    "tests/comfy/test_gpu_command.py": 45,
    "tests/comfy/test_trouble.py": 120,
    "tests/comfy/test_train_lora_server.py": 115,
    "tests/unit/test_methods.py": 112,
    "tests/comfy/test_prompt_and_pair_server.py": 100,
    "tests/comfy/test_compile.py": 90,
    "tests/unit/test_score_training.py": 70,
    "tests/comfy/test_toy_prompts_and_pairs.py": 55,
    "tests/comfy/test_toy_curve.py": 40,
    "tests/unit/test_compile.py": 40,
    "tests/comfy/test_adapter_layers.py": 35,
    "tests/comfy/test_bench.py": 30,
    "tests/comfy/test_captioning.py": 30,
}


GROUPS = {"comfy": ("comfy", no_comfyui), "workflows": ("comfy", no_comfyui), "proofs": ("comfy", no_comfyui),
          "browser": ("browser", no_browser)}  # fmt: skip
SKIPPED = {}  # group -> why


def group_of(path):
    """Name of the folder below tests/ that a file lies in."""
    parts = (
        pathlib.Path(path).resolve().relative_to(TESTS).parts if TESTS in pathlib.Path(path).resolve().parents else ()
    )
    return parts[0] if parts else ""


def pytest_ignore_collect(collection_path):
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    group = group_of(collection_path)
    why = GROUPS[group][1]() if group in GROUPS else ""
    if why:
        SKIPPED[group] = why
        return True
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hands out units of work in the order in which they were collected (see pytest_collection_modifyitems)."""
    from xdist.scheduler import LoadScopeScheduling

    class UnitScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return unit_of_work(nodeid)

    config.option.loadscopereorder = False
    return UnitScheduling(config, log)


def unit_of_work(nodeid):
    """What one process runs from beginning to end: a file, or the folder browser/."""
    file = nodeid.split("::")[0]
    return "tests/browser" if file.startswith("tests/browser/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker process tells which groups it skipped."""
    SKIPPED.update(getattr(node, "workeroutput", {}).get("skipped", {}))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["skipped"] = SKIPPED


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: -SECONDS.get(unit_of_work(item.nodeid), 0))
    for item in items:
        group = group_of(item.path)
        if group in GROUPS:
            item.add_marker(GROUPS[group][0])
        elif "server" in item.fixturenames or "comfy" in item.fixturenames:
            item.add_marker("comfy")
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not gpu(), reason="no CUDA device"))


def gpu():
    import torch

    return torch.cuda.is_available()


def pytest_terminal_summary(terminalreporter):
    for group, why in sorted(SKIPPED.items()):
        terminalreporter.write_line(f"SKIPPED {group} tests: {why}", red=True, bold=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small wait for a second thread longer than they work, seventy times longer on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI in this process, on the CPU, with a base folder of its own: `.path`, `.folder_paths`, `.nodes`."""
    if why := no_comfyui():
        pytest.skip(why)
    from trainyard.tests.comfy import boot

    boot.boot()
    import folder_paths
    import nodes

    assert pathlib.Path(nodes.__file__).parent == boot.COMFYUI, f"`import nodes` is {nodes.__file__} and not ComfyUI's"
    return types.SimpleNamespace(path=boot.COMFYUI, folder_paths=folder_paths, nodes=nodes)


@pytest.fixture
def folders(comfy, tmp_path):
    """ComfyUI's input, output, temp and datasets folders below one throw-away folder, which is returned. They stay when
    a test undoes its own patches."""
    for name in ("input", "output", "temp", "datasets"):
        (tmp_path / name).mkdir()
    kinds = comfy.folder_paths.folder_names_and_paths
    with pytest.MonkeyPatch.context() as patch:
        for name in ("input", "output", "temp"):
            patch.setattr(comfy.folder_paths, f"{name}_directory", str(tmp_path / name))
        patch.setitem(kinds, "datasets", ([str(tmp_path / "datasets")], kinds.get("datasets", ([], set()))[1]))
        yield tmp_path


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real ComfyUI server with this pack and the tests' own helper nodes. One start (10-20 s) per session."""
    if why := no_comfyui():
        pytest.skip(why)
    from trainyard.tests.comfy.server import Server

    with Server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running
