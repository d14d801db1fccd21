"""Builds one workflow from a short description: nodes, links and groups, laid out and written as ComfyUI's page saves
it."""

from __future__ import annotations

import uuid

from trainyard.tests.workflows.convert import DRAWN, WIDGETS, controlled, widgets

BLUE, GREEN, VIOLET, BROWN = "#3f789e", "#8A8", "#b06fbf", "#a1683b"  # colours of groups
TITLE_PX, PADDING_PX, GAP_PX = 30, 20, 30  # a node's title bar, the inside of a group, between two nodes
SOCKET_PX, WIDGET_PX, TEXT_WIDGET_PX = 20, 24, 110  # heights of a socket, a widget, a widget of several lines


class WorkflowBuilder:
    """A workflow in the making. A node has a key; links are written `{input: "key.output"}`.

    `schemas`: every node's schema by id, as ComfyUI's /object_info gives them.
    """

    def __init__(self, name: str, note: str, note_size: tuple[int, int], schemas: dict):
        self.name, self.schemas, self.nodes, self.groups = name, schemas, {}, []
        self.add_node("note", "MarkdownNote", (0, -80), note_size, {"": note})

    def add_node(self, key, node_id, position, size, widgets=None, links=None, title=None, properties=None):
        """`widgets`: the values that differ from the node's defaults. `title`: shown in place of the node's name."""
        self.nodes[key] = dict(
            node_id=node_id,
            position=position,
            size=size,
            widgets=widgets or {},
            links=links or {},
            title=title,
            properties=properties or {},
        )

    def add_group(self, title, colour, left, top, *columns):
        """A titled frame around columns of nodes. Each column is (width, [node, ...]), each node (key, node id, height,
        widgets, links[, title[, properties]]). `height` leaves room for what a node shows after a run; no node is made
        lower than its own inputs."""
        x, bottom = left + PADDING_PX, top
        for width, column in columns:
            y = top + 50 + TITLE_PX
            for key, node_id, height, *rest in column:
                if node_id in self.schemas:
                    height = max(height, minimum_node_height(self.schemas[node_id]))
                self.add_node(key, node_id, (x, y), (width, height), *rest)
                bottom, y = max(bottom, y + height), y + height + TITLE_PX + GAP_PX
            x += width + GAP_PX
        bounds = [left, top, x - left - GAP_PX + PADDING_PX, bottom - top + PADDING_PX]
        self.groups.append(dict(title=title, colour=colour, bounds=bounds))

    def to_page(self) -> dict:
        """The workflow as the page saves it. ValueError for a node or an input that this ComfyUI does not have."""
        if missing := sorted({node["node_id"] for node in self.nodes.values()} - set(self.schemas) - set(DRAWN)):
            raise ValueError(f"{self.name}: this ComfyUI has no node {', '.join(missing)}; did the pack fail to load?")
        numbers = {key: number for number, key in enumerate(self.nodes, 1)}
        links = []
        nodes = [self.page_node(order, node, numbers, links) for order, node in enumerate(self.nodes.values())]
        for number, source, output, *_ in links:
            nodes[source - 1]["outputs"][output]["links"].append(number)
        groups = [
            {
                "id": number,
                "title": group["title"],
                "bounding": group["bounds"],
                "color": group["colour"],
                "font_size": 24,
                "flags": {},
            }
            for number, group in enumerate(self.groups, 1)
        ]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"trainyard/{self.name}")),
            "revision": 0,
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [100, 220]}},
            "version": 0.4,
        }

    def page_node(self, order, node, numbers, links) -> dict:
        """One node as the page saves it; its links are appended to `links`."""
        number = order + 1
        made = {
            "id": number,
            "type": node["node_id"],
            "pos": list(node["position"]),
            "size": list(node["size"]),
            "flags": {},
            "order": order,
            "mode": 0,
        }
        schema = self.schemas.get(node["node_id"])
        if schema is None:  # a note: the page draws it, the server does not know it
            return made | {
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": list(node["widgets"].values()),
            }
        slots = ordered_slots(schema)
        if unknown := sorted((node["widgets"].keys() | node["links"].keys()) - {name for name, *_ in slots}):
            raise ValueError(
                f"{self.name}: {node['node_id']} has no input {', '.join(unknown)}; it has "
                f"{', '.join(name for name, *_ in slots)}."
            )
        inputs = [self.page_input(number, index, *slot, node, numbers, links) for index, slot in enumerate(slots)]
        outputs = [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip(schema["output_name"], schema["output"], strict=True)
        ]
        made |= {
            "inputs": inputs,
            "outputs": outputs,
            "properties": {"Node name for S&R": node["node_id"], **node["properties"]},
            "widgets_values": widget_values(schema, node["widgets"]),
        }
        return made | ({"title": node["title"]} if node["title"] else {})

    def page_input(self, number, index, name, kind, optional, is_widget, node, numbers, links) -> dict:
        """One input as the page saves it; its link, if any, is appended to `links`."""
        link = None
        if name in node["links"]:
            key, _, output = node["links"][name].partition(".")
            source = self.schemas[self.nodes[key]["node_id"]]
            slot = source["output_name"].index(output)
            link = len(links) + 1
            links.append([link, numbers[key], slot, number, index, source["output"][slot]])
        shape = {"shape": 7} if optional and not is_widget else {}
        return {"name": name, "type": kind} | shape | ({"widget": {"name": name}} if is_widget else {}) | {"link": link}


def ordered_slots(schema) -> list[tuple[str, str, bool, bool]]:
    """(name, type, optional, is a widget) of every input: sockets first, then widgets, as the page orders them."""
    found = []
    for group in ("required", "optional"):
        for name, (kind, *about) in schema["input"].get(group, {}).items():
            kind = "COMBO" if isinstance(kind, list) else kind
            is_widget = kind in WIDGETS and not (about and about[0].get("forceInput"))
            found.append((name, kind, group == "optional", is_widget))
    return [slot for slot in found if not slot[3]] + [slot for slot in found if slot[3]]


def minimum_node_height(schema) -> int:
    """px that the page gives a node at least: its rows of sockets, then its widgets (litegraph's computeSize)."""
    sockets = sum(not is_widget for *_, is_widget in ordered_slots(schema))
    rows = max(sockets, len(schema["output_name"]), 1)
    drawn = sum(
        TEXT_WIDGET_PX if about.get("multiline") else WIDGET_PX * (1 + controlled(name, kind, about))
        for name, kind, about in widgets(schema)
    )
    return SOCKET_PX * rows + drawn + PADDING_PX


def widget_values(schema, chosen: dict) -> list:
    """The values of all widgets, by position: the chosen ones, else the defaults."""
    values = []
    for name, kind, about in widgets(schema):
        first = about.get("options", [None])[0] if kind == "COMBO" else None
        values.append(chosen.get(name, about.get("default", first)))
        values += ["fixed"] if controlled(name, kind, about) else []
    return values
