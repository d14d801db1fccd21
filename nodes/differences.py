"""Sliders, LECO and differences: Train nodes that share one engine."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io, ui

from ..trainers import exams
from ..trainers.data.encoded import Encoded as EncodedData
from ..trainers.data.pairs import paired, pairs_of
from ..trainers.data.prompts import PromptRow, several
from ..trainers.diffusion import density_for
from ..trainers.evaluate import along, drawn, measure, more_like
from ..trainers.methods.difference import Difference, axis_of, tasks_of
from ..trainers.methods.pairs import Change, ImageSlider
from ..trainers.points import Model, Noise, Pictures, Rollouts, noise_of, planned
from ..trainers.runs import checked_name
from ..trainers.settings import (
    DORA,
    AdapterSettings,
    NoiseSettings,
    OptimizerSettings,
    PointSettings,
    RunSettings,
    Settings,
    choice,
    number,
    text,
)
from ..trainers.validation import picked
from . import host, planner
from .fields import CATEGORY, Dataset, Encoded, LoraModel, LossMap, inputs, record
from .lora import graph_metadata
from .prompts import Prompts
from .recipes import AdapterRecipe, NoiseRecipe, OptimizerRecipe, PointRecipe
from .training import AFTER, CALIBRATE, OFF, TrainingJob, largest, parted, picture_probe, resolution
from .validation import ValidationRecipe


class ImagePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardImagePairs",
            display_name="Image Pairs",
            category=CATEGORY,
            description="Two folders as pairs: pictures of the same file name show one scene with more and with less of an attribute. "
            "For image-pair sliders (more at +1, less at -1), and for Train Difference (after, before).",
            search_aliases=["slider dataset", "before after", "positive negative images", "addift pairs", "concept slider"],
            inputs=[
                Dataset.Input("positive", tooltip="Pictures with more of the attribute, or after the change."),
                Dataset.Input("negative", tooltip="Pictures with less of it, or before the change; the same file names."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.25,
                    tooltip="The positive pictures are learnt at this strength, the negative ones at minus it. (0.01 to 100)",
                ),
                Dataset.Input("pairs", optional=True, tooltip="From another Image Pairs node, for graded sliders such as 2, 1, -1, -2."),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset", tooltip="Both sides, for Encode Dataset.")],
        )

    @classmethod
    def execute(cls, positive, negative, strength, pairs=None):
        return io.NodeOutput(paired(positive, negative, strength, pairs))


# -- what the Train nodes show ------------------------------------------------------------------------------------------------


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceSettings(Settings):
    """Where the rows are trained that do not say it themselves."""

    resolution: int = number(512, 16, 8192, "Points are made at this size; below the model's own size is cheaper and often enough.",
                             unit="px", step=8, advanced=True)  # fmt: skip
    preserve_weight: float = number(1.0, 0.0, 100.0, "How often preserved prompts are trained, against the row they belong to.", advanced=True)


def run_widgets(steps, learning_rate, rank, shown=("seed",), **more):
    """steps, learning rate and rank with a method's own defaults, then the rest of the run. Published presets add up to a learning rate *
    alpha / rank * steps of 0.05 for sliders (ai-toolkit, Concept Sliders) and of 0.001 to 0.01 for ADDifT; too weak can be rescaled."""
    defaults = dict(steps=steps, learning_rate=learning_rate, rank=rank)
    widgets = [*inputs(RunSettings, only=("steps", "learning_rate")), *inputs(AdapterSettings, only=("rank",))]
    for widget in widgets:
        widget.default = defaults[widget.id]
    rest = inputs(RunSettings, only=("batch", "seed", "save_every"))
    for widget in rest:
        widget.advanced = None if widget.id in shown else True
    return [
        *widgets,
        io.String.Input("run_name", tooltip="Names the run's folder in output/loras/trainyard. The same name and settings continue that run.", **more),
        *rest,
        planner.checkpointing_input(advanced=True),
        io.Combo.Input(
            "calibrate",
            options=list(CALIBRATE),
            default=AFTER,
            advanced=True,
            tooltip="Draw small samples at strengths -2 to 2 and write the curve of effect and drift into the file and the report.",
        ),
    ]


def recipes(points: bool):
    return [
        AdapterRecipe.Input("adapter", optional=True, tooltip="From Adapter Settings; defaults without it."),
        OptimizerRecipe.Input("optimizer", optional=True, tooltip="From Optimizer Settings; defaults without it."),
        NoiseRecipe.Input("noise", optional=True, tooltip="From Noise and Loss Settings: which noise levels are trained."),
        *([PointRecipe.Input("points", optional=True, tooltip="From Point Settings; rollouts without it.")] if points else []),
    ]


def looking():
    return ValidationRecipe.Input("validation", optional=True, tooltip="From Validation and Previews: loss at fixed questions, best weights, early stop, samples.")


def results():
    return [
        LoraModel.Output("lora", display_name="lora", tooltip="For Save LoRA, Apply LoRA, Strength Sweep and ComfyUI's own LORA_MODEL nodes."),
        LossMap.Output("losses", display_name="losses", tooltip="One number per step, for Loss Plot."),
        io.Model.Output("model", display_name="model", tooltip="The model with the LoRA applied at strength 1."),
        io.String.Output("report", display_name="report", tooltip="What was done, with the forwards planned and spent."),
    ]


HIDDEN = [io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo]


def common(cls, model, widgets, adapter, optimizer, noise, validation=None, both_ways=True):
    """What every job of this file is given. both_ways: the adapter is also trained, or meant to be used, at strengths below 0."""
    return dict(
        model=model,
        run=record(RunSettings, widgets),
        adapter=odd(dataclasses.replace(adapter or AdapterSettings(), rank=widgets["rank"]), both_ways),
        optimizing=optimizer or OptimizerSettings(),
        noise=noise or NoiseSettings(),
        name=checked_name(widgets["run_name"]),
        checkpointing=widgets["checkpointing"],
        retry_cheaper=widgets.get("retry_cheaper", False),
        compile_blocks=widgets.get("compile_blocks", False),
        calibrate=widgets["calibrate"],
        graph=graph_metadata(cls.hidden),
        node_id=cls.hidden.unique_id,
        looking=validation,
    )


def odd(adapter: AdapterSettings, both_ways: bool = True) -> AdapterSettings:
    """The adapter, when its effect at -1 is the opposite of that at +1 (where that is needed) and the frozen model is found at 0. ValueError
    otherwise."""
    if adapter.text_encoder:
        raise ValueError("text_encoder is on: a difference is learnt between prompts that the frozen text encoder has encoded once. "
                         "Switch it off in Adapter Settings.")
    if both_ways and adapter.algorithm == DORA:
        raise ValueError("algorithm is DoRA, whose effect at -1 is not the opposite of that at +1: it learns the size of every row beside its "
                         "direction. Choose LoRA, LoHa or LoKr in Adapter Settings for sliders, LECO and differences.")
    return adapter


def levels_only(noise: NoiseSettings, why, idle=("weighting", "loss", "noise_offset", "pyramid_levels", "perturbation")):
    """ValueError for noise settings that would do nothing here."""
    for f in dataclasses.fields(noise):
        if f.name in idle and (value := getattr(noise, f.name)) != f.default:
            raise ValueError(f"{f.name} is {value} in Noise and Loss Settings, and it does nothing here: {why}. Set it to {f.default}.")


def trained(cls, job):
    lora, losses, line = job.result()
    line = f"{line}{job.cost(len(losses))}{f'; {job.curve.line()}' if job.curve else ''}"
    host.show(line, job.node_id)
    patched, _ = host.applied(job.model, None, lora)
    return io.NodeOutput(lora, {"loss": losses}, patched, line, ui=ui.PreviewText(line))


@dataclasses.dataclass(kw_only=True)
class DifferenceJob(TrainingJob):
    """A run whose steps ask the model several times."""

    student: object = None  # counts its forwards

    def cost(self, steps=None) -> str:
        """One phrase on the forwards spent in so many steps and planned; nothing when the run was only read."""
        return forwards(self.student, steps or self.run.steps, self.planned()) if self.student else ""


# -- differences between prompts ------------------------------------------------------------------------------------------------


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
            host.check_latents(self.model, self.data.channels)
        levels_only(self.noise, "prompts teach by noise levels alone")
        host.check_prompts(self.clip, self.texts())
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
        return host.latent_shapes(self.model, row.resolution or self.place.resolution, row.dynamic_resolution)

    def parts(self):
        rows = [dataclasses.asdict(row) for row in self.rows]
        encoder = host.identity(self.clip.patcher, self.clip.layer_idx)
        return rows, self.slider, self.points, self.place, encoder, self.data.fingerprint if self.data else ""

    def records(self):
        return self.points, self.place

    def largest(self):
        shapes = [shape for task in self.tasks() for shape in task.shapes]
        return largest(self.data) if self.data else max(shapes, key=lambda shape: shape[-1] * shape[-2])

    def prepare(self):
        encoder = host.TextEncoder(self.clip)
        texts = self.texts()
        try:
            with host.gradients():
                self.conds = dict(zip(texts, encoder.encode(texts), strict=True))
        finally:
            encoder.free()

    def method(self, session):
        tasks, self.guidance = self.tasks(), host.rollout_guidance(session, self.points.guidance_scale)
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
        asked, levels = exams.asking(method), self.looking.settings.levels
        about = [self.points, exams.plainly(self.noise), levels]
        if self.points.points == "pictures":
            picks, density = picked(data, count), density_for(self.noise, session.family.density)
            points = exams.on_pictures(session.denoiser, asked.tasks, data, density, self.noise, levels, picks)
            return exams.point_exam(asked, points, len(picks), self.run.batch, data.fingerprint, picks, *about)
        if self.points.points == "noise":
            points = exams.on_noise(session.denoiser, asked.tasks, self.noise, levels)
        else:
            points = exams.on_ways(asked.model, asked.tasks, self.points, self.noise, self.guidance, levels)
        return exams.point_exam(asked, points, count, self.run.batch, self.place, *about)

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
        x0 = session.denoiser.model_space(host.random_latent(self.tasks()[0].shapes[0]))
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


def drawer(model, shape, unconditional, guidance, seed, pictures=2, steps=8):
    """draw(prompt, strength) for the curve: few small pictures from fixed noise."""
    noise = noise_of((pictures, *shape), model.denoiser, host.generator(seed))
    return lambda prompt, strength: drawn(model, prompt, unconditional, noise, strength, steps, guidance)


def forwards(student, steps, planned=None) -> str:
    """One phrase on the forwards spent in so many steps, and planned for each; nothing when the run was only read."""
    if student is None or not steps:
        return ""
    more = f", {sum(planned.values()):.1f} planned" if planned else ""
    return f"; forwards per step: {parted(student.spent, steps)}{more}"


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


def lately():
    """Inputs that came after the first release: at the end."""
    return [looking(), planner.retry_input(), planner.compile_input()]


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


# -- differences between pictures -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class PairJob(DifferenceJob):
    """Image-pair sliders and ADDifT: what is moved is shown by pictures."""

    data: EncodedData
    method_of: type
    strength: float = 1.0

    @property
    def kind(self):
        return f"{self.method_of.__name__} 1"

    def check(self):
        host.check_latents(self.model, self.data.channels)
        levels_only(self.noise, "both sides of a pair are shown the same noise", idle=("perturbation",))
        refuse_equal(pairs_of(self.data), self.data)

    def parts(self):
        return self.data.fingerprint, self.strength

    def largest(self):
        return largest(self.data)

    def method(self, session):
        more = {} if self.method_of is ImageSlider else {"strength": self.strength}
        self.student = self.method_of(
            session.denoiser, session.adapters, self.data, self.noise, session.family.density, self.run.batch, **more
        )
        return self.student

    def planned(self):
        found = self.student.planned(self.run.steps * self.optimizing.accumulate)
        return {what: count / self.run.steps for what, count in found.items()}

    def exam(self, session, method, data, count):
        return exams.pair_exam(method, data, count, self.looking.settings.levels, self.run.batch)

    def check_held_out(self, data):
        super().check_held_out(data)
        pairs_of(data)

    def measured(self, session):
        """Along the mean difference of the pairs, on pictures of the first pair's caption."""
        first = self.student.items[0]
        same = [pair for pair in self.student.items if pair.latent == first.latent][:16]
        rng, end = host.generator(0), first.strengths[0]
        sides = [self.data.batch([pair.at[s] for pair in same], host.generator(0)) for s in (end, -end) if all(s in pair.at for pair in same)]
        positive, negative = (session.denoiser.model_space(side.x0) for side in sides)
        cond = self.data.batch([first.at[end]], rng).conds[0]
        empty = self.data.store.load(self.data.empty) if self.data.empty else None
        asking = Model(session.denoiser, session.adapters, {"scene": cond, "": empty or cond})
        guidance = host.rollout_guidance(session, 0.0) if empty else 1.0
        draw = drawer(asking, first.latent, "", guidance, self.run.seed)
        effect = along((positive - negative).mean(0, keepdim=True))
        return measure(draw, "scene", effect, unit="half the difference of the pairs")

    def probe(self, session):
        return picture_probe(self.data, session)

    def about(self):
        return dict(resolution=resolution(self.data), dataset={"images": len(self.data.items), "dropout": self.data.dropout})


def refuse_equal(pairs, data):
    """ValueError when no pair shows a difference: the same folder was chosen twice, say."""
    if all(len({data.items[index].latent for index in pair.at.values()}) == 1 for pair in pairs):
        raise ValueError(f"Both pictures of every pair are the same, for example {data.items[next(iter(pairs[0].at.values()))].path}: there is "
                         "no difference to learn. Choose two different folders.")


class TrainImageSlider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardTrainImageSlider",
            display_name="Train Slider (Image Pairs)",
            category=CATEGORY,
            description="A slider from a few pairs of pictures: the positive ones at +1, the negative ones at -1, both in every step, with the "
            "same noise.",
            search_aliases=["visual slider", "concept slider", "image slider", "lora slider", "before after"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train on. It is not changed: the LoRA comes out beside it."),
                Encoded.Input("encoded", tooltip="From Encode Dataset, with Image Pairs before it."),
                *run_widgets(500, 2e-4, 4, shown=("batch", "seed"), default="my_slider"),
                *recipes(points=False),
                *lately(),
            ],
            outputs=results(),
            hidden=HIDDEN,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, encoded, adapter=None, optimizer=None, noise=None, validation=None, **widgets):
        return trained(cls, PairJob(data=encoded, method_of=ImageSlider, **common(cls, model, widgets, adapter, optimizer, noise, validation)))


class TrainDifference(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardTrainDifference",
            display_name="Train Difference",
            category=CATEGORY,
            description="Learn only what changed between a picture before and a picture after (ADDifT); one pair and a minute can be enough.",
            search_aliases=["addift", "copy machine", "multi-addift", "before after", "edit lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train on. It is not changed: the LoRA comes out beside it."),
                Encoded.Input("encoded", tooltip="From Encode Dataset, with Image Pairs before it: positive is after, negative is before."),
                *run_widgets(100, 1e-4, 4, shown=("batch", "seed"), default="my_difference"),
                io.Float.Input(
                    "strength",
                    default=0.25,
                    min=0.01,
                    max=10.0,
                    step=0.05,
                    tooltip="The change is learnt at plus and minus this strength; strength 1 of the file then has more of it. (0.01 to 10)",
                ),
                *recipes(points=False),
                *lately(),
            ],
            outputs=results(),
            hidden=HIDDEN,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, encoded, strength, adapter=None, optimizer=None, noise=None, validation=None, **widgets):
        job = PairJob(data=encoded, method_of=Change, strength=strength, **common(cls, model, widgets, adapter, optimizer, noise, validation))
        return trained(cls, job)


NODES = [ImagePairs, TrainLeco, TrainTextSlider, TrainImageSlider, TrainDifference]
