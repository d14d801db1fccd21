"""Files survive crashes and full disks, hold the same bytes for the same content, and say what is in them."""

import concurrent.futures
import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from trainyard.tests.unit.toy import rng
from trainyard.trainers import files
from trainyard.trainers.files import (
    LoraFile,
    lora_metadata,
    read_lora,
    read_safetensors,
    read_state_tree,
    tensor_hash,
    write_bytes_atomically,
    write_lora,
    write_safetensors,
    write_state_tree,
)
from trainyard.trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings

RECORDS = {"adapter": AdapterSettings, "optimizing": OptimizerSettings, "noise": NoiseSettings, "run": RunSettings}


def metadata(*, dataset=None, base="sdxl_base_v1-0", **records):
    made = {name: records.get(name, record()) for name, record in RECORDS.items()}
    about = dict(
        title="star",
        architecture="stable-diffusion-xl-v1-base",
        prediction="epsilon",
        resolution="1024x1024",
        steps=300,
    )
    return lora_metadata(base=base, dataset=dataset or {"images": 12, "dropout": 0.1}, **about, **made)


def lora(value=1.0):
    key = "lora_unet_attn_to_q"
    up, down = torch.full((3, 2), value), torch.randn(2, 3, generator=rng())
    return LoraFile(
        {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)},
        metadata(),
        300,
    )


def names(folder):
    """Every file, hidden ones too."""
    return sorted(os.listdir(folder))


# -- atomic ------------------------------------------------------------------------------------------------------------


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_rubbish_and_says_how_much_is_needed(fails, tmp_path, monkeypatch):
    path = tmp_path / "star.safetensors"
    write_bytes_atomically(path, b"old")
    monkeypatch.setattr(os, fails, no_space)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 2**19))
    with pytest.raises(
        OSError, match=r"could not be written \(No space left on device\): 1\.5 MiB are needed and 0\.5 MiB are free"
    ) as full:
        write_bytes_atomically(path, bytes(3 * 2**19))
    assert full.value.errno == errno.ENOSPC and str(path) in str(full.value)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["star.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_really_full_is_told_apart_from_success(tmp_path, monkeypatch):
    """/dev/full takes no byte: the operating system's own ENOSPC, from write or flush."""
    import builtins

    real = open
    monkeypatch.setattr(
        builtins, "open", lambda path, mode="r", *a, **k: real("/dev/full" if mode == "wb" else path, mode, *a, **k)
    )
    with pytest.raises(OSError, match="No space left on device"):
        write_bytes_atomically(tmp_path / "star.safetensors", b"new")
    assert names(tmp_path) == []


def test_an_interrupt_while_writing_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    path = tmp_path / "star.safetensors"
    write_bytes_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["star.safetensors"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    write_bytes_atomically(tmp_path / "new folder" / "star", b"new")
    assert order == ["sync", "replace"] and names(tmp_path / "new folder") == ["star"]


def dead_process_id():
    """The id of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_what_a_dead_process_left_half_written_is_removed_by_the_next_one(tmp_path, monkeypatch):
    """Also when the next process has the same id, as in a container that starts again."""
    here = tmp_path / "loras"
    here.mkdir()
    dead, same_id, works, elsewhere, foreign = (
        f".{files.MACHINE}-00000000-0.{dead_process_id()}.part",
        f".{files.MACHINE}-00000000-1.{os.getpid()}.part",
        f".{files.MACHINE}-00000000-2.{os.getppid()}.part",
        ".00000000-00000000-3.1.part",
        ".model.part",
    )
    for name in (dead, same_id, works, elsewhere):
        (here / name).write_bytes(b"half")
    (here / foreign).mkdir()
    os.utime(here / foreign, (0, 0))
    write_bytes_atomically(here / "star", b"new")
    assert names(here) == sorted([works, elsewhere, foreign, "star"])
    os.utime(here / elsewhere, (time.time() - 7200,) * 2)
    files.remove_stale_parts(here)
    assert names(here) == sorted([works, foreign, "star"])


def test_two_threads_that_write_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    """Both wait until both parts are written."""
    both, sync = threading.Barrier(2), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (sync(descriptor), both.wait(10)))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda blob: write_bytes_atomically(tmp_path / "star", blob), (b"one", b"two")))
    assert (tmp_path / "star").read_bytes() in (b"one", b"two") and names(tmp_path) == ["star"]


def test_the_longest_name_of_a_disk_can_be_written(tmp_path):
    write_bytes_atomically(tmp_path / ("x" * 255), b"new")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"new"


def test_a_name_that_is_too_long_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="the name is not possible here. Choose a shorter one"):
        write_bytes_atomically(tmp_path / ("あ" * 86), b"new")


# -- the same bytes ----------------------------------------------------------------------------------------------------


def test_the_same_content_gives_the_same_bytes_whatever_the_order_of_its_metadata(tmp_path):
    """The library keeps metadata in a hash map: without care two writes in one process differ."""
    tensors = {f"layer{i}": torch.randn(3, generator=rng(i)) for i in range(3)}
    about = {f"key{i}": str(i) for i in range(20)}
    blobs = set()
    for turn in range(8):
        items = list(about.items())
        write_safetensors(tmp_path / "f", tensors, dict(items[turn:] + items[:turn]))
        blobs.add((tmp_path / "f").read_bytes())
    assert len(blobs) == 1
    back, told = read_safetensors(tmp_path / "f")
    assert told == about and all(torch.equal(back[k], v) for k, v in tensors.items())


def test_the_header_stays_aligned_and_readable_by_the_library(tmp_path):
    """The header's length is a multiple of 8 (the format's own rule), with text of any language in it."""
    from safetensors import safe_open

    write_safetensors(tmp_path / "f", {"a": torch.ones(2)}, {"title": "звезда ★", "b": "1"})
    length = int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")
    assert length % 8 == 0
    with safe_open(tmp_path / "f", "pt") as file:
        assert file.metadata() == {"title": "звезда ★", "b": "1"}


def test_tensors_that_were_read_do_not_change_with_their_file(tmp_path):
    """Mapped memory would, and on Windows the file could not be replaced while a resumed run holds them."""
    path = tmp_path / "f"
    write_safetensors(path, {"a": torch.ones(1000)})
    tensors, _ = read_safetensors(path)
    with open(path, "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert tensors["a"].sum() == 1000


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 100])
def test_a_damaged_file_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a readable safetensors file"):
        read_safetensors(tmp_path / "bad.safetensors")


def test_a_file_cut_short_is_an_error(tmp_path):
    write_safetensors(tmp_path / "f", {"a": torch.ones(1000)})
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_safetensors(tmp_path / "f")


# -- trees -------------------------------------------------------------------------------------------------------------


def same(a, b):
    """Equal in type, value and bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a


TREES = {
    "empty": {},
    "kinds": {"i": 2**62, "f": 0.1, "nan": math.nan, "inf": -math.inf, "t": True, "n": None, "s": "ü", "list": [], "tuple": (), "dict": {}},
    "keys of two kinds": {1: "int", "1": "text", (2, 3): "tuple"},
    "nested": {"groups": [{"betas": (0.9, 0.999), "params": [0, 1]}], "state": {0: {"step": torch.tensor(3.0)}}},
    "tensors": {"empty": torch.zeros(0, 3), "scalar": torch.tensor(7), "bf16": torch.ones(2, dtype=torch.bfloat16), "nan": torch.tensor([math.nan]),
                "turned": torch.arange(6.0).view(2, 3).T, "bool": torch.tensor([True, False]), "uint8": torch.arange(3, dtype=torch.uint8)},
    "words of its own": {"dict": [1], "tensor": "0", "tuple": {"tensor": torch.ones(1)}},
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_equal_in_every_bit(name, tmp_path):
    write_state_tree(tmp_path / "state", TREES[name])
    assert same(TREES[name], read_state_tree(tmp_path / "state")), read_state_tree(tmp_path / "state")


def test_one_tensor_in_two_places_is_two_tensors_afterwards(tmp_path):
    shared = torch.ones(2)
    write_state_tree(tmp_path / "state", {"a": shared, "b": shared, "part": shared[:1]})
    back = read_state_tree(tmp_path / "state")
    back["a"].zero_()
    assert back["b"].tolist() == [1.0, 1.0] and back["part"].tolist() == [1.0]


def test_a_lora_is_no_saved_state(tmp_path):
    write_lora(tmp_path / "star.safetensors", lora())
    with pytest.raises(ValueError, match=r"star\.safetensors is not a saved state"):
        read_state_tree(tmp_path / "star.safetensors")


STATE = {
    "step": 3,
    "losses": torch.arange(3.0),
    "params": [torch.ones(4, 3), torch.ones(2, dtype=torch.bfloat16)],
    "why": None,
}


def flipped(blob, bit):
    """The bytes with one bit turned over."""
    return blob[: bit // 8] + bytes([blob[bit // 8] ^ 1 << bit % 8]) + blob[bit // 8 + 1 :]


@pytest.mark.parametrize("start", [0, 5, 11])
def test_no_flipped_bit_of_a_state_is_accepted(start, tmp_path):
    """Every 17th bit from three starts: lengths, names, types, shapes, the tree, the checksum and the values."""
    path = tmp_path / "state"
    write_state_tree(path, STATE)
    blob = path.read_bytes()
    for bit in range(start, 8 * len(blob), 17):
        path.write_bytes(flipped(blob, bit))
        with pytest.raises(ValueError, match=r"state is (damaged|not a)"):
            read_state_tree(path)


def test_a_state_that_is_cut_off_anywhere_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "state"
    write_state_tree(path, STATE)
    blob = path.read_bytes()
    for length in range(0, len(blob), 13):
        path.write_bytes(blob[:length])
        with pytest.raises(ValueError, match="state is not a readable safetensors file"):
            read_state_tree(path)


def test_a_state_of_the_first_releases_has_no_checksum_and_is_read(tmp_path):
    write_safetensors(tmp_path / "state", {"0": torch.ones(2)}, {"tree": '{"dict": [["w", {"tensor": "0"}]]}'})
    assert read_state_tree(tmp_path / "state")["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "tree", ["", "{", "{}", '{"tensor": "7"}', '{"dict": 5}', '{"dict": [[1]]}', '{"x": 1}', "[" * 100_000]
)
def test_a_tree_that_nobody_wrote_is_an_error_in_words(tree, tmp_path):
    write_safetensors(tmp_path / "state", {"0": torch.ones(2)}, {"tree": tree})
    with pytest.raises(ValueError, match="state is damaged: "):
        read_state_tree(tmp_path / "state")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state")
    with pytest.raises(ValueError, match="state is not a readable safetensors file: it is no regular file"):
        read_state_tree(tmp_path / "state")


# -- LoRA files --------------------------------------------------------------------------------------------------------


def test_a_lora_file_holds_its_tensors_its_metadata_and_a_hash_of_its_values(tmp_path):
    made = lora()
    write_lora(tmp_path / "star.safetensors", made, {"prompt": "{}"})
    tensors, told = read_safetensors(tmp_path / "star.safetensors")
    assert all(torch.equal(tensors[k], v) for k, v in made.items()) and tensors.keys() == made.keys()
    assert told.pop("prompt") == "{}"
    assert told.pop("trainyard.metadata_hash").startswith("sha256 of the metadata: ")
    assert told.pop("modelspec.hash_sha256") == f"0x{tensor_hash(tensors)}"
    assert told == made.metadata


def test_the_hash_by_hand():
    """sha256 over name and bytes, in the order of the names: 1.0 is 0000803f in little-endian fp32."""
    expected = hashlib.sha256(b"a" + bytes.fromhex("0000803f") + b"b" + bytes.fromhex("00000040")).hexdigest()
    assert tensor_hash({"b": torch.tensor([2.0]), "a": torch.tensor(1.0)}) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_lora_with_nan_is_refused_and_the_old_file_stays(value, tmp_path):
    path = tmp_path / "star.safetensors"
    write_lora(path, lora())
    before = path.read_bytes()
    with pytest.raises(
        ValueError,
        match=r"holds NaN or infinite values \(1 tensors, first lora_unet_attn_to_q.lora_up.weight\).*Lower the learning rate",
    ):
        write_lora(path, lora(value))
    assert path.read_bytes() == before


def test_an_empty_lora_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="This LoRA is empty: no layer has learnt anything yet. Train for at least one step"
    ):
        write_lora(tmp_path / "star.safetensors", LoraFile({}, metadata()))
    assert names(tmp_path) == []


def test_a_damaged_lora_of_ours_is_told_by_its_hash(tmp_path):
    """Every 101st bit of the values: each is found by the hash that the file has had since the first release."""
    path = tmp_path / "star.safetensors"
    write_lora(path, lora())
    blob = path.read_bytes()
    assert read_lora(path).keys() == lora().keys() and read_lora(path).steps == 300
    values = 8 * (8 + int.from_bytes(blob[:8], "little"))
    for bit in range(values, 8 * len(blob), 101):
        path.write_bytes(flipped(blob, bit))
        with pytest.raises(ValueError, match=r"star\.safetensors is damaged: its values are not those that were saved"):
            read_lora(path)


@pytest.mark.parametrize("start", range(7))
def test_no_flipped_bit_in_the_header_of_a_lora_goes_unnoticed(start, tmp_path):
    """Every 7th bit from each start, so each bit of lengths, names, types, shapes, metadata and checksums: an error, a
    word on it, or the same content."""
    path = tmp_path / "star.safetensors"
    write_lora(path, LoraFile(lora(), {"ss_training_comment": files.TRAINING_COMMENT, "ss_steps": "300", "é": ""}))
    blob, written = path.read_bytes(), read_safetensors(path)[1]
    assert read_lora(path).damage == ""
    for bit in range(start, 8 * (8 + int.from_bytes(blob[:8], "little")), 7):
        path.write_bytes(flipped(blob, bit))
        try:
            back = read_lora(path)
        except ValueError:
            continue
        same_content = back.metadata == written and all(same(back[key], value) for key, value in lora().items())
        assert back.damage or (same_content and back.keys() == lora().keys()), bit


def test_metadata_that_another_program_changed_is_told_and_the_lora_is_read(tmp_path):
    """Also where it took our mark away, or kept the checksum while it changed all values, as kohya's resizing does."""
    path = tmp_path / "star.safetensors"
    write_lora(path, lora())
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, tensors, {**metadata, "ss_output_name": "moon"})
    assert "the metadata is not what was saved (trainyard.metadata_hash differs)" in read_lora(path).damage
    resized = {key: value * 2 for key, value in tensors.items()}
    write_safetensors(path, resized, {**metadata, "ss_training_comment": "resized; trained by Trainyard"})
    assert read_lora(path).damage and read_lora(path)["lora_unet_attn_to_q.alpha"] == 4
    write_lora(path, read_lora(path))
    assert not read_lora(path).damage


def test_types_and_shapes_that_were_changed_are_told(tmp_path):
    """The checksum of the values is of their bytes, which are the same."""
    path = tmp_path / "star.safetensors"
    write_lora(path, lora())
    tensors, metadata = read_safetensors(path)
    for change in (lambda value: value.view(torch.int32), lambda value: value.reshape(-1)):
        write_safetensors(path, {key: change(value) for key, value in tensors.items()}, metadata)
        assert read_lora(path).damage


def test_a_lora_of_the_first_releases_has_no_checksum_of_its_metadata_and_is_read(tmp_path):
    write_safetensors(tmp_path / "old", lora(), {**metadata(), "modelspec.hash_sha256": f"0x{tensor_hash(lora())}"})
    assert read_lora(tmp_path / "old").damage == "" and read_lora(tmp_path / "old").steps == 300


def test_a_lora_of_another_tool_is_read_whatever_its_hash_says(tmp_path):
    about = {"modelspec.hash_sha256": "0x00", "ss_training_comment": "mine", "ss_steps": "many"}
    write_safetensors(tmp_path / "other", {"w": torch.ones(1)}, about)
    assert read_lora(tmp_path / "other")["w"].item() == 1.0 and read_lora(tmp_path / "other").steps == 0


def test_metadata_says_what_other_tools_look_for():
    told = metadata(run=RunSettings(steps=400, batch=2, seed=7), adapter=AdapterSettings(rank=8, alpha=4.0))
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False", "ss_max_train_steps": "400", "ss_steps": "300", "ss_batch_size_per_device": "2", "ss_seed": "7",
        "ss_num_train_images": "12", "ss_optimizer": "AdamW", "ss_min_snr_gamma": "None", "ss_output_name": "star",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.title": "star",
        "modelspec.resolution": "1024x1024", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {k: told[k] for k in expected} == expected
    assert all(isinstance(v, str) for v in told.values())


def test_metadata_follows_the_settings():
    assert metadata(adapter=AdapterSettings(rank=8))["ss_network_alpha"] == "8", "alpha 0 means alpha = rank"
    conv = json.loads(metadata(adapter=AdapterSettings(conv=True, conv_rank=4))["ss_network_args"])
    assert conv == {"conv_dim": 4, "conv_alpha": 4} and metadata()["ss_network_args"] == "{}"
    assert metadata(noise=NoiseSettings(weighting="min-SNR", gamma=3.0))["ss_min_snr_gamma"] == "3.0"
    assert metadata(base="sd_v2-1-768-v")["ss_v2"] == "True"
    assert metadata()["ss_text_encoder_lr"] == "0"
    both = metadata(adapter=AdapterSettings(text_encoder=True), run=RunSettings(learning_rate=1e-3))
    assert float(both["ss_text_encoder_lr"]) == pytest.approx(1e-4) and both["ss_unet_lr"] == "0.001"


def test_the_records_of_the_run_come_back_from_the_metadata():
    records = {"adapter": AdapterSettings(rank=3, targets="attention"), "optimizing": OptimizerSettings(clip=0.5), "noise": NoiseSettings(),
               "run": RunSettings(seed=2**63 - 1)}  # fmt: skip
    told = json.loads(metadata(**records)["trainyard"])
    assert {record: told[type(record).__name__] for record in records.values()} == {
        record: record.to_dict() for record in records.values()
    }
    assert [type(record).from_dict(told[type(record).__name__]) for record in records.values()] == list(
        records.values()
    )


def test_no_clock_time_is_in_a_file(tmp_path, monkeypatch):
    """The same run in another year gives the same bytes."""
    write_lora(tmp_path / "a", lora())
    monkeypatch.setattr("time.time", lambda: 4e9)
    write_lora(tmp_path / "b", lora())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
