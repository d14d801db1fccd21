"""What goes wrong while people train, tried for real: each time a word that says what to do, nothing lost, the model
and the host as before."""

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import signal
import time
import uuid
import warnings

import comfy.model_management as mm
import pytest
import torch
from trainyard.nodes import paths
from trainyard.nodes.train import planner
from trainyard.nodes.train.previews import PreviewRenderer
from trainyard.tests.comfy.families import make
from trainyard.tests.comfy.server import Server
from trainyard.tests.comfy.test_host import fingerprint, left_behind
from trainyard.tests.comfy.test_previews import looking
from trainyard.tests.comfy.test_train_lora import Poisoned, data, job, result, state, with_task
from trainyard.tests.comfy.test_train_lora_server import graph, make_dataset, stop_after
from trainyard.trainers import loop
from trainyard.trainers import runs as run_files
from trainyard.trainers.loop import Diverged


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextlib.contextmanager
def given_back(model):
    """The model, its classes and the host's flags are as before, whatever happens inside."""
    before, classes = fingerprint(model), {type(m): type(m).forward for m in model.model.modules()}
    habits = (mm.in_training, mm.NUM_STREAMS, torch.is_grad_enabled())
    yield
    assert fingerprint(model) == before
    assert left_behind(model) == []
    assert {type(m): type(m).forward for m in model.model.modules()} == classes
    assert (mm.in_training, mm.NUM_STREAMS, torch.is_grad_enabled()) == habits
    assert not model.injections and not model.patches


# -- Cancel, at every stage --------------------------------------------------------------------------------------------


def pressed_when(monkeypatch, owner, name, nth=1):
    """The user presses Cancel while the nth call of owner.name is at work."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            mm.interrupt_current_processing(True)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


MOMENTS = {  # where Cancel is pressed, and at least how many steps are on the disk then
    "load": (lambda: (mm, "load_models_gpu", 1), 0),
    "measuring": (lambda: (planner, "measure_step_cost", 1), 0),
    "step": (lambda: (loop, "accumulate_gradients", 4), 3),
    "preview": (lambda: (PreviewRenderer, "sample_one_latent", 2), 2),
    "save": (lambda: (run_files, "write_state_tree", 1), 2),
}


def troubled_job(model, **more):
    a_job = job(model=model, **{"steps": 6, "save_every": 2, "checkpointing": "auto", **more})
    look = looking(previews=dict(preview_every=2, sampling_steps=2, width=128, height=128, guidance=2.0))
    return dataclasses.replace(a_job, monitoring=look)


@pytest.mark.parametrize("moment", MOMENTS)
def test_cancel_keeps_the_work_and_the_next_run_ends_as_if_it_had_never_been(folders, monkeypatch, moment):
    model, (where, least) = make("sd3", inference=True), MOMENTS[moment]
    whole = result(troubled_job(make("sd3", inference=True), name="whole"))[0]
    with given_back(model), monkeypatch.context() as patch:
        pressed_when(patch, *where())
        with pytest.raises(mm.InterruptProcessingException):
            result(troubled_job(model))
    assert not mm.processing_interrupted(), "the next prompt is not stopped too"
    kept = state()["step"] if list(paths.runs_folder().glob("test-*/run.json")) else 0
    assert least <= kept < 6
    assert equal(result(troubled_job(model))[0], whole)


# -- kill -9 in the middle of a save -----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("cut", range(4))
def test_kill_9_in_the_middle_of_a_save_costs_nothing_that_was_saved_before(folders, cut):
    """The process dies at the 1st, 2nd, ... replacement of a file by its new version after step 2 was saved."""
    whole = result(job(name="whole", steps=6, save_every=2))[0]
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            warnings.simplefilter("ignore")
            real, seen = os.replace, []

            def replace(part, path):
                if "step000002" in str(path) or seen:
                    seen.append(path)
                if len(seen) == 3 + cut:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(part, path)

            os.replace = replace
            result(job(steps=6, save_every=2))
        os._exit(1)
    _, ending = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(ending) and os.WTERMSIG(ending) == signal.SIGKILL
    assert state()["step"] in (2, 4)
    resumed = result(job(steps=6, save_every=2))[0]
    assert equal(resumed, whole)
    (folder,) = paths.runs_folder().glob("test-*")
    assert not [f for f in folder.rglob("*.safetensors") if f.stat().st_size == 0]


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_told_before_any_training(folders, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_files.tempfile, "TemporaryFile", refuse)
    model = make("sd3", inference=True)
    with (
        given_back(model),
        pytest.raises(OSError, match="cannot be saved in .*nothing was trained.*--output-directory"),
    ):
        result(job(model=model))
    assert not list(paths.runs_folder().glob("test-*")), "not even an empty folder"


def test_a_file_in_the_place_of_the_runs_folder_is_told_before_any_training(folders):
    place = paths.runs_folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"")
    with pytest.raises(OSError, match="Not a directory"):
        result(job())


def test_a_disk_that_fills_up_in_the_middle_keeps_the_last_save_and_says_how_much_is_missing(folders, monkeypatch):
    whole = result(job(name="whole", steps=6, save_every=2))[0]
    model, real, calls = make("sd3", inference=True), os.fsync, []

    def fills_up(descriptor):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    with given_back(model), monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        with pytest.raises(OSError, match=r"MiB are needed and .* MiB are free.*Free some space and press Run again"):
            result(job(model=model, steps=6, save_every=2))
    assert state()["step"] == 2
    (folder,) = paths.runs_folder().glob("test-*")
    assert not list(folder.glob(".*")), "no half-written file stays"
    assert equal(result(job(model=model, steps=6, save_every=2))[0], whole)


# -- numbers, and previews ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4])
def test_a_loss_that_is_no_number_leaves_the_model_and_the_last_good_state(folders, step):
    model = make("sd3", inference=True)
    a_job = with_task(job(model=model, steps=step + 9, save_every=2), data=Poisoned(data(), at=step))
    with given_back(model), pytest.raises(Diverged, match="Lower the learning rate"):
        result(a_job)
    for path in paths.runs_folder().glob("test-*/*.safetensors"):
        from safetensors.torch import load_file

        assert all(value.isfinite().all() for value in load_file(path).values())


def test_trouble_in_every_preview_costs_the_previews_and_not_the_run(folders, monkeypatch):
    plain = result(troubled_job(make("sd3", inference=True), name="plain"))[0]
    model = make("sd3", inference=True)

    def broken(*_):
        raise RuntimeError("the VAE is broken")

    monkeypatch.setattr(PreviewRenderer, "decode_latent", broken)
    with given_back(model):
        lora, _, _ = result(troubled_job(model))
    assert equal(lora, plain)


# -- the real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(server):
    return make_dataset(server, "troubles")


def files(server, name):
    """sha256 of the finished LoRA of every run of that name."""
    found = sorted((server.base / "output" / "loras" / "trainyard").glob(f"{name}-*"))
    return {f.name: tensor_digest(f / f"{name}.safetensors") for f in found if (f / f"{name}.safetensors").exists()}


def tensor_digest(path):
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for key, value in sorted(load_file(path).items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def ended(server, prompt_id, seconds=300):
    """The history entry of a prompt nobody listens to."""
    deadline = time.monotonic() + seconds
    while not (found := server.history(prompt_id)):
        assert time.monotonic() < deadline, server.tail()
        time.sleep(0.1)
    return found


def queued(server, prompt):
    """The id of a prompt that was put into the queue without a listener."""
    status, body = server.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
    assert status == 200 and not body["node_errors"], body
    return body["prompt_id"]


def test_the_browser_is_closed_and_the_run_goes_on_and_is_found_when_it_comes_back(server, dataset):
    import aiohttp

    prompt = graph(server, dataset, run_name="alone", steps=8)
    client = uuid.uuid4().hex

    async def leave_in_the_middle():
        address = f"ws://127.0.0.1:{server.port}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            _, body = await asyncio.to_thread(server.post, "/prompt", {"prompt": prompt, "client_id": client})
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT and json.loads(message.data).get("type") == "progress":
                    return body["prompt_id"]

    entry = ended(server, asyncio.run(leave_in_the_middle()))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert "8 steps" in json.dumps(entry["outputs"])
    assert len(files(server, "alone")) == 1


def test_two_queued_runs_of_one_name_do_not_mix(server, dataset):
    """Another seed is another run, in another folder; the same recipe is trained once."""
    ids = [queued(server, graph(server, dataset, run_name="twins", seed=seed)) for seed in (1, 2, 1)]
    entries = [ended(server, one) for one in ids]
    assert all(entry["status"]["status_str"] == "success" for entry in entries), entries
    assert len(files(server, "twins")) == 2
    assert len(set(files(server, "twins").values())) == 2


def test_unload_models_pressed_during_training_changes_nothing(server, dataset):
    pressed = []

    def press(event):
        data = event.get("data") or {}
        if event["type"] == "progress" and data.get("node") == "4" and not pressed:
            pressed.append(server.post("/free", {"unload_models": True, "free_memory": True})[0])

    freed = server.run(graph(server, dataset, run_name="freed", steps=8), watch=press)
    assert freed.ok, freed.why
    assert pressed == [200]
    assert server.run(graph(server, dataset, run_name="kept", steps=8)).ok
    assert set(files(server, "freed").values()) == set(files(server, "kept").values())


def test_a_prompt_from_before_an_input_was_added_still_runs_and_saved_widgets_keep_their_places(server):
    """Inputs that came later are optional and come last, so neither a saved prompt nor a saved list of widget values is
    misread."""
    known = server.object_info("TrainyardTrainLora")["input"]
    first = ["steps", "learning_rate", "rank", "batch", "seed", "save_every", "run_name", "checkpointing"]
    assert [name for name in known["required"] if name not in ("model", "encoded")] == first
    widgets = [
        name for name, (kind, *_) in known["optional"].items() if kind in ("BOOLEAN", "INT", "FLOAT", "STRING", "COMBO")
    ]
    assert widgets == ["retry_cheaper", "compile_blocks"]


@pytest.mark.slow
def test_comfyui_restarted_between_two_halves_of_a_run_gives_the_same_file(tmp_path):
    steps = 12
    with Server(tmp_path / "halves") as first:
        folder = make_dataset(first)
        stopped = first.run(graph(first, folder, run_name="halves", steps=steps), watch=stop_after(first, 3))
        assert stopped.ending == "execution_interrupted", stopped.why
    with Server(first.base) as second:
        rest = second.run(graph(second, folder, run_name="halves", steps=steps))
        assert rest.ok, rest.why
        whole = second.run(graph(second, folder, run_name="whole", steps=steps))
        assert whole.ok, whole.why
        assert set(files(second, "halves").values()) == set(files(second, "whole").values())
