"""The report as one page of Markdown, for somebody who has never seen this project. Imports no torch."""

from __future__ import annotations

import statistics

from .cases import CARD, CHECK, CORE, LECO, OURS, SCORE, WARM_STEPS

GIB = 2**30
SCORE_TRAINER = "Trainyard, Train Score Model"
TRAINERS = {
    OURS: "Trainyard, Train LoRA",
    CORE: "ComfyUI's own Train LoRA",
    LECO: "Trainyard, Train LECO",
    SCORE: SCORE_TRAINER,
}
INTRODUCTION = """[Trainyard](https://github.com/trainyard/trainyard) trains LoRAs and other small models inside ComfyUI. This page was
written by `benchmarks/gpu.py`, which trains models of published size with random weights for a few steps on one graphics
card, one after the other, each in a process of its own. Nothing was downloaded, and nothing that was learnt is kept."""
PRETEND = """**This card is not there.** It was rehearsed with `--pretend`: which steps run, what fits, bytes on the card and bytes that
cross are as on a card; seconds, and whether numbers are right, only a real one can tell."""
NOTES = """- *seconds*: the median of the timed steps (of LECO the mean, since one step in six samples a trajectory), after {warm} steps
  that are not timed and one whose copies are counted; the card is waited for before and after each.
- *peak*: the most that tensors took (torch.cuda.max_memory_allocated), and what the allocator had reserved for them, from
  the first step on. *Beside*: peak without what lay on the card before the first step, weights and adapters that is.
  *Forecast*: that figure as the planner told it before the run. What the driver and other programs take comes on top.
- *MFU*: FLOPs that a step cannot do without (forward and backward of the frozen model with rank-16 adapters on attention
  and MLP; no recomputation) over what the card could have done in that time, at the rate of the matrix product that was
  measured in this run, not a maker's figure. ComfyUI's own row has the same FLOPs above, whatever it computes.
- *up*, *down*: bytes copied from main memory to the card and back in one step, counted from torch's copies.
- ComfyUI's own Train LoRA has its defaults, rank 16: it trains all layers, with checkpointing at depth 1, and with a batch of
  n it predicts every image under every caption, n x n. It is given one copy of the model where its node would load two.
- Models lie in main memory first, as a loader leaves them, and ComfyUI's memory manager takes them to the card."""


def write_page(report: dict) -> str:
    """The page of a report of gpu.py, finished or not."""
    card = find_card(report)
    parts = [f"# Trainyard on {card.get('name', 'an unknown card')}", INTRODUCTION]
    parts += [PRETEND] if report["pretend_gib"] else []
    parts += [f"**{line}**" for line in list_verdicts(report)]
    parts += [heading("Machine", format_machine(report)), heading("One training step", format_steps(report, card))]
    parts += [heading("Loss and gradients of one step, against the CPU in fp32", format_checks(report))]
    parts += [
        heading("Left out, or not as usual", format_missing(report)),
        heading("How to read it", NOTES.format(warm=WARM_STEPS)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def find_card(report: dict) -> dict:
    return next((row["card"] for row in report["rows"] if "card" in row), {})


def list_verdicts(report: dict) -> list[str]:
    checks = [check for row in report["rows"] for check in row.get("checks", ())]
    judged = [check for check in checks if check["passes"] is not None]
    wrong = [check for check in judged if not check["passes"]]
    failed = [row for row in report["rows"] if row["status"] == "failed" and row["kind"] != CORE]
    lines = [f"{row['name']} FAILED: please open an issue with this page." for row in failed]
    if wrong:
        return [f"WRONG: loss or gradients of {len(wrong)} of {len(judged)} checks differ from the CPU's.", *lines]
    if judged:
        return [f"Loss and gradients agree with the CPU's in all {len(judged)} checks.", *lines]
    return ["Loss and gradients were not compared with the CPU's.", *lines]


# -- tables ------------------------------------------------------------------------------------------------------------


def format_table(titles: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) if rows else ""


def format_machine(report: dict) -> str:
    card = find_card(report)
    machine = next((row["machine"] for row in report["rows"] if "machine" in row), {})
    facts = {
        "card": f"{card.get('name')}, {gib(card.get('memory'))} GiB, {gib(card.get('free_memory'))} free at the start",
        "capability": f"{card.get('capability')}, bf16 {yes(card.get('bf16'))}, computes in {card.get('computes_in')}",
        "measured peak": rate(card.get("matmul_flops"), 1e12, "TFLOP/s (matrix product of side 8192)"),
        "to the card": rate(card.get("copy_bytes_per_s"), GIB, "GiB/s from page-locked memory")
        + f", PCIe {card.get('pcie_generation', '?')} x{card.get('pcie_lanes', '?')}",
        "driver": f"{card.get('driver', '?')}, CUDA {card.get('cuda')}, cuDNN {card.get('cudnn')}, limit {card.get('power_limit', '?')}",
        "computer": f"{machine.get('cpu')}, {machine.get('cores')} cores, {gib(machine.get('memory'))} GiB, "
        f"{gib(machine.get('free_memory'))} free; {machine.get('os')}",
        "software": f"torch {machine.get('torch')}, ComfyUI {machine.get('comfyui')}, Python {machine.get('python')}, "
        f"Trainyard {machine.get('commit') or 'of an unknown commit'}, {machine.get('date')}",
        "ComfyUI": f"{machine.get('vram_state')}, dynamic VRAM {yes(machine.get('dynamic_vram'))}, allocator "
        f"{machine.get('allocator') or 'native'}, arguments {' '.join(report['flags']) or 'none'}",
    }
    unknown = ("measured peak", "to the card", "driver", "capability", "ComfyUI") if report["pretend_gib"] else ()
    return format_table(["", ""], [[name, text] for name, text in facts.items() if name not in unknown])


STEP_TITLES = ["", "trainer", "weights", "checkpointing", "seconds", "images/s", "MFU", "core / ours", "peak GiB", "reserved", "beside",
               "forecast", "up GiB", "down"]  # fmt: skip


def format_steps(report: dict, card: dict) -> str:
    rows = [row for row in report["rows"] if row["status"] == "measured" and "seconds" in row]
    timed = not report["pretend_gib"]
    return format_table(STEP_TITLES, [format_step(row, rows, card, timed) for row in rows])


def format_step(row: dict, rows: list[dict], card: dict, timed: bool) -> list[str]:
    ours = find_counterpart(row, rows)
    return [
        row["about"] + format_forwards(row),
        TRAINERS[row["kind"]],
        {"float8_e4m3fn": "fp8", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(row["stored"], "–"),
        format_plan(row),
        f"{seconds_of(row):.3f}" if timed else "–",
        f"{row['batch'] / seconds_of(row):.2f}" if timed else "–",
        f"{find_mfu(row, ours, card):.0%}" if timed and find_mfu(row, ours, card) else "–",
        f"{seconds_of(row) / seconds_of(ours):.2f}" if timed and row["kind"] == CORE and ours else "",
        gib(row["peak_allocated"], 2),
        gib(row["peak_reserved"], 2),
        gib(row["step_bytes"], 2),
        f"{row['forecast'] / row['step_bytes'] - 1:+.0%}" if row.get("forecast") else "",
        gib(row["up"], 3),
        gib(row["down"], 3),
    ]


def format_plan(row: dict) -> str:
    """The checkpointing, and how the batch was split."""
    split = f", {row['accumulate']} x {row['microbatch']}" if row.get("accumulate", 1) > 1 else ""
    return f"{row['checkpointing']}{split}"


def format_forwards(row: dict) -> str:
    calls = row.get("forwards")
    return f" ({sum(calls.values()):.1f} model calls a step)" if calls else ""


def seconds_of(row: dict) -> float:
    return (statistics.fmean if row["kind"] == LECO else statistics.median)(row["seconds"])


def find_counterpart(row: dict, rows: list[dict]) -> dict | None:
    """Our row of the same model and batch, whose useful FLOPs count for ComfyUI's own, too."""
    same = lambda other: all(other[name] == row[name] for name in ("model", "batch", "is_tiny"))
    return next((other for other in rows if other["kind"] == OURS and same(other)), None)


def find_mfu(row: dict, ours: dict | None, card: dict) -> float | None:
    flops = (ours or {}).get("useful_flops") if row["kind"] == CORE else row.get("useful_flops")
    return flops / seconds_of(row) / card["matmul_flops"] if flops and card.get("matmul_flops") else None


def format_checks(report: dict) -> str:
    rows = [check for row in report["rows"] for check in row.get("checks", ())]
    if not rows or report["pretend_gib"]:
        return "The same code ran; there are no numbers to compare on a pretend card." if rows else ""
    titles = ["model", "computed in", "loss is off by", "gradient is off by", "allowed", ""]
    return format_table(titles, [format_check(check) for check in rows])


def format_check(check: dict) -> list[str]:
    allowed = " and ".join(f"{limit:g}" for limit in check["limits"])
    errors = [f"{check[name]:.1e}" for name in ("loss_error", "gradient_error")]
    return [
        f"{check['model']} ({check['about']})",
        check["computed"],
        *errors,
        allowed,
        "ok" if check["passes"] else "**WRONG**",
    ]


def format_missing(report: dict) -> str:
    """Rows without figures, and why; and why some weights are smaller than usual."""
    missing = [row for row in report["rows"] if row["status"] != "measured"]
    lines = [f"- {name_row(row)}: {row['status']}, {row.get('why', '')}" for row in missing]
    return "\n".join([*lines, *(f"- {name_row(row)}: {row['note']}" for row in report["rows"] if row.get("note"))])


def name_row(row: dict) -> str:
    return row["about"] if row["kind"] in (CARD, CHECK) else f"{row['about']}, {TRAINERS[row['kind']]}"


def gib(count, digits: int = 1) -> str:
    return "–" if count is None else f"{count / GIB:.{digits}f}"


def rate(value, unit: float, name: str) -> str:
    return "?" if value is None else f"{value / unit:.1f} {name}"


def yes(value) -> str:
    return "yes" if value else "no"
