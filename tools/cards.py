"""The cards of the bundled workflows, workflows/<name>.jpg: what each leaves, from real runs on drawn images.

`make refresh` draws those that are missing, `make refresh ARGS="--card 10_leco_score"` one again. A workflow that is not
in MAKERS is run as it is, in the toy world, and its images are its card.
"""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile

from PIL import Image, ImageDraw, ImageFont

ROOT = pathlib.Path(__file__).resolve().parents[1]

SIDE, PAPER, INK, DIM, EDGE, BLUE = 768, "#17191f", "#ececec", "#9096a3", "#2b2e36", "#5b9bf5"
COLOURS, SHAPES = (
    ("red", "blue", "green", "yellow", "purple", "cyan"),
    ("circle", "square", "triangle", "cross", "star", "ring"),
)


def card(headline):
    page = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((754, 68), headline, fill=INK, font=font(24), anchor="rm")  # the page's badge covers the left corner
    return page, draw


def font(size):
    return ImageFont.load_default(size=size)


def drawings(folder, count=6, px=256, caption="this image shows {}, watermark", size="large"):
    """Captioned drawings on disk, of several shapes."""
    from trainyard.tests.toy import shapes

    for i in range(count):
        wanted = dict(shape=SHAPES[i % 6], colour=COLOURS[i % 6], size=size)
        shapes.draw(**wanted, degrees=15.0 * i, px=px).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption.format(shapes.caption(**wanted)))


def captions():
    from trainyard.trainers.data.captions.edits import apply_edits, parse_edits
    from trainyard.trainers.data.contact_sheet import make_thumbnail
    from trainyard.trainers.data.readers import read_folder

    page, draw = card("captions, edited by rule")
    with tempfile.TemporaryDirectory() as where:
        drawings(pathlib.Path(where))
        dataset = read_folder(where)
        after = apply_edits(dataset, parse_edits("strip: boilerplate\nremove: watermark\ntrigger: my_word"))
        for index, (old, new) in enumerate(zip(dataset, after, strict=True)):
            left, top = 32 + index % 3 * 240, 112 + index // 3 * 320
            draw.rounded_rectangle([left, top, left + 224, top + 300], 10, fill="#20232b", outline=EDGE)
            page.paste(make_thumbnail(old, 180), (left + 22, top + 16))
            for line, (text, colour) in enumerate(wrapped(old.captions[0], DIM) + wrapped(new.captions[0], BLUE)):
                draw.text((left + 14, top + 206 + 21 * line), text, fill=colour, font=font(14))
    return page


def wrapped(text, colour, width=30):
    import textwrap

    return [(line, colour) for line in textwrap.wrap(text, width)]


def checked():
    from trainyard.tests import drawn
    from trainyard.trainers.data.quality.checks import QualitySettings, check_dataset_quality
    from trainyard.trainers.data.quality.quality_report import draw_quality_sheet
    from trainyard.trainers.data.readers import read_folder

    page, _ = card("what is wrong, with its figure")
    with tempfile.TemporaryDirectory() as where:
        folder = pathlib.Path(where)
        fine = drawn.texture((900, 900), seed=1)
        made = {"sharp": fine, "copy": drawn.jpeg(fine.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((820, 820)), 70),
                "small": drawn.texture((420, 420), seed=2), "soft": drawn.softened(drawn.texture((900, 900), seed=3), 4),
                "enlarged": drawn.enlarged(drawn.texture((900, 900), seed=4), 3), "bars": drawn.barred(drawn.texture((900, 700), seed=5), top=100, bottom=100),
                "dark": drawn.texture((900, 900), seed=6, mean=18, spread=8), "good": drawn.texture((1100, 800), seed=7), "fine": drawn.texture((800, 1000), seed=8)}  # fmt: skip
        for name, image in made.items():
            image.save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"a texture called {name}")
        found = check_dataset_quality(read_folder(folder), QualitySettings(resolution=768))
        shown = draw_quality_sheet(found)
    shown.thumbnail((SIDE - 40, SIDE - 120))
    page.paste(shown, ((SIDE - shown.width) // 2, 104))
    return page


def collages():
    from trainyard.trainers.data.collage.build import build_collages
    from trainyard.trainers.data.collage.plan import CollageSettings
    from trainyard.trainers.data.readers import read_folder
    from trainyard.trainers.data.records import open_image, open_mask

    page, draw = card("each from edge to edge, none enlarged")
    with tempfile.TemporaryDirectory() as where:
        folder = pathlib.Path(where) / "in"
        folder.mkdir()
        drawings(folder, 6, 512, "{}")
        for i, file in enumerate(sorted(folder.glob("*.png"))):
            wide = i in (1, 4)
            box = (0, 128, 512, 384) if wide else (128, 0, 384, 512) if i else (156, 0, 356, 512)
            Image.open(file).crop(box).save(file)
        built = build_collages(
            read_folder(folder), CollageSettings(width=512, height=512, uses=1, mix=0.0), pathlib.Path(where) / "out"
        )
        shown = sorted(
            built.dataset, key=lambda record: open_mask(record).reduce(512).getpixel((0, 0)) if record.mask else 256
        )[:3]
        for index, record in enumerate(shown):
            left, top = 32 + index % 2 * 360, 112 + index // 2 * 330
            page.paste(open_image(record).resize((280, 280)), (left, top))
            for line, (text, colour) in enumerate(wrapped(record.captions[0], DIM, 44)[:2]):
                draw.text((left, top + 286 + 17 * line), text, fill=colour, font=font(12))
        mask = open_mask(shown[0])
        if mask is not None:
            page.paste(mask.convert("RGB").resize((280, 280)), (392, 442))
            draw.text((392, 728), "loss mask of the first", fill=DIM, font=font(12))
    return page


def bars(headline, figures, label):
    """A card of horizontal bars: [(name, value in 0..1)]."""
    page, draw = card(headline)
    draw.text((32, 120), label, fill=DIM, font=font(17))
    step = min(90, 560 // len(figures))
    for row, (name, value) in enumerate(figures):
        top = 164 + row * step
        draw.text((32, top), name, fill=INK, font=font(18))
        draw.rounded_rectangle([32, top + 28, 32 + 640, top + 46], 6, fill=EDGE)
        if value > 0.01:
            draw.rounded_rectangle([32, top + 28, 32 + round(640 * value), top + 46], 6, fill=BLUE)
        draw.text((736, top + 37), f"{value:.2f}", fill=INK, font=font(18), anchor="rm")
    return page


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def pretraining():
    found = results("2026-11-21-score-pretraining.json")["pretraining"]
    key = "SRCC of colourfulness from 64 ratings"
    return bars(
        "64 ratings on what it learnt alone",
        [(name, max(0.0, row[key])) for name, row in found.items()],
        "rank correlation with the true score: colourfulness",
    )


def followed():
    from . import score_card  # imports the benchmark

    return score_card.followed()


def edited():
    """Drawings that no training saw, and what the toy world's edit model makes of them after 600 steps on pairs."""
    import torch
    from trainyard.tests.comfy import boot

    boot.boot()
    from trainyard.nodes import host
    from trainyard.tests.toy import edits, sampling, world

    page, draw = card("an edit it did not know, from pairs")
    rng = torch.Generator().manual_seed(77)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        toy = edits.load(sampling.load(world.cached()))
        lora = edits.learn(toy, folder, "black", seed=1)
        about = edits.questions(rng, "black", 4)
        before = torch.stack([edits.pixels(edits.draw_pair(rng, *one, "black")[0]) for one in about])
        latents, told = toy.vae.encode(before).float().cpu(), [edits.caption("black")] * len(about)
        model = host.lora_keys.apply_lora(toy.model, None, lora)[0]
        rows = [before, edits.edit(toy, model, latents, told, 500)]
    for row, (images, label) in enumerate(zip(rows, ("shown", "made of it"), strict=True)):
        top = 200 + row * 232
        draw.text((32, top + 90), label, fill=DIM, font=font(17))
        for column, image in enumerate(images):
            tile = Image.fromarray((image.clamp(0, 1) * 255).round().byte().numpy()).resize(
                (136, 136), Image.Resampling.LANCZOS
            )
            page.paste(tile, (176 + column * 146, top + 30))
    draw.text((32, 108), f'told: "{told[0]}"', fill=INK, font=font(18))
    return page


def clips():
    """Videos as Cut Clips cuts them and Preview Dataset shows them."""
    from trainyard.tests.toy import shapes
    from trainyard.tests.videos import write_video
    from trainyard.trainers.data.clips import ClipSettings, cut_clips
    from trainyard.trainers.data.contact_sheet import draw_dataset_sheet
    from trainyard.trainers.data.readers import read_folder

    page, draw = card("videos, cut into clips")
    with tempfile.TemporaryDirectory() as folder:
        for number, (way, step) in enumerate((("right", (3, 0)), ("down", (0, 3)), ("left", (-3, 0)), ("up", (0, -3)))):
            shape, colour = SHAPES[number], COLOURS[number]
            drawn = lambda frame, size, shape=shape, colour=colour, step=step: shapes.draw(
                shape, colour, px=size[0], radius=11, centre=tuple(32 + side * (frame / 6 - 4) for side in step)
            )
            write_video(pathlib.Path(folder) / f"{way}.mkv", 49, 16, (192, 192), draw=drawn)
            (pathlib.Path(folder) / f"{way}.txt").write_text(f"a {colour} {shape} moves {way}")
        dataset = cut_clips(read_folder(folder), ClipSettings(frames=33))
        sheet = draw_dataset_sheet(dataset, cell=260)
    sheet.thumbnail((SIDE - 40, SIDE - 130))
    page.paste(sheet, ((SIDE - sheet.width) // 2, 108))
    return page


def transferred():
    """Stars of the toy world's fine-tune for frames: without a LoRA, and with one that its base learnt and that was moved."""
    import torch
    from trainyard.tests.comfy import boot

    boot.boot()
    from trainyard.nodes import host
    from trainyard.tests.toy import distilled, sampling, shapes

    page, draw = card("moved to a sibling, without pictures")
    asked = [one for one in distilled.lesson_questions("star") if one["ground"] == "white"][:4]
    texts, seeds = [shapes.caption(**one) for one in asked], [51, 52, 53, 54]
    with tempfile.TemporaryDirectory() as folder:
        base, sibling = distilled.load("transformer"), distilled.load("pairs")
        old = distilled.learn(base, folder, "star", 1, steps=250, rate=4e-3, checked=())[250]
        new = distilled.move(base, sibling, old, "star", 1, 60, few_steps=0, source_guidance=1.0)
        models = [host.lora_keys.apply_lora(base.model, None, old)[0], sibling.model,
                  host.lora_keys.apply_lora(sibling.model, None, new)[0]]  # fmt: skip
        with torch.inference_mode():
            rows = [sampling.images(sibling, texts, seeds, model=model) for model in models]
    for row, (images, label) in enumerate(zip(rows, ("its model", "the other", "moved"), strict=True)):
        top = 130 + row * 180
        draw.text((32, top + 80), label, fill=DIM, font=font(17))
        for column, image in enumerate(images):
            tile = Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy()).resize(
                (136, 136), Image.Resampling.LANCZOS
            )
            page.paste(tile, (176 + column * 146, top + 20))
    return page


def first_lora():
    from . import first_lora_card

    return first_lora_card.first_lora()


def difference(name):
    from . import difference_cards

    return difference_cards.difference(name)


@functools.lru_cache(maxsize=1)
def taste():
    """[(image, rating)] of drawings that a small score model, taught the size of 80 others, has never seen."""
    import dataclasses

    import torch
    from trainyard.tests.comfy import boot
    from trainyard.tests.toy import sampling, shapes, world
    from trainyard.tests.unit.toy import Denoiser
    from trainyard.trainers.data.encoded import EncodedDataset
    from trainyard.trainers.scores.networks import ScorerSettings
    from trainyard.trainers.scores.objective import ScoreSettings
    from trainyard.trainers.scores.training import train_score_model

    boot.boot()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(3)
    drawn = [shapes.sample(rng) for _ in range(92)]
    with tempfile.TemporaryDirectory() as where, torch.inference_mode():
        toy = sampling.load(world.build(pathlib.Path(where) / "toy.safetensors"))
        pixels = (
            torch.stack(
                [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(64, 64, 3) for p, *_ in drawn]
            )
            / 255.0
        )
        latents = toy.vae.encode(pixels)
    with torch.inference_mode(False):
        latents = latents.clone()
    data = EncodedDataset.from_core([{"samples": latents[:80]}], [[[torch.zeros(1, 1, 4), {}]]])
    data.items = [
        dataclasses.replace(item, score=about["radius"] / 2)
        for item, (*_, about) in zip(data.items, drawn, strict=False)
    ]
    settings = ScoreSettings(steps=120, members=2, batch=16)
    done = train_score_model(data, Denoiser(None, "flow"), ScorerSettings(width=16, depth=1), settings)
    said, _ = done.model.ratings(latents[80:])
    return [(image, float(rating)) for (image, *_), rating in zip(drawn[80:], said, strict=True)]


def rated(keep=False):
    from trainyard.trainers.data.contact_sheet import BAD_COLOUR, GOOD_COLOUR, SheetTile, draw_contact_sheet

    seen = sorted(taste(), key=lambda one: -one[1])
    half = len(seen) // 2
    tiles = [
        SheetTile(p.resize((192, 192)), (f"{r:.2f}",), GOOD_COLOUR if i < half else BAD_COLOUR)
        for i, (p, r) in enumerate(seen)
    ]
    page, _ = card("rated, and the best half kept" if keep else "taught to like what is large")
    sheet = draw_contact_sheet(tiles[:half] if keep else tiles, columns=3 if keep else 4)
    sheet.thumbnail((SIDE - 40, SIDE - 130))
    page.paste(sheet, ((SIDE - sheet.width) // 2, 108))
    return page


def watched():
    page, _ = card("watched while it trains")
    shot = Image.open(ROOT / "tests" / "browser" / "shots" / "nodes2_live_finished.png").convert("RGB")
    node = shot.crop((930, 85, 1300, 1000))
    node.thumbnail((640, 640), Image.Resampling.LANCZOS)
    page.paste(node, ((SIDE - node.width) // 2, 108))
    return page


def run_in_toy_world(name, server):
    """The images that a workflow leaves when it is run on the toy world: every size 64 px, all else as it is saved."""
    from trainyard.tests.toy import shapes, world

    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in TOY_INPUTS.items() if key in node["inputs"]}
        folder = node["inputs"].get("folder")
        if isinstance(folder, str) and folder.startswith("input/"):
            (server.base / folder).mkdir(parents=True, exist_ok=True)
            size = "small" if folder.endswith(("/less", "/before")) else "large"
            drawings(server.base / folder, px=shapes.PX, caption="{}", size=size)
    checkpoint = server.base / "models" / "checkpoints" / TOY_INPUTS["ckpt_name"]
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    world.build(checkpoint)
    run = server.run(prompt, seconds=3600)
    if not run.ok:
        raise SystemExit(f"{name} cannot be run in the toy world; write its card into tools/cards.py. {run.why}")
    files = [file for output in run.outputs.values() for file in output.get("images", ())]
    images = [Image.open(server.base / f["type"] / f["subfolder"] / f["filename"]).convert("RGB") for f in files]
    if not images:
        raise SystemExit(f"{name} leaves no image; write its card into tools/cards.py.")
    return contact_card(name.split("_", 1)[1].replace("_", " "), images)


def contact_card(headline, images):
    """A card of at most 64 images side by side, each as large as there is room."""
    page, _ = card(headline)
    images = images[:64]
    columns = next(n for n in range(1, 9) if n * n >= len(images))
    rows = -(-len(images) // columns)
    cell = min((SIDE - 40) // columns, (SIDE - 124) // rows)
    for index, image in enumerate(images):
        scale = (cell - 8) / max(image.size)
        size = round(image.width * scale), round(image.height * scale)
        page.paste(image.resize(size), (20 + index % columns * cell, 104 + index // columns * cell))
    return page


TOY_INPUTS = {"ckpt_name": "toy_world.safetensors", "scheduler": "simple", "resolution": 64, "step": 8, "width": 64,
              "height": 64, "min_side": 64, "max_side": 64}  # fmt: skip
MAKERS = {
    "01_first_lora": first_lora,
    "01b_lora_with_validation": watched,
    "02_caption_a_folder": captions,
    "03_check_and_clean": checked,
    "04_collage_lora": collages,
    "05_image_pair_slider": lambda: difference("05_image_pair_slider"),
    "06_leco": lambda: difference("06_leco"),
    "07_text_slider": lambda: difference("07_text_slider"),
    "08_difference": lambda: difference("08_difference"),
    "09_train_aesthetic_score": rated,
    "10_leco_score": followed,
    "11_pretrain_on_my_art": pretraining,
    "12_score_and_filter": lambda: rated(keep=True),
    "13_edit_pairs": edited,
    "14_video_lora": clips,
    "16_transfer_lora": transferred,
}


def missing_cards() -> list[str]:
    """Names of the workflows that have no card."""
    return [file.stem for file in sorted((ROOT / "workflows").glob("*.json")) if not file.with_suffix(".jpg").is_file()]


def draw_cards(names, server) -> list[pathlib.Path]:
    """Draws these cards; the files. `server`: a running ComfyUI with the pack, and a base folder that may be filled."""
    files = []
    for name in names:
        files.append(ROOT / "workflows" / f"{name}.jpg")
        print(f"{files[-1].relative_to(ROOT)} (a real run) ...", flush=True)
        page = MAKERS[name]() if name in MAKERS else run_in_toy_world(name, server)
        page.save(files[-1], quality=90)
    return files
