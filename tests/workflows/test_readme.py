"""What the README promises is there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_node_has_its_row(server):
    for name, schema in server.object_info().items():
        if name.startswith("Trainyard"):
            assert f"| {schema['display_name']} |" in README, f"{name} is not in the README's table of nodes"


def test_every_family_is_named(comfy):
    from trainyard.trainers.families import MODEL_FAMILIES

    table = README[README.index("## Model families") :].split("\n## ")[0]
    assert [family.label for family in MODEL_FAMILIES.values() if family.label not in table] == []


def test_every_link_into_the_repository_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_commands_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= set(targets)
    assert {"demo", "test"} <= set(re.findall(r"`make ([a-z-]+)`", README))
    for file in re.findall(r"-r (?:trainyard/)?(\S+\.txt)", README):
        assert (ROOT / file).is_file(), file
