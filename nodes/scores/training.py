"""What the nodes that train score models share: trunks on loaded models, the cache of trained models, and the
training."""

import json

from comfy_api.latest import io, ui

from ...trainers.data.image_scan import ScanOptions
from ...trainers.data.quality.duplicates import duplicate_group_names
from ...trainers.data.readers import make_printable
from ...trainers.files import read_safetensors
from ...trainers.scores.backbones import cache_frozen_features
from ...trainers.scores.files import is_whole_score_model, read_score_model, write_score_model
from ...trainers.scores.networks import DECODED_IMAGE, LATENT_BACKBONES, LOADED_BACKBONES, MODEL_FEATURES
from ...trainers.scores.resume import UNFINISHED, ResumeFolder, remove_abandoned_work
from ...trainers.scores.training import train_score_model
from .. import host, paths
from . import feature_extractors, latents


def choose_backbone_settings(scorer, pretrained):
    """What holds backbone, width, depth and rank: the settings, or the info of the pretrained model. ValueError for a
    pretrained model without a trunk to start from."""
    if pretrained is None:
        return scorer
    if not all(hasattr(network, "trunk") for network in pretrained.networks) or not pretrained.networks:
        raise ValueError(
            "What is connected as pretrained is a finished image scorer and has no backbone to train. Connect a "
            "model of Pretrain Score Backbone or Train Score Model, or use it as the teacher of Distill Score "
            "Model."
        )
    return pretrained.info


def find_trunk_factory(backbone, model=None, vae=None, clip_vision=None):
    """`trunk(info)` for a backbone on loaded models; None for one on latents alone. `backbone`: settings or info of a
    score model. ValueError for what is not connected."""
    if backbone.backbone in LATENT_BACKBONES:
        return None
    if backbone.backbone == MODEL_FEATURES and model is None:
        feature_extractors.DiffusionFeatureExtractor(None)
    if backbone.backbone == DECODED_IMAGE:
        feature_extractors.DifferentiableClipVision(clip_vision)
        feature_extractors.check_decoding_vae(vae)
    return feature_extractors.make_trunk_factory(model, vae, clip_vision)


def train_on_ratings(
    model, encoded, scorer, settings, backbone, trunk, report, *, pairs=(), pretrained=None, resume=None
):
    """The result of `train_score_model` on rated images of this MODEL's latents, near-duplicates in one fold. Features
    of a frozen backbone are computed once."""
    options = ScanOptions(report=report, check_interrupt=host.progress.raise_if_interrupted)
    groups = duplicate_group_names(encoded, options)
    schedule = latents.NoiseSchedule(model)
    data, denoiser = encoded, schedule
    if backbone.backbone in LOADED_BACKBONES and not backbone.rank:
        data, denoiser, trunk = cache_frozen_features(encoded, schedule, trunk)
    return train_score_model(
        data,
        denoiser,
        scorer,
        settings,
        latent_format=latents.latent_format_name(model),
        groups=groups,
        pairs=pairs,
        trunk=trunk,
        pretrained=pretrained,
        resume=resume,
        device=schedule.device,
        report=report,
        check_interrupt=host.progress.raise_if_interrupted,
    )


def load_or_train_score_model(fingerprint: str, node_id, train, trunk=None):
    """(score model, report, losses) of train(resume), or of an earlier training with this fingerprint. A training that
    was stopped continues at the next call. `trunk(info)`: for backbones on loaded models."""
    path = paths.score_cache_folder() / f"{fingerprint}.safetensors"
    remove_abandoned_work(path.parent)
    if is_whole_score_model(path, "report", "losses"):
        metadata = read_safetensors(path)[1]
        words = f"{metadata['report']}\nTrained before: it was read from the cache."
        return read_score_model(path, trunk), words, json.loads(metadata["losses"])
    resume = ResumeFolder(paths.score_cache_folder() / f"{fingerprint}{UNFINISHED}")
    try:
        with host.context.enable_gradients():
            result = train(resume)
    except BaseException:
        if resume.saved_progress:
            host.progress.show_node_text(
                f"stopped; all up to {resume.saved_progress} is saved, Run goes on from there", node_id
            )
        raise
    words = make_printable(result.report)
    write_score_model(path, result.model, {"report": words, "losses": json.dumps(result.losses)})
    resume.clear()
    return result.model, words, result.losses


def score_model_output(node, model, report, losses):
    """The outputs of a node that trains a score model; the first line of the report is shown on the node."""
    host.progress.show_node_text(report.splitlines()[0], node.hidden.unique_id)
    return io.NodeOutput(model, report, {"loss": losses}, ui=ui.PreviewText(report))
