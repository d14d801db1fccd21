"""Learning from images without ratings."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from trainyard.tests.fakes_data import FakeVae
from trainyard.tests.unit.toy import Denoiser
from trainyard.trainers.data.join_split import join_datasets
from trainyard.trainers.data.labels import folder_labels, read_labels
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.views import (
    CROP_VIEW,
    GREY_VIEW,
    QUARTER_PERMUTATIONS,
    ROTATED_VIEW,
    SHUFFLED_VIEW,
    ViewSpec,
    encode_views,
    render_view,
    shuffle_quarters,
)
from trainyard.trainers.loop import step_rng
from trainyard.trainers.scores.files import read_score_model, score_model_tensors, write_score_model
from trainyard.trainers.scores.networks import LATENT_BACKBONES, PRETRAINING_TASK, ScorerSettings
from trainyard.trainers.scores.pretext import (
    MASK_RATIO,
    PretextSettings,
    PretextTraining,
    build_pretext_heads,
    features_and_map,
    masked_mse,
    nt_xent,
    sample_block_mask,
)
from trainyard.trainers.scores.pretraining import predict_out_of_fold, pretrain_backbone, retrieval_hits
from trainyard.trainers.scores.resume import ResumeFolder

ALL = dict(inpaint=1.0, simclr=0.5, rotation=1.0, jigsaw=1.0, colours=1.0, classes=1.0)


@pytest.fixture
def folder(tmp_path):
    """16 images of two plain colours each, in two folders: red ones and green ones."""
    for number in range(16):
        name, rng = ("red", "green")[number % 2], torch.Generator().manual_seed(number)
        levels = (torch.rand(3, 4, 4, generator=rng) * 80).round().byte()
        levels[number % 2] += 150
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(levels.permute(1, 2, 0).numpy()).resize((72, 64), Image.Resampling.NEAREST)
        image.save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


@pytest.fixture
def dataset(folder):
    return join_datasets([read_folder(folder / "red"), read_folder(folder / "green")])


def views_of(dataset, tmp_path, settings=None, vae=None):
    settings = settings or PretextSettings(**ALL)
    return encode_views(
        dataset, settings.kinds(), size=32, crops=3, seed=0, vae=vae or FakeVae(factor=4), cache_dir=tmp_path / "cache"
    )


def test_quarters_are_shuffled_before_encoding_and_do_not_touch():
    square = Image.new("RGB", (64, 64))
    for quarter, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]):
        square.paste(colour, (quarter % 2 * 32, quarter // 2 * 32, quarter % 2 * 32 + 32, quarter // 2 * 32 + 32))
    page = shuffle_quarters(square, (3, 2, 1, 0))
    assert page.getpixel((16, 16)) == (255, 255, 0)
    assert page.getpixel((48, 48)) == (255, 0, 0)
    assert page.getpixel((32, 16)) == (128, 128, 128), "a gap"


def test_a_crop_keeps_proportions_and_a_turn_turns():
    image = Image.new("RGB", (80, 40))
    image.paste((255, 255, 255), (40, 0, 80, 20))
    whole = render_view(ViewSpec(ROTATED_VIEW, label=0), image, 40)
    assert whole.getpixel((35, 5)) == (255, 255, 255)
    assert whole.getpixel((5, 5)) == (0, 0, 0)
    assert render_view(ViewSpec(ROTATED_VIEW, label=1), image, 40).getpixel((5, 5)) == (255, 255, 255), "anticlockwise"
    assert render_view(ViewSpec(CROP_VIEW, mirrored=True), image, 40).getpixel((5, 5)) == (255, 255, 255)


def test_views_are_encoded_once_and_are_what_they_say(dataset, tmp_path):
    vae = FakeVae(factor=4)
    views = views_of(dataset, tmp_path, vae=vae)
    first = views.views_by_image[0]
    assert {kind: len(v) for kind, v in first.items()} == {
        CROP_VIEW: 3,
        ROTATED_VIEW: 4,
        SHUFFLED_VIEW: 3,
        GREY_VIEW: 2,
    }
    assert [v.label for v in first[ROTATED_VIEW]] == [0, 1, 2, 3]
    assert all(0 <= v.label < len(QUARTER_PERMUTATIONS) for v in first[SHUFFLED_VIEW])
    grey, coloured = (views.load_latent(v) for v in first[GREY_VIEW])
    assert float((grey[0] - grey[1]).abs().max()) < 1e-6
    assert float((coloured[0] - coloured[1]).abs().max()) > 0.1
    calls = vae.calls
    assert views_of(dataset, tmp_path, vae=vae) is not None
    assert vae.calls == calls


def test_only_what_the_tasks_need_is_encoded(dataset, tmp_path):
    views = views_of(dataset, tmp_path, PretextSettings())
    assert set(views.views_by_image[0]) == {CROP_VIEW}


def test_contrast_by_hand():
    """Two pairs at right angles, tau 1: each row has its partner at 1 and two others at 0: log((e + 1 + 1) / e)."""
    a = torch.eye(2)
    assert nt_xent(a, 3 * a, 1.0).tolist() == pytest.approx([math.log((math.e + 2) / math.e)] * 2)
    assert nt_xent(a[:1], a[:1]).tolist() == [0.0], "one image has nobody to be confused with"


def test_hidden_error_by_hand():
    """Two cells hidden, one channel of two off by 2 in one of them: 4 / (2 cells * 2 channels)."""
    truth, guess, hidden = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2)
    hidden[0, 0, 0] = 1
    guess[0, 1, 0, 0], guess[0, 0, 1, 1] = 2.0, 9.0
    assert masked_mse(guess, truth, hidden).tolist() == [1.0]


def test_six_blocks_in_ten_are_hidden():
    hidden = sample_block_mask((3, 4, 20, 20), torch.Generator().manual_seed(0))
    assert hidden.shape == (3, 1, 20, 20)
    assert hidden.mean((1, 2, 3)).tolist() == pytest.approx([MASK_RATIO] * 3)
    assert torch.equal(hidden[..., ::2, ::2], hidden[..., 1::2, 1::2])


@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
@pytest.mark.parametrize("shape", [(4, 8, 8), (16, 10, 6), (4, 1, 8, 8)])
def test_a_map_of_any_shape_is_painted_back_to_a_latent_of_its_size(backbone, shape):
    trunk, settings = LATENT_BACKBONES[backbone](shape[0], 8, 1), PretextSettings(backbone=backbone)
    heads = build_pretext_heads(trunk, shape, settings, 0)
    x = torch.randn(2, *shape)
    features, state = features_and_map(trunk, x, torch.zeros(2))
    assert features.shape == (2, trunk.size)
    assert heads["inpaint"](state, shape[-2:]).shape == (2, shape[0], *shape[-2:])
    assert not trunk.last._forward_hooks


@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
def test_every_task_learns_and_its_loss_is_one_number_per_picture(dataset, tmp_path, backbone):
    settings = PretextSettings(**ALL, backbone=backbone, batch=4)
    views, trunk = views_of(dataset, tmp_path), LATENT_BACKBONES[backbone](3, 8, 1)
    heads = build_pretext_heads(trunk, views.shape, settings, 2)
    method = PretextTraining(Denoiser(), trunk, heads, views, range(16), settings, labels=[0] * 8 + [None] * 8)
    for name, _ in settings.tasks():
        assert method.loss_functions[name]([0, 1, 8], step_rng(0, 1)).shape == (3,)
    loss = method.loss(step_rng(0, 0))
    assert loss.shape == (4,)
    loss.mean().backward()
    reached = {name for name, p in trunk.named_parameters() if p.grad is not None}
    assert len(reached) == len(list(trunk.parameters()))
    assert float(method.classes([8, 9], step_rng(0, 1)).detach().sum()) == 0.0, "no label, no loss"


def test_the_same_seed_gives_the_same_backbone_and_the_file_loads_back(dataset, tmp_path):
    settings = PretextSettings(steps=3, batch=4, size=32)
    runs = [
        pretrain_backbone(views_of(dataset, tmp_path, settings), Denoiser(), ScorerSettings(width=8, depth=1), settings)
        for _ in range(2)
    ]
    a, b = (run.model.networks[0].state_dict() for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert runs[0].model.info.task == PRETRAINING_TASK
    write_score_model(tmp_path / "b.safetensors", runs[0].model)
    assert read_score_model(tmp_path / "b.safetensors").info == runs[0].model.info
    assert runs[0].model.mean_score(torch.randn(2, 3, 8, 8), torch.zeros(2)).tolist() == [0, 0], "it has no head yet"


def test_a_pretraining_that_is_stopped_goes_on_and_gives_the_same_backbone(dataset, tmp_path, monkeypatch):
    settings = PretextSettings(steps=6, batch=4, size=32)
    views, losses, calls = views_of(dataset, tmp_path, settings), PretextTraining.loss, []
    train = lambda **more: pretrain_backbone(views, Denoiser(), ScorerSettings(width=8, depth=1), settings, **more)
    whole = train()

    def stopping(self, rng):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(self, rng)

    monkeypatch.setattr(PretextTraining, "loss", stopping)
    resume = ResumeFolder(tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        train(resume=resume)
    assert resume.saved_progress == "network 1, step 3"
    parts = train(resume=ResumeFolder(tmp_path / "work"))
    ours, theirs = score_model_tensors(parts.model), score_model_tensors(whole.model)
    assert (
        parts.losses == whole.losses
        and parts.report == whole.report
        and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    )


def test_probes_tell_before_from_after(dataset, tmp_path):
    records = tuple(replace(r, score=float(i)) for i, r in enumerate(dataset)) + tuple(
        replace(r, score=float(i + 16)) for i, r in enumerate(dataset)
    )
    dataset = replace(dataset, records=records)
    settings = PretextSettings(steps=30, batch=8, size=32)
    views = views_of(dataset, tmp_path, settings)
    done = pretrain_backbone(
        views, Denoiser(), ScorerSettings(width=8, depth=1), settings, labels=folder_labels(views.dataset)
    )
    probes = ("same picture found", "ridge SRCC", "ridge class accuracy")
    assert set(done.model.info.metrics) == {*probes, *(f"{name}, untrained" for name in probes)}
    assert done.model.info.metrics["ridge class accuracy"] == [1.0, 1.0, 1.0], "red from green, with its interval"
    assert "learnt from: there are too few" in done.report
    assert len(done.losses) == 30
    assert sum(done.losses[-5:]) < sum(done.losses[:5])


def test_the_nearest_crop_by_hand():
    rows = torch.tensor([[1.0, 0], [0, 1], [-1, -1]])
    assert retrieval_hits(rows, rows * 2 + 0.1).all()
    assert retrieval_hits(rows[[1, 0, 2]], rows).tolist() == [False, False, True]


def test_ridge_finds_a_line_and_nothing_in_noise():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 200, generator=rng)
    line = rows[:, :1] + 0.1 * torch.randn(80, 1, generator=rng)
    few = rows[:, :20]
    assert torch.corrcoef(torch.cat([predict_out_of_fold(few, line), line], 1).T)[0, 1] > 0.95
    chance = torch.randn(80, 1, generator=rng)
    assert abs(torch.corrcoef(torch.cat([predict_out_of_fold(few, chance), chance], 1).T)[0, 1]) < 0.35


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="weights of all tasks are 0"):
        PretextSettings(inpaint=0.0, simclr=0.0)


def test_classes_without_classes_are_refused(folder, tmp_path):
    settings = PretextSettings(classes=1.0, size=32)
    views = views_of(read_folder(folder / "red"), tmp_path, settings)
    with pytest.raises(ValueError, match="the images have 0 classes"):
        pretrain_backbone(views, Denoiser(), ScorerSettings(width=8), settings, labels=folder_labels(views.dataset))


def test_a_size_that_the_vae_cannot_cut_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="Choose a multiple of 16"):
        encode_views(dataset, (), size=40, crops=2, seed=0, vae=FakeVae(factor=8), cache_dir=tmp_path)


def test_labels_come_from_a_table_and_what_it_does_not_name_has_none(dataset, folder):
    (folder / "labels.csv").write_text("file,label\nred/0.png,warm\ngreen/1.png,cold\n")
    labels = read_labels(folder / "labels.csv", dataset)
    assert sorted(label for label in labels if label) == ["cold", "warm"]
    assert labels[0] == "warm"
    (folder / "wrong.csv").write_text("file,label\nnowhere.png,warm\n")
    with pytest.raises(ValueError, match="nowhere.png"):
        read_labels(folder / "wrong.csv", dataset)
    (folder / "other.csv").write_text("name,score\na,1\n")
    with pytest.raises(ValueError, match="file,label"):
        read_labels(folder / "other.csv", dataset)
