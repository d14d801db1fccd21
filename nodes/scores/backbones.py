"""The door to ComfyUI for score models that look through something loaded: the MODEL's own states, or VAE and
CLIP_VISION.

Nothing of it is changed. Hooks and adapters are there during one call, weights are in ComfyUI's memory manager, and
what a call borrows it gives back on every way out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import comfy.latent_formats
import comfy.model_management as mm
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...trainers.adapters.adapters import Adapters, find_adaptable_layers
from ...trainers.data.records import open_image
from ...trainers.files import tensor_hash
from ...trainers.memory.checkpointing import checkpoint_blocks
from ...trainers.scores.aesthetic_heads import AestheticHead, check_embedding_width
from ...trainers.scores.backbones import (
    LoadedModelTrunk,
    from_scorer_input,
    pool_hidden_states,
)
from ...trainers.scores.networks import (
    DECODED_IMAGE,
    LATENT_BACKBONES,
    MODEL_FEATURES,
    ScoreModelInfo,
    ScorerEnsemble,
    squeeze_single_frame,
)
from ...trainers.settings import AdapterSettings, compute_fingerprint
from .. import host
from ..host.families import find_model_family
from . import latents

BLOCK_DEPTHS = (1 / 3, 1 / 2)  # of a transformer's blocks (DiNa-LRM's choice, HKUST-C4G/diffusion-rm)
LORA_LR_FACTOR = 0.1  # of the score model's learning rate: 1e-4, usual for LoRA, at its default of 1e-3
# level that a clean latent is announced at: below it a model's states say little (LRM and DiNa-LRM score noised
# latents)
MIN_NOISE_LEVEL = 0.1
# times the memory of decoding: an SD VAE keeps 2.8 GiB for backward at 512 px, and the host counts 1.1 for decoding
DECODE_BACKWARD_MEMORY_FACTOR = 3
AESTHETIC_SCALE_MIDDLE = (
    5.0  # of the scales of aesthetic heads, 1 to 10; a score model says how far above it a picture is
)
IMAGE_FIRST_BLOCKS = ("DoubleStreamBlock",)  # blocks that return (image, text); all others (text, image)
BLOCK_LIST_NAMES = (
    "blocks",
    "layers",
)  # how families call their own list of blocks; refiners and embedders are called otherwise


class StopForward(Exception):
    """The last block that is looked at has spoken; the rest of the network need not run."""


# -- a loaded MODEL ----------------------------------------------------------------------------------------------------


class DiffusionFeatureExtractor:
    """(x, level) as `unit_view` gives them -> (B, seen): the pooled states of a UNet's stages down to the middle (as
    LRM takes them, Kwai-Kolors/LPO), or of a transformer's image tokens after a third and half of its blocks. Without
    text."""

    def __init__(self, model):
        if model is None:
            raise ValueError(
                f"The backbone '{MODEL_FEATURES}' looks through the diffusion model itself: connect the MODEL that it "
                "was or is to be trained with."
            )
        self.patcher = host.session.clone_for_training(model)
        self.network = self.patcher.model.diffusion_model
        self.blocks = select_feature_blocks(self.network)
        self.denoiser = host.denoiser.ComfyDenoiser(self.patcher, find_model_family(self.patcher.model.model_config))
        self.cond = zero_conditioning(self.network)

    def __call__(self, x: Tensor, level: Tensor, adapters: Adapters | None = None) -> Tensor:
        """`adapters`: those that hang on the network for this look; where they are trained, each block keeps its input
        only."""
        device = x.device
        x, level = x.to(self.patcher.load_device, torch.float32), level.to(self.patcher.load_device)
        found: list[Tensor] = []
        with (
            self.forward_context(needs_gradients(x, self.network), adapters),
            capture_block_states(self.blocks, found, count_image_tokens(x)),
        ):
            with contextlib.suppress(StopForward):
                self.denoiser.denoise(
                    *from_scorer_input(self.denoiser, x, level, MIN_NOISE_LEVEL), [self.cond] * len(x)
                )
        if len(found) < len(self.blocks):
            raise RuntimeError(
                f"{type(self.network).__name__} ran {len(found)} of the {len(self.blocks)} blocks that are looked at. "
                "Please report this model."
            )
        return torch.cat(found, 1).to(device)

    @contextlib.contextmanager
    def forward_context(self, graded: bool, adapters: Adapters | None = None):
        """The model on its device, as the host loads it; in a training session it is there already, and stays as it
        is."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(host.context.enable_gradients() if graded else torch.no_grad())
            model = self.patcher.model
            if not self.patcher.loaded_size():
                mm.load_models_gpu([self.patcher])
            if model.current_patcher is None:
                self.patcher.pre_run()
                stack.callback(self.patcher.cleanup)
            if adapters is not None:
                adapters.to(self.patcher.load_device)
            if graded:
                host.context.replace_inference_parameters(model)
                stack.enter_context(self.autograd_context())
                if adapters is not None and any(p.requires_grad for p in adapters.parameters()):
                    stack.enter_context(
                        checkpoint_blocks(
                            host.context.find_block_classes(self.network), ExtractorRecomputeContext(self, adapters)
                        )
                    )
            yield

    @contextlib.contextmanager
    def autograd_context(self):
        """The host's habits as autograd wants them."""
        with (
            host.out_of_place.disable_inplace_updates(self.network),
            host.context.set_training_flag(),
            host.context.disable_transfer_streams(),
            host.context.use_differentiable_rope(),
        ):
            yield

    def active_layers(self) -> set[str]:
        """Names of the layers that a look comes by with something in hand: the rest of the network never runs, and a
        text of zeros tells nothing to the layers that read it."""
        names: set[str] = set()

        def note(name):
            return lambda layer, args, out: names.add(name) if args and args[0].any() else None

        handles = [
            layer.register_forward_hook(note(name)) for name, layer in find_adaptable_layers(self.network).items()
        ]
        try:
            self.feature_width()
        finally:
            for handle in handles:
                handle.remove()
        return names

    def feature_width(self) -> int:
        """Numbers per picture, found by looking at noise."""
        shape = self.denoiser.model.latent_format
        frames = (1,) if shape.latent_dimensions == 3 else ()
        noise = torch.randn(1, shape.latent_channels, *frames, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(False), torch.no_grad():
            return self(noise, torch.full((1,), 0.5)).shape[1]


@dataclass(frozen=True)
class ExtractorRecomputeContext:
    """What a block needs that is computed again in backward, when the look is long over: its adapters, and the host's
    habits."""

    extractor: DiffusionFeatureExtractor
    adapters: Adapters

    def capture_context(self):
        @contextlib.contextmanager
        def again():
            with self.extractor.autograd_context(), self.adapters.attached():
                yield

        return again


def needs_gradients(x: Tensor, network) -> bool:
    """Whether anybody will ask for gradients: of the latent, or of adapters that hang on the network."""
    return (
        torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and (x.requires_grad or any(m._forward_hooks for m in network.modules()))
    )


@contextlib.contextmanager
def capture_block_states(blocks, found: list, tokens: int):
    """Each block's state is pooled into `found` as it comes; the last one ends the run."""

    def see(module, _, out):
        found.append(pool_hidden_states(select_image_state(module, out, tokens)))
        if len(found) == len(blocks):
            raise StopForward

    handles = []
    try:
        handles += [block.register_forward_hook(see) for block in blocks]
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_image_tokens(x: Tensor) -> int:
    """Image tokens of a transformer with patches of 2x2 cells."""
    return -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)


def select_image_state(block, out, tokens: int) -> Tensor:
    """The image's state in what a block returns: without the text's tensor, and without the text's tokens before the
    image's."""
    if isinstance(out, (tuple, list)):
        parts = [part for part in out if torch.is_tensor(part)]
        out = parts[0 if type(block).__name__ in IMAGE_FIRST_BLOCKS else -1]
    if out.ndim == 5 and out.shape[-1] == getattr(block, "x_dim", None):
        out = out.flatten(1, 3)  # Cosmos keeps (B, T, h, w, C)
    return out[:, -tokens:] if out.ndim == 3 and out.shape[1] > tokens else out


def select_feature_blocks(network) -> list[torch.nn.Module]:
    """The blocks that are looked at, in the order they run. ValueError for networks of another build."""
    if hasattr(network, "input_blocks") and getattr(network, "middle_block", None) is not None:
        return [
            block[-1] for block in (*select_unet_blocks(network.input_blocks), network.middle_block)
        ]  # the host calls the layers, never the block
    named = [
        (name, child)
        for name, child in network.named_children()
        if isinstance(child, torch.nn.ModuleList) and name.endswith(BLOCK_LIST_NAMES)
    ]
    blocks = [block for _, children in named for block in children]
    if len(blocks) < 2:
        raise ValueError(
            f"The backbone '{MODEL_FEATURES}' knows UNets and transformers with a list of blocks; "
            f"{type(network).__name__} has neither. Choose 'latent ResNet', which needs no model."
        )
    return list(dict.fromkeys(blocks[max(0, round(len(blocks) * depth) - 1)] for depth in BLOCK_DEPTHS))


def select_unet_blocks(blocks) -> list[torch.nn.Module]:
    """The last block before each halving, and the last of all."""
    halving = [i for i, block in enumerate(blocks) if any(type(m).__name__ == "Downsample" for m in block)]
    return [blocks[i - 1] for i in halving] + [blocks[-1]]


TEXT_WIDTH_PATHS = {  # where a network says how wide a text token is, and a pooled text
    "cross_attn": (
        "context_embedder.in_features",
        "txt_in.in_features",
        "cap_embedder.1.in_features",
        "cond_seq_linear.in_features",
        "text_embedding.0.in_features",
        "txt_in.input_embedder.in_features",
    ),
    "pooled_output": ("y_embedder.mlp.0.in_features", "vector_in.in_layer.in_features"),
}
SDXL_POOLED_WIDTH = 1280


def zero_conditioning(network) -> dict:
    """The conditioning that says nothing: zeros as wide as the network's text."""
    width = resolve_first_width(network, TEXT_WIDTH_PATHS["cross_attn"]) or cross_attention_width(network)
    cond = {"cross_attn": torch.zeros(1, 77, width)}
    if pooled_width := resolve_first_width(network, TEXT_WIDTH_PATHS["pooled_output"]) or (
        SDXL_POOLED_WIDTH if getattr(network, "num_classes", None) is not None else 0
    ):
        cond["pooled_output"] = torch.zeros(1, pooled_width)
    return cond


def resolve_first_width(network, paths) -> int:
    for path in paths:
        with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError):
            return int(resolve_attribute_path(network, path))
    return 0


def resolve_attribute_path(thing, path: str):
    for name in path.split("."):
        thing = thing[int(name)] if name.isdigit() else getattr(thing, name)
    return thing


def cross_attention_width(network) -> int:
    """Of networks that only cross attention tells: the inputs of its keys."""
    for name, module in network.named_modules():
        if name.endswith(("attn2.to_k", "cross_attn.k", "cross_attn.k_proj")):
            return module.in_features
    raise ValueError(
        f"The backbone '{MODEL_FEATURES}' cannot tell how wide the text of {type(network).__name__} is. Choose 'latent "
        "ResNet', which needs no model."
    )


# -- VAE and CLIP_VISION -----------------------------------------------------------------------------------------------


class DifferentiableClipVision:
    """A CLIP_VISION that can be differentiated: pixels (B, 3, h, w) in 0..1 -> embeddings (B, d), or all tokens of a
    SigLIP."""

    SIDE = 384  # px, for encoders that take any size

    def __init__(self, clip_vision):
        if clip_vision is None:
            raise ValueError("There is no CLIP_VISION to look at pictures with. Connect one from Load CLIP Vision.")
        self.clip_vision, self.patcher = clip_vision, static_patcher(clip_vision.patcher)
        side = getattr(clip_vision, "image_size", 0)
        self.side = side if isinstance(side, int) and side > 0 else self.SIDE

    def __call__(self, pixels: Tensor) -> Tensor:
        model, device = self.clip_vision.model, self.patcher.load_device
        pixels = resize_centre_crop(pixels.to(device, torch.float32), self.side)
        mean, std = (
            torch.tensor(v, device=device).view(3, 1, 1)
            for v in (self.clip_vision.image_mean, self.clip_vision.image_std)
        )
        return model(pixel_values=(pixels - mean) / std, intermediate_output=-2)[2].float()

    @property
    def width(self) -> int:
        """Numbers of an embedding, or of a token."""
        with torch.inference_mode(False), torch.no_grad(), loaded_patchers([self.patcher], False):
            return self(torch.zeros(1, 3, self.side, self.side)).shape[-1]


def static_patcher(patcher):
    return host.session.get_non_dynamic_patcher(patcher) if patcher.is_dynamic() else patcher


@contextlib.contextmanager
def loaded_patchers(patchers, graded: bool):
    """The models on their devices, ready for gradients where they are wanted. What is there already stays: asked again,
    the host would make room for it anew, and a model in training is what it would push out."""
    if missing := [patcher for patcher in patchers if not patcher.loaded_size()]:
        mm.load_models_gpu(missing)
    with contextlib.ExitStack() as stack:
        if graded:
            stack.enter_context(host.context.enable_gradients())
            for patcher in patchers:
                host.context.replace_inference_parameters(patcher.model)
                stack.enter_context(host.out_of_place.disable_inplace_updates(patcher.model))
            for habit in (host.context.set_training_flag, host.context.disable_transfer_streams):
                stack.enter_context(habit())
        yield


def resize_centre_crop(pixels: Tensor, side: int) -> Tensor:
    """The middle square, side x side: as the host's clip_preprocess, without its rounding to 256 levels, which has no
    gradient."""
    height, width = pixels.shape[-2:]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        pixels = F.interpolate(
            pixels, size=(round(height * scale), round(width * scale)), mode="bicubic", antialias=True
        )
    top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
    return pixels[..., top : top + side, left : left + side]


class DecodedFeatureExtractor:
    """(x, level) -> (B, d): the latent decoded and looked at by a CLIP_VISION, or rated by a head on it. The level is
    not asked: noise is plainly to be seen in the picture."""

    def __init__(self, vae, sight: DifferentiableClipVision, format_name: str, head: AestheticHead | None = None):
        check_vae(vae)
        self.vae, self.vision_encoder, self.head = vae, sight, head
        self.patcher, self.format = static_patcher(vae.patcher), latent_format_by_name(format_name)
        self.output_affine = vae_output_affine(vae)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        graded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and x.requires_grad
        with (
            loaded_patchers([self.patcher, self.vision_encoder.patcher], graded),
            contextlib.nullcontext() if graded else torch.no_grad(),
        ):
            seen = self.vision_encoder(self.decode_pixels(x))
            if self.head is not None:
                return self.head.to(seen.device)(seen)[:, None].to(x.device)
            return mean_pool_tokens(seen).to(x.device)

    def gradient_memory(self, shape) -> float:
        """Bytes that a look with gradient at latents (B, C, ..., h, w) needs beside the model in training."""
        models = self.patcher.model_size() + self.vision_encoder.patcher.model_size()
        return models + DECODE_BACKWARD_MEMORY_FACTOR * self.vae.memory_used_decode(
            (shape[0], shape[1], *shape[-2:]), self.vae.vae_dtype
        )

    def decode_pixels(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) about 0 to 1, not clamped: the clamp of VAE.decode has no gradient where a picture is white or
        black."""
        latent = self.format.process_out(x.to(self.patcher.load_device, torch.float32))
        latent = (
            squeeze_single_frame(latent)
            if self.vae.latent_dim == 2
            else latent
            if latent.ndim == 5
            else latent.unsqueeze(2)
        )
        pixels = self.vae.first_stage_model.decode(latent.to(self.vae.vae_dtype)).float()
        scale, shift = self.output_affine
        return squeeze_single_frame(pixels) * scale + shift


def check_vae(vae) -> None:
    if vae is None:
        raise ValueError(
            f"The backbone '{DECODED_IMAGE}' decodes latents: connect the VAE that belongs to the model, or its TAESD."
        )


def mean_pool_tokens(seen: Tensor) -> Tensor:
    """(B, d); all tokens of a SigLIP by their mean, as nodes/data/image_features.py does."""
    return seen.mean(1) if seen.ndim == 3 else seen


def latent_format_by_name(name: str):
    kind = getattr(comfy.latent_formats, name, None)
    if kind is None:
        raise ValueError(
            f"The backbone '{DECODED_IMAGE}' decodes latents of {name!r}, a kind that this ComfyUI does not know. "
            "Update ComfyUI."
        )
    return kind()


def vae_output_affine(vae) -> tuple[float, float]:
    """(scale, shift) of the VAE's own way from what it decodes to 0..1, read off two values that no clamp touches."""
    low, high = vae.process_output(torch.tensor([0.25, 0.75])).tolist()
    scale = (high - low) / 0.5
    return scale, low - 0.25 * scale


# -- what score models and their nodes ask for -------------------------------------------------------------------------


def make_trunk_factory(model=None, vae=None, clip_vision=None) -> Callable[[ScoreModelInfo], torch.nn.Module]:
    """`trunk(about)` for every backbone, its weights drawn from torch's own generator. ValueError, when it is asked,
    for what is not connected."""
    looks: dict[str, object] = {}  # one for all members of an ensemble

    def look(info: ScoreModelInfo):
        if info.backbone not in looks:
            made = (
                DiffusionFeatureExtractor(model)
                if info.backbone == MODEL_FEATURES
                else DecodedFeatureExtractor(vae, DifferentiableClipVision(clip_vision), info.latent_format)
            )
            looks[info.backbone] = (
                made,
                made.feature_width() if info.backbone == MODEL_FEATURES else made.vision_encoder.width,
            )
        return looks[info.backbone]

    def trunk(info: ScoreModelInfo):
        if info.backbone in LATENT_BACKBONES:
            return LATENT_BACKBONES[info.backbone](info.channels, info.width, info.depth)
        found, seen = look(info)
        if info.backbone == MODEL_FEATURES and found.denoiser.model.latent_format.latent_channels != info.channels:
            raise ValueError(
                f"This score model looks through a model of {info.channels} latent channels ({info.latent_format}), "
                f"and the connected MODEL has {found.denoiser.model.latent_format.latent_channels} "
                f"({latents.latent_format_name(found.patcher)})."
            )
        if info.backbone != MODEL_FEATURES or not info.rank:
            return LoadedModelTrunk(found, seen, info.width)
        adapters = make_feature_adapters(found, info.rank)
        return LoadedModelTrunk(functools.partial(found, adapters=adapters), seen, info.width, adapters)

    return trunk


def make_feature_adapters(look: DiffusionFeatureExtractor, rank: int) -> Adapters:
    """A LoRA on the attention that a look comes by, all else being dead weight in the file. It learns slower than the
    small layers after it."""
    rng = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
    adapters = Adapters(look.network, AdapterSettings(rank=rank, targets="attention"), rng).keep_layers(
        look.active_layers()
    )
    for p in adapters.parameters():
        p.rate = LORA_LR_FACTOR
    return adapters


class ImageScoreModel(ScorerEnsemble):
    """An aesthetic head on a CLIP_VISION: rates pictures, and latents too when it was given a VAE to decode them
    with."""

    def __init__(self, head: AestheticHead, clip_vision, name: str, vae=None, format_name: str = "", channels: int = 0):
        self.head, self.vision_encoder, self.name = head, DifferentiableClipVision(clip_vision), name
        check_embedding_width(head, self.vision_encoder.width)
        check_siglip_pooler(head, clip_vision)
        networks = (
            []
            if vae is None
            else [DecodedScorer(DecodedFeatureExtractor(vae, self.vision_encoder, format_name, head), name)]
        )
        super().__init__(
            networks,
            ScoreModelInfo(
                DECODED_IMAGE,
                "regression",
                format_name,
                channels,
                noisy=False,
                mean=AESTHETIC_SCALE_MIDDLE,
                low=1.0,
                high=10.0,
            ),
        )
        others = [host.identity.hash_patched_weights(one.patcher) for one in (clip_vision, vae) if one is not None]
        self.identity = compute_fingerprint(name, tensor_hash(head.state_dict()), others, format_name)

    def member_scores(self, x: Tensor, level: Tensor) -> Tensor:
        if not self.networks:
            raise ValueError(
                f"{self.name} rates pictures, and was asked about latents. Connect model and vae to Load Aesthetic "
                "Head, so that it can decode them."
            )
        return super().member_scores(x, level)

    @torch.no_grad()
    def rate(self, pictures, report=None, check_interrupt=host.progress.raise_if_interrupted) -> list[float]:
        """One rating for each PIL picture, on the head's own scale; the middle square of each is seen."""
        out: list[float] = []
        with loaded_patchers([self.vision_encoder.patcher], False):
            for picture in pictures:
                check_interrupt()
                pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).movedim(-1, 0)[
                    None
                ]
                seen = self.vision_encoder(pixels)
                out += self.head.to(seen.device)(seen).tolist()
                if report:
                    report(len(out))
        if not np.isfinite(out).all():
            raise ValueError(
                f"{self.name} gives ratings that are no numbers (NaN). Load the CLIP vision again, or start ComfyUI "
                "with --fp32-text-enc."
            )
        return out

    def rate_pictures(
        self, dataset, report=None, check_interrupt=host.progress.raise_if_interrupted
    ) -> tuple[list[float], list[float]]:
        """(ratings, spreads) of a dataset's pictures, one opened at a time. A single head has no spread."""
        tell = report and (lambda done: report(done, len(dataset), "rated"))
        return self.rate((open_image(record) for record in dataset), tell, check_interrupt), [0.0] * len(dataset)


class DecodedScorer(torch.nn.Module):
    """The network of an image score model: (x, level) -> (B, 1), in points above the middle of the head's scale. It has
    nothing of its own."""

    def __init__(self, extract: DecodedFeatureExtractor, name: str):
        super().__init__()
        self.extract, self.name = extract, name

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.extract(x, level) - AESTHETIC_SCALE_MIDDLE

    def state_dict(self, *args, **kwargs):
        raise ValueError(
            f"{self.name} has its own file and is not saved again: load it with Load Aesthetic Head wherever it is "
            "wanted."
        )


def check_siglip_pooler(head: AestheticHead, clip_vision) -> None:
    siglip = getattr(clip_vision, "model_type", "").startswith("siglip")
    if siglip and head.pooler is None:
        raise ValueError(
            "This head rates SigLIP's pooled embedding, and ComfyUI's SigLIP comes without its pooling layer. Choose "
            "as pooler a file that holds it: model.safetensors of google/siglip-so400m-patch14-384, in "
            "models/clip_vision."
        )
    if not siglip and head.pooler is not None:
        raise ValueError(
            "The pooler belongs to SigLIP, and the connected CLIP_VISION pools by itself. Set pooler to (none)."
        )
