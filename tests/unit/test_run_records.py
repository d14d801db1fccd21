"""The list of runs always comes: what is wrong with one run is said of that run, and it can be deleted."""

import errno
import json
import os
import re
import time

import pytest
from trainyard.tests.unit.test_runs import kept
from trainyard.trainers import run_records
from trainyard.trainers.run_records import (
    delete_run_folder,
    find_run_folder,
    list_run_records,
    read_json_object,
    read_run_record,
)

GOOD = {"name": "a", "step": 1, "steps": 2, "why": "stopped", "loss": 0.5}
ODD_RECORDS = {
    "nothing": ("", "cut off or is no JSON"),
    "cut off": ('{"name": "a", "st', "cut off or is no JSON"),
    "no object": ("[]", "holds no JSON object"),
    "a number": ("1", "holds no JSON object"),
    "empty": ("{}", "does not say 'name'"),
    "no why": (json.dumps({k: v for k, v in GOOD.items() if k != "why"}), "does not say 'why'"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep object": ('{"a":' * 100_000, "nested too deeply"),
    "nested name": (json.dumps({**GOOD, "name": {"a": 1}}), "says 'name' is {'a': 1}, which cannot be"),
    "step in words": (json.dumps({**GOOD, "step": "three"}), "says 'step' is 'three'"),
    "step below 0": (json.dumps({**GOOD, "step": -1}), "says 'step' is -1"),
    "step beyond counting": (json.dumps({**GOOD, "step": 10**400}), "says 'step' is 1000"),
    "step of truth": (json.dumps({**GOOD, "step": True}), "says 'step' is True"),
    "step of nothing": (json.dumps({**GOOD, "steps": None}), "says 'steps' is None"),
    "digits without end": ('{"step": ' + "9" * 10_000 + "}", "is no JSON"),
    "loss in words": (json.dumps({**GOOD, "loss": "low"}), "says 'loss' is 'low'"),
    "validation is a list": (json.dumps({**GOOD, "validation": [1]}), r"says 'validation' is \[1\]"),
    "validation of words": (json.dumps({**GOOD, "validation": {"loss": "x"}}), "validation in run.json says 'loss' is 'x'"),
    "sample is a list": (json.dumps({**GOOD, "sample": []}), r"says 'sample' is \[\]"),
    "no UTF-8": (b"\xff\xfe{}", "is no UTF-8 text"),
    "a zero byte": (b"\0" * 10, "is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("text, reason", ODD_RECORDS.values(), ids=ODD_RECORDS)
def test_an_odd_record_is_a_damaged_run_with_its_reason_that_can_be_deleted(text, reason, tmp_path):
    _, store = kept(tmp_path, 2)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "run.json").write_bytes(text.encode() if isinstance(text, str) else text)
    records = {about["folder"]: about for about in list_run_records(tmp_path)}
    assert set(records) == {"bad", store.folder.name} and records[store.folder.name]["damage"] == ""
    damaged = records["bad"]
    assert (damaged["name"], damaged["why"], damaged["bytes"]) == (
        "bad",
        "damaged",
        len((bad / "run.json").read_bytes()),
    )
    assert re.search(reason, damaged["damage"])
    json.dumps(damaged, allow_nan=False)
    delete_run_folder(tmp_path, "bad")
    assert not bad.exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "missing", "unreadable"])
def test_a_record_that_is_no_readable_file_neither_hangs_nor_hides_the_others(kind, tmp_path):
    _, store = kept(tmp_path, 2)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "resume.state").write_bytes(b"1")
    if kind == "pipe":
        os.mkfifo(bad / "run.json")
    elif kind == "folder":
        (bad / "run.json").mkdir()
    elif kind == "dangling link":
        (bad / "run.json").symlink_to(tmp_path / "nowhere")
    elif kind == "unreadable":
        (bad / "run.json").symlink_to(bad / "run.json")
    begun = time.monotonic()
    records = {about["folder"]: about["damage"] for about in list_run_records(tmp_path)}
    assert time.monotonic() - begun < 1 and records[store.folder.name] == ""
    reasons = {"pipe": "is no regular file", "folder": "is no regular file", "unreadable": "cannot be read"}
    assert reasons.get(kind, "is missing") in records["bad"]
    assert delete_run_folder(tmp_path, "bad") == 1 and not bad.exists()


def test_a_record_larger_than_any_is_not_read(tmp_path):
    with open(tmp_path / "run.json", "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match="run.json has 65 MiB, which is too much"):
        read_json_object(tmp_path / "run.json")


def test_a_run_with_the_longest_name_can_be_deleted(tmp_path):
    """A run's folder is nine characters longer than its name."""
    _, store = kept(tmp_path, 1)
    long = store.folder.rename(tmp_path / f"{'x' * 100}-01234567")
    assert find_run_folder(tmp_path, long.name) == long and delete_run_folder(tmp_path, long.name) > 0


@pytest.mark.parametrize("name", ["_under", "mit ö", "a\nb", "100%", "e\u0301"])
def test_whatever_is_listed_can_be_deleted(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text("{}")
    assert [about["folder"] for about in list_run_records(tmp_path)] == [name]
    assert delete_run_folder(tmp_path, name) == 2 and list_run_records(tmp_path) == []


def test_what_is_no_run_is_neither_listed_nor_deleted(tmp_path):
    for name in (".locks", ".deleted-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        with pytest.raises(ValueError, match="is not a run"):
            delete_run_folder(tmp_path, name)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert list_run_records(tmp_path) == [] and list_run_records(tmp_path / "nowhere") == []
    with pytest.raises(ValueError, match="There is no run in 'pictures'"):
        delete_run_folder(tmp_path, "pictures")
    assert (tmp_path / "pictures").is_dir()


def test_a_run_that_is_deleted_while_the_list_is_made_is_not_called_damaged(tmp_path, monkeypatch):
    _, store = kept(tmp_path, 2)
    read = run_records.read_run_record

    def delete_first(folder):
        delete_run_folder(tmp_path, folder.name)
        return read(folder)

    monkeypatch.setattr(run_records, "read_run_record", delete_first)
    assert list_run_records(tmp_path) == [] and not store.folder.exists()


def test_a_lock_that_cannot_be_opened_says_which_file_to_free(tmp_path):
    (tmp_path / ".locks" / "a.lock").mkdir(parents=True)
    with pytest.raises(OSError, match=r"The lock of run 'a' cannot be taken \(.*a\.lock, or delete that file"):
        with run_records.lock_run_folder(tmp_path, "a"):
            pass


def test_a_disk_without_locks_is_said_and_does_not_stop_anybody(tmp_path, monkeypatch, caplog):
    def refuse(lock):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_records.FileLock, "acquire", refuse)
    with run_records.lock_run_folder(tmp_path, "a"):
        assert "cannot be locked" in caplog.text


def test_a_good_record_keeps_what_it_says(tmp_path):
    _, store = kept(tmp_path, 3)
    about = read_run_record(store.folder)
    assert (about["name"], about["step"], about["why"], about["damage"], about["lora"]) == (
        "toy",
        3,
        "finished",
        "",
        "toy.safetensors",
    )
