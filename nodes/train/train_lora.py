"""The Train LoRA node."""

import dataclasses

from comfy_api.latest import io, ui

from ...trainers.data.encoded import Encoded as EncodedData
from ...trainers.files import LoraFile, tensor_hash
from ...trainers.methods.lora import Lora
from ...trainers.methods.prior import Prior
from ...trainers.monitor.validation import Exam, picked
from ...trainers.runs import checked_name
from ...trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings
from .. import host
from ..fields import CATEGORY, Encoded, LoraModel, LossMap, graph_metadata, inputs, record
from . import planner
from .job import TrainingJob, first, largest, picture_probe, resolution
from .prior import PriorRecipe
from .settings_nodes import AdapterRecipe, NoiseRecipe, OptimizerRecipe
from .validation import ValidationRecipe


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
                planner.checkpointing_input(),
                io.Clip.Input("clip", optional=True, tooltip="Only to train the text encoder too (switch it on in Adapter Settings)."),
                AdapterRecipe.Input("adapter", optional=True, tooltip="From Adapter Settings; defaults without it."),
                OptimizerRecipe.Input("optimizer", optional=True, tooltip="From Optimizer Settings; defaults without it."),
                NoiseRecipe.Input("noise", optional=True, tooltip="From Noise and Loss Settings; the family's own recipe without it."),
                io.Latent.Input("latents", optional=True, tooltip="LATENT list of ComfyUI's Make Training Dataset, in place of encoded."),
                io.Conditioning.Input(
                    "conditioning", optional=True, tooltip="CONDITIONING list of ComfyUI's Make Training Dataset, in place of encoded."
                ),
                LoraModel.Input("start_from", optional=True, tooltip="A LoRA whose training goes on here, with another dataset or recipe. Same "
                                "algorithm, rank and layers."),
                PriorRecipe.Input("prior", optional=True, tooltip="From Prior Preservation: what the model must not forget."),
                ValidationRecipe.Input("validation", optional=True, tooltip="From Validation and Previews: loss on held-out pictures, samples, early stop."),
                planner.retry_input(),
                planner.compile_input(),
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
        start_from=None,
        prior=None,
        validation=None,
        retry_cheaper=(False,),
        compile_blocks=(False,),
        **widgets,
    ):
        values = {k: v[0] for k, v in widgets.items()}
        job = Job(
            model=model[0],
            clip=first(clip),
            data=training_data(encoded, latents, conditioning),
            start=first(start_from),
            prior=first(prior),
            run=record(RunSettings, values),
            adapter=dataclasses.replace(first(adapter) or AdapterSettings(), rank=values["rank"]),
            optimizing=first(optimizer) or OptimizerSettings(),
            noise=first(noise) or NoiseSettings(),
            name=checked_name(run_name[0]),
            checkpointing=checkpointing[0],
            retry_cheaper=first(retry_cheaper),
            compile_blocks=first(compile_blocks),
            graph=graph_metadata(cls.hidden),
            node_id=cls.hidden.unique_id,
            looking=first(validation),
        )
        lora, losses, line = job.result()
        host.progress.show(line.split(";")[0], job.node_id)  # the chart tells all of it
        patched, _ = host.lora_keys.applied(job.model, None, lora)
        return io.NodeOutput(lora, {"loss": losses}, patched, lora.steps, ui=ui.PreviewText(line))


def training_data(encoded, latents, conditioning) -> EncodedData:
    if encoded and (latents or conditioning):
        raise ValueError("Both encoded and latents/conditioning are connected. Connect one of them, so that it is clear what is trained.")
    if encoded:
        return encoded[0]
    if not latents or not conditioning:
        raise ValueError("There is nothing to train on. Connect encoded (from Encode Dataset), or both latents and conditioning.")
    return EncodedData.from_core(latents, conditioning)


@dataclasses.dataclass(kw_only=True)
class Job(TrainingJob):
    """One Train LoRA run: everything that the node was given."""

    data: EncodedData
    start: LoraFile | None = None
    prior: Prior | None = None
    kind = "lora 1"

    def check(self):
        self.data.require_conditionings()
        host.checks.check_latents(self.model, self.data.channels)
        if self.prior is not None and self.prior.data is not None:
            host.checks.check_latents(self.model, self.prior.data.channels)

    def parts(self):
        start = [] if self.start is None else ["start", tensor_hash(self.start)]
        return (self.data.fingerprint, *start, *([] if self.prior is None else ["prior", *self.prior.parts()]))

    def largest(self):
        return largest(self.data)

    def method(self, session):
        if self.start is not None:
            host.session.start_from(session, self.start)
        density = session.family.density
        return Lora(
            session.denoiser, session.adapters, self.data, self.noise, density, self.run.batch, session.text_adapters, session.encode, self.prior
        )

    def exam(self, session, method, data, count):
        return Exam(session.denoiser, data, picked(data, count), method.density, self.noise, self.looking.settings.levels, self.run.batch, session.encode)

    def probe(self, session):
        return picture_probe(self.data, session)

    def about(self):
        return dict(resolution=resolution(self.data), dataset={"images": len(self.data.items), "dropout": self.data.dropout})


NODES = [TrainLora]
