"""Weightings, Huber losses and kinds of noise by hand, for eps, v and flow models; the moving average of what is
trained."""

import math
import types

import pytest
import torch
from trainyard.tests.unit.toy import Denoiser, Line, Net, Perfect, adapters, dataset, rng
from trainyard.trainers.diffusion import (
    add_pyramid_noise,
    denoising_loss,
    huber_width,
    loss_weight,
    native_error,
    sample_training_noise,
    slope,
    snr,
)
from trainyard.trainers.files import read_state_tree, write_state_tree
from trainyard.trainers.loop import NoStore, TrainingState, train
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.optimizers import EmaOptimizer, apply_eval_weights, eval_weights_applied, make_optimizer
from trainyard.trainers.settings import (
    AdapterSettings,
    NoiseSettings,
    OptimizerSettings,
    RunSettings,
    compute_fingerprint,
)

X0 = torch.zeros(1, 2, 4, 4)


def weight(prediction, sigma, **settings):
    return loss_weight(Denoiser(prediction=prediction), torch.tensor([sigma]), NoiseSettings(**settings)).item()


# -- weightings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weighting, prediction, sigma, value",
    [
        # SNR 4 at sigma 0.5 for eps and v; gamma 5: 4 * 5 / 9 = 2.222 of x0; native_scale^2 0.25 for eps, 0.2 for v
        ("soft-min-SNR", "eps", 0.5, 20 / 9 * 0.25),
        ("soft-min-SNR", "v", 0.5, 20 / 9 * 0.2),
        ("soft-min-SNR", "flow", 1 / 3, 20 / 9 / 9),  # SNR ((1 - s) / s)^2 = 4, native_scale s
        # eps: 1 / sqrt(SNR) = 0.5, as published; x0: sqrt(SNR) = 2; v: 2 * 0.2
        ("debiased", "eps", 0.5, 0.5),
        ("debiased", "v", 0.5, 0.4),
        ("debiased", "flow", 1 / 3, 2 / 9),
        # eps: 1 / (1 + SNR) = 0.2, as published; x0: SNR / (1 + SNR) = 0.8; v: 0.8 * 0.2
        ("P2", "eps", 0.5, 0.2),
        ("P2", "v", 0.5, 0.16),
        ("P2", "flow", 1 / 3, 0.8 / 9),
    ],
)
def test_weightings_by_hand(weighting, prediction, sigma, value):
    assert weight(prediction, sigma, weighting=weighting) == pytest.approx(value, rel=1e-5)


def test_soft_min_snr_is_the_published_weight_of_v_when_gamma_is_1():
    """k-diffusion: (s * sd)^2 / (s^2 + sd^2)^2 with sd = 1, of the preconditioned target, which is v."""
    for sigma in (0.1, 1.0, 7.0):
        assert weight("v", sigma, weighting="soft-min-SNR", gamma=1.0) == pytest.approx(
            (sigma / (sigma**2 + 1)) ** 2, rel=1e-5
        )


def test_soft_min_snr_stays_below_min_snr_and_meets_it_far_away():
    for sigma in (0.001, 0.4, 50.0):
        soft, hard = (weight("eps", sigma, weighting=name) for name in ("soft-min-SNR", "min-SNR"))
        assert soft <= hard * (1 + 1e-6)
    assert weight("eps", 50.0, weighting="soft-min-SNR") == pytest.approx(
        weight("eps", 50.0, weighting="min-SNR"), rel=1e-3
    )


def test_p2_falls_faster_with_a_larger_power():
    assert weight("eps", 0.5, weighting="P2", p2_gamma=0.5) == pytest.approx(5**-0.5, rel=1e-5)
    assert weight("eps", 0.5, weighting="P2", p2_gamma=0.0) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("weighting", ["min-SNR", "soft-min-SNR", "debiased", "P2"])
@pytest.mark.parametrize(
    "prediction, sigmas", [("eps", (0.002, 14.6, 4518.0)), ("v", (0.002, 14.6, 4518.0)), ("flow", (1e-4, 0.5, 1.0))]
)
def test_every_weight_is_finite_and_not_negative_at_both_ends(weighting, prediction, sigmas):
    found = [weight(prediction, sigma, weighting=weighting) for sigma in sigmas]
    assert all(math.isfinite(w) and w >= 0 for w in found), found


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_huber_by_hand(prediction):
    """The network's own answer is off by 0.75 everywhere, c = 1: 2 * (sqrt(0.75^2 + 1) - 1) = 0.5."""
    denoiser, sigma = Denoiser(prediction=prediction), torch.tensor([0.5])
    off = 0.75 * denoiser.native_scale(sigma).view(1, 1, 1, 1)
    assert native_error(
        denoiser, X0 + off, X0, sigma, None, NoiseSettings(loss="Huber", huber_c=1.0)
    ).item() == pytest.approx(0.5)


def test_small_errors_are_squared_and_large_ones_counted_once():
    denoiser, one = Denoiser(prediction="eps"), torch.ones(1)
    small, large = (
        native_error(denoiser, X0 + e, X0, one, None, NoiseSettings(loss="Huber")).item() for e in (0.001, 100.0)
    )
    assert small == pytest.approx(1e-6, rel=1e-2) and large == pytest.approx(2 * 0.1 * (100 - 0.1), rel=1e-4)


@pytest.mark.parametrize("prediction, sigma", [("eps", 1.0), ("v", 1.0), ("flow", 0.5)])
def test_the_huber_schedule_by_hand_and_alike_for_every_family(prediction, sigma):
    """SNR 1: (1 - 0.1) / (1 + 1)^2 + 0.1 = 0.325."""
    settings = NoiseSettings(loss="scheduled Huber")
    assert huber_width(Denoiser(prediction=prediction), torch.tensor([sigma]), settings).item() == pytest.approx(
        0.325, rel=1e-5
    )


def test_the_huber_schedule_is_1_where_clean_and_c_where_noisy():
    settings, denoiser = NoiseSettings(loss="scheduled Huber"), Denoiser(prediction="eps")
    assert huber_width(denoiser, torch.tensor([1e-4, 1e4]), settings).tolist() == [
        pytest.approx(1, abs=1e-3),
        pytest.approx(0.1, abs=1e-3),
    ]


def test_a_mask_hides_huber_errors_too():
    denoiser, mask = Denoiser(prediction="eps"), torch.zeros(1, 1, 4, 4)
    mask[..., 0] = 1
    off = X0.clone()
    off[..., 1:] = 5.0
    assert native_error(denoiser, off, X0, torch.ones(1), mask, NoiseSettings(loss="Huber")).item() == 0


# -- noise -------------------------------------------------------------------------------------------------------------


def test_plain_noise_is_drawn_as_ever():
    assert torch.equal(sample_training_noise(X0, rng(3), NoiseSettings()), torch.randn(X0.shape, generator=rng(3)))


def test_an_offset_moves_each_channel_of_each_picture_as_a_whole():
    x0 = torch.zeros(3, 2, 4, 4)
    moved = sample_training_noise(x0, rng(3), NoiseSettings(noise_offset=0.5)) - torch.randn(x0.shape, generator=rng(3))
    assert moved.flatten(2).std(2).max() < 1e-6 and moved[..., 0, 0].unique().numel() == 6


def test_the_offset_is_as_large_as_asked():
    offsets = sample_training_noise(torch.zeros(4000, 2, 2, 2), rng(), NoiseSettings(noise_offset=0.5)).mean((2, 3))
    assert offsets.var().item() == pytest.approx(0.5**2 + 1 / 4, rel=0.05), "offset^2 + the variance of a mean of 4"


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 4, 3, 16, 8)])
def test_multires_noise_has_spread_1_and_neighbours_that_agree(shape):
    noise = sample_training_noise(torch.zeros(shape), rng(), NoiseSettings(pyramid_levels=6, pyramid_discount=0.8))
    assert noise.shape == shape and noise.flatten(1).std(1).tolist() == [pytest.approx(1, rel=1e-4)] * 2
    alike = lambda n: (n[..., 1:] * n[..., :-1]).mean().item()
    assert alike(noise) > 0.2 > abs(alike(torch.randn(shape, generator=rng())))


def test_multires_noise_by_hand():
    """A discount that is hardly anything leaves the noise as it was, up to its spread."""
    noise = torch.randn(1, 2, 8, 8, generator=rng(1))
    assert torch.allclose(add_pyramid_noise(noise, rng(2), 3, 1e-9), noise / noise.std(), atol=1e-5)


@pytest.mark.parametrize("settings", [dict(noise_offset=0.1), dict(pyramid_levels=4), dict(perturbation=0.1)])
def test_every_kind_of_noise_comes_from_the_steps_own_generator(settings):
    def loss(seed):
        return LoraTraining(Denoiser(Net()), adapters(Net()), dataset(), NoiseSettings(**settings)).loss(rng(seed))

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))


@pytest.mark.parametrize("prediction, sigma", [("eps", 2.0), ("v", 2.0), ("flow", 0.4)])
def test_perturbation_changes_what_is_shown_and_not_what_the_network_is_to_answer(prediction, sigma):
    """A model that answers its target for the plain noise has no loss, however much more noise it is shown."""
    draw = rng()
    x0, noise, extra = (torch.randn(1, 2, 4, 4, generator=draw) for _ in range(3))
    s = torch.tensor(sigma)
    target = {"eps": noise, "v": (noise - s * x0) / (s**2 + 1).sqrt(), "flow": noise - x0}[prediction]

    class Answers(Denoiser):
        def denoise(self, x, sigma, conds):
            self.shown = x
            return self.x0(x, s, target)

    model = Answers(prediction=prediction)
    assert denoising_loss(model, x0, noise, torch.tensor([sigma]), [], extra=0.3 * extra).item() == pytest.approx(
        0, abs=1e-9
    )
    assert torch.allclose(model.shown, model.noised(x0, noise + 0.3 * extra, torch.tensor([sigma])))


def test_without_perturbation_a_perfect_model_has_no_loss():
    x0 = torch.randn(1, 2, 4, 4, generator=rng())
    assert denoising_loss(Perfect(x0), x0, torch.randn_like(x0), torch.tensor([0.5]), []).item() == 0
    assert slope(x0, torch.ones(1), x0).abs().max() == 0 and snr(
        Perfect(x0), torch.tensor([0.5])
    ).item() == pytest.approx(1)


# -- the average -------------------------------------------------------------------------------------------------------


def averaged(decay, on_cpu=False):
    line = Line(0.0)
    optimizer = make_optimizer([{"params": [line.w], "lr": 1.0}], OptimizerSettings(optimizer="SGD", beta1=0.0, weight_decay=0.0, ema=decay,
                                                                                    ema_on_cpu=on_cpu))  # fmt: skip
    return line, optimizer


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_average_by_hand(on_cpu):
    """w is 0, then 1, then 2. Decays min(0.5, 1/10) and min(0.5, 2/11): 0.9 * 1 = 0.9, then 2/11 * 0.9 + 9/11 * 2 =
    1.8."""
    line, optimizer = averaged(0.5, on_cpu)
    for _ in range(2):
        line.w.grad = torch.tensor([-1.0])
        optimizer.step()
    with eval_weights_applied(optimizer, [line.w]):
        assert line.w.item() == pytest.approx(1.8)
    assert line.w.item() == 2.0, "training goes on from where it was"
    apply_eval_weights(optimizer)
    assert line.w.item() == pytest.approx(1.8)


def test_an_average_in_main_memory_waits_once_for_all_tensors(monkeypatch):
    """Pretended parameters of a GPU: every copy is queued before the one wait."""
    queue = []

    class Pretended:
        device, is_cuda = torch.device("cuda:1"), True

        def detach(self):
            return self

    class Arrival:
        device = torch.device("cpu")

        def copy_(self, value, non_blocking):
            assert isinstance(value, Pretended) and non_blocking
            queue.append("copy")

    stream = types.SimpleNamespace(synchronize=lambda: queue.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    average = EmaOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 0.9)
    average.arrivals = [Arrival() for _ in range(3)]
    monkeypatch.setattr(average, "params", lambda: [Pretended() for _ in range(3)])
    average.fetch_parameters()
    assert queue == ["copy"] * 3 + ["wait"]


def test_the_average_resumes_bit_for_bit(tmp_path):
    def after(parts):
        line, losses = Line(0.0), []
        state = None
        for steps in parts:
            line = Line(0.0)
            store = Kept(state)
            how = OptimizerSettings(ema=0.9)
            losses = train(line, RunSettings(steps=steps, learning_rate=0.1), how, store=store)
            write_state_tree(tmp_path / "state", store.state)
            state = read_state_tree(tmp_path / "state")
        return line.w.item(), losses, state

    class Kept(NoStore):
        def __init__(self, state):
            self.state = state

        def load(self):
            return self.state

        def save(self, state, why):
            self.state = state

    whole, parts = after([8]), after([3, 8])
    assert whole[:2] == parts[:2]
    assert torch.equal(whole[2]["optimizer"]["average"][0], parts[2]["optimizer"]["average"][0])
    assert whole[0] != whole[2]["params"][0].item(), (
        "what is delivered is the average, what is kept is the training point"
    )


def test_an_average_beside_schedule_free_is_refused():
    with pytest.raises(
        ValueError, match="ema is 0.9 and the optimizer is ScheduleFreeAdamW, which delivers an average by itself"
    ):
        OptimizerSettings(optimizer="ScheduleFreeAdamW", ema=0.9)


def test_training_itself_is_the_same_with_an_average():
    losses = [
        train(Line(0.0), RunSettings(steps=6, learning_rate=0.1), OptimizerSettings(ema=ema)) for ema in (0.0, 0.99)
    ]
    assert losses[0] == losses[1]


def test_a_run_in_memory_keeps_its_average():
    line, optimizer = averaged(0.9)
    assert set(TrainingState(line, optimizer, [line.w]).state()["optimizer"]) == {"optimizer", "average", "updates"}


# -- runs from before --------------------------------------------------------------------------------------------------


def test_settings_that_came_later_leave_the_fingerprints_of_older_runs_alone():
    """32 digits that a release without these settings gave."""
    old = {"rank": 16, "alpha": 0.0, "rslora": False, "targets": "attention+mlp", "pattern": "", "conv": False, "conv_rank": 8,
           "conv_alpha": 0.0, "text_encoder": False}  # fmt: skip
    assert compute_fingerprint(AdapterSettings()) == compute_fingerprint({"AdapterSettings": old})
    assert compute_fingerprint(AdapterSettings(dropout=0.1)) != compute_fingerprint(AdapterSettings())
    assert compute_fingerprint(NoiseSettings(loss="Huber")) != compute_fingerprint(NoiseSettings())
