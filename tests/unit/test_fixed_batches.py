"""Fixed questions about differences: by hand, the same each time, near what training draws, and no cost or change of
the training."""

import dataclasses

import pytest
import torch
from trainyard.tests.unit.toy import SHAPE, Denoiser, Net, dataset, pairs, prompts, shaken
from trainyard.trainers.diffusion import NoiseLevelDensity
from trainyard.trainers.loop import train
from trainyard.trainers.methods.image_pairs import AddiftTraining, ImageSlider
from trainyard.trainers.methods.prompts import (
    PromptDifferenceTraining,
    make_leco_targets,
    make_preserve_targets,
    make_slider_targets,
)
from trainyard.trainers.methods.rollouts import ImagePoints, NoisePoints, PromptTask, RolloutPoints, StudentTeacherModel
from trainyard.trainers.monitor import fixed_batches
from trainyard.trainers.monitor.validation import RESTORE_BEST, ValidationMonitor, ValidationSettings
from trainyard.trainers.settings import NoiseSettings, PointSettings, RunSettings

PLAIN, BAND = NoiseSettings(), NoiseSettings(min_time=0.3, max_time=0.8)
SETTINGS = PointSettings(sampling_steps=5, ways=3, refresh=4)


def model():
    network = Net()
    return StudentTeacherModel(Denoiser(network), shaken(network), prompts())


def sliding(method=ImageSlider, noise=PLAIN):
    m = model()
    return method(m.denoiser, m.adapters, pairs(), noise, NoiseLevelDensity(), 2)


def tasks(batch=2):
    return [
        PromptTask(pulls, "cat", "", 1.0, (SHAPE,), batch)
        for pulls in (make_slider_targets("cat", "old", "young"), make_preserve_targets("dog"))
    ]


def moving(kind="rollout", noise=PLAIN):
    """A Difference on points of a kind."""
    m = model()
    points = {
        "rollout": lambda: RolloutPoints(m, tasks(), SETTINGS, noise, 2.0),
        "pictures": lambda: ImagePoints(m, tasks(), dataset(), noise, NoiseLevelDensity(), 2),
        "noise": lambda: NoisePoints(m, tasks(), noise),
    }[kind]()
    return PromptDifferenceTraining(m, tasks(), points)


def exam_of(method, kind="rollout", rows=4, batch=3, noise=PLAIN, levels=4):
    asked = fixed_batches.with_separate_counts(method)
    points = {
        "rollout": lambda: fixed_batches.points_on_rollouts(asked.model, asked.tasks, SETTINGS, noise, 2.0, levels),
        "pictures": lambda: fixed_batches.points_on_images(
            method.model.denoiser, asked.tasks, dataset(), NoiseLevelDensity(), noise, levels, range(rows)
        ),
        "noise": lambda: fixed_batches.points_on_noise(method.model.denoiser, asked.tasks, noise, levels),
    }[kind]()
    return fixed_batches.build_point_validation(asked, points, rows, batch, kind)


def pair_exam(method, count=2, levels=4, batch=3, data=None):
    return fixed_batches.build_pair_validation(method, data or method.data, count, levels, batch)


KINDS = ("rollout", "pictures", "noise")
MADE = {
    "image slider": (lambda: sliding(), pair_exam),
    "change": (lambda: sliding(AddiftTraining), pair_exam),
    **{kind: (lambda kind=kind: moving(kind), lambda m, kind=kind: exam_of(m, kind)) for kind in KINDS},
}


@pytest.mark.parametrize("name", MADE)
def test_two_measurements_of_the_same_weights_are_equal_and_cost_the_training_nothing(name):
    make, ask = MADE[name]
    method = make()
    before = dict(getattr(method, "forward_counts", None) or method.model.forward_counts)
    exam = ask(method)
    first, second, other = exam.losses(), exam.losses(), ask(make()).losses()
    assert torch.equal(first, second) and torch.equal(first, other) and first.isfinite().all() and first.min() > 0
    assert (getattr(method, "forward_counts", None) or method.model.forward_counts) == before
    assert first.shape == (len(exam.picks), len(exam.first_sigmas()))


@pytest.mark.parametrize("name", MADE)
def test_noise_levels_go_from_clean_to_noisy_and_the_batch_changes_no_answer(name):
    make, ask = MADE[name]
    exam = ask(make())
    assert exam.first_sigmas() == sorted(exam.first_sigmas())
    one = ask(make())
    one.batch = 1
    assert one.losses().flatten().tolist() == pytest.approx(exam.losses().flatten().tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_points_lie_in_the_band_that_is_trained(kind):
    sigmas = exam_of(moving(kind, BAND), kind, noise=BAND).first_sigmas()
    assert min(sigmas) >= 0.3 - 1e-6 and max(sigmas) <= 0.8 + 1e-6


@pytest.mark.parametrize("name", MADE)
def test_what_is_measured_moves_with_the_weights_and_is_not_moved_by_its_own_points(name):
    """The points of ways are those of the frozen model: the student, which changes, does not choose what it is
    asked."""
    make, ask = MADE[name]
    method = make()
    exam = ask(method)
    before = exam.losses()
    sigmas = exam.first_sigmas()
    with torch.no_grad():
        for p in method.parameters():
            p.mul_(1.5)
    assert not torch.equal(exam.losses(), before)
    fresh = ask(method)
    assert torch.allclose(fresh.losses(), exam.losses(), rtol=1e-5) and fresh.first_sigmas() == sigmas


def test_a_slider_is_measured_as_the_mean_of_both_its_sides():
    """Against a literal loop: each side noised alike, the squared error of the velocity at its own strength."""
    method = sliding()
    exam = pair_exam(method, count=1, levels=2)
    pair = exam.method.items[0]
    wanted = []
    for level, sigma in enumerate(exam.first_sigmas()):
        both = []
        for strength, index in pair.index_by_strength.items():
            batch = method.data.make_batch([index], fixed_batches.validation_rng("pair", pair.name))
            x0 = method.denoiser.model_space(batch.x0)
            noise = fixed_batches.cpu_randn_like(x0, fixed_batches.validation_rng("noise", pair.name, level))
            sigma = torch.tensor([float(sigma)])
            with torch.no_grad(), method.adapters.at_strength(strength):
                answer = method.denoiser.denoise(method.denoiser.noised(x0, noise, sigma), sigma, batch.conds)
            both.append(((answer - x0) / sigma).square().mean())
        wanted.append(sum(both) / 2)
    assert exam.losses()[0].tolist() == pytest.approx([float(w) for w in wanted], rel=1e-4)


def test_a_perfect_student_has_no_loss_at_its_points():
    """A task that keeps the prompt, and adapters that change nothing: the goal is what the student says."""
    m = model()
    with torch.no_grad():
        for p in m.adapters.parameters():
            p.zero_()
    method = PromptDifferenceTraining(m, [PromptTask(make_preserve_targets("cat"), "cat", "", 1.0, (SHAPE,), 1)], None)
    exam = fixed_batches.build_point_validation(
        fixed_batches.with_separate_counts(method),
        fixed_batches.points_on_rollouts(m, method.tasks, SETTINGS, NoiseSettings(), 1.0, 4),
        2,
        2,
    )
    assert exam.losses().abs().max() < 1e-8


def test_each_task_is_asked_in_its_turn_and_the_frozen_model_only_once():
    exam = exam_of(moving(), rows=4)
    exam.losses()
    spent = dict(exam.method.model.forward_counts)
    assert [exam.points(row).task for row in range(4)] == [0, 1, 0, 1]
    assert spent["rollout"] == 4 * (5 - 1) * 2
    assert spent["frozen"] == 2 * 4 * 3 + 2 * 4 * 1, (
        "three prompts of the slider and one of what is kept, at four points of two ways each"
    )
    exam.losses()
    assert exam.method.model.forward_counts["frozen"] == spent["frozen"]


def test_held_out_pairs_are_asked_at_every_strength_they_have():
    graded = pairs(2, (2.0, 1.0, -1.0, -2.0), seed=8)
    exam = pair_exam(sliding(), count=5, data=graded)
    assert len(exam.picks) == 2 and exam.losses().shape == (2, 4)
    assert exam.describe_sample(0)["image"] == graded.items[0].path or exam.describe_sample(0)["image"]


def test_weights_and_other_noise_of_the_training_are_not_measured():
    odd = NoiseSettings(loss="Huber", noise_offset=0.3)
    assert torch.equal(pair_exam(sliding(noise=odd)).losses(), pair_exam(sliding()).losses())


def test_measurements_of_other_questions_are_told_apart():
    keys = {exam_of(moving(), rows=4).key, exam_of(moving(), rows=3).key, exam_of(moving("noise"), "noise").key,
            pair_exam(sliding()).key, pair_exam(sliding(AddiftTraining)).key, pair_exam(sliding(), levels=5).key}  # fmt: skip
    assert len(keys) == 6
    other = moving()
    other.tasks = [PromptTask(make_leco_targets("cat", "old", "dog", ""), "cat", "", 1.0, (SHAPE,), 2)]
    assert exam_of(other).key not in keys


@pytest.mark.parametrize("name", MADE)
def test_a_run_that_is_looked_at_is_the_run_that_is_not(name):
    make, ask = MADE[name]
    run = RunSettings(steps=7, learning_rate=0.01, save_every=0)
    plain, seen = make(), make()
    watch = ValidationMonitor(ValidationSettings(every=2), {"training": ask(seen)})
    losses = train(plain, run), train(seen, run, monitor=watch)
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters(), strict=True))
    assert [entry["step"] for entry in watch.history] == [0, 2, 4, 6, 7]
    assert watch.line().endswith(watch.losses_by_name["training"].where)


def test_the_best_weights_of_a_slider_are_restored_and_a_run_ends_when_nothing_is_gained():
    method = sliding()
    watch = ValidationMonitor(
        ValidationSettings(every=1, best=RESTORE_BEST, patience=2),
        {"validation": pair_exam(method, data=pairs(seed=91))},
    )
    train(method, RunSettings(steps=40, learning_rate=1.0, save_every=0), monitor=watch)
    best = min(watch.history[1:], key=lambda entry: entry["loss"])
    assert watch.history[-1]["step"] < 40 and watch.best["step"] == best["step"]
    assert float(watch.losses_by_name["validation"].losses().mean()) == pytest.approx(best["loss"], rel=1e-5), (
        "the weights are those of the best step"
    )


def test_an_interrupt_is_heard_at_every_forward():
    class Stop(BaseException): ...

    def stop():
        raise Stop

    for make, ask in MADE.values():
        with pytest.raises(Stop):
            ask(make()).losses(stop)


def test_dropped_captions_are_not_asked():
    method = sliding()
    method.data = dataclasses.replace(method.data, empty_key=method.data.items[0].caption_keys[0], dropout=1.0)
    assert torch.equal(pair_exam(method).losses(), pair_exam(sliding()).losses())
