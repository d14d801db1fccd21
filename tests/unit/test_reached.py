"""How far a run that learns from prompts has come, and that it ends there."""

import dataclasses

import pytest
import torch
from trainyard.tests.unit.test_prompt_and_pair_methods import Given, Says, Switch, model, rollouts
from trainyard.tests.unit.toy import SHAPE, rng
from trainyard.trainers.loop import NoStore, train
from trainyard.trainers.methods.prompts import (
    PromptDifferenceTraining,
    TargetProgress,
    make_leco_targets,
    make_preserve_targets,
    make_replacement_targets,
)
from trainyard.trainers.methods.rollouts import LatentPoint, PromptTask, StudentTeacherModel
from trainyard.trainers.monitor.reached import ReachedMonitor
from trainyard.trainers.settings import RunSettings

ERASE = PromptTask(make_leco_targets("t", "t", "u", "u", "erase", 1.0), "t", shapes=(SHAPE,))


def said(student, task=ERASE, **numbers):
    """A method whose frozen model says these numbers, at one point, and which needs two predictions to know."""
    says = Says({"t": 5.0, "u": 2.0, "p": 1.0, **numbers}, student)
    says.on = Switch()
    m = StudentTeacherModel(says, says.on, {p: {"prompt": p} for p in ("t", "u", "p")})
    x, sigma = torch.zeros(1, 1, 2, 2), torch.ones(1)
    point = LatentPoint(0, x, sigma, m.predict_teacher(x, sigma, task.teacher_prompts))
    return PromptDifferenceTraining(m, [task], Given(point), progress=TargetProgress(window=2))


@pytest.mark.parametrize(("student", "reached"), [(5.0, 0.0), (2.0, 0.5), (-1.0, 1.0), (8.0, -0.5)])
def test_the_share_of_the_way_by_hand(student, reached):
    """Frozen 5, goal 2 - (5 - 2) = -1: the way is -6. A student that says 2 has gone half of it; one that says 8 went
    the other way."""
    method = said(student)
    assert method.progress.reached is None
    method.loss(rng())
    assert method.progress.reached == pytest.approx(reached)


def test_a_goal_that_does_not_name_the_target_costs_no_forward_more_and_is_said_not_to_be_measured():
    method = said(2.0, PromptTask(make_replacement_targets("t", "p"), "t", shapes=(SHAPE,)))
    method.loss(rng())
    assert method.model.forward_counts["frozen"] == 1 and method.progress.recent == []
    assert "not measured" in ReachedMonitor(method.progress, 0.5).line()
    assert ReachedMonitor(method.progress, 0.0).line() == ""


def test_points_that_were_trained_on_and_prompts_that_stay_are_no_measure():
    kept = said(4.0, PromptTask(make_preserve_targets("t"), "t", shapes=(SHAPE,)))
    again = said(4.0)
    again.points.point = dataclasses.replace(again.points.point, trained=True)
    for method in (kept, again):
        method.loss(rng())
        assert method.progress.recent == []


def test_a_rollouts_point_is_untrained_the_first_time_alone():
    points, seen = rollouts(model()), set()
    for step in range(12):
        point = points.draw(rng(step))
        key = tuple(point.x.flatten().tolist())
        assert point.trained == (key in seen)
        seen.add(key)
    assert len(seen) < 12, "no point was drawn twice"


def test_progress_goes_on_after_a_resume():
    whole = PromptDifferenceTraining(m := model(), [task := rollouts(m).tasks[0]], rollouts(m, [task]))
    for step in range(6):
        whole.loss(rng(step))
    other = PromptDifferenceTraining(m := model(), [task], rollouts(m, [task]))
    other.load_state(whole.state())
    assert len(other.progress.recent) == len(whole.progress.recent) > 0
    torch.testing.assert_close(other.progress.recent, whole.progress.recent)
    other.load_state({key: value for key, value in whole.state().items() if key != "progress"})
    assert other.progress.recent == []


# -- the end of a run --------------------------------------------------------------------------------------------------


class Kept(NoStore):
    def save(self, state, why):
        self.why, self.state = why, state


def run(stop_at, steps=200, rate=1e-2):
    m = model()
    method = PromptDifferenceTraining(m, rollouts(m).tasks, rollouts(m), progress=TargetProgress(window=8))
    monitor, store = ReachedMonitor(method.progress, stop_at), Kept()
    losses = train(method, RunSettings(steps=steps, learning_rate=rate, save_every=0), store=store, monitor=monitor)
    return losses, monitor, store


def test_a_run_ends_when_its_target_is_reached_and_says_so():
    losses, monitor, store = run(stop_at=0.7)
    assert len(losses) < 200 and monitor.reached >= 0.7 and store.why == "finished"
    assert monitor.line() == f"reached {monitor.reached:.0%} of the way"
    assert all(entry["reached"] < 0.7 for entry in monitor.measurements[:-1])
    again = ReachedMonitor(TargetProgress(), 0.7)
    again.load_state(store.state["watch"])
    assert again.should_stop and not again.due(len(losses), 200)


def test_a_run_that_does_not_get_there_trains_all_its_steps_and_says_so():
    losses, monitor, _ = run(stop_at=0.9, steps=20, rate=1e-6)
    assert len(losses) == 20
    assert monitor.line() == f"reached {monitor.reached:.0%} of the way, not the 90% of stop_at: raise steps"


def test_stop_at_0_never_ends_a_run():
    losses, monitor, _ = run(stop_at=0.0, steps=60)
    assert len(losses) == 60 and monitor.line() == f"reached {monitor.reached:.0%} of the way"


def test_what_else_is_monitored_goes_on_beside_it():
    class Other:
        best, should_stop, note, checked = {"step": 3, "params": []}, False, "loss 1", ()

        def due(self, step, steps):
            return step == 7

        def run_checks(self, step, steps, params):
            self.checked += (step,)
            return True

        def line(self):
            return "validated"

        def state(self):
            return {"history": [1]}

        def load_state(self, state):
            self.loaded = state

    progress = TargetProgress(window=1)
    progress.add(torch.ones(1, 1), torch.full((1, 1), 2.0))
    monitor = ReachedMonitor(progress, 0.9, Other())
    assert monitor.due(7, 100) and monitor.run_checks(7, 100, []) and not monitor.measurements
    assert not monitor.run_checks(10, 100, []) and monitor.validation.checked == (7,)
    assert monitor.note == "reached 50%; loss 1" and monitor.line().endswith("; validated") and monitor.best
    state = monitor.state()
    assert state == {"history": [1], "reached": [{"step": 10, "reached": 0.5}]}
    monitor.load_state(state)
    assert monitor.validation.loaded == {"history": [1]}
    alone = ReachedMonitor(TargetProgress(), 0.0)
    alone.load_state(state)
    assert alone.state() == state, "a part of the run without validation keeps what an earlier one saw"
