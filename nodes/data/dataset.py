"""Datasets in and out of the graph: from folders and images, joined, split, looked at and saved."""

from comfy_api.latest import io, ui

from ...trainers.data.contact_sheet import draw_dataset_sheet
from ...trainers.data.image_scan import ScanOptions
from ...trainers.data.images import dataset_from_tensors, image_to_batch_tensor, record_to_tensors
from ...trainers.data.join_split import (
    SplitSettings,
    find_repeated_images,
    join_datasets,
    parse_dataset_weights,
    split_dataset,
)
from ...trainers.data.quality.duplicates import group_near_duplicates
from ...trainers.data.readers import CAPTION_LINE_MODES, VIDEO_MODES, hash_folder_state, make_printable, read_folder
from ...trainers.data.records import describe_colour_profiles, describe_controls, describe_left_out
from ...trainers.data.writers import SaveSettings, format_save_summary, save_dataset
from .. import host, paths
from ..fields import CATEGORY, DatasetType, settings_from_widgets, settings_inputs

MAX_JOINED_DATASETS = 8


class LoadDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadDataset",
            display_name="Load Dataset",
            category=CATEGORY,
            description="Loads images and videos from a folder with their captions (.txt, .caption, .json), "
            "metadata.jsonl, .csv or .json, kohya folders such as 10_name (10 repeats), and masks as name.mask.png or"
            " in their own folder.",
            search_aliases=[
                "image folder",
                "dataset",
                "training images",
                "captions",
                "dreambooth",
                "metadata",
                "csv",
                "masks",
                "videos",
                "mp4",
            ],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=paths.list_dataset_folders(),
                    tooltip="A folder inside ComfyUI's input, datasets or output/datasets folder. Press R after adding "
                    "one.",
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=10_000,
                    tooltip="How often an epoch shows each image; multiplied by a folder's own N_name. (1 to 10000)",
                ),
                io.Boolean.Input(
                    "alpha_mask",
                    default=False,
                    advanced=True,
                    tooltip="Use the images' transparency as a loss mask: transparent areas are not trained.",
                ),
                io.Combo.Input(
                    "caption_lines",
                    options=list(CAPTION_LINE_MODES),
                    default=CAPTION_LINE_MODES[0],
                    optional=True,
                    tooltip="one: the whole text file is one caption. alternatives: every line is a caption, and "
                    "one is drawn at random.",
                ),
                io.Combo.Input(
                    "masks",
                    options=paths.list_optional_folders(),
                    default=paths.NO_FOLDER,
                    optional=True,
                    tooltip="A folder of masks with the names of the images; white is trained, black is not.",
                ),
                io.String.Input(
                    "metadata",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Name of a .csv, .json or .jsonl file in the folder, instead of metadata.jsonl, "
                    "metadata.csv and metadata.json.",
                ),
                io.Combo.Input(
                    "controls",
                    options=paths.list_optional_folders(),
                    default=paths.NO_FOLDER,
                    optional=True,
                    tooltip="For edit models: a folder of control images, from which the model learns to make the "
                    "images. cat.png belongs to cat.jpg; several are cat_1.png, cat_2.png. They may also lie beside "
                    "the images as cat.control.png.",
                ),
                io.Combo.Input(
                    "videos",
                    options=list(VIDEO_MODES),
                    default=VIDEO_MODES[0],
                    optional=True,
                    advanced=True,
                    tooltip="Whether videos and folders of frames (walk.24fps) are read, for Cut Clips. auto: where "
                    "the folder has no images; beside images they are left out and named in about.",
                ),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="The list of images, for Encode Dataset."
                ),
                io.String.Output(
                    "about", display_name="about", tooltip="What was found, and what was skipped and why."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, masks=paths.NO_FOLDER, controls=paths.NO_FOLDER, **_):
        beside = paths.resolve_optional_folder(masks), paths.resolve_optional_folder(controls)
        return hash_folder_state(paths.resolve_dataset_folder(folder), *beside)

    @classmethod
    def execute(
        cls,
        folder,
        repeats,
        alpha_mask=False,
        caption_lines=CAPTION_LINE_MODES[0],
        masks=paths.NO_FOLDER,
        metadata="",
        controls=paths.NO_FOLDER,
        videos=VIDEO_MODES[0],
    ):
        path = paths.resolve_dataset_folder(folder)
        dataset = read_folder(
            path,
            repeats=repeats,
            alpha_mask=alpha_mask,
            progress=make_cancellable_progress(cls),
            caption_lines=caption_lines,
            masks=paths.resolve_optional_folder(masks),
            controls=paths.resolve_optional_folder(controls),
            metadata=paths.resolve_file_in_folder(path, metadata),
            facts_file=paths.image_facts_file(),
            videos=videos,
        )
        return io.NodeOutput(dataset, format_dataset_summary(dataset))


class JoinDatasets(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        more = [
            DatasetType.Input(f"dataset_{number}", optional=True, tooltip="One more dataset to join.")
            for number in range(2, MAX_JOINED_DATASETS + 1)
        ]
        return io.Schema(
            node_id="TrainyardJoinDatasets",
            display_name="Join Datasets",
            category=CATEGORY,
            description="Combines several datasets into one, each used as often as its weight says.",
            search_aliases=["merge", "concatenate", "combine folders", "regularization images", "balance", "concepts"],
            inputs=[
                DatasetType.Input("dataset_1", tooltip="The first dataset; its images come first."),
                *more,
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="How often the images of each connected dataset are used, such as 1, 0.5, 2. Empty: "
                    "all the same.",
                ),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset",
                    display_name="dataset",
                    tooltip="All images, with their repeats multiplied by the weights.",
                ),
                io.String.Output(
                    "about", display_name="about", tooltip="The source of each part, and images that occur twice."
                ),
            ],
        )

    @classmethod
    def execute(cls, dataset_1, weights="", **more):
        datasets = [dataset_1, *(more[name] for name in sorted(more) if more[name] is not None)]
        whole = join_datasets(datasets, parse_dataset_weights(weights, len(datasets)))
        return io.NodeOutput(
            whole,
            "\n".join(
                [
                    format_dataset_summary(whole),
                    *(make_printable(f"the same image twice: {a} and {b}") for a, b in find_repeated_images(whole)),
                ]
            ),
        )


class SplitDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardSplitDataset",
            display_name="Split Dataset",
            category=CATEGORY,
            description="Holds out some images for validation. The choice depends on their content: adding an "
            "image does not move the others.",
            search_aliases=["validation", "holdout", "test set", "train val split", "partition"],
            inputs=[DatasetType.Input("dataset", tooltip="The images to split."), *settings_inputs(SplitSettings)],
            outputs=[
                DatasetType.Output("train", display_name="train", tooltip="The images to train on."),
                DatasetType.Output(
                    "validation", display_name="validation", tooltip="The images to measure on; never train on them."
                ),
                io.String.Output(
                    "about", display_name="about", tooltip="The number of images on each side, and which are held out."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, **widgets):
        settings = settings_from_widgets(SplitSettings, widgets)
        options = ScanOptions(
            report=host.progress.ItemProgressReporter(cls.hidden.unique_id),
            check_interrupt=host.progress.raise_if_interrupted,
        )
        train, validation = split_dataset(
            dataset, settings, group_near_duplicates(dataset, options) if settings.similar else None
        )
        lines = [
            f"{len(train)} images to train on, {len(validation)} to validate on:",
            *(make_printable(r.path) for r in validation),
        ]
        return io.NodeOutput(train, validation, "\n".join(lines))


class PreviewDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardPreviewDataset",
            display_name="Preview Dataset",
            category=CATEGORY,
            description="Shows a page of a dataset's images with name, size, repeats, caption and flags, cropped "
            "as for training.",
            search_aliases=["contact sheet", "thumbnails", "browse pictures", "show dataset", "gallery"],
            inputs=[
                DatasetType.Input("dataset", tooltip="The images to show."),
                io.Int.Input(
                    "page", default=1, min=1, max=100_000, tooltip="Which page to show, the first is 1. (1 to 100000)"
                ),
                io.Int.Input(
                    "per_page",
                    default=24,
                    min=1,
                    max=400,
                    tooltip="How many images a page shows. (1 to 400 images)",
                ),
                io.Int.Input(
                    "cell",
                    default=192,
                    min=64,
                    max=1024,
                    step=16,
                    advanced=True,
                    tooltip="Size of each image on the page. (64 to 1024 px)",
                ),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The page as one image, for Save Image."),
                io.String.Output(
                    "about", display_name="about", tooltip="What the dataset holds, and what was skipped and why."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dataset, page, per_page, cell=192):
        sheet = image_to_batch_tensor(draw_dataset_sheet(dataset, page, per_page, cell))
        return io.NodeOutput(sheet, format_dataset_summary(dataset), ui=ui.PreviewImage(sheet, cls=cls))


class SaveDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardSaveDataset",
            display_name="Save Dataset",
            category=CATEGORY,
            description="Writes images, captions, masks, tags and scores to a folder that this pack and other "
            "trainers can read. The folder is written completely or not at all.",
            search_aliases=[
                "export",
                "kohya folder",
                "write captions",
                "jsonl",
                "save training images",
                "hugging face",
            ],
            inputs=[
                DatasetType.Input("dataset", tooltip="The images to save; crops are applied."),
                io.String.Input(
                    "name", default="my_dataset", tooltip="Name of the folder, such as my_set or cats/black."
                ),
                io.Combo.Input(
                    "place",
                    options=list(paths.DATASET_SAVE_PLACES),
                    tooltip="Which ComfyUI folder to write to. Load Dataset finds both.",
                ),
                *settings_inputs(SaveSettings),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace what Save Dataset wrote under this name before. Folders with other files are"
                    " never replaced.",
                ),
            ],
            outputs=[
                DatasetType.Output("dataset", display_name="dataset", tooltip="The input dataset, unchanged."),
                io.String.Output(
                    "about",
                    display_name="about",
                    tooltip="The folder, the number of images, and what was renamed.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dataset, name, place, overwrite=False, **widgets):
        saved = save_dataset(
            dataset,
            paths.new_dataset_folder(place, name),
            settings_from_widgets(SaveSettings, widgets),
            overwrite,
            host.progress.ItemProgressReporter(cls.hidden.unique_id),
            host.progress.raise_if_interrupted,
        )
        text = make_printable(format_save_summary(saved, dataset))
        host.progress.show_node_text(text.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(dataset, text)


class DatasetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardDatasetFromImages",
            display_name="Dataset from Images",
            category=CATEGORY,
            description="Makes a dataset from images in the graph, with captions and masks. Each image is written"
            " once, to the cache in the datasets folder.",
            search_aliases=[
                "image list to dataset",
                "generated pictures",
                "core dataset",
                "batch to dataset",
                "synthetic data",
            ],
            inputs=[
                io.Image.Input("images", tooltip="Images, batches or lists of them, of any sizes."),
                io.String.Input(
                    "captions",
                    force_input=True,
                    optional=True,
                    tooltip="A list of captions: one for all images, one per batch, or one per image.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Loss masks, white is trained: one for all images, one per batch, or one per image.",
                ),
            ],
            outputs=[
                DatasetType.Output("dataset", display_name="dataset", tooltip="The list of images, for Encode Dataset.")
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, images, captions=(), masks=()):
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        return io.NodeOutput(
            dataset_from_tensors(
                images,
                captions or (),
                masks or (),
                paths.image_cache_folder(),
                report,
                host.progress.raise_if_interrupted,
            )
        )


class DatasetToImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardDatasetToImages",
            display_name="Dataset to Images",
            category=CATEGORY,
            description="Converts a dataset to lists of images, captions and masks for ComfyUI's own nodes. All "
            "images are decoded into memory.",
            search_aliases=["unpack dataset", "image list", "dataset to list", "make training dataset"],
            inputs=[
                DatasetType.Input("dataset", tooltip="The images to output."),
                io.Int.Input(
                    "first", default=1, min=1, max=1_000_000, tooltip="Number of the first image. (1 to 1000000)"
                ),
                io.Int.Input(
                    "most",
                    default=100,
                    min=1,
                    max=100_000,
                    tooltip="Maximum number of images to decode. (1 to 100000 images)",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    is_output_list=True,
                    tooltip="The images, cropped as for training.",
                ),
                io.String.Output(
                    "captions",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The first caption of each image, or an empty text.",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    is_output_list=True,
                    tooltip="The loss masks; all white if an image has none.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, first=1, most=100):
        records, tell, found = dataset.records[first - 1 :][:most], make_cancellable_progress(cls), []
        if not records:
            raise ValueError(f"first is {first}, and the dataset has {len(dataset)} images. Choose a smaller number.")
        for done, one in enumerate(records, 1):
            found.append(record_to_tensors(one))
            tell(done, len(records), one.path)
        return io.NodeOutput(*(list(column) for column in zip(*found, strict=True)))


def make_cancellable_progress(node):
    """Progress in the node, which Cancel can stop."""
    report = host.progress.ItemProgressReporter(node.hidden.unique_id)

    def tell(done, total, text):
        host.progress.raise_if_interrupted()
        report(done, total, make_printable(text))

    return tell


def format_dataset_summary(dataset) -> str:
    captioned = sum(1 for r in dataset if r.captions)
    masked = sum(1 for r in dataset if r.mask)
    masks = f", {masked} with masks" if masked else ""
    lines = [
        f"{count_kinds(dataset.records)}, {captioned} with captions{masks}, {sum(r.repeats for r in dataset)} per epoch"
    ]
    lines += describe_clips(dataset.records) + describe_controls(dataset.records) + describe_colour_profiles(dataset)
    return make_printable("\n".join(lines + describe_left_out(dataset)))


def count_kinds(records) -> str:
    """Such as 12 images, or 3 clips and 1 image."""
    videos, clips = (sum(1 for r in records if r.video and bool(r.clip) == cut) for cut in (False, True))
    counts = [(clips, "clip"), (videos, "video"), (len(records) - clips - videos, "image")]
    found = [f"{count} {kind}{'s'[: count != 1]}" for count, kind in counts if count]
    return " and ".join(found) if clips or videos else f"{len(records)} images"


def describe_clips(records) -> list[str]:
    if not any(record.video for record in records):
        return []
    from ...trainers.data.clips import describe_videos

    return describe_videos(records)


NODES = [
    LoadDataset,
    DatasetFromImages,
    JoinDatasets,
    SplitDataset,
    PreviewDataset,
    SaveDataset,
    DatasetToImages,
]
