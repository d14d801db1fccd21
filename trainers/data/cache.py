"""What the VAE and the text encoder said, kept on disk as safetensors files named by a hash of everything that went in.

A changed image, setting or model gives another name, so nothing stale is ever read; files are replaced whole, so an
encode that was killed continues where it stopped. In memory only the last-used values stay, up to a budget.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_state_tree, unpack_state_tree, write_state_tree

MIB = 2**20
STALE_PART_SECONDS = 3600.0


class LruCache:
    """The most recently used values, at most `budget` bytes of tensors in all; a larger value is not kept."""

    def __init__(self, budget: int):
        self.budget, self.used_bytes = budget, 0
        self.values: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str, load):
        """The value under this key; load() makes it when it is not here."""
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key][0]
        value = load()
        self.put(key, value, count_tensor_bytes(value))
        return value

    def put(self, key: str, value, nbytes: int):
        if nbytes > self.budget:
            return
        self.values[key] = value, nbytes
        self.used_bytes += nbytes
        while self.used_bytes > self.budget:
            _, (_, dropped) = self.values.popitem(last=False)
            self.used_bytes -= dropped


class DiskCache:
    """Trees (dicts of tensors, numbers, text, None and more dicts and lists) by key, one file each. `load` values are
    shared: do not write into their tensors."""

    def __init__(self, folder, budget: int = 512 * MIB):
        self.folder, self.lru = Path(folder), LruCache(budget)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(self.folder)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def read_shapes(self, key: str) -> dict | None:
        """The tree with each tensor's shape in its place, from the file's header alone; None when absent or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path(key)), framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                return unpack_state_tree(json.loads((file.metadata() or {})["tree"]), shapes)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def write(self, key: str, tree: dict) -> None:
        write_state_tree(self.path(key), tree)

    def load(self, key: str) -> dict:
        """The tree, from memory or disk."""
        return self.lru.get(key, lambda: self.read_from_disk(key))

    def read_from_disk(self, key: str) -> dict:
        try:
            with torch.inference_mode(False):  # a node may ask, and autograd refuses tensors made in inference mode
                return map_tensors(
                    read_state_tree(self.path(key)), Tensor.clone
                )  # what read_tree gives are windows into the file
        except (OSError, ValueError) as error:
            raise ValueError(self.describe_lost_file(key)) from error

    def describe_lost_file(self, key: str) -> str:
        return (
            f"The cached file {self.path(key)} is gone or damaged. Run Encode Dataset again; only what is missing is "
            "encoded."
        )


class MemoryStore(dict):
    """The same door for values that live in memory only."""

    def load(self, key: str) -> dict:
        return self[key]


def map_tensors(tree, change) -> Any:
    """The tree with change(tensor) in place of every tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    return type(tree)(map_tensors(value, change) for value in tree) if isinstance(tree, (list, tuple)) else tree


def count_tensor_bytes(tree) -> int:
    """Bytes of all tensors in the tree."""
    counted = []
    map_tensors(tree, lambda tensor: counted.append(tensor.nbytes))
    return sum(counted)


def remove_stale_parts(folder: Path) -> None:
    """Remove what a killed process left half written; younger files may belong to another process at work."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_PART_SECONDS:
                part.unlink()
