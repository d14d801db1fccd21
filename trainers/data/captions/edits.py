"""Captions edited by rule: a small language, one operation per line, and what a dataset becomes by it.

    # comments and empty lines are passed over
    trigger: sks
    remove: watermark, signature
    s/\\bman\\b/person/
    truncate: 75

Every operation is a pure function of one caption; a dataset comes in and another one goes out. `OPERATIONS` lists them all. What is
in double quotes is taken as it stands, spaces and arrows included. Tags are what stands between commas (, ， 、); two tags are the same
when they differ only in case, width, underscores for spaces or backslashes. A caption of several lines is edited line by line.
"""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..records import Dataset, Record
from .variants import record_rng

Counter = Callable[[str], Mapping[str, int]]  # tokens of a text by text encoder
REGEX_SECONDS = 2.0

OPERATIONS: dict[str, Operation] = {}


@dataclass(frozen=True)
class About:
    """What an operation may know besides the caption itself."""

    record: Record
    rng: torch.Generator
    tokens: Counter | None = None


@dataclass(frozen=True)
class Operation:
    """One word of the language: how it is written, what it does, and how a line of it becomes a function."""

    usage: str
    hint: str
    build: Callable[[str], Callable[[str, About], str]]


@dataclass(frozen=True)
class Edit:
    """One line of the language, ready to run. Conditions hold for the lines after them."""

    line: int
    text: str
    run: Callable[[str, About], str] | None = None
    condition: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Change:
    """What became of one picture's captions."""

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class Wrong(ValueError):
    """What is wrong with a line's argument; the line itself is added by whoever reads lines."""


def operation(usage: str, hint: str):
    """Lists a builder in OPERATIONS under the first word of its usage."""

    def listed(build):
        OPERATIONS[usage.split(":")[0]] = Operation(usage, hint, build)
        return build

    return listed


# -- from text to edits --------------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[Edit, ...]:
    """The edits that these lines ask for. ValueError with the line's number, its text and what is possible."""
    lines = enumerate(text.split("\n"), 1)
    return tuple(parsed(number, line.strip()) for number, line in lines if line.strip() and not line.strip().startswith("#"))


def parsed(number: int, line: str) -> Edit:
    try:
        if substitution(line):
            return Edit(number, line, substituted(line))
        name, argument = named(line)
        if name in CONDITIONS:
            return Edit(number, line, condition=CONDITIONS[name](argument))
        return Edit(number, line, OPERATIONS[name].build(argument))
    except Wrong as error:
        raise ValueError(f"Line {number} of the edits, {line!r}: {error}") from None


def named(line: str) -> tuple[str, str]:
    """(operation, argument) of `name: argument` or `name`."""
    name, _, argument = line.partition(":")
    name = name.strip().casefold()
    known = (*OPERATIONS, *CONDITIONS)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        raise Wrong(f"there is no operation {name!r}." + (f" Did you mean {near[0]!r}?" if near else "") + f" There are: {', '.join(known)}, s/a/b/.")
    return name, argument.strip()


def needed(argument: str, usage: str) -> str:
    if not argument:
        raise Wrong(f"something is missing after the colon; write {usage!r}.")
    return argument


def literal(text: str) -> str:
    """What is in double quotes as it stands, else the text without the spaces around it."""
    text = text.strip()
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text


def arrow(text: str, usage: str) -> tuple[str, str]:
    """(left, right) of `left -> right`; either may be quoted."""
    match = re.fullmatch(r'\s*("[^"]*"|.+?)\s*->\s*("[^"]*"|.*?)\s*', text)
    if not match:
        raise Wrong(f"it needs an arrow; write {usage!r}.")
    return literal(match[1]), literal(match[2])


def words(argument: str, usage: str) -> list[str]:
    found = [literal(word) for word in split(argument)]
    return found or needed("", usage)


def count(argument: str, word: str) -> int:
    """The number in `keep 2`; 0 for nothing."""
    match = re.fullmatch(rf"(?:{word}\s+(\d+))?", argument.casefold())
    if not match:
        raise Wrong(f"{argument!r} is not understood; write nothing, or {word} and a whole number such as '{word} 2'.")
    return int(match[1] or 0)


# -- from captions to captions ---------------------------------------------------------------------------------------------------


def apply(dataset: Dataset, edits: tuple[Edit, ...], seed: int = 0, tokens: Counter | None = None, report=None, check_interrupt=None) -> Dataset:
    """The dataset with every caption edited. A picture without a caption is edited as one whose caption is empty.

    The order that `shuffle` gives depends on the seed and the picture alone. report(done, total, name) is told of every picture.
    """
    records = []
    for done, record in enumerate(dataset, 1):
        if check_interrupt:
            check_interrupt()
        records.append(edited(record, edits, seed, tokens))
        if report:
            report(done, len(dataset), Path(record.path).name)
    return replace(dataset, records=tuple(records))


def edited(record: Record, edits: tuple[Edit, ...], seed: int = 0, tokens: Counter | None = None) -> Record:
    """The record with its captions edited; alternatives that became equal or empty are dropped."""
    about = About(record, record_rng(record, seed), tokens)
    captions = (edited_caption(caption, edits, about) for caption in record.captions or ("",))
    return replace(record, captions=tuple(dict.fromkeys(filter(None, captions))))


def edited_caption(caption: str, edits: tuple[Edit, ...], about: About) -> str:
    applies = True
    for edit in edits:
        if edit.condition:
            applies = edit.condition(caption)
        elif applies:
            try:
                caption = edit.run(caption, about).strip()
            except Wrong as error:
                raise ValueError(f"Line {edit.line} of the edits, {edit.text!r}, on {Path(about.record.path).name}: {error}") from None
    return caption


def changes(before: Dataset, after: Dataset) -> list[Change]:
    """What became different, picture by picture."""
    pairs = zip(before, after, strict=True)
    return [Change(Path(old.path).name, old.captions, new.captions) for old, new in pairs if old.captions != new.captions]


def preview(before: Dataset, after: Dataset, show: int = 5) -> str:
    """How many pictures changed, and the first `show` of them before and after."""
    changed = changes(before, after)
    lines = [f"{len(changed)} of {len(before)} pictures changed"]
    for change in changed[:show]:
        lines += ["", change.name, *(f"- {text}" for text in change.before or ("(no caption)",))]
        lines += [f"+ {text}" for text in change.after or ("(no caption)",)]
    return "\n".join(lines + ([f"\n... and {len(changed) - show} more"] if show < len(changed) else []))


# -- tags --------------------------------------------------------------------------------------------------------------------------

COMMAS = re.compile("[,，、]")


def split(caption: str) -> list[str]:
    """The tags of a caption, without empty ones."""
    return [tag for tag in map(str.strip, COMMAS.split(caption)) if tag]


def key(tag: str) -> str:
    """Equal for tags that mean the same."""
    plain = unicodedata.normalize("NFKC", tag).casefold().replace("\\", "").replace("_", " ")
    return " ".join(plain.split()) or tag


def keys(tags) -> set[str]:
    return {key(tag) for tag in tags}


def joined(tags, like: str) -> str:
    """The tags with the kind of comma that `like` uses first."""
    comma = COMMAS.search(like)
    return (", " if comma is None or comma[0] == "," else comma[0]).join(tags)


def by_tags(change: Callable[[list[str], About], list[str]]):
    """The operation that changes each line's list of tags. A line whose tags stay as they are stays as it is."""

    def line(text: str, about: About) -> str:
        after = change(split(text), about)
        return text if after == [part.strip() for part in COMMAS.split(text)] else joined(after, text)

    return by_lines(line)


def by_lines(change: Callable[[str, About], str]):
    def lines(text: str, about: About) -> str:
        return "\n".join(change(line, about) for line in text.split("\n"))

    return lines


UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"  # scripts that glue words together


def whole(word: str) -> re.Pattern:
    """Finds the word or phrase standing by itself; in scripts without spaces, anywhere."""
    before = "" if re.match(f"[{UNSPACED}]", word) or not re.match(r"\w", word) else rf"(?<![^\W{UNSPACED}])"
    after = "" if re.search(f"[{UNSPACED}]$", word) or not re.search(r"\w$", word) else rf"(?![^\W{UNSPACED}])"
    return re.compile(before + re.escape(word) + after)


def says(caption: str, word: str) -> bool:
    """Whether the caption names this word or phrase."""
    return bool(whole(key(word)).search(key(caption)))


@operation("remove: tag, tag", "removes these tags")
def remove(argument):
    unwanted = keys(words(argument, "remove: tag, tag"))
    return by_tags(lambda tags, _: [tag for tag in tags if key(tag) not in unwanted])


@operation("blacklist: word, word", "removes every tag that contains one of these words")
def blacklist(argument):
    unwanted = words(argument, "blacklist: word, word")
    return by_tags(lambda tags, _: [tag for tag in tags if not any(says(tag, word) for word in unwanted)])


@operation("keep: tag, tag", "removes every tag but these")
def keep(argument):
    wanted = keys(words(argument, "keep: tag, tag"))
    return by_tags(lambda tags, _: [tag for tag in tags if key(tag) in wanted])


@operation("swap: tag -> tag; tag -> tag", "puts other tags in the place of these")
def swap(argument):
    usage = "swap: tag -> tag; tag -> tag"
    pairs = dict(arrow(pair, usage) for pair in needed(argument, usage).split(";") if pair.strip())
    others = {key(old): split(new) for old, new in pairs.items()}
    return by_tags(lambda tags, _: [new for tag in tags for new in others.get(key(tag), [tag])])


@operation("dedupe", "removes tags that have been said already")
def dedupe(argument):
    nothing(argument)
    return by_tags(lambda tags, _: list({key(tag): tag for tag in reversed(tags)}.values())[::-1])


@operation("sort", "sorts tags by the alphabet; 'sort: keep 1' leaves the first in place")
def sort(argument):
    front = count(argument, "keep")
    return by_tags(lambda tags, _: tags[:front] + sorted(tags[front:], key=lambda tag: (key(tag), tag)))


@operation("shuffle", "shuffles tags by the seed; 'shuffle: keep 2' leaves the first two in place")
def shuffle(argument):
    front = count(argument, "keep")

    def shuffled(tags, about):
        rest = tags[front:]
        return tags[:front] + [rest[i] for i in torch.randperm(len(rest), generator=about.rng).tolist()]

    return by_tags(shuffled)


@operation("merge: tags, prose", "joins the picture's own tags and its caption, nothing said twice; or 'merge: prose, tags'")
def merge(argument):
    order = tuple(word.casefold() for word in split(argument))
    if sorted(order) != ["prose", "tags"]:
        raise Wrong(f"{argument!r} is not understood; write 'merge: tags, prose' or 'merge: prose, tags'.")

    def merged(caption, about):
        tags = joined({key(tag): tag for tag in about.record.tags if not says(caption, tag)}.values(), caption)
        parts = (tags, caption) if order[0] == "tags" else (caption.rstrip(" ,，、"), tags)
        return joined(filter(None, parts), caption)

    return merged


def nothing(argument):
    if argument:
        raise Wrong(f"nothing is expected after the colon, and there is {argument!r}.")


# -- words -------------------------------------------------------------------------------------------------------------------------

CLOSING = tuple(",.;:!?)]}，。、；：！？")


@operation("trigger: word", "puts the word first, unless the caption names it; a tag of that name moves to the front")
def trigger(argument):
    word = literal(needed(argument, "trigger: sks"))

    def triggered(caption, about):
        tags = split(caption)
        if key(word) in keys(tags):
            rest = [tag for tag in tags if key(tag) != key(word)]
            return caption if key(tags[0]) == key(word) and len(rest) == len(tags) - 1 else joined([word, *rest], caption)
        return caption if says(caption, word) else joined(filter(None, (word, caption)), caption)

    return triggered


@operation("prefix: text", "puts the text in front, with a space; in quotes as it stands")
def prefix(argument):
    text = needed(argument, "prefix: text")
    text = literal(text) if quoted(text) else text + " "
    return lambda caption, _: caption if (caption + " ").startswith(text) else text + caption


@operation("suffix: text", "puts the text at the end, with a space unless it begins with a comma or a stop; in quotes as it stands")
def suffix(argument):
    text = needed(argument, "suffix: text")
    text = literal(text) if quoted(text) else text if text.startswith(CLOSING) else " " + text
    return lambda caption, _: caption if (" " + caption).endswith(text.rstrip()) else caption + text


def quoted(text: str) -> bool:
    return literal(text) != text.strip()


@operation("replace: a -> b", "puts b in the place of a wherever it stands, letter by letter")
def substitute(argument):
    old, new = arrow(argument, "replace: a -> b")
    if not old:
        raise Wrong("nothing stands before the arrow; write 'replace: a -> b'.")
    return lambda caption, _: caption.replace(old, new)


@operation("lower", "lower-case letters")
def lower(argument):
    nothing(argument)
    return lambda caption, _: caption.lower()


# Names that are written with underscores: emoticons of booru taggers, and the quality words that Pony models were trained with.
KAOMOJI = frozenset("0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_|| ;_; t_t".split())
QUALITY = re.compile(r"(score|source|rating)_\w+")


@operation("underscores: to spaces", "long_hair becomes long hair; emoticons such as ^_^ and score_9 stay")
def underscores(argument):
    if argument.casefold() != "to spaces":
        raise Wrong(f"{argument!r} is not understood; write 'underscores: to spaces'.")

    def spaced(tag):
        plain = tag.replace("\\", "").casefold()
        return tag if plain in KAOMOJI or QUALITY.fullmatch(plain) else tag.replace("_", " ").strip()

    return by_tags(lambda tags, _: [spaced(tag) for tag in tags])


@operation("escape: parentheses", "( becomes \\(, so that text encoders do not read it as emphasis")
def escape(argument):
    parentheses(argument, "escape")
    return lambda caption, _: re.sub(r"(?<!\\)([()])", r"\\\1", caption)


@operation("unescape: parentheses", "\\( becomes (")
def unescape(argument):
    parentheses(argument, "unescape")
    return lambda caption, _: re.sub(r"\\([()])", r"\1", caption)


def parentheses(argument, name):
    if argument.casefold() != "parentheses":
        raise Wrong(f"{argument!r} is not understood; write '{name}: parentheses'.")


# What captioning models say before they come to the point. Matched at the beginning of a caption, ignoring case.
MEDIUM = r"(?:image|picture|photo|photograph|painting|drawing|illustration|artwork|scene|screenshot|render)"
SHOWS = r"(?:shows|depicts|features|displays|captures|contains|portrays|presents|illustrates|showcases|is of)"
OPENINGS = (
    rf"(?:this|the)(?: \w+)? {MEDIUM} {SHOWS}",
    rf"in (?:this|the) {MEDIUM},?(?: (?:we|you) (?:can )?see| there (?:is|are))?",
    r"(?:an? )?(?:image|picture|photo|photograph) of",  # not painting or drawing: that is worth learning
    r"(?:we|you) (?:can )?see",
    r"there (?:is|are)",
)
ANYWHERE = (r"\baraf+(?:ed|es?|y)?\b",)  # a word that BLIP made up


@operation("strip: boilerplate", "removes openings such as 'this image shows' and 'a photo of'; add phrases of your own after a comma")
def strip(argument):
    asked = words(argument, "strip: boilerplate")
    own = [whole(phrase).pattern for phrase in asked if phrase.casefold() != "boilerplate"]
    openings, anywhere = ((), own) if len(own) == len(asked) else (OPENINGS, (*ANYWHERE, *own))
    opening = re.compile(rf"\s*(?:{'|'.join(openings)})\b[\s,:]*", re.IGNORECASE) if openings else None
    phrase = re.compile("|".join(anywhere), re.IGNORECASE) if anywhere else None

    def stripped(caption, _):
        text, before = caption, None
        while text != before:
            before = text
            text = tidy(phrase.sub("", text)) if phrase.search(text) else text
            text = opening.sub("", text, count=1) if opening and opening.match(text) else text
        return text[:1].upper() + text[1:] if caption[:1].isupper() and text != caption else text

    return by_lines(stripped)


def tidy(text: str) -> str:
    """Without the double spaces and orphaned commas that a removed phrase leaves."""
    text = re.sub(r"\s*([,，、])(?:\s*[,，、])+", r"\1", re.sub(r"[^\S\n]{2,}", " ", text))
    return re.sub(r"\s+([,.;，、])", r"\1", text).strip(" ,，、")


# -- length ------------------------------------------------------------------------------------------------------------------------

CLAUSE = 5  # a tag of more words than this is prose, and is cut between words


@operation("truncate: 75", "at most so many tokens (needs CLIP), whole tags and words; or 'truncate: 40 words', 'truncate: 20 tags'")
def truncate(argument):
    match = re.fullmatch(r"(\d+)\s*(tokens?|words?|tags?)?", argument.casefold())
    if not match or not int(match[1]):
        raise Wrong(f"{argument!r} is no length; write a number above 0: 'truncate: 75' (tokens), 'truncate: 40 words' or 'truncate: 20 tags'.")
    most, measure = int(match[1]), MEASURES[(match[2] or "tokens").rstrip("s")]
    return lambda caption, about: shortened(caption, lambda text: measure(text, about) <= most)


def shortened(caption: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of whole tags that fits; a long tag (prose) is cut between its words."""
    if fits(caption):
        return caption
    ends = [match.start() for match in COMMAS.finditer(caption)]
    kept = longest(caption, ends, fits)
    rest = caption[len(kept) :]
    clause = COMMAS.split(rest[1:] if kept else rest)[0]
    if kept and len(clause.split()) <= CLAUSE:
        return kept.rstrip()
    start = caption.index(clause, len(kept))
    ends = [start + match.start() for match in re.finditer(rf"\s+|(?<=[{UNSPACED}])", clause)]
    return (longest(caption, [end for end in ends if end > start], fits) or kept).rstrip(" ,，、")


def longest(text: str, ends: list[int], fits) -> str:
    """text[:end] for the largest end that fits, by halving: counting tokens is the slow part."""
    low, high = 0, len(ends)  # ends[:low] fit, ends[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(text[: ends[middle]]) else (low, middle)
    return text[: ends[low - 1]] if low else ""


def tokens_of(text: str, about: About) -> int:
    """By the text encoder that counts most."""
    if about.tokens is None:
        raise Wrong("tokens cannot be counted without a text encoder. Connect CLIP, or write 'truncate: 40 words'.")
    return max(about.tokens(text).values(), default=0)


MEASURES = {"token": tokens_of, "word": lambda text, _: len(text.split()), "tag": lambda text, _: len(split(text))}


# -- regular expressions ---------------------------------------------------------------------------------------------------------

DELIMITERS = set(string.punctuation) - set('\\:"')
FLAGS = {"i": "IGNORECASE", "m": "MULTILINE", "s": "DOTALL"}


def substitution(line: str) -> bool:
    """Whether the line is s/pattern/replacement/, with any punctuation for the slash."""
    return len(line) > 1 and line[0] == "s" and line[1] in DELIMITERS


def substituted(line: str):
    """The operation of s/pattern/replacement/flags: all of them, or the first with flag 1. A pattern that takes too long is refused."""
    import regex  # of transformers and diffusers; unlike re it can be stopped

    pattern, new, flags = slashed(line)
    if unknown := set(flags) - {*FLAGS, "g", "1"}:
        raise Wrong(f"the flags {''.join(sorted(unknown))!r} are unknown; possible are i (ignore case), 1 (the first only), m, s and g.")
    try:
        options = sum(getattr(regex, FLAGS[flag]) for flag in set(flags) & set(FLAGS))
        found = regex.compile(pattern, options)
        regex.sub(f"{pattern}|", new, "", flags=options)  # the replacement is looked at only where something matches, so something does
    except (regex.error, IndexError) as error:
        place = f" at character {error.pos + 1}" if getattr(error, "pos", None) is not None else ""
        raise Wrong(f"{pattern!r} -> {new!r} is no regular expression{place}: {getattr(error, 'msg', error)}.") from None

    def run(caption, _):
        try:
            return found.sub(new, caption, count=1 if "1" in flags else 0, timeout=REGEX_SECONDS)
        except TimeoutError:
            raise Wrong(f"the pattern took more than {REGEX_SECONDS:g} s on {caption[:60]!r}; repeats inside repeats, such as (a+)+, do that.") from None
        except (regex.error, IndexError) as error:
            raise Wrong(f"{new!r} does not fit the pattern: {error}.") from None

    return run


def slashed(line: str) -> tuple[str, str, str]:
    """(pattern, replacement, flags); a delimiter after a backslash is part of the text."""
    mark = re.escape(line[1])
    part = rf"((?:\\.|[^\\{mark}])*)"
    match = re.fullmatch(f"s{mark}{part}{mark}{part}{mark}(\\w*)", line)
    if not match or not match[1]:
        raise Wrong(f"it is no substitution; write 's{line[1]}pattern{line[1]}replacement{line[1]}', and \\{line[1]} for a {line[1]!r} in the text.")
    pattern, new = (text.replace(f"\\{line[1]}", line[1]) for text in match.groups()[:2])
    return pattern, new, match[3]


# -- conditions ------------------------------------------------------------------------------------------------------------------


def only(argument: str):
    """Whether a caption names one of these words; always, without words."""
    asked = split(argument)
    return lambda caption: not asked or any(says(caption, word) for word in asked)


def unless(argument: str):
    asked = words(argument, "unless: word")
    return lambda caption: not any(says(caption, word) for word in asked)


CONDITIONS = {"only": only, "unless": unless}
