"""Trains the toy world's CLIP_VISION, a small CLIP that tells how an image was drawn, and writes
tests/toy/weights/eyes.safetensors.

    python -m tests.toy.train_eyes train pack check      # stopped runs go on from TOY_WORK, by default /tmp/toy_world

It stands in for the encoders that nobody can download here. Shapes lie at any angle and place, in any colour on any
ground, and it is asked for all of that, never for a score. Run from the root of the repository, like train_world.
"""

import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from . import shapes, world
from .train_world import WORK, learn, pack, pixels

NUMBERS = ("red", "green", "blue", "ground red", "ground green", "ground blue", "radius", "x", "y")
POOL = 20000  # images drawn once; each is seen mirrored, too


def drawn(rng):
    """(image, number of its shape, what NUMBERS says, about -1 to 1)."""
    one = lambda low, high: low + (high - low) * torch.rand((), generator=rng).item()
    kind, radius = shapes.below(rng, len(shapes.SHAPES)), one(8, 19)
    ground = [round(one(10, 245))] * 3 if one(0, 1) < 0.5 else [round(one(10, 245)) for _ in range(3)]
    colour = [round(one(10, 245)) for _ in range(3)]
    while np.linalg.norm(np.subtract(colour, ground)) < 70:
        colour = [round(one(10, 245)) for _ in range(3)]
    centre = shapes.inside(shapes.SHAPES[kind], radius, [one(-12, 12) for _ in range(2)])
    image = shapes.draw(
        shapes.SHAPES[kind], tuple(colour), ground=tuple(ground), radius=radius, centre=centre, degrees=one(0, 360)
    )
    return (
        image,
        kind,
        [(v - 128) / 70 for v in (*colour, *ground)] + [(radius - 13.5) / 3.2, *((v - 32) / 6 for v in centre)],
    )


def pool(count, seed):
    """(pixels (N, 3, 64, 64) of 8 bits, shapes (N), numbers (N, 9))."""
    path = WORK / f"eyes-{count}-{seed}.pt"
    if not path.exists():
        rng = torch.Generator().manual_seed(seed)
        made = [drawn(rng) for _ in range(count)]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            (
                pixels([image for image, *_ in made]),
                torch.tensor([kind for _, kind, _ in made]),
                torch.tensor([numbers for *_, numbers in made]),
            ),
            path,
        )
    return torch.load(path)


class Telling(torch.nn.Module):
    """The encoder and what it is asked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.eyes = CLIPVisionModelWithProjection(CLIPVisionConfig(**world.EYES))
        width = world.EYES["projection_dim"]
        self.shape, self.numbers = torch.nn.Linear(width, len(shapes.SHAPES)), torch.nn.Linear(width, len(NUMBERS))

    def forward(self, images):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in world.LIGHT)
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.eyes(pixel_values=(images.float() / 255 - mean) / std).image_embeds
            seen = F.layer_norm(seen.float(), seen.shape[1:])
            return self.shape(seen).float(), self.numbers(seen).float()


def mirrored(rng, images, numbers):
    """The same images, mirrored by chance, with their new places."""
    x, y = (-1.0 if torch.rand((), generator=rng) < 0.5 else 1.0 for _ in range(2))
    flips = [axis for axis, sign in ((-1, x), (-2, y)) if sign < 0]
    return images.flip(flips), numbers * torch.tensor([1.0] * 7 + [x, y])


def train(steps=6000, batch=64, rate=1e-3, seed=21):
    start = time.time()
    images, kinds, numbers = pool(POOL, seed)
    print(f"data ready, {time.time() - start:.0f} s", flush=True)

    def losses(step, rng):
        pick = torch.randint(len(images), (batch,), generator=rng)
        looked, told = mirrored(rng, images[pick], numbers[pick])
        shape, said = model(looked)
        return [F.cross_entropy(shape, kinds[pick]) + (said - told).square().mean()]

    model = Telling()
    learn("eyes", model, losses, steps, rate, seed)


def check():
    """Of 2000 new images: the share of shapes named, and how much of the numbers' variance is told."""
    images, kinds, numbers = pool(2000, 22)
    model = Telling()
    model.load_state_dict(world.unpack(load_file(str(world.WEIGHTS / "eyes.safetensors"))))
    with torch.no_grad():
        parts = [model(some) for some in images.split(200)]
    shape, said = (torch.cat(some) for some in zip(*parts, strict=True))
    told = 1 - (said - numbers).square().mean(0) / numbers.var(0)
    print(
        f"shape {(shape.argmax(1) == kinds).float().mean():.3f}",
        {name: round(value.item(), 3) for name, value in zip(NUMBERS, told, strict=True)},
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for part in sys.argv[1:]:
        {"train": train, "pack": lambda: pack([("eyes", "eyes")]), "check": check}[part]()
