"""The Train LoRA node."""

import collections
import dataclasses

from comfy_api.latest import io, ui

from ..trainers.data.encoded import Encoded as EncodedData
from ..trainers.files import LoraFile, lora_metadata
from ..trainers.loop import train
from ..trainers.methods.lora import Lora
from ..trainers.runs import RunFolder, checked_name
from ..trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings, fingerprint
from . import host, paths
from .fields import CATEGORY, Encoded, LoraModel, LossMap, inputs, record
from .lora import graph_metadata
from .recipes import AdapterRecipe, NoiseRecipe, OptimizerRecipe


class TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardTrainLora",
            display_name="Train LoRA (Trainyard)",
            category=CATEGORY,
            description="Train a LoRA on the loaded model. It can be stopped and goes on where it was; pressing Run again on an unchanged "
            "graph never trains twice.",
            search_aliases=["lora training", "finetune", "dreambooth", "locon", "train"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on. It is not changed: the LoRA comes out beside it."),
                Encoded.Input("encoded", optional=True, tooltip="From Encode Dataset. Or connect latents and conditioning below instead."),
                *inputs(RunSettings, only=("steps", "learning_rate")),
                *inputs(AdapterSettings, only=("rank",)),
                *inputs(RunSettings, only=("batch", "seed", "save_every")),
                io.String.Input(
                    "run_name",
                    default="my_lora",
                    tooltip="Names the run's folder in output/loras/trainyard. The same name and settings continue that run.",
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=list(host.CHECKPOINTING),
                    default="off",
                    tooltip="'per block' needs much less memory and about a third more time per step.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Only to train the text encoder too (switch it on in Adapter Settings)."),
                AdapterRecipe.Input("adapter", optional=True, tooltip="From Adapter Settings; defaults without it."),
                OptimizerRecipe.Input("optimizer", optional=True, tooltip="From Optimizer Settings; defaults without it."),
                NoiseRecipe.Input("noise", optional=True, tooltip="From Noise and Loss Settings; the family's own recipe without it."),
                io.Latent.Input("latents", optional=True, tooltip="LATENT list of ComfyUI's Make Training Dataset, in place of encoded."),
                io.Conditioning.Input(
                    "conditioning", optional=True, tooltip="CONDITIONING list of ComfyUI's Make Training Dataset, in place of encoded."
                ),
            ],
            outputs=[
                LoraModel.Output("lora", display_name="lora", tooltip="For Save LoRA, Apply LoRA, and ComfyUI's own LORA_MODEL nodes."),
                LossMap.Output("losses", display_name="losses", tooltip="One number per step, for Loss Plot."),
                io.Model.Output("model", display_name="model", tooltip="The model with the LoRA applied at strength 1."),
                io.Int.Output("steps", display_name="steps", tooltip="Optimizer steps done."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        run_name,
        checkpointing,
        encoded=None,
        clip=None,
        adapter=None,
        optimizer=None,
        noise=None,
        latents=None,
        conditioning=None,
        **widgets,
    ):
        values = {k: v[0] for k, v in widgets.items()}
        job = Job(
            model=model[0],
            clip=first(clip),
            data=training_data(encoded, latents, conditioning),
            run=record(RunSettings, values),
            adapter=dataclasses.replace(first(adapter) or AdapterSettings(), rank=values["rank"]),
            optimizing=first(optimizer) or OptimizerSettings(),
            noise=first(noise) or NoiseSettings(),
            name=checked_name(run_name[0]),
            checkpointing=checkpointing[0],
            graph=graph_metadata(cls.hidden),
            node_id=cls.hidden.unique_id,
        )
        lora, losses, line = job.result()
        host.show(line, job.node_id)
        patched, _ = host.applied(job.model, None, lora)
        return io.NodeOutput(lora, {"loss": losses}, patched, lora.steps, ui=ui.PreviewText(line))


def first(values):
    return values[0] if values else None


def training_data(encoded, latents, conditioning) -> EncodedData:
    if encoded and (latents or conditioning):
        raise ValueError("Both encoded and latents/conditioning are connected. Connect one of them, so that it is clear what is trained.")
    if encoded:
        return encoded[0]
    if not latents or not conditioning:
        raise ValueError("There is nothing to train on. Connect encoded (from Encode Dataset), or both latents and conditioning.")
    return EncodedData.from_core(latents, conditioning)


def resolution(data) -> str:
    """The commonest picture size as WIDTHxHEIGHT in pixels, or "unknown" where only latents were given."""
    buckets = collections.Counter(item.bucket for item in data.items if item.bucket)
    return "x".join(map(str, buckets.most_common(1)[0][0])) if buckets else "unknown"


@dataclasses.dataclass
class Job:
    """One Train LoRA run: everything that the node was given."""

    model: object
    clip: object
    data: EncodedData
    run: RunSettings
    adapter: AdapterSettings
    optimizing: OptimizerSettings
    noise: NoiseSettings
    name: str
    checkpointing: str
    graph: dict
    node_id: str

    def result(self):
        """(LoRA, losses, a line for the person). A run that is already finished is read from its file."""
        host.check_latents(self.model, self.data.channels)
        folder = RunFolder(paths.runs_folder(), self.name, self.fingerprint(), self.recipe(), self.run.steps)
        if (done := folder.finished()) is not None:
            return *done, f"already trained: {folder.lora_path(self.run.steps).name} was read, nothing was trained again"
        lora, losses = self.trained(folder)
        return (
            lora,
            losses,
            f"{self.run.steps} steps, loss {sum(losses[-20:]) / len(losses[-20:]):.4f}, {len(host.bases(lora))} layers in {folder.folder.name}",
        )

    def recipe(self) -> dict:
        records = (self.adapter, self.optimizing, self.noise, self.run)
        return {type(r).__name__: r.to_dict() for r in records} | {"checkpointing": self.checkpointing, "images": len(self.data.items)}

    def fingerprint(self) -> str:
        """Of all that changes the result. The number of steps is not part of it, so that a run can be continued to more."""
        run = {k: v for k, v in self.run.to_dict().items() if k not in ("steps", "save_every")}
        clip = host.identity(self.clip.patcher, self.clip.layer_idx) if self.adapter.text_encoder and self.clip else ""
        return fingerprint(
            "lora 1", self.data.fingerprint, host.model_identity(self.model), clip, self.adapter, self.optimizing, self.noise, run
        )

    def trained(self, folder):
        report = host.Report(self.run.steps, self.node_id)
        memory = host.training_memory(self.model, self.data, self.run.batch, self.checkpointing)
        try:
            with host.training(
                self.model, self.adapter, clip=self.clip, seed=self.run.seed, checkpointing=self.checkpointing, memory=memory
            ) as session:
                method = self.method(session)
                if not session.family.known:
                    self.check(session)
                folder.export = lambda step: self.lora(session, step)
                losses = train(method, self.run, self.optimizing, report=report, store=folder)
                lora = folder.export(self.run.steps)
        except BaseException as error:
            if folder.saved:
                host.show(f"stopped; step {folder.saved} of {self.run.steps} is saved, Run goes on from there", self.node_id)
            if host.out_of_memory(error):
                raise RuntimeError(host.memory_advice(self.run, self.checkpointing, self.data)) from error
            raise
        host.check_loads(self.model, self.clip, lora)
        return lora, losses

    def method(self, session):
        density = session.family.density
        return Lora(
            session.denoiser, session.adapters, self.data, self.noise, density, self.run.batch, session.text_adapters, session.encode
        )

    def check(self, session):
        batch = self.data.batch([0], host.generator(0))
        host.check_gradients(session, session.denoiser.model_space(batch.x0), batch.conds)

    def lora(self, session, steps):
        tensors, untouched = session.tensors()
        if untouched:
            host.say_once(f"{len(untouched)} layers are never used by this model and are left out of the file, for example {untouched[0]}")
        metadata = lora_metadata(
            title=self.name, base=session.family.base, architecture=session.family.architecture, prediction=session.denoiser.prediction,
            adapter=self.adapter, optimizing=self.optimizing, noise=self.noise, run=self.run, steps=steps,
            resolution=resolution(self.data), dataset={"images": len(self.data.items), "dropout": self.data.dropout},
        )  # fmt: skip
        return LoraFile(tensors, {**metadata, **self.graph}, steps)


NODES = [TrainLora]
