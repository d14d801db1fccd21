"""Networks on latents of any size, what they see of noise, what their numbers mean, and the file that keeps them."""

import json

import pytest
import torch
from trainyard.tests.unit.toy import Denoiser, rng
from trainyard.trainers.files import METADATA_HASH_KEY, read_safetensors, write_safetensors
from trainyard.trainers.scores.files import (
    check_score_latent_format,
    is_whole_score_model,
    parse_score_model_info,
    read_score_model,
    score_file_matches,
    write_score_model,
)
from trainyard.trainers.scores.networks import (
    LATENT_BACKBONES,
    NUM_RATING_BINS,
    SCORE_TASKS,
    ScoreModelInfo,
    ScorerEnsemble,
    build_scorer,
    call_with_seed,
    head_output_size,
    interpolate_knots,
    level_to_sigma,
    score_from_outputs,
    sincos_position_embedding,
    to_rating_scale,
    to_scorer_input,
)

SMALL = dict(width=8, depth=1)


def model(members=2, **about):
    about = ScoreModelInfo(**{**SMALL, "channels": 4, "members": members, **about})
    return ScorerEnsemble([call_with_seed(i, lambda: build_scorer(about)) for i in range(members)], about)


def drawn(about):
    return call_with_seed(0, lambda: build_scorer(about))


def shaken(network, seed=0):
    """Away from the start, where the level and the attention do nothing yet."""
    draw = rng(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return network


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (7, 12), (2, 2), (1, 1), (33, 5)])
@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
def test_latents_of_any_size_are_scored(backbone, channels, shape):
    network = drawn(ScoreModelInfo(backbone=backbone, channels=channels, outputs=3, **SMALL))
    x = torch.randn(2, channels, *shape, generator=rng())
    out = network(x, torch.tensor([0.0, 0.7]))
    assert out.shape == (2, 3) and out.isfinite().all()
    assert torch.equal(network(x[:, :, None], torch.tensor([0.0, 0.7])), out), "a video of one frame is that image"


@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
def test_a_video_of_several_frames_is_refused(backbone):
    with pytest.raises(ValueError, match=r"scores images, but got latents of shape \(1, 4, 2, 8, 8\)"):
        drawn(ScoreModelInfo(backbone=backbone, **SMALL))(torch.zeros(1, 4, 2, 8, 8), torch.zeros(1))


@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
def test_a_batch_says_what_each_picture_says_alone(backbone):
    network = shaken(drawn(ScoreModelInfo(backbone=backbone, **SMALL)))
    x, level = torch.randn(3, 4, 6, 8, generator=rng()), torch.rand(3, generator=rng(1))
    alone = torch.cat([network(x[i : i + 1], level[i : i + 1]) for i in range(3)])
    assert torch.allclose(network(x, level), alone, atol=1e-5)


@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
def test_the_level_of_noise_counts(backbone):
    network = shaken(drawn(ScoreModelInfo(backbone=backbone, **SMALL)))
    x = torch.randn(1, 4, 8, 8, generator=rng())
    assert (network(x, torch.tensor([0.1])) - network(x, torch.tensor([0.9]))).abs().item() > 1e-3


@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
def test_brightness_is_not_normalised_away(backbone):
    """Two flat images, one of them brighter: narrow networks with one channel per group would see no difference."""
    network = shaken(drawn(ScoreModelInfo(backbone=backbone, **SMALL)))
    x = torch.stack([torch.full((4, 8, 8), 0.5), torch.full((4, 8, 8), 1.5)])
    one, other = network(x, torch.zeros(2)).flatten().tolist()
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
def test_the_gradient_toward_a_better_latent_is_that_of_differences(backbone):
    """As LECO-score needs it: the change of the score along a direction, against a central difference, in double
    precision."""
    made = ScorerEnsemble(
        [shaken(drawn(ScoreModelInfo(backbone=backbone, **SMALL)), i).double() for i in range(2)],
        ScoreModelInfo(backbone=backbone),
    )
    for network in made.networks:
        network.trunk.level.forward = lambda level, own=network.trunk.level: own.layers(
            torch.cat([(level[:, None] * own.speed).sin(), (level[:, None] * own.speed).cos()], 1))  # fmt: skip
    x = torch.randn(1, 4, 6, 6, generator=rng(), dtype=torch.float64, requires_grad=True)
    level, direction = (
        torch.tensor([0.4], dtype=torch.float64),
        torch.randn(1, 4, 6, 6, generator=rng(1), dtype=torch.float64),
    )
    (gradient,) = torch.autograd.grad(made.mean_score(x, level).sum(), x)
    step = 1e-5
    difference = (made.mean_score(x + step * direction, level) - made.mean_score(x - step * direction, level)) / (
        2 * step
    )
    assert float((gradient * direction).sum()) == pytest.approx(difference.item(), rel=1e-3)


def test_positions_differ_everywhere_and_are_the_same_from_the_middle():
    table = sincos_position_embedding(16, 5, 7)
    assert table.shape == (16, 5, 7)
    flat = table.flatten(1).T
    assert torch.cdist(flat, flat).add(torch.eye(35)).min() > 1e-2
    assert torch.allclose(sincos_position_embedding(16, 7, 9)[:, 1:-1, 1:-1], table, atol=1e-6), (
        "a larger image has the smaller one in its middle"
    )


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_the_view_of_a_flow_model_by_hand():
    """sigma .6: x = .4 x0 + .6 noise has spread sqrt(.16 + .36), level .6 / (.4 + .6)"""
    x = torch.ones(1, 2, 2, 2)
    seen, level = to_scorer_input(Denoiser(), x, torch.tensor([0.6]))
    assert level.item() == pytest.approx(0.6) and seen[0, 0, 0, 0].item() == pytest.approx(1 / (0.16 + 0.36) ** 0.5)


def test_the_view_of_an_eps_model_by_hand():
    """sigma 3: x = x0 + 3 noise has spread sqrt(10), level 3 / 4"""
    seen, level = to_scorer_input(Denoiser(None, "eps"), torch.ones(1, 2, 2, 2), torch.tensor([3.0]))
    assert level.item() == pytest.approx(0.75) and seen[0, 0, 0, 0].item() == pytest.approx(10**-0.5)


@pytest.mark.parametrize("prediction", ["flow", "eps", "v"])
def test_a_level_has_its_sigma(prediction):
    denoiser, levels = Denoiser(None, prediction), torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(
        to_scorer_input(denoiser, torch.zeros(3, 1, 1, 1), level_to_sigma(denoiser, levels))[1], levels, atol=1e-6
    )


def test_a_model_of_clean_pictures_takes_everything_for_clean():
    made = model(noisy=False)
    shaken(made.networks[0])
    x = torch.randn(2, 4, 8, 8, generator=rng())
    assert torch.equal(made.mean_score(x, torch.tensor([0.9, 0.9])), made.mean_score(x, torch.zeros(2)))


# -- what is said ------------------------------------------------------------------------------------------------------


def test_values_by_hand():
    """ten bins from 1 to 10, all on the bin of 7, mean 5 and std 2: (7 - 5) / 2 = 1; three classes, all on the last:
    1"""
    bins = torch.full((1, NUM_RATING_BINS), -50.0)
    bins[0, 6] = 50.0
    assert score_from_outputs(
        bins, ScoreModelInfo(task="distribution", low=1.0, high=10.0, mean=5.0, std=2.0)
    ).item() == pytest.approx(1)
    assert score_from_outputs(
        torch.tensor([[0.0, 0.0, 50.0]]), ScoreModelInfo(task="multiclass")
    ).item() == pytest.approx(1)
    assert score_from_outputs(torch.tensor([[0.3]]), ScoreModelInfo()).item() == pytest.approx(0.3)


def test_ratings_are_on_the_users_scale_by_line_curve_or_probability():
    """z = 1, mean 5, std 2: 7 on the scale; by the line .5 x + 1 that is 4.5; by the curve through (6, 0) and (8, 10)
    it is 5"""
    z = torch.tensor([1.0])
    assert to_rating_scale(z, ScoreModelInfo(mean=5.0, std=2.0)).item() == 7
    assert to_rating_scale(z, ScoreModelInfo(mean=5.0, std=2.0, line=(0.5, 1.0))).item() == 4.5
    assert to_rating_scale(z, ScoreModelInfo(mean=5.0, std=2.0, curve=((6.0, 0.0), (8.0, 10.0)))).item() == 5
    assert to_rating_scale(torch.tensor([0.0]), ScoreModelInfo(task="binary")).item() == 0.5


def test_a_curve_is_level_beyond_its_ends():
    said = interpolate_knots(
        torch.tensor([-1.0, 0.5, 2.0, 9.0]), torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 10.0, 20.0])
    )
    assert said.tolist() == [0, 5, 15, 20]
    assert interpolate_knots(torch.tensor([4.0]), torch.tensor([0.0]), torch.tensor([3.0])).tolist() == [3]


def test_the_spread_is_how_far_the_members_disagree():
    made = model(members=3, mean=5.0, std=2.0)
    for network, bias in zip(made.networks, (-1.0, 0.0, 1.0), strict=True):
        torch.nn.init.zeros_(network.head[-1].weight), torch.nn.init.constant_(network.head[-1].bias, bias)
    rating, spread = made.ratings(torch.randn(2, 4, 8, 8, generator=rng()))
    assert rating.tolist() == [5, 5] and spread.tolist() == pytest.approx([2 * (2 / 3) ** 0.5] * 2)


def test_drawing_weights_leaves_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (call_with_seed(s, lambda: torch.randn(3)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_backbone_of_a_loaded_model_is_not_made_from_nothing():
    with pytest.raises(ValueError, match="'model features' is made from a loaded model: connect the one"):
        build_scorer(ScoreModelInfo(backbone="model features"))


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", SCORE_TASKS)
@pytest.mark.parametrize("backbone", LATENT_BACKBONES)
def test_a_model_loads_back_equal(backbone, task, tmp_path):
    made = model(backbone=backbone, task=task, outputs=head_output_size(task, 3), classes=("0.0", "1.0", "2.5"), curve=((0.0, 1.0), (2.0, 3.5)), std=2.0,
                 latent_format="SD3", metrics={"SRCC": [0.9, 0.8, 0.95]}, line=(0.9, 0.1), trained=False)  # fmt: skip
    for network in made.networks:
        shaken(network)
    write_score_model(tmp_path / "m.safetensors", made)
    back = read_score_model(tmp_path / "m.safetensors")
    x, level = torch.randn(2, 4, 8, 8, generator=rng()), torch.tensor([0.0, 0.6])
    assert back.info == made.info and torch.equal(back.member_scores(x, level), made.member_scores(x, level))
    assert all(torch.equal(a, b) for a, b in zip(back.ratings(x), made.ratings(x), strict=True))
    assert score_file_matches(made, tmp_path / "m.safetensors") and not score_file_matches(
        model(), tmp_path / "m.safetensors"
    )
    assert not any(p.requires_grad for network in back.networks for p in network.parameters())


def test_what_a_newer_version_wrote_is_refused(tmp_path):
    file = tmp_path / "m.safetensors"
    write_score_model(file, model())
    tensors, metadata = read_safetensors(file)
    metadata.pop(METADATA_HASH_KEY)
    about = json.loads(metadata["about"])
    write_safetensors(file, tensors, {**metadata, "about": json.dumps({**about, "mood": 3})})
    with pytest.raises(ValueError, match="made by a newer version: it says mood. Update Trainyard"):
        read_score_model(file)
    with pytest.raises(ValueError, match="is a score model of version 2, and this Trainyard reads version 1"):
        parse_score_model_info({**metadata, "trainyard.score_model": "2"}, "m")


def test_a_flipped_bit_in_a_score_model_is_told(tmp_path):
    """The last byte of the file is a value."""
    file = tmp_path / "m.safetensors"
    write_score_model(file, model(), {"report": ""})
    assert is_whole_score_model(file, "report") and not is_whole_score_model(file, "losses")
    blob = file.read_bytes()
    file.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    assert not is_whole_score_model(file) and not is_whole_score_model(tmp_path / "none")
    with pytest.raises(ValueError, match="m.safetensors is damaged: its values are not those that were saved"):
        read_score_model(file)


def test_a_flipped_bit_in_what_a_score_model_says_of_itself_is_told(tmp_path):
    """A mean of ratings of 5 that became 7 reads as well as before."""
    file = tmp_path / "m.safetensors"
    write_score_model(file, model(), {"note": "the mean is 5"})
    blob = file.read_bytes()
    file.write_bytes(blob.replace(b"the mean is 5", b"the mean is 7"))
    assert not is_whole_score_model(file)
    with pytest.raises(ValueError, match="m.safetensors: the metadata is not what was saved.*Save it again"):
        read_score_model(file)


def test_other_and_damaged_files_are_refused_in_words(tmp_path):
    file = tmp_path / "m.safetensors"
    write_safetensors(file, {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="m.safetensors is not a score model of Trainyard"):
        read_score_model(file)
    write_score_model(file, model())
    tensors, metadata = read_safetensors(file)
    metadata.pop(METADATA_HASH_KEY)
    write_safetensors(file, dict(list(tensors.items())[:-1]), metadata)
    with pytest.raises(
        ValueError, match="m.safetensors does not hold the weights that it says it holds.*may be damaged"
    ):
        read_score_model(file)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_score_model(tmp_path / "x.safetensors")


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    made = model()
    with torch.no_grad():
        made.networks[1].head[-1].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite values \(1 tensors, first 1.head"):
        write_score_model(tmp_path / "m.safetensors", made)
    assert not list(tmp_path.iterdir())


def test_latents_of_another_format_or_another_number_of_channels_are_refused_with_both_names():
    about = ScoreModelInfo(latent_format="SD15", channels=4)
    check_score_latent_format(about, "SD15", 4), check_score_latent_format(about, "", 4)
    with pytest.raises(ValueError, match=r"reads latents of SD15 \(4 channels\), and these are of SDXL \(4 channels\)"):
        check_score_latent_format(about, "SDXL", 4)
    with pytest.raises(ValueError, match=r"of SD15 \(4 channels\), and these are of an unnamed format \(16 channels\)"):
        check_score_latent_format(about, "", 16)
