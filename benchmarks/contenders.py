"""Who is measured: the bare frozen model, ours, ComfyUI's own Train LoRA, and two peers (peers/), each on one model and
one dataset.

With weights, core is its real node, `TrainLoraNode.execute`, and ours is the session, method and loop that our node
runs. On meta tensors no node can run (there is no loss to read), so both are their own real parts around one forward of
the network: ours the adapters, contexts and step, core the weight wrappers, checkpoint patch and optimizer of its node.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import comfy.model_management as mm
import comfy_extras.nodes_train as core_nodes
import torch
from comfy.model_patcher import CoreModelPatcher

from ..nodes import host
from ..trainers.adapters.adapters import Adapters, select_target_layers
from ..trainers.data.encoded import EncodedDataset
from ..trainers.diffusion import cpu_randn_like, denoising_loss, sample_sigmas
from ..trainers.loop import train
from ..trainers.memory.checkpointing import checkpoint_blocks
from ..trainers.methods.lora import LoraTraining
from ..trainers.optimizers import make_optimizer
from ..trainers.rng import make_generator
from ..trainers.settings import AdapterSettings, OptimizerSettings, RunSettings
from . import shapes
from .meters import Laps
from .peers import diffusers_script, kohya_style

DEFAULT_TARGETS, EVERY_LAYER = "our targets", "all layers"


@dataclass(frozen=True)
class Plan:
    """What every contender of one table has in common."""

    shape: shapes.Shape
    batch: int = 1
    timed: int = 3
    dtype: torch.dtype = torch.float32  # of the model
    core_dtype: str = "fp32"  # of core's adapters; ours are always fp32
    device: str = "cpu"
    clock: Callable[[], float] = time.perf_counter  # of the timed steps

    @property
    def is_unet(self) -> bool:
        return "channel_mult" in self.shape.family.config

    def adapter(self, targets: str) -> AdapterSettings:
        """Every layer: the linear layers and convolutions that core trains; core also trains norms and biases."""
        rank = self.shape.rank
        if targets == DEFAULT_TARGETS:
            return AdapterSettings(rank=rank)
        return AdapterSettings(rank=rank, targets="all linear", conv=True, conv_rank=rank)


# -- with weights ------------------------------------------------------------------------------------------------------


def bare(plan: Plan):
    """Forward and backward of the frozen model, with a gradient to its input and nothing else."""
    model, data = shapes.make(plan.shape, plan.dtype), encoded(plan)
    laps = laps_over(model, plan)
    with (
        host.session.open_training_session(model, plan.adapter(DEFAULT_TARGETS)) as session,
        session.adapters.at_strength(0.0),
        contextlib.closing(laps),
    ):
        denoiser = session.denoiser
        for step in range(laps.steps):
            laps()
            rng = make_generator(step)
            batch = data.make_batch(range(plan.batch), rng)
            x0 = denoiser.model_space(batch.x0).requires_grad_()
            sigma = sample_sigmas(denoiser, session.family.density, x0, rng)
            denoising_loss(denoiser, x0, cpu_randn_like(x0, rng), sigma, batch.conds).mean().backward()
    return laps.cost, 0


def ours(plan: Plan, targets: str, checkpointing: str):
    """(Cost, trained numbers) of the loop behind our Train LoRA node."""
    model, data = shapes.make(plan.shape, plan.dtype), encoded(plan)
    laps = laps_over(model, plan)
    with (
        host.session.open_training_session(model, plan.adapter(targets), checkpointing=checkpointing) as session,
        contextlib.closing(laps),
    ):
        method = LoraTraining(
            session.denoiser, session.adapters, data, density=session.family.density, batch=plan.batch
        )
        run = RunSettings(steps=laps.steps + 1, batch=plan.batch)
        with contextlib.suppress(Finished):
            train(Lapped(method, laps), run, interval=math.inf)
        return laps.cost, numbers(session.adapters.parameters())


class Finished(Exception):
    """Every lap is done."""


@dataclass
class Lapped:
    """A method whose steps begin a new lap, until there is none left."""

    method: LoraTraining
    laps: Laps

    def parameters(self):
        return self.method.parameters()

    def loss(self, rng):
        if not self.laps():
            raise Finished
        return self.method.loss(rng)


def core(plan: Plan, targets: str, depth: int | None, bypass: bool = False, mended: bool = False):
    """(Cost, trained numbers) of ComfyUI's node. `depth`: its checkpoint_depth (1 by default), None for no
    checkpointing. `mended`: with our out-of-place blocks, without which some models do not train in core at all."""
    model = shapes.make(plan.shape, plan.dtype)
    latent, conditioning = shapes.dataset(plan.shape, plan.batch)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # autocast in fp32 on the CPU says that it is off
        if mended:
            stack.enter_context(host.out_of_place.disable_inplace_updates(model.model.diffusion_model))
        if targets != EVERY_LAYER:
            layers = select_target_layers(model.model.diffusion_model, plan.adapter(targets))
            stack.enter_context(mock.patch.object(core_nodes, "_setup_lora_adapters", only(layers)))
        laps = stack.enter_context(core_laps(Laps([], plan.timed, plan.device == "cuda", plan.clock)))
        result = core_nodes.TrainLoraNode.execute(
            **core_inputs(plan, model, latent, conditioning, laps.steps, depth, bypass)
        )
    return laps.cost, numbers(result.args[0].values())


def core_inputs(plan, model, latent, conditioning, steps, depth, bypass):
    """The node's own defaults, but for rank and dtype; a model that computes in fp16 goes on in it."""
    compute = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "none"}[plan.dtype]
    one = dict(model=model, latents=latent, positive=conditioning, batch_size=plan.batch, steps=steps, grad_accumulation_steps=1,
               learning_rate=5e-4, rank=plan.shape.rank, optimizer="AdamW", loss_function="MSE", seed=0, training_dtype=compute,
               lora_dtype=plan.core_dtype, quantized_backward=False, algorithm="LoRA", gradient_checkpointing=depth is not None,
               checkpoint_depth=depth or 1, offloading=False, existing_lora="[None]", bucket_mode=False, bypass_mode=bypass)  # fmt: skip
    return {name: [value] for name, value in one.items()}


@contextlib.contextmanager
def core_laps(laps):
    """Laps over core's steps: its progress bar is made before the first step and told after each."""

    class Bar:
        def __init__(self, total):
            laps()

        def update(self, value):
            laps()

    sample = core_nodes.TrainSampler.sample

    def with_weights(sampler, model_wrap, *args, **kwargs):
        laps.weights = list(model_wrap.inner_model.diffusion_model.parameters())
        return sample(sampler, model_wrap, *args, **kwargs)

    with (
        mock.patch.object(core_nodes, "ProgressBar", Bar),
        mock.patch.object(core_nodes.TrainSampler, "sample", with_weights),
    ):
        with mock.patch.object(core_nodes.comfy.utils, "PROGRESS_BAR_ENABLED", False), contextlib.closing(laps):
            yield laps


def only(layers):
    """Core's own adapters on these layers of the network alone, in place of every module's weights, norms and
    biases."""

    def setup(patcher, existing, algorithm, dtype, rank):
        trained, adapters = {}, []
        for name, layer in layers.items():
            adapter, params = core_nodes._create_weight_adapter(
                layer, f"diffusion_model.{name}", existing, algorithm, dtype, rank
            )
            patcher.add_weight_wrapper(f"diffusion_model.{name}.weight", adapter)
            trained |= params
            adapters.append(adapter)
        return trained, adapters

    return setup


def kohya(plan: Plan, checkpointing: bool):
    """(Cost, trained numbers) of sd-scripts' way in our session and loop."""
    model, data = shapes.make(plan.shape, plan.dtype), encoded(plan)
    laps = laps_over(model, plan)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(host.session.open_training_session(model, plan.adapter(DEFAULT_TARGETS)))
        session.adapters.detach()
        loras, method = kohya_method(plan, session, data, checkpointing)
        stack.enter_context(loras.installed())
        if checkpointing:
            stack.enter_context(
                kohya_style.checkpointed(host.context.find_block_classes(session.denoiser.model.diffusion_model))
            )
        stack.enter_context(contextlib.closing(laps))
        with contextlib.suppress(Finished):
            train(Lapped(method, laps), RunSettings(steps=laps.steps + 1, batch=plan.batch), interval=math.inf)
    return laps.cost, numbers(loras.parameters())


def kohya_method(plan, session, data, checkpointing):
    """(its LoRAs, our method on them). Under its checkpoints captions take a gradient."""
    loras = kohya_style.Loras(session.denoiser.model.diffusion_model, plan.adapter(DEFAULT_TARGETS)).to(
        session.denoiser.device
    )
    asked = (lambda batch: [kohya_style.asking(cond) for cond in batch.conds]) if checkpointing else None
    return loras, LoraTraining(
        session.denoiser, loras, data, density=session.family.density, batch=plan.batch, encode_batch=asked
    )


def script(plan: Plan, targets: tuple, checkpointing: bool):
    """(Cost, trained numbers) of diffusers' scripts, with the host model's weights."""
    unet = script_unet(plan)
    params = diffusers_script.adapted(unet, plan.shape.rank, targets, checkpointing)
    laps = Laps(unet.parameters(), plan.timed, plan.device == "cuda", plan.clock)
    step = diffusers_script.Script(unet, params, script_batch(plan, unet))
    with contextlib.closing(laps):
        while laps():
            step()
    return laps.cost, numbers(params)


def script_unet(plan):
    patcher = shapes.make(plan.shape, plan.dtype)
    model = patcher.model
    return diffusers_script.network(
        model.model_config.unet_config, plan.dtype, patcher.load_device, model.diffusion_model.state_dict()
    )


def script_batch(plan, unet):
    latent, conditioning = shapes.dataset(plan.shape, plan.batch)
    pooled = [extras["pooled_output"] for _, extras in conditioning if extras]
    there = lambda parts: torch.cat(parts).to(unet.device, unet.dtype) if parts else None
    return diffusers_script.batch_of(
        latent["samples"].to(unet.device), there([cross for cross, _ in conditioning]), there(pooled)
    )


def encoded(plan):
    latent, conditioning = shapes.dataset(plan.shape, plan.batch)
    return EncodedDataset.from_core([latent], [conditioning])


def laps_over(model, plan):
    return Laps(model.model.diffusion_model.parameters(), plan.timed, plan.device == "cuda", plan.clock)


def numbers(params) -> int:
    return sum(p.numel() for p in params)


# -- without weights ---------------------------------------------------------------------------------------------------


def flash(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **_):
    """The GPU's attention kernel on meta tensors; torch's own choice there would be one that writes out the whole (T,
    T) matrix."""
    assert mask is None, "no mask in these models"
    if not skip_reshape:
        q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Meta:
    """One forward of a network without values, as a method; `loss` has a gradient to the input when `to_input` is
    set."""

    def __init__(self, plan: Plan, to_input: bool):
        model = shapes.base_model(plan.shape, plan.dtype, "meta")
        self.model, self.network = model, model.diffusion_model.requires_grad_(False)
        self.x, self.t, self.more = shapes.empty_inputs(plan.shape, plan.dtype, plan.batch)
        self.x.requires_grad_(to_input)

    def loss(self, rng=None):
        options = {"optimized_attention_override": lambda _, *args, **kwargs: flash(*args, **kwargs)}
        out = self.network(self.x, self.t, transformer_options=options, **self.more)
        return (out.float() - self.x.detach().float()).square().flatten(1).mean(1)

    def measured(self, plan, step):
        laps = Laps(self.network.parameters(), 0)
        with contextlib.closing(laps), host.context.set_training_flag(), host.context.use_differentiable_rope():
            for _ in range(laps.steps):
                laps()
                step()
                self.x.grad = None
        return laps.cost


def meta_bare(plan: Plan):
    meta = Meta(plan, to_input=True)
    with host.out_of_place.disable_inplace_updates(meta.network):
        return meta.measured(plan, lambda: meta.loss().mean().backward()), 0


def meta_ours(plan: Plan, targets: str, checkpointing: str):
    meta = Meta(plan, to_input=False)
    adapters = Adapters(meta.network, plan.adapter(targets)).to("meta")
    params = list(adapters.parameters())
    optimizer = make_optimizer([{"params": params, "lr": 1e-4}], OptimizerSettings())
    classes = host.context.find_block_classes(meta.network) if checkpointing == "per block" else ()
    with (
        host.out_of_place.disable_inplace_updates(meta.network),
        checkpoint_blocks(classes, adapters),
        adapters.attached(),
    ):
        cost = meta.measured(plan, lambda: step(meta, optimizer, params, OptimizerSettings().clip))
    return cost, numbers(params)


def meta_kohya(plan: Plan, checkpointing: bool):
    meta = Meta(plan, to_input=checkpointing and not plan.is_unet)
    with torch.device("meta"):
        loras = kohya_style.Loras(meta.network, plan.adapter(DEFAULT_TARGETS))
    params = list(loras.parameters())
    optimizer = make_optimizer([{"params": params, "lr": 1e-4}], OptimizerSettings())
    captions = [meta.more[name].requires_grad_() for name in ("context", "y") if checkpointing and name in meta.more]

    def one():
        step(meta, optimizer, params, OptimizerSettings().clip)
        for caption in captions:
            caption.grad = None

    classes = host.context.find_block_classes(meta.network) if checkpointing else ()
    with host.out_of_place.disable_inplace_updates(meta.network), kohya_style.checkpointed(classes), loras.installed():
        return meta.measured(plan, one), numbers(params)


def meta_script(plan: Plan, targets: tuple, checkpointing: bool):
    config = shapes.base_model(plan.shape, plan.dtype, "meta").model_config.unet_config
    unet = diffusers_script.network(config, plan.dtype, "meta")
    params = diffusers_script.adapted(unet, plan.shape.rank, targets, checkpointing)
    x, _, more = shapes.empty_inputs(plan.shape, plan.dtype, plan.batch)
    pooled = (
        torch.empty(plan.batch, plan.shape.family.pooled, device="meta", dtype=plan.dtype)
        if plan.shape.family.pooled
        else None
    )
    step = diffusers_script.Script(unet, params, diffusers_script.batch_of(x, more["context"], pooled))
    laps = Laps(unet.parameters(), 0)
    with contextlib.closing(laps), diffusers_script.attention_of_a_gpu():
        while laps():
            step()
    return laps.cost, numbers(params)


def meta_core(plan: Plan, targets: str, depth: int | None, bypass: bool = False, mended: bool = False):
    meta = Meta(plan, to_input=True)
    patcher = CoreModelPatcher(meta.model, torch.device("meta"), torch.device("meta"))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[plan.core_dtype]
    with contextlib.ExitStack() as stack:
        with torch.device("meta"):
            trained, manager = core_adapters(plan, patcher, targets, dtype, bypass)
        if mended:
            stack.enter_context(host.out_of_place.disable_inplace_updates(meta.network))
        wrapped(patcher)
        if manager is not None:
            stack.enter_context(mock.patch.object(mm, "get_torch_device", lambda: torch.device("meta")))
            for injection in manager.create_injections(meta.model):
                injection.inject(patcher)
        for module in core_nodes.find_modules_at_depth(meta.network, depth) if depth else ():
            core_nodes.patch(module)
        params = [p for p in trained.values() if p.requires_grad]
        optimizer = core_nodes._create_optimizer("AdamW", params, 5e-4)
        return meta.measured(plan, lambda: step(meta, optimizer)), numbers(params)


def core_adapters(plan, patcher, targets, dtype, bypass):
    """(trained parameters, bypass manager or None), made by core's own functions."""
    if bypass:
        trained, _, manager = core_nodes._setup_lora_adapters_bypass(patcher, {}, "LoRA", dtype, plan.shape.rank)
        return trained, manager
    setup = core_nodes._setup_lora_adapters
    if targets != EVERY_LAYER:
        setup = only(select_target_layers(patcher.model.diffusion_model, plan.adapter(targets)))
    return setup(patcher, {}, "LoRA", dtype, plan.shape.rank)[0], None


def wrapped(patcher):
    """What ModelPatcher.load does with weight wrappers, without moving any weight."""
    for name, functions in patcher.weight_wrapper_patches.items():
        path, kind = name.rsplit(".", 1)
        setattr(patcher.model.get_submodule(path), f"{kind}_function", list(functions))


def step(meta, optimizer, params=(), clip=0.0):
    """One optimizer step; core does not clip."""
    meta.loss().mean().backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(params, clip)
    optimizer.step()
    optimizer.zero_grad()


# -- the table ---------------------------------------------------------------------------------------------------------


def contenders(plan: Plan, meta: bool):
    """name -> function(plan). Names are those of the table and of the claims. Diffusers' scripts know UNets only, and
    need two packages."""
    b, o, c, k, d = (
        (meta_bare, meta_ours, meta_core, meta_kohya, meta_script) if meta else (bare, ours, core, kohya, script)
    )
    rows = {
        "bare model": b,
        "ours, our targets": partial(o, targets=DEFAULT_TARGETS, checkpointing="off"),
        "ours, our targets, per block": partial(o, targets=DEFAULT_TARGETS, checkpointing="per block"),
        "ours, all layers": partial(o, targets=EVERY_LAYER, checkpointing="off"),
        "ours, all layers, per block": partial(o, targets=EVERY_LAYER, checkpointing="per block"),
        "core, default": partial(c, targets=EVERY_LAYER, depth=1),
        "core, no checkpointing": partial(c, targets=EVERY_LAYER, depth=None),
        "core, depth 2": partial(c, targets=EVERY_LAYER, depth=2),
        "core, our targets": partial(c, targets=DEFAULT_TARGETS, depth=1),
        "core, our targets, no checkpointing": partial(c, targets=DEFAULT_TARGETS, depth=None),
        "core, bypass, no checkpointing": partial(c, targets=EVERY_LAYER, depth=None, bypass=True),
        "kohya-style": partial(k, checkpointing=False),
        "kohya-style, checkpointing": partial(k, checkpointing=True),
    }
    if plan.is_unet and all(map(importlib.util.find_spec, ("diffusers", "peft"))):
        for name, targets in (
            ("diffusers script", diffusers_script.OWN),
            ("diffusers script, our targets", diffusers_script.SAME),
        ):
            rows[name] = partial(d, targets=targets, checkpointing=False)
            rows[f"{name}, checkpointing"] = partial(d, targets=targets, checkpointing=True)
    return rows
