"""Several images in one frame, so that patterns are learnt relative to the frame."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ...trainers.data.collage.plan import CollageSettings
from .. import host, paths
from ..fields import CATEGORY, DatasetType, settings_from_widgets, settings_inputs


class BuildCollages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardBuildCollages",
            display_name="Build Collages",
            category=CATEGORY,
            description="Puts two to four images into one frame, each spanning it along one axis and never "
            "stretched, so that patterns are learnt relative to the frame.",
            search_aliases=["image grid", "tile pictures", "side by side", "montage", "stitch dataset"],
            inputs=[
                DatasetType.Input("dataset", tooltip="From Load Dataset, preferably already checked and captioned."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Connect it to list captions that became too long for the text encoder.",
                ),
                *settings_inputs(CollageSettings),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset",
                    display_name="dataset",
                    tooltip="The collages with masks and captions, for Encode Dataset.",
                ),
                io.Image.Output(
                    "sheet", display_name="sheet", tooltip="The first collages on one page, flagged ones first."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What was made, and what was left out and why."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, clip=None, **widgets):
        from ...trainers.data.collage.build import build_collages, draw_collages_sheet
        from .token_counter import make_token_counter

        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        built = build_collages(
            dataset,
            settings_from_widgets(CollageSettings, widgets),
            paths.cache_folder() / "collages",
            report,
            host.progress.raise_if_interrupted,
            tokens=make_token_counter(clip),
        )
        sheet = torch.from_numpy(np.asarray(draw_collages_sheet(built), dtype=np.float32) / 255)[None]
        host.progress.show_node_text(built.report.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(built.dataset, sheet, built.report, ui=ui.PreviewImage(sheet, cls=cls))


NODES = [BuildCollages]
