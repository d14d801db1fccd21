"""Where datasets may lie: several roots, links that the user put there, and a cache that stays where it is."""

import os

import pytest
from PIL import Image
from trainyard.nodes import paths
from trainyard.nodes.data import dataset as nodes
from trainyard.tests.comfy.test_dataset import run


def image_folder(folder):
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(folder / "a.png")
    return folder


@pytest.fixture
def roots(comfy, folders, monkeypatch):
    """(ComfyUI's own datasets folder, one that extra_model_paths.yaml adds)."""
    kinds = comfy.folder_paths.folder_names_and_paths
    monkeypatch.setattr(comfy.folder_paths, "base_path", str(folders))
    added = folders / "disk" / "sets"
    added.mkdir(parents=True)
    monkeypatch.setitem(kinds, "datasets", ([str(folders / "datasets"), str(added)], kinds["datasets"][1]))
    return folders / "datasets", added


# -- roots -------------------------------------------------------------------------------------------------------------


def test_all_roots_are_offered_and_found(roots):
    for root, name in zip(roots, ("dogs", "cats"), strict=True):
        image_folder(root / name / "deep")
        (root / name / "prompts.yaml").write_text("- target: cat\n")
    assert paths.list_dataset_folders() == [
        "datasets/dogs",
        "datasets/dogs/deep",
        "datasets/cats",
        "datasets/cats/deep",
    ]
    assert paths.list_prompt_files()[1:] == ["datasets/dogs/prompts.yaml", "datasets/cats/prompts.yaml"]
    assert paths.resolve_dataset_folder("datasets/cats/deep") == roots[1] / "cats" / "deep"
    assert paths.resolve_prompt_file("datasets/cats/prompts.yaml") == roots[1] / "cats" / "prompts.yaml"


def test_the_same_name_in_two_roots_is_two_choices(roots):
    for root in roots:
        image_folder(root / "cats")
    assert paths.list_dataset_folders() == ["datasets/cats", "datasets/sets/cats"]
    assert paths.resolve_dataset_folder("datasets/cats") == roots[0] / "cats"
    assert paths.resolve_dataset_folder("datasets/sets/cats") == roots[1] / "cats"


def test_a_folder_that_is_nowhere_is_named_below_the_first_root(roots):
    with pytest.raises(ValueError, match=r"The folder .*datasets.gone does not exist"):
        run(nodes.LoadDataset, folder="datasets/gone", repeats=1)
    for name in ("datasets/../..", "datasets/sets/../../..", "datasets/..", "elsewhere/x", "/etc"):
        with pytest.raises(ValueError, match="leads out of|must begin with"):
            paths.resolve_dataset_folder(name)


def test_the_cache_stays_when_a_root_is_added(comfy, roots):
    kinds = comfy.folder_paths.folder_names_and_paths
    for order in (roots, roots[::-1], roots[:1]):
        kinds["datasets"] = (list(map(str, order)), set())
        assert paths.cache_folder() == roots[0] / "trainyard_cache"


def test_a_cache_that_lies_in_an_added_root_only_is_used(roots):
    (roots[1] / "trainyard_cache").mkdir()
    assert paths.cache_folder() == roots[1] / "trainyard_cache"
    (roots[0] / "trainyard_cache").mkdir()
    assert paths.cache_folder() == roots[0] / "trainyard_cache"


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["input", "datasets"])
def test_a_link_directly_inside_is_offered_and_read(folders, tmp_path_factory, place):
    elsewhere = image_folder(tmp_path_factory.mktemp("disk") / "cats" / "10_black").parent
    image_folder(elsewhere / "masks")
    (folders / place / "link").symlink_to(elsewhere, target_is_directory=True)
    assert paths.list_dataset_folders() == [f"{place}/link", f"{place}/link/10_black", f"{place}/link/masks"]
    dataset, about = run(nodes.LoadDataset, folder=f"{place}/link", repeats=1)
    assert [record.repeats for record in dataset] == [10] and about.startswith("1 images")
    assert paths.resolve_dataset_folder(f"{place}/link/masks") == folders / place / "link" / "masks"


def test_a_link_to_a_file_directly_inside_is_offered_and_read(folders, tmp_path_factory):
    file = tmp_path_factory.mktemp("disk") / "mine.yaml"
    file.write_text("- target: cat\n")
    (folders / "input" / "prompts.yaml").symlink_to(file)
    assert paths.list_prompt_files()[1:] == ["input/prompts.yaml"]
    assert paths.resolve_prompt_file("input/prompts.yaml").read_text() == file.read_text()


def test_a_link_deeper_inside_is_not_offered_and_leads_nowhere(folders, tmp_path_factory):
    elsewhere = image_folder(tmp_path_factory.mktemp("disk") / "secret")
    (elsewhere / "prompts.yaml").write_text("- target: cat\n")
    unpacked = image_folder(folders / "input" / "unpacked")
    (unpacked / "link").symlink_to(elsewhere, target_is_directory=True)
    (unpacked / "prompts.yaml").symlink_to(elsewhere / "prompts.yaml")
    assert paths.list_dataset_folders() == ["input/unpacked"] and len(paths.list_prompt_files()) == 1
    with pytest.raises(ValueError, match=r"leads out of .*only if it lies directly in ComfyUI's"):
        paths.resolve_dataset_folder("input/unpacked/link")
    with pytest.raises(ValueError, match="leads out of"):
        paths.resolve_prompt_file("input/unpacked/prompts.yaml")


@pytest.mark.parametrize("name", ["link/..", "link/../..", "link/../../input", "link/inner", "./link/..", "link//etc"])
def test_nothing_leads_out_of_where_a_link_leads(folders, tmp_path_factory, name):
    elsewhere = image_folder(tmp_path_factory.mktemp("disk") / "cats")
    (elsewhere / "inner").symlink_to("/etc", target_is_directory=True)
    (folders / "input" / "link").symlink_to(elsewhere, target_is_directory=True)
    if name == "link//etc":
        assert paths.resolve_dataset_folder(f"input/{name}") == folders / "input" / "link" / "etc"
    else:
        with pytest.raises(ValueError, match="leads out of"):
            paths.resolve_dataset_folder(f"input/{name}")


def test_a_link_that_leads_back_is_not_offered(folders):
    image_folder(folders / "input" / "set")
    (folders / "input" / "again").symlink_to(folders / "input", target_is_directory=True)
    (folders / "input" / "all").symlink_to("/", target_is_directory=True)
    (folders / "input" / "gone").symlink_to(folders / "nowhere")
    assert paths.list_dataset_folders() == ["input/set"]
    for name in ("again/set", "all/etc"):
        with pytest.raises(ValueError, match="leads back to the folder it lies in"):
            paths.resolve_dataset_folder(f"input/{name}")


def test_nothing_is_saved_through_a_link(folders, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk")
    (folders / "input" / "link").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(ValueError, match="leads out of"):
        paths.new_dataset_folder("input", "link/mine")
    assert os.listdir(elsewhere) == []
