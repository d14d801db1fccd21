"""Every choice that changes a result: its default, range, unit and hint, written once.

Widgets, validation, the fingerprint of a run and the metadata of a file all come from these records.
What does not change the result (paths, progress, devices) is an argument, never a setting.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# -- fields ------------------------------------------------------------------------------------------------------------
# `later` marks a field that came after a release: prompts saved before still run, and at its default it is no part of
# the fingerprint, so that runs made before it are found again.


def number_field(default, lo, hi, hint, *, unit="", step=None, advanced=False, later=False):
    """A number in [lo, hi]; an int default makes it a whole number."""
    return field(
        default=default, metadata=dict(lo=lo, hi=hi, hint=hint, unit=unit, step=step, advanced=advanced, later=later)
    )


def choice_field(default, options, hint, *, advanced=False, later=False):
    return field(default=default, metadata=dict(options=tuple(options), hint=hint, advanced=advanced, later=later))


def switch_field(default, hint, *, advanced=False, later=False):
    return field(default=default, metadata=dict(switch=True, hint=hint, advanced=advanced, later=later))


def text_field(default, hint, *, advanced=False, later=False, multiline=False):
    return field(
        default=default, metadata=dict(text=True, hint=hint, advanced=advanced, later=later, multiline=multiline)
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A frozen record, checked once on construction. Raises ValueError naming the field, its value and the remedy."""

    def __post_init__(self):
        for f in fields(self):
            value = check_field_value(f.name, getattr(self, f.name), f.default, f.metadata)
            object.__setattr__(self, f.name, value)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """The record these values describe; keys that this record does not know are an error."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(unknown)}; it knows {', '.join(sorted(known))}."
            )
        return cls(**values)


def check_field_value(name, value, default, meta):
    """The value in its field's type, or ValueError. Links between nodes bypass widget limits, and NaN passes min and
    max."""
    if "options" in meta:
        if value not in meta["options"]:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, meta['options']))}.")
        return value
    if meta.get("switch"):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be true or false.")
        return value
    if meta.get("text"):
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}; it must be text.")
        return value
    if "lo" in meta:
        return check_number_value(name, value, type(default), meta)
    return value


def check_number_value(name, value, kind, meta):
    unit = f" {meta['unit']}" if meta.get("unit") else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}; it must be a number.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a finite number between {meta['lo']} and {meta['hi']}{unit}.")
    if not meta["lo"] <= value <= meta["hi"]:
        raise ValueError(f"{name} is {value}; it must lie between {meta['lo']} and {meta['hi']}{unit}.")
    if kind is int and value != int(value):
        raise ValueError(f"{name} is {value}; it must be a whole number{unit and ' of' + unit}.")
    return kind(value)


def compute_fingerprint(*parts) -> str:
    """32 hex digits that change when any part does. Parts are settings records or JSON-able values."""
    plain = [{type(p).__name__: fingerprint_values(p)} if isinstance(p, Settings) else p for p in parts]
    canonical = json.dumps(plain, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def fingerprint_values(settings: Settings) -> dict[str, Any]:
    """The values that make a run what it is: later fields count once they are changed."""
    named = {f.name: f for f in fields(settings)}
    return {
        k: v for k, v in settings.to_dict().items() if not (named[k].metadata.get("later") and v == named[k].default)
    }


# -- the records of a LoRA run -----------------------------------------------------------------------------------------

ADAPTER_TARGETS = ("attention", "attention+mlp", "all linear", "regex")
ADAPTER_ALGORITHMS = LORA, DORA, LOHA, LOKR = ("LoRA", "DoRA", "LoHa", "LoKr")
COMFYUI, WEBUI, LYCORIS, DIFFUSERS = EXPORT_TARGETS = ("ComfyUI", "A1111, Forge, kohya", "LyCORIS", "diffusers")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Settings):
    """What is trained on top of the frozen model."""

    rank: int = number_field(
        16, 1, 4096, "Rank of the adapter. A larger rank has more capacity and makes a larger file."
    )
    alpha: float = number_field(
        0.0,
        0.0,
        4096.0,
        "Scales the adapter's output by alpha / rank. 0 means alpha = rank, a scale of 1.",
        step=0.5,
    )
    rslora: bool = switch_field(
        False,
        "Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA). Keeps large ranks learning.",
        advanced=True,
    )
    targets: str = choice_field("attention+mlp", ADAPTER_TARGETS, "Which layers of the model get an adapter.")
    pattern: str = text_field(
        "",
        "With targets = regex: trains the layers whose name matches this regular expression, for example attn2|ff.",
        advanced=True,
    )
    conv: bool = switch_field(False, "Also train the 3x3 convolutions of a UNet (LoCon). Transformers have none.")
    conv_rank: int = number_field(8, 1, 4096, "Rank of the convolution adapters.", advanced=True)
    conv_alpha: float = number_field(
        0.0, 0.0, 4096.0, "Alpha of the convolution adapters. 0 means alpha = conv_rank.", step=0.5, advanced=True
    )
    text_encoder: bool = switch_field(
        False,
        "Also train the text encoder. Connect CLIP to the Train node; usually off for SDXL and newer models.",
    )
    algorithm: str = choice_field(
        LORA,
        ADAPTER_ALGORITHMS,
        "LoRA: a product of two low-rank matrices. DoRA: the same, plus a trained magnitude for each output row. "
        "LoHa: the elementwise product of two LoRAs. LoKr: a Kronecker product, the smallest file.",
        later=True,
    )
    factor: int = number_field(
        8,
        0,
        4096,
        "LoKr: largest number of rows and columns of the small matrix. A larger value makes a smaller file; 0 "
        "makes it as close to square as possible.",
        advanced=True,
        later=True,
    )
    dropout: float = number_field(
        0.0,
        0.0,
        0.95,
        "LoRA and DoRA: share of the adapter's inner activations dropped at each step, against overfitting.",
        step=0.05,
        advanced=True,
        later=True,
    )
    module_dropout: float = number_field(
        0.0,
        0.0,
        0.95,
        "Share of the layers whose adapter is dropped at each step.",
        step=0.05,
        advanced=True,
        later=True,
    )
    up_rate: float = number_field(
        1.0,
        0.01,
        1000.0,
        "LoRA+: learning rate multiplier of the matrix that is initialised to zero. The paper uses 16.",
        step=1.0,
        advanced=True,
        later=True,
    )
    blocks: str = text_field(
        "",
        "Rank, alpha and learning rate by layer name, one rule per line: attn2: rank=8 alpha=4 lr=0.5. rank=0 leaves "
        "layers out.",
        advanced=True,
        later=True,
        multiline=True,
    )
    rank_dropout: float = number_field(
        0.0,
        0.0,
        0.95,
        "LoRA and DoRA: share of the ranks dropped for each image at each step, so that no rank depends on another.",
        step=0.05,
        advanced=True,
        later=True,
    )

    def __post_init__(self):
        super().__post_init__()
        parse_block_rules(self.blocks)
        for name in ("dropout", "rank_dropout"):
            if (share := getattr(self, name)) and self.algorithm in (LOHA, LOKR):
                raise ValueError(
                    f"{name} is {share:g} and algorithm is {self.algorithm}, which has no inner values to leave out. "
                    f"Use module_dropout, or set {name} to 0."
                )
        if (self.targets == "regex") != bool(self.pattern):
            remedy = (
                "write one, for example attn2|ff" if self.targets == "regex" else "clear it, or set targets to regex"
            )
            raise ValueError(f"targets is {self.targets!r} and pattern is {self.pattern!r}; {remedy}.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern is {self.pattern!r}, which is not a regular expression: {error}.") from None


@dataclass(frozen=True)
class BlockRule:
    """One line of `blocks`. rank and alpha None: as on the rest; lr is a share of the run's learning rate."""

    line: str
    pattern: re.Pattern
    rank: int | None = None
    alpha: float | None = None
    lr: float = 1.0


BLOCK_RULE_RANGES = {"rank": (int, 0, 4096), "alpha": (float, 0.0, 4096.0), "lr": (float, 1e-6, 1000.0)}


def parse_block_rules(text: str) -> tuple[BlockRule, ...]:
    """The rules of a text such as `attn2: rank=8 alpha=4 lr=0.5`, one per line; empty lines and # remarks are skipped.
    Raises ValueError that names the line."""
    lines = [(number, line.split("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    return tuple(parse_block_rule(f"blocks, line {number}: {line!r}", line) for number, line in lines if line)


def parse_block_rule(where: str, line: str) -> BlockRule:
    pattern, colon, values = line.rpartition(":")
    if not colon or not pattern.strip() or not values.split():
        raise ValueError(
            f"{where} is not a rule. Write a pattern, a colon and values, for example attn2: rank=8 alpha=4 lr=0.5"
        )
    try:
        compiled = re.compile(pattern.strip())
    except re.error as error:
        raise ValueError(f"{where}: {pattern.strip()!r} is not a regular expression ({error}).") from None
    return BlockRule(where, compiled, **dict(parse_rule_value(where, word) for word in values.split()))


def parse_rule_value(where: str, word: str) -> tuple[str, Any]:
    """(name, number): whole for rank, otherwise a float."""
    name, _, value = word.partition("=")
    if name not in BLOCK_RULE_RANGES:
        raise ValueError(f"{where}: {word!r} is none of rank=, alpha= and lr=.")
    kind, low, high = BLOCK_RULE_RANGES[name]
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ValueError(
            f"{where}: {name} is {value!r}; it must be a {'whole ' if kind is int else ''}number from {low:g} to "
            f"{high:g}."
        )
    return name, number


OPTIMIZERS = ("AdamW", "AdamW8bit", "Prodigy", "ScheduleFreeAdamW", "Lion", "CAME", "Adafactor", "RAdam", "Adan", "SGD")
LR_SCHEDULES = ("constant", "linear", "cosine", "cosine with restarts", "polynomial")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """How a gradient becomes a change."""

    optimizer: str = choice_field(
        "AdamW", OPTIMIZERS, "AdamW needs no extra package. Prodigy finds its own learning rate (set it to 1)."
    )
    schedule: str = choice_field("constant", LR_SCHEDULES, "Learning rate schedule after the warmup.")
    warmup: int = number_field(
        0, 0, 1_000_000, "The learning rate rises from 0 over these steps.", unit="optimizer steps"
    )
    restarts: int = number_field(1, 1, 1000, "Number of cycles of the schedule 'cosine with restarts'.", advanced=True)
    weight_decay: float = number_field(
        0.01, 0.0, 10.0, "Pulls the adapter's weights toward zero.", step=0.001, advanced=True
    )
    beta1: float = number_field(
        0.9, 0.0, 0.9999, "Decay of the gradient's running mean. Adan keeps its own three.", step=0.001, advanced=True
    )
    beta2: float = number_field(
        0.999,
        0.0,
        0.99999,
        "Decay of the running mean of the squared gradient. Adan keeps its own three.",
        step=0.0001,
        advanced=True,
    )
    clip: float = number_field(
        1.0,
        0.0,
        1000.0,
        "Maximum gradient norm; larger gradients are scaled down to it. 0 turns clipping off.",
        step=0.1,
    )
    accumulate: int = number_field(
        1,
        1,
        1024,
        "Batches per optimizer step (gradient accumulation): the effect of a larger batch without its memory.",
    )
    text_encoder_lr: float = number_field(
        0.0, 0.0, 10.0, "Learning rate of the text encoder's adapters. 0 means a tenth of the learning rate.", step=1e-6
    )
    ema: float = number_field(
        0.0,
        0.0,
        0.99999,
        "Outputs a moving average of the adapter over the steps, which smooths the result. 0.99 to 0.999 is "
        "usual; 0 is off.",
        step=0.001,
        advanced=True,
        later=True,
    )
    ema_on_cpu: bool = switch_field(
        False,
        "Keep the average in main memory. It uses no GPU memory, and each step waits for a copy.",
        advanced=True,
        later=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ema and self.optimizer == "ScheduleFreeAdamW":
            raise ValueError(
                f"ema is {self.ema:g} and the optimizer is ScheduleFreeAdamW, which delivers an average by itself. Set "
                "ema to 0, or choose another optimizer."
            )


NOISE_DENSITIES = ("model default", "uniform", "logit-normal", "host schedule")
LOSS_WEIGHTINGS = ("none", "min-SNR", "soft-min-SNR", "debiased", "P2")
DISTILLED_MODES = FAMILY_DEFAULT, PLAIN_TARGET, CONTRASTIVE, DRIFT, CONTRASTIVE_DRIFT = (
    "model default",
    "plain",
    "contrastive",
    "drift",
    "contrastive and drift",
)
LOSS_TYPES = MSE, HUBER, SCHEDULED_HUBER = ("MSE", "Huber", "scheduled Huber")


@dataclass(frozen=True, kw_only=True)
class NoiseSettings(Settings):
    """Where on the way from image to noise a step trains, and how its error counts."""

    density: str = choice_field(
        "model default",
        NOISE_DENSITIES,
        "How noise levels are drawn. 'model default' is the recipe of the loaded family.",
    )
    mean: float = number_field(
        0.0, -10.0, 10.0, "Centre of logit-normal; above 0 trains more on high noise.", step=0.05, advanced=True
    )
    std: float = number_field(1.0, 0.01, 10.0, "Width of logit-normal.", step=0.05, advanced=True)
    shift: float = number_field(
        0.0,
        0.0,
        100.0,
        "Flow models: shifts noise levels up by s*t / (1 + (s-1)*t). 0 uses the family's default.",
        step=0.05,
        advanced=True,
    )
    min_time: float = number_field(
        0.0, 0.0, 1.0, "Lowest noise level to train: 0 is the clean image.", step=0.01, advanced=True
    )
    max_time: float = number_field(
        1.0, 0.0, 1.0, "Highest noise level to train: 1 is pure noise.", step=0.01, advanced=True
    )
    weighting: str = choice_field(
        "none",
        LOSS_WEIGHTINGS,
        "How much each noise level counts. min-SNR limits the weight of nearly clean images; for eps and v-prediction "
        "models.",
    )
    gamma: float = number_field(
        5.0, 0.01, 1000.0, "The limit of min-SNR and soft-min-SNR; the paper uses 5.", step=0.5, advanced=True
    )
    p2_gamma: float = number_field(
        1.0,
        0.0,
        10.0,
        "P2: exponent of (1 + SNR), which divides the weight; the paper uses 0.5 and 1.",
        step=0.25,
        advanced=True,
        later=True,
    )
    loss: str = choice_field(
        MSE,
        LOSS_TYPES,
        "MSE: squared error. Huber: large errors count less, so outliers in the dataset do less harm. scheduled "
        "Huber: close to MSE where noise is low, Huber where it is high.",
        advanced=True,
        later=True,
    )
    huber_c: float = number_field(
        0.1,
        0.0001,
        10.0,
        "Huber: errors well above this count linearly instead of squared.",
        step=0.05,
        advanced=True,
        later=True,
    )
    noise_offset: float = number_field(
        0.0,
        0.0,
        1.0,
        "Adds one random value to each channel of the noise, so that very dark and very bright images can be "
        "learnt. 0.05 is usual.",
        step=0.01,
        advanced=True,
        later=True,
    )
    pyramid_levels: int = number_field(
        0,
        0,
        10,
        "Multi-resolution noise: number of coarser layers added, each at most half the resolution of the last. 6 "
        "is usual; 0 is off.",
        advanced=True,
        later=True,
    )
    pyramid_discount: float = number_field(
        0.3,
        0.01,
        1.0,
        "Multi-resolution noise: weight of each coarser layer relative to the previous one.",
        step=0.05,
        advanced=True,
        later=True,
    )
    perturbation: float = number_field(
        0.0,
        0.0,
        1.0,
        "Input perturbation: the model's input has this much more noise than its timestep says. 0.1 is usual.",
        step=0.05,
        advanced=True,
        later=True,
    )
    distilled: str = choice_field(
        FAMILY_DEFAULT,
        DISTILLED_MODES,
        "Train LoRA on a few-step model (Turbo, schnell, Lightning, distilled Klein) without making it need more "
        "steps. contrastive: the target is pushed away from the empty caption, as guidance would. drift: at its own "
        "few steps the model is held to what it predicts without the LoRA. 'model default' trains plainly.",
        later=True,
    )
    contrast: float = number_field(
        2.5,
        1.0,
        30.0,
        "contrastive: the guidance scale that is built into the model. 1 is the plain target.",
        step=0.25,
        advanced=True,
        later=True,
    )
    drift_weight: float = number_field(
        1.0,
        0.0,
        1000.0,
        "drift: weight of its loss relative to the training loss.",
        step=0.25,
        advanced=True,
        later=True,
    )
    few_steps: int = number_field(
        0,
        0,
        100,
        "drift: sampling steps that the model is distilled to. 0 means the family's own, or 4.",
        unit="steps",
        advanced=True,
        later=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.min_time >= self.max_time:
            raise ValueError(
                f"min_time is {self.min_time} and max_time is {self.max_time}; min_time must be the smaller one."
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """How long and from which seed."""

    steps: int = number_field(1000, 1, 10_000_000, "Optimizer steps of the whole run.", unit="optimizer steps")
    learning_rate: float = number_field(
        1e-4, 1e-9, 10.0, "Learning rate. 1e-4 suits AdamW; Prodigy wants 1.", step=1e-6
    )
    batch: int = number_field(
        1,
        0,
        1024,
        "Images per step. 0: as many as memory allows, at most 8, determined when the run begins.",
        unit="images",
    )
    seed: int = number_field(
        0,
        0,
        2**63 - 1,
        "The same seed, data and settings give the same file: bit for bit on the CPU, nearly so on a GPU.",
    )
    save_every: int = number_field(
        250,
        0,
        1_000_000,
        "Save a LoRA and the resume state every this many steps. 0 saves only at the end.",
        unit="optimizer steps",
    )


# -- the records of differences ----------------------------------------------------------------------------------------

POINT_SOURCES = ("rollout", "pictures", "noise")


@dataclass(frozen=True, kw_only=True)
class PointSettings(Settings):
    """Where a difference between prompts is learnt."""

    points: str = choice_field(
        "rollout",
        POINT_SOURCES,
        "rollout: latents that the model passes while it samples the prompts. pictures: noised images of a "
        "dataset, cheaper. noise: pure noise, cheapest, for high noise levels only.",
    )
    sampling_steps: int = number_field(
        8, 2, 1000, "rollout: sampling steps of one trajectory from noise to image. Every latent on it is trained on."
    )
    guidance_scale: float = number_field(
        0.0,
        0.0,
        30.0,
        "rollout: classifier-free guidance (CFG) during sampling; 1 halves the cost. 0 means 3, or 1 for "
        "guidance-distilled models such as Flux.",
        step=0.5,
    )
    ways: int = number_field(
        8, 1, 4096, "rollout: number of trajectories kept and trained on at the same time.", advanced=True
    )
    refresh: int = number_field(
        6,
        1,
        1_000_000,
        "rollout: after this many updates, the current model resamples the oldest trajectory.",
        unit="optimizer steps",
        advanced=True,
    )
    renormalise: bool = switch_field(
        False,
        "Scale each target to the magnitude of the model's own prediction, so that high guidance does not "
        "oversaturate.",
        advanced=True,
    )


TRAJECTORIES = SOURCE_TRAJECTORY, TARGET_TRAJECTORY = ("source with LoRA", "target")


@dataclass(frozen=True, kw_only=True)
class TransferSettings(Settings):
    """Where the change that a LoRA makes is measured, and how."""

    trajectory: str = choice_field(
        SOURCE_TRAJECTORY,
        TRAJECTORIES,
        "Which model samples the latents that are learnt at. The source with its LoRA shows what the LoRA draws; the "
        "target shows where it samples.",
        advanced=True,
    )
    trajectories: int = number_field(
        32, 1, 100_000, "Number of trajectories sampled before the training, dealt to the prompts in turn."
    )
    few_steps: int = number_field(
        0,
        0,
        100,
        "Sampling steps that the target is distilled to (4 or 8 for most Turbo, Lightning and schnell models): it is "
        "trained at exactly these noise levels. 0: an ordinary model, trained at all levels.",
        unit="steps",
    )
    sampling_steps: int = number_field(
        8, 2, 1000, "Sampling steps of a trajectory for an ordinary target; every step is learnt at.", advanced=True
    )
    resolution: int = number_field(
        512, 16, 8192, "The size of the latents that are learnt at.", unit="px", step=8, advanced=True
    )
    source_guidance: float = number_field(
        1.0,
        1.0,
        30.0,
        "Classifier-free guidance under which the change in the source is measured. 1 is the change itself; for a "
        "target whose guidance is built in, the guidance that the source is used with.",
        step=0.25,
    )


INPAINT_NONE, MASK_BOXES, MASK_STROKES, MASK_OF_DATASET = "none", "boxes", "strokes", "from the dataset"
BOXES_AND_STROKES, MIXED_MASKS = "boxes and strokes", "boxes, strokes and dataset"
LOSS_OF_INPAINT = "inpaint masks"


@dataclass(frozen=True, kw_only=True)
class InpaintSettings(Settings):
    """Which part of an image an inpainting model does not see and learns to fill, and where its loss counts."""

    inpaint_masks: str = choice_field(
        INPAINT_NONE,
        (INPAINT_NONE, MASK_BOXES, MASK_STROKES, BOXES_AND_STROKES, MASK_OF_DATASET, MIXED_MASKS),
        "For inpainting models (Flux Fill, SD and SDXL inpainting): the holes that it learns to fill. from the "
        "dataset: the white part of each image's mask.",
        advanced=True,
        later=True,
    )
    masks_per_image: int = number_field(
        4,
        1,
        64,
        "How many boxes or strokes are drawn for each image; a step takes one of them. Each is one more run of the "
        "VAE.",
        unit="masks",
        advanced=True,
        later=True,
    )
    full_masks: float = number_field(
        0.25,
        0.0,
        1.0,
        "Share of steps in which the whole image is the hole. Stable Diffusion's inpainting was trained with 0.25.",
        step=0.05,
        advanced=True,
        later=True,
    )
    loss_masks: str = choice_field(
        MASK_OF_DATASET,
        (MASK_OF_DATASET, LOSS_OF_INPAINT, INPAINT_NONE),
        "Where the loss counts. from the dataset: in the white part of each image's mask, everywhere without one. "
        "inpaint masks: in the hole. none: everywhere.",
        advanced=True,
        later=True,
    )

    def mask_kinds(self) -> tuple[str, ...]:
        """The kinds of masks that the holes are made of."""
        several = {
            INPAINT_NONE: (),
            BOXES_AND_STROKES: (MASK_BOXES, MASK_STROKES),
            MIXED_MASKS: (MASK_BOXES, MASK_STROKES, MASK_OF_DATASET),
        }
        return several.get(self.inpaint_masks, (self.inpaint_masks,))
