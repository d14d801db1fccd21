"""The bundled workflows: each is described in tools/sources/<name>.py and written as workflows/<name>.json (what the page
opens) and workflows/api/<name>.json (its twin, an API prompt).

A description says what differs from the defaults: RESULT (its row in the README), NOTE and NOTE_SIZE (the note at the
left), and build(workflow), which adds groups of nodes. A workflow without a description was made in the page; its twin is
derived from it all the same.
"""

from __future__ import annotations

import importlib
import json
import pathlib

from trainyard.tests.workflows.convert import to_api

from .workflow_builder import WorkflowBuilder

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"
PLACING = ("pos", "size")  # where a node lies says nothing about what it does


def source_names() -> list[str]:
    """Names of all workflows that are described in tools/sources/."""
    return sorted(file.stem for file in (ROOT / "tools" / "sources").glob("[0-9]*.py"))


def load_source(name: str):
    return importlib.import_module(f"trainyard.tools.sources.{name}")


def build_workflow(name: str, schemas: dict) -> dict:
    """A described workflow as the page saves it."""
    source = load_source(name)
    workflow = WorkflowBuilder(name, source.NOTE, source.NOTE_SIZE, schemas)
    source.build(workflow)
    return workflow.to_page()


def without_layout(workflow: dict) -> dict:
    """What a workflow does and says, without where its nodes lie."""
    nodes = [{key: value for key, value in node.items() if key not in PLACING} for node in workflow["nodes"]]
    groups = [{key: value for key, value in group.items() if key != "bounding"} for group in workflow["groups"]]
    return workflow | {"nodes": nodes, "groups": groups}


def write_workflows(schemas: dict, laid_out: tuple[str, ...] = ()) -> list[pathlib.Path]:
    """The files that changed. A file whose nodes, links and texts are the described ones keeps its layout, unless its
    name begins with one of `laid_out`."""
    changed = []
    for name in source_names():
        path, built = FOLDER / f"{name}.json", build_workflow(name, schemas)
        known = json.loads(path.read_text("utf-8")) if path.is_file() else None
        if known is None or without_layout(known) != without_layout(built) or name.startswith(tuple(laid_out)):
            changed += write_json(path, built)
    for path in sorted(FOLDER.glob("*.json")):
        changed += write_json(FOLDER / "api" / path.name, to_api(json.loads(path.read_text("utf-8")), schemas))
    return changed


def write_json(path: pathlib.Path, tree: dict) -> list[pathlib.Path]:
    """[path] when its file was written, [] when it held the same text already."""
    text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
    if path.is_file() and path.read_text("utf-8") == text:
        return []
    path.write_text(text, encoding="utf-8")
    return [path]
