"""From a captioner and a dataset to a dataset with captions: nothing said is lost, and one bad picture stops nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.records import Dataset, Record, open_image
from ..files import write_bytes
from ..settings import fingerprint
from . import Captioner, Said
from .prompts import PromptSettings, held_to

FILL, REPLACE, ADD, SKIP = MODES = ("fill", "replace", "add", "skip")
GIVE_UP = 5  # a model that fails on its first pictures fails on all


@dataclass(frozen=True)
class Captioned:
    """A dataset with captions, and how each picture came to its own."""

    dataset: Dataset
    made: int = 0  # said now
    kept: int = 0  # said in an earlier run, found in the cache
    passed: int = 0  # had what it needs
    failed: tuple[tuple[str, str], ...] = ()  # (path, why)


class Words:
    """What captioners said, one small file each. Safe to delete: it is said again."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def find(self, key: str) -> Said | None:
        """What was said, or None when it never was or the file is damaged."""
        try:
            values = json.loads(self.path(key).read_text(encoding="utf-8"))
            return Said(str(values["text"]), tuple(map(str, values["tags"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: str, said: Said, about: dict) -> None:
        values = {"text": said.text, "tags": said.tags, **about}
        write_bytes(self.path(key), json.dumps(values, ensure_ascii=False, indent=1).encode("utf-8", "replace"))


def caption_dataset(
    dataset: Dataset,
    captioner: Captioner,
    prompt: Callable[[Record], str],
    mode: str = FILL,
    cache: Words | None = None,
    wording: PromptSettings | None = None,
    gives_tags: bool = False,
    report: Callable[[int, int, str], None] = lambda *_: None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Captioned:
    """The dataset with what the captioner says of each picture.

    A picture that fails keeps its caption, carries a flag, and is listed with the reason. Raises RuntimeError when every picture
    fails, when the model fails on the first few, and when memory runs out. Run again: what was said already is not asked again.
    """
    job = Job(captioner, prompt, wording or PromptSettings(), cache if getattr(captioner, "looks", True) else None)
    records, passed, failed = [], 0, []
    for done, record in enumerate(dataset, 1):
        check_interrupt()
        name = Path(record.path).name
        if not wanted(record, mode, gives_tags):
            records.append(record)
            passed += 1
            report(done, len(dataset), f"{name}: left as it is")
            continue
        try:
            said = job.ask(record)
            records.append(written(record, said, mode))
            report(done, len(dataset), f"{name}: {said.text}")
        except Exception as error:
            if out_of_memory(error):
                raise RuntimeError(no_memory(name, job)) from error
            failed.append((record.path, reason(error)))
            records.append(replace(record, flags=(*clean_flags(record), f"caption failed ({reason(error)})")))
            report(done, len(dataset), f"{name}: failed, {reason(error)}")
            if job.broken >= GIVE_UP and not job.made + job.kept:
                raise RuntimeError(f"The captioner failed on the first {job.broken} pictures it saw, the last time at {name}: "
                                   f"{reason(error)}") from error
    if failed and not job.made + job.kept:
        raise RuntimeError(f"No picture got a caption: all {len(failed)} failed. The first, {Path(failed[0][0]).name}: {failed[0][1]}")
    return Captioned(Dataset(tuple(records), dataset.skipped), job.made, job.kept, passed, tuple(failed))


@dataclass
class Job:
    """One captioner at work, and what it has done so far."""

    captioner: Captioner
    prompt: Callable[[Record], str]
    wording: PromptSettings
    cache: Words | None
    made: int = 0
    kept: int = 0
    broken: int = 0  # failures of the captioner itself, not of a file

    def ask(self, record: Record) -> Said:
        """What the captioner says of this picture, from the cache when it said so before. ValueError when it says nothing."""
        asked = self.prompt(record)
        key = fingerprint("said", record.id, record.crop, self.captioner.identity, asked)
        known = self.cache.find(key) if self.cache else None
        raw = known or self.look(record, asked)
        said = held_to(self.wording, raw)
        if not said.text:
            raise ValueError("nothing was said of it")
        if known is None and self.cache:
            about = {"picture": record.id, "captioner": self.captioner.identity, "prompt": asked}
            self.cache.keep(key, raw, about)
        self.made, self.kept = self.made + (known is None), self.kept + (known is not None)
        return said

    def look(self, record: Record, asked: str) -> Said:
        picture = open_image(record) if getattr(self.captioner, "looks", True) else None
        try:
            return self.captioner.caption(picture, asked)
        except Exception:
            self.broken += 1
            raise


def wanted(record: Record, mode: str, gives_tags: bool) -> bool:
    """Whether the captioner has to look. fill: something that it gives is missing; skip: the picture has neither caption nor tags."""
    captioned = any(caption.strip() for caption in record.captions)
    if mode == FILL:
        return not captioned or (gives_tags and not record.tags)
    if mode == SKIP:
        return not captioned and not record.tags
    return True


def written(record: Record, said: Said, mode: str) -> Record:
    """The record with these words: in place of its own (replace), behind them (add), or where it has none (fill, skip)."""
    own = tuple(caption for caption in record.captions if caption.strip())
    record = replace(record, flags=clean_flags(record))
    if mode == REPLACE:
        return replace(record, captions=(said.text,), tags=said.tags or record.tags)
    if mode == ADD:
        captions = tuple(joined(caption, said) for caption in own) or (said.text,)
        return replace(record, captions=captions, tags=tuple(dict.fromkeys((*record.tags, *said.tags))))
    return replace(record, captions=own or (said.text,), tags=record.tags or said.tags)


def joined(caption: str, said: Said) -> str:
    """The caption and what was said: tags that it lacks behind commas, prose as a sentence of its own; never the same twice."""
    caption = caption.strip()
    if said.tags:
        present = {tag.strip().casefold() for tag in caption.split(",")}
        return ", ".join([caption.rstrip(" ,"), *(tag for tag in said.tags if tag.casefold() not in present)])
    if said.text.casefold() in caption.casefold():
        return caption
    return f"{caption} {said.text}" if caption.endswith((".", "!", "?", ",")) else f"{caption}, {said.text}"


def clean_flags(record: Record) -> tuple[str, ...]:
    return tuple(flag for flag in record.flags if not flag.startswith("caption failed"))


def reason(error: BaseException) -> str:
    """The error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error).casefold()


def no_memory(name: str, job: Job) -> str:
    return (f"Out of memory at {name}, after {job.made + job.kept} captions, which are kept: Run again continues behind them. To need less: "
            "lower max_res or beams, choose a smaller model, or a tagger. Models loaded elsewhere in the graph are moved away by ComfyUI "
            "where they can be.")  # fmt: skip
