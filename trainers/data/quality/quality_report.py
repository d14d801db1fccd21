"""A check as a person reads it: counts, a list with the worst first, and a sheet of pictures framed by severity."""

from __future__ import annotations

import io
from collections import Counter

from PIL import Image

from ..sheets import BAD, GOOD, Tile, contact_sheet
from ..sheets import WARN as AMBER
from .duplicates import shown
from .findings import REJECT, WARN
from .quality import DROP, FLAG, KEEP, Check, Checked, QualitySettings

COLOURS = {REJECT: BAD, WARN: AMBER, None: GOOD}
DONE = {DROP: "dropped", FLAG: "flagged", KEEP: "only reported"}
LISTED = 500  # pictures named one by one; the figures of all are in the JSON


def report(found: Check, settings: QualitySettings) -> str:
    """Markdown lists: counts per check, the set as a whole, then each picture with something to say, worst first."""
    counts = Counter(one.severity for one in found.pictures)
    lines = [f"{len(found.pictures)} pictures checked: {told(counts, REJECT, settings.on_reject)}, {told(counts, WARN, settings.on_warn)}, "
             f"{counts[None]} good"]  # fmt: skip
    checks = Counter((finding.severity, finding.check) for one in found.pictures for finding in one.findings)
    lines += [f"- {check}: {count} ({'rejected' if severity == REJECT else 'warned'})" for (severity, check), count in checks.most_common()]
    lines += ["", "The whole set", *(f"- {note}" for note in found.notes)] if found.notes else []
    worst = [one for one in found.worst_first() if one.findings]
    lines += ["", "Worst first", *(row(one) for one in worst[:LISTED])] if worst else []
    return "\n".join(lines + ([f"- and {len(worst) - LISTED} more"] if len(worst) > LISTED else []))


def told(counts, severity, action) -> str:
    word = "rejected" if severity == REJECT else "with warnings"
    return f"{counts[severity]} {word}" + (f" ({DONE[action]})" if counts[severity] else "")


def row(one: Checked) -> str:
    return f"- {name(one)}: {'REJECTED ' if one.severity == REJECT else ''}" + "; ".join(map(str, ordered(one)))


def name(one: Checked) -> str:
    width, height = one.record.frame
    return f"{shown(one.record)} {width}x{height}"


def ordered(one: Checked):
    """Its findings, the worst first."""
    return sorted(one.findings, key=lambda finding: finding.severity != REJECT)


def sheet(found: Check, limit: int = 60) -> Image.Image:
    """The worst pictures, framed red, amber or green; the first line under each is its worst finding."""
    worst = found.worst_first()
    counts = Counter(one.severity for one in worst)
    title = f"{len(worst)} pictures: {counts[REJECT]} rejected, {counts[WARN]} with warnings, {counts[None]} good"
    if len(worst) > limit:
        title += f"; the first {limit} are shown, worst first"
    return contact_sheet([tile(one) for one in worst[:limit]], title=title, cell=208)


def tile(one: Checked) -> Tile:
    picture = Image.open(io.BytesIO(one.measures.thumbnail)) if one.measures else Image.new("RGB", (8, 8))
    words = [str(finding) for finding in ordered(one)]
    second = [words[1] + (f" and {len(words) - 2} more" if len(words) > 2 else "")] if len(words) > 1 else []
    return Tile(picture, (words[0] if words else "good", *second, name(one)), COLOURS[one.severity])
