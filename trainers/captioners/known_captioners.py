"""Captioners that are known to work, and what to say when one is not on this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

LOCAL_MODEL, WD_TAGGER = "local model", "WD tagger"
DOWNLOAD_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.csv",
)  # never .bin or .py: what could run code stays away
ONNX_DOWNLOAD_PATTERNS = ("*.onnx", "*.json", "*.csv")  # a tagger, where timm is not installed


@dataclass(frozen=True)
class KnownCaptioner:
    gigabytes: float  # to download
    backend: str
    description: str


KNOWN_CAPTIONERS = {
    "florence-community/Florence-2-large-ft": KnownCaptioner(
        1.6, LOCAL_MODEL, "short to long descriptions, fast, also without a GPU"
    ),
    "Salesforce/blip-image-captioning-large": KnownCaptioner(
        1.9, LOCAL_MODEL, "one short sentence, also without a GPU"
    ),
    "HuggingFaceTB/SmolVLM-Instruct": KnownCaptioner(4.5, LOCAL_MODEL, "follows instructions, small"),
    "Qwen/Qwen3-VL-4B-Instruct": KnownCaptioner(8.9, LOCAL_MODEL, "follows instructions, many languages, reads text"),
    "fancyfeast/llama-joycaption-beta-one-hf-llava": KnownCaptioner(17.0, LOCAL_MODEL, "made for training captions"),
    "SmilingWolf/wd-eva02-large-tagger-v3": KnownCaptioner(1.3, WD_TAGGER, "booru tags, most exact"),
    "SmilingWolf/wd-vit-tagger-v3": KnownCaptioner(0.4, WD_TAGGER, "booru tags, fast"),
}
SMALLEST_CAPTIONERS = {LOCAL_MODEL: "florence-community/Florence-2-large-ft", WD_TAGGER: "SmilingWolf/wd-vit-tagger-v3"}


def format_missing_captioner(name: str, searched: list[Path], target: Path, backend: str) -> str:
    """What is wanted, where it was looked for, how it is had, and what needs none."""
    repo = name if name in KNOWN_CAPTIONERS else None
    have = (
        f"To have it ({KNOWN_CAPTIONERS[repo].gigabytes:g} GB): hf download {repo} --local-dir "
        f"{target / Path(repo).name}"
        if repo
        else format_download_hint(backend, target)
    )
    folders = "\n".join(f"  {folder}" for folder in searched)
    return (
        f"The captioner {name!r} is not on this machine. Searched:\n{folders}\n{have}\n"
        "Or tick allow_download, and it is fetched at the next run. Without any download: connect a CLIP that sees "
        "(Qwen3-VL, Gemma 3 or 4) and "
        "choose 'loaded CLIP', or choose 'file name' or 'fixed text'."
    )


def format_download_hint(backend: str, target: Path) -> str:
    """The download line of the smallest captioner of a backend, for a name that nobody knows."""
    repo = SMALLEST_CAPTIONERS[backend]
    return (
        f"Press R and choose a model that is there, or get {repo} ({KNOWN_CAPTIONERS[repo].gigabytes:g} GB): hf "
        f"download {repo} --local-dir {target / Path(repo).name}"
    )


def download_captioner(repo: str, target: Path, report, check_interrupt) -> Path:
    """The folder of a repository, downloaded whole or not at all; an interrupted download goes on where it was.

    report(done bytes, all bytes, text). Raises ValueError with the hub's own reason."""
    import huggingface_hub

    part = target.with_name(f".{target.name}.part")
    try:
        huggingface_hub.snapshot_download(
            repo,
            local_dir=part,
            allow_patterns=list_download_patterns(repo),
            tqdm_class=make_download_bar_class(report, check_interrupt, repo),
        )
        part.replace(target)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{repo} could not be downloaded to {target}: {error} What has arrived is kept; run again to go on."
        ) from error
    return target


def list_download_patterns(repo: str) -> list[str]:
    tagger = repo in KNOWN_CAPTIONERS and KNOWN_CAPTIONERS[repo].backend == WD_TAGGER
    return list(ONNX_DOWNLOAD_PATTERNS if tagger and importlib.util.find_spec("timm") is None else DOWNLOAD_PATTERNS)


def make_download_bar_class(report, check_interrupt, repo: str):
    """The hub's progress bar, which tells the node instead of the console and stops when the user does."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(
                *args, **{**{k: v for k, v in kwargs.items() if k != "name"}, "disable": False, "file": NullTextFile()}
            )

        def update(self, n=1):
            check_interrupt()
            shown = super().update(n)
            if self.unit == "B" and self.total:
                report(min(int(self.n), int(self.total)), int(self.total), f"bytes of {repo}")
            return shown

    return Bar


class NullTextFile:
    """A file that forgets what is written."""

    encoding = "utf-8"

    def write(self, text):
        return len(text)

    def flush(self):
        pass
