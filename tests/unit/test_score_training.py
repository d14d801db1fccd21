"""The losses of a score model by hand, and whole trainings on latents whose true score is known."""

import contextlib
import math
import os
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainyard.tests.unit.toy import Denoiser, Stop, dataset, rng
from trainyard.trainers import loop
from trainyard.trainers.scores.files import score_model_tensors
from trainyard.trainers.scores.networks import (
    NUM_RATING_BINS,
    ScoreModelInfo,
    ScorerEnsemble,
    ScorerSettings,
    build_scorer,
    call_with_seed,
)
from trainyard.trainers.scores.objective import (
    MAX_SCORE_NOISE,
    SCORE_LOSSES,
    ScoreSettings,
    ScoreTraining,
    bradley_terry_loss,
    emd_loss,
    noised_scorer_input,
    ranking_loss,
    score_targets,
    squared_error,
    two_hot_ratings,
)
from trainyard.trainers.scores.resume import ResumeFolder, remove_abandoned_work
from trainyard.trainers.scores.training import (
    EnsembleMember,
    build_rating_task,
    fold_groups,
    rate_latents,
    train_score_model,
)

TINY = ScorerSettings(width=8, depth=1)
QUICK = ScoreSettings(steps=60, batch=16, members=2, learning_rate=5e-3, check_every=20)
ABOUT = ScoreModelInfo(channels=2, width=8, depth=1)


def rated(count=60, score=lambda mean: float(mean[0].mean()), seed=5):
    """Random latents; their true score is the mean of the first channel."""
    data = dataset(count, seed)
    data.items = [replace(item, score=score(data.store.load(item.latent)["mean"])) for item in data.items]
    return data


def train(data, denoiser=None, scorer=TINY, settings=QUICK, **rest):
    return train_score_model(data, denoiser or Denoiser(), scorer, settings, **rest)


TASK_FIGURES = {"distribution": "SRCC", "binary": "AUROC", "multiclass": "accuracy", "pairwise": "pairwise accuracy"}


def task_data(task, count=80):
    """Latents whose true score is the mean of the first channel, or on which side of a bound that lies."""
    score = {
        "binary": lambda m: float(m[0].mean() > 0),
        "multiclass": lambda m: float(m[0].mean() > 0) + float(m[0].mean() > 0.2),
    }
    return rated(count, score.get(task, lambda m: float(m[0].mean())))


def task_ratings(task, count=80, steps=120):
    """(the training, its model's ratings of what it was trained on, their spreads)."""
    data = task_data(task, count)
    made = train(data, settings=replace(QUICK, task=task, steps=steps))
    return made, *rate_latents(made.model, [data.store.load(item.latent)["mean"] for item in data.items])


# -- losses by hand ----------------------------------------------------------------------------------------------------


def test_square_by_hand():
    assert squared_error(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 5.0])).tolist() == [1, 4]


def test_ranking_by_hand():
    """Wanted 0 and 2, said 0 and 0: both orders of the one pair lose log 2, weighted alike, so each image loses log
    2. Said 1 and 0, the wrong way round by 1: log(1 + e)."""
    assert ranking_loss(torch.zeros(2), torch.tensor([0.0, 2.0])).tolist() == pytest.approx([math.log(2)] * 2)
    assert ranking_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])).tolist() == pytest.approx(
        [math.log(1 + math.e)] * 2
    )


def test_ranking_weighs_pairs_by_their_difference():
    """Wanted 0, 0, 3: the two equal ones are no pair. Each of them has one pair of weight 3, the third has two: of 12
    in all, times 3."""
    losses = ranking_loss(torch.zeros(3), torch.tensor([0.0, 0.0, 3.0]))
    assert losses.tolist() == pytest.approx([0.75 * math.log(2), 0.75 * math.log(2), 1.5 * math.log(2)])
    assert losses.mean().item() == pytest.approx(math.log(2)), "the mean over images is the mean over pairs"


def test_margin_ranking_by_hand():
    """Wanted 0 and 2, said 0 and 1.5: .5 of the difference is missing; said 0 and 3: nothing is"""
    assert ranking_loss(torch.tensor([0.0, 1.5]), torch.tensor([0.0, 2.0]), margin=True).tolist() == pytest.approx(
        [0.5, 0.5]
    )
    assert ranking_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 2.0]), margin=True).tolist() == [0, 0]


def test_a_batch_of_equal_ratings_has_no_order():
    assert ranking_loss(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 4.0])).tolist() == [0, 0]
    assert ranking_loss(torch.tensor([1.0]), torch.tensor([4.0])).tolist() == [0]


def test_earth_movers_by_hand():
    """All weight on the first bin, wanted on the third: two of ten cumulative shares differ by 1, so sqrt(2 / 10)"""
    said = torch.full((1, NUM_RATING_BINS), -100.0)
    said[0, 0] = 100.0
    wanted = torch.zeros(1, NUM_RATING_BINS)
    wanted[0, 2] = 1.0
    assert emd_loss(said, wanted).item() == pytest.approx(math.sqrt(0.2))
    exact = said.clone().requires_grad_()
    emd_loss(exact, said.softmax(1)).sum().backward()
    assert exact.grad.isfinite().all(), "a perfect answer has a gradient too"


def test_bradley_terry_by_hand():
    """equal: log 2; the better one ahead by 2: log(1 + e^-2)"""
    assert bradley_terry_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).tolist() == pytest.approx(
        [math.log(2), math.log(1 + math.exp(-2))]
    )


def test_bins_by_hand():
    """from 1 to 10 the bins are the whole numbers: 1, 7.25 and 10"""
    rows = two_hot_ratings(torch.tensor([1.0, 7.25, 10.0]), 1.0, 10.0)
    assert rows[0].tolist() == [1] + [0] * 9 and rows[2].tolist() == [0] * 9 + [1]
    assert rows[1, 6:8].tolist() == pytest.approx([0.75, 0.25]) and rows.sum(1).tolist() == pytest.approx([1, 1, 1])


def test_targets_by_hand():
    assert score_targets([3.0, 7.0], ScoreModelInfo(mean=5.0, std=2.0)).tolist() == [-1, 1]
    assert score_targets([0.0, 1.0, 0.0], ScoreModelInfo(task="binary", classes=("0.0", "1.0"))).tolist() == [0, 1, 0]
    assert score_targets(
        [2.5, 0.0, 9.0], ScoreModelInfo(task="multiclass", classes=("0.0", "2.5", "9.0"))
    ).tolist() == [1, 0, 2]


@pytest.mark.parametrize("loss", SCORE_LOSSES)
def test_the_default_loss_is_square_plus_a_quarter_of_the_order(loss):
    """said 0 and 0, wanted -1 and 1: squares 1 and 1; logistic order log 2, margin order 2"""
    method = method_of(rated(4), loss=loss)
    losses = method.sample_losses(torch.zeros(2, 1), torch.tensor([-1.0, 1.0])).tolist()
    extra = {"MSE": 0.0, "MSE + ranking": 0.25 * math.log(2), "MSE + margin ranking": 0.25 * 2}[loss]
    assert losses == pytest.approx([1 + extra] * 2)


def method_of(data, denoiser=None, about=ABOUT, dropout=0.0, pairs=(), **settings):
    network = call_with_seed(0, lambda: build_scorer(about))
    scores = [item.score or 0.0 for item in data.items]
    settings = ScoreSettings(**{"batch": 4, **settings})
    return ScoreTraining(
        denoiser or Denoiser(), network, data, about, score_targets(scores, about), pairs, settings, dropout
    )


# -- what is drawn -----------------------------------------------------------------------------------------------------


def looked_at(method, steps=60):
    """Levels, and images, that the network is shown."""
    found = []
    real = method.network.forward
    method.network.forward = lambda x, level, keep=None: found.append((x, level)) or real(x, level, keep)
    for step in range(steps):
        method.loss(rng(step))
    return torch.cat([x for x, _ in found]), torch.cat([level for _, level in found])


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_half_of_what_is_seen_is_clean_and_the_rest_is_of_every_level(prediction):
    denoiser = Denoiser(None, prediction)
    x, level = looked_at(method_of(rated(16), denoiser, batch=16))
    clean = level == 0
    assert 0.45 < clean.float().mean() < 0.55
    highest = MAX_SCORE_NOISE if prediction == "flow" else float(denoiser.sigmas[979] / (1 + denoiser.sigmas[979]))
    assert level.max() <= highest + 1e-6 and level.max() > 0.9 * highest
    assert level[~clean].quantile(torch.tensor([0.1, 0.9])).diff() > 0.5
    assert 0.9 < x[level > 0.5].std() < 1.1, "noised latents are of unit size"


def test_a_model_of_clean_pictures_sees_nothing_else():
    data = rated(8)
    x, level = looked_at(method_of(data, about=replace(ABOUT, noisy=False), batch=8), 3)
    known = torch.stack([data.store.load(item.latent)["mean"] for item in data.items])
    assert (level == 0).all() and all(any(torch.equal(a, b) for b in known) for a in x)


def test_a_mirrored_picture_is_the_latent_that_was_encoded_of_it():
    data = rated(4)
    data.store["mirror"] = {"mean": torch.full((2, 4, 4), 9.0), "std": None}
    data.items = [replace(item, flipped="mirror") for item in data.items]
    x, _ = looked_at(method_of(data, about=replace(ABOUT, noisy=False)), 40)
    assert 0.4 < (x == 9).flatten(1).all(1).float().mean() < 0.6


def test_pictures_of_several_sizes_share_a_batch_in_their_order():
    data = rated(6)
    for number in (1, 4):
        key = data.items[number].latent
        data.store[key] = {"mean": torch.randn(2, 6, 3, generator=rng(number)), "std": None}
        data.items[number] = replace(data.items[number], shape=(2, 6, 3))
    method = method_of(data)
    together = method.predict_outputs([0, 1, 2, 3, 4, 5], torch.zeros(6), rng())
    alone = torch.cat([method.predict_outputs([i], torch.zeros(1), rng()) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_clean_ones_are_left_as_they_are():
    x0 = torch.randn(3, 2, 4, 4, generator=rng())
    x, level = noised_scorer_input(
        Denoiser(None, "eps"), x0, torch.tensor([0.0, 2.0, 2.0]), torch.tensor([False, True, False]), rng()
    )
    assert torch.equal(x[[0, 2]], x0[[0, 2]]) and not torch.equal(x[1], x0[1])
    assert level.tolist() == pytest.approx([0, 2 / 3, 0])


def test_dropout_comes_from_the_steps_generator():
    method = method_of(rated(4), dropout=0.5)
    torch.manual_seed(1)
    first = method.loss(rng(3))
    method = method_of(rated(4), dropout=0.5)
    torch.manual_seed(2)
    assert torch.equal(method.loss(rng(3)), first)
    keep = method.dropout_mask(1000, rng())
    assert set(keep.unique().tolist()) == {0.0, 2.0} and keep.mean().item() == pytest.approx(1, abs=0.05)


def test_the_average_of_the_weights_by_hand():
    """memory (1 + n) / (10 + n): after the weight 1 (as it began) comes 0, kept at .1; then 0 again, kept at 2 / 11"""
    method = method_of(rated(4))
    method.average = [torch.ones_like(p) for p in method.parameters()]
    method.load_weights([torch.zeros_like(p) for p in method.parameters()])
    method.update_average()
    assert method.average[0].flatten()[0].item() == pytest.approx(0.1)
    method.update_average()
    assert method.average[0].flatten()[0].item() == pytest.approx(0.1 * 2 / 11)


# -- whole trainings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["latent ResNet", "latent ViT"])
def test_a_known_score_is_found_and_said_to_be(backbone):
    made = train(rated(80, lambda mean: 5 + 3 * float(mean[0].mean())), scorer=ScorerSettings(backbone=backbone, width=8, depth=1),
                 settings=replace(QUICK, steps=120))  # fmt: skip
    about = made.model.info
    assert about.trained and about.metrics["SRCC"][0] > 0.6, made.report
    assert set(about.metrics) >= {"SRCC", "PLCC", "MAE", "pairwise accuracy", "SRCC at noise 0.9"}
    assert (
        made.report.startswith("Trained on 80 rated images: SRCC 0.")
        and len(made.predictions) == 80
        and len(made.losses) == 120
    )
    assert about.members == len(made.model.networks) == 2 and about.mean == pytest.approx(5, abs=0.3)
    assert 4 < np.mean(made.predictions) < 6, "on the user's own scale"


def test_a_slip_of_the_hand_is_pointed_at():
    data = rated(80, lambda mean: 5 + 3 * float(mean[0].mean()))
    data.items[7] = replace(data.items[7], score=20.0, path="/set/slip.png")
    report = train(data, scorer=replace(TINY, backbone="latent ViT"), settings=replace(QUICK, steps=120)).report
    assert report.splitlines()[-1].startswith("Look again at the ratings of slip.png (rated 20, said "), report


@pytest.mark.parametrize(("task", "figure"), TASK_FIGURES.items())
def test_every_task_is_trained_measured_and_answers_on_its_own_scale(task, figure):
    """That it learns what can be learnt: tests/proofs/test_score_tasks.py."""
    made, ratings, spreads = task_ratings(task, count=40, steps=4)
    info = made.model.info
    assert info.task == task and figure in info.metrics and len(made.losses) == 4, made.report
    assert np.isfinite(ratings).all() and len(ratings) == 40 and min(spreads) >= 0


def test_what_is_learnt_is_measured_on_pictures_that_were_not_seen(monkeypatch):
    """Members and what they judge: no image, and no near-duplicate of one, is on both sides."""
    learnt, judged = [], []
    real_learn, real_judged = EnsembleMember.train_member, EnsembleMember.predict_held_out
    monkeypatch.setattr(
        EnsembleMember,
        "train_member",
        lambda self, index, *rest: learnt.append(set(index.tolist())) or real_learn(self, index, *rest),
    )
    monkeypatch.setattr(
        EnsembleMember,
        "predict_held_out",
        lambda self, index, *rest: judged.append(set(index.tolist())) or real_judged(self, index, *rest),
    )
    groups = [i // 3 for i in range(60)]
    train(rated(60), settings=replace(QUICK, steps=2, members=4), groups=groups)
    assert len(learnt) == len(judged) == 4 and set().union(*judged) == set(range(60)) and sum(map(len, judged)) == 60
    for known, asked in zip(learnt, judged, strict=True):
        assert not known & asked and not {groups[i] for i in known} & {groups[i] for i in asked}


def test_a_score_that_is_chance_is_not_called_trained():
    draw = iter(torch.randn(1000, generator=rng(9)).tolist())
    made = train(rated(60, lambda mean: next(draw)))
    assert not made.model.info.trained
    assert (
        made.report.startswith("NOT TRAINED: SRCC is ")
        and "chance gives 0" in made.report
        and "Rate more images" in made.report
    )


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    first, same, other = (train(rated(40), settings=replace(QUICK, steps=30, seed=s)) for s in (1, 1, 2))
    one, two, three = (score_model_tensors(t.model) for t in (first, same, other))
    assert first.model.info == same.model.info and all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], three[k]) for k in one)


def test_a_member_stops_when_held_back_pictures_are_scored_no_better():
    made = train(rated(160), settings=replace(QUICK, steps=400, check_every=2, patience=2))
    assert len(made.losses) < 400 and len(made.losses) % 2 == 0
    assert len(train(rated(160), settings=replace(QUICK, steps=8, check_every=2, patience=0)).losses) == 8


def test_the_best_weights_are_kept_and_not_the_last(monkeypatch):
    """The marks of the held back images are made up: the third is the best, so the average of step 6 is what
    stays."""
    marks, kept = iter([0.1, 0.2, 0.9, 0.3, 0.3, 0.3] * 2), []
    monkeypatch.setattr(EnsembleMember, "validation_score", lambda self, index: next(marks))
    real = ScoreTraining.load_weights
    monkeypatch.setattr(
        ScoreTraining,
        "load_weights",
        lambda self, weights: kept.append((self.steps, weights[0].clone())) or real(self, weights),
    )
    made = train(rated(160), settings=replace(QUICK, steps=12, check_every=2, patience=10))
    at_six = next(weights for steps, weights in kept if steps == 6)
    assert torch.equal(next(made.model.networks[0].parameters()), at_six)


def test_an_interrupt_passes_through():
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    with pytest.raises(Stop):
        train(rated(40), check_interrupt=interrupt)


# -- stopped and gone on -----------------------------------------------------------------------------------------------


class After:
    """An interrupt after so many questions."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise Stop


def stopped_and_gone_on(folder, every, data, settings, **rest):
    """(the finished training, how often it was stopped), the n-th time after n * `every` questions: what is done is
    measured again each time."""
    for stops in range(200):
        with contextlib.suppress(Stop):
            return train(
                data, settings=settings, resume=ResumeFolder(folder), check_interrupt=After((stops + 1) * every), **rest
            ), stops
    raise AssertionError("It never ends: nothing is kept.")


def same_training(a, b):
    one, two = score_model_tensors(a.model), score_model_tensors(b.model)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (
        a.model.info == b.model.info and a.losses == b.losses and a.predictions == b.predictions and a.lines == b.lines
    )


@pytest.mark.parametrize(("every", "patience"), [(5, 10), (6, 10), (7, 0), (13, 10), (6, 1)])
def test_a_training_that_is_stopped_again_and_again_is_the_same_training(tmp_path, monkeypatch, every, patience):
    """Stopped in the middle of a network, on the very step where held back images are scored, while a network is
    measured, and between two; with and without an early end. How well they are scored is made up of the last digits of
    the weights: any step may be the best, and one that is asked twice, or not at all, is seen."""
    monkeypatch.setattr(
        loop.TrainingClock, "report_due", lambda self, step: True
    )  # asked at every step, not by the clock
    monkeypatch.setattr(
        EnsembleMember,
        "validation_score",
        lambda self, index: 1e4 * float(next(self.network.parameters()).detach().double().sum()) % 1,
    )
    data, settings = rated(160), replace(QUICK, steps=18, members=3, check_every=3, patience=patience)
    whole = train(data, settings=settings)
    assert (len(whole.losses) < 18) == (patience == 1)
    parts, stops = stopped_and_gone_on(tmp_path / "work", every, data, settings)
    assert stops > 2
    same_training(whole, parts)


@pytest.mark.parametrize("task", ["distribution", "multiclass", "pairwise"])
def test_every_task_goes_on_where_it_was_stopped(tmp_path, monkeypatch, task):
    monkeypatch.setattr(loop.TrainingClock, "report_due", lambda self, step: True)
    data = rated(60, lambda m: float(m[0].mean() > 0) + float(m[0].mean() > 0.2)) if task == "multiclass" else rated(60)
    settings = replace(QUICK, steps=8, task=task)
    same_training(train(data, settings=settings), stopped_and_gone_on(tmp_path / "work", 11, data, settings)[0])


def test_networks_that_are_done_are_not_trained_again(tmp_path, monkeypatch):
    data, settings = rated(60), replace(QUICK, steps=4, members=3)
    done, loss = [], ScoreTraining.loss
    monkeypatch.setattr(
        ScoreTraining,
        "loss",
        lambda self, rng: done.append(1) or (loss(self, rng) if len(done) != 10 else (_ for _ in ()).throw(Stop())),
    )
    resume = ResumeFolder(tmp_path / "work")
    with pytest.raises(Stop):
        train(data, settings=settings, resume=resume)
    assert resume.saved_progress == "network 3, step 1" and sorted(p.name for p in (tmp_path / "work").iterdir()) == [
        "network0.state",
        "network1.state",
        "now.state",
    ]
    train(data, settings=settings, resume=ResumeFolder(tmp_path / "work"))
    assert len(done) == 10 + 3, "of the third network steps 2 to 4"
    resume.clear()
    assert not (tmp_path / "work").exists()


def test_work_that_nobody_will_go_on_with_is_removed_and_other_work_stays(tmp_path):
    """Of the first the model is there; the second is 31 days old; the third is of today."""
    ages = {"finished": 0, "old": 31, "now": 0}
    for name, days in ages.items():
        (tmp_path / f"{name}.unfinished").mkdir()
        (tmp_path / f"{name}.unfinished" / "now.state").write_bytes(b"")
        for path in (tmp_path / f"{name}.unfinished" / "now.state", tmp_path / f"{name}.unfinished"):
            os.utime(path, (time.time() - days * 86400,) * 2)
    (tmp_path / "finished.safetensors").write_bytes(b"")
    remove_abandoned_work(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished.safetensors", "now.unfinished"]


def test_damaged_work_says_what_to_delete(tmp_path):
    (tmp_path / "network0.state").write_bytes(b"no state")
    with pytest.raises(ValueError, match=f"Delete the folder {re.escape(str(tmp_path))}"):
        train(rated(40), resume=ResumeFolder(tmp_path))


def test_progress_counts_the_steps_of_all_members():
    told = []
    train(rated(40), settings=replace(QUICK, steps=10), report=lambda *args: told.append(args))
    assert told[-1][:2] == (20, 20) and told[-1][2].startswith("network 2 of 2, step 10/10")


@pytest.mark.parametrize("calibration", ["linear", "isotonic", "off"])
def test_ratings_come_out_on_the_scale_they_went_in(calibration):
    data = rated(120, lambda mean: 50 + 20 * float(mean[0].mean()))
    made = train(data, settings=replace(QUICK, steps=80, calibration=calibration))
    about = made.model.info
    assert bool(about.curve) == (calibration == "isotonic") and (about.line != (1.0, 0.0)) == (calibration == "linear")
    assert about.metrics["MAE"][0] < np.std([item.score for item in data.items]), made.report
    assert 30 < min(made.predictions) < max(made.predictions) < 70


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_alone_are_enough():
    data = dataset(240)
    means = [float(data.store.load(item.latent)["mean"][0].mean()) for item in data.items]
    pairs = [(a, b) if means[a] > means[b] else (b, a) for a, b in zip(range(0, 240, 2), range(1, 240, 2), strict=True)]
    made = train(
        data,
        scorer=replace(TINY, backbone="latent ViT"),
        settings=replace(QUICK, task="pairwise", steps=120),
        pairs=pairs,
    )
    assert made.report.startswith("Trained on 120 pairs of 240 images: pairwise accuracy 0."), made.report


def test_both_sides_of_a_pair_are_in_one_fold_where_that_can_be():
    data, settings = rated(40), replace(QUICK, task="pairwise")
    apart = [(i, i + 1) for i in range(0, 40, 2)]
    task, groups = build_rating_task(data, TINY, settings, "", apart, list(range(40)), None)
    names = fold_groups(groups, task, settings)
    assert all(names[a] == names[b] for a, b in apart) and len(set(names)) == 20
    chain = [(i, i + 1) for i in range(39)]
    task, groups = build_rating_task(data, TINY, settings, "", chain, list(range(40)), None)
    assert fold_groups(groups, task, settings) == groups, "a chain ties all to all: each image for itself"


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_pictures_without_a_rating_are_left_out_and_named():
    data = rated(40)
    data.items[3] = replace(data.items[3], score=None, path="/somewhere/cat.png")
    made = train(data, settings=replace(QUICK, steps=2))
    assert "1 images without a rating were left out: /somewhere/cat.png" in made.report and len(made.predictions) == 39


def test_too_few_constant_and_unsuitable_ratings_are_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="10 images are rated. So few"):
        train(rated(10))
    assert train(rated(10), settings=replace(QUICK, steps=2, few=True)).report
    with pytest.raises(ValueError, match="All 30 ratings are 5"):
        train(rated(30, lambda mean: 5.0))
    with pytest.raises(ValueError, match="binary needs two different ratings, such as 0 and 1, and there are 30"):
        train(rated(30), settings=replace(QUICK, task="binary"))
    with pytest.raises(ValueError, match="None of the 30 images has a rating"):
        train(dataset(30))


def test_a_pretrained_trunk_is_learnt_on_and_another_kind_of_latent_refused():
    before = replace(ABOUT, latent_format="SD15", width=16)
    pretrained = ScorerEnsemble([call_with_seed(5, lambda: build_scorer(before))], before)
    made = train(
        rated(40), settings=replace(QUICK, steps=1, learning_rate=1e-7), pretrained=pretrained, latent_format="SD15"
    )
    assert made.model.info.width == 16
    start, end = pretrained.networks[0].trunk.state_dict(), made.model.networks[1].trunk.state_dict()
    assert all(torch.allclose(start[k], end[k], atol=1e-4) for k in start)
    with pytest.raises(
        ValueError,
        match=r"pretrained backbone sees latents of SD15 \(2 channels\), and these are of SDXL \(2 channels\)",
    ):
        train(rated(40), pretrained=pretrained, latent_format="SDXL")
