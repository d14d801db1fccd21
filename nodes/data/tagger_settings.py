"""Which tags Caption Images keeps from a tagger, and which words from CLIP."""

from comfy_api.latest import io

from ...trainers.captioners.tags import TaggerSettings
from ..fields import CATEGORY, settings_from_widgets, settings_inputs

TaggerSettingsType = io.Custom("TRAINYARD_TAGGER")


class TaggerSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardTagger",
            display_name="Tagger Settings",
            category=f"{CATEGORY}/settings",
            description="Sets which tags an image keeps, in which order and spelling. Connect it to Caption "
            "Images; without it the defaults apply.",
            search_aliases=["wd14", "wd tagger", "danbooru tags", "booru", "e621", "tag threshold", "mcut", "autotag"],
            inputs=settings_inputs(TaggerSettings),
            outputs=[
                TaggerSettingsType.Output(
                    "tagger", display_name="tagger", tooltip="For the tagger input of Caption Images."
                )
            ],
        )

    @classmethod
    def execute(cls, **widgets):
        return io.NodeOutput(settings_from_widgets(TaggerSettings, widgets))


NODES = [TaggerSettingsNode]
