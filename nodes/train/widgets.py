"""Widgets, outputs and the job that Train nodes without a text encoder share: sliders, LECO, differences."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io, ui

from ...trainers.methods.rollouts import sample_latent_noise
from ...trainers.monitor.strength_curve import sample_from_noise
from ...trainers.rng import make_generator
from ...trainers.settings import (
    DORA,
    AdapterSettings,
    NoiseSettings,
    OptimizerSettings,
    RunSettings,
    Settings,
    number_field,
)
from .. import host
from ..fields import LoraModelType, LossMapType, graph_metadata, settings_from_widgets, settings_inputs
from . import planner
from .job import CALIBRATE_AFTER, CALIBRATE_MODES, TrainingJob, split_assistant
from .settings_nodes import AdapterSettingsType, NoiseSettingsType, OptimizerSettingsType, PointSettingsType
from .validation import ValidationSettingsType


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceSettings(Settings):
    """Where the rows are trained that do not say it themselves."""

    resolution: int = number_field(
        512,
        16,
        8192,
        "The size at which points are made; below the model's own size is cheaper and often enough.",
        unit="px",
        step=8,
        advanced=True,
    )
    preserve_weight: float = number_field(
        1.0, 0.0, 100.0, "How often preserved prompts are trained, relative to their row.", advanced=True
    )


def make_run_inputs(steps, learning_rate, rank, shown=("seed",), **more):
    """steps, learning rate and rank with a method's own defaults, then the rest of the run. Published presets add up to
    a learning rate * alpha / rank * steps of 0.05 for sliders (ai-toolkit, Concept Sliders) and of 0.001 to 0.01 for
    ADDifT; too weak can be rescaled."""
    defaults = dict(steps=steps, learning_rate=learning_rate, rank=rank)
    widgets = [
        *settings_inputs(RunSettings, only=("steps", "learning_rate")),
        *settings_inputs(AdapterSettings, only=("rank",)),
    ]
    for widget in widgets:
        widget.default = defaults[widget.id]
    rest = settings_inputs(RunSettings, only=("batch", "seed", "save_every"))
    for widget in rest:
        widget.advanced = None if widget.id in shown else True
    return [
        *widgets,
        io.String.Input(
            "run_name",
            tooltip="Name of the run's folder in output/loras/trainyard. The same name and settings continue that run.",
            **more,
        ),
        *rest,
        planner.checkpointing_input(advanced=True),
        io.Combo.Input(
            "calibrate",
            options=list(CALIBRATE_MODES),
            default=CALIBRATE_AFTER,
            advanced=True,
            tooltip="Draw small samples at strengths -2 to 2 and write the curve of effect and drift into the "
            "file and the report.",
        ),
    ]


def make_settings_inputs(points: bool):
    return [
        AdapterSettingsType.Input(
            "adapter", optional=True, tooltip="From Adapter Settings. Not connected: the defaults."
        ),
        OptimizerSettingsType.Input(
            "optimizer", optional=True, tooltip="From Optimizer Settings. Not connected: the defaults."
        ),
        NoiseSettingsType.Input(
            "noise", optional=True, tooltip="From Noise and Loss Settings: which noise levels to train."
        ),
        *(
            [PointSettingsType.Input("points", optional=True, tooltip="From Point Settings. Not connected: rollouts.")]
            if points
            else []
        ),
    ]


def make_validation_input():
    return ValidationSettingsType.Input(
        "validation",
        optional=True,
        tooltip="From Validation and Previews: validation loss at fixed points, best weights, early stopping, samples.",
    )


def make_training_outputs():
    return [
        LoraModelType.Output(
            "lora",
            display_name="lora",
            tooltip="For Save LoRA, Apply LoRA, Strength Sweep and ComfyUI's own LORA_MODEL nodes.",
        ),
        LossMapType.Output("losses", display_name="losses", tooltip="One number per step, for Loss Plot."),
        io.Model.Output("model", display_name="model", tooltip="The model with the LoRA at strength 1."),
        io.String.Output("report", display_name="report", tooltip="A summary, with planned and actual forward passes."),
    ]


HIDDEN_INPUTS = [io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo]


def make_job(cls, task, model, widgets, adapter, optimizer, noise, validation=None, *, clip=None, both_ways=True):
    """The job of a node with these inputs. both_ways: the adapter is also trained, or meant to be used, at strengths
    below 0."""
    from ...trainers.runs import check_run_name

    noise, assistant = split_assistant(noise)
    if assistant is not None:
        raise ValueError(
            "assistant is connected to Noise and Loss Settings, and only Train LoRA can use one: this node learns from "
            "the model's own predictions, which an assistant would change. Disconnect it."
        )
    adapter = dataclasses.replace(adapter or AdapterSettings(), rank=widgets["rank"])
    return TrainingJob(
        task=task,
        model=model,
        clip=clip,
        run=settings_from_widgets(RunSettings, widgets),
        adapter=check_difference_adapter(adapter, both_ways),
        optimizing=optimizer or OptimizerSettings(),
        noise=noise,
        name=check_run_name(widgets["run_name"]),
        checkpointing=widgets["checkpointing"],
        retry_cheaper=widgets.get("retry_cheaper", False),
        compile_blocks=widgets.get("compile_blocks", False),
        calibrate=widgets["calibrate"],
        graph=graph_metadata(cls.hidden),
        node_id=cls.hidden.unique_id,
        monitoring=validation,
    )


def check_difference_adapter(adapter: AdapterSettings, both_ways: bool = True) -> AdapterSettings:
    """The adapter, when its effect at -1 is the opposite of that at +1 (where that is needed) and the frozen model is
    found at 0. ValueError otherwise."""
    if adapter.text_encoder:
        raise ValueError(
            "text_encoder is on: the frozen text encoder encodes the prompts only once. Switch it off in Adapter "
            "Settings."
        )
    if both_ways and adapter.algorithm == DORA:
        raise ValueError(
            "algorithm is DoRA, whose effect at -1 is not the opposite of that at +1: it also trains the magnitude "
            "of every row. Choose LoRA, LoHa or LoKr in Adapter Settings for sliders, LECO and differences."
        )
    return adapter


def check_unused_noise_settings(
    noise: NoiseSettings, why, idle=("weighting", "loss", "noise_offset", "pyramid_levels", "perturbation", "distilled")
):
    """ValueError for noise settings that would do nothing here."""
    for f in dataclasses.fields(noise):
        if f.name in idle and (value := getattr(noise, f.name)) != f.default:
            raise ValueError(
                f"{f.name} is {value} in Noise and Loss Settings, and it does nothing here: {why}. Set it to "
                f"{f.default}."
            )


def run_difference_node(job: TrainingJob) -> io.NodeOutput:
    from .run import format_forward_counts, run_training

    result = run_training(job)
    line = f"{result.line}{format_forward_counts(result)}{f'; {result.curve.line()}' if result.curve else ''}"
    host.progress.show_node_text(line, job.node_id)
    patched, _ = host.lora_keys.apply_lora(job.model, None, result.lora)
    return io.NodeOutput(result.lora, {"loss": result.losses}, patched, line, ui=ui.PreviewText(line))


def make_curve_sampler(model, shape, unconditional, guidance, seed, images=2, steps=8):
    """draw(prompt, strength) for the curve: few small images from fixed noise."""
    noise = sample_latent_noise((images, *shape), model.denoiser, make_generator(seed))
    return lambda prompt, strength: sample_from_noise(model, prompt, unconditional, noise, strength, steps, guidance)


def make_appended_inputs():
    """Inputs that came after the first release: at the end."""
    return [make_validation_input(), planner.retry_cheaper_input(), planner.compile_blocks_input()]
