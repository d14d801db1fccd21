"""The pictures of the dataset workflows, from real runs of their parts on drawn pictures: workflows/02..04.jpg.

    .venv/bin/python tools/cards.py
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

from PIL import Image, ImageDraw, ImageFont

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import trainyard_plugin  # noqa: E402, F401, I001 - the alias package

SIDE, PAPER, INK, DIM, EDGE, BLUE = 768, "#17191f", "#ececec", "#9096a3", "#2b2e36", "#5b9bf5"
COLOURS, SHAPES = ("red", "blue", "green", "yellow", "purple", "cyan"), ("circle", "square", "triangle", "cross", "star", "ring")


def card(headline):
    page = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((754, 68), headline, fill=INK, font=font(24), anchor="rm")  # the page's badge covers the left corner
    return page, draw


def font(size):
    return ImageFont.load_default(size=size)


def drawings(folder, count=6, px=256, caption="this image shows {}, watermark"):
    """Captioned drawings on disk, of several shapes."""
    from trainyard.tests.toy import shapes

    for i in range(count):
        wanted = dict(shape=SHAPES[i % 6], colour=COLOURS[i % 6], size="large")
        shapes.draw(**wanted, degrees=15.0 * i, px=px).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption.format(shapes.caption(**wanted)))


def captions():
    from trainyard.trainers.data.edits import apply, parse
    from trainyard.trainers.data.readers import read_folder
    from trainyard.trainers.data.sheets import thumbnail

    page, draw = card("captions, edited by rule")
    with tempfile.TemporaryDirectory() as where:
        drawings(pathlib.Path(where))
        dataset = read_folder(where)
        after = apply(dataset, parse("strip: boilerplate\nremove: watermark\ntrigger: my_word"))
        for index, (old, new) in enumerate(zip(dataset, after, strict=True)):
            left, top = 32 + index % 3 * 240, 112 + index // 3 * 320
            draw.rounded_rectangle([left, top, left + 224, top + 300], 10, fill="#20232b", outline=EDGE)
            page.paste(thumbnail(old, 180), (left + 22, top + 16))
            for line, (text, colour) in enumerate(wrapped(old.captions[0], DIM) + wrapped(new.captions[0], BLUE)):
                draw.text((left + 14, top + 206 + 21 * line), text, fill=colour, font=font(14))
    return page


def wrapped(text, colour, width=30):
    import textwrap

    return [(line, colour) for line in textwrap.wrap(text, width)]


def checked():
    from trainyard.tests import drawn
    from trainyard.trainers.data.quality import QualitySettings, check
    from trainyard.trainers.data.quality_report import sheet
    from trainyard.trainers.data.readers import read_folder

    page, _ = card("what is wrong, with its figure")
    with tempfile.TemporaryDirectory() as where:
        folder = pathlib.Path(where)
        fine = drawn.texture((900, 900), seed=1)
        made = {"sharp": fine, "copy": drawn.jpeg(fine.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((820, 820)), 70),
                "small": drawn.texture((420, 420), seed=2), "soft": drawn.softened(drawn.texture((900, 900), seed=3), 4),
                "enlarged": drawn.enlarged(drawn.texture((900, 900), seed=4), 3), "bars": drawn.barred(drawn.texture((900, 700), seed=5), top=100, bottom=100),
                "dark": drawn.texture((900, 900), seed=6, mean=18, spread=8), "good": drawn.texture((1100, 800), seed=7), "fine": drawn.texture((800, 1000), seed=8)}  # fmt: skip
        for name, picture in made.items():
            picture.save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"a texture called {name}")
        found = check(read_folder(folder), QualitySettings(resolution=768))
        shown = sheet(found)
    shown.thumbnail((SIDE - 40, SIDE - 120))
    page.paste(shown, ((SIDE - shown.width) // 2, 104))
    return page


def collages():
    from trainyard.trainers.data.collage import build_collages
    from trainyard.trainers.data.collage_plan import CollageSettings
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
        built = build_collages(read_folder(folder), CollageSettings(width=512, height=512, uses=1, mix=0.0), pathlib.Path(where) / "out")
        shown = sorted(built.dataset, key=lambda record: open_mask(record).reduce(512).getpixel((0, 0)) if record.mask else 256)[:3]
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


def main():
    for name, make in {"02_caption_a_folder": captions, "03_check_and_clean": checked, "04_collage_lora": collages}.items():
        make().save(ROOT / "workflows" / f"{name}.jpg", quality=88)
        print(f"{name}.jpg")


if __name__ == "__main__":
    main()
