"""The cards of workflows 05 to 08 and the images of their help pages: each workflow's own graph, run on the toy world in
a real ComfyUI, about three minutes each on two cores."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

from .demo import OUT, ROOT

INK, DIM, PAPER, GRID, LINE = "#ececec", "#9096a3", "#17191f", "#2b2e36", "#5b9bf5"
SIDE, CELL, GAP, LEFT, TOP = 768, 112, 12, 134, 108
CHART = (668, 736)  # top and bottom, px
QUICK = {
    "steps": 200,
    "learning_rate": 1e-3,
    "rank": 8,
    "batch": 4,
}  # as benchmarks/differences.py trains the toy world


@dataclass(frozen=True)
class Card:
    """What is asked of a workflow in the toy world: `said` goes to nodes by class, `pairs` to folders, `asked` are the
    rows."""

    title: str
    asked: tuple[str, ...]
    said: dict = field(default_factory=dict)
    pairs: dict = field(default_factory=dict)  # folder -> size of the shapes in it
    area: bool = True  # the curve under the rows: the mean area of the shapes

    def change(self, node):
        node["inputs"] |= self.said.get(node["class_type"], {})


KINDS = ("a large green circle on a white ground", "a large blue cross on a grey ground")
SIZES = (
    "a green circle on a white ground",
    "a blue cross on a grey ground",
    "a yellow square on a black ground",
    "a purple triangle on a white ground",
)
ROWS = "".join(
    f"a {colour} {shape} | positive: a large {colour} {shape} | negative: a small {colour} {shape} | guidance: 1\n"
    for colour, shape in (("red", "circle"), ("yellow", "square"), ("green", "triangle"), ("blue", "cross"))
)
CARDS = {
    "05_image_pair_slider": Card("size, learnt from five pairs of "
                                 "pictures", SIZES, {"TrainyardTrainImageSlider": QUICK}, {"more": "large", "less": "small"}),
    "06_leco": Card(
        "without red: no pictures, prompts alone",
        ("a large red circle on a white ground", "a large red circle on a black ground", "a small red circle on a grey "
                                                                                         "ground", *KINDS),
        {"TrainyardTrainLeco": QUICK | {"steps": 300, "target": "a red circle", "unconditional": "a circle", "guidance": 2.0,
                                        "preserve": "a blue circle; a green circle; a yellow circle"}},
        area=False,
    ),
    "07_text_slider": Card("size, learnt from prompts "
                           "alone", SIZES, {"TrainyardTrainTextSlider": QUICK, "TrainyardLoadPrompts": {"text": ROWS}}),
    "08_difference": Card("one pair, one minute: from small to "
                          "large", SIZES, {"TrainyardTrainDifference": QUICK | {"steps": 100, "batch": 1}},
                          {"after": "large", "before": "small"}),
}  # fmt: skip
SMALL = {
    "TrainyardEncodeDataset": {
        "resolution": 64,
        "step": 8,
        "min_side": 64,
        "max_side": 64,
        "trigger": "",
        "dropout": 0.0,
    },
    "TrainyardTrainLeco": {"resolution": 64},
    "TrainyardTrainTextSlider": {"resolution": 64},
    "TrainyardStrengthSweep": {
        "resolution": 64,
        "pictures": 1,
        "guidance": 2.0,
        "scheduler": "simple",
        "asked_effect": 0.0,
    },
}


def draw_pairs(card, folder):
    """input/<name> for both sides: the same shapes in two sizes, with the same captions."""
    from trainyard.tests.toy import shapes

    colours, grounds = list(shapes.COLOURS), list(shapes.GROUNDS)
    count = 1 if "after" in card.pairs else 5
    for name, size in card.pairs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for old in (folder / name).iterdir():
            old.unlink()
        for i in range(count):
            wanted = shapes.SEEN[i % 4], colours[i], grounds[i % 3]
            shapes.draw(wanted[0], wanted[1], size, wanted[2]).save(folder / name / f"{i}.png")
            (folder / name / f"{i}.txt").write_text(
                shapes.caption(wanted[0], wanted[1], ground=wanted[2]), encoding="utf-8"
            )


def graph(name, card, checkpoint):
    """The workflow's prompt, in the toy world: one Strength Sweep for each row of the card, its images saved as
    row<i>."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        node["inputs"] |= (
            {"ckpt_name": checkpoint}
            if node["class_type"] == "CheckpointLoaderSimple"
            else SMALL.get(node["class_type"], {})
        )
        card.change(node)
    (sweep,) = [key for key, node in prompt.items() if node["class_type"] == "TrainyardStrengthSweep"]
    ask = prompt[sweep]["inputs"]["positive"][0]
    for i, words in enumerate(card.asked):
        prompt[f"ask{i}"] = copy.deepcopy(prompt[ask])
        prompt[f"ask{i}"]["inputs"]["text"] = words
        prompt[f"sweep{i}"] = copy.deepcopy(prompt[sweep])
        prompt[f"sweep{i}"]["inputs"] |= {"positive": [f"ask{i}", 0], "seed": 40 + i}
        for unused in ("toward", "away", "preserve"):
            prompt[f"sweep{i}"]["inputs"].pop(unused, None)
        prompt[f"row{i}"] = {
            "class_type": "SaveImage",
            "inputs": {"images": [f"sweep{i}", 1], "filename_prefix": f"{name}/row{i}"},
        }
    prompt[ask]["inputs"]["text"] = card.asked[0]
    return prompt, prompt[sweep]["inputs"]["strengths"]


def rows(server, name, card, checkpoint):
    """([strength], rows of PIL images) of one run of the workflow."""
    draw_pairs(card, server.base / "input")
    prompt, strengths = graph(name, card, checkpoint)
    run = server.run(prompt, seconds=1800)
    if not run.ok:
        raise SystemExit(f"{name} failed: {run.why}")
    print(name, [output["text"] for output in run.outputs.values() if "text" in output], flush=True)
    read = lambda i: [
        Image.open(server.output(name, file["filename"])).convert("RGB") for file in run.outputs[f"row{i}"]["images"]
    ]
    return sorted({float(s) for s in strengths.split(",")}), [read(i) for i in range(len(card.asked))]


def drawn(card, strengths, images):
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw, font = ImageDraw.Draw(image), lambda size: ImageFont.load_default(size=size)
    cell = min(
        CELL,
        (SIDE - LEFT - 20 - GAP * (len(strengths) - 1)) // len(strengths),
        (620 - TOP if card.area else 690 - TOP) // len(images) - GAP,
    )
    step = (SIDE - LEFT - 20 - cell) / (len(strengths) - 1)
    x = lambda column: LEFT + column * step
    draw.text((754, 62), card.title, fill=INK, font=font(24), anchor="rm")  # the page's badge covers the left corner
    mask = Image.new("L", (cell, cell), 0)
    ImageDraw.Draw(mask).rounded_rectangle([0, 0, cell - 1, cell - 1], 8, fill=255)
    for row, (found, words) in enumerate(zip(images, card.asked, strict=True)):
        top = TOP + row * (cell + GAP)
        draw.multiline_text(
            (LEFT - 12, top + cell / 2), folded(words), fill=DIM, font=font(14), anchor="rm", align="right"
        )
        for column, tile in enumerate(found):
            image.paste(tile.resize((cell, cell), Image.Resampling.BICUBIC), (round(x(column)), top), mask)
    bottom = TOP + len(images) * (cell + GAP)
    for column, strength in enumerate(strengths):
        draw.text(
            (x(column) + cell / 2, bottom + 12),
            f"{strength:+g}" if strength else "0",
            fill=INK,
            font=font(19),
            anchor="mm",
        )
    if card.area:
        chart(draw, [x(column) + cell / 2 for column in range(len(strengths))], areas(images), font(15))
    return image


def folded(words):
    """a large red circle on a white ground -> three short lines"""
    head, _, ground = words.partition(" on a ")
    return "\n".join((*head.removeprefix("a ").rsplit(" ", 1), f"on {ground.removesuffix(' ground')}"))


def areas(images):
    """Mean area of the shapes in each column, px of 64 x 64."""
    from trainyard.tests.toy.measure import measure

    return [sum(measure(image).area for image in column) / len(column) for column in zip(*images, strict=True)]


def chart(draw, xs, values, font):
    top, bottom = CHART
    y = lambda value: bottom - (bottom - top) * value / max(values)
    draw.line([(xs[0], bottom), (xs[-1], bottom)], fill=GRID, width=2)
    draw.line(list(zip(xs, map(y, values), strict=True)), fill=LINE, width=4, joint="curve")
    for x, value in zip(xs, values, strict=True):
        draw.ellipse([x - 5, y(value) - 5, x + 5, y(value) + 5], fill=LINE)
    draw.text((LEFT - 12, (top + bottom) / 2), "area", fill=DIM, font=font, anchor="rm")


def difference(name):
    """The card of one of these workflows; its rows and curve become the image of its help page too."""
    from trainyard.tests.comfy.server import Server
    from trainyard.tests.toy import world

    base, card = OUT / "comfyui", CARDS[name]
    checkpoint = base / "models" / "checkpoints" / "toy_world.safetensors"
    if not checkpoint.exists():
        world.build(checkpoint)
    with Server(base, packs={"trainyard": ROOT}) as server:
        strengths, images = rows(server, name, card, checkpoint.name)
    image = drawn(card, strengths, images)
    shown = image.crop((0, TOP - 8, SIDE, SIDE)).resize((SIDE // 2, (SIDE - TOP + 8) // 2), Image.Resampling.LANCZOS)
    shown.save(ROOT / "web" / "docs" / f"{name[3:]}.jpg", quality=88)
    return image
