"""A folder of images made ready for training, by ComfyUI's own nodes and by ours, on real servers: images/s and peak
memory.

    .venv/bin/python benchmarks/encode_dataset.py                                                  # about five minutes
    on two quiet cores .venv/bin/python benchmarks/encode_dataset.py --counts 40 120 --json
    benchmarks/results/today-datasets.json

Every row is a server of its own with the same small checkpoint (tests/comfy/tiny.py), warmed up with two images; then
the clock and the peak of its resident memory start. Core: load the folder, resize, crop, Make Training Dataset, Save
Training Dataset. Ours: Load Dataset, Encode Dataset, to the same size. `again` repeats ours with another dropout, so
that all is found on disk. Check Dataset has no counterpart.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

import pack

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parents[1]
MIB = 2**20


# -- the images ------------------------------------------------------------------------------------------------------


def photographs(folder: pathlib.Path, count: int, side: int) -> None:
    """`count` captioned JPEGs of side x side px: clouds with grain, about as hard to decode and as large as photos."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        clouds = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 8, (side, side, 1))
        Image.fromarray((np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8)).save(
            folder / f"{index:04d}.jpg", quality=90
        )
        (folder / f"{index:04d}.txt").write_text(f"a cloud, number {index}", encoding="utf-8")


# -- what is run -------------------------------------------------------------------------------------------------------


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def core(folder, size, **_):
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name="tiny_sd15.safetensors"),
        "load": node("LoadImageTextDataSetFromFolder", folder=folder),
        "resize": node("ResizeImagesByShorterEdge", images=["load", 0], shorter_edge=size),
        "crop": node("CenterCropImages", images=["resize", 0], width=size, height=size),
        "encode": node(
            "MakeTrainingDataset", images=["crop", 0], vae=["model", 2], clip=["model", 1], texts=["load", 1]
        ),
        "end": node(
            "SaveTrainingDataset",
            latents=["encode", 0],
            conditioning=["encode", 1],
            folder_name=f"core_{folder}",
            shard_size=1000,
        ),
    }


def ours(folder, size, schemas, **widgets):
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name="tiny_sd15.safetensors"),
        "load": node("TrainyardLoadDataset", **filled(schemas, "TrainyardLoadDataset", folder=f"input/{folder}")),
        "encode": node("TrainyardEncodeDataset", **filled(schemas, "TrainyardEncodeDataset", dataset=["load", 0], vae=["model", 2],
                                                          clip=["model", 1], resolution=size, **widgets)),
        "end": node("PreviewAny", source=["encode", 0]),
    }  # fmt: skip


def checked(folder, size, schemas, **_):
    return {
        "load": node("TrainyardLoadDataset", **filled(schemas, "TrainyardLoadDataset", folder=f"input/{folder}")),
        "check": node("TrainyardCheckDataset", **filled(schemas, "TrainyardCheckDataset", dataset=["load", 0])),
        "end": node("PreviewAny", source=["check", 0]),
    }


def filled(schemas, kind, **given) -> dict:
    """The node's inputs, with its own default where nothing is given."""
    about = {
        name: info[1] if len(info) > 1 else {} for name, info in schemas[kind]["input"].get("required", {}).items()
    }
    defaults = {name: facts["default"] if "default" in facts else facts["options"][0] for name, facts in about.items()
                if name not in given and ("default" in facts or facts.get("options"))}  # fmt: skip
    return defaults | given


ROWS = {"core": core, "ours": ours, "check": checked}


# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(name: str, count: int, base: pathlib.Path, size: int, side: int) -> list[dict]:
    """The rows of one server: of this graph, and for ours of the second run, which finds all on disk."""
    from trainyard.tests.comfy.server import Server

    photographs(base / "input" / "few", 2, side)
    photographs(base / "input" / "many", count, side)
    with Server(base) as server:
        server.install("sd15")
        schemas = server.object_info()
        once(server, ROWS[name]("few", size, schemas=schemas), 2)
        rows = [{"row": name} | once(server, ROWS[name]("many", size, schemas=schemas), count)]
        if name == "ours":
            rows.append({"row": "ours, again"} | once(server, ours("many", size, schemas, dropout=0.1), count))
    return rows


def once(server, prompt, count: int) -> dict:
    """Seconds, images/s, and by how much the server's memory rose above where it was."""
    place = pathlib.Path(f"/proc/{server.process.pid}")
    before, worked = status(place, "VmRSS"), cpu_seconds(place)
    (place / "clear_refs").write_text("5")  # the peak starts anew
    begin = time.perf_counter()
    run = server.run(prompt, seconds=3000)
    seconds = time.perf_counter() - begin
    if not run.ok:
        raise RuntimeError(run.why)
    return {"count": count, "seconds": round(seconds, 2), "per_second": round(count / seconds, 2),
            "cpu_seconds": round(cpu_seconds(place) - worked, 2), "idle_mib": round(before / MIB), "rise_mib": round((status(place, "VmHWM") - before) / MIB)}  # fmt: skip


def status(place: pathlib.Path, name: str) -> int:
    """Bytes."""
    (line,) = (line for line in (place / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def cpu_seconds(place: pathlib.Path) -> float:
    """What the process has worked so far, on all its threads; other work on the machine does not count, as it does in
    seconds."""
    fields = (place / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def batching(sizes=(128, 256), batches=(1, 2, 4, 8)) -> list[dict]:
    """Seconds per image and how far latents move, when the VAE gets several images at once: why Encode Dataset
    gives it one."""
    import comfy.sd
    import torch
    from trainyard.nodes import host
    from trainyard.tests.comfy import tiny

    with torch.inference_mode():
        vae = comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd15")), output_clip=False)[2]
    rows = []
    with host.context.enable_gradients():
        encoder = host.encoders.VaeEncoder(vae)
        for size in sizes:
            images = torch.rand(8, size, size, 3, generator=torch.Generator().manual_seed(0))
            alone = torch.cat([encoder.encode(image[None])[0] for image in images])
            for batch in batches:
                passes = []
                for _ in range(3):
                    begin = time.perf_counter()
                    together = torch.cat([encoder.encode(some)[0] for some in images.split(batch)])
                    passes.append((time.perf_counter() - begin) / len(images))
                rows.append({"size": size, "batch": batch, "seconds": round(min(passes), 4),
                             "moved": float((together - alone).abs().max() / alone.abs().max())})  # fmt: skip
    return rows


# -- showing -----------------------------------------------------------------------------------------------------------


def ratios(rows) -> dict:
    """Ours against core at the largest count, and memory per image from the smallest count to the largest."""
    counts = sorted({row["count"] for row in rows})
    at = {(row["row"], row["count"]): row for row in rows}
    growth = {name: round((at[name, counts[-1]]["rise_mib"] - at[name, counts[0]]["rise_mib"]) / (counts[-1] - counts[0]), 3)
              for name in ("core", "ours", "check") if len(counts) > 1 and (name, counts[-1]) in at}  # fmt: skip
    found = {"mib_per_picture": growth}
    if ("core", counts[-1]) in at and ("ours", counts[-1]) in at:
        core_row, our_row, again = (at[name, counts[-1]] for name in ("core", "ours", "ours, again"))
        found |= {"speed": round(our_row["per_second"] / core_row["per_second"], 3),
                  "cpu seconds": round(our_row["cpu_seconds"] / core_row["cpu_seconds"], 3), "peak": round(our_row["rise_mib"] / core_row["rise_mib"], 4),
                  "speed again": round(again["per_second"] / core_row["per_second"], 2)}  # fmt: skip
    return found


def shown(result) -> str:
    lines = [f"{'':14}{'pictures':>9}{'seconds':>9}{'images/s':>10}{'cpu s':>8}{'idle MiB':>10}{'rise MiB':>10}"]
    lines += [
        f"{r['row']:14}{r['count']:9}{r['seconds']:9.1f}{r['per_second']:10.2f}{r['cpu_seconds']:8.1f}{r['idle_mib']:10}{r['rise_mib']:10}"
        for r in result["rows"]
    ]
    lines += [f"  {name}: {value}" for name, value in result["ratios"].items()]
    lines += [
        f"  VAE, {r['size']} px, batch {r['batch']}: {r['seconds']:.4f} s a picture, latents moved by {r['moved']:.1e}"
        for r in result["batching"]
    ]
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[40, 120], help="pictures; memory per picture needs two counts"
    )
    parser.add_argument("--side", type=int, default=1024, help="px of the pictures")
    parser.add_argument("--size", type=int, default=128, help="px they are encoded at")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "batching"], default=[*ROWS, "batching"])
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def main():
    asked = arguments()
    pack.boot()
    import torch
    from trainyard.benchmarks.train_lora import machine

    torch.set_num_threads(1)
    rows = []
    for name in (name for name in asked.rows if name in ROWS):
        for count in asked.counts:
            with tempfile.TemporaryDirectory() as folder:
                rows += measured(name, count, pathlib.Path(folder), asked.size, asked.side)
    result = {"machine": machine(False), "side": asked.side, "size": asked.size, "rows": rows, "ratios": ratios(rows),
              "batching": batching() if "batching" in asked.rows else []}  # fmt: skip
    print(shown(result))
    if asked.json:
        pathlib.Path(asked.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
