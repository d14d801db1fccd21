"""Images by what is seen in them."""

import numpy as np
import pytest
import torch
from trainyard.tests.fakes_data import image
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.similarity.clusters import ClusterSettings, cluster_features
from trainyard.trainers.data.similarity.similar import (
    ImageFeatures,
    collect_matched_images,
    draw_clusters_sheet,
    draw_similarity_sheet,
    find_similar_images,
    format_clusters_report,
    format_similarity_report,
    select_query_images,
    split_by_cluster,
    unit_rows,
)
from trainyard.trainers.scores.backbones import extract_trunk_features
from trainyard.trainers.scores.networks import ScoreModelInfo, ScorerEnsemble, build_scorer


@pytest.fixture
def dataset(tmp_path):
    for number in range(6):
        image(tmp_path / f"p{number}.png", seed=number)
    return read_folder(tmp_path)


def features(dataset, angles=(0, 5, 10, 90, 95, 100), kind=""):
    turn = np.radians(np.array(angles, float))
    return ImageFeatures(dataset, unit_rows(np.stack([np.cos(turn), np.sin(turn)], 1) * 3), "eyes", kind)


def test_the_nearest_come_first_with_their_cosines_and_never_the_picture_itself(dataset):
    eyes = features(dataset)
    (found,) = find_similar_images(select_query_images(eyes, "p0", everything=False), eyes, most=3)
    assert [m.index for m in found] == [1, 2, 3]
    assert [m.cosine for m in found] == pytest.approx(np.cos(np.radians([5, 10, 90])), abs=1e-6)
    assert [m.index for m in find_similar_images(select_query_images(eyes, "p0", False), eyes, 9, least=0.9)[0]] == [
        1,
        2,
    ]


def test_several_queries_have_a_row_each_and_their_finds_are_listed_once(dataset):
    eyes = features(dataset)
    asked = select_query_images(eyes, "", everything=True)
    matches = find_similar_images(asked, eyes, most=2, least=0.5)
    found = collect_matched_images(eyes, matches)
    assert len(found) == len(set(found.records)) == 6
    sheet = draw_similarity_sheet(asked, eyes, matches)
    assert sheet.height > sheet.width, "six rows of three"
    assert "p3.png: p4.png 0.996, p5.png 0.985" in format_similarity_report(asked, eyes, matches)


def test_nothing_alike_is_said_in_words(dataset):
    eyes = features(dataset, (0, 60, 120, 180, 240, 300))
    asked = select_query_images(eyes, "", everything=False)
    matches = find_similar_images(asked, eyes, 3, least=0.9)
    assert matches == [[]]
    assert "nothing that is alike enough" in format_similarity_report(asked, eyes, matches)
    assert draw_similarity_sheet(asked, eyes, matches).width > 100


def test_rows_of_different_eyes_are_not_compared(dataset):
    with pytest.raises(ValueError, match="cannot be compared"):
        find_similar_images(features(dataset, kind="a"), features(dataset, kind="b"), 3)
    with pytest.raises(ValueError, match="No file name of 6 images holds 'cat'"):
        select_query_images(features(dataset), "cat", False)


def test_groups_become_datasets_with_flags_a_sheet_and_words(dataset):
    eyes = features(dataset)
    found = cluster_features(eyes.rows, ClusterSettings())
    parts, whole = split_by_cluster(eyes, found)
    assert [len(part) for part in parts] == [3, 3]
    assert whole[0].flags[0].startswith("group 1 of 2 (silhouette 0.9")
    assert [r.path for r in whole] == [r.path for r in dataset]
    words = format_clusters_report(eyes, found)
    assert "6 images in 2 groups" in words
    assert "most typical p1.png" in words
    assert draw_clusters_sheet(eyes, found).width > 6 * 160
    again, _ = split_by_cluster(ImageFeatures(whole, eyes.rows, "eyes"), found)
    assert len(again[0][0].flags) == 1, "the group of before is not kept beside the new one"


def test_copies_amount_to_one_picture(dataset):
    assert features(dataset, (30,) * 6).diversity == pytest.approx(1.0)
    assert features(dataset, (0, 90) * 3).diversity == pytest.approx(2.0)


def test_a_score_models_trunk_sees_latents_of_several_sizes_in_their_order():
    model = ScorerEnsemble([build_scorer(ScoreModelInfo(width=8, depth=1)).eval()], ScoreModelInfo(width=8, depth=1))
    latents = [
        torch.randn(4, *size, generator=torch.Generator().manual_seed(i))
        for i, size in enumerate([(8, 8), (6, 10), (8, 8)])
    ]
    rows = extract_trunk_features(model, latents)
    assert np.allclose(rows[2], extract_trunk_features(model, latents[2:])[0], atol=1e-5)
    assert rows.shape == (3, model.networks[0].trunk.size)
