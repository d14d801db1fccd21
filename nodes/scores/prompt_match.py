"""A score that reads: how well a picture matches words, by a CLIP that has seen both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ...trainers.data.records import open_image
from ...trainers.scores.backbones import DECODED
from ...trainers.scores.networks import About, ScoreModel
from ...trainers.settings import fingerprint
from .. import host
from ..data import vision, zeroshot
from ..fields import CATEGORY, latents_too
from ..fields import ScoreModel as ScoreModelType
from . import backbones, latents

PERCENT = 100.0  # CLIPScore (Hessel et al. 2021) is told in hundredths
MEAN, STD = 25.0, 5.0  # of CLIP scores of pictures with captions, roughly
AT_ONCE = 32


class PromptMatch(ScoreModel):
    """A hundred times the cosine between a picture and words. `words` are compared with where nobody gives others."""

    def __init__(self, clip_vision, clip, words: str = "", vae=None, format_name: str = "", channels: int = 0):
        self.encoder = zeroshot.partner(clip_vision, clip)
        self.clip_vision, self.clip, self.words, self.known = clip_vision, clip, words.strip(), {}
        eyes = [] if vae is None else [Eyes(backbones.PixelLook(vae, backbones.Sight(clip_vision), format_name))]
        super().__init__(eyes, About(DECODED, "regression", format_name, channels, noisy=False, mean=MEAN, std=STD, low=0.0, high=PERCENT))
        others = [host.identity.identity(one.patcher) for one in (clip_vision, clip, vae) if one is not None]
        self.identity = fingerprint("prompt match", self.words, others, format_name)

    def read(self, texts) -> None:
        """Understand these texts now; later, while a model is trained, the text encoder would take its place."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(new), AT_ONCE):
                part = new[start : start + AT_ONCE]
                self.known |= zip(part, F.normalize(zeroshot.text_features(self.clip, part, self.encoder).clone(), dim=-1), strict=True)

    def matched(self, seen: Tensor, texts) -> Tensor:
        """(B,) the scores of embeddings, each with its own text."""
        self.read(texts)
        words = torch.stack([self.known[text] for text in texts]).to(seen.device)
        return PERCENT * (F.normalize(seen.float(), dim=-1) * words).sum(-1)

    def members_told(self, x: Tensor, level: Tensor, texts) -> Tensor:
        """(1, B) how well the decoded latents match a text each, in standard deviations."""
        if not self.networks:
            raise ValueError("This score compares pictures with words, and was asked about latents. Connect model and vae to Prompt Match Score.")
        return ((self.matched(self.networks[0](x, level), texts) - MEAN) / STD)[None]

    def members(self, x: Tensor, level: Tensor) -> Tensor:
        if not self.words:
            raise ValueError("Prompt Match Score has no words to compare latents with. Write them into its words.")
        return self.members_told(x, level, [self.words] * len(x))

    @torch.no_grad()
    def rate_pictures(self, dataset, report=None, check_interrupt=host.progress.interrupted) -> tuple[list[float], list[float]]:
        """(scores, spreads) of pictures, with the words, or else each with its own caption."""
        texts = [self.words or next(iter(record.captions), "") for record in dataset]
        if bare := [record.path for record, text in zip(dataset, texts, strict=True) if not text.strip()]:
            raise ValueError(f"Prompt Match Score has no words, and {len(bare)} of {len(dataset)} pictures have no caption, such as {bare[0]}. Write words, "
                             "or caption the pictures.")
        found: list[float] = []
        for record, text in zip(dataset, texts, strict=True):
            seen = torch.from_numpy(vision.features(self.clip_vision, [open_image(record)], check_interrupt))
            found += self.matched(seen, [text]).tolist()
            if report:
                report(len(found), len(dataset), "rated")
        return found, [0.0] * len(found)


class Eyes(torch.nn.Module):
    """(x, level) -> (B, d) embeddings of decoded latents. It has nothing of its own."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.look(x, level)

    def state_dict(self, *args, **kwargs):
        raise ValueError("Prompt Match Score has no file of its own: add the node wherever it is wanted.")


class PromptMatchScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardPromptMatch",
            display_name="Prompt Match Score",
            category=CATEGORY,
            description="A score of how well a picture matches words, by a CLIP that sees and reads. For captions, for Train LECO-Score (each prompt's "
            "own words, or good words against bad ones), and as a teacher.",
            search_aliases=["clip score", "text alignment", "prompt adherence", "clipscore", "semantic relative preference", "zero-shot reward"],
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="CLIP-ViT-L, -H or -bigG from Load CLIP Vision."),
                io.Clip.Input("clip", tooltip="Its partner with text projection: CLIP-L of openai/clip-vit-large-patch14, the CLIP of SD2.1, or of SDXL."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="What pictures are compared with. Empty: each with its own caption, or in Train LECO-Score with its own prompt.",
                ),
                *latents_too(),
            ],
            outputs=[
                ScoreModelType.Output("score_model", display_name="score_model", tooltip="For Score Images, Distill Score Model (with words) and, with model "
                                      "and vae, Train LECO-Score."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip_vision, clip, words="", model=None, vae=None):
        with host.context.gradients():
            return io.NodeOutput(PromptMatch(clip_vision, clip, words, *latents.to_score(model, vae)))


NODES = [PromptMatchScore]
