"""Rules that edit captions: a small language with one operation per line, and a dataset to which they are applied.

    # comments and empty lines are ignored
    trigger: sks
    remove: watermark, signature
    s/\\bman\\b/person/
    truncate: 75

Every operation is a pure function of one caption. EDIT_OPERATIONS lists them all. Text in double quotes is taken
literally, spaces and arrows included. Tags are the pieces between commas (, ， 、); two tags are the same when they
differ only in case, width, underscores for spaces or backslashes. A caption of several lines is edited line by line.
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

from ..caption_variants import fill_trigger, make_record_rng
from ..records import ImageDataset, ImageRecord

CountTokens = Callable[[str], Mapping[str, int]]  # text -> number of tokens by text encoder
CLIP_ENCODERS = ("l", "g", "h", "clip_l", "clip_g", "clip_h")  # ComfyUI's names of the encoders that read in chunks
REGEX_TIMEOUT_SECONDS = 2.0

EDIT_OPERATIONS: dict[str, EditOperation] = {}


@dataclass(frozen=True)
class EditContext:
    """What an operation may use besides the caption itself."""

    record: ImageRecord
    rng: torch.Generator
    count_tokens: CountTokens | None = None


ApplyEdit = Callable[[str, EditContext], str]  # (caption, context) -> caption


@dataclass(frozen=True)
class EditOperation:
    """One operation of the language: how it is written, what it does, and the builder of its function."""

    usage: str
    hint: str
    build: Callable[[str], ApplyEdit]  # from the text after the colon


@dataclass(frozen=True)
class CaptionEdit:
    """One parsed line: an edit or a condition. A condition decides about the lines after it, up to the next one."""

    line: int
    text: str
    run: ApplyEdit | None = None
    condition: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class CaptionChange:
    """The captions of one image before and after the edits."""

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class EditError(ValueError):
    """An error in one line's argument; the reader of the lines adds the line's number and text."""


def register_operation(usage: str, hint: str):
    """A decorator that enters a builder into EDIT_OPERATIONS under the first word of its usage."""

    def register(build):
        EDIT_OPERATIONS[usage.split(":")[0]] = EditOperation(usage, hint, build)
        return build

    return register


# -- from text to edits ------------------------------------------------------------------------------------------------


def parse_edits(text: str) -> tuple[CaptionEdit, ...]:
    """The edits of these lines. ValueError with the line's number, its text and what is possible."""
    lines = enumerate(text.split("\n"), 1)
    return tuple(
        parse_edit_line(number, line.strip())
        for number, line in lines
        if line.strip() and not line.strip().startswith("#")
    )


def parse_edit_line(number: int, line: str) -> CaptionEdit:
    try:
        if len(line) > 1 and line[0] == "s" and line[1] in REGEX_DELIMITERS:  # s/pattern/replacement/
            return CaptionEdit(number, line, build_substitution(line))
        name, argument = split_operation_line(line)
        if name in EDIT_CONDITIONS:
            return CaptionEdit(number, line, condition=EDIT_CONDITIONS[name](argument))
        return CaptionEdit(number, line, EDIT_OPERATIONS[name].build(argument))
    except EditError as error:
        raise ValueError(f"Line {number} of the edits, {line!r}: {error}") from None


def split_operation_line(line: str) -> tuple[str, str]:
    """(operation, argument) of `name: argument` or `name`."""
    name, _, argument = line.partition(":")
    name = name.strip().casefold()
    known = (*EDIT_OPERATIONS, *EDIT_CONDITIONS)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        raise EditError(
            f"there is no operation {name!r}."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + f" There are: {', '.join(known)}, s/a/b/."
        )
    return name, argument.strip()


def require_argument(argument: str, usage: str) -> str:
    if not argument:
        raise EditError(f"something is missing after the colon; write {usage!r}.")
    return argument


def unquote_text(text: str) -> str:
    """The text inside double quotes as it is, else the text without the spaces around it."""
    text = text.strip()
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text


def split_arrow(text: str, usage: str) -> tuple[str, str]:
    """(left, right) of `left -> right`; either may be quoted."""
    match = re.fullmatch(r'\s*("[^"]*"|.+?)\s*->\s*("[^"]*"|.*?)\s*', text)
    if not match:
        raise EditError(f"it needs an arrow; write {usage!r}.")
    return unquote_text(match[1]), unquote_text(match[2])


def parse_word_list(argument: str, usage: str) -> list[str]:
    found = [unquote_text(word) for word in split_tags(argument)]
    if not found:
        require_argument("", usage)
    return found


def parse_keep_count(argument: str, word: str) -> int:
    """The number in `keep 2`; 0 for nothing."""
    match = re.fullmatch(rf"(?:{word}\s+(\d+))?", argument.casefold())
    if not match:
        raise EditError(
            f"{argument!r} is not understood; write nothing, or {word} and a whole number such as '{word} 2'."
        )
    return int(match[1] or 0)


# -- from captions to captions -----------------------------------------------------------------------------------------


def apply_edits(
    dataset: ImageDataset,
    edits: tuple[CaptionEdit, ...],
    seed: int = 0,
    count_tokens: CountTokens | None = None,
    report: Callable[[int, int, str], None] | None = None,
    check_interrupt: Callable[[], None] | None = None,
) -> ImageDataset:
    """The dataset with every caption edited. An image without a caption is edited as if it had an empty one.

    The order that `shuffle` gives depends on the seed and the image alone. report(done, total, name) is called after
    every image.
    """
    records = []
    for done, record in enumerate(dataset, 1):
        if check_interrupt:
            check_interrupt()
        records.append(edit_record(record, edits, seed, count_tokens))
        if report:
            report(done, len(dataset), Path(record.path).name)
    return replace(dataset, records=tuple(records))


def edit_record(
    record: ImageRecord, edits: tuple[CaptionEdit, ...], seed: int = 0, count_tokens: CountTokens | None = None
) -> ImageRecord:
    """The record with its captions edited; alternatives that became equal or empty are dropped."""
    context = EditContext(record, make_record_rng(record, seed), count_tokens)
    captions = (edit_caption(caption, edits, context) for caption in record.captions or ("",))
    return replace(record, captions=tuple(dict.fromkeys(filter(None, captions))))


def edit_caption(caption: str, edits: tuple[CaptionEdit, ...], context: EditContext) -> str:
    applies = True
    for edit in edits:
        if edit.condition:
            applies = edit.condition(caption)
        elif applies and edit.run:
            try:
                caption = edit.run(caption, context).strip()
            except EditError as error:
                raise ValueError(
                    f"Line {edit.line} of the edits, {edit.text!r}, on {Path(context.record.path).name}: {error}"
                ) from None
    return caption


def list_caption_changes(before: ImageDataset, after: ImageDataset) -> list[CaptionChange]:
    """The changed captions, image by image."""
    pairs = zip(before, after, strict=True)
    return [
        CaptionChange(Path(old.path).name, old.captions, new.captions)
        for old, new in pairs
        if old.captions != new.captions
    ]


def format_edit_preview(before: ImageDataset, after: ImageDataset, show: int = 5) -> str:
    """How many images have changed captions, and the first `show` of them before and after."""
    changed = list_caption_changes(before, after)
    lines = [f"{len(changed)} of {len(before)} images changed"]
    for change in changed[:show]:
        lines += ["", change.name, *(f"- {text}" for text in change.before or ("(no caption)",))]
        lines += [f"+ {text}" for text in change.after or ("(no caption)",)]
    return "\n".join(lines + ([f"\n... and {len(changed) - show} more"] if show < len(changed) else []))


# -- tags --------------------------------------------------------------------------------------------------------------

COMMA_PATTERN = re.compile("[,，、]")


def split_tags(caption: str) -> list[str]:
    """The tags of a caption, without empty ones."""
    return [tag for tag in map(str.strip, COMMA_PATTERN.split(caption)) if tag]


def caption_tag_key(tag: str) -> str:
    """A key that is equal for tags that count as the same."""
    plain = unicodedata.normalize("NFKC", tag).casefold().replace("\\", "").replace("_", " ")
    return " ".join(plain.split()) or tag


def caption_tag_keys(tags) -> set[str]:
    return {caption_tag_key(tag) for tag in tags}


def join_tags(tags, like: str) -> str:
    """The tags joined with the comma that comes first in `like`: western or CJK."""
    comma = COMMA_PATTERN.search(like)
    return (", " if comma is None or comma[0] == "," else comma[0]).join(tags)


def make_tag_edit(change: Callable[[list[str], EditContext], list[str]]) -> ApplyEdit:
    """The edit that applies `change` to the tags of each line. A line whose tags do not change stays as it is."""

    def edit_line(text: str, context: EditContext) -> str:
        after = change(split_tags(text), context)
        return text if after == [part.strip() for part in COMMA_PATTERN.split(text)] else join_tags(after, text)

    return make_line_edit(edit_line)


def make_line_edit(change: ApplyEdit) -> ApplyEdit:
    """The edit that applies `change` to each line of a caption."""

    def edit_lines(text: str, context: EditContext) -> str:
        return "\n".join(change(line, context) for line in text.split("\n"))

    return edit_lines


# Thai, Japanese, Chinese and Korean: scripts without spaces between words.
UNSPACED_SCRIPTS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"


def phrase_pattern(word: str) -> re.Pattern:
    """A pattern that finds the word or phrase as a whole; in scripts without spaces, anywhere."""
    before = (
        "" if re.match(f"[{UNSPACED_SCRIPTS}]", word) or not re.match(r"\w", word) else rf"(?<![^\W{UNSPACED_SCRIPTS}])"
    )
    after = (
        ""
        if re.search(f"[{UNSPACED_SCRIPTS}]$", word) or not re.search(r"\w$", word)
        else rf"(?![^\W{UNSPACED_SCRIPTS}])"
    )
    return re.compile(before + re.escape(word) + after)


def mentions_phrase(caption: str, word: str) -> bool:
    """Whether the caption contains this word or phrase, however it is spelled."""
    return bool(phrase_pattern(caption_tag_key(word)).search(caption_tag_key(caption)))


@register_operation("remove: tag, tag", "removes these tags")
def build_remove_edit(argument):
    unwanted = caption_tag_keys(parse_word_list(argument, "remove: tag, tag"))
    return make_tag_edit(lambda tags, _: [tag for tag in tags if caption_tag_key(tag) not in unwanted])


@register_operation("blacklist: word, word", "removes every tag that contains one of these words")
def build_blacklist_edit(argument):
    unwanted = parse_word_list(argument, "blacklist: word, word")
    return make_tag_edit(
        lambda tags, _: [tag for tag in tags if not any(mentions_phrase(tag, word) for word in unwanted)]
    )


@register_operation("keep: tag, tag", "removes every tag but these")
def build_keep_edit(argument):
    wanted = caption_tag_keys(parse_word_list(argument, "keep: tag, tag"))
    return make_tag_edit(lambda tags, _: [tag for tag in tags if caption_tag_key(tag) in wanted])


@register_operation("swap: tag -> tag; tag -> tag", "puts other tags in the place of these")
def build_swap_edit(argument):
    usage = "swap: tag -> tag; tag -> tag"
    pairs = dict(split_arrow(pair, usage) for pair in require_argument(argument, usage).split(";") if pair.strip())
    replacements = {caption_tag_key(old): split_tags(new) for old, new in pairs.items()}
    return make_tag_edit(lambda tags, _: [new for tag in tags for new in replacements.get(caption_tag_key(tag), [tag])])


@register_operation("dedupe", "removes tags that have been said already")
def build_dedupe_edit(argument):
    reject_argument(argument)
    return make_tag_edit(lambda tags, _: list({caption_tag_key(tag): tag for tag in reversed(tags)}.values())[::-1])


@register_operation("sort", "sorts tags by the alphabet; 'sort: keep 1' leaves the first in place")
def build_sort_edit(argument):
    front = parse_keep_count(argument, "keep")
    return make_tag_edit(
        lambda tags, _: tags[:front] + sorted(tags[front:], key=lambda tag: (caption_tag_key(tag), tag))
    )


@register_operation("shuffle", "shuffles tags by the seed; 'shuffle: keep 2' leaves the first two in place")
def build_shuffle_edit(argument):
    front = parse_keep_count(argument, "keep")

    def shuffle(tags: list[str], context: EditContext) -> list[str]:
        rest = tags[front:]
        return tags[:front] + [rest[i] for i in torch.randperm(len(rest), generator=context.rng).tolist()]

    return make_tag_edit(shuffle)


@register_operation(
    "merge: tags, prose", "joins the image's own tags and its caption, nothing said twice; or 'merge: prose, tags'"
)
def build_merge_edit(argument):
    order = tuple(word.casefold() for word in split_tags(argument))
    if sorted(order) != ["prose", "tags"]:
        raise EditError(f"{argument!r} is not understood; write 'merge: tags, prose' or 'merge: prose, tags'.")

    def merge(caption: str, context: EditContext) -> str:
        tags = join_tags(
            {caption_tag_key(tag): tag for tag in context.record.tags if not mentions_phrase(caption, tag)}.values(),
            caption,
        )
        parts = (tags, caption) if order[0] == "tags" else (caption.rstrip(" ,，、"), tags)
        return join_tags(filter(None, parts), caption)

    return merge


def reject_argument(argument):
    if argument:
        raise EditError(f"nothing is expected after the colon, and there is {argument!r}.")


# -- words -------------------------------------------------------------------------------------------------------------

CLOSING_PUNCTUATION = tuple(",.;:!?)]}，。、；：！？")


@register_operation(
    "trigger: word", "puts the word first, unless the caption names it; a tag of that name moves to the front"
)
def build_trigger_edit(argument):
    word = unquote_text(require_argument(argument, "trigger: sks"))

    def add_trigger(caption: str, context: EditContext) -> str:
        tags = split_tags(caption)
        if caption_tag_key(word) in caption_tag_keys(tags):
            rest = [tag for tag in tags if caption_tag_key(tag) != caption_tag_key(word)]
            return (
                caption
                if caption_tag_key(tags[0]) == caption_tag_key(word) and len(rest) == len(tags) - 1
                else join_tags([word, *rest], caption)
            )
        caption = fill_trigger(caption, word)
        return caption if mentions_phrase(caption, word) else join_tags(filter(None, (word, caption)), caption)

    return add_trigger


@register_operation("prefix: text", "puts the text in front, with a space; in quotes as it stands")
def build_prefix_edit(argument):
    text = require_argument(argument, "prefix: text")
    text = unquote_text(text) if is_quoted(text) else text + " "
    return lambda caption, _: caption if (caption + " ").startswith(text) else text + caption


@register_operation(
    "suffix: text",
    "puts the text at the end, with a space unless it begins with a comma or a stop; in quotes as it stands",
)
def build_suffix_edit(argument):
    text = require_argument(argument, "suffix: text")
    text = unquote_text(text) if is_quoted(text) else text if text.startswith(CLOSING_PUNCTUATION) else " " + text
    return lambda caption, _: caption if (" " + caption).endswith(text.rstrip()) else caption + text


def is_quoted(text: str) -> bool:
    return unquote_text(text) != text.strip()


@register_operation("replace: a -> b", "puts b in the place of a wherever it stands, letter by letter")
def build_replace_edit(argument):
    old, new = split_arrow(argument, "replace: a -> b")
    if not old:
        raise EditError("nothing stands before the arrow; write 'replace: a -> b'.")
    return lambda caption, _: caption.replace(old, new)


@register_operation("lower", "lower-case letters")
def build_lower_edit(argument):
    reject_argument(argument)
    return lambda caption, _: caption.lower()


# Tags that keep their underscores: emoticons, and the quality tags that Pony models were trained with.
BOORU_KAOMOJI = frozenset(
    "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_|| ;_; t_t".split()
)
QUALITY_TAG_PATTERN = re.compile(r"(score|source|rating)_\w+")


@register_operation("underscores: to spaces", "long_hair becomes long hair; emoticons such as ^_^ and score_9 stay")
def build_underscores_edit(argument):
    if argument.casefold() != "to spaces":
        raise EditError(f"{argument!r} is not understood; write 'underscores: to spaces'.")

    def replace_underscores(tag: str) -> str:
        plain = tag.replace("\\", "").casefold()
        return tag if plain in BOORU_KAOMOJI or QUALITY_TAG_PATTERN.fullmatch(plain) else tag.replace("_", " ").strip()

    return make_tag_edit(lambda tags, _: [replace_underscores(tag) for tag in tags])


@register_operation(
    "escape: parentheses", "( becomes \\(, for captions that are used as prompts; training needs no escapes"
)
def build_escape_edit(argument):
    require_parentheses(argument, "escape")
    return lambda caption, _: re.sub(r"(?<!\\)([()])", r"\\\1", caption)


@register_operation("unescape: parentheses", "\\( becomes (")
def build_unescape_edit(argument):
    require_parentheses(argument, "unescape")
    return lambda caption, _: re.sub(r"\\([()])", r"\1", caption)


def require_parentheses(argument, name):
    if argument.casefold() != "parentheses":
        raise EditError(f"{argument!r} is not understood; write '{name}: parentheses'.")


# Openings of captioning models that carry no information. Matched at the beginning of a caption, ignoring case.
MEDIUM_NOUNS = r"(?:image|picture|photo|photograph|painting|drawing|illustration|artwork|scene|screenshot|render)"
DEPICTING_VERBS = r"(?:shows|depicts|features|displays|captures|contains|portrays|presents|illustrates|showcases|is of)"
BOILERPLATE_OPENINGS = (
    rf"(?:this|the)(?: \w+)? {MEDIUM_NOUNS} {DEPICTING_VERBS}",
    rf"in (?:this|the) {MEDIUM_NOUNS},?(?: (?:we|you) (?:can )?see| there (?:is|are))?",
    r"(?:an? )?(?:image|picture|photo|photograph) of",  # not painting or drawing: that is worth learning
    r"(?:we|you) (?:can )?see",
    r"there (?:is|are)",
)
BOILERPLATE_WORDS = (r"\baraf+(?:ed|es?|y)?\b",)  # a word that BLIP made up


@register_operation(
    "strip: boilerplate",
    "removes openings such as 'this image shows' and 'a photo of'; add phrases of your own after a comma",
)
def build_strip_edit(argument):
    phrases = parse_word_list(argument, "strip: boilerplate")
    own = [phrase_pattern(phrase).pattern for phrase in phrases if phrase.casefold() != "boilerplate"]
    openings, anywhere = ((), own) if len(own) == len(phrases) else (BOILERPLATE_OPENINGS, (*BOILERPLATE_WORDS, *own))
    opening = re.compile(rf"\s*(?:{'|'.join(openings)})\b[\s,:]*", re.IGNORECASE) if openings else None
    unwanted = re.compile("|".join(anywhere), re.IGNORECASE)

    def strip_line(caption: str, _: EditContext) -> str:
        text, before = caption, None
        while text != before:
            before = text
            text = tidy_edited_text(unwanted.sub("", text)) if unwanted.search(text) else text
            text = opening.sub("", text, count=1) if opening and opening.match(text) else text
        return text[:1].upper() + text[1:] if caption[:1].isupper() and text != caption else text

    return make_line_edit(strip_line)


def tidy_edited_text(text: str) -> str:
    """The text without the double spaces and orphaned commas that a removed phrase leaves."""
    text = re.sub(r"\s*([,，、])(?:\s*[,，、])+", r"\1", re.sub(r"[^\S\n]{2,}", " ", text))
    return re.sub(r"\s+([,.;，、])", r"\1", text).strip(" ,，、")


# -- length ------------------------------------------------------------------------------------------------------------

TRUNCATED_TAG_WORDS = 5  # a tag of more words than this is prose, and is cut between words


@register_operation(
    "truncate: 75",
    "at most so many tokens (needs CLIP), whole tags and words; or 'truncate: 40 words', 'truncate: 20 tags'",
)
def build_truncate_edit(argument):
    match = re.fullmatch(r"(\d+)\s*(tokens?|words?|tags?)?", argument.casefold())
    if not match or not int(match[1]):
        raise EditError(
            f"{argument!r} is not a length; write a number above 0: 'truncate: 75' (tokens), 'truncate: 40 words' "
            "or 'truncate: 20 tags'."
        )
    limit, measure = int(match[1]), LENGTH_MEASURES[(match[2] or "tokens").rstrip("s")]
    return lambda caption, context: truncate_caption(caption, lambda text: measure(text, context) <= limit)


def truncate_caption(caption: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of whole tags that fits; a long tag (prose) is cut between its words."""
    if fits(caption):
        return caption
    ends = [match.start() for match in COMMA_PATTERN.finditer(caption)]
    kept = longest_fitting_prefix(caption, ends, fits)
    rest = caption[len(kept) :]
    clause = COMMA_PATTERN.split(rest[1:] if kept else rest)[0]
    if kept and len(clause.split()) <= TRUNCATED_TAG_WORDS:
        return kept.rstrip()
    start = caption.index(clause, len(kept))
    ends = [start + match.start() for match in re.finditer(rf"\s+|(?<=[{UNSPACED_SCRIPTS}])", clause)]
    return (longest_fitting_prefix(caption, [end for end in ends if end > start], fits) or kept).rstrip(" ,，、")


def longest_fitting_prefix(text: str, ends: list[int], fits: Callable[[str], bool]) -> str:
    """text[:end] for the largest of `ends` that fits, "" for none; by bisection, because counting tokens is slow."""
    low, high = 0, len(ends)  # ends[:low] fit, ends[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(text[: ends[middle]]) else (low, middle)
    return text[: ends[low - 1]] if low else ""


def count_most_tokens(text: str, context: EditContext) -> int:
    """The number of tokens in the text encoder that counts most."""
    if context.count_tokens is None:
        raise EditError("tokens cannot be counted without a text encoder. Connect CLIP, or write 'truncate: 40 words'.")
    return max(context.count_tokens(text).values(), default=0)


LENGTH_MEASURES = {
    "token": count_most_tokens,
    "word": lambda text, _: len(text.split()),
    "tag": lambda text, _: len(split_tags(text)),
}


# -- regular expressions -----------------------------------------------------------------------------------------------

REGEX_DELIMITERS = set(string.punctuation) - set('\\:"')  # what may stand in place of the slashes
REGEX_FLAGS = {"i": "IGNORECASE", "m": "MULTILINE", "s": "DOTALL"}


def build_substitution(line: str):
    """The edit of s/pattern/replacement/flags, which replaces all matches, or the first with flag 1. A pattern that
    takes too long is an error."""
    import regex  # a dependency of transformers and diffusers; unlike re it has a timeout

    pattern, new, flags = split_substitution(line)
    if unknown := set(flags) - {*REGEX_FLAGS, "g", "1"}:
        raise EditError(
            f"the flags {''.join(sorted(unknown))!r} are unknown; possible are i (ignore case), 1 (the first only), m, "
            "s and g."
        )
    try:
        options = sum(getattr(regex, REGEX_FLAGS[flag]) for flag in set(flags) & set(REGEX_FLAGS))
        compiled = regex.compile(pattern, options)
        # A wrong replacement is noticed only where something matches, so let the empty alternative match.
        regex.sub(f"{pattern}|", new, "", flags=options)
    except (regex.error, IndexError) as error:
        position = getattr(error, "pos", None)
        place = f" at character {position + 1}" if position is not None else ""
        raise EditError(
            f"{pattern!r} -> {new!r} is not a regular expression{place}: {getattr(error, 'msg', error)}."
        ) from None

    def run(caption, _):
        try:
            return compiled.sub(new, caption, count=1 if "1" in flags else 0, timeout=REGEX_TIMEOUT_SECONDS)
        except TimeoutError:
            raise EditError(
                f"the pattern took more than {REGEX_TIMEOUT_SECONDS:g} s on {caption[:60]!r}; repeats inside repeats, "
                "such as (a+)+, do that."
            ) from None
        except (regex.error, IndexError) as error:
            raise EditError(f"{new!r} does not fit the pattern: {error}.") from None

    return run


def split_substitution(line: str) -> tuple[str, str, str]:
    """(pattern, replacement, flags); a delimiter after a backslash is part of the text."""
    mark = re.escape(line[1])
    part = rf"((?:\\.|[^\\{mark}])*)"
    match = re.fullmatch(f"s{mark}{part}{mark}{part}{mark}(\\w*)", line)
    if not match or not match[1]:
        raise EditError(
            f"it is not a substitution; write 's{line[1]}pattern{line[1]}replacement{line[1]}', and \\{line[1]} for "
            f"a {line[1]!r} in the text."
        )
    pattern, new = (text.replace(f"\\{line[1]}", line[1]) for text in match.groups()[:2])
    return pattern, new, match[3]


# -- conditions --------------------------------------------------------------------------------------------------------


def build_only_condition(argument: str):
    """The condition that a caption contains one of these words; without words it always holds."""
    words = split_tags(argument)
    return lambda caption: not words or any(mentions_phrase(caption, word) for word in words)


def build_unless_condition(argument: str):
    """The condition that a caption contains none of these words."""
    words = parse_word_list(argument, "unless: word")
    return lambda caption: not any(mentions_phrase(caption, word) for word in words)


EDIT_CONDITIONS = {"only": build_only_condition, "unless": build_unless_condition}
