"""Captioning models under ComfyUI's memory manager, which may unload them at any time.

`managed_captioner(captioner)` wraps a network that is not ComfyUI's own; ClipCaptioner uses the text encoder that is
loaded in the graph.
"""

from __future__ import annotations

import contextlib

import comfy.model_management as mm
import comfy.model_patcher
import numpy as np
import torch
from PIL import Image

from ...trainers.captioners import CaptionResult
from ...trainers.captioners.caption_prompts import PromptSettings
from ...trainers.captioners.vlm import CaptionerSettings, downscale_to_max_side
from ...trainers.settings import compute_fingerprint
from .. import host

CAPTIONER_WORKING_MEMORY = 1.5 * 2**30  # bytes beside the weights for one image and its caption: a first guess
VISION_TEXT_ENCODERS = "Qwen3-VL (Krea 2, Ideogram 4), Gemma 3 (LTX-2, Lumina 2 with vision) and Gemma 4"


def captioner_dtype() -> torch.dtype:
    """The precision in which the host runs text models on its device."""
    device = mm.get_torch_device()
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


class NetworkWrapper(torch.nn.Module):
    """A module around the network: the patcher sets attributes such as `device`, which some networks refuse."""

    def __init__(self, network):
        super().__init__()
        self.network = network


class ManagedCaptioner:
    """A captioner whose network ComfyUI loads before each image, unless it is still there, and may evict in
    between."""

    needs_image = True

    def __init__(self, captioner):
        self.captioner, self.identity = captioner, captioner.identity
        self.follows_instructions = getattr(captioner, "follows_instructions", False)
        self.patcher = comfy.model_patcher.ModelPatcher(
            NetworkWrapper(captioner.module),
            load_device=mm.get_torch_device(),
            offload_device=mm.text_encoder_offload_device(),
        )

    def caption(self, image, prompt: str) -> CaptionResult:
        self.load()
        with mm.cuda_device_context(self.patcher.load_device):
            return self.captioner.caption(image, prompt)

    def load(self):
        """Loads all weights: layers that are not ComfyUI's own cannot fetch them one by one."""
        mm.load_models_gpu([self.patcher], memory_required=CAPTIONER_WORKING_MEMORY, force_full_load=True)
        device = self.patcher.load_device
        if any(p.device != device for p in self.patcher.model.parameters()):
            self.patcher.model.to(device)

    def unload(self):
        mm.unload_model_and_clones(self.patcher)
        mm.soft_empty_cache()


@contextlib.contextmanager
def managed_captioner(captioner):
    """The captioner under the host's memory manager, unloaded at the end. One without a network stays as it is."""
    if getattr(captioner, "module", None) is None:
        yield captioner
        return
    holder = ManagedCaptioner(captioner)
    try:
        yield holder
    finally:
        holder.unload()


class ClipCaptioner:
    """The CLIP of the graph as a captioner, through the host's own generate, as in core's Generate Text."""

    needs_image = follows_instructions = True

    def __init__(self, clip, settings: CaptionerSettings, wording: PromptSettings):
        self.clip, self.settings, self.wording = clip, settings, wording
        if not clip_accepts_images(clip):
            name = type(clip.cond_stage_model).__name__
            raise ValueError(
                f"The connected CLIP ({name}) does not accept images. Text encoders that do: "
                f"{VISION_TEXT_ENCODERS}; the Qwen2.5-VL of Qwen-Image accepts images, but ComfyUI offers "
                "no text generation for it. Load one of them with a CLIP loader node, or choose another backend: "
                "'local model', 'WD tagger', 'file name', 'fixed text'."
            )
        self.identity = (
            f"clip {host.identity.hash_patched_weights(clip.patcher)} {compute_fingerprint(settings, wording.begin)}"
        )

    def caption(self, image, prompt: str) -> CaptionResult:
        s = self.settings
        begin = self.wording.begin.strip()
        tokens = tokenize_with_image(
            self.clip,
            f"{prompt} Begin with: {begin}" if begin else prompt,
            pixels(downscale_to_max_side(image, s.max_res)),
        )
        ids = self.clip.generate(
            tokens,
            do_sample=s.temperature > 0,
            max_length=s.max_tokens,
            temperature=s.temperature,
            top_k=0,
            top_p=s.top_p,
            min_p=0.0,
            repetition_penalty=s.repetition,
            presence_penalty=0.0,
            seed=s.seed,
        )
        return CaptionResult(self.clip.decode(ids, skip_special_tokens=True).strip())


def pixels(image: Image.Image) -> torch.Tensor:
    """(1, H, W, 3) in 0..1, as the host's IMAGE."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]


def tokenize_with_image(clip, prompt: str, image):
    return clip.tokenize(prompt, image=image, skip_template=False, min_length=1, thinking=False)


def clip_accepts_images(clip) -> bool:
    """Whether an image becomes tokens: other text encoders accept and ignore it."""
    try:
        tokens = tokenize_with_image(clip, "see", torch.zeros(1, 64, 64, 3))
    except (TypeError, AttributeError):
        return False
    return hasattr(clip.cond_stage_model, "generate") and any(is_image_token(token) for token in iterate_tokens(tokens))


def iterate_tokens(tokens):
    if isinstance(tokens, (dict, list)):
        for part in tokens.values() if isinstance(tokens, dict) else tokens:
            yield from iterate_tokens(part)
    elif isinstance(tokens, tuple) and tokens:
        yield tokens[0]


def is_image_token(token) -> bool:
    return isinstance(token, dict) and token.get("type") == "image"
