"""make refresh: everything that is derived from the nodes and from the descriptions of the workflows, made again.

    make refresh                              # what is out of date; nothing changes where nothing changed
    make refresh ARGS=--accept                # also the snapshot of nodes that saved workflows know differently
    make refresh ARGS="--card 06_leco"        # draw a workflow's card again: a real run, minutes
    make refresh ARGS="--layout 06_leco"      # lay a described workflow out again, as its description has it

Writes tests/workflows/nodes.json (the snapshot of schemas), locales/en/nodeDefs.json (and takes translations of changed
texts out of the other languages), missing rows of README.md, MODELS.md, workflows/*.json where their description says something
else, workflows/api/*.json, and cards (workflows/*.jpg) that are missing. The schemas are those of a real ComfyUI server.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def refresh(schemas: dict, accept: bool = False, laid_out: tuple[str, ...] = ()) -> list[pathlib.Path]:
    """The files that changed; says what is left for a person to do."""
    from trainyard.tools import locales, readme, workflows

    own = {name: schema for name, schema in schemas.items() if name.startswith("Trainyard")}
    changed = [
        *refresh_snapshot(own, accept),
        *locales.write_locales(own),
        *readme.write_readme(own),
        *workflows.write_workflows(schemas, laid_out),
    ]
    for path in changed:
        print(path.relative_to(ROOT))
    for line in locales.report_missing():
        print(f"[shown in English] {line}")
    for name in own:
        if not (ROOT / "web" / "docs" / name / "en.md").is_file():
            print(f"[to write] {name} has no help page: web/docs/{name}/en.md")
    return changed


def refresh_snapshot(schemas: dict, accept: bool) -> list[pathlib.Path]:
    """New nodes are added to the snapshot; a known one that promises something else only changes when that is accepted."""
    from trainyard.tests.workflows import snapshot

    known, found = snapshot.known_promises(), snapshot.all_promises(schemas)
    broken = snapshot.changed_nodes(known, found)
    if broken and not accept:
        print(
            f"[to decide] {', '.join(broken)} changed, and saved workflows depend on what they were. If it is meant: "
            "`make refresh ARGS=--accept`, and a line in CHANGELOG.md. Until then the test of the snapshot fails."
        )
        found |= {name: known[name] for name in broken}
    return snapshot.write_promises(dict(sorted(found.items())))


def refresh_models() -> list[pathlib.Path]:
    """[MODELS.md] when it changed: asked of ComfyUI's classes in this process."""
    from trainyard.tests.comfy.boot import boot

    boot()
    from trainyard.tools import model_table

    changed = model_table.write_table()
    for path in changed:
        print(path.relative_to(ROOT))
    return changed


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    import trainyard_plugin  # noqa: F401 - makes this pack the package `trainyard`
    from trainyard.tests.comfy.server import Server
    from trainyard.tests.conftest import no_comfyui
    from trainyard.tools import cards

    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--accept", action="store_true", help="write changed schemas of known nodes too")
    asked.add_argument("--card", nargs="+", default=[], metavar="NAME", help="workflows whose card is drawn again")
    asked.add_argument("--layout", nargs="+", default=[], metavar="NAME", help="workflows that are laid out again")
    chosen = asked.parse_args()
    if why := no_comfyui():
        print(
            f"make refresh asks a real ComfyUI for the schemas of all nodes, and there is none: {why}. Nothing was changed."
        )
        return 1
    with tempfile.TemporaryDirectory() as base, Server(pathlib.Path(base), packs={"trainyard": ROOT}) as server:
        if errors := server.import_errors():
            print("ComfyUI could not load the pack. Nothing was changed.", *errors, server.tail(), sep="\n")
            return 1
        changed = refresh(server.object_info(), chosen.accept, tuple(chosen.layout)) + refresh_models()
        drawn = cards.draw_cards(chosen.card or cards.missing_cards(), server)
    print(f"{len(changed) + len(drawn)} files changed." if changed or drawn else "Everything was up to date.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
