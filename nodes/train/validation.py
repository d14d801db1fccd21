"""The settings node for looking at a run while it trains: validation loss, best weights, early stop, samples."""

from __future__ import annotations

import contextlib
import dataclasses

from comfy_api.latest import io

from ...trainers.data.encoded import split_conditioning
from ...trainers.monitor.previews import PreviewSettings
from ...trainers.monitor.validation import ValidationSettings, Watch
from .. import host
from ..fields import CATEGORY, Encoded, inputs, record
from .previews import Previews, latent_shape

ValidationRecipe = io.Custom("TRAINYARD_VALIDATION")


@dataclasses.dataclass
class Looking:
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
        """([(text, conditioning)], (text, conditioning) of what is avoided or None) of what the user asked for; empty lists leave the choice
        to the run. Encodes texts, so it is to be asked before the model is loaded."""
        asked = [(f"positive {i + 1}", cond) for i, cond in enumerate(split_conditioning(self.positive or []))]
        away = ("", split_conditioning(self.negative)[0]) if self.negative else None
        if lines := self.previews.lines():
            encoder = host.encoders.TextEncoder(self.clip)
            try:
                with host.context.gradients():
                    *conds, last = encoder.encode([*lines, self.previews.negative_prompt])
            finally:
                encoder.free()
            asked = list(zip(lines, conds, strict=True)) + asked
            away = away or (self.previews.negative_prompt, last)
        return asked, away

    def check_for(self, job):
        """Raises ValueError when the held-out pictures cannot tell anything about this job."""
        if self.held_out is None or not self.settings.every:
            return
        job.check_held_out(self.held_out)
        host.checks.check_latents(job.model, self.held_out.channels)
        known = {item.path for item in job.data.items if item.path}
        if both := [item.path for item in self.held_out.items if item.path in known]:
            raise ValueError(f"{len(both)} of the {len(self.held_out)} held-out pictures are also trained on, for example {both[0]}: their loss would "
                             "tell nothing. Part the dataset with Split Dataset and encode both halves.")

    def check(self):
        """Raises ValueError for what cannot work, before any training."""
        if self.previews.preview_every and self.previews.lines() and self.clip is None:
            raise ValueError("Prompts are written in Validation and Previews, and no CLIP is connected to it. Connect CLIP, or empty the prompts: "
                             "the samples then show captions of the dataset.")


class Validation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardValidation",
            display_name="Validation and Previews",
            category=f"{CATEGORY}/settings",
            description="Look at a run while it trains: validation loss at fixed noise, the best weights, early stop, and sample pictures with the "
            "live adapter. Looking never changes the training.",
            search_aliases=["held out loss", "test set", "sample images", "early stopping", "best checkpoint", "overfitting", "tensorboard"],
            inputs=[
                *inputs(ValidationSettings),
                *inputs(PreviewSettings),
                io.Combo.Input("sampler", options=list(host.sampling.SAMPLERS), default="euler", advanced=True, tooltip="As in KSampler; euler is fine."),
                io.Combo.Input("scheduler", options=list(host.sampling.SCHEDULERS), default="normal", advanced=True, tooltip="As in KSampler; normal is fine."),
                Encoded.Input("held_out", optional=True, tooltip="Encoded pictures that are not trained on. Without it, fixed training pictures are measured."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the samples. Without it they are shown roughly, from their latents."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts that are written here."),
                io.Conditioning.Input("positive", optional=True, tooltip="Your own conditioning to draw samples of, each row one sample."),
                io.Conditioning.Input("negative", optional=True, tooltip="What guidance avoids in the samples."),
            ],
            outputs=[ValidationRecipe.Output("validation", display_name="validation", tooltip="For the validation input of a Train node.")],
        )

    @classmethod
    def execute(cls, sampler, scheduler, held_out=None, vae=None, clip=None, positive=None, negative=None, **widgets):
        for name, value, options in (("sampler", sampler, host.sampling.SAMPLERS), ("scheduler", scheduler, host.sampling.SCHEDULERS)):
            if value not in options:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(options)}.")
        looking = Looking(record(ValidationSettings, widgets), record(PreviewSettings, widgets), sampler, scheduler, held_out, vae, clip, positive, negative)
        looking.check()
        return io.NodeOutput(looking)


# -- at work -----------------------------------------------------------------------------------------------------------------------


def watching(job, session, method) -> Watch:
    """What a job asked to be looked at, over the model that is loaded for training."""
    looking, s = job.looking, job.looking.settings
    own, exam = getattr(job, "data", None), lambda data, count: job.exam(session, method, data, count) if s.every and count else None
    found = {"validation": exam(looking.held_out, s.images) if looking.held_out else None, "training": exam(own, s.images)}
    draw = samples(job, session)
    return Watch(
        s, {name: one for name, one in found.items() if one}, exam(own, s.name_worst) if job.names_worst else None, draw and draw.draw,
        looking.previews.preview_every, tick=host.progress.interrupted, say=lambda text: say(job, text), notice=lambda kind, entry: notice(job, kind, entry),
    )  # fmt: skip


def say(job, text: str):
    host.progress.interrupted()
    if text != job.live.text:
        host.progress.show(text, job.node_id)
    job.live.say(text)


def notice(job, kind: str, entry: dict):
    job.live.notice(kind, entry)
    if kind == "trouble":
        host.progress.show(entry["text"], job.node_id)
        host.progress.warn(entry["text"])
    if job.board:
        job.board.notice(kind, entry)


def samples(job, session) -> Previews | None:
    """What draws the samples of a job, or None when none are asked for."""
    looking = job.looking
    if not looking.previews.preview_every:
        return None
    prompts, away = looking.asked
    more, other = ([], None) if prompts else job.sample_prompts()
    shape = latent_shape(job.model, looking.previews, getattr(job, "data", None), job.side())
    return Previews(session, looking.previews, [*prompts, *more], away or other, shape, job.store.samples_folder, vae=looking.vae,
                    sampler=looking.sampler, scheduler=looking.scheduler, memory=job.memory) if prompts or more else None  # fmt: skip


@contextlib.contextmanager
def board_of(job):
    """The TensorBoard writer of a job while it runs, or None."""
    if not (job.looking and job.looking.settings.tensorboard):
        yield None
        return
    from ...trainers.monitor.tensorboard import board_in

    done = len(state["losses"]) if (state := job.store.load()) else 0
    job.board = board_in(job.store.folder / "tensorboard", done)
    try:
        yield job.board
    finally:
        job.board.close()


NODES = [Validation]
