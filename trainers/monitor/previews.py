"""Sample images on the way: what is drawn how often, and the sheet that shows each beside what the model drew before
it learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..data.caption_variants import fill_trigger
from ..settings import Settings, number_field, text_field
from .plots import PLOT_BACKGROUND, PLOT_TEXT_COLOUR

PREVIEW_GAP, PREVIEW_LABEL_HEIGHT, PREVIEW_HEADER_HEIGHT = 10, 24, 36  # pixels


@dataclass(frozen=True, kw_only=True)
class PreviewSettings(Settings):
    """What is drawn while a run trains. Nothing of it changes a step."""

    preview_every: int = number_field(
        250, 0, 1_000_000, "Draw samples every this many steps, and at the end. 0 draws none.", unit="optimizer steps"
    )
    prompts: str = text_field(
        "",
        "One prompt per line; [trigger] stands for the trigger of Encode Dataset. Needs CLIP connected; empty: the "
        "first captions of the dataset, or the conditioning on positive.",
        multiline=True,
    )
    negative_prompt: str = text_field("", "Negative prompt for the prompts of this node.")
    preview_seed: int = number_field(
        0, 0, 2**63 - 1, "Seed of the first sample of each prompt; the second uses the next one."
    )
    pictures: int = number_field(1, 1, 16, "Samples per prompt, on consecutive seeds.", unit="images")
    sampling_steps: int = number_field(20, 1, 1000, "Sampling steps of each sample.")
    guidance: float = number_field(
        0.0,
        0.0,
        30.0,
        "Classifier-free guidance (CFG). 0 means 5, or 1 for guidance-distilled models.",
        step=0.5,
    )
    strength: float = number_field(1.0, -20.0, 20.0, "The adapter's strength in the samples.", step=0.1, advanced=True)
    width: int = number_field(
        0,
        0,
        8192,
        "Width of the samples. 0 means the most common size of the dataset, or 512.",
        unit="px",
        step=8,
        advanced=True,
    )
    height: int = number_field(
        0,
        0,
        8192,
        "Height of the samples. 0 means the most common size of the dataset, or 512.",
        unit="px",
        step=8,
        advanced=True,
    )

    def lines(self, trigger: str = "") -> list[str]:
        """The prompts; a trigger stands where they say [trigger]."""
        return [line.strip() for line in fill_trigger(self.prompts, trigger).splitlines() if line.strip()]


def draw_samples_sheet(rows, titles, cell: int = 384) -> Image.Image:
    """`rows`: (label, samples), as many images as there are `titles`; None leaves a cell empty. Many rows stand in
    several columns."""
    size = fit_in_cell([sample for _, samples in rows for sample in samples if sample], cell)
    columns = max(1, round(math.sqrt(len(rows) * size[1] / (size[0] * len(titles)))))
    lines = math.ceil(len(rows) / columns)
    block = (len(titles) * (size[0] + PREVIEW_GAP), size[1] + PREVIEW_LABEL_HEIGHT + PREVIEW_GAP)
    image = Image.new(
        "RGB", (columns * block[0] + PREVIEW_GAP, PREVIEW_HEADER_HEIGHT + lines * block[1]), PLOT_BACKGROUND
    )
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    for number_, (label, samples) in enumerate(rows):
        left, top = PREVIEW_GAP + number_ // lines * block[0], PREVIEW_HEADER_HEIGHT + number_ % lines * block[1]
        for column, (sample, title) in enumerate(zip(samples, titles, strict=True)):
            x = left + column * (size[0] + PREVIEW_GAP)
            if number_ % lines == 0:
                draw.text((x, PREVIEW_HEADER_HEIGHT / 2), title, fill=PLOT_TEXT_COLOUR, font=font, anchor="lm")
            if sample:
                image.paste(resize_preview(sample, size), (x, top))
        draw.text(
            (left, top + size[1] + PREVIEW_LABEL_HEIGHT / 2),
            truncate_label(draw, label, block[0] - PREVIEW_GAP, font),
            fill=PLOT_TEXT_COLOUR,
            font=font,
            anchor="lm",
        )
    return image


def fit_in_cell(samples, cell: int) -> tuple[int, int]:
    """The size of the first image within a square of `cell`; small ones grow, so that they can be seen."""
    width, height = samples[0].size if samples else (1, 1)
    scale = cell / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize_preview(image: Image.Image, size) -> Image.Image:
    how = Image.Resampling.NEAREST if 2 * image.width <= size[0] else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)


def truncate_label(draw, label: str, width: float, font) -> str:
    """The label with … where it would be cut."""
    label = " ".join(label.split())
    if draw.textlength(label, font=font) <= width:
        return label
    while label and draw.textlength(f"{label}…", font=font) > width:
        label = label[:-1]
    return f"{label.rstrip()}…"
