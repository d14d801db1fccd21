"""Vision-language models from a local folder as captioners, through transformers' own classes: the folder's code is
never run, and nothing is downloaded.

Four prompt manners cover them all: a chat template (LLaVA, JoyCaption, Qwen-VL, InternVL, Gemma 3, SmolVLM), a task
token (Florence-2), a text beside the image (BLIP-2, PaliGemma), and a text that the model continues (BLIP, GIT). The
host decides on which device the network lies; inputs are moved there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..settings import Settings, compute_fingerprint, number_field
from . import CaptionResult
from .caption_prompts import PromptSettings, split_phrases

CHAT_PROMPT, TASK_PROMPT, TEXT_PROMPT, CONTINUATION_PROMPT = "chat", "task", "beside", "onward"
CONTINUATION_MODELS = ("blip", "git", "vision-encoder-decoder")
FLORENCE_TASKS = (
    "<CAPTION>",
    "<DETAILED_CAPTION>",
    "<MORE_DETAILED_CAPTION>",
    "<OCR>",
    "<OD>",
    "<DENSE_REGION_CAPTION>",
)
# model_type of a folder that brings its own code -> the same model in transformers' own form
CONVERTED_REPOSITORIES = {
    "florence2": "florence-community/Florence-2-base (or -large, -base-ft, -large-ft)",
    "internvl_chat": "OpenGVLab/InternVL3-2B-hf (the repositories that end in -hf)",
    "moondream1": "HuggingFaceTB/SmolVLM-Instruct",
    "minicpmv": "Qwen/Qwen3-VL-4B-Instruct",
    "molmo": "Qwen/Qwen3-VL-4B-Instruct",
}


@dataclass(frozen=True, kw_only=True)
class CaptionerSettings(Settings):
    """Image size and sampling of a captioning model."""

    max_res: int = number_field(
        768, 64, 4096, "Longest side of the image that the model receives. Lower is faster.", unit="px", step=32
    )
    max_tokens: int = number_field(
        256, 1, 4096, "Maximum length of a caption; a token is about 0.75 words.", unit="tokens"
    )
    temperature: float = number_field(
        0.0, 0.0, 2.0, "0 always takes the most likely word; higher values vary the wording.", step=0.05, advanced=True
    )
    top_p: float = number_field(
        0.9,
        0.01,
        1.0,
        "With temperature: sample only from the most likely words that make up this share of the probability.",
        step=0.01,
        advanced=True,
    )
    beams: int = number_field(
        1, 1, 16, "Beam search width; 3 suits BLIP and Florence-2. Memory grows with it.", advanced=True
    )
    repetition: float = number_field(
        1.0,
        1.0,
        2.0,
        "Repetition penalty. Above 1, words that were already used become less likely.",
        step=0.05,
        advanced=True,
    )
    seed: int = number_field(0, 0, 2**32 - 1, "With temperature: another seed gives another wording.", advanced=True)


@dataclass
class VlmCaptioner:
    """A captioner made of a transformers model and its processor."""

    module: Any  # transformers' PreTrainedModel with generate()
    processor: Any  # transformers' processor class of this model; what it can be called with differs by family
    manner: str  # CHAT_PROMPT, TASK_PROMPT, TEXT_PROMPT or CONTINUATION_PROMPT
    settings: CaptionerSettings
    wording: PromptSettings
    name: str  # of the model and its precision: part of the identity
    check_interrupt: Callable[[], None] = lambda: None
    needs_image = True
    identity: str = field(init=False)

    def __post_init__(self):
        decoding = (
            self.wording.begin.strip(),
            self.wording.forbidden,
            self.wording.length if self.manner == TASK_PROMPT else "",
        )
        self.identity = f"{self.name} {compute_fingerprint(self.settings, *decoding)}"

    @property
    def follows_instructions(self) -> bool:
        """Whether the model follows a prompt in sentences; the others are given the user's own text or nothing."""
        return self.manner == CHAT_PROMPT

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @torch.no_grad()
    def caption(self, image: Image.Image, prompt: str) -> CaptionResult:
        """The model's caption; the answer is made to start with `begin` where the manner allows it."""
        image = downscale_to_max_side(image.convert("RGB"), self.settings.max_res)
        inputs, prefix = self.build_inputs(image, prompt.strip())
        inputs = move_inputs_to_device(
            {k: v for k, v in inputs.items() if k != "labels"}, next(self.module.parameters())
        )
        with seeded_sampling(self.settings, self.module):
            out = self.module.generate(**inputs, **self.generation_kwargs())
        # A continued text is part of the caption, any other prompt is not.
        new = out[0] if self.manner == CONTINUATION_PROMPT else strip_prompt_tokens(out[0], inputs.get("input_ids"))
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return CaptionResult(text if not prefix or text.startswith(prefix) else f"{prefix.rstrip()} {text}")

    def build_inputs(self, image, prompt):
        """(the processor's tensors, the text that the answer was made to start with)."""
        begin = self.wording.begin.strip()
        if self.manner == CHAT_PROMPT:
            return self.build_chat_inputs(image, prompt, begin), begin
        if self.manner == TASK_PROMPT:
            return self.processor(
                text=choose_florence_task(prompt, self.wording.length), images=image, return_tensors="pt"
            ), ""
        if self.manner == CONTINUATION_PROMPT:
            return self.build_continuation_inputs(image, " ".join(filter(None, (prompt, begin)))), ""
        return self.build_text_inputs(image, prompt, begin), begin

    def build_chat_inputs(self, image, prompt, begin):
        """The model's own chat template, followed by the beginning of the answer."""
        turn = [
            {"role": "user", "content": [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]}
        ]
        text = self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + begin
        bos = getattr(self.tokenizer, "bos_token", None)
        # A template that writes the BOS token itself must not get a second one.
        special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        return self.processor(text=[text], images=[image], return_tensors="pt", **special)

    def build_text_inputs(self, image, prompt, begin):
        """A text beside the image, with the placeholder token that LLaVA and PaliGemma want for it."""
        kind = self.module.config.model_type
        text = " ".join(filter(None, (prompt or ("caption en" if kind == "paligemma" else ""), begin)))
        image_token = getattr(self.processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        if kind.startswith("llava") and image_token:  # a LLaVA from before chat templates
            text = f"USER: {image_token}\n{prompt or 'Describe this picture.'} ASSISTANT:{' ' + begin if begin else ''}"
        if kind == "paligemma":
            text = f"{image_token}{text}"
        return (
            self.processor(images=image, text=text, return_tensors="pt")
            if text
            else self.processor(images=image, return_tensors="pt")
        )

    def build_continuation_inputs(self, image, text):
        """Inputs for BLIP and GIT, which continue the text. Its end-of-text token is left out, or they would stop."""
        inputs = dict(self.processor(images=image, return_tensors="pt"))
        inputs = {"pixel_values": inputs["pixel_values"]}
        kind = self.module.config.model_type
        if text and kind != "vision-encoder-decoder":
            ids = self.tokenizer(text, return_tensors="pt").input_ids
            if kind == "git" and int(ids[0, -1]) == self.tokenizer.sep_token_id:
                ids = ids[:, :-1]  # BLIP's own generate drops it itself
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs

    def generation_kwargs(self) -> dict[str, Any]:
        """The arguments of transformers' generate()."""
        s = self.settings
        sampling = (
            dict(do_sample=True, temperature=s.temperature, top_p=s.top_p) if s.temperature else dict(do_sample=False)
        )
        extra: dict[str, Any] = dict(repetition_penalty=s.repetition) if s.repetition > 1 else {}
        if bad := self.bad_word_ids():
            extra["bad_words_ids"] = bad
        return dict(
            max_new_tokens=s.max_tokens,
            num_beams=s.beams,
            stopping_criteria=[self.interrupt_criterion],
            **sampling,
            **extra,
        )

    def interrupt_criterion(self, ids, scores, **_):
        """A stopping criterion of generate(), called after every token: it raises the host's interrupt and never ends a
        caption itself. One False per sequence."""
        self.check_interrupt()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def bad_word_ids(self) -> list[list[int]]:
        """Token ids of the forbidden words in the spellings that tokenize differently: with and without a space before
        them, as written and capitalised."""
        spellings = [
            s for w in split_phrases(self.wording.forbidden) for s in (w, f" {w}", w.capitalize(), f" {w.capitalize()}")
        ]
        ids = [self.tokenizer(s, add_special_tokens=False).input_ids for s in spellings]
        unknown = self.tokenizer.unk_token_id
        return [list(each) for each in dict.fromkeys(map(tuple, ids)) if each and unknown not in each]


# -- small parts -------------------------------------------------------------------------------------------------------


def downscale_to_max_side(image: Image.Image, longest: int) -> Image.Image:
    """The image, scaled down so that its longer side is at most this many pixels."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def move_inputs_to_device(inputs, like: torch.Tensor) -> dict:
    """The tensors among the inputs on the network's device, floating-point ones in its precision."""
    return {
        k: v.to(like.device, like.dtype if v.is_floating_point() else v.dtype)
        for k, v in inputs.items()
        if torch.is_tensor(v)
    }


def strip_prompt_tokens(out, prompt_ids):
    """The generated tokens without the prompt, which some models repeat in front of them. (T,), (1, P) -> (T - P,)"""
    if prompt_ids is None:
        return out
    length = prompt_ids.shape[1]
    return out[length:] if len(out) >= length and torch.equal(out[:length], prompt_ids[0]) else out


def choose_florence_task(prompt: str, length: str) -> str:
    """The task token for Florence-2, which follows no instructions: the one that the prompt begins with, else a caption
    of about this length."""
    if prompt.startswith("<") and prompt.split(">")[0] + ">" in FLORENCE_TASKS:
        return prompt
    return {"very short": FLORENCE_TASKS[0], "short": FLORENCE_TASKS[0], "medium": FLORENCE_TASKS[1]}.get(
        length, FLORENCE_TASKS[2]
    )


@contextlib.contextmanager
def seeded_sampling(settings: CaptionerSettings, module):
    """Every image starts from the same seed, so that a resumed run writes the captions of an uninterrupted one. The
    global RNG state is restored."""
    if not settings.temperature:
        yield
        return
    device = next(module.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        yield


# -- from a folder -----------------------------------------------------------------------------------------------------


def load_vlm_captioner(
    folder, settings: CaptionerSettings, wording: PromptSettings, dtype=torch.float32, check_interrupt=lambda: None
) -> VlmCaptioner:
    """The captioner in this folder, on the CPU. Raises ValueError for a folder that is no vision-language model, needs
    its own code, is quantised, or lacks weights."""
    folder = Path(folder)
    config = read_vlm_config(folder)
    module = load_vlm_model(folder, dtype, config).eval().requires_grad_(False)
    processor = load_vlm_processor(folder, config["model_type"])
    name = f"{folder.name} {hash_model_listing(folder)} {str(dtype).removeprefix('torch.')}"
    return VlmCaptioner(
        module,
        processor,
        detect_prompt_manner(config["model_type"], processor),
        settings,
        wording,
        name,
        check_interrupt,
    )


def read_vlm_config(folder: Path) -> dict:
    """The folder's config.json. Raises ValueError for what load_vlm_captioner refuses before it opens any weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not a model folder: its config.json is missing or unreadable ({error}). Download the "
            "whole folder."
        ) from error
    if "auto_map" in config:
        remedy = (
            f"Download the converted repository {CONVERTED_REPOSITORIES[kind]}"
            if kind in CONVERTED_REPOSITORIES
            else "Choose a model that transformers knows itself"
        )
        raise ValueError(
            f"{folder.name} (model_type {kind!r}) brings its own Python code, which is never run here. {remedy}."
        )
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{folder.name} is quantised ({method}), and such weights cannot be moved between GPU and RAM by ComfyUI. "
            "Download the same model in 16 bits, or load a quantised text encoder with a CLIP loader and choose "
            "'loaded CLIP'."
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no .safetensors file. Other weight files can run code when they are opened and are "
            "refused; download the repository's safetensors files."
        )
    return config


def load_vlm_model(folder: Path, dtype, config: dict) -> Any:
    """The transformers model. Raises ValueError when it cannot be loaded or when weights are missing, which
    transformers would fill with random numbers."""
    from transformers import AutoModelForImageTextToText

    silence_transformers()
    try:
        # transformers' annotations leave out the pair that output_loading_info gives
        module, info = AutoModelForImageTextToText.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ValueError(
            f"{folder.name} (model_type {config['model_type']!r}) cannot be loaded as a model that describes "
            f"images: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        other = CONVERTED_REPOSITORIES.get(config["model_type"])
        raise ValueError(
            f"{folder.name} lacks {len(missing)} weights that its model needs, for example {missing[0]}; its output "
            f"would be meaningless. Download it again{f', as {other}' if other else ''}."
        )
    return module


def load_vlm_processor(folder: Path, kind: str) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    local = dict(local_files_only=True, trust_remote_code=False)
    try:
        if kind == "vision-encoder-decoder":
            return ImageTextProcessor(
                AutoImageProcessor.from_pretrained(folder, **local), AutoTokenizer.from_pretrained(folder, **local)
            )
        return AutoProcessor.from_pretrained(folder, **local)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ValueError(
            f"{folder.name} has weights, but its processor or tokenizer cannot be loaded: {error}. Download all of its "
            ".json, .txt and .model files."
        ) from error


@dataclass
class ImageTextProcessor:
    """An image processor and a tokenizer, for models that were saved without a combined processor."""

    image_processor: Any
    tokenizer: Any

    def __call__(self, images, **kwargs):
        return self.image_processor(images=images, **kwargs)


def detect_prompt_manner(kind: str, processor) -> str:
    if kind == "florence2":
        return TASK_PROMPT
    if kind in CONTINUATION_MODELS:
        return CONTINUATION_PROMPT
    return CHAT_PROMPT if getattr(processor, "chat_template", None) else TEXT_PROMPT


def hash_model_listing(folder: Path) -> str:
    """A short hash of the names and sizes of a model's files; another version of the model gets another identity."""
    return compute_fingerprint(sorted([f.name, f.stat().st_size] for f in folder.iterdir() if f.is_file()))[:12]


def silence_transformers():
    """Switches off transformers' progress bars and hints on the console."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
