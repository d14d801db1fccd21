"""The toy world inside ComfyUI: load the built file with the real loader, sample with the real sampler, measure the
images.

ComfyUI must be importable (tests: the `comfy` fixture; scripts: its folder on sys.path and comfy.cli_args.args.cpu
set).
"""

from types import SimpleNamespace

import torch

from . import shapes, world
from .measure import measure

STEPS, CFG = 20, 2.5
STEPS_DISTILLED = 4  # of the distilled model, without guidance


def load(path):
    """`.model`, `.clip`, `.vae` of a checkpoint, as CheckpointLoaderSimple gives them."""
    import comfy.sd

    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]
    return SimpleNamespace(model=model, clip=clip, vae=vae)


def clip_vision():
    """The toy world's CLIP_VISION in ComfyUI's own class; its weights are in no checkpoint, and ComfyUI's loader knows
    real sizes only."""
    import comfy.clip_vision

    eyes = comfy.clip_vision.ClipVisionModel({"model_type": "clip_vision_model", **world.EYES})
    missing, unknown = eyes.load_sd(world.eyes())
    if missing or unknown:
        raise ValueError(f"The stored encoder and ComfyUI's do not fit: {[*missing, *unknown][:3]}.")
    return eyes


def conditioning(clip, prompts):
    """CONDITIONING of several prompts as one batch, in their order. Each is encoded once in the life of `clip`."""
    known = vars(clip).setdefault("toy_conditionings", {})
    for p in dict.fromkeys(prompts):
        if p not in known:
            known[p] = clip.encode_from_tokens_scheduled(clip.tokenize(p))[0]
    return [
        [
            torch.cat([known[p][0] for p in prompts]),
            {"pooled_output": torch.cat([known[p][1]["pooled_output"] for p in prompts])},
        ]
    ]


def noise(seeds, px=shapes.PX, width=None):
    """Start noise, one seed per image: the same as KSampler's for that seed at batch size 1. Square, or of another
    width in pixels."""
    shape = (1, world.CHANNELS, px // 8, (width or px) // 8)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def images(toy, prompts, seeds, steps=STEPS, cfg=CFG, negative="", model=None, px=shapes.PX, width=None):
    """(N, px, width or px, 3) images in [0, 1], one per prompt and seed, by ComfyUI's euler sampler; `model` (with a
    LoRA) replaces toy.model."""
    import comfy.sample

    start = noise(seeds, px, width)
    positive, negative = conditioning(toy.clip, prompts), conditioning(toy.clip, [negative] * len(prompts))
    latents = comfy.sample.sample(
        model or toy.model,
        start,
        steps,
        cfg,
        "euler",
        "simple",
        positive,
        negative,
        torch.zeros_like(start),
        disable_pbar=True,
        seed=seeds[0],
    )
    return toy.vae.decode(latents)


def accuracy(toy, wanted, first_seed, batch=96, **how):
    """Share of images that show what was asked: {attribute: share}, `all` for every attribute asked at once, and the
    count.

    `wanted` are attribute dicts as shapes.caption takes them; every image has its own seed, counted up from
    first_seed.
    """
    hits = {}
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        seeds = list(range(first_seed + start, first_seed + start + len(part)))
        for asked, image in zip(part, images(toy, [shapes.caption(**a) for a in part], seeds, **how), strict=True):
            seen, asked = measure(image), {k: v for k, v in asked.items() if v}
            for key, value in asked.items():
                hits.setdefault(key, []).append(getattr(seen, key) == value)
            hits.setdefault("all", []).append(seen.matches(**asked))
    return {key: round(sum(h) / len(h), 4) for key, h in hits.items()} | {"count": len(wanted)}
