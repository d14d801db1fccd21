"""The arithmetic of noise, by hand: slopes, native errors, weights, densities and a trajectory."""

import math

import pytest
import torch
from trainyard.tests.unit.toy import Denoiser, Perfect, rng
from trainyard.trainers.diffusion import (
    NoiseLevelDensity,
    TokenShift,
    cpu_randn_like,
    denoising_loss,
    density_cdf,
    density_quantile,
    loss_weight,
    native_error,
    per_sample_mse,
    resolve_noise_density,
    sample_euler,
    sample_sigmas,
    shift_noise_level,
    slope,
    snr,
    unshift_noise_level,
)
from trainyard.trainers.settings import NoiseSettings

PREDICTIONS = ("eps", "v", "flow")
LOGIT_NORMAL = NoiseLevelDensity("logit-normal", 0.0, 1.0, 1.0)


def pair(seed=0, batch=3):
    """(x0, noise) of shape (B, 2, 4, 4)."""
    draw = rng(seed)
    return torch.randn(batch, 2, 4, 4, generator=draw), torch.randn(batch, 2, 4, 4, generator=draw)


def latents(count, side=2):
    """`count` latents of one channel that take no memory."""
    return torch.zeros(1, 1, 1, 1).expand(count, 1, side, side)


def drawn(density, low=0.0, high=1.0, prediction="flow", count=20_000, side=2):
    """`count` noise levels."""
    return sample_sigmas(Denoiser(prediction=prediction), density, latents(count, side), rng(), low, high)


def wanted(prediction, x0, noise, sigma):
    """What the network is trained to answer: the noise, v = (noise - sigma * x0) / sqrt(sigma^2 + 1), or noise - x0."""
    s = sigma.view(-1, 1, 1, 1)
    return {"eps": noise, "v": (noise - s * x0) / (s**2 + 1).sqrt(), "flow": noise - x0}[prediction]


# -- one convention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_slope_is_the_noise_of_eps_models_and_the_velocity_of_flow_models(prediction):
    x0, noise = pair()
    sigma = torch.tensor([0.1, 0.5, 0.9])
    x = Denoiser(prediction=prediction).noised(x0, noise, sigma)
    assert torch.allclose(slope(x, sigma, x0), noise - x0 if prediction == "flow" else noise, atol=1e-5)


def test_noise_and_slope_by_hand():
    """x0 = 2, noise = 10, sigma = 0.25. eps: x = 2 + 2.5 = 4.5, slope 10. flow: x = 1.5 + 2.5 = 4, slope (4 - 2) / 0.25
    = 8 = 10 - 2."""
    x0, noise, sigma = torch.full((1, 1), 2.0), torch.full((1, 1), 10.0), torch.tensor([0.25])
    for prediction, x, answer in (("eps", 4.5, 10.0), ("flow", 4.0, 8.0)):
        noised = Denoiser(prediction=prediction).noised(x0, noise, sigma)
        assert noised.item() == x and slope(noised, sigma, x0).item() == answer


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_the_native_error_is_the_error_of_the_networks_own_answer(prediction, sigma):
    """A network that is wrong by e everywhere has a native error of e^2 at every noise level, whatever it predicts:
    0.3^2 = 0.09."""
    x0, noise = pair()
    model, sigma = Denoiser(prediction=prediction), torch.full((3,), sigma)
    x = model.noised(x0, noise, sigma)
    x0_hat = model.x0(x, sigma.view(-1, 1, 1, 1), wanted(prediction, x0, noise, sigma) + 0.3)
    assert native_error(model, x0_hat, x0, sigma).tolist() == pytest.approx([0.09] * 3, rel=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_has_no_loss(prediction):
    x0, noise = pair(batch=1)
    assert denoising_loss(Perfect(x0, prediction), x0, noise, torch.tensor([0.5]), [None]).tolist() == [0.0]


def test_the_loss_of_an_eps_model_by_hand():
    """x0 = 2, noise = 10, sigma 0.5; the model says x0 = 3: off by 1, which is 1 / 0.5 = 2 in the noise: loss 4."""
    model = Perfect(torch.full((1, 1), 3.0), "eps")
    assert (
        denoising_loss(model, torch.full((1, 1), 2.0), torch.full((1, 1), 10.0), torch.tensor([0.5]), [None]).item()
        == 4.0
    )


# -- means and masks ---------------------------------------------------------------------------------------------------


def test_the_mean_is_taken_per_sample_and_over_what_the_mask_lets_through():
    """Errors 1, 2, 3, 4: mean of squares 30/4 = 7.5; behind the mask (1, 0, 0, 1): (1 + 16) / 2 = 8.5, half of the
    last: (1 + 8) / 1.5 = 6."""
    error = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).repeat(2, 1, 1, 1)
    assert per_sample_mse(error, torch.zeros_like(error)).tolist() == [7.5, 7.5]
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[1.0, 0.0], [0.0, 0.5]]]])
    assert per_sample_mse(error, torch.zeros_like(error), mask).tolist() == [8.5, 6.0]


def test_a_mask_of_one_channel_covers_all_channels_and_an_empty_one_gives_zero():
    a, b = pair(batch=2)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2] = 1
    first, second = per_sample_mse(a, b, mask).tolist()
    assert first == pytest.approx((a - b)[0, :, :2].square().mean().item(), rel=1e-6) and second == 0.0


def test_half_precision_errors_are_taken_in_fp32():
    a = torch.full((1, 1000), 300.0, dtype=torch.float16)  # 300^2 is beyond fp16
    assert per_sample_mse(a, torch.zeros_like(a)).item() == 90_000.0


def test_noise_is_drawn_on_the_cpu_from_the_generator_alone():
    x = torch.zeros(2, 3, dtype=torch.float16)
    torch.manual_seed(1)
    first = cpu_randn_like(x, rng(4))
    torch.manual_seed(2)
    assert torch.equal(first, cpu_randn_like(x, rng(4))) and not torch.equal(first, cpu_randn_like(x, rng(5)))
    assert torch.equal(first, torch.randn(2, 3, generator=rng(4))) and first.dtype == torch.float32


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction, sigma, value", [("eps", 0.5, 4.0), ("v", 2.0, 0.25), ("flow", 0.5, 1.0), ("flow", 0.2, 16.0)]
)
def test_signal_to_noise_by_hand(prediction, sigma, value):
    """1 / sigma^2 for eps and v; ((1 - sigma) / sigma)^2 for flow: (0.8 / 0.2)^2 = 16."""
    assert snr(Denoiser(prediction=prediction), torch.tensor([sigma])).item() == pytest.approx(value)


@pytest.mark.parametrize("prediction, sigma, weight", [
    ("eps", 0.25, 5 / 16), ("eps", 0.5, 1.0), ("eps", 2.0, 1.0),
    ("v", 0.25, 5 / 17), ("v", 2.0, 0.25 / 1.25), ("v", 1.0, 0.5),
])  # fmt: skip
def test_min_snr_by_hand(prediction, sigma, weight):
    """min(SNR, 5) / SNR for eps and min(SNR, 5) / (SNR + 1) for v (Hang et al. 2023); SNR = 16 at sigma 0.25 and 0.25
    at sigma 2."""
    settings = NoiseSettings(weighting="min-SNR", gamma=5.0)
    assert loss_weight(Denoiser(prediction=prediction), torch.tensor([sigma]), settings).item() == pytest.approx(weight)


def test_without_a_weighting_every_noise_level_counts_the_same():
    assert loss_weight(Denoiser(prediction="eps"), torch.tensor([0.03, 1.0, 14.0]), NoiseSettings()).tolist() == [
        1.0,
        1.0,
        1.0,
    ]


# -- densities ---------------------------------------------------------------------------------------------------------


def test_the_resolution_shift_is_e_to_the_half_at_256_tokens_and_e_to_1_15_at_4096():
    assert TokenShift().shift_at(256) == pytest.approx(math.exp(0.5), rel=1e-6)
    assert TokenShift().shift_at(4096) == pytest.approx(math.exp(1.15), rel=1e-6)
    assert (
        TokenShift().count_tokens(latents(1, 128)) == 4096
        and TokenShift().count_tokens(torch.zeros(1, 16, 5, 32, 32)) == 256
    )


def test_shifts_by_hand_and_back():
    """t = 0.5 under a shift of 3: 1.5 / 2 = 0.75; the ends stay."""
    assert shift_noise_level(0.5, 3.0) == 0.75 and unshift_noise_level(0.75, 3.0) == 0.5
    for shift in (0.1, 1.0, 3.0, 20.0):
        assert [unshift_noise_level(shift_noise_level(t, shift), shift) for t in (0.0, 0.3, 1.0)] == pytest.approx(
            [0.0, 0.3, 1.0]
        )


def test_logit_normal_quantiles_by_hand():
    """The median is sigmoid(mean); 84.13 % lie below sigmoid(mean + std)."""
    density = NoiseLevelDensity("logit-normal", 0.5, 2.0)
    at = density_quantile(density, torch.tensor([0.5, 0.8413447461], dtype=torch.float64)).tolist()
    assert at == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.5))], rel=1e-6)


@pytest.mark.parametrize("density", [NoiseLevelDensity(), LOGIT_NORMAL, NoiseLevelDensity("logit-normal", -1.0, 0.5)])
def test_the_share_below_is_the_inverse_of_the_quantile(density):
    for q in (0.01, 0.5, 0.99):
        assert density_cdf(
            density, density_quantile(density, torch.tensor([q], dtype=torch.float64)).item()
        ) == pytest.approx(q, rel=1e-6)
    assert density_cdf(density, 0.0) == 0.0 and density_cdf(density, 1.0) == 1.0


@pytest.mark.parametrize(
    "density, below_a_quarter",
    [(NoiseLevelDensity(), 0.25), (LOGIT_NORMAL, 0.1360), (NoiseLevelDensity("uniform", shift=3.0), 0.1)],
)
def test_noise_levels_fall_as_often_as_the_density_says(density, below_a_quarter):
    """Normal(0, 1) is below logit(0.25) = -1.0986 for 13.60 % of draws. Shift 3: t = 0.25 / (3 - 2 * 0.25) = 0.1.
    20000 draws: one standard deviation is 0.3 %."""
    share = (drawn(density) < 0.25).float().mean().item()
    assert share == pytest.approx(below_a_quarter, abs=0.012), share


@pytest.mark.parametrize(
    "density", [LOGIT_NORMAL, NoiseLevelDensity("uniform", shift=3.0), NoiseLevelDensity("logit-normal", 0.5, 0.7, 2.0)]
)
def test_a_range_is_cut_out_of_the_density_exactly(density):
    """The draws between 0.3 and 0.6 fall as the whole density's own draws between 0.3 and 0.6 do."""
    cut, whole = drawn(density, 0.3, 0.6), drawn(density, count=200_000)
    inside = whole[(whole >= 0.3) & (whole <= 0.6)]
    assert cut.min() >= 0.3 - 1e-6 and cut.max() <= 0.6 + 1e-6
    quarters = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    gap = (cut.quantile(quarters) - inside.quantile(quarters)).abs().max().item()
    assert gap < 0.01, f"quantiles differ by {gap}"


@pytest.mark.parametrize("low, high", [(0.0, 0.002), (0.999, 1.0), (0.9999, 1.0)])
def test_a_range_in_the_far_tail_is_kept_too(low, high):
    """logit(0.9999) = 9.2 standard deviations: no fp64 number lies between that share and 1."""
    for density in (LOGIT_NORMAL, NoiseLevelDensity("logit-normal", -2.0, 0.5, 3.0)):
        sigma = drawn(density, low, high, count=1000)
        assert sigma.min() >= low - 1e-6 and sigma.max() <= high + 1e-6, (sigma.min(), sigma.max())


def test_every_shift_gives_finite_noise_levels_above_zero():
    for shift in [*(i / 50 for i in range(1, 100)), *(i / 3 for i in range(6, 301, 7))]:
        sigma = drawn(NoiseLevelDensity("logit-normal", 0.0, 1.0, shift), count=16)
        assert sigma.isfinite().all() and (sigma > 0).all() and (sigma <= 1).all(), shift


def test_the_shift_of_flux_follows_the_size_of_each_picture():
    """The median of a logit-normal at shift s is s / (1 + s): s = e^0.5 at 256 tokens, e^1.15 at 4096."""
    density = NoiseLevelDensity("logit-normal", 0.0, 1.0, "resolution")
    for side, shift in ((32, math.exp(0.5)), (128, math.exp(1.15))):
        assert drawn(density, side=side).median().item() == pytest.approx(shift / (1 + shift), abs=0.01)


def test_eps_models_train_on_their_own_timesteps_and_ignore_shifts():
    """u in [0.25, 0.5) is timestep 250 to 499 of 1000, each as likely as another."""
    model = Denoiser(prediction="eps")
    sigma = drawn(NoiseLevelDensity("uniform", shift=5.0), 0.25, 0.5, "eps")
    index = torch.searchsorted(model.sigmas, sigma)
    assert torch.equal(model.sigmas[index], sigma), "a noise level between two timesteps, which the network never saw"
    assert index.min() == 250 and index.max() == 499
    assert index.float().mean().item() == pytest.approx(374.5, abs=2.0)  # sd of the mean 72 / sqrt(20000) = 0.5
    assert drawn(NoiseLevelDensity(), prediction="eps").unique().numel() == 1000


def test_the_host_schedule_is_the_denoisers_own_and_never_shifted_twice():
    """The toy flow model's own schedule is u itself, so uniform draws stay uniform whatever the family's shift is."""
    assert drawn(NoiseLevelDensity("host schedule", shift=3.0)).median().item() == pytest.approx(0.5, abs=0.015)


def test_one_noise_level_per_sample_on_the_samples_device_in_fp32():
    x0 = torch.zeros(5, 4, 8, 8, dtype=torch.float16)
    sigma = sample_sigmas(Denoiser(), LOGIT_NORMAL, x0, rng())
    assert sigma.shape == (5,) and sigma.dtype == torch.float32 and sigma.unique().numel() == 5


def test_settings_that_leave_the_density_open_take_the_familys_own():
    family = NoiseLevelDensity("logit-normal", 0.3, 0.8, "resolution")
    assert resolve_noise_density(NoiseSettings(), family) == family
    assert resolve_noise_density(NoiseSettings(shift=2.0), family) == NoiseLevelDensity("logit-normal", 0.3, 0.8, 2.0)
    assert resolve_noise_density(NoiseSettings(density="logit-normal", mean=1.0), family) == NoiseLevelDensity(
        "logit-normal", 1.0, 1.0, "resolution"
    )
    assert resolve_noise_density(NoiseSettings(density="uniform", shift=1.0), family) == NoiseLevelDensity(
        "uniform", 0.0, 1.0, 1.0
    )


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_trajectory_of_a_perfect_denoiser_lands_on_its_x0(prediction):
    x0, noise = pair(batch=2)
    sigmas = torch.tensor([1.0, 0.7, 0.2, 0.0]) if prediction == "flow" else torch.tensor([14.6, 5.0, 0.5, 0.0])
    end = sample_euler(Perfect(x0, prediction), noise, [None, None], sigmas)
    assert torch.allclose(end, x0, atol=1e-5), (end - x0).abs().max()


def test_a_trajectory_stops_where_its_sigmas_stop_by_hand():
    """Flow, x0 = 2, noise = 10: at sigma 0.25 the straight line is at 0.75 * 2 + 0.25 * 10 = 4."""
    end = sample_euler(
        Perfect(torch.full((1, 1), 2.0)), torch.full((1, 1), 10.0), [None], torch.tensor([1.0, 0.6, 0.25])
    )
    assert end.item() == pytest.approx(4.0)
