"""Videos, animations and folders of frames: read, cut into clips, encoded."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from trainyard.tests.fakes_data import FakeVae, encoded, image
from trainyard.tests.videos import STEP, grey, shown, write_video
from trainyard.trainers.captioners import CaptionResult
from trainyard.trainers.captioners.caption_dataset import caption_dataset
from trainyard.trainers.data.buckets import BucketSettings
from trainyard.trainers.data.caption_variants import CaptionSettings
from trainyard.trainers.data.clips import ClipSettings, cut_clips, describe_videos
from trainyard.trainers.data.contact_sheet import draw_dataset_sheet
from trainyard.trainers.data.join_split import SplitSettings, split_dataset
from trainyard.trainers.data.readers import read_folder
from trainyard.trainers.data.records import ImageDataset, open_image, open_mask
from trainyard.trainers.data.videos import decode_from, open_clip_frames, probe_video, read_frames
from trainyard.trainers.data.writers import SaveSettings, save_dataset
from trainyard.trainers.rng import make_generator
from trainyard.trainers.settings import InpaintSettings

SMALL = BucketSettings(resolution=16, step=8)


class ClipVae(FakeVae):
    """4n + 1 frames make n + 1 latent frames: the first by itself, then the mean of four."""

    def fit_frames(self, frames):
        return (frames - 1) // 4 * 4 + 1

    def encode(self, images):
        mean, std = super().encode(images)  # (F, C, h, w)
        cells = torch.stack([mean[0], *(part.mean(0) for part in mean[1:].split(4) if len(part))])
        return cells.movedim(0, 1)[None], std


def cut(folder, frames=5, fps=10.0, **rest):
    return cut_clips(read_folder(folder, videos="read"), ClipSettings(frames=frames, fps=fps, **rest))


def encode(root, dataset, vae):
    return encoded(root, dataset, vae=vae, buckets=SMALL, captions=CaptionSettings(trigger="toy"))


def frames_of(record):
    return [shown(frame) for frame in open_clip_frames(record)]


@pytest.mark.parametrize("name, codec", [("a.mkv", "ffv1"), ("a.mp4", "libx264"), ("a.webm", "libvpx")])
def test_each_kind_of_file_gives_the_frames_that_are_nearest_in_time(tmp_path, name, codec):
    file = write_video(tmp_path / name, codec=codec)
    found = probe_video(file)
    assert (found.size, found.frames, found.fps, found.is_variable) == ((32, 16), 30, 10.0, False)
    assert [shown(frame) for frame in read_frames(file, [0.04, 0.06, 1.0, 2.9], 10)] == [0, 1, 10, 29]
    assert [shown(frame) for frame in read_frames(file, [2.5, 2.6], 10)] == [25, 26]  # not from the beginning


def test_animations_give_their_frames_and_are_images_until_they_are_cut(tmp_path):
    for name in ("a.gif", "b.webp"):
        rest = [grey(number) for number in range(1, 5)]
        grey(0).save(tmp_path / name, save_all=True, append_images=rest, duration=100, lossless=True)
    dataset = read_folder(tmp_path)
    assert [record.video for record in dataset] == [None, None] and shown(open_image(dataset[0])) == 0
    assert [frames_of(record) for record in cut(tmp_path)] == [[0, 1, 2, 3, 4]] * 2


def test_a_folder_of_frames_is_one_record_with_the_rate_that_its_name_tells(tmp_path):
    for number in range(12):
        for folder in ("walk.20fps", "run.frames"):
            (tmp_path / folder).mkdir(exist_ok=True)
            grey(number).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "walk.txt").write_text("somebody walks")
    image(tmp_path / "still.png")
    dataset = read_folder(tmp_path, videos="read")
    assert [(record.path.rsplit("/", 1)[1], record.frames) for record in dataset] == [
        ("run.frames", 12), ("still.png", 1), ("walk.20fps", 12)
    ]  # fmt: skip
    assert dataset[2].captions == ("somebody walks",) and not dataset.skipped
    run, still, walk = cut(tmp_path)
    assert frames_of(run) == [0, 1, 2, 3, 4] and frames_of(walk) == [0, 2, 4, 6, 8] and still.clip is None


def test_videos_beside_images_are_left_out_and_told_unless_they_are_asked_for(tmp_path):
    write_video(tmp_path / "b.mkv")
    (tmp_path / "c.frames").mkdir()
    grey(1).save(tmp_path / "c.frames" / "0.png")
    names = lambda **more: [record.path.rsplit("/", 1)[1] for record in read_folder(tmp_path, **more)]
    assert names() == ["b.mkv", "c.frames"]
    image(tmp_path / "a.png")
    assert names() == names(videos="leave out") == ["a.png"]
    told = [(path.rsplit("/", 1)[1], reason) for path, reason in read_folder(tmp_path).skipped]
    assert [name for name, _ in told] == ["b.mkv", "c.frames"] and "Set videos of Load Dataset to read" in told[0][1]
    assert names(videos="read") == ["a.png", "b.mkv", "c.frames"]
    with pytest.raises(ValueError, match="videos is 'all'; choose one of auto, read, leave out"):
        read_folder(tmp_path, videos="all")


def test_clips_are_taken_at_one_rate_from_the_start_evenly_or_end_to_end(tmp_path):
    write_video(tmp_path / "a.mkv", frames=30, fps=10)
    assert [frames_of(record) for record in cut(tmp_path, 5, 5.0)] == [[0, 2, 4, 6, 8]]
    assert [frames_of(record) for record in cut(tmp_path, 9, 10.0, sampling="chunks")] == [
        list(range(start, start + 9)) for start in (0, 9, 18)
    ]
    assert [frames_of(record)[0] for record in cut(tmp_path, 11, 10.0, sampling="uniform", clips=2)] == [5, 14]
    assert [frames_of(record) for record in cut(tmp_path, 30, 0.0)] == [list(range(30))]


def test_a_video_of_variable_rate_plays_at_its_own_speed(tmp_path):
    write_video(tmp_path / "a.mkv", frames=6, times=[0, 0.1, 0.2, 0.6, 1.0, 1.1])
    assert probe_video(tmp_path / "a.mkv").is_variable
    (record,) = cut_clips(read_folder(tmp_path), ClipSettings(frames=3, fps=4.0))
    assert frames_of(record) == [0, 2, 3]  # at 0, 0.25 and 0.5 s


def test_only_the_frames_up_to_the_last_one_are_decoded(tmp_path, monkeypatch):
    from trainyard.trainers.data import videos

    file, made, original = write_video(tmp_path / "a.mkv", frames=60), [], videos.frame_to_image
    monkeypatch.setattr(videos, "frame_to_image", lambda frame: made.append(frame.pts) or original(frame))
    assert [shown(frame) for frame in read_frames(file, [3.0, 3.2], 10)] == [30, 32]
    assert len(made) == 2


@pytest.mark.parametrize("frames, fps, message", [
    (31, 10.0, "1 video cannot give a clip of 31 frames at 10 a second: a.mkv has 30 frames at 10 a second"),
    (5, 16.0, "a.mkv has 10 frames a second. Choose fewer frames or a lower fps"),
])  # fmt: skip
def test_a_video_that_is_too_short_or_too_slow_is_an_error_or_is_left_out_and_listed(tmp_path, frames, fps, message):
    write_video(tmp_path / "a.mkv")
    with pytest.raises(ValueError, match=message):
        cut(tmp_path, frames, fps)
    write_video(tmp_path / "b.mkv", frames=80, fps=24)
    left = cut(tmp_path, frames, fps, short_videos="leave out")
    assert len(left) == 1 and left.skipped[0][0].endswith("a.mkv")


def test_what_is_no_video_is_skipped_with_the_reason(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)
    write_video(tmp_path / "good.mkv")
    dataset = read_folder(tmp_path)
    assert len(dataset) == 1 and "cannot be decoded as a video (Invalid data" in dataset.skipped[0][1]
    (tmp_path / "good.mkv").write_bytes((tmp_path / "bad.mp4").read_bytes())
    with pytest.raises(ValueError, match=r"cannot be decoded|has changed"):
        list(open_clip_frames(dataset[0]))


def test_records_of_clips_survive_json_and_tell_themselves_apart(tmp_path):
    write_video(tmp_path / "a.mkv", frames=30)
    clips = cut(tmp_path, 9, 10.0, sampling="chunks")
    assert ImageDataset.from_json(clips.to_json()) == clips
    assert len({record.id for record in clips}) == 3
    assert describe_videos(clips) == ["3 clips of 9 frames, 10 fps, 0.9 s"]
    with pytest.raises(ValueError, match="cut into clips already"):
        cut_clips(clips, ClipSettings())


def test_clips_of_one_video_stay_on_one_side_of_a_split(tmp_path):
    for number in range(4):
        write_video(tmp_path / f"{number}.mkv", frames=10 + number)
    clips = cut(tmp_path, 5, 10.0, sampling="chunks")
    train, held_out = split_dataset(clips, SplitSettings(share=0.5))
    assert not {record.path for record in train} & {record.path for record in held_out}


def test_the_middle_frame_stands_for_a_clip_and_its_page_tells_the_length(tmp_path):
    write_video(tmp_path / "a.mkv")
    (record,) = cut(tmp_path, 9)
    assert shown(open_image(record)) == 4
    assert draw_dataset_sheet([record]).size[0] > 0


# -- encoded -----------------------------------------------------------------------------------------------------------


def test_clips_and_images_of_one_set_are_encoded_in_their_own_buckets(tmp_path):
    write_video(tmp_path / "in" / "a.mkv")
    image(tmp_path / "in" / "b.png")
    data = encode(tmp_path, cut(tmp_path / "in"), ClipVae())
    shapes = [item.shape for item in data.items]
    assert shapes == [(3, 2, 1, 3), (3, 1, 2, 2)] and [item.frames for item in data.items] == [5, 1]
    x0 = data.make_batch([0], make_generator(0)).x0
    steps = (x0[0, :, :, 0, 0].mean(0) * 255 / STEP - 1).tolist()
    assert steps == pytest.approx([0, 2.5], abs=0.01)  # frame 0, then the mean of 1 to 4


def test_what_is_on_disk_is_not_decoded_again(tmp_path, monkeypatch):
    from trainyard.trainers.data import videos

    write_video(tmp_path / "in" / "a.mkv")
    clips = cut(tmp_path / "in")
    first = encode(tmp_path, clips, ClipVae())
    monkeypatch.setattr(videos, "read_frames", None)
    assert encode(tmp_path, clips, ClipVae()).fingerprint == first.fingerprint


def test_no_more_clips_are_in_memory_than_are_opened_ahead(tmp_path, monkeypatch):
    from trainyard.trainers.data import encode as module

    for number in range(8):
        write_video(tmp_path / "in" / f"{number}.mkv", frames=5, draw=lambda i, size, n=number: grey(i + n, size))
    opened, finished = [], []
    original = module.open_bucketed_frames
    monkeypatch.setattr(module, "open_bucketed_frames", lambda p, ground: opened.append(p) or original(p, ground))

    class Watching(ClipVae):
        def encode(self, images):
            finished.append(len(opened))
            return super().encode(images)

    encode(tmp_path, cut(tmp_path / "in"), Watching())
    assert len(finished) == 8
    assert all(ahead <= number + 2 + module.PREFETCH_IMAGES for number, ahead in enumerate(finished))


@pytest.mark.parametrize("vae, frames, message", [
    (ClipVae(), 7, "latents hold 5 or 9 of them. Set frames to 5 or 9"),
    (FakeVae(), 5, "this VAE encodes single images"),
])  # fmt: skip
def test_a_length_that_the_vae_cannot_hold_is_an_error_before_any_work(tmp_path, vae, frames, message):
    write_video(tmp_path / "in" / "a.mkv")
    with pytest.raises(ValueError, match=message):
        encode(tmp_path, cut(tmp_path / "in", frames), vae)
    assert not vae.calls


def test_a_video_that_is_not_cut_is_an_error_and_one_frame_of_it_is_an_image(tmp_path):
    write_video(tmp_path / "in" / "a.mkv")
    with pytest.raises(ValueError, match="Connect Cut Clips between"):
        encode(tmp_path, read_folder(tmp_path / "in"), ClipVae())
    data = encode(tmp_path, cut(tmp_path / "in", 1), FakeVae())
    assert data.items[0].shape == (3, 1, 3)


@pytest.mark.parametrize("is_video", [False, True])
def test_a_mask_counts_for_every_frame_and_a_mask_video_for_each_its_own(tmp_path, is_video):
    """Frames 0 and 1 are masked out of the left half; the second latent frame holds frames 1 to 4."""
    write_video(tmp_path / "in" / "a.mkv", frames=5)
    half = np.full((16, 32, 3), 255, np.uint8)
    half[:, :16] = 0
    white = np.full((16, 32, 3), 255, np.uint8)
    if is_video:
        mask = lambda number, size: Image.fromarray(half if number < 2 else white)
        write_video(tmp_path / "in" / "a.mask.mkv", frames=5, draw=mask)
    else:
        Image.fromarray(half).save(tmp_path / "in" / "a.mask.png")
    dataset = cut(tmp_path / "in")
    assert len(dataset) == 1 and not dataset.skipped and open_mask(dataset[0]).size == (32, 16)
    data = encode(tmp_path, dataset, ClipVae())
    mask = data.make_batch([0], make_generator(0)).mask
    left_and_right = mask[0, 0, :, 0, [0, -1]].tolist()
    assert left_and_right == ([[0, 1], [0.75, 1]] if is_video else [[0, 1]])


def test_a_mask_video_of_another_length_is_an_error(tmp_path):
    write_video(tmp_path / "a.mkv", frames=9)
    write_video(tmp_path / "a.mask.mkv", frames=5)
    assert "has 5 frames and its video 9" in str(pytest.raises(ValueError, read_folder, tmp_path).value)


# -- captions and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("follows, size, seen", [(True, (64, 32), 2), (False, (32, 16), 2)])
def test_a_captioner_that_follows_instructions_sees_four_frames_and_a_tagger_the_middle_one(
    tmp_path, follows, size, seen
):
    """Four frames of five: 0, 1, 3 and 4, in the mean 2."""

    class Captioner:
        identity, follows_instructions, images = "captioner", follows, []

        def caption(self, image, prompt):
            self.images.append(image)
            return CaptionResult("a clip")

    write_video(tmp_path / "a.mkv")
    captioner = Captioner()
    result = caption_dataset(cut(tmp_path), captioner, lambda record: "what happens?")
    assert result.dataset[0].captions == ("a clip",)
    (shown_image,) = captioner.images
    assert shown_image.size == size and shown(shown_image) == seen


def test_clips_are_not_saved_as_images(tmp_path):
    write_video(tmp_path / "in" / "a.mkv")
    with pytest.raises(ValueError, match="holds 1 video, and only images can be saved"):
        save_dataset(cut(tmp_path / "in"), tmp_path / "out", SaveSettings())


def test_a_file_whose_index_leads_past_the_frame_is_read_from_its_beginning():
    class Container:
        at = 0.0

        def seek(self, offset, stream):
            self.at = offset * stream.time_base + (0.4 if offset else 0.0)

        def decode(self, stream):
            return (SimpleNamespace(time=self.at + number / 10) for number in range(8))

    stream = SimpleNamespace(time_base=Fraction(1, 1000))
    assert next(decode_from(Container(), stream, 0.0, 0.3))[0] == 0.0


def test_holes_are_refused_for_clips(tmp_path):
    write_video(tmp_path / "in" / "walk.mkv").with_suffix(".txt").write_text("a walk")
    with pytest.raises(ValueError, match="1 of 1 are clips, such as walk.mkv: holes are cut into images alone"):
        encoded(
            tmp_path, cut(tmp_path / "in"), vae=ClipVae(), buckets=SMALL, inpaint=InpaintSettings(inpaint_masks="boxes")
        )
