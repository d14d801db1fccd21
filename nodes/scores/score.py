"""Score models: rated pictures in, a model that rates others out."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from comfy_api.latest import io, ui
from PIL import Image

from ...trainers.data.buckets import BucketSettings
from ...trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from ...trainers.data.contact_sheet import make_thumbnail
from ...trainers.data.encode import encode_dataset
from ...trainers.data.image_scan import ScanOptions
from ...trainers.data.images import dataset_from_tensors, image_to_batch_tensor
from ...trainers.data.quality.duplicates import duplicate_group_names
from ...trainers.data.rating_sheet import draw_best_and_worst_sheet
from ...trainers.data.ratings import (
    RATING_SOURCES,
    RankSettings,
    read_preference_table,
    read_rated_folder,
    select_by_score,
    set_image_scores,
)
from ...trainers.data.readers import hash_folder_state, make_printable
from ...trainers.data.records import ImageDataset as Pictures
from ...trainers.files import tensor_hash
from ...trainers.scores.files import (
    check_score_latent_format,
    read_score_model,
    score_file_matches,
    score_model_tensors,
    write_score_model,
)
from ...trainers.scores.networks import LATENT_BACKBONES, PRETRAINING_TASK, ScorerSettings, check_trained_head
from ...trainers.scores.objective import ScoreSettings
from ...trainers.scores.training import rate_latents, train_score_model
from ...trainers.settings import Settings, compute_fingerprint, number_field
from .. import host, paths
from ..data.dataset import format_dataset_summary as dataset_words
from ..data.dataset import make_cancellable_progress
from ..fields import (
    CATEGORY,
    DatasetType,
    EncodedType,
    LossMapType,
    ScoreModelType,
    graph_metadata,
    settings_from_widgets,
    settings_inputs,
)
from . import latents as latents_room
from . import score_backbones

BASIC_SCORE_FIELDS = (
    "task",
    "steps",
    "learning_rate",
    "batch",
    "members",
    "seed",
)  # of ScoreSettings; the rest is advanced


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringSettings(Settings):
    """How pictures are shown to a score model."""

    resolution: int = number_field(
        0,
        0,
        8192,
        "Images are scored at about resolution x resolution pixels in total. 0: the size that the score model was"
        " trained at.",
        unit="px",
        step=8,
    )
    shown: int = number_field(
        12, 1, 60, "How many of the best and of the worst images the sheet shows.", unit="pictures"
    )


DEFAULT_SCORE_SIDE = 512  # px, where a score model does not say at which size it was trained
SCORE_TRAINING_VERSION = 1  # of the training: raise it when the same inputs would give another model


class LoadRatedPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadRatedPictures",
            display_name="Load Rated Pictures",
            category=CATEGORY,
            description="Loads images with their ratings: from metadata (CSV, JSONL, JSON), from cat.score beside"
            " cat.png, or from folder names such as 7.5_landscapes.",
            search_aliases=["ratings", "aesthetic dataset", "scored images", "load scores", "labels"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=paths.list_dataset_folders(),
                    tooltip="A folder inside ComfyUI's input, datasets or output/datasets folder.",
                ),
                io.Combo.Input(
                    "ratings",
                    options=list(RATING_SOURCES),
                    tooltip="files: .score files, otherwise score in the metadata. folder names: the number at "
                    "the beginning of a subfolder's name.",
                ),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="The images with their ratings, for Encode Dataset."
                ),
                io.String.Output(
                    "about",
                    display_name="about",
                    tooltip="The number and range of the ratings, and what was skipped and why.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return hash_folder_state(paths.resolve_dataset_folder(folder))

    @classmethod
    def execute(cls, folder, ratings=RATING_SOURCES[0]):
        dataset = read_rated_folder(paths.resolve_dataset_folder(folder), ratings, make_cancellable_progress(cls))
        words = "\n".join([format_rating_summary(dataset), dataset_words(dataset)])
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(dataset, words)


def format_rating_summary(dataset) -> str:
    scores = [r.score for r in dataset if r.score is not None]
    if not scores:
        return f"none of {len(dataset)} pictures is rated"
    return (
        f"{len(scores)} of {len(dataset)} pictures are rated, from {min(scores):g} to {max(scores):g}, "
        f"{len(set(scores))} different ratings"
    )


class TrainScoreModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        advanced = [f for f in ScoreSettings.__dataclass_fields__ if f not in BASIC_SCORE_FIELDS]
        return io.Schema(
            node_id="TrainyardTrainScoreModel",
            display_name="Train Score Model",
            category=CATEGORY,
            description="Trains a score model on rated images, in latent space and at any noise level. Each "
            "network is evaluated on images it was not trained on; a model that is not better than "
            "chance is reported as not trained.",
            search_aliases=[
                "aesthetic predictor",
                "reward model",
                "rating model",
                "preference",
                "scorer",
                "nsfw classifier",
                "quality model",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model whose latents are scored: its noise schedule and latent format are used. "
                    "It is not trained.",
                ),
                EncodedType.Input(
                    "encoded",
                    tooltip="Rated images from Encode Dataset, preferably with flip on. They need no CLIP.",
                ),
                *settings_inputs(ScorerSettings, only=("backbone", "noisy")),
                *settings_inputs(ScoreSettings, only=BASIC_SCORE_FIELDS),
                *settings_inputs(ScorerSettings, only=("width", "depth", "dropout")),
                *settings_inputs(ScoreSettings, only=advanced),
                io.Combo.Input(
                    "file",
                    options=paths.list_pair_files(),
                    default=paths.NO_PAIRS,
                    advanced=True,
                    tooltip="For the task pairwise: a CSV file with the columns better and worse. Without one, "
                    "the ratings decide which is better.",
                ),
                *settings_inputs(ScorerSettings, only=("rank",)),
                ScoreModelType.Input(
                    "pretrained",
                    optional=True,
                    tooltip="Start from the backbone of this model, such as one from Pretrain Score Backbone.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="For the backbone 'decode + image scorer' only: decodes the latents."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For the backbone 'decode + image scorer' only: reads the images.",
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
                    tooltip="Accuracy on held-out images, with confidence intervals.",
                ),
                LossMapType.Output(
                    "losses", display_name="losses", tooltip="The losses of the first network, for Loss Plot."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, encoded, file=paths.NO_PAIRS, pretrained=None, vae=None, clip_vision=None, **widgets):
        scorer, settings = settings_from_widgets(ScorerSettings, widgets), settings_from_widgets(ScoreSettings, widgets)
        host.checks.check_latent_channels(model, encoded.channels)
        pairs = read_preference_pairs(file, encoded, settings.task)
        seeing = score_backbones.choose_backbone_settings(scorer, pretrained)
        key = score_training_fingerprint(model, encoded, scorer, settings, pairs, pretrained, vae, clip_vision)
        trunk = find_trunk_factory(seeing, model, vae, clip_vision)
        make = lambda resume: train_from_ratings(
            cls.hidden.unique_id, model, encoded, scorer, settings, pairs, pretrained, seeing, trunk, resume
        )
        return score_backbones.score_model_output(
            cls, *score_backbones.load_or_train_score_model(key, cls.hidden.unique_id, make, trunk)
        )


def read_preference_pairs(file, encoded, task) -> list[tuple[int, int]]:
    table = paths.resolve_pair_file(file)
    if table is None:
        return []
    if task != "pairwise":
        raise ValueError(f"A file of pairs is chosen and the task is {task!r}. Choose the task pairwise, or no file.")
    return read_preference_table(table, [item.path for item in encoded.items])


def score_training_fingerprint(model, encoded, scorer, settings, pairs, pretrained, vae, clip_vision) -> str:
    """A name that changes with everything that the trained model depends on."""
    before = compute_fingerprint(pretrained.info.to_dict(), content(pretrained)) if pretrained is not None else ""
    others = [host.identity.hash_patched_weights(other.patcher) for other in (vae, clip_vision) if other is not None]
    ratings = [[item.id, item.score] for item in encoded.items]
    return compute_fingerprint(
        SCORE_TRAINING_VERSION,
        host.identity.hash_model_and_schedule(model),
        encoded.fingerprint,
        ratings,
        scorer,
        settings,
        [list(p) for p in pairs],
        before,
        others,
    )


def content(score_model) -> str:
    return tensor_hash(score_model_tensors(score_model))


def find_trunk_factory(scorer, model, vae, clip_vision):
    """None for networks that look at latents by themselves; else what makes a trunk from loaded models."""
    if scorer.backbone in LATENT_BACKBONES:
        return None
    return score_backbones.make_checked_trunk_factory(scorer, model, vae, clip_vision)


def train_from_ratings(node_id, model, encoded, scorer, settings, pairs, pretrained, seeing, trunk, resume):
    schedule = latents_room.NoiseSchedule(model)
    report = host.progress.ItemProgressReporter(node_id)
    groups = duplicate_group_names(
        encoded, ScanOptions(report=report, check_interrupt=host.progress.raise_if_interrupted)
    )
    data, denoiser = encoded, schedule
    if trunk is not None:
        data, denoiser, trunk = score_backbones.cache_features_if_frozen(encoded, schedule, seeing, trunk)
    return train_score_model(
        data,
        denoiser,
        scorer,
        settings,
        latent_format=latents_room.latent_format_name(model),
        groups=groups,
        pairs=pairs,
        trunk=trunk,
        pretrained=pretrained,
        resume=resume,
        device=schedule.device,
        report=report,
        check_interrupt=host.progress.raise_if_interrupted,
    )


class SaveScoreModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardSaveScoreModel",
            display_name="Save Score Model",
            category=CATEGORY,
            description="Writes a score model with its evaluation to models/score_models, then reads it back and "
            "compares. An existing file is never overwritten.",
            search_aliases=["export scorer", "keep reward model", "aesthetic safetensors"],
            inputs=[
                ScoreModelType.Input("score_model", tooltip="From Train, Pretrain or Distill Score Model."),
                io.String.Input(
                    "name",
                    default="my_score",
                    tooltip="File name in models/score_models; folder/name creates a folder.",
                ),
                io.Boolean.Input(
                    "untrained",
                    default=False,
                    advanced=True,
                    tooltip="Also save a model that is not better than chance. Its file records this, and every "
                    "node that loads it repeats it.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="The path of the file.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, score_model, name, untrained=False):
        if not score_model.info.trained and not untrained:
            raise ValueError(
                "This score model is not saved, because it cannot be told from chance: "
                f"{format_score_metrics(score_model.info)}. Rate more pictures and train it again, or switch "
                "untrained on to keep it all the same."
            )
        path = paths.new_score_model_path(name, lambda there: score_file_matches(score_model, there))
        before = path.exists()
        if not before:
            write_score_model(path, score_model, graph_metadata(cls.hidden))
        if not score_file_matches(score_model, path):
            raise RuntimeError(f"{path} does not hold what was written; the disk may be failing. Save it elsewhere.")
        how = "was saved before" if before else "read back and equal"
        line = f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB, {how}"
        host.progress.show_node_text(line, cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui=ui.PreviewText(line))


class LoadScoreModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadScoreModel",
            display_name="Load Score Model",
            category=CATEGORY,
            description="Loads a score model from models/score_models, with its evaluation: to score images, or "
            "as the objective of Train LECO-Score.",
            search_aliases=["open scorer", "aesthetic model", "reward loader"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=paths.score_model_names(),
                    tooltip="A file written by Save Score Model. Press R after adding one.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Required for score models on another model's features; for all others it checks the "
                    "latent format.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Only for the backbone 'decode + image scorer'."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="Only for the backbone 'decode + image scorer'."
                ),
            ],
            outputs=[
                ScoreModelType.Output(
                    "score_model", display_name="score_model", tooltip="For Score Images and Train LECO-Score."
                ),
                io.String.Output(
                    "about",
                    display_name="about",
                    tooltip="What it scores, how accurate it is, and what it was trained on.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return (file, paths.file_change_stamp(paths.score_model_path(file)))

    @classmethod
    def execute(cls, file, model=None, vae=None, clip_vision=None):
        loaded = read_score_model(
            paths.score_model_path(file), lambda info: make_connected_trunk(info, model, vae, clip_vision)
        )
        if model is not None:
            check_score_latent_format(
                loaded.info, latents_room.latent_format_name(model), model.model.latent_format.latent_channels
            )
        return io.NodeOutput(loaded, format_score_model_summary(loaded.info))


def make_connected_trunk(info, model, vae, clip_vision):
    maker = find_trunk_factory(info, model, vae, clip_vision)
    return maker and maker(info)


def format_score_metrics(info) -> str:
    return (
        ", ".join(f"{name} {value:.3f} ({low:.3f} to {high:.3f})" for name, (value, low, high) in info.metrics.items())
        or "it was not measured"
    )


def format_score_model_summary(info) -> str:
    facts = [
        "" if info.trained else "NOT TRAINED: what it says cannot be told from chance.",
        f"{describe_score_model_kind(info)} on {info.latent_format or 'latents'} of {info.channels} channels",
        "at any noise level" if info.noisy else "of clean pictures only",
        f"figures on pictures that were not learnt from: {format_score_metrics(info)}",
        f"ratings from {info.low:g} to {info.high:g}, mean {info.mean:g}"
        if info.task in ("regression", "distribution")
        else "",
        f"trained at about {info.resolution}x{info.resolution} px" if info.resolution else "",
    ]
    return "\n".join(fact for fact in facts if fact)


def describe_score_model_kind(info) -> str:
    if info.task == PRETRAINING_TASK:
        return (
            f"a pre-trained backbone without a head ({info.backbone}), for the input pretrained of Train Score Model,"
        )
    lora = f" with a LoRA of rank {info.rank}" if info.rank else ""
    return f"{info.task} by {info.members} networks ({info.backbone}{lora})"


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Scores images or latents with a score model: a list of scores, the dataset with its "
            "scores, and a sheet of the best and worst.",
            search_aliases=["rate pictures", "aesthetic score", "score latents", "quality score", "predict rating"],
            inputs=[
                ScoreModelType.Input("score_model", tooltip="From Train or Load Score Model, or an aesthetic head."),
                DatasetType.Input(
                    "dataset", optional=True, tooltip="The images to score. Or connect images or latents instead."
                ),
                io.Image.Input("images", optional=True, tooltip="Images in the graph to score, instead of a dataset."),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="Latents in the graph to score, instead of images. They need no VAE.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of the model that the scores are for. Needed to score images.",
                ),
                *settings_inputs(ScoringSettings),
            ],
            outputs=[
                io.Float.Output(
                    "scores",
                    display_name="scores",
                    is_output_list=True,
                    tooltip="One score per image, on the scale of the training ratings.",
                ),
                io.Float.Output(
                    "spreads",
                    display_name="spreads",
                    is_output_list=True,
                    tooltip="How far the score model's networks disagree on each image.",
                ),
                DatasetType.Output(
                    "dataset",
                    display_name="dataset",
                    tooltip="The images with their scores, for Rank and Filter. Empty for latents.",
                ),
                io.Image.Output("sheet", display_name="sheet", tooltip="The best images, then the worst."),
                io.String.Output("report", display_name="report", tooltip="Mean and range, and every score."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, score_model, dataset=None, images=None, latents=None, vae=None, **widgets):
        settings, report = (
            settings_from_widgets(ScoringSettings, widgets),
            host.progress.ItemProgressReporter(cls.hidden.unique_id),
        )
        check_trained_head(score_model.info)
        if sum(given is not None for given in (dataset, images, latents)) != 1:
            raise ValueError("Connect exactly one of dataset, images and latents, so that it is clear what is scored.")
        if latents is not None:
            found, picture, names = score_latent_samples(score_model, latents, vae, report)
            after = Pictures(())
        else:
            before = (
                dataset
                if images is None
                else dataset_from_tensors(
                    [images], (), (), paths.image_cache_folder(), report, host.progress.raise_if_interrupted
                )
            )
            found = score_dataset_images(score_model, before, vae, settings, report)
            after, names = set_image_scores(before, found[0]), [make_printable(Path(r.path).name) for r in before]
            picture = lambda i: make_thumbnail(before[i])
        words = format_score_report(score_model.info, *found, names)
        sheet = image_to_batch_tensor(
            draw_best_and_worst_sheet(found[0], picture, names, settings.shown, found[1], words.splitlines()[0])
        )
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(*found, after, sheet, words, ui=ui.PreviewImage(sheet, cls=cls))


def score_dataset_images(score_model, dataset, vae, settings, report) -> tuple[list[float], list[float]]:
    """(scores, spreads). A scorer of pictures is shown the pictures, one of latents their latents."""
    if hasattr(score_model, "rate_pictures"):
        return score_model.rate_pictures(dataset, report, host.progress.raise_if_interrupted)
    encoder, info = host.encoders.VaeEncoder(vae), score_model.info
    check_score_latent_format(info, "", encoder.channels)
    step = math.lcm(8, 2 * encoder.factor)
    side = max(step, settings.resolution or info.resolution or DEFAULT_SCORE_SIDE)
    try:
        with host.context.enable_gradients():
            encoded = encode_dataset(
                dataset,
                CaptionSettings(caption_mode=CAPTION_MODE_EMPTY),
                BucketSettings(resolution=side, step=step, merge=1),
                flip=False,
                vae=encoder,
                text=None,
                cache_dir=paths.cache_folder(),
                report=report,
                check_interrupt=host.progress.raise_if_interrupted,
            )
    finally:
        encoder.unload()
    means = [
        latents_room.latent_to_model_space(encoded.store.load(item.latent)["mean"][None], info.latent_format)[0]
        for item in encoded.items
    ]
    return rate_latents(score_model, means, vae.device, report, host.progress.raise_if_interrupted)


def score_latent_samples(score_model, latent, vae, report):
    """((scores, spreads), index -> picture, names)"""
    samples, info = latent["samples"], score_model.info
    check_score_latent_format(info, "", samples.shape[1])
    found = rate_latents(
        score_model,
        list(latents_room.latent_to_model_space(samples, info.latent_format)),
        samples.device,
        report,
        host.progress.raise_if_interrupted,
    )
    pictures = (
        (lambda i: first_frame_to_image(vae.decode(samples[i : i + 1])))
        if vae is not None
        else lambda i: Image.new("RGB", (64, 64), "#000000")
    )
    return found, pictures, [f"latent {i}" for i in range(len(samples))]


def first_frame_to_image(images) -> Image.Image:
    """The first of IMAGE (B, H, W, 3) or (B, frames, H, W, 3)."""
    array = images.reshape(-1, *images.shape[-3:])[0].clamp(0, 1).cpu().float().numpy()
    return Image.fromarray((array * 255).round().astype(np.uint8))


def format_score_report(info, scores, spreads, names) -> str:
    head = f"{len(scores)} pictures scored: mean {np.mean(scores):.3f}, from {min(scores):.3f} to {max(scores):.3f}"
    warned = [] if info.trained else ["This score model cannot be told from chance; its scores say nothing."]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return "\n".join([head, *warned, *(f"{scores[i]:.3f} +-{spreads[i]:.3f} {names[i]}" for i in order)])


class RankAndFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardRankAndFilter",
            display_name="Rank and Filter by Score",
            category=CATEGORY,
            description="Keeps the images with the best scores: a share, those above a threshold, or a fixed number.",
            search_aliases=["top pictures", "select best", "score threshold", "sort dataset", "cull"],
            inputs=[
                DatasetType.Input("dataset", tooltip="Images with scores, from Score Images or Load Rated Pictures."),
                io.Float.Input(
                    "scores",
                    optional=True,
                    force_input=True,
                    default=0.0,
                    min=-1_000_000.0,
                    max=1_000_000.0,
                    tooltip="A list of scores, one per image, to use instead of those in the dataset. (-1000000 "
                    "to 1000000)",
                ),
                *settings_inputs(RankSettings),
            ],
            outputs=[
                DatasetType.Output("dataset", display_name="dataset", tooltip="The images that are kept."),
                DatasetType.Output("rest", display_name="rest", tooltip="The images that are removed."),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="The best and worst of the kept images, then the removed ones.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="How many images are kept, and their score range."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dataset, scores=None, **widgets):
        settings = settings_from_widgets(RankSettings, {name: values[0] for name, values in widgets.items()})
        whole = set_image_scores(dataset[0], scores) if scores else dataset[0]
        stays, goes = select_by_score(whole, settings)
        words = "\n".join(
            f"{len(part)} pictures {what}" + format_score_range(part) for part, what in ((stays, "stay"), (goes, "go"))
        )
        shown = Pictures((*stays.records, *goes.records))
        sheet = image_to_batch_tensor(
            draw_best_and_worst_sheet(
                [r.score for r in shown],
                lambda i: make_thumbnail(shown[i]),
                [make_printable(Path(r.path).name) for r in shown],
                title=words.replace("\n", ", "),
            )
        )
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(stays, goes, sheet, words, ui=ui.PreviewImage(sheet, cls=cls))


def format_score_range(dataset) -> str:
    scores = [r.score for r in dataset]
    return f", scores from {min(scores):g} to {max(scores):g}" if scores else ""


NODES = [LoadRatedPictures, TrainScoreModel, SaveScoreModel, LoadScoreModel, ScoreImages, RankAndFilter]
