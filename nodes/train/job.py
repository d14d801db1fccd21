"""What a Train node was asked to do, and what differs between the Train nodes. `run.py` does it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ...trainers.data.encoded import EncodedDataset, image_conditioning, most_common_bucket
from ...trainers.files import LoraFile, tensor_hash
from ...trainers.monitor.strength_curve import StrengthCurve
from ...trainers.protocols import Method, Monitor, ValidationLoss
from ...trainers.rng import make_generator
from ...trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings, compute_fingerprint
from .. import host
from ..page import live
from .previews import SamplePrompt
from .validation import MonitorConfig

if TYPE_CHECKING:
    from ..host.session import TrainingSession

CALIBRATE_AFTER, CALIBRATE_EVERY, CALIBRATE_OFF = CALIBRATE_MODES = ("after training", "at every save", "off")


@dataclasses.dataclass(frozen=True)
class NoiseWithAssistant:
    """What Noise and Loss Settings gives with an assistant connected."""

    noise: NoiseSettings
    assistant: LoraFile


def split_assistant(given: NoiseSettings | NoiseWithAssistant | None) -> tuple[NoiseSettings, LoraFile | None]:
    """(settings, assistant or None) of a node's noise input."""
    if isinstance(given, NoiseWithAssistant):
        return given.noise, given.assistant
    return given or NoiseSettings(), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What one run was asked for. Nothing in it changes while the run is at work."""

    task: TrainTask
    model: object  # MODEL: a ModelPatcher
    run: RunSettings
    adapter: AdapterSettings
    optimizing: OptimizerSettings
    noise: NoiseSettings
    name: str
    checkpointing: str  # one of host.session.CHECKPOINTING_MODES
    graph: dict  # "workflow" and "prompt" as JSON texts
    node_id: str
    clip: object = None  # CLIP, or None
    calibrate: str = CALIBRATE_OFF
    monitoring: MonitorConfig | None = None  # Validation and Previews
    retry_cheaper: bool = False  # when memory runs out
    compile_blocks: bool = False
    assistant: LoraFile | None = None  # at work while the adapter is trained, and no part of it

    def check(self):
        """Raises ValueError for what can be known before the long work."""
        host.conditions.check_trainable(self.model)
        if self.assistant is not None:
            host.lora_keys.check_assistant(self.model, self.assistant)
        self.task.check(self)
        if self.monitoring:
            self.monitoring.check_job(self)
        self.task.check_conditions(self)

    def fingerprint(self) -> str:
        """Of all that changes the result. The number of steps is not part of it, so that a run can be continued to
        more."""
        run = {k: v for k, v in self.run.to_dict().items() if k not in ("steps", "save_every")}
        trained_clip = self.clip if self.adapter.text_encoder else None
        return compute_fingerprint(
            self.task.version,
            *self.task.fingerprint_parts(self),
            host.identity.hash_model_and_schedule(self.model),
            hash_clip(trained_clip) if trained_clip else "",
            self.adapter,
            self.optimizing,
            self.noise,
            run,
            *([] if self.assistant is None else ["assistant", tensor_hash(self.assistant)]),
        )

    def run_record(self) -> dict:
        """Settings, dataset and model as run.json holds them."""
        records = (self.adapter, self.optimizing, self.noise, self.run, *self.task.settings_records())
        return {
            **{type(record).__name__: record.to_dict() for record in records},
            "checkpointing": self.checkpointing,
            "compile_blocks": self.compile_blocks,
            **self.task.metadata_fields()["dataset"],
            "model": live.find_model_file(self.graph, self.node_id),
        }

    def with_batch(self, batch: int, accumulate: int) -> TrainingJob:
        run, optimizing = self.run, self.optimizing
        return dataclasses.replace(
            self,
            run=dataclasses.replace(run, batch=batch),
            optimizing=dataclasses.replace(optimizing, accumulate=accumulate),
        )


class TrainTask(Protocol):
    """What differs between the Train nodes: what is trained on, and how the method is built from it. A frozen value:
    the same task can be run again. `prompts` is what `encode_prompts` returned: text -> conditioning."""

    version: str  # of the method: part of the fingerprint
    data: EncodedDataset | None  # images that are trained on

    def check(self, job: TrainingJob):
        """Raises ValueError for what can be known before the long work."""

    def check_conditions(self, job: TrainingJob):
        """Raises ValueError where the MODEL needs more than the texts or conditionings that it would be trained
        with."""
        host.conditions.check_text_is_enough(job.model)
        if self.data is not None:
            host.conditions.check_holes(job.model, self.data)

    def fingerprint_parts(self, job: TrainingJob) -> tuple:
        """What the result depends on beside the job's own records: fingerprints, settings records, JSON values."""
        ...

    def settings_records(self) -> tuple:
        """Settings records of the method's own, for the run folder."""
        return ()

    def ending_rules(self) -> dict:
        """What else decides at which step the run ends; a finished run counts as finished only under the same."""
        return {}

    def metadata_fields(self) -> dict:
        """{"resolution": "WIDTHxHEIGHT", "dataset": {"images": ..., "dropout": ...}} for the file's metadata."""
        ...

    def largest_shape(self, job: TrainingJob) -> tuple[int, ...]:
        """The largest latent (C, ..., h, w) of a step."""
        ...

    def largest_numel(self, job: TrainingJob) -> int:
        """Numbers that the network sees at most of one image: its latent, and control images beside it."""
        controls = max((item.control_numel for item in self.data.items), default=0) if self.data else 0
        return math.prod(self.largest_shape(job)) + controls

    def extra_memory(self, job: TrainingJob) -> float:
        """Bytes that other models need beside this one while it trains."""
        return 0.0

    def default_resolution(self) -> int:
        """px: the size of samples where no images are trained on that could tell."""
        return 512

    def check_held_out(self, data: EncodedDataset):
        """Raises ValueError for held-out images that have no loss here."""
        data.require_conditionings()

    def encode_prompts(self, job: TrainingJob) -> dict[str, dict]:
        """Work of the text encoder, done before the model is loaded for training; the encoder is freed again."""
        return {}

    def prepare(self, job: TrainingJob, prompts: dict[str, dict], folder, show: Callable[[str], None]) -> TrainTask:
        """This task with what other models must be asked for before the run, done before the model is loaded for
        training. `folder`: pathlib.Path where it may be kept; `show(text)` may raise the host's interrupt."""
        return self

    def default_sample_prompts(self, job: TrainingJob, prompts) -> tuple[list[SamplePrompt], SamplePrompt | None]:
        """What samples show when nobody asked for others, and what they avoid."""
        return first_distinct_captions(self.data) if self.data else ([], None)

    def gradient_check_inputs(self, job: TrainingJob, session: TrainingSession, prompts):
        """(x0, conds) that the gradients of an unknown family are checked on."""
        return dataset_gradient_check_inputs(self.data, session)

    def build(self, job: TrainingJob, session: TrainingSession, prompts: dict[str, dict]) -> BuiltMethod:
        """The method over a model that is loaded for training. May be called again with another batch."""
        ...


class BuiltMethod(Protocol):
    """A method over the model that is loaded for training, and what its run can be asked."""

    method: Method
    student: object  # counts its forwards (`forward_counts`), or None
    can_name_worst: bool = True  # whether what is trained on has names

    def notes(self) -> list[str]:
        """What the person should know of the recipe at the end."""
        return []

    def planned_forwards(self) -> dict[str, float]:
        """Forwards that a step is expected to cost, by kind, for methods whose steps ask the model several times."""
        return {}

    def validation_loss(self, data: EncodedDataset | None, count: int) -> ValidationLoss | None:
        """The validation loss (trainers/monitor/) on at most `count` elements of `data`, or None."""
        return None

    def make_monitor(self, validation: Monitor | None) -> Monitor | None:
        """What monitors the run: by default the validation monitor that the user asked for, or None."""
        return validation

    def measure_curve(self) -> StrengthCurve | None:
        """Effect and drift over the strength of the adapters as they are now, for methods that have such a curve."""
        return None

    def ends_early(self) -> bool:
        """Whether the method's own monitor has ended the run."""
        return False

    def extra_metadata(self, with_curve: bool) -> dict[str, str]:
        """Metadata of the method's own. with_curve: `measure_curve` was called for this file."""
        return {}


def hash_clip(clip) -> str:
    return host.identity.hash_patched_weights(clip.patcher, clip.layer_idx)


def unwrap_list_input(values):
    """The value behind an input of a node whose inputs come as lists."""
    return values[0] if values else None


def largest_latent_shape(data) -> tuple[int, ...]:
    return max({item.shape for item in data.items}, key=math.prod)


def most_common_resolution(data) -> str:
    """The commonest image size as WIDTHxHEIGHT in pixels, or "unknown" where only latents were given."""
    bucket = most_common_bucket(data)
    return "x".join(map(str, bucket)) if bucket else "unknown"


def dataset_metadata_fields(data) -> dict:
    return dict(resolution=most_common_resolution(data), dataset={"images": len(data.items), "dropout": data.dropout})


def dataset_gradient_check_inputs(data, session):
    batch = data.make_batch([0], make_generator(0))
    return session.denoiser.model_space(batch.x0), batch.conds


def first_distinct_captions(data, count: int = 2) -> tuple[list[SamplePrompt], SamplePrompt | None]:
    """The first captions of a dataset that differ, and the empty caption where it has one. Where only conditionings
    were given, they have no caption to encode again."""
    plain, found = dataclasses.replace(data, dropout=0.0, full_masks=0.0), {}
    for pick in range(min(len(data.items), 50)):
        batch = plain.make_batch([pick], make_generator(0))
        label = batch.captions[0] or f"caption {len(found) + 1}"
        caption = batch.captions[0] if data.items[pick].path else None
        found.setdefault(label, SamplePrompt(label, batch.conds[0], caption))
        if len(found) == count:
            break
    if data.empty_key is None:
        return list(found.values()), None
    sizes = image_conditioning(next(iter(found.values())).cond)
    return list(found.values()), SamplePrompt(
        "", {**data.store.load(data.empty_key), **sizes}, "" if data.items[0].path else None
    )
