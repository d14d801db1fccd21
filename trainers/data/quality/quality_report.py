"""A check as a person reads it: counts, a list with the worst first, and a sheet of images framed by severity."""

from __future__ import annotations

import io
from collections import Counter

from PIL import Image

from ..contact_sheet import BAD_COLOUR, GOOD_COLOUR, WARN_COLOUR, SheetTile, describe_frames, draw_contact_sheet
from ..findings import SEVERITY_REJECT, SEVERITY_WARN
from .checks import DROP_IMAGE, FLAG_IMAGE, KEEP_IMAGE, CheckedImage, QualityCheck, QualitySettings
from .duplicates import printable_file_name

SEVERITY_COLOURS = {SEVERITY_REJECT: BAD_COLOUR, SEVERITY_WARN: WARN_COLOUR, None: GOOD_COLOUR}
ACTION_PHRASES = {DROP_IMAGE: "dropped", FLAG_IMAGE: "flagged", KEEP_IMAGE: "only reported"}
MAX_LISTED_IMAGES = 500  # images named one by one; the figures of all are in the JSON


def format_quality_report(found: QualityCheck, settings: QualitySettings) -> str:
    """Markdown lists: counts per check, the set as a whole, then each image with something to say, worst first."""
    counts = Counter(one.severity for one in found.images)
    lines = [
        f"{len(found.images)} images checked: "
        f"{format_severity_count(counts, SEVERITY_REJECT, settings.on_reject)}, "
        f"{format_severity_count(counts, SEVERITY_WARN, settings.on_warn)}, {counts[None]} good"
    ]
    checks = Counter((finding.severity, finding.check) for one in found.images for finding in one.findings)
    lines += [
        f"- {check}: {count} ({'rejected' if severity == SEVERITY_REJECT else 'warned'})"
        for (severity, check), count in checks.most_common()
    ]
    lines += ["", "The whole set", *(f"- {note}" for note in found.notes)] if found.notes else []
    worst = [one for one in found.worst_first() if one.findings]
    lines += ["", "Worst first", *(format_checked_image(one) for one in worst[:MAX_LISTED_IMAGES])] if worst else []
    return "\n".join(
        lines + ([f"- and {len(worst) - MAX_LISTED_IMAGES} more"] if len(worst) > MAX_LISTED_IMAGES else [])
    )


def format_severity_count(counts, severity, action) -> str:
    word = "rejected" if severity == SEVERITY_REJECT else "with warnings"
    return f"{counts[severity]} {word}" + (f" ({ACTION_PHRASES[action]})" if counts[severity] else "")


def format_checked_image(one: CheckedImage) -> str:
    return f"- {format_name_and_size(one)}: {'REJECTED ' if one.severity == SEVERITY_REJECT else ''}" + "; ".join(
        map(str, sort_findings(one))
    )


def format_name_and_size(one: CheckedImage) -> str:
    width, height = one.record.cropped_size
    return " ".join([printable_file_name(one.record), f"{width}x{height}", *describe_frames(one.record)])


def sort_findings(one: CheckedImage):
    """Its findings, the worst first."""
    return sorted(one.findings, key=lambda finding: finding.severity != SEVERITY_REJECT)


def draw_quality_sheet(found: QualityCheck, limit: int = 60) -> Image.Image:
    """The worst images, framed red, amber or green; the first line under each is its worst finding."""
    worst = found.worst_first()
    counts = Counter(one.severity for one in worst)
    title = (
        f"{len(worst)} images: {counts[SEVERITY_REJECT]} rejected, {counts[SEVERITY_WARN]} with warnings, "
        f"{counts[None]} good"
    )
    if len(worst) > limit:
        title += f"; the first {limit} are shown, worst first"
    return draw_contact_sheet([make_quality_tile(one) for one in worst[:limit]], title=title, cell=208)


def make_quality_tile(one: CheckedImage) -> SheetTile:
    image = Image.open(io.BytesIO(one.measures.thumbnail)) if one.measures else Image.new("RGB", (8, 8))
    words = [str(finding) for finding in sort_findings(one)]
    second = [words[1] + (f" and {len(words) - 2} more" if len(words) > 2 else "")] if len(words) > 1 else []
    return SheetTile(
        image, (words[0] if words else "good", *second, format_name_and_size(one)), SEVERITY_COLOURS[one.severity]
    )
