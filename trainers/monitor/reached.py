"""Ends a run that learns from prompts when its concept has moved as far as was asked, and says how far it came."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..methods.prompts import TargetProgress
from ..protocols import Monitor

STATE_KEY = "reached"


@dataclass
class ReachedMonitor:
    """`stop_at`: the share of the way to the goal (methods/prompts.py: TargetProgress) at which the run ends; 0 never
    ends it. `validation`: what else is monitored."""

    progress: TargetProgress
    stop_at: float
    validation: Monitor | None = None
    every: int = 10  # optimizer steps
    measurements: list[dict] = field(default_factory=list)  # {"step", "reached"}
    other_state: dict = field(default_factory=dict)  # of `validation` in an earlier part of the run; kept without one

    def reached_due(self, step: int, steps: int) -> bool:
        due = step > 0 and (step % self.every == 0 or step == steps)
        return due and all(entry["step"] != step for entry in self.measurements)

    def due(self, step: int, steps: int) -> bool:
        return self.reached_due(step, steps) or bool(self.validation and self.validation.due(step, steps))

    def run_checks(self, step: int, steps: int, params) -> bool:
        if self.reached_due(step, steps) and (reached := self.progress.reached) is not None:
            self.measurements.append({"step": step, "reached": reached})
        return bool(
            self.validation and self.validation.due(step, steps) and self.validation.run_checks(step, steps, params)
        )

    @property
    def reached(self) -> float | None:
        """At the last measurement."""
        return self.measurements[-1]["reached"] if self.measurements else None

    @property
    def has_reached(self) -> bool:
        return self.reached is not None and 0 < self.stop_at <= self.reached

    @property
    def should_stop(self) -> bool:
        return self.has_reached or bool(self.validation and self.validation.should_stop)

    @property
    def best(self) -> dict | None:
        return self.validation.best if self.validation else None

    @property
    def note(self) -> str:
        return "; ".join(filter(None, (self.format_reached(), getattr(self.validation, "note", ""))))

    def format_reached(self) -> str:
        return "" if self.reached is None else f"reached {self.reached:.0%}"

    def line(self) -> str:
        """For the end of the run."""
        if self.reached is None and self.stop_at:
            unknown = "how far it came was not measured (the goal does not name the target, or the run was too short)"
            return "; ".join(filter(None, (unknown, getattr(self.validation, "line", str)())))
        missed = self.reached is not None and not self.has_reached and self.stop_at > 0
        more = f" of the way, not the {self.stop_at:.0%} of stop_at: raise steps" if missed else " of the way"
        text = self.format_reached() and self.format_reached() + more
        return "; ".join(filter(None, (text, getattr(self.validation, "line", str)())))

    def finish(self) -> None:
        if self.validation:
            self.validation.finish()

    def state(self) -> dict:
        other = self.validation.state() if self.validation else self.other_state
        return {**other, STATE_KEY: list(self.measurements)}

    def load_state(self, state: dict) -> None:
        self.measurements = list(state.get(STATE_KEY, ()))
        self.other_state = {key: value for key, value in state.items() if key != STATE_KEY}
        if self.validation and self.other_state:
            self.validation.load_state(self.other_state)
