"""Presets: where to begin for a family and a purpose."""

from comfy_api.latest import io, ui

from ...trainers.presets import PRESET_FAMILIES, PRESET_PURPOSES, format_preset, make_training_preset
from ..fields import CATEGORY
from .settings_nodes import AdapterSettingsType, NoiseSettingsType, OptimizerSettingsType


class PresetRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardPreset",
            display_name="Training Preset",
            category=f"{CATEGORY}/settings",
            description="Published starting settings for a model family and a purpose: adapter, optimizer, noise,"
            " steps, learning rate, rank and resolution. Every value can be changed.",
            search_aliases=[
                "recommended settings",
                "recipe",
                "sd15 sdxl flux settings",
                "illustrious",
                "noobai",
                "character lora",
                "style lora",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "family",
                    options=list(PRESET_FAMILIES),
                    default="SDXL",
                    tooltip="The family of the model to train.",
                ),
                io.Combo.Input(
                    "purpose",
                    options=list(PRESET_PURPOSES),
                    default=PRESET_PURPOSES[0],
                    tooltip="What to train: one character, a style, or a thing, pose or idea.",
                ),
                io.Int.Input(
                    "pictures",
                    default=20,
                    min=1,
                    max=1_000_000,
                    tooltip="Number of images: more images need more steps. (1 to 1000000)",
                ),
                io.String.Input(
                    "changes",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Your own values, one per line, such as: rank = 32. They replace the preset's.",
                ),
            ],
            outputs=[
                AdapterSettingsType.Output(
                    "adapter", display_name="adapter", tooltip="For the adapter input of Train LoRA."
                ),
                OptimizerSettingsType.Output(
                    "optimizer", display_name="optimizer", tooltip="For the optimizer input of Train LoRA."
                ),
                NoiseSettingsType.Output("noise", display_name="noise", tooltip="For the noise input of Train LoRA."),
                io.Int.Output("steps", display_name="steps", tooltip="For the steps of Train LoRA."),
                io.Float.Output(
                    "learning_rate", display_name="learning_rate", tooltip="For the learning rate of Train LoRA."
                ),
                io.Int.Output("rank", display_name="rank", tooltip="For the rank of Train LoRA."),
                io.Int.Output("resolution", display_name="resolution", tooltip="For the resolution of Encode Dataset."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Every chosen value, advice on the images, and the sources of the values.",
                ),
            ],
        )

    @classmethod
    def execute(cls, family, purpose, pictures, changes=""):
        chosen = make_training_preset(family, purpose, pictures, changes)
        words = format_preset(chosen)
        return io.NodeOutput(
            chosen.adapter,
            chosen.optimizer,
            chosen.noise,
            chosen.run.steps,
            chosen.run.learning_rate,
            chosen.adapter.rank,
            chosen.resolution,
            words,
            ui=ui.PreviewText(words),
        )


NODES = [PresetRecipe]
