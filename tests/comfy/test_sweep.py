"""Strength Sweep on the toy world: a LoRA of random numbers has a curve, and its file can be rescaled."""

import json

import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.train.sweep import StrengthSweepRun, SweepSettings, arrange_sweep_rows, calibrate_lora
from trainyard.tests.toy import sampling, world
from trainyard.trainers.adapters.adapters import Adapters
from trainyard.trainers.files import LoraFile, rescale_lora
from trainyard.trainers.monitor.plots import draw_sweep_sheet
from trainyard.trainers.monitor.strength_curve import StrengthCurve
from trainyard.trainers.rng import make_generator
from trainyard.trainers.settings import AdapterSettings


@pytest.fixture(scope="module")
def toy(comfy):
    return sampling.load(world.cached())


def random_lora(model, size=0.03):
    network = model.model.diffusion_model
    made = Adapters(network, AdapterSettings(rank=2), make_generator(1))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=make_generator(len(p))) * size)
    return LoraFile(
        made.export_tensors(host.lora_keys.unet_lora_keys(model.model, made.layers).__getitem__)[0],
        {"ss_steps": "3"},
        3,
    )


def swept(toy, lora, strengths="-2, 0, 1, 2", **rest):
    prompts = {
        name: toy.clip.encode_from_tokens_scheduled(toy.clip.tokenize(text))
        for name, text in (("p", "a red circle"), ("n", ""), ("b", "a blue circle"))
    }
    settings = SweepSettings(strengths=strengths, pictures=2, resolution=64, steps=6, guidance=2.0)
    sweep = StrengthSweepRun(toy.model, lora, prompts["p"], prompts["n"], settings, "euler", "simple", None)
    with torch.inference_mode():
        return sweep, sweep.curve(
            *(prompts[name] if name else None for name in (rest.get("toward"), rest.get("away"), rest.get("preserve")))
        )


def test_a_lora_without_a_direction_is_measured_along_its_own(toy):
    sweep, curve = swept(toy, random_lora(toy.model))
    assert curve.strengths == (-2.0, 0.0, 1.0, 2.0) and curve.effect[1] == 0.0 and curve.drift[1] == 0.0
    assert curve.effect[3] == pytest.approx(1.0, abs=1e-4) and curve.drift[3] > curve.drift[2] > 0
    images = sweep.decoded(toy.vae)
    assert images.shape == (8, 64, 64, 3)
    sheet = draw_sweep_sheet(
        arrange_sweep_rows(images, 4), sweep.labels(), curve.strengths, curve.effect, curve.drift, curve.unit
    )
    assert sheet.width > 4 * 192 and len(sheet.getcolors(10**6)) > 100


def test_the_model_itself_tells_red_from_blue(toy):
    """Measured toward blue: images of the blue prompt are the unit, and a file that does nothing stays at 0."""
    nothing = LoraFile({k: v * 0 + 1e-9 for k, v in random_lora(toy.model).items()})
    sweep, curve = swept(toy, nothing, toward="b", away="p", preserve="n")
    assert curve.effect == pytest.approx([0, 0, 0, 0], abs=0.02) and curve.unit == "what `toward` itself looks like"
    assert max(curve.drift) < 0.01
    blue = sweep.asked(sweep.draw("toward", 0.0)).mean() - sweep.asked(sweep.draw("scene", 0.0)).mean()
    assert blue > 0.2, f"blue images are only {blue:.2f} more like blue than red ones"


def test_a_rescaled_file_does_at_1_what_it_did_at_the_factor(toy):
    lora = random_lora(toy.model)
    smaller = rescale_lora(lora, 0.5, {"trainyard.rescaled": "0.5"})
    first, _ = swept(toy, lora, "0.5")
    second, _ = swept(toy, smaller, "1")
    torch.testing.assert_close(second.latents[1.0], first.latents[0.5], atol=1e-5, rtol=1e-4)
    assert smaller.metadata["ss_steps"] == "3" and smaller.steps == 3


def test_an_asked_effect_is_found_on_the_curve_and_one_out_of_reach_is_refused(toy):
    lora, curve = random_lora(toy.model), StrengthCurve((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (0.1, 0.0, 0.1), "x")
    new, line = calibrate_lora(lora, curve, 1.0)
    key = next(k for k in lora if k.endswith(".alpha"))
    assert float(new[key]) == pytest.approx(float(lora[key]) / 2) and "rescaled by 0.5" in line
    assert json.loads(new.metadata["trainyard.curve"])["effect"] == [-2.0, 0.0, 2.0]
    same, _ = calibrate_lora(lora, curve, 0.0)
    assert all(torch.equal(same[k], lora[k]) for k in lora) and "trainyard.curve" in same.metadata
    with pytest.raises(ValueError, match="No measured strength has the effect 5"):
        calibrate_lora(lora, curve, 5.0)


@pytest.mark.parametrize("text", ["", "0", "one, two", "1, nan", "1000"])
def test_strengths_that_make_no_sweep_are_refused(text):
    with pytest.raises(ValueError, match="strengths is"):
        SweepSettings(strengths=text).values()
