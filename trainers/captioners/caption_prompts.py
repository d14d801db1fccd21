"""Prompts for captioning models, and the rules that their answers must meet: how to begin, forbidden and forced words.

The presets are this project's own words. Templates may use {tags}, {name}, {folder} and {caption} of the image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..data.records import ImageRecord
from ..settings import Settings, choice_field, number_field, text_field
from . import CaptionResult
from .template_captioner import clean_file_name

CAPTION_STYLES = {
    "descriptive": "Describe this picture in full sentences: the subject, what it does, the surroundings, the light "
    "and the colours.",
    "straightforward": "Say plainly what this picture shows. Name subjects, objects and places; do not guess and do "
    "not praise.",
    "training prompt": "Write the text prompt that would make an image generator draw this picture: subject, setting, "
    "style, light, framing.",
    "tags": "List what is visible in this picture as short tags separated by commas, the most important ones first. "
    "Write nothing else.",
    "objects and places": "Name the objects in this picture and say where each one is: left, right, top, bottom, in "
    "front or behind.",
    "style only": "Describe only how this picture is made: medium, technique, palette, light, composition. Do not name "
    "what it shows.",
    "subject only": "Describe only the main subject of this picture. Leave out the background, the light and the "
    "style.",
    "art critique": "Discuss this picture as an art critic would: composition, colour, technique, mood and what it may "
    "mean.",
    "product": "Describe the item in this picture for a shop's catalogue: material, colour, shape, details and "
    "condition.",
    "alt text": "Write the alternative text of this picture for someone who cannot see it.",
    "social post": "Write the line that someone would post together with this picture.",
}
CAPTION_LENGTHS = {
    "any": "",
    "very short": "Use at most 12 words.",
    "short": "Use one sentence.",
    "medium": "Use two or three sentences.",
    "long": "Use about six sentences.",
    "very long": "Use several paragraphs and leave nothing out.",
    "number of words": "Use about {words} words.",
}
TEMPLATE_FIELDS = ("tags", "name", "folder", "caption")
TEMPLATE_FIELD_PATTERN = re.compile(r"\{(\w+)\}")
THINK_BLOCK_PATTERN = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """How captions are worded."""

    style: str = choice_field(
        "descriptive",
        CAPTION_STYLES,
        "Requested kind of text. Models without instructions (BLIP, GIT) ignore it.",
    )
    length: str = choice_field(
        "any", CAPTION_LENGTHS, "Requested length of the caption. For Florence-2 it selects the task."
    )
    words: int = number_field(60, 5, 500, "With length = number of words: how many.", unit="words")
    extra: str = text_field(
        "", "Added to the instruction. {tags}, {name}, {folder} and {caption} are replaced for each image."
    )
    begin: str = text_field("", "Every caption begins with these words; the model continues from them.")
    forbidden: str = text_field("", "Words that captions must not contain, separated by commas: picture of, watermark.")
    forced: str = text_field(
        "", "Words that every caption must contain, separated by commas. Missing ones are added at the end."
    )

    def __post_init__(self):
        super().__post_init__()
        check_caption_template(self.extra)
        clash = {w.casefold() for w in split_phrases(self.forbidden)} & {
            w.casefold() for w in split_phrases(self.forced)
        }
        if clash:
            raise ValueError(f"{', '.join(sorted(clash))} is both forbidden and forced; take it out of one of the two.")


def split_phrases(words: str) -> list[str]:
    """The different phrases of a text, separated by commas or lines."""
    return list(dict.fromkeys(filter(None, map(str.strip, words.replace("\n", ",").split(",")))))


def template_values(record: ImageRecord) -> dict[str, str]:
    """The value of each of TEMPLATE_FIELDS for this image."""
    path = Path(record.path)
    return {
        "tags": ", ".join(record.tags),
        "name": clean_file_name(record.path),
        "folder": path.parent.name,
        "caption": record.captions[0] if record.captions else "",
    }


def check_caption_template(template: str) -> None:
    """ValueError for a {field} that is none of TEMPLATE_FIELDS."""
    unknown = [name for name in TEMPLATE_FIELD_PATTERN.findall(template) if name not in TEMPLATE_FIELDS]
    if unknown:
        raise ValueError(
            f"The text asks for {{{unknown[0]}}}, which no image has; use "
            f"{', '.join(f'{{{name}}}' for name in TEMPLATE_FIELDS)}."
        )


def fill_caption_template(template: str, record: ImageRecord) -> str:
    """The template with this image's values in its {fields}."""
    check_caption_template(template)
    values = template_values(record)
    return TEMPLATE_FIELD_PATTERN.sub(lambda match: values[match[1]], template)


def build_caption_prompt(wording: PromptSettings) -> str:
    """The prompt template made from the settings, for a user who writes none."""
    parts = [CAPTION_STYLES[wording.style], CAPTION_LENGTHS[wording.length].format(words=wording.words)]
    if forced := split_phrases(wording.forced):
        parts.append(f"Mention: {', '.join(forced)}.")
    if forbidden := split_phrases(wording.forbidden):
        parts.append(f"Do not use these words: {', '.join(forbidden)}.")
    return " ".join(filter(None, [*parts, wording.extra.strip()]))


# -- the answer --------------------------------------------------------------------------------------------------------


def apply_wording_rules(wording: PromptSettings, answer: CaptionResult) -> CaptionResult:
    """The model's answer without its thinking and the forbidden words, with the beginning and the forced words."""
    forbidden = split_phrases(wording.forbidden)
    body = tidy_answer_text(remove_words(forbidden, THINK_BLOCK_PATTERN.sub("", answer.text)))
    tags = tuple(dict.fromkeys(filter(None, (tidy_answer_text(remove_words(forbidden, tag)) for tag in answer.tags))))
    if not body and not tags:
        return CaptionResult()
    glue = ", " if answer.tags else " "
    body, tags = prepend_begin_words(wording.begin.strip(), body, tags, glue)
    missing = [word for word in split_phrases(wording.forced) if not whole_word_pattern(word).search(body)]
    return CaptionResult(", ".join([body.rstrip(" ,"), *missing]), (*tags, *missing) if answer.tags else ())


def prepend_begin_words(begin: str, body: str, tags: tuple[str, ...], glue: str) -> tuple[str, tuple[str, ...]]:
    """(body, tags) that begin with these words; a body that does so already is not changed."""
    if not begin or body.casefold().startswith(begin.casefold()):
        return body, tags
    head = begin.rstrip(" ,") if glue == ", " else begin
    return f"{head}{glue}{body}", (head, *(t for t in tags if t != head)) if tags else ()


def whole_word_pattern(phrase: str) -> re.Pattern:
    """A pattern that finds the phrase as whole words, in upper and lower case."""
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)


def remove_words(phrases: list[str], body: str) -> str:
    for phrase in phrases:
        body = whole_word_pattern(phrase).sub("", body)
    return body


def tidy_answer_text(body: str) -> str:
    """One line of text, without the doubled spaces and commas that removed words leave."""
    body = re.sub(r"\s+", " ", body)
    body = re.sub(r"\s+([,.;:!?])", r"\1", body)
    body = re.sub(r",(?:\s*,)+", ",", body)
    return body.strip(" ,;:")
