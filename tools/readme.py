"""The README's tables of nodes and workflows: a row for each, in words that may be bettered by hand."""

from __future__ import annotations

import pathlib
import re

from . import workflows

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLES = {"data": "datasets", "train": "training", "scores": "scores"}  # folder of nodes/ -> head of its table


def add_rows(readme: str, head: str, rows: dict[str, str]) -> str:
    """The README with a row at the end of the table whose first head is `head`, for each name that has none anywhere."""
    missing = [f"| {name} | {text} |\n" for name, text in rows.items() if f"\n| {name} |" not in readme]
    if not missing:
        return readme
    table = re.search(rf"^\| {head} \|.*\n(?:\|.*\n)*", readme, re.M)
    if table is None:
        raise ValueError(f"README.md has no table that begins with `| {head} |`, for {', '.join(rows)}.")
    return readme[: table.end()] + "".join(missing) + readme[table.end() :]


def node_folders() -> dict[str, str]:
    """Folder of nodes/ in which each node is written, by node id."""
    found = {}
    for file in sorted((ROOT / "nodes").glob("*/*.py")):
        for node_id in re.findall(r'node_id ?= ?"(\w+)"', file.read_text("utf-8")):
            found[node_id] = file.parent.name
    return found


def write_readme(schemas: dict) -> list[pathlib.Path]:
    """[README.md] when rows were added: a node's first sentence, what a workflow's source says comes out of it."""
    path, folders = ROOT / "README.md", node_folders()
    readme = known = path.read_text("utf-8")
    for node_id, schema in schemas.items():
        sentence = schema["description"].split(". ")[0].rstrip(".").replace("|", "/")
        readme = add_rows(readme, TABLES[folders[node_id]], {schema["display_name"]: sentence})
    readme = add_rows(
        readme, "workflow", {name: workflows.load_source(name).RESULT for name in workflows.source_names()}
    )
    if readme == known:
        return []
    path.write_text(readme, encoding="utf-8")
    return [path]
