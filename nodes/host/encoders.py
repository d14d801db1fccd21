"""A loaded CLIP and a loaded VAE as the encoders of trainers.data."""

from __future__ import annotations

import contextlib
from functools import cached_property

import comfy.model_management as mm
import torch

from ...trainers.data.captions.literal import EMBEDDING_WORD, escape_brackets, has_prompt_syntax, unescape_brackets
from .context import enable_gradients
from .identity import hash_patched_weights
from .progress import raise_if_interrupted

# Both lines are the same words to an encoder that weighs them, and different ones to an encoder that does not. In
# quotes, because some families read quoted text with an encoder of its own.
BRACKET_PROBES = ('"(a)"', '"((a))"')
NO_EMBEDDING_WORD = "\0embedding:"  # stands in no text


# -- captions and prompts as tokens ------------------------------------------------------------------------------------


class CaptionTokenizer:
    """Captions as the tokens of a loaded CLIP, read literally, with weight 1: as the host reads the prompt in which
    their brackets are escaped. Encoders that know no weights get no escapes, which would be backslashes to them."""

    def __init__(self, clip):
        self.clip = clip

    def __call__(self, caption: str, **options) -> dict:
        """{encoder: chunks of (token, weight)}; options: as of the host's `tokenize`."""
        if not has_prompt_syntax(caption):
            return self.clip.tokenize(caption, **options)
        words = unescape_brackets(caption)
        with read_embeddings_as_words(self.clip):
            plain = self.clip.tokenize(words, **options)
            escaped = self.clip.tokenize(escape_brackets(words), **options)
        if not isinstance(plain, dict):  # language models alone, which know no weights
            return plain
        return {name: escaped[name] if name in self.weighing_encoders else plain[name] for name in plain}

    @cached_property
    def weighing_encoders(self) -> frozenset[str]:
        """Names of the encoders that read brackets as weights. Asked of the tokenizer itself, because families differ
        and a custom node may bring its own."""
        once, twice = (self.clip.tokenize(probe) for probe in BRACKET_PROBES)
        return frozenset(name for name in once if list_token_ids(once[name]) == list_token_ids(twice[name]))


def list_token_ids(chunks) -> list:
    return [entry[0] for chunk in chunks for entry in chunk]


@contextlib.contextmanager
def read_embeddings_as_words(clip):
    """`embedding:name` is text to the tokenizers of a loaded CLIP while inside."""
    tokenizers = list_inner_tokenizers(getattr(clip, "tokenizer", None))
    before = [tokenizer.embedding_identifier for tokenizer in tokenizers]
    try:
        for tokenizer in tokenizers:
            tokenizer.embedding_identifier = NO_EMBEDDING_WORD
        yield
    finally:
        for tokenizer, word in zip(tokenizers, before, strict=True):
            tokenizer.embedding_identifier = word


def list_inner_tokenizers(tokenizer) -> list:
    """The tokenizers that look for embeddings: one for each encoder of a family, inside the family's own."""
    own = [tokenizer] if getattr(tokenizer, "embedding_identifier", None) == EMBEDDING_WORD else []
    inner = [part for part in getattr(tokenizer, "__dict__", {}).values() if hasattr(part, "tokenize_with_weights")]
    return own + [found for part in inner for found in list_inner_tokenizers(part)]


class TokenCounter:
    """counter(text) -> {encoder: number of tokens}, without start, end, padding and template tokens, and without
    loading weights. Counts are cached. The texts are captions, unless `tokenize` reads them otherwise."""

    def __init__(self, clip, tokenize=None):
        self.tokenize, self.cached_counts = tokenize or CaptionTokenizer(clip), {}

    @cached_property
    def template_counts(self) -> dict[str, int]:
        return self.count_tokens("")

    def __call__(self, text: str) -> dict[str, int]:
        if text not in self.cached_counts:
            self.cached_counts[text] = {
                name: max(0, count - self.template_counts.get(name, 0))
                for name, count in self.count_tokens(text).items()
            }
        return self.cached_counts[text]

    def count_tokens(self, text) -> dict[str, int]:
        """Encoder -> tokens that belong to a word."""
        chunks = self.tokenize(text, return_word_ids=True)
        return {name: sum(map(belongs_to_word, (e for chunk in part for e in chunk))) for name, part in chunks.items()}


def belongs_to_word(entry) -> bool:
    """Whether (token, weight, word id) is no start, end or padding, which have the id 0. A few families give no ids
    for words."""
    return len(entry) < 3 or entry[2] != 0


# -- texts as conditionings --------------------------------------------------------------------------------------------


def encode_tokens(clip, tokens) -> dict:
    ((tensor, extras),) = clip.encode_from_tokens_scheduled(tokens, show_pbar=False)
    return {"cross_attn": tensor, **extras}


def encode_prompt(clip, prompt: str) -> dict:
    """One prompt as the host's own encode node gives it: brackets weigh."""
    return encode_tokens(clip, clip.tokenize(prompt))


def encode_caption(clip, caption: str) -> dict:
    """One caption, read literally."""
    return encode_tokens(clip, CaptionTokenizer(clip)(caption))


def check_clip(clip):
    if clip is None:
        raise ValueError(
            "CLIP is empty: this checkpoint holds no text encoder. Load one with a CLIP loader node (CLIPLoader, "
            "DualCLIPLoader) and connect it."
        )


def check_vae(vae):
    if vae is None:
        raise ValueError("VAE is empty: this checkpoint holds no VAE. Load one with the Load VAE node and connect it.")


def encode_prompts_once(clip, prompts) -> dict[str, dict]:
    """{prompt: conditioning}, which autograd may use; the text encoder leaves the device afterwards."""
    return encode_texts_once(clip, prompts, TextEncoder.encode_prompts)


def encode_prompts_with_images(clip, reader: str, prompts) -> list[dict]:
    """Conditionings of (prompt, images); see `encode_prompts_once`."""
    encoder = TextEncoder(clip, reader)
    try:
        with enable_gradients():
            return [encoder.encode_prompt_with_images(prompt, images) for prompt, images in prompts]
    finally:
        encoder.unload()


def encode_captions_once(clip, captions) -> dict[str, dict]:
    """The same of captions, read literally."""
    return encode_texts_once(clip, captions, TextEncoder.encode)


def encode_texts_once(clip, texts, encode) -> dict[str, dict]:
    encoder = TextEncoder(clip)
    try:
        with enable_gradients():
            return dict(zip(texts, encode(encoder, list(texts)), strict=True))
    finally:
        encoder.unload()


AUTO_IMAGE_READER, NO_IMAGE_READER = "auto", ""
ONE_IMAGE_READER, SEVERAL_IMAGES_READER = "TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus"
NO_FIRST_FRAME = "none"
FIRST_FRAME_NODES = (NO_FIRST_FRAME, "WanImageToVideo", "HunyuanImageToVideo", "HunyuanVideo15ImageToVideo")
IMAGE_READERS = (AUTO_IMAGE_READER, ONE_IMAGE_READER, SEVERAL_IMAGES_READER)  # ids of the host's nodes


def resolve_image_reader(clip, choice: str) -> str:
    """The host's node that reads caption and control images together for this CLIP; empty where it reads captions
    alone. Raises ValueError for a node that is not made for it."""
    from comfy.text_encoders.qwen_image import QwenImageTokenizer

    reads_images = isinstance(getattr(clip, "tokenizer", None), QwenImageTokenizer)
    if choice == AUTO_IMAGE_READER:
        return SEVERAL_IMAGES_READER if reads_images else NO_IMAGE_READER
    if choice and not reads_images:
        raise ValueError(
            f"{choice} reads control images with the text encoder of Qwen-Image, and CLIP is "
            f"{type(getattr(clip, 'tokenizer', None)).__name__}. Choose {AUTO_IMAGE_READER}, or load the text encoder "
            "of Qwen-Image-Edit."
        )
    return choice


def run_image_reader(reader: str, clip, text: str, images: list[torch.Tensor]) -> list:
    """CONDITIONING of a text and images, without reference latents: those are kept apart."""
    from comfy_extras import nodes_qwen

    most = 1 if reader == ONE_IMAGE_READER else 3
    if len(images) > most:
        raise ValueError(
            f"{reader} reads at most {most} control image{'s'[: most != 1]} and an image has {len(images)}."
        )
    node = getattr(nodes_qwen, reader)
    names = ["image"] if reader == ONE_IMAGE_READER else [f"image{number}" for number in range(1, len(images) + 1)]
    return node.execute(clip, text, **dict(zip(names, images, strict=True))).args[0]


class TextEncoder:
    """trainers.data's text door over a loaded CLIP. Raises the host's interrupt between two texts. `image_reader`: one
    of IMAGE_READERS, for encoders that see control images beside the text."""

    def __init__(self, clip, image_reader: str = NO_IMAGE_READER):
        check_clip(clip)
        self.clip, self.tokenize = clip, CaptionTokenizer(clip)
        self.identity = hash_patched_weights(clip.patcher, clip.layer_idx)
        self.image_reader = resolve_image_reader(clip, image_reader)

    @cached_property
    def count_tokens(self) -> TokenCounter:
        return TokenCounter(self.clip, self.tokenize)

    def encode(self, captions: list[str]) -> list[dict]:
        """Conditionings of captions, read literally."""
        return self.encode_each(captions, self.tokenize)

    def encode_prompts(self, prompts: list[str]) -> list[dict]:
        """Conditionings of prompts, as the host's own encode node gives them."""
        return self.encode_each(prompts, self.clip.tokenize)

    def encode_with_images(self, text: str, images: list[torch.Tensor]) -> dict:
        """The conditioning of a caption and of images (1, H, W, 3) in 0..1, as the host's own node for it gives it."""
        with read_embeddings_as_words(self.clip):
            return self.encode_prompt_with_images(text, images)

    def encode_prompt_with_images(self, prompt: str, images: list[torch.Tensor]) -> dict:
        """The same of a prompt."""
        raise_if_interrupted()
        with torch.no_grad():
            ((tensor, extras),) = run_image_reader(self.image_reader, self.clip, prompt, images)
        return {"cross_attn": tensor, **extras}

    def encode_each(self, texts, tokenize) -> list[dict]:
        found = []
        with torch.no_grad():
            for text in texts:
                raise_if_interrupted()
                found.append(encode_tokens(self.clip, tokenize(text)))
        return found

    def on_device(self) -> contextlib.nullcontext:
        """The host loads it at the first text, and nothing unloads it in between."""
        return contextlib.nullcontext()

    def unload(self):
        mm.unload_model_and_clones(self.clip.patcher)


class VaeEncoder:
    """trainers.data's VAE door over a loaded VAE."""

    def __init__(self, vae):
        check_vae(vae)
        self.vae = vae
        self.identity = hash_patched_weights(vae.patcher)
        self.channels = vae.latent_channels
        self.factor = int(vae.spacial_compression_encode())

    def fit_frames(self, frames: int) -> int:
        """The largest number of frames up to this one that the latents can hold: what the decoder would give back. 1
        for a VAE of single images."""
        vae = self.vae
        if vae.latent_dim != 3 or vae.not_video or vae.temporal_compression_decode() is None:
            return 1
        return max(1, int(vae.upscale_ratio[0](vae.downscale_ratio[0](frames))))

    def encode(self, images):
        """(mean, std or None), unscaled; images (B, H, W, 3) in 0..1. A VAE with a Gaussian posterior shows its
        moments."""
        moments = []
        regulariser = getattr(self.vae.first_stage_model, "regularization", None)
        hook = regulariser and regulariser.register_forward_pre_hook(lambda _, args: moments.append(args[0].detach()))
        try:
            with torch.no_grad():
                latent = self.vae.encode(images)
        finally:
            if hook:
                hook.remove()
        return posterior_mean_std(latent, moments)

    def unload(self):
        mm.unload_model_and_clones(self.vae.patcher)


def posterior_mean_std(latent, moments):
    """(mean, std) from the encoder's raw moments, when they describe this very latent; (latent, None) otherwise."""
    z = torch.cat(moments).to(latent) if moments else None
    if (
        z is None
        or z.shape[0] != latent.shape[0]
        or z.shape[1] != 2 * latent.shape[1]
        or z.shape[2:] != latent.shape[2:]
    ):
        return latent, None
    mean, log_variance = z.chunk(2, dim=1)
    return mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
