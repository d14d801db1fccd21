"""Toy models of a few lines: a network of 4k weights with the layer names of a transformer, and datasets of a few
random latents."""

import dataclasses

import torch
from torch import nn
from trainyard.trainers.adapters.adapters import Adapters
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.diffusion import per_sample
from trainyard.trainers.files import LoraFile
from trainyard.trainers.runs import RunFolder
from trainyard.trainers.settings import AdapterSettings

CHANNELS, SIDE, WORDS = 2, 4, 6  # latents are (2, 4, 4), a caption is 6 numbers
SHAPE = (CHANNELS, SIDE, SIDE)


class Stop(BaseException):
    """An interrupt, as the host raises it: no Exception."""


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Block(nn.Module):
    """A residual block with an attention and an MLP in name, each one linear layer in and one out."""

    def __init__(self, width):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(width, width), "to_out": nn.Linear(width, width)})
        self.ff = nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})

    def forward(self, h):
        h = h + self.attn["to_out"](torch.tanh(self.attn["to_q"](h)))
        return h + self.ff["down"](torch.tanh(self.ff["up"](h)))


class Net(nn.Module):
    """(B, 2, 4, 4), (B,), (B, 6) -> (B, 2, 4, 4). Frozen random weights; norms and modulation are there to be left
    alone."""

    def __init__(self, width=24, seed=0):
        super().__init__()
        pixels = CHANNELS * SIDE * SIDE
        self.img_in, self.txt_in = nn.Linear(pixels, width), nn.Linear(WORDS, width)
        self.time_mod = nn.Linear(4, width)
        self.blocks = nn.ModuleList([Block(width)])
        self.norm, self.final = nn.LayerNorm(width), nn.Linear(width, pixels)
        draw = rng(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / max(1, p[0].numel()) ** 0.5)
        self.requires_grad_(False)

    def forward(self, x, sigma, words):
        h = (
            self.img_in(x.flatten(1))
            + self.txt_in(words)
            + self.time_mod(torch.cos(sigma[:, None].log1p() * torch.arange(4.0)))
        )
        for block in self.blocks:
            h = block(h)
        return self.final(self.norm(h)).view_as(x)


class Denoiser:
    """A Denoiser over a Net that answers `eps`, `v` or `flow`, with the noise schedule of SD1.5 or a straight line."""

    def __init__(self, network=None, prediction="flow"):
        self.network, self.prediction, self.flow = network, prediction, prediction == "flow"
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        self.sigmas = ((1 - alphas) / alphas).sqrt().float()  # (1000,) rising from 0.029 to 14.6

    def model_space(self, latent):
        return latent.clone()

    def noised(self, x0, noise, sigma):
        s = per_sample(sigma, x0)
        return (1 - s) * x0 + s * noise if self.flow else x0 + s * noise

    def sigma_at(self, u):
        return u if self.flow else self.sigmas[(u * 1000).long().clamp(0, 999)]

    def native_scale(self, sigma):
        return sigma / (sigma**2 + 1).sqrt() if self.prediction == "v" else sigma

    def denoise(self, x, sigma, conds):
        out = self.network(x, sigma, torch.cat([c["cross_attn"].flatten(1) for c in conds]))
        return self.x0(x, per_sample(sigma, x), out)

    def x0(self, x, s, out):
        """x0 for what the network answers (Karras et al. 2022, table 1; Salimans and Ho 2022 for v)."""
        return x / (s**2 + 1) - out * s / (s**2 + 1).sqrt() if self.prediction == "v" else x - s * out


class Perfect(Denoiser):
    """Knows the answer."""

    def __init__(self, x0, prediction="flow"):
        super().__init__(None, prediction)
        self.predict_x0 = x0

    def denoise(self, x, sigma, conds):
        return self.predict_x0.expand_as(x)


def dataset(count=4, seed=5, masks=False, dropout=None):
    """`count` random latents, each under a caption of its own. `dropout`: there is an empty caption too."""
    draw = rng(seed)
    latents = [{"samples": torch.randn(1, CHANNELS, SIDE, SIDE, generator=draw)} for _ in range(count)]
    if masks:
        for latent in latents:
            latent["noise_mask"] = (torch.rand(1, SIDE, SIDE, generator=draw) > 0.5).float()
    captions = [[[torch.randn(1, 1, WORDS, generator=draw), {}]] for _ in range(count)]
    empty = None if dropout is None else [[torch.zeros(1, 1, WORDS), {}]]
    return EncodedDataset.from_core(latents, captions, empty, dropout or 0.0)


def prompts(seed=3):
    """Prompt -> conditioning."""
    draw = rng(seed)
    return {
        text: {"cross_attn": torch.randn(1, 1, WORDS, generator=draw)}
        for text in ("", "cat", "red cat", "dog", "old", "young")
    }


def pairs(count=3, strengths=(1.0, -1.0), seed=5):
    """`count` scenes, one random latent for each strength, under one caption a scene."""
    draw = rng(seed)
    latents, words, tags = [], [], []
    for scene in range(count):
        caption = torch.randn(1, 1, WORDS, generator=draw)
        for strength in strengths:
            latents.append({"samples": torch.randn(1, *SHAPE, generator=draw)})
            words.append([[caption, {}]])
            tags.append((f"scene {scene}", strength))
    data = EncodedDataset.from_core(latents, words)
    data.items = [dataclasses.replace(item, pair=p, strength=s) for item, (p, s) in zip(data.items, tags, strict=True)]
    return data


def adapters(network, seed=0, **settings):
    made = Adapters(network, AdapterSettings(**{"rank": 4, "targets": "all linear", **settings}), rng(seed))
    made.attach()
    return made


def shaken(network, seed=9):
    """Adapters that change something already."""
    made = adapters(network)
    draw = rng(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.2)
    return made


def folder(tmp_path, exported, steps, name="toy", fingerprint="0123456789abcdef"):
    """A RunFolder whose LoRAs are `exported()`: tensors by key."""
    return RunFolder(
        tmp_path,
        name,
        fingerprint,
        {"note": "toy"},
        steps,
        lambda step: LoraFile(exported(), {"ss_steps": str(step)}, step),
    )


class Line:
    """A method of one number: w times random inputs should equal 3 times them. Draws are remembered in `seen`."""

    def __init__(self, value=0.0, batch=1, size=1):
        self.w, self.batch, self.seen = torch.nn.Parameter(torch.full((size,), float(value))), batch, []

    def parameters(self):
        return [self.w]

    def loss(self, generator):
        x = torch.randn(self.batch, generator=generator)
        self.seen += x.tolist()
        return (self.w.mean() * x - 3 * x).square()
