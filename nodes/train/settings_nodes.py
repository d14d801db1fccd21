"""Optional settings nodes: what the Train nodes leave out."""

import dataclasses

from comfy_api.latest import io

from ...trainers.families import EXPERT_RANGES, WHOLE_RANGE
from ...trainers.files import as_lora_file
from ...trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, PointSettings
from ..fields import CATEGORY, LoraModelType, settings_from_widgets, settings_inputs
from .job import NoiseWithAssistant

AdapterSettingsType = io.Custom("TRAINYARD_ADAPTER")
OptimizerSettingsType = io.Custom("TRAINYARD_OPTIMIZER")
NoiseSettingsType = io.Custom("TRAINYARD_NOISE")
PointSettingsType = io.Custom("TRAINYARD_POINTS")


class Adapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardAdapter",
            display_name="Adapter Settings",
            category=f"{CATEGORY}/settings",
            description="Sets the adapter algorithm, its target layers and its scale. Connect it to a Train node;"
            " without it the node uses the defaults.",
            search_aliases=[
                "lora settings",
                "alpha",
                "target modules",
                "locon",
                "rslora",
                "text encoder lora",
                "network dim",
                "dora",
                "loha",
                "lokr",
                "lycoris",
                "lora plus",
                "block weight",
                "network dropout",
            ],
            inputs=settings_inputs(AdapterSettings, without=("rank",)),
            outputs=[
                AdapterSettingsType.Output(
                    "adapter", display_name="adapter", tooltip="For the adapter input of a Train node."
                )
            ],
        )

    @classmethod
    def execute(cls, **widgets):
        return io.NodeOutput(settings_from_widgets(AdapterSettings, widgets))


class Optimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardOptimizer",
            display_name="Optimizer Settings",
            category=f"{CATEGORY}/settings",
            description="Sets the optimizer, learning rate schedule, warmup, gradient clipping and accumulation.",
            search_aliases=[
                "adamw",
                "prodigy",
                "lion",
                "schedule free",
                "scheduler",
                "warmup",
                "gradient accumulation",
                "8bit",
                "ema",
            ],
            inputs=settings_inputs(OptimizerSettings),
            outputs=[
                OptimizerSettingsType.Output(
                    "optimizer", display_name="optimizer", tooltip="For the optimizer input of a Train node."
                )
            ],
        )

    @classmethod
    def execute(cls, **widgets):
        return io.NodeOutput(settings_from_widgets(OptimizerSettings, widgets))


class NoiseAndLoss(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardNoiseAndLoss",
            display_name="Noise and Loss Settings",
            category=f"{CATEGORY}/settings",
            description="Sets how often each noise level is trained, how the noise is made, and how errors count.",
            search_aliases=[
                "min snr",
                "timestep sampling",
                "logit normal",
                "flux shift",
                "timestep range",
                "loss weighting",
                "huber",
                "noise offset",
                "multires noise",
                "pyramid noise",
                "debiased",
                "p2",
                "input perturbation",
                "distilled",
                "turbo",
                "schnell",
                "lightning",
                "training adapter",
                "assistant lora",
                "few steps",
                "wan 2.2 experts",
                "high noise low noise",
            ],
            inputs=[
                *settings_inputs(NoiseSettings),
                LoraModelType.Input(
                    "assistant",
                    optional=True,
                    tooltip="Train LoRA on a few-step model: a LoRA (training adapter, de-distillation LoRA) that is "
                    "at work while yours is trained. Your file does not contain it, and samples are drawn without it.",
                ),
                io.Combo.Input(
                    "expert",
                    options=list(EXPERT_RANGES),
                    default=WHOLE_RANGE,
                    optional=True,
                    tooltip="For models of two experts, such as Wan 2.2 14B: trains only the noise levels that this "
                    "one draws, in place of min_time and max_time. Each expert gets a LoRA of its own.",
                ),
            ],
            outputs=[
                NoiseSettingsType.Output("noise", display_name="noise", tooltip="For the noise input of a Train node.")
            ],
        )

    @classmethod
    def execute(cls, assistant=None, expert=WHOLE_RANGE, **widgets):
        noise = keep_to_expert(settings_from_widgets(NoiseSettings, widgets), expert)
        return io.NodeOutput(noise if assistant is None else NoiseWithAssistant(noise, as_lora_file(assistant)))


def keep_to_expert(settings: NoiseSettings, expert: str) -> NoiseSettings:
    """The settings with the range of noise levels of one expert."""
    if expert == WHOLE_RANGE:
        return settings
    if expert not in EXPERT_RANGES:
        raise ValueError(f"expert is {expert!r}; choose one of {', '.join(EXPERT_RANGES)}.")
    if (settings.min_time, settings.max_time) != EXPERT_RANGES[WHOLE_RANGE]:
        raise ValueError(
            f"expert is {expert!r}, and the range is also set by hand: min_time {settings.min_time:g}, max_time "
            f"{settings.max_time:g}. Put these back to 0 and 1, or choose {WHOLE_RANGE!r}."
        )
    low, high = EXPERT_RANGES[expert]
    return dataclasses.replace(settings, min_time=low, max_time=high)


class Points(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardPoints",
            display_name="Point Settings",
            category=f"{CATEGORY}/settings",
            description="Sets the latents that LECO and text sliders train on: rollouts of the model, noised "
            "images, or pure noise.",
            search_aliases=["rollout", "partial denoising", "on-policy", "leco speed", "ilecos", "max denoising steps"],
            inputs=settings_inputs(PointSettings),
            outputs=[
                PointSettingsType.Output(
                    "points", display_name="points", tooltip="For the points input of Train LECO and Train Text Slider."
                )
            ],
        )

    @classmethod
    def execute(cls, **widgets):
        return io.NodeOutput(settings_from_widgets(PointSettings, widgets))


NODES = [Adapter, Optimizer, NoiseAndLoss, Points]
