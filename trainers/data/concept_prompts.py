"""Prompt rows for LECO and sliders, one per concept, from widgets, text, CSV, TSV, YAML or JSON.

The keys are those of p1atdev/LECO's, the Concept Sliders' and ai-toolkit's prompt files. Keys of theirs that mean
nothing here are left out with a note. Any other key is an error that names it: were it ignored, a misspelled
`guidance: 4` would train at 1, and the method would seem not to work.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

from .metadata import MAX_TABLE_BYTES, read_text_file
from .tables import find_table_separator, parse_decimal, read_text_table

PROMPT_ACTIONS = ("erase", "enhance", "replace")
PROMPT_KEY_ALIASES = {
    "guidance_scale": "guidance",
    "negative": "unconditional",
    "batch_size": "batch",
    "replacement": "positive",
    "target_class": "target",
}
IN_TRAIN_NODE = "it is set in the Train node"
FOREIGN_PROMPT_KEYS = {  # key of other trainers' prompt files: why it is not read
    **dict.fromkeys(("rank", "alpha", "network_rank", "network_alpha", "network_dim", "network_type"), IN_TRAIN_NODE),
    **dict.fromkeys(
        ("training_method", "lr", "learning_rate", "iterations", "steps", "seed", "optimizer"), IN_TRAIN_NODE
    ),
    **dict.fromkeys(("lr_scheduler", "noise_scheduler", "max_denoising_steps", "precision", "dtype"), IN_TRAIN_NODE),
    **dict.fromkeys(("bucketing", "resolutions"), "sizes come from resolution and dynamic_resolution"),
    "dynamic_crops": "images are trained as if they were not cropped",
    "multiplier": "strengths are 1 and -1",
    "shuffle": "prompts stay as they are",
    "anchors": "write preserve for prompts that must not change",
    "name": "nothing depends on it",
    "comment": "nothing depends on it",
}
PROMPT_FORMATS = ("auto", "text", "csv", "tsv", "yaml", "json")
PROMPT_FILE_FORMATS = {".txt": "text", ".csv": "csv", ".tsv": "tsv", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
INTEGER_RANGES = {"resolution": (0, 16384), "batch": (1, 1024)}  # (minimum, maximum)


@dataclass(frozen=True)
class PromptRow:
    """The prompts and settings of one concept, as in LECO. positive None: the target; neutral None: unconditional. The
    target may be "", every image, where the other prompts give a direction."""

    target: str
    positive: str | None = None
    unconditional: str = ""
    neutral: str | None = None
    action: str = "erase"
    guidance: float = 1.0
    weight: float = 1.0
    resolution: int = 0  # pixels along a side; 0 leaves it to the node
    dynamic_resolution: bool = False  # a side between half the resolution and all of it, drawn anew each step
    batch: int = 1
    preserve: tuple[str, ...] = ()  # prompts that must stay as they are
    # Each is put before every prompt in turn, so that the concept does not become tied to one of them.
    attributes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.target.strip() and self.effective_positive == self.unconditional:
            raise ValueError("target is empty. Write the words of the concept to change.")
        if self.action not in PROMPT_ACTIONS:
            raise ValueError(f"action is {self.action!r}; choose one of {', '.join(PROMPT_ACTIONS)}.")
        for name, positive in (("guidance", self.guidance), ("weight", self.weight)):
            if not 0 < positive < 1000:
                raise ValueError(
                    f"{name} is {positive:g}; it must be above "
                    f"0{', or there is nothing to learn' if name == 'guidance' else ''}."
                )
        if self.action == "replace":
            if self.positive is None or self.positive == self.target:
                raise ValueError(
                    f"action is replace and positive is {self.positive!r}; write what {self.target!r} is to become."
                )
        elif self.effective_positive == self.unconditional:
            raise ValueError(
                f"positive and unconditional are both {self.effective_positive!r}: they define no direction to "
                "train. Change one of them."
            )

    @property
    def effective_positive(self) -> str:
        return self.target if self.positive is None else self.positive

    @property
    def effective_neutral(self) -> str:
        return self.unconditional if self.neutral is None else self.neutral


PROMPT_KEYS = tuple(f.name for f in fields(PromptRow))


def read_prompts(
    text: str, form: str = "auto", defaults: dict | None = None, notes: list[str] | None = None
) -> tuple[PromptRow, ...]:
    """The rows of a text in one of PROMPT_FORMATS. `defaults` fill what a row leaves out. `notes` is told what is left
    out. Raises ValueError naming the row and what is wrong."""
    text = text.removeprefix("\ufeff")
    form = guess_prompt_format(text) if form == "auto" else form
    found = {
        "text": parse_text_prompts,
        "csv": parse_csv_prompts,
        "tsv": lambda text: parse_csv_prompts(text, "\t"),
        "yaml": parse_yaml_prompts,
        "json": parse_json_prompts,
    }[form](text)
    if not found:
        raise ValueError(
            "There are no prompts. Write one line per concept, for example: red car -> blue car | guidance: 2"
        )
    told: list[str] = [] if notes is None else notes
    return tuple(build_prompt_row(where, drop_foreign_keys(where, row, told), defaults or {}) for where, row in found)


def read_prompt_file(path, defaults: dict | None = None, notes: list[str] | None = None) -> tuple[PromptRow, ...]:
    """The rows of a file, whose extension names the format."""
    path = Path(path)
    form = PROMPT_FILE_FORMATS.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path.name} ends in {path.suffix!r}; prompt files end in {', '.join(PROMPT_FILE_FORMATS)}.")
    text = read_text_file(path, "prompt file", MAX_TABLE_BYTES)
    if form == "text" and guess_prompt_format(text) == "tsv":  # Excel's "Unicode text" ends in .txt
        form = "tsv"
    try:
        return read_prompts(text, form, defaults, notes)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def guess_prompt_format(text: str) -> str:
    """The format of a text without a file name."""
    first = next((line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")), "")
    if first.startswith(("[", "{")):
        return "json"
    if first.startswith(("-", "target:", "targets:", "target_class:")):
        return "yaml"
    separator = find_table_separator(text, "target")
    return "text" if separator is None else "tsv" if separator == "\t" else "csv"


# -- formats: each parser returns [(where, {key: value})] --------------------------------------------------------------


def parse_text_prompts(text):
    """One concept a line: `target`, `target -> positive` (replace), each followed by ` | key: value` as often as
    wanted; # comments."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        head, *options = (part.strip() for part in line.split("|"))
        target, arrow, becomes = (part.strip() for part in head.partition("->"))
        values = {"target": target} | ({"action": "replace", "positive": becomes} if arrow else {})
        for option in options:
            key, colon, value = (part.strip() for part in option.partition(":"))
            if not colon:
                raise ValueError(f"Line {number}: {option!r} is not 'key: value'. For example: {target} | guidance: 2")
            values[key] = value
        rows.append((f"Line {number}", values))
    return rows


def parse_csv_prompts(text, delimiter=","):
    table = read_text_table(text, delimiter)
    if table.error:
        raise ValueError(f"The table cannot be read: {table.error}. Mend that line.")
    for row in table.rows:
        if row.extra:
            raise ValueError(
                f"{row.where.capitalize()} has more cells than the header. Put texts that hold {table.separator!r} in "
                "double quotes."
            )
    return [
        (row.where.capitalize(), {key: cell for key, cell in row.cells.items() if cell or key == "target"})
        for row in table.rows
    ]


def parse_yaml_prompts(text):
    import yaml

    try:
        return number_prompt_rows(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"This is not YAML: {' '.join(str(error).split())}") from error


def parse_json_prompts(text):
    try:
        return number_prompt_rows(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"This is not JSON: {error.msg} at line {error.lineno}.") from error


def number_prompt_rows(values):
    if isinstance(values, dict):  # ai-toolkit names its list of rows
        values = values["targets"] if isinstance(values.get("targets"), list) else [values]
    values = values or []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("A prompt file is a list of rows, each with keys such as target and action.")
    return [(f"Row {number}", value) for number, value in enumerate(values, 1)]


# -- one row -----------------------------------------------------------------------------------------------------------


def drop_foreign_keys(where, values: dict, notes: list[str]) -> dict:
    """The values without keys that only other trainers read, each of which is noted once."""
    kept = {}
    for key, value in values.items():
        name = plain_prompt_key(key)
        if name not in FOREIGN_PROMPT_KEYS:
            kept[key] = value
            continue
        if name == "multiplier" and parse_prompt_number(key, value) != 1:
            raise ValueError(
                f"{where}: multiplier is {value!r}, by which other trainers scale the LoRA; it is always 1 here. Leave "
                "it out; if it is below 0, swap positive and negative."
            )
        note = f"{name} is not read: {FOREIGN_PROMPT_KEYS[name]}"
        if note not in notes:
            notes.append(note)
    return kept


def build_prompt_row(where, values: dict, defaults: dict) -> PromptRow:
    try:
        named = {resolve_prompt_key(key): value for key, value in values.items()}
        if len(named) < len(values):
            raise ValueError(f"two of {', '.join(map(str, values))} mean the same. Keep one.")
        return PromptRow(
            **{
                **defaults,
                **{
                    key: convert_prompt_value(key, "" if value is None else value)
                    for key, value in named.items()
                    if value is not None or key == "target"
                },
            }
        )
    except TypeError as error:
        raise ValueError(f"{where} has no target. Write the words of the concept to change.") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def plain_prompt_key(key) -> str:
    return str(key).strip().lower().replace(" ", "_").replace("-", "_")


def resolve_prompt_key(key) -> str:
    name = plain_prompt_key(key)
    name = PROMPT_KEY_ALIASES.get(name, name)
    if name not in PROMPT_KEYS:
        near = difflib.get_close_matches(name, [*PROMPT_KEYS, *PROMPT_KEY_ALIASES], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no key {str(key)!r}.{hint} The keys are {', '.join(PROMPT_KEYS)}.")
    return name


def convert_prompt_value(key, value):
    if key in ("guidance", "weight"):
        return parse_prompt_number(key, value)
    if key in INTEGER_RANGES:
        low, high = INTEGER_RANGES[key]
        count = parse_prompt_number(key, value)
        if count != int(count) or not low <= count <= high:
            raise ValueError(f"{key} is {value!r}; it must be a whole number from {low} to {high}.")
        return int(count)
    if key == "dynamic_resolution":
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if str(value).lower() not in words:
            raise ValueError(f"{key} is {value!r}; it must be true or false.")
        return words[str(value).lower()]
    if key == "attributes":
        return split_prompt_list(value, ";,")
    if key == "preserve":
        return split_prompt_list(value, ";")  # a comma is part of a prompt
    if isinstance(value, (dict, list)):
        raise ValueError(f"{key} is {value!r}; it must be text.")
    return str(value).strip()


def parse_prompt_number(key, value) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return parse_decimal(value) if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key} is {value!r}; it must be a number.") from None


def split_prompt_list(value, separators) -> tuple[str, ...]:
    """The items of a list, or of a text that is split at lines and at any of the separators."""
    parts = value if isinstance(value, (list, tuple)) else re.split(f"[{separators}\n]", str(value))
    return tuple(part for part in (str(part).strip() for part in parts) if part)
