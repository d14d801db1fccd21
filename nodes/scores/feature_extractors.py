"""Feature extractors on ComfyUI's loaded models, for score models: the hidden states of a MODEL, or a VAE and a
CLIP_VISION on the decoded image.

The loaded models are not changed. Hooks and adapters are attached during one call only, weights stay with ComfyUI's
memory manager, and everything a call borrows is given back, also after an error.
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
from ...trainers.data.images import image_to_batch_tensor
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
from ..host.families import find_patcher_family
from . import latents

BLOCK_DEPTHS = (1 / 3, 1 / 2)  # of a transformer's blocks (DiNa-LRM's choice, HKUST-C4G/diffusion-rm)
LORA_LR_FACTOR = 0.1  # of the score model's learning rate: 1e-4, usual for LoRA, at its default of 1e-3
# at least this noise level is passed to the model: below it its states say little (LRM and DiNa-LRM score noised
# latents)
MIN_NOISE_LEVEL = 0.1
# times the memory of decoding: an SD VAE keeps 2.8 GiB for backward at 512 px, and ComfyUI counts 1.1 for decoding
DECODE_BACKWARD_MEMORY_FACTOR = 3
AESTHETIC_SCALE_MIDDLE = 5.0  # of aesthetic heads, which rate 1 to 10; their scores are points above it
IMAGE_FIRST_BLOCKS = ("DoubleStreamBlock",)  # blocks that return (image, text); all others (text, image)
BLOCK_LIST_NAMES = ("blocks", "layers")  # endings of the names of main block lists; refiners and embedders have others


class StopForward(Exception):
    """The last feature block has run; the rest of the network is not needed."""


# -- a loaded MODEL ----------------------------------------------------------------------------------------------------


class DiffusionFeatureExtractor:
    """(x, level) as `to_scorer_input` gives them -> (B, features): the pooled hidden states of a UNet's stages down to
    the middle block (as in LRM, Kwai-Kolors/LPO), or of a transformer's image tokens after a third and half of its
    blocks. The text conditioning is zero."""

    def __init__(self, model):
        if model is None:
            raise ValueError(
                f"The backbone '{MODEL_FEATURES}' uses the diffusion model's own features: connect the MODEL that "
                "it is trained with."
            )
        self.patcher = host.session.clone_for_training(model)
        self.network = self.patcher.model.diffusion_model
        self.blocks = select_feature_blocks(self.network)
        self.denoiser = host.denoiser.ComfyDenoiser(self.patcher, find_patcher_family(self.patcher))
        self.cond = zero_conditioning(self.network)

    def __call__(self, x: Tensor, level: Tensor, adapters: Adapters | None = None) -> Tensor:
        """`adapters`: those attached to the network for this call; where they are trained, blocks are checkpointed."""
        device = x.device
        x, level = x.to(self.patcher.load_device, torch.float32), level.to(self.patcher.load_device)
        states: list[Tensor] = []
        with (
            self.forward_context(needs_gradients(x, self.network), adapters),
            capture_block_states(self.blocks, states, count_image_tokens(x)),
        ):
            with contextlib.suppress(StopForward):
                self.denoiser.denoise(
                    *from_scorer_input(self.denoiser, x, level, MIN_NOISE_LEVEL), [self.cond] * len(x)
                )
        if len(states) < len(self.blocks):
            raise RuntimeError(
                f"{type(self.network).__name__} ran {len(states)} of the {len(self.blocks)} blocks whose features "
                "are needed. Please report this model."
            )
        return torch.cat(states, 1).to(device)

    @contextlib.contextmanager
    def forward_context(self, with_gradients: bool, adapters: Adapters | None = None):
        """The model loaded on its device and ready for a forward pass, with or without gradients. In a training session
        it is loaded already, and stays as it is."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(host.context.enable_gradients() if with_gradients else torch.no_grad())
            stack.enter_context(host.context.disable_fp8_matmul())  # the same features with and without gradients
            model = self.patcher.model
            if not self.patcher.loaded_size():
                mm.load_models_gpu([self.patcher])
            if model.current_patcher is None:
                self.patcher.pre_run()
                stack.callback(self.patcher.cleanup)
            if adapters is not None:
                adapters.to(self.patcher.load_device)
            if with_gradients:
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
        """ComfyUI's optimisations switched to forms that autograd can differentiate."""
        with (
            host.out_of_place.disable_inplace_updates(self.network),
            host.frozen_casts.recast_frozen_weights(self.network),
            host.context.set_training_flag(),
            host.context.disable_fp8_matmul(),
            host.context.disable_transfer_streams(),
            host.context.use_differentiable_rope(),
        ):
            yield

    def active_layers(self) -> set[str]:
        """Names of the layers that affect the features: they run, on an input that is not all zero. The layers after
        the last feature block never run, and those that read the text read zeros."""
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
        """Features per image, found by a forward pass on noise."""
        latent = self.denoiser.model.latent_format
        frames = (1,) if latent.latent_dimensions == 3 else ()
        noise = torch.randn(1, latent.latent_channels, *frames, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(False), torch.no_grad():
            return self(noise, torch.full((1,), 0.5)).shape[1]


@dataclass(frozen=True)
class ExtractorRecomputeContext:
    """What a checkpointed block needs when backward recomputes it after the call is over: the adapters, and the
    autograd context."""

    extractor: DiffusionFeatureExtractor
    adapters: Adapters

    def capture_context(self):
        @contextlib.contextmanager
        def recompute():
            with self.extractor.autograd_context(), self.adapters.attached():
                yield

        return recompute


def needs_gradients(x: Tensor, network) -> bool:
    """Whether the forward pass needs gradients: of the latent, or of adapters attached to the network."""
    return (
        torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and (x.requires_grad or any(m._forward_hooks for m in network.modules()))
    )


@contextlib.contextmanager
def capture_block_states(blocks, states: list, tokens: int):
    """While active, each block's pooled output is appended to `states`; the last one raises StopForward."""

    def capture(module, _, out):
        states.append(pool_hidden_states(select_image_state(module, out, tokens)))
        if len(states) == len(blocks):
            raise StopForward

    handles = []
    try:
        handles += [block.register_forward_hook(capture) for block in blocks]
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_image_tokens(x: Tensor) -> int:
    """Image tokens of a transformer with patches of 2x2 latent cells."""
    return -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)


def select_image_state(block, out, tokens: int) -> Tensor:
    """The image's part of what a block returns: without the text tensor, and without text tokens before the image
    tokens."""
    if isinstance(out, (tuple, list)):
        parts = [part for part in out if torch.is_tensor(part)]
        out = parts[0 if type(block).__name__ in IMAGE_FIRST_BLOCKS else -1]
    if out.ndim == 5 and out.shape[-1] == getattr(block, "x_dim", None):
        out = out.flatten(1, 3)  # Cosmos keeps (B, T, h, w, C)
    return out[:, -tokens:] if out.ndim == 3 and out.shape[1] > tokens else out


def select_feature_blocks(network) -> list[torch.nn.Module]:
    """The modules whose outputs are the features, in the order they run. ValueError for networks of another
    architecture."""
    if hasattr(network, "input_blocks") and getattr(network, "middle_block", None) is not None:
        # the last layer of each block, because ComfyUI calls the layers and never the block
        return [block[-1] for block in (*select_unet_blocks(network.input_blocks), network.middle_block)]
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
    """The last block before each downsampling, and the last of all."""
    downsampling = [i for i, block in enumerate(blocks) if any(type(m).__name__ == "Downsample" for m in block)]
    return [blocks[i - 1] for i in downsampling] + [blocks[-1]]


TEXT_WIDTH_PATHS = {  # attributes of networks that hold the width of a text token, and of the pooled text
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
    """A conditioning without text: zeros as wide as the network's text embeddings."""
    width = resolve_first_width(network, TEXT_WIDTH_PATHS["cross_attn"]) or cross_attention_width(network)
    cond = {"cross_attn": torch.zeros(1, 77, width)}
    if pooled_width := resolve_first_width(network, TEXT_WIDTH_PATHS["pooled_output"]) or (
        SDXL_POOLED_WIDTH if getattr(network, "num_classes", None) is not None else 0
    ):
        cond["pooled_output"] = torch.zeros(1, pooled_width)
    return cond


def resolve_first_width(network, paths) -> int:
    """The value of the first attribute path that the network has, or 0."""
    for path in paths:
        with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError):
            return int(resolve_attribute_path(network, path))
    return 0


def resolve_attribute_path(thing, path: str):
    """thing.a.0.b for "a.0.b"; numbers are indices."""
    for name in path.split("."):
        thing = thing[int(name)] if name.isdigit() else getattr(thing, name)
    return thing


def cross_attention_width(network) -> int:
    """The width of a text token by the key projection of the cross attention, for networks that state it nowhere
    else."""
    for name, module in network.named_modules():
        if name.endswith(("attn2.to_k", "cross_attn.k", "cross_attn.k_proj")):
            return module.in_features
    raise ValueError(
        f"The backbone '{MODEL_FEATURES}' cannot tell how wide the text of {type(network).__name__} is. Choose 'latent "
        "ResNet', which needs no model."
    )


# -- VAE and CLIP_VISION -----------------------------------------------------------------------------------------------


class DifferentiableClipVision:
    """A CLIP_VISION with gradients: pixels (B, 3, h, w) in 0..1 -> embeddings (B, d), or all tokens (B, T, d) of a
    SigLIP."""

    SIDE = 384  # px, for encoders that take any size

    def __init__(self, clip_vision):
        if clip_vision is None:
            raise ValueError("No CLIP_VISION is connected. Connect one from Load CLIP Vision.")
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
        """Width of an embedding, or of a token."""
        with torch.inference_mode(False), torch.no_grad(), loaded_patchers([self.patcher], False):
            return self(torch.zeros(1, 3, self.side, self.side)).shape[-1]


def static_patcher(patcher):
    """The patcher itself, or its non-dynamic form where ComfyUI would stream its weights."""
    return host.session.get_non_dynamic_patcher(patcher) if patcher.is_dynamic() else patcher


@contextlib.contextmanager
def loaded_patchers(patchers, with_gradients: bool):
    """The models loaded on their devices, ready for gradients if asked for. What is loaded already is not loaded again:
    ComfyUI would free memory for it once more, and a model in training is what it would unload."""
    if missing := [patcher for patcher in patchers if not patcher.loaded_size()]:
        mm.load_models_gpu(missing)
    with contextlib.ExitStack() as stack:
        if with_gradients:
            stack.enter_context(host.context.enable_gradients())
            for patcher in patchers:
                host.context.replace_inference_parameters(patcher.model)
                stack.enter_context(host.out_of_place.disable_inplace_updates(patcher.model))
            for context in (host.context.set_training_flag, host.context.disable_transfer_streams):
                stack.enter_context(context())
        yield


def resize_centre_crop(pixels: Tensor, side: int) -> Tensor:
    """The centre square, side x side: as ComfyUI's clip_preprocess, without its rounding to 256 levels, which has no
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
    """(x, level) -> (B, d) image features of the decoded latent by a CLIP_VISION, or (B, 1) ratings by a head on it.
    The level is not used: the noise can be seen in the image."""

    def __init__(
        self, vae, vision_encoder: DifferentiableClipVision, format_name: str, head: AestheticHead | None = None
    ):
        check_decoding_vae(vae)
        self.vae, self.vision_encoder, self.head = vae, vision_encoder, head
        self.patcher, self.format = static_patcher(vae.patcher), latent_format_by_name(format_name)
        self.output_affine = vae_output_affine(vae)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        with_gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and x.requires_grad
        with (
            loaded_patchers([self.patcher, self.vision_encoder.patcher], with_gradients),
            contextlib.nullcontext() if with_gradients else torch.no_grad(),
        ):
            encoded = self.vision_encoder(self.decode_pixels(x))
            if self.head is not None:
                return self.head.to(encoded.device)(encoded)[:, None].to(x.device)
            return (encoded.mean(1) if encoded.ndim == 3 else encoded).to(x.device)  # SigLIP gives tokens

    def gradient_memory(self, shape) -> float:
        """Bytes that a call with gradients on latents (B, C, ..., h, w) needs beside the model in training."""
        models = self.patcher.model_size() + self.vision_encoder.patcher.model_size()
        return models + DECODE_BACKWARD_MEMORY_FACTOR * self.vae.memory_used_decode(
            (shape[0], shape[1], *shape[-2:]), self.vae.vae_dtype
        )

    def decode_pixels(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) about 0 to 1, not clamped: the clamp of VAE.decode has no gradient where an image is white or
        black."""
        latent = self.format.process_out(x.to(self.patcher.load_device, torch.float32))
        if self.vae.latent_dim == 2:
            latent = squeeze_single_frame(latent)
        elif latent.ndim != 5:
            latent = latent.unsqueeze(2)
        pixels = self.vae.first_stage_model.decode(latent.to(self.vae.vae_dtype)).float()
        scale, shift = self.output_affine
        return squeeze_single_frame(pixels) * scale + shift


def check_decoding_vae(vae) -> None:
    """ValueError where no VAE is connected."""
    if vae is None:
        raise ValueError(
            f"The backbone '{DECODED_IMAGE}' decodes latents: connect the VAE that belongs to the model, or its TAESD."
        )


def latent_format_by_name(name: str):
    kind = getattr(comfy.latent_formats, name, None)
    if kind is None:
        raise ValueError(
            f"The backbone '{DECODED_IMAGE}' decodes latents of {name!r}, a kind that this ComfyUI does not know. "
            "Update ComfyUI."
        )
    return kind()


def vae_output_affine(vae) -> tuple[float, float]:
    """(scale, shift) from what the VAE decodes to 0..1, measured at two values that its clamp leaves alone."""
    low, high = vae.process_output(torch.tensor([0.25, 0.75])).tolist()
    scale = (high - low) / 0.5
    return scale, low - 0.25 * scale


# -- score models on these extractors ----------------------------------------------------------------------------------


def make_trunk_factory(model=None, vae=None, clip_vision=None) -> Callable[[ScoreModelInfo], torch.nn.Module]:
    """`trunk(info)` for every backbone, initialised from torch's global generator. It raises ValueError for what is not
    connected."""
    extractors: dict[str, tuple] = {}  # {backbone: (extractor, features)}, shared by all members of an ensemble

    def find_extractor(info: ScoreModelInfo):
        if info.backbone not in extractors:
            if info.backbone == MODEL_FEATURES:
                made = DiffusionFeatureExtractor(model)
                extractors[info.backbone] = made, made.feature_width()
            else:
                made = DecodedFeatureExtractor(vae, DifferentiableClipVision(clip_vision), info.latent_format)
                extractors[info.backbone] = made, made.vision_encoder.width
        return extractors[info.backbone]

    def trunk(info: ScoreModelInfo):
        if info.backbone in LATENT_BACKBONES:
            return LATENT_BACKBONES[info.backbone](info.channels, info.width, info.depth)
        extractor, features = find_extractor(info)
        if info.backbone != MODEL_FEATURES:
            return LoadedModelTrunk(extractor, features, info.width)
        if (channels := extractor.denoiser.model.latent_format.latent_channels) != info.channels:
            raise ValueError(
                f"This score model uses the features of a model with {info.channels} latent channels "
                f"({info.latent_format}), and the connected MODEL has {channels} "
                f"({latents.latent_format_name(extractor.patcher)})."
            )
        if not info.rank:
            return LoadedModelTrunk(extractor, features, info.width)
        adapters = make_feature_adapters(extractor, info.rank)
        return LoadedModelTrunk(functools.partial(extractor, adapters=adapters), features, info.width, adapters)

    return trunk


def make_feature_adapters(extractor: DiffusionFeatureExtractor, rank: int) -> Adapters:
    """A LoRA on the attention layers that affect the features; on others it would be dead weight in the file. Its
    learning rate is lower than that of the layers after it."""
    rng = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
    adapters = Adapters(extractor.network, AdapterSettings(rank=rank, targets="attention"), rng)
    adapters = adapters.keep_layers(extractor.active_layers())
    for p in adapters.parameters():
        p.rate = LORA_LR_FACTOR
    return adapters


class ImageScoreModel(ScorerEnsemble):
    """An aesthetic head on a CLIP_VISION as a score model: rates images, and with a VAE to decode them also latents."""

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
                f"{self.name} scores images, but got latents. Connect model and vae to Load Aesthetic Head, so that "
                "it can decode them."
            )
        return super().member_scores(x, level)

    @torch.no_grad()
    def rate(self, images, report=None, check_interrupt=host.progress.raise_if_interrupted) -> list[float]:
        """One rating for each PIL image, on the head's own scale, from its centre square."""
        ratings: list[float] = []
        with loaded_patchers([self.vision_encoder.patcher], False):
            for image in images:
                check_interrupt()
                encoded = self.vision_encoder(image_to_batch_tensor(image.convert("RGB")).movedim(-1, 1))
                ratings += self.head.to(encoded.device)(encoded).tolist()
                if report:
                    report(len(ratings))
        if not np.isfinite(ratings).all():
            raise ValueError(
                f"{self.name} gives NaN ratings. Load the CLIP vision again, or start ComfyUI with --fp32-text-enc."
            )
        return ratings

    def rate_images(
        self, dataset, report=None, check_interrupt=host.progress.raise_if_interrupted
    ) -> tuple[list[float], list[float]]:
        """(ratings, spreads) of a dataset's images, one opened at a time. A single head has no spread."""
        progress = report and (lambda done: report(done, len(dataset), "rated"))
        return self.rate((open_image(record) for record in dataset), progress, check_interrupt), [0.0] * len(dataset)


class DecodedScorer(torch.nn.Module):
    """The network of an ImageScoreModel: (x, level) -> (B, 1), in points above the middle of the head's scale. It has
    no weights of its own."""

    def __init__(self, extract: DecodedFeatureExtractor, name: str):
        super().__init__()
        self.extract, self.name = extract, name

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.extract(x, level) - AESTHETIC_SCALE_MIDDLE

    def state_dict(self, *args, **kwargs):
        raise ValueError(
            f"{self.name} has its own file and is not saved again: load it with Load Aesthetic Head wherever you "
            "need it."
        )


def check_siglip_pooler(head: AestheticHead, clip_vision) -> None:
    """ValueError for a SigLIP without a pooler, and for a pooler on an encoder that pools by itself."""
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
