"""Which files are images by their name, which are masks, and which only look like images."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from PIL import Image

from .metadata import is_file_or_broken_link

# By format of Pillow, the usual ones first. Of what Pillow decodes icons, X bitmaps, drawings, layered files, data of
# science and videos are left out.
FORMAT_ENDINGS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
MORE_FORMAT_ENDINGS = {
    "JPEG": (".jfif", ".jpe", ".pjpeg", ".pjp"),  # .jfif: as browsers save them under Windows
    "PNG": (".apng",),
    "DIB": (".dib",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "TGA": (".tga",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "SGI": (".sgi",),
    "DDS": (".dds",),
}
JPEG_ENDINGS = (*FORMAT_ENDINGS["JPEG"], *MORE_FORMAT_ENDINGS["JPEG"])
FRAME_FOLDER = re.compile(r"[^.].*\.(frames|[1-9]\d*fps)", re.IGNORECASE | re.DOTALL)
MASK_STEM = ".mask"
MASK_SUFFIX = ".mask.png"
MASK_SUFFIXES = (MASK_SUFFIX, "-masklabel.png")  # the latter is OneTrainer's; white is learnt in both
CONDITION_SUFFIX = "-condlabel.png"  # OneTrainer's images that condition a model; nothing here is trained on them
UNREAD_IMAGE_ENDINGS = frozenset(
    (
        ".heic .heif .heics .hif .jxl .jxr .wdp .hdp .avifs .mpo .jps .jls .flif .bpg "  # photos
        ".raw .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .raf .rw2 .rwl .pef .ptx .srw .3fr .fff .iiq .mef .mos "
        ".mrw .x3f .kdc .dcr .erf "  # raw photos
        ".psd .psb .xcf .kra .ora .clip .afphoto .svg .svgz .eps .ai .ps .wmf .emf "  # layered files and drawings
        ".exr .hdr .pfm .fit .fits .dcm .ico .icns .cur .xbm .xpm .wbmp .blp .vtf .ktx .ktx2 .rgb .rgba .bw .im .msp "
        ".pcd .pxr .ras"
    ).split()
)
VIDEO_ENDINGS = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .wmv .flv .mpg .mpeg .mts .m2ts .3gp .ogv .mxf .fli .flc".split()
)
MASK_VIDEO_SUFFIXES = tuple(f"{MASK_STEM}{ending}" for ending in sorted(VIDEO_ENDINGS))
SIGNATURES = {  # first bytes, as (offset, bytes), of files that are images whatever they are called
    "PNG": (0, b"\x89PNG\r\n\x1a\n"),
    "JPEG": (0, b"\xff\xd8\xff"),
    "GIF": (0, b"GIF8"),
    "WebP": (8, b"WEBP"),
    "TIFF": (0, b"II*\0"),
    "TIFF (big-endian)": (0, b"MM\0*"),
    "AVIF": (4, b"ftypavif"),
    "HEIC": (4, b"ftyphei"),
    "JPEG 2000": (4, b"jP  \r\n\x87\n"),
    "JPEG XL": (0, b"\xff\x0a"),
    "JPEG XL (boxed)": (4, b"JXL \r\n\x87\n"),
    "Photoshop": (0, b"8BPS"),
}
SIGNATURE_BYTES = 16


@lru_cache(maxsize=1)
def image_extensions() -> tuple[str, ...]:
    """The file name endings that are read; .avif where this Pillow can decode it."""
    listed = [*FORMAT_ENDINGS.items(), *MORE_FORMAT_ENDINGS.items()]
    return tuple(ending for kind, endings in listed if kind != "AVIF" or can_decode_avif() for ending in endings)


def can_decode_avif() -> bool:
    """Asked of one of Pillow's decoders, because Image.registered_extensions imports all of them: a tenth of the time
    that the pack takes to import."""
    try:
        from PIL import AvifImagePlugin
    except ImportError:  # an older Pillow, where another package may have added it
        return ".avif" in Image.EXTENSION
    return AvifImagePlugin.SUPPORTED


def is_image_name(name: str) -> bool:
    """Whether a file of this name is read as an image."""
    lower = name.lower()
    return (
        os.path.splitext(lower)[1] in image_extensions()
        and not lower.startswith(".")
        and not lower.endswith((*MASK_SUFFIXES, CONDITION_SUFFIX))
    )


def is_video_name(name: str) -> bool:
    """Whether a file of this name is read as a video; name.mask.mp4 is a mask."""
    stem, ending = os.path.splitext(name.lower())
    return ending in VIDEO_ENDINGS and not stem.startswith(".") and not stem.endswith(MASK_STEM)


def is_media_name(name: str) -> bool:
    return is_image_name(name) or is_video_name(name)


def is_frame_folder_name(name: str) -> bool:
    """Whether the images in a folder of this name are the frames of one clip: walk.24fps, or walk.frames."""
    return FRAME_FOLDER.fullmatch(name) is not None


def is_video_path(path: Path) -> bool:
    """Whether what is there is read as several frames: a video, or a folder of frames."""
    return is_video_name(path.name) or path.name.lower().endswith(MASK_VIDEO_SUFFIXES) or path.is_dir()


def is_media_file(file: Path) -> bool:
    """Whether it is read as an image, a video, or a folder of frames."""
    is_file = is_media_name(file.name) and is_file_or_broken_link(file)
    return is_file or (is_frame_folder_name(file.name) and file.is_dir())


def is_mask_name(name: str) -> bool:
    """Whether a file of this name beside an image or a video is its mask."""
    return name.lower().endswith((*MASK_SUFFIXES, *MASK_VIDEO_SUFFIXES)) and not name.startswith(".")


def strip_mask_suffix(name: str) -> str:
    """The stem of the image that a mask of this name belongs to, whichever way of naming masks it follows."""
    suffixes = *MASK_SUFFIXES, *MASK_VIDEO_SUFFIXES
    suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), Path(name).suffix)
    return name[: len(name) - len(suffix)]


def explain_unread_image(file: Path) -> str | None:
    """Why a file that is an image is not read. None for files of another kind."""
    ending = file.suffix.lower()
    if ending in UNREAD_IMAGE_ENDINGS:
        return f"images ending in {ending} are not read; save it as PNG, JPEG or WebP"
    if (kind := name_image_content(file)) is not None:
        named = f"its name ends in {ending}" if ending else "its name has no ending"
        return f"{named}, and it holds an image ({kind}); give it the ending of that format"
    return None


def name_image_content(file: Path) -> str | None:
    """The image format that a file's first bytes belong to."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(SIGNATURE_BYTES)
    except OSError:
        return None
    return next((kind for kind, (at, sign) in SIGNATURES.items() if start[at : at + len(sign)] == sign), None)
