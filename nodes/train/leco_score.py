"""LECO-score: a LoRA that is pulled up a score model, and the prompts it is trained on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ...trainers.data.encoded import EncodedDataset
from ...trainers.data.signed_prompts import (
    SignedPrompt,
    read_signed_prompt_file,
    read_signed_prompts,
    sample_signed_prompts,
)
from ...trainers.methods.leco_score import (
    ORIGINAL_LECO_SCORE,
    SCORE_TARGETS,
    LecoScoreSettings,
    LecoScoreTraining,
    NoisedImageStates,
    build_score_tasks,
    check_target_scorers,
    is_text_scorer,
    list_score_texts,
    make_rollout_states,
)
from ...trainers.methods.rollouts import StudentTeacherModel, sample_latent_noise
from ...trainers.monitor.strength_curve import StrengthCurve, measure_strength_curve, sample_from_noise
from ...trainers.rng import make_generator
from ...trainers.scores.networks import LATENT_BACKBONES, ScorerEnsemble, check_trained_head
from ...trainers.settings import Settings, number_field
from .. import host, paths
from ..fields import (
    CATEGORY,
    EncodedType,
    LoraModelType,
    LossMapType,
    ScoreModelType,
    settings_from_widgets,
    settings_inputs,
)
from . import planner
from .job import (
    BuiltMethod,
    TrainingJob,
    TrainTask,
    hash_clip,
    largest_latent_shape,
    unwrap_list_input,
)
from .previews import SamplePrompt
from .widgets import (
    HIDDEN_INPUTS,
    make_job,
    make_run_inputs,
    make_settings_inputs,
    make_validation_input,
)

if TYPE_CHECKING:
    from ...trainers.monitor.score_monitor import ScoreMonitor
    from .run import TrainingResult

SignedPromptsType = io.Custom("TRAINYARD_SIGNED_PROMPTS")  # tuple of trainers.data.signed_prompts.SignedPrompt
LecoScoreSettingsType = io.Custom("TRAINYARD_LECO_SCORE")
ScoreMixType = io.Custom("TRAINYARD_SCORE_MIX")  # tuple of (ScoreModel, weight)

ORIGINAL_RECIPE = "original recipe"
MONITOR_METADATA_KEY = "trainyard.watch"  # key of the metadata: what was seen, for a person
SCORE_UNIT = "standard deviations of the ratings"
SCORE_CURVE_STRENGTHS, SLIDER_CURVE_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5), (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
PREVIEW_IMAGES_PER_PROMPT, PREVIEW_SAMPLING_STEPS, MAX_PREVIEW_PROMPTS = 4, 8, 2  # each time samples are scored


# -- prompts -----------------------------------------------------------------------------------------------------------


class LoadSignedPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadSignedPrompts",
            display_name="Load Signed Prompts",
            category=CATEGORY,
            description="Loads prompts with a direction for Train LECO-Score: 1 raises the score of their images,"
            " -1 lowers it, 0 keeps them unchanged.",
            search_aliases=["partiprompts", "prompt list", "reward prompts", "weighted prompts", "score prompts"],
            is_input_list=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=paths.NamesOnDisk(
                        choice
                        for choice in paths.list_prompt_files()
                        if choice == paths.NO_PROMPT_FILE or Path(choice).suffix.lower() in (".txt", ".csv", ".tsv")
                    ),
                    tooltip="A .txt, .csv or .tsv file in ComfyUI's input or datasets folder, or the text below. Press "
                    "R after adding one.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="Used if no file is chosen: one prompt per line, or weight | prompt | negative. A "
                    "list of texts may be connected.",
                ),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Uses this many of the prompts, drawn with seed. 0 uses all. (0 to 100000 prompts)",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    advanced=True,
                    tooltip="Determines which prompts are drawn if count is not 0. (0 to 9223372036854775807)",
                ),
            ],
            outputs=[
                SignedPromptsType.Output(
                    "prompts", display_name="prompts", tooltip="For the prompts input of Train LECO-Score."
                ),
                io.String.Output("about", display_name="about", tooltip="Every prompt as it was parsed."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        choice = unwrap_list_input(file) if isinstance(file, list) else file
        return paths.file_change_stamp(paths.resolve_prompt_file(choice)) if choice != paths.NO_PROMPT_FILE else ""

    @classmethod
    def execute(cls, file, text, count, seed):
        rows = (
            read_signed_prompts("\n".join(text))
            if unwrap_list_input(file) == paths.NO_PROMPT_FILE
            else read_signed_prompt_file(paths.resolve_prompt_file(unwrap_list_input(file)))
        )
        rows = sample_signed_prompts(rows, unwrap_list_input(count), unwrap_list_input(seed))
        return io.NodeOutput(rows, "\n".join(map(format_signed_prompt, rows)))


def format_signed_prompt(row: SignedPrompt) -> str:
    direction = {1.0: "better", -1.0: "worse", 0.0: "kept"}[row.sign]
    return f"{direction} ({row.weight:g}): {row.prompt}" + (f" | negative {row.negative}" if row.negative else "")


# -- settings ----------------------------------------------------------------------------------------------------------


class ScoreMixer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardScoreMix",
            display_name="Score Mix",
            category=CATEGORY,
            description="Adds a score model with a weight, for Train LECO-Score. Chain several; the score model "
            "on the Train node itself has weight 1.",
            search_aliases=["several rewards", "combine score models", "reward mix", "weighted rewards"],
            inputs=[
                ScoreModelType.Input("score_model", tooltip="From Load Score Model or Train Score Model."),
                io.Float.Input(
                    "weight",
                    default=0.5,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Weight of this score relative to the others; below 0 the score is lowered. (-100 to 100)",
                ),
                ScoreMixType.Input("more_scores", optional=True, tooltip="From another Score Mix."),
            ],
            outputs=[
                ScoreMixType.Output(
                    "more_scores",
                    display_name="more_scores",
                    tooltip="For more_scores of Train LECO-Score or of another Score Mix.",
                )
            ],
        )

    @classmethod
    def execute(cls, score_model, weight, more_scores=()):
        return io.NodeOutput((*(more_scores or ()), (score_model, weight)))


class LecoScoreOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLecoScoreSettings",
            display_name="LECO-Score Settings",
            category=f"{CATEGORY}/settings",
            description="Sets the anchor, step range, slider mode, caps and monitoring of Train LECO-Score. "
            "Without it the defaults apply.",
            search_aliases=["anchor", "kl", "reward hacking", "early stop", "srpo", "step range"],
            inputs=[*settings_inputs(LecoScoreSettings, without=("target",)), *settings_inputs(WatchSettings)],
            outputs=[
                LecoScoreSettingsType.Output(
                    "settings", display_name="settings", tooltip="For the settings input of Train LECO-Score."
                )
            ],
        )

    @classmethod
    def execute(cls, **widgets):
        return io.NodeOutput(
            (settings_from_widgets(LecoScoreSettings, widgets), settings_from_widgets(WatchSettings, widgets))
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchSettings(Settings):
    """How a run is looked at."""

    watch_every: int = number_field(
        50, 1, 1_000_000, "Test images are sampled and scored every this many steps.", unit="optimizer steps"
    )
    patience: int = number_field(
        2,
        1,
        1000,
        "With a held-out score model: stop after this many measurements in a row below its best while the trained"
        " score rises.",
        unit="looks",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorePlace(Settings):
    resolution: int = number_field(
        512,
        16,
        8192,
        "The size to sample and score. Best is the size that the score model was trained on.",
        unit="px",
        step=8,
    )


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class LecoScoreTask(TrainTask):
    """LECO-score: prompts whose images are to be scored higher, lower, or left as they are."""

    prompts: tuple[SignedPrompt, ...]
    scores: tuple[tuple[ScorerEnsemble, float], ...]  # (score model, weight)
    held_out: ScorerEnsemble | None
    settings: LecoScoreSettings
    monitor_settings: WatchSettings
    place: ScorePlace
    data: EncodedDataset | None = None
    version = "leco score 1"

    def list_scores(self) -> list[tuple[ScorerEnsemble, float]]:
        """All score models with their weights; the held-out one has none."""
        return [*self.scores, *([(self.held_out, 0.0)] if self.held_out else [])]

    def check(self, job):
        self.check_data(job)
        for score, _ in self.list_scores():
            check_score_model(score, job.model)
        check_target_scorers(self.scores, self.settings)
        host.encoders.check_clip(job.clip)
        host.checks.check_prompt_lengths(job.clip, self.list_texts())
        self.score_tasks(job)

    def check_data(self, job):
        own = self.settings.target == "direct_align"
        if own and self.data is None:
            raise ValueError(
                "target is 'direct_align', which trains on your own images, and none are connected. Connect "
                "encoded, or choose another target."
            )
        if not own and self.data is not None:
            raise ValueError(
                f"An encoded dataset is connected, and target is {self.settings.target!r}, which needs none. Choose "
                "'direct_align', or disconnect it."
            )
        if self.data is not None:
            host.checks.check_latent_channels(job.model, self.data.channels)
            self.data.require_conditionings()
        if not self.prompts:
            raise ValueError(
                "There are no prompts. Write one a line into prompts_text, or connect Load Signed Prompts"
                + (": they are sampled for monitoring during the run." if own else ".")
            )

    def score_tasks(self, job):
        return build_score_tasks(self.prompts, self.latent_shapes(job), job.run.batch, self.settings)

    def latent_shapes(self, job):
        return host.checks.square_latent_shapes(job.model, self.place.resolution)

    def list_texts(self) -> list[str]:
        return list(dict.fromkeys(["", *(text for row in self.prompts for text in (row.prompt, row.negative))]))

    def fingerprint_parts(self, job):
        from ...trainers.scores.files import score_model_identity

        judges = [(score_model_identity(score), score.info.to_dict(), weight) for score, weight in self.list_scores()]
        rows = [dataclasses.asdict(row) for row in self.prompts]
        images = self.data.fingerprint if self.data else ""
        return rows, judges, self.settings, self.monitor_settings, self.place, hash_clip(job.clip), images

    def settings_records(self):
        return self.settings, self.monitor_settings, self.place

    def metadata_fields(self):
        return dict(
            resolution="x".join([str(self.place.resolution)] * 2),
            dataset={"images": len(self.data or ()), "dropout": 0.0},
        )

    def largest_shape(self, job):
        return largest_latent_shape(self.data) if self.data else self.latent_shapes(job)[0]

    def extra_memory(self, job):
        """Score models that decode have a VAE and a CLIP_VISION there all the time."""
        extractors = {
            id(extractor): extractor
            for score, _ in self.list_scores()
            for network in score.networks
            if hasattr(extractor := unwrap_feature_extractor(network), "gradient_memory")
        }
        shape = (job.run.batch, *self.largest_shape(job))
        return float(sum(extractor.gradient_memory(shape) for extractor in extractors.values()))

    def default_resolution(self):
        return self.place.resolution

    def check_held_out(self, data):
        raise ValueError(
            "Images are connected to held_out of Validation and Previews, and LECO-Score has no image loss. "
            "Disconnect them; a second score model on held_out of Train LECO-Score measures whether images improve."
        )

    def encode_prompts(self, job):
        captions = [text for item in self.data.items for text in item.captions] if self.data else []
        for score, _ in self.list_scores():
            if is_text_scorer(score):
                score.encode_prompts(
                    list_score_texts(self.settings, ["", *(row.prompt for row in self.prompts), *captions])
                )
        return host.encoders.encode_prompts_once(job.clip, self.list_texts())

    def preview_prompts(self) -> list[str]:
        """The prompts that samples are scored on: those that are to become better come first."""
        return [row.prompt for row in sorted(self.prompts, key=lambda row: -row.sign)[:MAX_PREVIEW_PROMPTS]]

    def negative_prompts(self) -> dict[str, str]:
        return {row.prompt: row.negative for row in self.prompts}

    def default_sample_prompts(self, job, prompts):
        prompt = self.preview_prompts()[0]
        negative = self.negative_prompts()[prompt]
        return [SamplePrompt(prompt or "without a prompt", prompts[prompt])], SamplePrompt(negative, prompts[negative])

    def gradient_check_inputs(self, job, session, prompts):
        x0 = session.denoiser.model_space(host.checks.random_latent(self.latent_shapes(job)[0]))
        return x0, [next(iter(prompts.values()))]

    def build(self, job, session, prompts):
        student = StudentTeacherModel(session.denoiser, session.adapters, prompts)
        scores = [(copy_score_for_training(score, session), weight) for score, weight in self.scores]
        held_out = self.held_out and copy_score_for_training(self.held_out, session)
        guidance = host.session.rollout_guidance(session, self.settings.guidance_scale)
        states = (
            NoisedImageStates(student, self.data, self.settings, job.run.batch)
            if self.data
            else make_rollout_states(student, self.score_tasks(job), self.settings, guidance)
        )
        method = LecoScoreTraining(student, scores, states, self.settings)
        return BuiltLecoScore(job, method, student, held_out, guidance)


def check_score_model(score: ScorerEnsemble, model):
    """ValueError for a score model that cannot be followed on this MODEL."""
    from ...trainers.scores.files import check_score_latent_format
    from ..scores import latents

    check_trained_head(score.info)
    if not score.networks:
        raise ValueError(
            "This score model scores images, but LECO-Score needs scores of latents. Connect model and vae to the "
            "node it comes from."
        )
    check_score_latent_format(score.info, latents.latent_format_name(model), model.model.latent_format.latent_channels)
    if not score.info.trained:
        raise ValueError(
            f"This score model ({score.info.backbone}) is not better than chance: there is nothing to optimise. "
            "Give it more ratings in Train Score Model."
        )


@dataclasses.dataclass
class BuiltLecoScore(BuiltMethod):
    job: TrainingJob
    method: LecoScoreTraining
    student: StudentTeacherModel
    held_out: ScorerEnsemble | None
    guidance: float  # classifier-free, of rollouts and samples
    score_monitor: ScoreMonitor | None = None
    held_out_curve: StrengthCurve | None = None

    def make_monitor(self, validation):
        from ...trainers.monitor.score_monitor import ScoreAndValidationMonitor, ScoreMonitor

        task = self.job.task
        every, patience = task.monitor_settings.watch_every, task.monitor_settings.patience
        self.score_monitor = ScoreMonitor(
            self.method, self.make_preview_sampler(), task.preview_prompts(), self.held_out, every, patience
        )
        return ScoreAndValidationMonitor(self.score_monitor, validation) if validation else self.score_monitor

    def make_preview_sampler(self):
        """draw(prompt, strength) from fixed noise, in batches no larger than a step's."""
        job, negative = self.job, self.job.task.negative_prompts()
        shape = (PREVIEW_IMAGES_PER_PROMPT, *job.task.latent_shapes(job)[0])
        noise = sample_latent_noise(shape, self.student.denoiser, make_generator(job.run.seed))
        # Samples are no cost of the training.
        uncounted = dataclasses.replace(self.student, forward_counts=dict(self.student.forward_counts))

        def draw(prompt, strength):
            host.progress.raise_if_interrupted()
            return torch.cat(
                [
                    sample_from_noise(
                        uncounted, prompt, negative[prompt], part, strength, PREVIEW_SAMPLING_STEPS, self.guidance
                    )
                    for part in noise.split(job.run.batch)
                ]
            )

        return draw

    def measure_curve(self):
        """The trained score over the strength, and the held-out one beside it."""
        from ...trainers.monitor.score_monitor import score_latents

        draw, prompt = functools.cache(self.make_preview_sampler()), self.job.task.preview_prompts()[0]
        strengths = SLIDER_CURVE_STRENGTHS if self.job.task.settings.slider else SCORE_CURVE_STRENGTHS

        def curve_of(scores):
            effect = lambda x0: score_latents(self.method.denoiser, scores, x0, prompt)
            return measure_strength_curve(draw, prompt, effect, strengths=strengths, unit=SCORE_UNIT)

        self.held_out_curve = curve_of([(self.held_out, 1.0)]) if self.held_out else None
        return curve_of(self.method.scores)

    def ends_early(self):
        return self.score_monitor is not None and self.score_monitor.should_stop

    def extra_metadata(self, with_curve):
        found = {}
        if self.score_monitor.measurements:
            measurements = [dataclasses.asdict(one) for one in self.score_monitor.measurements]
            found["trainyard.looks"] = json.dumps(measurements)
            found[MONITOR_METADATA_KEY] = self.score_monitor.format_report()
        if with_curve and self.held_out_curve:
            found["trainyard.curve.held_out"] = self.held_out_curve.to_json()
        return found


def load_preview_latents(job: TrainingJob, result: TrainingResult) -> torch.Tensor:
    """(B, C, ..., h, w) as the host's LATENT, in the order of the run; also of a run that was only read."""
    from ...trainers.monitor.score_monitor import ScoreMonitor

    if result.built is None:
        monitor = ScoreMonitor(None, None, ())
        monitor.load_state(result.folder.read_state()["watch"])
    else:
        monitor = result.built.score_monitor
    return job.model.model.process_latent_out(monitor.preview_strip())


def unwrap_feature_extractor(network):
    """What a network looks with, under what remembers for it."""
    look = getattr(getattr(network, "trunk", network), "extract", None)
    return getattr(look, "extract", look)


def copy_score_for_training(score: ScorerEnsemble, session) -> ScorerEnsemble:
    """A score model whose networks autograd can run, on the device of the training; the one that is given stays as it
    is. One that looks through the very MODEL in training sees it as it was, and an aesthetic head has nothing of its
    own to copy."""
    own = score.info.backbone in LATENT_BACKBONES
    apart = lambda network: (
        copy.deepcopy(network)
        if own
        else copy_bypassing_adapters(network, session.adapters)
        if hasattr(network, "trunk")
        else network
    )
    made = copy.copy(score)
    made.networks = [apart(network) for network in score.networks]
    for network in made.networks:
        host.context.replace_inference_parameters(network)
        network.eval().requires_grad_(False)
    return made.to(session.denoiser.device)


def copy_bypassing_adapters(network, adapters):
    """The network with a trunk of its own that looks past these adapters; all weights are shared."""
    made, trunk = copy.copy(network), copy.copy(network.trunk)
    made._modules = {**network._modules, "trunk": trunk}
    trunk.exclude_adapters(adapters)
    return made


class TrainLecoScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardTrainLecoScore",
            display_name="Train LECO-Score",
            category=CATEGORY,
            description="Trains a LoRA that raises the score of a score model, with prompts alone: no images and "
            "no captions are needed.",
            search_aliases=["reward finetuning", "aesthetic lora", "draft", "refl", "rlhf", "alignprop", "srpo"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to train on. It is not changed; the LoRA is a separate output."
                ),
                io.Clip.Input(
                    "clip", tooltip="The text encoder of the model; it encodes the prompts once and leaves the GPU."
                ),
                ScoreModelType.Input(
                    "score_model", tooltip="The score model to train for; it must read this model's latents."
                ),
                io.String.Input(
                    "prompts_text",
                    default="",
                    multiline=True,
                    tooltip="One prompt per line, or weight | prompt | negative. Weight 1 raises the score, -1 "
                    "lowers it, 0 keeps images unchanged.",
                ),
                io.Combo.Input(
                    "target",
                    options=[*SCORE_TARGETS, ORIGINAL_RECIPE],
                    default=SCORE_TARGETS[0],
                    tooltip="What the score model sees of each scored step. 'original recipe' is the first "
                    "published LECO-Score: no anchor, a score model of clean latents, settings ignored.",
                ),
                *settings_inputs(ScorePlace),
                *make_run_inputs(300, 1e-4, 8, default="my_score_lora"),
                SignedPromptsType.Input(
                    "prompts", optional=True, tooltip="From Load Signed Prompts, instead of prompts_text."
                ),
                ScoreMixType.Input(
                    "more_scores",
                    optional=True,
                    tooltip="From Score Mix: further score models with weights; score_model has weight 1.",
                ),
                ScoreModelType.Input(
                    "held_out",
                    optional=True,
                    tooltip="A second score model that is not trained on. The run ends if it falls while "
                    "score_model rises.",
                ),
                EncodedType.Input(
                    "encoded",
                    optional=True,
                    tooltip="From Encode Dataset: your own images, for the target 'direct_align'.",
                ),
                LecoScoreSettingsType.Input(
                    "settings", optional=True, tooltip="From LECO-Score Settings. Not connected: the defaults."
                ),
                *[recipe for recipe in make_settings_inputs(points=False) if recipe.id != "noise"],
                planner.retry_cheaper_input(),
                planner.compile_blocks_input(),
                make_validation_input(),
            ],
            outputs=[
                LoraModelType.Output(
                    "lora",
                    display_name="lora",
                    tooltip="For Save LoRA, Apply LoRA, Strength Sweep and ComfyUI's own LORA_MODEL nodes.",
                ),
                LossMapType.Output("losses", display_name="losses", tooltip="One number per step, for Loss Plot."),
                io.Model.Output("model", display_name="model", tooltip="The model with the LoRA at strength 1."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Score, held-out score, drift and diversity over the run, and over the strength.",
                ),
                io.Latent.Output(
                    "previews",
                    display_name="previews",
                    tooltip="The same images over the run, for VAE Decode.",
                ),
            ],
            hidden=HIDDEN_INPUTS,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        score_model,
        prompts_text,
        target,
        prompts=None,
        more_scores=None,
        held_out=None,
        encoded=None,
        settings=None,
        adapter=None,
        optimizer=None,
        validation=None,
        **widgets,
    ):
        chosen, monitor_settings = settings or (LecoScoreSettings(), WatchSettings())
        chosen = ORIGINAL_LECO_SCORE if target == ORIGINAL_RECIPE else dataclasses.replace(chosen, target=target)
        task = LecoScoreTask(
            prompts=select_signed_prompts(prompts, prompts_text),
            scores=((score_model, 1.0), *(more_scores or ())),
            held_out=held_out,
            data=encoded,
            settings=chosen,
            monitor_settings=monitor_settings,
            place=settings_from_widgets(ScorePlace, widgets),
        )
        records = (adapter, optimizer, None, validation)
        return run_leco_score_node(make_job(cls, task, model, widgets, *records, clip=clip, both_ways=chosen.slider))


def select_signed_prompts(prompts, text: str) -> tuple[SignedPrompt, ...]:
    """The prompts of the socket or of the widget. ValueError when both are there, for one would be trained on by
    nobody."""
    if prompts and text.strip():
        raise ValueError(
            f"prompts_text holds {text.strip().splitlines()[0]!r}, and prompts are connected too. Clear prompts_text, "
            "or disconnect prompts."
        )
    return tuple(prompts) if prompts else read_signed_prompts(text) if text.strip() else ()


def run_leco_score_node(job: TrainingJob) -> io.NodeOutput:
    from .run import format_forward_counts, run_training

    result = run_training(job)
    curve = json.loads(result.lora.metadata.get("trainyard.curve", "null"))
    parts = (
        f"{result.line}{format_forward_counts(result, job.run.steps)}",
        result.lora.metadata.get(MONITOR_METADATA_KEY, ""),
        format_score_curve(curve),
    )
    report = "\n".join(part for part in parts if part)
    host.progress.show_node_text(result.line, job.node_id)
    patched, _ = host.lora_keys.apply_lora(job.model, None, result.lora)
    previews = {"samples": load_preview_latents(job, result)}
    return io.NodeOutput(result.lora, {"loss": result.losses}, patched, report, previews, ui=ui.PreviewText(report))


def format_score_curve(curve: dict | None) -> str:
    if curve is None:
        return ""
    points = ", ".join(
        f"{effect:+.2f} at {strength:g} (drift {drift:.2f})"
        for strength, effect, drift in zip(curve["strengths"], curve["effect"], curve["drift"], strict=True)
    )
    return f"score by strength, in {curve['unit']}: {points}"


NODES = [LoadSignedPrompts, ScoreMixer, LecoScoreOptions, TrainLecoScore]
