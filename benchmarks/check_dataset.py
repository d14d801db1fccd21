"""How fast Check Dataset is: noise-textured images are drawn, half as PNG and half as JPEG, and checked with
everything on.

    python benchmarks/check_dataset.py --images 300 --size 1024 --threads 2

Prints seconds, images/s, processor seconds (what counts on a busy machine) and the peak memory of the process;
drawing and reading the folder are not counted. Needs no ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import trainyard_plugin  # noqa: E402, F401 - makes the pack importable as `trainyard`
from trainyard.tests.drawn import texture  # noqa: E402
from trainyard.trainers.data.image_scan import ScanOptions  # noqa: E402
from trainyard.trainers.data.quality.checks import QualitySettings, apply_quality_actions, check_dataset_quality  # noqa: E402
from trainyard.trainers.data.quality.duplicates import DuplicateSettings, deduplicate  # noqa: E402
from trainyard.trainers.data.quality.quality_report import draw_quality_sheet, format_quality_report  # noqa: E402
from trainyard.trainers.data.readers import read_folder  # noqa: E402


def draw(folder: pathlib.Path, images: int, size: int):
    """Different images from a few textures: turned and shifted, which costs less than drawing each."""
    base = [texture((size, size), seed, slope=1.1) for seed in range(4)]
    for index in range(images):
        image = base[index % 4].rotate(90 * (index // 4 % 4))
        image = image.transform(image.size, 0, (0.9, 0, index * size / images / 10, 0, 0.9, 0))
        name = folder / f"{index:05}.{'png' if index % 2 else 'jpg'}"
        image.save(name, **({"compress_level": 1} if index % 2 else {"quality": 92}))
        name.with_suffix(".txt").write_text(f"picture number {index}", encoding="utf-8")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work):
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - cpu


def measured(images: int, size: int, threads: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        draw(pathlib.Path(folder), images, size)
        dataset = read_folder(folder)
        before, settings = peak_mib(), QualitySettings(resolution=1024, on_warn="flag")
        options = ScanOptions(threads=threads)
        found, seconds, cpu = timed(lambda: check_dataset_quality(dataset, settings, options=options))
        _, drawing, _ = timed(
            lambda: (
                apply_quality_actions(dataset, found, settings),
                format_quality_report(found, settings),
                draw_quality_sheet(found),
            )
        )
        peak = peak_mib()
        _, comparing, _ = timed(lambda: deduplicate(dataset, DuplicateSettings(), options))
    return {
        "pictures": images, "size": size, "threads": threads,
        "check_s": round(seconds, 2), "check_per_s": round(images / seconds, 2), "check_cpu_s": round(cpu, 2),
        "report_and_sheet_s": round(drawing, 2),
        "deduplicate_s": round(comparing, 2), "deduplicate_per_s": round(images / comparing, 2),
        "peak_rss_mib": round(peak), "peak_rss_before_mib": round(before),
    }  # fmt: skip


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pictures", type=int, default=300)
    options.add_argument("--size", type=int, default=1024, help="pixels, both sides")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    chosen = options.parse_args()
    figures = measured(chosen.images, chosen.size, chosen.threads)
    print("\n".join(f"{name:>20} {value}" for name, value in figures.items()))
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
