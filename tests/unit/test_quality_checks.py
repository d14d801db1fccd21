"""Check Dataset: each fault is found on one side of its threshold and not on the other, and what follows is what was
asked."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from trainyard.tests.drawn import barred, enlarged, jpeg, softened, texture
from trainyard.trainers.data.contact_sheet import BAD_COLOUR
from trainyard.trainers.data.image_scan import ScanOptions
from trainyard.trainers.data.quality.checks import (
    QualitySettings,
    apply_quality_actions,
    check_dataset_quality,
    format_quality_json,
)
from trainyard.trainers.data.quality.quality_report import draw_quality_sheet, format_quality_report
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset

SMALL = dict(resolution=512, reject_below=128, warn_below=256)  # so that drawn images need not be large
ON = ("blur", "enlarged", "duplicates", "contrast", "exposure", "borders", "shape", "captions")


def only(*checks, **values):
    """Settings with these checks and no others."""
    return QualitySettings(**{**SMALL, **{name: name in checks for name in ON}, **values})


def folder_of(root, **images):
    for name, image in images.items():
        image.save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
    return read_folder(root)


def flags_of(root, image, settings):
    (record,) = apply_quality_actions(
        folder_of(root, a=image),
        *done(folder_of(root, a=image), replace(settings, on_reject="flag", on_warn="flag")),
    )
    return record.flags


def done(dataset, settings, **more):
    return check_dataset_quality(dataset, settings, **more), settings


def texture_on(ground, colour):
    """A disc of one colour with a little grain on a ground with a little grain."""
    image = Image.new("RGB", (400, 400), ground)
    ImageDraw.Draw(image).ellipse([100, 100, 300, 300], fill=colour)
    grain = np.random.default_rng(0).normal(0, 3, (400, 400, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def burnt(share):
    """A texture whose brightest share is pure white."""
    grey = np.asarray(texture((512, 512)).convert("L"))
    return Image.fromarray(np.where(grey >= np.quantile(grey, 1 - share), 255, grey).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    ("checks", "values", "bad", "good", "flag"),
    [
        ((), dict(reject_below=300), texture((400, 299)), texture((400, 300)), "resolution (short side 299 px < 300)"),
        ((), dict(warn_below=300), texture((400, 299)), texture((400, 300)), "resolution (short side 299 px < 300)"),
        ((), dict(resolution=512), texture((384, 384)), texture((512, 512)), "upscaling (1.33x to fill its bucket "
                                                                             "512x512 > 1.05x)"),
        (("blur",), {}, softened(texture((512, 512)), 2), texture((512, 512)), "blur (FFT share 0.0"),
        (("enlarged",), {}, enlarged(texture((512, 512)), 3), texture((512, 512)), "enlarged (by about "),
        (("contrast",), {}, texture_on("#d9c7a8", "#dcb496"), texture_on("#2850a0", "#dcb496"), "contrast (subject and "
                                                                                                "ground dE 9."),
        (("exposure",), {}, texture((512, 512), mean=30, spread=12), texture((512, 512)), "dark (brightest hundredth "
                                                                                          "0.2"),
        (("exposure",), {}, texture((512, 512), mean=252, spread=2), texture((512, 512)), "bright (darkest twentieth "
                                                                                          "0.9"),
        (("exposure",), {}, burnt(0.35), burnt(0.25), "clipped (3"),
        (("borders",), {}, barred(texture((512, 472)), top=40), texture((512, 512)), "bars (top 40 px > 2)"),
        (("shape",), {}, texture((1600, 512)), texture((1400, 512)), "aspect (short to long side 0.32 < 0.35)"),
        (("shape",), {}, Image.new("RGB", (512, 512), "#778899"), texture((512, 512)), "plain (entropy 0.00 bits < "
                                                                                       "1.5)"),
    ],
    ids=["reject", "warn", "upscaling", "blur", "enlarged", "contrast", "dark", "bright", "clipped", "bars", "aspect", "plain"],
)  # fmt: skip
def test_a_fault_is_flagged_with_its_figure_and_threshold_and_a_good_picture_is_not(
    tmp_path, checks, values, bad, good, flag
):
    values = {"resolution": 128, **values}
    if checks == ("enlarged",):
        values["resolution"] = 512
    found = flags_of(tmp_path, bad, only(*checks, **values))
    assert [text for text in found if text.startswith(flag)], found
    assert flags_of(tmp_path, good, only(*checks, **values)) == ()


def test_a_white_ground_is_not_clipped_highlights(tmp_path):
    image = Image.new("RGB", (400, 400), "#ffffff")
    image.paste(texture((200, 200)), (100, 100))
    assert flags_of(tmp_path, image, only("exposure", resolution=128)) == ()


def test_an_enlarged_picture_with_enough_detail_for_its_bucket_is_good(tmp_path):
    """600 px enlarged by 2 hold 300 px of detail: enough for 256, not for 512"""
    image = enlarged(texture((600, 600)), 2)
    assert flags_of(tmp_path, image, only("enlarged", resolution=128)) == ()
    assert "detail of" in flags_of(tmp_path, image, only("enlarged", resolution=512))[0]


def test_the_mask_decides_what_is_the_subject(tmp_path):
    image = texture_on("#2850a0", "#dcb496")
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle([10, 10, 60, 60], fill=255)  # blue on blue
    mask.save(tmp_path / "a.mask.png")
    assert flags_of(tmp_path, image, only("contrast", resolution=128))[0].startswith("contrast (")


def test_copies_name_the_one_they_are_copies_of(tmp_path):
    dataset = folder_of(
        tmp_path, a=texture((400, 300), 0), b=texture((400, 300), 1), c=jpeg(texture((400, 300), 0), 50)
    )
    checked = apply_quality_actions(dataset, *done(dataset, only("duplicates", resolution=128)))
    assert [record.flags for record in checked][:2] == [(), ()]
    (flag,) = checked[2].flags
    assert flag.startswith("duplicate (to a.png, ") and flag.endswith(" bits <= 10)")


def test_a_vision_model_adds_cosines_and_is_asked_once_per_picture(tmp_path):
    dataset = folder_of(tmp_path, a=texture((400, 300), 0), b=texture((400, 300), 1))
    asked = []

    def features(images):
        asked.extend(images)
        return np.tile(np.array([[0.6, 0.8]], np.float32), (len(images), 1))

    found = check_dataset_quality(dataset, only("duplicates", resolution=128), options=ScanOptions(features=features))
    assert [str(finding) for one in found.images for finding in one.findings] == [
        "duplicate (to a.png, cosine 1.000 >= 0.95)"
    ]
    assert found.vendi == pytest.approx(1)
    assert "2 images count as 1.0 different ones (Vendi score, from features of the vision model)" in found.notes[0]
    assert len(asked) == 2


# -- captions ----------------------------------------------------------------------------------------------------------


def captioned(tmp_path, *captions):
    texture((256, 256)).save(tmp_path / "a.png")
    record = read_folder(tmp_path)[0]
    return ImageDataset(
        tuple(replace(record, captions=(text,) if isinstance(text, str) else text) for text in captions)
    )


def words(text):
    return {"l": len(text.split()), "t5xxl": len(text.split())}


def test_captions_are_checked_for_emptiness_trigger_and_length(tmp_path):
    """80 words are two chunks of CLIP-L; 600 are too many for T5 as well"""
    texts = ("sks cat", "", "a dog", "SKS " + "word " * 79, "sks " + "word " * 599, ("sks one", "two"))
    dataset = captioned(tmp_path, *texts)
    checked = apply_quality_actions(
        dataset, *done(dataset, only("captions", trigger="sks", resolution=128), tokens=words)
    )
    assert [record.flags for record in checked] == [
        (),
        ("caption (empty)",),
        ("trigger ('sks' is missing)",),
        ("tokens (CLIP-L 80 > 75: 2 chunks)",),
        ("tokens (CLIP-L 600 > 75: 8 chunks)", "tokens (t5xxl 600 > 512)"),
        ("trigger ('sks' is missing in 1 of 2 alternatives)",),
    ]


def test_a_placeholder_says_the_trigger_and_the_set_notes_that_one_is_needed(tmp_path):
    dataset = captioned(tmp_path, "photo of [trigger]", "a cat")
    check, settings = done(dataset, only("captions", resolution=128, trigger="sks"))
    flags = [record.flags for record in apply_quality_actions(dataset, check, settings)]
    assert flags == [(), ("trigger ('sks' is missing)",)]
    assert "captions: 1 say [trigger], for which Encode Dataset needs its trigger" in check.notes


def test_a_caption_that_is_too_long_to_train_with_is_found_and_cancel_is_noticed_between_captions(tmp_path):
    dataset, asked = captioned(tmp_path, "a " * 2049, "b " * 40_000), []
    words = lambda text: {"l": len(text.split())}
    options = ScanOptions(check_interrupt=lambda: asked.append(1))
    settings = only("captions", resolution=128)
    checked = apply_quality_actions(dataset, *done(dataset, settings, tokens=words, options=options))
    assert [record.flags for record in checked] == [
        ("too long (2049 words, 2049 tokens in l (28 chunks of 75) > 2048 tokens: Encode Dataset refuses it)",),
        ("too long (40000 words, 79999 characters > 2048 tokens: Encode Dataset refuses it)",),
    ]
    with_captions = len(asked)
    check_dataset_quality(dataset, only(resolution=128), options=options)
    assert with_captions - (len(asked) - with_captions) == 2, "once for each caption, beside once for each image"


def test_without_a_trigger_and_a_counter_only_empty_captions_are_found(tmp_path):
    dataset = captioned(tmp_path, "word " * 600, " ")
    checked = apply_quality_actions(dataset, *done(dataset, only("captions", resolution=128)))
    assert [record.flags for record in checked] == [(), ("caption (empty)",)]


@pytest.mark.parametrize(("same", "told"), [(3, False), (4, True)])
def test_many_identical_captions_are_a_note_about_the_set(tmp_path, same, told):
    """3 of 10 are 30 %, which is allowed; 4 are not"""
    dataset = captioned(tmp_path, *["a photo"] * same, *(f"text {i}" for i in range(10 - same)))
    notes = "\n".join(check_dataset_quality(dataset, only("captions", resolution=128)).notes)
    assert ("identical captions: 40% > 30% read 'a photo'" in notes) == told


# -- what follows ------------------------------------------------------------------------------------------------------


def messy(tmp_path):
    """a good, b too small with mask, caption and score, c soft, d broken."""
    dataset = folder_of(
        tmp_path,
        a=texture((512, 512), 0),
        b=texture((100, 100), 1),
        c=softened(texture((512, 512), 2), 3),
        d=texture((512, 512), 3),
    )
    Image.new("L", (100, 100), 255).save(tmp_path / "b.mask.png")
    dataset = read_folder(tmp_path)
    (tmp_path / "d.png").write_bytes(b"no picture any more")
    return ImageDataset(tuple(replace(record, score=5.0) for record in dataset), (("e.png", "was skipped before"),))


SETTINGS = only("blur", "duplicates", "captions", resolution=128)


def names(dataset):
    return [record.path.rpartition("/")[2] for record in dataset]


def test_a_drop_takes_mask_score_and_caption_along_and_says_why(tmp_path):
    dataset = messy(tmp_path)
    checked = apply_quality_actions(dataset, *done(dataset, SETTINGS))
    assert names(checked) == ["a.png", "c.png"]
    assert not [record for record in checked if record.mask or record.captions == ("caption of b",)]
    assert checked.skipped[0] == ("e.png", "was skipped before")
    assert [(path.rpartition("/")[2], why.split(" (")[0]) for path, why in checked.skipped[1:]] == [
        ("b.png", "resolution"),
        ("d.png", "unreadable"),
    ]
    assert "100 px < 128" in checked.skipped[1][1]
    assert checked[1].flags[0].startswith("blur (")
    assert len(dataset) == 4 and not dataset[2].flags, "the dataset that came in is what it was"


@pytest.mark.parametrize(
    ("on_reject", "on_warn", "stay", "flagged"),
    [
        ("flag", "flag", "abcd", "bcd"),
        ("keep", "keep", "abcd", ""),
        ("keep", "flag", "abcd", "bc"),  # b is also smaller than its bucket, which is a warning
        ("drop", "drop", "a", ""),
        ("flag", "drop", "abd", "bd"),
    ],
)
def test_each_severity_has_its_own_action(tmp_path, on_reject, on_warn, stay, flagged):
    dataset = messy(tmp_path)
    checked = apply_quality_actions(dataset, *done(dataset, replace(SETTINGS, on_reject=on_reject, on_warn=on_warn)))
    assert "".join(name[0] for name in names(checked)) == stay
    assert "".join(name[0] for name, record in zip(names(checked), checked, strict=True) if record.flags) == flagged


def test_flags_of_before_stay_and_none_is_set_twice(tmp_path):
    dataset = messy(tmp_path)
    dataset = replace(dataset, records=tuple(replace(record, flags=("mine",)) for record in dataset))
    once = apply_quality_actions(dataset, *done(dataset, SETTINGS))
    assert once[0].flags == ("mine",)
    assert apply_quality_actions(once, *done(once, SETTINGS)) == once


def test_the_report_counts_and_lists_the_worst_first(tmp_path):
    dataset = messy(tmp_path)
    found, settings = done(dataset, SETTINGS)
    lines = format_quality_report(found, settings).splitlines()
    assert lines[0] == "4 images checked: 2 rejected (dropped), 1 with warnings (flagged), 1 good"
    assert "- resolution: 1 (rejected)" in lines
    worst = lines[lines.index("Worst first") + 1 :]
    assert [line.split(":")[0] for line in worst] == ["- b.png 100x100", "- d.png 512x512", "- c.png 512x512"]
    assert "REJECTED resolution (short side 100 px < 128)" in worst[0]


def test_the_figures_are_json_for_every_picture(tmp_path):
    dataset = messy(tmp_path)
    figures = json.loads(format_quality_json(check_dataset_quality(dataset, SETTINGS)))
    assert [image["severity"] for image in figures["pictures"]] == ["good", "reject", "warn", "reject"]
    assert figures["pictures"][0]["size"] == [512, 512]
    assert figures["pictures"][2]["fine"] < 0.007
    assert "fine" not in figures["pictures"][3], "unreadable"


def test_the_sheet_frames_the_worst_in_red_first(tmp_path):
    dataset = messy(tmp_path)
    page = draw_quality_sheet(check_dataset_quality(dataset, SETTINGS))
    assert page.getpixel((9, 60)) == tuple(int(BAD_COLOUR[i : i + 2], 16) for i in (1, 3, 5))


def test_a_mistake_of_our_own_is_never_taken_for_a_bad_picture(tmp_path, monkeypatch):
    from trainyard.trainers.data.quality import checks

    dataset = messy(tmp_path)

    def mistaken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(checks, "compute_image_signature", mistaken)
    with pytest.raises(TypeError, match="a bug"):
        check_dataset_quality(dataset, SETTINGS)


def test_a_mask_that_does_not_fit_is_reported_for_its_picture_only(tmp_path):
    dataset = folder_of(tmp_path, a=texture((512, 512)), b=texture((512, 512), 1))
    Image.new("L", (512, 300), 255).save(tmp_path / "b.mask.png")
    masked = ImageDataset((dataset[0], replace(dataset[1], mask=str(tmp_path / "b.mask.png"))))
    found = check_dataset_quality(masked, only("contrast", resolution=128, min_contrast=0.0))
    assert found.images[0].findings == ()
    assert "b.mask.png is 512x300 px and its image 512x512 px" in str(found.images[1].findings[0])


def test_an_empty_dataset_is_no_error_to_check():
    found = check_dataset_quality(ImageDataset(()), QualitySettings())
    assert apply_quality_actions(ImageDataset(()), found, QualitySettings()) == ImageDataset(())
    assert format_quality_report(found, QualitySettings()).startswith("0 images checked")


def test_the_number_of_threads_changes_nothing(tmp_path):
    dataset = messy(tmp_path)
    one, four = (check_dataset_quality(dataset, SETTINGS, options=ScanOptions(threads=threads)) for threads in (1, 4))
    assert format_quality_json(one) == format_quality_json(four)


def test_progress_reaches_the_end_and_an_interrupt_ends_the_check(tmp_path):
    dataset = ImageDataset(messy(tmp_path).records * 5)
    seen = []
    check_dataset_quality(
        dataset, SETTINGS, options=ScanOptions(report=lambda done, total, text: seen.append((done, total)))
    )
    assert seen[-1] == (20, 20)

    class Cut(BaseException):
        pass

    calls = []

    def cut():
        calls.append(1)
        if len(calls) == 2:
            raise Cut

    with pytest.raises(Cut):
        check_dataset_quality(dataset, SETTINGS, options=ScanOptions(check_interrupt=cut))
    assert len(calls) == 2


def test_similar_must_be_wider_than_duplicate():
    with pytest.raises(
        ValueError, match="similar_bits is 5 and max_bits is 10; similar_bits must be at least max_bits"
    ):
        QualitySettings(similar_bits=5)
