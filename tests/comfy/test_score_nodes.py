"""Score models as nodes of ComfyUI: rated images in a folder become a model that rates others, in this process and on
the server."""

import comfy.sd
import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.nodes import host, paths
from trainyard.nodes.data.encode import EncodeDataset
from trainyard.nodes.scores import latents
from trainyard.nodes.scores.score import (
    LoadRatedPictures,
    LoadScoreModel,
    RankAndFilter,
    SaveScoreModel,
    ScoreImages,
    ScoringSettings,
    TrainScoreModel,
)
from trainyard.nodes.train.train_lora import select_training_data
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import make
from trainyard.trainers import loop
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from trainyard.trainers.data.ratings import RankSettings
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.rng import make_generator
from trainyard.trainers.scores.files import score_model_tensors
from trainyard.trainers.scores.networks import (
    ScoreModelInfo,
    ScorerEnsemble,
    ScorerSettings,
    build_scorer,
    to_scorer_input,
)
from trainyard.trainers.scores.objective import ScoreSettings
from trainyard.trainers.settings import AdapterSettings, compute_fingerprint

TINY = dict(steps=80, batch=16, members=2, learning_rate=3e-3, check_every=20, width=8, depth=1, noisy=True)
SHADES = 32


def node(kind):
    return kind.PREPARE_CLASS_CLONE(None)  # what the executor calls: the class with its hidden inputs


def draw(folder, shades, size=(64, 64)):
    """Grey noise of rising brightness; the rating is the brightness from 0 to 10."""
    folder.mkdir(parents=True)
    for index, shade in enumerate(shades):
        pixels = (
            np.random.default_rng(index)
            .normal(40 + 170 * shade, 25, (size[1], size[0], 3))
            .clip(0, 255)
            .astype(np.uint8)
        )
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.score").write_text(f"{10 * shade:.2f}", encoding="utf-8")


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd3_noclip")), output_clip=False)[2]


@pytest.fixture
def places(folders, comfy, monkeypatch):
    monkeypatch.setitem(
        comfy.folder_paths.folder_names_and_paths,
        paths.SCORE_MODELS,
        ([str(folders / "score_models")], {".safetensors"}),
    )
    draw(folders / "input" / "rated", np.linspace(0, 1, SHADES))
    return folders


def widgets(**changed):
    return {**ScorerSettings().to_dict(), **ScoreSettings().to_dict(), **TINY, **changed}


def encoded(vae, folder="input/rated"):
    dataset = node(LoadRatedPictures).execute(folder).args[0]
    sizes = BucketSettings(resolution=64, step=8).to_dict()
    with torch.inference_mode():
        return (
            node(EncodeDataset)
            .execute(dataset, vae, **{**CaptionSettings(caption_mode=CAPTION_MODE_EMPTY).to_dict(), **sizes}, flip=True)
            .args[0]
        )


def train(data, model=None, **changed):
    with torch.inference_mode():
        return node(TrainScoreModel).execute(model or make("sd3", inference=True), data, **widgets(**changed)).args


def test_from_a_folder_of_rated_pictures_to_scores_of_others(vae, places):
    """Trained without CLIP on brightness, saved, loaded, and asked about images that it never saw."""
    data = encoded(vae)
    model = make("sd3", inference=True)
    before = compute_fingerprint(host.identity.hash_model_and_schedule(model))
    score_model, report, losses = train(data, model)
    assert (
        compute_fingerprint(host.identity.hash_model_and_schedule(model)) == before
        and host.encoders.VaeEncoder(vae).identity
    )
    assert score_model.info.trained, report
    assert (
        score_model.info.latent_format == "SD3"
        and score_model.info.channels == 16
        and score_model.info.resolution == 64
    )
    assert report.startswith(f"Trained on {SHADES} rated images: SRCC 0.") and len(losses["loss"]) == 80

    path = node(SaveScoreModel).execute(score_model, "bright").args[0]
    assert path.endswith("score_models/bright.safetensors")
    assert node(SaveScoreModel).execute(score_model, "bright").args[0] == path, "the same model is not written twice"
    loaded, about = node(LoadScoreModel).execute("bright.safetensors").args
    assert "SRCC" in about and "SD3" in about

    draw(places / "input" / "others", [0.9, 0.1, 0.5, 0.7], (72, 64))
    dataset = node(LoadRatedPictures).execute("input/others").args[0]
    with torch.inference_mode():
        scores, spreads, after, sheet, words = (
            node(ScoreImages).execute(loaded, dataset=dataset, vae=vae, **ScoringSettings().to_dict()).args
        )
    assert sorted(range(4), key=lambda i: scores[i]) == [1, 2, 3, 0], scores
    assert (
        [r.score for r in after] == scores
        and all(s >= 0 for s in spreads)
        and [r.score for r in dataset] == [9.0, 1.0, 5.0, 7.0]
    )
    assert sheet.shape[-1] == 3 and "00.png" in words.splitlines()[1]

    keep = {name: [value] for name, value in RankSettings(by="number", number=2, keep_order=False).to_dict().items()}
    stays, goes, _, line = node(RankAndFilter).execute([after], **keep).args
    assert [r.path[-6:] for r in stays] == ["00.png", "03.png"] and len(goes) == 2 and line.startswith("2 images stay")
    assert [r.score for r in node(RankAndFilter).execute([after], scores=[1.0, 4.0, 3.0, 2.0], **keep).args[0]] == [
        4.0,
        3.0,
    ]


def test_images_and_latents_of_the_graph_are_scored_alike(vae, places):
    score_model = train(encoded(vae))[0]
    images = torch.rand(3, 64, 64, 3, generator=make_generator(0)).mul(255).round().div(255)
    with torch.inference_mode():
        by_image = node(ScoreImages).execute(score_model, images=images, vae=vae, **ScoringSettings().to_dict()).args
        latent = {"samples": vae.encode(images)}
        by_latent = node(ScoreImages).execute(score_model, latents=latent, vae=vae, **ScoringSettings().to_dict()).args
    assert by_image[0] == pytest.approx(by_latent[0], abs=1e-3)
    assert len(by_image[2]) == 3 and len(by_latent[2]) == 0


def test_an_unchanged_graph_never_trains_twice_not_even_after_a_restart(vae, places, monkeypatch):
    data = encoded(vae)
    first, words, losses = train(data, steps=10)
    monkeypatch.setattr("trainyard.nodes.scores.training.train_on_ratings", lambda *_: pytest.fail("trained again"))
    again, told, same_losses = train(data, steps=10)
    assert again.info == first.info and told.startswith(words) and same_losses == losses
    x, level = (
        torch.randn(2, 16, 8, 8, generator=make_generator(0)),
        torch.rand(2, generator=make_generator(1)),
    )
    assert torch.equal(again.mean_score(x, level), first.mean_score(x, level))


def test_a_training_that_is_interrupted_goes_on_at_the_next_run_and_gives_the_same_model(vae, places, monkeypatch):
    data, asked, shown = encoded(vae), [], []
    whole = train(data, steps=40)[0]
    for path in paths.score_cache_folder().iterdir():
        path.unlink()

    class Interrupted(BaseException):
        """The host's is no Exception either."""

    def interrupt():
        asked.append(1)
        if len(asked) == 80:
            raise Interrupted

    monkeypatch.setattr(loop.TrainingClock, "report_due", lambda self, step: True)
    monkeypatch.setattr(host.progress, "raise_if_interrupted", interrupt)
    monkeypatch.setattr(host.progress, "show_node_text", lambda line, node_id=None: shown.append(line))
    with pytest.raises(Interrupted):
        train(data, steps=40)
    assert shown[-1].startswith("stopped; all up to network 2, step ") and shown[-1].endswith(
        "is saved, Run goes on from there"
    )
    again, report, _ = train(data, steps=40)
    ours, theirs = score_model_tensors(again), score_model_tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and again.info == whole.info
    assert [path.suffix for path in paths.score_cache_folder().iterdir()] == [".safetensors"], (
        "the unfinished work is gone"
    )


def test_what_cannot_be_told_from_chance_is_said_and_not_saved(vae, places):
    data = encoded(vae)
    order = torch.randperm(SHADES, generator=make_generator(3)).tolist()
    items = [type(item)(**{**vars(item), "score": float(order[i])}) for i, item in enumerate(data.items)]
    score_model, report, _ = train(type(data)(items, data.store, data.channels, "shuffled"), steps=30)
    assert not score_model.info.trained and report.startswith("NOT TRAINED: SRCC is ")
    with pytest.raises(ValueError, match=r"not saved, because it is not better than chance: SRCC .*Rate more images"):
        node(SaveScoreModel).execute(score_model, "chance")
    path = node(SaveScoreModel).execute(score_model, "chance", untrained=True).args[0]
    assert node(LoadScoreModel).execute("chance.safetensors").args[1].startswith("NOT TRAINED"), path


def model_of(**about):
    about = ScoreModelInfo(**{"latent_format": "SD3", "channels": 16, "width": 8, "depth": 1, **about})
    return ScorerEnsemble([build_scorer(about)], about)


def test_a_scorer_of_another_latent_format_is_refused_with_both_names(vae, places):
    node(SaveScoreModel).execute(model_of(), "sd3")
    with pytest.raises(ValueError, match=r"reads latents of SD3 \(16 channels\), and these are of SD15 \(4 channels\)"):
        node(LoadScoreModel).execute("sd3.safetensors", make("sd15"))
    with pytest.raises(
        ValueError, match=r"reads latents of SD3 \(16 channels\), and these are of Flux \(16 channels\)"
    ):
        node(LoadScoreModel).execute("sd3.safetensors", make("flux"))
    with pytest.raises(
        ValueError, match=r"reads latents of SD15 \(4 channels\), and these are of an unnamed format \(16 channels\)"
    ):
        node(ScoreImages).execute(
            model_of(latent_format="SD15", channels=4),
            images=torch.rand(1, 64, 64, 3),
            vae=vae,
            **ScoringSettings().to_dict(),
        )
    assert node(LoadScoreModel).execute("sd3.safetensors", make("sd3")).args[0].info.latent_format == "SD3"


def test_what_is_to_be_scored_must_be_clear(vae):
    for inputs in ({}, {"images": torch.rand(1, 8, 8, 3), "latents": {"samples": torch.rand(1, 16, 1, 1)}}):
        with pytest.raises(ValueError, match="exactly one of dataset, images and latents"):
            node(ScoreImages).execute(model_of(), vae=vae, **inputs, **ScoringSettings().to_dict())


def test_a_lora_refuses_pictures_that_were_encoded_without_clip(vae, places):
    data = encoded(vae)
    assert not data.items[0].captions and data.empty_key is None
    with pytest.raises(
        ValueError, match="encoded without CLIP, which is enough for score models and for nothing else.*Connect CLIP"
    ):
        select_training_data([data], None, None).require_conditionings()
    with (
        host.session.open_training_session(make("sd3"), AdapterSettings(rank=1)) as session,
        pytest.raises(ValueError, match="encoded without CLIP"),
    ):
        LoraTraining(session.denoiser, session.adapters, data).loss(make_generator(0))


def test_captions_without_clip_are_still_refused(vae, places):
    dataset = node(LoadRatedPictures).execute("input/rated").args[0]
    with pytest.raises(ValueError, match="CLIP is empty"):
        node(EncodeDataset).execute(
            dataset,
            vae,
            **{**CaptionSettings().to_dict(), **BucketSettings(resolution=64, step=8).to_dict()},
            flip=False,
        )


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_the_schedule_alone_says_what_the_loaded_model_says(family):
    """Scale, noise and levels of a MODEL that is not loaded equal those of the denoiser that trains."""
    model = make(family)
    schedule = latents.NoiseSchedule(model)
    latent = torch.randn((1, *make_shape(model)), generator=make_generator(0))
    u = torch.tensor([0.3])
    with host.session.open_training_session(model, AdapterSettings(rank=1)) as session:
        denoiser = session.denoiser
        x0, sigma = denoiser.model_space(latent), denoiser.sigma_at(u)
        x = denoiser.noised(x0, torch.ones_like(x0), sigma)
        assert schedule.flow == denoiser.flow
        assert torch.equal(schedule.model_space(latent), x0) and torch.equal(schedule.sigma_at(u), sigma)
        assert torch.equal(schedule.noised(x0, torch.ones_like(x0), sigma), x)
        assert torch.equal(latents.latent_to_model_space(latent, latents.latent_format_name(model)), x0.cpu())
        for one, other in zip(to_scorer_input(schedule, x, sigma), to_scorer_input(denoiser, x, sigma), strict=True):
            assert torch.equal(one, other)


def make_shape(model):
    return model.model.latent_format.latent_channels, 8, 8


def graph(checkpoint):
    widgets_of = lambda record, **changed: record(**changed).to_dict()
    link = lambda name, slot=0: [name, slot]
    node_ = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}
    return {
        "model": node_("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "data": node_("TrainyardLoadRatedPictures", folder="input/rated_here", ratings="files"),
        "encode": node_("TrainyardEncodeDataset", dataset=link("data"), vae=link("model", 2), flip=True, seed=0,
                        **widgets_of(CaptionSettings, caption_mode=CAPTION_MODE_EMPTY), **widgets_of(BucketSettings, resolution=64, step=8)),
        "train": node_("TrainyardTrainScoreModel", model=link("model"), encoded=link("encode"), file=paths.NO_PAIRS, **widgets()),
        "save": node_("TrainyardSaveScoreModel", score_model=link("train"), name="server/bright", untrained=False),
        "score": node_("TrainyardScoreImages", score_model=link("train"), dataset=link("data"), vae=link("model", 2), **ScoringSettings().to_dict()),
        "rank": node_("TrainyardRankAndFilter", dataset=link("score", 2), scores=link("score"), **RankSettings().to_dict()),
    }  # fmt: skip


def test_the_real_server_trains_saves_scores_and_filters(server):
    draw(server.base / "input" / "rated_here", np.linspace(0, 1, SHADES))
    run = server.run(graph(server.install("sd3_noclip")))
    assert run.ok, run.why
    assert (server.base / "models" / "score_models" / "server" / "bright.safetensors").is_file()
    assert len(run.outputs["rank"]["images"]) == 1
