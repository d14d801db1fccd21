"""What was found out about images outlasts the process, and costs nobody anything where it cannot."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
from trainyard.tests.unit.test_readers import image
from trainyard.trainers.data import fact_store, file_facts
from trainyard.trainers.data.fact_store import FactStore
from trainyard.trainers.data.readers import KNOWN_IMAGES, read_folder
from trainyard.trainers.data.records import open_image


@pytest.fixture(autouse=True)
def long_ago(monkeypatch):
    """Every file counts as written long ago, though its ctime cannot be set."""
    monkeypatch.setattr(file_facts, "SETTLED_NS", -(10**12))


@pytest.fixture
def folder(tmp_path):
    """Three images and a mask."""
    for number in range(3):
        image(tmp_path / "images", f"{number}.png", colour=(number, 0, 0))
    image(tmp_path / "images", "0.mask.png", mode="L", colour=9)
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded."""
    asked, find = [], KNOWN_IMAGES.find
    monkeypatch.setattr(KNOWN_IMAGES, "find", lambda file: asked.append(file.name) or find(file))
    return asked


def start_again():
    """As a new process begins: nothing is known."""
    KNOWN_IMAGES.known.clear()
    KNOWN_IMAGES.forgotten.clear()


def test_images_are_not_decoded_again_after_a_restart(folder, tmp_path, decoded):
    facts = tmp_path / "cache" / "facts.sqlite3"
    first = read_folder(folder, facts_file=facts)
    assert len(decoded) == 4
    start_again()
    assert read_folder(folder, facts_file=facts) == first and len(decoded) == 4
    start_again()
    image(folder, "1.png", colour=(77, 0, 0), size=(4, 4))
    again = read_folder(folder, facts_file=facts)
    assert decoded[4:] == ["1.png"] and again[1].size == (4, 4) and again[1].id != first[1].id
    assert (again[0], again[2]) == (first[0], first[2])


def test_an_image_that_cannot_be_decoded_is_tried_again(folder, tmp_path, decoded):
    (folder / "bad.png").write_bytes(b"none")
    for _ in range(2):
        start_again()
        assert len(read_folder(folder, facts_file=tmp_path / "facts").skipped) == 1
    assert decoded.count("bad.png") == 2 and len(decoded) == 6


def damage_row(file):
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE facts SET fact = replace(fact, '\"size\"', '\"sizf\"')")
    connection.close()


DAMAGES = {
    "no database": lambda file: file.write_bytes(b"this is no database" * 99),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "overwritten": lambda file: file.write_bytes(file.read_bytes()[:100] + os.urandom(file.stat().st_size - 100)),
    "a row": damage_row,
}


@pytest.mark.parametrize("damage", list(DAMAGES.values()), ids=list(DAMAGES))
def test_a_damaged_file_is_made_again_and_told(folder, tmp_path, decoded, caplog, damage):
    facts = tmp_path / "facts.sqlite3"
    first = read_folder(folder, facts_file=facts)
    damage(facts)
    start_again()
    assert read_folder(folder, facts_file=facts) == first and len(decoded) == 8
    assert "facts.sqlite3 is damaged" in caplog.text and "is made again; the images are read anew" in caplog.text
    start_again()
    assert read_folder(folder, facts_file=facts) == first and len(decoded) == 8


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    file = tmp_path / "facts.sqlite3"
    with FactStore(file) as store:
        store.write("name", "1 2 3", "the fact")
    blob = file.read_bytes()
    for bit in range(0, 8 * len(blob), 997):
        file.write_bytes(blob[: bit // 8] + bytes([blob[bit // 8] ^ 1 << bit % 8]) + blob[bit // 8 + 1 :])
        with FactStore(file, notify=lambda text: None) as store:
            assert store.read("name", "1 2 3") in (None, "the fact")
            store.write("name", "1 2 3", "the fact")
        with FactStore(file, notify=lambda text: None) as store:
            assert store.read("name", "1 2 3") == "the fact", bit


def test_where_nothing_can_be_written_images_are_read_all_the_same(folder, tmp_path, caplog):
    (tmp_path / "file").touch()
    facts = tmp_path / "file" / "facts.sqlite3"
    assert read_folder(folder, facts_file=facts) == read_folder(folder)
    assert "cannot be used" in caplog.text and "images are read anew after each start" in caplog.text


def test_a_file_that_another_program_locks_is_waited_for_and_then_left(tmp_path, monkeypatch):
    monkeypatch.setattr(fact_store, "SECONDS_FOR_OTHERS", 0.1)
    told, file = [], tmp_path / "facts"
    with FactStore(file) as store:
        store.write("a", "1", "fact")
    other = sqlite3.connect(file)
    other.execute("BEGIN EXCLUSIVE")
    with FactStore(file, told.append) as store:
        assert store.read("a", "1") is None
        store.write("a", "2", "other")
    assert len(told) == 1 and "database is locked" in told[0]
    other.close()
    with FactStore(file) as store:
        assert store.read("a", "1") == "fact"


def test_nobody_waits_while_facts_are_found_out(tmp_path):
    """What is not written yet holds no lock."""
    with FactStore(tmp_path / "facts") as one, FactStore(tmp_path / "facts") as other:
        one.write("a", "1", "of one")
        other.write("b", "1", "of the other")
        other.flush()
        one.flush()
        assert one.read("b", "1") == "of the other" and other.read("a", "1") == "of one"


WRITER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fact_store", sys.argv[1])
sys.modules["fact_store"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.FACTS_PER_WRITE = 5
def notify(text):
    raise SystemExit(text)
with module.FactStore(sys.argv[2], notify) as store:
    for number in range(60):
        store.write(f"{sys.argv[3]} {number}", "1", sys.argv[3])
        assert store.read(f"{sys.argv[3]} {number - 5}", "1") in (None, sys.argv[3])
"""


def test_processes_write_one_file_at_once(tmp_path):
    command = [sys.executable, "-c", WRITER, fact_store.__file__, str(tmp_path / "facts")]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("one", "two")]
    assert [(writer.communicate()[1], writer.returncode) for writer in writers] == [("", 0)] * 2
    with FactStore(tmp_path / "facts") as store:
        names = [f"{name} {number}" for name in ("one", "two") for number in range(60)]
        assert [store.read(name, "1") for name in names] == ["one"] * 60 + ["two"] * 60


def test_facts_that_another_process_wrote_while_the_file_was_opened_stay(tmp_path, monkeypatch):
    """Both find a new file without a table; the second to make it must not drop what the first has written."""
    read_version, asked = fact_store.read_version, []

    def read_late(connection):
        version = read_version(connection)
        if not asked:
            asked.append(version)
            with FactStore(tmp_path / "facts") as other:
                other.write("one", "1", "first")
        return version

    monkeypatch.setattr(fact_store, "read_version", read_late)
    with FactStore(tmp_path / "facts") as store:
        store.write("two", "1", "second")
    with FactStore(tmp_path / "facts") as store:
        assert (asked, store.read("one", "1"), store.read("two", "1")) == ([0], "first", "second")


def test_facts_of_another_version_are_forgotten(tmp_path, monkeypatch):
    with FactStore(tmp_path / "facts") as store:
        store.write("a", "1", "old")
    monkeypatch.setattr(fact_store, "FACTS_VERSION", fact_store.FACTS_VERSION + 1)
    with FactStore(tmp_path / "facts") as store:
        assert store.read("a", "1") is None
        store.write("a", "1", "new")
    with FactStore(tmp_path / "facts") as store:
        assert store.read("a", "1") == "new"


def test_no_more_facts_are_kept_than_a_limit_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(fact_store, "MAX_STORED_FACTS", 3)
    with FactStore(tmp_path / "facts") as store:
        for name in ("a", "b", "c", "a", "d"):
            store.write(name, "1", name)
            store.flush()
        assert [store.read(name, "1") for name in "abcd"] == ["a", None, "c", "d"]


def test_what_turned_out_to_be_wrong_is_not_read_from_the_file_again(folder, tmp_path, monkeypatch):
    """A file system whose times and inodes tell nothing."""
    monkeypatch.setattr(file_facts, "read_file_stamp", lambda file: (1, 2, 3, 4))
    facts = tmp_path / "facts"
    first = read_folder(folder, facts_file=facts)
    image(folder, "0.png", colour=(0, 0, 99))
    with pytest.raises(ValueError, match="has changed since the dataset was loaded. Load the dataset again"):
        open_image(first[0])
    assert open_image(read_folder(folder, facts_file=facts)[0]).getpixel((0, 0)) == (0, 0, 99)
    start_again()
    assert open_image(read_folder(folder, facts_file=facts)[0]).getpixel((0, 0)) == (0, 0, 99)


@pytest.mark.skipif(os.name != "posix", reason="names of any bytes")
def test_names_that_are_no_text_are_kept(tmp_path):
    name = os.fsdecode(b"/a/\xff.png")
    with FactStore(tmp_path / "facts") as store:
        store.write(name, "1", json.dumps([1]))
        store.flush()
        assert store.read(name, "1") == "[1]"
