"""Sliders, LECO and differences: Train nodes that share one engine."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ...trainers.data.encoded import Encoded as EncodedData
from ...trainers.data.prompts import PromptRow, several
from ...trainers.diffusion import density_for
from ...trainers.methods.prompts import Difference, tasks_of
from ...trainers.methods.rollouts import Model, Noise, Pictures, Rollouts, planned
from ...trainers.monitor import fixed_batches
from ...trainers.monitor.strength_curve import axis_of, measure, more_like
from ...trainers.monitor.validation import picked
from ...trainers.settings import (
    PointSettings,
    Settings,
    choice,
    number,
    text,
)
from .. import host
from ..fields import CATEGORY, Encoded, inputs, record
from .image_pairs import ImagePairs, TrainDifference, TrainImageSlider
from .job import OFF, largest
from .prompts import Prompts
from .widgets import HIDDEN, DifferenceJob, PlaceSettings, common, drawer, lately, levels_only, recipes, results, run_widgets, trained



@dataclasses.dataclass(frozen=True, kw_only=True)
class LecoWords(Settings):
    """The prompts of Train LECO, when none are connected."""

    target: str = text("", "The concept that is moved, for example: red car.")
    action: str = choice("erase", ("erase", "enhance", "replace"), "erase: away from the concept. enhance: toward it. replace: it becomes `positive`.")
    positive: str = text("", "What is taken away or added, or what the target becomes. Empty: the target itself.")
    guidance: float = number(1.0, 0.01, 100.0, "How far to move. 1 is the whole difference; enhance needs more than 1.", step=0.25)
    neutral: str = text("", "Where the target is moved to when the concept is erased. Empty: the unconditional prompt.", advanced=True)
    unconditional: str = text("", "What positive is compared with: only what lies between the two is moved. Empty is anything; a prompt keeps the rest.", advanced=True)
    preserve: str = text("", "Prompts that must stay as they are, parted by semicolons or lines.", advanced=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliderWords(Settings):
    """The prompts of Train Text Slider, when none are connected."""

    target: str = text("", "What the slider acts on, for example: person.")
    positive: str = text("", "The far end at +1, for example: old person.")
    negative: str = text("", "The far end at -1, for example: young person.")
    guidance: float = number(2.0, 0.01, 100.0, "How far apart the two ends are; the paper uses 4.", step=0.25)
    attributes: str = text("", "Put before every prompt in turn, so that the slider does not change them: male, female.", advanced=True)
    preserve: str = text("", "Prompts that must stay as they are, parted by semicolons or lines.", advanced=True)


























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
            raise ValueError("CLIP is empty: this checkpoint holds no text encoder. Load one with a CLIP loader node and connect it.")
        if self.points.points == "pictures" and self.data is None:
            raise ValueError("points is 'pictures', and no encoded dataset is connected. Connect encoded, or choose 'rollout' in Point Settings.")
        if self.points.points != "pictures" and self.data is not None:
            raise ValueError(f"An encoded dataset is connected, and points is {self.points.points!r}. Choose 'pictures' in Point Settings, or disconnect it.")
        if self.data is not None:
            host.checks.check_latents(self.model, self.data.channels)
        levels_only(self.noise, "prompts teach by noise levels alone")
        host.checks.check_prompts(self.clip, self.texts())
        self.tasks()

    def tasks(self):
        """Each row with its own batch times the node's, which may be left open until the run begins."""
        rows = [dataclasses.replace(row, batch=row.batch * max(1, self.run.batch)) for row in self.rows]
        return tasks_of(rows, self.shapes, self.slider, self.place.preserve_weight)

    def texts(self) -> list[str]:
        asked = axis_of(self.rows[0], self.slider).texts if self.calibrate != OFF else ()
        return list(dict.fromkeys([prompt for task in self.tasks() for prompt in task.texts] + list(asked)))

    def side(self):
        return self.place.resolution

    def shapes(self, row):
        return host.checks.latent_shapes(self.model, row.resolution or self.place.resolution, row.dynamic_resolution)

    def parts(self):
        rows = [dataclasses.asdict(row) for row in self.rows]
        encoder = host.identity.identity(self.clip.patcher, self.clip.layer_idx)
        return rows, self.slider, self.points, self.place, encoder, self.data.fingerprint if self.data else ""

    def records(self):
        return self.points, self.place

    def largest(self):
        shapes = [shape for task in self.tasks() for shape in task.shapes]
        return largest(self.data) if self.data else max(shapes, key=lambda shape: shape[-1] * shape[-2])

    def prepare(self):
        encoder = host.encoders.TextEncoder(self.clip)
        texts = self.texts()
        try:
            with host.context.gradients():
                self.conds = dict(zip(texts, encoder.encode(texts), strict=True))
        finally:
            encoder.free()

    def method(self, session):
        tasks, self.guidance = self.tasks(), host.session.rollout_guidance(session, self.points.guidance_scale)
        self.student = Model(session.denoiser, session.adapters, self.conds)
        return Difference(self.student, tasks, self.source(session, tasks), self.points.renormalise)

    names_worst = False

    def check_held_out(self, data):
        if self.data is None:
            raise ValueError("held_out is connected, and this run learns from prompts alone: there is no loss of pictures to measure. Disconnect "
                             "held_out; fixed points of the model's own are measured.")
        super().check_held_out(data)

    def exam(self, session, method, data, count):
        """At points of the frozen model's own, which stay the same whatever the student learns."""
        asked, levels = fixed_batches.asking(method), self.looking.settings.levels
        about = [self.points, fixed_batches.plainly(self.noise), levels]
        if self.points.points == "pictures":
            picks, density = picked(data, count), density_for(self.noise, session.family.density)
            points = fixed_batches.on_pictures(session.denoiser, asked.tasks, data, density, self.noise, levels, picks)
            return fixed_batches.point_exam(asked, points, len(picks), self.run.batch, data.fingerprint, picks, *about)
        if self.points.points == "noise":
            points = fixed_batches.on_noise(session.denoiser, asked.tasks, self.noise, levels)
        else:
            points = fixed_batches.on_ways(asked.model, asked.tasks, self.points, self.noise, self.guidance, levels)
        return fixed_batches.point_exam(asked, points, count, self.run.batch, self.place, *about)

    def planned(self):
        updates = self.run.steps * self.optimizing.accumulate
        found = planned(self.points, self.tasks(), self.noise, self.guidance, updates, self.run.batch)
        return {what: count / self.run.steps for what, count in found.items()}

    def source(self, session, tasks):
        if self.points.points == "pictures":
            return Pictures(self.student, tasks, self.data, self.noise, session.family.density, self.run.batch)
        if self.points.points == "noise":
            return Noise(self.student, tasks, self.noise)
        return Rollouts(self.student, tasks, self.points, self.noise, self.guidance)

    def probe(self, session):
        x0 = session.denoiser.model_space(host.checks.random_latent(self.tasks()[0].shapes[0]))
        return x0, [next(iter(self.conds.values()))]

    def sample_prompts(self):
        task = self.tasks()[0]
        return [(task.scene or "without a prompt", self.conds[task.scene])], (task.away, self.conds[task.away])

    def measured(self, session):
        """Along what the first row changes."""
        axis, shape = axis_of(self.rows[0], self.slider), self.shapes(self.rows[0])[-1]
        asking = Model(session.denoiser, session.adapters, self.conds)
        draw = drawer(asking, shape, axis.unconditional, self.guidance, self.run.seed)
        effect = lambda x0: more_like(asking, x0, axis.toward, axis.away)
        unit = "in the measure's own unit" if axis.reference is None else f"what {axis.reference!r} itself draws"
        return measure(draw, axis.scene, effect, reference=axis.reference, preserve=axis.preserve, unit=unit)

    def about(self):
        return dict(resolution="x".join([str(self.place.resolution)] * 2), dataset={"images": 0, "dropout": 0.0})






def prompt_schema(words, run_name: str, prompts_tip: str, **about):
    """Of a node that learns from prompts alone; both kinds differ in their words."""
    return io.Schema(
        category=CATEGORY,
        inputs=[
            io.Model.Input("model", tooltip="The model to train on. It is not changed: the LoRA comes out beside it."),
            io.Clip.Input("clip", tooltip="The text encoder of the model; it encodes the prompts once and leaves."),
            *inputs(words),
            *run_widgets(500, 2e-4, 4, shown=(), default=run_name),
            *inputs(PlaceSettings),
            Prompts.Input("prompts", optional=True, tooltip=prompts_tip),
            Encoded.Input("encoded", optional=True, tooltip="From Encode Dataset, when Point Settings say 'pictures'."),
            *recipes(points=True),
            *lately(),
        ],
        outputs=results(),
        hidden=HIDDEN,
        is_output_node=True,
        **about,
    )




def trained_by_prompts(cls, model, clip, rows, slider, widgets, *, encoded, points, **recipes):
    return trained(cls, PromptJob(
        rows=rows, slider=slider, clip=clip, data=encoded, points=points or PointSettings(), place=record(PlaceSettings, widgets),
        **common(cls, model, widgets, **recipes),
    ))  # fmt: skip


class TrainLeco(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return prompt_schema(
            LecoWords,
            "my_leco",
            "From Load Prompts, in place of the prompts above; leave target empty then.",
            node_id="TrainyardTrainLeco",
            display_name="Train LECO",
            description="Erase, enhance or replace a concept with prompts alone: no pictures are needed. The LoRA at strength 1 has the effect, "
            "at -1 the opposite.",
            search_aliases=["erase concept", "concept erasing", "replace concept", "ileco", "unlearn"],
        )

    @classmethod
    def execute(cls, model, clip, prompts=None, encoded=None, adapter=None, optimizer=None, noise=None, points=None, validation=None, **widgets):
        words = record(LecoWords, widgets)
        rows = only(prompts, words.target) or (leco_row(words),)
        return trained_by_prompts(cls, model, clip, rows, False, widgets, encoded=encoded, points=points, adapter=adapter, optimizer=optimizer,
                                  noise=noise, validation=validation)  # fmt: skip


def only(prompts, target: str) -> tuple[PromptRow, ...]:
    """The rows of Load Prompts, if any. ValueError when the node's own prompts are written too: nobody would learn them."""
    if prompts and target.strip():
        raise ValueError(f"target is {target!r}, and prompts are connected too. Clear target, or disconnect prompts.")
    return tuple(prompts or ())


def leco_row(words: LecoWords) -> PromptRow:
    return PromptRow(
        words.target, words.positive or None, words.unconditional, words.neutral or None, words.action, words.guidance,
        preserve=several(words.preserve, ";"),
    )  # fmt: skip


class TrainTextSlider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return prompt_schema(
            SliderWords,
            "my_slider",
            "From Load Prompts, in place of the prompts above (leave target empty); unconditional is the negative end.",
            node_id="TrainyardTrainTextSlider",
            display_name="Train Text Slider",
            description="A slider from prompts alone: at +1 the target becomes more like the positive prompt, at -1 more like the negative one.",
            search_aliases=["concept slider", "attribute slider", "lora slider", "disentangled", "age slider"],
        )

    @classmethod
    def execute(cls, model, clip, prompts=None, encoded=None, adapter=None, optimizer=None, noise=None, points=None, validation=None, **widgets):
        words = record(SliderWords, widgets)
        rows = with_two_ends(only(prompts, words.target)) or (slider_row(words),)
        return trained_by_prompts(cls, model, clip, rows, True, widgets, encoded=encoded, points=points, adapter=adapter, optimizer=optimizer,
                                  noise=noise, validation=validation)  # fmt: skip


def with_two_ends(rows):
    """The rows. ValueError for one whose action a slider has not got."""
    if found := next((row for row in rows if row.action == "replace"), None):
        raise ValueError(f"{found.target!r} -> {found.plus!r} replaces, and a slider has two ends: write target, positive and unconditional, "
                         "or connect the prompts to Train LECO.")
    return rows


def slider_row(words: SliderWords) -> PromptRow:
    if (words.positive or words.target) == words.negative:
        raise ValueError(f"positive and negative are both {words.negative!r}: between them lies no direction to learn. Change one of them.")
    return PromptRow(
        words.target, words.positive or None, words.negative, None, "enhance", words.guidance,
        preserve=several(words.preserve, ";"), attributes=several(words.attributes, ";,"),
    )  # fmt: skip












NODES = [ImagePairs, TrainLeco, TrainTextSlider, TrainImageSlider, TrainDifference]
