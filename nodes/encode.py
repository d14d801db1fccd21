"""From pictures and captions to the latents and conditionings that a Train node reads."""

from comfy_api.latest import io

from ..trainers.data.buckets import BucketSettings
from ..trainers.data.captions import CaptionSettings
from ..trainers.data.encode import encode
from . import host, paths
from .fields import CATEGORY, Dataset, Encoded, inputs, record


class EncodeDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardEncodeDataset",
            display_name="Encode Dataset",
            category=CATEGORY,
            description="Sort pictures into buckets and encode pictures and captions once, with a cache on disk. "
            "CLIP and VAE leave the GPU afterwards.",
            search_aliases=["bucket", "latent cache", "vae encode dataset", "caption dropout", "trigger word"],
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Dataset."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model to be trained."),
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder of the model to be trained. Also needed without captions: the empty text is encoded too.",
                ),
                *inputs(CaptionSettings),
                *inputs(BucketSettings),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    tooltip="Also learn the mirror image of every picture. Not for text, faces or anything with a left and a right.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    advanced=True,
                    control_after_generate=io.ControlAfterGenerate.fixed,  # the page would draw a new one, and train anew, at every Run
                    tooltip=f"Decides how shuffled captions are ordered. (0 to {2**63 - 1})",
                ),
            ],
            outputs=[Encoded.Output("encoded", display_name="encoded", tooltip="Latents and conditionings, for a Train node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, vae, clip, flip, seed=0, **widgets):
        captions, buckets = record(CaptionSettings, widgets), record(BucketSettings, widgets)
        pictures, text = host.PictureEncoder(vae), host.TextEncoder(clip)
        report = host.Steps(cls.hidden.unique_id)
        with host.gradients():  # tensors made here must be ordinary ones
            encoded = encode(
                dataset, captions, buckets, flip=flip, seed=seed, vae=pictures, text=text,
                cache_dir=paths.cache_folder(), report=report, check_interrupt=host.interrupted,
            )  # fmt: skip
        pictures.free()
        text.free()
        sizes = len({item.bucket for item in encoded.items})
        host.show(f"{len(encoded)} pictures in {sizes} bucket{'s'[: sizes > 1]}, encoded", cls.hidden.unique_id)
        return io.NodeOutput(encoded)


NODES = [EncodeDataset]
