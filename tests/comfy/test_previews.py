"""Looking at a run inside ComfyUI: validation and samples through the ordinary sampler, and a training that does not
notice."""

import dataclasses
import itertools
import json
import sys
import types

import comfy.model_management as mm
import pytest
import torch
from PIL import Image
from trainyard.nodes import host, paths
from trainyard.nodes.page import live, run_routes
from trainyard.nodes.train import leco
from trainyard.nodes.train.job import TrainingJob
from trainyard.nodes.train.previews import PreviewRenderer, preview_latent_shape, switch_to_sampling
from trainyard.nodes.train.run import format_forward_counts
from trainyard.nodes.train.validation import MonitorConfig, Validation
from trainyard.nodes.train.widgets import PlaceSettings
from trainyard.tests.comfy.families import cond, make
from trainyard.tests.comfy.families import latent_shape as family_latent
from trainyard.tests.comfy.test_prompt_and_pair_nodes import pair_job, pairs
from trainyard.tests.comfy.test_train_lora import data, job, result, run, state
from trainyard.trainers.data.concept_prompts import PromptRow
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.loop import TrainingProgress
from trainyard.trainers.memory.plan import PLAN_OFFLOADED
from trainyard.trainers.methods.image_pairs import AddiftTraining, ImageSlider
from trainyard.trainers.monitor.previews import PreviewSettings
from trainyard.trainers.monitor.validation import RESTORE_BEST, ImageValidationLoss, ValidationSettings
from trainyard.trainers.runs import RunFolder, to_finite_json
from trainyard.trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings, PointSettings, RunSettings

SMALL = dict(preview_every=2, sampling_steps=2, width=128, height=128, guidance=2.0)


class Vae:
    """Shows the first three channels, and pushes every model out of memory, as a large VAE does."""

    def decode(self, latent):
        mm.unload_all_models()
        return latent[:, :3].reshape(-1, 3, *latent.shape[-2:]).movedim(1, -1)


def looking(family="sd3", previews=None, vae=True, **settings):
    chosen = ValidationSettings(**{"every": 2, "images": 2, "levels": 2, "name_worst": 2, **settings})
    return MonitorConfig(
        chosen,
        PreviewSettings(**(previews or SMALL)),
        vae=Vae() if vae else None,
        positive=cond(family, 3),
        negative=cond(family, 4),
    )


def seen_job(family="sd3", look=None, model=None, **more):
    return dataclasses.replace(job(family, model, **more), monitoring=look or looking(family))


def last_live_run():
    return next(reversed(live.LIVE_RUNS.values()))


def run_folder(name="test"):
    (folder,) = paths.runs_folder().glob(f"{name}-*")
    return folder


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", ["sd3", "sdxl", "flux", "qwen"])
@pytest.mark.parametrize("checkpointing", ["off", "per block"])
def test_a_run_that_is_looked_at_is_the_same_run_and_its_model_is_left_as_it_was(folders, family, checkpointing):
    model = make(family, inference=True)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    plain, losses, _ = result(job(family, name="plain", steps=5, checkpointing=checkpointing))
    lora, seen_losses, line = result(seen_job(family, model=model, steps=5, checkpointing=checkpointing))
    assert seen_losses == losses and equal(lora, plain)
    assert "validation loss" in line and "highest loss: " in line
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    assert not mm.in_training and "forward" not in model.model.diffusion_model.__dict__
    assert [entry["step"] for entry in json.loads((run_folder() / "validation.json").read_text())] == [0, 2, 4, 5]


def test_samples_are_sheets_in_the_runs_folder_with_the_base_beside_them(folders):
    result(seen_job(steps=3))
    folder = run_folder() / "samples"
    assert sorted(f.name for f in folder.iterdir()) == ["base_00.png", "step000002.jpg", "step000003.jpg"]
    with Image.open(folder / "step000003.jpg") as sheet:
        assert sheet.width > 2 * 384
    assert state()["sample"] == "samples/step000003.jpg"


def test_the_base_is_drawn_once_and_kept_through_a_stop(folders, monkeypatch):
    result(seen_job(steps=3))
    strengths = []
    drawn = PreviewRenderer.render_images
    monkeypatch.setattr(
        PreviewRenderer, "render_images", lambda self, strength: strengths.append(strength) or drawn(self, strength)
    )
    result(seen_job(steps=5))
    assert strengths == [1.0, 1.0], "two sheets, at step 4 and 5"


def test_without_prompts_the_samples_show_captions_and_without_a_vae_they_are_rough(folders):
    look = MonitorConfig(ValidationSettings(every=0), PreviewSettings(**SMALL))
    result(seen_job("sdxl", look, steps=2))
    assert {f.name for f in (run_folder() / "samples").iterdir()} == {"base_00.png", "base_01.png", "step000002.jpg"}
    assert not (run_folder() / "validation.json").exists()


def test_a_sample_is_what_the_saved_file_draws(folders, monkeypatch):
    """The live adapter in the ordinary sampler, against the finished file in the host's own loader."""
    latents = []
    sampled = PreviewRenderer.sample_one_latent
    monkeypatch.setattr(
        PreviewRenderer, "sample_one_latent", lambda self, *rest: latents.append(sampled(self, *rest)) or latents[-1]
    )
    a_job = seen_job(steps=4, learning_rate=1e-2)
    lora, _, _ = result(a_job)
    p = a_job.monitoring.previews
    shape = preview_latent_shape(a_job.model, p, None, a_job.task.default_resolution())
    with torch.inference_mode():
        patched = host.lora_keys.apply_lora(make("sd3", inference=True), None, lora)[0]
        how = dict(steps=p.sampling_steps, guidance=2.0, sampler="euler", scheduler="normal")
        from_file = host.sampling.sample_latents(patched, cond("sd3", 3), cond("sd3", 4), shape, [0], **how)
        base = host.sampling.sample_latents(
            make("sd3", inference=True), cond("sd3", 3), cond("sd3", 4), shape, [0], **how
        )
    assert torch.allclose(latents[0], base, atol=1e-5), "the base column"
    assert not torch.allclose(from_file, base, atol=1e-3), "the LoRA does nothing, and the test proves nothing"
    assert torch.allclose(latents[-1], from_file, atol=1e-4), (latents[-1] - from_file).abs().max()


def test_after_the_sampler_the_model_is_ready_for_the_next_step(comfy):
    model = make("sd3", inference=True)
    with torch.inference_mode(), host.session.open_training_session(model, AdapterSettings(rank=4)) as session:
        patcher = session.denoiser.patcher
        with pytest.raises(ZeroDivisionError), switch_to_sampling(session):
            assert not mm.in_training and not torch.is_grad_enabled()
            patcher.cleanup()
            mm.unload_all_models()
            raise ZeroDivisionError
        assert mm.in_training and torch.is_grad_enabled() and patcher.model.current_patcher is patcher
        x = torch.randn(1, *family_latent("sd3")[1:], generator=torch.Generator().manual_seed(0))
        out = session.denoiser.denoise(
            x, torch.tensor([0.5]), [{"cross_attn": cond("sd3", 1)[0][0], **cond("sd3", 1)[0][1]}]
        )
        out.square().mean().backward()
        assert all(p.grad is not None for p in session.adapters.parameters() if p.requires_grad), (
            "the adapters are attached again"
        )


def test_trouble_in_a_preview_is_told_and_the_run_goes_on(folders, monkeypatch):
    monkeypatch.setattr(Vae, "decode", lambda self, latent: 1 / 0)
    plain, losses, _ = result(job(name="plain", steps=4))
    done = run(seen_job(steps=4))
    assert done.losses == losses and equal(done.lora, plain)
    assert [t["text"] for t in done.live_run.troubles] == [
        "No samples at step 2: division by zero",
        "No samples at step 4: division by zero",
    ]


def test_the_interrupt_in_a_preview_stops_the_run_and_keeps_it(folders, monkeypatch):
    def decode(self, latent):
        raise mm.InterruptProcessingException

    monkeypatch.setattr(Vae, "decode", decode)
    with pytest.raises(mm.InterruptProcessingException):
        result(seen_job(steps=4))
    assert (state()["step"], state()["why"], last_live_run().status) == (2, "stopped", "stopped")
    monkeypatch.undo()
    resumed = result(seen_job(steps=4))[0]
    assert equal(resumed, result(job(name="whole", steps=4))[0])


def test_an_early_end_is_a_finished_run_and_its_chart_comes_back(folders, monkeypatch):
    """Measurements that only rise: the first one after the start, at step 2, is the best; patience 2 ends the run at
    step 6."""
    rising = itertools.count(1)
    monkeypatch.setattr(
        ImageValidationLoss,
        "losses",
        lambda self, tick: torch.full((len(self.picks), self.levels), float(next(rising))),
    )
    look = looking(patience=2, best=RESTORE_BEST, previews={"preview_every": 0})
    done = run(seen_job(look=look, steps=30))
    assert (len(done.losses), done.lora.steps) == (6, 2)
    assert "6 of 30 steps, ended early" in done.line and "the weights of step 2 are the result" in done.line
    again = run(seen_job(look=look, steps=30))
    assert again.line.startswith("already trained") and again.losses == done.losses and equal(again.lora, done.lora)
    assert (
        again.live_run.losses == done.losses
        and again.live_run.validation == done.live_run.validation
        and again.live_run.status == "finished"
    )


def test_held_out_pictures_are_measured_and_may_not_be_trained_on(folders):
    latents = [
        {"samples": torch.randn(family_latent("sd3"), generator=torch.Generator().manual_seed(s))} for s in (31, 32)
    ]
    look = looking(previews={"preview_every": 0})
    look.held_out = EncodedDataset.from_core(latents, [cond("sd3", seed) for seed in (8, 9)])
    last = run(seen_job(look=look, steps=2)).live_run.validation[-1]
    assert last["held_out"] and last["training"] is not None
    trained = data()
    trained.items = [dataclasses.replace(item, path=f"/set/{item.id}.png") for item in trained.items]
    look.held_out = trained
    with pytest.raises(ValueError, match="3 of the 3 held-out images are also trained on, for example /set/0.png"):
        result(seen_job(look=look, steps=2, encoded=trained, name="both"))


def test_written_prompts_without_clip_are_refused_before_any_training(comfy):
    with pytest.raises(ValueError, match="no CLIP is connected to it. Connect CLIP, or empty the prompts"):
        Validation.execute(**{**widgets(), "prompts": "a red star"})


def test_a_sampler_from_a_link_is_checked_again(comfy):
    with pytest.raises(ValueError, match="sampler is 'magic'; choose one of euler"):
        Validation.execute(**{**widgets(), "sampler": "magic"})


def widgets():
    return {**ValidationSettings().to_dict(), **PreviewSettings().to_dict(), "sampler": "euler", "scheduler": "normal"}


def test_tensorboard_asked_for_and_missing_is_told_before_any_training(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match="Run: pip install tensorboard"):
        result(seen_job(look=looking(tensorboard=True)))
    assert last_live_run().losses == []


def test_the_paths_of_tensorboards_files_are_checked_before_any_training(folders, monkeypatch):
    asked = []

    def check(self, others=()):
        asked.append([path.parent.name for path in others])
        raise ValueError("seen enough")

    monkeypatch.setattr(RunFolder, "check_writable", check)
    for on in (True, False):
        with pytest.raises(ValueError, match="seen enough"):
            result(seen_job(look=looking(tensorboard=on)))
    assert asked == [["tensorboard"], []]


def test_two_runs_in_one_graph_and_one_node_in_two_workflows_do_not_mix():
    live.LIVE_RUNS.clear()
    one = live.start_live_run("5", {"workflow": '{"id": "w1"}'}, "a", "a-1", 10)
    two = live.start_live_run("6", {"workflow": '{"id": "w1"}'}, "b", "b-1", 10)
    other = live.start_live_run("5", {"workflow": '{"id": "w2"}'}, "c", "c-1", 10)
    assert (
        live.find_last_run("5", "w1") is one
        and live.find_last_run("6", "w1") is two
        and live.find_last_run("5", "w2") is other
    )
    assert live.find_last_run("7", "w1") is None and live.find_active_run("b-1") is two
    again = live.start_live_run("5", {"workflow": '{"id": "w1"}'}, "a", "a-1", 10)
    assert live.find_last_run("5", "w1") is again and again.run != one.run
    for i in range(2 * live.MAX_LIVE_RUNS):
        live.start_live_run(f"n{i}", {}, "x", "x", 1)
    assert len(live.LIVE_RUNS) == live.MAX_LIVE_RUNS
    live.LIVE_RUNS.clear()


def test_a_long_curve_is_thinned_to_means_and_nan_is_left_out():
    assert live.downsample_losses([1.0, 3.0, float("nan"), 5.0], 10, 2) == [[12, 2.0], [14, 5.0]]
    assert live.downsample_losses([1.0, 2.0], 0, 100) == [[1, 1.0], [2, 2.0]]
    assert to_finite_json({"a": [float("inf"), 1.5]}) == {"a": [None, 1.5]}
    json.dumps(to_finite_json([float("nan")]), allow_nan=False)


def test_the_page_is_told_everything_once_and_not_too_often(monkeypatch):
    import server

    told, seconds = [], [0.0]
    page = types.SimpleNamespace(client_id="me", send_sync=lambda event, news, client: told.append(news))
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    monkeypatch.setattr(live.time, "monotonic", lambda: seconds[0])
    one = live.LiveRun("5", "w", "p", "a", "a-1", 100, last_sent=-1.0)
    for step in range(1, 101):
        seconds[0] += 0.05
        one.report(TrainingProgress(step, 100, [1.0 / i for i in range(1, step + 1)], 1e-4, 1.0))
        if step % 10 == 0:
            one.add_event("validation", {"step": step, "loss": float("nan")})
    one.set_ended(live.FINISHED, "done")
    assert 10 < len(told) <= 5.0 / live.SEND_INTERVAL + 2
    assert (
        [point for news in told for point in news["losses"]]
        == one.full_state()["losses"]
        == [[i, 1.0 / i] for i in range(1, 101)]
    )
    assert [entry["step"] for news in told for entry in news["validation"]] == list(range(10, 101, 10))
    counts = [len(news["validation"]) for news in told]
    assert [news["before"]["validation"] for news in told] == [sum(counts[:i]) for i in range(len(counts))]
    assert (told[-1]["status"], told[-1]["text"]) == ("finished", "done")
    json.dumps(told, allow_nan=False)


def test_the_model_of_a_run_is_the_file_behind_it():
    prompt = {
        "1": {"inputs": {"ckpt_name": "toy.safetensors"}},
        "2": {"inputs": {"model": ["1", 0], "shift": 3.0}},
        "5": {"inputs": {"model": ["2", 0]}},
    }
    assert live.find_model_file({"prompt": json.dumps(prompt)}, "5") == "toy.safetensors"
    assert live.find_model_file({}, "5") == ""


@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_sliders_draw_samples_too(folders, strength):
    look = MonitorConfig(ValidationSettings(), PreviewSettings(**{**SMALL, "strength": strength}), vae=Vae())
    done = run(dataclasses.replace(pair_job(ImageSlider), monitoring=look))
    plain = run(pair_job(ImageSlider, name="plain")).losses
    assert done.losses == plain and [sample["step"] for sample in done.live_run.samples] == [2, 4]
    assert [entry["where"] for entry in done.live_run.validation] == ["on fixed training pairs"] * 2


@pytest.mark.parametrize("method, patience", [(ImageSlider, 2), (AddiftTraining, 0)])
def test_held_out_pairs_are_measured_and_the_best_weights_come_back(folders, method, patience):
    """A learning rate that overshoots: the slider ends two measurements after its best."""
    look = looking(previews={"preview_every": 0}, best=RESTORE_BEST, patience=patience, name_worst=1)
    look.held_out = pairs("sd3")
    a_job = pair_job(method, steps=30 if patience else 10, learning_rate=5.0)
    done = run(dataclasses.replace(a_job, monitoring=look))
    lora, losses, history = done.lora, done.losses, done.live_run.validation
    best = min(history[1:], key=lambda entry: entry["loss"])
    assert history[-1]["held_out"] and history[-1]["training"] is not None and history[-1]["noun"] == "pairs"
    assert lora.steps == best["step"] and "against training pairs" in done.line
    assert ("ended early" in done.line and lora.steps < len(losses) < 30) if patience else len(losses) == 10
    short = run(pair_job(method, name="short", steps=best["step"], learning_rate=5.0)).lora
    assert equal(short, lora)


def test_held_out_pictures_that_are_no_pairs_are_refused(folders):
    a_job = dataclasses.replace(pair_job(ImageSlider), monitoring=MonitorConfig(held_out=data()))
    with pytest.raises(ValueError, match="belongs to no pair. Put Image Pairs between Load Dataset and Encode Dataset"):
        run(a_job)


class Prompted(leco.PromptDifferenceTask):
    """Train LECO with prompts that are encoded already."""

    def check(self, job): ...

    def fingerprint_parts(self, job):
        return self.slider, self.points, self.place

    def encode_prompts(self, job):
        return {
            text: {"cross_attn": tensor, **extras}
            for seed, text in enumerate(self.list_texts(job))
            for tensor, extras in [cond("sd3", seed)[0]]
        }


def prompt_job(points="rollout", looking=None, data=None, **run):
    row = PromptRow("cat", None, "", None, "erase", 1.0, preserve=("dog",))
    points_settings = PointSettings(points=points, sampling_steps=4, ways=2)
    return TrainingJob(
        task=Prompted(
            rows=(row,), slider=False, points=points_settings, place=PlaceSettings(resolution=128), data=data
        ),
        model=make("sd3", inference=True),
        adapter=AdapterSettings(rank=4),
        run=RunSettings(**{"steps": 4, "learning_rate": 1e-3, "batch": 1, "seed": 1, "save_every": 0, **run}),
        optimizing=OptimizerSettings(),
        noise=NoiseSettings(),
        name=f"leco {points} {bool(looking)}",
        checkpointing="off",
        graph={},
        node_id=None,
        monitoring=looking,
    )


@pytest.mark.parametrize("points, steps", [("rollout", 40), ("pictures", 5), ("noise", 5)])
def test_a_leco_says_at_its_start_and_at_its_end_how_many_forwards_were_planned(folders, monkeypatch, points, steps):
    """Of images and noise the plan is what tasks are drawn by chance around; of ways it is what is expected."""
    shown = []
    monkeypatch.setattr(host.progress, "show_node_text", lambda line, node_id=None: shown.append(line))
    done = run(prompt_job(points, data=data() if points == "pictures" else None, steps=steps))
    spent = sum(done.built.student.forward_counts.values()) / steps
    planned = sum(done.built.planned_forwards().values())
    cost = format_forward_counts(done)
    assert shown[0].startswith(f"forwards per step: {planned:.1f} (") and shown[0].endswith("student) planned")
    assert f"{spent:.1f} (" in cost and cost.endswith(f", {planned:.1f} planned")
    assert planned == pytest.approx(spent, rel=0.25)


@pytest.mark.parametrize("points", ["rollout", "pictures", "noise"])
def test_a_leco_is_measured_at_fixed_points_and_is_the_same_run(folders, points):
    encoded = data() if points == "pictures" else None
    look = looking(previews={"preview_every": 0}, levels=3)
    plain, losses, _ = result(prompt_job(points, data=encoded))
    done = run(prompt_job(points, look, encoded))
    assert done.losses == losses and equal(plain, done.lora)
    history = done.live_run.validation
    assert [(entry["step"], entry["where"], len(entry["bins"])) for entry in history] == [
        (0, "at fixed points", 3),
        (2, "at fixed points", 3),
        (4, "at fixed points", 3),
    ]
    assert "at fixed points" in done.line and done.built.student.forward_counts["student"] == 4, (
        "what is asked is no cost of the training"
    )


def test_held_out_pictures_of_a_leco_without_pictures_are_refused(folders):
    look = looking()
    look.held_out = data()
    with pytest.raises(
        ValueError, match="trains on prompts alone.*Disconnect held_out; fixed points of the model's own are measured"
    ):
        run(prompt_job(looking=look))


# -- what the page asks ------------------------------------------------------------------------------------------------


def test_the_list_tells_of_runs_on_the_disk_and_at_work(folders):
    live.LIVE_RUNS.clear()
    result(seen_job(steps=2, look=looking(previews={"preview_every": 2, "sampling_steps": 1, "width": 64})))
    live.start_live_run("9", {}, "fresh", "fresh-1", 50)
    fresh, done = run_routes.list_all_runs()
    assert (fresh["name"], fresh["status"], fresh["step"], fresh["steps"], fresh["bytes"]) == (
        "fresh",
        "training",
        0,
        50,
        0,
    )
    assert (done["name"], done["status"], done["step"], done["lora"], done["sample"]) == (
        "test",
        "finished",
        2,
        "test.safetensors",
        "samples/step000002.jpg",
    )
    assert done["bytes"] > 10_000 and done["loss"] > 0 and done["validation"]["step"] == 2
    json.dumps([fresh, done], allow_nan=False)
    live.LIVE_RUNS.clear()


def test_a_run_at_work_is_not_deleted_and_a_finished_one_is(folders):
    live.LIVE_RUNS.clear()
    result(job(steps=1))
    name = run_folder().name
    busy = live.start_live_run("1", {}, "test", name, 5)
    with pytest.raises(ValueError, match="is training. Stop it first"):
        run_routes.delete_saved_run(name)
    busy.set_ended(live.STOPPED, "")
    assert run_routes.delete_saved_run(name)["freed"] > 0 and not list(paths.runs_folder().glob("[!.]*"))
    live.LIVE_RUNS.clear()


def test_a_run_keeps_the_graph_that_made_it(folders):
    graph = {"workflow": json.dumps({"id": "w", "nodes": []}), "prompt": json.dumps({"1": {}})}
    result(dataclasses.replace(job(steps=1), graph=graph))
    assert run_routes.read_run_graph(run_folder().name) == {"workflow": {"id": "w", "nodes": []}, "prompt": {"1": {}}}
    with pytest.raises(ValueError, match="is not a run"):
        run_routes.read_run_graph("../../test")


def test_the_routes_answer_on_the_real_server_and_refuse_what_is_no_run(server):
    secret = server.output("loras", "secret")
    secret.mkdir(parents=True, exist_ok=True)
    (secret / "run.json").write_text("{}")
    runs = server.get("/trainyard/runs")
    assert runs == server.get("/api/trainyard/runs")
    assert {run["file"].split("/")[0] for run in runs} <= {"trainyard"} and "secret" not in {
        run["folder"] for run in runs
    }
    assert server.get("/trainyard/runs/77?workflow=none") == {}
    for name in ("nothing", "..%2Fsecret", "%2e%2e%2fsecret", "%2Fetc", "x%00"):
        status, body = server.post(f"/trainyard/runs/{name}/delete")
        assert status in (400, 403, 404), (name, status, body)
    assert (secret / "run.json").exists()


def test_samples_are_as_large_as_asked_then_as_the_pictures_then_as_what_is_trained():
    model = make("sd3", inference=True)
    size = lambda settings, data=None, **more: preview_latent_shape(model, PreviewSettings(**settings), data, **more)[
        -2:
    ]
    assert size({"width": 128, "height": 256}, side=64) == (32, 16)
    assert size({}, data("sd3"), side=1024) == data("sd3").items[0].shape[-2:]
    assert size({}, side=1024) == (128, 128) and size({}, side=job("sd3").task.default_resolution()) == (64, 64)


def test_weights_that_wait_in_the_cpus_memory_wait_there_after_samples_too():
    """The sampler loads the whole model, because it fits beside a sampling step."""
    with (
        torch.inference_mode(),
        host.session.open_training_session(
            make("sd3", inference=True), AdapterSettings(rank=4), checkpointing=PLAN_OFFLOADED
        ) as session,
    ):
        patcher = session.denoiser.patcher
        before = patcher.loaded_size()
        with switch_to_sampling(session):
            mm.load_models_gpu([patcher])
            assert patcher.loaded_size() > before
        assert patcher.loaded_size() == before
