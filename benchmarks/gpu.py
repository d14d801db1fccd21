"""What a step of training costs on this machine's graphics card: seconds, memory, how much of the card's arithmetic is
used, what crosses the bus, beside ComfyUI's own Train LoRA in the same run; and whether loss and gradients are right.

    python benchmarks/gpu.py                       # with ComfyUI's Python; under ten minutes, nothing is downloaded
    python benchmarks/gpu.py --quick               # two minutes
    python benchmarks/gpu.py --cases sdxl flux     # these rows alone
    python benchmarks/gpu.py -- --lowvram          # what follows -- are arguments of ComfyUI
    python benchmarks/gpu.py --pretend 12          # the same code on a card that is not there: no times

Models have their published size and random weights. Leaves gpu-report/report.md, a page to paste into an issue, and
gpu-report/report.json. Ends with 1 when loss or gradients differ from the CPU's by more than the page's limits, or when
one of our rows fails, and with 2 when there is no card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

SCRIPT = pathlib.Path(__file__).resolve()
ROOT = SCRIPT.parents[1]
if "trainyard" not in sys.modules:
    sys.path.insert(0, str(SCRIPT.parent))  # a Python that is packed with ComfyUI does not do it by itself
    import pack

    pack.name_package()

from trainyard.benchmarks.on_card import cases, page  # noqa: E402
from trainyard.tests.comfy import boot  # noqa: E402

NO_CARD_STATUS = "no card"
BUDGET_S, QUICK_BUDGET_S = 570, 115
START_S = 12  # a process with torch and ComfyUI takes about so long to begin
SHARE_FOR_STEPS = 0.75  # of a case's time, after which no further step is begun
NO_CARD = """No graphics card was found: {why}.
This measures cards that torch.cuda drives: NVIDIA, and AMD under ROCm. Run it with the Python that runs ComfyUI on the card
(this one is {python}), or rehearse it with --pretend 12."""
NO_COMFYUI = "ComfyUI was not found beside this pack. Set COMFYUI_PATH to its folder (the one with main.py)."


# -- one case, in a process of its own ---------------------------------------------------------------------------------


def run_case(asked: dict, result: pathlib.Path):
    """Writes the row of a case. `asked`: name, limit_s, pretend (GiB, or null), flags (of ComfyUI)."""
    start, case = time.monotonic(), cases.BY_NAME[asked["name"]]
    from trainyard.benchmarks import pack

    pack.boot(cuda=not asked["pretend"], flags=asked["flags"])
    import torch

    if not asked["pretend"] and not torch.cuda.is_available():
        is_for_cards = torch.version.cuda or torch.version.hip
        what = "sees none" if is_for_cards else "is a build for CPUs"
        row = {"status": NO_CARD_STATUS, "why": f"torch {torch.__version__} {what}"}
    else:
        from trainyard.benchmarks.on_card import cards, measure

        card = cards.PretendedCard(asked["pretend"]) if asked["pretend"] else cards.CudaCard()
        row = measure.measure_case(case, card, start + SHARE_FOR_STEPS * asked["limit_s"])
        if case.kind == cases.CARD:
            row["machine"] = measure.describe_machine()
    result.write_text(json.dumps(row))


def start_case(case, limit_s: float, pretend, flags, folder: pathlib.Path) -> dict:
    """The row of a case, from a process that is ended after limit_s."""
    result, log = folder / f"{case.name}.json", folder / f"{case.name}.log"
    asked = {"name": case.name, "limit_s": limit_s, "pretend": pretend, "flags": flags}
    command = [sys.executable, str(SCRIPT), "--case", json.dumps(asked), str(result)]
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    began = time.monotonic()
    with log.open("w") as written:
        try:
            done = subprocess.run(
                command, stdout=written, stderr=subprocess.STDOUT, timeout=limit_s, cwd=ROOT, env=os.environ | places
            )
        except subprocess.TimeoutExpired:
            return {"status": "too slow", "why": f"no figure within {limit_s:.0f} s", "took_s": limit_s}
    took = {"took_s": round(time.monotonic() - began, 1)}
    if result.exists():
        return {**json.loads(result.read_text()), **took}
    last = log.read_text(errors="replace").strip().splitlines()[-8:]
    return {"status": "failed", "why": f"the process ended with {done.returncode}: {' / '.join(last)[-1500:]}", **took}


# -- the whole run -----------------------------------------------------------------------------------------------------


def measure_all(chosen, budget_s: float, pretend, flags, save) -> dict:
    """The report, while `save(report)` keeps what is there after every case."""
    report = {"pretend_gib": pretend, "flags": flags, "budget_s": budget_s, "rows": []}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trainyard-gpu-", ignore_cleanup_errors=True) as folder:
        for number, case in enumerate(chosen, 1):
            left = budget_s - (time.monotonic() - began)
            print(f"[{number}/{len(chosen)}] {case.name}: {case.about} ({case.kind}) …", flush=True)
            if left < min(START_S * 1.5, case.limit_s):
                row = {"status": "skipped", "why": f"no time left of {budget_s:.0f} s"}
            else:
                row = start_case(
                    case, min(case.limit_s, left) if not pretend else left, pretend, flags, pathlib.Path(folder)
                )
            report["rows"].append({**dataclasses.asdict(case), **row})
            print(f"    {row['status']}{': ' + row['why'] if row.get('why') else ''}", flush=True)
            report["took_s"] = round(time.monotonic() - began, 1)
            if row["status"] == NO_CARD_STATUS:
                break
            save(report)
    return report


def find_exit_status(report: dict) -> int:
    """1 when a check is outside its limits, or one of our own rows failed; core's failures are its own."""
    ours = [row for row in report["rows"] if row["kind"] != cases.CORE]
    wrong = any(check["passes"] is False for row in ours for check in row.get("checks", ()))
    return int(wrong or any(row["status"] == "failed" for row in ours))


def parse_arguments(words: list[str]):
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes instead of ten")
    parser.add_argument(
        "--cases", nargs="+", choices=list(cases.BY_NAME), metavar="NAME", help=", ".join(cases.BY_NAME)
    )
    parser.add_argument("--pretend", type=float, metavar="GIB", help="on a card that is not there, of this size")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="for everything; what has no time left is skipped"
    )
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "gpu-report", help="folder of the report")
    parser.add_argument("--case", nargs=2, metavar=("JSON", "FILE"), help=argparse.SUPPRESS)
    asked, flags = parser.parse_args(words[:cut]), words[cut + 1 :]
    if asked.pretend and flags:
        parser.error(f"{' '.join(flags)}: a pretend card takes no arguments of ComfyUI")
    return asked, flags


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # a pipe of another alphabet is no reason to stop
    asked, flags = parse_arguments(sys.argv[1:])
    if asked.case:
        run_case(json.loads(asked.case[0]), pathlib.Path(asked.case[1]))
        return 0
    if boot.COMFYUI is None:
        print(NO_COMFYUI)
        return 2
    budget = asked.budget or (QUICK_BUDGET_S if asked.quick else BUDGET_S) * (10 if asked.pretend else 1)
    asked.out.mkdir(parents=True, exist_ok=True)

    def save(report):
        (asked.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (asked.out / "report.md").write_text(page.write_page(report), encoding="utf-8")

    report = measure_all(cases.choose_cases(asked.cases, asked.quick), budget, asked.pretend, flags, save)
    last = report["rows"][-1]
    if last["status"] == NO_CARD_STATUS:
        print(NO_CARD.format(why=last["why"], python=sys.executable))
        return 2
    print(f"\n{page.write_page(report)}\nWritten to {asked.out / 'report.md'} and {asked.out / 'report.json'}")
    return find_exit_status(report)


if __name__ == "__main__":
    sys.exit(main())
