"""Texts of all nodes for translators, and what a translation still lacks.

    make refresh                                         # writes locales/en/nodeDefs.json from the nodes themselves
    .venv/bin/python tools/locales.py                    # names every text that another language lacks
    .venv/bin/python tools/locales.py todo zh > new.json # the English texts that Chinese lacks, to be filled in:
    {English: ""} .venv/bin/python tools/locales.py fill zh new.json   # puts them where they belong; a key may also be
    the path of a text

When an English text changes, `make refresh` takes its old translation out of the other languages; a sentence that only
moved takes its translation along. ComfyUI reads locales/<language>/nodeDefs.json, and its page shows a text that is not
there as the node has it, in English; the pack's own page does the same with the words of main.json. So nobody has to
translate in order to change a node.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOCALES, WEB = ROOT / "locales", ROOT / "web"


def texts(schema: dict) -> dict:
    """The translatable texts of one node, from what ComfyUI tells its page about it."""
    inputs = {}
    for group in ("required", "optional"):
        for name, (_, *about) in schema["input"].get(group, {}).items():
            about = about[0] if about else {}
            inputs[name] = {"name": about.get("display_name") or name, "tooltip": about.get("tooltip", "")}
    tips = schema.get("output_tooltips") or [""] * len(schema["output_name"])
    outputs = {
        str(i): {"name": name, "tooltip": tip or ""}
        for i, (name, tip) in enumerate(zip(schema["output_name"], tips, strict=True))
    }
    return {
        "display_name": schema["display_name"],
        "description": schema["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def flat(tree: dict, prefix: tuple = ()) -> dict[str, str]:
    """Path -> text of every text that is not empty."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, (*prefix, key))
        elif value:
            out["/".join((*prefix, key))] = value
    return out


def differences(english: dict, translated: dict) -> tuple[list[str], list[str]]:
    """(paths that the translation lacks, paths that no node has any more)."""
    wanted, given = flat(english), flat(translated)
    return sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())


def tree(texts: dict[str, str]) -> dict:
    """The nested form of path -> text, as ComfyUI reads it."""
    out = {}
    for path, text in texts.items():
        *way, last = path.split("/")
        place = out
        for key in way:
            place = place.setdefault(key, {})
        place[last] = text
    return out


def carried(before: dict, now: dict, translated: dict) -> dict:
    """The translation of `now`, from one of `before`: texts that changed are left out, sentences that moved keep their
    translation."""
    old, new, given = flat(before), flat(now), flat(translated)
    sentences = {text: given[path] for path, text in old.items() if path in given and not is_label(path)}
    kept = {path: given[path] for path, text in new.items() if old.get(path) == text and path in given}
    moved = {path: sentences[text] for path, text in new.items() if text in sentences and not is_label(path)}
    return tree(moved | kept)


def is_label(path: str) -> bool:
    """Whether a text is the name of an input or output: one word of English may need two of another language in two
    nodes."""
    return path.endswith("/name")


def filled(english: dict, translated: dict, words: dict[str, str]) -> dict:
    """The translation with `words` put in, whose keys are English texts that have none yet, or paths."""
    wanted, given = flat(english), flat(translated)
    unknown = sorted(key for key in words if key not in wanted and key not in wanted.values())
    if unknown:
        raise KeyError(
            f"{len(unknown)} keys are no English text and no path, the first: {unknown[0]!r}. Run `todo` again, the "
            "nodes changed."
        )
    new = {path: words[text] for path, text in wanted.items() if words.get(text) and path not in given}
    named = {path: words[path] for path in wanted if words.get(path)}
    return tree(given | new | named)


def read(language: str) -> dict:
    """A language's texts; none when there is no such file."""
    file = LOCALES / language / "nodeDefs.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def write(language: str, texts: dict) -> list[pathlib.Path]:
    """[the language's file] when these texts were written to it, [] when they were in it already."""
    file = LOCALES / language / "nodeDefs.json"
    if texts == read(language):
        return []
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(texts, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return [file]


def languages() -> list[str]:
    """Every language but English, which is the nodes' own."""
    return sorted(file.parent.name for file in LOCALES.glob("*/nodeDefs.json") if file.parent.name != "en")


def write_locales(schemas: dict) -> list[pathlib.Path]:
    """The files that changed: English as the nodes have it now, and every other language without the translations of
    texts that changed."""
    before, now = read("en"), {name: texts(schema) for name, schema in schemas.items()}
    changed = [file for language in languages() for file in write(language, carried(before, now, read(language)))]
    return changed + write("en", now)


def report_missing() -> list[str]:
    """A line for each language that lacks texts; the page shows those in English."""
    lines = []
    for language in languages():
        nodes, words = (
            differences(read("en"), read(language))[0],
            sorted(page_words() - read_page_words(language).keys()),
        )
        if nodes or words:
            shown = ", ".join([*nodes, *words][:5]) + (", ..." if len(nodes) + len(words) > 5 else "")
            lines.append(
                f"{language}: {len(nodes)} texts of nodes and {len(words)} words of the page have no translation: {shown}"
            )
    return lines


# -- the page's own words ----------------------------------------------------------------------------------------------
WORD = re.compile(r"\bword\('([^']+)'")
ACT = re.compile(r"\bact\('([^']+)', '([^']+)'")
CHOSEN = (  # where the word depends on the run: its status, what was measured, which cards are shown
    *("training", "stopped", "finished", "failed"),
    *(
        f"{how} {noun}"
        for how, nouns in (
            ("fixed", ("pictures", "pairs", "points")),
            ("trained", ("pictures", "pairs", "points", "scores")),
        )
        for noun in nouns
    ),
    *("minus the score", "minus the held-out score", "validation", "all", "edited", "without caption"),
    *("No picture matches the filter.", "Run to see the pictures."),
)


def page_words() -> set[str]:
    """The English words and sentences that the scripts in web/ show."""
    found = set(CHOSEN)
    for file in (*WEB.glob("*.js"), *WEB.glob("*.mjs")):
        text = file.read_text("utf-8")
        found |= set(WORD.findall(text)) | {part for pair in ACT.findall(text) for part in pair}
    return found


def read_page_words(language: str) -> dict[str, str]:
    """A language's words of the page, by their English."""
    file = LOCALES / language / "main.json"
    return json.loads(file.read_text("utf-8")).get("trainyard", {}) if file.is_file() else {}


# -- for translators ---------------------------------------------------------------------------------------------------
def todo(language: str) -> dict[str, str]:
    """English texts that a language lacks, each once, with nothing as their translation."""
    english = flat(read("en"))
    return {english[path]: "" for path in differences(read("en"), read(language))[0]}


def main(order="", language="", words="") -> int:
    if order == "todo":
        print(json.dumps(todo(language), indent=1, ensure_ascii=False))
    elif order == "fill":
        write(language, filled(read("en"), read(language), json.loads(pathlib.Path(words).read_text("utf-8"))))
    else:
        print(*(report_missing() or ["Every text is translated."]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
