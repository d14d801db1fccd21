"""Every algorithm through ComfyUI's own loader, on every family; starting from a file, and on top of a LoRA that is
already on the model."""

import types

import comfy.lora
import pytest
import torch
from trainyard.nodes import host
from trainyard.tests.comfy.families import FAMILIES
from trainyard.tests.comfy.test_host import Problem, as_loader_gives, left_behind, loaded_output, shake
from trainyard.tests.comfy.test_host import fingerprint as weights_of
from trainyard.trainers.files import LoraFile, write_lora
from trainyard.trainers.loop import train
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.rng import make_generator
from trainyard.trainers.settings import (
    AdapterSettings,
    NoiseSettings,
    OptimizerSettings,
    RunSettings,
    compute_fingerprint,
)

NEW = ("DoRA", "LoHa", "LoKr")


def settings(family, algorithm, **more):
    return AdapterSettings(**{"rank": 2, "algorithm": algorithm, "conv": family == "sd15", "conv_rank": 2, **more})


def answers(session, problem, strengths=(0.0, 1.0, -1.0)):
    found = {}
    with torch.no_grad():
        for strength in strengths:
            with session.adapters.at_strength(strength):
                found[strength] = problem.denoiser.denoise(problem.x0, problem.sigma, problem.conds).clone()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("algorithm", NEW)
def test_a_saved_file_in_the_real_loader_gives_the_trained_output_at_plus_and_minus_one(algorithm, family, tmp_path):
    model = as_loader_gives(family)
    with torch.inference_mode(), host.session.open_training_session(model, settings(family, algorithm)) as session:
        shake(session.adapters, size=0.05 if algorithm == "DoRA" else 0.15)
        problem = Problem(session, family)
        said = answers(session, problem)
        tensors, _ = session.tensors()
    path = tmp_path / "lora.safetensors"
    write_lora(path, LoraFile(tensors))
    assert host.lora_keys.find_unloadable_layers(model, None, LoraFile(tensors)) == []
    for strength in (1.0, -1.0):
        got, wanted = loaded_output(model, path, strength, problem), said[strength]
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))
        assert error <= 1e-5, f"{algorithm} on {family} at {strength:+}: {error:.1e}"
        assert float((wanted - said[0.0]).abs().max()) > 100 * float((got - wanted).abs().max()), (
            "the adapter must do something that shows"
        )


@pytest.mark.parametrize("checkpointing", ["off", "per block"])
@pytest.mark.parametrize("family", ["sd15", "flux"])
@pytest.mark.parametrize("algorithm", ["LoHa", "LoKr"])
def test_gradients_equal_finite_differences(algorithm, family, checkpointing):
    """DoRA is left out: its gradient takes the norm as a constant, and finite differences do not."""
    with (
        torch.inference_mode(),
        host.session.open_training_session(
            as_loader_gives(family), settings(family, algorithm), checkpointing=checkpointing
        ) as session,
    ):
        problem = Problem(session, family)
        error = host.checks.check_gradients(session, problem.x0, problem.conds)
    assert error < 2e-3, f"{error:.1e}"


@pytest.mark.parametrize("family", ["sd15", "flux", "sd3"])
@pytest.mark.parametrize(
    "more",
    [dict(algorithm="DoRA"), dict(algorithm="LoRA", dropout=0.4, rank_dropout=0.3, module_dropout=0.2)],
    ids=["DoRA", "dropout"],
)
def test_checkpointed_gradients_are_those_without_checkpointing(more, family):
    found = []
    for checkpointing in ("off", "per block"):
        with (
            torch.inference_mode(),
            host.session.open_training_session(
                as_loader_gives(family), settings(family, **more), checkpointing=checkpointing
            ) as session,
        ):
            shake(session.adapters)
            problem = Problem(session, family)
            with session.adapters.dropout_active(make_generator(5)):
                loss = problem.loss().mean()
            loss.backward()  # outside: what was left out must be remembered
            found.append(torch.cat([p.grad.flatten() for p in session.adapters.parameters() if p.grad is not None]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6 * float(found[0].abs().max()))


# -- starting from a file, and on top of a LoRA ------------------------------------------------------------------------


def trained_file(model, family, algorithm="LoRA", seed=0, start=None, **more):
    with (
        torch.inference_mode(),
        host.session.open_training_session(model, settings(family, algorithm, **more), seed=seed) as session,
    ):
        if start is None:
            shake(session.adapters, seed, 0.05)
        else:
            host.session.load_lora_into_session(session, start)
        return LoraFile(session.tensors()[0])


@pytest.mark.parametrize("algorithm", ["LoRA", *NEW])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_a_file_that_is_started_from_comes_out_as_it_went_in(family, algorithm):
    """Names of ComfyUI's own kind ("diffusion_model...") are found as well."""
    model = as_loader_gives(family)
    first = trained_file(model, family, algorithm)
    second = trained_file(model, family, algorithm, seed=1, start=first)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[k], second[k], rtol=1e-4, atol=1e-5) for k in first)
    if family == "flux":
        with torch.inference_mode(), host.session.open_training_session(model, settings(family, algorithm)) as session:
            names = {key: f"diffusion_model.{name}" for name, key in session.layer_keys.items()}
        renamed = LoraFile({k.replace(k.split(".")[0], names[k.split(".")[0]]): v for k, v in first.items()})
        assert trained_file(model, family, algorithm, seed=1, start=renamed).keys() == first.keys()


def diffusers_file(model, session, rank=2, up=".lora_B.weight", down=".lora_A.weight"):
    """A LoRA in the names of diffusers that the host's loader knows, q, k and v apart, of the layers of a session."""
    draw, tensors, names = make_generator(3), {}, {}
    layers = {f"diffusion_model.{name}.weight": layer for name, layer in session.adapters.layers.items()}
    for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        name, rows = target[:2] if isinstance(target, tuple) else (target, None)
        if key.startswith("transformer.") and name in layers:
            names.setdefault(name, {})[rows] = key
    for name, keys in names.items():
        for rows, key in keys.items():
            if rows is None and len(keys) > 1:  # Flux.2's name for the whole of what Flux splits
                continue
            outputs = rows[2] if rows else layers[name].out_features
            tensors[f"{key}{up}"] = torch.randn(outputs, rank, generator=draw) * 0.02
            tensors[f"{key}{down}"] = torch.randn(rank, layers[name].in_features, generator=draw) * 0.1
    return LoraFile(tensors)


@pytest.mark.parametrize("suffix", ["weight", "default.weight"])
@pytest.mark.parametrize("family", ["sd3", "flux", "zimage"])
def test_q_k_and_v_of_diffusers_start_a_fused_layer_exactly(family, suffix, tmp_path):
    """Against the host's loader, which adds each part to its rows of the weight. Joined, the rank is 3 * 2, and 8 is
    asked for: the other layers and ranks are filled up."""
    model = as_loader_gives(family)
    with torch.inference_mode(), host.session.open_training_session(model, settings(family, "LoRA", rank=8)) as session:
        start = diffusers_file(model, session, up=f".lora_B.{suffix}", down=f".lora_A.{suffix}")
        assert any("to_k.lora_A" in key for key in start)
        host.session.load_lora_into_session(session, start)
        problem = Problem(session, family)
        said = answers(session, problem, (0.0, 1.0))
    write_lora(tmp_path / "split.safetensors", start)
    wanted = loaded_output(model, tmp_path / "split.safetensors", 1.0, problem)
    error, effect = (float((said[s] - wanted).abs().max() / wanted.abs().max()) for s in (1.0, 0.0))
    assert error <= 2e-6 and effect > 1e-3, f"{family}: {error:.1e} of {effect:.1e}"


def test_a_rank_too_small_for_q_k_and_v_together_says_the_rank():
    model = as_loader_gives("flux")
    with torch.inference_mode(), host.session.open_training_session(model, settings("flux", "LoRA")) as session:
        start = diffusers_file(model, session)
        with pytest.raises(ValueError, match=r"the file has rank \d+, so set rank to that"):
            host.session.load_lora_into_session(session, start)


@pytest.mark.parametrize(
    ("down", "up"),
    [(".lora_A.default.weight", ".lora_B.default.weight"), ("_lora.down.weight", "_lora.up.weight"),
     (".lora.down.weight", ".lora.up.weight"), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")],
)  # fmt: skip
def test_every_spelling_of_the_host_is_started_from(down, up):
    model = as_loader_gives("flux")
    first = trained_file(model, "flux")
    start = LoraFile({k.replace(".lora_down.weight", down).replace(".lora_up.weight", up): v for k, v in first.items()})
    second = trained_file(model, "flux", seed=1, start=start)
    assert first.keys() == second.keys() and all(torch.allclose(first[k], second[k]) for k in first)


def test_two_spellings_of_one_layer_are_refused():
    model = as_loader_gives("flux")
    first = trained_file(model, "flux")
    name = next(k for k in first if k.endswith("single_blocks_0_linear2.lora_up.weight")).split(".")[0]
    twin = {k.replace(name, "diffusion_model.single_blocks.0.linear2"): v for k, v in first.items() if name in k}
    with pytest.raises(ValueError, match=r"start_from holds .*linear2.weight twice"):
        trained_file(model, "flux", start=LoraFile(first | twin))


def test_a_file_of_another_model_is_refused_with_its_layer():
    with pytest.raises(
        ValueError, match="start_from has .* layers that are not trained here, such as lora_unet_double_blocks"
    ):
        trained_file(as_loader_gives("sd15"), "sd15", start=trained_file(as_loader_gives("flux"), "flux"))


@pytest.mark.parametrize("algorithm", ["LoRA", "DoRA"])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_training_goes_on_top_of_a_lora_that_is_on_the_model(family, algorithm, tmp_path):
    """The loss starts from what the patched model says; the new file on top of the first gives the trained output;
    nothing of either stays in the base."""
    model = as_loader_gives(family)
    before = weights_of(model)
    first = trained_file(model, family)
    patched, _ = host.lora_keys.apply_lora(model, None, first)
    with (
        torch.inference_mode(),
        host.session.open_training_session(patched, settings(family, algorithm), seed=3) as session,
    ):
        problem = Problem(session, family)
        start = answers(session, problem, (0.0, 1.0))
        assert torch.allclose(start[0.0], start[1.0], rtol=1e-5, atol=1e-5), (
            "a fresh adapter starts from the model with the LoRA"
        )
        shake(session.adapters, 7, 0.05)
        trained = answers(session, problem, (1.0,))[1.0]
        second = LoraFile(session.tensors()[0])
    with torch.inference_mode(), host.session.open_training_session(model, settings(family, "LoRA")) as session:
        alone = answers(session, Problem(session, family), (0.0,))[0.0]
    assert not torch.allclose(alone, start[0.0], rtol=1e-3, atol=1e-3), "the first LoRA must do something"
    write_lora(tmp_path / "second.safetensors", second)
    got = loaded_output(patched, tmp_path / "second.safetensors", 1.0, problem)
    assert float((got - trained).abs().max() / trained.abs().max().clamp(min=1)) <= 1e-5
    patched.unpatch_model()
    assert weights_of(model) == before and left_behind(model) == []


def test_what_is_started_from_is_part_of_the_run():
    from trainyard.nodes.train.train_lora import LoraTask

    a_job = types.SimpleNamespace(noise=NoiseSettings(), assistant=None, model=as_loader_gives("sd3"))
    data = types.SimpleNamespace(fingerprint="x", empty_key=None)
    parts = lambda start: LoraTask(data=data, start_from=start).fingerprint_parts(a_job)
    one, same, other = (LoraFile({"a.lora_up.weight": torch.full((1,), value)}) for value in (1.0, 1.0, 2.0))
    prints = [compute_fingerprint(*parts(start)) for start in (None, one, same, other)]
    assert prints[1] == prints[2] and len(set(prints)) == 3


def test_two_steps_of_real_training_move_every_kind():
    from trainyard.trainers.data.encoded import EncodedDataset

    for algorithm in NEW:
        with (
            torch.inference_mode(),
            host.session.open_training_session(as_loader_gives("sd3"), settings("sd3", algorithm)) as session,
        ):
            draw = make_generator(0)
            latents = [{"samples": torch.randn(1, 16, 16, 16, generator=draw)} for _ in range(2)]
            data = EncodedDataset.from_core(
                latents,
                [[[torch.randn(1, 7, 64, generator=draw), {"pooled_output": torch.randn(1, 32, generator=draw)}]]],
            )
            train(
                LoraTraining(session.denoiser, session.adapters, data),
                RunSettings(steps=2, learning_rate=1e-2),
                OptimizerSettings(),
            )
            assert len(session.tensors()[0]) > 0, algorithm
