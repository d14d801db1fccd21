"""WD-style taggers from a local folder: image in, the probability of every tag out.

A folder holds a list of tags (selected_tags.csv) and a network: model.safetensors with timm's config.json, or
model.onnx. The first runs on torch, on the device where the host puts it; the second on onnxruntime. Images are
prepared as the taggers were trained: on white, padded to a square, resized bicubically, BGR (SmilingWolf's wd-tagger).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image

from ..data.records import WHITE, flatten_alpha
from ..settings import compute_fingerprint
from . import CaptionResult
from .tags import TAG_CATEGORIES, TaggerSettings, TagLabel, select_tags

TAG_LIST_FILES = ("selected_tags.csv", "tags-selected.csv")
HASH_SAMPLES, HASH_SAMPLE_BYTES = 16, 65536
TAGGER_DOWNLOAD_EXAMPLE = (
    "hf download SmilingWolf/wd-eva02-large-tagger-v3 --local-dir models/wd14_tagger/wd-eva02-large-tagger-v3"
)
TIMM_PACKAGE, ONNX_PACKAGE = "timm", "onnxruntime"
TIMM_WEIGHTS_FILE = "model.safetensors"  # the file that timm itself prefers


class TaggerNetwork(Protocol):
    """A network that gives tag probabilities, and how its input is prepared."""

    size: int  # side of the square input, in pixels

    @property
    def module(self) -> torch.nn.Module | None: ...

    @property
    def outputs(self) -> int | None:
        """How many tags it has; None where the file does not say."""
        ...

    def preprocess(self, pixels: np.ndarray) -> np.ndarray: ...

    def run(self, batch: np.ndarray) -> np.ndarray: ...


class OnnxSession(Protocol):
    """The part of onnxruntime.InferenceSession that is used here."""

    def get_inputs(self) -> Sequence[Any]: ...

    def get_outputs(self) -> Sequence[Any]: ...

    def run(self, output_names: None, input_feed: dict[str, np.ndarray]) -> Sequence[Any]: ...


@dataclass
class WdTagger:
    """A captioner that gives tags."""

    network: TaggerNetwork
    labels: Sequence[TagLabel]
    settings: TaggerSettings
    name: str
    identity: str = field(init=False)

    def __post_init__(self):
        if self.network.outputs not in (None, len(self.labels)):
            raise ValueError(
                f"{self.name} answers {self.network.outputs} tags and its list names {len(self.labels)}. Download the "
                "model and its .csv file together again."
            )
        self.identity = (
            f"{self.name} {compute_fingerprint(self.settings, [[label.name, label.category] for label in self.labels])}"
        )

    @property
    def module(self) -> torch.nn.Module | None:
        """The torch network for the host to place, or None where onnxruntime runs it."""
        return self.network.module

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """One image as the network's input, without the batch dimension."""
        pixels = pad_to_white_square(image, self.network.size)
        return self.network.preprocess(pixels[:, :, ::-1] if self.settings.channels == "BGR" else pixels)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Probabilities (B, tags) of a batch of preprocessed images."""
        return self.network.run(batch)

    def caption(self, image: Image.Image, prompt: str = "") -> CaptionResult:
        tags = select_tags(self.labels, self.run(self.preprocess(image)[None])[0], self.settings)
        return CaptionResult(", ".join(tags), tags)


def load_tagger(folder, settings: TaggerSettings | None = None) -> WdTagger:
    """The tagger in this folder. Raises ValueError for what the folder lacks, ImportError for a package that is not
    installed."""
    folder = Path(folder)
    labels = read_tag_labels(find_tag_list(folder))
    network, weights = load_tagger_network(folder)
    return WdTagger(network, labels, settings or TaggerSettings(), f"{folder.name} {hash_file_samples(weights)}")


# -- images ------------------------------------------------------------------------------------------------------------


def pad_to_white_square(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the whole image on white, centred in a square, resized bicubically."""
    image = flatten_alpha(image, WHITE)
    side = max(image.size)
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.array(square if side == size else square.resize((size, size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class PixelNormaliser:
    """(H, W, 3) uint8 -> (3, H, W): (pixel / 255 - mean) / std, as timm's networks are trained."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).to(torch.float32).div(255)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return image.sub_(mean).div_(std).numpy()


def normaliser_from_config(config: dict) -> PixelNormaliser | None:
    """The normaliser with the mean and std of a timm config.json, or None where it names none."""
    found = config.get("pretrained_cfg") or {}
    return PixelNormaliser(tuple(found["mean"]), tuple(found["std"])) if "mean" in found and "std" in found else None


# -- the list of tags --------------------------------------------------------------------------------------------------


def find_tag_list(folder: Path) -> Path:
    """The .csv file that names the tags. ValueError when the folder holds none."""
    if not folder.is_dir():
        raise ValueError(f"There is no tagger folder {folder}. For example: {TAGGER_DOWNLOAD_EXAMPLE}")
    usual = [folder / name for name in TAG_LIST_FILES if (folder / name).is_file()]
    found = usual or [
        path for path in sorted(folder.glob("*.csv")) if {"name", "category"} <= set(read_csv_header(path))
    ]
    if len(found) != 1 and not usual:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        remedy = "keep one of them" if found else f"download the whole folder, for example: {TAGGER_DOWNLOAD_EXAMPLE}"
        raise ValueError(
            f"{folder} holds {len(found)} lists of tags (.csv with the columns name and category), but {held}; "
            f"{remedy}."
        )
    return found[0]


def read_csv_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader(file), [])


def read_tag_labels(path: Path) -> tuple[TagLabel, ...]:
    """The tags in the order of the network's outputs. Categories are Danbooru's and e621's numbers (0, 4, 9 ...) or
    words."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"name", "category"} <= set(rows[0]):
        raise ValueError(
            f"{path} is not a list of tags: it needs the columns name and category, and has "
            f"{', '.join(read_csv_header(path)) or 'none'}."
        )
    return tuple(TagLabel((row["name"] or "").strip(), parse_tag_category(row["category"] or "")) for row in rows)


def parse_tag_category(text: str) -> str:
    text = text.strip().casefold()
    return TAG_CATEGORIES.get(text, text or TAG_CATEGORIES["0"])


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass
class TimmNetwork:
    """A timm network, which gives logits."""

    module: torch.nn.Module
    size: int
    normalise: PixelNormaliser

    @property
    def outputs(self) -> int:
        return cast(int, self.module.num_classes)

    def preprocess(self, pixels: np.ndarray) -> np.ndarray:
        return self.normalise(pixels)  # (3, size, size)

    @torch.no_grad()
    def run(self, batch: np.ndarray) -> np.ndarray:
        like = next(self.module.parameters())
        return self.module(torch.from_numpy(batch).to(like.device, like.dtype)).float().sigmoid().cpu().numpy()


@dataclass
class OnnxNetwork:
    """A network that onnxruntime runs. Channels-last input (N, H, W, 3) takes pixels of 0 to 255, as WD's taggers do;
    channels-first input takes them normalised as config.json says."""

    session: OnnxSession
    size: int
    normalise: PixelNormaliser | None  # None: channels last
    module = None

    @property
    def outputs(self) -> int | None:
        count = self.session.get_outputs()[0].shape[-1]
        return count if isinstance(count, int) else None

    def preprocess(self, pixels: np.ndarray) -> np.ndarray:
        return self.normalise(pixels) if self.normalise else pixels.astype(np.float32)

    def run(self, batch: np.ndarray) -> np.ndarray:
        out = self.session.run(None, {self.session.get_inputs()[0].name: np.ascontiguousarray(batch)})[0].astype(
            np.float32
        )
        logits = out.min() < 0 or out.max() > 1  # WD's .onnx files contain the sigmoid, others do not
        return torch.from_numpy(out).sigmoid().numpy() if logits else out


def load_tagger_network(folder: Path) -> tuple[TaggerNetwork, Path]:
    """(network, its weights file). Torch is preferred: the host can move its weights between GPU and RAM."""
    weights = folder / TIMM_WEIGHTS_FILE
    onnx = next(iter(sorted(folder.glob("*.onnx"))), None)
    config = read_tagger_config(folder)
    if weights.is_file() and "architecture" in config and (onnx is None or is_package_installed(TIMM_PACKAGE)):
        return load_timm_network(folder, config), weights
    if onnx is not None:
        return make_onnx_network(onnx, config), onnx
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:12])
    raise ValueError(
        f"{folder} holds no tagger that can be run, but {held}. It needs model.onnx, or {TIMM_WEIGHTS_FILE} with a "
        f"config.json that names timm's architecture, for example: {TAGGER_DOWNLOAD_EXAMPLE}"
    )


def read_tagger_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}). Download it again.") from error


def is_package_installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def require_package(package: str, folder: Path):
    if not is_package_installed(package):
        raise ImportError(
            f"The tagger {folder.name} needs the Python package {package}, which is not installed. Type this with "
            f"ComfyUI's own Python, then restart: python -m pip install {package}"
        )


def load_timm_network(folder: Path, config: dict) -> TimmNetwork:
    require_package(TIMM_PACKAGE, folder)
    import timm

    try:
        module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().requires_grad_(False)
    except (RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        # AssertionError: timm before 1.0.16 does not know local-dir
        raise ValueError(
            f"{folder.name} ({config['architecture']!r}) cannot be loaded with timm {timm.__version__}: {error}. If "
            "the folder was downloaded whole, a newer timm may read it: python -m pip install -U timm"
        ) from error
    data = cast(dict, module.pretrained_cfg)
    return TimmNetwork(module, data["input_size"][-1], PixelNormaliser(tuple(data["mean"]), tuple(data["std"])))


def make_onnx_network(path: Path, config: dict, session: OnnxSession | None = None) -> OnnxNetwork:
    """The network of an .onnx file whose input is (N, size, size, 3) or (N, 3, size, size)."""
    session = session or open_onnx_session(path)
    shape = session.get_inputs()[0].shape
    channels_last = len(shape) == 4 and shape[3] == 3
    if not channels_last and not (len(shape) == 4 and shape[1] == 3):
        raise ValueError(
            f"{path} expects images of shape {shape}; a tagger needs (N, size, size, 3) or (N, 3, size, size)."
        )
    size = shape[2]
    if not isinstance(size, int):
        size = (config.get("pretrained_cfg") or {}).get("input_size", [448])[-1]
    normalise = None if channels_last else normaliser_from_config(config)
    if not channels_last and normalise is None:
        raise ValueError(
            f"{path} expects normalised pixels, and no config.json beside it names mean and std. Use a tagger of "
            "the WD kind, or its .safetensors version."
        )
    return OnnxNetwork(session, size, normalise)


def open_onnx_session(path: Path) -> OnnxSession:
    require_package(ONNX_PACKAGE, path.parent)
    import onnxruntime

    preferred = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return onnxruntime.InferenceSession(
        str(path), providers=[p for p in preferred if p in onnxruntime.get_available_providers()]
    )


def hash_file_samples(path: Path) -> str:
    """12 hex digits from the file's length and samples spread over it: tells files apart without reading gigabytes."""
    length = path.stat().st_size
    digest = hashlib.blake2b(str(length).encode(), digest_size=6)
    with path.open("rb") as file:
        for index in range(HASH_SAMPLES):
            file.seek(max(0, length - HASH_SAMPLE_BYTES) * index // (HASH_SAMPLES - 1))
            digest.update(file.read(HASH_SAMPLE_BYTES))
    return digest.hexdigest()
