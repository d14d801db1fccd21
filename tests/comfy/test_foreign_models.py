"""MODELs that are not as a core loader gives them: packed by another node, with a LoRA on them, or streamed by ComfyUI."""

import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from trainyard.nodes import host
from trainyard.tests.comfy import families
from trainyard.tests.comfy.test_host import RANK_4, Problem, fingerprint, shake
from trainyard.trainers.files import LoraFile, write_lora


class PackedTensor(torch.Tensor):
    """Bytes that stand for a matrix of another shape, like a tensor of a GGUF file in the nodes that read these: it says
    the matrix's shape, and neither clones nor detaches."""

    def __new__(cls, data, shape):
        return super().__new__(cls, data)

    def __init__(self, data, shape):
        super().__init__()
        self.tensor_shape = shape

    @classmethod
    def pack(cls, weight):
        """Blocks of 32 numbers: 2 bytes of scale and one byte each."""
        blocks = weight.reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True).div(127).half()
        numbers = (blocks / scale).round().to(torch.int8)
        return cls(torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], 1), weight.shape)

    def unpack(self, dtype):
        data = self.as_subclass(torch.Tensor)
        scale, numbers = data[:, :2].contiguous().view(torch.float16), data[:, 2:].contiguous().view(torch.int8)
        return (numbers.to(dtype) * scale.to(dtype)).reshape(self.tensor_shape)

    @property
    def shape(self):
        return self.tensor_shape

    def to(self, *args, **kwargs):
        return PackedTensor(self.as_subclass(torch.Tensor).to(*args, **kwargs), self.tensor_shape)

    def clone(self, *args, **kwargs):
        return self

    def detach(self):
        return self


class PackedLinear(comfy.ops.manual_cast.Linear):
    """Unpacks its weight in each call, in a way of its own."""

    def forward_comfy_cast_weights(self, input):
        weight = self.weight.to(input.device).unpack(input.dtype)
        return torch.nn.functional.linear(input, weight, None if self.bias is None else self.bias.to(input))


def pack_blocks(model):
    """The model, with the matrices of its blocks packed."""
    with torch.inference_mode():
        for name, layer in model.model.diffusion_model.named_modules():
            if isinstance(layer, torch.nn.Linear) and "blocks" in name:
                layer.__class__ = PackedLinear
                layer.weight = torch.nn.Parameter(PackedTensor.pack(layer.weight), requires_grad=False)
    return model


@pytest.mark.parametrize("checkpointing", host.session.CHECKPOINTING_MODES[:4])
def test_a_model_in_a_packed_format_of_another_node_trains_with_right_gradients(checkpointing):
    model = pack_blocks(families.make("flux", inference=True))
    bytes_before = [p.as_subclass(torch.Tensor).clone() for p in model.model.parameters()]
    with (
        torch.inference_mode(),
        host.session.open_training_session(model, RANK_4, checkpointing=checkpointing) as session,
    ):
        problem = Problem(session, "flux")
        assert len(session.adapters.layers) == 20
        assert host.checks.check_gradients(session, problem.x0, problem.conds) < 1e-3
    after = [p.as_subclass(torch.Tensor) for p in model.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, bytes_before, strict=True))


# -- a LoRA that is active already -------------------------------------------------------------------------------------
PATCHED = "diffusion_model.double_blocks.0.img_mlp.0.weight"


def predict(model, strength=0.0, adapters=None):
    """The session's prediction at a strength, and the file of its adapters."""
    with torch.inference_mode(), host.session.open_training_session(model, RANK_4) as session:
        if adapters is not None:
            shake(session.adapters)
        problem = Problem(session, "flux")
        x = problem.denoiser.noised(problem.x0, problem.noise, problem.sigma)
        with torch.no_grad(), session.adapters.at_strength(strength):
            return problem.denoiser.denoise(x, problem.sigma, problem.conds), session.tensors()[0]


def test_what_a_model_has_on_it_is_trained_on_top_of_and_is_not_in_the_file(tmp_path):
    model = families.make("flux", inference=True)
    before, (plain, _) = fingerprint(model), predict(model)
    patched = model.clone()
    weight = model.model.state_dict()[PATCHED]
    patched.add_patches({PATCHED: (torch.randn(weight.shape) * 0.1,)}, 1.0)
    with_patch, _ = predict(patched)
    assert not torch.allclose(with_patch, plain, atol=1e-3), "the patch is in what is trained on"
    trained, tensors = predict(patched, 1.0, "shaken")
    write_lora(tmp_path / "lora.safetensors", LoraFile(tensors))
    own = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    both, _ = comfy.sd.load_lora_for_models(patched, None, own, 1.0, 0.0)
    assert torch.allclose(predict(both)[0], trained, atol=1e-4), "the file belongs on the patched model"
    alone, _ = comfy.sd.load_lora_for_models(model, None, own, 1.0, 0.0)
    assert not torch.allclose(predict(alone)[0], trained, atol=1e-3), "and does not hold the patch"
    model.unpatch_model()
    assert fingerprint(model) == before


# -- dynamic VRAM ------------------------------------------------------------------------------------------------------


class StreamedPatcher(ModelPatcher):
    """As ComfyUI's own patcher for dynamic VRAM, which needs a graphics card."""

    def is_dynamic(self):
        return True

    non_dynamic_delegate_model = None
    get_non_dynamic_delegate = ModelPatcherDynamic.get_non_dynamic_delegate


def streamed(model):
    made = StreamedPatcher(model.model, model.load_device, model.offload_device)
    made.cached_patcher_init = model.cached_patcher_init
    return made


def test_a_streamed_model_trains_as_a_copy_that_is_loaded_as_a_whole():
    model = families.make("flux", inference=True)
    plain, _ = predict(model)
    patcher = streamed(model)
    got, _ = predict(patcher)
    assert torch.equal(got, plain)
    with torch.inference_mode(), host.session.open_training_session(patcher, RANK_4) as session:
        assert not session.denoiser.patcher.is_dynamic()
        assert session.denoiser.model is not model.model


def test_a_streamed_model_that_cannot_be_loaded_as_a_whole_is_refused_in_words():
    patcher = streamed(families.make("flux", inference=True))
    patcher.cached_patcher_init = None
    with (
        pytest.raises(RuntimeError, match="dynamic VRAM.*core loader node.*--disable-dynamic-vram"),
        torch.inference_mode(),
        host.session.open_training_session(patcher, RANK_4),
    ):
        pass
