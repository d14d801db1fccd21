"""What is wrong with which image, and which images are the same."""

import torch
from comfy_api.latest import io, ui

from ...trainers.data.contact_sheet import draw_contact_sheet
from ...trainers.data.image_scan import ScanOptions
from ...trainers.data.images import image_to_batch_tensor
from ...trainers.data.quality.checks import (
    QualitySettings,
    apply_quality_actions,
    check_dataset_quality,
    format_quality_json,
)
from ...trainers.data.quality.duplicates import DuplicateSettings, deduplicate, make_duplicate_tiles
from .. import host
from ..fields import CATEGORY, DatasetType, settings_from_widgets, settings_inputs

VISION_TOOLTIP = (
    "Also compares image content, which finds crops: CLIP-L, CLIP-H, SigLIP or DINO, from Load CLIP Vision."
)


class CheckDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCheckDataset",
            display_name="Check Dataset",
            category=CATEGORY,
            description="Checks every image and caption before training: size, blur, upscaling, duplicates, "
            "contrast, borders, exposure, captions. Flags or drops bad images and shows the measured "
            "values.",
            search_aliases=[
                "image quality",
                "blur detection",
                "filter images",
                "clean pictures",
                "resolution filter",
                "validate",
            ],
            is_output_node=True,
            inputs=[
                DatasetType.Input("dataset", tooltip="From Load Dataset, with or without captions."),
                *settings_inputs(QualitySettings),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Also counts the tokens of captions for its text encoders. Its weights are not loaded.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=VISION_TOOLTIP),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="The remaining images, with their flags."
                ),
                io.Image.Output(
                    "sheet", display_name="sheet", tooltip="The worst images on one page, framed red, amber or green."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Counts, statistics of the whole set, and every finding, worst first.",
                ),
                io.String.Output(
                    "figures", display_name="figures", tooltip="All measurements of every image, as JSON."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, clip=None, clip_vision=None, **widgets):
        from ...trainers.data.quality.quality_report import draw_quality_sheet, format_quality_report
        from .token_counter import make_token_counter

        settings = settings_from_widgets(QualitySettings, widgets)
        found = check_dataset_quality(dataset, settings, make_token_counter(clip), make_scan_options(cls, clip_vision))
        words = format_quality_report(found, settings)
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        page = image_to_batch_tensor(draw_quality_sheet(found)) if found.images else blank_sheet_tensor()
        return io.NodeOutput(
            apply_quality_actions(dataset, found, settings),
            page,
            words,
            format_quality_json(found),
            ui=ui.PreviewImage(page, cls=cls),
        )


class DeduplicateDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardDeduplicateDataset",
            display_name="Deduplicate Dataset",
            category=CATEGORY,
            description="Finds duplicate images, including resized, recompressed and mirrored ones, and keeps the"
            " best of each.",
            search_aliases=["duplicates", "near duplicates", "phash", "similar images", "remove copies"],
            is_output_node=True,
            inputs=[
                DatasetType.Input("dataset", tooltip="The images to compare with each other."),
                *settings_inputs(DuplicateSettings),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=VISION_TOOLTIP),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset",
                    display_name="dataset",
                    tooltip="One image of each group, or all of them with the copies marked.",
                ),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="The groups side by side: the image that stays in green, followed by its copies.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Every group, and the value that links each copy to it."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, clip_vision=None, **widgets):
        found = deduplicate(
            dataset, settings_from_widgets(DuplicateSettings, widgets), make_scan_options(cls, clip_vision)
        )
        words = found.report()
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        page = (
            image_to_batch_tensor(draw_contact_sheet(make_duplicate_tiles(found), title=words.splitlines()[0]))
            if found.groups
            else blank_sheet_tensor()
        )
        return io.NodeOutput(found.dataset, page, words, ui=ui.PreviewImage(page, cls=cls))


def make_scan_options(cls, clip_vision) -> ScanOptions:
    from .image_features import make_image_feature_encoder

    return ScanOptions(
        features=make_image_feature_encoder(clip_vision),
        report=host.progress.ItemProgressReporter(cls.hidden.unique_id),
        check_interrupt=host.progress.raise_if_interrupted,
    )


def blank_sheet_tensor() -> torch.Tensor:
    """There is nothing to show."""
    return torch.zeros(1, 64, 64, 3)


NODES = [CheckDataset, DeduplicateDataset]
