"""A run of a Train node, from top to bottom: checked, found finished or continued, trained on the loaded model, kept
whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

from ...trainers.files import LoraFile, lora_metadata
from ...trainers.loop import format_skipped_steps, mean_recent_loss, train
from ...trainers.memory.compile import describe_compile_error, format_not_compiled, is_compile_error
from ...trainers.monitor.strength_curve import StrengthCurve
from ...trainers.run_records import read_run_record
from ...trainers.runs import RunFolder
from .. import host, paths
from ..page import live
from . import planner
from .job import CALIBRATE_EVERY, CALIBRATE_OFF, BuiltMethod, TrainingJob
from .validation import make_validation_monitor


@dataclasses.dataclass(kw_only=True)
class TrainingResult:
    """What a run leaves."""

    lora: LoraFile
    losses: list[float]  # one per step
    line: str  # what was done, for a person
    folder: RunFolder
    live_run: live.LiveRun
    built: BuiltMethod | None = None  # None when the run was finished before and only read
    curve: StrengthCurve | None = None  # the last one that was measured


def run_training(job: TrainingJob) -> TrainingResult:
    """check -> find the run finished, or resume it -> encode prompts -> open the session -> plan -> train -> export.

    Raises ValueError for what can be known before the long work. The host's interrupt and errors go on after the last
    complete step was saved."""
    job.check()
    folder = open_run_folder(job)
    live_run = live.start_live_run(job.node_id, job.graph, job.name, folder.folder.name, job.run.steps)
    with live_run.ending_with_work():
        return read_finished_run(job, folder, live_run) or train_in_folder(job, folder, live_run)


def read_finished_run(job: TrainingJob, folder: RunFolder, live_run: live.LiveRun) -> TrainingResult | None:
    """The result of an earlier run of this very job, or None."""
    if (finished := folder.load_finished()) is None:
        return None
    line = f"already trained: {folder.lora_path(job.run.steps).name} was read, nothing was trained again"
    lora, losses = finished
    live_run.restore_finished(losses, folder.read_state().get("watch") or {}, line)
    return TrainingResult(lora=lora, losses=losses, line=line, folder=folder, live_run=live_run)


def train_in_folder(job: TrainingJob, folder: RunFolder, live_run: live.LiveRun) -> TrainingResult:
    """Train, or go on. Nobody else is at work in the folder meanwhile."""
    folder.check_writable(list_tensorboard_files(job, folder))
    display = RunDisplay(job, live_run)
    folder.notify = display.show_note
    with folder.hold():
        folder.load()  # what is wrong with it is said before the long work
        job, sizing = planner.resolve_batch_size(job, folder)
        prompts = job.task.encode_prompts(job)
        samples = job.monitoring.encode_prompts(job.task.data) if job.monitoring else None
        task = job.task.prepare(job, prompts, folder.folder, display.show_status)
        job = dataclasses.replace(job, task=task)
        try:
            result = train_with_fallback(RunAttempt(job, sizing, prompts, samples, folder, display))
        except BaseException:
            if folder.saved_step:
                text = f"stopped; step {folder.saved_step} of {job.run.steps} is saved, Run goes on from there"
                host.progress.show_node_text(text, job.node_id)
            raise
    host.lora_keys.check_lora_loads(job.model, job.clip, result.lora)
    live_run.set_ended(live.FINISHED, result.line)
    return result


def list_tensorboard_files(job: TrainingJob, folder: RunFolder) -> list[Path]:
    """The longest path that TensorBoard will write, if it is asked for."""
    if not (job.monitoring and job.monitoring.settings.tensorboard):
        return []
    from ...trainers.monitor.tensorboard import FOLDER_NAME, longest_event_path

    return [longest_event_path(folder.folder / FOLDER_NAME)]


def open_run_folder(job: TrainingJob) -> RunFolder:
    return RunFolder(
        paths.runs_folder(),
        job.name,
        job.fingerprint(),
        job.run_record(),
        job.run.steps,
        ending_rules={**job.task.ending_rules(), **(job.monitoring.settings.ending() if job.monitoring else {})},
        graph=job.graph,
    )


@dataclasses.dataclass(frozen=True)
class RunAttempt:
    """All that is ready before the model is loaded for training."""

    job: TrainingJob
    sizing: planner.BatchSizing
    prompts: dict[str, dict]  # text -> conditioning, for the method
    samples: tuple | None  # what monitoring encoded for its samples
    folder: RunFolder
    display: RunDisplay


def train_with_fallback(attempt: RunAttempt) -> TrainingResult:
    """Once more from the last saved step when memory runs out and the user allows it, under the plan that needs less,
    and when a program for a block cannot be made in the middle of a step, without compiling."""
    job, plan = attempt.job, attempt.job.checkpointing
    try:
        return train_once(attempt, plan)
    except host.memory.OutOfMemory as error:
        if not (job.retry_cheaper and error.cheaper_plan):
            raise
        plan = error.cheaper_plan
        why = f"out of memory with checkpointing {error.plan!r}; once more with {error.cheaper_plan!r}"
    except Exception as error:
        if not (job.compile_blocks and is_compile_error(error)):
            raise
        job = dataclasses.replace(job, compile_blocks=False)
        why = attempt.display.closing_note = format_not_compiled(describe_compile_error(error))
    attempt.folder.export_lora = None  # it holds the failed step
    host.memory.release_cached_memory()
    attempt.display.live_run.set_text(why)
    if sizes := attempt.folder.batch_sizes:  # chosen before it failed
        job = job.with_batch(sizes["batch"], sizes["accumulate"])
        attempt = dataclasses.replace(attempt, sizing=planner.FIXED_BATCH)
    return train_once(dataclasses.replace(attempt, job=job), plan)


def train_once(attempt: RunAttempt, checkpointing: str) -> TrainingResult:
    job, folder, display = attempt.job, attempt.folder, attempt.display
    memory = host.memory.estimate_training_memory(
        job.model, job.task.largest_shape(job), job.run.batch, checkpointing
    ) + job.task.extra_memory(job)
    plan = checkpointing
    try:
        with host.session.open_training_session(
            job.model,
            job.adapter,
            clip=job.clip,
            seed=job.run.seed,
            checkpointing=checkpointing,
            memory=memory,
            compiling=display.show_note if job.compile_blocks else None,
            assistant=job.assistant,
        ) as session:
            plans = planner.list_plans(session, checkpointing)
            if not session.family.known:
                inputs = job.task.gradient_check_inputs(job, session, attempt.prompts)
                plans = host.checks.find_right_plans(session, *inputs, plans, host.checks.check_gradients)
            planned = planner.plan_run(session, job, attempt.prompts, attempt.sizing, checkpointing, plans)
            job, built, plan = planned.job, planned.built, session.blocks.plan
            display.show_forecast(planned.forecast, built.planned_forwards(), folder)
            folder.batch_sizes = {"batch": job.run.batch, "accumulate": job.optimizing.accumulate}
            exporter = LoraExporter(job, session, built, folder)
            folder.export_lora = exporter.export
            with display.open_tensorboard(folder):
                validation = make_validation_monitor(job, session, built, attempt) if job.monitoring else None
                monitor = built.make_monitor(validation)
                losses = train(
                    built.method,
                    job.run,
                    job.optimizing,
                    report=display.report,
                    store=folder,
                    monitor=monitor,
                    loss_scale=host.session.make_loss_scale(session),
                )
            return TrainingResult(
                lora=exporter.last,
                losses=losses,
                line=format_result(
                    job, losses, exporter.last, folder, monitor, [*built.notes(), *display.closing_notes()]
                ),
                folder=folder,
                live_run=display.live_run,
                built=built,
                curve=exporter.curve,
            )
    except Exception as error:
        if host.memory.is_out_of_memory_error(error):
            raise host.memory.OutOfMemory(job.run, plan, job.model.load_device) from error
        raise


@dataclasses.dataclass
class LoraExporter:
    """The adapters of a session as LoRA files with metadata."""

    job: TrainingJob
    session: object  # host.session.TrainingSession
    built: BuiltMethod
    folder: RunFolder
    last: LoraFile | None = None
    curve: StrengthCurve | None = None

    def export(self, steps: int) -> LoraFile:
        job, session = self.job, self.session
        tensors, untouched = session.tensors()
        if untouched:
            host.progress.log_once(
                f"{len(untouched)} layers are never used by this model and are left out of the file, for example "
                f"{untouched[0]}"
            )
        metadata = lora_metadata(
            title=job.name,
            base=session.family.base_version,
            architecture=session.family.architecture,
            prediction=session.denoiser.prediction,
            adapter=job.adapter,
            optimizing=job.optimizing,
            noise=job.noise,
            run=job.run,
            steps=steps,
            **job.task.metadata_fields(),
        )
        if measured := self.needs_curve(steps):
            self.curve = self.built.measure_curve()
            metadata["trainyard.curve"] = self.curve.to_json()
        self.last = LoraFile(tensors, {**metadata, **job.graph, **self.built.extra_metadata(measured)}, steps)
        return self.last

    def needs_curve(self, step: int) -> bool:
        """Whether the file of this step gets its curve; a run that is stopped in between does not wait for one."""
        calibrate, every, why = self.job.calibrate, self.job.run.save_every, self.folder.save_reason
        if calibrate == CALIBRATE_OFF:
            return False
        if self.built.ends_early():
            return True
        at_save = calibrate == CALIBRATE_EVERY and every > 0 and step % every == 0
        return (why == "finished" or step == self.job.run.steps or at_save) and why != "best"


class RunDisplay:
    """What the person sees of a run: the page's chart, a line in the node, the log and TensorBoard."""

    def __init__(self, job: TrainingJob, live_run: live.LiveRun):
        self.job, self.live_run, self.tensorboard = job, live_run, None
        self.progress = host.progress.NodeProgressReporter(job.run.steps, job.node_id)
        self.closing_note = ""  # what the person should know at the end, too
        self.skipped = 0  # steps

    def report(self, progress):
        """Progress to the chart, to TensorBoard and to the host, which may raise its interrupt."""
        self.skipped = progress.skipped
        self.live_run.report(progress)
        if self.tensorboard is not None:
            self.tensorboard.report(progress)
        self.progress(progress)

    def show(self, text: str):
        self.live_run.set_text(text)
        host.progress.show_node_text(text, self.job.node_id)
        logging.info("Trainyard: %s: %s", self.job.name, text)

    def show_note(self, text: str):
        self.closing_note = text
        self.show(text)

    def closing_notes(self) -> list[str]:
        return [format_skipped_steps(self.skipped), self.closing_note]

    def show_status(self, text: str):
        """For texts that come often; raises the host's interrupt."""
        host.progress.raise_if_interrupted()
        if text != self.live_run.text:
            host.progress.show_node_text(text, self.job.node_id)
        self.live_run.set_text(text)

    def show_forecast(self, forecast, planned_forwards: dict[str, float], folder: RunFolder):
        """What the rest of the run will cost: memory and time, where they were measured, and forwards, where they are
        planned."""
        done = read_run_record(folder.folder)["step"]
        parts = [forecast.format_line(max(0, self.job.run.steps - done))] if forecast else []
        if planned_forwards:
            parts.append(f"forwards per step: {format_counts_per_step(planned_forwards, 1)} planned")
        if parts:
            self.show("; ".join(parts))

    def add_event(self, kind: str, entry: dict):
        """A measurement, a sheet of samples, or trouble with one."""
        self.live_run.add_event(kind, entry)
        if kind == "trouble":
            host.progress.show_node_text(entry["text"], self.job.node_id)
            host.progress.log_warning(entry["text"])
        if self.tensorboard is not None:
            self.tensorboard.notice(kind, entry)

    @contextlib.contextmanager
    def open_tensorboard(self, folder: RunFolder) -> Iterator[None]:
        """TensorBoard files are written inside, when they are asked for."""
        if not (self.job.monitoring and self.job.monitoring.settings.tensorboard):
            yield
            return
        from ...trainers.monitor.tensorboard import FOLDER_NAME, create_tensorboard_log

        done = len(state["losses"]) if (state := folder.load()) else 0
        self.tensorboard = create_tensorboard_log(folder.folder / FOLDER_NAME, done)
        try:
            yield
        finally:
            self.tensorboard.close()


def format_result(job, losses, lora, folder, monitor, closing_notes: list[str]) -> str:
    """What was done, for a person."""
    whole = len(losses) == job.run.steps
    done = f"{len(losses)} steps" if whole else f"{len(losses)} of {job.run.steps} steps, ended early"
    best = f", the weights of step {lora.steps} are the result" if lora.steps != len(losses) else ""
    layers = len(host.lora_keys.list_lora_layers(lora))
    monitored = getattr(monitor, "line", str)()
    more = "".join(f"; {text}" for text in (monitored, *closing_notes) if text)
    return f"{done}, loss {mean_recent_loss(losses):.4f}, {layers} layers in {folder.folder.name}{best}{more}"


def format_counts_per_step(counts, steps) -> str:
    """4.0 (2.0 frozen + 2.0 student)"""
    parts = " + ".join(f"{count / steps:.1f} {what}" for what, count in counts.items() if count)
    return f"{sum(counts.values()) / steps:.1f} ({parts})"


def format_forward_counts(result: TrainingResult, steps: int | None = None) -> str:
    """One phrase on the forwards spent in so many steps, and planned for each; nothing when the run was only read."""
    steps = len(result.losses) if steps is None else steps
    if result.built is None or not steps:
        return ""
    planned = result.built.planned_forwards()
    more = f", {sum(planned.values()):.1f} planned" if planned else ""
    return f"; forwards per step: {format_counts_per_step(result.built.student.forward_counts, steps)}{more}"
