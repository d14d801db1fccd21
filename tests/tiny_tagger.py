"""Taggers small enough to be trained while a test runs: they know three colours, two characters and two ratings.

The images are prepared here once more, slowly and literally, so that a mistake in the tagger's own preparation is not
learnt with it.
"""

import csv
import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

SIZE = 32
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220)}
TAGS = [
    ("bright", 9),
    ("dark", 9),
    ("red", 0),
    ("green", 0),
    ("blue", 0),
    ("red_square", 0),
    ("rosa_(toy_story)", 4),
    ("bluebell_(toy)", 4),
]


def drawn(colour, shift=0, size=(48, 32), ground=(255, 255, 255)):
    """A square of one colour on a wide white image."""
    image = Image.new("RGB", size, ground)
    ImageDraw.Draw(image).rectangle([12 + shift, 8, 31 + shift, 27], fill=COLOURS.get(colour, colour))
    return image


def truth(colour):
    """What the tags of such an image are, 1 or 0 each."""
    told = {"bright", colour, {"red": "rosa_(toy_story)", "blue": "bluebell_(toy)"}.get(colour)} | (
        {"red_square"} if colour == "red" else set()
    )
    return [float(name in told) for name, _ in TAGS]


def slowly_prepared(image, size=SIZE):
    """(size, size, 3) float 0 to 255, blue first: pixel by pixel, except for the resize."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side), (255, 255, 255))
    left, top = (side - image.width) // 2, (side - image.height) // 2
    for x in range(image.width):
        for y in range(image.height):
            padded.putpixel((left + x, top + y), image.getpixel((x, y)))
    small = padded.resize((size, size), Image.Resampling.BICUBIC)
    out = np.zeros((size, size, 3), np.float32)
    for x in range(size):
        for y in range(size):
            red, green, blue = small.getpixel((x, y))
            out[y, x] = blue, green, red
    return out


def lessons():
    """(pixels (N, 3, size, size) float 0 to 255 blue first, truth (N, tags))."""
    images = [(colour, drawn(colour, shift)) for colour in COLOURS for shift in (-8, -4, 0, 4, 8)]
    pixels = torch.stack([torch.from_numpy(slowly_prepared(image)).permute(2, 0, 1) for _, image in images])
    return pixels, torch.tensor([truth(colour) for colour, _ in images])


def taught(network, prepare, steps, rate):
    """The network with the lessons learnt; prepare is what its file format does to the pixels."""
    pixels, answers = lessons()
    optimizer = torch.optim.Adam(network.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(prepare(pixels)), answers).backward()
        optimizer.step()
    return network.eval()


def write_tags(folder, rows=TAGS, name="selected_tags.csv"):
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["tag_id", "name", "category", "count"])
        table.writerows([index, tag, category, 100 - index] for index, (tag, category) in enumerate(rows))


def timm_folder(folder):
    """As SmilingWolf's v3 repositories: model.safetensors, config.json, selected_tags.csv."""
    import timm

    torch.manual_seed(0)
    shape = dict(img_size=SIZE, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=len(TAGS), **shape)
    taught(network, lambda pixels: (pixels / 255 - 0.5) / 0.5, steps=60, rate=5e-3)
    folder.mkdir(parents=True)
    cfg = dict(
        input_size=(3, SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0
    )
    network.pretrained_cfg = network.default_cfg = {**network.pretrained_cfg, **cfg}
    timm.models.save_for_hf(network, folder, model_args=shape, safe_serialization=True)
    write_tags(folder)
    return pathlib.Path(folder)


def onnx_folder(folder, sigmoid=True):
    """As SmilingWolf's v2 and v3 .onnx files: (N, size, size, 3) of 0 to 255 in, probabilities out."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, len(TAGS))
    )
    taught(network, lambda pixels: pixels / 255, steps=250, rate=3e-2)
    tensors = [numpy_helper.from_array(p.detach().numpy(), name) for name, p in network.named_parameters()]
    tensors.append(numpy_helper.from_array(np.float32([1 / 255]), "unit"))
    nodes = [
        helper.make_node("Mul", ["input_1:0", "unit"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["first", "0.weight", "0.bias"], ["conv"], strides=[8, 8]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "4.weight", "4.bias"], ["logits"], transB=1),
        helper.make_node("Sigmoid", ["logits"], ["predictions_sigmoid"]),
    ]
    out = "predictions_sigmoid" if sigmoid else "logits"
    graph = helper.make_graph(
        nodes if sigmoid else nodes[:-1], "tagger",
        [helper.make_tensor_value_info("input_1:0", TensorProto.FLOAT, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["batch", len(TAGS)])], tensors,
    )  # fmt: skip
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(folder / "model.onnx")
    )
    write_tags(folder)
    return pathlib.Path(folder)
