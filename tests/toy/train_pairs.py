"""Goes on training the toy world's transformer on frames of two shapes, and writes tests/toy/weights/pairs.safetensors.
Half an hour of one core.

    python -m tests.toy.train_pairs train pack      # stopped runs go on from TOY_WORK, by default /tmp/toy_world

Half of a step's images stay alone, 64 x 64 px. The other half are frames of 128 x 64 px, what Build Collages makes of
two of them, captioned by position ("left: a red circle on a white ground; right: ..."), always of SEEN shapes. Run from
the root of the repository, like train_world.
"""

import os
import sys
import time

import torch
from safetensors.torch import load_file, save_file

from . import shapes, world
from .train_world import (
    WORK,
    blank_transformer,
    encode_images,
    encode_texts,
    flow_loss,
    learn,
    pack,
    pixels,
    said,
    sigmas,
)

TOKENS = 28  # the longest caption of a frame needs 27; the rest of 77 is padding


def by_position(left, right):
    return f"left: {left}; right: {right}"


def brief(rng, attributes):
    """As `said`, but a cell of a frame is never left without a word."""
    return next(text for text in iter(lambda: said(rng, attributes), None) if text)


def encode_frames(images):
    """Latents (N, 16, 8, 8 or 16), by the VAE as it is stored."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / "vae.safetensors").exists():
        save_file(world.unpack(load_file(str(world.WEIGHTS / "vae.safetensors"))), str(WORK / "vae.safetensors"))
    return encode_images(images)


def side_by_side(left, right):
    frame = shapes.Image.new("RGB", (2 * shapes.PX, shapes.PX))
    frame.paste(left, (0, 0))
    frame.paste(right, (shapes.PX, 0))
    return frame


def lessons(kind, count, seed, per_caption=4):
    """(latents, caption number of each, hidden states, pooled) of images alone or frames; caption 0 is the empty
    one."""
    path = WORK / f"{kind}-{count}-{seed}.pt"
    if path.exists():
        return torch.load(path)
    rng, drawn, words, texts = torch.Generator().manual_seed(seed), [], [], [""]
    while len(drawn) < count:
        here, there = shapes.sample(rng)[2], shapes.sample(rng)[2]
        texts.append(brief(rng, here) if kind == "alone" else by_position(brief(rng, here), brief(rng, there)))
        for _ in range(per_caption):
            left, right = (
                shapes.sample(rng, **{k: a[k] for k in ("shape", "colour", "size", "ground")})[0] for a in (here, there)
            )
            drawn.append(left if kind == "alone" else side_by_side(left, right))
            words.append(len(texts) - 1)
    made = encode_frames(pixels(drawn)), torch.tensor(words), *encode_texts(texts, TOKENS)
    torch.save(made, path)
    return made


def transformer():
    """The host's MMDiT with the CLIP-L columns only and the stored weights."""
    model = blank_transformer(torch.Generator().manual_seed(0))
    stored = world.unpack(load_file(str(world.WEIGHTS / "transformer.safetensors")))
    model.load_state_dict(stored | {"pos_embed": world.position_table(world.WIDTH, world.SIDE)})
    return model


def train(steps=3000, batch=32, rate=6e-4, seed=11):
    """`batch` images alone and as many frames per step; one in ten without a caption, for guidance."""
    start = time.time()
    kinds = [lessons("alone", 3000, seed), lessons("frames", 6000, seed + 1)]
    print(f"data ready, {time.time() - start:.0f} s", flush=True)
    model = transformer()

    def losses(step, rng):
        return [of_kind(rng, *kind) for kind in kinds]

    def of_kind(rng, latents, words, context, pooled):
        pick, noise = (
            torch.randint(len(latents), (batch,), generator=rng),
            torch.randn((batch, *latents.shape[1:]), generator=rng),
        )
        sigma, empty = sigmas(rng, batch), torch.rand(batch, generator=rng) < 0.1
        text = torch.where(empty, 0, words[pick])
        return flow_loss(model, latents[pick], noise, sigma, context[text], pooled[text])

    learn("pairs", model, losses, steps, rate, seed)


if __name__ == "__main__":
    from comfy.cli_args import args

    args.cpu = True
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for part in sys.argv[1:]:
        {"train": train, "pack": lambda: pack([("pairs", "pairs")])}[part]()
