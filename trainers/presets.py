"""Where to begin: settings for a model family and a purpose, taken from recipes that others publish. Every value can be
changed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from .families import MODEL_FAMILIES
from .settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings, check_field_value

PURPOSE_CHARACTER, PURPOSE_STYLE, PURPOSE_CONCEPT = PRESET_PURPOSES = ("character", "style", "concept")


@dataclass(frozen=True)
class FamilyDefaults:
    """What a family begins with, whatever is taught. Steps are for batch 1: so many per image, within (least, most)
    by purpose."""

    family_key: str  # of trainers/families.py; several presets may be of one family
    rank: int
    alpha: float
    learning_rate: float
    resolution: int
    source: str
    adapter: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    noise: dict = field(default_factory=dict)
    step_ranges: dict = field(
        default_factory=lambda: {
            PURPOSE_CHARACTER: (1000, 3000),
            PURPOSE_STYLE: (2000, 6000),
            PURPOSE_CONCEPT: (1000, 2500),
        }
    )


MIN_SNR_NOISE = {"weighting": "min-SNR", "gamma": 5.0}
AI_TOOLKIT_OPTIMIZER = {"ema": 0.99}
PRESET_FAMILIES = {
    "SD 1.5": FamilyDefaults(
        "sd15",
        16,
        8.0,
        1e-4,
        512,
        "kohya-ss sd-scripts, example of its LoRA guide for SD 1.x (dim 16, alpha 8, 1e-4, cosine with restarts, "
        "warmup 100); restarts 3 and min-SNR 5 from hollowstrawberry's kohya-colab",
        optimizer={"schedule": "cosine with restarts", "restarts": 3, "warmup": 100},
        noise=MIN_SNR_NOISE,
    ),
    "SDXL": FamilyDefaults(
        "sdxl",
        32,
        16.0,
        1e-4,
        1024,
        "kohya-ss sd-scripts, guide for SDXL (dim 32, alpha 16, 1e-4, the U-Net alone); min-SNR 5, Hang et al. 2023",
        optimizer={"schedule": "cosine", "warmup": 100},
        noise=MIN_SNR_NOISE,
    ),
    "Illustrious": FamilyDefaults(
        "sdxl",
        32,
        16.0,
        3e-4,
        1024,
        "civitai article 9148 (U-Net 3e-4, rank 32, alpha half of it), civitai model 850658 (cosine, debiased); steps "
        "by SeaArt's guide (1500 to 3000 for a character, 3000 to 6000 for a style)",
        optimizer={"schedule": "cosine", "warmup": 100},
        noise={"weighting": "debiased"},
        step_ranges={PURPOSE_CHARACTER: (1500, 3000), PURPOSE_STYLE: (3000, 6000), PURPOSE_CONCEPT: (1500, 3000)},
    ),
    "NoobAI v-pred": FamilyDefaults(
        "sdxl",
        32,
        16.0,
        3e-4,
        1024,
        "as Illustrious, with min-SNR in its form for v-prediction, min(SNR, 5) / (SNR + 1), as in kohya-ss "
        "sd-scripts; the schedule with zero terminal SNR comes from the model itself",
        optimizer={"schedule": "cosine", "warmup": 100},
        noise=MIN_SNR_NOISE,
        step_ranges={PURPOSE_CHARACTER: (1500, 3000), PURPOSE_STYLE: (3000, 6000), PURPOSE_CONCEPT: (1500, 3000)},
    ),
    "SD 3": FamilyDefaults(
        "sd3",
        16,
        16.0,
        4e-4,
        768,
        "ostris/ai-toolkit as Replicate's SD 3.5 trainer sets it (rank 16 = alpha, 4e-4, 512 and 768 px, EMA 0.99, "
        "caption dropout 0.05); noise levels by Esser et al. 2024",
        optimizer=AI_TOOLKIT_OPTIMIZER,
        step_ranges={PURPOSE_CHARACTER: (700, 2000), PURPOSE_STYLE: (1000, 3000), PURPOSE_CONCEPT: (700, 2000)},
    ),
    "Flux": FamilyDefaults(
        "flux",
        16,
        16.0,
        1e-4,
        768,
        "ostris/ai-toolkit, example for FLUX.1-dev (rank 16 = alpha, 1e-4, 2000 steps, 512 to 1024 px, EMA 0.99, "
        "caption dropout 0.05); guidance 1 and the shift by size as in kohya-ss sd-scripts",
        optimizer=AI_TOOLKIT_OPTIMIZER,
        step_ranges={PURPOSE_CHARACTER: (1000, 2000), PURPOSE_STYLE: (1500, 3000), PURPOSE_CONCEPT: (1000, 2000)},
    ),
    "Chroma": FamilyDefaults(
        "chroma",
        16,
        16.0,
        1e-4,
        768,
        "ostris/ai-toolkit (1e-4, caption dropout 0.05), kohya-ss sd-scripts (guidance 0, logit-normal noise levels)",
        optimizer=AI_TOOLKIT_OPTIMIZER,
        step_ranges={PURPOSE_CHARACTER: (1000, 2500), PURPOSE_STYLE: (1500, 3500), PURPOSE_CONCEPT: (1000, 2500)},
    ),
}
# What a purpose changes: our own choice within the published ranges.
STEPS_PER_IMAGE = {PURPOSE_CHARACTER: 100, PURPOSE_STYLE: 60, PURPOSE_CONCEPT: 80}
RANK_FACTORS = {PURPOSE_CHARACTER: 1.0, PURPOSE_STYLE: 2.0, PURPOSE_CONCEPT: 0.5}  # of the family's rank
DATASET_ADVICE = {
    PURPOSE_CHARACTER: "20 to 40 pictures, a trigger word; leave out of the captions what always belongs to the "
    "character",
    PURPOSE_STYLE: "40 pictures and more, of many subjects; describe what is shown and not how; caption dropout 0.1",
    PURPOSE_CONCEPT: "20 to 60 pictures in which little else is alike; name the concept in every caption; Prior "
    "Preservation keeps the rest",
}
RUN_FIELDS = ("steps", "learning_rate")  # of the run's own settings; batch and seed are the Train node's


@dataclass(frozen=True)
class TrainingPreset:
    """Everything that a run begins with."""

    family: str
    purpose: str
    adapter: AdapterSettings
    optimizer: OptimizerSettings
    noise: NoiseSettings
    run: RunSettings
    resolution: int
    changed_names: tuple[str, ...] = ()


def make_training_preset(family: str, purpose: str, images: int, changes: str = "") -> TrainingPreset:
    """The values for a family and a purpose, then the user's own `name = value` lines. Raises ValueError that names a
    bad line."""
    base = PRESET_FAMILIES[family]
    rank = max(4, int(base.rank * RANK_FACTORS[purpose]))
    least, most = base.step_ranges[purpose]
    steps = min(max(STEPS_PER_IMAGE[purpose] * images, least), most)
    convolutions = (
        {"conv": True, "conv_rank": max(4, rank // 2), "conv_alpha": max(4, rank // 2) / 2}
        if purpose == PURPOSE_STYLE and MODEL_FAMILIES[base.family_key].is_unet
        else {}
    )
    chosen = TrainingPreset(
        family,
        purpose,
        AdapterSettings(rank=rank, alpha=base.alpha / base.rank * rank, **{**base.adapter, **convolutions}),
        OptimizerSettings(**base.optimizer),
        NoiseSettings(**base.noise),
        RunSettings(steps=steps, learning_rate=base.learning_rate),
        base.resolution,
    )
    for number, line in enumerate(changes.splitlines(), 1):
        if text := line.split("#")[0].strip():
            chosen = apply_preset_change(chosen, f"changes, line {number}: {text!r}", text)
    return chosen


def apply_preset_change(chosen: TrainingPreset, where: str, text: str) -> TrainingPreset:
    name, equals, value = (part.strip() for part in text.partition("="))
    done = (*chosen.changed_names, name)
    if not equals:
        raise ValueError(f"{where} is not a change. Write a name, = and a value, for example rank = 32.")
    try:
        if name == "resolution":
            return replace(
                chosen,
                resolution=check_field_value(
                    name, parse_setting_value(value, 1024), 1024, dict(lo=16, hi=8192, unit="px")
                ),
                changed_names=done,
            )
        for part in ("adapter", "optimizer", "noise", "run"):
            settings = getattr(chosen, part)
            if name in (kinds := {f.name: f for f in fields(settings) if part != "run" or f.name in RUN_FIELDS}):
                new = replace(settings, **{name: parse_setting_value(value, kinds[name].default)})
                return replace(chosen, **{part: new}, changed_names=done)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    known = [
        *RUN_FIELDS,
        "resolution",
        *(f.name for part in ("adapter", "optimizer", "noise") for f in fields(getattr(chosen, part))),
    ]
    raise ValueError(f"{where}: there is no setting {name!r}. There are: {', '.join(known)}.")


def parse_setting_value(value: str, default):
    """The value in the kind of its field, as far as the text says so; the record judges it."""
    if isinstance(default, bool):
        return {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}.get(
            value.lower(), value
        )
    for kind in (int, float) if isinstance(default, (int, float)) else ():
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def format_preset(chosen: TrainingPreset) -> str:
    """Every value that is not a default, the advice and the sources, one per line."""
    run = (
        f"steps {chosen.run.steps}, learning rate {chosen.run.learning_rate:g}, rank {chosen.adapter.rank}, resolution "
        f"{chosen.resolution} px"
    )
    parts = [("adapter", chosen.adapter, ("rank",)), ("optimizer", chosen.optimizer, ()), ("noise", chosen.noise, ())]
    lines = [
        f"{chosen.family}, {chosen.purpose}",
        run,
        *(f"{name}: {told}" for name, settings, less in parts if (told := format_changed_settings(settings, less))),
    ]
    if chosen.changed_names:
        lines.append(f"changed by you: {', '.join(dict.fromkeys(chosen.changed_names))}")
    return "\n".join(
        [*lines, f"pictures: {DATASET_ADVICE[chosen.purpose]}", f"from: {PRESET_FAMILIES[chosen.family].source}"]
    )


def format_changed_settings(settings, less) -> str:
    given = {
        f.name: getattr(settings, f.name)
        for f in fields(settings)
        if f.name not in less and getattr(settings, f.name) != f.default
    }
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in given.items()
    )
