"""Which tags an image gets, from the probability of every tag that a tagger knows.

Probabilities in, words out: thresholds, unwanted and renamed tags, overlaps, order and spelling. No model is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..data.captions.edits import BOORU_KAOMOJI
from ..settings import Settings, choice_field, number_field, switch_field, text_field

GENERAL_CATEGORY, CHARACTER_CATEGORY, RATING_CATEGORY = "general", "character", "rating"
TAG_CATEGORIES = {
    "0": GENERAL_CATEGORY,
    "1": "artist",
    "3": "copyright",
    "4": CHARACTER_CATEGORY,
    "5": "species",
    "7": "meta",
    "8": "lore",
    "9": RATING_CATEGORY,
}
# Order "category": other categories follow these.
CATEGORY_ORDER = (CHARACTER_CATEGORY, "copyright", "artist", "species", GENERAL_CATEGORY)
TAG_ORDERS = ("characters first", "probability", "category")
RATING_POSITIONS = ("off", "first", "last")
MIN_CHARACTER_THRESHOLD = 0.15  # mcut never names a character below this (SmilingWolf's wd-tagger)
TAGGER_KAOMOJI = BOORU_KAOMOJI - {";_;", "t_t"}  # SmilingWolf's list of emoticons, which keep their underscores


@dataclass(frozen=True, kw_only=True)
class TaggerSettings(Settings):
    """Which tags an image keeps, and how they are written. The last two are for zero-shot tags, the others for
    taggers."""

    general_threshold: float = number_field(
        0.35, 0.0, 1.0, "Minimum probability of an ordinary tag. Lower finds more tags, including more wrong ones."
    )
    character_threshold: float = number_field(0.85, 0.0, 1.0, "Minimum probability of a character's name.")
    mcut: bool = switch_field(
        False, "Set the threshold for each image: the middle of the largest gap between its probabilities."
    )
    max_tags: int = number_field(0, 0, 1000, "Keep only the most probable tags. 0 keeps all that pass.", unit="tags")
    drop_overlaps: bool = switch_field(
        False, "Remove a tag that a longer tag ends with: long hair beside very long hair."
    )
    undesired: str = text_field("", "Tags to remove, separated by commas.")
    replacements: str = text_field("", "Replaces tags: a -> b; c -> d. An empty right side removes the tag.")
    always_first: str = text_field("", "Tags to move to the front, in this order, if they were found: 1girl, 1boy.")
    order: str = choice_field("characters first", TAG_ORDERS, "In each group the most probable tag comes first.")
    ratings: str = choice_field(
        "off", RATING_POSITIONS, "Write the best-fitting rating (general, sensitive, questionable, explicit)."
    )
    expand_characters: bool = switch_field(False, "Write name_(series) as two tags: name, series.", advanced=True)
    spaces: bool = switch_field(
        True, "Spaces instead of underscores; emoticons such as ^_^ keep theirs.", advanced=True
    )
    escape_parentheses: bool = switch_field(
        False,
        "Write \\( and \\), for captions that are used as prompts. Training captions need no escapes.",
        advanced=True,
    )
    channels: str = choice_field(
        "BGR",
        ("BGR", "RGB"),
        "The channel order that the tagger was trained with. WD and Z3D taggers: BGR.",
        advanced=True,
    )
    zero_shot_words: int = number_field(
        6,
        0,
        100,
        "zero-shot tags: maximum number of words of the vocabulary, besides those of lines with a colon.",
        unit="words",
        advanced=True,
    )
    zero_shot_certainty: float = number_field(
        0.6,
        0.0,
        1.0,
        "zero-shot tags: minimum probability of a word against 'something'. 0.5: as close to the image as 'something'.",
        advanced=True,
    )

    def __post_init__(self):
        super().__post_init__()
        parse_replacements(self.replacements)  # so that a mistake in it is an error before the work begins


@dataclass(frozen=True)
class TagLabel:
    """One output of a tagger."""

    name: str
    category: str = GENERAL_CATEGORY


@dataclass(frozen=True)
class PredictedTag:
    """A tag and its probability on one image."""

    name: str
    category: str
    probability: float


def select_tags(
    labels: Sequence[TagLabel], probabilities: Iterable[float], settings: TaggerSettings
) -> tuple[str, ...]:
    """The tags of one image as they are written, each once."""
    everything = [
        PredictedTag(label.name, label.category, float(p)) for label, p in zip(labels, probabilities, strict=True)
    ]
    found = drop_undesired_tags(keep_tags_over_threshold(everything, settings), settings.undesired)
    names = parse_replacements(settings.replacements)
    found = [replace(tag, name=name) for tag in found for name in names.get(tagger_tag_key(tag.name), (tag.name,))]
    if settings.expand_characters:
        found = [part for tag in found for part in expand_character_tag(tag)]
    found = drop_repeated_tags(found)
    if settings.drop_overlaps:
        found = drop_overlapping_tags(found)
    found = found[: settings.max_tags or None]
    found = add_rating_tag(
        move_tags_to_front(order_tags(found, settings.order), settings.always_first), everything, settings
    )
    return tuple(dict.fromkeys(format_tag_name(tag.name, settings) for tag in found))


# -- which ones --------------------------------------------------------------------------------------------------------


def keep_tags_over_threshold(tags: Sequence[PredictedTag], settings: TaggerSettings) -> list[PredictedTag]:
    """Tags at or above the threshold of their category, most probable first. Ratings are left out: see
    add_rating_tag."""
    characters = [tag for tag in tags if tag.category == CHARACTER_CATEGORY]
    others = [tag for tag in tags if tag.category not in (CHARACTER_CATEGORY, RATING_CATEGORY)]
    threshold, character_threshold = settings.general_threshold, settings.character_threshold
    if settings.mcut:
        threshold = mcut((tag.probability for tag in others), threshold)
        found = mcut((tag.probability for tag in characters), character_threshold)
        character_threshold = max(MIN_CHARACTER_THRESHOLD, found)
    kept = [tag for tag in others if tag.probability >= threshold] + [
        tag for tag in characters if tag.probability >= character_threshold
    ]
    return sort_by_probability(kept)


def mcut(probabilities: Iterable[float], otherwise: float) -> float:
    """The middle of the largest gap between the sorted probabilities (Largeron et al. 2012); `otherwise` where there is
    no gap."""
    falling = sorted(probabilities, reverse=True)
    gaps = [(high - low, -index) for index, (high, low) in enumerate(zip(falling, falling[1:], strict=False))]
    if not gaps or max(gaps)[0] <= 0:
        return otherwise
    index = -max(gaps)[1]
    return (falling[index] + falling[index + 1]) / 2


def drop_undesired_tags(tags: Iterable[PredictedTag], undesired: str) -> list[PredictedTag]:
    unwanted = {tagger_tag_key(name) for name in split_tag_names(undesired)}
    return [tag for tag in tags if tagger_tag_key(tag.name) not in unwanted]


def parse_replacements(text: str) -> dict[str, tuple[str, ...]]:
    """Key of a tag -> the tags that replace it. Pairs are a -> b; c -> d, or kohya's a,b;c,d. ValueError when one is
    no pair."""
    out = {}
    for pair in filter(str.strip, text.replace("\n", ";").split(";")):
        left, arrow, right = pair.partition("->")
        names = split_tag_names(right) if arrow else ()
        if not arrow:
            left, comma, right = pair.partition(",")
            names = (right.strip(),) if comma and right.strip() and "," not in right else None
        if not left.strip() or names is None:
            raise ValueError(f"replacements holds {pair.strip()!r}, which is not a pair; write a -> b; c -> d.")
        out[tagger_tag_key(left)] = names
    return out


def expand_character_tag(tag: PredictedTag) -> list[PredictedTag]:
    """A character tag as name and series, which stands in the last parentheses: saber_(alter)_(fate) ->
    saber_(alter), fate. Other tags stay as they are."""
    name, opened, series = tag.name.removesuffix(")").rpartition("(")
    if (
        tag.category != CHARACTER_CATEGORY
        or not opened
        or not tag.name.endswith(")")
        or not name.strip("_ ")
        or not series
    ):
        return [tag]
    return [replace(tag, name=name.rstrip("_ ")), replace(tag, name=series)]


def drop_repeated_tags(tags: Iterable[PredictedTag]) -> list[PredictedTag]:
    first = {}
    for tag in tags:
        first.setdefault(tagger_tag_key(tag.name), tag)
    return list(first.values())


def drop_overlapping_tags(tags: Sequence[PredictedTag]) -> list[PredictedTag]:
    """The tags without those whose words another tag ends with. What a tag names comes last: very_long_hair implies
    long_hair and hair, while cat_ears does not imply cat."""
    words = {
        tagger_tag_key(tag.name): tuple(tagger_tag_key(tag.name).split("_"))
        for tag in tags
        if tag.category == GENERAL_CATEGORY
    }
    ends = {own[start:] for own in words.values() for start in range(1, len(own))}
    return [tag for tag in tags if words.get(tagger_tag_key(tag.name)) not in ends]


# -- in which order, and how spelled -----------------------------------------------------------------------------------


def sort_by_probability(tags: Iterable[PredictedTag]) -> list[PredictedTag]:
    return sorted(tags, key=lambda tag: -tag.probability)  # stable: equals stay in the tagger's own order


def order_tags(tags: Sequence[PredictedTag], order: str) -> list[PredictedTag]:
    if order == "characters first":
        return sorted(tags, key=lambda tag: tag.category != CHARACTER_CATEGORY)
    if order == "category":
        rank = {category: index for index, category in enumerate(CATEGORY_ORDER)}
        return sorted(tags, key=lambda tag: rank.get(tag.category, len(rank)))
    return list(tags)


def move_tags_to_front(tags: Sequence[PredictedTag], first: str) -> list[PredictedTag]:
    """The tags with those named in `first` before the others, in that order."""
    rank = {tagger_tag_key(name): index for index, name in enumerate(split_tag_names(first))}
    return sorted(tags, key=lambda tag: rank.get(tagger_tag_key(tag.name), len(rank)))


def add_rating_tag(
    tags: Sequence[PredictedTag], everything: Iterable[PredictedTag], settings: TaggerSettings
) -> list[PredictedTag]:
    """The tags with the most probable rating before or after them, as the settings say."""
    best = sort_by_probability(tag for tag in everything if tag.category == RATING_CATEGORY)[:1]
    return {"first": [*best, *tags], "last": [*tags, *best]}.get(settings.ratings, list(tags))


def format_tag_name(name: str, settings: TaggerSettings) -> str:
    name = name.replace("_", " ") if settings.spaces and name not in TAGGER_KAOMOJI else name
    return name.replace("(", "\\(").replace(")", "\\)") if settings.escape_parentheses else name


def tagger_tag_key(name: str) -> str:
    """A key that is equal for all spellings of a tag: long hair, Long_Hair, long_hair."""
    return "_".join(name.strip().casefold().replace("_", " ").split()) or name.strip()


def split_tag_names(names: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, names.split(","))))
