"""A workflow as the page saves it -> the prompt that the page would send. The browser test holds this against the page
itself."""

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DRAWN = ("Note", "MarkdownNote")  # exist in the page only


def to_api(workflow, schemas):
    """{node id: {class_type, inputs, _meta}}. `schemas` as /object_info gives them. No subgraphs, reroutes or bypassed
    nodes."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): prompt_node(node, schemas[node["type"]], sources)
        for node in workflow["nodes"]
        if node["type"] not in DRAWN
    }


def prompt_node(node, schema, sources):
    links = {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
    title = node.get("title") or schema["display_name"] or node["type"]
    return {"inputs": widget_values(node, schema) | links, "class_type": node["type"], "_meta": {"title": title}}


def widget_values(node, schema):
    """The saved values by input name. They are saved by position, and a seed is followed by what happens to it after a
    run."""
    values, named = iter(node["widgets_values"]), {}
    for name, kind, about in widgets(schema):
        value = next(values, about.get("default"))
        named[name] = value
        if controlled(name, kind, about):
            next(values, None)
    return named


def widgets(schema):
    """(name, kind, options) of every input that is a widget, in the order of the node."""
    for group in ("required", "optional"):
        for name, (kind, *about) in schema["input"].get(group, {}).items():
            kind = "COMBO" if isinstance(kind, list) else kind
            about = about[0] if about else {}
            if kind in WIDGETS and not about.get("forceInput"):
                yield name, kind, about


def controlled(name, kind, about):
    """The page adds `control after generate` to what asks for it, and to every whole number that is called seed."""
    return bool(about.get("control_after_generate")) or (kind == "INT" and name in ("seed", "noise_seed"))
