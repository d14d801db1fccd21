"""The settings node for looking at a run while it trains: validation loss, best weights, early stop, samples."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ...trainers.data.caption_variants import TRIGGER_PLACEHOLDER, fill_trigger, has_trigger_placeholder
from ...trainers.data.encoded import split_conditioning
from ...trainers.monitor.previews import PreviewSettings
from ...trainers.monitor.validation import ValidationMonitor, ValidationSettings
from .. import host
from ..fields import CATEGORY, EncodedType, settings_from_widgets, settings_inputs
from .previews import PreviewRenderer, SamplePrompt, preview_latent_shape, show_images

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

    def encode_prompts(self, data=None) -> tuple[list[SamplePrompt], SamplePrompt | None]:
        """(samples, what they avoid or None) that the user asked for; empty lists leave the choice to the run.
        `data`: the dataset whose trigger stands for [trigger], and whose control images are shown. Encodes texts, so it
        is to be called before the model is loaded."""
        if not self.previews.preview_every:
            return [], None
        prompts = [
            SamplePrompt(f"positive {i + 1}", cond) for i, cond in enumerate(split_conditioning(self.positive or []))
        ]
        negative = SamplePrompt("", split_conditioning(self.negative)[0]) if self.negative else None
        trigger = data.trigger if data else ""
        if lines := self.previews.lines(trigger):
            avoided = fill_trigger(self.previews.negative_prompt, trigger)
            if data and data.image_reader:
                return [*self.encode_beside_images(lines, avoided, data), *prompts], negative
            conds = host.encoders.encode_prompts_once(self.clip, list(dict.fromkeys([*lines, avoided])))
            prompts = [SamplePrompt(line, conds[line], prompt=line) for line in lines] + prompts
            negative = negative or SamplePrompt(avoided, conds[avoided], prompt=avoided)
        return prompts, negative

    def encode_beside_images(self, lines: list[str], avoided: str, data) -> list[SamplePrompt]:
        """Samples of prompts that the text encoder reads beside control images, as it read the captions; the images are
        those that `show_images` gives to the same samples."""
        items = [item for item in data.items if item.controls]
        shown = [items[number % len(items)].open_controls() for number in range(len(lines))]
        texts = [
            pair for line, images in zip(lines, shown, strict=True) for pair in ((line, images), (avoided, images))
        ]
        conds = host.encoders.encode_prompts_with_images(self.clip, data.image_reader, texts)
        return [
            SamplePrompt(line, cond, prompt=line, avoided=other)
            for line, cond, other in zip(lines, conds[::2], conds[1::2], strict=True)
        ]

    def check_job(self, job):
        """Raises ValueError when the held-out images cannot tell anything about this job, and for prompts that cannot
        be drawn."""
        if self.previews.preview_every and self.previews.lines():
            self.check_prompts(job.task.data.trigger if job.task.data else "")
        if self.held_out is None or not self.settings.every:
            return
        job.task.check_held_out(self.held_out)
        host.checks.check_latent_channels(job.model, self.held_out.channels)
        known = {item.path for item in job.task.data.items if item.path}
        if both := [item.path for item in self.held_out.items if item.path in known]:
            raise ValueError(
                f"{len(both)} of the {len(self.held_out)} held-out images are also trained on, for example "
                f"{both[0]}: their loss would not show overfitting. Split the dataset with Split Dataset and encode "
                "both halves."
            )

    def check_prompts(self, trigger: str):
        texts = [*self.previews.lines(), self.previews.negative_prompt]
        if not trigger and any(map(has_trigger_placeholder, texts)):
            raise ValueError(
                f"The prompts of Validation and Previews say {TRIGGER_PLACEHOLDER}, and this run has no trigger. Write "
                "the word into trigger of Encode Dataset, or write the prompts without it."
            )
        host.encoders.check_clip(self.clip)
        host.checks.check_text_lengths(self.clip, [fill_trigger(text, trigger) for text in texts])

    def check_settings(self):
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
        config = MonitorConfig(
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
        config.check_settings()
        return io.NodeOutput(config)


# -- at work -----------------------------------------------------------------------------------------------------------


def make_validation_monitor(job, session, built, attempt) -> ValidationMonitor:
    """What Validation and Previews asked for, over the model that is loaded for training."""
    config, settings, trained = job.monitoring, job.monitoring.settings, job.task.data

    def make_loss(data, count: int):
        return built.validation_loss(data, count) if settings.every and count else None

    losses = {
        "validation": make_loss(config.held_out, settings.images) if config.held_out else None,
        "training": make_loss(trained, settings.images),
    }
    renderer = make_preview_renderer(job, session, attempt)
    return ValidationMonitor(
        settings,
        {name: loss for name, loss in losses.items() if loss},
        make_loss(trained, settings.name_worst) if built.can_name_worst else None,
        renderer and renderer.write_sample_sheet,
        config.previews.preview_every,
        check_interrupt=host.progress.raise_if_interrupted,
        show_status=attempt.display.show_status,
        on_event=attempt.display.add_event,
    )


def make_preview_renderer(job, session, attempt) -> PreviewRenderer | None:
    """What draws the samples of a run, or None when none are asked for."""
    config = job.monitoring
    if not config.previews.preview_every:
        return None
    prompts, negative = attempt.samples
    own, own_negative = ([], None) if prompts else job.task.default_sample_prompts(job, attempt.prompts)
    if not (prompts or own):
        return None
    if not host.checks.makes_images(job.model):
        attempt.display.show_note(
            f"no samples: {host.conditions.model_name(job.model.model)} makes no images, and Validation and Previews "
            "draws nothing else yet. Losses are measured"
        )
        return None
    shape = preview_latent_shape(job.model, config.previews, job.task.data, job.task.default_resolution())
    return PreviewRenderer(
        session,
        config.previews,
        show_images([*prompts, *own], job.task.data, job.model.model, shape),
        negative or own_negative,
        shape,
        attempt.folder.samples_folder,
        vae=config.vae,
        sampler=config.sampler,
        scheduler=config.scheduler,
    )


NODES = [Validation]
