"""The card of workflow 01, from the newest `make demo`: its first four prompts as they came out without and with the LoRA,
and the loss of that run."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from .demo import OUT

INK, DIM, PAPER, GRID, RAW, SMOOTH = "#ececec", "#9096a3", "#17191f", "#2b2e36", "#33507c", "#5b9bf5"
SIDE, CELL, LEFT, TOP, GAP = 768, 150, 112, 116, 14
CHART = (LEFT, 480, 726, 720)  # left, top, right, bottom, px
SHEET_CELL, SHEET_GAP, SHEET_TOP, SHOWN = 128, 8, 40, 8


def cells():
    """Rows of PIL images cut out of the demo's before/after sheet."""
    sheet = Image.open(OUT / "before_after.png").convert("RGB")
    step = SHEET_CELL + SHEET_GAP
    left = sheet.width - SHOWN * step
    at = lambda row, column: (left + column * step, SHEET_TOP + row * step)
    return [
        [sheet.crop((*at(r, c), at(r, c)[0] + SHEET_CELL, at(r, c)[1] + SHEET_CELL)) for c in range(4)]
        for r in range(2)
    ]


def losses():
    from trainyard.trainers.files import read_state_tree

    states = (OUT / "comfyui" / "output" / "loras" / "trainyard").glob("stars-*/resume.state")
    return read_state_tree(max(states, key=lambda f: f.stat().st_mtime))["losses"].tolist()


def rounded(image):
    mask = Image.new("L", (CELL, CELL), 0)
    ImageDraw.Draw(mask).rounded_rectangle([0, 0, CELL - 1, CELL - 1], 10, fill=255)
    return image.resize((CELL, CELL), Image.Resampling.BICUBIC), mask


def chart(draw, values):
    from trainyard.trainers.monitor.plots import exponential_moving_average

    left, top, right, bottom = CHART
    high, low = max(exponential_moving_average(values)), min(values)
    x = lambda i: left + (right - left) * i / (len(values) - 1)
    y = lambda v: bottom - (bottom - top) * (min(v, high) - low) / (high - low)
    for i in range(5):
        draw.line([(left, top + (bottom - top) * i / 4), (right, top + (bottom - top) * i / 4)], fill=GRID)
    for curve, colour, width in ((values, RAW, 1), (exponential_moving_average(values), SMOOTH, 4)):
        draw.line([(x(i), y(v)) for i, v in enumerate(curve)], fill=colour, width=width, joint="curve")


def first_lora():
    if not (OUT / "before_after.png").is_file():
        raise SystemExit("The card of 01_first_lora shows the newest demo: run `make demo` first.")
    card = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw, text = ImageDraw.Draw(card), lambda size: ImageFont.load_default(size=size)
    draw.text(
        (754, 68), "a shape it has never seen", fill=INK, font=text(24), anchor="rm"
    )  # the page's badge covers the left corner
    for row, (images, label, colour) in enumerate(zip(cells(), ("without", "with LoRA"), (DIM, INK), strict=True)):
        top = TOP + row * (CELL + GAP)
        draw.text((98, top + CELL / 2), label, fill=colour, font=text(19), anchor="rm")
        for column, image in enumerate(images):
            image, mask = rounded(image)
            card.paste(image, (LEFT + column * (CELL + GAP), top), mask)
    values = losses()
    chart(draw, values)
    draw.text((98, 602), "loss", fill=DIM, font=text(19), anchor="rm")
    draw.text((LEFT, 740), "step 1", fill=DIM, font=text(17), anchor="lt")
    draw.text((726, 740), str(len(values)), fill=DIM, font=text(17), anchor="rt")
    return card
