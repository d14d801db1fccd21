"""Differences between prompts and between images: each loss by hand, and against a slow, literal version."""

import contextlib
import dataclasses

import pytest
import torch
from trainyard.tests.unit.toy import SHAPE, WORDS, Denoiser, Net, pairs, prompts, rng, shaken
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.diffusion import NoiseLevelDensity
from trainyard.trainers.methods.image_pairs import AddiftTraining, ImageSlider
from trainyard.trainers.methods.prompts import (
    PromptDifferenceTraining,
    make_leco_targets,
    make_preserve_targets,
    make_replacement_targets,
    make_slider_targets,
)
from trainyard.trainers.methods.rollouts import (
    ImagePoints,
    LatentPoint,
    NoisePoints,
    PromptTask,
    RolloutPoints,
    StudentTeacherModel,
    count_planned_forwards,
    rollout_lifetimes,
    sample_rollout_levels,
)
from trainyard.trainers.settings import NoiseSettings, PointSettings


def model(prediction="flow"):
    network = Net()
    return StudentTeacherModel(Denoiser(network, prediction), shaken(network), prompts())


class Says:
    """A Denoiser whose answer is a number for each prompt, and `student` wherever the adapters are on."""

    flow = True

    def __init__(self, numbers, student):
        self.numbers, self.student_says, self.on = numbers, student, None

    def native_scale(self, sigma):
        return torch.ones_like(sigma)

    def denoise(self, x, sigma, conds):
        said = [self.student_says if self.on.strength else self.numbers[c["prompt"]] for c in conds]
        return torch.tensor(said).view(-1, 1, 1, 1).expand_as(x)


@dataclasses.dataclass
class Switch:
    strength: float = 1.0

    def dropout_active(self, rng):
        return contextlib.nullcontext()

    def at_strength(self, strength):
        @contextlib.contextmanager
        def turned():
            before, self.strength = self.strength, strength
            yield
            self.strength = before

        return turned()


class Given:
    def __init__(self, point):
        self.point = point

    def draw(self, rng):
        return self.point


@pytest.mark.parametrize(("action", "loss"), [("enhance", 9.0), ("erase", 81.0)])
def test_leco_goal_by_hand(action, loss):
    """neutral 1, positive 5, unconditional 2, guidance 2, enhance: goal = 1 + 2 * (5 - 2) = 7; target 4 -> loss 9.
    Erase: goal = 1 - 6 = -5; target 4 -> loss 81."""
    says = Says({"n": 1.0, "p": 5.0, "u": 2.0}, 4.0)
    says.on = Switch()
    task = PromptTask(make_leco_targets("t", "p", "n", "u", action, 2.0), "t")
    m = StudentTeacherModel(says, says.on, {p: {"prompt": p} for p in ("t", "n", "p", "u")})
    x, sigma = torch.zeros(1, 1, 2, 2), torch.ones(1)
    answers = m.predict_teacher(x, sigma, task.teacher_prompts)
    assert PromptDifferenceTraining(m, [task], Given(LatentPoint(0, x, sigma, answers))).loss(rng()).tolist() == [loss]


def test_a_slider_pulls_both_ways_by_hand():
    """target 1, positive 5, negative 2, guidance 2: +1 goes to 1 + 6 = 7 and -1 to 1 - 6 = -5. A student that says 4 at
    both is wrong by 3 and by 9."""
    says = Says({"t": 1.0, "p": 5.0, "n": 2.0}, 4.0)
    says.on = Switch()
    task = PromptTask(make_slider_targets("t", "p", "n", 2.0), "t")
    m = StudentTeacherModel(says, says.on, {p: {"prompt": p} for p in "tpn"})
    x, sigma = torch.zeros(1, 1, 2, 2), torch.ones(1)
    point = LatentPoint(0, x, sigma, m.predict_teacher(x, sigma, task.teacher_prompts))
    assert PromptDifferenceTraining(m, [task], Given(point)).loss(rng()).tolist() == [9.0, 81.0]


def test_prompts_that_are_the_same_are_asked_once():
    """p1atdev's default erase: target = positive and neutral = unconditional; goal = (1 + g) * neutral - g *
    positive."""
    (pull,) = make_leco_targets("cat", "cat", "", "", "erase", 2.0)
    assert dict((p, w) for w, p in pull.weighted_prompts) == {"": 3.0, "cat": -2.0}
    assert PromptTask((pull,), "cat").teacher_prompts == ("", "cat") and PromptTask((pull,), "cat").all_prompts == (
        "",
        "cat",
    )


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_loss_is_the_literal_one_in_the_networks_own_terms(prediction):
    """mean over pixels of (e_student - (e_n + g (e_p - e_u)))^2, with e what the network itself answers."""
    m, g = model(prediction), 1.7
    task = PromptTask(make_leco_targets("cat", "red cat", "dog", "old", "enhance", g), "cat")
    x, sigma = torch.randn(2, *SHAPE, generator=rng(1)), torch.tensor([0.3, 0.8])
    words = lambda prompt: m.conds[prompt]["cross_attn"].flatten(1).expand(2, -1)
    with torch.no_grad(), m.adapters.at_strength(0):
        e = {p: m.denoiser.network(x, sigma, words(p)) for p in ("red cat", "dog", "old")}
    with torch.no_grad():
        student = m.denoiser.network(x, sigma, words("cat"))
    literal = (student - (e["dog"] + g * (e["red cat"] - e["old"]))).square().flatten(1).mean(1)
    point = LatentPoint(0, x, sigma, m.predict_teacher(x, sigma, task.teacher_prompts))
    torch.testing.assert_close(
        PromptDifferenceTraining(m, [task], Given(point)).loss(rng()).detach(), literal, rtol=2e-4, atol=1e-6
    )


def test_two_polarities_of_one_step_have_the_gradients_of_two_steps():
    """A graph at +1 and one at -1 that are alive together must not read each other's strength."""
    both, one = model(), model()
    task = PromptTask(make_slider_targets("cat", "old", "young", 1.5), "cat")
    x, sigma = torch.randn(2, *SHAPE, generator=rng(1)), torch.tensor([0.3, 0.8])
    point = LatentPoint(0, x, sigma, both.predict_teacher(x, sigma, task.teacher_prompts))
    PromptDifferenceTraining(both, [task], Given(point)).loss(rng()).sum().backward()
    for pull in task.targets:
        PromptDifferenceTraining(one, [dataclasses.replace(task, targets=(pull,))], Given(point)).loss(
            rng()
        ).sum().backward()
    for a, b in zip(both.adapters.parameters(), one.adapters.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert both.adapters.strength == 1.0


def test_the_strength_comes_back_after_an_error():
    m = model()
    m.denoiser.network.forward = lambda *_: 1 / 0
    for ask in (
        lambda: m.predict_teacher(torch.zeros(1, *SHAPE), torch.ones(1), [""]),
        lambda: m.predict_student(torch.zeros(1, *SHAPE), torch.ones(1), "", -1),
    ):
        with pytest.raises(ZeroDivisionError):
            ask()
        assert m.adapters.strength == 1.0


def test_renormalised_goals_are_as_strong_as_the_models_own_answer():
    from trainyard.trainers.diffusion import slope
    from trainyard.trainers.methods.prompts import match_slope_statistics

    x, sigma, answer = (
        torch.randn(2, *SHAPE, generator=rng(1)),
        torch.tensor([0.3, 0.8]),
        torch.randn(2, *SHAPE, generator=rng(2)),
    )
    point = LatentPoint(0, x, sigma)
    turned = slope(x, sigma, match_slope_statistics(answer, answer * 3 + torch.randn(x.shape, generator=rng(4)), point))
    own = slope(x, sigma, answer)
    torch.testing.assert_close(turned.mean((1, 2, 3)), own.mean((1, 2, 3)))
    torch.testing.assert_close(turned.std((1, 2, 3)), own.std((1, 2, 3)))
    torch.testing.assert_close(match_slope_statistics(answer, answer, point), answer)


# -- points ------------------------------------------------------------------------------------------------------------


def rollouts(m, tasks=None, noise=None, **settings):
    tasks = tasks or [
        PromptTask(make_leco_targets("cat", "cat", "", "", "erase", 1.0), "cat", shapes=(SHAPE,), batch=2)
    ]
    return RolloutPoints(
        m,
        tasks,
        PointSettings(**{"sampling_steps": 5, "ways": 3, "refresh": 4, **settings}),
        noise or NoiseSettings(),
        3.0,
        dealt=True,
    )


def test_a_way_is_the_samplers_own_and_every_state_on_it_is_a_point():
    from trainyard.trainers.diffusion import denoise_with_guidance, per_sample, slope

    m = model()
    way = rollouts(m).rollout_sampled_task(rng(5))
    assert len(way) == 5 and way[0].sigma.tolist() == [1.0, 1.0]
    for a, b in zip(way, way[1:], strict=False):
        assert (b.sigma < a.sigma).all()
        with torch.no_grad():
            x0 = denoise_with_guidance(m.denoiser, a.x, a.sigma, m.conds["cat"], m.conds[""], 3.0)
        torch.testing.assert_close(b.x, a.x + slope(a.x, a.sigma, x0) * per_sample(b.sigma - a.sigma, a.x))


def test_forwards_are_counted_and_cached_answers_cost_nothing():
    """At first two ways of five points, batch 2, guidance 3: 2 * 4 * 2 * 2 = 32 forwards; each point asks two prompts
    for two samples once."""
    m = model()
    points = rollouts(m)
    asked = set()
    for step in range(3):
        asked.add(id(points.draw(rng(step))))
    assert (
        m.forward_counts["rollout"] == 32
        and m.forward_counts["frozen"] <= 3 * 4
        and m.forward_counts["frozen"] % 4 == 0
    )
    before = m.forward_counts["frozen"]
    generator = rng(2)
    generator_state = generator.get_state()
    points.updates = 1
    points.draw(generator.set_state(generator_state))
    assert m.forward_counts["frozen"] == before, "the point of the third draw was asked again"


def test_ways_come_one_by_one_and_then_the_oldest_goes():
    points = rollouts(model())
    seen = []
    for step in range(13):
        points.draw(rng(step))
        seen.append(tuple(way[0].x.sum().item() for way in points.rollouts))
    changes = [i for i in range(1, 13) if seen[i] != seen[i - 1]]
    assert changes == [4, 8, 12] and [len(ways) for ways in seen] == [2] * 4 + [3] * 9
    assert seen[4][:2] == seen[3] and seen[8][:2] == seen[7][1:]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.7), (0.5, 0.52), (0.9, 1.0)])
def test_every_wanted_level_lies_in_the_band_and_there_is_always_one(low, high):
    for seed in range(20):
        levels, wanted = sample_rollout_levels(6, 3, low, high, rng(seed))
        assert (levels[1:] < levels[:-1]).all() and levels.min() >= low and any(wanted)
        for level, good in zip(levels, wanted, strict=True):
            assert not good or (level >= low - 1e-6).all() and (level <= high + 1e-6).all()


def test_saved_points_go_on_as_if_nothing_had_happened():
    def draws(points, first, last):
        return [points.draw(rng(step)) for step in range(first, last)]

    erase = rollouts(model()).tasks[0]
    tasks = [erase, *(dataclasses.replace(erase, weight=weight) for weight in (3.0, 0.5))]
    whole, part = rollouts(model(), tasks), rollouts(model(), tasks)
    draws(whole, 0, 5), draws(part, 0, 5)
    other = rollouts(model(), tasks)
    other.load_state(part.state())
    for a, b in zip(draws(whole, 5, 12), draws(other, 5, 12), strict=True):
        assert torch.equal(a.x, b.x) and all(torch.equal(a.answers[p], b.answers[p]) for p in a.answers)
        assert a.task == b.task
    assert other.model.forward_counts == whole.model.forward_counts


def test_a_state_that_was_taken_does_not_change_with_later_draws():
    points = rollouts(model())
    points.draw(rng(0))
    state = points.state()
    before = [[len(point["answers"]) for point in way] for way in state["ways"]]
    for step in range(1, 9):
        points.draw(rng(step))
    assert [[len(point["answers"]) for point in way] for way in state["ways"]] == before


def test_points_of_pictures_and_of_noise():
    m = model()
    task = PromptTask(make_slider_targets("cat", "old", "young"), "cat", shapes=(SHAPE,), batch=2)
    images = ImagePoints(m, [task], pairs(2), NoiseSettings(), NoiseLevelDensity(), 1)
    point = images.draw(rng(0))
    assert (
        point.x.shape == (1, *SHAPE)
        and set(point.answers) == {"cat", "old", "young"}
        and m.forward_counts == dict(rollout=0, frozen=3, student=0)
    )
    fresh = NoisePoints(m, [task], NoiseSettings(min_time=0.9)).draw(rng(0))
    assert fresh.x.shape == (2, *SHAPE) and (fresh.sigma >= 0.9).all()


def test_tasks_are_drawn_by_weight():
    light, heavy = (
        PromptTask(make_preserve_targets(p), p, shapes=(SHAPE,), weight=w) for p, w in (("cat", 1.0), ("dog", 9.0))
    )
    drawn = [NoisePoints(model(), [light, heavy], NoiseSettings()).draw(rng(seed)).task for seed in range(200)]
    assert 160 < sum(drawn) < 198


@pytest.mark.parametrize("seed", range(10))
def test_trajectories_are_dealt_evenly_over_the_tasks_by_weight(seed):
    """Of 19, half are of what is erased, give or take one; drawn at random, one run in three would miss by three."""
    erase = rollouts(model()).tasks[0]
    kept = [
        PromptTask(make_preserve_targets(prompt), prompt, shapes=(SHAPE,), weight=0.25)
        for prompt in ("cat", "dog", "old", "young")
    ]
    points = rollouts(model(), [erase, *kept])
    dealt = [points.deal_task_index(rng(100 * seed + step)) for step in range(190)]
    for first in range(0, 171):
        assert abs(dealt[first : first + 19].count(0) - 9.5) <= 1.5
    assert all(abs(dealt.count(number) - 190 / 8) <= 3 for number in (1, 2, 3, 4))


@pytest.mark.parametrize(("count", "preserved"), [(48, 3), (32, 5), (21, 2), (8, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_every_preserved_value_of_a_table_gets_its_share_of_the_trajectories(count, preserved, seed):
    """Each row of a table preserves itself in every other value: a red circle, a red square ... Of 30 trajectories half
    are of rows, and each value has as many as any other. In the order of the table, 48 rows with three values met one of
    the three alone."""
    erase = rollouts(model()).tasks[0]
    keep = PromptTask(make_preserve_targets("dog"), "dog", shapes=(SHAPE,), weight=1 / preserved)
    points = rollouts(model(), [task for _ in range(count) for task in (erase, *[keep] * preserved)])
    dealt = [points.deal_task_index(rng(100 * seed + step)) for step in range(30)]
    kinds = [number % (preserved + 1) for number in dealt]
    assert dealt[0] == 0 and abs(kinds.count(0) - 15) <= 1
    assert all(abs(kinds.count(value) - 15 / preserved) <= 1.5 for value in range(1, preserved + 1)), kinds
    assert len({number for number in dealt if number % (preserved + 1) == 0}) >= min(count, 10)


@pytest.mark.parametrize("seed", range(10))
def test_the_first_update_is_of_a_row_and_not_of_what_is_preserved(seed):
    row = rollouts(model()).tasks[0]
    kept = PromptTask(make_preserve_targets("dog"), "dog", shapes=(SHAPE,), weight=9.0)
    assert rollouts(model(), [row, kept]).draw(rng(seed)).task == 0


# -- pairs of images -------------------------------------------------------------------------------------------------


def test_an_image_slider_is_the_denoising_loss_of_each_side_at_its_strength():
    from trainyard.trainers.diffusion import denoising_loss

    m = model()
    method = ImageSlider(m.denoiser, m.adapters, pairs(), batch=2)
    sides, x0, noise, sigma = method.sample_step(rng(4))
    assert [strength for strength, _ in sides] == [1.0, -1.0] and not torch.equal(x0[0], x0[1])
    literal = []
    for clean, (strength, batch) in zip(x0, sides, strict=True):
        with m.adapters.at_strength(strength):
            literal.append(denoising_loss(m.denoiser, clean, noise, sigma, batch.conds))
    fresh = ImageSlider(m.denoiser, m.adapters, pairs(), batch=2)
    torch.testing.assert_close(fresh.loss(rng(4)), torch.cat(literal))


def test_graded_strengths_come_in_opposite_twos():
    m = model()
    method = ImageSlider(m.denoiser, m.adapters, pairs(3, (2.0, 1.0, -1.0, -2.0)))
    seen = {tuple(s for s, _ in method.sample_step(rng(seed))[0]) for seed in range(20)}
    assert seen == {(2.0, -2.0), (1.0, -1.0)}


def test_the_change_by_hand():
    """The frozen model errs by e_b on `before` and by e_a on `after`: the goals are after + e_b and before + e_a, so a
    model that is the same amount off everywhere has nothing to unlearn."""

    class Off(Says):
        """2 above the truth, frozen or not; `b` is 0 and `a` is 1 everywhere."""

        def noised(self, x0, noise, sigma):
            return x0

        def model_space(self, latent):
            return latent

        def sigma_at(self, u):
            return u

        def denoise(self, x, sigma, conds):
            return x + 2.0

    says = Off({}, 0.0)
    says.on = Switch()
    data = EncodedDataset.from_core(
        [{"samples": torch.full((1, 1, 2, 2), v)} for v in (0.0, 1.0)], [[[torch.zeros(1, 1, WORDS), {}]]]
    )
    data.items = [
        dataclasses.replace(item, pair="p", strength=s) for item, s in zip(data.items, (-1.0, 1.0), strict=True)
    ]
    method = AddiftTraining(says, says.on, data, NoiseSettings())
    assert method.loss(rng()).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_change_in_noise_terms_is_the_published_one_for_eps(prediction):
    """For eps: student(after_t) -> frozen eps(before_t), and the other way round at minus (hako-mikan, ADDifT)."""
    m = model(prediction)
    method = AddiftTraining(m.denoiser, m.adapters, pairs(1), NoiseSettings())
    ((_, after), (_, before)), (a, b), noise, sigma = method.sample_step(rng(4))
    seen_b, seen_a = m.denoiser.noised(b, noise, sigma), m.denoiser.noised(a, noise, sigma)
    eps = lambda x, x0: (x - x0) / sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        with m.adapters.at_strength(0):
            goal = eps(seen_b, m.denoiser.denoise(seen_b, sigma, before.conds))
        with m.adapters.at_strength(0.25):
            student = eps(seen_a, m.denoiser.denoise(seen_a, sigma, after.conds))
    fresh = AddiftTraining(m.denoiser, m.adapters, pairs(1), NoiseSettings())
    found = fresh.loss(rng(4))[0].detach()
    if prediction == "eps":
        torch.testing.assert_close(found, (student - goal).square().mean(), rtol=1e-3, atol=1e-6)
    else:  # the velocity also holds the images' own difference, which the published form leaves in the target
        assert not torch.isclose(found, (student - goal).square().mean(), rtol=1e-3)


def test_pictures_without_a_partner_are_named():
    from trainyard.trainers.data.pairs import pair_datasets
    from trainyard.trainers.data.records import ImageDataset, ImageRecord

    make = lambda *names, size=(64, 64): ImageDataset(tuple(ImageRecord(n, f"/x/{n}.png", size) for n in names))
    with pytest.raises(ValueError, match=r"2 have no partner, c \(only positive\), d \(only negative\)"):
        pair_datasets(make("a", "c"), make("a", "d"))
    with pytest.raises(ValueError, match="different shape, 64x64 and 64x32"):
        pair_datasets(make("a"), make("a", size=(64, 32)))
    both = pair_datasets(make("a", "b"), make("a", "b"))
    assert [(r.pair, r.strength) for r in both] == [("a", 1.0), ("b", 1.0), ("a", -1.0), ("b", -1.0)]
    graded = pair_datasets(make("a"), make("a"), 2.0, pair_datasets(make("a"), make("a")))
    assert {r.strength for r in graded} == {1.0, -1.0, 2.0, -2.0}
    with pytest.raises(ValueError, match="strength -1 already"):
        pair_datasets(make("a"), make("a"), 1.0, pair_datasets(make("a"), make("a")))


def test_replacing_is_one_pull():
    assert make_replacement_targets("cat", "dog") == (
        dataclasses.replace(make_replacement_targets("cat", "dog")[0], weighted_prompts=((1.0, "dog"),)),
    )


@pytest.mark.parametrize("noise", [NoiseSettings(), NoiseSettings(min_time=0.3, max_time=0.8)])
def test_forwards_are_spent_as_they_were_planned(noise):
    """Ways and students to the forward; the frozen model's answers within 3 % of what is expected."""
    m = model()
    tasks = [
        PromptTask(pulls, "cat", shapes=(SHAPE,), batch=2)
        for pulls in (make_slider_targets("cat", "old", "young"), make_preserve_targets("dog"))
    ]
    for seed in range(4):
        points = rollouts(m, tasks[:1], noise)
        for step in range(203):
            points.draw(rng(1000 * seed + step))
    spent = {kind: count / 4 for kind, count in m.forward_counts.items()}
    plan = count_planned_forwards(points.settings, tasks[:1], noise, 3.0, 203)
    assert plan["rollout"] == spent["rollout"] and plan["student"] == 203 * 4  # draw() asks no student
    assert spent["frozen"] == pytest.approx(plan["frozen"], rel=0.03)
    both = count_planned_forwards(points.settings, tasks, noise, 1.0, 203)
    assert both["rollout"] == plan["rollout"] / 2 and both["student"] == 203 * 3


def test_a_way_is_kept_until_there_are_more_than_is_wanted():
    """Of three ways the first two are there at once, and every 4 updates one comes. In 10 updates: eras of 4, 4 and 2
    draws among 2, 3 and 3 ways; the first way goes when the fourth comes."""
    assert rollout_lifetimes(3, 4, 10) == [[(2, 4), (3, 4)], [(2, 4), (3, 4), (3, 2)], [(3, 4), (3, 2)], [(3, 2)]]
    assert rollout_lifetimes(1, 4, 5) == [[(1, 4)], [(1, 1)]]
