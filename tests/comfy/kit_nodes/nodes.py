"""Nodes with the prefix Kit: random conditioning, drawn images, a digest of a model's weights, a wait that can be
interrupted."""

import hashlib
import time

import torch
from comfy_api.latest import ComfyExtension, io
from typing_extensions import override


def node(node_id, inputs, *outputs):
    return io.Schema(node_id=node_id, display_name=node_id, category="tests", inputs=inputs, outputs=list(outputs))


def numbers(**defaults):
    return [io.Int.Input(name, default=value) for name, value in defaults.items()]


class KitConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sizes = numbers(seed=0, tokens=77, width=768, pooled=0)
        return node("KitConditioning", sizes, io.Conditioning.Output())

    @classmethod
    def execute(cls, seed, tokens, width, pooled):
        rng = torch.Generator().manual_seed(seed)
        rest = {"pooled_output": torch.randn(1, pooled, generator=rng)} if pooled else {}
        return io.NodeOutput([[torch.randn(1, tokens, width, generator=rng) * 0.5, rest]])


class KitImages(io.ComfyNode):
    """Random images, one IMAGE of batch size 1 per item of the list."""

    @classmethod
    def define_schema(cls):
        sizes = numbers(seed=0, count=2, width=64, height=64)
        return node("KitImages", sizes, io.Image.Output(is_output_list=True))

    @classmethod
    def execute(cls, seed, count, width, height):
        rng = torch.Generator().manual_seed(seed)
        return io.NodeOutput([torch.rand(1, height, width, 3, generator=rng) for _ in range(count)])


class KitDigest(io.ComfyNode):
    """Shows a digest of the base weights that a MODEL holds at this moment. `seed`: change it to look again."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("model"), *numbers(seed=0), io.AnyType.Input("after", optional=True)]
        schema = node("KitDigest", inputs, io.String.Output())
        schema.is_output_node = True
        return schema

    @classmethod
    def execute(cls, model, seed, after=None):
        digest = hashlib.sha256()
        for name, tensor in sorted(model.model.state_dict().items()):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return io.NodeOutput(digest.hexdigest(), ui={"text": [digest.hexdigest()]})


class KitWait(io.ComfyNode):
    """Waits; looks for an interrupt every 10 ms, as a training step would."""

    @classmethod
    def define_schema(cls):
        schema = node("KitWait", [io.Float.Input("seconds", default=1.0)], io.Float.Output())
        schema.is_output_node = True
        return schema

    @classmethod
    def execute(cls, seconds):
        import comfy.model_management

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.01)
        return io.NodeOutput(seconds, ui={"seconds": [seconds]})


class Kit(ComfyExtension):
    @override
    async def get_node_list(self):
        return [KitConditioning, KitImages, KitDigest, KitWait]
