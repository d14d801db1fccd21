"""The Transfer LoRA node: a LoRA of one MODEL becomes one of a sibling, without images."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io

from ...trainers.data.caption_variants import CaptionSettings, expand_caption
from ...trainers.files import LoraFile, as_lora_file, read_safetensors, tensor_hash, write_safetensors
from ...trainers.methods.prompts import PromptDifferenceTraining, TargetProgress
from ...trainers.methods.rollouts import StudentTeacherModel
from ...trainers.monitor.reached import ReachedMonitor
from ...trainers.settings import SOURCE_TRAJECTORY, Settings, TransferSettings, text_field
from .. import host
from ..fields import CATEGORY, LoraModelType, settings_from_widgets, settings_inputs
from .job import CALIBRATE_OFF, BuiltMethod, TrainingJob, TrainTask, hash_clip
from .leco import REACHED_METADATA_KEY, EndSettings
from .previews import SamplePrompt
from .widgets import (
    HIDDEN_INPUTS,
    check_unused_noise_settings,
    make_appended_inputs,
    make_job,
    make_run_inputs,
    make_settings_inputs,
    make_training_outputs,
    run_difference_node,
)

if TYPE_CHECKING:
    from ...trainers.methods.rollouts import LatentPoint

POINTS_FILE = "transfer_points.safetensors"
MAX_PROMPTS = 64
IDLE_NOISE = (
    "weighting",
    "loss",
    "noise_offset",
    "pyramid_levels",
    "perturbation",
    "distilled",
    "min_time",
    "max_time",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferWords(Settings):
    """What the LoRA is asked for while it is moved."""

    prompts: str = text_field(
        "",
        "What the LoRA is used for, one prompt per line, with its trigger word: a photo of sks dog {on grass|indoors}. "
        "{a|b} stands for both. A line without the trigger holds what must not change.",
        multiline=True,
    )

    def lines(self) -> list[str]:
        """Every prompt once. Raises ValueError for none, and for more than are sensible."""
        every = CaptionSettings(wildcards=True, variants=MAX_PROMPTS)
        lines = [line.strip() for line in self.prompts.splitlines() if line.strip()]
        rng = torch.Generator().manual_seed(0)
        found = list(dict.fromkeys(text for line in lines for text in expand_caption(line, every, rng)))
        if not found:
            raise ValueError(
                "prompts is empty, and a LoRA does nothing without its words. Write what it is used for, one prompt "
                "per line, with its trigger word."
            )
        if len(found) > MAX_PROMPTS:
            raise ValueError(f"prompts stands for {len(found)} texts and {MAX_PROMPTS} is the most. Use fewer choices.")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferTask(TrainTask):
    """Transfer LoRA: what is learnt is the change that a LoRA makes in another model."""

    source: object  # MODEL that the LoRA was trained on, without it
    lora: LoraFile
    words: TransferWords
    settings: TransferSettings
    end: EndSettings = EndSettings()
    start_from: LoraFile | None = None
    points: tuple[LatentPoint, ...] | None = None  # with goals; None before `prepare`
    data = None
    version = "transfer 1"

    def check(self, job):
        host.encoders.check_clip(job.clip)
        check_unused_noise_settings(job.noise, "goals are predictions of the models", idle=IDLE_NOISE)
        check_siblings(self.source, job.model)
        check_whole_lora(self.source, self.lora)
        host.checks.check_prompt_lengths(job.clip, self.words.lines())

    def check_conditions(self, job):
        for model in (self.source, job.model):
            host.conditions.check_text_is_enough(model)

    def fingerprint_parts(self, job):
        start = () if self.start_from is None else ("start", tensor_hash(self.start_from))
        source = host.identity.hash_model_and_schedule(self.source)
        return source, tensor_hash(self.lora), self.words, self.settings, hash_clip(job.clip), *start

    def settings_records(self):
        return self.words, self.settings, self.end

    def ending_rules(self):
        return {"stop_at": self.end.stop_at} if self.end.stop_at else {}

    def metadata_fields(self):
        side = str(self.settings.resolution)
        return dict(resolution="x".join([side, side]), dataset={"images": 0, "dropout": 0.0})

    def largest_shape(self, job):
        return host.checks.square_latent_shapes(job.model, self.settings.resolution)[0]

    def default_resolution(self):
        return self.settings.resolution

    def check_held_out(self, data):
        raise ValueError(
            "held_out is connected, and a LoRA is moved without images: there is no image loss to measure. Disconnect "
            "it; how far the LoRA has come is reported anyway."
        )

    def encode_prompts(self, job):
        return host.encoders.encode_prompts_once(job.clip, list(dict.fromkeys([*self.words.lines(), ""])))

    def default_sample_prompts(self, job, prompts):
        shown = self.words.lines()[:2]
        return [SamplePrompt(text, prompts[text]) for text in shown], SamplePrompt("", prompts[""])

    def gradient_check_inputs(self, job, session, prompts):
        x0 = session.denoiser.model_space(host.checks.random_latent(self.largest_shape(job)))
        return x0, [next(iter(prompts.values()))]

    def tasks(self, job):
        from ...trainers.methods.transfer import make_transfer_tasks

        return make_transfer_tasks(self.words.lines(), self.largest_shape(job), max(1, job.run.batch))

    def prepare(self, job, prompts, folder, show):
        from ...trainers.methods.transfer import points_from_tensors, points_to_tensors

        path, tasks = folder / POINTS_FILE, self.tasks(job)
        try:
            points = points_from_tensors(read_safetensors(path)[0], tasks)
        except (OSError, ValueError, KeyError) as error:
            if path.exists():
                logging.warning("Trainyard: %s cannot be read (%s); it is made again.", path, error)
            points = self.make_points(job, tasks, prompts, show)
            write_safetensors(path, points_to_tensors(points, tasks))
        return dataclasses.replace(self, points=tuple(points))

    def make_points(self, job, tasks, prompts, show) -> list[LatentPoint]:
        """Latents with goals. One model is loaded after the other, so that two need not fit beside each other."""
        from ...trainers.methods.transfer import predict_at_points, sample_transfer_points, with_goals

        settings, schedule = self.settings, host.session.read_schedule(job.model)
        changed, _ = host.lora_keys.apply_lora(self.source, None, self.lora)
        driver = changed if settings.trajectory == SOURCE_TRAJECTORY else job.model
        tick = lambda text: lambda: show(f"before the training: {text}")
        with host.session.open_frozen_model(driver, prompts) as model:
            guidance = settings.source_guidance if driver is changed else 1.0
            points = sample_transfer_points(
                model, schedule, tasks, settings, guidance, job.run.seed, tick("sampling trajectories")
            )

        def ask(asked, guidance, what):
            with host.session.open_frozen_model(asked, prompts) as model:
                return predict_at_points(model, points, tasks, guidance, tick(f"asking {what}"))

        after = ask(changed, settings.source_guidance, "the source with its LoRA")
        before = ask(self.source, settings.source_guidance, "the source without it")
        return with_goals(points, tasks, before, after, ask(job.model, 1.0, "the target"))

    def build(self, job, session, prompts):
        from ...trainers.methods.transfer import TransferPoints

        if self.start_from is not None:
            host.session.load_lora_into_session(session, self.start_from)
        student = StudentTeacherModel(session.denoiser, session.adapters, prompts)
        points = TransferPoints(student, list(self.points or ()))
        method = PromptDifferenceTraining(student, self.tasks(job), points, progress=TargetProgress())
        return BuiltTransfer(job, session, method, student)


@dataclasses.dataclass
class BuiltTransfer(BuiltMethod):
    job: TrainingJob
    session: object
    method: PromptDifferenceTraining
    student: StudentTeacherModel
    reached_monitor: ReachedMonitor | None = None
    can_name_worst = False

    def make_monitor(self, validation):
        self.reached_monitor = ReachedMonitor(self.method.progress, self.job.task.end.stop_at, validation)
        return self.reached_monitor

    def extra_metadata(self, with_curve):
        reached = self.reached_monitor and self.reached_monitor.reached
        return {} if reached is None else {REACHED_METADATA_KEY: f"{reached:.3f}"}

    def planned_forwards(self):
        return {"student": float(self.job.run.batch * self.job.optimizing.accumulate)}


def check_siblings(source, target) -> None:
    """ValueError for two models whose latents or noise are of different kinds."""
    if source.model.latent_format.latent_channels != target.model.latent_format.latent_channels or type(
        source.model.latent_format
    ) is not type(target.model.latent_format):
        names = [type(model.model.latent_format).__name__ for model in (source, target)]
        raise ValueError(
            f"source has latents of kind {names[0]} and model of kind {names[1]}: a LoRA can move between models that "
            "share a VAE, such as a base and its Turbo. Load siblings."
        )
    flows = [host.families.is_flow(model.get_model_object("model_sampling")) for model in (source, target)]
    if flows[0] != flows[1]:
        raise ValueError(
            "One of source and model is a flow model and the other is not, so that their noise levels cannot be "
            "compared. Load siblings of one kind."
        )


def check_whole_lora(source, lora) -> None:
    """ValueError for a LoRA of which the source would not use everything."""
    if left_out := host.lora_keys.find_unloadable_layers(source, None, lora):
        raise ValueError(host.lora_keys.describe_left_out_layers(None, lora, left_out) + (
            " Transfer LoRA moves what a LoRA does to the diffusion model. Connect the source that it was trained on."
        ))  # fmt: skip


class TransferLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        run = [one for one in make_run_inputs(200, 5e-4, 16, default="my_transfer") if one.id != "calibrate"]
        return io.Schema(
            node_id="TrainyardTransferLora",
            display_name="Transfer LoRA",
            category=CATEGORY,
            description="Moves a LoRA from the model it was trained on to a sibling, such as a base model's to its "
            "Turbo or to a fine-tune, without images: the new LoRA learns to change the model as the old one did.",
            search_aliases=[
                "convert lora",
                "port lora",
                "turbo lora",
                "base to turbo",
                "distilled lora",
                "migrate lora",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The target: the model that gets the new LoRA. It is not changed."),
                io.Model.Input("source", tooltip="The model that the LoRA was trained on, without the LoRA."),
                LoraModelType.Input("lora", tooltip="The LoRA to move, from Load LoRA File or a Train node."),
                io.Clip.Input(
                    "clip", tooltip="The text encoder, which both models share; it encodes the prompts once."
                ),
                *settings_inputs(TransferWords),
                *run,
                *settings_inputs(TransferSettings),
                *make_settings_inputs(points=False),
                *make_appended_inputs(),
                *settings_inputs(EndSettings, optional=True),
                LoraModelType.Input(
                    "start_from",
                    optional=True,
                    tooltip="A LoRA of the target to begin with, such as the old one itself. Its algorithm, rank and "
                    "layers must match.",
                ),
            ],
            outputs=make_training_outputs(),
            hidden=HIDDEN_INPUTS,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        source,
        lora,
        clip,
        adapter=None,
        optimizer=None,
        noise=None,
        validation=None,
        start_from=None,
        **widgets,
    ):
        task = TransferTask(
            source=source,
            lora=as_lora_file(lora),
            words=settings_from_widgets(TransferWords, widgets),
            settings=settings_from_widgets(TransferSettings, widgets),
            end=settings_from_widgets(EndSettings, widgets),
            start_from=None if start_from is None else as_lora_file(start_from),
        )
        widgets["calibrate"] = CALIBRATE_OFF
        job = make_job(cls, task, model, widgets, adapter, optimizer, noise, validation, clip=clip, both_ways=False)
        return run_difference_node(job)


NODES = [TransferLora]
