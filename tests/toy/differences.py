"""The proofs of LECO, sliders, replacement and ADDifT in the toy world: what is taught, and how its effect is read from
images.

    with torch.inference_mode():
        taught = learn(toy, LESSONS["erase"])
        marks = LESSONS["erase"].exam(toy, taught.lora)

Every exam draws with ComfyUI's own sampler, the LoRA applied as a loaded file is, on prompts and seeds that no training
saw. "Kept" and "unchanged" are judged against what the base draws from the same seed, so that the base's own mistakes
(one outline in twenty is bent) count for neither side.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...nodes import host
from ...trainers.data.buckets import BucketSettings
from ...trainers.data.caption_variants import CaptionSettings
from ...trainers.data.concept_prompts import PromptRow
from ...trainers.data.encode import encode_dataset
from ...trainers.data.pairs import pair_datasets
from ...trainers.data.readers import read_folder
from ...trainers.files import LoraFile
from ...trainers.loop import NoStore, train
from ...trainers.methods.image_pairs import AddiftTraining, ImageSlider
from ...trainers.methods.prompts import (
    PromptDifferenceTraining,
    build_prompt_tasks,
    make_leco_targets,
    make_preserve_targets,
    make_replacement_targets,
    make_slider_targets,
)
from ...trainers.methods.rollouts import PromptTask, RolloutPoints, StudentTeacherModel, count_planned_forwards
from ...trainers.monitor.reached import ReachedMonitor
from ...trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, PointSettings, RunSettings
from . import sampling, shapes, world
from .measure import measure

LATENT = (world.CHANNELS, shapes.PX // 8, shapes.PX // 8)
STRENGTHS = tuple(s / 2 for s in range(-4, 5))  # -2, -1.5 ... 2
FIRST_SEED = 500_000  # of the exams; training draws its noise from another generator
COLOURS, GROUNDS, SIZES, SHAPES = tuple(shapes.COLOURS), tuple(shapes.GROUNDS), tuple(shapes.SIZES), shapes.SEEN


# -- teaching ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What is taught, with which settings, and `exam(toy, lora)`, which gives its marks. `make(toy, session, lesson)`
    is the method."""

    make: Callable
    exam: Callable
    run: RunSettings
    rank: int = 8
    targets: str = "attention+mlp"
    points: PointSettings = PointSettings(sampling_steps=8, refresh=6)
    noise: NoiseSettings = NoiseSettings()
    schedule: str = "cosine"
    strength: float = 0.25  # ADDifT
    stop_at: float = 0.0  # share of the way at which a lesson from prompts ends; 0 never

    def but(self, **changes) -> Lesson:
        """The same lesson with other settings; those of the run are named without it."""
        known = {f.name for f in dataclasses.fields(RunSettings)}
        run = dataclasses.replace(self.run, **{k: v for k, v in changes.items() if k in known})
        return dataclasses.replace(self, run=run, **{k: v for k, v in changes.items() if k not in known})


@dataclass(frozen=True)
class Snapshot:
    """The adapters after so many updates, and the forwards that they cost (a forward is one sample, CFG counts as
    two)."""

    step: int
    lora: LoraFile
    forward_counts: dict[str, int]

    @property
    def forwards(self) -> int:
        return sum(self.forward_counts.values())


@dataclass
class Snapshots(NoStore):
    """A store that keeps the adapters of every save in memory."""

    session: object
    method: object
    taken: list[Snapshot] = field(default_factory=list)

    def save(self, state, why):
        model = getattr(self.method, "model", self.method)
        self.taken.append(Snapshot(state["step"], LoraFile(self.session.tensors()[0]), dict(model.forward_counts)))


@dataclass(frozen=True)
class Taught:
    snapshots: list[Snapshot]
    losses: list[float]
    planned: dict | None  # forwards that a rollout lesson was expected to cost
    seconds: float  # of one core, whatever else the machine does
    reached: float | None = None  # share of the way to the goal, where one is measured

    @property
    def lora(self) -> LoraFile:
        return self.snapshots[-1].lora


def learn(toy, lesson: Lesson) -> Taught:
    """Trained through the door that the nodes use."""
    start = time.process_time()
    adapter = AdapterSettings(rank=lesson.rank, targets=lesson.targets)
    with host.session.open_training_session(toy.model, adapter, seed=lesson.run.seed) as session:
        method = lesson.make(toy, session, lesson)
        store = Snapshots(session, method)
        monitor = ReachedMonitor(method.progress, lesson.stop_at) if hasattr(method, "progress") else None
        losses = train(method, lesson.run, OptimizerSettings(schedule=lesson.schedule), store=store, monitor=monitor)
    seconds = time.process_time() - start
    return Taught(store.taken, losses, plan_of(method, lesson), seconds, monitor and monitor.reached)


def plan_of(method, lesson):
    points = getattr(method, "points", None)
    return points and count_planned_forwards(
        points.settings, points.tasks, lesson.noise, points.guidance, lesson.run.steps
    )


def from_prompts(tasks, original=None):
    """A lesson's `make` for pulls between prompts; every task has the run's batch. `original(model, tasks)`: another
    method on the same."""

    def make(toy, session, lesson):
        mine = [dataclasses.replace(task, shapes=(LATENT,), batch=lesson.run.batch) for task in tasks]
        texts = list(dict.fromkeys(text for task in mine for text in task.all_prompts))
        model = StudentTeacherModel(session.denoiser, session.adapters, encoded_prompts(toy, texts))
        if original:
            return original(model, mine)
        guidance = host.session.rollout_guidance(session, lesson.points.guidance_scale)
        return PromptDifferenceTraining(
            model,
            mine,
            RolloutPoints(model, mine, lesson.points, lesson.noise, guidance, dealt=True),
            lesson.points.renormalise,
        )

    return make


def encoded_prompts(toy, texts) -> dict:
    """Prompt -> conditioning; each is encoded once in the life of `toy`."""
    known = vars(toy).setdefault("prompts_of_lessons", {})
    missing = [text for text in texts if text not in known]
    known.update(zip(missing, host.encoders.TextEncoder(toy.clip).encode(missing), strict=True))
    return {text: known[text] for text in texts}


def from_pairs(kind, pairs, **settings):
    """A lesson's `make` for drawn pairs [(caption, image at -1, image at +1)], read and encoded as the nodes do."""

    def make(toy, session, lesson):
        more = {"strength": lesson.strength} if kind is AddiftTraining else {}
        return kind(
            session.denoiser,
            session.adapters,
            encoded(toy, pairs),
            lesson.noise,
            session.family.density,
            lesson.run.batch,
            **more,
        )

    return make


def encoded(toy, pairs):
    with tempfile.TemporaryDirectory() as place:
        sides = {side: Path(place) / side for side in ("minus", "plus")}
        for number, (caption, minus, plus) in enumerate(pairs):
            for side, image in (("minus", minus), ("plus", plus)):
                sides[side].mkdir(exist_ok=True)
                image.save(sides[side] / f"{number}.png")
                (sides[side] / f"{number}.txt").write_text(caption, encoding="utf-8")
        data = pair_datasets(read_folder(sides["plus"]), read_folder(sides["minus"]))
        buckets = BucketSettings(resolution=shapes.PX, step=8, min_side=shapes.PX, max_side=shapes.PX)
        doors = host.encoders.VaeEncoder(toy.vae), host.encoders.TextEncoder(toy.clip)
        made = encode_dataset(data, CaptionSettings(dropout=0.0), buckets, False, *doors, Path(place) / "cache")
        return in_memory(made)


def in_memory(data):
    """The same data without its folder."""
    from ...trainers.data.cache import MemoryStore

    keys = {key for item in data.items for key in (item.latent, *item.caption_keys)}
    return dataclasses.replace(data, store=MemoryStore({key: data.store.load(key) for key in keys}), empty_key=None)


# -- looking -----------------------------------------------------------------------------------------------------------


def look(toy, lora, wanted, strength=1.0, first_seed=FIRST_SEED, steps=12, cfg=2.0):
    """What is seen on one image per attribute dict, drawn with the LoRA at a strength; `lora` None is the base."""
    prompts = [shapes.caption(**w) for w in wanted]
    known = vars(toy).setdefault("drawn_by_the_base", {})
    question = (*prompts, first_seed, steps, cfg)
    if lora is None and question in known:
        return known[question]
    model = toy.model if lora is None else host.lora_keys.apply_lora(toy.model, None, lora, strength)[0]
    images = sampling.images(toy, prompts, list(range(first_seed, first_seed + len(wanted))), steps, cfg, model=model)
    seen = [measure(image) for image in images]
    if lora is None:
        known[question] = seen
    return seen


def share(values) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)


def same(seen, before, *names) -> bool:
    return all(getattr(seen, name) == getattr(before, name) for name in names)


def kept(seen, before, *names) -> float:
    """Share of images that show the same attributes as the base's own image from the same seed."""
    return share(same(s, b, *names) for s, b in zip(seen, before, strict=True))


def mixed(count, seed=0, **fixed):
    """`count` different full captions; `fixed` pins attributes, leaves them out (None) or narrows them (a tuple)."""
    values = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "ground": GROUNDS}
    values |= {key: value if isinstance(value, tuple) else (value,) for key, value in fixed.items()}
    every = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    return [every[order[i % len(every)]] for i in range(count)]


def without(name):
    """The other colours, or the other shapes."""
    return tuple(other for other in (SHAPES if name in SHAPES else COLOURS) if other != name)


def attribute_of(concept):
    return "shape" if concept in SHAPES else "colour"


OTHERS_KEPT = "others unchanged in shape, size and colour"


# -- exams: {what: share or figure} ------------------------------------------------------------------------------------


def erase_exam(toy, lora, concept="red", count=24, steps=12):
    """Of the images that the base draws of the concept (a colour or a shape), the share that shows it no longer; and
    what else moved."""
    name = attribute_of(concept)
    rest_of = [other for other in ("shape", "size", "colour") if other != name]
    asked, others = mixed(count, **{name: concept}), mixed(count, **{name: without(concept)})
    before, after = (look(toy, which, asked, steps=steps) for which in (None, lora))
    was = [(b, a) for b, a in zip(before, after, strict=True) if getattr(b, name) == concept]
    rest, now = (look(toy, which, others, first_seed=FIRST_SEED + 1000, steps=steps) for which in (None, lora))
    return {
        "erased": share(getattr(a, name) != concept for _, a in was),
        "of": len(was),
        f"{' and '.join(rest_of)} of the erased kept": share(same(a, b, *rest_of) for b, a in was),
        OTHERS_KEPT: kept(now, rest, "shape", "size", "colour"),
        "others as asked, base": share(s.matches(**w) for s, w in zip(rest, others, strict=True)),
        "others as asked, after": share(s.matches(**w) for s, w in zip(now, others, strict=True)),
    }


def quick_erase_exam(toy, lora, colour="red"):
    """The two marks of a curve, on few images."""
    asked, others = mixed(24, colour=colour), mixed(12, colour=without(colour))
    before, after = look(toy, None, asked, steps=8), look(toy, lora, asked, steps=8)
    rest, now = (look(toy, which, others, first_seed=FIRST_SEED + 1000, steps=8) for which in (None, lora))
    return {
        "erased": share(a.colour != colour for b, a in zip(before, after, strict=True) if b.colour == colour),
        "others kept": kept(now, rest, "shape", "size", "colour"),
    }


def enhance_exam(toy, lora, colour="red", count=16):
    """Prompts that name no colour: the share drawn in this one, from the base and after. Prompts that name another must
    keep theirs."""
    asked, others = mixed(count, colour=None), mixed(2 * count, colour=without(colour))
    before, after = look(toy, None, asked), look(toy, lora, asked)
    rest, now = (
        look(toy, None, others, first_seed=FIRST_SEED + 1000),
        look(toy, lora, others, first_seed=FIRST_SEED + 1000),
    )
    return {
        "of the colour, base": share(s.colour == colour for s in before),
        "of the colour, after": share(s.colour == colour for s in after),
        "shape and size kept": kept(after, before, "shape", "size"),
        "named colours unchanged in shape, size and colour": kept(now, rest, "shape", "size", "colour"),
    }


def replace_exam(toy, lora, old="square", new="circle", count=16):
    asked, others = mixed(count, shape=old), mixed(2 * count, shape=tuple(s for s in SHAPES if s != old))
    before, after = look(toy, None, asked), look(toy, lora, asked)
    rest, now = (
        look(toy, None, others, first_seed=FIRST_SEED + 1000),
        look(toy, lora, others, first_seed=FIRST_SEED + 1000),
    )
    return {
        "old shape, base": share(s.shape == old for s in before),
        "new shape, base, when asked": share(
            s.shape == new for s, w in zip(rest, others, strict=True) if w["shape"] == new
        ),
        "new shape, after": share(s.shape == new for s in after),
        "old shape, after": share(s.shape == old for s in after),
        "colour and size kept": kept(after, before, "colour", "size"),
        "others unchanged in shape, size and colour": kept(now, rest, "shape", "size", "colour"),
    }


def slider_exam(toy, lora, count=16, strengths=STRENGTHS):
    """Area against strength on prompts that name no size. Colour and shape are compared with the base's image of the
    same seed."""
    asked = mixed(count, size=None)
    before = look(toy, None, asked)
    seen = {s: before if s == 0 else look(toy, lora, asked, s) for s in strengths}
    areas = {s: [one.area for one in row] for s, row in seen.items()}
    moved = [s for s in strengths if s]
    return {
        "area by strength, px": {s: round(sum(a) / len(a), 1) for s, a in areas.items()},
        "Spearman of mean area": spearman(strengths, [sum(areas[s]) for s in strengths]),
        "Spearman of each picture, mean": round(
            sum(spearman(strengths, column) for column in zip(*areas.values(), strict=True)) / count, 4
        ),
        "colour and shape kept": share(
            same(a, b, "colour", "shape") for s in moved for a, b in zip(seen[s], before, strict=True)
        ),
        "colour and shape kept by strength": {s: kept(seen[s], before, "colour", "shape") for s in moved},
        "large by strength": {s: share(one.size == "large" for one in row) for s, row in seen.items()},
        "base": {
            name: share(getattr(s, name) == w[name] for s, w in zip(before, asked, strict=True))
            for name in ("colour", "shape")
        },
    }


def spearman(a, b) -> float:
    from scipy.stats import spearmanr

    return round(float(spearmanr(a, b).statistic), 4)


# -- lessons -----------------------------------------------------------------------------------------------------------


def said(**attributes):
    return shapes.caption(**{"shape": "shape", **attributes})


def prompt_run(**changes):
    return RunSettings(**{"steps": 300, "learning_rate": 1e-3, "batch": 4, "seed": 1, "save_every": 0, **changes})


NAMED_CONTEXTS = ({}, {}, {}, *({"size": size} for size in SIZES), *({"ground": ground} for ground in GROUNDS))


def erase_rows(concept="red", guidance=1.0, contexts=NAMED_CONTEXTS, toward=None):
    """A colour or a shape, in prompts that name a size, a ground or neither; those of the exam name both. `toward`:
    the colour or shape that it moves to; None leaves it out. Each row preserves itself in every other colour, or
    shape."""
    name = attribute_of(concept)
    values = (
        [dict(colour=concept, shape=s) for s in SHAPES]
        if name == "colour"
        else [dict(shape=concept, colour=c) for c in COLOURS]
    )
    bare = {name: toward or ("shape" if name == "shape" else None)}
    named = [{**value, **context} for value in values for context in contexts]
    return [
        PromptRow(
            said(**row),
            unconditional=said(**{**row, **bare}),
            guidance=guidance,
            preserve=tuple(said(**{**row, name: other}) for other in without(concept)),
        )
        for row in named
    ]


def neighbour_of(concept):
    """The colour, or the shape, after it in the list."""
    known = SHAPES if concept in SHAPES else COLOURS
    return known[(known.index(concept) + 1) % len(known)]


def erase_tasks(concept="red", guidance=1.0, preserve=True, contexts=NAMED_CONTEXTS, toward=None, preserve_weight=1.0):
    rows = erase_rows(concept, guidance, contexts, toward)
    rows = rows if preserve else [dataclasses.replace(row, preserve=()) for row in rows]
    return build_prompt_tasks(rows, lambda row: (LATENT,), preserve_weight=preserve_weight)


def erase_lesson(concept="red") -> Lesson:
    """A colour or a shape erased. Adapters on every linear layer: with attention and MLP alone the lesson hardly carries
    over to longer prompts, probably because prompts reach this world by the modulation too.

    It moves to a neighbour (the anchor of Ablating Concepts, Kumari et al. 2023) and a little beyond: *shape*, without a
    name, draws a third of triangles. What is preserved is met twice as often as what is erased, and short trajectories
    without guidance meet three times as many prompts for the same forwards. LOG.md has the figures."""
    tasks = erase_tasks(concept, 0.2, toward=neighbour_of(concept), preserve_weight=2.0)
    return Lesson(
        from_prompts(tasks),
        functools.partial(erase_exam, concept=concept),
        prompt_run(learning_rate=2e-3, steps=330, batch=1),
        rank=16,
        targets="all linear",
        points=PointSettings(sampling_steps=4, refresh=4, guidance_scale=1),
        stop_at=0.9,
    )


def enhance_tasks(colour="red", guidance=1.0):
    rows = [
        PromptTask(
            make_leco_targets(
                said(shape=s), said(shape=s, colour=colour), said(shape=s), said(shape=s), "enhance", guidance
            ),
            said(shape=s),
        )
        for s in SHAPES
    ]
    others = [said(shape=s, colour=c) for s, c in zip(SHAPES * 2, without(colour), strict=False)]
    return rows + [
        PromptTask(make_preserve_targets(prompt), prompt, weight=0.5 * len(rows) / len(others)) for prompt in others
    ]


def replace_tasks(old="square", new="circle"):
    """Some prompts name a size or a ground, most do not; what is kept is said as long as what is replaced."""
    rows = [dict(colour=c, size=(None, *SIZES)[i % 3], ground=(None, *GROUNDS)[i % 4]) for i, c in enumerate(COLOURS)]
    others = [said(shape=s, **row) for row, s in zip(rows, [s for s in SHAPES if s != old] * 2, strict=True)]
    return [
        PromptTask(make_replacement_targets(said(shape=old, **row), said(shape=new, **row)), said(shape=old, **row))
        for row in rows
    ] + [PromptTask(make_preserve_targets(prompt), prompt, weight=0.5) for prompt in others]


def slider_tasks(guidance=1.0):
    rows = [(s, c) for s, c in zip(SHAPES * 2, COLOURS, strict=False)]
    return [
        PromptTask(
            make_slider_targets(
                said(shape=s, colour=c),
                said(shape=s, colour=c, size="large"),
                said(shape=s, colour=c, size="small"),
                guidance,
            ),
            said(shape=s, colour=c),
        )
        for s, c in rows
    ]


def drawn_pairs(count=5, first=0):
    """[(caption without a size, small, large)]: the same shape, colour, ground and place, from the row of number `first`
    on."""
    numbers = range(first, first + count)
    rows = [(SHAPES[i % len(SHAPES)], COLOURS[i % len(COLOURS)], GROUNDS[i % len(GROUNDS)]) for i in numbers]
    return [
        (said(shape=s, colour=c, ground=g), shapes.draw(s, c, "small", g), shapes.draw(s, c, "large", g))
        for s, c, g in rows
    ]


def enhance_lesson(colour="red") -> Lesson:
    return Lesson(
        from_prompts(enhance_tasks(colour, guidance=2.0)),
        functools.partial(enhance_exam, colour=colour),
        prompt_run(learning_rate=4e-3, steps=240),
        targets="all linear",
    )


def replace_lesson(old="square", new="circle") -> Lesson:
    """What a prompt says of a shape reaches this small world by the modulation too, so replacing one needs adapters on
    every linear layer: with "attention+mlp" 0 to 4 of 12 squares became circles after 200 to 450 steps."""
    return Lesson(
        from_prompts(replace_tasks(old, new)),
        functools.partial(replace_exam, old=old, new=new),
        prompt_run(learning_rate=4e-3, steps=720),
        rank=16,
        targets="all linear",
    )


def image_slider_lesson(first=0) -> Lesson:
    return Lesson(from_pairs(ImageSlider, drawn_pairs(5, first)), slider_exam, prompt_run())


def difference_lesson(first=0) -> Lesson:
    return Lesson(from_pairs(AddiftTraining, drawn_pairs(1, first)), slider_exam, prompt_run(steps=100, batch=1))


LESSONS = {
    "erase": erase_lesson(),
    "enhance": enhance_lesson(),
    "replace": replace_lesson(),
    "text slider": Lesson(from_prompts(slider_tasks()), slider_exam, prompt_run()),
    "image slider": image_slider_lesson(),
    "difference": difference_lesson(),
}


def curve_lesson(original=None, concept="red") -> Lesson:
    """Erasing a colour for the curve over forwards: batch 1 and a steady learning rate, nothing preserved, as the
    original trains."""
    run = prompt_run(steps=105, save_every=15, batch=1, learning_rate=3e-3)
    return Lesson(
        from_prompts(erase_tasks(concept, preserve=False, contexts=({},)), original),
        functools.partial(quick_erase_exam, colour=concept),
        run,
        schedule="constant",
    )
