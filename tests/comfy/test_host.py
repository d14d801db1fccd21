"""The door to ComfyUI, on ComfyUI's own classes at tiny size: gradients, files, and a model given back as it was."""

import contextlib
import hashlib
import json

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import nodes as comfy_nodes
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file, save_file
from trainyard.nodes import host
from trainyard.tests.comfy import tiny
from trainyard.tests.comfy.families import FAMILIES, cond, latent_shape, make
from trainyard.trainers.adapters.adapters import Adapters
from trainyard.trainers.diffusion import denoising_loss, sample_sigmas
from trainyard.trainers.files import LoraFile, write_lora
from trainyard.trainers.settings import AdapterSettings

RANK_4 = AdapterSettings(rank=4)
ADAPTERS = {"sd15": AdapterSettings(rank=4, conv=True, conv_rank=2)}


def captions(family, count=2):
    entries = [cond(family, seed)[0] for seed in range(count)]
    return [{"cross_attn": tensor, **extras} for tensor, extras in entries]


def shake(adapters, seed=0, size=0.05):
    """Adapters away from zero, as after training."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * size)


class Problem:
    """One fixed batch of two different captions."""

    def __init__(self, session, family):
        rng = torch.Generator().manual_seed(3)
        shape = latent_shape(family, 2)
        self.denoiser, self.conds = session.denoiser, captions(family)
        self.x0 = session.denoiser.model_space(torch.randn(shape, generator=rng))
        self.noise = torch.randn(self.x0.shape, generator=rng)
        self.sigma = sample_sigmas(session.denoiser, session.family.density, self.x0, rng)

    def loss(self, rows=slice(None)):
        return denoising_loss(self.denoiser, self.x0[rows], self.noise[rows], self.sigma[rows], self.conds[rows])

    def gradient(self, adapters):
        adapters.zero_grad()
        self.loss().mean().backward()
        return torch.cat(
            [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in adapters.parameters()]
        )


def fingerprint(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def left_behind(model):
    """Names of modules that still carry something of ours."""
    return [
        n for n, m in model.model.named_modules() if "forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks
    ]


def as_loader_gives(family, dtype=torch.float32):
    return make(family, dtype=dtype, inference=True)


@pytest.mark.parametrize("checkpointing", host.session.CHECKPOINTING_MODES[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_finite_differences(family, checkpointing):
    with (
        torch.inference_mode(),
        host.session.open_training_session(
            as_loader_gives(family), ADAPTERS.get(family, RANK_4), checkpointing=checkpointing
        ) as session,
    ):
        problem = Problem(session, family)
        error = host.checks.check_gradients(session, problem.x0, problem.conds)
        assert error < 1e-3, f"{family}: gradients are off by {error:.1e}"


def reference_gradient(family, model, adapter):
    """Autograd through the host's own in-place code, with every overwritten tensor saved by torch itself."""
    row, patcher = host.families.find_model_family(model.model.model_config), host.session.clone_for_training(model)
    with host.context.enable_gradients(), host.context.set_training_flag(), host.context.use_differentiable_rope():
        adapters = Adapters(model.model.diffusion_model, adapter)
        shake(adapters)
        with (
            host.session.load_with_adapters(patcher, adapters, 0.0),
            torch.autograd.graph.allow_mutation_on_saved_tensors(),
        ):
            host.context.replace_inference_parameters(model.model)
            session = host.session.TrainingSession(host.denoiser.ComfyDenoiser(patcher, row), adapters, row)
            return Problem(session, family).gradient(adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", host.session.CHECKPOINTING_MODES[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_an_out_of_place_reference(family, checkpointing, dtype):
    adapter = ADAPTERS.get(family, RANK_4)
    wanted = reference_gradient(family, as_loader_gives(family, dtype), adapter)
    with (
        torch.inference_mode(),
        host.session.open_training_session(
            as_loader_gives(family, dtype), adapter, checkpointing=checkpointing
        ) as session,
    ):
        shake(session.adapters)
        got = Problem(session, family).gradient(session.adapters)
    cosine = float(torch.nn.functional.cosine_similarity(got.double(), wanted.double(), dim=0))
    assert cosine >= 0.9999, f"{family}, {checkpointing}, {dtype}: cosine {cosine:.6f}"
    assert float(got.norm() / wanted.norm()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_two_captions_equals_two_batches_of_one(family):
    with torch.inference_mode(), host.session.open_training_session(as_loader_gives(family), RANK_4) as session:
        shake(session.adapters)
        problem = Problem(session, family)
        together, apart = problem.loss(), torch.cat([problem.loss(slice(i, i + 1)) for i in range(2)])
        assert torch.allclose(together, apart, rtol=1e-5), f"{together.tolist()} against {apart.tolist()}"
        problem.conds.reverse()
        assert not torch.allclose(problem.loss(), together, rtol=1e-5), "the captions must matter"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_file_in_the_real_loader_gives_the_trained_output_at_plus_and_minus_one(family, tmp_path):
    model = as_loader_gives(family)
    with torch.inference_mode(), host.session.open_training_session(model, ADAPTERS.get(family, RANK_4)) as session:
        shake(session.adapters, size=0.02)
        problem = Problem(session, family)
        outputs = outputs_by_strength(session, problem)
        tensors, _ = session.tensors()
    check_loaded_outputs(model, tensors, tmp_path / "lora.safetensors", problem, outputs)


def outputs_by_strength(session, problem):
    """{strength: x0} at 0, 1 and -1"""

    def ask(strength):
        with torch.no_grad(), session.adapters.at_strength(strength):
            return problem.denoiser.denoise(problem.x0, problem.sigma, problem.conds).clone()

    return {strength: ask(strength) for strength in (0.0, 1.0, -1.0)}


def check_loaded_outputs(model, tensors, path, problem, outputs):
    write_lora(path, LoraFile(tensors))
    for strength in (1.0, -1.0):
        wanted, got = outputs[strength], loaded_output(model, path, strength, problem)
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))
        assert error <= 1e-5, f"at {strength:+}: {error:.1e}"
        assert float((wanted - outputs[0.0]).abs().max()) > 100 * float((got - wanted).abs().max()), (
            "the adapter must do something that shows"
        )


def loaded_output(model, path, strength, problem):
    """The same prediction through ComfyUI's own LoraLoader machinery."""
    from comfy.utils import load_torch_file

    patched, _ = comfy.sd.load_lora_for_models(model, None, load_torch_file(str(path), safe_load=True), strength, 0.0)
    with host.context.enable_gradients(), torch.no_grad():
        mm.load_models_gpu([patched])
        patched.pre_run()
        out = host.denoiser.ComfyDenoiser(patched, host.families.find_model_family(model.model.model_config)).denoise(
            problem.x0, problem.sigma, problem.conds
        )
        mm.load_models_gpu([model])
    return out


class Stop(BaseException):
    """Like the host's interrupt: no Exception."""


OOM = torch.OutOfMemoryError("raised by a test")
ENDINGS = {"success": None, "interrupt": Stop(), "exception": RuntimeError("failed"), "out of memory": OOM}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_given_back_bit_for_bit_after(ending, family):
    model = as_loader_gives(family)
    before, classes = fingerprint(model), {type(m): type(m).forward for m in model.model.modules()}
    error = ENDINGS[ending]
    try:
        with (
            torch.inference_mode(),
            host.session.open_training_session(model, RANK_4, checkpointing="per block") as session,
        ):
            shake(session.adapters)
            Problem(session, family).loss().mean().backward()
            if error is not None:
                raise error
    except BaseException as raised:
        if raised is not error:
            raise
    assert fingerprint(model) == before
    assert left_behind(model) == []
    assert {type(m): type(m).forward for m in model.model.modules()} == classes
    assert mm.in_training is False
    assert not model.injections


def quantised(state):
    """ComfyUI's per-layer format: fp8 weights with a scale and a note, for every matrix of a block."""
    out = {}
    for key, value in state.items():
        if value.ndim != 2 or "blocks" not in key:
            out[key] = value
            continue
        base, scale = key.removesuffix("weight"), value.float().abs().max() / 448
        out[key] = (value.float() / scale).to(torch.float8_e4m3fn)
        out[f"{base}weight_scale"] = scale.reshape(())
        out[f"{base}comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return out


@pytest.mark.parametrize("checkpointing", host.session.CHECKPOINTING_MODES[:2])
@pytest.mark.parametrize("storage", ["fp8", "quantised"])
def test_a_base_in_eight_bits_trains_with_right_gradients(storage, checkpointing, tmp_path):
    path = tiny.build("flux")
    if storage == "quantised":
        save_file(quantised(load_file(path)), tmp_path / "flux.safetensors")
        path = tmp_path / "flux.safetensors"
    options = {"dtype": torch.float8_e4m3fn} if storage == "fp8" else {}
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path), model_options=options)
        before = host.identity.hash_model_and_schedule(model)
        with host.session.open_training_session(model, RANK_4, checkpointing=checkpointing) as session:
            assert len(session.adapters.layers) == 20, "quantised layers are found as well"
            cond = {"cross_attn": torch.randn(1, 7, 768), "pooled_output": torch.randn(1, 768)}
            error = host.checks.check_gradients(session, torch.randn(1, 16, 8, 8), [cond])
    assert error < 1e-3, f"{error:.1e}"
    assert host.identity.hash_model_and_schedule(model) == before


def quantised_as(name, state):
    """In any of ComfyUI's per-layer formats, as its own classes pack them."""
    layout, out = QUANT_ALGOS[name]["comfy_tensor_layout"], {}
    about = {"convrot_groupsize": 64} if name in ("convrot_w4a4", "asym_w4a8_int8") else {}
    scaled = {"scale": "recalculate"} if name.startswith("float8") or name == "nvfp4" else {}
    for key, value in state.items():
        if value.ndim != 2 or "blocks" not in key:
            out[key] = value
            continue
        out |= QuantizedTensor.from_float(value.float(), layout, **about, **scaled).state_dict(key)
        note = json.dumps({"format": name, **about}).encode()
        out[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    return {key: value.contiguous() for key, value in out.items()}


@pytest.mark.parametrize("name", QUANT_ALGOS)
def test_each_quantised_format_trains_with_right_gradients_on_a_card_that_multiplies_in_it(name, tmp_path, monkeypatch):
    for support in ("supports_fp8_compute", "supports_nvfp4_compute", "supports_mxfp8_compute"):
        monkeypatch.setattr(mm, support, lambda device=None: True)
    save_file(quantised_as(name, load_file(tiny.build("flux"))), tmp_path / "flux.safetensors")
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(tmp_path / "flux.safetensors"))
        layers = [m for m in model.model.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]
        assert len(layers) > 10
        before = host.identity.hash_model_and_schedule(model)
        with host.session.open_training_session(model, RANK_4) as session:
            cond = {"cross_attn": torch.randn(1, 7, 768), "pooled_output": torch.randn(1, 768)}
            error = host.checks.check_gradients(session, torch.randn(1, 16, 8, 8), [cond])
    assert error < 1e-3, f"{error:.1e}"
    assert host.identity.hash_model_and_schedule(model) == before
    assert not any(layer._full_precision_mm for layer in layers), "samplers multiply in the format again"


@pytest.mark.parametrize("storage", ["fp8", "quantised"])
def test_the_frozen_model_and_untrained_adapters_predict_the_same_bits_where_fp8_is_multiplied(
    storage, tmp_path, monkeypatch
):
    """As with `--fast fp8_matrix_mult` on a device that can: what is learnt is what the adapters change, and no
    difference of arithmetic between a pass with gradients and one without."""
    monkeypatch.setattr(mm, "SUPPORT_FP8_OPS", True)
    path, fp8_linear = tiny.build("flux"), comfy.ops.fp8_linear
    if storage == "quantised":
        save_file(quantised(load_file(path)), tmp_path / "flux.safetensors")
        path = tmp_path / "flux.safetensors"
    options = {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True} if storage == "fp8" else {}
    rng = torch.Generator().manual_seed(0)
    cond = {
        "cross_attn": torch.randn(1, 7, 768, generator=rng),
        "pooled_output": torch.randn(1, 768, generator=rng),
    }
    x, sigma = torch.randn(1, 16, 8, 8, generator=rng), torch.tensor([0.5])
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path), model_options=options)
        with host.session.open_training_session(model, RANK_4) as session:
            assert (comfy.ops.fp8_ops.Linear in map(type, session.denoiser.model.modules())) == (storage == "fp8")
            student = session.denoiser.denoise(x, sigma, [cond])
            with torch.no_grad(), session.adapters.at_strength(0):
                teacher = session.denoiser.denoise(x, sigma, [cond])
            assert student.requires_grad and torch.equal(student, teacher)
    assert comfy.ops.fp8_linear is fp8_linear


def test_no_shared_transfer_buffer_is_used_while_training(monkeypatch):
    """The host's streams fetch every offloaded layer into one buffer; backward would read another layer's weights."""
    monkeypatch.setattr(mm, "NUM_STREAMS", 2)
    with host.session.open_training_session(make("sd3"), RANK_4):
        assert mm.get_offload_stream(torch.device("cuda")) is None
    assert mm.NUM_STREAMS == 2


def test_an_interrupt_raised_by_the_host_inside_a_forward_comes_through():
    model = as_loader_gives("flux")
    before = fingerprint(model)
    with (
        pytest.raises(mm.InterruptProcessingException),
        torch.inference_mode(),
        host.session.open_training_session(model, RANK_4) as session,
    ):
        problem = Problem(session, "flux")
        mm.interrupt_current_processing(True)
        problem.loss()
    assert fingerprint(model) == before
    assert left_behind(model) == []


def test_sampling_works_as_before_after_a_training():
    family = "flux"
    model = as_loader_gives(family)
    sample = lambda: comfy_nodes.KSampler().sample(
        model, 1, 2, 1.0, "euler", "simple", cond(family), cond(family, 1), {"samples": torch.zeros(latent_shape(family))}, 1.0
    )[0]["samples"]  # fmt: skip
    with torch.inference_mode():
        before = sample()
        with host.session.open_training_session(model, RANK_4) as session:
            shake(session.adapters)
            Problem(session, family).loss().mean().backward()
        assert torch.equal(sample(), before)


def test_training_on_top_of_a_lora_that_is_already_on_the_model_sees_it():
    """The other LoRA is baked into the weights that are trained on, and the file holds only what was learnt on top."""
    family = "sd3"
    model = as_loader_gives(family)
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
        shake(session.adapters, size=0.1)
        problem = Problem(session, family)
        with torch.no_grad():
            wanted = problem.loss()
        tensors, _ = session.tensors()
    patched, _ = host.lora_keys.apply_lora(model, None, LoraFile(tensors))
    with torch.inference_mode(), host.session.open_training_session(patched, RANK_4) as session, torch.no_grad():
        got = Problem(session, family).loss()
    assert torch.allclose(got, wanted, rtol=1e-4), f"{got.tolist()} against {wanted.tolist()}"


def test_latents_of_another_model_are_refused():
    with pytest.raises(
        ValueError, match="The latents have 4 channels and this MODEL expects 16. Encode the dataset with the VAE"
    ):
        host.checks.check_latent_channels(make("flux"), 4)


def test_a_model_whose_gradients_are_wrong_is_refused(monkeypatch):
    """An in-place residual that autograd cannot see: the loss moves more than its gradient says."""
    model = as_loader_gives("anima")
    block = type(model.model.diffusion_model.blocks[0])
    original = block.forward
    monkeypatch.setattr(
        block,
        "forward",
        lambda self, x, *a, **k: (
            x + (original(self, x, *a, **k) - x).detach() * 0.5 + (original(self, x, *a, **k) - x) * 0.5
        ),
    )
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
        problem = Problem(session, "anima")
        with pytest.raises(RuntimeError, match="does not know Anima.* gradients are off by"):
            host.checks.check_gradients(session, problem.x0, problem.conds)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_min_snr_and_native_scale_by_hand(family):
    """sigma 2: SNR 1/4. eps: |dx0/dout| = 2. min-SNR with gamma 0.1 weighs the noise error by 0.1 * 4 = 0.4."""
    from trainyard.trainers.diffusion import loss_weight, snr
    from trainyard.trainers.settings import NoiseSettings

    with host.session.open_training_session(make(family), RANK_4) as session:
        sigma = torch.tensor([2.0])
        assert float(session.denoiser.native_scale(sigma)) == pytest.approx(2.0)
        assert float(snr(session.denoiser, sigma)) == pytest.approx(0.25)
        assert float(
            loss_weight(session.denoiser, sigma, NoiseSettings(weighting="min-SNR", gamma=0.1))
        ) == pytest.approx(0.4)


def test_native_error_of_v_prediction_is_the_error_of_v():
    """x0 = x/(s^2+1) - s/sqrt(s^2+1) v; at s = 1 an x0 error of 1 is a v error of sqrt(2)."""
    with host.session.open_training_session(make("sd2_v"), RANK_4) as session:
        assert float(session.denoiser.native_scale(torch.tensor([1.0]))) == pytest.approx(2**-0.5)


def test_discrete_models_train_on_their_own_timesteps():
    with host.session.open_training_session(make("sd15"), RANK_4) as session:
        ms = session.denoiser.sampling
        sigma = session.denoiser.sigma_at(torch.tensor([0.0, 0.5, 0.9999, 1.0]))
        assert torch.equal(sigma, ms.sigmas[[0, 500, 999, 999]])


def test_sdxl_size_conditioning_is_each_pictures_own():
    """Two images of another size in one batch get different model inputs, each as it gets alone."""
    model = as_loader_gives("sdxl")
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
        problem = Problem(session, "sdxl")
        problem.conds = [
            {
                **captions("sdxl")[0],
                "width": w,
                "height": 512,
                "crop_w": c,
                "crop_h": 0,
                "target_width": 64,
                "target_height": 64,
            }
            for w, c in ((512, 0), (1024, 77))
        ]
        rows = [session.denoiser._model_inputs(c, problem.x0[:1]) for c in problem.conds]
        assert not torch.equal(rows[0]["y"].cond, rows[1]["y"].cond)
        both, alone = problem.loss(), torch.cat([problem.loss(slice(i, i + 1)) for i in range(2)])
        assert torch.allclose(both, alone, rtol=1e-5)


@pytest.mark.parametrize(("family", "guidance"), [("flux", 1.0), ("chroma", 0.0)])
def test_guidance_while_training_is_the_familys(family, guidance):
    with torch.inference_mode(), host.session.open_training_session(as_loader_gives(family), RANK_4) as session:
        problem = Problem(session, family)
        assert float(session.denoiser._model_inputs(problem.conds[0], problem.x0[:1])["guidance"].cond) == guidance


def test_an_empty_lora_is_refused_with_the_reason():
    """A run can end before any layer learnt something: of prompts that are to stay as they are, for example."""
    with pytest.raises(ValueError, match="This LoRA is empty.*Train it for more steps"):
        host.lora_keys.apply_lora(make("sd3", inference=True), None, LoraFile({}))


def test_weights_that_a_loader_gave_stay_where_they_are_in_memory():
    """The host page-locks the memory of weights that wait there, and copies would give it back under its hands."""
    model = as_loader_gives("flux")
    addresses = lambda: {name: value.data_ptr() for name, value in model.model.state_dict().items()}
    before = addresses()
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4):
        assert not any(p.is_inference() for p in model.model.parameters())
        assert addresses() == before


def test_a_quantised_weight_becomes_a_normal_tensor_over_the_same_memory():
    with torch.inference_mode():
        made = QuantizedTensor.from_float(torch.randn(32, 32, dtype=torch.bfloat16), "TensorCoreFP8E4M3Layout")
    shared = host.context.share_as_normal_tensor(made)
    assert made.is_inference() and not shared.is_inference()
    assert not shared._qdata.is_inference()
    assert shared._qdata.data_ptr() == made._qdata.data_ptr()
    assert torch.equal(shared.dequantize(), made.dequantize())


def test_a_table_that_is_a_plain_attribute_becomes_a_normal_tensor_over_the_same_memory():
    """ACE-Step's positions of lyrics: a layer that is trained reads them, and autograd keeps what it reads."""
    from comfy.ldm.ace.lyric_encoder import EspnetRelPositionalEncoding

    with torch.inference_mode():
        encoding = EspnetRelPositionalEncoding(8, 0.0, max_len=16)
        encoding.of_layers = [encoding.pe * 2, None]
    network, address, values = torch.nn.Sequential(encoding), encoding.pe.data_ptr(), encoding.pe.clone()
    with host.context.enable_gradients():
        assert host.context.replace_inference_parameters(network) == 2
        _, positions = encoding(torch.zeros(1, 5, 8))
        trained = torch.nn.Linear(8, 8)
        trained(positions + encoding.of_layers[0][:, :9]).sum().backward()
    assert encoding.pe.data_ptr() == address and torch.equal(encoding.pe, values)
    assert trained.weight.grad is not None and encoding.of_layers[1] is None
    assert host.context.replace_inference_parameters(network) == 0


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_model_in_fp16_has_the_gradients_of_fp32_under_a_loss_scale(accumulate):
    def gradient(dtype, scaled):
        model = as_loader_gives("sd3", dtype)
        with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
            shake(session.adapters)
            scale = host.session.make_loss_scale(session)
            assert (scale is not None) == (dtype == torch.float16)
            params, problem = list(session.adapters.parameters()), Problem(session, "sd3")

            def compute(scale):
                for _ in range(accumulate):
                    (problem.loss().mean() / accumulate * scale).backward()
                return torch.zeros(())

            scale.find_gradients(params, compute, lambda: None) if scaled else compute(1.0)
            return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in params])

    wanted = gradient(torch.float32, False)
    cosine = lambda got: float(torch.nn.functional.cosine_similarity(got.double(), wanted.double(), dim=0))
    plain, scaled = cosine(gradient(torch.float16, False)), cosine(gradient(torch.float16, True))
    assert scaled > 0.9999, f"without a scale {plain:.4f}, with it {scaled:.6f}"
    assert plain < scaled


# -- frozen weights that are cast --------------------------------------------------------------------------------------


def load_stored(family, storage, folder):
    """A tiny model whose weights are stored in another precision than it computes in."""
    path = tiny.build({"flux": "flux", "sd15": "sd15_noclip"}[family])
    if storage == "quantised":
        save_file(quantised(load_file(path)), folder / "model.safetensors")
        path = folder / "model.safetensors"
    dtypes = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}
    model = comfy.sd.load_diffusion_model(
        str(path), model_options={"dtype": dtypes[storage]} if storage in dtypes else {}
    )
    model.set_model_compute_dtype(torch.float32)
    return model


def gradients_and_copies(model, adapter):
    """(gradients of a step, shapes of the copies of weights that autograd kept, bytes that it kept)."""
    with host.session.open_training_session(model, adapter) as session:
        shake(session.adapters)
        network = session.denoiser.model.diffusion_model
        shapes = {tuple(p.shape) for p in network.parameters() if p.ndim > 1}
        shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
        mine = [*network.parameters(), *session.adapters.parameters()]
        storages = {p.untyped_storage()._cdata for p in mine if type(p.data) is torch.Tensor}
        kept = {}

        def pack(tensor):
            if (key := tensor.untyped_storage()._cdata) not in storages:
                kept[key] = tensor
            return tensor

        rng = torch.Generator().manual_seed(0)
        x = torch.randn(1, session.denoiser.model.latent_format.latent_channels, 8, 8, generator=rng)
        cond = {
            "cross_attn": torch.randn(1, 7, 768, generator=rng),
            "pooled_output": torch.randn(1, 768, generator=rng),
        }
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = session.denoiser.denoise(x, torch.tensor([0.5]), [cond]).square().mean()
        loss.backward()
        gradients = [p.grad.clone() for p in session.adapters.parameters() if p.grad is not None]
        copies = [tuple(t.shape) for t in kept.values() if tuple(t.shape) in shapes]
        return gradients, copies, sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(
    "family, storage", [("flux", "fp8"), ("flux", "fp16"), ("flux", "quantised"), ("sd15", "fp16"), ("sd15", "fp8")]
)
def test_frozen_weights_are_cast_again_in_backward_and_gradients_are_the_same_bit_for_bit(
    family, storage, tmp_path, monkeypatch
):
    """A third of what is kept at most, on models as small as these; on real ones the copies are a second model."""
    classes = [comfy.ops.manual_cast.Linear, comfy.ops.disable_weight_init.Linear, comfy.ops.disable_weight_init.Conv2d]
    methods = [dict(vars(cls)) for cls in classes]
    adapter = ADAPTERS.get(family, RANK_4)
    with torch.inference_mode():
        model = load_stored(family, storage, tmp_path)
        again, copies, size = gradients_and_copies(model, adapter)
        assert [dict(vars(cls)) for cls in classes] == methods
        monkeypatch.setattr(host.session, "recast_frozen_weights", lambda network: contextlib.nullcontext())
        kept, kept_copies, kept_size = gradients_and_copies(model, adapter)
    assert copies == [] and len(kept_copies) > 10
    equal = torch.allclose if storage == "quantised" else torch.equal  # the host multiplies those with another kernel
    assert len(again) == len(kept) and all(equal(a, b) for a, b in zip(again, kept, strict=True))
    assert size < kept_size / 1.5, f"{size} and {kept_size} bytes"


def test_layers_that_cast_in_a_way_of_their_own_are_left_alone():
    """As those of nodes for other file formats, whose weights the host's cast does not understand."""

    class Packed(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, x):
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) * 2)

    class Padded(comfy.ops.manual_cast.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(torch.nn.functional.pad(x, (1, 0, 1, 0)), weight, bias)

    before = [cls.forward_comfy_cast_weights for cls in (Packed, Padded)]
    with host.frozen_casts.recast_frozen_weights(torch.nn.Sequential(Packed(4, 4), Padded(4, 4, 3))):
        assert [cls.forward_comfy_cast_weights for cls in (Packed, Padded)] == before
