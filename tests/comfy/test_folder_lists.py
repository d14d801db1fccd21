"""Choices of nodes: which folders and files they list, and that a large input folder costs nobody seconds."""

import importlib
import os

from trainyard import nodes
from trainyard.nodes import paths
from trainyard.trainers.data import folder_listing


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_texts_beside_an_image_of_any_kind_are_captions_and_no_prompt_files(folders):
    images = ["a.png", "b.JPG", "c.bmp", "sub/d.webp", "sub/e.tiff"]
    captions = [os.path.splitext(name)[0] + ".txt" for name in images]
    touch(folders / "input", *images, *captions, "prompts.txt", "sub/more.YAML", "f.png.txt", "pairs.csv", "a.csv")
    assert paths.list_prompt_files() == [
        paths.NO_PROMPT_FILE,
        "input/f.png.txt",
        "input/pairs.csv",
        "input/prompts.txt",
        "input/sub/more.YAML",
    ]
    assert paths.list_pair_files() == [paths.NO_PAIRS, "input/a.csv", "input/pairs.csv"]


def test_folders_are_listed_to_a_depth_without_hidden_ones(folders):
    touch(folders / "input", "a/b/c/d/x.png", "a/.hidden/x.png", "3d/x.png", "top.png")
    touch(folders / "datasets", "set/x.png", "trainyard_cache/pictures/x.png")
    touch(folders / "output", "datasets/saved/x.png", "other/x.png")
    (folders / "input" / "link").symlink_to(folders / "datasets")
    inside = ["input/a", "input/a/b", "input/a/b/c", "input/link", "input/link/set"]
    assert paths.list_dataset_folders() == [*inside, "datasets/set", "output/saved"]
    assert paths.list_nested_folders(folders / "nowhere") == []


def test_the_choices_of_all_nodes_read_a_folder_once(folders, monkeypatch):
    """the folder of the images has not changed for long"""
    touch(folders / "input", *(f"many/{number}.{ending}" for number in range(50) for ending in ("png", "txt")))
    os.utime(folders / "input" / "many", (1, 1))
    seen, scandir = [], os.scandir
    monkeypatch.setattr(folder_listing.os, "scandir", lambda path: seen.append(str(path)) or scandir(path))
    for _ in range(2):
        for name in nodes.find_node_modules():
            for node in importlib.import_module(name, nodes.__name__).NODES:
                node.define_schema()
    assert seen.count(str(folders / "input" / "many")) == 1, seen
