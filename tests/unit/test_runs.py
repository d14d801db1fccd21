"""A run's folder: names that are safe, states that belong to one recipe, and a finished run that is found again."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainyard.tests.unit.toy import Line, Stop, folder
from trainyard.trainers.files import LoraFile, read_safetensors, read_state_tree
from trainyard.trainers.loop import train
from trainyard.trainers.run_records import RunInUse, delete_run_folder
from trainyard.trainers.runs import RunFolder, check_run_name
from trainyard.trainers.settings import RunSettings


def kept(tmp_path, steps, save_every=0, method=None, report=None, **changes):
    """(losses, folder) of a run of a Line that is kept on disk."""
    method = method or Line()
    store = folder(tmp_path, lambda: {"w": method.w.detach().clone()}, steps, **changes)
    settings = RunSettings(steps=steps, learning_rate=0.05, save_every=save_every)
    return train(method, settings, store=store, report=report, interval=0), store


def files(store):
    """Every file in the folder of a run, hidden ones too."""
    return sorted(p.name for p in store.folder.iterdir())


def about(store):
    return json.loads((store.folder / "run.json").read_text("utf-8"))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["star", "my star 2", "  star  ", "a.b-c_d+e", "Öl 3", "звезда", "9", "x" * 100])
def test_a_plain_name_is_taken_without_the_spaces_around_it(name):
    assert check_run_name(name) == name.strip()


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../star", "a/b", "a\\b", "/etc", "C:star", "~star", ".hidden", "_star", "-rf", "star.", "a\0b",
                                  "a\nb", "a*b", "x" * 101, "star\u202e", "star\n", "\tstar", "star\r", "st\x7far", "star\u2028"])  # fmt: skip
def test_a_name_that_could_leave_its_folder_or_hide_is_refused(name):
    with pytest.raises(ValueError, match="The run name is .*; use letters, digits, spaces"):
        check_run_name(name)


@pytest.mark.parametrize("name", ["nul", "CON", "com1", "Lpt9.old", "aux.v2", "com²"])
def test_a_name_of_a_windows_device_is_refused(name):
    with pytest.raises(ValueError, match=f"The run name '{name}' is the name of a device on Windows"):
        check_run_name(name)


def test_a_name_has_room_for_the_longest_file_of_the_run():
    """あ has 3 bytes: 77 of them and -step1234567.safetensors are 255, and a disk allows 255."""
    assert check_run_name("あ" * 77) == "あ" * 77 and check_run_name("console") and check_run_name("nul_2")
    with pytest.raises(
        ValueError, match="is too long: the file あ+-step0000000.safetensors would have a name of 264 bytes"
    ):
        check_run_name("あ" * 80)


def test_a_message_shows_the_name_as_it_was_given():
    with pytest.raises(ValueError, match=r"The run name is '\.\./star'; use letters"):
        check_run_name("../star")


# -- what is kept ------------------------------------------------------------------------------------------------------


def method_losses(store):
    return store.load()["losses"].tolist()


def test_a_run_leaves_its_state_its_recipe_and_its_loras(tmp_path):
    _, store = kept(tmp_path, 5, save_every=2)
    assert store.folder == tmp_path / "toy-01234567"
    assert files(store) == [
        "resume.previous.state",
        "resume.state",
        "run.json",
        "toy-step000002.safetensors",
        "toy-step000004.safetensors",
        "toy.safetensors",
    ]
    known = {
        "name": "toy",
        "fingerprint": "0123456789abcdef",
        "step": 5,
        "steps": 5,
        "why": "finished",
        "early": False,
        "ending": {},
        "note": "toy",
    }
    assert about(store) == {**known, "loss": pytest.approx(sum(method_losses(store)) / 5)}
    tensors, metadata = read_safetensors(store.lora_path(4))
    assert (
        metadata["ss_steps"] == "4" and tensors["w"].item() == kept(tmp_path / "other", 4)[1].load()["params"][0].item()
    )


def test_an_interrupt_keeps_the_lora_of_its_step(tmp_path):
    def report(progress):
        if progress.step == 3:
            raise Stop

    with pytest.raises(Stop):
        kept(tmp_path, 5, report=report)
    store = folder(tmp_path, None, 5)
    assert files(store) == ["resume.state", "run.json", "toy-step000003.safetensors"]
    assert about(store)["why"] == "stopped" and store.load()["step"] == 3 and store.load_finished() is None


def test_a_safety_copy_writes_the_state_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("trainyard.trainers.loop.TrainingClock.autosave_seconds", -1)
    seen = []
    _, store = kept(
        tmp_path,
        3,
        report=lambda progress: seen.append(files(folder(tmp_path, None, 3))) if progress.step == 2 else None,
    )
    assert seen[-1] == ["resume.previous.state", "resume.state", "run.json"]


def test_a_lora_that_has_learnt_nothing_is_not_written(tmp_path):
    method, store = Line(), folder(tmp_path, dict, 2)
    train(method, RunSettings(steps=2, learning_rate=0.05), store=store)
    assert files(store) == ["resume.state", "run.json"] and store.load_finished() is None


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    whole, whole_store = kept(tmp_path / "whole", 6)
    kept(tmp_path / "parts", 3)
    parts, parts_store = kept(tmp_path / "parts", 6)
    assert parts == whole and parts_store.state_path.read_bytes() == whole_store.state_path.read_bytes()
    assert parts_store.lora_path(6).read_bytes() == whole_store.lora_path(6).read_bytes()


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_another_recipe_of_the_same_name_lives_in_another_folder(tmp_path):
    first, one = kept(tmp_path, 3)
    second, two = kept(tmp_path, 3, fingerprint="fedcba9876543210")
    assert one.folder != two.folder and first == second and one.load_finished() and two.load_finished()


def test_a_state_of_another_recipe_is_refused(tmp_path):
    """Two fingerprints that share their first eight digits share a folder."""
    kept(tmp_path, 3)
    other = folder(tmp_path, None, 3, fingerprint="01234567ffffffff")
    assert other.load_finished() is None
    with pytest.raises(
        ValueError, match=r"resume\.state belongs to another recipe; choose another run name, or move that folder away"
    ):
        other.load()


def test_fewer_steps_than_are_done_are_refused_with_the_number(tmp_path):
    kept(tmp_path, 5)
    with pytest.raises(
        ValueError, match=r"Run 'toy' has already done 5 steps, and 3 are asked for\. Ask for more steps to continue it"
    ):
        folder(tmp_path, None, 3).load()


@pytest.mark.parametrize("damage", [b"", b"half a file"])
def test_a_damaged_state_says_which_folder_to_move_away(damage, tmp_path):
    _, store = kept(tmp_path, 3)
    store.state_path.write_bytes(damage)
    assert store.load_finished() is None
    with pytest.raises(
        ValueError,
        match=r"resume\.state is not a readable safetensors file.*Move the folder .*toy-01234567 away, or "
        r"choose another",
    ):
        store.load()


DAMAGES = {
    "cut off": lambda blob: blob[: len(blob) // 2],
    "empty": lambda blob: b"",
    "a flipped bit": lambda blob: blob[:-1] + bytes([blob[-1] ^ 4]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_falls_back_to_the_one_before_says_so_and_ends_as_if_nothing_had_been(damage, tmp_path):
    """Saves at 2 and 4 of 5 steps, then the end: the newest state is that of step 5, the one before that of step 4."""
    whole, store = kept(tmp_path / "whole", 5, save_every=2)
    kept(tmp_path / "bad", 5, save_every=2)
    bad, told = folder(tmp_path / "bad", None, 5), []
    bad.state_path.write_bytes(damage(bad.state_path.read_bytes()))
    bad.notify = told.append
    assert bad.load_finished() is None and bad.load()["step"] == 4 and bad.load()["step"] == 4
    assert len(told) == 1 and "resume.state is" in told[0] and "goes on from the save before it, step 4" in told[0]
    assert kept(tmp_path / "bad", 5, save_every=2)[0] == whole
    for file in (store.state_path.name, "toy.safetensors", "resume.previous.state"):
        assert (bad.folder / file).read_bytes() == (store.folder / file).read_bytes(), "the good one was kept"


@pytest.mark.parametrize("dies_at", range(3))
def test_a_save_that_is_cut_anywhere_leaves_a_whole_state(dies_at, tmp_path, monkeypatch):
    """The second save dies at its 1st, 2nd, 3rd renaming: what is found is step 2, or step 4 when it was whole."""
    whole, _ = kept(tmp_path / "whole", 6, save_every=2)
    kept(tmp_path / "cut", 2)
    replace, seen = os.replace, []

    def die(part, path):
        if "resume" in Path(path).name:
            seen.append(path)
            if len(seen) > dies_at:
                raise KeyboardInterrupt
        replace(part, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        kept(tmp_path / "cut", 4)
    told = []
    store = folder(tmp_path / "cut", None, 6)
    store.notify = told.append
    assert store.load()["step"] == (2 if dies_at == 0 else 4) and not told
    assert kept(tmp_path / "cut", 6, save_every=2)[0] == whole
    assert not [name for name in files(store) if "next" in name or ".part" in name]


@pytest.mark.parametrize("text", ["{}", "[]", "null", "{", "", "\0", '{"step": 4}', "[" * 100_000, '{"a":' * 100_000])
def test_a_finished_run_with_an_odd_record_is_finished_again_from_its_state(text, tmp_path):
    losses, store = kept(tmp_path, 4)
    before = about(store)
    (store.folder / "run.json").write_text(text)
    assert store.load_finished() is None
    method = Line()
    assert kept(tmp_path, 4, method=method)[0] == losses and method.seen == []
    assert about(store) == before and store.load_finished() is not None


def test_a_damaged_lora_of_a_finished_run_is_written_again_from_its_state(tmp_path):
    """The hash is that of all our files; the metadata says that it is one of ours."""
    ours = {"ss_training_comment": "trained by Trainyard"}
    method = Line()
    store = folder(tmp_path, None, 3)
    store.export_lora = lambda step: LoraFile({"w": method.w.detach().clone()}, ours, step)
    train(method, RunSettings(steps=3, learning_rate=0.05), store=store)
    good = store.lora_path(3).read_bytes()
    assert store.load_finished() is not None
    store.lora_path(3).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert store.load_finished() is None
    train(method, RunSettings(steps=3, learning_rate=0.05), store=store)
    assert store.lora_path(3).read_bytes() == good


@pytest.mark.parametrize("file", ["resume.state", "run.json", "toy.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_told_before_any_training(kind, file, tmp_path):
    store = folder(tmp_path, None, 3)
    (store.folder / file).mkdir(parents=True) if kind == "folder" else (
        store.folder.mkdir(),
        os.mkfifo(store.folder / file),
    )
    with pytest.raises(ValueError, match="is no regular file, so the run cannot be saved there. Delete or move it"):
        store.check_writable()


def test_a_name_too_long_for_this_very_disk_is_told_before_any_training(tmp_path, monkeypatch):
    """Encrypted home folders allow 143 bytes."""
    monkeypatch.setattr(os, "pathconf", lambda folder, what: 143, raising=False)
    folder(tmp_path, None, 3, name="x" * 100).check_writable()
    with pytest.raises(
        ValueError, match=r"too long for this disk.*would have a name of 173 bytes, and 143 are allowed"
    ):
        folder(tmp_path, None, 3, name="あ" * 50).check_writable()


# -- one at a time -----------------------------------------------------------------------------------------------------


def test_a_run_at_work_is_neither_trained_twice_nor_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("trainyard.trainers.run_records.LOCK_SECONDS", 0.05)
    _, store = kept(tmp_path, 3)
    with store.hold():
        with pytest.raises(RunInUse, match="is in use: it is being trained"), folder(tmp_path, None, 3).hold():
            pass
        with pytest.raises(RunInUse):
            delete_run_folder(tmp_path, store.folder.name)
        with folder(tmp_path, None, 3, name="other").hold():
            pass
    assert store.load()["step"] == 3
    assert delete_run_folder(tmp_path, store.folder.name) > 0 and not store.folder.exists()


HOLDER = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_the_process_that_held_it_however_it_dies(tmp_path, monkeypatch):
    monkeypatch.setattr("trainyard.trainers.run_records.LOCK_SECONDS", 0.05)
    _, store = kept(tmp_path, 3)
    with store.hold():
        pass
    (lock,) = (tmp_path / ".locks").iterdir()
    other = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(RunInUse):
        delete_run_folder(tmp_path, store.folder.name)
    other.kill()
    other.communicate()
    assert delete_run_folder(tmp_path, store.folder.name) > 0


def test_four_deletions_at_once_delete_once_and_refuse_three(tmp_path):
    _, store = kept(tmp_path, 3)

    def delete(_):
        try:
            return delete_run_folder(tmp_path, store.folder.name)
        except ValueError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        told = list(pool.map(delete, range(4)))
    assert sum(isinstance(one, int) for one in told) == 1
    assert all(isinstance(one, int) or "There is no run in" in one for one in told)
    assert [entry.name for entry in tmp_path.iterdir()] == [".locks"]


def test_what_a_killed_process_left_half_written_is_gone_when_the_run_goes_on(tmp_path):
    _, store = kept(tmp_path, 3)
    store.samples_folder.mkdir()
    for part in (store.folder / ".toy.safetensors.1.part", store.samples_folder / ".step000100.jpg.2.part"):
        part.write_bytes(b"half")
    with store.hold():
        assert not list(tmp_path.rglob("*.part")) and store.load()["step"] == 3


def test_a_folder_without_a_run_has_nothing_to_load(tmp_path):
    store = folder(tmp_path, None, 3)
    assert store.load() is None and store.load_finished() is None and not store.folder.exists()


# -- finished ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_found_again_by_another_process(tmp_path):
    losses, _ = kept(tmp_path, 4)
    again = RunFolder(tmp_path, "toy", "0123456789abcdef", {}, 4)
    lora, found = again.load_finished()
    assert found == losses and lora.steps == 4 and lora.metadata["ss_steps"] == "4"
    assert torch.equal(lora["w"], read_state_tree(again.state_path)["params"][0])


@pytest.mark.parametrize("missing", ["toy.safetensors", "resume.state", "run.json"])
def test_a_run_that_misses_a_file_is_not_taken_for_finished_and_can_be_finished_again(missing, tmp_path):
    losses, store = kept(tmp_path, 4)
    before = store.lora_path(4).read_bytes()
    (store.folder / missing).unlink()
    assert store.load_finished() is None
    assert kept(tmp_path, 4)[0] == losses
    assert store.load_finished() is not None and store.lora_path(4).read_bytes() == before


def test_a_finished_lora_with_a_flipped_bit_in_its_metadata_is_made_again(tmp_path):
    _, store = kept(tmp_path, 4)
    whole = store.lora_path(4).read_bytes()
    at = whole.index(b"ss_steps")
    store.lora_path(4).write_bytes(whole[:at] + b"r" + whole[at + 1 :])
    assert store.load_finished() is None
    kept(tmp_path, 4)
    assert store.lora_path(4).read_bytes() == whole


def test_a_longer_run_is_not_finished_by_the_lora_of_the_shorter_one(tmp_path, monkeypatch):
    """3 steps are done; the run goes on to 6 and dies between its state and its LoRA: `toy.safetensors` is still that
    of step 3."""
    kept(tmp_path, 3)

    def die(path, made, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainyard.trainers.runs.write_lora", die)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, 6)
    monkeypatch.undo()
    store = folder(tmp_path, None, 6)
    assert store.load()["step"] == 6 and read_safetensors(store.lora_path(6))[1]["ss_steps"] == "3"
    assert store.load_finished() is None
    _, store = kept(tmp_path, 6)
    lora, losses = store.load_finished()
    assert lora.metadata["ss_steps"] == "6" and len(losses) == 6


def test_a_full_disk_at_the_lora_keeps_the_state(tmp_path, monkeypatch):
    def full(path, made, *rest):
        raise OSError(28, "No space left on device")

    whole, _ = kept(tmp_path / "whole", 4)
    monkeypatch.setattr("trainyard.trainers.runs.write_lora", full)
    with pytest.raises(OSError, match="No space left"):
        kept(tmp_path / "full", 4)
    monkeypatch.undo()
    method = Line()
    assert kept(tmp_path / "full", 4, method=method)[0] == whole
    assert method.seen == [], "the steps were done, only the file was missing"


def test_a_run_folder_that_moves_takes_its_run_along(tmp_path):
    losses, _ = kept(tmp_path / "old", 3)
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert folder(tmp_path / "new", None, 3).load_finished()[1] == losses
