"""Score models without ratings of one's own: pre-trained backbones, published aesthetic heads, and distillation from
them."""

from dataclasses import replace

from comfy_api.latest import io

from ...trainers.data.views import encode_views
from ...trainers.files import tensor_hash
from ...trainers.scores.networks import DECODED_IMAGE, ScorerSettings, check_trained_head
from ...trainers.scores.objective import MSE_ONLY, ScoreSettings
from ...trainers.scores.pretext import PretextSettings
from ...trainers.settings import compute_fingerprint
from .. import host, paths
from ..fields import (
    CATEGORY,
    DatasetType,
    EncodedType,
    LossMapType,
    ScoreModelType,
    latent_score_inputs,
    settings_from_widgets,
    settings_inputs,
)

# of pre-training and distillation: raise it when the same inputs would give another model
BACKBONE_TRAINING_VERSION = 1
BASIC_PRETEXT_FIELDS = ("backbone", "inpaint", "simclr", "steps", "batch", "size", "seed")
BASIC_DISTIL_FIELDS = ("steps", "learning_rate", "batch", "members", "seed")
ADVANCED_DISTIL_FIELDS = ("weight_decay", "ema", "check_every", "patience", "few")  # of ScoreSettings, advanced


class PretrainScoreBackbone(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        rest = [name for name in PretextSettings.__dataclass_fields__ if name not in BASIC_PRETEXT_FIELDS]
        return io.Schema(
            node_id="TrainyardPretrainScoreBackbone",
            display_name="Pretrain Score Backbone",
            category=CATEGORY,
            description="Pretrains a latent backbone on your own unrated images with self-supervised tasks: "
            "masked parts, matching crops, rotation, shuffles, colours, classes. Train Score Model "
            "then needs fewer ratings.",
            search_aliases=[
                "self supervised",
                "simclr",
                "inpainting pretext",
                "representation learning",
                "pretraining",
                "unlabelled",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model whose latents are used: its noise schedule and latent format. It is not "
                    "trained.",
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="The model's VAE. Every view of an image is encoded separately, once.",
                ),
                DatasetType.Input(
                    "dataset",
                    tooltip="As many images as you have of the kind to be rated. Captions are not read.",
                ),
                *settings_inputs(PretextSettings, only=BASIC_PRETEXT_FIELDS),
                *settings_inputs(ScorerSettings, only=("noisy",)),
                *settings_inputs(PretextSettings, only=rest),
                *settings_inputs(ScorerSettings, only=("width", "depth")),
                io.Combo.Input(
                    "labels",
                    options=paths.list_pair_files(),
                    default=paths.NO_PAIRS,
                    advanced=True,
                    tooltip="For classes: a CSV file with the columns file and label. Without one, the images' "
                    "folders are the classes.",
                ),
            ],
            outputs=[
                ScoreModelType.Output(
                    "score_model",
                    display_name="score_model",
                    tooltip="A backbone without a head, for pretrained of Train Score Model.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Quality of the backbone: probes before and after."
                ),
                LossMapType.Output("losses", display_name="losses", tooltip="One number per step, for Loss Plot."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, vae, dataset, labels=paths.NO_PAIRS, **widgets):
        from .training import load_or_train_score_model, score_model_output

        settings = settings_from_widgets(PretextSettings, widgets)
        scorer_widgets = {
            name: value for name, value in widgets.items() if name != "backbone"
        }  # it is a pretext setting
        scorer = settings_from_widgets(ScorerSettings, scorer_widgets)
        classes = read_class_labels(dataset, labels) if settings.classes else [None] * len(dataset)
        encoder, report = host.encoders.VaeEncoder(vae), host.progress.ItemProgressReporter(cls.hidden.unique_id)
        host.checks.check_latent_channels(model, encoder.channels)
        fingerprint = compute_fingerprint(
            "pretext",
            BACKBONE_TRAINING_VERSION,
            host.identity.hash_model_and_schedule(model),
            encoder.identity,
            dataset.fingerprint(),
            scorer,
            settings,
            classes,
            [record.score for record in dataset],
        )
        train = lambda resume: pretrain_from_images(model, encoder, dataset, scorer, settings, classes, report, resume)
        return score_model_output(cls, *load_or_train_score_model(fingerprint, cls.hidden.unique_id, train))


def pretrain_from_images(model, encoder, dataset, scorer, settings, classes, report, resume):
    """The result of `pretrain_backbone` on encoded views of the dataset's images."""
    from ...trainers.scores.pretraining import pretrain_backbone
    from . import latents

    schedule = latents.NoiseSchedule(model)
    try:
        views = encode_views(
            dataset,
            settings.kinds(),
            size=settings.size,
            crops=settings.crops,
            seed=settings.seed,
            vae=encoder,
            cache_dir=paths.cache_folder(),
            report=report,
            check_interrupt=host.progress.raise_if_interrupted,
        )
    finally:
        encoder.unload()
    return pretrain_backbone(
        views,
        schedule,
        scorer,
        settings,
        latent_format=latents.latent_format_name(model),
        labels=classes,
        device=schedule.device,
        resume=resume,
        report=report,
        check_interrupt=host.progress.raise_if_interrupted,
    )


def read_class_labels(dataset, labels: str) -> list:
    """The class of every image, by the chosen table or else by its folder; None where there is none."""
    from ...trainers.data.labels import folder_labels, read_labels

    table = paths.resolve_pair_file(labels)
    return folder_labels(dataset) if table is None else read_labels(table, dataset)


class LoadAestheticHead(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadAestheticHead",
            display_name="Load Aesthetic Head",
            category=CATEGORY,
            description="Loads an aesthetic predictor for CLIP or SigLIP (LAION v1 and v2, Aesthetic Predictor "
            "V2.5) as a score model: for images, and through a VAE for latents.",
            search_aliases=[
                "laion aesthetic",
                "improved aesthetic predictor",
                "siglip aesthetic",
                "pixel scorer",
                "sac logos ava",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=paths.aesthetic_head_names(),
                    tooltip="A .safetensors, .pth, .pt or .ckpt file in models/aesthetic_heads; only tensors are "
                    "loaded. Press R after adding one.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The image encoder that the head was trained on. If it is another one, the error says"
                    " which is needed.",
                ),
                io.Combo.Input(
                    "pooler",
                    options=paths.pooler_names(),
                    default=paths.NO_POOLER,
                    tooltip="For SigLIP heads: a file in models/clip_vision that holds SigLIP's pooling layer, such as "
                    "google's own model.safetensors.",
                ),
                *latent_score_inputs(),
            ],
            outputs=[
                ScoreModelType.Output(
                    "score_model",
                    display_name="score_model",
                    tooltip="For Score Images, Distill Score Model and, with model and vae, Train LECO-Score.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return (file, paths.file_change_stamp(paths.aesthetic_head_path(file)))

    @classmethod
    def execute(cls, file, clip_vision, pooler=paths.NO_POOLER, model=None, vae=None):
        from ...trainers.scores.aesthetic_heads import read_aesthetic_head
        from . import feature_extractors, latents

        latent_inputs = latents.latent_scoring_inputs(model, vae)
        with host.context.enable_gradients():
            head = read_aesthetic_head(paths.aesthetic_head_path(file), paths.pooler_path(pooler))
            return io.NodeOutput(feature_extractors.ImageScoreModel(head, clip_vision, file, *latent_inputs))


class DistillScoreModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardDistillScoreModel",
            display_name="Distill Score Model",
            category=CATEGORY,
            description="Distills an image scorer into a latent score model that works at any noise level. Needs "
            "no ratings, and no decoding when used.",
            search_aliases=["distillation", "teacher student", "latent aesthetic", "copy scorer", "noise aware reward"],
            inputs=[
                ScoreModelType.Input("teacher", tooltip="From Load Aesthetic Head: rates the images."),
                io.Model.Input(
                    "model",
                    tooltip="The model whose latents the student scores: its noise schedule and latent format are"
                    " used. It is not trained.",
                ),
                DatasetType.Input(
                    "dataset",
                    tooltip="The images that were encoded. Some hundred of the kind to be scored; no ratings needed.",
                ),
                EncodedType.Input(
                    "encoded",
                    tooltip="The same images from Encode Dataset, preferably with flip on. They need no CLIP.",
                ),
                *settings_inputs(ScorerSettings, only=("backbone", "noisy")),
                *settings_inputs(ScoreSettings, only=BASIC_DISTIL_FIELDS),
                *settings_inputs(ScorerSettings, only=("width", "depth", "dropout")),
                *settings_inputs(ScoreSettings, only=ADVANCED_DISTIL_FIELDS),
                *settings_inputs(ScorerSettings, only=("rank",)),
                ScoreModelType.Input(
                    "pretrained",
                    optional=True,
                    tooltip="Start from the backbone of this model, such as one from Pretrain Score Backbone.",
                ),
            ],
            outputs=[
                ScoreModelType.Output(
                    "score_model",
                    display_name="score_model",
                    tooltip="For Save Score Model, Score Images and Train LECO-Score.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Agreement of student and teacher on held-out images.",
                ),
                LossMapType.Output(
                    "losses", display_name="losses", tooltip="The losses of the first network, for Loss Plot."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, teacher, model, dataset, encoded, pretrained=None, **widgets):
        from ...trainers.scores.files import score_model_tensors
        from .training import (
            choose_backbone_settings,
            find_trunk_factory,
            load_or_train_score_model,
            score_model_output,
            train_on_ratings,
        )

        scorer = settings_from_widgets(ScorerSettings, widgets)
        settings = settings_from_widgets(ScoreSettings, {**widgets, "task": "regression", "loss": MSE_ONLY})
        host.checks.check_latent_channels(model, encoded.channels)
        backbone = choose_backbone_settings(scorer, pretrained)
        if backbone.backbone == DECODED_IMAGE:
            raise ValueError(
                f"The backbone '{DECODED_IMAGE}' would be the teacher once more: it decodes and looks at images. "
                "Choose 'latent ResNet'."
            )
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        rated = rate_with_teacher(teacher, dataset, encoded, report)
        fingerprint = compute_fingerprint(
            "distil",
            BACKBONE_TRAINING_VERSION,
            host.identity.hash_model_and_schedule(model),
            encoded.fingerprint,
            [[item.id, item.score] for item in rated.items],
            scorer,
            settings,
            "" if pretrained is None else tensor_hash(score_model_tensors(pretrained)),
        )
        trunk = find_trunk_factory(backbone, model)
        train = lambda resume: train_on_ratings(
            model, rated, scorer, settings, backbone, trunk, report, pretrained=pretrained, resume=resume
        )
        return score_model_output(cls, *load_or_train_score_model(fingerprint, cls.hidden.unique_id, train, trunk))


def rate_with_teacher(teacher, dataset, encoded, report):
    """The encoded dataset with the teacher's ratings in place of its own. ValueError for a teacher that does not rate
    images, and for encoded images that are not in the dataset."""
    check_trained_head(teacher.info)
    if not hasattr(teacher, "rate_images"):
        raise ValueError(
            "The teacher is a score model of latents, but images are to be scored. Connect one of Load Aesthetic "
            "Head, or Prompt Match Score; a score model of latents needs no distillation."
        )
    if not getattr(teacher, "words", "said by itself"):
        raise ValueError(
            "The teacher compares each image with its own caption, and the student will see no captions. Write "
            "words into Prompt Match Score."
        )
    ids = {item.id for item in encoded.items}
    if missing := ids - {r.id for r in dataset}:
        raise ValueError(
            f"{len(missing)} of {len(ids)} encoded images are not in the dataset. Connect the dataset that was encoded."
        )
    images = type(dataset)(tuple({record.id: record for record in dataset if record.id in ids}.values()))
    scores, _ = teacher.rate_images(images, report, host.progress.raise_if_interrupted)
    ratings = {record.id: score for record, score in zip(images, scores, strict=True)}
    return replace(encoded, items=[replace(item, score=ratings[item.id]) for item in encoded.items])


NODES = [PretrainScoreBackbone, DistillScoreModel, LoadAestheticHead]
