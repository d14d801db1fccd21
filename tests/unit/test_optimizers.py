"""Every optimizer by name steps, learns and resumes exactly; schedules by hand."""

import importlib.util
import sys

import pytest
import torch
from trainyard.tests.unit.toy import Line, rng
from trainyard.trainers.files import read_state_tree, write_state_tree
from trainyard.trainers.loop import train
from trainyard.trainers.optimizers import apply_eval_weights, eval_weights_applied, lr_schedule_factor, make_optimizer
from trainyard.trainers.settings import LR_SCHEDULES, OPTIMIZERS, OptimizerSettings, RunSettings

IN_TORCH = ("AdamW", "RAdam", "SGD")
INSTALLED = [name for name in OPTIMIZERS if name != "AdamW8bit"]  # bitsandbytes is not in the development environment
RATE = {"Prodigy": 1.0, "SGD": 0.05, "Lion": 0.02}  # where 0.05 is not a sensible rate


def optimizer_or_skip(name, params, **settings):
    if name not in IN_TORCH:
        pytest.importorskip("pytorch_optimizer")
    return make_optimizer(
        [{"params": params, "lr": RATE.get(name, 0.05)}], OptimizerSettings(optimizer=name, **settings)
    )


def problem(seed=0):
    """(parameters, target): a matrix and a vector, as a LoRA's tensors are of several shapes, and where they should
    go."""
    draw = rng(seed)
    shapes = ((5, 4), (6,))
    return [torch.nn.Parameter(torch.zeros(s)) for s in shapes], [torch.randn(s, generator=draw) for s in shapes]


def distance(params, target):
    return sum((p - t).square().sum() for p, t in zip(params, target, strict=True))


def steps(optimizer, params, target, count):
    """Optimizer steps on the distance; no two gradients alike, as the target shakes by the step."""
    for step in range(count):
        shaken = [t + 0.1 * torch.randn(t.shape, generator=rng(100 + step)) for t in target]
        distance(params, shaken).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", INSTALLED)
def test_an_optimizer_moves_every_parameter_and_gets_nearer(name):
    params, target = problem()
    before = distance(params, target).item()
    optimizer = optimizer_or_skip(name, params)
    steps(optimizer, params, target, 30)
    assert all((p != 0).all() for p in params)
    after = distance(params, target).item()
    assert after < 0.97 * before, f"{name}: {before:.4f} -> {after:.4f}"


@pytest.mark.parametrize("name", INSTALLED)
def test_an_optimizer_read_back_from_disk_goes_on_bit_for_bit(name, tmp_path):
    """4 + 4 steps through a file, with new objects, equal 8 steps in one go; the second four see other targets than the
    first."""
    (whole, target), (first, _), (second, _) = problem(), problem(), problem()
    optimizer = optimizer_or_skip(name, whole)
    steps(optimizer, whole, target, 4)
    steps(optimizer, whole, target[:1] + [t + 1 for t in target[1:]], 4)

    optimizer = optimizer_or_skip(name, first)
    steps(optimizer, first, target, 4)
    write_state_tree(tmp_path / "state", {"params": first, "optimizer": optimizer.state_dict()})
    saved = read_state_tree(tmp_path / "state")
    optimizer = optimizer_or_skip(name, second)
    with torch.no_grad():
        for p, value in zip(second, saved["params"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    steps(optimizer, second, target[:1] + [t + 1 for t in target[1:]], 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True)), f"{name} does not resume exactly"


@pytest.mark.parametrize("name", INSTALLED)
def test_weight_decay_pulls_every_optimizer_toward_zero(name):
    """The same two steps from 1, with and without. (In the long run Prodigy answers a decay with a larger rate.)"""
    norms = []
    for decay in (0.0, 1.0):
        params, target = problem()
        for p in params:
            p.data.fill_(1.0)
        steps(optimizer_or_skip(name, params, weight_decay=decay), params, target, 2)
        norms.append(sum(p.detach().double().norm().item() for p in params))
    assert norms[1] < norms[0], norms


def test_adamw_is_torchs_own_with_the_betas_asked_for():
    params, target = problem()
    same, _ = problem()
    ours = optimizer_or_skip("AdamW", params, beta1=0.8, beta2=0.95, weight_decay=0.1)
    torchs = torch.optim.AdamW(same, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)
    steps(ours, params, target, 5)
    steps(torchs, same, target, 5)
    assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


@pytest.mark.parametrize("name", ["Prodigy", "ScheduleFreeAdamW", "Lion", "CAME", "Adafactor"])
def test_an_optimizer_of_the_package_gets_the_betas_asked_for(name):
    optimizer = optimizer_or_skip(name, problem()[0], beta1=0.8, beta2=0.95)
    assert tuple(optimizer.param_groups[0]["betas"])[:2] == (0.8, 0.95)


def test_groups_keep_their_own_rates():
    groups = [{"params": [p], "lr": lr} for p, lr in zip(problem()[0], (1e-3, 1e-4), strict=True)]
    assert [g["lr"] for g in make_optimizer(groups, OptimizerSettings()).param_groups] == [1e-3, 1e-4]


def moved_with_rates(name, *rates, count=6):
    """How far a parameter of each group has gone in some steps along the same slope, as a mean over its numbers."""
    if name not in IN_TORCH:
        pytest.importorskip("pytorch_optimizer")
    params = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in rates]
    groups = [{"params": [p], "lr": rate * RATE.get(name, 0.05)} for p, rate in zip(params, rates, strict=True)]
    optimizer = make_optimizer(groups, OptimizerSettings(optimizer=name, weight_decay=0.0))
    for step in range(count):
        slope = 1 + 0.1 * torch.rand(3, 4, generator=rng(step))
        sum((p * slope).sum() for p in params).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [-p.mean().item() for p in params]


@pytest.mark.parametrize("shares", [(1.0, 0.25), (0.25, 1.0), (1.0, 16.0), (1e-6, 1.0)], ids=str)
@pytest.mark.parametrize("name", INSTALLED)
def test_every_optimizer_moves_a_group_in_proportion_to_its_rate_whichever_comes_first(name, shares):
    first, second = moved_with_rates(name, *shares)
    assert first > 0 and first / second == pytest.approx(shares[0] / shares[1], rel=1e-3), f"{name}: {first} {second}"


@pytest.mark.parametrize("name", INSTALLED)
def test_a_slow_group_does_not_slow_the_others(name):
    """Prodigy's one estimate is a mean over its groups, weighted by their rates, so a slow one has little part in it."""
    alone, (_, beside) = moved_with_rates(name, 1.0)[0], moved_with_rates(name, 0.01, 1.0)
    assert beside == pytest.approx(alone, rel=0.05), f"{name}: {alone} alone, {beside} beside a slow group"


@pytest.mark.parametrize("name", INSTALLED)
def test_a_parameter_that_learns_faster_goes_further_under_every_optimizer(name):
    """`rate`, which LoRA+ and the rules of `blocks` set."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    params[1].rate = 16.0
    optimizer = optimizer_or_skip(name, params, weight_decay=0.0)
    sum(p.sum() for p in params).backward()
    optimizer.step()
    assert params[1][0].item() == pytest.approx(16 * params[0][0].item(), rel=1e-3)


def test_prodigy_with_rates_apart_goes_on_bit_for_bit_and_its_groups_keep_their_rates(tmp_path):
    pytest.importorskip("pytorch_optimizer")

    def begin():
        params, target = problem()
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (1.0, 0.1), strict=True)]
        return make_optimizer(groups, OptimizerSettings(optimizer="Prodigy")), params, target

    optimizer, whole, target = begin()
    steps(optimizer, whole, target, 8)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8, 1e-8]

    first, params, target = begin()
    steps(first, params, target, 8)
    steps(optimizer, whole, target, 3)
    write_state_tree(tmp_path / "state", {"params": params, "optimizer": first.state_dict()})
    saved = read_state_tree(tmp_path / "state")
    second, params, target = begin()
    with torch.no_grad():
        for p, value in zip(params, saved["params"], strict=True):
            p.copy_(value)
    second.load_state_dict(saved["optimizer"])
    steps(second, params, target, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, params, strict=True))


def test_prodigy_with_equal_rates_is_the_packages_own_bit_for_bit():
    package = pytest.importorskip("pytorch_optimizer")
    (params, target), (same, _) = problem(), problem()
    ours = make_optimizer([{"params": [p], "lr": 1.0} for p in params], OptimizerSettings(optimizer="Prodigy"))
    theirs = package.Prodigy(same, lr=1.0, betas=(0.9, 0.999), weight_decay=0.01)
    steps(ours, params, target, 5)
    steps(theirs, same, target, 5)
    assert type(ours) is type(theirs) and all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


# -- missing packages --------------------------------------------------------------------------------------------------


def without(monkeypatch, *missing):
    """As if these packages were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else real(name, *rest))
    for name in missing:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    "name, package", [("AdamW8bit", "bitsandbytes"), ("Prodigy", "pytorch-optimizer"), ("Lion", "pytorch-optimizer")]
)
def test_a_missing_package_gives_the_line_to_type(name, package, monkeypatch):
    without(monkeypatch, "bitsandbytes", "pytorch_optimizer")
    with pytest.raises(
        RuntimeError,
        match=rf"The optimizer {name} needs a package that is not installed\. Run: pip install {package}\n",
    ):
        make_optimizer([{"params": problem()[0], "lr": 1.0}], OptimizerSettings(optimizer=name))


@pytest.mark.parametrize("name", IN_TORCH)
def test_torchs_optimizers_need_no_package(name, monkeypatch):
    without(monkeypatch, "bitsandbytes", "pytorch_optimizer")
    params, target = problem()
    steps(make_optimizer([{"params": params, "lr": 0.1}], OptimizerSettings(optimizer=name)), params, target, 1)
    assert all((p != 0).all() for p in params)


# -- schedule-free -----------------------------------------------------------------------------------------------------


def test_schedule_free_delivers_its_average_and_returns_to_its_training_point_bit_for_bit():
    """beta1 = 0.9: the average x solves y = 0.9 x + 0.1 z, so x = (y - 0.1 z) / 0.9 (Defazio et al. 2024)."""
    params, target = problem()
    optimizer = optimizer_or_skip("ScheduleFreeAdamW", params)
    steps(optimizer, params, target, 5)
    before = [p.detach().clone() for p in params]
    averages = [(p.detach() - 0.1 * optimizer.state[p]["z"]) / 0.9 for p in params]
    with eval_weights_applied(optimizer, params):
        assert all(torch.allclose(p, x, atol=1e-6) for p, x in zip(params, averages, strict=True))
        assert not any(torch.equal(p, y) for p, y in zip(params, before, strict=True))
    assert all(torch.equal(p, y) for p, y in zip(params, before, strict=True))
    undisturbed, _ = problem()
    other = optimizer_or_skip("ScheduleFreeAdamW", undisturbed)
    steps(other, undisturbed, target, 5)
    steps(other, undisturbed, target, 5)
    steps(optimizer, params, target, 5)
    assert all(torch.equal(a, b) for a, b in zip(params, undisturbed, strict=True)), (
        "looking at the average changed the run"
    )


def test_the_training_point_returns_after_an_error_too():
    params, target = problem()
    optimizer = optimizer_or_skip("ScheduleFreeAdamW", params)
    steps(optimizer, params, target, 3)
    before = [p.detach().clone() for p in params]
    with pytest.raises(OSError), eval_weights_applied(optimizer, params):
        raise OSError("disk full")
    assert (
        all(torch.equal(p, y) for p, y in zip(params, before, strict=True)) and optimizer.param_groups[0]["train_mode"]
    )


def test_a_finished_run_leaves_the_average_that_it_saved(tmp_path):
    """Whoever exports the parameters after the last step gets what the store was given, and not the training point."""
    pytest.importorskip("pytorch_optimizer")
    seen = []

    class Store:
        def load(self):
            return None

        def save(self, state, why):
            seen.append((why, method.w.item(), state["params"][0].item()))

    method = Line()
    train(
        method,
        RunSettings(steps=5, learning_rate=0.1, save_every=0),
        OptimizerSettings(optimizer="ScheduleFreeAdamW"),
        store=Store(),
    )
    ((why, delivered, training_point),) = seen
    assert why == "finished" and delivered != training_point
    assert method.w.item() == delivered


def test_other_optimizers_deliver_what_they_train():
    params, target = problem()
    optimizer = optimizer_or_skip("AdamW", params)
    steps(optimizer, params, target, 2)
    before = [p.detach().clone() for p in params]
    with eval_weights_applied(optimizer, params):
        pass
    apply_eval_weights(optimizer)
    assert all(torch.equal(p, y) for p, y in zip(params, before, strict=True))


# -- schedules ---------------------------------------------------------------------------------------------------------


def factors(schedule, steps=8, **settings):
    return [lr_schedule_factor(step, steps, OptimizerSettings(schedule=schedule, **settings)) for step in range(steps)]


HALF = 0.5**0.5
BY_HAND = {  # of 8 steps, at t = 0, 1/8, ... 7/8
    "constant": [1.0] * 8,
    "linear": [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [1, 0.961940, (1 + HALF) / 2, 0.691342, 0.5, 0.308658, (1 - HALF) / 2, 0.038060],
    "cosine with restarts": [1, (1 + HALF) / 2, 0.5, (1 - HALF) / 2] * 2,
    "polynomial": [(1 - i / 8) ** 2 for i in range(8)],
}


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_schedules_by_hand(schedule):
    assert factors(schedule, restarts=2) == pytest.approx(BY_HAND[schedule], abs=1e-6)


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_the_warmup_rises_in_equal_parts_and_the_schedule_fills_the_rest(schedule):
    """Warmup 3: 1/4, 2/4, 3/4, and then the schedule of 8 steps from its start."""
    with_warmup = factors(schedule, steps=11, warmup=3, restarts=2)
    assert with_warmup[:3] == [0.25, 0.5, 0.75]
    assert with_warmup[3:] == pytest.approx(BY_HAND[schedule], abs=1e-6)


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_a_warmup_as_long_as_the_run_never_gets_full(schedule):
    assert factors(schedule, steps=3, warmup=3) == [0.25, 0.5, 0.75] and factors(schedule, steps=1) == [1.0]


def test_the_loop_gives_every_step_the_rate_of_the_schedule():
    """SGD without momentum on a loss with gradient 1: the parameter falls by the sum of the rates, 0.1 * (1/3 + 2/3 + 1
    + 3/4 + 1/2 + 1/4)."""

    class Slope:
        def __init__(self):
            self.w = torch.nn.Parameter(torch.zeros(()))

        def parameters(self):
            return [self.w]

        def loss(self, generator):
            return self.w[None]

    method = Slope()
    optimizing = OptimizerSettings(optimizer="SGD", schedule="linear", warmup=2, beta1=0.0, weight_decay=0.0)
    train(method, RunSettings(steps=6, learning_rate=0.1), optimizing)
    assert method.w.item() == pytest.approx(-0.1 * 3.5)
