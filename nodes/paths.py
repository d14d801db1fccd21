"""The only functions that touch names given by a user. Every one refuses a path that leaves its root."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

NONE = "(no folder yet)"
DEPTH = 3
NOT_PICTURES = ("3d", "trainyard_cache")  # the host's folder of meshes, our own of latents


def roots() -> dict[str, Path]:
    """Where datasets may lie, by the first part of their name."""
    return {"input": Path(folder_paths.get_input_directory()), "datasets": Path(folder_paths.get_folder_paths("datasets")[0])}


def dataset_folders() -> list[str]:
    """Folders below input/ and datasets/, as input/name or datasets/name, sorted."""
    found = [f"{name}/{sub}" for name, root in roots().items() for sub in subfolders(root)]
    return found or [NONE]


def subfolders(root: Path) -> list[str]:
    """Relative paths of folders, at most DEPTH deep, without hidden ones."""
    out = []
    for folder, names, _ in os.walk(root):
        names[:] = sorted(n for n in names if not n.startswith(".") and n not in NOT_PICTURES)
        relative = Path(folder).relative_to(root)
        if relative.parts:
            out.append(relative.as_posix())
        if len(relative.parts) >= DEPTH:
            names.clear()
    return sorted(out)


def dataset_folder(choice: str) -> Path:
    """The folder behind a choice of `dataset_folders`. Raises ValueError when it is not below input/ or datasets/."""
    if choice == NONE:
        raise ValueError("There is no dataset folder yet. Put a folder with pictures into ComfyUI's input folder, then press R to refresh.")
    name, _, rest = choice.replace("\\", "/").partition("/")
    if name not in roots():
        raise ValueError(f"The dataset folder is {choice!r}; it must begin with {' or '.join(f'{r}/' for r in roots())}.")
    return inside(roots()[name], rest, choice)


def inside(root: Path, relative: str, shown: str) -> Path:
    """root/relative, which must lie below root, links followed. Raises ValueError otherwise."""
    path = root / relative
    if not folder_paths.is_within_directory(str(root), str(path)):
        raise ValueError(f"{shown!r} leads out of {root}; choose a path inside it.")
    return path


def cache_folder() -> Path:
    """Encoded latents and texts: safe to delete, rebuilt on demand."""
    return Path(folder_paths.get_folder_paths("datasets")[0]) / "trainyard_cache"


def loras_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "loras"


def runs_folder() -> Path:
    """One folder per run, below output/loras so that every LoRA loader lists what a run saved."""
    return loras_folder() / "trainyard"


def lora_to_write(name: str, is_the_same) -> Path:
    """name.safetensors in output/loras, else name_2, name_3 ...: the first that does not exist, or that `is_the_same(path)` already.
    Raises ValueError for a bad name."""
    plain = name.strip().removesuffix(".safetensors").replace("\\", "/").strip("/")
    if not plain or any(part in ("", ".", "..") or set(part) & set('<>:"|?*\0') for part in plain.split("/")):
        raise ValueError(f"The LoRA's name is {name!r}; use a plain name such as my_style, or folder/my_style.")
    path, count = inside(loras_folder(), f"{plain}.safetensors", name), 2
    while path.exists() and not is_the_same(path):
        path = inside(loras_folder(), f"{plain}_{count}.safetensors", name)
        count += 1
    return path


def lora_names() -> list[str]:
    return sorted(folder_paths.get_filename_list("loras")) or ["(no LoRA yet)"]


def lora_path(name: str) -> Path:
    """The file behind a name of `lora_names`. Raises ValueError when there is none, or when it is no safetensors file."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(f"There is no LoRA named {name!r} in {', '.join(folder_paths.get_folder_paths('loras'))}.")
    if not path.endswith((".safetensors", ".sft")):
        raise ValueError(f"{name!r} is no .safetensors file; other formats can run code when they are opened and are refused.")
    return Path(path)
