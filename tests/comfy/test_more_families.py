"""Families beyond those of tests/comfy/families.py: what a run checks, two steps, and a file that the host loads."""

import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.host import gradient_check
from trainyard.nodes.host.families import TESTED_CLASSES
from trainyard.tests.comfy import families
from trainyard.tests.comfy.more_families import MORE, REFUSED, conditions_of
from trainyard.tests.comfy.test_host import Problem, check_loaded_outputs, outputs_by_strength, shake
from trainyard.trainers.adapters.adapters import select_target_layers
from trainyard.trainers.memory.plan import PLAN_OFF
from trainyard.trainers.settings import AdapterSettings

pytestmark = [  # the host's, of numpy and torch
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor"),
]
SETTINGS = AdapterSettings(rank=4, targets="attention+mlp")


@pytest.mark.parametrize("name", MORE)
def test_a_model_trains_with_right_gradients_and_the_host_loads_its_file(name, monkeypatch, tmp_path):
    """All in one session, since most of the time is spent on making the model. Every layer is in a random half once."""
    monkeypatch.setitem(families.TABLE, name, MORE[name])
    monkeypatch.setattr(gradient_check, "SPLITS", 1)
    model = families.make(name, inference=True)
    with torch.inference_mode(), host.session.open_training_session(model, SETTINGS, checkpointing=PLAN_OFF) as session:
        assert session.family.known == (MORE[name].supported in TESTED_CLASSES), "others are checked before each run"
        problem = Problem(session, name)
        for seed, cond in enumerate(problem.conds):
            cond.update(conditions_of(name, seed))
        host.conditions.check_conditions(model, [("it", cond) for cond in problem.conds])
        error = host.checks.check_gradients(session, problem.x0, problem.conds)
        assert error < 1e-3, f"gradients are off by {error:.1e}"
        lower_the_loss(session, problem)
        shake(session.adapters, size=0.02)
        together, apart = problem.loss(), torch.cat([problem.loss(slice(i, i + 1)) for i in range(2)])
        assert torch.allclose(together, apart, rtol=1e-5), f"{together.tolist()} against {apart.tolist()}"
        outputs = outputs_by_strength(session, problem)
        tensors, _ = session.tensors()
    check_loaded_outputs(model, tensors, tmp_path / "lora.safetensors", problem, outputs)


def lower_the_loss(session, problem):
    """Two steps along the gradient, each of which should lower the loss by 2 %."""
    losses = []
    for _ in range(3):
        session.adapters.zero_grad()
        loss = problem.loss().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        slopes = [p.grad for p in session.adapters.parameters() if p.grad is not None]
        rate = 0.02 * losses[-1] / sum(float(slope.square().sum()) for slope in slopes)
        with torch.no_grad():
            for p in session.adapters.parameters():
                if p.grad is not None:
                    p -= rate * p.grad
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", MORE)
def test_both_presets_of_targets_match_layers(name):
    network = families.base_model(MORE[name], torch.float32).diffusion_model
    attention, more = (
        select_target_layers(network, AdapterSettings(targets=targets)) for targets in ("attention", "attention+mlp")
    )
    assert 0 < len(attention) < len(more)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_with_a_reason(name, monkeypatch):
    monkeypatch.setitem(families.TABLE, name, REFUSED[name])
    with pytest.raises(ValueError, match=f"{REFUSED[name].supported} cannot be trained: "):
        host.conditions.check_trainable(families.make(name))


def test_the_table_of_models_is_current():
    from trainyard.tools import model_table

    assert model_table.PATH.read_text("utf-8") == model_table.format_table(), "run `make refresh`"
