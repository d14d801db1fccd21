"""An edit model learns an edit that it does not know from pairs, on drawings that it never saw. The whole figures:
benchmarks/edits.py."""

import pytest
import torch
from trainyard.tests.toy import edits, sampling, world


@pytest.fixture(scope="module")
def toy(comfy):
    with torch.inference_mode():
        return edits.load(sampling.load(world.cached()))


def test_an_unknown_edit_is_learnt_and_the_rest_is_held(toy, tmp_path):
    with torch.inference_mode():
        before = edits.exam(toy, None, "black")
        after = edits.exam(toy, edits.learn(toy, tmp_path, "black", seed=1), "black")
    print(f"without the LoRA {before}, with it {after}")
    assert before["error, mean"] > 0.5
    assert after["error, mean"] <= 0.1
    assert after["change where nothing was to change"] <= 0.05
