"""Backbones without ratings, aesthetic heads and students as nodes of ComfyUI, with real (tiny) models."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import comfy.sd
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from trainyard.nodes import host, paths
from trainyard.nodes.data.encode import EncodeDataset
from trainyard.nodes.scores import score, score_backbones
from trainyard.nodes.scores.features import ClusterImages, ExtractFeatures, SimilarImages
from trainyard.nodes.scores.score_backbones import DistillScoreModel, LoadAestheticHead, PretrainScoreBackbone
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import cond, latent_shape, make
from trainyard.tests.comfy.test_quality import encoder
from trainyard.trainers import loop
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.data.join_split import join_datasets
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.similarity.clusters import ClusterSettings
from trainyard.trainers.data.similarity.similar import SimilarSettings
from trainyard.trainers.scores.files import score_model_tensors
from trainyard.trainers.scores.networks import MODEL_FEATURES, PRETRAINING_TASK, ScorerSettings
from trainyard.trainers.scores.objective import ScoreSettings
from trainyard.trainers.scores.pretext import PretextSettings

SMALL = dict(width=8, depth=1)
SHADES = 32


def node(kind):
    return kind.PREPARE_CLASS_CLONE(None)  # what the executor calls: the class with its hidden inputs


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd3_noclip")), output_clip=False)[2]


@pytest.fixture
def places(folders, comfy, monkeypatch):
    """Grey noise of rising brightness, dark ones in one folder and light ones in another; an aesthetic head for the
    tiny encoder."""
    kinds = comfy.folder_paths.folder_names_and_paths
    for kind, endings in ((paths.SCORE_MODELS, {".safetensors"}), (paths.AESTHETIC_HEADS, paths.HEAD_EXTENSIONS)):
        (folders / kind).mkdir()
        monkeypatch.setitem(kinds, kind, ([str(folders / kind)], endings))
    for index, shade in enumerate(np.linspace(0, 1, SHADES)):
        place = folders / "input" / "set" / ("dark" if shade < 0.5 else "light")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).normal(40 + 170 * shade, 25, (64, 64, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{index:02d}.png")
    rng = torch.Generator().manual_seed(0)
    save_file({"layers.0.weight": torch.randn(8, 24, generator=rng), "layers.0.bias": torch.zeros(8), "layers.1.weight": torch.randn(1, 8, generator=rng),
               "layers.1.bias": torch.full((1,), 5.0)}, folders / paths.AESTHETIC_HEADS / "tiny.safetensors")  # fmt: skip
    return folders


@pytest.fixture
def dataset(places):
    return join_datasets([read_folder(places / "input" / "set" / name) for name in ("dark", "light")])


def encoded_of(dataset, vae):
    sizes = BucketSettings(resolution=64, step=16, min_side=64, max_side=64).to_dict()
    with torch.inference_mode():
        return (
            node(EncodeDataset)
            .execute(dataset, vae, flip=False, **CaptionSettings(caption_mode=CAPTION_MODE_EMPTY).to_dict(), **sizes)
            .args[0]
        )


def values(*records, **changed):
    return {name: value for record in records for name, value in record.to_dict().items()} | changed


def hash_of(patcher):
    return host.identity.hash_patched_weights(patcher), {
        name: value.double().sum().item() for name, value in patcher.model.state_dict().items()
    }


PRETEXT = values(
    ScorerSettings(**SMALL),
    PretextSettings(steps=6, batch=8, size=64, crops=2, rotation=1.0, jigsaw=1.0, colours=1.0, classes=1.0),
)


def pretrain(dataset, vae):
    with torch.inference_mode():
        return node(PretrainScoreBackbone).execute(make("sd3", inference=True), vae, dataset, **PRETEXT).args


@pytest.fixture(scope="module")
def pretrained_once():
    return {}


@pytest.fixture
def pretrained(dataset, vae, pretrained_once):
    """The (SCORE_MODEL, report, losses) of one pre-training that this file shares, a copy for each test."""
    if not pretrained_once:
        pretrained_once["outputs"] = pretrain(dataset, vae)
    return copy.deepcopy(pretrained_once["outputs"])


def test_pictures_without_ratings_make_a_backbone_that_train_score_model_starts_from(dataset, vae, pretrained):
    model, report, losses = pretrained
    assert model.info.task == PRETRAINING_TASK
    assert model.info.latent_format == "SD3"
    assert "same picture found" in report
    assert "ridge class accuracy" in report, "dark and light are folders"
    assert len(losses["loss"]) == 6
    rated = type(dataset)(tuple(replace(r, score=float(i)) for i, r in enumerate(dataset)))
    given = values(ScorerSettings(**SMALL), ScoreSettings(steps=4, batch=8, members=2))
    with torch.inference_mode():
        trained, *_ = (
            node(score.TrainScoreModel)
            .execute(make("sd3", inference=True), encoded_of(rated, vae), pretrained=model, **given)
            .args
        )
    assert trained.info.width == 8


def test_the_same_pictures_are_not_pretrained_twice(dataset, vae, monkeypatch):
    few = type(dataset)(dataset.records[::4])
    pretrained = pretrain(few, vae)
    monkeypatch.setattr(score_backbones, "pretrain_from_images", lambda *_: pytest.fail("trained again"))
    again = pretrain(few, vae)
    assert "read from the cache" in again[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(again[0].networks[0].parameters(), pretrained[0].networks[0].parameters(), strict=True)
    )


def head(places, sight, **more):
    with torch.inference_mode():
        return node(LoadAestheticHead).execute("tiny.safetensors", sight, **more).args[0]


def test_an_aesthetic_head_rates_pictures_and_with_model_and_vae_their_latents(places, dataset, vae):
    sight = encoder()
    before = hash_of(sight.patcher), hash_of(vae.patcher)
    whole = head(places, sight, model=make("sd3", inference=True), vae=vae)
    with torch.inference_mode():
        ratings, spreads = whole.rate_images(dataset)
    assert len(ratings) == SHADES and set(spreads) == {0.0}
    with torch.inference_mode():
        out = node(score.ScoreImages).execute(whole, dataset=dataset, **score.ScoringSettings().to_dict()).args
    assert out[0] == pytest.approx(ratings)
    with host.context.enable_gradients():
        x = torch.randn(1, 16, 8, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(whole.mean_score(x, torch.zeros(1)).sum(), x)
    assert float(grad.norm()) > 0
    assert (hash_of(sight.patcher), hash_of(vae.patcher)) == before


def test_half_of_what_latents_need_is_refused(places, vae):
    with pytest.raises(ValueError, match="both model and vae are needed"):
        head(places, encoder(), vae=vae)


@pytest.mark.parametrize("backbone", ["latent ResNet", MODEL_FEATURES])
def test_a_student_learns_its_teachers_ratings_and_keeps_its_scale(places, dataset, vae, backbone):
    teacher, model = head(places, encoder()), make("sd3", inference=True)
    before = hash_of(model)
    given = values(ScorerSettings(backbone=backbone, **SMALL), ScoreSettings(steps=30, batch=8, members=2, patience=0))
    with torch.inference_mode():
        student, report, _ = (
            node(DistillScoreModel).execute(teacher, model, dataset, encoded_of(dataset, vae), **given).args
        )
        said = teacher.rate_images(dataset)[0]
    assert student.info.mean == pytest.approx(np.mean(said), abs=1e-3)
    assert student.info.task == "regression"
    assert "SRCC" in report
    assert hash_of(model) == before
    assert not any(m._forward_hooks for m in model.model.modules())
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert student.mean_score(x, torch.tensor([0.0, 0.5])).shape == (2,)


def test_an_aesthetic_head_is_no_backbone_to_learn_on(places, dataset, vae):
    whole, model = head(places, encoder(), model=make("sd3", inference=True), vae=vae), make("sd3", inference=True)
    given = values(ScorerSettings(**SMALL), ScoreSettings(steps=2, batch=8, members=2))
    for train, more in ((score.TrainScoreModel, {}), (DistillScoreModel, {"teacher": whole, "dataset": dataset})):
        with pytest.raises(ValueError, match="has no backbone to train. Connect a model of Pretrain Score Backbone"):
            node(train).execute(model=model, encoded=encoded_of(dataset, vae), pretrained=whole, **more, **given)


def test_a_score_of_latents_is_no_teacher(dataset, vae, pretrained):
    rates = replace(pretrained[0], info=replace(pretrained[0].info, task="regression"))
    with pytest.raises(ValueError, match="Connect one of Load Aesthetic Head"):
        score_backbones.rate_with_teacher(rates, dataset, encoded_of(dataset, vae), None)


def test_a_backbone_without_a_head_rates_nothing_and_says_what_it_is_for(dataset, vae, pretrained):
    """Its head says 0 to everything, which would look like a rating."""
    backbone, says = (
        pretrained[0],
        r"pre-trained backbone \(latent ResNet, from Pretrain Score Backbone\): it has no trained head.*as pretrained",
    )
    with pytest.raises(ValueError, match=says):
        node(score.ScoreImages).execute(backbone, dataset=dataset, vae=vae, **score.ScoringSettings().to_dict())
    with pytest.raises(ValueError, match=says):
        node(score.ScoreImages).execute(
            backbone, latents={"samples": torch.zeros(1, 16, 8, 8)}, **score.ScoringSettings().to_dict()
        )
    with pytest.raises(ValueError, match=says):
        score_backbones.rate_with_teacher(backbone, dataset, encoded_of(dataset, vae), None)
    node(score.SaveScoreModel).execute(backbone, "eyes")
    assert (
        node(score.LoadScoreModel)
        .execute("eyes.safetensors")
        .args[1]
        .startswith("a pre-trained backbone without a head (latent ResNet)")
    )


def test_features_of_a_vision_model_find_alike_pictures_and_groups(dataset):
    with torch.inference_mode():
        features, diversity, report = node(ExtractFeatures).execute(dataset, clip_vision=encoder()).args
        found, sheet, words = (
            node(SimilarImages).execute(features, **SimilarSettings(most=3, name="00", least=-1.0).to_dict()).args
        )
        parts, whole, groups, page, told = (
            node(ClusterImages).execute(features, **ClusterSettings(clusters=3).to_dict()).args
        )
    assert features.rows.shape == (SHADES, 24)
    assert diversity >= 1
    assert "seen by CLIP_VISION" in report
    assert len(found) == 3 and sheet.shape[-1] == 3 and words.startswith("3 images of 32")
    assert sum(map(len, parts)) == SHADES and len(groups) == SHADES and set(groups) == {1, 2, 3}
    assert page.ndim == 4 and "32 images in 3 groups" in told
    assert whole[0].flags


def test_features_of_a_backbone_need_its_vae_and_are_not_compared_with_others(dataset, vae, pretrained):
    with torch.inference_mode():
        features = node(ExtractFeatures).execute(dataset, score_model=pretrained[0], vae=vae).args[0]
        others = node(ExtractFeatures).execute(dataset, clip_vision=encoder()).args[0]
    assert len(features) == SHADES
    with pytest.raises(ValueError, match="cannot be compared"):
        node(SimilarImages).execute(features, queries=others, **SimilarSettings().to_dict())
    with pytest.raises(ValueError, match="either clip_vision or score_model"):
        node(ExtractFeatures).execute(dataset)


def test_the_same_bytes_are_found_by_nobody_but_a_broken_file_only_leaves_itself_out(places, dataset):
    lost = dataset[3]
    Path(lost.path).write_bytes(b"no image")
    with torch.inference_mode():
        features = node(ExtractFeatures).execute(dataset, clip_vision=encoder()).args[0]
    assert len(features) == SHADES - 1
    assert features.dataset.skipped[0][0] == lost.path


def rated_latents(family, count=24):
    """Latents of noise whose rating is the mean of their first channel."""
    x = torch.randn(count, *latent_shape(family)[1:], generator=torch.Generator().manual_seed(0))
    data = EncodedDataset.from_core([{"samples": x}], [cond(family)])
    return replace(data, items=[replace(item, score=float(x[i, 0].mean())) for i, item in enumerate(data.items)])


@pytest.mark.parametrize(("family", "rank"), [("sd3", 0), ("sd3", 4), ("sd15", 4)])
def test_train_score_model_learns_on_the_models_own_states_frozen_or_with_a_lora(places, family, rank):
    """Saved, loaded and asked again it says the same; the LoRA is in the file, was taught, and the MODEL is as it
    was."""
    model = make(family, inference=True)
    before, bits = hash_of(model), {name: value.clone() for name, value in model.model.state_dict().items()}
    given = values(
        ScorerSettings(backbone=MODEL_FEATURES, rank=rank, **SMALL),
        ScoreSettings(steps=10 if rank else 30, batch=8, members=2, patience=0),
    )
    with torch.inference_mode():
        trained, report, _ = node(score.TrainScoreModel).execute(model, rated_latents(family), **given).args
        node(score.SaveScoreModel).execute(trained, "through the model", untrained=True)
        loaded, words = node(score.LoadScoreModel).execute("through the model.safetensors", model=model).args
        again, told, _ = node(score.TrainScoreModel).execute(model, rated_latents(family), **given).args
    x, level = (
        torch.randn(latent_shape(family, 4), generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.0, 0.0, 0.4, 0.8]),
    )
    with torch.no_grad():
        said = [one.mean_score(x, level) for one in (trained, loaded, again)]
    assert (
        torch.allclose(said[0], said[1], atol=1e-3) and torch.equal(said[1], said[2]) and "read from the cache" in told
    )
    taught = [value for name, value in loaded.networks[0].state_dict().items() if name.endswith(".up")]
    assert bool(taught) == bool(rank) and (not rank or any(bool(up.any()) for up in taught))
    assert ("with a LoRA of rank 4" in words) == bool(rank)
    assert hash_of(model) == before and all(
        torch.equal(value, bits[name]) for name, value in model.model.state_dict().items()
    )
    assert not any(m._forward_hooks for m in model.model.modules())
    with torch.inference_mode():
        scores = (
            node(score.ScoreImages).execute(loaded, latents={"samples": x}, **score.ScoringSettings().to_dict()).args[0]
        )
    assert len(scores) == 4 and np.isfinite(scores).all()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_training_on_the_models_states_that_is_interrupted_goes_on_to_the_same_model(places, monkeypatch, rank):
    """Also where it was stopped right after the first batch had settled how each number is standardised."""
    given = values(
        ScorerSettings(backbone=MODEL_FEATURES, rank=rank, **SMALL),
        ScoreSettings(steps=6, batch=8, members=2, patience=0),
    )
    model, asked, stops = make("sd3", inference=True), [], []

    def interrupt():
        asked.append(1)
        if len(asked) in stops:
            raise KeyboardInterrupt

    def run():
        with torch.inference_mode():
            return node(score.TrainScoreModel).execute(model, rated_latents("sd3"), **given).args[0]

    whole = run()
    shutil.rmtree(paths.score_cache_folder())
    monkeypatch.setattr(loop.TrainingClock, "report_due", lambda self, step: True)
    monkeypatch.setattr(host.progress, "raise_if_interrupted", interrupt)
    for stop in (2, 4, 7):
        asked.clear()
        stops[:] = [stop]
        with pytest.raises(KeyboardInterrupt):
            run()
        assert not any(m._forward_hooks for m in model.model.modules())
    stops.clear()
    ours, theirs = score_model_tensors(run()), score_model_tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), max(
        float((ours[n] - theirs[n]).abs().max()) for n in theirs
    )


def test_a_score_model_through_the_model_is_learnt_on_with_its_lora_whatever_the_widgets_say(places):
    model = make("sd3", inference=True)
    short = dict(steps=3, batch=8, members=2, patience=0)
    with torch.inference_mode():
        first = (
            node(score.TrainScoreModel)
            .execute(
                model,
                rated_latents("sd3"),
                **values(ScorerSettings(backbone=MODEL_FEATURES, rank=4, **SMALL), ScoreSettings(**short)),
            )
            .args[0]
        )
        second = (
            node(score.TrainScoreModel)
            .execute(
                model,
                rated_latents("sd3"),
                pretrained=first,
                **values(ScorerSettings(**SMALL), ScoreSettings(**short, seed=5)),
            )
            .args[0]
        )
    assert (second.info.backbone, second.info.rank) == (MODEL_FEATURES, 4)


def test_a_lora_for_a_backbone_that_has_no_model_is_refused():
    with pytest.raises(
        ValueError,
        match="rank is 4 and backbone is 'latent ResNet', which looks through no diffusion model.*Set rank to 0",
    ):
        ScorerSettings(rank=4)
