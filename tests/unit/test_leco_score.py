"""LECO-score: each loss by hand, what each target shows the score model, the anchor that finds its size, and the watch
that ends a run."""

import math

import pytest
import torch
from torch import nn
from trainyard.tests.unit.toy import SHAPE, Denoiser, Net, dataset, prompts, rng, shaken
from trainyard.trainers.data.signed_prompts import SignedPrompt
from trainyard.trainers.loop import NoStore, train
from trainyard.trainers.methods import leco_score
from trainyard.trainers.methods.leco_score import (
    ORIGINAL_LECO_SCORE,
    SCORE_TARGETS,
    LecoScoreSettings,
    LecoScoreTraining,
    NoisedImageStates,
    ScoredState,
    SingleRolloutStates,
    build_score_tasks,
    graded_noise_levels,
    make_rollout_states,
)
from trainyard.trainers.methods.rollouts import PromptTarget, StudentTeacherModel
from trainyard.trainers.monitor.score_monitor import (
    COLLAPSE_THRESHOLD,
    ScoreAndValidationMonitor,
    ScoreMeasurement,
    ScoreMonitor,
    best_held_out,
)
from trainyard.trainers.monitor.validation import RESTORE_BEST, ValidationMonitor, ValidationSettings
from trainyard.trainers.scores.networks import ScoreModelInfo, ScorerEnsemble
from trainyard.trainers.settings import RunSettings

ROWS = (SignedPrompt("cat"), SignedPrompt("dog", -1.0, "old"), SignedPrompt("young", 0.0))
PLAIN = dict(anchor=0.0, balance=False, uncertainty=0.0)


class Mean(nn.Module):
    """Says factor * (mean of what it sees) + noisy * level."""

    def __init__(self, factor=1.0, noisy=0.0):
        super().__init__()
        self.factor, self.noisy = factor, noisy

    def forward(self, x, level):
        return (self.factor * x.flatten(1).mean(1) + self.noisy * level)[:, None]


class Curved(nn.Module):
    def forward(self, x, level):
        return torch.tanh(x).square().flatten(1).sum(1, keepdim=True) * (1 - level[:, None])


def score(*networks, **about):
    return ScorerEnsemble(list(networks) or [Mean()], ScoreModelInfo(channels=2, **about))


def model(prediction="flow"):
    network = Net()
    return StudentTeacherModel(Denoiser(network, prediction), shaken(network), prompts())


class Given:
    def __init__(self, place):
        self.place = place

    def draw(self, rng):
        return self.place


class Fixed(Denoiser):
    """A flow model whose answer is one number while adapters are on."""

    def __init__(self, answer):
        super().__init__()
        self.predict_x0 = answer

    def denoise(self, x, sigma, conds):
        return torch.full_like(x, self.predict_x0).requires_grad_()


def by_hand(settings, sign=1.0, answer=4.0, scores=None, base=None, strength=1.0, **place):
    """A LecoScore that says `answer` at x = 2, sigma = 0.5, on the way to 0.25."""
    m = model()
    m.denoiser = Fixed(answer)
    x, sigma = torch.full((1, *SHAPE), 2.0), torch.tensor([0.5])
    where = ScoredState(
        x,
        sigma,
        torch.tensor([0.25]),
        [None],
        (PromptTarget("cat", (), strength, sign),),
        None if base is None else torch.full_like(x, base),
        **place,
    )
    return LecoScoreTraining(m, scores or [(score(), 1.0)], Given(where), LecoScoreSettings(**{**PLAIN, **settings}))


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_next_step_by_hand():
    """slope (2 - 4) / 0.5 = -4, over -0.25: the state becomes 3. Unit view of a flow at 0.25: / sqrt(.75^2 + .25^2).
    Loss minus that."""
    assert by_hand({"target": "next_step"}).loss(rng()).item() == pytest.approx(-3 / math.sqrt(0.625))


def test_the_original_recipe_tells_the_scorer_that_it_sees_a_clean_picture():
    """The same state, and a scorer that adds 100 * level: 0.25 where it is told, nothing as the first recipe had it."""
    told, clean = (
        by_hand({"target": "next_step", "as_clean": c}, scores=[(score(Mean(1.0, 100.0)), 1.0)]).loss(rng()).item()
        for c in (False, True)
    )
    assert told - clean == pytest.approx(-25.0) and clean == pytest.approx(-3 / math.sqrt(0.625))
    assert (
        ORIGINAL_LECO_SCORE.as_clean
        and not ORIGINAL_LECO_SCORE.anchor
        and ORIGINAL_LECO_SCORE.target == "next_step"
        and not ORIGINAL_LECO_SCORE.needs_noise
    )


def test_x0_by_hand():
    assert by_hand({"target": "x0"}).loss(rng()).item() == pytest.approx(-4.0)


def test_direct_align_by_hand():
    """The state after the step is 3; 0.25 of it is the known noise 1, so the image is (3 - 0.25) / 0.75."""
    method = by_hand({"target": "direct_align"}, noise=torch.ones(1, *SHAPE))
    assert method.loss(rng()).item() == pytest.approx(-2.75 / 0.75)


def test_direct_align_finds_the_picture_whatever_the_student_says_when_the_step_is_short():
    """That is what makes it valid where x0 is a blur: the known noise is taken out, not what the model believes."""
    for prediction in ("flow", "eps"):
        denoiser = Denoiser(Net(), prediction)
        x0, noise = torch.randn(2, *SHAPE, generator=rng(1)), torch.randn(2, *SHAPE, generator=rng(2))
        sigma = torch.tensor([0.5, 0.9])
        place = ScoredState(denoiser.noised(x0, noise, sigma), sigma, sigma - 1e-6, [], (), noise=noise)
        ((seen, zero),) = leco_score.direct_align_inputs(
            type("M", (), {"denoiser": denoiser}), place, torch.randn_like(x0), rng()
        )
        torch.testing.assert_close(seen, x0, atol=1e-3, rtol=1e-3)
        assert zero.tolist() == [0, 0]


def test_x0_renoised_is_seen_at_the_asked_shares_of_the_steps_own_noise_and_every_draw_counts():
    """sigma 0.5: shares of 0.2 to 1 are levels of 0.1 to 0.5."""
    method = by_hand(
        {"target": "x0_renoised", "renoise_low": 0.2, "renoise_high": 1.0, "draws": 3},
        scores=[(score(Mean(0.0, 1.0)), 1.0)],
    )
    levels = [-method.loss(rng(i)).item() for i in range(40)]
    assert 0.1 < min(levels) and max(levels) < 0.5 and abs(sum(levels) / 40 - 0.3) < 0.04
    seen = leco_score.renoised_inputs(method, method.state_source.place, torch.ones(1, *SHAPE), rng())
    assert len(seen) == 3 and len({float(sigma) for _, sigma in seen}) == 3


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_x0_renoised_never_has_more_noise_than_the_step_nor_than_score_models_are_trained_on(prediction):
    denoiser = Denoiser(Net(), prediction)
    sigma = leco_score.level_to_sigma(denoiser, torch.tensor([0.3, 0.9, 0.999]))
    method = type("M", (), {"denoiser": denoiser, "settings": LecoScoreSettings(draws=8)})
    for _, seen in leco_score.renoised_inputs(
        method, ScoredState(torch.zeros(3, *SHAPE), sigma, sigma / 2, [], ()), torch.ones(3, *SHAPE), rng()
    ):
        level = leco_score.sigma_to_level(denoiser, seen)
        assert (level <= torch.tensor([0.3, 0.9, leco_score.MAX_SCORE_NOISE]) + 1e-4).all() and (
            level >= 0.79 * torch.tensor([0.3, 0.9, 0.999])
        ).all()


def test_draft_lv_takes_its_last_step_anew_for_each_draw():
    method = by_hand({"target": "draft_lv", "draws": 3})
    assert method.loss(rng()).item() == pytest.approx(-4.0) and method.model.forward_counts["student"] == 4
    assert graded_noise_levels(LecoScoreSettings(target="draft_lv", sampling_steps=25)) == (0.04, 0.04)


def test_the_anchor_by_hand():
    """Student 4, frozen model 3 at sigma 0.5: the slopes differ by 2, anchor 5 * 4 = 20 on top of minus the score 4."""
    method = by_hand({"target": "x0", "anchor": 5.0, "adjust": False}, base=3.0)
    assert method.loss(rng()).item() == pytest.approx(16.0)
    assert method.drift.item() == pytest.approx(2.0)


@pytest.mark.parametrize(("sign", "loss"), [(1.0, -4.0), (-1.0, 4.0)])
def test_the_sign_of_a_prompt_is_the_direction(sign, loss):
    assert by_hand({"target": "x0"}, sign).loss(rng()).item() == pytest.approx(loss)


def test_a_prompt_of_weight_0_is_only_anchored():
    assert by_hand({"target": "x0", "anchor": 5.0, "adjust": False}, 0.0, base=3.0).loss(rng()).item() == pytest.approx(
        20.0
    )
    with pytest.raises(ValueError, match="'young' has weight 0: it is only anchored, and anchor is 0"):
        build_score_tasks(ROWS, [SHAPE], 1, LecoScoreSettings(anchor=0.0))


def test_members_that_disagree_are_trusted_less_in_both_directions():
    """Members say 4 and 8: mean 6, deviation 2. Up: -(6 - 1.5 * 2) = -3; down: -(-6 - 3) = 9."""
    disagreeing = [(score(Mean(1.0), Mean(2.0)), 1.0)]
    losses = [
        by_hand({"target": "x0", "uncertainty": 1.5}, sign, scores=disagreeing).loss(rng()).item()
        for sign in (1.0, -1.0)
    ]
    assert losses == pytest.approx([-3.0, 9.0])


def test_members_that_agree_have_a_gradient():
    method = by_hand({"target": "x0", "uncertainty": 1.0}, scores=[(score(Mean(), Mean()), 1.0)])
    x0 = torch.full((1, *SHAPE), 4.0, requires_grad=True)
    method.reward([(x0, torch.zeros(1))], 1.0).sum().backward()
    assert x0.grad.isfinite().all() and x0.grad.abs().sum() > 0


def test_a_cap_is_enough():
    """Score 4, cap 3: the loss is -3 and pulls no longer. Cap 5: it is -4, as without one."""
    assert by_hand({"target": "x0", "cap": 5.0}).loss(rng()).item() == pytest.approx(-4.0)
    method, x0 = by_hand({"target": "x0", "cap": 3.0}), torch.full((1, *SHAPE), 4.0, requires_grad=True)
    reward = method.reward([(x0, torch.zeros(1))], 1.0)
    reward.sum().backward()
    assert reward.item() == pytest.approx(3.0) and x0.grad.abs().sum() == 0


def test_several_scores_are_a_weighted_mean():
    """(3 * 4 + 1 * (-8)) / 4 = 1"""
    assert by_hand({"target": "x0"}, scores=[(score(), 3.0), (score(Mean(-2.0)), 1.0)]).loss(
        rng()
    ).item() == pytest.approx(-1.0)


def test_the_relative_reward_of_a_scorer_that_reads():
    """S(good) 5, S(bad) 2, k 0.5: 1.5 * 5 - 2 = 5.5"""

    class Reads(ScorerEnsemble):
        def members_for_prompts(self, x, level, texts):
            assert texts in (["nice. cat"], ["poor. cat"])
            return torch.full((1, len(texts)), {"nice": 5.0, "poor": 2.0}[texts[0][:4]])

    settings = {"target": "x0", "relative": 0.5, "good_words": "nice", "bad_words": "poor"}
    reads = Reads([Mean()], ScoreModelInfo(channels=2))
    assert by_hand(settings, scores=[(reads, 1.0)], prompts=("cat",)).loss(rng()).item() == pytest.approx(-5.5)
    both = [(reads, 1.0), (score(), 3.0)]
    assert by_hand(settings, scores=both, prompts=("cat",)).loss(rng()).item() == pytest.approx(
        (-5.5 + 3 * by_hand({"target": "x0"}).loss(rng()).item()) / 4
    )
    with pytest.raises(
        ValueError,
        match=r"no score model here \(latent ResNet\) reads text.* Set relative to 0, or use Prompt Match Score",
    ):
        by_hand(settings)
    with pytest.raises(ValueError, match="write both, or set relative to 0"):
        LecoScoreSettings(relative=0.1)


# -- scorers that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", SCORE_TARGETS)
def test_a_scorer_of_clean_pictures_is_refused_where_it_would_see_noise(target):
    clean = [(score(noisy=False), 1.0)]
    if target in ("x0_renoised", "next_step"):
        with pytest.raises(
            ValueError,
            match="was trained on clean images only. Train it with 'noisy' on, or choose one of x0, direct_align, "
            "draft_lv",
        ):
            by_hand({"target": target}, scores=clean)
    else:
        by_hand({"target": target}, scores=clean)
    by_hand({"target": target, "as_clean": True}, scores=clean)


def test_weights_that_cancel_are_refused():
    with pytest.raises(ValueError, match=r"the weights 1, -1: their sum must be above 0"):
        by_hand({"target": "x0"}, scores=[(score(), 1.0), (score(), -1.0)])


@pytest.mark.parametrize(
    "pair", [("first_step", "last_step"), ("drift_low", "drift_high"), ("renoise_low", "renoise_high")]
)
def test_ranges_that_are_none_are_refused(pair):
    with pytest.raises(ValueError, match=f"{pair[0]} must be the smaller one"):
        LecoScoreSettings(**{pair[0]: 0.7, pair[1]: 0.7})


# -- where steps are graded --------------------------------------------------------------------------------------------


def walked(settings=None, rows=ROWS, prediction="flow", scores=None, batch=1, **more):
    m = model(prediction)
    settings = settings or LecoScoreSettings(**{"sampling_steps": 6, "ways": 2, "refresh": 2, **more})
    return LecoScoreTraining(
        m,
        scores or [(score(Curved()), 1.0)],
        make_rollout_states(m, build_score_tasks(rows, [SHAPE], batch, settings), settings, 2.0),
        settings,
    )


def test_steps_are_graded_in_the_range_asked_for_and_lead_one_step_on():
    method = walked(first_step=0.25, last_step=0.75, sampling_steps=10)
    places = [method.state_source.draw(rng(i)) for i in range(60)]
    levels = torch.cat([place.sigma for place in places])
    assert 0.25 <= levels.min() and levels.max() <= 0.75
    torch.testing.assert_close(torch.cat([place.next_sigma for place in places]), levels - 0.1)


def test_draft_lv_grades_the_last_state_of_a_way_only():
    method = walked(target="draft_lv", sampling_steps=8)
    assert {round(float(method.state_source.draw(rng(i)).sigma), 5) for i in range(10)} == {0.125}


def test_prompts_are_drawn_as_often_as_their_weights_say_and_those_of_0_like_one():
    method = walked(
        rows=(SignedPrompt("cat", 3.0), SignedPrompt("dog", -2.0), SignedPrompt("young", 0.0)), ways=1, refresh=1
    )
    drawn = [method.state_source.draw(rng(i)).prompts[0] for i in range(300)]
    shares = [drawn.count(p) / 300 for p in ("cat", "dog", "young")]
    assert shares == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=0.08)


def test_a_slider_goes_up_at_plus_one_and_down_at_minus_one_in_one_step():
    settings = LecoScoreSettings(slider=True)
    assert [[(p.strength, p.weight) for p in task.targets] for task in build_score_tasks(ROWS, [SHAPE], 1, settings)] == [
        [(1.0, 1.0), (-1.0, -1.0)], [(1.0, -1.0), (-1.0, 1.0)], [(1.0, 0.0), (-1.0, -0.0)],
    ]  # fmt: skip
    assert walked(slider=True).loss(rng()).shape == (2,)


def test_without_an_anchor_the_frozen_model_is_never_asked():
    method = walked(rows=ROWS[:2], anchor=0.0)
    for i in range(5):
        method.loss(rng(i))
    assert (
        method.model.forward_counts["frozen"] == 0
        and method.model.forward_counts["student"] == 5
        and method.model.forward_counts["rollout"] > 0
    )


def test_the_frozen_models_answer_at_a_state_is_asked_once():
    method = walked(rows=ROWS[:1], ways=1, refresh=1000, sampling_steps=2)
    for i in range(12):
        method.loss(rng(i))
    assert method.model.forward_counts["frozen"] <= 2 and method.model.forward_counts["student"] == 12


def test_a_way_for_each_update_is_walked_no_further_than_to_its_state():
    """10 states of a way of 11 steps under guidance 2: on average half of 2 * 10 forwards."""
    method = walked(ways=1, refresh=1, sampling_steps=11, first_step=0.0, last_step=0.99, rows=ROWS[:1])
    places = [method.state_source.draw(rng(i)) for i in range(40)]
    assert (
        isinstance(method.state_source, SingleRolloutStates)
        and 7 < method.model.forward_counts["rollout"] / 40 < 13
        and method.model.forward_counts["frozen"] == 40
    )
    assert all(
        float(place.sigma - place.next_sigma) == pytest.approx(1 / 11, abs=1e-6) or float(place.next_sigma) == 0
        for place in places
    )
    levels = torch.cat([place.sigma for place in places])
    assert levels.max() == 1.0 and levels.min() < 0.15


def test_the_original_recipe_runs():
    train(
        walked(ORIGINAL_LECO_SCORE, rows=ROWS[:2], scores=[(score(Curved(), noisy=False), 1.0)]),
        RunSettings(steps=3, learning_rate=1e-3, save_every=0),
    )


def injected(settings=None, scores=None):
    m = model()
    settings = settings or LecoScoreSettings(target="direct_align")
    return LecoScoreTraining(
        m, scores or [(score(Curved()), 1.0)], NoisedImageStates(m, dataset(), settings, 2), settings
    )


def test_direct_align_grades_the_users_own_pictures_under_their_own_captions():
    method = injected()
    place = method.state_source.draw(rng())
    assert place.x.shape == (2, *SHAPE) and len(place.conds) == 2 and place.teacher_x0 is not None
    own = [method.state_source.data.store.load(item.latent)["mean"] for item in method.state_source.data.items]
    x0 = (place.x - place.sigma.view(-1, 1, 1, 1) * place.noise) / (1 - place.sigma.view(-1, 1, 1, 1))
    assert all(any(torch.allclose(one, latent, atol=1e-5) for latent in own) for one in x0)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["flow", "eps", "v"])
@pytest.mark.parametrize("target", [target for target in SCORE_TARGETS if target != "draft_lv"])
def test_the_gradient_is_that_of_finite_differences(target, prediction):
    method = in_doubles(target, prediction)
    params, value = method.parameters(), lambda: method.loss(rng(5)).sum()
    grads = torch.autograd.grad(value(), params)
    size = math.sqrt(sum(float(g.square().sum()) for g in grads))
    ends = [moved(value, params, grads, sign * 1e-4 / size) for sign in (1, -1)]
    assert size > 0 and (ends[0] - ends[1]) / 2e-4 == pytest.approx(size, rel=2e-3)


def in_doubles(target, prediction):
    settings = LecoScoreSettings(target=target, balance=False, anchor=0.5, adjust=False)
    x, base, noise = torch.randn(3, 2, *SHAPE, generator=rng(1), dtype=torch.float64)
    sigma, conds = torch.tensor([0.4, 0.7]).double(), [{"cross_attn": prompts()["cat"]["cross_attn"].double()}] * 2
    place = ScoredState(x, sigma, sigma - 0.05, conds, (PromptTarget("cat", (), 1.0, 1.0),), base, noise)
    method = LecoScoreTraining(model(prediction), [(score(Curved()), 1.0)], Given(place), settings)
    method.model.denoiser.network.double(), method.model.adapters.double()
    return method


@torch.no_grad()
def moved(value, params, direction, step):
    """value() with the parameters moved along a direction; they are put back."""
    before = [p.clone() for p in params]
    for p, d in zip(params, direction, strict=True):
        p.add_(d, alpha=step)
    found = float(value())
    for p, b in zip(params, before, strict=True):
        p.copy_(b)
    return found


def test_the_gradient_of_draft_lv_is_that_of_its_last_steps_alone():
    method = by_hand({"target": "draft_lv"})
    x0 = torch.full((1, *SHAPE), 4.0, requires_grad=True)
    seen = leco_score.draft_lv_inputs(method, method.state_source.place, x0, rng())
    sum(image.sum() for image, _ in seen).backward()
    assert x0.grad is None and len(seen) == 2


def test_bands_of_noise_levels_have_equal_gradients_when_they_are_balanced():
    """At sigma 0.05 the network's output moves x0 ten times less than at 0.5; balanced, both pull alike."""
    sizes = {}
    for balance in (False, True):
        method = by_hand({"target": "x0", "balance": balance})
        for _ in range(3):
            for sigma in (0.05, 0.5):
                x0 = torch.full((1, *SHAPE), 4.0, requires_grad=True)
                reward = method.reward([(x0, torch.zeros(1))], 1.0)
                method.balance_by_band(reward, x0, torch.tensor([sigma])).sum().backward()
                sizes[balance, sigma] = float(x0.grad.norm()) * sigma  # native scale of a flow
    assert sizes[False, 0.5] / sizes[False, 0.05] == pytest.approx(10, rel=1e-3)
    assert sizes[True, 0.5] / sizes[True, 0.05] == pytest.approx(1, rel=1e-3)


# -- an anchor that finds its size -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drift", "anchor"), [(1.2, 15.0), (0.05, 10 / 1.5), (0.6, 10.0)])
def test_the_anchor_answers_to_the_drift(drift, anchor):
    method = walked(anchor=10.0)
    for _ in range(10):
        method.updates += 1
        method.update_anchor(torch.tensor(drift))
    assert float(method.anchor) == pytest.approx(anchor)


def test_an_anchor_that_is_not_to_be_adjusted_stays():
    method = walked(anchor=10.0, adjust=False)
    for _ in range(30):
        method.updates += 1
        method.update_anchor(torch.tensor(5.0))
    assert float(method.anchor) == 10.0


def test_the_anchor_holds_the_drift_near_its_band():
    """A strong pull: without anchor the steps drift far; with it they stay near the upper end of the band."""
    drifts = {}
    for name, more in (("held", dict(anchor=1.0)), ("fixed and weak", dict(anchor=1e-4, adjust=False))):
        method = walked(rows=ROWS[:1], target="x0", **more)
        train(method, RunSettings(steps=150, learning_rate=3e-2, save_every=0))
        drifts[name] = float(method.drift)
    assert drifts["held"] < 0.8 < drifts["fixed and weak"], drifts


# -- the watch ---------------------------------------------------------------------------------------------------------


def drawing(m):
    """x0 of a single step from fixed noise: cheap, and it moves with the adapters."""
    noise = torch.randn(3, *SHAPE, generator=rng(4))

    def draw(prompt, strength):
        with torch.no_grad(), m.adapters.at_strength(strength):
            return m.denoiser.denoise(noise, torch.full((3,), 0.8), [m.conds[prompt]] * 3)

    return draw


def watched(held_out=None, every=5):
    """(method, watch)"""
    method = walked(rows=ROWS[:1], target="x0", anchor=0.1, adjust=False, scores=[(score(), 1.0)])
    return method, ScoreMonitor(method, drawing(method.model), ("cat",), held_out, every)


def go(method, watch, steps, store=None):
    return train(method, RunSettings(steps=steps, learning_rate=1e-2, save_every=0), store=store, monitor=watch)


def test_the_watch_sees_the_score_rise_and_measures_what_else_moves():
    method, watch = watched()
    go(method, watch, 18)
    assert [look.step for look in watch.measurements] == [0, 5, 10, 15, 18]
    first, last = watch.measurements[0], watch.measurements[-1]
    assert (
        last.score > first.score
        and last.held_out is None
        and last.diversity > 0
        and last.step_drift > 0
        and not watch.should_stop
    )
    assert watch.preview_strip().shape == (5, *SHAPE)
    assert "step 18: score" in watch.format_report() and "anchor 0.1" in watch.format_report()


def test_what_was_seen_last_is_told_while_the_run_goes_on():
    method, watch = watched()
    lines = []
    train(
        method,
        RunSettings(steps=12, learning_rate=1e-2, save_every=0),
        report=lambda progress: lines.append(progress.format_line()),
        monitor=watch,
        interval=0.0,
    )
    assert (
        lines[6].startswith("step 7/12 · loss ")
        and lines[6].endswith(f" left · {watch.measurements[1].line()}")
        and "step 5: score" in lines[6]
    )


def test_watching_changes_nothing_of_the_training():
    (plain, _), (seen, watch) = watched(), watched()
    assert go(plain, None, 8) == go(seen, watch, 8)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters(), strict=True))


def test_the_run_ends_when_the_held_out_score_falls_while_the_trained_one_rises():
    """Held out is the opposite score: it falls from the start, so the third look ends the run, with the adapters of the
    second."""
    method, watch = watched(score(Mean(-1.0)))
    assert len(go(method, watch, 100)) == 10
    other, shorter = watched(score(Mean(-1.0)))
    go(other, shorter, 5)
    assert (
        "stopped at step 10: since step 0 the trained score went from" in watch.format_report()
        and watch.best["step"] == 5
    )
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), method.parameters(), strict=True))


def test_a_held_out_score_that_rises_too_ends_nothing():
    method, watch = watched(score(Mean(2.0)))
    assert len(go(method, watch, 25)) == 25
    assert len(watch.measurements) == 6 and best_held_out(watch.measurements).step > 0 and watch.best is None


class Kept(NoStore):
    """The last state, as a file would hold it."""

    def __init__(self):
        self.state = None

    def load(self):
        return self.state

    def save(self, state, why):
        self.state = state


def test_a_watched_run_that_is_resumed_is_the_same_run():
    whole, parts = Kept(), Kept()
    go(*watched(score(Mean(0.5))), 14, whole)
    go(*watched(score(Mean(0.5))), 7, parts)
    go(*watched(score(Mean(0.5))), 14, parts)
    looks = [
        [look for look in kept.state["watch"]["looks"] if look["step"] != 7] for kept in (whole, parts)
    ]  # the shorter run looked at its end
    assert looks[0] == looks[1]
    assert all(torch.equal(a, b) for a, b in zip(whole.state["params"], parts.state["params"], strict=True))


def test_pictures_that_all_become_the_same_are_told():
    look = ScoreMeasurement(50, 1.0, None, 0.4, COLLAPSE_THRESHOLD - 0.1, 10.0, 0.3)
    assert "diversity 0.50 (collapsing)" in look.line()


def test_previews_of_a_long_run_are_thinned_evenly():
    watch = ScoreMonitor(None, None, ("cat",))
    for step in range(40):
        watch.keep_previews(step, torch.full((1, *SHAPE), float(step)))
    assert len(watch.previews) <= 16 and {0, 16, 32} <= set(watch.previews)


# -- with Validation and Previews --------------------------------------------------------------------------------------


def both(held_out=None, every=2, **settings):
    """(method, watch) of a run that is also looked at by Validation and Previews, which learns of every look."""
    method, seen = watched(held_out, every)
    told = []
    asked = ValidationMonitor(
        ValidationSettings(**{"every": 10, **settings}), on_event=lambda kind, entry: told.append(entry)
    )
    return method, ScoreAndValidationMonitor(seen, asked), told


def test_every_look_of_a_score_is_a_measurement_of_the_held_out_score_taken_negative():
    method, watch, told = both(score(Mean(2.0)))
    go(method, watch, 5)
    looks = watch.score_monitor.measurements
    assert [entry["step"] for entry in told] == [0, 2, 4, 5]
    assert [entry["loss"] for entry in told] == [-look.held_out for look in looks]
    assert all(entry["held_out"] for entry in told) and watch.line().startswith("minus the held-out score -")


def test_without_a_held_out_score_the_trained_one_is_watched_and_said_to_be():
    method, watch, told = both()
    go(method, watch, 4)
    assert [entry["loss"] for entry in told] == [-look.score for look in watch.score_monitor.measurements]
    assert watch.line().endswith("by the score model that pulls") and not told[0]["held_out"]


def test_a_score_run_ends_for_want_of_gain_and_gives_back_its_best_moment():
    """Held out is the opposite score, and LECO-Score's own patience is long: the first look at trained adapters is the
    best one."""
    method, watch, _ = both(score(Mean(-1.0)), patience=2, best=RESTORE_BEST)
    watch.score_monitor.patience = 100
    losses = go(method, watch, 100)
    assert len(losses) == 6 and watch.best["step"] == 2
    other, _, _ = both()
    go(other, None, 2)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), method.parameters(), strict=True))


def test_a_score_run_that_is_looked_at_by_both_is_the_run_that_is_not():
    (plain, _), (seen, watch, _) = watched(), both(score(Mean(2.0)))
    assert go(plain, None, 7) == go(seen, watch, 7)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters(), strict=True))


def test_a_score_run_that_was_begun_without_validation_goes_on_with_it_and_the_other_way_round():
    store = Kept()
    method, seen = watched(score(Mean(2.0)), 2)
    go(method, seen, 4, store)
    method, watch, _ = both(score(Mean(2.0)))
    go(method, watch, 8, store)
    assert [entry["step"] for entry in watch.validation_monitor.history] == [0, 2, 4, 6, 8]
    method, seen = watched(score(Mean(2.0)), 2)
    go(method, seen, 10, store)
    assert [look.step for look in seen.measurements] == [0, 2, 4, 6, 8, 10]
