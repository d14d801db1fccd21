"""Runs a captioner over a dataset: every caption is cached as soon as it exists, and one bad image does not stop the
run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data.records import ImageDataset, ImageRecord, open_image
from ..files import write_bytes_atomically
from ..settings import compute_fingerprint
from . import Captioner, CaptionResult
from .caption_prompts import PromptSettings, apply_wording_rules

FILL_MISSING, REPLACE_EXISTING, ADD_TO_EXISTING, SKIP_CAPTIONED = WRITE_MODES = ("fill", "replace", "add", "skip")
MAX_INITIAL_FAILURES = 5  # a model that fails on its first images fails on all of them


@dataclass(frozen=True)
class CaptioningResult:
    """A captioned dataset, and how many images were captioned, found in the cache, left alone or failed."""

    dataset: ImageDataset
    generated: int = 0  # captioned in this run
    cached: int = 0  # captioned in an earlier run and found in the cache
    unchanged: int = 0  # needed no caption
    failed: tuple[tuple[str, str], ...] = ()  # (path, reason)


class CaptionCache:
    """Raw captions on disk, one small JSON file each. Safe to delete: they are generated again."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def find(self, key: str) -> CaptionResult | None:
        """The cached caption, or None when there is none or its file is damaged."""
        try:
            values = json.loads(self.path(key).read_text(encoding="utf-8"))
            return CaptionResult(str(values["text"]), tuple(map(str, values["tags"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store(self, key: str, result: CaptionResult, info: dict) -> None:
        """Writes the caption; `info` tells a person who opens the file what it belongs to and is never read back."""
        values = {"text": result.text, "tags": result.tags, **info}
        write_bytes_atomically(
            self.path(key), json.dumps(values, ensure_ascii=False, indent=1).encode("utf-8", "replace")
        )


def caption_dataset(
    dataset: ImageDataset,
    captioner: Captioner,
    prompt: Callable[[ImageRecord], str],
    mode: str = FILL_MISSING,
    cache: CaptionCache | None = None,
    wording: PromptSettings | None = None,
    gives_tags: bool = False,
    report: Callable[[int, int, str], None] = lambda *_: None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> CaptioningResult:
    """The dataset with captions from the captioner, and the counts of what happened.

    An image that fails keeps its caption, carries a flag, and is listed with the reason. Raises RuntimeError when
    every image fails, when the model fails on the first few, and when memory runs out. A second run takes what is
    cached and asks the captioner for the rest. `gives_tags`: the captioner writes tags too, so that in mode fill an
    image without tags counts as incomplete.
    """
    job = CaptioningJob(
        captioner, prompt, wording or PromptSettings(), cache if getattr(captioner, "needs_image", True) else None
    )
    records, unchanged, failed = [], 0, []
    for done, record in enumerate(dataset, 1):
        check_interrupt()
        name = Path(record.path).name
        if not needs_captioning(record, mode, gives_tags):
            records.append(record)
            unchanged += 1
            report(done, len(dataset), f"{name}: left as it is")
            continue
        try:
            result = job.caption_record(record)
            records.append(write_record_captions(record, result, mode))
            report(done, len(dataset), f"{name}: {result.text}")
        except Exception as error:
            # torch raises OutOfMemoryError for a device; drivers and onnxruntime say it in words only
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error).casefold():
                raise RuntimeError(format_out_of_memory(name, job)) from error
            failed.append((record.path, format_failure_reason(error)))
            records.append(
                replace(record, flags=(*drop_failure_flags(record), f"caption failed ({format_failure_reason(error)})"))
            )
            report(done, len(dataset), f"{name}: failed, {format_failure_reason(error)}")
            if job.model_failures >= MAX_INITIAL_FAILURES and not job.generated + job.cached:
                raise RuntimeError(
                    f"The captioner failed on the first {job.model_failures} images it saw, the last time at "
                    f"{name}: {format_failure_reason(error)}"
                ) from error
    if failed and not job.generated + job.cached:
        raise RuntimeError(
            f"No image got a caption: all {len(failed)} failed. The first, {Path(failed[0][0]).name}: {failed[0][1]}"
        )
    return CaptioningResult(
        ImageDataset(tuple(records), dataset.skipped), job.generated, job.cached, unchanged, tuple(failed)
    )


def open_shown_image(record: ImageRecord, captioner: Captioner) -> Image.Image:
    """The image. Of a clip a model that follows instructions sees four frames, in reading order; taggers, which would
    name the grid, see the one in the middle."""
    if record.video is None or not getattr(captioner, "follows_instructions", False):
        return open_image(record)
    from ..data.videos import open_frame_grid

    return open_frame_grid(record)


@dataclass
class CaptioningJob:
    """One captioner with its prompt, wording and cache, and the counts so far."""

    captioner: Captioner
    prompt: Callable[[ImageRecord], str]
    wording: PromptSettings
    cache: CaptionCache | None
    generated: int = 0
    cached: int = 0
    model_failures: int = 0  # errors of the captioner itself, not of an image file

    def caption_record(self, record: ImageRecord) -> CaptionResult:
        """The caption of this image after the wording rules, from the cache where an earlier run stored it. ValueError
        when nothing is left of it.

        The cache holds the raw answer: other forced words need no new one."""
        prompt = self.prompt(record)
        key = compute_fingerprint("said", record.pixels_id, record.crop, self.captioner.identity, prompt)
        cached = self.cache.find(key) if self.cache else None
        raw = cached or self.run_captioner(record, prompt)
        result = apply_wording_rules(self.wording, raw)
        if not result.text:
            raise ValueError("nothing was said of it")
        if cached is None and self.cache:
            info = {"picture": record.id, "captioner": self.captioner.identity, "prompt": prompt}
            self.cache.store(key, raw, info)
        self.generated, self.cached = self.generated + (cached is None), self.cached + (cached is not None)
        return result

    def run_captioner(self, record: ImageRecord, prompt: str) -> CaptionResult:
        image: Any = open_shown_image(record, self.captioner) if getattr(self.captioner, "needs_image", True) else None
        try:
            return self.captioner.caption(image, prompt)
        except Exception:
            self.model_failures += 1
            raise


def needs_captioning(record: ImageRecord, mode: str, gives_tags: bool) -> bool:
    """Whether the captioner has to run on this image. fill: a caption is missing, or tags that it would give; skip: the
    image has neither caption nor tags."""
    captioned = any(caption.strip() for caption in record.captions)
    if mode == FILL_MISSING:
        return not captioned or (gives_tags and not record.tags)
    if mode == SKIP_CAPTIONED:
        return not captioned and not record.tags
    return True


def write_record_captions(record: ImageRecord, result: CaptionResult, mode: str) -> ImageRecord:
    """The record with the new caption and tags: in place of its own (replace), after them (add), or where it has none
    (fill, skip)."""
    existing = tuple(caption for caption in record.captions if caption.strip())
    record = replace(record, flags=drop_failure_flags(record))
    if mode == REPLACE_EXISTING:
        return replace(record, captions=(result.text,), tags=result.tags or record.tags)
    if mode == ADD_TO_EXISTING:
        captions = tuple(append_to_caption(caption, result) for caption in existing) or (result.text,)
        return replace(record, captions=captions, tags=tuple(dict.fromkeys((*record.tags, *result.tags))))
    return replace(record, captions=existing or (result.text,), tags=record.tags or result.tags)


def append_to_caption(caption: str, result: CaptionResult) -> str:
    """The caption with the new one after it: tags that it lacks after commas, prose as a sentence of its own; nothing
    is written twice."""
    caption = caption.strip()
    if result.tags:
        present = {tag.strip().casefold() for tag in caption.split(",")}
        return ", ".join([caption.rstrip(" ,"), *(tag for tag in result.tags if tag.casefold() not in present)])
    if result.text.casefold() in caption.casefold():
        return caption
    return f"{caption} {result.text}" if caption.endswith((".", "!", "?", ",")) else f"{caption}, {result.text}"


def drop_failure_flags(record: ImageRecord) -> tuple[str, ...]:
    """The record's flags without the one that an earlier failure left."""
    return tuple(flag for flag in record.flags if not flag.startswith("caption failed"))


def format_failure_reason(error: BaseException) -> str:
    """The error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def format_out_of_memory(name: str, job: CaptioningJob) -> str:
    return (
        f"Out of memory at {name}, after {job.generated + job.cached} captions, which are kept: Run again continues "
        "behind them. To need less: lower max_res or beams, choose a smaller model, or a tagger. Models loaded "
        "elsewhere in the graph are moved away by ComfyUI where they can be."
    )
