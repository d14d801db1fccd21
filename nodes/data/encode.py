"""From images and captions to the latents and conditionings that a Train node reads, and the sizes they are trained
at."""

import contextlib

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import ImageColor

from ...trainers.data import cache
from ...trainers.data.buckets import BucketSettings, ClipSettings
from ...trainers.data.caption_variants import CAPTION_MODE_EMPTY, CaptionSettings
from ...trainers.data.encode import encode_dataset
from ...trainers.settings import InpaintSettings
from .. import host, paths
from ..fields import CATEGORY, DatasetType, EncodedType, settings_from_widgets, settings_inputs

APPENDED_BUCKET_FIELDS = (
    "rules",
    "merge",
    "max_crop",
)  # after the first release: at the end, because saved workflows hold widgets by position
APPENDED_CAPTION_FIELDS = ("tag_dropout", "wildcards", "text_precision")


class BucketDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardBucketDataset",
            display_name="Bucket Dataset",
            category=CATEGORY,
            description="Assigns each image its training size and shows the result: buckets, crops, and images "
            "that are alone in their bucket.",
            search_aliases=["aspect ratio", "resolution", "crop", "resize dataset", "multires"],
            is_output_node=True,
            inputs=[
                DatasetType.Input("dataset", tooltip="From Load Dataset. Sizes assigned earlier are replaced."),
                *settings_inputs(BucketSettings),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset",
                    display_name="dataset",
                    tooltip="The images with their sizes. Encode Dataset uses these sizes.",
                ),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="All buckets drawn to one scale; the fill height compares each with the fullest.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="All buckets as text, merged images, and suitable batch sizes.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, **widgets):
        from ...trainers.data.bucket_report import assign_buckets, draw_buckets_sheet, format_bucket_report

        result = assign_buckets(dataset, settings_from_widgets(BucketSettings, widgets))
        words = format_bucket_report(result)
        sheet = torch.from_numpy(np.asarray(draw_buckets_sheet(result), dtype=np.float32) / 255)[None]
        host.progress.show_node_text(words.splitlines()[0], cls.hidden.unique_id)
        return io.NodeOutput(result.dataset, sheet, words, ui=ui.PreviewImage(sheet, cls=cls))


class CutClips(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCutClips",
            display_name="Cut Clips",
            category=CATEGORY,
            description="Cuts videos, animations and folders of frames into clips of one length and frame rate, for "
            "video models. Images stay as they are.",
            search_aliases=["video dataset", "frames", "fps", "split video", "frame extraction", "gif"],
            inputs=[
                DatasetType.Input("dataset", tooltip="From Load Dataset, with videos in it."),
                *settings_inputs(ClipSettings),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="The clips and images, for captions or Encode Dataset."
                ),
                io.String.Output("about", display_name="about", tooltip="The clips, and videos that were left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset, **widgets):
        from ...trainers.data.clips import cut_clips
        from .dataset import format_dataset_summary, make_cancellable_progress

        clips = cut_clips(dataset, settings_from_widgets(ClipSettings, widgets), make_cancellable_progress(cls))
        return io.NodeOutput(clips, format_dataset_summary(clips))


class EncodeDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardEncodeDataset",
            display_name="Encode Dataset",
            category=CATEGORY,
            description="Sorts images and clips into buckets, encodes them and their captions once, and caches them on "
            "disk. CLIP and VAE leave the GPU afterwards.",
            search_aliases=[
                "bucket",
                "latent cache",
                "vae encode dataset",
                "caption dropout",
                "trigger word",
                "tag dropout",
                "wildcards",
                "keep tokens",
                "inpainting",
                "fill",
                "outpainting",
                "random mask",
            ],
            inputs=[
                DatasetType.Input("dataset", tooltip="From Load Dataset. Sizes assigned by Bucket Dataset are kept."),
                io.Vae.Input("vae", tooltip="The VAE of the model to be trained."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the model to be trained; the empty text is encoded too. Only a "
                    "score model does not need it: then choose the caption mode 'empty (unconditional)'.",
                ),
                *settings_inputs(CaptionSettings, without=APPENDED_CAPTION_FIELDS),
                *settings_inputs(BucketSettings, without=APPENDED_BUCKET_FIELDS),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    tooltip="Also train on the mirror image of every image. Not for text, faces or anything where"
                    " left and right matter.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    advanced=True,
                    # the page would draw a new one, and train anew, at every Run
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip=f"Determines the order of shuffled captions, and the inpaint masks. (0 to {2**63 - 1})",
                ),
                *settings_inputs(BucketSettings, only=APPENDED_BUCKET_FIELDS, optional=True),
                io.String.Input(
                    "ground",
                    default="#ffffff",
                    optional=True,
                    advanced=True,
                    tooltip="The colour under transparent images, as #rrggbb or a name such as grey.",
                ),
                *settings_inputs(CaptionSettings, only=APPENDED_CAPTION_FIELDS),
                io.Combo.Input(
                    "image_reader",
                    options=list(host.encoders.IMAGE_READERS),
                    default=host.encoders.AUTO_IMAGE_READER,
                    optional=True,
                    advanced=True,
                    tooltip="For edit models whose text encoder sees the control images: the ComfyUI node that you "
                    "will also use for your prompts. auto: TextEncodeQwenImageEditPlus (Qwen-Image-Edit-2509 and "
                    "later) for Qwen-Image's text encoder; others read the caption alone.",
                ),
                *settings_inputs(InpaintSettings),
                io.Combo.Input(
                    "first_frame",
                    options=list(host.encoders.FIRST_FRAME_NODES),
                    default=host.encoders.NO_FIRST_FRAME,
                    optional=True,
                    advanced=True,
                    tooltip="For image-to-video models: the ComfyUI node that you draw with. It is given the first "
                    "frame of each clip. SkyReels: HunyuanImageToVideo. none: the model makes clips from text.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For Wan 2.1 image-to-video, which also sees the first frame through CLIP_VISION.",
                ),
            ],
            outputs=[
                EncodedType.Output(
                    "encoded", display_name="encoded", tooltip="Latents and conditioning, for a Train node."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return cache.lost_files  # so that Run encodes again what a Train node missed

    @classmethod
    def execute(
        cls,
        dataset,
        vae,
        clip=None,
        flip=False,
        seed=0,
        ground="#ffffff",
        image_reader=host.encoders.AUTO_IMAGE_READER,
        first_frame=host.encoders.NO_FIRST_FRAME,
        clip_vision=None,
        **widgets,
    ):
        from ..host.first_frames import make_first_frames, unloaded_afterwards

        captions, buckets, inpaint = (
            settings_from_widgets(record, widgets) for record in (CaptionSettings, BucketSettings, InpaintSettings)
        )
        images, text = host.encoders.VaeEncoder(vae), make_text_encoder(clip, captions, image_reader)
        with (
            contextlib.ExitStack() as borrowed,
            host.context.enable_gradients(),
        ):  # tensors made here must be ordinary ones
            borrowed.callback(images.unload)
            borrowed.enter_context(unloaded_afterwards(clip_vision))
            if text is not None:
                borrowed.callback(text.unload)
            encoded = encode_dataset(
                dataset,
                captions,
                buckets,
                flip=flip,
                seed=seed,
                vae=images,
                text=text,
                cache_dir=paths.cache_folder(),
                report=host.progress.ItemProgressReporter(cls.hidden.unique_id),
                check_interrupt=host.progress.raise_if_interrupted,
                ground=parse_colour(ground),
                inpaint=inpaint,
                first_frame=make_first_frames(first_frame, vae, clip_vision),
            )
        sizes = len({(item.bucket, item.frames) for item in encoded.items})
        holes = sum(len(item.holes) for item in encoded.items)
        told = f", with {holes} inpaint mask{'s'[: holes > 1]}" if holes else ""
        host.progress.show_node_text(
            f"{format_count_of_kinds(encoded.items)} in {sizes} bucket{'s'[: sizes > 1]}, encoded{told}",
            cls.hidden.unique_id,
        )
        return io.NodeOutput(encoded)


def format_count_of_kinds(items) -> str:
    """Such as 12 images and 3 clips."""
    clips = sum(item.frames > 1 for item in items)
    counts = [(len(items) - clips, "image"), (clips, "clip")]
    return " and ".join(f"{count} {kind}{'s'[: count != 1]}" for count, kind in counts if count) or "0 images"


class EncodeSounds(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardEncodeSounds",
            display_name="Encode Sounds",
            category=CATEGORY,
            description="Encodes a folder of sounds with their captions and lyrics, for Train LoRA on Stable Audio or "
            "ACE-Step. CLIP and VAE leave the GPU afterwards.",
            search_aliases=["audio dataset", "music", "wav", "mp3", "lyrics", "ace step", "stable audio"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=paths.list_dataset_folders(),
                    tooltip="A folder of sounds (wav, flac, mp3, ogg, opus, m4a, aac), each with a caption beside it "
                    "(name.txt) and lyrics where it has some (name.lyrics.txt).",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model to be trained."),
                io.Clip.Input("clip", tooltip="The text encoder of the model to be trained."),
                io.Float.Input(
                    "seconds",
                    default=47.0,
                    min=0.0,
                    max=600.0,
                    step=0.1,
                    tooltip="Only the first seconds of each sound are trained on. 0: all of it. Sounds of one length "
                    "can share a batch. (0 to 600 seconds)",
                ),
                io.Float.Input(
                    "dropout",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of steps that use the empty caption instead; 0.1 keeps guidance working. (0 to 1)",
                ),
            ],
            outputs=[
                EncodedType.Output(
                    "encoded", display_name="encoded", tooltip="Latents and conditioning, for a Train node."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        from ...trainers.data.sounds import describe_sound_folder_state

        return describe_sound_folder_state(paths.resolve_dataset_folder(folder))

    @classmethod
    def execute(cls, folder, vae, clip, seconds, dropout):
        from ...trainers.data.sounds import read_sound_folder
        from ..host import sounds as host_sounds

        sounds = read_sound_folder(paths.resolve_dataset_folder(folder))
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        encoded = host_sounds.encode_sounds(sounds, vae, clip, seconds, dropout, report)
        unread = sum(bool(sound.lyrics) for sound in sounds) if not host_sounds.reads_lyrics(clip) else 0
        told = f"{len(encoded)} sounds, encoded" + (f"; this CLIP reads no lyrics, {unread} have some" * (unread > 0))
        host.progress.show_node_text(told, cls.hidden.unique_id)
        return io.NodeOutput(encoded)


def parse_colour(name: str) -> tuple[int, int, int]:
    """(red, green, blue) of a colour's name. Raises ValueError for what is none."""
    try:
        return ImageColor.getrgb(name.strip())[:3]
    except ValueError:
        raise ValueError(f"ground is {name!r}; write a colour such as #ffffff or grey.") from None


def make_text_encoder(clip, captions, image_reader):
    """None where nothing is connected and nothing is to be said: an Encoded for score models. Train nodes that need
    more say so."""
    is_without = clip is None and captions.caption_mode == CAPTION_MODE_EMPTY
    return None if is_without else host.encoders.TextEncoder(clip, image_reader)


NODES = [BucketDataset, EncodeDataset, CutClips, EncodeSounds]
