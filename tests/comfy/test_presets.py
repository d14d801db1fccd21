"""The settings nodes as ComfyUI runs them: presets give what Train LoRA takes, and prompts saved before a setting
existed still run."""

import dataclasses

import pytest
from trainyard.nodes.train import presets, prior, settings_nodes
from trainyard.nodes.train.presets import PresetRecipe
from trainyard.nodes.train.settings_nodes import Adapter, NoiseAndLoss, Optimizer
from trainyard.tests.comfy.test_train_lora import job, result
from trainyard.trainers.presets import PRESET_FAMILIES
from trainyard.trainers.settings import AdapterSettings, NoiseSettings, OptimizerSettings


def test_a_preset_trains(folders):
    out = PresetRecipe.execute("Flux", "character", 5, "rank = 4").args
    made = job("flux", steps=2, learning_rate=out[4])
    made = dataclasses.replace(made, adapter=out[0], optimizing=out[1], noise=out[2])
    lora, losses, _ = result(made)
    assert len(losses) == 2 and len(lora) > 0 and out[3:7] == (1000, 1e-4, 4, 768)


@pytest.mark.parametrize("family", PRESET_FAMILIES)
def test_a_preset_says_what_it_chose(family):
    out = PresetRecipe.execute(family, "style", 40)
    assert isinstance(out.args[0], AdapterSettings) and out.args[7].startswith(f"{family}, style\nsteps ")


@pytest.mark.parametrize(
    "node, record", [(Adapter, AdapterSettings), (Optimizer, OptimizerSettings), (NoiseAndLoss, NoiseSettings)]
)
def test_settings_that_came_later_may_be_absent_from_a_saved_prompt(node, record):
    schema = node.GET_SCHEMA()
    late = [i.id for i in schema.inputs if i.optional]
    assert late and [i.id for i in schema.inputs][-len(late) :] == late, (
        "after all others: widgets are saved by position"
    )
    assert node.execute().args[0] == record()


def test_every_node_has_a_schema():
    for module in (presets, prior, settings_nodes):
        for node in module.NODES:
            assert node.GET_SCHEMA().node_id.startswith("Trainyard")
