"""What a vision model or a score backbone sees in pictures, and what follows: which are alike, and which groups they
form."""

import math

from comfy_api.latest import io, ui

from ...trainers.data.buckets import BucketSettings
from ...trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from ...trainers.data.encode import encode_dataset
from ...trainers.data.image_scan import ScanOptions, scan_images
from ...trainers.data.images import image_to_batch_tensor
from ...trainers.data.records import ImageDataset as Pictures
from ...trainers.data.similarity.clusters import ClusterSettings, cluster_features
from ...trainers.data.similarity.similar import (
    ImageFeatures,
    SimilarSettings,
    collect_matched_images,
    draw_clusters_sheet,
    draw_similarity_sheet,
    find_similar_images,
    format_clusters_report,
    format_similarity_report,
    select_query_images,
    split_by_cluster,
    unit_rows,
)
from ...trainers.files import tensor_hash
from ...trainers.scores.backbones import extract_trunk_features
from ...trainers.scores.files import check_score_latent_format
from .. import host, paths
from ..data import image_features
from ..fields import CATEGORY, DatasetType, ScoreModelType, settings_from_widgets, settings_inputs
from . import latents

FeaturesType = io.Custom("TRAINYARD_FEATURES")  # holds trainers.data.similarity.similar.Features
DEFAULT_FEATURE_SIDE = 512  # px, where a score model does not say at which size it was trained


class ExtractFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardExtractFeatures",
            display_name="Extract Features",
            category=CATEGORY,
            description="Computes a feature vector for each image with a vision model (CLIP, SigLIP, DINO) or the"
            " backbone of a score model, for comparing images.",
            search_aliases=["embeddings", "clip vectors", "dino", "image embedding", "vendi diversity"],
            inputs=[
                DatasetType.Input("dataset", tooltip="The images, from Load Dataset."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP for content and style, DINOv2 or v3 for objects and shapes.",
                ),
                ScoreModelType.Input(
                    "score_model",
                    optional=True,
                    tooltip="Instead of clip_vision: the backbone from Pretrain Score Backbone or of any latent "
                    "score model. Needs vae.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="With score_model: the VAE of the model whose latents it reads."
                ),
            ],
            outputs=[
                FeaturesType.Output(
                    "features", display_name="features", tooltip="For Similar Images and Cluster Images."
                ),
                io.Float.Output(
                    "diversity",
                    display_name="diversity",
                    tooltip="How many different images the set is equivalent to (Vendi score).",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="How many images were processed, by which model, and which could not be opened.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, clip_vision=None, score_model=None, vae=None):
        if (clip_vision is None) == (score_model is None):
            raise ValueError(
                "Connect either clip_vision or score_model (with vae), so that it is clear what looks at the pictures."
            )
        if not len(dataset):
            raise ValueError("The dataset has no images. Load a folder with images first.")
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        found = (
            extract_vision_features(dataset, clip_vision, report)
            if score_model is None
            else extract_backbone_features(dataset, score_model, vae, report)
        )
        words = format_features_summary(found)
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(found, found.diversity, words)


def extract_vision_features(dataset, clip_vision, report) -> ImageFeatures:
    """Pictures that cannot be opened are left out, with the reason."""
    looking = ScanOptions(
        features=image_features.make_image_feature_encoder(clip_vision),
        report=report,
        check_interrupt=host.progress.raise_if_interrupted,
    )
    _, rows, broken = scan_images(dataset.records, lambda record, picture, mask: None, looking)
    there = [i for i in range(len(dataset)) if i not in broken]
    if not there:
        raise ValueError(f"None of {len(dataset)} pictures can be opened: {next(iter(broken.values()))}")
    skipped = (*dataset.skipped, *((dataset[i].path, why) for i, why in broken.items()))
    kind = f"vision {host.identity.hash_patched_weights(clip_vision.patcher)}"
    return ImageFeatures(
        Pictures(tuple(dataset[i] for i in there), skipped), unit_rows(rows[there]), "CLIP_VISION", kind
    )


def extract_backbone_features(dataset, score_model, vae, report) -> ImageFeatures:
    if not score_model.networks or not hasattr(score_model.networks[0], "trunk"):
        raise ValueError(
            "This score model is an aesthetic head on a CLIP_VISION. Connect that CLIP_VISION as clip_vision instead."
        )
    encoder, info = host.encoders.VaeEncoder(vae), score_model.info
    check_score_latent_format(info, "", encoder.channels)
    step = math.lcm(8, 2 * encoder.factor)
    try:
        with host.context.enable_gradients():
            encoded = encode_dataset(
                dataset,
                CaptionSettings(caption_mode=CAPTION_MODE_EMPTY),
                BucketSettings(resolution=max(step, info.resolution or DEFAULT_FEATURE_SIDE), step=step, merge=1),
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
        latents.latent_to_model_space(encoded.store.load(item.latent)["mean"][None], info.latent_format)[0]
        for item in encoded.items
    ]
    rows = extract_trunk_features(score_model, means, vae.device, report, host.progress.raise_if_interrupted)
    kind = f"backbone {tensor_hash(score_model.networks[0].trunk.state_dict())}"
    return ImageFeatures(dataset, unit_rows(rows), f"the backbone of a score model ({info.backbone})", kind)


def format_features_summary(found: ImageFeatures) -> str:
    lines = [
        f"{len(found)} pictures seen by {found.source}, {found.rows.shape[1]} numbers each; they amount to "
        f"{found.diversity:.1f} different ones"
    ]
    return "\n".join(lines + [f"skipped {path}: {reason}" for path, reason in found.dataset.skipped])


class SimilarImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardSimilarImages",
            display_name="Similar Images",
            category=CATEGORY,
            description="Finds the most similar images of a set, best first, on a sheet and as a dataset.",
            search_aliases=[
                "nearest neighbours",
                "reverse image search",
                "find duplicates",
                "retrieval",
                "memorisation",
            ],
            inputs=[
                FeaturesType.Input("features", tooltip="The set to search, from Extract Features."),
                FeaturesType.Input(
                    "queries",
                    optional=True,
                    tooltip="Query images with features from the same vision model, such as generated images. "
                    "Without it, the query comes from the set itself.",
                ),
                *settings_inputs(SimilarSettings),
            ],
            outputs=[
                DatasetType.Output("dataset", display_name="dataset", tooltip="Every match once, most similar first."),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="Each query, framed green, with its matches and their cosine similarity.",
                ),
                io.String.Output("report", display_name="report", tooltip="The same as text."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, features, queries=None, **widgets):
        settings = settings_from_widgets(SimilarSettings, widgets)
        asked = select_query_images(queries or features, settings.name, everything=queries is not None)
        matches = find_similar_images(asked, features, settings.most, settings.least)
        words = format_similarity_report(asked, features, matches)
        sheet = image_to_batch_tensor(draw_similarity_sheet(asked, features, matches))
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(
            collect_matched_images(features, matches), sheet, words, ui=ui.PreviewImage(sheet, cls=cls)
        )


class ClusterImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardClusterImages",
            display_name="Cluster Images",
            category=CATEGORY,
            description="Groups similar images and outputs a sheet and one dataset per group.",
            search_aliases=["k-means", "group by style", "agglomerative", "sort pictures", "silhouette"],
            inputs=[
                FeaturesType.Input("features", tooltip="From Extract Features."),
                *settings_inputs(ClusterSettings),
            ],
            outputs=[
                DatasetType.Output(
                    "datasets",
                    display_name="datasets",
                    is_output_list=True,
                    tooltip="One dataset per group, the largest first.",
                ),
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="All images; each image's flags name its group."
                ),
                io.Int.Output(
                    "groups",
                    display_name="groups",
                    is_output_list=True,
                    tooltip="The group number of each image, in order.",
                ),
                io.Image.Output(
                    "sheet", display_name="sheet", tooltip="One row per group, its most typical images first."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="All groups as text, and how clear the groups are."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, features, **widgets):
        found = cluster_features(
            features.rows, settings_from_widgets(ClusterSettings, widgets), host.progress.raise_if_interrupted
        )
        (parts, whole), words = split_by_cluster(features, found), format_clusters_report(features, found)
        sheet = image_to_batch_tensor(draw_clusters_sheet(features, found))
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(
            parts, whole, [label + 1 for label in found.labels], sheet, words, ui=ui.PreviewImage(sheet, cls=cls)
        )


NODES = [ExtractFeatures, SimilarImages, ClusterImages]
