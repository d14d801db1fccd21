"""Image embeddings as conditioning in place of captions, for the models that take them: SDXL, unCLIP, Stable Cascade
and Flux with Redux."""

from __future__ import annotations

import dataclasses

import comfy.model_base
import torch
from comfy_api.latest import io

from ...trainers.data.encoded import EncodedDataset
from ...trainers.data.feature_noise import LafiteSettings, perturb_embedding
from ...trainers.data.images import image_to_batch_tensor
from ...trainers.data.records import open_image
from ...trainers.rng import make_generator
from ...trainers.settings import compute_fingerprint
from .. import host
from ..fields import CATEGORY, DatasetType, EncodedType, settings_from_widgets, settings_inputs

IMAGE_PROMPT_FAMILIES = (
    "SDXL (with CLIP-ViT-bigG), SD 2.1 unCLIP, Stable Cascade stage C, and Flux.1 (with a Redux style model)"
)
EMPTY_CAPTION_KEY = "image/empty"


# -- slots: where an embedding goes into a conditioning ----------------------------------------------------------------
# fingerprint_name is part of the fingerprint of encoded sets, and never changes.


class ClipVisionOutput:
    """The attributes of a CLIP_VISION_OUTPUT that ComfyUI's models read."""

    def __init__(self, **values):
        self.__dict__.update(values)


class SdxlPooledSlot:
    """SDXL: in place of the pooled text embedding of CLIP-G."""

    fingerprint_name = "Pooled"

    embedding_field, encoder_name = "image_embeds", "CLIP-ViT-bigG-14"

    def __init__(self, model):
        self.width = 1280

    def __call__(self, cond: dict, embedding) -> dict:
        return {**cond, "pooled_output": embedding}


class UnclipSlot:
    """SD 2.1 unCLIP: its own input for image embeddings, without further noise."""

    fingerprint_name = "Unclip"

    embedding_field, encoder_name = "image_embeds", "the CLIP vision model of its checkpoint"

    def __init__(self, model):
        self.width = model.noise_augmentor.time_embed.dim

    def __call__(self, cond: dict, embedding) -> dict:
        return {
            **cond,
            "unclip_conditioning": [
                {
                    "clip_vision_output": ClipVisionOutput(image_embeds=embedding),
                    "strength": 1.0,
                    "noise_augmentation": 0.0,
                }
            ],
        }


class CascadeSlot(UnclipSlot):
    """Stable Cascade stage C: its input clip_img, which ComfyUI fills from the same list."""

    fingerprint_name = "Cascade"

    encoder_name = "CLIP-ViT-L-14"

    def __init__(self, model):
        self.width = 768


class ReduxSlot:
    """Flux: tokens of the Redux style model after those of the text."""

    fingerprint_name = "Redux"

    embedding_field, encoder_name = "last_hidden_state", "SigLIP so400m patch 14"

    def __init__(self, model, style_model):
        if style_model is None:
            raise ValueError(
                "Flux takes images through a Redux style model, and none is connected. Load one with Load Style Model."
            )
        self.style, self.width = style_model, style_model.model.redux_dim

    def __call__(self, cond: dict, embedding) -> dict:
        with torch.no_grad():
            tokens = host.context.clone_inference_tensors(
                self.style.get_cond(ClipVisionOutput(last_hidden_state=embedding))
            )
        return {**cond, "cross_attn": torch.cat([cond["cross_attn"], tokens.to(cond["cross_attn"])], 1)}


def find_embedding_slot(model, style_model=None):
    """The slot `(cond, embedding) -> cond` of this MODEL. ValueError, naming the families that have one, for others."""
    network = model.model
    if type(network) is comfy.model_base.Flux:  # its descendants were never trained with Redux
        return ReduxSlot(network, style_model)
    if style_model is not None:
        raise ValueError(
            "A style model is connected, and only Flux.1 reads one: this MODEL is "
            f"{type(model.model.model_config).__name__}. Disconnect it."
        )
    for kind, slot in (
        (comfy.model_base.SDXL, SdxlPooledSlot),
        (comfy.model_base.SD21UNCLIP, UnclipSlot),
        (comfy.model_base.StableCascade_C, CascadeSlot),
    ):
        if isinstance(network, kind):
            return slot(network)
    raise ValueError(
        f"This MODEL ({type(model.model.model_config).__name__}) has no place for an image embedding: its text "
        f"tokens are not CLIP embeddings of a whole text. Models that have: {IMAGE_PROMPT_FAMILIES}. For others "
        "choose the caption mode 'empty (unconditional)' in Encode Dataset."
    )


def encode_image_embedding(clip_vision, pixels, slot) -> torch.Tensor:
    """(1, D) or tokens (1, T, D) of one image (1, H, W, 3), not an inference tensor. ValueError for a CLIP_VISION that
    does not fit the slot."""
    with torch.no_grad():
        embedding = clip_vision.encode_image(pixels)[slot.embedding_field].float().cpu()
    if embedding.shape[-1] != slot.width or embedding.ndim != (3 if slot.embedding_field == "last_hidden_state" else 2):
        raise ValueError(
            f"This clip_vision gives {embedding.shape[-1]} numbers per image, and the MODEL expects {slot.width}: "
            f"load {slot.encoder_name}."
        )
    return host.context.clone_inference_tensors(embedding)


def encode_empty_prompt(clip) -> dict:
    """The conditioning of the empty text."""
    encoder = host.encoders.TextEncoder(clip)
    try:
        return host.context.clone_inference_tensors(encoder.encode([""])[0])
    finally:
        encoder.unload()


# -- the nodes ---------------------------------------------------------------------------------------------------------


IMAGE_PROMPT_INPUTS = [
    io.Model.Input("model", tooltip=f"Determines where the embedding goes. Supported: {IMAGE_PROMPT_FAMILIES}."),
    io.Clip.Input("clip", tooltip="The text encoder of the model; it encodes only the empty text."),
    io.ClipVision.Input("clip_vision", tooltip="The image encoder that the model's family was made with."),
]
STYLE_MODEL_INPUT = io.StyleModel.Input("style_model", optional=True, tooltip="For Flux.1: the Redux style model.")


class ImageConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardImageConditioning",
            display_name="Image Conditioning",
            category=CATEGORY,
            description="Converts an image's CLIP embedding to CONDITIONING, for models trained with Captions "
            "from Images and for variations of an image.",
            search_aliases=["revision", "unclip", "redux", "lafite", "picture prompt"],
            inputs=[
                *IMAGE_PROMPT_INPUTS,
                io.Image.Input("images", tooltip="One image, or several whose embeddings are averaged."),
                *settings_inputs(LafiteSettings, only=("alpha", "seed")),
                STYLE_MODEL_INPUT,
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="For positive of a sampler."
                )
            ],
        )

    @classmethod
    def execute(cls, model, clip, clip_vision, images, style_model=None, **widgets):
        settings, slot = settings_from_widgets(LafiteSettings, widgets), find_embedding_slot(model, style_model)
        with host.context.enable_gradients():
            embeddings = [encode_image_embedding(clip_vision, image[None], slot) for image in images]
            rng = make_generator(settings.seed)
            embedding = perturb_embedding(torch.stack(embeddings).mean(0), settings.alpha, rng)
            cond = slot(encode_empty_prompt(clip), embedding)
        return io.NodeOutput([[cond["cross_attn"], {key: value for key, value in cond.items() if key != "cross_attn"}]])


class CaptionsFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCaptionsFromImages",
            display_name="Captions from Images",
            category=CATEGORY,
            description="Replaces captions with each image's own CLIP embedding plus noise: trains without "
            "captions, and the LoRA still follows text prompts.",
            search_aliases=["lafite", "language free training", "no captions", "clip image embedding"],
            inputs=[
                *IMAGE_PROMPT_INPUTS,
                DatasetType.Input("dataset", tooltip="The images that were encoded."),
                EncodedType.Input("encoded", tooltip="From Encode Dataset. Its captions are replaced."),
                *settings_inputs(LafiteSettings),
                STYLE_MODEL_INPUT,
            ],
            outputs=[
                EncodedType.Output(
                    "encoded",
                    display_name="encoded",
                    tooltip="The same latents, conditioned on their image embeddings, for Train LoRA.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, clip, clip_vision, dataset, encoded, style_model=None, **widgets):
        settings, slot = settings_from_widgets(LafiteSettings, widgets), find_embedding_slot(model, style_model)
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        with host.context.enable_gradients():
            captioned = caption_with_image_embeddings(encoded, dataset, clip, clip_vision, slot, settings, report)
        return io.NodeOutput(captioned)


def caption_with_image_embeddings(
    encoded: EncodedDataset, dataset, clip, clip_vision, slot, settings: LafiteSettings, report
) -> EncodedDataset:
    """The encoded dataset with the embedding of each image in place of its captions. ValueError where an encoded image
    is not in the dataset."""
    records = {record.id: record for record in dataset.records}
    if missing := [item.path or item.id for item in encoded.items if item.id not in records]:
        raise ValueError(
            f"{len(missing)} encoded images are not in the dataset, for example {missing[0]}. Connect the dataset "
            "that was encoded."
        )
    embeddings = []
    for done, item in enumerate(encoded.items):
        host.progress.raise_if_interrupted()
        report(done, len(encoded), "pictures seen")
        pixels = image_to_batch_tensor(open_image(records[item.id]).convert("RGB"))
        embeddings.append(encode_image_embedding(clip_vision, pixels, slot))
    variants = range(settings.variants)
    items = [
        dataclasses.replace(
            item,
            caption_keys=tuple(f"image/{number}/{variant}" for variant in variants),
            captions=("",) * len(variants),
        )
        for number, item in enumerate(encoded.items)
    ]
    fingerprint = compute_fingerprint(
        "captions from images 1",
        encoded.fingerprint,
        settings,
        host.identity.hash_patched_weights(clip_vision.patcher),
        slot.fingerprint_name,
        host.identity.hash_patched_weights(clip.patcher, clip.layer_idx),
        style_model_checksums(slot),
    )
    store = ImageConditioningStore(
        embeddings, [item.id for item in encoded.items], slot, encode_empty_prompt(clip), settings, encoded.store
    )
    return dataclasses.replace(
        encoded, items=items, store=store, fingerprint=fingerprint, empty_key=EMPTY_CAPTION_KEY, dropout=settings.drop
    )


def style_model_checksums(slot) -> list:
    """A checksum for each weight of the slot's style model, for the fingerprint; [] without one."""
    style = getattr(slot, "style", None)
    return [] if style is None else [float(p.double().abs().sum()) for p in style.model.parameters()]


@dataclasses.dataclass
class ImageConditioningStore:
    """A store that makes conditionings when they are loaded, under keys image/<number>/<variant>, and takes all other
    keys from another store. Kept in memory, the tokens of Redux would take 12 MB each."""

    embeddings: list[torch.Tensor]
    ids: list[str]
    slot: object
    empty: dict
    settings: LafiteSettings
    fallback_store: object

    def load(self, key: str):
        if key == EMPTY_CAPTION_KEY:
            return self.empty
        if not key.startswith("image/"):
            return self.fallback_store.load(key)
        _, number, variant = key.split("/")
        # the noise depends on the image and not on its place in the dataset
        digest = compute_fingerprint(self.settings.seed, self.ids[int(number)], int(variant))
        rng = make_generator(int(digest[:15], 16))
        return self.slot(self.empty, perturb_embedding(self.embeddings[int(number)], self.settings.alpha, rng))


NODES = [ImageConditioning, CaptionsFromImages]
