"""Families beyond those of tests/comfy/families.py: the checks of a run, two steps, and a file that the host loads."""

import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.host.families import TESTED_CLASSES
from trainyard.tests.comfy import families
from trainyard.tests.comfy.more_families import ASKED_FOR, MORE, PER_BLOCK
from trainyard.tests.comfy.test_host import Problem
from trainyard.trainers.files import LoraFile
from trainyard.trainers.memory.plan import PLAN_OFF, PLAN_PER_BLOCK
from trainyard.trainers.settings import AdapterSettings


@pytest.mark.parametrize("name", MORE)
def test_two_steps_lower_the_loss_with_right_gradients_and_the_host_loads_the_file(name, monkeypatch):
    monkeypatch.setitem(families.TABLE, name, MORE[name])
    model = families.make(name, inference=True)
    plan = PLAN_PER_BLOCK if name in PER_BLOCK else PLAN_OFF
    settings = AdapterSettings(rank=4, targets="attention+mlp")
    with torch.inference_mode(), host.session.open_training_session(model, settings, checkpointing=plan) as session:
        assert session.family.known == (MORE[name].supported in TESTED_CLASSES), "others are checked before each run"
        problem = Problem(session, name)
        for cond in problem.conds:
            cond.update(ASKED_FOR.get(name, {}))
        error = host.checks.check_gradients(session, problem.x0, problem.conds)
        assert error < 1e-3, f"gradients are off by {error:.1e}"
        optimizer = torch.optim.SGD(session.adapters.parameters(), 0.0)
        losses = []
        for _ in range(3):
            session.adapters.zero_grad()
            loss = problem.loss().mean()
            value = float(loss.detach())
            loss.backward()
            norm = sum(float(p.grad.square().sum()) for p in session.adapters.parameters() if p.grad is not None)
            optimizer.param_groups[0]["lr"] = 0.02 * value / norm  # a step that should lower the loss by 2 %
            optimizer.step()
            losses.append(value)
        assert losses[2] < losses[1] < losses[0]
        host.lora_keys.check_lora_loads(model, None, LoraFile(session.tensors()[0]))


def test_the_table_of_models_is_current():
    from trainyard.tools import model_table

    assert model_table.PATH.read_text("utf-8") == model_table.format_table(), "run `make refresh`"
