"""What is wrong with which picture, and which pictures are the same."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ...trainers.data.quality.duplicates import DuplicateSettings, deduplicate, tiles
from ...trainers.data.quality.quality import QualitySettings, acted, as_json, check
from ...trainers.data.quality.quality_report import report, sheet
from ...trainers.data.quality.thumbnails import Looking
from ...trainers.data.sheets import contact_sheet
from .. import host
from ..fields import CATEGORY, Dataset, inputs, record
from .token_counter import counter
from .vision import looker

VISION = "Also compares what the pictures show, which finds crops: CLIP-L, CLIP-H, SigLIP or DINO, from Load CLIP Vision."


class CheckDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCheckDataset",
            display_name="Check Dataset",
            category=CATEGORY,
            description="Look at every picture and caption before training: too small, blurred, enlarged, doubled, low contrast, bars, exposure, captions. "
            "Marks or drops what is bad and says why, with figures.",
            search_aliases=["image quality", "blur detection", "filter images", "clean pictures", "resolution filter", "validate"],
            is_output_node=True,
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Dataset, with or without captions."),
                *inputs(QualitySettings),
                io.Clip.Input("clip", optional=True, tooltip="Also counts the tokens of captions for its text encoders. Its weights are not loaded."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=VISION),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="The pictures that stay, with their flags."),
                io.Image.Output("sheet", display_name="sheet", tooltip="The worst pictures on one page, framed red, amber or green."),
                io.String.Output("report", display_name="report", tooltip="Counts, the set as a whole, and every finding, worst first."),
                io.String.Output("figures", display_name="figures", tooltip="Every figure of every picture, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, clip=None, clip_vision=None, **widgets):
        settings = record(QualitySettings, widgets)
        found = check(dataset, settings, counter(clip), looking(cls, clip_vision))
        words = report(found, settings)
        host.progress.show(words.splitlines()[0], cls.hidden.unique_id)
        page = tensor(sheet(found)) if found.pictures else blank()
        return io.NodeOutput(acted(dataset, found, settings), page, words, as_json(found), ui=ui.PreviewImage(page, cls=cls))


class DeduplicateDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardDeduplicateDataset",
            display_name="Deduplicate Dataset",
            category=CATEGORY,
            description="Find pictures that are there more than once, also resized, saved anew or mirrored, and keep the best of each.",
            search_aliases=["duplicates", "near duplicates", "phash", "similar images", "remove copies"],
            is_output_node=True,
            inputs=[
                Dataset.Input("dataset", tooltip="The pictures to compare with each other."),
                *inputs(DuplicateSettings),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=VISION),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="One picture of each group, or all of them with the copies marked."),
                io.Image.Output("sheet", display_name="sheet", tooltip="The groups side by side: what stays in green, its copies after it."),
                io.String.Output("report", display_name="report", tooltip="Every group, and the figure that ties each copy to it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, clip_vision=None, **widgets):
        found = deduplicate(dataset, record(DuplicateSettings, widgets), looking(cls, clip_vision))
        words = found.report()
        host.progress.show(words.splitlines()[0], cls.hidden.unique_id)
        page = tensor(contact_sheet(tiles(found), title=words.splitlines()[0])) if found.groups else blank()
        return io.NodeOutput(found.dataset, page, words, ui=ui.PreviewImage(page, cls=cls))


def looking(cls, clip_vision) -> Looking:
    return Looking(features=looker(clip_vision), report=host.progress.Steps(cls.hidden.unique_id), check_interrupt=host.progress.interrupted)


def tensor(page) -> torch.Tensor:
    """(1, H, W, 3) in 0..1."""
    return torch.from_numpy(np.asarray(page, dtype=np.float32) / 255)[None]


def blank() -> torch.Tensor:
    """There is nothing to show."""
    return torch.zeros(1, 64, 64, 3)


NODES = [CheckDataset, DeduplicateDataset]
