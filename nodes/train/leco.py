"""Sliders, LECO and differences: Train nodes that share one engine."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ...trainers.data.concept_prompts import PromptRow, split_prompt_list
from ...trainers.data.encoded import EncodedDataset as EncodedData
from ...trainers.diffusion import resolve_noise_density
from ...trainers.methods.prompts import PromptDifferenceTraining, build_prompt_tasks
from ...trainers.methods.rollouts import (
    ImagePoints,
    NoisePoints,
    RolloutPoints,
    StudentTeacherModel,
    count_planned_forwards,
)
from ...trainers.monitor import fixed_batches
from ...trainers.monitor.strength_curve import diffusion_classifier_score, measure_strength_curve, row_slider_axis
from ...trainers.monitor.validation import pick_validation_images
from ...trainers.settings import PointSettings, Settings, choice_field, number_field, text_field
from .. import host
from ..fields import CATEGORY, EncodedType, settings_from_widgets, settings_inputs
from .job import CALIBRATE_OFF, largest_latent_shape
from .prompts import PromptRowsType
from .widgets import (
    HIDDEN_INPUTS,
    DifferenceJob,
    PlaceSettings,
    check_unused_noise_settings,
    common_job_arguments,
    make_appended_inputs,
    make_curve_sampler,
    make_run_inputs,
    make_settings_inputs,
    make_training_outputs,
    run_difference_job,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LecoWords(Settings):
    """The prompts of Train LECO, when none are connected."""

    target: str = text_field("", "The concept to change, for example: red car.")
    action: str = choice_field(
        "erase",
        ("erase", "enhance", "replace"),
        "erase: away from the concept. enhance: toward it. replace: the target becomes `positive`.",
    )
    positive: str = text_field(
        "", "The concept to remove or add, or what the target becomes. Empty: the target itself."
    )
    guidance: float = number_field(
        1.0, 0.01, 100.0, "How far to move. 1 is the whole difference; enhance needs more than 1.", step=0.25
    )
    neutral: str = text_field(
        "", "Where the target moves when the concept is erased. Empty: the unconditional prompt.", advanced=True
    )
    unconditional: str = text_field(
        "",
        "The prompt that positive is compared with: only the difference between the two changes. Empty means "
        "anything; a prompt keeps what both share.",
        advanced=True,
    )
    preserve: str = text_field("", "Prompts that must not change, separated by semicolons or lines.", advanced=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliderWords(Settings):
    """The prompts of Train Text Slider, when none are connected."""

    target: str = text_field("", "What the slider applies to, for example: person.")
    positive: str = text_field("", "The end at +1, for example: old person.")
    negative: str = text_field("", "The end at -1, for example: young person.")
    guidance: float = number_field(2.0, 0.01, 100.0, "How far apart the two ends are; the paper uses 4.", step=0.25)
    attributes: str = text_field(
        "", "Put before every prompt in turn, so that the slider does not change them: male, female.", advanced=True
    )
    preserve: str = text_field("", "Prompts that must not change, separated by semicolons or lines.", advanced=True)


@dataclasses.dataclass(kw_only=True)
class PromptJob(DifferenceJob):
    """LECO, replacement and text sliders: what is moved is told by prompts."""

    rows: tuple[PromptRow, ...]
    slider: bool
    points: PointSettings
    place: PlaceSettings
    data: EncodedData | None = None
    kind = "difference 1"

    def check(self):
        if self.clip is None:
            raise ValueError(
                "CLIP is empty: this checkpoint holds no text encoder. Load one with a CLIP loader node and connect it."
            )
        if self.points.points == "pictures" and self.data is None:
            raise ValueError(
                "points is 'pictures', and no encoded dataset is connected. Connect encoded, or choose 'rollout' in "
                "Point Settings."
            )
        if self.points.points != "pictures" and self.data is not None:
            raise ValueError(
                f"An encoded dataset is connected, and points is {self.points.points!r}. Choose 'pictures' in Point "
                "Settings, or disconnect it."
            )
        if self.data is not None:
            host.checks.check_latent_channels(self.model, self.data.channels)
        check_unused_noise_settings(self.noise, "prompts teach by noise levels alone")
        host.checks.check_prompt_lengths(self.clip, self.texts())
        self.tasks()

    def tasks(self):
        """Each row with its own batch times the node's, which may be left open until the run begins."""
        rows = [dataclasses.replace(row, batch=row.batch * max(1, self.run.batch)) for row in self.rows]
        return build_prompt_tasks(rows, self.shapes, self.slider, self.place.preserve_weight)

    def texts(self) -> list[str]:
        asked = row_slider_axis(self.rows[0], self.slider).texts if self.calibrate != CALIBRATE_OFF else ()
        return list(dict.fromkeys([prompt for task in self.tasks() for prompt in task.texts] + list(asked)))

    def side(self):
        return self.place.resolution

    def shapes(self, row):
        return host.checks.square_latent_shapes(
            self.model, row.resolution or self.place.resolution, row.dynamic_resolution
        )

    def parts(self):
        rows = [dataclasses.asdict(row) for row in self.rows]
        encoder = host.identity.hash_patched_weights(self.clip.patcher, self.clip.layer_idx)
        return rows, self.slider, self.points, self.place, encoder, self.data.fingerprint if self.data else ""

    def records(self):
        return self.points, self.place

    def largest(self):
        shapes = [shape for task in self.tasks() for shape in task.shapes]
        return largest_latent_shape(self.data) if self.data else max(shapes, key=lambda shape: shape[-1] * shape[-2])

    def prepare(self):
        encoder = host.encoders.TextEncoder(self.clip)
        texts = self.texts()
        try:
            with host.context.enable_gradients():
                self.conds = dict(zip(texts, encoder.encode(texts), strict=True))
        finally:
            encoder.free()

    def method(self, session):
        tasks, self.guidance = self.tasks(), host.session.rollout_guidance(session, self.points.guidance_scale)
        self.student = StudentTeacherModel(session.denoiser, session.adapters, self.conds)
        return PromptDifferenceTraining(self.student, tasks, self.source(session, tasks), self.points.renormalise)

    names_worst = False

    def check_held_out(self, data):
        if self.data is None:
            raise ValueError(
                "held_out is connected, and this run learns from prompts alone: there is no loss of pictures to "
                "measure. Disconnect held_out; fixed points of the model's own are measured."
            )
        super().check_held_out(data)

    def exam(self, session, method, data, count):
        """At points of the frozen model's own, which stay the same whatever the student learns."""
        asked, levels = fixed_batches.with_separate_counts(method), self.looking.settings.levels
        about = [self.points, fixed_batches.strip_noise_weighting(self.noise), levels]
        if self.points.points == "pictures":
            picks, density = (
                pick_validation_images(data, count),
                resolve_noise_density(self.noise, session.family.density),
            )
            points = fixed_batches.points_on_images(
                session.denoiser, asked.tasks, data, density, self.noise, levels, picks
            )
            return fixed_batches.build_point_validation(
                asked, points, len(picks), self.run.batch, data.fingerprint, picks, *about
            )
        if self.points.points == "noise":
            points = fixed_batches.points_on_noise(session.denoiser, asked.tasks, self.noise, levels)
        else:
            points = fixed_batches.points_on_rollouts(
                asked.model, asked.tasks, self.points, self.noise, self.guidance, levels
            )
        return fixed_batches.build_point_validation(asked, points, count, self.run.batch, self.place, *about)

    def planned(self):
        updates = self.run.steps * self.optimizing.accumulate
        found = count_planned_forwards(self.points, self.tasks(), self.noise, self.guidance, updates, self.run.batch)
        return {what: count / self.run.steps for what, count in found.items()}

    def source(self, session, tasks):
        if self.points.points == "pictures":
            return ImagePoints(self.student, tasks, self.data, self.noise, session.family.density, self.run.batch)
        if self.points.points == "noise":
            return NoisePoints(self.student, tasks, self.noise)
        return RolloutPoints(self.student, tasks, self.points, self.noise, self.guidance)

    def probe(self, session):
        x0 = session.denoiser.model_space(host.checks.random_latent(self.tasks()[0].shapes[0]))
        return x0, [next(iter(self.conds.values()))]

    def default_sample_prompts(self):
        task = self.tasks()[0]
        return [(task.scene or "without a prompt", self.conds[task.scene])], (task.away, self.conds[task.away])

    def measured(self, session):
        """Along what the first row changes."""
        axis, shape = row_slider_axis(self.rows[0], self.slider), self.shapes(self.rows[0])[-1]
        asking = StudentTeacherModel(session.denoiser, session.adapters, self.conds)
        draw = make_curve_sampler(asking, shape, axis.unconditional, self.guidance, self.run.seed)
        effect = lambda x0: diffusion_classifier_score(asking, x0, axis.toward, axis.away)
        unit = "in the measure's own unit" if axis.reference is None else f"what {axis.reference!r} itself draws"
        return measure_strength_curve(
            draw, axis.scene, effect, reference=axis.reference, preserve=axis.preserve, unit=unit
        )

    def about(self):
        return dict(resolution="x".join([str(self.place.resolution)] * 2), dataset={"images": 0, "dropout": 0.0})


def make_prompt_node_schema(words, run_name: str, prompts_tip: str, **about):
    """Of a node that learns from prompts alone; both kinds differ in their words."""
    return io.Schema(
        category=CATEGORY,
        inputs=[
            io.Model.Input("model", tooltip="The model to train on. It is not changed; the LoRA is a separate output."),
            io.Clip.Input(
                "clip", tooltip="The text encoder of the model; it encodes the prompts once and leaves the GPU."
            ),
            *settings_inputs(words),
            *make_run_inputs(500, 2e-4, 4, shown=(), default=run_name),
            *settings_inputs(PlaceSettings),
            PromptRowsType.Input("prompts", optional=True, tooltip=prompts_tip),
            EncodedType.Input(
                "encoded", optional=True, tooltip="From Encode Dataset, if Point Settings use 'pictures'."
            ),
            *make_settings_inputs(points=True),
            *make_appended_inputs(),
        ],
        outputs=make_training_outputs(),
        hidden=HIDDEN_INPUTS,
        is_output_node=True,
        **about,
    )


def run_prompt_job(cls, model, clip, rows, slider, widgets, *, encoded, points, **recipes):
    return run_difference_job(
        cls,
        PromptJob(
            rows=rows,
            slider=slider,
            clip=clip,
            data=encoded,
            points=points or PointSettings(),
            place=settings_from_widgets(PlaceSettings, widgets),
            **common_job_arguments(cls, model, widgets, **recipes),
        ),
    )


class TrainLeco(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return make_prompt_node_schema(
            LecoWords,
            "my_leco",
            "From Load Prompts, instead of the prompts above; leave target empty.",
            node_id="TrainyardTrainLeco",
            display_name="Train LECO",
            description="Erases, enhances or replaces a concept with prompts alone, without images. At strength 1"
            " the LoRA has the effect, at -1 the opposite.",
            search_aliases=["erase concept", "concept erasing", "replace concept", "ileco", "unlearn"],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        prompts=None,
        encoded=None,
        adapter=None,
        optimizer=None,
        noise=None,
        points=None,
        validation=None,
        **widgets,
    ):
        words = settings_from_widgets(LecoWords, widgets)
        rows = select_prompt_rows(prompts, words.target) or (make_leco_row(words),)
        return run_prompt_job(
            cls,
            model,
            clip,
            rows,
            False,
            widgets,
            encoded=encoded,
            points=points,
            adapter=adapter,
            optimizer=optimizer,
            noise=noise,
            validation=validation,
        )


def select_prompt_rows(prompts, target: str) -> tuple[PromptRow, ...]:
    """The rows of Load Prompts, if any. ValueError when the node's own prompts are written too: nobody would learn
    them."""
    if prompts and target.strip():
        raise ValueError(f"target is {target!r}, and prompts are connected too. Clear target, or disconnect prompts.")
    return tuple(prompts or ())


def make_leco_row(words: LecoWords) -> PromptRow:
    return PromptRow(
        words.target,
        words.positive or None,
        words.unconditional,
        words.neutral or None,
        words.action,
        words.guidance,
        preserve=split_prompt_list(words.preserve, ";"),
    )


class TrainTextSlider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return make_prompt_node_schema(
            SliderWords,
            "my_slider",
            "From Load Prompts, instead of the prompts above (leave target empty); unconditional is the negative end.",
            node_id="TrainyardTrainTextSlider",
            display_name="Train Text Slider",
            description="Trains a slider from prompts alone: at +1 the target becomes more like the positive "
            "prompt, at -1 more like the negative one.",
            search_aliases=["concept slider", "attribute slider", "lora slider", "disentangled", "age slider"],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        prompts=None,
        encoded=None,
        adapter=None,
        optimizer=None,
        noise=None,
        points=None,
        validation=None,
        **widgets,
    ):
        words = settings_from_widgets(SliderWords, widgets)
        rows = check_slider_rows(select_prompt_rows(prompts, words.target)) or (make_slider_row(words),)
        return run_prompt_job(
            cls,
            model,
            clip,
            rows,
            True,
            widgets,
            encoded=encoded,
            points=points,
            adapter=adapter,
            optimizer=optimizer,
            noise=noise,
            validation=validation,
        )


def check_slider_rows(rows):
    """The rows. ValueError for one whose action a slider has not got."""
    if found := next((row for row in rows if row.action == "replace"), None):
        raise ValueError(
            f"{found.target!r} -> {found.effective_positive!r} replaces, and a slider has two ends: write target, "
            "positive and unconditional, or connect the prompts to Train LECO."
        )
    return rows


def make_slider_row(words: SliderWords) -> PromptRow:
    if (words.positive or words.target) == words.negative:
        raise ValueError(
            f"positive and negative are both {words.negative!r}: between them lies no direction to learn. Change one "
            "of them."
        )
    return PromptRow(
        words.target,
        words.positive or None,
        words.negative,
        None,
        "enhance",
        words.guidance,
        preserve=split_prompt_list(words.preserve, ";"),
        attributes=split_prompt_list(words.attributes, ";,"),
    )


NODES = [TrainLeco, TrainTextSlider]
