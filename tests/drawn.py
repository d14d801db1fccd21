"""Images drawn from a seed whose faults are known: textures with the spectrum of photos, softened, enlarged,
framed."""

import io

import numpy as np
from PIL import Image, ImageFilter

LANCZOS, BICUBIC, BILINEAR = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def texture(size=(640, 640), seed=0, slope=1.0, mean=128.0, spread=45.0):
    """Coloured noise whose amplitude falls with frequency**slope; 1 is that of natural images."""
    width, height = size
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**slope
    noise[1:] = 0.6 * noise[:1] + 0.4 * noise[1:]  # channels of a photo go together
    layers = np.fft.irfft2(noise, s=(height, width))
    layers = layers / layers.std(axis=(1, 2), keepdims=True) * spread + mean
    return Image.fromarray(layers.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def softened(image, radius):
    return image.filter(ImageFilter.GaussianBlur(radius))


def enlarged(image, factor, how=BICUBIC):
    """The image at its own size, from a copy that is smaller by the factor."""
    small = image.resize((round(image.width / factor), round(image.height / factor)), LANCZOS)
    return small.resize(image.size, how)


def jpeg(image, quality):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def barred(image, left=0, top=0, right=0, bottom=0, colour="#000000"):
    framed = Image.new("RGB", (image.width + left + right, image.height + top + bottom), colour)
    framed.paste(image, (left, top))
    return framed


def grey(image):
    return np.asarray(image.convert("L"), np.float32)
