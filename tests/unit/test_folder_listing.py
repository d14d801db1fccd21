"""Folders and files are read again when they have changed, and only then."""

import os
import time

import pytest
from trainyard.tests.unit.test_readers import image
from trainyard.trainers.data import file_facts, folder_listing
from trainyard.trainers.data.file_facts import FileFacts
from trainyard.trainers.data.folder_listing import FolderListing, list_folder
from trainyard.trainers.data.readers import KNOWN_IMAGES, hash_folder_state, read_folder
from trainyard.trainers.data.records import open_image

LONG_AGO = 10**18


@pytest.fixture
def scans(monkeypatch):
    """The folders that are read."""
    seen, scandir = [], os.scandir
    monkeypatch.setattr(folder_listing.os, "scandir", lambda path: seen.append(path) or scandir(path))
    monkeypatch.setattr(folder_listing, "KNOWN_FOLDERS", {})
    return seen


def settle(path):
    """As if it had been changed long ago."""
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


def test_a_folder_that_stays_the_same_is_read_once(tmp_path, scans):
    for name in ("b.TXT", "a.txt", "c.png", "none"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    settle(tmp_path)
    found = [list_folder(tmp_path) for _ in range(3)]
    files = {".txt": ("a.txt", "b.TXT"), ".png": ("c.png",), "": ("none",)}
    assert found == [FolderListing(("sub",), frozenset(), files)] * 3 and len(scans) == 1
    assert found[0].files_ending_in((".png", ".txt")) == ["a.txt", "b.TXT", "c.png"]


def test_a_folder_that_has_changed_is_read_again(tmp_path, scans):
    settle(tmp_path)
    assert list_folder(tmp_path) == FolderListing()
    (tmp_path / "a.txt").touch()
    assert list_folder(tmp_path).files == {".txt": ("a.txt",)}
    (tmp_path / "a.txt").unlink()
    os.utime(tmp_path, ns=(LONG_AGO + 1, LONG_AGO + 1))
    assert list_folder(tmp_path) == FolderListing()


def test_a_folder_that_changed_a_moment_ago_is_read_again(tmp_path, scans):
    """two changes in one tick of the file system's clock leave one time"""
    now = time.time_ns()
    (tmp_path / "a.txt").touch()
    os.utime(tmp_path, ns=(now, now))
    assert list_folder(tmp_path).files == {".txt": ("a.txt",)}
    (tmp_path / "b.txt").touch()
    os.utime(tmp_path, ns=(now, now))
    assert list_folder(tmp_path).files == {".txt": ("a.txt", "b.txt")}


def test_a_link_that_leads_nowhere_yet_is_followed_later(tmp_path, scans):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "target")
    settle(tmp_path / "set")
    assert list_folder(tmp_path / "set") == FolderListing(broken_links=("link",))
    (tmp_path / "target").mkdir()
    assert list_folder(tmp_path / "set") == FolderListing(("link",), frozenset({"link"}))


def test_a_folder_that_is_gone_or_a_circle_of_links_is_empty(tmp_path, scans):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "a").touch()
    settle(tmp_path / "gone")
    assert list_folder(tmp_path / "gone").files == {"": ("a",)}
    (tmp_path / "gone" / "a").unlink()
    (tmp_path / "gone").rmdir()
    for name in ("loop", "gone", "never"):
        assert list_folder(tmp_path / name) == FolderListing(), name
    assert list_folder(tmp_path) == FolderListing(broken_links=("loop",))


def test_no_more_folders_are_kept_than_a_limit(tmp_path, scans, monkeypatch):
    monkeypatch.setattr(folder_listing, "MAX_KNOWN_FOLDERS", 2)
    for name in "abc":
        (tmp_path / name).mkdir()
        settle(tmp_path / name)
        list_folder(tmp_path / name)
    assert list(folder_listing.KNOWN_FOLDERS) == [str(tmp_path / "b"), str(tmp_path / "c")]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def long_ago(monkeypatch):
    """Every file counts as written long ago, though its ctime cannot be set."""
    monkeypatch.setattr(file_facts, "SETTLED_NS", -(10**12))


def test_a_file_that_stays_the_same_is_examined_once(tmp_path, long_ago):
    asked = []
    facts = FileFacts(lambda file: asked.append(file.name) or file.read_text())
    file = tmp_path / "a.txt"
    file.write_text("one")
    assert [facts.get(file), facts.get(file)] == ["one", "one"] and asked == ["a.txt"]
    file.write_text("two")
    assert facts.get(file) == "two"
    stat = file.stat()
    file.write_text("six")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert facts.get(file) == "six", "size and mtime are equal; ctime is not"
    file_facts.forget_file(file)
    assert facts.get(file) == "six" and len(asked) == 4


def test_a_file_written_a_moment_ago_is_examined_again(tmp_path):
    asked = []
    facts = FileFacts(lambda file: asked.append(file))
    (tmp_path / "a.txt").write_text("one")
    facts.get(tmp_path / "a.txt")
    facts.get(tmp_path / "a.txt")
    assert len(asked) == 2 and not facts.known


def test_what_an_examination_raises_is_not_kept(tmp_path, long_ago):
    facts = FileFacts(lambda file: file.read_text())
    for _ in range(2):
        with pytest.raises(OSError, match="a.txt"):
            facts.get(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("one")
    assert facts.get(tmp_path / "a.txt") == "one"


def test_no_more_files_are_kept_than_a_limit(tmp_path, long_ago):
    facts = FileFacts(lambda file: file.name, most=2)
    for name in "abc":
        (tmp_path / name).touch()
        facts.get(tmp_path / name)
    assert [known[1] for known in facts.known.values()] == ["b", "c"]


def test_images_that_stay_the_same_are_not_decoded_again(tmp_path, long_ago, monkeypatch):
    for number in range(3):
        image(tmp_path, f"{number}.png", colour=(number, 0, 0))
    image(tmp_path, "0.mask.png", mode="L", colour=9)
    asked, find = [], KNOWN_IMAGES.find
    monkeypatch.setattr(KNOWN_IMAGES, "find", lambda file: asked.append(file.name) or find(file))
    first = read_folder(tmp_path)
    assert sorted(asked) == ["0.mask.png", "0.png", "1.png", "2.png"]
    image(tmp_path, "1.png", colour=(77, 0, 0), size=(4, 4))
    (tmp_path / "2.txt").write_text("a new caption")
    again = read_folder(tmp_path)
    assert asked[4:] == ["1.png"] and again[1].size == (4, 4) and again[1].id != first[1].id
    assert again[0] == first[0] and again[2].captions == ("a new caption",)


def test_an_image_that_changed_unseen_is_read_anew_after_the_error_that_asks_for_it(tmp_path, long_ago, monkeypatch):
    """a file system whose times and inodes tell nothing"""
    monkeypatch.setattr(file_facts, "read_file_stamp", lambda file: (1, 2, 3, 4, 5))
    image(tmp_path, "a.png")
    first = read_folder(tmp_path)
    image(tmp_path, "a.png", colour=(0, 0, 99))
    assert read_folder(tmp_path) == first
    with pytest.raises(ValueError, match="has changed since the dataset was loaded. Load the dataset again"):
        open_image(first[0])
    assert open_image(read_folder(tmp_path)[0]).getpixel((0, 0)) == (0, 0, 99)


def test_the_state_of_a_folder_tells_names_sizes_and_times(tmp_path):
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "a.txt"
    file.write_text("one")
    settle(file)
    states = [hash_folder_state(tmp_path)]
    for change in (
        lambda: os.utime(file, ns=(LONG_AGO, LONG_AGO + 1)),
        lambda: file.write_text("longer") and settle(file),
        lambda: file.rename(tmp_path / "sub" / "b.txt"),
    ):
        assert hash_folder_state(tmp_path) == states[-1]
        change()
        states.append(hash_folder_state(tmp_path))
    assert len(set(states)) == 4
