"""Small videos for tests: frame i is grey, STEP * (i + 1), so that a test sees which frame it got."""

from fractions import Fraction

import numpy as np
from PIL import Image

STEP = 5


def grey(number, size=(32, 16)):
    return Image.new("RGB", size, (STEP * (number + 1),) * 3)


def write_video(path, frames=30, fps=10, size=(32, 16), times=None, draw=grey, codec="ffv1", gop=6):
    """times: seconds of each frame, in place of an even rate. ffv1 loses nothing, and lies in .mkv and .avi."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p" if codec != "ffv1" else "bgr0"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000) if times else 1 / Fraction(fps)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(draw(number, size)), format="rgb24")
            frame.pts = round(times[number] * 1000) if times else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(image):
    """Which frame an image is."""
    return round(float(np.asarray(image.convert("L")).mean()) / STEP) - 1
