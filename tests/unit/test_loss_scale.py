"""The dynamic loss scale of models that compute in fp16."""

import math

import pytest
import torch
from trainyard.trainers import loss_scale
from trainyard.trainers.loop import Diverged, train
from trainyard.trainers.loss_scale import FIRST_SCALE, LossScale
from trainyard.trainers.settings import OptimizerSettings, RunSettings

PLAIN = OptimizerSettings(clip=0.0)


class ThroughHalf(torch.autograd.Function):
    """The identity, whose gradients pass through fp16 as those of a model that computes in it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.half().float()


class HalfModel:
    """One number w with the loss size * (w - 1)^2, whose gradient passes through fp16."""

    def __init__(self, size):
        self.size, self.draws = size, 0
        self.w = torch.nn.Parameter(torch.zeros(1))

    def parameters(self):
        return [self.w]

    def loss(self, rng):
        self.draws += 1
        return ThroughHalf.apply(self.w - 1).square() * self.size

    def state(self):
        return {"draws": self.draws}

    def load_state(self, state):
        self.draws = state["draws"]


class Memory:
    """A store that keeps the state of the last save."""

    def __init__(self, state=None):
        self.state = state

    def load(self):
        return self.state

    def save(self, state, why):
        self.state = state

    def save_best(self, step): ...


def trained(size, scale, steps=20, store=None, **run):
    method = HalfModel(size)
    losses = train(method, RunSettings(steps=steps, learning_rate=0.1, **run), PLAIN, loss_scale=scale, store=store)
    return method, losses


def test_gradients_too_small_for_fp16_are_learnt_from_under_a_scale():
    """The gradient 2e-8 is zero in fp16, and 8e-5 after the scale of 4096."""
    assert float(trained(1e-8, None)[0].w.detach()) == 0.0
    assert float(trained(1e-8, LossScale())[0].w.detach()) > 0.3


def test_a_scale_under_which_a_gradient_does_not_fit_is_halved_and_the_step_done_again():
    """The gradient -200 times 2^9 is beyond 65504, the largest number of fp16; times 2^8 it is not."""
    scale = LossScale()
    method, losses = trained(100.0, scale, steps=1)
    assert scale.scale == 2.0**8
    assert losses == [100.0]
    assert float(method.w.detach()) > 0
    assert method.draws == 1, "the tries before are undone"


def test_the_scaled_run_is_the_plain_run_where_nothing_overflows():
    plain, scaled = trained(1.0, None), trained(1.0, LossScale(scale=2.0))
    assert plain[1] == scaled[1]
    assert torch.equal(plain[0].w, scaled[0].w)


def test_the_scale_is_doubled_after_many_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "STEPS_UNTIL_DOUBLED", 5)
    scale = LossScale()
    trained(1e-6, scale, steps=10)
    assert scale.scale == FIRST_SCALE * 4


def test_a_resumed_run_goes_on_under_the_same_scale(monkeypatch):
    monkeypatch.setattr(loss_scale, "STEPS_UNTIL_DOUBLED", 3)
    whole, half, rest = LossScale(), LossScale(), LossScale()
    wanted = trained(1e-6, whole, steps=8)
    store = Memory()
    trained(1e-6, half, steps=4, store=store)
    resumed = trained(1e-6, rest, steps=8, store=Memory(store.state))
    assert rest == whole
    assert torch.equal(resumed[0].w, wanted[0].w)


def test_a_loss_that_is_no_number_still_ends_the_run():
    scale = LossScale()
    with pytest.raises(Diverged, match="The loss became nan"):
        trained(math.nan, scale, steps=1)
    assert scale.scale == FIRST_SCALE, "no scale helps against it"
