"""Models of sound: trained from the latents and conditionings of the host's own nodes."""

import array
import dataclasses
import wave

import pytest
import torch
from trainyard.nodes import host
from trainyard.nodes.host.sounds import encode_sounds
from trainyard.nodes.train.validation import MonitorConfig
from trainyard.tests.comfy import families
from trainyard.tests.comfy.more_families import MORE, conditions_of
from trainyard.tests.comfy.test_train_lora import job, run
from trainyard.trainers.data.encoded import EncodedDataset
from trainyard.trainers.data.sounds import read_sound_folder
from trainyard.trainers.monitor.previews import PreviewSettings
from trainyard.trainers.monitor.validation import ValidationSettings
from trainyard.trainers.settings import NoiseSettings

pytestmark = pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype")  # the host's
SOUND = ("stable_audio", "ace", "ace15")


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    for name in SOUND:
        monkeypatch.setitem(families.TABLE, name, MORE[name])


def conditioning(name, seed):
    ((cross, extras),) = families.cond(name, seed)
    return [[cross, {**extras, **conditions_of(name, seed)}]]


def latents(name, lengths):
    shape, rng = families.latent_shape(name), torch.Generator().manual_seed(1)
    return [{"samples": torch.randn(*shape[:-1], length, generator=rng), "type": "audio"} for length in lengths]


def dataset(name, lengths=(24, 24, 16)):
    conds = [conditioning(name, seed) for seed in range(len(lengths))]
    return EncodedDataset.from_core(latents(name, lengths), conds)


@pytest.mark.parametrize("name", SOUND)
def test_sounds_of_two_lengths_train_and_samples_are_left_out_with_a_note(name, folders):
    looked_at = MonitorConfig(
        ValidationSettings(every=1, images=2, levels=2),
        PreviewSettings(preview_every=1),
        positive=conditioning(name, 7),
    )
    model = families.make(name, inference=True)
    a_job = job("sd3", model=model, encoded=dataset(name), name=f"sound-{name}", steps=3)
    done = run(dataclasses.replace(a_job, monitoring=looked_at))
    assert done.lora and len(done.losses) == 3
    assert f"no samples: {MORE[name].supported} makes no images" in done.line


def test_a_mask_is_refused_in_words():
    (latent,) = latents("stable_audio", [16])
    with pytest.raises(ValueError, match="Latent 0 has no height and width, and a noise_mask"):
        EncodedDataset.from_core([{**latent, "noise_mask": torch.ones(1, 8, 8)}], [conditioning("stable_audio", 0)])


def test_noise_for_images_is_refused_in_words(folders):
    model = families.make("stable_audio", inference=True)
    a_job = job("sd3", model=model, encoded=dataset("stable_audio"), name="sound-pyramid", steps=1)
    with pytest.raises(ValueError, match="Multi-resolution noise is for images.*pyramid_levels to 0"):
        dataclasses.replace(a_job, noise=NoiseSettings(pyramid_levels=2)).check()


@pytest.mark.parametrize("name", SOUND)
def test_what_trains_on_images_of_a_size_refuses_it(name):
    with pytest.raises(ValueError, match=f"{MORE[name].supported} does not generate images"):
        host.checks.square_latent_shapes(families.make(name), 512)


# -- a folder of sounds ------------------------------------------------------------------------------------------------
RATE = 8000


class Vae:
    """One cell for a hundred samples, with their mean in the first two channels."""

    audio_sample_rate = RATE

    def __init__(self):
        self.patcher = families.make("sd3")

    def encode(self, waveform):
        cells = waveform[0].unfold(0, 100, 100).mean(-1).T[None]
        return torch.cat([cells, torch.zeros(1, 62, cells.shape[-1])], dim=1)


class Clip:
    """Tells what it was asked to read."""

    def __init__(self, tokenizer):
        self.tokenizer, self.read, self.patcher = tokenizer, [], families.make("sd3")

    def tokenize(self, text, **options):
        self.read.append((text, options))
        return {"words": [[(len(text), 1.0)]]}

    def encode_from_tokens_scheduled(self, tokens, show_pbar):
        return [[torch.full((1, 7, 768), float(tokens["words"][0][0][0])), {}]]


def write_sound(path, seconds, channels=1, level=1000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(array.array("h", [level] * round(seconds * RATE) * channels).tobytes())


@pytest.fixture
def songs(tmp_path):
    for name, seconds, channels in (("a", 0.5, 1), ("b", 0.25, 2)):
        write_sound(tmp_path / f"{name}.wav", seconds, channels)
        (tmp_path / f"{name}.txt").write_text(f"song {name}")
    (tmp_path / "b.lyrics.txt").write_text("la (la)")
    return read_sound_folder(tmp_path)


def encode(sounds, clip, seconds=0.25, dropout=0.5):
    with torch.inference_mode():
        return encode_sounds(sounds, Vae(), clip, seconds, dropout, lambda *_: None)


def test_a_folder_of_sounds_trains(songs, folders):
    data = encode(songs, Clip(object()), seconds=0.3)
    assert [item.shape for item in data.items] == [(64, 24), (64, 20)]
    batch = data.make_batch([0], torch.Generator().manual_seed(0))
    assert batch.x0[0, :2].allclose(torch.tensor(1000 / 32768), atol=1e-4) and not batch.x0[0, 2:].any()
    cond = dataclasses.replace(data, dropout=0.0).make_batch([1], torch.Generator().manual_seed(0)).conds[0]
    assert (cond["seconds_start"], cond["seconds_total"]) == (0.0, 0.25)
    model = families.make("stable_audio", inference=True)
    assert len(run(job("sd3", model=model, encoded=data, name="sound-folder", steps=2)).losses) == 2


def test_ace_step_is_told_lyrics_and_length_and_makes_no_codes(songs):
    from comfy.text_encoders.ace15 import ACE15Tokenizer

    clip = Clip(object.__new__(ACE15Tokenizer))
    encode(songs, clip)
    asked = [(text, options["lyrics"], options["duration"]) for text, options in clip.read]
    assert asked == [("song a", "", 0.25), ("song b", "la (la)", 0.25), ("", "", 0.25)]
    assert not any(options["generate_audio_codes"] for _, options in clip.read)


def test_a_file_that_is_no_sound_is_named(songs):
    songs[0].path.write_bytes(b"RIFF nothing")
    with pytest.raises(ValueError, match=r"a.wav cannot be read as sound: "):
        encode(songs, Clip(object()))
