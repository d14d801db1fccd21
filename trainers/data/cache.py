"""What the VAE and the text encoder said, kept on disk as safetensors files named by a hash of everything that went in.

A changed image, setting or model gives another name, so nothing stale is ever read; files are replaced whole, so an
encode that was killed continues where it stopped. In memory only the last-used values stay, up to a budget.

Files lie in folders named by the first two digits of their key, because many tools and file systems are slow with one
folder of 100 000 files. What a tensor's values do not need is not written (see `pack_tensor`); it is there again, in
every value, when the tensor is read.
"""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_state_tree, remove_stale_parts_once, unpack_state_tree, write_state_tree

MIB = 2**20
SHARD_DIGITS = 2  # 256 folders
READ_AHEAD_ENTRIES = 32  # most that are read ahead for one batch
PACKED = "packed"  # the only key of a dict in the place of a packed tensor
PACKED_DTYPES = (torch.bfloat16, torch.float16)
PROBE_VALUES = 1024  # values that tell most tensors that do not fit a smaller type
lost_files = 0  # that were asked for in this process and were gone or damaged


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
    shared: do not write into their tensors. One thread at a time may ask."""

    def __init__(self, folder, budget: int = 512 * MIB):
        self.folder, self.lru = Path(folder), LruCache(budget)
        self.reading: OrderedDict[str, Future] = OrderedDict()
        self.reader: ThreadPoolExecutor | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, *self.folder.glob("[0-9a-f]" * SHARD_DIGITS)):
            remove_stale_parts_once(folder)
        self.move_unsharded_files()

    def path(self, key: str) -> Path:
        return self.folder / key[:SHARD_DIGITS] / f"{key}.safetensors"

    def move_unsharded_files(self) -> None:
        """Brings files of the first release, which lie in the folder itself, to their place. One that cannot be moved
        is encoded again."""
        for file in list(self.folder.glob("*.safetensors")):
            with contextlib.suppress(OSError):
                self.path(file.stem).parent.mkdir(exist_ok=True)
                file.replace(self.path(file.stem))

    def read_shapes(self, key: str) -> dict | None:
        """The tree with each tensor's shape in its place, from the file's header alone; None when absent or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path(key)), framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                return unpack_tree(unpack_state_tree(json.loads((file.metadata() or {})["tree"]), shapes), unpack_shape)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def write(self, key: str, tree: dict) -> None:
        write_state_tree(self.path(key), map_tensors(tree, pack_tensor))

    def load(self, key: str) -> dict:
        """The tree, from memory or disk."""
        return self.lru.get(key, lambda: self.take_read_ahead(key) or self.read_from_disk(key))

    def read_ahead(self, keys: Iterable[str]) -> None:
        """Begins to read what will be asked for next, in a thread. What stays unasked for is forgotten."""
        wanted = (key for key in keys if key not in self.lru.values and key not in self.reading)
        for key in islice(wanted, READ_AHEAD_ENTRIES):
            self.reader = self.reader or ThreadPoolExecutor(1, "trainyard-read")
            self.reading[key] = self.reader.submit(self.read_tree, key)
        while len(self.reading) > 2 * READ_AHEAD_ENTRIES:  # the batch in work, and the next
            self.reading.popitem(last=False)[1].cancel()

    def take_read_ahead(self, key: str) -> dict | None:
        """What was read ahead; None where it was not, or not with success."""
        future = self.reading.pop(key, None)
        if future is None or future.cancel() or future.exception() is not None:
            return None
        return future.result()

    def read_from_disk(self, key: str) -> dict:
        try:
            return self.read_tree(key)
        except (OSError, ValueError) as error:
            self.remove_damaged_file(key, error)
            raise ValueError(self.describe_lost_file(key)) from error

    def read_tree(self, key: str) -> dict:
        with torch.inference_mode(False):  # a node may ask, and autograd refuses tensors made in inference mode
            return unpack_tree(read_state_tree(self.path(key)), unpack_tensor)

    def remove_damaged_file(self, key: str, error: Exception) -> None:
        """So that the next encoding makes it again."""
        global lost_files
        lost_files += 1
        if isinstance(error, ValueError):
            with contextlib.suppress(OSError):
                self.path(key).unlink()

    def describe_lost_file(self, key: str) -> str:
        return (
            f"The cached file {self.path(key)} is gone or damaged. Run Encode Dataset again (press Run); only what is "
            "missing is encoded."
        )


class MemoryStore(dict):
    """The same door for values that live in memory only."""

    def load(self, key: str) -> dict:
        return self[key]


class TensorRecord(dict):
    """A dict whose values are attributes, too. It stands for an object of another package that only holds tensors, such
    as what CLIP vision gives, and unlike it can be hashed by its content."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def as_tensor_record(value) -> Any:
    """A TensorRecord of an object whose attributes are tensors and plain values; anything else as it is."""
    held = getattr(value, "__dict__", None)
    if not isinstance(held, dict) or not any(isinstance(each, Tensor) for each in held.values()):
        return value
    plain = all(each is None or isinstance(each, (Tensor, int, float, str, list, tuple)) for each in held.values())
    return TensorRecord(held) if plain else value


def map_tensors(tree, change) -> Any:
    """The tree with change(tensor) in place of every tensor. Objects that hold tensors come back as TensorRecords."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree := as_tensor_record(tree), dict):
        kind = TensorRecord if isinstance(tree, TensorRecord) else dict
        return kind({key: map_tensors(value, change) for key, value in tree.items()})
    return type(tree)(map_tensors(value, change) for value in tree) if isinstance(tree, (list, tuple)) else tree


def count_tensor_bytes(tree) -> int:
    """Bytes of all tensors in the tree."""
    counted = []
    map_tensors(tree, lambda tensor: counted.append(tensor.nbytes))
    return sum(counted)


# -- tensors without what their values do not need ---------------------------------------------------------------------


def pack_tensor(tensor: Tensor) -> Tensor | dict:
    """The tensor itself, or {PACKED: (tensor, name of its dtype, rows)}: fp32 values that an encoder made in half
    precision are stored in it, and rows at the end that are equal, such as a text's masked padding, once. Nothing is
    rounded."""
    if tensor.dtype != torch.float32 or tensor.ndim < 2 or not tensor.numel():
        return tensor
    rows = tensor.shape[-2]
    small = narrow_exactly(tensor[..., : count_distinct_rows(tensor), :])
    if small.nbytes == tensor.nbytes:
        return tensor
    return {PACKED: (small, str(tensor.dtype).removeprefix("torch."), rows)}


def count_distinct_rows(tensor: Tensor) -> int:
    """Rows (second to last dimension) after which all are equal to the last of them; at least 1."""
    rows = tensor.shape[-2]
    if rows < 2 or not torch.equal(tensor[..., -1, :], tensor[..., -2, :]):
        return rows
    differs = (tensor != tensor[..., -1:, :]).any(-1).reshape(-1, rows).any(0)
    return min(rows, int(differs.nonzero().max()) + 2) if differs.any() else 1


def narrow_exactly(tensor: Tensor) -> Tensor:
    """In the smallest type that holds every value."""
    probe = tensor.flatten()[:PROBE_VALUES]
    for dtype in PACKED_DTYPES:
        if torch.equal(probe.to(dtype).to(tensor.dtype), probe):
            small = tensor.to(dtype)
            if torch.equal(small.to(tensor.dtype), tensor):
                return small
    return tensor


def unpack_tree(tree, unpack) -> Any:
    """The tree with unpack(tensor, dtype, rows) in the place of what `pack_tensor` packed."""
    if isinstance(tree, dict):
        if tree.keys() == {PACKED}:
            return unpack(*tree[PACKED])
        return {key: unpack_tree(value, unpack) for key, value in tree.items()}
    return type(tree)(unpack_tree(value, unpack) for value in tree) if isinstance(tree, (list, tuple)) else tree


def unpack_tensor(small: Tensor, dtype: str, rows: int) -> Tensor:
    """The tensor before `pack_tensor`."""
    wide = small.to(getattr(torch, dtype))
    missing = rows - wide.shape[-2]
    if not missing:
        return wide
    return torch.cat([wide, wide[..., -1:, :].expand(*wide.shape[:-2], missing, wide.shape[-1])], dim=-2)


def unpack_shape(small: tuple[int, ...], dtype: str, rows: int) -> tuple[int, ...]:
    """The same of a shape."""
    return (*small[:-2], rows, small[-1])
