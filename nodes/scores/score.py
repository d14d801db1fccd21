"""Score models: load rated images, train a score model on them, save and load it, score and filter other images."""

import dataclasses
from pathlib import Path

import numpy as np
from comfy_api.latest import io, ui
from PIL import Image

from ...trainers.data.contact_sheet import make_thumbnail
from ...trainers.data.images import dataset_from_tensors, image_to_batch_tensor
from ...trainers.data.ratings import (
    RATING_SOURCES,
    RankSettings,
    read_preference_table,
    read_rated_folder,
    select_by_score,
    set_image_scores,
)
from ...trainers.data.readers import hash_folder_state, make_printable
from ...trainers.data.records import ImageDataset
from ...trainers.files import tensor_hash
from ...trainers.scores.networks import ScorerSettings, check_trained_head
from ...trainers.scores.objective import ScoreSettings
from ...trainers.settings import Settings, compute_fingerprint, number_field
from .. import host, paths
from ..data.dataset import format_dataset_summary, make_cancellable_progress
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

BASIC_SCORE_FIELDS = (
    "task",
    "steps",
    "learning_rate",
    "batch",
    "members",
    "seed",
)  # of ScoreSettings; others: advanced


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringSettings(Settings):
    """How images are scored, and how many the sheet shows."""

    resolution: int = number_field(
        0,
        0,
        8192,
        "Images are scored at about resolution x resolution pixels in total. 0: the size that the score model was"
        " trained at.",
        unit="px",
        step=8,
    )
    shown: int = number_field(12, 1, 60, "How many of the best and of the worst images the sheet shows.", unit="images")


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
        from ...trainers.scores.reports import format_rating_summary

        dataset = read_rated_folder(
            paths.resolve_dataset_folder(folder), ratings, make_cancellable_progress(cls), paths.image_facts_file()
        )
        summary = "\n".join([format_rating_summary(dataset), format_dataset_summary(dataset)])
        host.progress.show_node_text(summary.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(dataset, summary)


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
        from .training import (
            choose_backbone_settings,
            find_trunk_factory,
            load_or_train_score_model,
            score_model_output,
            train_on_ratings,
        )

        scorer, settings = settings_from_widgets(ScorerSettings, widgets), settings_from_widgets(ScoreSettings, widgets)
        host.checks.check_latent_channels(model, encoded.channels)
        pairs = read_preference_pairs(file, encoded, settings.task)
        backbone = choose_backbone_settings(scorer, pretrained)
        fingerprint = score_training_fingerprint(model, encoded, scorer, settings, pairs, pretrained, vae, clip_vision)
        trunk = find_trunk_factory(backbone, model, vae, clip_vision)
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        train = lambda resume: train_on_ratings(
            model, encoded, scorer, settings, backbone, trunk, report, pairs=pairs, pretrained=pretrained, resume=resume
        )
        return score_model_output(cls, *load_or_train_score_model(fingerprint, cls.hidden.unique_id, train, trunk))


def read_preference_pairs(file, encoded, task) -> list[tuple[int, int]]:
    """The (better, worse) indices in the chosen table; [] where none is chosen. ValueError for a table that the task
    does not use."""
    table = paths.resolve_pair_file(file)
    if table is None:
        return []
    if task != "pairwise":
        raise ValueError(f"A file of pairs is chosen and the task is {task!r}. Choose the task pairwise, or no file.")
    return read_preference_table(table, [item.path for item in encoded.items])


def score_training_fingerprint(model, encoded, scorer, settings, pairs, pretrained, vae, clip_vision) -> str:
    """A fingerprint of everything that the trained model depends on."""
    from ...trainers.scores.files import score_model_tensors

    before = ""
    if pretrained is not None:
        before = compute_fingerprint(pretrained.info.to_dict(), tensor_hash(score_model_tensors(pretrained)))
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
        from ...trainers.scores.files import score_file_matches, write_score_model
        from ...trainers.scores.reports import format_score_metrics

        if not score_model.info.trained and not untrained:
            raise ValueError(
                "This score model is not saved, because it is not better than chance: "
                f"{format_score_metrics(score_model.info)}. Rate more images and train it again, or switch "
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
        from ...trainers.scores.files import check_score_latent_format, read_score_model
        from ...trainers.scores.reports import format_score_model_summary
        from . import latents as score_latents

        loaded = read_score_model(
            paths.score_model_path(file), lambda info: make_connected_trunk(info, model, vae, clip_vision)
        )
        if model is not None:
            check_score_latent_format(
                loaded.info, score_latents.latent_format_name(model), model.model.latent_format.latent_channels
            )
        return io.NodeOutput(loaded, format_score_model_summary(loaded.info))


def make_connected_trunk(info, model, vae, clip_vision):
    """The trunk of a score model on loaded models; None for one on latents alone. ValueError for what is not
    connected."""
    from .training import find_trunk_factory

    factory = find_trunk_factory(info, model, vae, clip_vision)
    return factory and factory(info)


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
        from ...trainers.data.rating_sheet import draw_best_and_worst_sheet
        from ...trainers.scores.reports import format_score_report

        settings = settings_from_widgets(ScoringSettings, widgets)
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        check_trained_head(score_model.info)
        if sum(given is not None for given in (dataset, images, latents)) != 1:
            raise ValueError("Connect exactly one of dataset, images and latents, so that it is clear what is scored.")
        if images is not None:
            dataset = dataset_from_tensors(
                [images], (), (), paths.image_cache_folder(), report, host.progress.raise_if_interrupted
            )
        if latents is None:
            scores, spreads = score_dataset_images(score_model, dataset, vae, settings, report)
            scored = set_image_scores(dataset, scores)
            names, draw = format_image_names(dataset), lambda i: make_thumbnail(dataset[i])
        else:
            scores, spreads = score_latent_samples(score_model, latents, report)
            scored = ImageDataset(())
            names, draw = [f"latent {i}" for i in range(len(scores))], make_latent_drawer(latents["samples"], vae)
        words = format_score_report(score_model.info, scores, spreads, names)
        sheet = image_to_batch_tensor(
            draw_best_and_worst_sheet(scores, draw, names, settings.shown, spreads, words.splitlines()[0])
        )
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(scores, spreads, scored, sheet, words, ui=ui.PreviewImage(sheet, cls=cls))


def format_image_names(dataset) -> list[str]:
    """The file name of every image, as a sheet can print it."""
    return [make_printable(Path(record.path).name) for record in dataset]


def score_dataset_images(score_model, dataset, vae, settings, report) -> tuple[list[float], list[float]]:
    """(scores, spreads): of the images themselves where the score model rates images, else of their latents."""
    from ...trainers.scores.training import rate_latents
    from . import latents as score_latents

    if hasattr(score_model, "rate_images"):
        return score_model.rate_images(dataset, report, host.progress.raise_if_interrupted)
    means = score_latents.encode_for_score_model(score_model.info, dataset, vae, report, settings.resolution)
    return rate_latents(score_model, means, vae.device, report, host.progress.raise_if_interrupted)


def score_latent_samples(score_model, latent, report) -> tuple[list[float], list[float]]:
    """(scores, spreads) of a LATENT. ValueError for latents that the score model does not judge."""
    from ...trainers.scores.files import check_score_latent_format
    from ...trainers.scores.training import rate_latents
    from . import latents as score_latents

    samples, info = latent["samples"], score_model.info
    check_score_latent_format(info, "", samples.shape[1])
    in_model_space = list(score_latents.latent_to_model_space(samples, info.latent_format))
    return rate_latents(score_model, in_model_space, samples.device, report, host.progress.raise_if_interrupted)


def make_latent_drawer(samples, vae):
    """index -> the decoded latent as an image; a black square without a VAE."""
    if vae is None:
        return lambda i: Image.new("RGB", (64, 64), "#000000")
    return lambda i: first_frame_to_image(vae.decode(samples[i : i + 1]))


def first_frame_to_image(images) -> Image.Image:
    """The first frame of IMAGE (B, H, W, 3) or (B, frames, H, W, 3)."""
    array = images.reshape(-1, *images.shape[-3:])[0].clamp(0, 1).cpu().float().numpy()
    return Image.fromarray((array * 255).round().astype(np.uint8))


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
        from ...trainers.data.rating_sheet import draw_best_and_worst_sheet
        from ...trainers.scores.reports import format_selection

        settings = settings_from_widgets(RankSettings, {name: values[0] for name, values in widgets.items()})
        whole = set_image_scores(dataset[0], scores) if scores else dataset[0]
        kept, removed = select_by_score(whole, settings)
        words = format_selection(kept, removed)
        shown = ImageDataset((*kept.records, *removed.records))
        draw, title = lambda i: make_thumbnail(shown[i]), words.replace("\n", ", ")
        sheet = image_to_batch_tensor(
            draw_best_and_worst_sheet([r.score for r in shown], draw, format_image_names(shown), title=title)
        )
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(kept, removed, sheet, words, ui=ui.PreviewImage(sheet, cls=cls))


NODES = [LoadRatedPictures, TrainScoreModel, SaveScoreModel, LoadScoreModel, ScoreImages, RankAndFilter]
