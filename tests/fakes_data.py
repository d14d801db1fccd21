"""A VAE and a text encoder of a few lines that count their calls, and folders of small images."""

import contextlib

import numpy as np
import torch
from PIL import Image
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.data.encode import encode_dataset
from trainyard.trainers.data.readers import read_folder


class Cut(BaseException):
    """An interrupt, as the host raises it."""


class FakeVae:
    """Each cell of 8x8 px is a weighted mean, left pixels weighing more; std is a constant, or None."""

    def __init__(self, identity="vae", factor=8, std=None, stop_at=None, gain=1.0, frames=False):
        self.identity, self.factor, self.std, self.stop_at, self.calls = identity, factor, std, stop_at, 0
        self.gain, self.frames = gain, frames

    def fit_frames(self, frames):
        return 1

    def encode(self, images):
        self.calls += 1
        if self.calls == self.stop_at:
            raise Cut
        b, h, w, c = images.shape
        f = self.factor
        weight = torch.linspace(2, 0, f)[:, None] / f**2
        mean = (images.view(b, h // f, f, w // f, f, c) * weight).sum((2, 4)).movedim(-1, 1) * self.gain
        mean = mean[:, :, None] if self.frames else mean
        return mean, None if self.std is None else torch.full_like(mean, self.std)


class FakeText:
    """cross_attn holds the caption's length, so that a test sees whose conditioning it got."""

    def __init__(self, identity="text", **extras):
        self.identity, self.extras, self.seen = identity, extras, []
        self.image_reader, self.images = "", []

    def encode(self, texts):
        self.seen += texts
        return [self.cond(float(len(text))) for text in texts]

    def encode_with_images(self, text, images):
        self.seen.append(text)
        self.images.append(images)
        return self.cond(float(len(text)) + float(images[0].mean()))

    def count_tokens(self, text):
        return {"l": len(text.split())}

    def on_device(self):
        return contextlib.nullcontext()

    def cond(self, value):
        return {
            "cross_attn": torch.full((1, 3, 4), value),
            "pooled_output": torch.ones(1, 2).half(),
            "mask": None,
            **self.extras,
        }


def image(path, size=(16, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(array).save(path)


def repaint(path):
    image(path, seed=12345)


def captioned(folder, count, size=(16, 16)):
    """`count` noise images 0.png, 1.png, ... with captions 'caption 0', ..."""
    for i in range(count):
        image(folder / f"{i}.png", size, seed=i)
        (folder / f"{i}.txt").write_text(f"caption {i}", encoding="utf-8")


def encoded(root, dataset=None, folder="in", captions=None, buckets=None, flip=False, vae=None, text=None, **rest):
    """The images in root/in, encoded with small buckets into root/cache."""
    dataset = read_folder(root / folder) if dataset is None else dataset
    buckets = buckets or BucketSettings(resolution=16, step=8)
    return encode_dataset(
        dataset,
        captions or CaptionSettings(),
        buckets,
        flip,
        vae or FakeVae(),
        text or FakeText(),
        root / "cache",
        **rest,
    )


def cached_files(root):
    """The files in root/cache."""
    return [file for file in (root / "cache").rglob("*") if file.is_file()]
