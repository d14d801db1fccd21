"""What large datasets cost.

.venv/bin/python benchmarks/large_datasets.py cache      bytes and reads of the cache of Encode Dataset
.venv/bin/python benchmarks/large_datasets.py folders    schemas and Load Dataset with 20 000 images in input/
.venv/bin/python benchmarks/large_datasets.py server     the same of a real server: its node list and Load Dataset, cold and warm
.venv/bin/python benchmarks/large_datasets.py import     what the pack's import adds to the start of ComfyUI
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pack
import torch
from PIL import Image

READS = 40
IMAGES = 20_000


# -- cache -------------------------------------------------------------------------------------------------------------


def make_texts() -> dict[str, dict]:
    """A conditioning of each kind, as ComfyUI's text encoders give it: fp32."""
    t5, wan, clip = torch.randn(1, 512, 4096), torch.randn(1, 512, 4096), torch.randn(1, 77, 2048)
    wan[:, 60:] = 0  # its encoder sets masked rows to 0
    return {
        "T5, 512 rows, padding in use": {"cross_attn": t5, "pooled_output": torch.randn(1, 768)},
        "the same as bf16": {"cross_attn": t5.bfloat16().float(), "pooled_output": torch.randn(1, 768)},
        "UMT5 of Wan, 512 rows, 60 in use": {"cross_attn": wan, "pooled_output": None},
        "SDXL's two CLIPs": {"cross_attn": clip, "pooled_output": torch.randn(1, 1280)},
        "the same as bf16 (SDXL)": {"cross_attn": clip.bfloat16().float(), "pooled_output": torch.randn(1, 1280)},
    }


def make_latents() -> dict[str, dict]:
    mean, std = torch.randn(4, 128, 128), torch.rand(4, 128, 128)
    return {
        "SDXL latent, 1024 px, VAE in fp32": {"mean": mean, "std": std},
        "SDXL latent, 1024 px, VAE in bf16": {"mean": mean.bfloat16().float(), "std": std},
    }


def measure_cache():
    for name, tree in {**make_texts(), **make_latents()}.items():
        with tempfile.TemporaryDirectory() as folder:
            size, seconds = measure_reads(Path(folder), tree)
        print(f"{name:40} {size / 1e6:8.2f} MB {1000 * seconds:8.2f} ms a read", flush=True)


def measure_reads(folder: Path, tree: dict) -> tuple[int, float]:
    """(bytes of a file, median seconds of a read from the operating system's memory)"""
    from trainyard.trainers.data.cache import DiskCache

    cache, keys = DiskCache(folder, budget=0), [f"{number:032x}" for number in range(READS)]
    for key in keys:
        cache.write(key, tree)
    return cache.path(keys[0]).stat().st_size, median(time_call(cache.load, key) for key in keys)


def time_call(call, *given) -> float:
    start = time.perf_counter()
    call(*given)
    return time.perf_counter() - start


# -- folders -----------------------------------------------------------------------------------------------------------


def measure_folders():
    import folder_paths
    from trainyard import nodes
    from trainyard.nodes import paths
    from trainyard.nodes.data.captions import THUMBNAILS_AT_RUN
    from trainyard.trainers.data.captions.manual_edits import build_caption_cards
    from trainyard.trainers.data.readers import hash_folder_state, read_folder

    listed = [
        node for name in nodes.find_node_modules() for node in importlib.import_module(name, "trainyard.nodes").NODES
    ]
    schemas = lambda: [node.define_schema() for node in listed]
    print_seconds(f"{len(listed)} schemas, input/ empty", schemas)
    folder = Path(folder_paths.get_input_directory()) / "many"
    draw_images(folder)
    for name in ("first", "second"):
        print_seconds(f"{len(listed)} schemas, {IMAGES} images with captions, {name} time", schemas)
    for name in ("first", "second"):
        print_seconds(f"hash_folder_state, {name} time", lambda: hash_folder_state(folder))
        print_seconds(f"read_folder, {name} time", lambda: read_folder(folder))
    dataset = read_folder(folder)
    cards = lambda: build_caption_cards(dataset, paths.thumbnails_folder(), first=THUMBNAILS_AT_RUN)
    print_seconds("cards of the caption grid", cards)


def draw_images(folder: Path) -> None:
    """Small PNGs of different bytes, long since there, and a caption for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        file = folder / f"{number:05}.png"
        image = Image.new("RGB", (64, 64), (number % 256, number // 256, 7))
        image.save(file)
        file.with_suffix(".txt").write_text(f"caption {number}", encoding="utf-8")
        os.utime(file, (1, 1))
    os.utime(folder, (1, 1))


def print_seconds(name: str, call) -> None:
    start = time.process_time()
    call()
    print(f"{name:60} {time.process_time() - start:8.2f} CPU s", flush=True)


# -- server ------------------------------------------------------------------------------------------------------------


def measure_server():
    """Wall seconds. The node list without and with the pack: the difference is the pack's share."""
    from trainyard.tests.comfy.server import PACKS, Server

    with tempfile.TemporaryDirectory() as base:
        for place in ("input/many", "input"):
            draw_images(Path(base) / place)
            for packs in ({}, {"trainyard": PACKS["trainyard"]}):
                with Server(base, packs=packs) as server:
                    times = [time_call(server.get, "/object_info") for _ in range(6)]
                words = f"images in {place}, {'with' if packs else 'without'} the pack"
                print(f"node list, {words}: {times[0]:.2f} s, then {min(times[1:]):.2f} s", flush=True)
            if place == "input/many":
                measure_server_reading(base)
                shutil.rmtree(Path(base) / place)


def measure_server_reading(base: str) -> None:
    """Load Dataset on a server that is started twice."""
    from trainyard.tests.comfy.server import PACKS, Server

    for start in ("first start", "second start"):
        with Server(base, packs={"trainyard": PACKS["trainyard"]}) as server:
            for repeats in (1, 2):  # another value, or the host would take the result that it has
                inputs = {"folder": "input/many", "repeats": repeats, "alpha_mask": False}
                prompt = {
                    "1": {"class_type": "TrainyardLoadDataset", "inputs": inputs},
                    "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
                }
                begin = time.perf_counter()
                run = server.run(prompt)
                if not run.ok:
                    raise RuntimeError(run.why)
                print(f"Load Dataset, {start}, run {repeats}: {time.perf_counter() - begin:.1f} s", flush=True)


# -- import ------------------------------------------------------------------------------------------------------------


def measure_import():
    importlib.import_module("nodes")  # ComfyUI's
    importlib.import_module("server")
    before, start = set(sys.modules), time.process_time()
    extension = importlib.import_module("trainyard.nodes").TrainyardExtension()
    for node in asyncio.run(extension.get_node_list()):
        node.define_schema()
    new = [name.split(".")[0] for name in set(sys.modules) - before]
    print(f"{time.process_time() - start:.2f} CPU seconds, {len(new)} modules, {new.count('trainyard')} of them ours")


COMMANDS = {"cache": measure_cache, "folders": measure_folders, "server": measure_server, "import": measure_import}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=list(COMMANDS))
    torch.set_num_threads(1)
    pack.boot()
    COMMANDS[parser.parse_args().command]()
