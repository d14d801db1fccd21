"""A workflow under construction: nodes, links and groups, laid out and written as ComfyUI's page saves it."""

from __future__ import annotations

import uuid
from typing import ClassVar

BLUE, GREEN, VIOLET, BROWN = "#3f789e", "#8A8", "#b06fbf", "#a1683b"


TITLE, PAD, GAP = 30, 20, 30


SLOT, LINE, LINES = 20, 24, 110  # px of a socket, a widget, a widget of several lines


CHECKPOINT = {"models": [{"name": "v1-5-pruned-emaonly-fp16.safetensors", "directory": "checkpoints", "url":
              "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors"}]}  # fmt: skip


class Flow:
    """One workflow in the making. Columns of nodes inside titled groups; links by `node.output`."""

    schemas: ClassVar[dict] = {}  # of ComfyUI; main() fills it before the first workflow is made

    def __init__(self, name: str, note: str, size=(380, 560)):
        self.name, self.nodes, self.groups = name, {}, []
        self.add("note", "MarkdownNote", (0, -80), size, {"": note})

    def add(self, key, kind, at, size, widgets=None, links=None, title=None, properties=None):
        self.nodes[key] = dict(
            kind=kind,
            at=at,
            size=size,
            widgets=widgets or {},
            links=links or {},
            title=title,
            properties=properties or {},
        )

    def group(self, title, colour, left, top, *columns):
        """Columns of (key, kind, height, widgets, links[, title]) from left to right, each (width, [nodes]); a frame
        around them all. `height` is for what a node shows after a run; no node is lower than its own inputs."""
        x, low = left + PAD, top
        for width, column in columns:
            y = top + 50 + TITLE
            for key, kind, height, *rest in column:
                height = max(height, least_height(self.schemas[kind]) if kind in self.schemas else 0)
                self.add(key, kind, (x, y), (width, height), *rest)
                low, y = max(low, y + height), y + height + TITLE + GAP
            x += width + GAP
        self.groups.append(
            dict(title=title, colour=colour, bounding=[left, top, x - left - GAP + PAD, low - top + PAD])
        )
        return left, low + PAD

    def build(self, schemas):
        from trainyard.tests.workflows.convert import DRAWN

        if missing := sorted({n["kind"] for n in self.nodes.values()} - set(schemas) - set(DRAWN)):
            raise ValueError(f"{self.name}: this ComfyUI has no node {', '.join(missing)}; did the pack fail to load?")
        numbers = {key: number for number, key in enumerate(self.nodes, 1)}
        links, built = [], []
        for order, (key, node) in enumerate(self.nodes.items()):
            schema = schemas.get(node["kind"])
            built.append(self.node(numbers[key], order, node, schema, numbers, schemas, links))
        for number, source, slot, *_ in links:
            next(n for n in built if n["id"] == source)["outputs"][slot]["links"].append(number)
        groups = [
            {
                "id": i,
                "title": g["title"],
                "bounding": g["bounding"],
                "color": g["colour"],
                "font_size": 24,
                "flags": {},
            }
            for i, g in enumerate(self.groups, 1)
        ]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"trainyard/{self.name}")), "revision": 0, "last_node_id": len(built),
            "last_link_id": len(links), "nodes": built, "links": links, "groups": groups, "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [100, 220]}}, "version": 0.4,
        }  # fmt: skip

    def node(self, number, order, node, schema, numbers, schemas, links):
        made = {
            "id": number,
            "type": node["kind"],
            "pos": list(node["at"]),
            "size": list(node["size"]),
            "flags": {},
            "order": order,
            "mode": 0,
        }
        if schema is None:
            return made | {
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": list(node["widgets"].values()),
            }
        inputs = [
            self.slot(number, index, *entry, node, numbers, schemas, links) for index, entry in enumerate(slots(schema))
        ]
        unknown = (set(node["widgets"]) | set(node["links"])) - {slot["name"] for slot in inputs}
        if unknown:
            raise ValueError(
                f"{self.name}: {node['kind']} has no input {', '.join(sorted(unknown))}; it has "
                f"{', '.join(s['name'] for s in inputs)}."
            )
        outputs = [
            {"name": n, "type": t, "links": []} for n, t in zip(schema["output_name"], schema["output"], strict=True)
        ]
        title = {"title": node["title"]} if node["title"] else {}
        properties = {"Node name for S&R": node["kind"], **node["properties"]}
        return (
            made
            | {
                "inputs": inputs,
                "outputs": outputs,
                "properties": properties,
                "widgets_values": values(schema, node["widgets"]),
            }
            | title
        )

    def slot(self, number, index, name, kind, optional, widget, node, numbers, schemas, links):
        link = None
        if name in node["links"]:
            key, _, output = node["links"][name].partition(".")
            source = schemas[self.nodes[key]["kind"]]
            at = source["output_name"].index(output)
            link = len(links) + 1
            links.append([link, numbers[key], at, number, index, source["output"][at]])
        shape = {"shape": 7} if optional and not widget else {}
        return {"name": name, "type": kind} | shape | ({"widget": {"name": name}} if widget else {}) | {"link": link}


def slots(schema):
    """(name, kind, optional, is a widget): sockets first, then widgets, as the page orders them."""
    from trainyard.tests.workflows.convert import WIDGETS

    found = []
    for group in ("required", "optional"):
        for name, (kind, *about) in schema["input"].get(group, {}).items():
            kind = "COMBO" if isinstance(kind, list) else kind
            widget = kind in WIDGETS and not (about and about[0].get("forceInput"))
            found.append((name, kind, group == "optional", widget))
    return [entry for entry in found if not entry[3]] + [entry for entry in found if entry[3]]


def least_height(schema) -> int:
    """px that the page gives a node at least: its rows of sockets, then its widgets (litegraph's computeSize)."""
    from trainyard.tests.workflows.convert import controlled, widgets

    sockets = sum(not widget for *_, widget in slots(schema))
    rows = max(sockets, len(schema["output_name"]), 1)
    drawn = sum(
        LINES if about.get("multiline") else LINE * (1 + controlled(name, kind, about))
        for name, kind, about in widgets(schema)
    )
    return SLOT * rows + drawn + PAD


def values(schema, chosen):
    from trainyard.tests.workflows.convert import controlled, widgets

    out = []
    for name, kind, about in widgets(schema):
        out.append(chosen.get(name, about.get("default", about.get("options", [None])[0] if kind == "COMBO" else None)))
        out += ["fixed"] if controlled(name, kind, about) else []
    return out
