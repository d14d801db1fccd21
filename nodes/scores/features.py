"""Image features by a vision model or a score model's backbone, and what follows from them: similar images and
clusters."""

from comfy_api.latest import io, ui

from ...trainers.data.image_scan import ScanOptions, scan_images
from ...trainers.data.images import image_to_batch_tensor
from ...trainers.data.records import ImageDataset, describe_left_out
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
from .. import host
from ..fields import CATEGORY, DatasetType, ScoreModelType, settings_from_widgets, settings_inputs

FeaturesType = io.Custom("TRAINYARD_FEATURES")  # holds trainers.data.similarity.similar.ImageFeatures


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
                "Connect either clip_vision or score_model (with vae), so that it is clear which encoder to use."
            )
        if not len(dataset):
            raise ValueError("The dataset has no images. Load a folder with images first.")
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        if score_model is None:
            features = extract_vision_features(dataset, clip_vision, report)
        else:
            features = extract_backbone_features(dataset, score_model, vae, report)
        summary = format_features_summary(features)
        host.progress.show_node_text(summary.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(features, features.diversity, summary)


def extract_vision_features(dataset, clip_vision, report) -> ImageFeatures:
    """Features of every image by a CLIP_VISION. Images that cannot be opened are left out, with the reason."""
    from ..data import image_features

    options = ScanOptions(
        features=image_features.make_image_feature_encoder(clip_vision),
        report=report,
        check_interrupt=host.progress.raise_if_interrupted,
    )
    _, rows, broken = scan_images(dataset.records, lambda record, image, mask: None, options)
    readable = [i for i in range(len(dataset)) if i not in broken]
    if not readable:
        raise ValueError(f"None of {len(dataset)} images can be opened: {next(iter(broken.values()))}")
    skipped = (*dataset.skipped, *((dataset[i].path, why) for i, why in broken.items()))
    kind = f"vision {host.identity.hash_patched_weights(clip_vision.patcher)}"
    seen = ImageDataset(tuple(dataset[i] for i in readable), skipped)
    return ImageFeatures(seen, unit_rows(rows[readable]), "CLIP_VISION", kind)


def extract_backbone_features(dataset, score_model, vae, report) -> ImageFeatures:
    """Features of every image by the trunk of a score model. ValueError for a score model without one."""
    from ...trainers.scores.backbones import extract_trunk_features
    from . import latents

    if not score_model.networks or not hasattr(score_model.networks[0], "trunk"):
        raise ValueError(
            "This score model is an aesthetic head on a CLIP_VISION. Connect that CLIP_VISION as clip_vision instead."
        )
    means = latents.encode_for_score_model(score_model.info, dataset, vae, report)
    rows = extract_trunk_features(score_model, means, vae.device, report, host.progress.raise_if_interrupted)
    kind = f"backbone {tensor_hash(score_model.networks[0].trunk.state_dict())}"
    return ImageFeatures(dataset, unit_rows(rows), f"the backbone of a score model ({score_model.info.backbone})", kind)


def format_features_summary(features: ImageFeatures) -> str:
    """How many images and features there are, how diverse they are, and a line for each skipped image."""
    lines = [
        f"{len(features)} images seen by {features.source}, {features.rows.shape[1]} numbers each; they amount to "
        f"{features.diversity:.1f} different ones"
    ]
    return "\n".join(lines + describe_left_out(features.dataset))


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
