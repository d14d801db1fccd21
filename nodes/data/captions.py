"""Captions edited by rule and by hand, and what they look like as a whole."""

import json

from comfy_api.latest import io, ui

from ...trainers.data.captions.edits import apply_edits, format_edit_preview, parse_edits
from .. import host, paths
from ..fields import CATEGORY, DatasetType

THUMBNAILS_AT_RUN = 100  # a page of the grid; the others are made when they are scrolled to
EXAMPLE_EDITS = (
    "# one edit per line, for example:\n# trigger: sks\n# remove: watermark, signature\n# s/\\bman\\b/person/\n# dedupe"
)


class EditCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardEditCaptions",
            display_name="Edit Captions",
            category=CATEGORY,
            description="Edits all captions with rules, one per line: trigger word, remove, replace, regular "
            "expressions, sort, shuffle, truncate. Shows what changed; files stay unchanged.",
            search_aliases=[
                "tag editor",
                "find and replace",
                "regex",
                "trigger word",
                "prefix suffix",
                "shuffle tags",
                "dedupe tags",
            ],
            is_output_node=True,
            inputs=[
                DatasetType.Input("dataset", tooltip="The images whose captions are edited."),
                io.String.Input(
                    "edits",
                    multiline=True,
                    default=EXAMPLE_EDITS,
                    tooltip="One edit per line, applied in order; # begins a comment. The help page lists all rules.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip=f"Determines the order for 'shuffle'. (0 to {2**63 - 1})",
                ),
                io.Int.Input(
                    "show",
                    default=5,
                    min=0,
                    max=1000,
                    tooltip="How many changed captions the preview shows. (0 to 1000 images)",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder that counts the tokens for 'truncate'. Its weights are not loaded.",
                ),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="The same images with the edited captions."
                ),
                io.String.Output(
                    "preview",
                    display_name="preview",
                    tooltip="How many captions changed, and the first of them before and after.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, edits, seed, show, clip=None):
        from .token_counter import make_token_counter

        rules = parse_edits(edits)
        after = apply_edits(
            dataset,
            rules,
            seed,
            make_token_counter(clip),
            make_silent_progress(cls.hidden.unique_id),
            host.progress.raise_if_interrupted,
        )
        text = format_edit_preview(dataset, after, show)
        return io.NodeOutput(after, text, ui=ui.PreviewText(text))


class CaptionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCaptionReport",
            display_name="Caption Report",
            category=CATEGORY,
            description="Summarises the captions of a dataset: missing, identical, too long, without trigger "
            "word, and how often each tag is used.",
            search_aliases=["tag statistics", "token count", "tag frequency", "check captions", "count tags"],
            is_output_node=True,
            inputs=[
                DatasetType.Input("dataset", tooltip="The images whose captions are counted."),
                io.String.Input(
                    "trigger", default="", tooltip="A word that every caption should contain; empty for none."
                ),
                io.Int.Input(
                    "tags",
                    default=30,
                    min=0,
                    max=10_000,
                    tooltip="How many of the most frequent tags are listed. (0 to 10000 tags)",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Also counts the tokens of each of its text encoders. Its weights are not loaded.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The report as text."),
                io.String.Output(
                    "json", display_name="json", tooltip="The same data as JSON, with every tag and file name."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, trigger, tags, clip=None):
        from ...trainers.data.captions import caption_report
        from .token_counter import make_token_counter

        figures = caption_report.build_caption_report(
            dataset, trigger, make_token_counter(clip), host.progress.raise_if_interrupted
        )
        text = caption_report.format_caption_report(figures, tags)
        return io.NodeOutput(text, json.dumps(figures, ensure_ascii=False, indent=1), ui=ui.PreviewText(text))


class EditCaptionsByHand(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardEditCaptionsByHand",
            display_name="Edit Captions by Hand",
            category=CATEGORY,
            description="Shows the images with editable captions in a grid, with search, find and replace, and "
            "undo. Edits are saved in the workflow; text files change only on request.",
            search_aliases=["tag editor", "caption grid", "manual captions", "dataset viewer", "browse dataset"],
            is_output_node=True,
            inputs=[
                DatasetType.Input("dataset", tooltip="The images to show. Run once to see them."),
                io.String.Input(
                    "edits",
                    multiline=True,
                    default="",
                    socketless=True,
                    tooltip="The edits from the grid as JSON: caption by image id (sha1 of the file).",
                ),
                io.Boolean.Input(
                    "save_to_files",
                    default=False,
                    tooltip="At the next Run, also write the edited captions into the text files beside the "
                    "images. The previous text is kept.",
                ),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="The same images with the captions from the grid."
                ),
                io.String.Output(
                    "about",
                    display_name="about",
                    tooltip="How many captions were edited, and which files were written.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, edits, save_to_files=False):
        from ...trainers.data.captions import manual_edits, sidecars
        from ..page import thumbnail_routes

        written = manual_edits.parse_manual_edits(edits)
        after = manual_edits.apply_manual_edits(dataset, written)
        cards = manual_edits.build_caption_cards(
            dataset,
            paths.thumbnails_folder(),
            make_silent_progress(cls.hidden.unique_id),
            host.progress.raise_if_interrupted,
            first=THUMBNAILS_AT_RUN,
        )
        thumbnail_routes.remember_shown_images(dataset)
        saved = (
            sidecars.write_caption_files(after, written, paths.list_dataset_roots(), [paths.cache_folder()])
            if save_to_files
            else None
        )
        about = "\n".join(
            [manual_edits.format_manual_edits(dataset, after, written), *sidecars.format_written_captions(saved)]
        )
        return io.NodeOutput(
            after,
            about,
            ui={"trainyard_captions": [caption_card_json(card) for card in cards], "trainyard_about": [about]},
        )


def make_silent_progress(node_id):
    """Progress without a line of text, which would take half the room of what the node shows."""
    drawn = host.progress.NodeProgressReporter(1, node_id).bar
    return lambda done, total, name: drawn.update_absolute(done, total)


def caption_card_json(card):
    """What the page draws of one image. A thumbnail that is not made yet has a name alone: see thumbnail_routes."""
    place = {"subfolder": paths.thumbnails_folder().name, "type": "temp"} if card.made else {}
    thumb = card.thumb and {"filename": card.thumb, **place}
    return {"id": card.id, "name": card.name, "captions": list(card.captions), "thumb": thumb, "why": card.why}


NODES = [EditCaptions, CaptionReport, EditCaptionsByHand]
