"""Images with scores that are known: brightness, colourfulness and roundness, read from the image that the VAE
decodes.

Shapes at any angle, size and place, in any colour on any grey, so that each score is a continuous number and no two go
together.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ...trainers.data.encoded import EncodedDataset
from . import shapes
from .measure import measure

SCORES = ("brightness", "colourfulness", "roundness")


def drawn(rng, px=shapes.PX):
    """One image by chance; all sizes show the same."""
    one = lambda low, high: low + (high - low) * torch.rand((), generator=rng).item()
    shape, radius = shapes.SHAPES[shapes.below(rng, len(shapes.SHAPES))], one(11, 19)
    ground = one(16, 243)
    colour = tuple(round(one(20, 240)) for _ in range(3))
    while np.linalg.norm(np.array(colour) - ground) < 90:  # the shape must be seen
        colour = tuple(round(one(20, 240)) for _ in range(3))
    centre = shapes.inside(shape, radius, [one(-shapes.DRIFT_PX, shapes.DRIFT_PX) for _ in range(2)])
    return shapes.draw(
        shape, colour, ground=(round(ground),) * 3, radius=radius, centre=centre, degrees=one(-30, 30), px=px
    )


def brightness(image) -> float:
    return float((image @ np.array([0.299, 0.587, 0.114])).mean())


def colourfulness(image) -> float:
    """Hasler and Suesstrunk 2003: the spread and the mean of the two opponent colours."""
    rg, yb = image[..., 0] - image[..., 1], (image[..., 0] + image[..., 1]) / 2 - image[..., 2]
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def roundness(seen) -> float:
    """1 for a circle; corners, arms and holes take away from it. `seen`: of `measure`."""
    return 1 - float(np.linalg.norm(seen.waves)) - seen.hole / 2


def latents(toy, count, seed, px=shapes.PX):
    """(latents (N, C, px / 8, px / 8) as the VAE gives them, {score: [N]}) of drawn images; those whose decoded shape
    cannot be read are drawn anew. Large ones are measured at 64 px."""
    rng, found, scores = torch.Generator().manual_seed(seed), [], {name: [] for name in SCORES}
    while len(found) < count:
        pixels = torch.stack([torch.from_numpy(np.asarray(drawn(rng, px), dtype=np.float32) / 255) for _ in range(64)])
        with torch.inference_mode():
            z = toy.vae.encode(pixels)
            decoded = reduced(toy.vae.decode(z).clamp(0, 1).cpu()).numpy()
        for latent, image in zip(z.float().cpu(), decoded, strict=True):
            seen = measure(image) if len(found) < count else None
            if seen is None or not any(seen.waves):
                continue
            found.append(latent.clone())
            for name, score in zip(SCORES, (brightness(image), colourfulness(image), roundness(seen)), strict=True):
                scores[name].append(score)
    with torch.inference_mode(False):
        return torch.stack(found).clone(), scores


def reduced(images):
    """(N, H, W, 3) at 64 px, each pixel the mean of those it covers."""
    return torch.nn.functional.adaptive_avg_pool2d(images.movedim(-1, 1), shapes.PX).movedim(1, -1)


def encoded(z, scores) -> EncodedDataset:
    """Latents as a rated dataset."""
    data = EncodedDataset.from_core([{"samples": z}], [[[torch.zeros(1, 1, 4), {}]]])
    data.items = [dataclasses.replace(item, score=score) for item, score in zip(data.items, scores, strict=True)]
    return data
