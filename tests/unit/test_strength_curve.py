"""The curve of a slider: effect and drift against strength."""

import json

import pytest
import torch
from trainyard.tests.unit.toy import CHANNELS, SHAPE, SIDE, Denoiser, Net, adapters, prompts, rng
from trainyard.trainers.methods.rollouts import StudentTeacherModel, sample_latent_noise
from trainyard.trainers.monitor.strength_curve import (
    SliderAxis,
    StrengthCurve,
    diffusion_classifier_score,
    make_axis_projection,
    measure_strength_curve,
    mid_ranks,
    relative_drift,
    sample_from_noise,
    spearman_correlation,
)


def model():
    network = Net()
    made = adapters(network)
    draw = rng(9)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return StudentTeacherModel(Denoiser(network), made, prompts())


def test_spearman_by_hand():
    """[1, 2, 3] against [10, 20, 5]: ranks 0 1 2 and 1 2 0, correlation -0.5. Equal values share their mean rank."""
    assert spearman_correlation([1, 2, 3], [10, 20, 5]) == pytest.approx(-0.5)
    assert spearman_correlation([1, 2, 3], [1, 8, 27]) == pytest.approx(1.0)
    assert spearman_correlation([1, 2, 3], [4, 4, 4]) == 0.0
    assert mid_ranks([7, 7, 1]) == [1.5, 1.5, 0.0]


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    draw = rng(2)
    for _ in range(20):
        a, b = (torch.randint(6, (9,), generator=draw).tolist() for _ in range(2))
        assert spearman_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)


def test_a_curve_says_its_slope_and_the_strength_of_an_effect():
    curve = StrengthCurve((-2.0, -1.0, 0.0, 1.0, 2.0), (-1.0, -0.5, 0.0, 0.5, 0.8), (0.4, 0.2, 0.0, 0.2, 0.4), "x")
    assert curve.per_unit == pytest.approx((2 + 0.5 + 0.5 + 1.6) / 10) and curve.monotone == pytest.approx(1.0)
    assert curve.strength_for(0.25) == pytest.approx(0.5) and curve.strength_for(0.65) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="No measured strength has the effect 2: .* from -1 to 0.8. Ask for less"):
        curve.strength_for(2.0)
    assert json.loads(curve.to_json())["per_unit"] == curve.per_unit and "drift at 1 0.20" in curve.line()


def test_projection_onto_a_difference_counts_in_halves_of_it():
    """From the middle of a pair to its positive side is 1, to its negative side -1."""
    positive, negative = torch.randn(1, *SHAPE, generator=rng(1)), torch.randn(1, *SHAPE, generator=rng(2))
    effect, middle = make_axis_projection(positive - negative), (positive + negative) / 2
    assert float(effect(positive) - effect(middle)) == pytest.approx(1.0, rel=1e-4)
    assert float(effect(negative) - effect(middle)) == pytest.approx(-1.0, rel=1e-4)


class Knows(Denoiser):
    """Predicts an image of the level that the prompt names, blended with what it sees; the adapter's strength adds to
    the level."""

    def __init__(self, levels, added):
        super().__init__(None, "flow")
        self.levels, self.added = levels, added

    def denoise(self, x, sigma, conds):
        level = torch.tensor([self.levels[c["prompt"]] + self.added.strength for c in conds])
        return level.view(-1, 1, 1, 1).expand_as(x)


def knowing():
    network = Net()
    added = adapters(network)
    return StudentTeacherModel(
        Knows({"t": 0.0, "p": 2.0, "n": -2.0, "": 0.0, "k": 1.0}, added),
        added,
        {p: {"prompt": p} for p in ("t", "p", "n", "", "k")},
    )


def test_a_model_that_knows_its_prompts_tells_pictures_apart_by_hand():
    """Prompts p and n mean images of 2 and -2. An image of 2 is predicted perfectly under p and badly under n: 1. A
    grey one: 0."""
    x0 = torch.stack([torch.full(SHAPE, v) for v in (2.0, 0.0, -2.0)])
    assert diffusion_classifier_score(knowing(), x0, "p", "n").tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-4)


def test_the_curve_of_a_known_slider_by_hand():
    """At strength s the image of t is s. `more like p than n` is 4s / (4 + s^2): at 2, where p's own images are, it
    is 1."""
    m = knowing()
    noise = sample_latent_noise((2, *SHAPE), m.denoiser, rng(4))
    draw = lambda prompt, strength: sample_from_noise(m, prompt, "", noise, strength, 4, 1.0)
    curve = measure_strength_curve(
        draw,
        "t",
        lambda x0: diffusion_classifier_score(m, x0, "p", "n"),
        reference="p",
        preserve=("k",),
        unit="p itself",
    )
    assert curve.effect == pytest.approx([-1.0, -0.8, 0.0, 0.8, 1.0], abs=1e-3)
    assert curve.monotone == pytest.approx(1.0) and curve.unit == "p itself" and m.adapters.strength == 1.0
    assert curve.strength_for(0.8) == pytest.approx(1.0, abs=0.01)


def test_drift_is_zero_for_equal_pictures_and_one_for_independent_ones():
    a, b = (torch.randn(64, CHANNELS, SIDE, SIDE, generator=rng(i)) for i in (1, 2))
    assert relative_drift([(a, a)]) == 0.0 and relative_drift([(a, b)]) == pytest.approx(1.0, abs=0.05)


def test_drawing_is_fixed_by_its_noise_and_leaves_the_adapters_as_they_were():
    m = model()
    noise = sample_latent_noise((2, *SHAPE), m.denoiser, rng(4))
    before = [p.clone() for p in m.adapters.parameters()]
    one, two, other = (sample_from_noise(m, "cat", "", noise, s, 4, 2.0) for s in (1.0, 1.0, -1.0))
    assert torch.equal(one, two) and not torch.equal(one, other) and not one.requires_grad and one.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, m.adapters.parameters(), strict=True))


def test_an_axis_names_every_text_once():
    assert SliderAxis("t", "p", "n", "p", ("k", "t")).texts == ("t", "p", "n", "", "k")
