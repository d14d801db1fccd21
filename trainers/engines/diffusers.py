"""The embedded engine: diffusers' models as Denoisers, in ComfyUI's conventions, for training without ComfyUI.

engine = load_engine("model.safetensors")        # or a diffusers folder
adapters = Adapters(engine.network, AdapterSettings(), rng)
with adapters.attached():
    x0 = engine.denoiser.denoise(x, sigma, conds)
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.adapters import Adapters, kohya_lora_key
from ..diffusion import per_sample, sample_euler, shift_noise_level
from ..families import MODEL_FAMILIES, ModelFamily
from ..rng import make_generator
from . import single_file
from . import text as words
from .single_file import CONVERT_REMEDY
from .text import ClipTextEncoder, T5TextEncoder, TextEncoders, hash_module_weights, load_clip_tokenizer, text_lora_key
from .vae import DiffusersVae

SDXL_SIZE_KEYS = (
    "height",
    "width",
    "crop_h",
    "crop_w",
    "target_height",
    "target_width",
)  # in the order SDXL reads them


# -- conditionings of a batch ------------------------------------------------------------------------------------------


def group_by_token_count(conds: list[dict]) -> list[list[int]]:
    """Indices of conditionings that can be stacked: long captions have more tokens than short ones."""
    groups: dict = {}
    for index, cond in enumerate(conds):
        groups.setdefault(tuple(cond["cross_attn"].shape[1:]), []).append(index)
    return list(groups.values())


def stack_conditionings(conds, name, like: Tensor) -> Tensor:
    return torch.cat([c[name].to(like.device, like.dtype) for c in conds])


# -- denoisers ---------------------------------------------------------------------------------------------------------


@dataclass
class EngineDenoiser(ABC):
    """What all denoisers share. `scale`, `shift`: the family's latent format, (latent - shift) * scale."""

    network: nn.Module
    scale: float
    shift: float = 0.0

    flow: ClassVar[bool]  # as in protocols.Denoiser, whose other members are here too

    @abstractmethod
    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma_at(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def native_scale(self, sigma: Tensor) -> Tensor: ...

    @abstractmethod
    def predict_x0(self, x: Tensor, sigma: Tensor, conds: list[dict]) -> Tensor:
        """x0 for conditionings that can be stacked."""

    @property
    def network_config(self) -> Any:
        """The arguments that diffusers built the network with, as attributes."""
        return self.network.config

    def model_space(self, latent):
        return ((latent.to(self.device).float() - self.shift) * self.scale).clone()

    def latent_space(self, x0):
        """A latent for the VAE: the inverse of model_space."""
        return x0 / self.scale + self.shift

    @property
    def device(self):
        return next(self.network.parameters()).device

    @property
    def dtype(self):
        return next(self.network.parameters()).dtype

    def denoise(self, x, sigma, conds):
        if len(conds) != len(x):
            raise ValueError(f"{len(x)} latents came with {len(conds)} conditionings; give one for each.")
        x, sigma = x.to(self.device).float(), sigma.to(self.device).float()
        groups = group_by_token_count(conds)
        parts = [self.predict_x0(x[g], sigma[g], [conds[i] for i in g]) for g in groups]
        order = torch.tensor([i for g in groups for i in g]).argsort()
        return torch.cat(parts)[order.to(x.device)]


class FlowDenoiser(EngineDenoiser):
    """x = (1 - sigma) x0 + sigma noise; the network answers the velocity, noise - x0."""

    flow = True
    schedule_shift = 3.0

    def noised(self, x0, noise, sigma):
        s = per_sample(sigma, x0)
        return (1 - s) * x0 + s * noise

    def sigma_at(self, u):
        return shift_noise_level(u, self.schedule_shift)

    def native_scale(self, sigma):
        return sigma

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, conds: list[dict]) -> Tensor:
        """What the network answers, in its own dtype."""

    def predict_x0(self, x, sigma, conds):
        return x - per_sample(sigma, x) * self.velocity(x.to(self.dtype), sigma, conds).float()


class Sd3Denoiser(FlowDenoiser):
    def velocity(self, x, sigma, conds):
        context, pooled = stack_conditionings(conds, "cross_attn", x), stack_conditionings(conds, "pooled_output", x)
        return self.network(
            x, encoder_hidden_states=context, pooled_projections=pooled, timestep=sigma * 1000, return_dict=False
        )[0]


class FluxDenoiser(FlowDenoiser):
    """ComfyUI's schedule shift is exp(1.15) for Flux dev and 1 for schnell, which has no guidance."""

    @property
    def takes_guidance(self) -> bool:
        return self.network_config.guidance_embeds

    @property
    def schedule_shift(self):
        return math.exp(1.15) if self.takes_guidance else 1.0

    def velocity(self, x, sigma, conds):
        context, pooled = stack_conditionings(conds, "cross_attn", x), stack_conditionings(conds, "pooled_output", x)
        guidance = (
            torch.tensor([float(c.get("guidance", 1.0)) for c in conds], device=x.device)
            if self.takes_guidance
            else None
        )
        out = self.network(
            pack_flux_latents(x),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=flux_position_ids(x),
            txt_ids=torch.zeros(context.shape[1], 3, device=x.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack_flux_latents(out, x.shape)


def pack_flux_latents(x):
    """(B, C, H, W) -> (B, H/2 * W/2, 4C): Flux's tokens of 2 x 2 latent cells."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack_flux_latents(tokens, shape):
    b, c, h, w = shape
    return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def flux_position_ids(x):
    """(H/2 * W/2, 3): row and column of each of Flux's tokens."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x.device, torch.float32)


@dataclass
class UnetDenoiser(EngineDenoiser):
    """SD1.5, SD2 and SDXL: x = x0 + sigma noise, answered at the whole timestep nearest to sigma."""

    sigmas: Tensor = field(kw_only=True)  # (1000,) rising
    prediction: str = field(default="epsilon", kw_only=True)  # or v_prediction

    flow = False

    def noised(self, x0, noise, sigma):
        return x0 + per_sample(sigma, x0) * noise

    def sigma_at(self, u):
        t = (u * len(self.sigmas)).floor().long().clamp(0, len(self.sigmas) - 1)
        return self.sigmas.to(u.device)[t].to(torch.float32)

    def nearest_timestep(self, sigma):
        return (sigma.log()[:, None] - self.sigmas.to(sigma).log()).abs().argmin(1)

    def native_scale(self, sigma):
        return sigma if self.prediction == "epsilon" else sigma / (sigma**2 + 1).sqrt()

    def predict_x0(self, x, sigma, conds):
        s = per_sample(sigma, x)
        out = self.network_output((x / (s**2 + 1).sqrt()).to(self.dtype), self.nearest_timestep(sigma), conds).float()
        return x - s * out if self.prediction == "epsilon" else x / (s**2 + 1) - out * s / (s**2 + 1).sqrt()

    def network_output(self, x, t, conds):
        added = self.sdxl_extras(conds, x) if self.network_config.addition_embed_type == "text_time" else None
        return self.network(
            x,
            t,
            encoder_hidden_states=stack_conditionings(conds, "cross_attn", x),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def sdxl_extras(self, conds, x):
        size = 8 * x.shape[-2], 8 * x.shape[-1]
        default = dict(zip(SDXL_SIZE_KEYS, (*size, 0, 0, *size), strict=True))
        sizes = [[float(c.get(k, default[k])) for k in SDXL_SIZE_KEYS] for c in conds]
        return {
            "text_embeds": stack_conditionings(conds, "pooled_output", x),
            "time_ids": torch.tensor(sizes, device=x.device, dtype=x.dtype),
        }


def scheduler_sigmas(scheduler: dict) -> Tensor:
    """(1000,) noise levels of a scheduler_config.json, in ComfyUI's numbers; zero terminal SNR ends at a large finite
    level."""
    n, first, last = (
        scheduler.get("num_train_timesteps", 1000),
        scheduler.get("beta_start", 0.00085),
        scheduler.get("beta_end", 0.012),
    )
    if scheduler.get("beta_schedule", "scaled_linear") == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, n, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(first, last, n, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)
    if scheduler.get("rescale_betas_zero_snr"):
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()  # Lin et al. 2024, algorithm 1
        alphas[-1] = 4.8973451890853435e-08  # ComfyUI's stand-in for zero
    return ((1 - alphas) / alphas).sqrt()


# -- the engine --------------------------------------------------------------------------------------------------------


@dataclass
class DiffusersEngine:
    """One loaded model: its denoiser, text side and autoencoder."""

    family_key: str  # of trainers/families.py
    denoiser: EngineDenoiser
    text: TextEncoders
    vae: DiffusersVae
    _identity: str = field(default="", init=False)

    @property
    def family(self) -> ModelFamily:
        return MODEL_FAMILIES[self.family_key]

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    @property
    def identity(self) -> str:
        """32 hex digits over the weights that are trained on."""
        self._identity = self._identity or hash_module_weights(self.network)
        return self._identity

    @property
    def prediction(self) -> str:
        """modelspec.prediction_type."""
        if not isinstance(self.denoiser, UnetDenoiser):
            return "flow"
        return {"epsilon": "epsilon", "v_prediction": "v"}[self.denoiser.prediction]

    def encode_batch(self, batch) -> list[dict]:
        """The batch's conditionings with gradients, for a text encoder that learns too."""
        sizes = [{k: v for k, v in c.items() if not isinstance(v, Tensor)} for c in batch.conds]
        return [{**size, **self.text(caption)} for size, caption in zip(sizes, batch.captions, strict=True)]

    def lora_key(self, name: str) -> str:
        """A layer's name in a LoRA file: diffusers' spelling for transformers, kohya's for UNets. ComfyUI and diffusers
        load both."""
        return f"transformer.{name}" if self.denoiser.flow else kohya_lora_key("lora_unet", name)

    def to_file_key(self, key: str) -> str:
        return to_peft_key(key) if key.startswith("transformer.") else key

    def lora_tensors(
        self, adapters: Adapters, text_adapters: Adapters | None = None
    ) -> tuple[dict[str, Tensor], list[str]]:
        """(tensors by their key in the file, layers that never learnt)."""
        tensors, untouched = {}, []
        for owner, key in self.adapters_with_keys(adapters, text_adapters):
            more, idle = owner.export_tensors(key)
            tensors |= {self.to_file_key(k): v for k, v in more.items()}
            untouched += idle
        return tensors, untouched

    def adapters_with_keys(self, adapters, text_adapters):
        return [(adapters, self.lora_key)] + ([(text_adapters, text_lora_key)] if text_adapters is not None else [])

    @torch.no_grad()
    def load_lora(self, tensors: dict[str, Tensor], adapters: Adapters, text_adapters: Adapters | None = None):
        """Fill adapters of the same settings from what `lora_tensors` gave; layers that are not in it are off."""
        for owner, key in self.adapters_with_keys(adapters, text_adapters):
            for name, layer in owner.layers.items():
                low = owner.adapter_for(name)
                keys = {suffix: self.to_file_key(f"{key(name)}.{suffix}") for suffix in low.export_tensors(layer)}
                found = {suffix: tensors[there] for suffix, there in keys.items() if there in tensors}
                low.load(layer, found) if found else low.reset_to_zero()

    @torch.no_grad()
    def sample(
        self, prompts: list[str], seed: int, size: tuple[int, int], steps=20, cfg: float | None = None
    ) -> Tensor:
        """(N, H, W, 3) images in 0..1 of `size` (width, height), by Euler steps with classifier-free guidance, one
        seed for all."""
        cfg = self.family.sampling_guidance if cfg is None else cfg
        conds, (empty,) = self.text.encode(prompts), self.text.encode([""])
        h, w = size[1] // self.vae.factor, size[0] // self.vae.factor
        noise = torch.randn(1, self.vae.channels, h, w, generator=make_generator(seed)).expand(len(conds), -1, -1, -1)
        sigmas = self.denoiser.sigma_at(torch.linspace(1, 0, steps + 1))
        sigmas[-1] = 0.0
        x0 = sample_euler(
            GuidedDenoiser(self.denoiser, empty, cfg),
            noise.to(self.denoiser.device),
            conds,
            sigmas.to(self.denoiser.device),
        )
        return self.vae.decode(self.denoiser.latent_space(x0))


@dataclass
class GuidedDenoiser:
    """Classifier-free guidance (Ho & Salimans 2022) as a denoiser of its own."""

    denoiser: EngineDenoiser
    empty_cond: dict
    cfg: float

    def noised(self, x0, noise, sigma):
        return self.denoiser.noised(x0, noise, sigma)

    def denoise(self, x, sigma, conds):
        if self.cfg == 1.0:
            return self.denoiser.denoise(x, sigma, conds)
        with_text, without = (self.denoiser.denoise(x, sigma, c) for c in (conds, [self.empty_cond] * len(conds)))
        return without + self.cfg * (with_text - without)


def to_peft_key(key: str) -> str:
    """Diffusers' spelling of a LoRA key: lora_A is down, lora_B is up."""
    return key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")


# -- loading -----------------------------------------------------------------------------------------------------------


def load_engine(path, device=None) -> DiffusersEngine:
    """The model of a diffusers folder or a single .safetensors file; nothing is fetched from the network.

    Raises FileNotFoundError or ValueError with the remedy for what is not there or not known."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give --model a diffusers folder or a .safetensors checkpoint.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    engine = load_diffusers_folder(path) if path.is_dir() else load_checkpoint_file(path)
    if device.type == "cuda":
        engine.network.to(device, torch.bfloat16)
    engine.text.device = engine.vae.device = device
    return engine


def load_diffusers_folder(path: Path) -> DiffusersEngine:
    """A folder with model_index.json, as pipeline.save_pretrained writes it."""
    if not (path / "model_index.json").exists():
        raise ValueError(
            f"{path} has no model_index.json, so it is not a diffusers folder. Give the folder that holds unet/ or "
            "transformer/."
        )
    if (path / "unet").is_dir():
        return load_unet_folder(path)
    kind = (
        json.loads((path / "transformer" / "config.json").read_text())["_class_name"]
        if (path / "transformer").is_dir()
        else "nothing"
    )
    makers = {"SD3Transformer2DModel": load_sd3_folder, "FluxTransformer2DModel": load_flux_folder}
    if kind not in makers:
        known = ", ".join(["UNet2DConditionModel", *makers])
        raise ValueError(f"{path} holds {kind}; the embedded engine knows {known}. Train it inside ComfyUI.")
    return makers[kind](path)


def load_frozen_module(kind, path: Path, part: str):
    """One module of a diffusers folder, fp32, from local files only."""
    module = kind.from_pretrained(str(path / part), local_files_only=True)
    return module.float().eval().requires_grad_(False)


def load_folder_clip(path: Path, number: str, prefix: str, layer=None) -> ClipTextEncoder:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = json.loads((path / f"text_encoder{number}" / "config.json").read_text())
    projected = "CLIPTextModelWithProjection" in config.get("architectures", [])
    model = load_frozen_module(
        CLIPTextModelWithProjection if projected else CLIPTextModel, path, f"text_encoder{number}"
    )
    return ClipTextEncoder(load_clip_tokenizer(path / f"tokenizer{number}"), model, prefix, layer)


def load_folder_t5(path: Path, number: str, min_tokens: int) -> T5TextEncoder:
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(str(path / f"tokenizer{number}"), local_files_only=True)
    return T5TextEncoder(tokenizer, load_frozen_module(T5EncoderModel, path, f"text_encoder{number}"), min_tokens)


def load_folder_vae(path: Path, space: tuple[float, float]) -> tuple[DiffusersVae, tuple[float, float]]:
    """(autoencoder, latent format). A tiny one gives model space itself; the family's format unscales its latents as
    ComfyUI does."""
    from diffusers import AutoencoderKL, AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]  loaded lazily

    config = json.loads((path / "vae" / "config.json").read_text())
    if config["_class_name"] == "AutoencoderTiny":
        return DiffusersVae(load_frozen_module(AutoencoderTiny, path, "vae"), *space, tiny=True), space
    space = config.get("scaling_factor") or space[0], config.get("shift_factor") or 0.0
    return DiffusersVae(load_frozen_module(AutoencoderKL, path, "vae"), *space), space


def load_unet_folder(path: Path) -> DiffusersEngine:
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]  loaded lazily

    unet: Any = load_frozen_module(UNet2DConditionModel, path, "unet")
    scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    if unet.config.addition_embed_type == "text_time":
        name, space = "sdxl", (0.13025, 0.0)
        encoders = {"l": load_folder_clip(path, "", "lora_te1", -2), "g": load_folder_clip(path, "_2", "lora_te2", -2)}
        text = TextEncoders(encoders, words.join_sdxl_states)
    else:
        name, space = ("sd15" if unet.config.cross_attention_dim == 768 else "sd2"), (0.18215, 0.0)
        text = TextEncoders({"l": load_folder_clip(path, "", "lora_te")}, words.join_clip_states)
    vae, space = load_folder_vae(path, space)
    prediction = scheduler.get("prediction_type", "epsilon")
    return DiffusersEngine(
        name, UnetDenoiser(unet, *space, sigmas=scheduler_sigmas(scheduler), prediction=prediction), text, vae
    )


def load_sd3_folder(path: Path) -> DiffusersEngine:
    from diffusers import SD3Transformer2DModel  # pyright: ignore[reportPrivateImportUsage]  loaded lazily

    parts = {"l": ("", "lora_te1"), "g": ("_2", "lora_te2")}
    encoders: dict[str, ClipTextEncoder | T5TextEncoder] = {
        k: load_folder_clip(path, n, prefix, -2)
        for k, (n, prefix) in parts.items()
        if (path / f"text_encoder{n}").is_dir()
    }
    if (path / "text_encoder_3").is_dir():
        encoders["t5"] = load_folder_t5(path, "_3", min_tokens=77)
    vae, space = load_folder_vae(path, (1.5305, 0.0609))
    return DiffusersEngine(
        "sd3",
        Sd3Denoiser(load_frozen_module(SD3Transformer2DModel, path, "transformer"), *space),
        TextEncoders(encoders, words.join_sd3_states),
        vae,
    )


def load_flux_folder(path: Path) -> DiffusersEngine:
    from diffusers import FluxTransformer2DModel  # pyright: ignore[reportPrivateImportUsage]  loaded lazily

    encoders = {"l": load_folder_clip(path, "", "lora_te1"), "t5": load_folder_t5(path, "_2", min_tokens=256)}
    vae, space = load_folder_vae(path, (0.3611, 0.1159))
    denoiser = FluxDenoiser(load_frozen_module(FluxTransformer2DModel, path, "transformer"), *space)
    return DiffusersEngine(
        "flux" if denoiser.takes_guidance else "schnell", denoiser, TextEncoders(encoders, words.join_flux_states), vae
    )


def load_checkpoint_file(path: Path) -> DiffusersEngine:
    """A single checkpoint: SD3-shaped ones directly, others when diffusers has their configuration in its local
    cache."""
    from ..files import read_safetensors

    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is not a .safetensors file. {CONVERT_REMEDY}")
    tensors, _ = read_safetensors(path)
    return (
        load_sd3_checkpoint(tensors) if single_file.is_sd3_checkpoint(tensors) else load_unet_checkpoint(path, tensors)
    )


def load_sd3_checkpoint(tensors) -> DiffusersEngine:
    space = (1.5305, 0.0609)
    if any(k.startswith(f"{single_file.TEXT_ENCODERS_PREFIX}t5xxl.") for k in tensors):
        raise ValueError(
            f"This checkpoint has a T5 text encoder inside, whose vocabulary is not available. {CONVERT_REMEDY}"
        )
    models = {"l": single_file.load_clip_model(tensors, "clip_l"), "g": single_file.load_clip_model(tensors, "clip_g")}
    if not any(models.values()):
        raise ValueError(f"This checkpoint has no text encoder inside, so it cannot encode captions. {CONVERT_REMEDY}")
    prefixes = {"l": "lora_te1", "g": "lora_te2"}
    encoders = {
        k: ClipTextEncoder(load_clip_tokenizer(pad_zero=k == "g"), m, prefixes[k], -2)
        for k, m in models.items()
        if m is not None
    }
    model, tiny = single_file.load_autoencoder(tensors)
    vae = DiffusersVae(model, *(single_file.read_latent_scaling(tensors, space) if tiny else space), tiny=tiny)
    return DiffusersEngine(
        "sd3",
        Sd3Denoiser(single_file.load_sd3_transformer(tensors), *space),
        TextEncoders(encoders, words.join_sd3_states),
        vae,
    )


def load_unet_checkpoint(path: Path, tensors) -> DiffusersEngine:
    """SD1.5 and SDXL files by diffusers' own reader, which needs the family's configuration in the local Hugging Face
    cache."""
    import tempfile

    if f"{single_file.MODEL_PREFIX}input_blocks.0.0.weight" not in tensors:
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"{path.name} is not a checkpoint that the embedded engine knows (its first tensors are {some}). "
            f"{CONVERT_REMEDY}"
        )
    from diffusers import (
        StableDiffusionPipeline,  # pyright: ignore[reportPrivateImportUsage]  loaded lazily
        StableDiffusionXLPipeline,  # pyright: ignore[reportPrivateImportUsage]  loaded lazily
    )

    kind = (
        StableDiffusionXLPipeline
        if any(k.startswith("conditioner.embedders.1.") for k in tensors)
        else StableDiffusionPipeline
    )
    try:
        pipeline = kind.from_single_file(str(path), local_files_only=True, torch_dtype=torch.float32)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path.name} is a UNet checkpoint, and diffusers' description of its family is not on this machine "
            f"({reason}). {CONVERT_REMEDY}"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        return load_diffusers_folder(Path(folder))
