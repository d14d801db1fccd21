"""What saved workflows and prompts depend on in every node: kept in nodes.json, and compared with the nodes as they are.

Ids, names, order, types, defaults and ranges are promises; texts may change freely. Widget values are saved by position:
a new input is appended, never inserted.
"""

import json
import pathlib

FILE = pathlib.Path(__file__).with_name("nodes.json")
READ_FROM_DISK = (
    "folder",
    "file",
    "masks",
    "controls",
    "model",
    "pooler",
    "labels",
)  # their options are what the machine holds
AS_IN_KSAMPLER = ("sampler", "scheduler")  # theirs are ComfyUI's own, and known from there
FACTS = ("default", "min", "max", "step", "options", "multiline", "advanced", "control_after_generate")


def schema_promises(schema) -> dict:
    """Inputs and outputs of one node, from its schema as /object_info gives it."""
    inputs = [
        {"name": name, "kind": "COMBO" if isinstance(kind, list) else kind, "group": group} | input_facts(name, *about)
        for group in ("required", "optional")
        for name, (kind, *about) in schema["input"].get(group, {}).items()
    ]
    outputs = [{"name": name, "kind": kind} for name, kind in zip(schema["output_name"], schema["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs}


def input_facts(name, about=None) -> dict:
    return {
        key: about[key]
        for key in FACTS
        if key in (about or {}) and not (key == "options" and name in READ_FROM_DISK + AS_IN_KSAMPLER)
    }


def all_promises(schemas) -> dict:
    """Of all these nodes, as nodes.json holds them."""
    return json.loads(json.dumps({name: schema_promises(schemas[name]) for name in sorted(schemas)}))


def known_promises() -> dict:
    return json.loads(FILE.read_text("utf-8"))


def changed_nodes(known: dict, found: dict) -> list[str]:
    """Ids of known nodes that promise something else by now, or are gone. A node that is new breaks no promise."""
    return sorted(name for name in known if known[name] != found.get(name))


def write_promises(promises: dict) -> list[pathlib.Path]:
    """[nodes.json] when it was written, [] when it held the same already."""
    text = json.dumps(promises, indent=1) + "\n"
    if FILE.is_file() and FILE.read_text("utf-8") == text:
        return []
    FILE.write_text(text, encoding="utf-8")
    return [FILE]
