"""Loss and gradients of one step on the card, against the same step on the CPU in fp32.

The weights are numbers that bf16 and nearly always fp16 hold exactly, so what differs is the computation and not the
rounding of weights. TF32 is off meanwhile: cuDNN would take it for convolutions in fp32.
"""

from __future__ import annotations

import contextlib
import dataclasses

import comfy.model_management as mm
import torch
from comfy.model_patcher import CoreModelPatcher
from trainyard.benchmarks import published, shapes
from trainyard.benchmarks.on_card.models import fill_weights, name_dtype
from trainyard.nodes import host
from trainyard.tests.comfy import families
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.methods.lora import LoraTraining
from trainyard.trainers.rng import make_generator
from trainyard.trainers.settings import AdapterSettings

# Largest relative error that passes, (loss, gradient), by the dtype that is computed in: about three times that of the
# CPU's own bf16 and fp16 against its fp32 (benchmarks/README.md).
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (0.005, 0.3), "float16": (0.005, 0.1)}
FLUX_BLOCKS = dataclasses.replace(
    published.PUBLISHED["flux"].family,
    config={**published.PUBLISHED["flux"].family.config, "depth": 1, "depth_single_blocks": 1},
    latent=(16, 32, 32),
)
BLOCKS = {
    "flux block": shapes.Shape(FLUX_BLOCKS, 16, 64, "one double and one single block of Flux.1-dev at full width")
}


@dataclasses.dataclass(frozen=True)
class CheckedStep:
    """Loss and gradient of one step, on the CPU, and the dtype that it was computed in."""

    loss: float
    gradient: torch.Tensor  # (N,) fp32
    computed: str


def find_check_shape(name: str) -> shapes.Shape:
    return BLOCKS.get(name) or shapes.Shape(families.TABLE[name], rank=4, tokens=7, about="toy size")


def compute_step(shape: shapes.Shape, dtype: torch.dtype, device) -> CheckedStep:
    """One step of a LoRA that is not at zero, from the same chance wherever it runs."""
    model = shapes.base_model(shape, dtype, "cpu")
    fill_rounded_weights(model.diffusion_model)
    patcher = CoreModelPatcher(model, load_device=torch.device(device), offload_device=torch.device("cpu"))
    latent, conditioning = shapes.dataset(shape, 1)
    data = EncodedDataset.from_core([latent], [conditioning])
    with without_tf32(), host.session.open_training_session(patcher, AdapterSettings(rank=shape.rank)) as session:
        shake_adapters(session.adapters)
        loss = LoraTraining(session.denoiser, session.adapters, data, density=session.family.density).loss(
            make_generator(0)
        )
        scaling = host.session.make_loss_scale(session)
        scale = scaling.scale if scaling else 1.0
        (loss.mean() * scale).backward()
        gradient = torch.cat([gradient_of(p) for p in session.adapters.parameters()]) / scale
        computed = session.denoiser.model.get_dtype_inference()
        return CheckedStep(float(loss.detach().mean()), gradient, name_dtype(computed))


def fill_rounded_weights(network):
    fill_weights(network)
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(value.to(torch.bfloat16))


def shake_adapters(adapters):
    """Away from zero, so that both matrices of each get a gradient."""
    rng = make_generator(1)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_((torch.randn(p.shape, generator=rng) * 0.02).to(p.device))


def gradient_of(p) -> torch.Tensor:
    grad = torch.zeros_like(p) if p.grad is None else p.grad
    return grad.detach().float().cpu().flatten()


@contextlib.contextmanager
def without_tf32():
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def compare_steps(found: CheckedStep, reference: CheckedStep) -> dict:
    """Relative errors, and whether they are within the limits."""
    loss = abs(found.loss - reference.loss) / abs(reference.loss)
    gradient = float((found.gradient - reference.gradient).norm() / reference.gradient.norm())
    allowed = LIMITS[found.computed]
    return {
        "computed": found.computed,
        "loss_error": loss,
        "gradient_error": gradient,
        "limits": list(allowed),
        "passes": bool(loss <= allowed[0] and gradient <= allowed[1]),
    }


def list_checked_dtypes(device) -> list[torch.dtype]:
    """That the card computes in. A card with bf16 trains fp16 models in bf16, so fp16 is asked of others only."""
    half = torch.bfloat16 if mm.should_use_bf16(device) else torch.float16 if mm.should_use_fp16(device) else None
    return [torch.float32, *([half] if half else [])]


def check_models(names: list[str], card) -> list[dict]:
    """A row for each model and dtype. On a pretend card the same code runs, and there is nothing to judge."""
    rows = []
    for name in names:
        shape = find_check_shape(name)
        reference = compute_step(shape, torch.float32, "cpu")
        for dtype in list_checked_dtypes(card.device):
            found = compute_step(shape, dtype, card.device)
            judged = compare_steps(found, reference) if card.is_real else {"computed": found.computed, "passes": None}
            rows.append({"model": name, "about": shape.about, **judged})
    return rows
