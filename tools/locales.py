"""Texts of all nodes for translators, and what a translation still lacks.

    .venv/bin/python tools/locales.py             # writes locales/en/nodeDefs.json from the nodes themselves
    .venv/bin/python tools/locales.py check       # names every text that another language lacks, or has too much

ComfyUI reads locales/<language>/nodeDefs.json; a text that is not there is shown as the node has it.
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
    outputs = {str(i): {"name": name, "tooltip": tip or ""} for i, (name, tip) in enumerate(zip(schema["output_name"], tips, strict=True))}
    return {"display_name": schema["display_name"], "description": schema["description"], "inputs": inputs, "outputs": outputs}


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


def english() -> dict:
    """The texts of every node of the pack, by node id."""
    package = types.ModuleType("trainyard")
    package.__path__ = [str(ROOT)]
    sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]  # our `nodes` would hide ComfyUI's
    sys.modules.setdefault("trainyard", package)
    from trainyard.tests.comfy import boot

    boot.boot()
    from trainyard.nodes import TrainyardExtension

    return {cls.GET_SCHEMA().node_id: texts(vars_of(cls.GET_NODE_INFO_V1())) for cls in asyncio.run(TrainyardExtension().get_node_list())}


def vars_of(info) -> dict:
    return info if isinstance(info, dict) else vars(info)


def main():
    now = english()
    if sys.argv[1:] != ["check"]:
        path = LOCALES / "en" / "nodeDefs.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{path}: {len(flat(now))} texts of {len(now)} nodes")
        return 0
    lacking = 0
    for file in sorted(LOCALES.glob("*/nodeDefs.json")):
        missing, stale = differences(now, json.loads(file.read_text("utf-8")))
        print(f"{file.parent.name}: {len(missing)} missing, {len(stale)} of no node", *missing[:20], *stale[:20], sep="\n  ")
        lacking += len(missing) + len(stale)
    return bool(lacking)


if __name__ == "__main__":
    sys.exit(main())
