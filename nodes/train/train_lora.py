"""The Train LoRA node."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ...trainers.data.encoded import EncodedDataset
from ...trainers.files import LoraFile, as_lora_file, tensor_hash
from ...trainers.methods.prior import PriorData
from ...trainers.monitor.validation import ImageValidationLoss, pick_validation_images
from ...trainers.rng import make_generator
from ...trainers.settings import AdapterSettings, OptimizerSettings, RunSettings
from .. import host
from ..fields import (
    CATEGORY,
    EncodedType,
    LoraModelType,
    LossMapType,
    graph_metadata,
    settings_from_widgets,
    settings_inputs,
)
from . import planner
from .job import (
    BuiltMethod,
    TrainingJob,
    TrainTask,
    dataset_metadata_fields,
    largest_latent_shape,
    split_assistant,
    unwrap_list_input,
)
from .prior import PriorType
from .settings_nodes import AdapterSettingsType, NoiseSettingsType, OptimizerSettingsType
from .validation import ValidationSettingsType

if TYPE_CHECKING:
    from ...trainers.methods.few_step import FewStepPlan
    from ...trainers.methods.lora import LoraTraining


class TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardTrainLora",
            display_name="Train LoRA (Trainyard)",
            category=CATEGORY,
            description="Trains a LoRA on the loaded model. It can be stopped and resumes where it was; pressing "
            "Run again on an unchanged graph does not train again.",
            search_aliases=["lora training", "finetune", "dreambooth", "locon", "train"],
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to train on. It is not changed; the LoRA is a separate output."
                ),
                EncodedType.Input(
                    "encoded",
                    optional=True,
                    tooltip="From Encode Dataset. Or connect latents and conditioning below instead.",
                ),
                *settings_inputs(RunSettings, only=("steps", "learning_rate")),
                *settings_inputs(AdapterSettings, only=("rank",)),
                *settings_inputs(RunSettings, only=("batch", "seed", "save_every")),
                io.String.Input(
                    "run_name",
                    default="my_lora",
                    tooltip="Name of the run's folder in output/loras/trainyard. The same name and settings "
                    "continue that run.",
                ),
                planner.checkpointing_input(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only to train the text encoder too (turn that on in Adapter Settings).",
                ),
                AdapterSettingsType.Input(
                    "adapter", optional=True, tooltip="From Adapter Settings. Not connected: the defaults."
                ),
                OptimizerSettingsType.Input(
                    "optimizer", optional=True, tooltip="From Optimizer Settings. Not connected: the defaults."
                ),
                NoiseSettingsType.Input(
                    "noise",
                    optional=True,
                    tooltip="From Noise and Loss Settings. Not connected: the family's own recipe.",
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="LATENT list of ComfyUI's Make Training Dataset, instead of encoded.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="CONDITIONING list of ComfyUI's Make Training Dataset, instead of encoded.",
                ),
                LoraModelType.Input(
                    "start_from",
                    optional=True,
                    tooltip="A LoRA to continue training, with another dataset or recipe. Its algorithm, rank and"
                    " layers must match.",
                ),
                PriorType.Input(
                    "prior", optional=True, tooltip="From Prior Preservation: what the model must not forget."
                ),
                ValidationSettingsType.Input(
                    "validation",
                    optional=True,
                    tooltip="From Validation and Previews: loss on held-out images, samples, early stopping.",
                ),
                planner.retry_cheaper_input(),
                planner.compile_blocks_input(),
            ],
            outputs=[
                LoraModelType.Output(
                    "lora",
                    display_name="lora",
                    tooltip="For Save LoRA, Apply LoRA, and ComfyUI's own LORA_MODEL nodes.",
                ),
                LossMapType.Output("losses", display_name="losses", tooltip="One number per step, for Loss Plot."),
                io.Model.Output("model", display_name="model", tooltip="The model with the LoRA at strength 1."),
                io.Int.Output("steps", display_name="steps", tooltip="The number of completed optimizer steps."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        run_name,
        checkpointing,
        encoded=None,
        clip=None,
        adapter=None,
        optimizer=None,
        noise=None,
        latents=None,
        conditioning=None,
        start_from=None,
        prior=None,
        validation=None,
        retry_cheaper=(False,),
        compile_blocks=(False,),
        **widgets,
    ):
        from ...trainers.runs import check_run_name
        from .run import run_training

        values = {k: v[0] for k, v in widgets.items()}
        noise, assistant = split_assistant(unwrap_list_input(noise))
        job = TrainingJob(
            task=LoraTask(
                data=select_training_data(encoded, latents, conditioning),
                start_from=None if unwrap_list_input(start_from) is None else as_lora_file(start_from[0]),
                prior=unwrap_list_input(prior),
            ),
            model=model[0],
            clip=unwrap_list_input(clip),
            run=settings_from_widgets(RunSettings, values),
            adapter=dataclasses.replace(unwrap_list_input(adapter) or AdapterSettings(), rank=values["rank"]),
            optimizing=unwrap_list_input(optimizer) or OptimizerSettings(),
            noise=noise,
            assistant=assistant,
            name=check_run_name(run_name[0]),
            checkpointing=checkpointing[0],
            retry_cheaper=unwrap_list_input(retry_cheaper),
            compile_blocks=unwrap_list_input(compile_blocks),
            graph=graph_metadata(cls.hidden),
            node_id=cls.hidden.unique_id,
            monitoring=unwrap_list_input(validation),
        )
        result = run_training(job)
        host.progress.show_node_text(result.line.split(";")[0], job.node_id)  # the chart tells all of it
        patched, _ = host.lora_keys.apply_lora(job.model, None, result.lora)
        return io.NodeOutput(
            result.lora, {"loss": result.losses}, patched, result.lora.steps, ui=ui.PreviewText(result.line)
        )


def select_training_data(encoded, latents, conditioning) -> EncodedDataset:
    if encoded and (latents or conditioning):
        raise ValueError(
            "Both encoded and latents/conditioning are connected. Connect one of them, so that it is clear what is "
            "trained."
        )
    if encoded:
        return encoded[0]
    if not latents or not conditioning:
        raise ValueError(
            "There is nothing to train on. Connect encoded (from Encode Dataset), or both latents and conditioning."
        )
    return EncodedDataset.from_core(latents, conditioning)


def check_references(model, data: EncodedDataset) -> None:
    """ValueError for control images that this model would not look at."""
    number = next((number for number, item in enumerate(data.items) if item.controls), None)
    if number is None:
        return
    batch = dataclasses.replace(data, dropout=0.0).make_batch([number], make_generator(0))
    if not host.denoiser.takes_references(model.model, batch.conds[0], batch.x0.shape[1:]):
        raise ValueError(
            f"The dataset has control images, and {type(model.model.model_config).__name__} takes none: it is no edit "
            "model, and would be trained as if they were not there. Load an edit model (Flux Kontext, Flux.2, "
            "Qwen-Image-Edit, InstructPix2Pix ...), or load the dataset without them."
        )


def check_clips(model, data: EncodedDataset) -> None:
    """ValueError for clips that this model does not make, and for first frames that it would not look at."""
    name = type(model.model.model_config).__name__
    clips = [item for item in data.items if len(item.shape) == 4 and item.shape[1] > 1]
    if clips and not host.families.makes_video(model):
        raise ValueError(
            f"The dataset has {len(clips)} clips, and {name} makes single images. Load a video model with its VAE, or "
            "set frames to 1 in Cut Clips."
        )
    number = next((number for number, item in enumerate(data.items) if item.first), None)
    if number is None:
        return
    batch = dataclasses.replace(data, dropout=0.0).make_batch([number], make_generator(0))
    if not host.denoiser.joins_first_frame(model.model, batch.conds[0], batch.x0.shape[1:]):
        raise ValueError(
            f"The dataset has first frames, and {name} takes none: it makes clips from text, and would be trained as "
            "if they were not there. Load an image-to-video model, or set first_frame to 'none' in Encode Dataset."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTask(TrainTask):
    """Train LoRA: images with captions."""

    data: EncodedDataset
    start_from: LoraFile | None = None
    prior: PriorData | None = None
    version = "lora 1"

    def check(self, job):
        self.data.require_conditionings()
        host.checks.check_latent_channels(job.model, self.data.channels)
        if self.prior is not None and self.prior.data is not None:
            host.checks.check_latent_channels(job.model, self.prior.data.channels)
        check_references(job.model, self.data)
        self.check_few_steps(job)
        check_clips(job.model, self.data)
        if job.noise.pyramid_levels and len(self.data.items[0].shape) < 3:
            raise ValueError(
                "Multi-resolution noise is for images, and these latents have no height and width. Set pyramid_levels "
                "to 0 in Noise and Loss Settings."
            )
        if job.adapter.text_encoder and job.clip is not None:
            self.check_captions_known()
            self.check_captions_alone()

    def few_step_plan(self, job) -> FewStepPlan:
        """What the settings ask for. Their default gives way to an assistant, which does the same another way, and
        where nobody encoded the empty caption."""
        from ...trainers.methods.few_step import FewStepPlan, plan_few_steps

        plan = plan_few_steps(job.noise, host.families.find_patcher_family(job.model).few_steps)
        idle = job.assistant is not None or self.data.empty_key is None
        return FewStepPlan() if plan.by_family and idle else plan

    def check_few_steps(self, job):
        from ...trainers.methods.few_step import check_empty_caption

        plan = self.few_step_plan(job)
        if plan.drift and job.assistant is not None:
            raise ValueError(
                f"distilled is {job.noise.distilled!r}, and an assistant is connected to Noise and Loss Settings: with "
                "it the model has no few-step trajectories of its own to hold on to. Disconnect it, or set distilled "
                "to plain."
            )
        if not plan.is_plain:
            check_empty_caption(self.data)
            if self.prior is not None and self.prior.data is not None:
                check_empty_caption(self.prior.data)

    def check_conditions(self, job):
        held_out = job.monitoring.held_out if job.monitoring and job.monitoring.settings.every else None
        if self.prior is not None and self.prior.conds:
            host.conditions.check_text_is_enough(job.model)
        for data in (self.data, self.prior and self.prior.data, held_out):
            if data is not None:
                host.conditions.check_holes(job.model, data)
                host.conditions.check_conditions(job.model, data.named_conds())

    def check_captions_known(self):
        """The text encoder reads captions in every step. Raises ValueError where only conditionings are there."""
        prior = [] if self.prior is None or self.prior.data is None else self.prior.data.items
        if not all(item.path for item in [*self.data.items, *prior]):
            raise ValueError(
                "text_encoder is on, and the images come as latents and conditioning, without the captions that a "
                "text encoder is trained with. Connect encoded, from Encode Dataset, or switch text_encoder off in "
                "Adapter Settings."
            )

    def check_captions_alone(self):
        """Raises ValueError where captions were read beside images, which a text encoder in training is not shown."""
        for data in (self.data, self.prior and self.prior.data):
            if data and data.image_reader:
                raise ValueError(
                    f"text_encoder is on, and the captions were encoded beside control images ({data.image_reader}). "
                    "While a text encoder is trained, it reads captions alone. Switch text_encoder off in Adapter "
                    "Settings."
                )

    def fingerprint_parts(self, job):
        start = () if self.start_from is None else ("start", tensor_hash(self.start_from))
        prior = () if self.prior is None else ("prior", *self.prior.fingerprint_parts())
        plan = self.few_step_plan(job)
        few_step = (dataclasses.astuple(plan),) if plan.by_family else ()  # others are told apart by the settings
        return (self.data.fingerprint, *start, *prior, *few_step)

    def metadata_fields(self):
        return dataset_metadata_fields(self.data)

    def largest_shape(self, job):
        return largest_latent_shape(self.data)

    def build(self, job, session, prompts):
        from ...trainers.methods.lora import LoraTraining

        if self.start_from is not None:
            host.session.load_lora_into_session(session, self.start_from)
        return BuiltLora(
            job,
            session,
            LoraTraining(
                session.denoiser,
                session.adapters,
                self.data,
                job.noise,
                session.family.density,
                job.run.batch,
                session.text_adapters,
                session.encode_captions,
                self.prior,
                self.few_step_plan(job),
            ),
        )


@dataclasses.dataclass
class BuiltLora(BuiltMethod):
    job: TrainingJob
    session: object
    method: LoraTraining
    student = None

    def notes(self):
        assisted = [] if self.job.assistant is None else ["trained with an assistant, which the file does not contain"]
        return [self.method.few_step.describe(), *assisted]

    def validation_loss(self, data, count):
        from ...trainers.methods.few_step import check_empty_caption

        if self.method.few_step.contrast != 1:
            check_empty_caption(data)
        return ImageValidationLoss(
            self.session.denoiser,
            data,
            pick_validation_images(data, count),
            self.method.density,
            self.job.noise,
            self.job.monitoring.settings.levels,
            self.job.run.batch,
            self.session.encode_captions,
            self.method,
        )


NODES = [TrainLora]
