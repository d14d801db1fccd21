"""What a check says about an image."""

from __future__ import annotations

from dataclasses import dataclass

SEVERITY_REJECT, SEVERITY_WARN = ("reject", "warn")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. As text it is the flag that a record carries: blur (FFT share 0.003 < 0.007)."""

    severity: str
    check: str
    detail: str  # figure and threshold

    def __str__(self) -> str:
        return f"{self.check} ({self.detail})"
