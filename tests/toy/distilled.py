"""What a LoRA does to a model that draws in few steps, on the toy world's distilled transformer: a new shape is learnt
from pictures in one of several ways, or moved from the base, and four-step pictures are measured.

    toy = distilled.load()
    loras = distilled.learn(toy, folder, "star", seed=1, how="contrastive")
    marks = distilled.exam(toy, loras[300], "star")
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...nodes import host
from ...trainers.data.buckets import BucketSettings
from ...trainers.data.caption_variants import CaptionSettings
from ...trainers.data.encode import encode_dataset
from ...trainers.data.readers import read_folder
from ...trainers.files import LoraFile
from ...trainers.loop import train
from ...trainers.methods.few_step import plan_few_steps
from ...trainers.methods.lora import LoraTraining
from ...trainers.methods.prompts import PromptDifferenceTraining
from ...trainers.methods.rollouts import StudentTeacherModel
from ...trainers.methods.transfer import (
    TransferPoints,
    make_transfer_tasks,
    predict_at_points,
    sample_transfer_points,
    with_goals,
)
from ...trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings, TransferSettings
from . import lesson, sampling, shapes, world

ROWS = {  # settings of Noise and Loss
    "plain": {"distilled": "plain"},
    "assistant": {"distilled": "plain"},
    "contrastive": {"distilled": "contrastive", "contrast": sampling.CFG},
    "drift": {"distilled": "drift"},
    "contrastive and drift": {"distilled": "contrastive and drift", "contrast": sampling.CFG},
}
STEPS, RANK, BATCH, RATE = 150, 32, 8, 4e-3
CHECKED = (10, 20, 30, 50, 100)  # steps whose LoRA is examined
FIRST_SEED = 800_000


def load(model=world.DISTILLED):
    """ComfyUI's model, clip and vae; "transformer" is the base."""
    with torch.inference_mode():
        return sampling.load(world.cached(model))


def read_pictures(toy, folder):
    with torch.inference_mode(), host.context.enable_gradients():
        return encode_dataset(
            read_folder(folder),
            CaptionSettings(dropout=0.1),
            BucketSettings(**lesson.ENCODE),
            False,
            host.encoders.VaeEncoder(toy.vae),
            host.encoders.TextEncoder(toy.clip),
            Path(folder).parent / "cache",
        )


def learn(toy, folder, shape, seed, how="plain", steps=STEPS, assistant=None, checked=CHECKED, rank=RANK, rate=RATE):
    """{step: LoRA} of a run on 48 drawn pictures of a shape, or on the pictures that are in the folder already."""
    folder = Path(folder) / shape
    data = read_pictures(toy, folder if folder.exists() else lesson.images(folder, seed=seed, shape=shape))
    noise, found = NoiseSettings(**ROWS[how]), {}
    run = RunSettings(steps=steps, learning_rate=rate, batch=BATCH, seed=seed, save_every=0)
    with (
        torch.inference_mode(),
        host.session.open_training_session(
            toy.model, AdapterSettings(rank=rank), seed=seed, assistant=assistant
        ) as session,
    ):
        method = LoraTraining(
            session.denoiser,
            session.adapters,
            data,
            noise,
            session.family.density,
            BATCH,
            few_step=plan_few_steps(noise),
        )

        def keep(progress):
            if progress.step in (*checked, steps):
                found[progress.step] = LoraFile(session.tensors()[0], {}, progress.step)

        train(method, run, OptimizerSettings(schedule="cosine"), report=keep, interval=0)
    return found


# -- the assistant: the model learns its own pictures plainly, and so becomes an ordinary one ---------------------------


def known_questions(count=96):
    """Attributes of shapes that the model knows: colours, sizes and grounds take turns."""
    every = [
        dict(shape=s, colour=c, size=size, ground=g)
        for s in shapes.SEEN
        for size in shapes.SIZES
        for c in shapes.COLOURS
        for g in shapes.GROUNDS
    ]
    return [every[(number * 37) % len(every)] for number in range(count)]


def make_assistant(toy, folder, seed=0, steps=STEPS) -> LoraFile:
    """Trained on pictures that the distilled model draws itself (ostris' recipe for training adapters)."""
    asked = known_questions()
    texts = [shapes.caption(**one) for one in asked]
    with torch.inference_mode():
        drawn = sampling.images(
            toy, texts, list(range(700_000, 700_000 + len(texts))), steps=sampling.STEPS_DISTILLED, cfg=1.0
        )
    where = Path(folder) / "own"
    where.mkdir(parents=True, exist_ok=True)
    for number, (image, text) in enumerate(zip(drawn, texts, strict=True)):
        pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
        shapes.Image.fromarray(pixels).save(where / f"{number:03}.png")
        (where / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return learn(toy, folder, "own", seed, steps=steps, checked=())[steps]


# -- moved from the base -----------------------------------------------------------------------------------------------


def move(base, toy, lora, shape, seed, steps, **settings) -> LoraFile:
    """A LoRA of the base as one of the distilled model, after so many steps."""
    chosen = TransferSettings(
        **{"few_steps": sampling.STEPS_DISTILLED, "trajectories": 20, "source_guidance": sampling.CFG, **settings}
    )
    texts = [shapes.caption(**one) for one in [*lesson_questions(shape), *known_questions(12)]]
    changed, _ = host.lora_keys.apply_lora(base.model, None, lora)
    with torch.inference_mode():
        prompts = host.encoders.encode_prompts_once(toy.clip, [*texts, ""])
    tasks = make_transfer_tasks(texts, (world.CHANNELS, 8, 8), BATCH)
    schedule, quiet = host.session.read_schedule(toy.model), lambda: None

    def ask(model, guidance):
        with host.session.open_frozen_model(model, prompts) as frozen:
            return predict_at_points(frozen, points, tasks, guidance, quiet)

    driver = toy.model if chosen.trajectory == "target" else changed
    g = chosen.source_guidance
    with torch.inference_mode(), host.context.enable_gradients():
        with host.session.open_frozen_model(driver, prompts) as frozen:
            guidance = 1.0 if driver is toy.model else g
            points = sample_transfer_points(frozen, schedule, tasks, chosen, guidance, seed, quiet)
        points = with_goals(points, tasks, ask(base.model, g), ask(changed, g), ask(toy.model, 1.0))
        with host.session.open_training_session(toy.model, AdapterSettings(rank=RANK), seed=seed) as session:
            student = StudentTeacherModel(session.denoiser, session.adapters, prompts)
            method = PromptDifferenceTraining(student, tasks, TransferPoints(student, points))
            run = RunSettings(steps=steps, learning_rate=RATE, batch=1, seed=seed, save_every=0)
            train(method, run, OptimizerSettings(schedule="cosine"))
            return LoraFile(session.tensors()[0], {}, steps)


# -- examined ----------------------------------------------------------------------------------------------------------


def lesson_questions(shape):
    return [one | {"shape": shape} for one in lesson.EXAM]


def kept_questions():
    """Large shapes that the model knows, in every colour, on two grounds in turn."""
    grounds = tuple(shapes.GROUNDS)
    return [
        dict(shape=name, colour=colour, size="large", ground=grounds[(at + turn) % 3])
        for name in shapes.SEEN
        for at, colour in enumerate(shapes.COLOURS)
        for turn in (0, 1)
    ]


def exam(toy, lora, shape, steps=sampling.STEPS_DISTILLED, cfg=1.0) -> dict[str, float]:
    """learnt: share of pictures asked for the new shape that show it; kept: share of 48 known pictures that show all
    that was asked."""
    model = None if lora is None else host.lora_keys.apply_lora(toy.model, None, lora)[0]
    how = dict(steps=steps, cfg=cfg, model=model, batch=48)
    with torch.inference_mode():
        learnt = sampling.accuracy(toy, lesson_questions(shape), FIRST_SEED, **how)
        kept = sampling.accuracy(toy, kept_questions(), FIRST_SEED + 1000, **how)
    return {
        "learnt": learnt["shape"],
        "learnt, all asked": learnt["all"],
        "kept": kept["all"],
        "kept shape": kept["shape"],
    }
