"""Reads tables of text as spreadsheets and other tools write them.

The separator may be a comma, a semicolon or a tab, with spaces after it; names of columns may be in quotes and in
capitals; a byte order mark, Excel's first line `sep=;`, empty lines and empty cells at the end of a line mean nothing.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

SEPARATORS = (",", ";", "\t")
SEPARATOR_LINE = re.compile(r"\ufeff?\s*\"?sep=(.)\"?[ \t]*(?:\r\n|\r|\n|$)")  # what Excel writes and hides


@dataclass(frozen=True)
class TableRow:
    """One line: its cells by column, and what stands beyond the last column."""

    line: int  # of its end in the file, from 1
    cells: dict[str, str]  # a short line has fewer
    extra: tuple[str, ...] = ()  # () unless one of them says something

    @property
    def where(self) -> str:
        return f"line {self.line}"


@dataclass(frozen=True)
class TextTable:
    """The columns in lower case and the rows below them; `error` says why reading ended too early."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    separator: str
    error: str = ""


def read_text_table(text: str, usual_separator: str = ",", has_quotes: bool = True) -> TextTable:
    """The table in a text, whose first line names the columns. has_quotes False: quotation marks around a cell are part
    of it."""
    separator = find_separator(text, usual_separator)
    lines, error = split_table_cells(text, separator, has_quotes)
    if lines and SEPARATOR_LINE.match(text):
        del lines[0]
    if not lines:
        return TextTable((), (), separator, error)
    columns = tuple(cell.strip('"').strip().lower() for cell in lines[0][1])
    repeated = sorted(name for name, count in Counter(columns).items() if name and count > 1)
    error = f"line {lines[0][0]} names two columns {', '.join(repeated)}" if repeated else error
    return TextTable(columns, tuple(make_table_row(columns, *line) for line in lines[1:]), separator, error)


def make_table_row(columns: tuple[str, ...], line: int, cells: list[str]) -> TableRow:
    extra = tuple(cells[len(columns) :])
    named = {name: cell for name, cell in zip(columns, cells) if name}  # noqa: B905 - short rows end early
    return TableRow(line, named, extra if any(extra) else ())


def find_separator(text: str, usual: str = ",") -> str:
    """The separator that the first line uses most, `usual` where there is none."""
    if match := SEPARATOR_LINE.match(text):
        return match[1]
    header = re.sub(r'"[^"]*"', "", first_filled_line(text))
    return max(dict.fromkeys((usual, *SEPARATORS)), key=header.count)


def first_filled_line(text: str) -> str:
    """The first line that is not empty, without a byte order mark."""
    return next((line for line in re.split(r"[\r\n]+", text.lstrip("\ufeff")) if line.strip()), "")


def find_table_separator(text: str, column: str) -> str | None:
    """The separator of the table whose header is the first line and names this column; None for a text without."""
    match = SEPARATOR_LINE.match(text)
    header = first_filled_line(text[match.end() :] if match else text)
    for separator in (match[1],) if match else ("\t", *SEPARATORS):
        if column in [cell.strip().strip('"').strip().lower() for cell in header.split(separator)]:
            return separator
    return None


def split_table_cells(text: str, separator: str, has_quotes: bool) -> tuple[list[tuple[int, list[str]]], str]:
    """([(line, cells)] of the lines that are not empty, why reading ended early).

    A space before a quotation mark is left out, as people write it: 1.png, "a ball, red". Where that makes no table, as
    in 1.png, "red" ball, the mark is part of the text."""
    first: tuple[list[tuple[int, list[str]]], str] = ([], "")
    for skips_spaces in (True, False):
        lines: list[tuple[int, list[str]]] = []
        reader = csv.reader(
            io.StringIO(text.lstrip("\ufeff"), newline=""),
            delimiter=separator,
            strict=True,
            skipinitialspace=skips_spaces,
            quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE,
        )
        try:
            lines.extend(read_filled_lines(reader))
        except csv.Error as error:
            first = first if first[1] else (lines, f"line {reader.line_num} cannot be read as CSV ({error})")
        else:
            return lines, ""
    return first


def read_filled_lines(reader) -> Iterator[tuple[int, list[str]]]:
    for cells in reader:
        stripped = [cell.strip() for cell in cells]
        if any(stripped):
            yield reader.line_num, stripped


def parse_decimal(text: str) -> float:
    """The number in a text; in 7,5 the comma is the decimal one. ValueError for anything else, such as 1,000."""
    return float(re.sub(r"^(\s*[+-]?\d+),(\d{1,2}\s*)$", r"\1.\2", text))
