"""Datasets in and out of the graph: from folders and pictures, joined, split, looked at and saved."""

from comfy_api.latest import io

from ..trainers.data.readers import folder_state, read_folder
from . import paths
from .fields import CATEGORY, Dataset


class LoadDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadDataset",
            display_name="Load Dataset",
            category=CATEGORY,
            description="Pictures and their captions from a folder: same-named .txt files, kohya folders such as 10_name (10 repeats), masks as name.mask.png.",
            search_aliases=["image folder", "dataset", "training images", "captions", "dreambooth"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=paths.dataset_folders(),
                    tooltip="A folder inside ComfyUI's input or datasets folder. Press R after adding one.",
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=10_000,
                    tooltip="How often an epoch shows each picture; multiplied with a folder's own N_name. (1 to 10000)",
                ),
                io.Boolean.Input(
                    "alpha_mask",
                    default=False,
                    advanced=True,
                    tooltip="Use the pictures' transparency as a loss mask: transparent parts are not learnt.",
                ),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="The list of pictures, for Encode Dataset."),
                io.String.Output("about", display_name="about", tooltip="What was found, and what was skipped and why."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return folder_state(paths.dataset_folder(folder))

    @classmethod
    def execute(cls, folder, repeats, alpha_mask=False):
        dataset = read_folder(paths.dataset_folder(folder), repeats=repeats, alpha_mask=alpha_mask)
        return io.NodeOutput(dataset, about(dataset))


def about(dataset) -> str:
    captioned = sum(1 for r in dataset if r.captions)
    lines = [f"{len(dataset)} pictures, {captioned} with captions, {sum(r.repeats for r in dataset)} per epoch"]
    return "\n".join(lines + [f"skipped {path}: {reason}" for path, reason in dataset.skipped])


NODES = [LoadDataset]
