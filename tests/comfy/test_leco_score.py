"""LECO-score on ComfyUI's own classes: right gradients through the graded step, the base bit-identical, runs that go on
and are found again, and what is refused before the long work."""

import dataclasses
import json

import comfy.model_patcher
import comfy.sd
import pytest
import torch
from trainyard.nodes import host, paths
from trainyard.nodes.scores import feature_extractors, latents
from trainyard.nodes.train import leco_score as nodes
from trainyard.nodes.train.job import TrainingJob
from trainyard.nodes.train.leco_score import (
    LecoScoreOptions,
    LecoScoreTask,
    LoadSignedPrompts,
    ScoreMixer,
    TrainLecoScore,
    WatchSettings,
)
from trainyard.nodes.train.run import format_forward_counts
from trainyard.nodes.train.validation import MonitorConfig
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import cond, latent_shape, make
from trainyard.tests.comfy.test_host import RANK_4, fingerprint, shake
from trainyard.tests.comfy.test_previews import Vae
from trainyard.tests.comfy.test_quality import encoder
from trainyard.tests.comfy.test_train_lora import result, run, with_task
from trainyard.tests.toy import world
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.data.signed_prompts import SignedPrompt
from trainyard.trainers.loop import step_rng
from trainyard.trainers.methods.leco_score import (
    SCORE_TARGETS,
    LecoScoreSettings,
    LecoScoreTraining,
    NoisedImageStates,
    RolloutStates,
    build_score_tasks,
)
from trainyard.trainers.methods.rollouts import StudentTeacherModel
from trainyard.trainers.monitor.previews import PreviewSettings
from trainyard.trainers.monitor.validation import ValidationSettings
from trainyard.trainers.scores.aesthetic_heads import AestheticHead, AestheticMLP
from trainyard.trainers.scores.files import write_score_model
from trainyard.trainers.scores.networks import (
    MODEL_FEATURES,
    PRETRAINING_TASK,
    LatentResNet,
    ScoreModelInfo,
    Scorer,
    ScorerEnsemble,
    call_with_seed,
)
from trainyard.trainers.settings import (
    ADAPTER_ALGORITHMS,
    AdapterSettings,
    NoiseSettings,
    OptimizerSettings,
    RunSettings,
)

FAMILIES = ("sd15", "sdxl", "sd3", "flux")
ROWS = (SignedPrompt("a cat"), SignedPrompt("an ugly cat", -1.0), SignedPrompt("a dog", 0.0))
QUICK = dict(sampling_steps=3, ways=1, refresh=2, guidance_scale=2.0)


class Clip:
    """A text encoder of a family: another conditioning for each prompt."""

    layer_idx = None

    def __init__(self, family):
        self.family = family
        with torch.inference_mode(False):
            self.cond_stage_model = torch.nn.Linear(2, 2).requires_grad_(False)
            self.cond_stage_model.weight.fill_(1.0), self.cond_stage_model.bias.fill_(0.0)
            self.patcher = comfy.model_patcher.ModelPatcher(
                self.cond_stage_model, torch.device("cpu"), torch.device("cpu")
            )

    def tokenize(self, text):
        return {"l": [[text]] * (2 if "endless" in text else 1)}

    def encode_from_tokens_scheduled(self, tokens, show_pbar=False):
        return cond(self.family, seed=sum(map(ord, tokens["l"][0][0])))


def judge(model, seed=1, **about):
    """A score model of random weights for the latents of a MODEL."""
    channels = model.model.latent_format.latent_channels

    def drawn():
        scorer = Scorer(LatentResNet(channels, 8, 1), 1)
        for block in scorer.trunk.blocks:
            torch.nn.init.normal_(block.second.weight, std=0.1)
            torch.nn.init.normal_(block.film.layer.weight, std=0.1)
        return scorer.eval().requires_grad_(False)

    return ScorerEnsemble(
        [call_with_seed(seed, drawn)],
        ScoreModelInfo(
            **{
                "channels": channels,
                "latent_format": latents.latent_format_name(model),
                "width": 8,
                "depth": 1,
                **about,
            }
        ),
    )


def images(family) -> EncodedDataset:
    samples = [
        {"samples": torch.randn(latent_shape(family), generator=torch.Generator().manual_seed(seed))}
        for seed in range(2)
    ]
    return EncodedDataset.from_core(samples, [cond(family, seed) for seed in range(2)])


def job(
    family="sd3",
    model=None,
    score=None,
    name="score",
    settings=None,
    held_out=None,
    rows=ROWS,
    data=None,
    watch_every=2,
    patience=2,
    calibrate="off",
    **run,
):
    model = model or make(family, inference=True)
    task = LecoScoreTask(
        prompts=rows,
        scores=((score or judge(model), 1.0),),
        held_out=held_out,
        data=data,
        settings=LecoScoreSettings(**{**QUICK, **(settings or {})}),
        monitor_settings=WatchSettings(watch_every=watch_every, patience=patience),
        place=nodes.ScorePlace(resolution=64),
    )
    return TrainingJob(
        task=task,
        model=model,
        clip=Clip(family),
        adapter=AdapterSettings(rank=4),
        optimizing=OptimizerSettings(),
        noise=NoiseSettings(),
        name=name,
        run=RunSettings(**{"steps": 4, "learning_rate": 1e-3, "batch": 1, "seed": 1, "save_every": 0, **run}),
        checkpointing="off",
        graph={},
        node_id=None,
        calibrate=calibrate,
    )


# -- the method on the families' own classes ---------------------------------------------------------------------------


def method_of(session, family, model, target):
    settings = LecoScoreSettings(**{**QUICK, "target": target, "balance": False, "adjust": False, "anchor": 2.0})
    clip = Clip(family)
    student = StudentTeacherModel(
        session.denoiser,
        session.adapters,
        {text: host.encoders.encode_caption(clip, text) for text in ("", *(row.prompt for row in ROWS))},
    )
    scores = [(nodes.copy_score_for_training(judge(model), session), 1.0)]
    if target == "direct_align":
        return LecoScoreTraining(student, scores, NoisedImageStates(student, images(family), settings, 2), settings)
    return LecoScoreTraining(
        student,
        scores,
        RolloutStates(student, build_score_tasks(ROWS[:1], [latent_shape(family)[1:]], 2, settings), settings, 2.0),
        settings,
    )


@pytest.mark.parametrize("target", [target for target in SCORE_TARGETS if target != "draft_lv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_the_step_are_those_of_finite_differences_and_the_base_is_left_alone(family, target):
    """One graded place, judged again and again; draft_lv's start is a state of the way and has no gradient."""
    model = make(family, inference=True)
    before = fingerprint(model)
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
        shake(session.adapters, size=0.02)
        method = method_of(session, family, model, target)
        place = method.state_source.draw(step_rng(0, 0))
        method.state_source = type("Given", (), {"draw": lambda self, rng: place})()
        loss = lambda: method.loss(step_rng(0, 1)).sum()
        params = method.parameters()
        size, direction = host.checks.gradient_norm_and_direction(loss, params)
        errors = [
            abs(host.checks.central_difference(loss, params, direction, step) / size - 1) for step in (3e-2, 1e-2, 3e-3)
        ]
        assert session.adapters.strength == 1.0
    assert min(errors) < 0.03, f"{family}, {target}: off by {min(errors):.1%}"
    assert fingerprint(model) == before, "the base weights have changed"


@pytest.mark.parametrize("target", SCORE_TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_give_the_same_step(family, target):
    found = []
    for checkpointing in ("off", "per block"):
        model = make(family, inference=True)
        with (
            torch.inference_mode(),
            host.session.open_training_session(model, RANK_4, checkpointing=checkpointing) as session,
        ):
            shake(session.adapters, size=0.02)
            loss = method_of(session, family, model, target).loss(step_rng(0, 0))
            loss.sum().backward()
            grads = [
                torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in session.adapters.parameters()
            ]
            found.append((loss.detach().clone(), torch.cat(grads).clone()))
    (a, first), (b, second) = found
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert first.norm() > 0 and float((first - second).norm() / first.norm()) < 1e-4


def test_a_score_model_made_under_inference_mode_is_lent_and_comes_back_as_it_was():
    with torch.inference_mode():
        model = make("sd15", inference=True)
        score = judge(model)
        before = [p.clone() for p in score.networks[0].parameters()]
        with host.session.open_training_session(model, RANK_4) as session:
            borrowed = nodes.copy_score_for_training(score, session)
            x = torch.randn(1, 4, 8, 8, requires_grad=True)
            borrowed.mean_score(x, torch.tensor([0.3])).sum().backward()
        assert x.grad.abs().sum() > 0 and borrowed.networks[0] is not score.networks[0]
        assert all(torch.equal(a, b) for a, b in zip(score.networks[0].parameters(), before, strict=True))


def looking(model):
    """A score model that looks through the MODEL itself."""
    about = ScoreModelInfo(
        backbone=MODEL_FEATURES,
        channels=model.model.latent_format.latent_channels,
        latent_format=latents.latent_format_name(model),
        width=8,
    )
    with torch.inference_mode(False):
        network = (
            call_with_seed(1, lambda: Scorer(feature_extractors.make_trunk_factory(model)(about), 1))
            .eval()
            .requires_grad_(False)
        )
    return ScorerEnsemble([network], about)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_score_model_that_looks_through_the_model_in_training_sees_it_as_it_was(family):
    with torch.inference_mode():
        model = make(family, inference=True)
        score = looking(model)
        before = fingerprint(model)
        with host.session.open_training_session(model, RANK_4) as session:
            judge_ = nodes.copy_score_for_training(score, session)
            x, level = torch.randn(latent_shape(family)), torch.tensor([0.3])
            plain = judge_.mean_score(x, level)
            shake(session.adapters, size=0.5)
            assert torch.allclose(judge_.mean_score(x, level), plain, atol=1e-5) and not torch.allclose(
                score.mean_score(x, level), plain, atol=1e-3
            )
            x.requires_grad_()
            judge_.mean_score(x, level).sum().backward()
            assert x.grad.abs().sum() > 0
        assert score.networks[0].trunk.excluded_adapters is None and fingerprint(model) == before


def test_a_run_under_a_score_model_that_looks_through_the_model(folders):
    with torch.inference_mode():
        model = make("sd3", inference=True)
        before = fingerprint(model)
        lora, losses, _ = result(job(model=model, score=looking(model)))
        assert lora and len(losses) == 4 and fingerprint(model) == before


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd3_noclip")), output_clip=False)[2]


def test_a_run_under_an_aesthetic_head_decodes_and_leaves_vae_and_clip_vision_alone(folders, vae, monkeypatch):
    """Images are decoded and rated at every step, and the adapters learn from it; another head is another run."""
    heads = [
        AestheticHead(AestheticMLP([(torch.randn(1, 24, generator=step_rng(0, seed)) * 20, torch.tensor([5.0]))]))
        for seed in range(2)
    ]
    sight = encoder()
    before = [
        {name: value.clone() for name, value in patcher.model.state_dict().items()}
        for patcher in (vae.patcher, sight.patcher)
    ]
    with torch.inference_mode():
        model = make("sd3", inference=True)
        base = fingerprint(model)
        with torch.inference_mode(False):
            scores = [feature_extractors.ImageScoreModel(head, sight, "head.pth", vae, "SD3", 16) for head in heads]
        made = job(model=model, score=scores[0], held_out=scores[1], settings={"target": "x0"})
        needed = made.task.extra_memory(made)
        asked, open_session = [], host.session.open_training_session
        monkeypatch.setattr(
            host.session,
            "open_training_session",
            lambda *args, **how: asked.append(how["memory"]) or open_session(*args, **how),
        )
        done = run(made)
        lora, losses, plain = done.lora, done.losses, job(model=model)
        assert (
            needed > 2 * (vae.patcher.model_size() + sight.patcher.model_size())
            and asked[0] > needed > plain.task.extra_memory(plain) == 0
        )
        assert job(model=model, score=scores[0]).fingerprint() != job(model=model, score=scores[1]).fingerprint()
    assert lora and len(losses) == 4 and fingerprint(model) == base
    after = [patcher.model.state_dict() for patcher in (vae.patcher, sight.patcher)]
    assert all(
        torch.equal(now[name], value) for was, now in zip(before, after, strict=True) for name, value in was.items()
    )


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_ends_in_a_file_with_what_was_seen_and_leaves_model_and_score_alone(folders, family):
    with torch.inference_mode():
        model = make(family, inference=True)
        score = judge(model)
        before, judged = fingerprint(model), [p.clone() for p in score.networks[0].parameters()]
        done = run(job(family, model, score, calibrate="after training"))
        lora = done.lora
        assert lora and len(done.losses) == 4 and "4 steps" in done.line and "rollout" in format_forward_counts(done, 4)
        assert fingerprint(model) == before and all(
            torch.equal(a, b) for a, b in zip(score.networks[0].parameters(), judged, strict=True)
        )
    looks = json.loads(lora.metadata["trainyard.looks"])
    assert [look["step"] for look in looks] == [0, 2, 4] and looks[0]["score"] == 0.0 and looks[0]["drift"] == 0.0
    curve = json.loads(lora.metadata["trainyard.curve"])
    assert (
        curve["strengths"] == list(nodes.SCORE_CURVE_STRENGTHS)
        and curve["effect"][0] == 0.0
        and curve["unit"] == nodes.SCORE_UNIT
    )
    assert curve["effect"][4] == pytest.approx(looks[-1]["score"], abs=0.1), (
        "strength 1 of the curve is what the last look saw, of its first prompt"
    )


def test_a_run_that_is_continued_is_the_same_run(folders):
    with torch.inference_mode():
        whole, losses, _ = result(job(name="whole"))
        result(job(name="parts", steps=2))
        parts, same, _ = result(job(name="parts"))
    assert losses == same and all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("kind", ADAPTER_ALGORITHMS)
def test_a_run_of_every_kind_of_adapter_with_an_average_that_is_continued_is_the_same_run(folders, kind):
    """The average of the adapters (ema) is what is looked at and delivered, and it is resumed with the run."""
    more = dict(adapter=AdapterSettings(rank=2, algorithm=kind, factor=4), optimizing=OptimizerSettings(ema=0.9))
    with torch.inference_mode():
        made = [
            dataclasses.replace(job(name=f"{kind}-{name}", steps=steps), **more)
            for name, steps in (("whole", 4), ("parts", 2), ("parts", 4))
        ]
        whole, _, parts = [run(one) for one in made]
        bare = result(dataclasses.replace(job(name=f"{kind}-bare"), adapter=more["adapter"]))[0]
    looks = [one.built.score_monitor.measurements for one in (whole, parts)]
    assert whole.losses == parts.losses and all(torch.equal(whole.lora[key], parts.lora[key]) for key in whole.lora)
    assert [look.step for look in looks[1]] == [0, 2, 4] and looks[0] == looks[1]
    whole = whole.lora
    sizes = [
        sum(float(lora[key].double().square().sum()) for key in lora if "alpha" not in key) for lora in (whole, bare)
    ]
    assert sizes[0] != sizes[1], "an average is not the last step"


def test_an_adapter_that_has_no_opposite_is_refused_for_a_slider_only(folders):
    model = make("sd3", inference=True)
    settings = (LecoScoreSettings(**QUICK), WatchSettings())
    lora = train_node(model, adapter=AdapterSettings(algorithm="DoRA"), settings=settings, steps=1, calibrate="off")[0]
    assert any(key.endswith("dora_scale") for key in lora)
    with pytest.raises(ValueError, match="algorithm is DoRA, whose effect at -1 is not the opposite"):
        train_node(
            model,
            adapter=AdapterSettings(algorithm="DoRA"),
            settings=(LecoScoreSettings(**QUICK, slider=True), WatchSettings()),
        )


def test_a_run_that_fools_its_score_model_ends_with_the_adapters_of_its_best_moment(folders):
    """Held out is the trained score with the opposite sign: of the moments after training began the first is the
    best."""
    with torch.inference_mode():
        model = make("sd3", inference=True)
        score, opposite = judge(model), judge(model)
        opposite.networks[0].head[-1].weight.neg_()
        opposite.networks[0].head[-1].bias.neg_()
        fooling = dict(model=model, score=score, held_out=opposite, rows=ROWS[:1], steps=60, learning_rate=2e-2)
        fooling |= dict(watch_every=4, settings={"target": "x0", "anchor": 0.0})
        lora, losses, _ = result(job(**fooling, calibrate="after training"))
        again, same, line = result(job(**fooling))
    assert (
        len(losses) < 60
        and "the adapters of step 4 are kept" in lora.metadata[nodes.MONITOR_METADATA_KEY]
        and lora.metadata["ss_steps"] == "4"
    )
    assert {"trainyard.curve", "trainyard.curve.held_out"} <= set(lora.metadata)
    assert "already trained" in line and same == losses and all(torch.equal(lora[key], again[key]) for key in lora)


def test_two_score_models_that_differ_are_two_runs(folders):
    model = make("sd3")
    prints = {job(model=model, score=judge(model, seed)).fingerprint() for seed in (1, 2)}
    assert len(prints | {job(model=model, score=judge(model, 1), held_out=judge(model, 3)).fingerprint()}) == 3


# -- the nodes ---------------------------------------------------------------------------------------------------------


def run_node(kind, **inputs):
    with torch.inference_mode():
        return kind.PREPARE_CLASS_CLONE(None).execute(**inputs).args


def train_node(model, **changes):
    widgets = dict(prompts_text="a cat\n-1 | an ugly "
                                "cat", target="x0_renoised", resolution=64, steps=3, learning_rate=1e-3, rank=4, run_name="mine",
                   batch=1, seed=1, save_every=0, checkpointing="off", calibrate="after training")  # fmt: skip
    settings = run_node(LecoScoreOptions, **{**LecoScoreSettings(**QUICK).to_dict(), "watch_every": 2, "patience": 2})[
        0
    ]
    return run_node(
        TrainLecoScore,
        **{
            "model": model,
            "clip": Clip("sd3"),
            "score_model": judge(model),
            "settings": settings,
            **widgets,
            **changes,
        },
    )


def test_the_node_gives_a_lora_its_losses_the_model_a_report_and_previews_and_reads_them_again(folders):
    model = make("sd3", inference=True)
    lora, losses, patched, report, previews = train_node(model)
    assert (
        len(losses["loss"]) == 3
        and patched is not model
        and len(patched.patches) == len(host.lora_keys.list_lora_layers(lora))
    )
    assert (
        "3 steps" in report
        and "step 2: score" in report
        and "score by strength, in standard deviations of the ratings" in report
    )
    assert previews["samples"].shape == (3 * 2, 16, 8, 8), "steps 0, 2 and 3 of two prompts"
    again, _, _, text, shown = train_node(model)
    assert (
        "already trained" in text
        and "step 2: score" in text
        and all(torch.equal(lora[key], again[key]) for key in lora)
    )
    assert torch.equal(shown["samples"], previews["samples"])


def test_the_original_recipe_takes_a_score_model_of_clean_pictures(folders):
    model = make("sd3", inference=True)
    _, losses, _, report, _ = train_node(
        model, target="original recipe", score_model=judge(model, noisy=False), steps=1, calibrate="off"
    )
    assert len(losses["loss"]) == 1 and "frozen" not in report


def test_several_scores_are_chained_and_trained_on(folders):
    model = make("sd3", inference=True)
    (mix,) = run_node(ScoreMixer, score_model=judge(model, 2), weight=0.5)
    (mix,) = run_node(ScoreMixer, score_model=judge(model, 3), weight=-0.25, more_scores=mix)
    assert [weight for _, weight in mix] == [0.5, -0.25]
    one, two = (
        train_node(model, steps=1, calibrate="off", run_name=name, more_scores=more)[0]
        for name, more in (("one", None), ("two", mix))
    )
    assert any(not torch.equal(one[key], two[key]) for key in one)


def test_direct_align_learns_on_encoded_pictures(folders):
    model = make("sd3", inference=True)
    _, losses, _, report, _ = train_node(model, target="direct_align", encoded=images("sd3"), steps=2, calibrate="off")
    assert len(losses["loss"]) == 2 and "rollout" not in report


def test_a_slider_is_measured_both_ways(folders):
    with torch.inference_mode():
        lora, _, _ = result(job(settings={"slider": True}, steps=2, calibrate="after training"))
    assert json.loads(lora.metadata["trainyard.curve"])["strengths"] == list(nodes.SLIDER_CURVE_STRENGTHS)


def test_signed_prompts_come_from_a_text_a_list_of_texts_or_a_file(folders):
    text = dict(file=[paths.NO_PROMPT_FILE], text=["a cat", "-1 | an ugly cat"], count=[0], seed=[0])
    rows, said = run_node(LoadSignedPrompts, **text)
    assert (
        rows == (SignedPrompt("a cat"), SignedPrompt("an ugly cat", -1.0))
        and said == "better (1): a cat\nworse (-1): an ugly cat"
    )
    (folders / "input" / "parti.tsv").write_text(
        "Prompt\tCategory\nan owl\tAnimals\na fox\tAnimals\n", encoding="utf-8"
    )
    rows, _ = run_node(LoadSignedPrompts, **{**text, "file": ["input/parti.tsv"], "count": [1]})
    assert len(rows) == 1 and rows[0].prompt in ("an owl", "a fox")


# -- refused before the long work --------------------------------------------------------------------------------------


def rates_images():
    return feature_extractors.ImageScoreModel(
        AestheticHead(AestheticMLP([(torch.zeros(1, 24), None)])), encoder(), "head.pth"
    )


@pytest.mark.parametrize(("change", "says"), [
    (lambda j: with_task(j, scores=((judge(make("sd15")), 1.0),)), r"reads latents of SD15 \(4 channels\), and these are of SD3 \(16 channels\)"),
    (lambda j: with_task(j, held_out=judge(make("sd15"))), "reads latents of SD15"),
    (lambda j: with_task(j, scores=((judge(j.model, noisy=False), 1.0),)), "was trained on clean images only"),
    (lambda j: with_task(j, scores=((judge(j.model, trained=False), 1.0),)), "is not better than chance"),
    (lambda j: with_task(j, scores=((judge(j.model, task=PRETRAINING_TASK), 1.0),)), "pre-trained backbone .* Connect "
                                                                                      "it to Train Score Model as "
                                                                                      "pretrained"),
    (lambda j: with_task(j, held_out=judge(j.model, task=PRETRAINING_TASK)), "pre-trained backbone"),
    (lambda j: with_task(j, scores=((rates_images(), 1.0),)), "scores images, but LECO-Score needs scores of "
                                                                 "latents. Connect model and vae"),
    (lambda j: with_task(j, prompts=()), "There are no prompts. Write one a line into prompts_text"),
    (lambda j: with_task(j, prompts=(SignedPrompt("endless"),)), "it would be cut into 2 pieces"),
    (lambda j: dataclasses.replace(j, clip=None), "CLIP is empty"),
    (lambda j: with_task(j, data=images("sd3")), "target is 'x0_renoised', which needs none. Choose 'direct_align'"),
    (lambda j: with_task(j, settings=LecoScoreSettings(target="direct_align")), "trains on your own images, and "
                                                                                 "none are connected"),
    (lambda j: with_task(j, settings=LecoScoreSettings(anchor=0.0)), "'a dog' has weight 0"),
    (lambda j: with_task(j, settings=LecoScoreSettings(relative=0.1, good_words="nice", bad_words="poor")), "reads text: good and bad words give the same score"),
])  # fmt: skip
def test_what_cannot_work_is_told_before_anything_is_loaded(folders, monkeypatch, change, says):
    made = change(job())
    monkeypatch.setattr(host.session, "open_training_session", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(host.encoders, "TextEncoder", lambda *_: pytest.fail("the text encoder was loaded"))
    with pytest.raises(ValueError, match=says):
        result(made)


def test_prompts_of_two_places_are_refused(folders):
    with pytest.raises(ValueError, match="prompts_text holds 'a cat', and prompts are connected too"):
        train_node(make("sd3"), prompts=ROWS)


def test_the_text_encoder_is_not_trained(folders):
    with pytest.raises(ValueError, match="text_encoder is on"):
        train_node(make("sd3"), adapter=dataclasses.replace(AdapterSettings(), text_encoder=True))


# -- on the server -----------------------------------------------------------------------------------------------------


def test_on_the_server_a_score_model_and_prompts_become_a_lora_and_previews(server, tmp_path):
    checkpoint = server.add_model("checkpoints", world.cached())
    about = ScoreModelInfo(channels=16, latent_format="SD3", width=8, depth=1)
    network = call_with_seed(1, lambda: Scorer(LatentResNet(16, 8, 1), 1))
    write_score_model(tmp_path / "likes.safetensors", ScorerEnsemble([network], about))
    score = server.add_model("score_models", tmp_path / "likes.safetensors")
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}
    settings = {**LecoScoreSettings(**QUICK).to_dict(), "watch_every": 2, "patience": 2}
    del settings["target"]
    run = server.run({
        "model": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "score": node("TrainyardLoadScoreModel", file=score),
        "prompts": node("TrainyardLoadSignedPrompts", file=paths.NO_PROMPT_FILE, text="a red circle\n-1 | a blue "
                                                                                      "square\n0 | a "
                                                                                      "cross", count=0, seed=0),
        "settings": node("TrainyardLecoScoreSettings", **settings),
        "train": node("TrainyardTrainLecoScore", model=["model", 0], clip=["model", 1], score_model=["score", 0], prompts_text="",
                      target="x0_renoised", resolution=64, steps=3, learning_rate=1e-3, rank=2, run_name="likes", batch=1, seed=0, save_every=0,
                      checkpointing="off", calibrate="off", prompts=["prompts", 0], settings=["settings", 0]),
        "save": node("TrainyardSaveLora", lora=["train", 0], name="likes", model=["model", 0]),
        "decode": node("VAEDecode", samples=["train", 4], vae=["model", 2]),
        "image": node("SaveImage", images=["decode", 0], filename_prefix="previews"),
    })  # fmt: skip
    assert run.ok, run.why
    assert "step 2: score" in json.dumps(run.outputs["train"]) and len(run.outputs["image"]["images"]) == 3 * 2


def test_validation_and_previews_draws_samples_and_watches_the_held_out_score(folders):
    """Samples by the ordinary sampler, looks as measurements, and the run that it would have been."""
    model = make("sd3", inference=True)
    second = judge(model, seed=2)
    with torch.inference_mode():
        plain, losses, _ = result(job(model=model, held_out=second, name="plain"))
        look = MonitorConfig(
            ValidationSettings(every=1),
            PreviewSettings(preview_every=4, sampling_steps=1, width=64, height=64),
            vae=Vae(),
        )
        a_job = dataclasses.replace(job(model=model, held_out=second), monitoring=look)
        done = run(a_job)
    assert done.losses == losses and all(torch.equal(plain[k], done.lora[k]) for k in plain)
    seen = done.built.score_monitor.measurements
    assert [entry["loss"] for entry in done.live_run.validation] == [-look.held_out for look in seen]
    assert [sample["step"] for sample in done.live_run.samples] == [4] and "minus the held-out score" in done.line
    with torch.inference_mode():
        again = run(dataclasses.replace(job(model=model, held_out=second), monitoring=look))
        previews = [nodes.load_preview_latents(a_job, one) for one in (done, again)]
    assert again.line.startswith("already trained") and previews[0].shape[0] == previews[1].shape[0]
    assert again.live_run.validation == done.live_run.validation


def test_held_out_pictures_are_refused_where_a_score_is_followed(folders):
    a_job = dataclasses.replace(job(), monitoring=MonitorConfig(held_out=images("sd3")))
    with pytest.raises(ValueError, match="second score model on held_out of Train LECO-Score measures"):
        result(a_job)
