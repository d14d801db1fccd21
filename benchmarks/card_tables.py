"""Tables of the rows of benchmarks/card.py, and their places in README.md and benchmarks/README.md.

A row is tests/card/rehearsal.py's Rehearsal as a dict. Where everything is kept on a card, a larger one makes no
difference, so it has no row of its own."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
GIB = 2**30
CARDS = (8, 12, 16, 24, 80)  # GiB
CONTEXT_GIB = 0.5  # of a card are the driver's and the desktop's
LORA, BF16, AUTO, OFF = "lora", "bfloat16", "auto", "off"
NOT_REHEARSED, DOES_NOT_FIT, FAILS = "?", "does not fit", "fails"
DTYPES = {BF16: "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}
SHORT_PLANS = {
    OFF: "all kept",
    "per block": "per block",
    "per block + CPU": "+ CPU",
    "offloaded blocks": "offloaded",
}
MARK = "<!-- {} of {}: written by `benchmarks/card.py --show` -->"


def card_size(row: dict) -> int:
    return round(row["scene"]["gib"] + CONTEXT_GIB)


def describe_result(row: dict | None) -> str:
    """The plan that was taken, or why there is none."""
    if row is None:
        return NOT_REHEARSED
    if row["error"]:
        return DOES_NOT_FIT if "OutOfMemory" in row["error"] or "StepDoesNotFit" in row["error"] else FAILS
    return row["plan"]


def find_row(rows: dict, model: str, card: int, dtype: str = BF16, method: str = LORA) -> dict | None:
    """The row of a card with checkpointing auto, or that of a smaller one which had room for everything."""
    scenes = [
        row
        for row in rows.values()
        if (row["scene"]["family"], row["scene"]["dtype"], row["scene"].get("method", LORA)) == (model, dtype, method)
        and row["scene"]["plan"] == AUTO
    ]
    exact = [row for row in scenes if card_size(row) == card]
    roomy = [row for row in scenes if card_size(row) < card and has_room_for_all(row)]
    return next(iter([*exact, *roomy]), None)


def has_room_for_all(row: dict) -> bool:
    return not row["error"] and row["plan"] == OFF and row["weights_on_card"] > 0.999 * row["weights"]


def smallest_card(rows: dict, model: str, dtype: str = BF16, method: str = LORA) -> int | None:
    fitting = (card for card in CARDS if (row := find_row(rows, model, card, dtype, method)) and not row["error"])
    return next(fitting, None)


def list_subjects(rows: dict) -> list[tuple[str, str, str]]:
    """(model, dtype, method) in the order of the rows, each once."""
    return list(
        dict.fromkeys(
            (row["scene"]["family"], row["scene"]["dtype"], row["scene"].get("method", LORA)) for row in rows.values()
        )
    )


def name_subject(names: dict, model: str, dtype: str, method: str) -> str:
    more = [*([DTYPES[dtype]] if dtype != BF16 else []), *([method] if method != LORA else [])]
    return ", ".join([names[model], *more])


def format_full_table(rows: dict, names: dict) -> str:
    """Every row with its figures. `names`: model -> what it is called."""
    lines = [
        "| model | weights, GiB | card, GiB | checkpointing | weights on it, GiB | peak, GiB | step, GiB | forecast "
        "| up, GiB | down, GiB | smallest card, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for subject in list_subjects(rows):
        smallest = smallest_card(rows, *subject)
        mine = [row for row in rows.values() if list_subjects({"": row}) == [subject]]
        lines += [
            format_row(row, name_subject(names, *subject), smallest)
            for row in sorted(mine, key=lambda row: row["scene"]["gib"])
        ]
    return "\n".join(lines)


def format_row(row: dict, name: str, smallest: int | None) -> str:
    head = f"| {name} | {row.get('weights', 0) / GIB:.1f} | {card_size(row)} | {describe_result(row)} |"
    if row["error"]:
        return f"{head} | | | | | | {smallest or ''} |"
    return (
        f"{head} {row['weights_on_card'] / GIB:.1f} | {row['card_peak'] / GIB:.1f} | {row['peak'] / GIB:.2f} | "
        f"{forecast_error(row):+.1%} | {row['up'] / GIB:.2f} | {row['down'] / GIB:.2f} | {smallest or ''} |"
    )


def forecast_error(row: dict) -> float:
    """How far the forecast is above what a step took; negative: below it."""
    return row["forecast"] / row["peak"] - 1


def format_short_table(rows: dict, names: dict) -> str:
    """What a LoRA of each model needs, in a few words."""
    lines = [
        f"| model | weights, GiB | {' | '.join(f'{card} GB' for card in CARDS)} |",
        f"|---|---|{'---|' * len(CARDS)}",
    ]
    for model, dtype, method in list_subjects(rows):
        found = [find_row(rows, model, card, dtype, method) for card in CARDS]
        if method != LORA or all(row is None for row in found):
            continue
        weights = next(row["weights"] for row in found if row) / GIB
        results = " | ".join(map(describe_shortly, found))
        lines.append(f"| {name_subject(names, model, dtype, method)} | {weights:.1f} | {results} |")
    return "\n".join(lines)


def describe_shortly(row: dict | None) -> str:
    """The plan in a word or two, and the GiB of weights that wait in main memory."""
    result = describe_result(row)
    if result not in SHORT_PLANS:
        return result
    away = (row["weights"] - row["weights_on_card"]) / GIB
    return SHORT_PLANS[result] + (f", {away:.1f} away" if away > 0.01 * row["weights"] / GIB else "")


def replace_between_marks(text: str, name: str, table: str) -> str:
    """ValueError where the text has no such place."""
    start, end = (re.escape(MARK.format(side, name)) for side in ("start", "end"))
    place = re.compile(f"({start}\n).*?({end})", re.S)
    if not place.search(text):
        raise ValueError(f"There is no place for the table {name!r}: {MARK.format('start', name)}")
    return place.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def make_documents(rows: dict, names: dict) -> dict[pathlib.Path, str]:
    """File -> its text with the tables of these rows."""
    tables = {
        ROOT / "README.md": ("what fits", format_short_table(rows, names)),
        ROOT / "benchmarks" / "README.md": ("cards", format_full_table(rows, names)),
    }
    return {path: replace_between_marks(path.read_text("utf-8"), *table) for path, table in tables.items()}
