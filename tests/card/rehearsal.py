"""A training run from top to bottom on the pretend card: opened, planned, validated, sampled, stepped, saved, unloaded.

    python tests/card/rehearsal.py '{"family": "flux", "gib": 0.02, "plan": "off"}' '{...}'

Prints one line of JSON for each: a Rehearsal. To be run in a process of its own, because torch cannot unlearn a device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import pathlib
import sys
import traceback

if "trainyard" not in sys.modules:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
    import pack

    pack.boot()

import comfy.model_management as mm
import torch
from comfy.model_patcher import CoreModelPatcher
from comfy.weight_adapter.lora import LoRAAdapter
from trainyard.benchmarks import published, shapes
from trainyard.nodes import host
from trainyard.nodes.scores import latents
from trainyard.nodes.train import leco, leco_score, planner, run
from trainyard.nodes.train.image_pairs import PairTask
from trainyard.nodes.train.job import TrainingJob
from trainyard.nodes.train.train_lora import LoraTask
from trainyard.nodes.train.validation import MonitorConfig
from trainyard.nodes.train.widgets import PlaceSettings
from trainyard.tests.card import device
from trainyard.tests.card.host import plug_in
from trainyard.tests.comfy import families, more_families
from trainyard.trainers import loop
from trainyard.trainers.data.concept_prompts import PromptRow
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.data.signed_prompts import SignedPrompt
from trainyard.trainers.memory.plan import PLAN_AUTO, PLAN_OFF
from trainyard.trainers.methods.image_pairs import AddiftTraining, ImageSlider
from trainyard.trainers.methods.leco_score import LecoScoreSettings
from trainyard.trainers.monitor.previews import PreviewSettings
from trainyard.trainers.monitor.validation import ValidationSettings
from trainyard.trainers.scores.networks import LatentResNet, ScoreModelInfo, Scorer, ScorerEnsemble, ScorerSettings
from trainyard.trainers.scores.objective import ScoreSettings
from trainyard.trainers.scores.training import train_score_model
from trainyard.trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, PointSettings, RunSettings

MIN_SCORED_IMAGES = 24
families.TABLE |= more_families.MORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What is rehearsed."""

    family: str
    gib: float = 24  # memory of the card
    room: float = 0  # where not 0: the card has room for so many times the weights, beside what ComfyUI keeps free
    plan: str = PLAN_AUTO
    dtype: str = "bfloat16"  # that the weights are stored in
    size: str = "tiny"  # or "published"
    batch: int = 1
    steps: int = 2
    accumulate: int = 1
    bf16: bool = True  # whether the card computes in it
    fp64: bool = True  # whether the card knows float64
    vram: str = "NORMAL_VRAM"  # or HIGH_VRAM: what ComfyUI was started with
    index: int = 0  # of the card among several
    patched: bool = False  # whether a LoRA is active in the MODEL
    monitored: bool = True  # with a validation and samples before, between and after the steps
    captions: str = "equal"  # or "of several lengths"
    reference: bool = False  # whether each image comes with the latent of another one, at toy size
    estimate: float = 0  # GiB: where not 0, what a step is thought to take when the model is loaded
    method: str = "lora"  # or "image slider", "difference", "leco", "leco-score", "score"


@dataclasses.dataclass(kw_only=True)
class Rehearsal:
    """What happened. Bytes; those of a step are of the last one, the first makes the optimizer's numbers."""

    scene: Scene
    error: str = ""
    plan: str = ""
    batch: int = 0
    weights: int = 0  # of the whole model
    weights_on_card: int = 0  # when the first step began
    weights_on_card_at_last: int = 0  # when the last step began
    forecast: int = 0  # beside the weights, as it is counted before the run
    peak: int = 0  # of a step, beside the weights that lay on the card then, and beside the adapters
    card_peak: int = 0  # of a step, in all
    up: int = 0
    up_beside: int = 0  # of these, while the card computes
    down: int = 0
    waiting_copies: list[str] = dataclasses.field(default_factory=list)  # within any step
    reads: list[str] = dataclasses.field(default_factory=list)  # within any step
    implicit_copies: list[str] = dataclasses.field(default_factory=list)  # within any step
    float64: list[str] = dataclasses.field(default_factory=list)  # within any step
    races: list[str] = dataclasses.field(default_factory=list)  # within any step
    down_copies: list[str] = dataclasses.field(default_factory=list)  # within the last step
    page_locked: int = 0  # registrations of the whole run
    freed_while_locked: int = 0
    locked_afterwards: int = 0
    left_on_card: int = 0  # when everything is unloaded
    compute_dtype: str = ""


def find_shape(scene: Scene) -> shapes.Shape:
    if scene.size == "published":
        return published.PUBLISHED[scene.family]
    family = families.TABLE[scene.family]
    reference = family.latent if scene.reference else ()
    return shapes.Shape(family, rank=4, tokens=7, about="toy size", reference=reference)


def make_model(scene: Scene):
    """The MODEL as a loader gives it: made under inference mode, in the CPU's memory. At published size its memory is
    never touched, so that it costs none."""
    dtype = getattr(torch, scene.dtype)
    compute = torch.bfloat16 if dtype.itemsize == 1 else None  # what ComfyUI casts fp8 weights to
    if scene.size == "tiny" and compute is None:
        return families.make(scene.family, dtype=dtype, inference=True)
    with torch.inference_mode():
        model = shapes.base_model(find_shape(scene), dtype, "cpu", compute)
    return CoreModelPatcher(model, load_device=mm.get_torch_device(), offload_device=torch.device("cpu"))


def patch_matrices(model):
    """As Load LoRA does, with rank 2 on each matrix of the network."""
    weights = {name: value for name, value in model.model.state_dict().items() if value.ndim == 2}
    low_rank = lambda out, inner: (torch.ones(out, 2), torch.ones(2, inner), 2.0, None, None, None)
    patches = {name: LoRAAdapter(set(), low_rank(*value.shape)) for name, value in weights.items()}
    assert model.add_patches(patches)


def make_caption(scene: Scene, tokens: int, rng) -> list:
    """[cross attention, extras] as a text encoder gives them."""
    cross, extras = shapes.caption(dataclasses.replace(find_shape(scene), tokens=tokens), rng)
    extras.setdefault("pooled_output", None)  # as of ComfyUI's text encoders without one
    if scene.family == "anima":  # its text encoder also hands over T5 tokens, (T,) without a batch axis
        extras |= {"t5xxl_ids": torch.randint(0, 32128, (tokens,), generator=rng), "t5xxl_weights": torch.ones(tokens)}
    return [cross, extras]


def make_dataset(scene: Scene, count: int = 4) -> EncodedDataset:
    """Images that are pairs, too: two by two."""
    shape, rng = find_shape(scene), torch.Generator().manual_seed(5)
    samples = [{"samples": torch.randn((1, *shape.family.latent), generator=rng)} for _ in range(count)]
    longer = 5 if scene.captions != "equal" else 0
    data = EncodedDataset.from_core(
        samples, [[make_caption(scene, shape.tokens + longer * n, rng)] for n in range(count)]
    )
    data.items = [
        dataclasses.replace(item, pair=str(n // 2), strength=(1.0, -1.0)[n % 2]) for n, item in enumerate(data.items)
    ]
    return data


def encode_texts(scene: Scene, texts) -> dict[str, dict]:
    """Text -> its conditioning, without a text encoder."""
    found = {}
    for text in texts:
        cross, extras = make_caption(scene, find_shape(scene).tokens, torch.Generator().manual_seed(3))
        found[text] = {"cross_attn": cross, **extras}
    return found


class EncodedPromptTask(leco.PromptDifferenceTask):
    """Train LECO with prompts that are encoded already."""

    def check(self, job): ...

    def fingerprint_parts(self, job):
        return self.slider, self.points, self.place

    def encode_prompts(self, job):
        return encode_texts(self.scene, self.list_texts(job))


class EncodedScoreTask(leco_score.LecoScoreTask):
    """Train LECO-Score with prompts that are encoded already."""

    def check(self, job): ...

    def fingerprint_parts(self, job):
        return self.settings, self.place

    def encode_prompts(self, job):
        return encode_texts(self.scene, self.list_texts())


def make_score_model(channels: int) -> ScorerEnsemble:
    """Of the size that Train Score Model makes by default, in the CPU's memory."""
    info = ScoreModelInfo(channels=channels)
    return ScorerEnsemble([Scorer(LatentResNet(channels, info.width, info.depth), 1)], info)


def make_task(scene: Scene):
    """What is trained."""
    pixels = 8 * find_shape(scene).family.latent[-1]
    if scene.method == "leco":
        row = PromptRow("cat", None, "", None, "erase", 1.0)
        points = PointSettings(points="rollout", sampling_steps=4, ways=2)
        task = EncodedPromptTask(rows=(row,), slider=False, points=points, place=PlaceSettings(resolution=pixels))
        object.__setattr__(task, "scene", scene)
        return task
    if scene.method == "leco-score":
        task = EncodedScoreTask(
            prompts=(SignedPrompt("a cat"), SignedPrompt("a dog", 0.0)),
            scores=((make_score_model(find_shape(scene).family.latent[0]), 1.0),),
            held_out=None,
            settings=LecoScoreSettings(sampling_steps=4, ways=1),
            monitor_settings=leco_score.WatchSettings(watch_every=1, patience=2),
            place=leco_score.ScorePlace(resolution=pixels),
        )
        object.__setattr__(task, "scene", scene)
        return task
    if scene.method == "lora":
        return LoraTask(data=make_dataset(scene))
    kinds = {"image slider": ImageSlider, "difference": AddiftTraining}
    return PairTask(data=make_dataset(scene), method_class=kinds[scene.method])


def train_score(scene: Scene, model):
    """Train Score Model with its default network on latents of this family."""
    data = make_dataset(scene, count=MIN_SCORED_IMAGES)
    data.items = [dataclasses.replace(item, score=float(n), pair=None) for n, item in enumerate(data.items)]
    schedule = latents.NoiseSchedule(model)
    settings = ScoreSettings(steps=scene.steps, members=2)
    with host.context.enable_gradients():
        train_score_model(data, schedule, ScorerSettings(), settings, device=schedule.device)


def make_job(scene: Scene, model, name: str) -> TrainingJob:
    monitoring = MonitorConfig(
        settings=ValidationSettings(every=1, images=1, levels=2, name_worst=0),
        previews=PreviewSettings(preview_every=1, sampling_steps=1, guidance=1.0),
    )
    return TrainingJob(
        task=make_task(scene),
        model=model,
        run=RunSettings(steps=scene.steps, learning_rate=1e-4, batch=scene.batch, seed=1, save_every=0),
        adapter=AdapterSettings(rank=find_shape(scene).rank),
        optimizing=OptimizerSettings(accumulate=scene.accumulate),
        noise=NoiseSettings(),
        name=name,
        checkpointing=scene.plan,
        graph={},
        node_id=None,
        monitoring=monitoring if scene.monitored else None,
    )


class StepWatch:
    """Where the steps of the loop begin and end, what they moved, and what lay on the card."""

    def __init__(self, card, model, about: Rehearsal):
        self.card, self.model, self.about = card, model, about
        self.steps = []  # CardTraffic
        self.weights_on_card = []  # bytes, when each step began
        self.adapters = 0  # bytes of all else that lay on the card when the first step began

    @contextlib.contextmanager
    def attached(self):
        rng, add, plan, threshold = loop.step_rng, loop.PendingLosses.add, planner.plan_run, planner.MIN_MEASURED_STEPS
        check, count = host.checks.find_right_plans, planner.count_step_memory
        estimate = host.memory.estimate_training_memory

        def begin_step(seed, step):
            self.begin()
            return rng(seed, step)

        def end_step(pending, loss, norm):
            add(pending, loss, norm)
            self.steps.append(self.card.current)
            self.card.begin_part()

        def plan_run(session, *rest):
            planned = plan(session, *rest)
            self.about.plan, self.about.batch = session.blocks.plan, planned.job.run.batch
            self.about.compute_dtype = str(session.denoiser.model.get_dtype_inference()).removeprefix("torch.")
            self.about.forecast = planned.forecast.peak_bytes if planned.forecast else 0
            return planned

        try:
            loop.step_rng, loop.PendingLosses.add = begin_step, end_step
            planner.plan_run, planner.MIN_MEASURED_STEPS = plan_run, 0
            # of an unknown family: it is about numbers
            host.checks.find_right_plans = lambda session, x0, conds, plans, check: plans
            if self.about.scene.estimate:
                host.memory.estimate_training_memory = lambda *_: self.about.scene.estimate * 2**30
            if self.about.scene.method == "leco-score":  # it looks back by itself and cannot be counted: torch's engine
                planner.count_step_memory = lambda probe: None  # does not survive the error that says so on this card
            yield self
        finally:
            loop.step_rng, loop.PendingLosses.add = rng, add
            planner.plan_run, planner.MIN_MEASURED_STEPS = plan, threshold
            host.checks.find_right_plans, planner.count_step_memory = check, count
            host.memory.estimate_training_memory = estimate

    def begin(self):
        gc.collect()  # a real card's figures are read after a collection, too
        self.card.begin_part()
        on_card = sum(p.nbytes for p in self.model.model.parameters() if p.device.type == device.CARD_TYPE)
        if not self.steps:
            self.adapters = self.card.live - on_card
        self.weights_on_card[len(self.steps) :] = [on_card]  # a step may begin anew with a smaller loss scale

    def report(self):
        """Into the Rehearsal."""
        about, last = self.about, self.steps[-1]
        about.card_peak = max(step.peak for step in self.steps)
        taken = (step.peak - weights for step, weights in zip(self.steps, self.weights_on_card, strict=False))
        about.peak = max(taken) - self.adapters  # the same weights need not lie there in every step
        about.weights_on_card, about.weights_on_card_at_last = self.weights_on_card[0], self.weights_on_card[-1]
        about.up, about.up_beside, about.down = last.up, last.up_beside, last.down
        about.down_copies = last.down_copies
        about.reads = [place for step in self.steps for place in step.reads]
        about.waiting_copies = [place for step in self.steps for place in step.waiting_copies]
        about.float64 = [place for step in self.steps for place in step.float64]
        about.races = [place for step in self.steps for place in step.races]
        about.implicit_copies = [place for step in self.steps for place in step.implicit_copies]


def rehearse(scene: Scene, name: str) -> Rehearsal:
    about = Rehearsal(scene=scene)
    card = device.PretendCard(scene.gib * 2**30)
    with plug_in(card, scene.bf16, scene.fp64, scene.vram, scene.index) as driver:
        model = make_model(scene)
        if scene.patched:
            patch_matrices(model)
        about.weights = model.model_size()
        if scene.room:
            card.total = int(mm.minimum_inference_memory() + scene.room * about.weights)
        watch = StepWatch(card, model, about)
        try:
            with watch.attached(), torch.inference_mode():
                if scene.method == "score":
                    about.plan = PLAN_OFF  # it has no other
                    train_score(scene, model)
                else:
                    run.run_training(make_job(scene, model, name))
        except Exception as error:
            about.error = describe_error(error)
        if watch.steps:
            watch.report()
        about.page_locked = driver.total
        mm.unload_all_models()
        del model, watch
        gc.collect()
        mm.cleanup_models()
        gc.collect()
        about.left_on_card = card.live
        about.freed_while_locked, about.locked_afterwards = driver.freed, len(driver.registered)
    return about


def describe_error(error: Exception) -> str:
    """Type and message, those of its first cause, and the last places of that which are no torch code."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    frames = [f for f in traceback.extract_tb(root.__traceback__) if "site-packages" not in f.filename]
    places = " < ".join(f"{pathlib.Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-6:]))
    causes = [error] if root is error else [error, root]
    return " < ".join(f"{type(cause).__name__}: {str(cause)[:400]}" for cause in causes) + f" at {places}"


def main():
    device.register_card()
    for number, text in enumerate(sys.argv[1:]):
        scene = Scene(**json.loads(text))
        print(json.dumps(dataclasses.asdict(rehearse(scene, f"rehearsal {number}"))), flush=True)


if __name__ == "__main__":
    main()
