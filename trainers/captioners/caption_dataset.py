"""From a captioner and a dataset to a dataset with captions: nothing said is lost, and one bad picture stops
nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.records import ImageDataset, ImageRecord, open_image
from ..files import write_bytes_atomically
from ..settings import compute_fingerprint
from . import Captioner, CaptionResult
from .caption_prompts import PromptSettings, apply_wording_rules

FILL_MISSING, REPLACE_EXISTING, ADD_TO_EXISTING, SKIP_CAPTIONED = WRITE_MODES = ("fill", "replace", "add", "skip")
MAX_INITIAL_FAILURES = 5  # a model that fails on its first pictures fails on all


@dataclass(frozen=True)
class CaptioningResult:
    """A dataset with captions, and how each picture came to its own."""

    dataset: ImageDataset
    generated: int = 0  # said now
    cached: int = 0  # said in an earlier run, found in the cache
    unchanged: int = 0  # had what it needs
    failed: tuple[tuple[str, str], ...] = ()  # (path, why)


class CaptionCache:
    """What captioners said, one small file each. Safe to delete: it is said again."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def find(self, key: str) -> CaptionResult | None:
        """What was said, or None when it never was or the file is damaged."""
        try:
            values = json.loads(self.path(key).read_text(encoding="utf-8"))
            return CaptionResult(str(values["text"]), tuple(map(str, values["tags"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store(self, key: str, said: CaptionResult, about: dict) -> None:
        values = {"text": said.text, "tags": said.tags, **about}
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
    """The dataset with what the captioner says of each picture.

    A picture that fails keeps its caption, carries a flag, and is listed with the reason. Raises RuntimeError when
    every picture fails, when the model fails on the first few, and when memory runs out. Run again: what was said
    already is not asked again.
    """
    job = CaptioningJob(
        captioner, prompt, wording or PromptSettings(), cache if getattr(captioner, "needs_image", True) else None
    )
    records, passed, failed = [], 0, []
    for done, record in enumerate(dataset, 1):
        check_interrupt()
        name = Path(record.path).name
        if not needs_captioning(record, mode, gives_tags):
            records.append(record)
            passed += 1
            report(done, len(dataset), f"{name}: left as it is")
            continue
        try:
            said = job.caption_record(record)
            records.append(write_record_captions(record, said, mode))
            report(done, len(dataset), f"{name}: {said.text}")
        except Exception as error:
            if is_memory_error(error):
                raise RuntimeError(format_out_of_memory(name, job)) from error
            failed.append((record.path, format_failure_reason(error)))
            records.append(
                replace(record, flags=(*drop_failure_flags(record), f"caption failed ({format_failure_reason(error)})"))
            )
            report(done, len(dataset), f"{name}: failed, {format_failure_reason(error)}")
            if job.model_failures >= MAX_INITIAL_FAILURES and not job.generated + job.cached:
                raise RuntimeError(
                    f"The captioner failed on the first {job.model_failures} pictures it saw, the last time at {name}: "
                    f"{format_failure_reason(error)}"
                ) from error
    if failed and not job.generated + job.cached:
        raise RuntimeError(
            f"No picture got a caption: all {len(failed)} failed. The first, {Path(failed[0][0]).name}: {failed[0][1]}"
        )
    return CaptioningResult(
        ImageDataset(tuple(records), dataset.skipped), job.generated, job.cached, passed, tuple(failed)
    )


@dataclass
class CaptioningJob:
    """One captioner at work, and what it has done so far."""

    captioner: Captioner
    prompt: Callable[[ImageRecord], str]
    wording: PromptSettings
    cache: CaptionCache | None
    generated: int = 0
    cached: int = 0
    model_failures: int = 0  # failures of the captioner itself, not of a file

    def caption_record(self, record: ImageRecord) -> CaptionResult:
        """What the captioner says of this picture, from the cache when it said so before. ValueError when it says
        nothing."""
        asked = self.prompt(record)
        key = compute_fingerprint("said", record.id, record.crop, self.captioner.identity, asked)
        known = self.cache.find(key) if self.cache else None
        raw = known or self.run_captioner(record, asked)
        said = apply_wording_rules(self.wording, raw)
        if not said.text:
            raise ValueError("nothing was said of it")
        if known is None and self.cache:
            about = {"picture": record.id, "captioner": self.captioner.identity, "prompt": asked}
            self.cache.store(key, raw, about)
        self.generated, self.cached = self.generated + (known is None), self.cached + (known is not None)
        return said

    def run_captioner(self, record: ImageRecord, asked: str) -> CaptionResult:
        picture = open_image(record) if getattr(self.captioner, "needs_image", True) else None
        try:
            return self.captioner.caption(picture, asked)
        except Exception:
            self.model_failures += 1
            raise


def needs_captioning(record: ImageRecord, mode: str, gives_tags: bool) -> bool:
    """Whether the captioner has to look. fill: something that it gives is missing; skip: the picture has neither
    caption nor tags."""
    captioned = any(caption.strip() for caption in record.captions)
    if mode == FILL_MISSING:
        return not captioned or (gives_tags and not record.tags)
    if mode == SKIP_CAPTIONED:
        return not captioned and not record.tags
    return True


def write_record_captions(record: ImageRecord, said: CaptionResult, mode: str) -> ImageRecord:
    """The record with these words: in place of its own (replace), behind them (add), or where it has none (fill,
    skip)."""
    own = tuple(caption for caption in record.captions if caption.strip())
    record = replace(record, flags=drop_failure_flags(record))
    if mode == REPLACE_EXISTING:
        return replace(record, captions=(said.text,), tags=said.tags or record.tags)
    if mode == ADD_TO_EXISTING:
        captions = tuple(append_to_caption(caption, said) for caption in own) or (said.text,)
        return replace(record, captions=captions, tags=tuple(dict.fromkeys((*record.tags, *said.tags))))
    return replace(record, captions=own or (said.text,), tags=record.tags or said.tags)


def append_to_caption(caption: str, said: CaptionResult) -> str:
    """The caption and what was said: tags that it lacks behind commas, prose as a sentence of its own; never the same
    twice."""
    caption = caption.strip()
    if said.tags:
        present = {tag.strip().casefold() for tag in caption.split(",")}
        return ", ".join([caption.rstrip(" ,"), *(tag for tag in said.tags if tag.casefold() not in present)])
    if said.text.casefold() in caption.casefold():
        return caption
    return f"{caption} {said.text}" if caption.endswith((".", "!", "?", ",")) else f"{caption}, {said.text}"


def drop_failure_flags(record: ImageRecord) -> tuple[str, ...]:
    return tuple(flag for flag in record.flags if not flag.startswith("caption failed"))


def format_failure_reason(error: BaseException) -> str:
    """The error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_memory_error(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error).casefold()


def format_out_of_memory(name: str, job: CaptioningJob) -> str:
    return (
        f"Out of memory at {name}, after {job.generated + job.cached} captions, which are kept: Run again continues "
        "behind them. To need less: lower max_res or beams, choose a smaller model, or a tagger. Models loaded elsewhere in "
        "the graph are moved away by ComfyUI where they can be."
    )
