"""A run from the page's side: whatever happens to it, it ends, is listed, and can be deleted, by our own page only."""

import concurrent.futures
import json
import os
import sys
import urllib.error
import urllib.request

import comfy.model_management as mm
import pytest
from trainyard.nodes import paths
from trainyard.nodes.page import live, run_routes
from trainyard.nodes.page.same_origin import find_origin_problem
from trainyard.nodes.train.job import TrainTask
from trainyard.nodes.train.train_lora import LoraTask
from trainyard.tests.comfy.test_train_lora import job, result
from trainyard.trainers import run_records
from trainyard.trainers.loop import TrainingClock
from trainyard.trainers.runs import RunFolder


@pytest.fixture(autouse=True)
def fresh_page(monkeypatch):
    live.LIVE_RUNS.clear()
    monkeypatch.setattr(run_records, "LOCK_SECONDS", 0.1)
    yield
    live.LIVE_RUNS.clear()


def run_folder(name="test"):
    (folder,) = paths.runs_folder().glob(f"{name}-*")
    return folder


def only_live_run():
    (one,) = live.LIVE_RUNS.values()
    return one


# -- every way out ends the live record --------------------------------------------------------------------------------

ERRORS = {
    "error": (lambda: ValueError("no such prompt"), live.FAILED, "no such prompt"),
    "error without words": (lambda: RuntimeError("\n"), live.FAILED, "RuntimeError"),
    "interrupt": (lambda: mm.InterruptProcessingException(), live.STOPPED, "stopped before its first step"),
    "exit": (lambda: SystemExit(), live.STOPPED, "stopped before its first step"),
}
STAGES = {
    "found finished": (RunFolder, "load_finished"),
    "writable": (RunFolder, "check_writable"),
    "resumed": (RunFolder, "load_batch_sizes"),
    "prompts": (LoraTask, "encode_prompts"),
    "shapes": (TrainTask, "extra_memory"),
    "build": (LoraTask, "build"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS)
def test_a_run_that_ends_before_its_first_step_is_not_shown_as_training(folders, monkeypatch, error, stage):
    make_error, status, text = ERRORS[error]

    def fail(*_, **__):
        raise make_error()

    monkeypatch.setattr(*STAGES[stage], fail)
    with pytest.raises(type(make_error())):
        result(job())
    one = only_live_run()
    assert (one.status, one.text) == (status, text) and live.find_active_run(one.folder) is None
    assert not [run for run in run_routes.list_all_runs() if run["status"] == "training"]


def test_a_run_whose_states_are_all_cut_off_fails_in_words_and_can_be_deleted(folders):
    result(job(steps=2))
    folder = run_folder()
    (folder / "run.json").write_text("{")
    (folder / "resume.state").write_bytes((folder / "resume.state").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"resume\.state is not a readable safetensors file.*Move the folder .* away"):
        result(job(steps=2))
    (shown,) = run_routes.list_all_runs()
    assert (shown["status"], shown["folder"]) == ("damaged", folder.name) and only_live_run().status == live.FAILED
    assert shown["text"].startswith("run.json is cut off or is no JSON")
    assert run_routes.delete_saved_run(folder.name)["freed"] > 0 and run_routes.list_all_runs() == []


def test_a_damaged_state_goes_on_from_the_one_before_says_so_and_gives_the_same_bytes(folders):
    result(job(name="whole", steps=6, save_every=2))
    whole = (run_folder("whole") / "whole.safetensors").read_bytes()
    result(job(steps=4, save_every=2))
    state = run_folder() / "resume.state"
    blob = state.read_bytes()
    state.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    lora, _, line = result(job(steps=6, save_every=2))
    assert "resume.state is damaged" in line and "goes on from the save before it, step 2" in line
    from safetensors.torch import load

    made, expected = load((run_folder() / "test.safetensors").read_bytes()), load(whole)
    assert made.keys() == expected.keys() and all(made[key].equal(expected[key]) for key in expected)


def test_a_run_cannot_be_deleted_under_its_hands_even_when_the_page_does_not_know_of_it(folders, monkeypatch):
    """As another server on the same output folder would: it has no live record of the run."""
    told, due = [], TrainingClock.save_due

    def delete(*args):
        if args[1] == 2:
            live.LIVE_RUNS.clear()
            with concurrent.futures.ThreadPoolExecutor(1) as other, pytest.raises(ValueError) as refused:
                other.submit(run_routes.delete_saved_run, run_folder().name).result()
            told.append(str(refused.value))
        return due(*args)

    result(job(steps=1))
    monkeypatch.setattr(TrainingClock, "save_due", delete)
    result(job(steps=4))
    assert len(told) == 1 and "is in use: it is being trained" in told[0]
    assert (
        json.loads((run_folder() / "run.json").read_text())["step"] == 4
        and (run_folder() / "test.safetensors").exists()
    )


# -- what the page asks ------------------------------------------------------------------------------------------------


def make_run(name, **files):
    folder = paths.runs_folder() / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / f"{file}.json").write_text(text)
    return folder


def test_the_list_comes_whatever_lies_in_one_run(folders):
    good = json.dumps({"name": "good", "step": 1, "steps": 2, "why": "stopped"})
    for name, text in {"a": "{}", "b": "[" * 50_000, "c": '{"name": 1}', "good": good}.items():
        make_run(name, run=text)
    os.mkfifo(make_run("pipe") / "run.json")
    shown = {run["folder"]: run for run in run_routes.list_all_runs()}
    assert {name: run["status"] for name, run in shown.items()} == {
        "a": "damaged", "b": "damaged", "c": "damaged", "pipe": "damaged", "good": "stopped",
    }  # fmt: skip
    assert all(run["text"].startswith("run.json ") for run in shown.values() if run["status"] == "damaged")
    json.dumps(list(shown.values()), allow_nan=False)
    for name in ("a", "b", "c", "pipe"):
        run_routes.delete_saved_run(name)
    assert [run["folder"] for run in run_routes.list_all_runs()] == ["good"]


@pytest.fixture
def default_recursion_limit():
    """torch.compile raises Python's limit for good, and then a deeper graph can be read."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("default_recursion_limit")
@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"workflow": ' + "[" * 900 + "]" * 900 + "}"])
def test_a_graph_that_cannot_be_read_is_told_in_words(folders, text):
    make_run("odd", run="{}", graph=text)
    with pytest.raises(ValueError, match=r"graph\.json"):
        run_routes.read_run_graph("odd")


def test_a_graph_with_numbers_that_json_does_not_have_can_be_opened(folders):
    make_run("odd", run="{}", graph='{"workflow": {"zoom": NaN}}')
    assert run_routes.read_run_graph("odd") == {"workflow": {"zoom": None}}


# -- who may change something ------------------------------------------------------------------------------------------

OWN = "127.0.0.1:8188"
ACCEPTED = [
    {"Host": OWN, "Origin": "http://127.0.0.1:8188"},
    {"Host": "localhost:8188", "Origin": "http://localhost:8188", "Sec-Fetch-Site": "same-origin"},
    {"Host": OWN, "Sec-Fetch-Site": "same-origin"},
    {"Host": "[::1]:8188", "Origin": "http://[::1]:8188"},
    {"Host": "192.168.1.5", "Origin": "http://192.168.1.5"},
    {"Host": "192.168.1.5:80", "Origin": "http://192.168.1.5"},
    {"Host": "workstation:8188", "Origin": "http://workstation:8188"},
    {"Host": "nas.local:8188", "Origin": "http://nas.local:8188"},
    {"Host": "comfy.example.org", "Origin": "https://comfy.example.org"},
    {"Host": "comfy.example.org:443", "Origin": "https://comfy.example.org"},
    {"Host": OWN, "Origin": "http://trusted.example", "Sec-Fetch-Site": "cross-site"},
]
REFUSED = [
    ({"Host": OWN}, "does not say where it comes from"),
    ({"Host": OWN, "Origin": "null"}, "comes from 'null'"),
    ({"Host": OWN, "Origin": ""}, "comes from ''"),
    ({"Host": OWN, "Origin": "file://"}, "comes from 'file://'"),
    ({"Host": OWN, "Origin": "http://evil.example"}, "comes from 'http://evil.example'"),
    ({"Host": OWN, "Origin": "http://127.0.0.1:9999"}, "comes from 'http://127.0.0.1:9999'"),
    ({"Host": OWN, "Origin": "http://127.0.0.1"}, "comes from 'http://127.0.0.1'"),
    ({"Host": OWN, "Origin": "http://127.0.0.1:x"}, "comes from 'http://127.0.0.1:x'"),
    ({"Host": OWN, "Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "same-site"}, "another site"),
    ({"Host": "evil.example:8188", "Origin": "http://evil.example:8188"}, "anybody could have pointed at it"),
    ({"Host": "evil.example", "Origin": "http://evil.example"}, "anybody could have pointed at it"),
    ({"Host": "evil.example", "Sec-Fetch-Site": "same-origin"}, "anybody could have pointed at it"),
    ({"Origin": "http://127.0.0.1:8188"}, "this server was asked as None"),
    ({"Origin": "null"}, "this server was asked as None"),
]  # fmt: skip


@pytest.mark.parametrize("headers", ACCEPTED, ids=str)
def test_requests_of_our_own_page_are_accepted(headers):
    assert find_origin_problem(headers, "http://trusted.example") == ""


@pytest.mark.parametrize("headers, reason", REFUSED, ids=str)
def test_requests_from_elsewhere_are_refused_with_the_reason(headers, reason):
    assert reason in find_origin_problem(headers, "http://trusted.example")


def ask(server, path, **headers):
    """(status, body) of a POST with exactly these headers."""
    request = urllib.request.Request(
        server.url + path, b"", {name.replace("_", "-"): text for name, text in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_real_server_lists_odd_runs_and_deletes_them_once_for_our_own_page_only(server):
    root = server.output("loras", "trainyard")
    for name, text in {"odd-empty": "{}", "odd-deep": "[" * 50_000, "odd-graph": "{}"}.items():
        (root / name).mkdir(parents=True)
        (root / name / "run.json").write_text(text)
    os.mkfifo(root / "odd-graph" / "graph.json")
    shown = {run["folder"]: run["status"] for run in server.get("/trainyard/runs")}
    assert {name: shown.get(name) for name in ("odd-empty", "odd-deep")} == {
        "odd-empty": "damaged",
        "odd-deep": "damaged",
    }
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get("/trainyard/runs/odd-graph/graph")
    assert refused.value.code == 400 and b"no regular file" in refused.value.read()
    path, own = "/trainyard/runs/odd-empty/delete", f"http://127.0.0.1:{server.port}"
    for headers in ({}, {"Origin": "null"}, {"Host": "evil.example", "Origin": "http://evil.example"}):
        status, body = ask(server, path, **headers)
        assert status == 403 and "Nothing was changed" in body
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        told = sorted(status for status, _ in pool.map(lambda _: ask(server, path, Origin=own), range(4)))
    assert told == [200, 400, 400, 400] and not (root / "odd-empty").exists()
    for name in ("odd-deep", "odd-graph"):
        assert ask(server, f"/trainyard/runs/{name}/delete", Origin=own)[0] == 200
