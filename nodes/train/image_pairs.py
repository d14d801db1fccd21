"""Train nodes that learn from pairs of images: Train Image Slider and Train Difference."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ...trainers.data.encoded import EncodedDataset
from ...trainers.data.pairs import collect_image_pairs, pair_datasets
from ...trainers.methods.image_pairs import AddiftTraining, ImageSlider
from ...trainers.methods.rollouts import StudentTeacherModel
from ...trainers.monitor import fixed_batches
from ...trainers.monitor.strength_curve import make_axis_projection, measure_strength_curve
from ...trainers.rng import make_generator
from .. import host
from ..fields import CATEGORY, DatasetType, EncodedType
from .job import BuiltMethod, TrainingJob, TrainTask, dataset_metadata_fields, largest_latent_shape
from .widgets import (
    HIDDEN_INPUTS,
    check_unused_noise_settings,
    make_appended_inputs,
    make_curve_sampler,
    make_job,
    make_run_inputs,
    make_settings_inputs,
    make_training_outputs,
    run_difference_node,
)


class ImagePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardImagePairs",
            display_name="Image Pairs",
            category=CATEGORY,
            description="Pairs the images of two folders by file name. A pair shows one scene with more and with "
            "less of an attribute (image-pair sliders), or after and before a change (Train "
            "Difference).",
            search_aliases=[
                "slider dataset",
                "before after",
                "positive negative images",
                "addift pairs",
                "concept slider",
            ],
            inputs=[
                DatasetType.Input("positive", tooltip="Images with more of the attribute, or after the change."),
                DatasetType.Input(
                    "negative", tooltip="Images with less of it, or before the change; the same file names."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.25,
                    tooltip="The positive images are trained at this strength, the negative ones at its negative."
                    " (0.01 to 100)",
                ),
                DatasetType.Input(
                    "pairs",
                    optional=True,
                    tooltip="From another Image Pairs node, for graded sliders such as 2, 1, -1, -2.",
                ),
            ],
            outputs=[DatasetType.Output("dataset", display_name="dataset", tooltip="Both sides, for Encode Dataset.")],
        )

    @classmethod
    def execute(cls, positive, negative, strength, pairs=None):
        return io.NodeOutput(pair_datasets(positive, negative, strength, pairs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTask(TrainTask):
    """Image-pair sliders and ADDifT: what is moved is shown by images."""

    data: EncodedDataset
    method_class: type[ImageSlider | AddiftTraining]
    strength: float = 1.0  # of ADDifT

    @property
    def version(self):
        return f"{self.method_class.fingerprint_name} 1"

    def check(self, job):
        host.checks.check_latent_channels(job.model, self.data.channels)
        check_unused_noise_settings(job.noise, "both sides of a pair are shown the same noise", idle=("perturbation",))
        check_unused_noise_settings(job.noise, "only Train LoRA looks at it", idle=("distilled",))
        check_pairs_differ(collect_image_pairs(self.data), self.data)

    def check_conditions(self, job):
        if any(item.holes for item in self.data.items):
            raise ValueError(
                "The pairs were encoded with inpaint masks, which differ between the two sides of a pair: the masks "
                "would be learnt with the images. Set inpaint_masks of Encode Dataset to none."
            )
        host.conditions.check_conditions(job.model, self.data.named_conds())

    def fingerprint_parts(self, job):
        return self.data.fingerprint, self.strength

    def metadata_fields(self):
        return dataset_metadata_fields(self.data)

    def largest_shape(self, job):
        return largest_latent_shape(self.data)

    def check_held_out(self, data):
        super().check_held_out(data)
        collect_image_pairs(data)

    def build(self, job, session, prompts):
        more = {} if self.method_class is ImageSlider else {"strength": self.strength}
        density = session.family.density
        method = self.method_class(
            session.denoiser, session.adapters, self.data, job.noise, density, job.run.batch, **more
        )
        return BuiltPairs(job, session, method)


@dataclasses.dataclass
class BuiltPairs(BuiltMethod):
    job: TrainingJob
    session: object
    method: ImageSlider | AddiftTraining

    @property
    def student(self):
        return self.method  # it counts its own forwards

    def planned_forwards(self):
        run = self.job.run
        found = self.method.planned_forwards(run.steps * self.job.optimizing.accumulate)
        return {what: count / run.steps for what, count in found.items()}

    def validation_loss(self, data, count):
        levels = self.job.monitoring.settings.levels
        return fixed_batches.build_pair_validation(self.method, data, count, levels, self.job.run.batch)

    def measure_curve(self):
        """Along the mean difference of the pairs, on images of the first pair's caption."""
        data, denoiser, pairs = self.job.task.data, self.session.denoiser, self.method.items
        first = pairs[0]
        same = [pair for pair in pairs if pair.latent == first.latent][:16]
        rng, end = make_generator(0), first.strengths[0]
        sides = [
            data.make_batch([pair.index_by_strength[s] for pair in same], make_generator(0))
            for s in (end, -end)
            if all(s in pair.index_by_strength for pair in same)
        ]
        positive, negative = (denoiser.model_space(side.x0) for side in sides)
        cond = data.make_batch([first.index_by_strength[end]], rng).conds[0]
        empty = data.store.load(data.empty_key) if data.empty_key else None
        asking = StudentTeacherModel(denoiser, self.session.adapters, {"scene": cond, "": empty or cond})
        guidance = host.session.rollout_guidance(self.session, 0.0) if empty else 1.0
        draw = make_curve_sampler(asking, first.latent, "", guidance, self.job.run.seed)
        effect = make_axis_projection((positive - negative).mean(0, keepdim=True))
        return measure_strength_curve(draw, "scene", effect, unit="half the difference of the pairs")


def check_pairs_differ(pairs, data):
    """ValueError when no pair shows a difference: the same folder was chosen twice, say."""
    if all(len({data.items[index].latent for index in pair.index_by_strength.values()}) == 1 for pair in pairs):
        raise ValueError(
            "Both images of every pair are the same, for example "
            f"{data.items[next(iter(pairs[0].index_by_strength.values()))].path}: there is no difference to learn. "
            "Choose two different folders."
        )


class TrainImageSlider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardTrainImageSlider",
            display_name="Train Slider (Image Pairs)",
            category=CATEGORY,
            description="Trains a slider from a few image pairs: the positive images at +1, the negative ones at "
            "-1, both in every step, with the same noise.",
            search_aliases=["visual slider", "concept slider", "image slider", "lora slider", "before after"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to train on. It is not changed; the LoRA is a separate output."
                ),
                EncodedType.Input("encoded", tooltip="From Encode Dataset, with Image Pairs before it."),
                *make_run_inputs(500, 2e-4, 4, shown=("batch", "seed"), default="my_slider"),
                *make_settings_inputs(points=False),
                *make_appended_inputs(),
            ],
            outputs=make_training_outputs(),
            hidden=HIDDEN_INPUTS,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, encoded, adapter=None, optimizer=None, noise=None, validation=None, **widgets):
        task = PairTask(data=encoded, method_class=ImageSlider)
        return run_difference_node(make_job(cls, task, model, widgets, adapter, optimizer, noise, validation))


class TrainDifference(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardTrainDifference",
            display_name="Train Difference",
            category=CATEGORY,
            description="Trains a LoRA on the change between a before and an after image (ADDifT); one pair and a"
            " minute can be enough.",
            search_aliases=["addift", "copy machine", "multi-addift", "before after", "edit lora"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to train on. It is not changed; the LoRA is a separate output."
                ),
                EncodedType.Input(
                    "encoded",
                    tooltip="From Encode Dataset, with Image Pairs before it: positive is after, negative is before.",
                ),
                *make_run_inputs(100, 1e-4, 4, shown=("batch", "seed"), default="my_difference"),
                io.Float.Input(
                    "strength",
                    default=0.25,
                    min=0.01,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength used in training, at plus and minus. A smaller value gives a stronger "
                    "effect at strength 1 of the file. (0.01 to 10)",
                ),
                *make_settings_inputs(points=False),
                *make_appended_inputs(),
            ],
            outputs=make_training_outputs(),
            hidden=HIDDEN_INPUTS,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, encoded, strength, adapter=None, optimizer=None, noise=None, validation=None, **widgets):
        task = PairTask(data=encoded, method_class=AddiftTraining, strength=strength)
        return run_difference_node(make_job(cls, task, model, widgets, adapter, optimizer, noise, validation))


NODES = [ImagePairs, TrainImageSlider, TrainDifference]
