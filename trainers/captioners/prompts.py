"""What a model that sees is asked, and what its answer is held to: begin with, never say, always say.

The presets are this project's own words. A template knows {tags}, {name}, {folder} and {caption} of the picture at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..data.records import Record
from ..settings import Settings, choice, number, text
from . import Said
from .plain import cleaned

STYLES = {
    "descriptive": "Describe this picture in full sentences: the subject, what it does, the surroundings, the light and the colours.",
    "straightforward": "Say plainly what this picture shows. Name subjects, objects and places; do not guess and do not praise.",
    "training prompt": "Write the text prompt that would make an image generator draw this picture: subject, setting, style, light, framing.",
    "tags": "List what is visible in this picture as short tags separated by commas, the most important ones first. Write nothing else.",
    "objects and places": "Name the objects in this picture and say where each one is: left, right, top, bottom, in front or behind.",
    "style only": "Describe only how this picture is made: medium, technique, palette, light, composition. Do not name what it shows.",
    "subject only": "Describe only the main subject of this picture. Leave out the background, the light and the style.",
    "art critique": "Discuss this picture as an art critic would: composition, colour, technique, mood and what it may mean.",
    "product": "Describe the item in this picture for a shop's catalogue: material, colour, shape, details and condition.",
    "alt text": "Write the alternative text of this picture for someone who cannot see it.",
    "social post": "Write the line that someone would post together with this picture.",
}
LENGTHS = {
    "any": "",
    "very short": "Use at most 12 words.",
    "short": "Use one sentence.",
    "medium": "Use two or three sentences.",
    "long": "Use about six sentences.",
    "very long": "Use several paragraphs and leave nothing out.",
    "number of words": "Use about {words} words.",
}
FIELD = re.compile(r"\{(\w+)\}")
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """How captions are worded."""

    style: str = choice("descriptive", STYLES, "What kind of text is asked for. Models without instructions (BLIP, GIT) leave it aside.")
    length: str = choice("any", LENGTHS, "How long a caption is asked for. Florence-2 picks its task by it.")
    words: int = number(60, 5, 500, "With length = number of words: how many.", unit="words")
    extra: str = text("", "Added to the request. {tags}, {name}, {folder} and {caption} become those of the picture.")
    begin: str = text("", "Every caption begins with these words; the model goes on from them.")
    forbidden: str = text("", "Words that no caption may hold, separated by commas: picture of, watermark.")
    forced: str = text("", "Words that every caption must hold, separated by commas; added at the end where they are missing.")

    def __post_init__(self):
        super().__post_init__()
        check_template(self.extra)
        clash = {w.casefold() for w in listed(self.forbidden)} & {w.casefold() for w in listed(self.forced)}
        if clash:
            raise ValueError(f"{', '.join(sorted(clash))} is both forbidden and forced; take it out of one of the two.")


def listed(words: str) -> list[str]:
    """The words of a comma-separated text."""
    return list(dict.fromkeys(filter(None, map(str.strip, words.replace("\n", ",").split(",")))))


def known_fields(record: Record) -> dict[str, str]:
    path = Path(record.path)
    return {
        "tags": ", ".join(record.tags),
        "name": cleaned(record.path),
        "folder": path.parent.name,
        "caption": record.captions[0] if record.captions else "",
    }


FIELDS = ("tags", "name", "folder", "caption")


def check_template(template: str) -> None:
    """ValueError for a {field} that no picture has."""
    unknown = [name for name in FIELD.findall(template) if name not in FIELDS]
    if unknown:
        raise ValueError(f"The text asks for {{{unknown[0]}}}, which no picture has; use {', '.join(f'{{{name}}}' for name in FIELDS)}.")


def filled(template: str, record: Record) -> str:
    """The template with the picture's own words in its {fields}."""
    check_template(template)
    values = known_fields(record)
    return FIELD.sub(lambda match: values[match[1]], template)


def request(wording: PromptSettings) -> str:
    """The template that a model is asked, when the user writes none."""
    parts = [STYLES[wording.style], LENGTHS[wording.length].format(words=wording.words)]
    if forced := listed(wording.forced):
        parts.append(f"Mention: {', '.join(forced)}.")
    if forbidden := listed(wording.forbidden):
        parts.append(f"Do not use these words: {', '.join(forbidden)}.")
    return " ".join(filter(None, [*parts, wording.extra.strip()]))


# -- the answer --------------------------------------------------------------------------------------------------------------------


def held_to(wording: PromptSettings, said: Said) -> Said:
    """The answer without thoughts and forbidden words, with the beginning and the forced words."""
    body = tidy(without(listed(wording.forbidden), THOUGHT.sub("", said.text)))
    tags = tuple(dict.fromkeys(filter(None, (tidy(without(listed(wording.forbidden), tag)) for tag in said.tags))))
    if not body and not tags:
        return Said()
    glue = ", " if said.tags else " "
    body, tags = begun(wording.begin.strip(), body, tags, glue)
    missing = [word for word in listed(wording.forced) if not holds(body, word)]
    return Said(", ".join([body.rstrip(" ,"), *missing]), (*tags, *missing) if said.tags else ())


def begun(begin: str, body: str, tags, glue: str):
    """(body, tags) that begin with these words, said once."""
    if not begin or body.casefold().startswith(begin.casefold()):
        return body, tags
    head = begin.rstrip(" ,") if glue == ", " else begin
    return f"{head}{glue}{body}", (head, *(t for t in tags if t != head)) if tags else ()


def word(value: str) -> re.Pattern:
    """A pattern that finds these words whole, whatever their case."""
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)", re.IGNORECASE)


def holds(body: str, value: str) -> bool:
    return word(value).search(body) is not None


def without(words: list[str], body: str) -> str:
    for value in words:
        body = word(value).sub("", body)
    return body


def tidy(body: str) -> str:
    """One line of text, without the holes that removed words leave: doubled spaces, commas side by side."""
    body = re.sub(r"\s+", " ", body)
    body = re.sub(r"\s+([,.;:!?])", r"\1", body)
    body = re.sub(r",(?:\s*,)+", ",", body)
    return body.strip(" ,;:")
