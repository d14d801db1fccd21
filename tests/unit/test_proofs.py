"""The table of proofs: every proof has a row, every row names what is there, and what runs when code changes."""

import shlex
import subprocess

import pytest
from trainyard.tests.proofs import run

PROOFS = run.read_proofs()


def test_every_proof_has_a_row_and_every_row_a_proof():
    files = {path.relative_to(run.ROOT).as_posix() for path in run.HERE.glob("test_*.py")}
    assert files == {
        word for proof in PROOFS.values() for word in shlex.split(proof["command"]) if word.endswith(".py")
    }


@pytest.mark.parametrize("name", PROOFS)
def test_a_row_says_what_is_measured_what_it_must_reach_and_what_it_depends_on(name):
    proof = PROOFS[name]
    assert set(proof) == {"command", "figure", "bound", "seconds", "code"}
    assert [code for code in proof["code"] if not (run.ROOT / code).exists()] == []
    assert [code for code in proof["code"] if code.endswith("/") != (run.ROOT / code).is_dir()] == []
    assert run.depends_on(proof, [word for word in shlex.split(proof["command"]) if word.endswith(".py")])


def test_a_proof_depends_on_its_files_and_on_all_that_lies_in_its_folders():
    proof = {"code": ["trainers/loop.py", "nodes/host/"]}
    assert run.depends_on(proof, ["README.md", "nodes/host/session.py"]) and run.depends_on(proof, ["trainers/loop.py"])
    assert not run.depends_on(proof, ["trainers/loops.py", "nodes/hosts.py"]) and not run.depends_on(proof, [])


def test_the_cheapest_run_first_and_those_that_find_no_time_are_named():
    proofs = {name: {"seconds": seconds} for name, seconds in (("long", 300), ("short", 10), ("middle", 80))}
    assert run.choose_within(proofs, 100) == (["short", "middle"], ["long"])
    assert run.choose_within(proofs, float("inf")) == (["short", "middle", "long"], [])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """commit(file, ...) in an empty repository that stands for the pack's."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.delenv("PROOFS_SINCE", raising=False)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git = [
        "git",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "init.defaultBranch=main",
        "-c",
        "commit.gpgsign=false",
    ]

    def commit(*files):
        for file in files:
            (tmp_path / file).write_text(file)
        for words in (["add", "-A"], ["commit", "-qm", "more"]):
            subprocess.run([*git, *words], cwd=tmp_path, check=True)

    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    return commit


def test_without_a_commit_to_compare_with_nothing_changed(repository):
    assert run.list_changed_files() == []
    repository("a.py")
    assert run.list_changed_files() == []


def test_on_the_main_branch_the_commit_before_counts_and_on_another_all_since_it_left(
    repository, monkeypatch, tmp_path
):
    repository("a.py")
    repository("b.py")
    (tmp_path / "c.py").touch()
    assert run.list_changed_files() == ["b.py", "c.py"]
    run.git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert run.list_changed_files() == ["b.py", "c.py"]
    repository("d.py")
    repository("e.py")
    assert run.list_changed_files() == ["c.py", "d.py", "e.py"]
    monkeypatch.setenv("PROOFS_SINCE", "HEAD~1")
    assert run.list_changed_files() == ["e.py"]
