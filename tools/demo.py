"""make demo: a small model that has never seen a star learns to draw one, in a few minutes on two cores.

Inside a real headless ComfyUI when one is found, with the embedded engine otherwise. Leaves in demo-out/:
lora.safetensors, loss.png and before_after.png. Run again to see that nothing is trained twice.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "demo-out"


def pack():
    """The pack as the package `trainyard`, as in the tests."""
    spec = importlib.util.spec_from_file_location("trainyard_plugin", ROOT / "tests" / "trainyard_plugin.py")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    return plugin.register()


class Bar:
    """One line that grows; only a few lines where the output is no terminal."""

    def __init__(self):
        self.what, self.shown = "", -1

    def __call__(self, what, done, total):
        share = 20 * done // max(1, total)
        if (what, share) == (self.what, self.shown):
            return
        fresh, self.what, self.shown = what != self.what, what, share
        live = sys.stdout.isatty()
        start = "\n" if fresh and live else ""
        line = f"{start}\r{what:<10} [{'#' * share:<20}] {done}/{total} "
        if live:
            print(line, end="", flush=True)
        elif fresh or share in (5, 10, 15, 20):
            print(line.strip(), flush=True)


def in_comfyui(lesson, world, exam):
    """(images without, images with) from one API prompt to a real server; the files land in OUT."""
    from PIL import Image
    from trainyard.tests.comfy.server import Server

    base = OUT / "comfyui"
    folder = lesson.images(base / "input" / "stars")
    checkpoint = base / "models" / "checkpoints" / "toy_world.safetensors"
    if not checkpoint.exists():
        print("Making the toy checkpoint ...", flush=True)
        world.build(checkpoint)
    print("Starting ComfyUI ...", flush=True)
    bar, names = Bar(), {"data": "reading", "encode": "encoding", "train": "training"}
    with Server(base, packs={"trainyard": ROOT}) as server:
        graph = lesson.graph(checkpoint.name, f"input/{folder.name}", exam=exam)

        def watch(event):
            data = event.get("data") or {}
            if event["type"] == "progress":
                bar(names.get(data["node"], "sampling"), data["value"], data["max"])

        run = server.run(graph, seconds=1800, watch=watch)
        if not run.ok:
            raise SystemExit(f"\nThe demo failed: {run.why}")
        print(flush=True)
        read = lambda key: Image.open(server.output(run.outputs[key]["images"][0]["filename"])).convert("RGB")
        without, learnt = ([read(f"{side}{i}") for i in range(len(exam))] for side in "bl")
        (plot,) = run.outputs["plot"]["images"]
        shutil.copy(base / plot["type"] / plot["subfolder"] / plot["filename"], OUT / "loss.png")
        print("Train LoRA says:", *run.outputs["train"].get("text", []))
    newest = max((base / "output" / "loras").glob("stars*.safetensors"), key=lambda f: f.stat().st_mtime)
    shutil.copy(newest, OUT / "lora.safetensors")
    return without, learnt


def embedded(lesson, world, exam):
    """The same lesson with `python -m trainers`, which needs no ComfyUI."""
    from trainyard.trainers.__main__ import main as command_line

    folder = lesson.images(OUT / "images")
    checkpoint = OUT / "toy_world.safetensors"
    if not checkpoint.exists():
        print("Making the toy checkpoint ...", flush=True)
        world.build(checkpoint)
    options = {
        "--model": checkpoint,
        "--images": folder,
        "--out": OUT / "run",
        "--name": "stars",
        "--dropout": 0.1,
        "--schedule": lesson.SCHEDULE,
    }
    options |= {f"--{k.replace('_', '-')}": v for k, v in {**lesson.TRAIN, **lesson.ENCODE}.items()}
    if code := command_line(["lora", *[str(part) for pair in options.items() for part in pair]]):
        raise SystemExit(code)
    shutil.copy(OUT / "run" / "stars.safetensors", OUT / "lora.safetensors")
    shutil.copy(OUT / "run" / "stars-loss.png", OUT / "loss.png")
    return sampled(checkpoint, OUT / "lora.safetensors", lesson, exam)


def sampled(checkpoint, lora, lesson, exam):
    """(images without, images with) a LoRA file, by the embedded engine."""
    from trainyard.tests.toy import shapes
    from trainyard.trainers.adapters.adapters import Adapters
    from trainyard.trainers.engines import diffusers
    from trainyard.trainers.files import read_safetensors
    from trainyard.trainers.settings import AdapterSettings

    engine = diffusers.load_engine(checkpoint)
    adapters = Adapters(engine.network, AdapterSettings(rank=lesson.TRAIN["rank"]))
    engine.load_lora(read_safetensors(lora)[0], adapters)
    bar, without, learnt = Bar(), [], []
    for index, wanted in enumerate(exam):
        bar("sampling", index + 1, len(exam))
        draw = lambda w=wanted, i=index: engine.sample([shapes.caption(**w)], 1000 + i, (shapes.PX, shapes.PX), 20, 2.5)
        without.append(image(draw()))
        with adapters.attached():
            learnt.append(image(draw()))
    print(flush=True)
    return without, learnt


def image(tensor):
    """(1, H, W, 3) in 0..1 -> PIL"""
    from PIL import Image

    return Image.fromarray((tensor[0].clamp(0, 1) * 255).round().byte().cpu().numpy())


def main():
    pack()
    from trainyard.tests.toy import lesson, shapes, world
    from trainyard.tools import env
    from trainyard.trainers.monitor.plots import draw_image_grid

    begin = time.monotonic()
    OUT.mkdir(exist_ok=True)
    place = env.find_comfyui()
    print(
        f"Training inside ComfyUI at {place}"
        if place
        else "ComfyUI was not found: training with the embedded engine (diffusers)",
        flush=True,
    )
    exam = lesson.EXAM[::2]
    without, learnt = (in_comfyui if place else embedded)(lesson, world, exam)
    before, after = lesson.marks(without, exam), lesson.marks(learnt, exam)
    shown = exam[:8]
    labels = [f"{w['colour']} on {w['ground']}" for w in shown]
    draw_image_grid([without[: len(shown)], learnt[: len(shown)]], ["without", "with LoRA"], labels, cell=128).save(
        OUT / "before_after.png"
    )
    print(f"\nAsked {len(exam)} times for {shapes.caption(lesson.WORD)!r}, on seeds that were not trained:")
    print(
        f"  without the LoRA {before['shape']:.0%} are stars; with it {after['shape']:.0%} (colour right "
        f"{after['colour']:.0%})"
    )
    print(
        f"  {OUT.relative_to(ROOT)}/before_after.png  loss.png  lora.safetensors   ({time.monotonic() - begin:.0f} s)"
    )
    if after["shape"] <= before["shape"]:
        raise SystemExit("The LoRA has not learnt the star; something is wrong.")


if __name__ == "__main__":
    main()
