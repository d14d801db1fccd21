"""CLIPScore as a score model: how well an image matches a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ...trainers.data.records import open_image
from ...trainers.scores.networks import DECODED_IMAGE, ScoreModelInfo, ScorerEnsemble
from ...trainers.settings import compute_fingerprint
from .. import host
from ..fields import CATEGORY, ScoreModelType, latent_score_inputs

CLIP_SCORE_SCALE = 100.0  # CLIPScore (Hessel et al. 2021) as a percentage
CLIP_SCORE_MEAN, CLIP_SCORE_STD = 25.0, 5.0  # of CLIP scores of captioned images, roughly
PROMPT_BATCH_SIZE = 32


class ClipScoreModel(ScorerEnsemble):
    """A hundred times the cosine between image and text embedding. `words` is the text where the caller gives none."""

    def __init__(self, clip_vision, clip, words: str = "", vae=None, format_name: str = "", channels: int = 0):
        from ..data import zeroshot
        from . import feature_extractors

        self.encoder = zeroshot.find_partner_encoder(clip_vision, clip)
        self.clip_vision, self.clip, self.words, self.text_embeddings = clip_vision, clip, words.strip(), {}
        networks = []
        if vae is not None:
            vision_encoder = feature_extractors.DifferentiableClipVision(clip_vision)
            networks = [
                DecodedClipEmbedder(feature_extractors.DecodedFeatureExtractor(vae, vision_encoder, format_name))
            ]
        super().__init__(
            networks,
            ScoreModelInfo(
                DECODED_IMAGE,
                "regression",
                format_name,
                channels,
                noisy=False,
                mean=CLIP_SCORE_MEAN,
                std=CLIP_SCORE_STD,
                low=0.0,
                high=CLIP_SCORE_SCALE,
            ),
        )
        others = [
            host.identity.hash_patched_weights(one.patcher) for one in (clip_vision, clip, vae) if one is not None
        ]
        self.identity = compute_fingerprint("prompt match", self.words, others, format_name)

    def encode_prompts(self, texts) -> None:
        """Encode these texts now and keep their embeddings. Later, while a model is trained, loading the text encoder
        would unload it."""
        from ..data import zeroshot

        new = [text for text in dict.fromkeys(texts) if text not in self.text_embeddings]
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(new), PROMPT_BATCH_SIZE):
                batch = new[start : start + PROMPT_BATCH_SIZE]
                features = zeroshot.encode_text_features(self.clip, batch, self.encoder).clone()
                self.text_embeddings |= zip(batch, F.normalize(features, dim=-1), strict=True)

    def clip_scores(self, image_embeddings: Tensor, texts) -> Tensor:
        """(B,) the CLIP score of each image embedding with its own text."""
        self.encode_prompts(texts)
        text_embeddings = torch.stack([self.text_embeddings[text] for text in texts]).to(image_embeddings.device)
        return CLIP_SCORE_SCALE * (F.normalize(image_embeddings.float(), dim=-1) * text_embeddings).sum(-1)

    def members_for_prompts(self, x: Tensor, level: Tensor, texts) -> Tensor:
        """(1, B) the score of each decoded latent with its own text, in standard deviations."""
        if not self.networks:
            raise ValueError(
                "This score compares images with text, but got latents. Connect model and vae to Prompt Match Score."
            )
        scores = self.clip_scores(self.networks[0](x, level), texts)
        return ((scores - CLIP_SCORE_MEAN) / CLIP_SCORE_STD)[None]

    def member_scores(self, x: Tensor, level: Tensor) -> Tensor:
        if not self.words:
            raise ValueError("Prompt Match Score has no words to compare latents with. Write them into its words.")
        return self.members_for_prompts(x, level, [self.words] * len(x))

    @torch.no_grad()
    def rate_images(
        self, dataset, report=None, check_interrupt=host.progress.raise_if_interrupted
    ) -> tuple[list[float], list[float]]:
        """(scores, spreads) of a dataset's images, with `words`, or else each with its own caption."""
        from ..data import image_features

        texts = [self.words or next(iter(record.captions), "") for record in dataset]
        if bare := [record.path for record, text in zip(dataset, texts, strict=True) if not text.strip()]:
            raise ValueError(
                f"Prompt Match Score has no words, and {len(bare)} of {len(dataset)} images have no caption, such "
                f"as {bare[0]}. Write words, or caption the images."
            )
        scores: list[float] = []
        for record, text in zip(dataset, texts, strict=True):
            features = image_features.encode_image_features(self.clip_vision, [open_image(record)], check_interrupt)
            scores += self.clip_scores(torch.from_numpy(features), [text]).tolist()
            if report:
                report(len(scores), len(dataset), "rated")
        return scores, [0.0] * len(scores)


class DecodedClipEmbedder(torch.nn.Module):
    """(x, level) -> (B, d) CLIP embeddings of decoded latents. It has no weights of its own."""

    def __init__(self, extract):
        super().__init__()
        self.extract = extract

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.extract(x, level)

    def state_dict(self, *args, **kwargs):
        raise ValueError("Prompt Match Score has no file of its own: add the node wherever you need it.")


class PromptMatchScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardPromptMatch",
            display_name="Prompt Match Score",
            category=CATEGORY,
            description="Scores how well an image matches a text, with a CLIP image and text encoder. For "
            "captions, for Train LECO-Score (each prompt's own words, or good words against bad "
            "ones), and as a teacher.",
            search_aliases=[
                "clip score",
                "text alignment",
                "prompt adherence",
                "clipscore",
                "semantic relative preference",
                "zero-shot reward",
            ],
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="CLIP-ViT-L, -H or -bigG from Load CLIP Vision."),
                io.Clip.Input(
                    "clip",
                    tooltip="The matching text encoder with text projection: CLIP-L of "
                    "openai/clip-vit-large-patch14, the CLIP of SD2.1, or of SDXL.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="The text to compare images with. Empty: each image's own caption, or in Train "
                    "LECO-Score its own prompt.",
                ),
                *latent_score_inputs(),
            ],
            outputs=[
                ScoreModelType.Output(
                    "score_model",
                    display_name="score_model",
                    tooltip="For Score Images, Distill Score Model (with words) and, with model and vae, Train "
                    "LECO-Score.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip_vision, clip, words="", model=None, vae=None):
        from . import latents

        with host.context.enable_gradients():
            return io.NodeOutput(ClipScoreModel(clip_vision, clip, words, *latents.latent_scoring_inputs(model, vae)))


NODES = [PromptMatchScore]
