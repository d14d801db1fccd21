"""The bundled workflows, from short descriptions: UI file and API twin, with every widget in its place.

    .venv/bin/python tools/workflows.py            # all that are described here
    .venv/bin/python tools/workflows.py 03         # those whose name begins so

A description names nodes, their place, the widgets that differ from the default and what is connected to what. The
schemas come from a real ComfyUI server, so a widget that was added later is in the right position after running this
again.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def schemas_of_comfyui():
    from trainyard.tests.comfy.server import Server

    with tempfile.TemporaryDirectory() as base, Server(pathlib.Path(base)) as server:
        return server.object_info()


def main():
    import trainyard_plugin  # noqa: F401 - the alias package
    from descriptions import FLOWS
    from flow import Flow
    from trainyard.tests.workflows.convert import to_api

    wanted = sys.argv[1:]
    Flow.schemas = schemas = schemas_of_comfyui()
    for make in FLOWS:
        flow = make()
        if wanted and not flow.name.startswith(tuple(wanted)):
            continue
        workflow = flow.build(schemas)
        (ROOT / "workflows" / f"{flow.name}.json").write_text(
            json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        twin = ROOT / "workflows" / "api" / f"{flow.name}.json"
        twin.write_text(json.dumps(to_api(workflow, schemas), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{flow.name}: {len(workflow['nodes'])} nodes")


if __name__ == "__main__":
    main()
