"""Which tags a picture gets, from the probability of every tag that a tagger knows.

Probabilities in, words out: thresholds, unwanted and renamed tags, overlaps, order and spelling, without any model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..settings import Settings, choice, number, switch, text

GENERAL, CHARACTER, RATING = "general", "character", "rating"
CATEGORIES = {"0": GENERAL, "1": "artist", "3": "copyright", "4": CHARACTER, "5": "species", "7": "meta", "8": "lore", "9": RATING}
FIRST_CATEGORIES = (CHARACTER, "copyright", "artist", "species", GENERAL)  # the order of a caption by category; others follow
ORDERS = ("characters first", "probability", "category")
RATINGS = ("off", "first", "last")
LEAST_CHARACTER = 0.15  # mcut never names a character below this (SmilingWolf's wd-tagger)
# Faces are spelled as they are: the underscore is a mouth or a nose.
KAOMOJI = frozenset("0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split())


@dataclass(frozen=True, kw_only=True)
class TaggerSettings(Settings):
    """Which tags a picture keeps, and how they are written. The last two are for words that CLIP picks, the others for taggers."""

    general_threshold: float = number(0.35, 0.0, 1.0, "Least probability of an ordinary tag. Lower finds more, and more that is wrong.")
    character_threshold: float = number(0.85, 0.0, 1.0, "Least probability of a character's name.")
    mcut: bool = switch(False, "Find each picture's threshold by itself: in the middle of the largest gap between its probabilities.")
    max_tags: int = number(0, 0, 1000, "Keep the most probable ones only. 0 keeps all that pass.", unit="tags")
    drop_overlaps: bool = switch(False, "Leave out a tag that a longer one ends with: long hair beside very long hair.")
    undesired: str = text("", "Tags never to write, separated by commas.")
    replacements: str = text("", "Other words for tags: a -> b; c -> d. Nothing behind the arrow removes the tag.")
    always_first: str = text("", "These go in front, in this order, where they were found: 1girl, 1boy.")
    order: str = choice("characters first", ORDERS, "In each group the most probable tag comes first.")
    ratings: str = choice("off", RATINGS, "Write the rating (general, sensitive, questionable, explicit) that fits best.")
    expand_characters: bool = switch(False, "Write name_(series) as two tags: name, series.", advanced=True)
    spaces: bool = switch(True, "Spaces in place of underscores; faces such as ^_^ keep theirs.", advanced=True)
    escape_parentheses: bool = switch(False, "Write \\( and \\), for captions that are used as prompts. Training needs no escapes.", advanced=True)
    channels: str = choice(
        "BGR", ("BGR", "RGB"), "Order of the colours that the tagger was trained with. WD and Z3D taggers: BGR.", advanced=True
    )
    zero_shot_words: int = number(
        6, 0, 100, "zero-shot tags: at most so many words of the vocabulary, besides those of lines with a colon.", unit="words", advanced=True
    )
    zero_shot_certainty: float = number(
        0.6, 0.0, 1.0, "zero-shot tags: least probability of a word against 'something'. 0.5: just nearer to the picture than nothing in particular.",
        advanced=True,
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        renamed(self.replacements)  # a mistake in it is told before the work begins


@dataclass(frozen=True)
class Label:
    """One output of a tagger."""

    name: str
    category: str = GENERAL


@dataclass(frozen=True)
class Found:
    """A tag of a picture."""

    name: str
    category: str
    probability: float


def tags_of(labels: Sequence[Label], probabilities: Iterable[float], settings: TaggerSettings) -> tuple[str, ...]:
    """The tags of one picture as they are written, each once."""
    everything = [Found(label.name, label.category, float(p)) for label, p in zip(labels, probabilities, strict=True)]
    found = renamed_tags(wanted(over_threshold(everything, settings), settings.undesired), renamed(settings.replacements))
    if settings.expand_characters:
        found = [part for tag in found for part in expanded(tag)]
    found = once(found)
    if settings.drop_overlaps:
        found = without_overlaps(found)
    found = found[: settings.max_tags or None]
    found = with_rating(front(ordered(found, settings.order), settings.always_first), everything, settings)
    return tuple(dict.fromkeys(spelled(tag.name, settings) for tag in found))


# -- which ones ----------------------------------------------------------------------------------------------------------


def over_threshold(tags: Sequence[Found], settings: TaggerSettings) -> list[Found]:
    """Tags at or above the threshold of their kind, most probable first. Ratings are no tags: see with_rating."""
    people = [tag for tag in tags if tag.category == CHARACTER]
    others = [tag for tag in tags if tag.category not in (CHARACTER, RATING)]
    least, least_person = settings.general_threshold, settings.character_threshold
    if settings.mcut:
        least = mcut((tag.probability for tag in others), least)
        least_person = max(LEAST_CHARACTER, mcut((tag.probability for tag in people), least_person))
    kept = [tag for tag in others if tag.probability >= least] + [tag for tag in people if tag.probability >= least_person]
    return most_probable_first(kept)


def mcut(probabilities: Iterable[float], otherwise: float) -> float:
    """The middle of the largest gap between the sorted probabilities (Largeron et al. 2012); `otherwise` where there is no gap."""
    falling = sorted(probabilities, reverse=True)
    gaps = [(high - low, -index) for index, (high, low) in enumerate(zip(falling, falling[1:], strict=False))]
    if not gaps or max(gaps)[0] <= 0:
        return otherwise
    index = -max(gaps)[1]
    return (falling[index] + falling[index + 1]) / 2


def wanted(tags: Iterable[Found], undesired: str) -> list[Found]:
    unwanted = {key(name) for name in listed(undesired)}
    return [tag for tag in tags if key(tag.name) not in unwanted]


def renamed(text: str) -> dict[str, tuple[str, ...]]:
    """Key of a tag -> the tags that stand for it. Pairs are a -> b; c -> d, or kohya's a,b;c,d. ValueError when one is no pair."""
    out = {}
    for pair in filter(str.strip, text.replace("\n", ";").split(";")):
        left, arrow, right = pair.partition("->")
        names = listed(right) if arrow else ()
        if not arrow:
            left, comma, right = pair.partition(",")
            names = (right.strip(),) if comma and right.strip() and "," not in right else None
        if not left.strip() or names is None:
            raise ValueError(f"replacements holds {pair.strip()!r}, which is no pair; write a -> b; c -> d.")
        out[key(left)] = names
    return out


def renamed_tags(tags: Iterable[Found], names: dict[str, tuple[str, ...]]) -> list[Found]:
    return [replace(tag, name=name) for tag in tags for name in names.get(key(tag.name), (tag.name,))]


def expanded(tag: Found) -> list[Found]:
    """A character as name and series; the last parentheses hold the series: saber_(alter)_(fate) -> saber_(alter), fate."""
    name, opened, series = tag.name.removesuffix(")").rpartition("(")
    if tag.category != CHARACTER or not opened or not tag.name.endswith(")") or not name.strip("_ ") or not series:
        return [tag]
    return [replace(tag, name=name.rstrip("_ ")), replace(tag, name=series)]


def once(tags: Iterable[Found]) -> list[Found]:
    first = {}
    for tag in tags:
        first.setdefault(key(tag.name), tag)
    return list(first.values())


def without_overlaps(tags: Sequence[Found]) -> list[Found]:
    """Without tags whose words another one ends with. The thing a tag names comes last, so that very_long_hair says long_hair and
    hair too, while cat_ears does not say cat."""
    words = {key(tag.name): tuple(key(tag.name).split("_")) for tag in tags if tag.category == GENERAL}
    ends = {own[start:] for own in words.values() for start in range(1, len(own))}
    return [tag for tag in tags if words.get(key(tag.name)) not in ends]


# -- in which order, and how spelled ---------------------------------------------------------------------------------------


def most_probable_first(tags: Iterable[Found]) -> list[Found]:
    return sorted(tags, key=lambda tag: -tag.probability)  # stable: equals stay in the tagger's own order


def ordered(tags: Sequence[Found], order: str) -> list[Found]:
    if order == "characters first":
        return sorted(tags, key=lambda tag: tag.category != CHARACTER)
    if order == "category":
        rank = {category: place for place, category in enumerate(FIRST_CATEGORIES)}
        return sorted(tags, key=lambda tag: rank.get(tag.category, len(rank)))
    return list(tags)


def front(tags: Sequence[Found], first: str) -> list[Found]:
    """The tags named in `first`, where they are among these, before the others."""
    places = {key(name): place for place, name in enumerate(listed(first))}
    return sorted(tags, key=lambda tag: places.get(key(tag.name), len(places)))


def with_rating(tags: Sequence[Found], everything: Iterable[Found], settings: TaggerSettings) -> list[Found]:
    best = most_probable_first(tag for tag in everything if tag.category == RATING)[:1]
    return {"first": [*best, *tags], "last": [*tags, *best]}.get(settings.ratings, list(tags))


def spelled(name: str, settings: TaggerSettings) -> str:
    name = name.replace("_", " ") if settings.spaces and name not in KAOMOJI else name
    return name.replace("(", "\\(").replace(")", "\\)") if settings.escape_parentheses else name


def key(name: str) -> str:
    """One form for all spellings of a tag: long hair, Long_Hair, long_hair."""
    return "_".join(name.strip().casefold().replace("_", " ").split()) or name.strip()


def listed(names: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, names.split(","))))
