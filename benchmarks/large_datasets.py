"""What large datasets cost: the cache's bytes and reads, without ComfyUI.

.venv/bin/python benchmarks/large_datasets.py cache
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import types
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
READS = 40


def load_pack():
    """The pack as package `trainyard`, without ComfyUI."""
    package = types.ModuleType("trainyard")
    package.__path__ = [str(ROOT)]
    sys.modules["trainyard"] = package


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


COMMANDS = {"cache": measure_cache}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=list(COMMANDS))
    torch.set_num_threads(1)
    load_pack()
    COMMANDS[parser.parse_args().command]()
