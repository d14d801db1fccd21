"""Sliders, LECO and differences: Train nodes that share one engine."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ...trainers.data.concept_prompts import PromptRow, split_prompt_list
from ...trainers.data.encoded import EncodedDataset
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
from ...trainers.monitor.reached import ReachedMonitor
from ...trainers.monitor.strength_curve import diffusion_classifier_score, measure_strength_curve, row_slider_axis
from ...trainers.monitor.validation import pick_validation_images
from ...trainers.settings import PointSettings, Settings, choice_field, number_field, text_field
from .. import host
from ..fields import CATEGORY, EncodedType, settings_from_widgets, settings_inputs
from .job import (
    CALIBRATE_OFF,
    BuiltMethod,
    TrainingJob,
    TrainTask,
    hash_clip,
    largest_latent_shape,
)
from .previews import SamplePrompt
from .prompts import PromptRowsType
from .widgets import (
    HIDDEN_INPUTS,
    PlaceSettings,
    check_unused_noise_settings,
    make_appended_inputs,
    make_curve_sampler,
    make_job,
    make_run_inputs,
    make_settings_inputs,
    make_training_outputs,
    run_difference_node,
)

REACHED_METADATA_KEY = "trainyard.reached"  # share of the way to the goal, 0 to 1


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndSettings(Settings):
    """When a run that learns from prompts has learnt enough."""

    stop_at: float = number_field(
        0.0,
        0.0,
        1.0,
        "Ends the run as soon as the target has moved this share of the way to its goal, measured at points that were "
        "not trained on. 0.95 is almost all of it. 0: train all steps; the share reached is reported anyway.",
        step=0.05,
        advanced=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptDifferenceTask(TrainTask):
    """LECO, replacement and text sliders: what is moved is told by prompts."""

    rows: tuple[PromptRow, ...]
    slider: bool
    points: PointSettings
    place: PlaceSettings
    data: EncodedDataset | None = None
    end: EndSettings = EndSettings()
    version = "difference 1"

    def check(self, job):
        host.encoders.check_clip(job.clip)
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
            host.checks.check_latent_channels(job.model, self.data.channels)
        check_unused_noise_settings(job.noise, "prompts teach by noise levels alone")
        host.checks.check_prompt_lengths(job.clip, self.list_texts(job))
        self.prompt_tasks(job)

    def prompt_tasks(self, job):
        """Each row with its own batch times the node's, which may be left open until the run begins."""
        rows = [dataclasses.replace(row, batch=row.batch * max(1, job.run.batch)) for row in self.rows]
        shapes_of_row = lambda row: self.latent_shapes(job, row)
        return build_prompt_tasks(rows, shapes_of_row, self.slider, self.place.preserve_weight)

    def latent_shapes(self, job, row):
        resolution = row.resolution or self.place.resolution
        return host.checks.square_latent_shapes(job.model, resolution, row.dynamic_resolution)

    def list_texts(self, job) -> list[str]:
        of_curve = row_slider_axis(self.rows[0], self.slider).texts if job.calibrate != CALIBRATE_OFF else ()
        of_tasks = [prompt for task in self.prompt_tasks(job) for prompt in task.all_prompts]
        return list(dict.fromkeys([*of_tasks, *of_curve]))

    def fingerprint_parts(self, job):
        rows = [dataclasses.asdict(row) for row in self.rows]
        images = self.data.fingerprint if self.data else ""
        return rows, self.slider, self.points, self.place, hash_clip(job.clip), images

    def settings_records(self):
        return self.points, self.place, self.end

    def ending_rules(self):
        return {"stop_at": self.end.stop_at} if self.end.stop_at else {}

    def metadata_fields(self):
        return dict(resolution="x".join([str(self.place.resolution)] * 2), dataset={"images": 0, "dropout": 0.0})

    def largest_shape(self, job):
        if self.data:
            return largest_latent_shape(self.data)
        shapes = [shape for task in self.prompt_tasks(job) for shape in task.shapes]
        return max(shapes, key=lambda shape: shape[-1] * shape[-2])

    def default_resolution(self):
        return self.place.resolution

    def check_held_out(self, data):
        if self.data is None:
            raise ValueError(
                "held_out is connected, and this run trains on prompts alone, so there is no image loss to "
                "measure. Disconnect held_out; fixed points of the model's own are measured."
            )
        super().check_held_out(data)

    def encode_prompts(self, job):
        return host.encoders.encode_prompts_once(job.clip, self.list_texts(job))

    def default_sample_prompts(self, job, prompts):
        task = self.prompt_tasks(job)[0]
        shown, negative = task.rollout_prompt, task.negative_prompt
        return [SamplePrompt(shown or "without a prompt", prompts[shown])], SamplePrompt(negative, prompts[negative])

    def gradient_check_inputs(self, job, session, prompts):
        x0 = session.denoiser.model_space(host.checks.random_latent(self.prompt_tasks(job)[0].shapes[0]))
        return x0, [next(iter(prompts.values()))]

    def build(self, job, session, prompts):
        tasks, guidance = self.prompt_tasks(job), host.session.rollout_guidance(session, self.points.guidance_scale)
        student = StudentTeacherModel(session.denoiser, session.adapters, prompts)
        if self.points.points == "pictures":
            source = ImagePoints(student, tasks, self.data, job.noise, session.family.density, job.run.batch)
        elif self.points.points == "noise":
            source = NoisePoints(student, tasks, job.noise)
        else:
            source = RolloutPoints(student, tasks, self.points, job.noise, guidance, dealt=True)
        method = PromptDifferenceTraining(student, tasks, source, self.points.renormalise)
        return BuiltPrompts(job, session, method, student, guidance, prompts)


@dataclasses.dataclass
class BuiltPrompts(BuiltMethod):
    job: TrainingJob
    session: object
    method: PromptDifferenceTraining
    student: StudentTeacherModel
    guidance: float  # classifier-free, of rollouts and samples
    prompts: dict[str, dict]
    reached_monitor: ReachedMonitor | None = None
    can_name_worst = False

    def make_monitor(self, validation):
        self.reached_monitor = ReachedMonitor(self.method.progress, self.job.task.end.stop_at, validation)
        return self.reached_monitor

    def extra_metadata(self, with_curve):
        reached = self.reached_monitor and self.reached_monitor.reached
        return {} if reached is None else {REACHED_METADATA_KEY: f"{reached:.3f}"}

    def planned_forwards(self):
        job, task = self.job, self.job.task
        updates = job.run.steps * job.optimizing.accumulate
        found = count_planned_forwards(
            task.points, task.prompt_tasks(job), job.noise, self.guidance, updates, job.run.batch
        )
        return {what: count / job.run.steps for what, count in found.items()}

    def validation_loss(self, data, count):
        """At points of the frozen model's own, which stay the same whatever the student learns."""
        job, task, denoiser = self.job, self.job.task, self.session.denoiser
        counted, levels = fixed_batches.with_separate_counts(self.method), job.monitoring.settings.levels
        identity = [task.points, fixed_batches.strip_noise_weighting(job.noise), levels]
        if task.points.points == "pictures":
            picks = pick_validation_images(data, count)
            density = resolve_noise_density(job.noise, self.session.family.density)
            points = fixed_batches.points_on_images(denoiser, counted.tasks, data, density, job.noise, levels, picks)
            return fixed_batches.build_point_validation(
                counted, points, len(picks), job.run.batch, data.fingerprint, picks, *identity
            )
        if task.points.points == "noise":
            points = fixed_batches.points_on_noise(denoiser, counted.tasks, job.noise, levels)
        else:
            points = fixed_batches.points_on_rollouts(
                counted.model, counted.tasks, task.points, job.noise, self.guidance, levels
            )
        return fixed_batches.build_point_validation(counted, points, count, job.run.batch, task.place, *identity)

    def measure_curve(self):
        """Along what the first row changes."""
        task = self.job.task
        row, axis = task.rows[0], row_slider_axis(task.rows[0], task.slider)
        asking = StudentTeacherModel(self.session.denoiser, self.session.adapters, self.prompts)
        shape = task.latent_shapes(self.job, row)[-1]
        draw = make_curve_sampler(asking, shape, axis.unconditional, self.guidance, self.job.run.seed)
        effect = lambda x0: diffusion_classifier_score(asking, x0, axis.toward, axis.away)
        unit = "in the measure's own unit" if axis.reference is None else f"what {axis.reference!r} itself draws"
        return measure_strength_curve(
            draw, axis.scene, effect, reference=axis.reference, preserve=axis.preserve, unit=unit
        )


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
            *settings_inputs(EndSettings, optional=True),
        ],
        outputs=make_training_outputs(),
        hidden=HIDDEN_INPUTS,
        is_output_node=True,
        **about,
    )


def run_prompt_node(cls, model, clip, rows, slider, widgets, *, encoded, points, **records):
    task = PromptDifferenceTask(
        rows=rows,
        slider=slider,
        data=encoded,
        points=points or PointSettings(),
        place=settings_from_widgets(PlaceSettings, widgets),
        end=settings_from_widgets(EndSettings, widgets),
    )
    return run_difference_node(make_job(cls, task, model, widgets, clip=clip, **records))


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
        return run_prompt_node(
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
    if not (prompts or target.strip()):  # in a file it is meant, here it was forgotten
        raise ValueError("target is empty. Write the words of the concept to change, or connect prompts.")
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
        return run_prompt_node(
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
            f"positive and negative are both {words.negative!r}: they define no direction to train. Change one of them."
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
