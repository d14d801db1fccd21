"""Validation: fixed questions, what follows from them, and a training that does not notice that it was looked at."""

import json
import math

import pytest
import torch
from trainyard.tests.unit.toy import Denoiser, Net, Perfect, Stop, adapters, dataset, folder
from trainyard.trainers.diffusion import NoiseLevelDensity, sample_sigmas, stratified_sigmas
from trainyard.trainers.files import read_safetensors
from trainyard.trainers.loop import TrainingProgress, train
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.monitor.tensorboard import TensorBoardLog, create_tensorboard_log, longest_event_path
from trainyard.trainers.monitor.validation import (
    RESTORE_BEST,
    ImageValidationLoss,
    ValidationMonitor,
    ValidationSettings,
    best_measurement,
    measurements_without_gain,
    pick_validation_images,
    relative_losses,
)
from trainyard.trainers.run_records import delete_run_folder, list_run_records
from trainyard.trainers.runs import RunFolder
from trainyard.trainers.settings import OptimizerSettings, RunSettings


def made(seed=0):
    """(method, its adapters) on four images."""
    network = Net()
    added = adapters(network, seed)
    return LoraTraining(Denoiser(network), added, dataset(), batch=2), added


def exam(method, data=None, count=3, **more):
    data = data or method.data
    return ImageValidationLoss(
        method.denoiser, data, pick_validation_images(data, count), method.density, method.noise, batch=4, **more
    )


def watch(method, held_out=None, **settings):
    exams = {"validation": exam(method, held_out)} if held_out else {}
    return ValidationMonitor(ValidationSettings(**{"every": 2, **settings}), {**exams, "training": exam(method)})


def run(steps, **more):
    return RunSettings(**{"steps": steps, "learning_rate": 0.02, "save_every": 0, **more})


def trained(tmp_path, steps, name="toy", looking=watch, optimizing=None, report=None, **settings):
    """(losses, the LoRA's tensors, watch, store) of one run in a folder."""
    method, added = made()
    seen = looking(method, **settings) if looking else None
    store = folder(tmp_path, lambda: added.export_tensors()[0], steps, name)
    store.ending_rules = seen.settings.ending() if seen else {}
    losses = train(method, run(steps), optimizing, store=store, monitor=seen, report=report, interval=0)
    return losses, read_safetensors(store.lora_path(steps))[0], seen, store


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- the questions -----------------------------------------------------------------------------------------------------


def test_the_levels_are_the_middles_of_equal_shares_of_what_training_draws():
    """Uniform flow: shares of an eighth have their middles at 1/16, 3/16, ..."""
    sigmas = stratified_sigmas(Denoiser(Net()), NoiseLevelDensity(), torch.zeros(1, 2, 4, 4), 8)
    assert sigmas.tolist() == pytest.approx([(2 * k + 1) / 16 for k in range(8)])


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize(
    "density", [NoiseLevelDensity("logit-normal", 0.3, 0.8, 3.0), NoiseLevelDensity("uniform", shift="resolution")]
)
def test_a_tenth_of_all_draws_lies_below_the_first_of_five_levels(prediction, density):
    denoiser, x0 = Denoiser(Net(), prediction), torch.zeros(20_000, 2, 4, 4)
    drawn = sample_sigmas(denoiser, density, x0, torch.Generator().manual_seed(0), 0.1, 0.9)
    levels = stratified_sigmas(denoiser, density, x0[:1], 5, 0.1, 0.9)
    assert [(drawn < level).float().mean().item() for level in levels] == pytest.approx(
        [0.1, 0.3, 0.5, 0.7, 0.9], abs=0.015
    )


def test_two_measurements_of_the_same_weights_are_equal_and_a_perfect_model_has_no_loss():
    method, _ = made()
    first, second = exam(method).losses(), exam(method).losses()
    assert first.shape == (3, 8) and torch.equal(first, second)
    one = dataset(1)
    perfect = Perfect(one.store.load(one.items[0].latent)["mean"][None])
    assert ImageValidationLoss(perfect, one, [0], NoiseLevelDensity()).losses().abs().max() < 1e-10


def test_the_batch_size_changes_no_answer():
    method, _ = made()
    one, many = exam(method), exam(method)
    one.batch = 1
    assert one.losses() == pytest.approx(many.losses(), rel=1e-5)


def test_dropped_captions_and_masks_are_as_in_training_but_without_dropout():
    method, _ = made()
    method.data.empty_key, method.data.dropout = method.data.items[0].caption_keys[0], 1.0
    told = exam(method)
    assert told.data.dropout == 0 and method.data.dropout == 1.0
    masked = exam(method, dataset(masks=True))
    assert masked.losses().isfinite().all()


def test_pictures_are_spread_over_the_set():
    assert pick_validation_images(dataset(4), 2) == [0, 2] and pick_validation_images(dataset(4), 9) == [0, 1, 2, 3]


def test_the_worst_picture_is_the_worst_at_its_noise_level():
    """Two levels, the second ten times as hard for all. Image 1 has twice what others have: 2 / (4/3) = 1.5 at both
    levels."""
    losses = torch.tensor([[1.0, 10.0], [2.0, 20.0], [1.0, 10.0]])
    assert relative_losses(losses).tolist() == pytest.approx([0.75, 1.5, 0.75])


# -- what follows ------------------------------------------------------------------------------------------------------


def entries(*losses, first=0, apart=10):
    return [{"step": first + i * apart, "loss": loss} for i, loss in enumerate(losses)]


def test_the_best_is_the_lowest_of_trained_weights():
    assert best_measurement(entries(0.1, 0.5, 0.3, 0.4))["step"] == 20
    assert best_measurement(entries(0.1, None)) is None


@pytest.mark.parametrize(
    "losses, gain, since",
    [((9, 5, 4, 3), 0.0, 0), ((9, 5, 6, 5), 0.0, 2), ((9, 5, 4.99, 4.98), 0.01, 2), ((9, 5, None), 0.0, 1)],
)
def test_patience_counts_measurements_without_a_gain(losses, gain, since):
    assert measurements_without_gain(entries(*losses), gain) == since


def test_a_run_is_measured_before_on_the_way_and_at_its_end(tmp_path):
    losses, _, seen, _ = trained(tmp_path, 5)
    assert [entry["step"] for entry in seen.history] == [0, 2, 4, 5]
    assert len(losses) == 5 and all(len(entry["bins"]) == len(entry["sigmas"]) == 8 for entry in seen.history)


def test_held_out_pictures_come_with_the_gap_to_training_pictures(tmp_path):
    _, _, seen, _ = trained(tmp_path, 40, held_out=dataset(3, seed=77), every=20)
    last = seen.history[-1]
    assert last["held_out"] and last["loss"] > last["training"], (
        "what was learnt by heart does not carry over to random images"
    )
    assert "against training pictures" in seen.line()


@pytest.mark.parametrize("optimizing", [None, OptimizerSettings(optimizer="ScheduleFreeAdamW")])
def test_training_is_bit_identical_with_and_without_validation(tmp_path, optimizing):
    if optimizing:
        pytest.importorskip("pytorch_optimizer")
    plain_losses, plain, _, _ = trained(tmp_path, 7, "plain", looking=None, optimizing=optimizing)
    torch.manual_seed(3)
    losses, tensors, _, _ = trained(tmp_path, 7, "seen", optimizing=optimizing)
    assert losses == plain_losses and same(tensors, plain)


def test_looking_leaves_torchs_own_chance_as_it_was():
    method, _ = made()
    seen = watch(method)
    seen.draw_samples, seen.preview_every = lambda step: torch.rand(3) and None, 1
    before = torch.random.get_rng_state()
    train(method, run(2), monitor=seen)
    assert torch.equal(before, torch.random.get_rng_state())


def stop_at(step):
    def report(progress):
        if progress.step == step:
            raise Stop

    return report


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_stopped_run_goes_on_with_its_measurements_and_its_best(tmp_path, stop):
    whole_losses, whole, all_seen, _ = trained(tmp_path, 6, "whole", best=RESTORE_BEST)
    with pytest.raises(Stop):
        trained(tmp_path, 6, "cut", best=RESTORE_BEST, report=stop_at(stop))
    losses, tensors, seen, _ = trained(tmp_path, 6, "cut", best=RESTORE_BEST)
    assert losses == whole_losses and same(tensors, whole)
    assert seen.history == all_seen.history and seen.best["step"] == all_seen.best["step"]


def test_an_interrupt_in_the_middle_of_a_measurement_loses_no_step(tmp_path):
    def interrupted(method, **settings):
        seen, calls = watch(method, **settings), []

        def tick():
            calls.append(1)
            if len(calls) == 10:
                raise Stop

        seen.check_interrupt = tick
        return seen

    with pytest.raises(Stop):
        trained(tmp_path, 6, "cut", looking=interrupted)
    losses, tensors, seen, _ = trained(tmp_path, 6, "cut")
    whole_losses, whole, all_seen, _ = trained(tmp_path, 6, "whole")
    assert losses == whole_losses and same(tensors, whole) and seen.history == all_seen.history


def test_a_run_continued_without_looking_keeps_what_was_seen(tmp_path):
    _, _, seen, _ = trained(tmp_path, 4)
    trained(tmp_path, 7, looking=None)
    _, _, again, _ = trained(tmp_path, 8)
    assert [entry["step"] for entry in again.history] == [0, 2, 4, 8], "the steps in between were not looked at"
    assert again.history[:3] == seen.history


def test_measurements_of_other_pictures_are_left_behind(tmp_path):
    trained(tmp_path, 4)
    _, _, seen, _ = trained(tmp_path, 6, held_out=dataset(2, seed=9))
    assert [entry["step"] for entry in seen.history] == [4, 6]


class Told(ValidationMonitor):
    """A Watch that is told what it measures: losses by step."""

    told = ()

    def measure(self, step, params):
        losses, self.losses_by_name["training"].losses = (
            self.losses_by_name["training"].losses,
            lambda tick: torch.full((1, 8), float(self.told[step])),
        )
        better = super().measure(step, params)
        self.losses_by_name["training"].losses = losses
        return better


def telling(losses):
    def looking(method, **settings):
        seen = watch(method, **{"every": 1, **settings})
        told = Told(seen.settings, seen.losses_by_name)
        told.told = losses
        return told

    return looking


def test_the_best_weights_are_the_result_when_asked_for(tmp_path):
    """Lowest after step 2: the file is that of a run of two steps, and the state still that of step 4, so that more
    steps can follow."""
    _, tensors, seen, store = trained(tmp_path, 4, looking=telling([9, 5, 3, 4, 6]), best=RESTORE_BEST)
    _, two, _, _ = trained(tmp_path, 2, "two", looking=None)
    assert same(tensors, two)
    state = store.load()
    assert (state["step"], state["delivered"]) == (4, 2)
    lora, losses = store.load_finished()
    assert lora.steps == 2 and lora.metadata["ss_steps"] == "2" and len(losses) == 4
    more, _, _, _ = trained(tmp_path, 6, looking=telling([9, 5, 3, 4, 6, 7, 8]), best=RESTORE_BEST)
    straight, _, _, _ = trained(tmp_path, 6, "straight", looking=None)
    assert more == straight


def test_the_parameters_after_the_run_are_the_delivered_ones():
    method, added = made()
    seen = telling([9, 5, 3, 4])(method, best=RESTORE_BEST)
    train(method, run(3), monitor=seen)
    other, more = made()
    train(other, run(2))
    assert same(added.export_tensors()[0], more.export_tensors()[0])


def test_the_best_so_far_is_a_file_beside_the_last_one(tmp_path):
    _, tensors, _, store = trained(tmp_path, 4, looking=telling([9, 5, 3, 4, 6]))
    _, two, _, _ = trained(tmp_path, 2, "two", looking=None)
    assert same(read_safetensors(store.best_path)[0], two) and not same(tensors, two)


def test_patience_ends_the_run_with_all_work_kept_and_finished(tmp_path):
    """Lowest at step 2; patience 2 ends it after step 4 of 9."""
    losses, tensors, _, store = trained(tmp_path, 9, looking=telling([9, 5, 3, 4, 6, 0, 0]), patience=2)
    _, four, _, _ = trained(tmp_path, 4, "four", looking=None)
    assert len(losses) == 4 and same(tensors, four)
    assert store.load_finished()[0].steps == 4
    about = json.loads((store.folder / "run.json").read_text())
    assert (about["why"], about["early"], about["step"], about["steps"]) == ("finished", True, 4, 9)


def test_less_patience_resumed_stops_at_once_and_no_patience_goes_on(tmp_path):
    trained(tmp_path, 9, looking=telling([9, 5, 3, 4, 6, 7, 8, 9, 9, 9]), patience=2)
    losses, _, _, store = trained(tmp_path, 9, looking=telling([9, 5, 3, 4, 6, 7, 8, 9, 9, 9]), patience=3)
    assert len(losses) == 5
    asked = RunFolder(tmp_path, "toy", store.fingerprint, {}, 9)
    assert asked.load_finished() is None, "without patience the run is not at its end"
    losses, _, _, store = trained(tmp_path, 9, looking=telling([0] * 10))
    assert len(losses) == 9 and store.load_finished() is not None


def test_a_loss_that_is_no_number_is_never_the_best_and_is_written_as_null(tmp_path):
    _, _, seen, store = trained(tmp_path, 3, looking=telling([9, 5, math.nan, 6]))
    assert best_measurement(seen.history)["step"] == 1
    assert json.loads((store.folder / "validation.json").read_text())[2]["loss"] is None
    assert "best 5.0000 at step 1" in seen.line()


def test_the_worst_pictures_are_named_at_the_end(tmp_path):
    def looking(method, **settings):
        seen = watch(method, **settings)
        seen.per_image_loss = exam(method, count=4)
        return seen

    _, _, seen, store = trained(tmp_path, 2, looking=looking)
    found = json.loads((store.folder / "images.json").read_text())
    assert len(found) == 4 and [one["loss"] for one in found] == sorted((one["loss"] for one in found), reverse=True)
    assert sum(one["loss"] for one in found) / 4 == pytest.approx(1)
    assert f"highest loss: {found[0]['image']}" in seen.line()


# -- samples -----------------------------------------------------------------------------------------------------------


def drawing(draw, every=2):
    def looking(method, **settings):
        seen = watch(method, **settings)
        seen.draw_samples, seen.preview_every = draw, every
        return seen

    return looking


def test_samples_are_drawn_every_so_many_steps_and_at_the_end_and_not_again_after_a_stop(tmp_path):
    steps = []

    def draw(step):
        steps.append(step)
        return {"step": step, "file": f"samples/{step}.jpg"}

    with pytest.raises(Stop):
        trained(tmp_path, 5, looking=drawing(draw), report=stop_at(3))
    _, _, seen, store = trained(tmp_path, 5, looking=drawing(draw))
    assert steps == [2, 4, 5] == [sample["step"] for sample in seen.samples]
    assert json.loads((store.folder / "run.json").read_text())["sample"] == "samples/5.jpg"


def test_trouble_in_a_preview_is_told_and_costs_nothing_else(tmp_path):
    told = []

    def looking(method, **settings):
        seen = drawing(lambda step: 1 / 0)(method, **settings)
        seen.on_event = lambda kind, entry: told.append((kind, entry))
        return seen

    losses, tensors, _, _ = trained(tmp_path, 4, looking=looking)
    plain_losses, plain, _, _ = trained(tmp_path, 4, "plain", looking=None)
    assert losses == plain_losses and same(tensors, plain)
    assert [entry["text"] for kind, entry in told if kind == "trouble"] == [
        f"No samples at step {s}: division by zero" for s in (2, 4)
    ]


def test_the_hosts_interrupt_in_a_preview_ends_the_run_and_keeps_the_step(tmp_path):
    def draw(step):
        raise Stop

    with pytest.raises(Stop):
        trained(tmp_path, 4, looking=drawing(draw))
    about = json.loads((tmp_path / "toy-01234567" / "run.json").read_text())
    assert (about["step"], about["why"]) == (2, "stopped")


# -- all runs ----------------------------------------------------------------------------------------------------------


def test_runs_are_listed_with_their_loss_their_size_and_their_newest_file(tmp_path):
    _, _, _, store = trained(tmp_path, 3)
    trained(tmp_path, 2, "other", looking=None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (broken, other, toy) = sorted(list_run_records(tmp_path), key=lambda about: about["name"])
    assert broken["damage"].startswith("run.json is cut off or is no JSON") and not toy["damage"]
    assert (toy["folder"], toy["lora"], toy["step"], toy["validation"]["step"]) == (
        store.folder.name,
        "toy.safetensors",
        3,
        3,
    )
    assert toy["bytes"] == sum(f.stat().st_size for f in store.folder.rglob("*")) and other["loss"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../outside",
        "/etc",
        "",
        ".",
        "no-such-run",
        "toy-01234567/..",
        "toy-01234567/samples",
        "a\\..\\b",
        "x\0y",
        "link",
    ],
)
def test_nothing_but_a_run_below_the_root_is_deleted(tmp_path, name):
    root, outside = tmp_path / "runs", tmp_path / "outside"
    outside.mkdir()
    (outside / "run.json").write_text("{}")
    trained(root, 1, looking=None)
    (root / "link").symlink_to(outside, target_is_directory=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is not a run|There is no run"):
        delete_run_folder(root, name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_deleted_whole(tmp_path):
    _, _, _, store = trained(tmp_path, 2)
    assert delete_run_folder(tmp_path, store.folder.name) > 0 and not store.folder.exists()


def test_settings_name_what_they_refuse():
    with pytest.raises(ValueError, match="patience is -1; it must lie between 0 and 100000 measurements"):
        ValidationSettings(patience=-1)
    assert ValidationSettings(patience=3).ending() == {"patience": 3, "least_gain": 0.0}
    assert ValidationSettings().ending() == {} == ValidationSettings(every=0, best=RESTORE_BEST, patience=3).ending()


# -- TensorBoard -------------------------------------------------------------------------------------------------------


class Writer:
    """What torch.utils.tensorboard.SummaryWriter is asked to write."""

    def __init__(self):
        self.last_write = []

    def add_scalar(self, name, value, step):
        self.last_write.append((name, value, step))


def test_every_loss_is_written_once_by_its_step_also_after_a_stop():
    writer = Writer()
    board = TensorBoardLog(writer, 2)  # two steps were written before the stop
    for step in (3, 5):
        board.report(TrainingProgress(step, 9, [float(i) for i in range(1, step + 1)], 1e-4, 0.0))
    losses = [(value, step) for name, value, step in writer.last_write if name == "loss/training step"]
    assert losses == [(3.0, 3), (4.0, 4), (5.0, 5)]
    assert [step for name, _, step in writer.last_write if name == "learning rate"] == [3, 5]


def test_measurements_are_written_by_noise_level_and_what_is_no_number_is_not():
    writer = Writer()
    TensorBoardLog(writer, 0).notice(
        "validation",
        {"step": 7, "loss": 0.5, "bins": [0.25, None], "sigmas": [0.1, 0.9], "held_out": True, "training": 0.4},
    )
    assert writer.last_write == [
        ("loss/validation", 0.5, 7),
        ("loss/fixed training pictures", 0.4, 7),
        ("loss by noise level/0.1", 0.25, 7),
    ]


def test_event_files_are_what_tensorboard_reads(tmp_path):
    board = create_tensorboard_log(tmp_path, 0)
    board.report(TrainingProgress(2, 2, [1.0, 0.5], 1e-4, 0.0))
    board.close()
    (file,) = tmp_path.iterdir()
    assert len(str(file)) <= len(str(longest_event_path(tmp_path))) <= len(str(file)) + 12
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/training step")] == [(1, 1.0), (2, 0.5)]
