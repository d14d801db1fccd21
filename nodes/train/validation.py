"""The settings node for looking at a run while it trains: validation loss, best weights, early stop, samples."""

from __future__ import annotations

import contextlib
import dataclasses

from comfy_api.latest import io

from ...trainers.data.encoded import split_conditioning
from ...trainers.monitor.previews import PreviewSettings
from ...trainers.monitor.validation import ValidationMonitor, ValidationSettings
from .. import host
from ..fields import CATEGORY, EncodedType, settings_from_widgets, settings_inputs
from .previews import PreviewRenderer, preview_latent_shape

ValidationSettingsType = io.Custom("TRAINYARD_VALIDATION")


@dataclasses.dataclass
class MonitorConfig:
    """What Validation and Previews was given."""

    settings: ValidationSettings = ValidationSettings()
    previews: PreviewSettings = PreviewSettings(preview_every=0)
    sampler: str = "euler"
    scheduler: str = "normal"
    held_out: object = None  # Encoded
    vae: object = None
    clip: object = None
    positive: list | None = None
    negative: list | None = None
    asked: tuple = ((), None)  # what `encode` made of the prompts

    def encode(self):
        """Encode the prompts, before the model is loaded for training."""
        if self.previews.preview_every:
            self.asked = self.prompts()

    def prompts(self) -> tuple[list[tuple[str, dict]], tuple[str, dict] | None]:
        """([(text, conditioning)], (text, conditioning) of what is avoided or None) of what the user asked for; empty
        lists leave the choice to the run. Encodes texts, so it is to be asked before the model is loaded."""
        asked = [(f"positive {i + 1}", cond) for i, cond in enumerate(split_conditioning(self.positive or []))]
        away = ("", split_conditioning(self.negative)[0]) if self.negative else None
        if lines := self.previews.lines():
            encoder = host.encoders.TextEncoder(self.clip)
            try:
                with host.context.enable_gradients():
                    *conds, last = encoder.encode([*lines, self.previews.negative_prompt])
            finally:
                encoder.free()
            asked = list(zip(lines, conds, strict=True)) + asked
            away = away or (self.previews.negative_prompt, last)
        return asked, away

    def check_job(self, job):
        """Raises ValueError when the held-out pictures cannot tell anything about this job."""
        if self.held_out is None or not self.settings.every:
            return
        job.check_held_out(self.held_out)
        host.checks.check_latent_channels(job.model, self.held_out.channels)
        known = {item.path for item in job.data.items if item.path}
        if both := [item.path for item in self.held_out.items if item.path in known]:
            raise ValueError(
                f"{len(both)} of the {len(self.held_out)} held-out pictures are also trained on, for example "
                f"{both[0]}: their loss would tell nothing. Part the dataset with Split Dataset and encode both halves."
            )

    def check(self):
        """Raises ValueError for what cannot work, before any training."""
        if self.previews.preview_every and self.previews.lines() and self.clip is None:
            raise ValueError(
                "Prompts are written in Validation and Previews, and no CLIP is connected to it. Connect CLIP, or "
                "empty the prompts: the samples then show captions of the dataset."
            )


class Validation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardValidation",
            display_name="Validation and Previews",
            category=f"{CATEGORY}/settings",
            description="Monitors a run while it trains: validation loss at fixed noise, the best weights, early "
            "stopping, and samples with the current adapter. Measuring does not affect training.",
            search_aliases=[
                "held out loss",
                "test set",
                "sample images",
                "early stopping",
                "best checkpoint",
                "overfitting",
                "tensorboard",
            ],
            inputs=[
                *settings_inputs(ValidationSettings),
                *settings_inputs(PreviewSettings),
                io.Combo.Input(
                    "sampler",
                    options=list(host.sampling.SAMPLERS),
                    default="euler",
                    advanced=True,
                    tooltip="As in KSampler; euler is fine.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(host.sampling.SCHEDULERS),
                    default="normal",
                    advanced=True,
                    tooltip="As in KSampler; normal is fine.",
                ),
                EncodedType.Input(
                    "held_out",
                    optional=True,
                    tooltip="Encoded images that are not trained on. Without it, fixed training images are measured.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the samples. Without it, they are rough previews of their latents.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts of this node."),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Your own conditioning for the samples; each row gives one sample.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Negative conditioning for the samples."),
            ],
            outputs=[
                ValidationSettingsType.Output(
                    "validation", display_name="validation", tooltip="For the validation input of a Train node."
                )
            ],
        )

    @classmethod
    def execute(cls, sampler, scheduler, held_out=None, vae=None, clip=None, positive=None, negative=None, **widgets):
        for name, value, options in (
            ("sampler", sampler, host.sampling.SAMPLERS),
            ("scheduler", scheduler, host.sampling.SCHEDULERS),
        ):
            if value not in options:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(options)}.")
        looking = MonitorConfig(
            settings_from_widgets(ValidationSettings, widgets),
            settings_from_widgets(PreviewSettings, widgets),
            sampler,
            scheduler,
            held_out,
            vae,
            clip,
            positive,
            negative,
        )
        looking.check()
        return io.NodeOutput(looking)


# -- at work -----------------------------------------------------------------------------------------------------------


def make_validation_monitor(job, session, method) -> ValidationMonitor:
    """What a job asked to be looked at, over the model that is loaded for training."""
    looking, s = job.looking, job.looking.settings
    own, exam = (
        getattr(job, "data", None),
        lambda data, count: job.exam(session, method, data, count) if s.every and count else None,
    )
    found = {
        "validation": exam(looking.held_out, s.images) if looking.held_out else None,
        "training": exam(own, s.images),
    }
    draw = make_preview_renderer(job, session)
    return ValidationMonitor(
        s,
        {name: one for name, one in found.items() if one},
        exam(own, s.name_worst) if job.names_worst else None,
        draw and draw.draw,
        looking.previews.preview_every,
        check_interrupt=host.progress.raise_if_interrupted,
        say=lambda text: show_job_text(job, text),
        notice=lambda kind, entry: publish_monitor_event(job, kind, entry),
    )


def show_job_text(job, text: str):
    host.progress.raise_if_interrupted()
    if text != job.live.text:
        host.progress.show_node_text(text, job.node_id)
    job.live.say(text)


def publish_monitor_event(job, kind: str, entry: dict):
    job.live.notice(kind, entry)
    if kind == "trouble":
        host.progress.show_node_text(entry["text"], job.node_id)
        host.progress.log_warning(entry["text"])
    if job.board_writer:
        job.board_writer.notice(kind, entry)


def make_preview_renderer(job, session) -> PreviewRenderer | None:
    """What draws the samples of a job, or None when none are asked for."""
    looking = job.looking
    if not looking.previews.preview_every:
        return None
    prompts, away = looking.asked
    more, other = ([], None) if prompts else job.default_sample_prompts()
    shape = preview_latent_shape(job.model, looking.previews, getattr(job, "data", None), job.side())
    return (
        PreviewRenderer(
            session,
            looking.previews,
            [*prompts, *more],
            away or other,
            shape,
            job.store.samples_folder,
            vae=looking.vae,
            sampler=looking.sampler,
            scheduler=looking.scheduler,
            memory=job.memory,
        )
        if prompts or more
        else None
    )


@contextlib.contextmanager
def open_tensorboard(job):
    """The TensorBoard writer of a job while it runs, or None."""
    if not (job.looking and job.looking.settings.tensorboard):
        yield None
        return
    from ...trainers.monitor.tensorboard import create_tensorboard_log

    done = len(state["losses"]) if (state := job.store.load()) else 0
    job.board_writer = create_tensorboard_log(job.store.folder / "tensorboard", done)
    try:
        yield job.board_writer
    finally:
        job.board_writer.close()


NODES = [Validation]
