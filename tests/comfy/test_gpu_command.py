"""`make gpu` without a card: the command itself on a pretend card, its branches for a real one against a stand-in for
torch.cuda, and its check of gradients against gradients that are wrong."""

import contextlib
import dataclasses
import inspect
import json
import subprocess
import sys
import types

import pytest
import torch
from trainyard.benchmarks import gpu, train_lora
from trainyard.benchmarks.contenders import Finished
from trainyard.benchmarks.meters import Crossings
from trainyard.benchmarks.on_card import cards, check, flops, models, page
from trainyard.benchmarks.on_card.cases import BY_NAME, CASES, choose_cases
from trainyard.benchmarks.on_card.laps import CardLaps, follow_loop
from trainyard.benchmarks.shapes import SHAPES
from trainyard.trainers import loop

GIB = 2**30
SMALL = 2  # GiB: room for a step of the toy model, and not for that of a score model on large latents


def run_command(folder, *words):
    command = [sys.executable, str(gpu.SCRIPT), *words, "--out", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """(the finished command, its report, its page)"""
    folder = tmp_path_factory.mktemp("gpu")
    done = run_command(folder, "--pretend", str(SMALL), "--cases", "tiny", "score")
    return done, json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def row_of(report, name):
    return next(row for row in report["rows"] if row["name"] == name)


def test_the_command_runs_through_on_a_pretend_card(pretended):
    done, report, _ = pretended
    assert done.returncode == 0, done.stdout + done.stderr
    row = row_of(report, "tiny")
    assert row["status"] == "measured", row
    assert len(row["seconds"]) == 1
    assert row["peak_allocated"] > row["step_bytes"] > 0
    assert row["peak_reserved"] is None, "no allocator"
    assert row["weights_on_card"] == row["weights"] > 0
    assert 0 < row["up"] < row["weights"] / 10 and row["down"] == 0, "a batch and its captions"
    assert (row["stored"], row["computed"], row["checkpointing"], row["microbatch"]) == (
        "bfloat16",
        "bfloat16",
        "off",
        1,
    )
    assert row["useful_flops"] > 0 and row["forecast"] > 0


def test_what_does_not_fit_the_card_is_told_as_such(pretended):
    _, report, written = pretended
    row = row_of(report, "score")
    assert (row["status"], "seconds" in row) == ("does not fit", False)
    assert "out of memory" in row["why"]
    assert f"- {row['about']}, {page.SCORE_TRAINER}: does not fit, {row['why']}" in written


def test_the_report_tells_the_machine_and_claims_no_times(pretended):
    _, report, written = pretended
    machine = row_of(report, "card")["machine"]
    assert machine["torch"] == torch.__version__ and machine["memory"] > GIB
    assert {"comfyui", "commit", "dynamic_vram", "flags", "cpu", "os"} <= set(machine)
    assert "**This card is not there.**" in written
    assert "| toy SD1.5 | Trainyard, Train LoRA | bf16 | off | – | – | – |" in written


def test_without_a_card_it_says_what_to_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    done = run_command(tmp_path)
    assert done.returncode == 2
    assert "No graphics card was found: torch" in done.stdout and "--pretend 12" in done.stdout
    assert not list(tmp_path.iterdir())


# -- the processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "why"),
    [
        ("print('boom'); raise SystemExit(3)", "failed", "ended with 3: boom"),
        ("import time; time.sleep(60)", "too slow", "1 s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_a_row(tmp_path, monkeypatch, code, status, why):
    script = tmp_path / "script.py"
    script.write_text(code)
    monkeypatch.setattr(gpu, "SCRIPT", script)
    row = gpu.start_case(BY_NAME["sd15"], 1.0 if status == "too slow" else 60, None, [], tmp_path)
    assert row["status"] == status and why in row["why"]


def test_what_has_no_time_left_is_skipped_and_said(monkeypatch):
    monkeypatch.setattr(gpu, "start_case", lambda *_: {"status": "measured"})
    report = gpu.measure_all(choose_cases(["sd15"], False), 1.0, None, [], lambda report: None)
    assert [row["status"] for row in report["rows"]] == ["skipped", "skipped"]
    assert "SD1.5, 512 px, Trainyard, Train LoRA: skipped, no time left of 1 s" in page.write_page(report)


def test_a_quick_run_and_a_whole_run_fit_their_time():
    """Limits are what a case may take; one that fits takes half a minute."""
    for quick, budget in ((True, gpu.QUICK_BUDGET_S), (False, gpu.BUDGET_S)):
        assert len(choose_cases([], quick)) * gpu.START_S < budget
    assert all(case.limit_s > gpu.START_S for case in CASES)
    assert {"check", "sdxl", "sdxl core"} < {case.name for case in choose_cases([], True)}


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([{"kind": "ours", "status": "measured"}], 0),
        ([{"kind": "ours", "status": "does not fit"}], 0),
        ([{"kind": "core", "status": "failed"}], 0),
        ([{"kind": "ours", "status": "failed"}], 1),
        ([{"kind": "check", "status": "measured", "checks": [{"passes": True}, {"passes": None}]}], 0),
        ([{"kind": "check", "status": "measured", "checks": [{"passes": True}, {"passes": False}]}], 1),
    ],
)
def test_the_command_fails_when_ours_fails_or_a_check_is_wrong(rows, status):
    assert gpu.find_exit_status({"rows": rows}) == status


# -- the page ----------------------------------------------------------------------------------------------------------


def measured_row(name, **more):
    return {
        **dataclasses.asdict(BY_NAME[name]), "status": "measured", "stored": "bfloat16", "checkpointing": "off",
        "seconds": [9.0, 2.0, 2.0], "peak_allocated": 6 * GIB, "peak_reserved": 7 * GIB, "step_bytes": GIB, "up": 0, "down": 0, **more,
    }  # fmt: skip


def test_the_page_has_times_ratios_and_mfu_by_hand():
    """Ours: median 2 s for 4 images; 30 TFLOP in 2 s at 60 TFLOP/s is 25 %. Core: 6 s, 3 times ours, 30 / (6 * 60) = 8 %."""
    rows = [
        {
            **dataclasses.asdict(BY_NAME["card"]),
            "status": "measured",
            "card": {"name": "X", "memory": 8 * GIB, "matmul_flops": 60e12},
        },
        measured_row("sdxl b4", useful_flops=30e12, forecast=1.1 * GIB, accumulate=2, microbatch=2),
        measured_row("sdxl b4 core", seconds=[6.0]),
    ]
    written = page.write_page({"rows": rows, "pretend_gib": None, "flags": ["--lowvram"]})
    ours, core = (line for line in written.splitlines() if line.startswith("| SDXL"))
    assert ours.split(" | ")[3:] == [
        "off, 2 x 2",
        "2.000",
        "2.00",
        "25%",
        "",
        "6.00",
        "7.00",
        "1.00",
        "+10%",
        "0.000",
        "0.000 |",
    ]
    assert core.split(" | ")[4:8] == ["6.000", "0.67", "8%", "3.00"]
    assert "arguments --lowvram" in written


@pytest.mark.parametrize(
    ("passes", "says"),
    [(True, "agree with the CPU's in all 1 checks"), (False, "**WRONG: loss or gradients of 1 of 1")],
)
def test_the_page_begins_with_the_verdict(passes, says):
    about = {
        "model": "flux",
        "about": "toy size",
        "computed": "bfloat16",
        "loss_error": 0.1,
        "gradient_error": 0.2,
        "limits": [0.3, 0.4],
        "passes": passes,
    }
    rows = [{**dataclasses.asdict(BY_NAME["check"]), "status": "measured", "checks": [about]}]
    written = page.write_page({"rows": rows, "pretend_gib": None, "flags": []})
    assert says in written
    assert (
        f"| flux (toy size) | bfloat16 | 1.0e-01 | 2.0e-01 | 0.3 and 0.4 | {'ok' if passes else '**WRONG**'} |"
        in written
    )


# -- loss and gradients ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """Of toy Flux, on the CPU in fp32."""
    return check.compute_step(check.find_check_shape("flux"), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_that_is_right_passes_the_check(reference, dtype):
    judged = check.compare_steps(check.compute_step(check.find_check_shape("flux"), dtype, "cpu"), reference)
    assert judged["passes"], judged
    assert judged["computed"] == models.name_dtype(dtype)
    assert (judged["gradient_error"] > 1e-5) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_wrong_does_not_pass_the_check(reference, dtype):
    """Half of it, and no numbers."""
    right = check.compute_step(check.find_check_shape("flux"), dtype, "cpu")
    halved = dataclasses.replace(right, gradient=right.gradient / 2)
    lost = dataclasses.replace(right, gradient=right.gradient * float("nan"))
    assert [check.compare_steps(found, reference)["passes"] for found in (right, halved, lost)] == [True, False, False]


def test_a_check_of_blocks_at_full_width_is_flux_with_one_of_each():
    shape = check.find_check_shape("flux block")
    assert (
        shape.family.config["hidden_size"],
        shape.family.config["depth"],
        shape.family.config["depth_single_blocks"],
    ) == (3072, 1, 1)


# -- the models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "card", "memory", "stored", "why"),
    [
        (2 * GIB, 8, 32, torch.bfloat16, ""),
        (11 * GIB, 24, 32, torch.bfloat16, ""),
        (11 * GIB, 16, 32, torch.float8_e4m3fn, "22.0 GiB of weights in bfloat16, and the card has 16.0 GiB"),
        (11 * GIB, 24, 16, torch.float8_e4m3fn, "main memory has free 16.0 GiB"),
    ],
)
def test_weights_are_stored_as_card_and_main_memory_allow(count, card, memory, stored, why):
    choice = models.choose_weights(count, torch.bfloat16, card * GIB, memory * GIB)
    assert (choice.stored, choice.computed) == (stored, torch.bfloat16)
    assert why in choice.why


def test_weights_that_main_memory_cannot_hold_are_refused():
    with pytest.raises(models.DoesNotFit, match="20.0 GiB even in fp8, and 16.0 GiB of main memory are free"):
        models.choose_weights(20 * GIB, torch.bfloat16, 80 * GIB, 16 * GIB)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_random_weights_have_their_dtype_and_a_sane_scale(stored):
    network = models.make_model(
        SHAPES["flux", "tiny"], models.WeightChoice(stored, torch.bfloat16)
    ).model.diffusion_model
    assert {p.dtype for p in network.parameters()} == {stored}
    qkv = network.double_blocks[0].img_attn.qkv.weight.float()
    assert float(qkv.std()) == pytest.approx(128**-0.5, rel=0.05)
    assert torch.linalg.matrix_rank(qkv) == min(qkv.shape), "values repeat, rows do not"


def test_useful_flops_are_those_of_a_step_without_checkpoints():
    """A frozen layer costs its product forward and one product backward, and attention two and a half times its own:
    together about twice a forward."""
    forward, step = flops.count_useful_flops(SHAPES["sd15", "tiny"], 1)
    assert 1.8 < step / forward < 2.6
    assert flops.count_useful_flops(SHAPES["sd15", "tiny"], 2) == (2 * forward, 2 * step)


# -- meters ------------------------------------------------------------------------------------------------------------


def test_copies_to_a_device_are_counted_by_their_bytes():
    """8 floats by .to and 2 by copy_ are 40 bytes; what stays on its device is none."""
    x, there = torch.ones(8), torch.empty(2, device="meta")
    with Crossings() as crossed:
        x.to("meta")
        there.copy_(x[:2])
        x.to(torch.float64)
        there.to(torch.float64)
    assert (crossed.up, crossed.down) == (40, 0)


class NoCard:
    is_real = False
    synchronize = reset_peak = staticmethod(lambda: None)
    allocated_bytes, peak_bytes = staticmethod(lambda: 5), staticmethod(lambda: (9, None))


def test_steps_are_warmed_up_counted_and_timed_in_this_order():
    laps, kinds = CardLaps(NoCard(), 2, float("inf")), []
    for _ in range(laps.steps):
        laps()
        kinds.append(len(laps.cost.seconds))
        torch.ones(2).to("meta")
    laps.close()
    assert (kinds, len(laps.cost.seconds), laps.crossed.up) == ([0, 0, 0, 0, 1], 2, 8)
    assert (laps.bytes_before, laps.peak_bytes) == (5, (9, None))
    with pytest.raises(Finished):
        laps()


def test_when_time_is_up_no_further_step_is_begun():
    laps = CardLaps(NoCard(), 10, deadline=0.0)
    with contextlib.suppress(Finished):
        while True:
            laps()
    assert len(laps.cost.seconds) == 1


# -- a real card -------------------------------------------------------------------------------------------------------


class StandInCuda:
    """torch.cuda as far as CudaCard asks it. Each call must suit the real function's signature."""

    answers = {
        "is_available": False,
        "synchronize": None,
        "memory_allocated": 100,
        "max_memory_allocated": 300,
        "max_memory_reserved": 400,
        "reset_peak_memory_stats": None,
        "mem_get_info": (5 * GIB, 8 * GIB),
        "get_device_capability": (8, 6),
        "is_bf16_supported": True,
        "get_device_properties": types.SimpleNamespace(name="GeForce", multi_processor_count=28, uuid="123"),
    }

    def __init__(self):
        self.calls, self.real = [], torch.cuda

    def __getattr__(self, name):
        answer, signature = self.answers[name], inspect.signature(getattr(self.real, name))

        def call(*args, **kwargs):
            signature.bind(*args, **kwargs)
            self.calls.append(name)
            return answer

        return call


@pytest.fixture
def cuda(monkeypatch):
    stand_in = StandInCuda()
    monkeypatch.setattr(torch, "cuda", stand_in)
    return stand_in


def test_a_real_card_is_asked_as_torch_wants_to_be_asked(cuda, monkeypatch):
    monkeypatch.setattr(cards, "query_driver", lambda uuid: {"driver": f"of {uuid}"})
    card = cards.CudaCard()  # its device is the CPU here
    about = card.describe()
    assert (about["name"], about["capability"], about["memory"], about["driver"]) == (
        "GeForce",
        "8.6",
        8 * GIB,
        "of 123",
    )
    json.dumps(about)
    card.reset_peak()
    assert (card.allocated_bytes(), card.peak_bytes()) == (100, (300, 400))
    assert {"reset_peak_memory_stats", "memory_allocated"} <= set(cuda.calls)


def test_every_timed_step_of_a_real_card_waits_for_it(cuda):
    laps = CardLaps(cards.CudaCard(), 2, float("inf"))
    for _ in range(laps.steps):
        laps()
    laps.close()
    assert cuda.calls.count("synchronize") == 1 + 2 * 2, "before the first step, and around each timed one"
    assert laps.peak_bytes == (300, 400) and laps.bytes_before == 100


def test_rates_of_a_real_card_are_work_over_the_best_time(cuda, monkeypatch):
    """2 * 64^3 FLOP in half a second; 1000 bytes in half a second."""
    clock = iter(n * 0.5 for n in range(1000))
    monkeypatch.setattr(cards.time, "perf_counter", lambda: next(clock))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
    card = cards.CudaCard()
    assert card.measure_matmul_rate(torch.float32, side=64) == 2 * 64**3 / 0.5
    assert card.measure_copy_rate(1000) == 2000
    assert cuda.calls.count("synchronize") == 4 * cards.REPEATS


def test_the_loops_step_is_followed_from_its_draw_to_its_last_use(monkeypatch):
    said = []

    class Said:
        __call__ = staticmethod(lambda: said.append("begin"))
        close = staticmethod(lambda: said.append("end"))

    before = loop.step_rng, loop.PendingLosses.add
    with follow_loop(Said()):
        for step in (0, 1):
            loop.step_rng(0, step)
            loop.step_rng(0, step)  # once more under a smaller loss scale
            loop.PendingLosses().add(torch.ones(1), torch.ones(1))
    assert said == ["begin", "end"] * 2
    assert (loop.step_rng, loop.PendingLosses.add) == before


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        (
            "570.86, 220.00 W, 4, 16\n",
            {"driver": "570.86", "power_limit": "220.00 W", "pcie_generation": "4", "pcie_lanes": "16"},
        ),
        ("", {}),
        ("odd\n", {}),
    ],
)
def test_the_driver_is_what_nvidia_smi_says(monkeypatch, printed, found):
    asked = []
    monkeypatch.setattr(
        cards.subprocess,
        "run",
        lambda command, **_: asked.append(command) or types.SimpleNamespace(stdout=printed, returncode=0),
    )
    assert cards.query_driver("123") == found
    assert asked[0][:2] == ["nvidia-smi", "--id=GPU-123"]


def test_a_machine_without_nvidia_smi_has_no_driver_to_tell(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(cards.subprocess, "run", missing)
    assert cards.query_driver() == {}


# -- the machine -------------------------------------------------------------------------------------------------------


def test_comfyui_is_started_on_a_card_with_its_arguments_and_its_allocator():
    """Which has to be chosen before torch is imported."""
    code = """
import json, sys
import pack
pack.boot(cuda=True, flags=["--lowvram"])
from comfy.cli_args import args
print(json.dumps([args.lowvram, args.cpu, "cuda_malloc" in sys.modules, "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=gpu.SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, False, True, False]


def test_a_machine_without_git_has_no_commit_to_tell(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(train_lora.subprocess, "run", missing)
    assert train_lora.find_commit() == ""


def test_a_processor_without_a_model_name_has_that_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(train_lora.platform, "processor", lambda: "aarch64")
    about = tmp_path / "cpuinfo"
    about.write_text("processor\t: 0\nmodel name\t: EPYC\n")
    assert train_lora.find_cpu_name(about) == "EPYC"
    about.write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert train_lora.find_cpu_name(about) == train_lora.find_cpu_name(tmp_path / "missing") == "aarch64"
