"""Captioners that are known to work, their download, and the message when one is not on this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

LOCAL_MODEL, WD_TAGGER = "local model", "WD tagger"
# Never .bin or .py: those can run code.
DOWNLOAD_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.csv")
ONNX_DOWNLOAD_PATTERNS = ("*.onnx", "*.json", "*.csv")  # of a tagger, where timm is not installed


@dataclass(frozen=True)
class KnownCaptioner:
    """A repository on Hugging Face that is known to work."""

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
    """The error message for a missing captioner: where it was searched, how to get it, and what needs no download."""
    remedy = (
        f"To have it ({KNOWN_CAPTIONERS[name].gigabytes:g} GB): hf download {name} --local-dir "
        f"{target / Path(name).name}"
        if name in KNOWN_CAPTIONERS
        else format_download_hint(backend, target)
    )
    folders = "\n".join(f"  {folder}" for folder in searched)
    return (
        f"The captioner {name!r} is not on this machine. Searched:\n{folders}\n{remedy}\n"
        "Or tick allow_download, and it is fetched at the next run. Without any download: connect a CLIP that sees "
        "(Qwen3-VL, Gemma 3 or 4) and "
        "choose 'loaded CLIP', or choose 'file name' or 'fixed text'."
    )


def format_download_hint(backend: str, target: Path) -> str:
    """How to download the smallest captioner of this backend, for a name that is not in the list."""
    repo = SMALLEST_CAPTIONERS[backend]
    return (
        f"Press R and choose a model that is there, or get {repo} ({KNOWN_CAPTIONERS[repo].gigabytes:g} GB): hf "
        f"download {repo} --local-dir {target / Path(repo).name}"
    )


def download_captioner(repo: str, target: Path, report, check_interrupt) -> Path:
    """The folder of a downloaded repository. It gets its name only when it is complete; an interrupted download
    resumes.

    report(done bytes, total bytes, text). Raises ValueError with the hub's own reason."""
    import huggingface_hub

    part = target.with_name(f".{target.name}.part")
    tagger = repo in KNOWN_CAPTIONERS and KNOWN_CAPTIONERS[repo].backend == WD_TAGGER
    onnx = tagger and importlib.util.find_spec("timm") is None
    try:
        huggingface_hub.snapshot_download(
            repo,
            local_dir=part,
            allow_patterns=list(ONNX_DOWNLOAD_PATTERNS if onnx else DOWNLOAD_PATTERNS),
            tqdm_class=make_download_bar_class(report, check_interrupt, repo),
        )
        part.replace(target)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{repo} could not be downloaded to {target}: {error} What has arrived is kept; run again to continue."
        ) from error
    return target


def make_download_bar_class(report, check_interrupt, repo: str):
    """A tqdm class for huggingface_hub that reports to the node instead of the console and raises the host's
    interrupt."""
    from tqdm.auto import tqdm

    class NodeProgressBar(tqdm):
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

    return NodeProgressBar


class NullTextFile:
    """A text file that discards what is written: tqdm needs one."""

    encoding = "utf-8"

    def write(self, text):
        return len(text)

    def flush(self):
        pass
