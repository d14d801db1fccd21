"""ComfyUI, as the trainers see it. The only door to comfy.* for training.

`training(model, ...)` borrows a loaded MODEL: gradients on, adapters attached, a few of the host's habits changed; on every way
out, the interrupt included, all of it is put back and the base weights are what they were, bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import math
import time
from dataclasses import dataclass, field

import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy_kitchen
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_kitchen.backends.eager import rope as eager_rope

from ..trainers.adapters import Adapters, by_base, kohya
from ..trainers.compiled import Compiler
from ..trainers.data.encoded import split_conditioning
from ..trainers.files import LoraFile
from ..trainers.plan import AUTO, OFF, OFFLOADED, PER_BLOCK, PER_BLOCK_CPU, cheaper
from ..trainers.points import Model, NoAdapters
from ..trainers.recompute import Blocks, checkpointed
from ..trainers.settings import AdapterSettings
from .families import Family, family_of
from .outofplace import out_of_place

KEY = "trainyard"
EVERYTHING = 1e32  # bytes: what the host says where it means all
CHECKPOINTING = (OFF, PER_BLOCK, PER_BLOCK_CPU, OFFLOADED, AUTO)


# -- leaving inference mode ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gradients():
    """Nodes run under inference_mode, where autograd records nothing."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(tree):
    """The same nested value with inference tensors replaced by clones, which autograd can save. Call inside `gradients()`."""
    if torch.is_tensor(tree):
        return tree.clone() if tree.is_inference() else tree
    if isinstance(tree, dict):
        return {k: ordinary(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(ordinary(v) for v in tree)
    return tree


def materialise(network) -> int:
    """Replace parameters and buffers that were made under inference mode; assigning to `.data` would not cure them."""
    count = 0
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_inference():
                module._parameters[name] = torch.nn.Parameter(value.detach().clone(), requires_grad=False)
                count += 1
        for name, value in module._buffers.items():
            if value is not None and value.is_inference():
                module._buffers[name] = value.clone()
                count += 1
    return count


# -- the host's habits, changed while training -------------------------------------------------------------------------


@contextlib.contextmanager
def in_training():
    """Forward and backward use the host's kernels that autograd knows; must hold during backward (recomputation) too."""
    before, mm.in_training = mm.in_training, True
    try:
        yield
    finally:
        mm.in_training = before


@contextlib.contextmanager
def fresh_weights():
    """Weights that are fetched from the CPU layer by layer get memory of their own. With its transfer streams the host fetches
    every layer into the same buffer, and backward would find the weights of a later layer in it."""
    before, mm.NUM_STREAMS = mm.NUM_STREAMS, 0
    try:
        yield
    finally:
        mm.NUM_STREAMS = before


@contextlib.contextmanager
def differentiable_rope():
    """A few families call the fused rotary kernels without asking `in_training`; those have no autograd formula."""
    names = [n for n in dir(eager_rope) if n.startswith(("apply_rope", "rms_rope")) and not n.endswith("_") and hasattr(comfy_kitchen, n)]
    before = {n: getattr(comfy_kitchen, n) for n in names}
    try:
        for n in names:
            setattr(comfy_kitchen, n, getattr(eager_rope, n))
        yield
    finally:
        for n, function in before.items():
            setattr(comfy_kitchen, n, function)


def block_classes(network) -> set[type]:
    """The classes whose calls are worth a checkpoint: a UNet's residual and transformer blocks, else the members of the
    network's own lists of blocks."""
    unet = {type(m) for m in network.modules() if type(m).__name__ in ("BasicTransformerBlock", "ResBlock")}
    lists = [m for m in network.children() if isinstance(m, torch.nn.ModuleList)]
    return unet or {type(m) for blocks in lists for m in blocks if any(True for _ in m.parameters())}


# What a block is told beside its inputs, and needs for patches alone: where it stands, and at which noise level.
PLACE = ("block", "block_index", "block_type", "total_blocks", "transformer_index", "sigmas", "sample_sigmas", "cond_or_uncond", "uuids")


def placeless(args, kwargs):
    """A block's call without what tells it its place, unless patches of other nodes may ask for it: blocks then share compiled programs."""
    less = lambda value: {k: v for k, v in value.items() if k not in PLACE} if isinstance(value, dict) and not patched(value) else value
    return tuple(map(less, args)), {name: less(value) for name, value in kwargs.items()}


def patched(options: dict) -> bool:
    return any(options.get(name) for name in ("patches", "patches_replace", "model_function_wrapper", "stg_self_attn_blocks"))


def compiler(adapters, say) -> Compiler:
    """For blocks that are to be compiled; `say` is told when they cannot be."""
    made = Compiler(adapters, placeless, say)
    if adapters.drops:
        made.give_up("adapters with dropout draw anew in every step")
    return made


# -- a loaded MODEL as a denoiser ---------------------------------------------------------------------------------------


class ComfyDenoiser:
    """trainers.diffusion.Denoiser over a ModelPatcher that is loaded and attached."""

    def __init__(self, patcher, family: Family):
        self.patcher, self.model, self.family = patcher, patcher.model, family
        self.device = patcher.load_device
        self.widest = 0  # numbers in the largest batch so far
        self.options = self._options()

    def _options(self):
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options).get("transformer_options", {})
        comfy.patcher_extension.merge_nested_dicts(options.setdefault("wrappers", {}), self.patcher.wrappers, copy_dict1=False)
        return options

    @property
    def sampling(self):
        return self.model.model_sampling

    @property
    def flow(self) -> bool:
        return isinstance(self.sampling, comfy.model_sampling.CONST)

    @property
    def prediction(self) -> str:
        """What the network predicts, in the words of modelspec."""
        kinds = comfy.model_sampling
        return "flow" if self.flow else "v" if isinstance(self.sampling, (kinds.V_PREDICTION, kinds.V_PREDICTION_DDPM)) else "epsilon"

    def model_space(self, latent):
        latent = latent.to(self.device, torch.float32)
        if latent.ndim == 4 and self.model.latent_format.latent_dimensions == 3:
            latent = latent.unsqueeze(2)  # an image is a video of one frame
        return self.model.process_latent_in(latent)

    def noised(self, x0, noise, sigma):
        return self.sampling.noise_scaling(sigma, noise, x0)

    def sigma_at(self, u):
        """Discrete schedules train on their own integer timesteps: the network never saw a sigma between two of them."""
        ms = self.sampling
        if discrete(ms):
            steps = len(ms.sigmas)
            index = (u * steps).floor().long().clamp(0, steps - 1)
            return ms.sigmas[index.to(ms.sigmas.device)].float()
        return torch.tensor([float(ms.percent_to_sigma(min(1 - float(v), 1 - 1e-6))) for v in u]).clamp(max=float(ms.sigma_max))

    def native_scale(self, sigma):
        one = torch.ones(len(sigma), 1, device=sigma.device)
        return self.sampling.calculate_denoised(sigma, one, torch.zeros_like(one)).abs().flatten()

    def denoise(self, x, sigma, conds):
        """Row i is predicted under cond i. (The host's own list of conds would predict every row under all of them and average.)"""
        rows = [self._row(cond, x[i : i + 1]) for i, cond in enumerate(ordinary(conds))]
        sigma = sigma.to(x.device)
        parts = [(group, self._apply(x[group], sigma[group], [rows[i] for i in group])) for group in concatenable(rows)]
        order = [i for group, _ in parts for i in group]
        out = torch.cat([part for _, part in parts])
        return out if order == sorted(order) else out[torch.tensor(order, device=x.device).argsort()]

    def _row(self, cond, x):
        """The host's own model inputs for one caption: extra_conds adds size conditioning, guidance, masks."""
        cond = {"guidance": self.family.guidance, **cond} if self.family.guidance is not None else cond
        about = dict(device=x.device, noise=x, latent_image=x, seed=0, prompt_type="positive")
        about |= dict(width=x.shape[-1] * 8, height=x.shape[-2] * 8)
        return {k: v.process_cond(batch_size=1, area=None) for k, v in self.model.extra_conds(**{**about, **cond}).items()}

    def _apply(self, x, sigma, rows):
        self.widest = max(self.widest, x.numel())
        inputs = comfy.samplers.cond_cat(rows, x.device)
        options = {**self.options, "cond_or_uncond": [0] * len(x), "sigmas": sigma, "sample_sigmas": sigma}
        return self.model.apply_model(x, sigma, transformer_options=options, **inputs)


def discrete(ms) -> bool:
    kinds = comfy.model_sampling
    return isinstance(ms, kinds.ModelSamplingDiscrete) and not isinstance(ms, (kinds.ModelSamplingDiscreteEDM, kinds.StableCascadeSampling))


def concatenable(rows) -> list[list[int]]:
    """Indices of rows whose conditionings fit into one batch; different token counts may need several."""
    groups: list[list[int]] = []
    for i, row in enumerate(rows):
        for group in groups:
            first = rows[group[0]]
            if first.keys() == row.keys() and all(first[k].can_concat(row[k]) for k in row):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


# -- the door -------------------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """What a method gets while the door is open."""

    denoiser: ComfyDenoiser
    adapters: Adapters
    family: Family
    text_adapters: Adapters | None = None
    encode: object = None  # (batch) -> conds with gradients
    keys: dict = field(default_factory=dict)  # layer path -> name in the file
    text_keys: dict = field(default_factory=dict)
    text_known: dict = field(default_factory=dict)  # name in a file -> weight of the text encoder
    blocks: Blocks = field(default_factory=Blocks)  # how the model's blocks keep what backward needs; may change between two steps
    away: int = 0  # bytes of the model's weights that were sent to the CPU's memory for the training

    def tensors(self):
        """(LoRA tensors in file names, names of layers that no step ever reached)."""
        tensors, untouched = self.adapters.tensors(self.keys.__getitem__)
        if self.text_adapters is not None:
            more, others = self.text_adapters.tensors(self.text_keys.__getitem__)
            tensors, untouched = {**tensors, **more}, untouched + others
        return tensors, untouched


@contextlib.contextmanager
def training(model, adapter: AdapterSettings, *, clip=None, seed: int = 0, checkpointing: str = "off", memory: float = 0.0, compiling=None):
    """A Session over a loaded MODEL. `memory`: bytes that the training needs beside the weights. `compiling(text)`: its blocks run
    compiled, and it is told when they cannot be.

    Raises ValueError when the adapter fits no layer, or when the text encoder is wanted and no CLIP is given."""
    if adapter.text_encoder and clip is None:
        raise ValueError("text_encoder is on, but no CLIP is connected. Connect CLIP to the Train node, or switch text_encoder off.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(gradients())
        patcher = borrowed(model)
        rng = torch.Generator().manual_seed(seed)
        network = patcher.model.diffusion_model
        adapters = Adapters(network, adapter, rng).to(patcher.load_device)
        session = Session(None, adapters, family_of(patcher.model.model_config), keys=unet_keys(patcher.model, adapters.layers))
        if adapter.text_encoder:
            stack.enter_context(text_training(clip, adapter, rng, session))
        stack.enter_context(loaded(patcher, adapters, memory))
        materialise(patcher.model)
        stack.enter_context(out_of_place(network))
        for habit in (in_training, fresh_weights, differentiable_rope):
            stack.enter_context(habit())
        session.blocks.plan = PER_BLOCK if checkpointing == AUTO else checkpointing  # until a plan is chosen
        if compiling:
            session.blocks.compiler = stack.enter_context(compiler(adapters, compiling).ready())
        stack.enter_context(checkpointed(block_classes(network), adapters, session.blocks))
        session.denoiser = ComfyDenoiser(patcher, session.family)
        if checkpointing == OFFLOADED:
            offload(session)
        yield session


def borrowed(model):
    """A clone of the patcher that shares the weights: its attention can run backward, and its half-precision is bf16 where the
    device has it (fp16 gradients underflow)."""
    patcher = whole(model) if model.is_dynamic() else model.clone()
    patcher.set_model_optimized_attention(attention_pytorch)
    if patcher.model.get_dtype_inference() == torch.float16 and mm.should_use_bf16(patcher.load_device):
        patcher.set_model_compute_dtype(torch.bfloat16)
    return patcher


def whole(model):
    """A patcher whose weights stay where they are: dynamic VRAM may evict a weight that backward still needs."""
    try:
        return model.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise RuntimeError(
            f"This MODEL uses dynamic VRAM and its loader offers no other way ({error}). Load it with a core loader node, "
            "or start ComfyUI with --disable-dynamic-vram."
        ) from error


@contextlib.contextmanager
def loaded(patcher, adapters, memory):
    """The host loads the model where it wants it, with the adapters as an injection of its patcher."""
    injection = comfy.patcher_extension.PatcherInjection(inject=lambda _: adapters.attach(), eject=lambda _: adapters.detach())
    patcher.set_injections(KEY, [injection])
    try:
        mm.unload_model_and_clones(patcher)  # weights pinned for offloading must not be materialised
        mm.load_models_gpu([patcher], memory_required=memory)
        patcher.pre_run()
        patcher.inject_model()
        yield
    finally:
        patcher.eject_model()
        adapters.detach()
        patcher.remove_injections(KEY)
        patcher.cleanup()
        mm.soft_empty_cache()


@contextlib.contextmanager
def text_training(clip, adapter, rng, session):
    """The text encoder with adapters: `session.encode(batch)` carries gradients."""
    clip = clip.clone()
    network = clip.cond_stage_model
    session.text_adapters = Adapters(network, text_targets(adapter), rng).to(clip.patcher.load_device)
    session.text_keys = clip_keys(network, session.text_adapters.layers)
    session.text_known = comfy.lora.model_lora_keys_clip(network, {})
    with loaded(clip.patcher, session.text_adapters, 0.0), out_of_place(network):
        materialise(network)
        session.encode = lambda batch: [
            {**sizes_of(old), **conditioning(clip, c)} for c, old in zip(batch.captions, batch.conds, strict=True)
        ]
        yield


def sizes_of(cond) -> dict:
    """The size conditioning of a picture, which does not come from its text."""
    return {k: v for k, v in cond.items() if k in ("width", "height", "crop_w", "crop_h", "target_width", "target_height")}


def text_targets(adapter: AdapterSettings) -> AdapterSettings:
    """The same adapter on a text encoder; a regular expression written for the model's layers does not apply there."""
    targets = "attention+mlp" if adapter.targets in ("regex", "all linear") else adapter.targets
    return AdapterSettings(**{**adapter.to_dict(), "targets": targets, "pattern": "", "conv": False, "blocks": ""})


# -- text and pictures ------------------------------------------------------------------------------------------------------


def conditioning(clip, caption: str) -> dict:
    """One caption as the host's own encode node gives it."""
    ((tensor, extras),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption), show_pbar=False)
    return {"cross_attn": tensor, **extras}


class TextEncoder:
    """trainers.data's text door over a loaded CLIP."""

    def __init__(self, clip):
        if clip is None:
            raise ValueError(
                "CLIP is empty: this checkpoint holds no text encoder. Load one with a CLIP loader node (CLIPLoader, DualCLIPLoader) and connect it."
            )
        self.clip = clip
        self.identity = identity(clip.patcher, clip.layer_idx)

    def encode(self, captions: list[str]) -> list[dict]:
        with torch.no_grad():
            return [conditioning(self.clip, c) for c in captions]

    def free(self):
        mm.unload_model_and_clones(self.clip.patcher)


class PictureEncoder:
    """trainers.data's VAE door over a loaded VAE."""

    def __init__(self, vae):
        if vae is None:
            raise ValueError("VAE is empty: this checkpoint holds no VAE. Load one with the Load VAE node and connect it.")
        self.vae = vae
        self.identity = identity(vae.patcher)
        self.channels = vae.latent_channels
        self.factor = int(vae.spacial_compression_encode())

    def encode(self, images):
        """(mean, std or None), unscaled; images (B, H, W, 3) in 0..1. A VAE with a Gaussian posterior shows its moments."""
        moments = []
        regulariser = getattr(self.vae.first_stage_model, "regularization", None)
        hook = regulariser and regulariser.register_forward_pre_hook(lambda _, args: moments.append(args[0].detach()))
        try:
            with torch.no_grad():
                latent = self.vae.encode(images)
        finally:
            if hook:
                hook.remove()
        return posterior(latent, moments)

    def free(self):
        mm.unload_model_and_clones(self.vae.patcher)


def posterior(latent, moments):
    """(mean, std) from the encoder's raw moments, when they describe this very latent; (latent, None) otherwise."""
    z = torch.cat(moments).to(latent) if moments else None
    if z is None or z.shape[0] != latent.shape[0] or z.shape[1] != 2 * latent.shape[1] or z.shape[2:] != latent.shape[2:]:
        return latent, None
    mean, log_variance = z.chunk(2, dim=1)
    return mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp()


# CLIP-L of SD1.5 and SDXL has no projection in its file; the host leaves that tensor as uninitialised memory, another at every load.
LEFT_OPEN = ("text_projection.weight",)


def identity(patcher, *more) -> str:
    """A hash that changes with the weights or the patches on them, without reading gigabytes: shapes and a sample of values."""
    digest = hashlib.blake2b(repr(more).encode(), digest_size=16)
    backup = {k: b.weight for k, b in patcher.backup.items()}  # originals of weights that patches are baked into at the moment
    for name, value in sorted(patcher.model.state_dict().items()):
        if not name.endswith(LEFT_OPEN):
            sample(digest, name, backup.get(name, value))
    for name, patches in sorted(patcher.patches.items()):
        for patch in patches:
            digest.update(repr((name, patch[0], patch[2])).encode())
            for tensor in tensors_of(patch[1]):
                sample(digest, name, tensor)
    return digest.hexdigest()


def model_identity(model) -> str:
    """identity() of a MODEL with its schedule: a ModelSampling node changes what is learnt."""
    ms = model.get_model_object("model_sampling")
    kinds = [cls.__name__ for cls in type(ms).__mro__[:3]]
    return identity(model, kinds, float(ms.sigma_min), float(ms.sigma_max), float(getattr(ms, "shift", 0.0)))


def sample(digest, name, tensor, count=64):
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    flat = tensor.detach().reshape(-1)
    if flat.numel() and flat.device.type != "meta":
        index = torch.arange(min(count, flat.numel()), device=flat.device) * max(1, flat.numel() // count)
        digest.update(flat[index].float().cpu().numpy().tobytes())


def tensors_of(value):
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_of(v)
    elif hasattr(value, "weights"):
        yield from tensors_of(value.weights)


# -- key names ----------------------------------------------------------------------------------------------------------------


def unet_keys(model, layers) -> dict[str, str]:
    """Layer path -> file name that the host's own loader maps back to that layer."""
    known = comfy.lora.model_lora_keys_unet(model, {})
    diffusers = {}
    if family_of(model.model_config).names == "diffusers":
        for name, path in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items():
            if name.endswith(".weight"):
                diffusers[path.removesuffix(".weight")] = kohya("lora_unet", name.removesuffix(".weight"))
    keys = {name: diffusers.get(name) or kohya("lora_unet", name) for name in layers}
    return loadable(keys, known, "diffusion_model.")


def clip_keys(network, layers) -> dict[str, str]:
    """Layer path -> lora_te..., as the host's loader maps it back: lora_te for a single CLIP-L, lora_te1/2/3 for several encoders."""
    known = comfy.lora.model_lora_keys_clip(network, {})
    several = sum(1 for name, child in network.named_children() if any(True for _ in child.parameters())) > 1
    keys = {}
    for name in layers:
        options = [k for k, target in known.items() if target == f"{name}.weight" and k.startswith("lora_te")]
        options.sort(key=lambda k: (k.startswith("lora_te_") == several, k))
        keys[name] = options[0] if options else f"text_encoders.{name}"
    return loadable(keys, known, "")


def loadable(keys, known, prefix):
    """Every key must lead back to its own layer, or the file would load with holes."""
    for name, key in keys.items():
        target = known.get(key)
        if (target[0] if isinstance(target, tuple) else target) != f"{prefix}{name}.weight":
            raise ValueError(
                f"Layer {name} has no key that ComfyUI's LoRA loader knows ({key} leads to {target}); choose other adapter targets."
            )
    return keys


# -- results ------------------------------------------------------------------------------------------------------------------


def applied(model, clip, lora, strength=1.0):
    """(MODEL, CLIP) with the LoRA as patches on clones; the inputs stay as they were. Raises ValueError for keys that do not fit."""
    misfits = unknown_keys(model, clip, lora)
    if len(misfits) == len(bases(lora)):
        raise ValueError(f"This LoRA fits neither MODEL nor CLIP: none of its {len(misfits)} layers is known, for example {misfits[0]}.")
    with torch.inference_mode(False):
        tensors = {k: ordinary(v) for k, v in lora.items()}
        return comfy.sd.load_lora_for_models(model, clip, tensors, strength, strength)


def bases(lora) -> list[str]:
    return sorted(by_base(lora))


def start_from(session: Session, lora):
    """The adapters of a session take over a file, whatever naming it uses. Raises ValueError when something in it would be lost."""
    names = {f"diffusion_model.{name}.weight": ("model", name) for name in session.adapters.layers}
    known = comfy.lora.model_lora_keys_unet(session.denoiser.model, {})
    if session.text_adapters is not None:
        names |= {f"{name}.weight": ("text", name) for name in session.text_adapters.layers}
        known = known | session.text_known
    found: dict[str, dict] = {"model": {}, "text": {}}
    for base, tensors in by_base(lora).items():
        target = known.get(base, base)
        part, name = names.get(target[0] if isinstance(target, tuple) else target, ("model", base))
        found[part][name] = tensors
    session.adapters.load(found["model"])
    if session.text_adapters is not None:
        session.text_adapters.load(found["text"])


def unknown_keys(model, clip, lora) -> list[str]:
    """Layers of the file that the host's loader would skip."""
    known = comfy.lora.model_lora_keys_unet(model.model, {}) if model is not None else {}
    if clip is not None:
        known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, known)
    return [b for b in bases(lora) if b not in known]


def check_loads(model, clip, lora: LoraFile):
    """The self-check after training: the host's own loader must take every layer of the file. Raises RuntimeError with those it skips."""
    misfits = unknown_keys(model, clip, lora)
    if misfits:
        raise RuntimeError(
            f"ComfyUI's loader would skip {len(misfits)} of {len(bases(lora))} trained layers, for example {misfits[0]}. Please report this model."
        )


# -- drawing, and asking the frozen model ---------------------------------------------------------------------------------------

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


def sampled(model, positive, negative, shape, seeds, *, steps, guidance, sampler, scheduler):
    """LATENT samples (B, C, ...) by the ordinary sampler, one per seed, for latents of shape (C, h, w). The seed alone decides a picture's
    noise, whatever else is in its batch."""
    noise = torch.cat([torch.randn((1, *shape), generator=generator(seed)) for seed in seeds])
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(noise))
    noise = noise.reshape(latent.shape)
    return comfy.sample.sample(
        model, noise, steps, guidance, sampler, scheduler, positive, negative, latent, disable_pbar=True, seed=seeds[0]
    )


@contextlib.contextmanager
def asking(model, conds: dict):
    """The model as it is, to be asked and not to be trained. `conds`: name -> CONDITIONING."""
    patcher = whole(model) if model.is_dynamic() else model.clone()
    mm.load_models_gpu([patcher])
    patcher.pre_run()
    try:
        rows = {name: split_conditioning(cond)[0] for name, cond in conds.items()}
        yield Model(ComfyDenoiser(patcher, family_of(patcher.model.model_config)), NoAdapters(), rows)
    finally:
        patcher.cleanup()


# -- checks before the long work ------------------------------------------------------------------------------------------------


def check_latents(model, channels: int):
    wanted = model.model.latent_format.latent_channels
    if channels != wanted:
        raise ValueError(
            f"The latents have {channels} channels and this MODEL wants {wanted}. Encode the dataset with the VAE that belongs to the MODEL."
        )


def check_prompts(clip, texts):
    """Raises ValueError for a prompt that the text encoder would cut into several pieces."""
    for text in texts:
        pieces = {name: len(chunks) for name, chunks in clip.tokenize(text).items()}
        if (name := max(pieces, key=pieces.get)) and pieces[name] > 1:
            raise ValueError(f"The prompt {text!r} is longer than the text encoder {name} takes at once: it would be cut into {pieces[name]} "
                             "pieces. Shorten it.")


def latent_shapes(model, resolution: int, dynamic: bool = False) -> tuple[tuple[int, ...], ...]:
    """Latent shapes (C, h, w) of square pictures of this size in pixels; dynamic: of every size from half of it on, in steps of 64."""
    shape = model.model.latent_format
    if shape.latent_dimensions not in (2, 3):
        raise ValueError(f"{type(model.model.model_config).__name__} draws no pictures, and its latents have no height and width.")
    cells = lambda pixels: max(2, pixels // int(shape.spacial_downscale_ratio) // 2 * 2)
    sides = range(resolution // 2 // 64 * 64 or 64, resolution + 1, 64) if dynamic else (resolution,)
    return tuple((shape.latent_channels, cells(height), cells(width)) for height in sides for width in sides)


def random_latent(shape):
    return torch.randn((1, *shape), generator=generator(0))


def rollout_guidance(session: Session, asked: float) -> float:
    """Classifier-free guidance for drawing: what is asked, else 3, or 1 where guidance is distilled into the weights."""
    return asked or (1.0 if session.family.distilled else 3.0)


def check_gradients(session: Session, x0, conds, tolerance=None):
    """Two tiny steps against finite differences, on adapters shaken off zero; they are put back. For families that no test covers.

    Raises RuntimeError when the model's gradients cannot be had or are wrong: training would run and learn nonsense."""
    denoiser, adapters = session.denoiser, session.adapters
    params = list(adapters.parameters())
    before = [p.detach().clone() for p in params]
    rng = torch.Generator().manual_seed(0)
    low_precision = denoiser.model.get_dtype_inference() in (torch.float16, torch.bfloat16)
    tolerance = tolerance or (0.2 if low_precision else 0.03)
    x0, conds = x0[:1], conds[:1]
    noise = torch.randn(x0.shape, generator=rng).to(x0)
    sigma = denoiser.sigma_at(torch.tensor([0.5])).to(x0)
    x = denoiser.noised(x0, noise, sigma)

    def loss():
        return (denoiser.denoise(x, sigma, conds) - x0).square().mean()

    try:
        with torch.no_grad():
            for p in params:
                p.add_(torch.randn(p.shape, generator=rng).to(p) * 0.02)
        autograd, direction = gradient(loss, params)
        errors = [abs(difference(loss, params, direction, step) / autograd - 1) for step in (3e-2, 1e-2, 3e-3)]
    except RuntimeError as error:
        raise RuntimeError(f"{unknown_model(denoiser)}: its forward pass cannot be differentiated ({error}). It is not trained.") from error
    finally:
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)
                p.grad = None
    if not min(errors) <= tolerance:
        raise RuntimeError(
            f"{unknown_model(denoiser)}: its gradients are off by {min(errors):.0%} against finite differences (at most {tolerance:.0%} is allowed). "
            "It would learn the wrong thing and is not trained."
        )
    return min(errors)


def unknown_model(denoiser):
    return (
        f"Trainyard does not know {type(denoiser.model.model_config).__name__}, so its gradients were checked first, and the check failed"
    )


def gradient(loss, params):
    """(norm, unit direction) of the loss gradient over all params."""
    loss().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in params]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    if not math.isfinite(norm) or norm == 0:
        raise RuntimeError(f"the gradient norm is {norm}")
    return norm, [g / norm for g in grads]


@torch.no_grad()
def difference(loss, params, direction, step):
    """Central difference of the loss along a direction."""
    values = []
    for sign in (+1, -1):
        for p, d in zip(params, direction, strict=True):
            p.add_(d, alpha=sign * step)
        values.append(float(loss()))
        for p, d in zip(params, direction, strict=True):
            p.add_(d, alpha=-sign * step)
    return (values[0] - values[1]) / (2 * step)


def training_memory(model, area, batch: int, checkpointing: str) -> float:
    """A rough first figure, in bytes, of what a step needs beside the weights: the host's own estimate for sampling, times what
    autograd keeps. The host offloads weights when it does not fit. `area`: the largest latent (C, ..., h, w)."""
    kept = {OFF: 12.0, PER_BLOCK: 3.0, PER_BLOCK_CPU: 2.0, OFFLOADED: 2.0, AUTO: 2.0}[checkpointing]
    return kept * model.model.memory_required([batch, *area])


class OutOfMemory(RuntimeError):
    """Memory ran out in the middle of a run. `cheaper`: the plan to try next, or None."""

    def __init__(self, run, plan: str):
        super().__init__(memory_advice(run, plan))
        self.plan, self.cheaper = plan, cheaper(plan)


def memory_advice(run, plan: str) -> str:
    """What to say when memory ran out in the middle of a run."""
    need = f"{measured_peak() / 2**30:.1f} GiB were in use"
    further = cheaper(plan)
    options = [
        f"set checkpointing to {further!r}" if further else "train at a smaller resolution (Encode Dataset)",
        f"lower batch from {run.batch} and raise accumulate instead" if run.batch > 1 else "use an 8-bit optimizer (AdamW8bit)",
        "lower rank, or train attention layers only",
    ]
    return (f"Out of memory: {need} when the step failed, with checkpointing {plan!r}. The run is saved and continues after a change of memory "
            f"settings. To need less: {'; '.join(options)}.")


def measured_peak() -> int:
    """Bytes: the device's peak, or the process's on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def free_memory(session: Session) -> int:
    """Bytes that the device of a session could still give."""
    return int(mm.get_free_memory(session.denoiser.device))


def block_weights(network, device) -> tuple[int, int]:
    """(bytes of the blocks' weights that lie on the device, all of the block that has most)."""
    classes = tuple(block_classes(network))
    blocks = [list(module.parameters()) for module in network.modules() if isinstance(module, classes)]
    here = sum(p.nbytes for block in blocks for p in block if p.device == device)
    return here, max((sum(p.nbytes for p in block) for block in blocks), default=0)


def offload(session: Session, count: float = EVERYTHING):
    """At least so many bytes of the model's weights leave the device, or all of them. The host fetches each again when its layer is called, and
    under checkpointing nothing keeps it longer than its block."""
    patcher = session.denoiser.patcher
    session.away += patcher.partially_unload(patcher.offload_device, count)


class Gauge:
    """How much a device takes from now on."""

    def __init__(self, device):
        self.device = device if device.type == "cuda" else None
        if self.device:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def peak(self) -> int:
        """Bytes beyond what was taken at the start, once all work is done; 0 for a device that does not say."""
        if not self.device:
            return 0
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before


def let_go():
    """What a failed step held is given back to the device."""
    gc.collect()
    mm.soft_empty_cache()


# -- while it runs ----------------------------------------------------------------------------------------------------------------


class Report:
    """Progress of a run, in ComfyUI's own bar and as a text line in the node; raises the host's interrupt."""

    def __init__(self, steps: int, node_id=None):
        self.bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self.node_id = node_id

    def __call__(self, progress):
        mm.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(progress.step, progress.steps)
        self.say(progress.line())

    def say(self, line: str):
        show(line, self.node_id)


def show(line: str, node_id=None):
    """A line of text in the node, which stays there until the next one."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(line, node_id, server.client_id)
    logging.debug("Trainyard: %s", line)


class Steps:
    """Progress of a job that counts things: report(done, total, what)."""

    def __init__(self, node_id=None):
        self.report = Report(1, node_id)
        self.last = 0.0

    def __call__(self, done, total, what=""):
        now = time.monotonic()
        if now - self.last > 0.4 or done == total:
            self.last = now
            self.report.bar.update_absolute(done, total)
            self.report.say(f"{done}/{total} {what}")


def interrupted():
    """Raise the host's interrupt if the user pressed Cancel."""
    mm.throw_exception_if_processing_interrupted()


def generator(seed: int):
    return torch.Generator().manual_seed(seed)


def say_once(line: str, said=set()):  # noqa: B006 - the set is the memory
    if line not in said:
        said.add(line)
        logging.info("Trainyard: %s", line)


def warn(line: str):
    logging.warning("Trainyard: %s", line)


def out_of_memory(error: BaseException) -> bool:
    """Of a device, or of the machine itself: torch's CPU allocator says so in words only."""
    return mm.is_oom(error) or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
