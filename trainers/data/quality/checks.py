"""What is wrong with which image: every figure measured once, then held against its threshold.

Sources of the thresholds: blur, hashes and contrast were measured on 200-300 photos; exposure, odd shapes and plain
images are CleanVision's. A finding says figure and threshold, so that a person can disagree with it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ...settings import Settings, choice_field, number_field, switch_field, text_field
from ..buckets import MIN_BUCKET_STEP, BucketSettings, initial_placement
from ..captions.caption_checks import check_record_captions, format_caption_notes
from ..captions.edits import CountTokens
from ..findings import SEVERITY_REJECT, SEVERITY_WARN, Finding
from ..image_scan import DEFAULT_SCAN, ScanOptions, scan_images
from ..readers import make_printable
from ..records import ImageDataset, ImageRecord
from ..similarity.diversity import sample_evenly, vendi, vendi_from_features
from .bars import detect_bars
from .colour import Contrast, measure_contrast
from .duplicates import (
    copy_preference_key,
    effective_megapixels,
    find_feature_pairs,
    find_hash_pairs,
    find_identical_files,
    group_duplicates,
    printable_file_name,
)
from .perceptual_hash import ImageSignature, compute_image_signature, signature_kernel
from .sharpness import estimate_enlargement, fine_detail_share, tile_sharpness

DROP_IMAGE, FLAG_IMAGE, KEEP_IMAGE = QUALITY_ACTIONS = ("drop", "flag", "keep")
SHARPNESS_LONG_SIDE_PX = 512  # px; the long side at which the thresholds of blur hold
THUMBNAIL_LONG_SIDE_PX = 192


@dataclass(frozen=True, kw_only=True)
class QualitySettings(Settings):
    """What a good training image is, and what happens to the others."""

    resolution: int = number_field(
        1024,
        64,
        8192,
        "The size the model will be trained at. Images are checked against the bucket they would get.",
        unit="px",
        step=64,
    )
    reject_below: int = number_field(512, 0, 8192, "A short side below this is rejected. 0 rejects none.", unit="px")
    warn_below: int = number_field(768, 0, 8192, "A short side below this gives a warning. 0 turns it off.", unit="px")
    on_reject: str = choice_field(
        DROP_IMAGE,
        QUALITY_ACTIONS,
        "Rejected images (too small, unreadable): drop removes them with caption, mask and score; flag marks "
        "them; keep only reports them.",
    )
    on_warn: str = choice_field(
        FLAG_IMAGE, QUALITY_ACTIONS, "Images with warnings only: drop, flag or keep, in the same way."
    )
    trigger: str = text_field("", "A word that every caption should contain. Empty: not checked.")

    blur: bool = switch_field(True, "Look for blurred images.", advanced=True)
    min_fine: float = number_field(
        0.007,
        0.0,
        1.0,
        "An image is blurred if its share of fine detail is below this and its tiles are below min_tiles.",
        step=0.001,
        advanced=True,
    )
    min_tiles: float = number_field(
        400.0,
        0.0,
        100_000.0,
        "Smallest accepted Laplacian variance of the sharpest tiles; it excuses a soft background.",
        step=10.0,
        advanced=True,
    )
    enlarged: bool = switch_field(True, "Look for upscaled images: more pixels than detail.", advanced=True)
    max_enlarged: float = number_field(
        1.5,
        1.0,
        4.0,
        "Largest upscaling factor without a warning, if less detail remains than the bucket has pixels.",
        step=0.1,
        advanced=True,
    )
    max_upscale: float = number_field(
        1.05,
        1.0,
        8.0,
        "How much an image may be enlarged to fill its bucket. Less than 1.05 is not detected.",
        step=0.05,
        advanced=True,
    )
    duplicates: bool = switch_field(True, "Look for duplicate images.", advanced=True)
    max_bits: int = number_field(
        10,
        0,
        20,
        "Images whose hashes differ in at most this many bits are duplicates.",
        unit="of 64 bits",
        advanced=True,
    )
    similar_bits: int = number_field(
        15, 0, 24, "Images whose hashes differ in at most this many bits are similar.", unit="of 64 bits", advanced=True
    )
    min_cosine: float = number_field(
        0.95,
        0.5,
        1.0,
        "With clip_vision: images whose features are at least this similar are duplicates.",
        step=0.005,
        advanced=True,
    )
    contrast: bool = switch_field(True, "Compare the subject with its background.", advanced=True)
    min_contrast: float = number_field(
        12.0,
        0.0,
        100.0,
        "Smallest accepted colour difference (CIEDE2000) between subject and background; 20 is good.",
        step=0.5,
        advanced=True,
    )
    exposure: bool = switch_field(True, "Look for images that are too dark, too bright or clipped.", advanced=True)
    min_light: float = number_field(
        0.32, 0.0, 1.0, "Too dark: the brightest hundredth of the image is darker than this.", step=0.01, advanced=True
    )
    max_dark: float = number_field(
        0.95,
        0.0,
        1.0,
        "Too bright: the darkest twentieth of the image is brighter than this.",
        step=0.01,
        advanced=True,
    )
    max_clipped: float = number_field(
        0.3,
        0.0,
        1.0,
        "Largest accepted share of pure white or black; a pure white or black background does not count.",
        step=0.01,
        advanced=True,
    )
    borders: bool = switch_field(True, "Look for solid borders at the edges.", advanced=True)
    max_bar: int = number_field(2, 0, 1000, "The widest bar without a warning.", unit="px", advanced=True)
    shape: bool = switch_field(True, "Look for very elongated and for nearly empty images.", advanced=True)
    min_aspect: float = number_field(
        0.35, 0.0, 1.0, "Smallest accepted ratio of the short to the long side.", step=0.01, advanced=True
    )
    min_entropy: float = number_field(
        1.5, 0.0, 8.0, "Smallest accepted entropy of the grey values.", unit="bits", step=0.1, advanced=True
    )
    captions: bool = switch_field(True, "Look for empty, repeated and overlong captions.", advanced=True)
    max_identical: float = number_field(
        0.3, 0.0, 1.0, "Largest accepted share of images with the same caption.", step=0.05, advanced=True
    )
    max_clip_tokens: int = number_field(
        75,
        1,
        10_000,
        "Longest caption for CLIP encoders, which read chunks of this length.",
        unit="tokens",
        advanced=True,
    )
    max_tokens: int = number_field(
        512, 1, 100_000, "Longest caption for other encoders (T5).", unit="tokens", advanced=True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.similar_bits < self.max_bits:
            raise ValueError(
                f"similar_bits is {self.similar_bits} and max_bits is {self.max_bits}; similar_bits must be at least "
                "max_bits."
            )


# -- one image -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageMeasurements:
    """The figures of one image. What is not asked for is None."""

    size: tuple[int, int]
    upscale: float | None  # by which it would have to grow to fill its bucket
    fine: float
    tiles: float
    enlarged: float
    light: float  # 99th percentile of the brightness, 0..1
    dark: float  # 5th percentile
    clipped: float
    entropy: float  # bits
    bars: tuple[int, int, int, int]  # left, top, right, bottom
    contrast: Contrast | None
    bucket: tuple[int, int] | None
    signature: ImageSignature
    thumbnail: bytes  # JPEG: kept for every image, so that the sheet decodes none again
    controls: tuple[float | str, ...] = ()  # see measure_controls

    def to_metrics(self) -> dict:
        """What a report shows, JSON-ready."""
        figures = {
            name: getattr(self, name)
            for name in ("upscale", "fine", "tiles", "enlarged", "light", "dark", "clipped", "entropy")
        }
        return {
            "size": list(self.size),
            **{name: None if value is None else round(value, 4) for name, value in figures.items()},
            "bars": list(self.bars),
            "contrast": self.contrast and round(self.contrast.dE, 2),
            "contrast_lightness": self.contrast and round(self.contrast.dL, 2),
        }


def measure_image_quality(
    record: ImageRecord, image: Image.Image, mask: Image.Image | None, settings: QualitySettings
) -> ImageMeasurements:
    """Every figure of one image."""
    from .control_checks import measure_controls

    rgb = np.asarray(image)
    grey = image.convert("L")
    small = grey.copy()
    small.thumbnail((SHARPNESS_LONG_SIDE_PX, SHARPNESS_LONG_SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=2.0)
    small = np.asarray(small, np.float32)
    upscale, bucket = bucket_upscale(record, settings.resolution)
    light, dark, clipped, entropy = measure_exposure(np.asarray(grey))
    return ImageMeasurements(
        size=image.size,
        upscale=upscale,
        bucket=bucket,
        fine=fine_detail_share(small),
        tiles=tile_sharpness(small),
        enlarged=estimate_enlargement(np.asarray(grey)) if settings.enlarged or settings.duplicates else 1.0,
        light=light,
        dark=dark,
        clipped=clipped,
        entropy=entropy,
        bars=detect_bars(rgb) if settings.borders else (0, 0, 0, 0),
        contrast=measure_contrast(image, mask) if settings.contrast else None,
        signature=compute_image_signature(image),
        thumbnail=encode_jpeg_thumbnail(image),
        controls=measure_controls(record, image),
    )


def encode_jpeg_thumbnail(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((THUMBNAIL_LONG_SIDE_PX, THUMBNAIL_LONG_SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=2.0)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=88)
    return data.getvalue()


def bucket_upscale(record: ImageRecord, resolution: int):
    """(factor, bucket) with which the image would fill its bucket; (None, None) where it has none."""
    step = min(64, max(MIN_BUCKET_STEP, resolution // 8))
    try:
        placement = initial_placement(record, BucketSettings(resolution=resolution, upscale=True, step=step))
    except ValueError:
        return None, None
    return max(
        placement.scaled[0] / record.cropped_size[0], placement.scaled[1] / record.cropped_size[1]
    ), placement.bucket


def measure_exposure(grey: np.ndarray) -> tuple[float, float, float, float]:
    """(99th percentile, 5th percentile, clipped share, entropy in bits) of 8-bit greys."""
    counts = np.bincount(grey.ravel(), minlength=256)
    share = counts / counts.sum()
    level = np.cumsum(share)
    light, dark = (int(np.searchsorted(level, at)) / 255 for at in (0.99, 0.05))
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    clipped = sum(
        share[ends].sum() for ends in ([0, 1], [254, 255]) if np.isin(edge, ends).mean() < 0.5
    )  # else it is a plain ground
    some = share[share > 0]
    return light, dark, float(clipped), float((some * np.log2(1 / some)).sum())


def check_image_measurements(found: ImageMeasurements, settings: QualitySettings) -> list[Finding]:
    """What is wrong with one image by itself."""
    return [
        finding
        for look in (
            check_resolution,
            check_blur,
            check_enlargement,
            check_contrast,
            check_exposure,
            check_borders,
            check_aspect_and_entropy,
        )
        for finding in look(found, settings)
    ]


def check_resolution(found: ImageMeasurements, settings: QualitySettings):
    short = min(found.size)
    if short < settings.reject_below:
        yield Finding(SEVERITY_REJECT, "resolution", f"short side {short} px < {settings.reject_below}")
    elif short < settings.warn_below:
        yield Finding(SEVERITY_WARN, "resolution", f"short side {short} px < {settings.warn_below}")
    if found.upscale is None:
        yield Finding(
            SEVERITY_WARN, "bucket", f"{found.size[0]}x{found.size[1]} px fits no bucket at {settings.resolution} px"
        )
    elif found.bucket is not None and found.upscale > settings.max_upscale + 0.005:
        yield Finding(
            SEVERITY_WARN,
            "upscaling",
            f"{found.upscale:.2f}x to fill its bucket {found.bucket[0]}x{found.bucket[1]} > {settings.max_upscale:g}x",
        )


def check_blur(found: ImageMeasurements, settings: QualitySettings):
    if settings.blur and found.fine < settings.min_fine and found.tiles < settings.min_tiles:
        yield Finding(
            SEVERITY_WARN,
            "blur",
            f"FFT share {found.fine:.4f} < {settings.min_fine:g}, sharpest tiles {found.tiles:.0f} < "
            f"{settings.min_tiles:g}",
        )


def check_enlargement(found: ImageMeasurements, settings: QualitySettings):
    """More pixels than detail, where that leaves less than the bucket shows."""
    if not settings.enlarged or found.enlarged < settings.max_enlarged or found.enlarged <= 1:
        return
    width, height = (round(side / found.enlarged) for side in found.size)
    if found.bucket is None or width * height < found.bucket[0] * found.bucket[1]:
        yield Finding(
            SEVERITY_WARN,
            "enlarged",
            f"by about {found.enlarged:.1f} >= {settings.max_enlarged:g}: detail of {width}x{height} px",
        )


def check_contrast(found: ImageMeasurements, settings: QualitySettings):
    if found.contrast and found.contrast.dE < settings.min_contrast:
        yield Finding(
            SEVERITY_WARN,
            "contrast",
            f"subject and ground dE {found.contrast.dE:.1f} < {settings.min_contrast:g}, dL {found.contrast.dL:.1f}",
        )


def check_exposure(found: ImageMeasurements, settings: QualitySettings):
    if not settings.exposure:
        return
    if found.light < settings.min_light:
        yield Finding(SEVERITY_WARN, "dark", f"brightest hundredth {found.light:.2f} < {settings.min_light:g}")
    if found.dark > settings.max_dark:
        yield Finding(SEVERITY_WARN, "bright", f"darkest twentieth {found.dark:.2f} > {settings.max_dark:g}")
    if found.clipped > settings.max_clipped:
        yield Finding(SEVERITY_WARN, "clipped", f"{found.clipped:.0%} pure white or black > {settings.max_clipped:.0%}")


def check_borders(found: ImageMeasurements, settings: QualitySettings):
    wide = [
        f"{name} {px} px"
        for name, px in zip(("left", "top", "right", "bottom"), found.bars, strict=True)
        if px > settings.max_bar
    ]
    if wide:
        yield Finding(SEVERITY_WARN, "bars", f"{', '.join(wide)} > {settings.max_bar}")


def check_aspect_and_entropy(found: ImageMeasurements, settings: QualitySettings):
    if not settings.shape:
        return
    ratio = min(found.size) / max(found.size)
    if ratio < settings.min_aspect:
        yield Finding(SEVERITY_WARN, "aspect", f"short to long side {ratio:.2f} < {settings.min_aspect:g}")
    if found.entropy < settings.min_entropy:
        yield Finding(SEVERITY_WARN, "plain", f"entropy {found.entropy:.2f} bits < {settings.min_entropy:g}")


# -- the whole set -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckedImage:
    """One image of the set, after the check."""

    record: ImageRecord
    measures: ImageMeasurements | None
    findings: tuple[Finding, ...]

    @property
    def severity(self) -> str | None:
        """REJECT, WARN or None."""
        found = {finding.severity for finding in self.findings}
        return SEVERITY_REJECT if SEVERITY_REJECT in found else SEVERITY_WARN if found else None


@dataclass(frozen=True)
class QualityCheck:
    """All that a check found."""

    images: tuple[CheckedImage, ...]
    notes: tuple[str, ...]  # about the set as a whole
    vendi: float | None

    def worst_first(self) -> list[CheckedImage]:
        rank = {SEVERITY_REJECT: 0, SEVERITY_WARN: 1, None: 2}
        return sorted(self.images, key=lambda one: (rank[one.severity], -len(one.findings)))


def check_dataset_quality(
    dataset: ImageDataset,
    settings: QualitySettings,
    tokens: CountTokens | None = None,
    options: ScanOptions = DEFAULT_SCAN,
) -> QualityCheck:
    """Look at every image and caption of the dataset. tokens(text) -> {encoder: tokens}. Broken files are findings,
    not errors."""
    from .control_checks import check_controls

    measures, features, broken = scan_images(
        dataset.records,
        lambda record, image, mask: measure_image_quality(record, image, mask, settings),
        options,
        masks=settings.contrast,
    )
    findings = [
        check_image_measurements(found, settings) if found else [Finding(SEVERITY_REJECT, "unreadable", broken[i])]
        for i, found in enumerate(measures)
    ]
    if settings.duplicates:
        for index, finding in check_duplicate_images(dataset, measures, features, settings):
            findings[index].append(finding)
    for index, finding in check_controls(dataset.records, [found.controls if found else () for found in measures]):
        findings[index].append(finding)
    if settings.captions:
        for index, record in enumerate(dataset):
            options.check_interrupt()
            findings[index] += check_record_captions(record, settings, tokens)
    score, note = measure_dataset_diversity(measures, features)
    notes = [note] if note else []
    if settings.captions:
        notes += format_caption_notes(dataset, settings, tokens)
    images = tuple(CheckedImage(*one) for one in zip(dataset, measures, map(tuple, findings), strict=True))
    return QualityCheck(images, tuple(notes), score)


def check_duplicate_images(
    dataset: ImageDataset, measures: Sequence[ImageMeasurements | None], features, settings: QualitySettings
):
    """(index, finding) of every copy but the best of its group."""
    known = [index for index, found in enumerate(measures) if found]

    def order(index):
        found = measures[index]
        return copy_preference_key(
            dataset[index],
            *((effective_megapixels(found.size, found.enlarged), found.tiles) if found else (0.0, 0.0)),
            index,
        )

    def pairs(bits):
        found = find_hash_pairs([measured.signature for measured in measures if measured], bits)
        return [replace(pair, first=known[pair.first], second=known[pair.second]) for pair in found]

    told = set()
    for kind, tied in (
        (
            "duplicate",
            [
                *find_identical_files(dataset.records),
                *pairs(settings.max_bits),
                *find_feature_pairs(features, settings.min_cosine),
            ],
        ),
        ("similar", pairs(settings.similar_bits) if settings.similar_bits > settings.max_bits else []),
    ):
        for group in group_duplicates(tied, order):
            for index in group.copies:
                if index not in told:
                    told.add(index)
                    yield (
                        index,
                        Finding(
                            SEVERITY_WARN,
                            kind,
                            f"to {printable_file_name(dataset[group.best])}, {group.reasons[index]}",
                        ),
                    )


def measure_dataset_diversity(measures: Sequence[ImageMeasurements | None], features) -> tuple[float | None, str]:
    """(Vendi score, a sentence about it)."""
    seen = [index for index, found in enumerate(measures) if found]
    if len(seen) < 2:
        return None, ""
    if features is not None:
        score, source, count = vendi_from_features(features[seen]), "features of the vision model", len(seen)
    else:
        prints = sample_evenly([found.signature for found in measures if found])
        score, source, count = (
            vendi(signature_kernel(prints)),
            "coarse shapes and colours; connect a clip_vision to compare contents",
            len(prints),
        )
    of = f"{count} images" if count == len(seen) else f"an even sample of {count} images"
    return score, f"diversity: {of} count as {score:.1f} different ones (Vendi score, from {source})"


# -- what follows ------------------------------------------------------------------------------------------------------


def apply_quality_actions(dataset: ImageDataset, found: QualityCheck, settings: QualitySettings) -> ImageDataset:
    """The dataset with flags set and images left out, as the settings say. What is left out goes with all that
    belongs to it."""
    kept, left_out = [], []
    action = {SEVERITY_REJECT: settings.on_reject, SEVERITY_WARN: settings.on_warn, None: KEEP_IMAGE}
    for one in found.images:
        if action[one.severity] == DROP_IMAGE:
            left_out.append((one.record.path, "; ".join(map(str, one.findings))))
        else:
            flags = [str(finding) for finding in one.findings if action[finding.severity] != KEEP_IMAGE]
            kept.append(replace(one.record, flags=tuple(dict.fromkeys((*one.record.flags, *flags)))))
    return ImageDataset(tuple(kept), (*dataset.skipped, *left_out))


def format_quality_json(found: QualityCheck) -> str:
    """Every figure of every image, for other programs."""
    images = [
        {
            "path": make_printable(one.record.path),
            "id": one.record.id,
            "severity": one.severity or "good",
            "findings": [str(finding) for finding in one.findings],
            **(one.measures.to_metrics() if one.measures else {}),
        }
        for one in found.images
    ]
    return json.dumps(
        {"pictures": images, "notes": list(found.notes), "vendi": found.vendi and round(found.vendi, 3)}, indent=1
    )
