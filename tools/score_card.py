"""The card of workflow 10: what Train LECO-Score's defaults do to the images of the toy world, trained as
benchmarks/leco_score.py trains them.

Three minutes on a quiet core.

The score model learns redness from drawn images that a noisy rater judged; the curve is the redness that is really
there. The first image of each prompt is shown, whatever it is. Sizes were not named in the prompts of the training,
and no noise of it is used again.
"""

from __future__ import annotations

import pathlib
import sys

from PIL import Image, ImageDraw, ImageFont

from .difference_cards import CELL, CHART, DIM, GRID, INK, LEFT, LINE, SIDE, Card, drawn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import leco_score as benchmark  # noqa: E402
import pack  # noqa: E402

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ASKED = [
    "a large circle on a white ground",
    "a small square on a grey ground",
    "a large triangle on a black ground",
    "a small cross on a white ground",
]


def followed():
    """The sheet: prompts over strengths from the same noise, and under it the true score of all that was drawn."""
    images, values = measured()
    page = drawn(Card("a score for red, prompts without colours", tuple(ASKED), area=False), STRENGTHS, images)
    chart(ImageDraw.Draw(page), values)
    return page


def measured():
    """(a row of PIL images for each prompt, the mean true score at each strength in standard deviations of drawn
    images)."""
    pack.boot()
    import torch
    from trainyard.nodes import host
    from trainyard.trainers.data.signed_prompts import SignedPrompt
    from trainyard.trainers.methods.leco_score import LecoScoreSettings

    torch.set_num_threads(1)
    true = benchmark.TRUE["redness"]
    with torch.inference_mode():
        toy = pack.toy_world()
        denoiser, learnt_from, _ = benchmark.prepared(toy)
        with host.context.enable_gradients():
            score = benchmark.scorer(denoiser, learnt_from, true, True)
        prompts = [SignedPrompt(scene) for scene in benchmark.scenes("trained")]
        found = benchmark.learnt(toy, learnt_from, true, LecoScoreSettings(), [(score, 1.0)], prompts, look)
    print({**found, "columns": [round(value, 2) for _, value in found["columns"]]}, flush=True)
    images, values = zip(*found["columns"], strict=True)
    return list(zip(*images, strict=True)), values


def look(judge):
    """(the first image of each prompt, the mean true score of all of them) at each strength."""
    from trainyard.nodes import host

    judge.model.conds.update(zip(ASKED, host.encoders.TextEncoder(judge.toy.clip).encode(ASKED), strict=True))
    judge.preview_prompts = ASKED
    return {"columns": [column(judge, judge.images(judge.draw(strength))) for strength in STRENGTHS]}


def column(judge, images):
    firsts = [
        Image.fromarray((p.clamp(0, 1) * 255).round().byte().numpy()) for p in images[:: len(images) // len(ASKED)]
    ]
    return firsts, float(judge.true(images).mean() / judge.unit)


def chart(draw, values):
    """The true score over the strength, each point with its figure, under the columns of images."""
    font, (top, bottom) = ImageFont.load_default, CHART
    low, high = min(*values, 0.0), max(*values, 0.0)
    y = lambda value: bottom - (bottom - top) * (value - low) / (high - low)
    places = [
        (LEFT + CELL / 2 + i * (SIDE - LEFT - 20 - CELL) / (len(values) - 1), y(value))
        for i, value in enumerate(values)
    ]
    draw.line([(places[0][0], y(0)), (places[-1][0], y(0))], fill=GRID, width=2)
    draw.line(places, fill=LINE, width=4, joint="curve")
    for (x, height), value in zip(places, values, strict=True):
        draw.ellipse([x - 5, height - 5, x + 5, height + 5], fill=LINE)
        draw.text(
            (x, height - 16), f"{value:+.1f}" if abs(value) >= 0.05 else "0", fill=INK, font=font(size=15), anchor="mm"
        )
    words = f"true redness\nof {benchmark.JUDGED} pictures,\nin standard\ndeviations"
    draw.multiline_text(
        (LEFT - 12, (top + bottom) / 2), words, fill=DIM, font=font(size=14), anchor="rm", align="right"
    )
