"""Opens a loaded MODEL for training.

`open_training_session(model, ...)` borrows the MODEL: gradients on, adapters attached, a few of the host's habits
changed. On every way out, the interrupt included, all of it is put back, and the base weights are what they were, bit
for bit.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import comfy.lora
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch

from ...trainers.adapters.adapters import Adapters, text_adapter_settings
from ...trainers.adapters.layers import layer_features
from ...trainers.data.encoded import image_conditioning, split_conditioning
from ...trainers.loss_scale import LossScale
from ...trainers.memory.plan import PLAN_AUTO, PLAN_OFF, PLAN_OFFLOADED, PLAN_PER_BLOCK, PLAN_PER_BLOCK_CPU
from ...trainers.methods.rollouts import NoAdapters, StudentTeacherModel
from ...trainers.rng import make_generator
from ...trainers.settings import AdapterSettings
from .context import (
    cast_quantised_layers,
    disable_fp8_matmul,
    disable_transfer_streams,
    enable_gradients,
    find_block_classes,
    make_block_compiler,
    make_tables_on_device,
    move_bare_parameters,
    move_noise_schedule,
    replace_inference_parameters,
    set_training_flag,
    use_differentiable_rope,
)
from .denoiser import ComfyDenoiser
from .encoders import CaptionTokenizer, encode_tokens
from .families import ModelFamily, find_patcher_family
from .frozen_casts import recast_frozen_weights
from .lora_keys import apply_lora, clip_lora_keys, group_lora_by_target, unet_lora_keys
from .memory import available_device_memory, offload_weights, waiting_weight_bytes
from .out_of_place import disable_inplace_updates

if TYPE_CHECKING:
    from ...trainers.memory.checkpointing import CheckpointPolicy

INJECTION_KEY = "trainyard"
MIN_LOADED_SHARE = 0.02  # of the weights: fewer are not worth to load them, and to count a step again
CHECKPOINTING_MODES = (PLAN_OFF, PLAN_PER_BLOCK, PLAN_PER_BLOCK_CPU, PLAN_OFFLOADED, PLAN_AUTO)


def make_checkpoint_policy() -> CheckpointPolicy:
    from ...trainers.memory.checkpointing import CheckpointPolicy

    return CheckpointPolicy()


@dataclass
class TrainingSession:
    """The loaded model with its adapters, for as long as it is open for training."""

    denoiser: ComfyDenoiser
    adapters: Adapters
    family: ModelFamily
    text_adapters: Adapters | None = None
    encode_captions: object = None  # (batch) -> conds with gradients, of captions that are read literally
    encode_prompt: object = None  # (prompt) -> cond with gradients, of a text that is read with weights
    text_patcher: object = None  # of the text encoder that is trained too
    layer_keys: dict = field(default_factory=dict)  # layer path -> name in the file
    text_layer_keys: dict = field(default_factory=dict)
    known_text_keys: dict = field(default_factory=dict)  # name in a file -> weight of the text encoder
    # how the model's blocks keep what backward needs; may change between two steps
    blocks: CheckpointPolicy = field(default_factory=make_checkpoint_policy)
    plain_patcher: object = None  # the model without the assistant, where there is one

    def tensors(self):
        """(LoRA tensors in file names, names of layers that no step ever reached)."""
        tensors, untouched = self.adapters.export_tensors(self.layer_keys.__getitem__)
        if self.text_adapters is not None:
            more, others = self.text_adapters.export_tensors(self.text_layer_keys.__getitem__)
            tensors, untouched = {**tensors, **more}, untouched + others
        return tensors, untouched


@contextlib.contextmanager
def open_training_session(
    model,
    adapter: AdapterSettings,
    *,
    clip=None,
    seed: int = 0,
    checkpointing: str = "off",
    memory: float = 0.0,
    compiling=None,
    assistant=None,
):
    """A TrainingSession over a loaded MODEL. `memory`: bytes that the training needs beside the weights.
    `compiling(text)`: its blocks run compiled, and it is told when they cannot be. `assistant`: a LoRA that the host
    adds to the weights for as long as the session is open, after the MODEL's own patches.

    Raises ValueError when the adapter fits no layer, or when the text encoder is wanted and no CLIP is given."""
    from ...trainers.memory.checkpointing import checkpoint_blocks
    from .prefetch import prefetch_offloaded

    if adapter.text_encoder and clip is None:
        raise ValueError(
            "text_encoder is on, but no CLIP is connected. Connect CLIP to the Train node, or switch text_encoder off."
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(enable_gradients())
        plain = patcher = clone_for_training(model)
        if assistant is not None:
            patcher, _ = apply_lora(plain, None, assistant)
        rng = make_generator(seed)
        network = patcher.model.diffusion_model
        adapters = Adapters(network, adapter, rng).to(patcher.load_device)
        session = TrainingSession(
            None,
            adapters,
            find_patcher_family(patcher),
            layer_keys=unet_lora_keys(patcher.model, adapters.layers),
            plain_patcher=None if assistant is None else plain,
        )
        if adapter.text_encoder:
            stack.enter_context(attach_text_adapters(clip, adapter, rng, session))
        if assistant is not None:
            stack.callback(mm.unload_model_and_clones, patcher)  # the host takes the assistant off the shared weights
            stack.enter_context(with_adapters_injected(plain, adapters))
        stack.enter_context(load_with_adapters(patcher, adapters, memory, session.text_patcher))
        stack.enter_context(disable_inplace_updates(network))
        stack.enter_context(recast_frozen_weights(network))
        stack.enter_context(cast_quantised_layers(network))
        session.blocks.prefetcher = stack.enter_context(prefetch_offloaded(network, patcher.load_device))
        for habit in (
            set_training_flag,
            disable_fp8_matmul,
            disable_transfer_streams,
            make_tables_on_device,
            use_differentiable_rope,
        ):
            stack.enter_context(habit())
        session.blocks.plan = PLAN_PER_BLOCK if checkpointing == PLAN_AUTO else checkpointing  # until a plan is chosen
        if compiling:
            session.blocks.compiler = stack.enter_context(make_block_compiler(adapters, compiling).compile_context())
        stack.enter_context(checkpoint_blocks(find_block_classes(network), adapters, session.blocks))
        session.denoiser = ComfyDenoiser(patcher, session.family)
        if checkpointing == PLAN_OFFLOADED:
            offload_weights(session)
        yield session


def clone_for_training(model):
    """A clone of the patcher that shares the weights: its attention can run backward, and its half-precision is bf16
    where the device has it (fp16 gradients underflow)."""
    patcher = get_non_dynamic_patcher(model) if model.is_dynamic() else model.clone()
    patcher.set_model_optimized_attention(attention_pytorch)
    if patcher.model.get_dtype_inference() == torch.float16 and mm.should_use_bf16(patcher.load_device):
        patcher.set_model_compute_dtype(torch.bfloat16)
    return patcher


def make_loss_scale(session: TrainingSession) -> LossScale | None:
    """For a model that computes in fp16, whose gradients would be zero in part; None for others."""
    computes_in = session.denoiser.model.get_dtype_inference()
    return LossScale() if computes_in == torch.float16 else None


def get_non_dynamic_patcher(model, name="MODEL"):
    """A patcher whose weights stay where they are: dynamic VRAM may evict a weight that backward still needs."""
    try:
        return model.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise RuntimeError(
            f"This {name} uses dynamic VRAM and its loader offers no other way ({error}). Load it with a core loader "
            "node, or start ComfyUI with --disable-dynamic-vram."
        ) from error


@contextlib.contextmanager
def with_adapters_injected(patcher, adapters):
    """Whenever the host loads this patcher inside, the adapters are attached to it."""
    injection = comfy.patcher_extension.PatcherInjection(
        inject=lambda _: adapters.attach(), eject=lambda _: adapters.detach()
    )
    patcher.set_injections(INJECTION_KEY, [injection])
    try:
        yield
    finally:
        patcher.eject_model()
        adapters.detach()
        patcher.remove_injections(INJECTION_KEY)
        patcher.cleanup()


@contextlib.contextmanager
def load_with_adapters(patcher, adapters, memory, beside=None):
    """The host loads the model where it wants it, with the adapters as an injection of its patcher. `beside`: the
    patcher of another model that must stay loaded with it."""
    try:
        with with_adapters_injected(patcher, adapters):
            mm.unload_model_and_clones(patcher)  # to be loaded again beside the memory that a step needs
            load_for_training(patcher, memory, beside)
            yield
    finally:
        mm.soft_empty_cache()


def load_for_training(patcher, memory, beside=None):
    """Loads the model, ready for the next step. `beside` is loaded in the same breath: asked for one after the other,
    the second could push the first out."""
    mm.load_models_gpu([patcher, *([] if beside is None else [beside])], memory_required=memory)
    for loaded in filter(None, (beside, patcher)):
        loaded.pre_run()
        loaded.inject_model()
        replace_inference_parameters(loaded.model)
    if isinstance(patcher.model, comfy.model_base.BaseModel):  # and no text encoder
        move_noise_schedule(patcher)
        move_bare_parameters(patcher)


def load_fitting_weights(session: TrainingSession, need: int) -> int:
    """Weights that wait in the CPU's memory come onto the device, as far as `need` bytes and what the host keeps free
    remain beside them; returns how many bytes did. Nothing is done for a few."""
    patcher = session.denoiser.patcher
    room = available_device_memory(session) - max(need + mm.extra_reserved_memory(), mm.minimum_inference_memory())
    before = patcher.loaded_size()
    if min(room, waiting_weight_bytes(session)) < MIN_LOADED_SHARE * patcher.model_size():
        return 0
    load_for_training(patcher, need, session.text_patcher)
    return max(0, patcher.loaded_size() - before)


@contextlib.contextmanager
def attach_text_adapters(clip, adapter, rng, session):
    """The text encoder with adapters: `session.encode_captions(batch)` carries gradients."""
    clip = clone_clip_for_training(clip)
    network = clip.cond_stage_model
    session.text_adapters = Adapters(network, text_adapter_settings(adapter), rng).to(clip.patcher.load_device)
    session.text_layer_keys = clip_lora_keys(network, session.text_adapters.layers)
    session.known_text_keys = comfy.lora.model_lora_keys_clip(network, {})
    with (
        load_with_adapters(clip.patcher, session.text_adapters, 0.0),
        disable_inplace_updates(network),
        recast_frozen_weights(network),
        cast_quantised_layers(network),
    ):
        tokenize = CaptionTokenizer(clip)
        session.encode_captions = lambda batch: [
            {**image_conditioning(old), **encode_tokens(clip, tokenize(c))}
            for c, old in zip(batch.captions, batch.conds, strict=True)
        ]
        session.encode_prompt = lambda prompt: encode_tokens(clip, clip.tokenize(prompt))
        session.text_patcher = clip.patcher
        yield


def clone_clip_for_training(clip):
    """A clone that shares the weights and does not ask the host to load it at every encode, which might unload the
    diffusion model in the middle of a step: the session keeps both loaded."""
    clip = clip.clone()
    if clip.patcher.is_dynamic():
        clip.patcher = get_non_dynamic_patcher(clip.patcher, "CLIP")
        clip.cond_stage_model = clip.patcher.model
    clip.load_model = lambda *_, **__: clip.patcher
    return clip


def load_lora_into_session(session: TrainingSession, lora):
    """The adapters of a session take over a file, whatever naming it uses. Raises ValueError when something in it would
    be lost."""
    layers = {f"diffusion_model.{name}.weight": ("model", name, m) for name, m in session.adapters.layers.items()}
    known = comfy.lora.model_lora_keys_unet(session.denoiser.model, {})
    if session.text_adapters is not None:
        layers |= {f"{name}.weight": ("text", name, m) for name, m in session.text_adapters.layers.items()}
        known = known | session.known_text_keys
    outputs = {target: layer_features(m)[1] for target, (_, _, m) in layers.items()}
    by_target, joined = group_lora_by_target(lora, known, outputs)
    found: dict[str, dict] = {"model": {}, "text": {}}
    for target, tensors in by_target.items():
        part, name, _ = layers.get(target, ("model", target, None))
        found[part][name] = tensors
    session.adapters.load(found["model"], pad_ranks=joined)
    if session.text_adapters is not None:
        session.text_adapters.load(found["text"], pad_ranks=joined)


@contextlib.contextmanager
def open_frozen_model(model, conds: dict):
    """The model as it is, to be asked and not to be trained. `conds`: name -> CONDITIONING, or one row of it."""
    patcher = get_non_dynamic_patcher(model) if model.is_dynamic() else model.clone()
    mm.load_models_gpu([patcher])
    patcher.pre_run()
    try:
        rows = {name: cond if isinstance(cond, dict) else split_conditioning(cond)[0] for name, cond in conds.items()}
        yield StudentTeacherModel(ComfyDenoiser(patcher, find_patcher_family(patcher)), NoAdapters(), rows)
    finally:
        patcher.cleanup()


def read_schedule(model) -> ComfyDenoiser:
    """The noise levels of a MODEL; it is not loaded for them, and must not be asked for predictions."""
    return ComfyDenoiser(model, find_patcher_family(model))


def rollout_guidance(session: TrainingSession, asked: float) -> float:
    """Classifier-free guidance for drawing: what is asked, else 3, or 1 where guidance is distilled into the
    weights."""
    return asked or (1.0 if session.family.guidance_distilled else 3.0)
