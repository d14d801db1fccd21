"""Where score models come from beside ratings: pictures alone, image scorers that others trained, models that are
loaded already."""

import json
from dataclasses import replace

from comfy_api.latest import io, ui

from ...trainers.data.image_scan import ScanOptions
from ...trainers.data.labels import folder_labels, read_labels
from ...trainers.data.quality.duplicates import duplicate_group_names
from ...trainers.data.readers import make_printable
from ...trainers.data.views import encode_views
from ...trainers.files import read_safetensors, tensor_hash
from ...trainers.scores.aesthetic_heads import read_aesthetic_head
from ...trainers.scores.backbones import cache_frozen_features
from ...trainers.scores.files import read_score_model, score_model_tensors, write_score_model
from ...trainers.scores.networks import (
    DECODED_IMAGE,
    LOADED_BACKBONES,
    MODEL_FEATURES,
    ScorerSettings,
    check_trained_head,
)
from ...trainers.scores.objective import MSE_ONLY, ScoreSettings
from ...trainers.scores.pretext import PretextSettings
from ...trainers.scores.pretraining import pretrain_backbone
from ...trainers.scores.resume import ResumeFolder
from ...trainers.scores.training import train_score_model
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
from . import backbones, latents

BACKBONE_TRAINING_VERSION = (
    1  # of pre-training and distillation: raise it when the same inputs would give another model
)
BASIC_PRETEXT_FIELDS = ("backbone", "inpaint", "simclr", "steps", "batch", "size", "seed")
BASIC_DISTIL_FIELDS = ("steps", "learning_rate", "batch", "members", "seed")
ADVANCED_DISTIL_FIELDS = ("weight_decay", "ema", "check_every", "patience", "few")  # of ScoreSettings, advanced


def make_checked_trunk_factory(scorer, model=None, vae=None, clip_vision=None):
    """`trunk(about)` for the backbone that `scorer` (settings, or what a file says of itself) names. ValueError for
    what is not connected."""
    if scorer.backbone == MODEL_FEATURES and model is None:
        backbones.DiffusionFeatureExtractor(None)
    if scorer.backbone == DECODED_IMAGE:
        backbones.DifferentiableClipVision(clip_vision)
        backbones.check_vae(vae)
    return backbones.make_trunk_factory(model, vae, clip_vision)


def choose_backbone_settings(scorer, pretrained):
    """What decides backbone, width, depth and rank: the settings, or what a pretrained model says of itself. ValueError
    for one that has no backbone to learn on."""
    if pretrained is None:
        return scorer
    if not all(hasattr(network, "trunk") for network in pretrained.networks) or not pretrained.networks:
        raise ValueError(
            "What is connected as pretrained is a finished scorer of pictures and has no backbone to learn on. Connect "
            "a model of Pretrain Score Backbone or Train Score Model, or use it as the teacher of Distill Score Model."
        )
    return pretrained.info


def cache_features_if_frozen(encoded, denoiser, scorer, trunk):
    """(encoded, denoiser, trunk) for `trained`: of backbones that stay as they are, what they see is computed once and
    kept."""
    return (
        cache_frozen_features(encoded, denoiser, trunk)
        if scorer.backbone in LOADED_BACKBONES and not scorer.rank
        else (encoded, denoiser, trunk)
    )


# -- trained before ----------------------------------------------------------------------------------------------------


def load_or_train_score_model(key: str, node_id, make, trunk=None):
    """(score model, report, losses) of make(work), or of the same work done before. Where it is stopped, it goes on
    from there at the next call. `trunk(about)`: for backbones made from something loaded."""
    path = paths.score_cache_folder() / f"{key}.safetensors"
    if path.is_file():
        metadata = read_safetensors(path)[1]
        words = f"{metadata['report']}\nTrained before: it was read from the cache."
        return read_score_model(path, trunk), words, json.loads(metadata["losses"])
    resume = ResumeFolder(paths.score_cache_folder() / f"{key}.unfinished")
    try:
        with host.context.enable_gradients():
            done = make(resume)
    except BaseException:
        if resume.saved_progress:
            host.progress.show_node_text(
                f"stopped; all up to {resume.saved_progress} is saved, Run goes on from there", node_id
            )
        raise
    words = make_printable(done.report)
    write_score_model(path, done.model, {"report": words, "losses": json.dumps(done.losses)})
    resume.clear()
    return done.model, words, done.losses


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
        scorer, settings = (
            settings_from_widgets(ScorerSettings, without_backbone(widgets)),
            settings_from_widgets(PretextSettings, widgets),
        )
        classes = read_class_labels(dataset, labels) if settings.classes else [None] * len(dataset)
        pictures, report = host.encoders.VaeEncoder(vae), host.progress.ItemProgressReporter(cls.hidden.unique_id)
        host.checks.check_latent_channels(model, pictures.channels)
        scores = [r.score for r in dataset]
        key = compute_fingerprint(
            "pretext",
            BACKBONE_TRAINING_VERSION,
            host.identity.hash_model_and_schedule(model),
            pictures.identity,
            dataset.fingerprint(),
            scorer,
            settings,
            classes,
            scores,
        )
        make = lambda resume: pretrain_from_images(model, pictures, dataset, scorer, settings, classes, report, resume)
        return score_model_output(cls, *load_or_train_score_model(key, cls.hidden.unique_id, make))


def pretrain_from_images(model, pictures, dataset, scorer, settings, classes, report, resume):
    schedule = latents.NoiseSchedule(model)
    try:
        views = encode_views(
            dataset,
            settings.kinds(),
            size=settings.size,
            crops=settings.crops,
            seed=settings.seed,
            vae=pictures,
            cache_dir=paths.cache_folder(),
            report=report,
            check_interrupt=host.progress.raise_if_interrupted,
        )
    finally:
        pictures.unload()
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


def without_backbone(widgets) -> dict:
    """The widgets of ScorerSettings; the backbone is PretextSettings' own."""
    return {name: value for name, value in widgets.items() if name != "backbone"}


def read_class_labels(dataset, labels: str) -> list:
    table = paths.resolve_pair_file(labels)
    return folder_labels(dataset) if table is None else read_labels(table, dataset)


def score_model_output(node, model, words, losses):
    host.progress.show_node_text(words.splitlines()[0], node.hidden.unique_id)
    return io.NodeOutput(model, words, {"loss": losses}, ui=ui.PreviewText(words))


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
        of_latents = latents.latent_scoring_inputs(model, vae)
        with host.context.enable_gradients():
            head = read_aesthetic_head(paths.aesthetic_head_path(file), paths.pooler_path(pooler))
            return io.NodeOutput(backbones.ImageScoreModel(head, clip_vision, file, *of_latents))


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
        scorer = settings_from_widgets(ScorerSettings, widgets)
        settings = settings_from_widgets(ScoreSettings, {**widgets, "task": "regression", "loss": MSE_ONLY})
        host.checks.check_latent_channels(model, encoded.channels)
        seeing = choose_backbone_settings(scorer, pretrained)
        if seeing.backbone == DECODED_IMAGE:
            raise ValueError(
                f"The backbone '{DECODED_IMAGE}' would be the teacher once more: it decodes and looks at pictures. "
                "Choose 'latent ResNet'."
            )
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        taught = rate_with_teacher(teacher, dataset, encoded, report)
        ratings = [[item.id, item.score] for item in taught.items]
        before = tensor_hash(score_model_tensors(pretrained)) if pretrained is not None else ""
        key = compute_fingerprint(
            "distil",
            BACKBONE_TRAINING_VERSION,
            host.identity.hash_model_and_schedule(model),
            encoded.fingerprint,
            ratings,
            scorer,
            settings,
            before,
        )
        trunk = make_checked_trunk_factory(seeing, model) if seeing.backbone in LOADED_BACKBONES else None
        make = lambda resume: distill_from_teacher(
            model, taught, scorer, settings, pretrained, seeing, trunk, report, resume
        )
        return score_model_output(cls, *load_or_train_score_model(key, cls.hidden.unique_id, make, trunk))


def rate_with_teacher(teacher, dataset, encoded, report):
    """The encoded pictures with the teacher's ratings in place of their own. ValueError for a teacher that does not
    look at pictures, and for encoded pictures that are not in the dataset."""
    check_trained_head(teacher.info)
    if not hasattr(teacher, "rate_pictures"):
        raise ValueError(
            "The teacher is a score model of latents, and pictures are to be rated. Connect one of Load Aesthetic "
            "Head, or Prompt Match Score; a score model of latents needs no distillation."
        )
    if not getattr(teacher, "words", "said by itself"):
        raise ValueError(
            "The teacher compares each picture with its own caption, and the student will see no captions. Write words "
            "into Prompt Match Score."
        )
    ids = {item.id for item in encoded.items}
    if missing := ids - {r.id for r in dataset}:
        raise ValueError(
            f"{len(missing)} of {len(ids)} encoded pictures are not in the dataset. Connect the dataset that was "
            "encoded."
        )
    wanted = type(dataset)(tuple({r.id: r for r in dataset if r.id in ids}.values()))
    ratings = dict(
        zip(
            (r.id for r in wanted),
            teacher.rate_pictures(wanted, report, host.progress.raise_if_interrupted)[0],
            strict=True,
        )
    )
    return rated(encoded, ratings)


def rated(encoded, ratings):
    return replace(encoded, items=[replace(item, score=ratings[item.id]) for item in encoded.items])


def distill_from_teacher(model, taught, scorer, settings, before, seeing, trunk, report, resume):
    groups = duplicate_group_names(
        taught, ScanOptions(report=report, check_interrupt=host.progress.raise_if_interrupted)
    )
    data, schedule, trunk = cache_features_if_frozen(taught, latents.NoiseSchedule(model), seeing, trunk)
    return train_score_model(
        data,
        schedule,
        scorer,
        settings,
        latent_format=latents.latent_format_name(model),
        groups=groups,
        trunk=trunk,
        pretrained=before,
        resume=resume,
        device=schedule.device,
        report=report,
        check_interrupt=host.progress.raise_if_interrupted,
    )


NODES = [PretrainScoreBackbone, DistillScoreModel, LoadAestheticHead]
