"""Optional settings nodes: what the Train nodes leave out."""

from comfy_api.latest import io

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
            ],
            inputs=[
                *settings_inputs(NoiseSettings),
                LoraModelType.Input(
                    "assistant",
                    optional=True,
                    tooltip="Train LoRA on a few-step model: a LoRA (training adapter, de-distillation LoRA) that is "
                    "at work while yours is trained. Your file does not contain it, and samples are drawn without it.",
                ),
            ],
            outputs=[
                NoiseSettingsType.Output("noise", display_name="noise", tooltip="For the noise input of a Train node.")
            ],
        )

    @classmethod
    def execute(cls, assistant=None, **widgets):
        noise = settings_from_widgets(NoiseSettings, widgets)
        return io.NodeOutput(noise if assistant is None else NoiseWithAssistant(noise, as_lora_file(assistant)))


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
