"""Context managers that change how the host runs a model while it trains: gradients, kernels, streams, compiled
blocks."""

from __future__ import annotations

import contextlib
import functools

import comfy.ldm.aura.mmdit
import comfy.ldm.wan.model
import comfy.model_management as mm
import comfy.ops
import comfy_kitchen
import torch
from comfy_kitchen.backends.eager import rope as eager_rope

from ...trainers.data.cache import map_tensors
from ...trainers.memory.compile import BlockCompiler


@contextlib.contextmanager
def enable_gradients():
    """Nodes run under inference_mode, where autograd records nothing."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def clone_inference_tensors(tree):
    """The tree with its inference tensors replaced by clones that autograd may use. Call inside
    `enable_gradients()`."""
    return map_tensors(tree, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def share_as_normal_tensor(value):
    """The same memory as a tensor that autograd takes. A clone would give back memory that the host has page-locked,
    and the driver would go on reading it; and it would need the room of both."""
    if hasattr(value, "__tensor_flatten__"):  # several tensors in one, as quantised weights are
        names, about = value.__tensor_flatten__()
        inner = {name: share_as_normal_tensor(getattr(value, name)) for name in names}
        return type(value).__tensor_unflatten__(inner, about, value.shape, value.stride())
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return value.detach().clone()
    return value.new_empty(0).set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def replace_inference_parameters(network) -> int:
    """Replace parameters, buffers and tensors that are plain attributes, where they were made under inference mode, by
    normal ones over the same memory; assigning to `.data` would not cure them. Call inside `enable_gradients()`."""
    count = 0
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_inference():
                module._parameters[name] = torch.nn.Parameter(share_as_normal_tensor(value), requires_grad=False)
                count += 1
        for held in (module._buffers, vars(module)):
            for name, value in held.items():
                if torch.is_tensor(value) and value.is_inference():
                    held[name] = share_as_normal_tensor(value)
                    count += 1
                elif isinstance(value, (list, tuple)) and any(torch.is_tensor(v) and v.is_inference() for v in value):
                    held[name] = type(value)(
                        share_as_normal_tensor(v) if torch.is_tensor(v) and v.is_inference() else v for v in value
                    )
                    count += 1
    return count


def move_noise_schedule(patcher):
    """The schedule's numbers go where the model computes. A model that is loaded in part leaves them in the CPU's
    memory, and each prediction would wait until its noise level has come down to be looked up. The host takes them
    along when it unloads the model."""
    patcher.model.model_sampling.to(patcher.load_device)


def move_bare_parameters(patcher):
    """Parameters that no layer of the host fetches lie on the device, as under the host's dynamic VRAM: those of
    modules that have layers below them (Wan's modulations), and of layers of torch's own (an embedding of HunyuanVideo
    1.5). Its partial loading leaves the former in memory that is not page-locked, and each block would wait for its
    own; the latter it page-locks when it unloads a part, and the network's forward moves them away from under the lock.
    They are small: 2.4 MB of Wan 14B's 27 GB. The host takes them along when it unloads the model."""
    for path, module in patcher.model.diffusion_model.named_modules(prefix="diffusion_model"):
        has_layers = any(True for child in module.children() for _ in child.parameters())
        if has_layers or not hasattr(module, "comfy_cast_weights"):
            for name, value in module.named_parameters(recurse=False):
                if value.device != patcher.load_device:
                    patcher.unpin_weight(f"{path}.{name}")
                    module._parameters[name] = torch.nn.Parameter(value.to(patcher.load_device), requires_grad=False)


@contextlib.contextmanager
def set_training_flag():
    """Forward and backward use the host's kernels that autograd knows; must hold during backward (recomputation)
    too."""
    before, mm.in_training = mm.in_training, True
    try:
        yield
    finally:
        mm.in_training = before


@contextlib.contextmanager
def disable_fp8_matmul():
    """Under `--fast fp8_matrix_mult` the host multiplies in fp8 wherever no gradient is asked for, and falls back to
    the compute dtype where one is: the frozen model's predictions would differ by percents from those of untrained
    adapters. While training, both sides cast the stored weights."""
    if not hasattr(comfy.ops, "fp8_linear"):
        yield
        return
    before, comfy.ops.fp8_linear = comfy.ops.fp8_linear, lambda layer, x: None  # None: the host casts instead
    try:
        yield
    finally:
        comfy.ops.fp8_linear = before


@contextlib.contextmanager
def cast_quantised_layers(network):
    """Layers with a quantised weight (fp8, mxfp8, nvfp4, int8 …) cast it, as on devices that cannot multiply in its
    format. Where they can, the host rounds each layer's input to 4 or 8 bits, so that the loss moves in steps
    and its gradient is another function's, by 10 % and more; and some formats have no backward."""
    layers = [module for module in network.modules() if getattr(module, "_full_precision_mm", None) is False]
    try:
        for layer in layers:
            layer._full_precision_mm = True
        yield
    finally:
        for layer in layers:
            layer._full_precision_mm = False


@contextlib.contextmanager
def disable_transfer_streams():
    """Weights that are fetched from the CPU layer by layer get memory of their own. With its transfer streams the host
    fetches every layer into the same buffer, and backward would find the weights of a later layer in it."""
    before, mm.NUM_STREAMS = mm.NUM_STREAMS, 0
    try:
        yield
    finally:
        mm.NUM_STREAMS = before


# Of the host, called once in a forward: each makes a table of numbers on the CPU and copies it to the device, which
# waits for it.
CPU_TABLE_FUNCTIONS = (
    (comfy.ldm.wan.model, "sinusoidal_embedding_1d"),
    (comfy.ldm.aura.mmdit.TimestepEmbedder, "timestep_embedding"),
)


@contextlib.contextmanager
def make_tables_on_device():
    """The tables of CPU_TABLE_FUNCTIONS are made where they are used."""
    before = [(owner, name, vars(owner)[name]) for owner, name in CPU_TABLE_FUNCTIONS if name in vars(owner)]
    try:
        for owner, name, _ in before:
            function = make_tensors_beside_arguments(getattr(owner, name))
            setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def make_tensors_beside_arguments(function):
    """The function, with its first tensor's device as torch's default."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)).device:
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def use_differentiable_rope():
    """A few families call the fused rotary kernels without asking `in_training`; those have no autograd formula."""
    names = [
        n
        for n in dir(eager_rope)
        if n.startswith(("apply_rope", "rms_rope")) and not n.endswith("_") and hasattr(comfy_kitchen, n)
    ]
    before = {n: getattr(comfy_kitchen, n) for n in names}
    try:
        for n in names:
            setattr(comfy_kitchen, n, getattr(eager_rope, n))
        yield
    finally:
        for n, function in before.items():
            setattr(comfy_kitchen, n, function)


def find_block_classes(network) -> set[type]:
    """The classes whose calls are worth a checkpoint: a UNet's residual and transformer blocks, else the members of the
    network's own lists of blocks."""
    unet = {type(m) for m in network.modules() if type(m).__name__ in ("BasicTransformerBlock", "ResBlock")}
    lists = [m for m in network.children() if isinstance(m, torch.nn.ModuleList)]
    return unet or {type(m) for blocks in lists for m in blocks if any(True for _ in m.parameters())}


# What a block is told beside its inputs, and needs for patches alone: where it stands, and at which noise level.
BLOCK_POSITION_KEYS = (
    "block",
    "block_index",
    "block_type",
    "total_blocks",
    "transformer_index",
    "sigmas",
    "sample_sigmas",
    "cond_or_uncond",
    "uuids",
)


def drop_block_position(args, kwargs):
    """A block's call without what tells it its place, unless patches of other nodes may ask for it: blocks then share
    compiled programs."""
    less = lambda value: (
        {k: v for k, v in value.items() if k not in BLOCK_POSITION_KEYS}
        if isinstance(value, dict) and not has_block_patches(value)
        else value
    )
    return tuple(map(less, args)), {name: less(value) for name, value in kwargs.items()}


def has_block_patches(options: dict) -> bool:
    return any(
        options.get(name) for name in ("patches", "patches_replace", "model_function_wrapper", "stg_self_attn_blocks")
    )


def make_block_compiler(adapters, say) -> BlockCompiler:
    """For blocks that are to be compiled; `say` is told when they cannot be."""
    made = BlockCompiler(adapters, drop_block_position, say)
    if adapters.has_dropout:
        made.give_up("adapters with dropout draw anew in every step")
    return made
