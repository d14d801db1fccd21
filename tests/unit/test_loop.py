"""The loop by what it promises: seeds, accumulation, clipping, reports, saves, and nothing lost on any way out."""

import copy
import math
import types

import pytest
import torch
from trainyard.tests.unit.toy import Line, Stop
from trainyard.trainers.loop import (
    BIT_TYPES,
    Diverged,
    TrainingClock,
    TrainingProgress,
    format_duration,
    list_cuda_devices,
    step_rng,
    train,
    zero_gradients_unless,
)
from trainyard.trainers.settings import OptimizerSettings, RunSettings

PLAIN = OptimizerSettings(optimizer="SGD", beta1=0.0, weight_decay=0.0, clip=0.0)


class Shelf:
    """A store in memory: every (step, why), and the last state, copied."""

    def __init__(self, state=None):
        self.state, self.saves = state, []

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state, why):
        self.state = copy.deepcopy(state)
        self.saves.append((state["step"], why))


class Faulty(Line):
    """A Line whose loss raises or turns into another number at chosen calls, counted from 1."""

    def __init__(self, at, trouble):
        super().__init__()
        self.at, self.failure, self.calls = at, trouble, 0

    def loss(self, generator):
        self.calls += 1
        if self.calls == self.at and not isinstance(self.failure, float):
            raise self.failure
        return super().loss(generator) * (self.failure if self.calls == self.at else 1.0)


def run(steps, **settings):
    return RunSettings(**{"steps": steps, "learning_rate": 0.05, "save_every": 0, **settings})


def stop_at(step):
    """A report that interrupts after this many steps."""

    def report(progress):
        if progress.step >= step:
            raise Stop

    return report


def learnt(steps, optimizing=None, **settings):
    """(w, losses) of an undisturbed run."""
    method = Line()
    return method, train(method, run(steps, **settings), optimizing)


# -- steps -------------------------------------------------------------------------------------------------------------


def test_a_step_by_hand():
    """loss = (w x - 3 x)^2, w = 0: gradient -6 x^2, so w = 0.05 * 6 x^2 after one step and the loss was 9 x^2."""
    method, losses = learnt(1, PLAIN)
    (x,) = method.seen
    assert method.w.item() == pytest.approx(0.3 * x * x) and losses == pytest.approx([9 * x * x])


def test_the_chance_of_a_step_depends_on_seed_and_step_alone():
    draws = {
        (seed, step): torch.randn(3, generator=step_rng(seed, step)).tolist()
        for seed in (0, 1, 11)
        for step in (0, 1, 10, 110)
    }
    assert len({tuple(v) for v in draws.values()}) == len(draws), "two steps share their chance"
    torch.manual_seed(7)
    assert torch.randn(3, generator=step_rng(1, 10)).tolist() == draws[1, 10]
    assert step_rng(0, 0).initial_seed() == 0x2BC42E553A894A51 >> 1, (
        "printf 0/0 | b2sum -l 64; another seed would change saved runs"
    )


def test_the_loop_reads_and_changes_no_global_seed():
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    first, _ = learnt(5)
    torch.manual_seed(2)
    after = torch.random.get_rng_state()
    second, _ = learnt(5)
    assert first.w.item() == second.w.item()
    assert torch.equal(after, torch.random.get_rng_state())
    torch.random.set_rng_state(before)


def test_random_state_of_the_parameters_gpu_is_kept_and_not_only_of_the_current_one(monkeypatch):
    on = lambda name: types.SimpleNamespace(device=torch.device(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert list_cuda_devices([on("cuda:2"), on("cpu"), on("cuda:2")]) == [0, 2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list_cuda_devices([on("cpu")]) == []


def test_the_loss_falls_and_there_is_one_number_per_step():
    method, losses = learnt(60)
    assert len(losses) == 60 and sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert abs(method.w.item() - 3) < 2


def test_two_batches_of_one_accumulated_equal_one_batch_of_two():
    """Both see the same four numbers in the same order; the gradient of a mean is the mean of the gradients."""
    pair, single = Line(batch=2), Line(batch=1)
    both = train(pair, run(2), PLAIN)
    summed = train(single, run(2), OptimizerSettings(**PLAIN.to_dict() | {"accumulate": 2}))
    assert pair.seen == pytest.approx(single.seen) and len(pair.seen) == 4
    assert single.w.item() == pytest.approx(pair.w.item(), rel=1e-6) and summed == pytest.approx(both, rel=1e-6)


def test_a_short_batch_counts_by_its_samples_when_batches_are_accumulated():
    """Batches of 4, 4 and 1: one step over the nine samples. Each loss is (w x)^2 summed by hand."""

    class Uneven(Line):
        sizes = (4, 4, 1)

        def loss(self, generator):
            self.batch = self.sizes[len(self.parts) % 3]
            self.parts.append(part := super().loss(generator))
            return part

        parts: list = []

    class Whole(Line):
        def __init__(self):
            super().__init__(batch=9)

    for order in ((4, 4, 1), (1, 4, 4), (3, 3, 3)):
        parts, whole = Uneven(), Whole()
        parts.parts, parts.sizes = [], order
        losses = train(parts, run(1), OptimizerSettings(**PLAIN.to_dict() | {"accumulate": 3}))
        expected = train(whole, run(1), PLAIN)
        assert parts.w.item() == pytest.approx(whole.w.item(), rel=1e-6), order
        assert losses == pytest.approx(expected, rel=1e-6)


def test_clipping_scales_a_long_gradient_down_and_leaves_a_short_one():
    """The gradient of one step is -6 x^2. SGD with rate 0.05 moves by 0.05 * min(6 x^2, clip)."""
    x = Line()
    train(x, run(1), PLAIN)
    length = 6 * x.seen[0] ** 2
    for clip, moved in ((length / 2, length / 2), (length * 2, length), (0.0, length)):
        method = Line()
        train(method, run(1), OptimizerSettings(**PLAIN.to_dict() | {"clip": clip}))
        assert method.w.item() == pytest.approx(0.05 * moved, rel=1e-4), f"clip {clip}"


def test_the_norm_is_taken_over_all_parameters_together():
    """Four equal gradients of length g each: together 2 g. Clipped to g, each moves by rate * g / 2."""
    one = Line(size=4)
    train(one, run(1), PLAIN)
    g = one.w[0].item() / 0.05
    clipped = Line(size=4)
    train(clipped, run(1), OptimizerSettings(**PLAIN.to_dict() | {"clip": g}))
    assert clipped.w.tolist() == pytest.approx([0.05 * g / 2] * 4, rel=1e-4)


def test_text_encoder_parameters_learn_at_a_tenth_or_at_their_own_rate():
    class Two:
        def __init__(self):
            self.named = {name: [torch.nn.Parameter(torch.zeros(1))] for name in ("model", "text encoder")}

        def groups(self):
            return self.named

        def loss(self, generator):
            return self.named["model"][0] + self.named["text encoder"][0]

    for own, moved in ((0.0, 0.005), (0.02, 0.02)):
        method = Two()
        train(method, run(1), OptimizerSettings(**PLAIN.to_dict() | {"text_encoder_lr": own}))
        assert [-p[0].item() for p in method.named.values()] == pytest.approx([0.05, moved])


# -- saves -------------------------------------------------------------------------------------------------------------


def test_a_run_saves_every_so_many_steps_and_at_its_end():
    shelf = Shelf()
    train(Line(), run(7, save_every=3), store=shelf)
    assert shelf.saves == [(3, "step"), (6, "step"), (7, "finished")]


def test_a_run_that_ends_on_a_save_saves_once():
    shelf = Shelf()
    train(Line(), run(6, save_every=3), store=shelf)
    assert shelf.saves == [(3, "step"), (6, "finished")]


def test_a_safety_copy_is_kept_every_few_minutes(monkeypatch):
    """The clock is moved on by one minute a step: a copy is due when more than 180 s have passed, at step 4 and 8."""
    shelf, seconds = Shelf(), [0.0]
    monkeypatch.setattr("trainyard.trainers.loop.time.monotonic", lambda: seconds[0])

    class Slow(Line):
        def loss(self, generator):
            seconds[0] += 60
            return super().loss(generator)

    train(Slow(), run(9), store=shelf)
    assert shelf.saves == [(4, "auto"), (8, "auto"), (9, "finished")]


def test_a_saved_step_is_not_saved_again_as_a_safety_copy(monkeypatch):
    monkeypatch.setattr(TrainingClock, "autosave_seconds", math.inf)
    shelf = Shelf()
    train(Line(), run(4, save_every=0), store=shelf)
    assert shelf.saves == [(4, "finished")]
    monkeypatch.setattr(TrainingClock, "autosave_seconds", -1)
    shelf = Shelf()
    train(Line(), run(4, save_every=2), store=shelf)
    assert shelf.saves == [(1, "auto"), (2, "step"), (3, "auto"), (4, "finished")]


def test_a_finished_run_that_is_asked_again_trains_nothing():
    shelf = Shelf()
    first = train(Line(), run(4), store=shelf)
    method = Line()
    assert train(method, run(4), store=shelf) == first
    assert method.seen == [] and method.w.item() == shelf.state["params"][0].item()


def test_more_steps_go_on_from_a_finished_run():
    shelf = Shelf()
    train(Line(), run(4), store=shelf)
    method = Line()
    losses = train(method, run(6), store=shelf)
    whole, all_losses = learnt(6)
    assert len(method.seen) == 2 and losses == all_losses and method.w.item() == whole.w.item()


def test_a_state_with_other_parameters_is_refused():
    shelf = Shelf()
    train(Line(), run(2), store=shelf)
    shelf.state["params"].append(torch.zeros(1))
    with pytest.raises(ValueError, match="The saved run has 2 trained tensors and this one 1; start a new run name"):
        train(Line(), run(2), store=shelf)


# -- every way out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [Stop(), ValueError("bad image"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_whatever_stops_a_loss_the_last_complete_step_is_saved_and_the_run_goes_on_exactly(trouble, accumulate):
    """Raised in the fourth step; with accumulation in the second half of it, when one half's gradient is already
    there."""
    optimizing = OptimizerSettings(accumulate=accumulate)
    shelf, method = Shelf(), Faulty(4 * accumulate, trouble)
    with pytest.raises(type(trouble)):
        train(method, run(6), optimizing, store=shelf)
    assert shelf.saves == [(3, "stopped")] and method.w.grad is None
    resumed = Line()
    losses = train(resumed, run(6), optimizing, store=shelf)
    whole, all_losses = learnt(6, optimizing)
    assert resumed.w.item() == whole.w.item() and losses == all_losses


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_an_interrupt_from_the_report_keeps_the_finished_step(step):
    shelf = Shelf()
    with pytest.raises(Stop):
        train(Line(), run(6), report=stop_at(step), store=shelf, interval=0)
    assert shelf.saves[-1] == (step, "stopped")
    resumed = Line()
    losses = train(resumed, run(6), store=shelf)
    whole, all_losses = learnt(6)
    assert resumed.w.item() == whole.w.item() and losses == all_losses


def test_an_interrupt_inside_the_optimizer_is_not_saved_as_a_step(monkeypatch):
    """The parameters have moved and the step has not been counted: saving them would train that step twice."""
    shelf, calls = Shelf(), []
    real = torch.optim.SGD.step

    def cut_short(self, *rest):
        real(self, *rest)
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("the optimizer's own memory")

    monkeypatch.setattr(torch.optim.SGD, "step", cut_short)
    with pytest.raises(torch.OutOfMemoryError):
        train(Line(), run(6, save_every=2), PLAIN, store=shelf)
    assert shelf.saves == [(2, "step")]
    monkeypatch.setattr(torch.optim.SGD, "step", real)
    resumed = Line()
    losses = train(resumed, run(6), PLAIN, store=shelf)
    whole, all_losses = learnt(6, PLAIN)
    assert resumed.w.item() == whole.w.item() and losses == all_losses


def test_an_interrupt_before_the_first_step_keeps_the_start():
    shelf = Shelf()
    with pytest.raises(Stop):
        train(Faulty(1, Stop()), run(3), store=shelf)
    assert shelf.saves == [(0, "stopped")]
    resumed = Line()
    assert train(resumed, run(3), store=shelf) == learnt(3)[1]


class Lasting(Faulty):
    """A Faulty whose loss stays that way for some calls."""

    def __init__(self, at, trouble, count):
        super().__init__(at, trouble)
        self.first, self.count = at, count

    def loss(self, generator):
        self.at = self.calls + 1 if self.first <= self.calls + 1 < self.first + self.count else 0
        return super().loss(generator)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_stays_no_number_stops_with_its_step_and_keeps_the_last_good_state(number):
    """From step 4 on: ten steps in a row end with step 13."""
    shelf = Shelf()
    with pytest.raises(
        Diverged,
        match=r"The loss became (nan|inf) .* at step 13, the last of 10 in a row that could not be used\. The last saved "
        r"state is kept\. Lower the learning rate",
    ):
        train(Lasting(4, number, 99), run(30, save_every=2), store=shelf)
    assert shelf.saves == [(2, "step"), (4, "step")]
    assert all(p.isfinite().all() for p in shelf.state["params"])


def test_a_short_run_without_any_number_is_not_a_finished_one():
    shelf = Shelf()
    with pytest.raises(Diverged, match="at step 3, the last of 3 in a row"):
        train(Lasting(1, math.nan, 99), run(3), store=shelf)
    assert shelf.saves == []


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_batch_whose_gradient_is_no_number_is_skipped_and_told(number, accumulate):
    """SGD without momentum: the step changes nothing, and those before and after it are as ever."""
    optimizing, told = OptimizerSettings(**PLAIN.to_dict() | {"accumulate": accumulate}), []
    method = Faulty(3 * accumulate, number)
    shelf = Shelf()
    losses = train(method, run(6), optimizing, report=told.append, store=shelf, interval=0)
    assert len(losses) == 6 and not math.isfinite(losses[2]) and all(map(math.isfinite, losses[:2] + losses[3:]))
    assert told[-1].skipped == 1 and "1 step skipped: the gradient was not finite" in told[-1].format_line()
    assert "loss nan" not in told[-1].format_line() and "skipped" not in told[0].format_line()

    without = Skipping(2)
    train(without, run(6), optimizing)
    assert method.w.item() == without.w.item()


class Skipping(Line):
    """A Line whose loss is 0 in one step, counted from 0."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def loss(self, generator):
        skipped = generator.initial_seed() == step_rng(0, self.step).initial_seed()
        return super().loss(generator) * (0.0 if skipped else 1.0)


@pytest.mark.parametrize("optimizer", ["AdamW", "RAdam", "SGD"])
def test_a_skipped_step_leaves_every_optimizer_with_finite_numbers(optimizer):
    method = Faulty(1, math.nan)
    shelf = Shelf()
    train(method, run(4), OptimizerSettings(optimizer=optimizer), store=shelf)
    assert method.w.isfinite().all() and method.w.item() != 0
    assert shelf.state["skipped"] == [1, 0]


def test_a_gradient_that_is_no_number_is_skipped_too_though_the_loss_is_one():
    """sqrt(w^2) at w = 0 is 0 with the gradient 0/0."""

    class Root(Line):
        def loss(self, generator):
            return (self.w.square()).sqrt()

    shelf, method = Shelf(), Root()
    with pytest.raises(Diverged, match=r"The loss became 0\.0 with gradient norm nan at step 3, the last of 3"):
        train(method, run(3), store=shelf)
    assert shelf.saves == [] and method.w.item() == 0


@pytest.mark.parametrize("stop", [5, 8])
def test_skipped_steps_are_counted_on_by_a_run_that_goes_on(stop):
    """NaN from step 4 on: stopped after `stop` steps and started again, it ends with step 13 all the same."""
    shelf = Shelf()
    with pytest.raises(Stop):
        train(Lasting(4, math.nan, 99), run(30), report=stop_at(stop), store=shelf, interval=0)
    assert shelf.state["skipped"] == [stop - 3, stop - 3] and shelf.saves[-1] == (stop, "stopped")
    with pytest.raises(Diverged, match="at step 13, the last of 10 in a row"):
        train(Lasting(1, math.nan, 99), run(30), store=shelf)


def test_a_run_without_trouble_has_no_word_of_skipped_steps_in_its_state():
    shelf = Shelf()
    train(Line(), run(2), store=shelf)
    assert "skipped" not in shelf.state


def test_an_interrupt_after_an_unseen_nan_saves_the_step_as_skipped():
    """With a long interval the NaN of step 2 is not fetched when the interrupt of step 3 comes."""
    shelf = Shelf()

    class Both(Faulty):
        def loss(self, generator):
            if self.calls == 2:
                raise Stop
            return super().loss(generator)

    with pytest.raises(Stop):
        train(Both(2, math.nan), run(5), store=shelf, interval=100)
    assert shelf.saves == [(2, "stopped")] and shelf.state["skipped"] == [1, 1]
    assert all(p.isfinite().all() for p in shelf.state["params"])


def test_gradients_are_zeroed_whatever_they_hold_and_otherwise_kept_bit_for_bit():
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    odd = [torch.tensor([[math.nan, -math.inf], [-0.0, 1e-30]], dtype=dtype).t() for dtype in kinds]
    kept = [grad.clone() for grad in odd]
    zero_gradients_unless(torch.tensor(True), kept)
    for before, after in zip(odd, kept, strict=True):
        bits = BIT_TYPES[before.dtype.itemsize]
        assert torch.equal(before.view(bits), after.view(bits))
    zero_gradients_unless(torch.tensor(False), kept)
    assert all((grad == 0).all() for grad in kept)


def test_a_store_that_fails_twice_raises_its_first_error():
    class Full(Shelf):
        def save(self, state, why):
            raise OSError(28, f"no space at {why}")

    with pytest.raises(OSError, match="no space at step"):
        train(Line(), run(4, save_every=2), store=Full())


# -- reports -----------------------------------------------------------------------------------------------------------


def test_reports_come_at_most_every_interval_and_see_every_loss_at_the_end():
    seen = []
    train(Line(), run(50), report=lambda p: seen.append((p.step, len(p.losses))), interval=1000)
    assert seen == [(1, 1), (50, 50)]


def test_with_no_interval_every_step_is_reported_in_order():
    seen = []
    train(Line(), run(5, save_every=2), report=lambda p: seen.append(p.step), interval=0)
    assert sorted(set(seen)) == [1, 2, 3, 4, 5] and seen == sorted(seen)


def test_a_resumed_run_reports_its_first_new_step_and_the_time_that_is_left(monkeypatch):
    """Two seconds a step: after one step of the resumed run three are left, 6 s."""
    seconds = [0.0]
    monkeypatch.setattr("trainyard.trainers.loop.time.monotonic", lambda: seconds[0])

    class Slow(Line):
        def loss(self, generator):
            seconds[0] += 2
            return super().loss(generator)

    shelf, seen = Shelf(), []
    train(Slow(), run(2), store=shelf)
    train(Slow(), run(6), store=shelf, report=lambda p: seen.append((p.step, p.seconds_left)), interval=0)
    assert seen[0] == (3, 6.0) and seen[-1] == (6, 0.0)


def test_the_progress_line_says_step_loss_and_time():
    """The mean of the last 20 losses: 1."""
    assert (
        TrainingProgress(30, 100, [9.0] * 10 + [1.0] * 20, 1e-4, 125).format_line()
        == "step 30/100 · loss 1.0000 · 2 min left"
    )
    assert [format_duration(s) for s in (0, 59.6, 89, 90, 5399, 5400, math.inf)] == [
        "0 s",
        "60 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
        "?",
    ]


def test_reading_no_loss_between_reports_keeps_a_gpu_from_waiting():
    """Losses are fetched in one go: the tensors of 49 unreported steps become numbers in a single call."""
    fetched = []
    real = torch.Tensor.tolist

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: (fetched.append(tuple(self.shape)), real(self))[1])
        patch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a step waited for the device"))
        patch.setattr(Line, "loss", lambda self, g: (self.w * torch.randn(1, generator=g)).square())
        train(Line(), run(50), PLAIN, interval=1000)
    assert fetched == [(1, 2), (49, 2)]
