"""What every Train node does with a run: found finished or continued, trained on the loaded model, kept whatever happens."""

from __future__ import annotations

import collections
import dataclasses
import math

from ..trainers.evaluate import Curve
from ..trainers.files import LoraFile, lora_metadata
from ..trainers.loop import train
from ..trainers.runs import RunFolder
from ..trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings, fingerprint
from . import host, paths

AFTER, EVERY, OFF = CALIBRATE = ("after training", "at every save", "off")


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
    calibrate: str = OFF
    curve: Curve | None = None
    exported: LoraFile | None = None  # what was written last
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

    def prepare(self):
        """Work before the model is loaded for training, such as encoding prompts."""

    def method(self, session):
        raise NotImplementedError

    def watch(self, session, method):
        """What looks at the run between two steps (see trainers.loop.train), or None."""
        return None

    def probe(self, session):
        """(x0, conds) that the gradients of an unknown family are checked on."""
        raise NotImplementedError

    def about(self) -> dict:
        """resolution and dataset, for the metadata."""
        raise NotImplementedError

    def measured(self, session) -> Curve | None:
        """The curve of the adapters as they are now, for methods that have one."""
        return None

    # -- the same for all ------------------------------------------------------------------------------------------------

    def result(self):
        """(LoRA, losses, a line for the person). A run that is already finished is read from its file."""
        self.check()
        folder = RunFolder(paths.runs_folder(), self.name, self.fingerprint(), self.recipe(), self.run.steps)
        if (done := folder.finished()) is not None:
            return *done, f"already trained: {folder.lora_path(self.run.steps).name} was read, nothing was trained again"
        lora, losses = self.trained(folder)
        loss = sum(losses[-20:]) / len(losses[-20:])
        return lora, losses, f"{self.run.steps} steps, loss {loss:.4f}, {len(host.bases(lora))} layers in {folder.folder.name}"

    def recipe(self) -> dict:
        records = (self.adapter, self.optimizing, self.noise, self.run, *self.records())
        return {type(r).__name__: r.to_dict() for r in records} | {"checkpointing": self.checkpointing, **self.about()["dataset"]}

    def fingerprint(self) -> str:
        """Of all that changes the result. The number of steps is not part of it, so that a run can be continued to more."""
        run = {k: v for k, v in self.run.to_dict().items() if k not in ("steps", "save_every")}
        clip = host.identity(self.clip.patcher, self.clip.layer_idx) if self.adapter.text_encoder and self.clip else ""
        return fingerprint(
            self.kind, *self.parts(), host.model_identity(self.model), clip, self.adapter, self.optimizing, self.noise, run
        )

    def trained(self, folder):
        self.prepare()
        report = host.Report(self.run.steps, self.node_id)
        memory = host.training_memory(self.model, self.largest(), self.run.batch, self.checkpointing)
        try:
            with host.training(
                self.model, self.adapter, clip=self.clip, seed=self.run.seed, checkpointing=self.checkpointing, memory=memory
            ) as session:
                method = self.method(session)
                if not session.family.known:
                    host.check_gradients(session, *self.probe(session))
                folder.export = lambda step: self.lora(session, step)
                losses = train(method, self.run, self.optimizing, report=report, store=folder, watch=self.watch(session, method))
                lora = self.exported
        except BaseException as error:
            if folder.saved:
                host.show(f"stopped; step {folder.saved} of {self.run.steps} is saved, Run goes on from there", self.node_id)
            if host.out_of_memory(error):
                raise RuntimeError(host.memory_advice(self.run, self.checkpointing)) from error
            raise
        host.check_loads(self.model, self.clip, lora)
        return lora, losses

    def lora(self, session, steps):
        tensors, untouched = session.tensors()
        if untouched:
            host.say_once(f"{len(untouched)} layers are never used by this model and are left out of the file, for example {untouched[0]}")
        metadata = lora_metadata(
            title=self.name, base=session.family.base, architecture=session.family.architecture, prediction=session.denoiser.prediction,
            adapter=self.adapter, optimizing=self.optimizing, noise=self.noise, run=self.run, steps=steps, **self.about(),
        )  # fmt: skip
        if self.calibrates(steps):
            self.curve = self.measured(session)
            metadata["trainyard.curve"] = self.curve.to_json()
        self.exported = LoraFile(tensors, {**metadata, **self.graph}, steps)
        return self.exported

    def calibrates(self, step) -> bool:
        """Whether the file of this step gets its curve; a run that is stopped in between does not wait for one."""
        every = self.run.save_every
        return self.calibrate != OFF and (step == self.run.steps or (self.calibrate == EVERY and every > 0 and step % every == 0))


def first(values):
    """The value behind an input of a node whose inputs come as lists."""
    return values[0] if values else None


def largest(data) -> tuple[int, ...]:
    return max({item.shape for item in data.items}, key=math.prod)


def resolution(data) -> str:
    """The commonest picture size as WIDTHxHEIGHT in pixels, or "unknown" where only latents were given."""
    buckets = collections.Counter(item.bucket for item in data.items if item.bucket)
    return "x".join(map(str, buckets.most_common(1)[0][0])) if buckets else "unknown"


def picture_probe(data, session):
    batch = data.batch([0], host.generator(0))
    return session.denoiser.model_space(batch.x0), batch.conds
