"""Vision-language models from a local folder, through transformers' own classes: no code of the folder is run, nothing
is fetched.

Four manners of asking cover them all: a chat template (LLaVA, JoyCaption, Qwen-VL, InternVL, Gemma 3, SmolVLM), a task
word (Florence-2), text beside the picture (BLIP-2, PaliGemma), and a text that the model goes on from (BLIP, GIT). The
network stays on the device where its host puts it; this file follows it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
    """How a model that sees looks and speaks."""

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
    """A captioner over a transformers model and its processor."""

    module: torch.nn.Module
    processor: object
    manner: str
    settings: CaptionerSettings
    wording: PromptSettings
    name: str  # of the model: part of the identity
    check_interrupt: Callable[[], None] = lambda: None
    needs_image = True
    identity: str = field(init=False)

    def __post_init__(self):
        spoken = (
            self.wording.begin.strip(),
            self.wording.forbidden,
            self.wording.length if self.manner == TASK_PROMPT else "",
        )
        self.identity = f"{self.name} {compute_fingerprint(self.settings, *spoken)}"

    @property
    def follows_instructions(self) -> bool:
        """Whether it does what a sentence asks; the others are given the user's own text or nothing."""
        return self.manner == CHAT_PROMPT

    @property
    def tokenizer(self):
        return getattr(self.processor, "tokenizer", self.processor)

    @torch.no_grad()
    def caption(self, picture: Image.Image, prompt: str) -> CaptionResult:
        """What the model says of the picture; `begin` is put into its mouth where it can be."""
        picture = downscale_to_max_side(picture.convert("RGB"), self.settings.max_res)
        inputs, spoken = self.build_inputs(picture, prompt.strip())
        inputs = move_inputs_to_device(
            {k: v for k, v in inputs.items() if k != "labels"}, next(self.module.parameters())
        )
        with seeded_sampling(self.settings, self.module):
            out = self.module.generate(**inputs, **self.generation_kwargs(inputs))
        new = (
            out[0] if self.manner == CONTINUATION_PROMPT else strip_prompt_tokens(out[0], inputs.get("input_ids"))
        )  # what it goes on from is part of the caption
        words = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return CaptionResult(words if not spoken or words.startswith(spoken) else f"{spoken.rstrip()} {words}")

    def build_inputs(self, picture, prompt):
        """(the processor's tensors, words that the answer goes on from)."""
        begin = self.wording.begin.strip()
        if self.manner == CHAT_PROMPT:
            return self.build_chat_inputs(picture, prompt, begin), begin
        if self.manner == TASK_PROMPT:
            return self.processor(
                text=choose_florence_task(prompt, self.wording.length), images=picture, return_tensors="pt"
            ), ""
        if self.manner == CONTINUATION_PROMPT:
            return self.build_continuation_inputs(picture, " ".join(filter(None, (prompt, begin)))), ""
        return self.build_text_inputs(picture, prompt, begin), begin

    def build_chat_inputs(self, picture, prompt, begin):
        """The model's own chat template, with the beginning of the answer behind it."""
        turn = [
            {"role": "user", "content": [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]}
        ]
        text = self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + begin
        bos = getattr(self.tokenizer, "bos_token", None)
        special = (
            {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        )  # the template has written it already
        return self.processor(text=[text], images=[picture], return_tensors="pt", **special)

    def build_text_inputs(self, picture, prompt, begin):
        kind = self.module.config.model_type
        text = " ".join(filter(None, (prompt or ("caption en" if kind == "paligemma" else ""), begin)))
        mark = getattr(self.processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        if kind.startswith("llava") and mark:  # a LLaVA of before chat templates
            text = f"USER: {mark}\n{prompt or 'Describe this picture.'} ASSISTANT:{' ' + begin if begin else ''}"
        if kind == "paligemma":
            text = f"{mark}{text}"
        return (
            self.processor(images=picture, text=text, return_tensors="pt")
            if text
            else self.processor(images=picture, return_tensors="pt")
        )

    def build_continuation_inputs(self, picture, text):
        """BLIP and GIT go on from a text; the mark that ends it would tell them to stop."""
        inputs = dict(self.processor(images=picture, return_tensors="pt"))
        inputs = {"pixel_values": inputs["pixel_values"]}
        kind = self.module.config.model_type
        if text and kind != "vision-encoder-decoder":
            ids = self.tokenizer(text, return_tensors="pt").input_ids
            if kind == "git" and int(ids[0, -1]) == self.tokenizer.sep_token_id:
                ids = ids[:, :-1]  # BLIP's own generate drops it itself
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs

    def generation_kwargs(self, inputs) -> dict:
        """generate()'s own arguments."""
        s = self.settings
        sampling = (
            dict(do_sample=True, temperature=s.temperature, top_p=s.top_p) if s.temperature else dict(do_sample=False)
        )
        extra = dict(repetition_penalty=s.repetition) if s.repetition > 1 else {}
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
        """Asked after every token: raises the host's interrupt, and never ends a caption itself."""
        self.check_interrupt()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def bad_word_ids(self) -> list[list[int]]:
        """Token sequences of the forbidden words, in the spellings a text has them: inside a sentence and at its
        start."""
        spellings = [
            s for w in split_phrases(self.wording.forbidden) for s in (w, f" {w}", w.capitalize(), f" {w.capitalize()}")
        ]
        ids = [self.tokenizer(s, add_special_tokens=False).input_ids for s in spellings]
        unknown = self.tokenizer.unk_token_id
        return [list(each) for each in dict.fromkeys(map(tuple, ids)) if each and unknown not in each]


# -- small parts -------------------------------------------------------------------------------------------------------


def downscale_to_max_side(picture: Image.Image, longest: int) -> Image.Image:
    """The picture, scaled down so that its longer side is at most this many pixels."""
    scale = longest / max(picture.size)
    if scale >= 1:
        return picture
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS)


def move_inputs_to_device(inputs, like: torch.Tensor) -> dict:
    """The inputs on the network's device; what is no whole number in the network's precision."""
    return {
        k: v.to(like.device, like.dtype if v.is_floating_point() else v.dtype)
        for k, v in inputs.items()
        if torch.is_tensor(v)
    }


def strip_prompt_tokens(out, asked):
    """The tokens that were said: without the prompt, where the model gives it back in front of them."""
    if asked is not None and len(out) >= asked.shape[1] and torch.equal(out[: asked.shape[1]], asked[0]):
        return out[asked.shape[1] :]
    return out


def choose_florence_task(prompt: str, length: str) -> str:
    """Florence-2 knows tasks and no instructions: the one that the prompt names, else a caption of about this
    length."""
    if prompt.startswith("<") and prompt.split(">")[0] + ">" in FLORENCE_TASKS:
        return prompt
    return {"very short": FLORENCE_TASKS[0], "short": FLORENCE_TASKS[0], "medium": FLORENCE_TASKS[1]}.get(
        length, FLORENCE_TASKS[2]
    )


@contextlib.contextmanager
def seeded_sampling(settings: CaptionerSettings, module):
    """Every picture starts from the same seed, so that a run that goes on says what one run would; the global state is
    put back."""
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
    """The captioner in this folder, on the CPU. Raises ValueError when the folder is no such model, brings its own
    code, is quantised, or lacks weights."""
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
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no model folder: its config.json is missing or unreadable ({error}). Download the whole "
            "folder."
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


def load_vlm_model(folder: Path, dtype, config: dict):
    from transformers import AutoModelForImageTextToText

    silence_transformers()
    try:
        module, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ValueError(
            f"{folder.name} (model_type {config['model_type']!r}) cannot be loaded as a model that describes pictures: "
            f"{error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        other = CONVERTED_REPOSITORIES.get(config["model_type"])
        raise ValueError(
            f"{folder.name} lacks {len(missing)} weights that its model needs, for example {missing[0]}; it would say "
            f"nonsense. Download it again{f', as {other}' if other else ''}."
        )
    return module


def load_vlm_processor(folder: Path, kind: str):
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
    """An image processor and a tokenizer, for models that were saved without a processor of their own."""

    images: object
    tokenizer: object

    def __call__(self, images, **kwargs):
        return self.images(images=images, **kwargs)


def detect_prompt_manner(kind: str, processor) -> str:
    if kind == "florence2":
        return TASK_PROMPT
    if kind in CONTINUATION_MODELS:
        return CONTINUATION_PROMPT
    return CHAT_PROMPT if getattr(processor, "chat_template", None) else TEXT_PROMPT


def hash_model_listing(folder: Path) -> str:
    """A short hash of the names and sizes of a model's files: another download, another captioner."""
    return compute_fingerprint(sorted([f.name, f.stat().st_size] for f in folder.iterdir() if f.is_file()))[:12]


def silence_transformers():
    """transformers' own progress bars and hints are for notebooks."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
