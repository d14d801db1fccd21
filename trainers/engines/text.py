"""Captions as conditionings: the text encoders of a model, read the way ComfyUI reads them.

ComfyUI's rules (comfy/sd1_clip.py, sdxl_clip.py, text_encoders/sd3_clip.py and flux.py): CLIP sees chunks of 75 tokens,
each with its own start and end; the chunks' states are joined, and the pooled state is the first chunk's. All texts are
read literally, as the nodes read captions: brackets weigh nothing, escaped or not.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.captions.literal import unescape_brackets

CLIP_CHUNK_TOKENS = 75  # tokens of a caption that CLIP sees at once, besides start and end


@contextlib.contextmanager
def module_on_device(module: nn.Module, device):
    """The module on a device while inside; back where it was afterwards. Free when it is there already."""
    before = next(module.parameters()).device
    module.to(device)
    try:
        yield module
    finally:
        module.to(before)


def hash_module_weights(*modules: nn.Module, extra: object = "") -> str:
    """32 hex digits over all weights: what a cache entry depends on."""
    state = hashlib.blake2b(str(extra).encode(), digest_size=16)
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            state.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


# -- CLIP --------------------------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: str, **options) -> Mapping[str, list[int]]: ...


@dataclass
class ClipTextEncoder:
    """One CLIP text model with its tokenizer. `hidden_layer`: which hidden state to use; None is the normalised last
    one."""

    tokenizer: Tokenizer
    model: nn.Module
    lora_prefix: str  # of its LoRA keys, such as lora_te1
    hidden_layer: int | None = None

    def tokens(self, caption: str) -> list[list[int]]:
        """The caption's chunks of 77 token ids."""
        start, end, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        ids = self.tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
        chunks = [ids[i : i + CLIP_CHUNK_TOKENS] for i in range(0, len(ids), CLIP_CHUNK_TOKENS)] or [[]]
        return [[start, *chunk, end] + [pad] * (CLIP_CHUNK_TOKENS - len(chunk)) for chunk in chunks]

    def __call__(self, caption: str) -> tuple[Tensor, Tensor]:
        """((1, 77 * chunks, D), (1, P))."""
        device = next(self.model.parameters()).device
        out = self.model(torch.tensor(self.tokens(caption), device=device), output_hidden_states=True)
        states = out.last_hidden_state if self.hidden_layer is None else out.hidden_states[self.hidden_layer]
        pooled = out.text_embeds if getattr(out, "text_embeds", None) is not None else out.pooler_output
        return states.flatten(0, 1)[None].float(), pooled[:1].float()


@dataclass
class T5TextEncoder:
    """The T5 encoder of SD3 and Flux: padded to `min_tokens` tokens with zeros, never cut, no mask, as ComfyUI does."""

    tokenizer: Tokenizer
    model: nn.Module
    min_tokens: int

    def tokens(self, caption: str) -> list[list[int]]:
        ids = self.tokenizer(caption, verbose=False)["input_ids"]
        return [ids + [0] * (self.min_tokens - len(ids))]

    def __call__(self, caption: str) -> tuple[Tensor, None]:
        device = next(self.model.parameters()).device
        ids = torch.tensor(self.tokens(caption), device=device)
        return self.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float(), None


# -- what a family makes of its encoders' states
# ----------------------------------------------------------------------------- Each takes {"l": (states, pooled), "g":
# ..., "t5": ...} with what the model has.


def join_clip_states(seen):
    """SD1.5 and SD2."""
    return {"cross_attn": seen["l"][0]}


def join_sdxl_states(seen):
    """SDXL: CLIP-L and CLIP-G states beside each other; CLIP-G's pooled state."""
    return {"cross_attn": concat_channels(seen["l"][0], seen["g"][0]), "pooled_output": seen["g"][1]}


def join_sd3_states(seen, width=4096):
    """CLIP-L beside CLIP-G, zero-filled to T5's width, then T5 after them. A missing pooled state is zero."""
    clip = concat_channels(*(seen[k][0] for k in ("l", "g") if k in seen))
    clip = F.pad(clip, (0 if "l" in seen else 768, 0))
    clip = pad_channels(clip, width)
    after = [seen["t5"][0]] if "t5" in seen else []
    pooled = [pad_channels(seen[k][1], n) if k in seen else clip.new_zeros(1, n) for k, n in (("l", 768), ("g", 1280))]
    return {"cross_attn": torch.cat([clip, *after], dim=1), "pooled_output": torch.cat(pooled, dim=-1)}


def pad_channels(states, width):
    """Zeros after the last channel, up to a width."""
    return F.pad(states, (0, width - states.shape[-1]))


def join_flux_states(seen):
    """T5's states, CLIP-L's pooled state."""
    return {"cross_attn": seen["t5"][0], "pooled_output": seen["l"][1]}


# Part of the identity of cached text encodings: these never change.
JOIN_IDENTITIES = {
    join_clip_states: "clip_alone",
    join_sdxl_states: "side_by_side",
    join_sd3_states: "sd3",
    join_flux_states: "flux",
}


def concat_channels(*states):
    """(1, T, D1 + D2), cut to the shortest."""
    shortest = min(s.shape[1] for s in states)
    return torch.cat([s[:, :shortest] for s in states], dim=-1)


@dataclass
class TextEncoders:
    """The text side of a model: `encode(captions)` gives one conditioning each, fp32, on the CPU."""

    encoders: dict  # of "l", "g", "t5"
    join_states: Callable[[dict], dict]  # one of JOIN_IDENTITIES
    device: torch.device = torch.device("cpu")
    _identity: str = field(default="", init=False)
    image_reader = ""  # none of these encoders sees images

    def encode_with_images(self, text: str, images) -> dict:
        raise ValueError("This text encoder reads captions alone, and no control images beside them.")

    @property
    def identity(self) -> str:
        if not self._identity:
            about = [
                [k, getattr(e, "hidden_layer", None), e.tokens("a red circle, Größe 12")]
                for k, e in self.encoders.items()
            ]
            self._identity = hash_module_weights(
                *(e.model for e in self.encoders.values()), extra=[JOIN_IDENTITIES[self.join_states], about]
            )
        return self._identity

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[dict]:
        with self.on_device():
            return [{k: v.cpu() for k, v in self(caption).items()} for caption in captions]

    @contextlib.contextmanager
    def on_device(self):
        """The encoders on their device while inside."""
        with contextlib.ExitStack() as stack:
            for encoder in self.encoders.values():
                stack.enter_context(module_on_device(encoder.model, self.device))
            yield

    def __call__(self, caption: str) -> dict:
        """One conditioning where the encoders are, with gradients when they are on."""
        words = unescape_brackets(caption)
        return self.join_states({kind: encoder(words) for kind, encoder in self.encoders.items()})

    def count_tokens(self, caption: str) -> dict[str, int]:
        """Encoder -> tokens of the caption, without start, end and padding."""
        words, bare = unescape_brackets(caption), {"add_special_tokens": False, "verbose": False}
        return {kind: len(encoder.tokenizer(words, **bare)["input_ids"]) for kind, encoder in self.encoders.items()}

    def trainable_models(self) -> nn.ModuleDict:
        """The CLIP models by the prefix of their LoRA keys."""
        return nn.ModuleDict({e.lora_prefix: e.model for e in self.encoders.values() if isinstance(e, ClipTextEncoder)})


def text_lora_key(name: str) -> str:
    """lora_te1.encoder.layers.0.mlp.fc1 -> lora_te1_text_model_encoder_layers_0_mlp_fc1; transformers 5 dropped the
    middle part."""
    prefix, path = name.split(".", 1)
    path = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
    return f"{prefix}_{path.replace('.', '_')}"


# -- CLIP's vocabulary without the network -----------------------------------------------------------------------------

CLIP_VOCABULARY_NAME = "bpe_simple_vocab_16e6.txt.gz"


def load_clip_tokenizer(folder=None, pad_zero=False):
    """CLIP's tokenizer: from a diffusers folder, or from the vocabulary that the package open_clip_torch carries.

    Raises RuntimeError with the line to type when neither is there."""
    from transformers import CLIPTokenizer

    if folder is not None:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    with tempfile.TemporaryDirectory() as made:
        write_clip_vocabulary(find_clip_vocabulary(), Path(made))
        tokenizer = CLIPTokenizer.from_pretrained(made, local_files_only=True)
    if pad_zero:
        tokenizer.pad_token = "!"  # id 0, CLIP-G's padding
    return tokenizer


def find_clip_vocabulary() -> Path:
    """The file inside open_clip, which is found but not imported: none of its own dependencies are needed."""
    spec = importlib.util.find_spec("open_clip")
    path = (
        Path(spec.submodule_search_locations[0]) / CLIP_VOCABULARY_NAME
        if spec and spec.submodule_search_locations
        else None
    )
    if path is None or not path.exists():
        raise RuntimeError(
            "A single-file checkpoint has no tokenizer inside, and CLIP's vocabulary is not installed. "
            "Run: pip install --no-deps open_clip_torch\nOr give --model a diffusers folder, which brings its own."
        )
    return path


def write_clip_vocabulary(packed: Path, folder: Path):
    """vocab.json and merges.txt as transformers reads them, from OpenAI's list of merges (Radford et al. 2021)."""
    with gzip.open(packed, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = byte_to_letter()
    words = [
        *letters,
        *(x + "</w>" for x in letters),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )


def byte_to_letter() -> list[str]:
    """A printable character for every byte (byte-level BPE, Radford et al. 2019): printable Latin-1 first, the rest
    from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]
