"""The rules that nothing else would notice breaking: who may import whom, and what a user has to install."""

import ast
import pathlib
import subprocess
import sys

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOST = set(
    "comfy comfy_api comfy_extras comfy_execution folder_paths nodes server execution node_helpers "
    "latent_preview".split()
)
HEAVY = {
    "timm",
    "onnx",
    "onnxruntime",
    "diffusers",
    "transformers",
    "peft",
    "scipy",
    "torchvision",
    "pytorch_optimizer",
    "accelerate",
}
BROUGHT = set(
    "av torch torchvision torchaudio numpy safetensors transformers pillow einops scipy tqdm psutil aiohttp".split()
)
# For training; for models that look at images; for score models that look through a loaded one; for samples drawn while
# a model trains.
DOORS = ("nodes/host/", "nodes/data/loaded_models.py", "nodes/scores/feature_extractors.py", "nodes/train/previews.py")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path, everywhere=True):
    """Absolute dotted names that a file imports; relative ones are resolved from the pack's root, as
    `.trainers.loop`."""
    tree = ast.parse(path.read_text(), str(path))
    nodes = ast.walk(tree) if everywhere else at_import_time(tree)
    return [name for node in nodes for name in imported(node, path)]


def at_import_time(node):
    """The nodes that run when a file is imported: not the bodies of functions, and not what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_typing_only(child):
            continue
        yield child
        yield from at_import_time(child)


def is_typing_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imported(node, path):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            folder = path.relative_to(ROOT).parts[: -node.level]
            base = "." + ".".join([*folder, *filter(None, [base])])
        return [base, *(f"{base.rstrip('.')}.{alias.name}" for alias in node.names)]
    return []


def top(name):
    return name.split(".")[0]


@pytest.mark.parametrize("path", modules("trainers"), ids=name_of)
def test_trainers_import_nothing_of_comfyui_or_of_the_rooms_above(path):
    names = imports(path)
    assert not [name for name in names if top(name) in HOST | {"trainyard"}]
    assert not [name for name in names if name.startswith(".") and not name.startswith(".trainers")], (
        "reaches above trainers/"
    )


@pytest.mark.parametrize("path", modules("trainers"), ids=name_of)
def test_trainers_import_heavy_packages_only_inside_functions(path):
    assert not [name for name in imports(path, everywhere=False) if top(name) in HEAVY]


@pytest.mark.parametrize("path", modules("nodes"), ids=name_of)
def test_nodes_import_heavy_packages_only_inside_functions_and_never_the_pack_by_name(path):
    assert not [name for name in imports(path, everywhere=False) if top(name) in HEAVY]
    by_name = [name for name in imports(path) if top(name) in {"trainyard", "trainers"}]
    assert not by_name, "use relative imports: the pack's folder may have any name"


@pytest.mark.parametrize(
    "path", [path for path in modules("nodes") if not name_of(path).startswith(DOORS)], ids=name_of
)
def test_only_the_host_doors_touch_samplers_and_model_management(path):
    closed = (
        "comfy.samplers",
        "comfy.sample",
        "comfy.sampler_helpers",
        "comfy.model_management",
        "comfy.model_patcher",
        "comfy.ops",
    )
    assert not [name for name in imports(path) if name.startswith(closed)]


@pytest.mark.parametrize("path", modules("trainers/methods"), ids=name_of)
def test_a_method_knows_neither_the_loop_nor_another_methods_private_names(path):
    names = imports(path)
    assert not [name for name in names if name.startswith((".trainers.loop", ".trainers.runs"))]
    others = [name for name in names if name.startswith(".trainers.methods.") and name.split(".")[-1].startswith("_")]
    assert not others


def test_data_and_settings_and_diffusion_know_no_methods():
    low = [
        *modules("trainers/data"),
        *modules("trainers/adapters"),
        *(ROOT / "trainers" / f"{room}.py" for room in ("settings", "diffusion", "files")),
    ]
    assert not [
        name_of(path)
        for path in low
        if path.is_file() and any(name.startswith(".trainers.methods") for name in imports(path))
    ]


def test_importing_the_pack_and_its_trainers_loads_no_heavy_package_and_nothing_of_comfyui():
    code = f"""
import importlib, pathlib, pkgutil, sys, types
root = pathlib.Path({str(ROOT)!r})
pack = sys.modules["pack"] = types.ModuleType("pack"); pack.__path__ = [str(root)]
for module in pkgutil.walk_packages([str(root / "trainers")], "pack.trainers."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import torch
print(*sorted(set(name.split(".")[0] for name in sys.modules) & {HEAVY | HOST}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_root_imports_nothing_of_comfyui_at_module_scope():
    assert not [
        name for name in imports(ROOT / "__init__.py", everywhere=False) if top(name) in HOST | HEAVY | {"torch"}
    ]


def test_the_pack_speaks_the_new_node_interface_only():
    files = [*ROOT.glob("*.py"), *modules("nodes"), *modules("trainers")]
    assert not [name_of(path) for path in files if "NODE_CLASS_MAPPINGS" in path.read_text()]
    assert "comfy_entrypoint" in (ROOT / "__init__.py").read_text()


def lines(name):
    return [
        line.strip() for line in (ROOT / name).read_text().splitlines() if line.strip() and not line.startswith("#")
    ]


def test_the_requirements_file_lists_exactly_the_projects_dependencies():
    assert lines("requirements.txt") == PYPROJECT["project"]["dependencies"]


def test_nothing_that_comfyui_brings_is_required_or_capped():
    required = lines("requirements.txt")
    assert not [line for line in required if line.split(">")[0].split("=")[0].strip().lower() in BROUGHT]
    assert not [line for line in required if any(mark in line for mark in ("==", "<", "~=", "git+", "@"))]


def test_torch_is_named_in_no_requirements_file():
    assert not [
        name.name
        for name in ROOT.glob("requirements*.txt")
        for line in lines(name.name)
        if line.lower().startswith("torch")
    ]


def test_the_registry_finds_what_it_asks_for():
    project, comfy = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
    assert project["name"] == "trainyard" and "comfyui" not in project["name"].lower()
    assert project["urls"]["Repository"].startswith("https://")
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"]
    assert "web" not in comfy, "WEB_DIRECTORY names it already: twice loads every script twice"
    assert (ROOT / project["license"]["file"]).is_file()
