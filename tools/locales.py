"""Texts of all nodes for translators, and what a translation still lacks.

    .venv/bin/python tools/locales.py                    # writes locales/en/nodeDefs.json from the nodes themselves
    .venv/bin/python tools/locales.py check              # names every text that another language lacks, or has too much
    .venv/bin/python tools/locales.py todo zh > new.json # the English texts that Chinese lacks, to be filled in:
    {English: ""} .venv/bin/python tools/locales.py fill zh new.json   # puts them where they belong; a key may also be
    a path that `check` names

When an English text changes, the first command takes its old translation out of the other languages, so that `check`
asks for a new one; a sentence that only moved takes its translation along. ComfyUI reads
locales/<language>/nodeDefs.json; a text that is not there is shown as the node has it.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"


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


def english() -> dict:
    """The texts of every node of the pack, by node id."""
    package = types.ModuleType("trainyard")
    package.__path__ = [str(ROOT)]
    sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]  # our `nodes` would hide ComfyUI's
    sys.modules.setdefault("trainyard", package)
    from trainyard.tests.comfy import boot

    boot.boot()
    from trainyard.nodes import TrainyardExtension

    return {
        cls.GET_SCHEMA().node_id: texts(vars_of(cls.GET_NODE_INFO_V1()))
        for cls in asyncio.run(TrainyardExtension().get_node_list())
    }


def vars_of(info) -> dict:
    return info if isinstance(info, dict) else vars(info)


def read(language: str) -> dict:
    """A language's texts; none when there is no such file."""
    file = LOCALES / language / "nodeDefs.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def write(language: str, texts: dict):
    """Writes a language's texts, unless they are in its file already."""
    file = LOCALES / language / "nodeDefs.json"
    if texts != read(language):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(texts, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{language}: {len(flat(texts))} texts of {len(texts)} nodes")


def languages() -> list[str]:
    """Every language but English, which is the nodes' own."""
    return sorted(file.parent.name for file in LOCALES.glob("*/nodeDefs.json") if file.parent.name != "en")


def rewrite(now: dict):
    """English as the nodes have it now, and every other language without the translations of texts that changed."""
    before = read("en")
    for language in languages():
        write(language, carried(before, now, read(language)))
    write("en", now)


def check(now: dict) -> bool:
    """Prints what each language lacks or has too much; true when that is anything."""
    found = read("en") != now
    if found:
        print("en: the nodes say something else by now; run tools/locales.py without `check` first")
    for language in languages():
        missing, stale = differences(now, read(language))
        print(f"{language}: {len(missing)} missing, {len(stale)} of no node", *missing[:20], *stale[:20], sep="\n  ")
        found |= bool(missing or stale)
    return found


def todo(language: str) -> dict[str, str]:
    """English texts that a language lacks, each once, with nothing as their translation."""
    english = flat(read("en"))
    return {english[path]: "" for path in differences(read("en"), read(language))[0]}


def main(order="", language="", words="") -> int:
    if order == "todo":
        print(json.dumps(todo(language), indent=1, ensure_ascii=False))
    elif order == "fill":
        write(language, filled(read("en"), read(language), json.loads(pathlib.Path(words).read_text("utf-8"))))
    elif order == "check":
        return check(english())
    else:
        rewrite(english())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
