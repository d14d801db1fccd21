"""Where score models come from beside ratings: pictures alone, image scorers that others trained, models that are loaded already."""

import json
from dataclasses import replace

from comfy_api.latest import io, ui

from ...trainers.data.labels import folder_labels, read_labels
from ...trainers.data.quality.thumbnails import Looking
from ...trainers.data.ratings import groups_of
from ...trainers.data.readers import printable
from ...trainers.data.views import encode_views
from ...trainers.files import read_safetensors, tensor_hash
from ...trainers.scores.aesthetic_heads import read_head
from ...trainers.scores.backbones import DECODED, LOOKING, MODEL, remembered
from ...trainers.scores.files import read_score_model, tensors_of, write_score_model
from ...trainers.scores.networks import ScorerSettings, check_rates
from ...trainers.scores.objective import PLAIN, ScoreSettings
from ...trainers.scores.pretext import PretextSettings
from ...trainers.scores.pretraining import pretrained
from ...trainers.scores.resume import Unfinished
from ...trainers.scores.training import trained
from ...trainers.settings import fingerprint
from .. import host, paths
from ..fields import CATEGORY, Dataset, Encoded, LossMap, ScoreModel, inputs, latents_too, record
from . import backbones, latents, prompt_match

VERSION = 1  # of pre-training and distillation: raise it when the same inputs would give another model
PRETEXT_SHOWN = ("backbone", "inpaint", "simclr", "steps", "batch", "size", "seed")
DISTIL_SHOWN = ("steps", "learning_rate", "batch", "members", "seed")
LATER = ("weight_decay", "ema", "check_every", "patience", "few")  # of ScoreSettings, advanced


def trunk_maker(scorer, model=None, vae=None, clip_vision=None):
    """`trunk(about)` for the backbone that `scorer` (settings, or what a file says of itself) names. ValueError for what is not connected."""
    if scorer.backbone == MODEL and model is None:
        backbones.ModelLook(None)
    if scorer.backbone == DECODED:
        backbones.Sight(clip_vision)
        backbones.check_vae(vae)
    return backbones.trunk_maker(model, vae, clip_vision)


def looks_like(scorer, pretrained):
    """What decides backbone, width, depth and rank: the settings, or what a pretrained model says of itself. ValueError for one that has no
    backbone to learn on."""
    if pretrained is None:
        return scorer
    if not all(hasattr(network, "trunk") for network in pretrained.networks) or not pretrained.networks:
        raise ValueError("What is connected as pretrained is a finished scorer of pictures and has no backbone to learn on. Connect a model of Pretrain Score "
                         "Backbone or Train Score Model, or use it as the teacher of Distill Score Model.")
    return pretrained.about


def frozen(encoded, denoiser, scorer, trunk):
    """(encoded, denoiser, trunk) for `trained`: of backbones that stay as they are, what they see is computed once and kept."""
    return remembered(encoded, denoiser, trunk) if scorer.backbone in LOOKING and not scorer.rank else (encoded, denoiser, trunk)


# -- trained before ---------------------------------------------------------------------------------------------------------------------------


def kept(key: str, node_id, make, trunk=None):
    """(score model, report, losses) of make(work), or of the same work done before. Where it is stopped, it goes on from there at the next call.
    `trunk(about)`: for backbones made from something loaded."""
    path = paths.scores_folder() / f"{key}.safetensors"
    if path.is_file():
        metadata = read_safetensors(path)[1]
        words = f"{metadata['report']}\nTrained before: it was read from the cache."
        return read_score_model(path, trunk), words, json.loads(metadata["losses"])
    work = Unfinished(paths.scores_folder() / f"{key}.unfinished")
    try:
        with host.context.gradients():
            done = make(work)
    except BaseException:
        if work.saved:
            host.progress.show(f"stopped; all up to {work.saved} is saved, Run goes on from there", node_id)
        raise
    words = printable(done.report)
    write_score_model(path, done.model, {"report": words, "losses": json.dumps(done.losses)})
    work.clear()
    return done.model, words, done.losses


class PretrainScoreBackbone(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        rest = [name for name in PretextSettings.__dataclass_fields__ if name not in PRETEXT_SHOWN]
        return io.Schema(
            node_id="TrainyardPretrainScoreBackbone",
            display_name="Pretrain Score Backbone",
            category=CATEGORY,
            description="Teach a latent backbone to see on your own pictures, without any rating: hidden parts, crops of one picture, turns, "
            "shuffles, colours, classes. Train Score Model then needs fewer ratings.",
            search_aliases=["self supervised", "simclr", "inpainting pretext", "representation learning", "pretraining", "unlabelled"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose latents are looked at: its schedule and its latent format. It is not trained."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model. Every view of a picture is encoded by itself, once."),
                Dataset.Input("dataset", tooltip="As many pictures as you have, of the kind that is to be rated. Captions are not read."),
                *inputs(PretextSettings, only=PRETEXT_SHOWN),
                *inputs(ScorerSettings, only=("noisy",)),
                *inputs(PretextSettings, only=rest),
                *inputs(ScorerSettings, only=("width", "depth")),
                io.Combo.Input(
                    "labels",
                    options=paths.pair_files(),
                    default=paths.NO_PAIRS,
                    advanced=True,
                    tooltip="For classes: a CSV file with the columns file and label. Without one, the folders of the pictures are their classes.",
                ),
            ],
            outputs=[
                ScoreModel.Output("score_model", display_name="score_model", tooltip="A backbone without a head: pretrained of Train Score Model."),
                io.String.Output("report", display_name="report", tooltip="What the backbone is worth: probes before and after."),
                LossMap.Output("losses", display_name="losses", tooltip="One number per step, for Loss Plot."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, vae, dataset, labels=paths.NO_PAIRS, **widgets):
        scorer, settings = record(ScorerSettings, without_backbone(widgets)), record(PretextSettings, widgets)
        classes = classes_of(dataset, labels) if settings.classes else [None] * len(dataset)
        pictures, report = host.encoders.PictureEncoder(vae), host.progress.Steps(cls.hidden.unique_id)
        host.checks.check_latents(model, pictures.channels)
        scores = [r.score for r in dataset]
        key = fingerprint("pretext", VERSION, host.identity.model_identity(model), pictures.identity, dataset.fingerprint(), scorer, settings, classes, scores)
        make = lambda work: from_pictures(model, pictures, dataset, scorer, settings, classes, report, work)
        return shown(cls, *kept(key, cls.hidden.unique_id, make))


def from_pictures(model, pictures, dataset, scorer, settings, classes, report, work):
    schedule = latents.Schedule(model)
    try:
        views = encode_views(dataset, settings.kinds(), size=settings.size, crops=settings.crops, seed=settings.seed, vae=pictures,
                             cache_dir=paths.cache_folder(), report=report, check_interrupt=host.progress.interrupted)  # fmt: skip
    finally:
        pictures.free()
    return pretrained(views, schedule, scorer, settings, latent_format=latents.format_name(model), labels=classes, device=schedule.device,
                      work=work, report=report, check_interrupt=host.progress.interrupted)  # fmt: skip


def without_backbone(widgets) -> dict:
    """The widgets of ScorerSettings; the backbone is PretextSettings' own."""
    return {name: value for name, value in widgets.items() if name != "backbone"}


def classes_of(dataset, labels: str) -> list:
    table = paths.pair_file(labels)
    return folder_labels(dataset) if table is None else read_labels(table, dataset)


def shown(node, model, words, losses):
    host.progress.show(words.splitlines()[0], node.hidden.unique_id)
    return io.NodeOutput(model, words, {"loss": losses}, ui=ui.PreviewText(words))


class LoadAestheticHead(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadAestheticHead",
            display_name="Load Aesthetic Head",
            category=CATEGORY,
            description="An aesthetic predictor that others trained on CLIP or SigLIP (LAION v1 and v2, Aesthetic Predictor V2.5), as a score model: "
            "for pictures, and through a VAE for latents.",
            search_aliases=["laion aesthetic", "improved aesthetic predictor", "siglip aesthetic", "pixel scorer", "sac logos ava"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=paths.head_names(),
                    tooltip="A .safetensors, .pth, .pt or .ckpt file in models/aesthetic_heads, of which only the numbers are read. Press R after adding one.",
                ),
                io.ClipVision.Input("clip_vision", tooltip="The image encoder that the head was trained on. The error says which one when it is another."),
                io.Combo.Input(
                    "pooler",
                    options=paths.pooler_names(),
                    default=paths.NO_POOLER,
                    tooltip="For SigLIP heads: a file in models/clip_vision that holds SigLIP's pooling layer, such as google's own model.safetensors.",
                ),
                *latents_too(),
            ],
            outputs=[
                ScoreModel.Output("score_model", display_name="score_model", tooltip="For Score Images, Distill Score Model and, with model and vae, "
                                  "Train LECO-Score."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return (file, paths.state_of(paths.head_path(file)))

    @classmethod
    def execute(cls, file, clip_vision, pooler=paths.NO_POOLER, model=None, vae=None):
        of_latents = latents.to_score(model, vae)
        with host.context.gradients():
            head = read_head(paths.head_path(file), paths.pooler_path(pooler))
            return io.NodeOutput(backbones.ImageScoreModel(head, clip_vision, file, *of_latents))


class DistillScoreModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardDistillScoreModel",
            display_name="Distill Score Model",
            category=CATEGORY,
            description="A latent score model that learns to say what an image scorer says, at any noise level: no ratings needed, and no decoding "
            "when it is used.",
            search_aliases=["distillation", "teacher student", "latent aesthetic", "copy scorer", "noise aware reward"],
            inputs=[
                ScoreModel.Input("teacher", tooltip="From Load Aesthetic Head: what rates the pictures."),
                io.Model.Input("model", tooltip="The model whose latents the student scores: its schedule and its latent format. It is not trained."),
                Dataset.Input("dataset", tooltip="The pictures that are encoded. Some hundred, like those that are to be scored; no ratings needed."),
                Encoded.Input("encoded", tooltip="The same pictures from Encode Dataset, best with flip on. CLIP is not needed for them."),
                *inputs(ScorerSettings, only=("backbone", "noisy")),
                *inputs(ScoreSettings, only=DISTIL_SHOWN),
                *inputs(ScorerSettings, only=("width", "depth", "dropout")),
                *inputs(ScoreSettings, only=LATER),
                *inputs(ScorerSettings, only=("rank",)),
                ScoreModel.Input("pretrained", optional=True, tooltip="Start from the backbone of this model, such as one of Pretrain Score Backbone."),
            ],
            outputs=[
                ScoreModel.Output("score_model", display_name="score_model", tooltip="For Save Score Model, Score Images and Train LECO-Score."),
                io.String.Output("report", display_name="report", tooltip="How well the student agrees with its teacher on pictures it never saw."),
                LossMap.Output("losses", display_name="losses", tooltip="The losses of the first network, for Loss Plot."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, teacher, model, dataset, encoded, pretrained=None, **widgets):
        scorer = record(ScorerSettings, widgets)
        settings = record(ScoreSettings, {**widgets, "task": "regression", "loss": PLAIN})
        host.checks.check_latents(model, encoded.channels)
        seeing = looks_like(scorer, pretrained)
        if seeing.backbone == DECODED:
            raise ValueError(f"The backbone '{DECODED}' would be the teacher once more: it decodes and looks at pictures. Choose 'latent ResNet'.")
        report = host.progress.Steps(cls.hidden.unique_id)
        taught = taught_by(teacher, dataset, encoded, report)
        ratings = [[item.id, item.score] for item in taught.items]
        before = tensor_hash(tensors_of(pretrained)) if pretrained is not None else ""
        key = fingerprint("distil", VERSION, host.identity.model_identity(model), encoded.fingerprint, ratings, scorer, settings, before)
        trunk = trunk_maker(seeing, model) if seeing.backbone in LOOKING else None
        make = lambda work: from_teacher(model, taught, scorer, settings, pretrained, seeing, trunk, report, work)
        return shown(cls, *kept(key, cls.hidden.unique_id, make, trunk))


def taught_by(teacher, dataset, encoded, report):
    """The encoded pictures with the teacher's ratings in place of their own. ValueError for a teacher that does not look at pictures, and for
    encoded pictures that are not in the dataset."""
    check_rates(teacher.about)
    if not hasattr(teacher, "rate_pictures"):
        raise ValueError("The teacher is a score model of latents, and pictures are to be rated. Connect one of Load Aesthetic Head, or Prompt Match Score; a "
                         "score model of latents needs no distillation.")
    if not getattr(teacher, "words", "said by itself"):
        raise ValueError("The teacher compares each picture with its own caption, and the student will see no captions. Write words into Prompt Match Score.")
    ids = {item.id for item in encoded.items}
    if missing := ids - {r.id for r in dataset}:
        raise ValueError(f"{len(missing)} of {len(ids)} encoded pictures are not in the dataset. Connect the dataset that was encoded.")
    wanted = type(dataset)(tuple({r.id: r for r in dataset if r.id in ids}.values()))
    ratings = dict(zip((r.id for r in wanted), teacher.rate_pictures(wanted, report, host.progress.interrupted)[0], strict=True))
    return rated(encoded, ratings)


def rated(encoded, ratings):
    return replace(encoded, items=[replace(item, score=ratings[item.id]) for item in encoded.items])


def from_teacher(model, taught, scorer, settings, before, seeing, trunk, report, work):
    groups = groups_of(taught, Looking(report=report, check_interrupt=host.progress.interrupted))
    data, schedule, trunk = frozen(taught, latents.Schedule(model), seeing, trunk)
    return trained(
        data, schedule, scorer, settings, latent_format=latents.format_name(model), groups=groups, trunk=trunk, pretrained=before,
        work=work, device=schedule.device, report=report, check_interrupt=host.progress.interrupted,
    )  # fmt: skip


NODES = [PretrainScoreBackbone, DistillScoreModel, LoadAestheticHead, *prompt_match.NODES]
