"""What every Train node does with a run: found finished or continued, trained on the loaded model, kept whatever
happens."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math

from ...trainers.files import LoraFile, lora_metadata
from ...trainers.loop import train
from ...trainers.memory.compile import describe_compile_error, format_not_compiled, is_compile_error
from ...trainers.monitor.strength_curve import StrengthCurve
from ...trainers.runs import RunFolder, read_run_record
from ...trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings, compute_fingerprint
from .. import host, paths
from ..page import live
from . import planner
from .validation import MonitorConfig, make_validation_monitor, open_tensorboard

CALIBRATE_AFTER, CALIBRATE_EVERY, CALIBRATE_OFF = CALIBRATE_MODES = ("after training", "at every save", "off")


@dataclasses.dataclass(kw_only=True)
class TrainingJob:
    """One run. What differs between the Train nodes is in the methods up to `about`."""

    model: object
    run: RunSettings
    adapter: AdapterSettings
    optimizing: OptimizerSettings
    noise: NoiseSettings
    name: str
    checkpointing: str
    graph: dict
    node_id: str
    clip: object = None
    calibrate: str = CALIBRATE_OFF
    curve: StrengthCurve | None = None
    exported_lora: LoraFile | None = None  # what was written last
    looking: MonitorConfig | None = None  # Validation and Previews
    store: RunFolder | None = None
    live: live.Live | None = None
    watched: object = None  # what looked at the run
    board_writer: object = None  # its TensorBoard files
    memory: float = 0.0  # bytes that a step needs beside the weights
    retry_cheaper: bool = False  # when memory runs out
    compile_blocks: bool = False
    closing_note: str = ""  # what the person should know at the end, too
    auto_batch: bool = False  # it is left open, and the run has not begun
    can_split_batch: bool = False  # what is asked for need not go through the model at once
    kind = ""  # of the method and its version: part of the fingerprint

    def check(self):
        """Raises ValueError for what can be known before the long work."""

    def parts(self) -> tuple:
        """What the result depends on beside the records above: fingerprints, settings records, JSON-able values."""
        raise NotImplementedError

    def records(self) -> tuple:
        """Settings records of the method's own, for the run folder."""
        return ()

    def largest(self) -> tuple[int, ...]:
        """The largest latent (C, ..., h, w) of a step."""
        raise NotImplementedError

    def room(self) -> float:
        """Bytes that other models need beside this one while it trains."""
        return 0.0

    def prepare(self):
        """Work before the model is loaded for training, such as encoding prompts."""

    def method(self, session):
        raise NotImplementedError

    def watch(self, session, method):
        """What looks at the run between two steps (see trainers.loop.train), or None."""
        return make_validation_monitor(self, session, method) if self.looking else None

    names_worst = True  # whether what is trained on has names

    def exam(self, session, method, data, count):
        """The questions of the validation loss (trainers/monitor/) about `data`, at most `count` of them; None for
        methods that are watched otherwise."""
        return None

    def check_held_out(self, data):
        """Raises ValueError for held-out pictures that nothing can be asked about."""
        data.require_conditionings()

    def default_sample_prompts(self):
        """([(text, conditioning)], (text, conditioning) to avoid or None) that samples show when nobody asked for
        others."""
        return first_distinct_captions(self.data) if getattr(self, "data", None) else ([], None)

    def side(self) -> int:
        """px: the size of samples where no pictures are trained on that could tell."""
        return 512

    def probe(self, session):
        """(x0, conds) that the gradients of an unknown family are checked on."""
        raise NotImplementedError

    def about(self) -> dict:
        """resolution and dataset, for the metadata."""
        raise NotImplementedError

    def planned(self) -> dict[str, float]:
        """Forwards that a step is expected to cost, by kind, for methods whose steps ask the model several times."""
        return {}

    def measured(self, session) -> StrengthCurve | None:
        """The curve of the adapters as they are now, for methods that have one."""
        return None

    # -- the same for all ----------------------------------------------------------------------------------------------

    def result(self):
        """(LoRA, losses, a line for the person). A run that is already finished is read from its file."""
        self.check()
        if self.looking:
            self.looking.check_job(self)
        ending = self.looking.settings.ending() if self.looking else {}
        self.store = folder = RunFolder(
            paths.runs_folder(),
            self.name,
            self.fingerprint(),
            self.recipe(),
            self.run.steps,
            ending=ending,
            graph=self.graph,
        )
        self.live = live.start_live_run(self.node_id, self.graph, self.name, folder.folder.name, self.run.steps)
        if (done := folder.finished()) is not None:
            line = f"already trained: {folder.lora_path(self.run.steps).name} was read, nothing was trained again"
            self.live.restore_finished(done[1], folder.read().get("watch") or {}, line)
            return *done, line
        folder.check_writable()
        lora, losses = self.trained(folder)
        line = self.line(losses, lora, folder)
        self.live.end(live.FINISHED, line)
        return lora, losses, line

    def line(self, losses, lora, folder) -> str:
        """What was done, for a person."""
        done = (
            f"{len(losses)} steps"
            if len(losses) == self.run.steps
            else f"{len(losses)} of {self.run.steps} steps, ended early"
        )
        best = f", the weights of step {lora.steps} are the result" if lora.steps != len(losses) else ""
        loss = sum(losses[-20:]) / len(losses[-20:])
        more = "".join(f"; {said}" for said in (self.format_monitor_result(), self.closing_note) if said)
        return (
            f"{done}, loss {loss:.4f}, {len(host.lora_keys.list_lora_layers(lora))} layers in "
            f"{folder.folder.name}{best}{more}"
        )

    def format_monitor_result(self) -> str:
        return getattr(self.watched, "line", str)()

    def recipe(self) -> dict:
        records = (self.adapter, self.optimizing, self.noise, self.run, *self.records())
        recipe = {type(r).__name__: r.to_dict() for r in records} | {
            "checkpointing": self.checkpointing,
            "compile_blocks": self.compile_blocks,
            **self.about()["dataset"],
        }
        return recipe | {"model": live.find_model_file(self.graph, self.node_id)}

    def fingerprint(self) -> str:
        """Of all that changes the result. The number of steps is not part of it, so that a run can be continued to
        more."""
        run = {k: v for k, v in self.run.to_dict().items() if k not in ("steps", "save_every")}
        clip = (
            host.identity.hash_patched_weights(self.clip.patcher, self.clip.layer_idx)
            if self.adapter.text_encoder and self.clip
            else ""
        )
        return compute_fingerprint(
            self.kind,
            *self.parts(),
            host.identity.hash_model_and_schedule(self.model),
            clip,
            self.adapter,
            self.optimizing,
            self.noise,
            run,
        )

    def init_batch_size(self, folder):
        """Batch and accumulate as an earlier part of the run had them; a batch that is left open is one picture until
        it is chosen."""
        begun = folder.load_batch_sizes()
        self.auto_batch = not begun and self.run.batch == 0
        self.can_split_batch = not begun and not self.auto_batch
        self.take(
            folder.sizes.get("batch", self.run.batch or 1), folder.sizes.get("accumulate", self.optimizing.accumulate)
        )

    def take(self, batch: int, accumulate: int):
        self.run = dataclasses.replace(self.run, batch=batch)
        self.optimizing = dataclasses.replace(self.optimizing, accumulate=accumulate)

    def trained(self, folder):
        self.init_batch_size(folder)
        self.prepare()
        if self.looking:
            self.looking.encode()
        try:
            lora, losses = self.train_with_fallback(folder)
        except BaseException as error:
            self.live.broken(error)
            if folder.saved:
                host.progress.show_node_text(
                    f"stopped; step {folder.saved} of {self.run.steps} is saved, Run goes on from there", self.node_id
                )
            raise
        host.lora_keys.check_lora_loads(self.model, self.clip, lora)
        return lora, losses

    def train_with_fallback(self, folder):
        """(LoRA, losses). Once more from the last saved step when memory runs out and the user allows it, under the
        plan that needs less, and when a program for a block cannot be made in the middle of a step, without
        compiling."""
        try:
            return self.train_once(folder, self.checkpointing)
        except host.memory.OutOfMemory as error:
            if not (self.retry_cheaper and error.cheaper_plan):
                raise
            plan, why = (
                error.cheaper_plan,
                f"out of memory with checkpointing {error.plan!r}; once more with {error.cheaper_plan!r}",
            )
        except Exception as error:
            if not (self.compile_blocks and is_compile_error(error)):
                raise
            self.compile_blocks, plan, why = (
                False,
                self.checkpointing,
                format_not_compiled(describe_compile_error(error)),
            )
            self.closing_note = why
        folder.export = self.watched = None  # they hold the failed step
        host.memory.release_cached_memory()
        self.live.say(why)
        return self.train_once(folder, plan)

    def train_once(self, folder, checkpointing):
        self.memory = (
            host.memory.estimate_training_memory(self.model, self.largest(), self.run.batch, checkpointing)
            + self.room()
        )
        plan = checkpointing
        try:
            with host.session.open_training_session(
                self.model,
                self.adapter,
                clip=self.clip,
                seed=self.run.seed,
                checkpointing=checkpointing,
                memory=self.memory,
                compiling=self.tell if self.compile_blocks else None,
            ) as session:
                if not session.family.known:
                    host.checks.check_gradients(session, *self.probe(session))
                method, forecast = planner.plan_run(session, self, checkpointing)
                self.show_forecast(forecast, folder)
                folder.sizes = {"batch": self.run.batch, "accumulate": self.optimizing.accumulate}
                self.auto_batch = self.can_split_batch = False
                plan = session.blocks.plan
                folder.export = lambda step: self.lora(session, step)
                with open_tensorboard(self) as board:
                    report = ReporterGroup(
                        self.live, board, host.progress.NodeProgressReporter(self.run.steps, self.node_id)
                    )
                    self.watched = self.watch(session, method)
                    losses = train(method, self.run, self.optimizing, report=report, store=folder, watch=self.watched)
                return self.exported_lora, losses
        except Exception as error:
            if host.memory.is_out_of_memory_error(error):
                raise host.memory.OutOfMemory(self.run, plan) from error
            raise

    def tell(self, text: str):
        self.closing_note = text
        self.live.say(text)
        host.progress.show_node_text(text, self.node_id)
        logging.info("Trainyard: %s: %s", self.name, text)

    def show_forecast(self, forecast, folder):
        """Says what the rest of the run will cost: memory and time, where they were measured, and forwards, where they
        are planned."""
        done = (read_run_record(folder.folder / "run.json") or {}).get("step", 0)
        parts = [forecast.format_line(max(0, self.run.steps - done))] if forecast else []
        if found := self.planned():
            parts.append(f"forwards per step: {format_counts_per_step(found, 1)} planned")
        if not parts:
            return
        line = "; ".join(parts)
        self.live.say(line)
        host.progress.show_node_text(line, self.node_id)
        logging.info("Trainyard: %s: %s", self.name, line)

    def lora(self, session, steps):
        tensors, untouched = session.tensors()
        if untouched:
            host.progress.log_once(
                f"{len(untouched)} layers are never used by this model and are left out of the file, for example "
                f"{untouched[0]}"
            )
        metadata = lora_metadata(
            title=self.name,
            base=session.family.base,
            architecture=session.family.architecture,
            prediction=session.denoiser.prediction,
            adapter=self.adapter,
            optimizing=self.optimizing,
            noise=self.noise,
            run=self.run,
            steps=steps,
            **self.about(),
        )
        if self.needs_curve(steps):
            self.curve = self.measured(session)
            metadata["trainyard.curve"] = self.curve.to_json()
        self.exported_lora = LoraFile(tensors, {**metadata, **self.graph}, steps)
        return self.exported_lora

    def needs_curve(self, step) -> bool:
        """Whether the file of this step gets its curve; a run that is stopped in between does not wait for one."""
        every, why = self.run.save_every, self.store.why if self.store else ""
        due = (
            why == "finished"
            or step == self.run.steps
            or (self.calibrate == CALIBRATE_EVERY and every > 0 and step % every == 0)
        )
        return self.calibrate != CALIBRATE_OFF and due and why != "best"


class ReporterGroup:
    """One report to the page's chart, to TensorBoard and to the host, which may raise its interrupt."""

    def __init__(self, *to):
        self.to = [report for report in to if report is not None]

    def __call__(self, progress):
        for report in self.to:
            getattr(report, "report", report)(progress)


def format_counts_per_step(counts, steps) -> str:
    """4.0 (2.0 frozen + 2.0 student)"""
    parts = " + ".join(f"{count / steps:.1f} {what}" for what, count in counts.items() if count)
    return f"{sum(counts.values()) / steps:.1f} ({parts})"


def unwrap_list_input(values):
    """The value behind an input of a node whose inputs come as lists."""
    return values[0] if values else None


def largest_latent_shape(data) -> tuple[int, ...]:
    return max({item.shape for item in data.items}, key=math.prod)


def most_common_resolution(data) -> str:
    """The commonest picture size as WIDTHxHEIGHT in pixels, or "unknown" where only latents were given."""
    buckets = collections.Counter(item.bucket for item in data.items if item.bucket)
    return "x".join(map(str, buckets.most_common(1)[0][0])) if buckets else "unknown"


def dataset_gradient_check_inputs(data, session):
    batch = data.batch([0], host.progress.make_generator(0))
    return session.denoiser.model_space(batch.x0), batch.conds


def first_distinct_captions(data, count: int = 2):
    """([(text, conditioning)], (text, conditioning) of the empty caption or None): the first captions of a dataset that
    differ."""
    plain, found = dataclasses.replace(data, dropout=0.0), {}
    for pick in range(min(len(data.items), 50)):
        batch = plain.batch([pick], host.progress.make_generator(0))
        found.setdefault(batch.captions[0] or f"caption {len(found) + 1}", batch.conds[0])
        if len(found) == count:
            break
    away = (
        None
        if data.empty is None
        else ("", {**data.store.load(data.empty), **host.session.extract_size_conditioning(next(iter(found.values())))})
    )
    return list(found.items()), away
