"""A score that reads: images against words, as CLIP sees both; what LECO-score learns from it."""

import comfy.sd
import pytest
import torch
from PIL import Image
from trainyard.nodes import host
from trainyard.nodes.data import image_features, zeroshot
from trainyard.nodes.scores import feature_extractors
from trainyard.nodes.scores.prompt_match import CLIP_SCORE_SCALE, ClipScoreModel, PromptMatchScore
from trainyard.nodes.scores.score import ScoreImages, ScoringSettings
from trainyard.nodes.scores.score_backbones import rate_with_teacher
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import make
from trainyard.tests.comfy.test_feature_extractors import slope, unchanged, weights
from trainyard.tests.comfy.test_host import fingerprint
from trainyard.tests.comfy.test_leco_score import ROWS, images, job
from trainyard.tests.comfy.test_train_lora import result
from trainyard.tests.comfy.test_zeroshot import COLOURS, clip_l, eyes, plain  # noqa: F401 - fixtures
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.methods.leco_score import predict_member_scores
from trainyard.trainers.scores.files import write_score_model


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny.build("sd3_noclip")), output_clip=False)[2]


@pytest.fixture
def coloured(tmp_path):
    for colour in COLOURS:
        plain(colour).save(tmp_path / f"{colour}.png")
        (tmp_path / f"{colour}.txt").write_text(f"a photo of {colour}", encoding="utf-8")
    return read_folder(tmp_path)


def node(kind):
    return kind.PREPARE_CLASS_CLONE(None)


def test_a_picture_is_rated_by_its_own_caption_or_by_the_words(clip_l, eyes, coloured):  # noqa: F811
    """A hundred times the cosine, as the host's own encoders give it."""
    with torch.inference_mode():
        score = node(PromptMatchScore).execute(eyes, clip_l).args[0]
        own = node(ScoreImages).execute(score, dataset=coloured, **ScoringSettings().to_dict()).args[0]
        seen = torch.from_numpy(image_features.encode_image_features(eyes, [plain("blue")]))
        words = torch.nn.functional.normalize(
            zeroshot.encode_text_features(clip_l, ["a photo of blue"], "clip_l"), dim=-1
        )
        red = node(PromptMatchScore).execute(eyes, clip_l, "a photo of red").args[0].rate_images(coloured)[0]
    names = [record.path.rsplit("/", 1)[1] for record in coloured]
    assert own[names.index("blue.png")] == pytest.approx(CLIP_SCORE_SCALE * float((seen * words).sum()), abs=1e-3)
    assert max(range(3), key=lambda i: red[i]) == names.index("red.png")


def test_pictures_with_nothing_to_compare_with_are_refused(clip_l, eyes, coloured, tmp_path):  # noqa: F811
    (tmp_path / "red.txt").unlink()
    bare = read_folder(tmp_path)
    with pytest.raises(ValueError, match="no words, and 1 of 3 images have no caption, such as .*red.png. Write words"):
        ClipScoreModel(eyes, clip_l).rate_images(bare)
    with pytest.raises(ValueError, match="the student will see no captions. Write words into Prompt Match Score"):
        rate_with_teacher(ClipScoreModel(eyes, clip_l), coloured, images("sd3"), None)
    with pytest.raises(ValueError, match="both model and vae are needed"):
        node(PromptMatchScore).execute(eyes, clip_l, model=make("sd3"))


def test_latents_are_decoded_and_pass_gradients_back(clip_l, eyes, vae):  # noqa: F811
    model = make("sd3", inference=True)
    with torch.inference_mode():
        score = node(PromptMatchScore).execute(eyes, clip_l, "a photo of red", model, vae).args[0]
    before = weights(vae.patcher), weights(eyes.patcher), weights(clip_l.patcher)
    x, level = torch.randn(2, 16, 10, 10, generator=torch.Generator().manual_seed(2)) * 0.3, torch.zeros(2)
    with torch.no_grad():
        pixels = vae.decode(feature_extractors.latent_format_by_name("SD3").process_out(x))
    shown = [Image.fromarray((image.cpu().numpy() * 255).round().astype("uint8")) for image in pixels]
    seen = torch.from_numpy(image_features.encode_image_features(eyes, shown))
    assert score.ratings(x)[0].tolist() == pytest.approx(
        score.clip_scores(seen, ["a photo of red"] * 2).tolist(), abs=0.3
    )
    with torch.no_grad():
        assert torch.equal(
            predict_member_scores(score, x, level, ["a photo of blue"] * 2), score.member_scores(x, level)
        ), "its own words come first in LECO-score"
    said = lambda x: score.members_for_prompts(x, level, ["a photo of red", "a photo of blue"])[0]
    auto, finite = slope(said, x)
    assert auto == pytest.approx(finite, rel=0.05, abs=1e-5)
    assert abs(auto) > 1e-4
    for patcher, was in zip((vae.patcher, eyes.patcher, clip_l.patcher), before, strict=True):
        assert unchanged(patcher, was)
    with pytest.raises(ValueError, match="no file of its own"):
        write_score_model("never.safetensors", score)
    with pytest.raises(ValueError, match="no words to compare latents with"):
        ClipScoreModel(eyes, clip_l, "", vae, "SD3", 16).mean_score(x, level)


@pytest.mark.parametrize("target", ["x0", "direct_align"])
def test_leco_score_learns_from_good_words_against_bad_ones(folders, clip_l, eyes, vae, monkeypatch, target):  # noqa: F811
    """All texts are understood before the model is loaded for training; the words of the prompts count, and the base is
    left alone."""
    with torch.inference_mode():
        model = make("sd3", inference=True)
        before = fingerprint(model)
        score = node(PromptMatchScore).execute(eyes, clip_l, "", model, vae).args[0]
        own = zeroshot.encode_text_features
        monkeypatch.setattr(
            zeroshot,
            "encode_text_features",
            lambda *args: own(*args) if not host.session.mm.in_training else pytest.fail("read too late"),
        )
        words = {"relative": 0.2, "good_words": "beautiful", "bad_words": "ugly"}
        data = images("sd3") if target == "direct_align" else None
        made = job(
            model=model,
            score=score,
            held_out=score,
            rows=ROWS[:1],
            data=data,
            settings={"target": target, **words},
            calibrate="after training",
        )
        lora, losses, _ = result(made)
        assert {"a cat", "beautiful. a cat", "ugly. a cat"} <= set(score.text_embeddings)
        assert (
            result(job(model=model, score=score, name="plain", rows=ROWS[:1], settings={"target": "x0"}))[1] != losses
        )
    assert lora and len(losses) == 4 and fingerprint(model) == before
