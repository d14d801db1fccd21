"""A folder of sounds: what is read beside them, and what is refused in words."""

import pytest
from trainyard.trainers.data.sounds import describe_sound_folder_state, read_sound_folder


def folder(root, **texts):
    for name, text in texts.items():
        (root / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("caption", ["a__txt", "a__caption__txt", "a_prompt__txt"])
@pytest.mark.parametrize("lyrics", ["a__lyrics__txt", "a_lyrics__txt"])
def test_caption_and_lyrics_lie_beside_the_sound(tmp_path, caption, lyrics):
    folder(tmp_path, a__WAV="", **{caption: " a drum \n", lyrics: "[verse]\nla"}, b__png="")
    (sound,) = read_sound_folder(tmp_path)
    assert (sound.path.name, sound.caption, sound.lyrics) == ("a.WAV", "a drum", "[verse]\nla")


def test_sounds_come_by_name_and_lyrics_may_be_missing(tmp_path):
    folder(tmp_path, b__mp3="", b__txt="two", a__flac="", a__txt="one")
    assert [(sound.path.name, sound.caption, sound.lyrics) for sound in read_sound_folder(tmp_path)] == [
        ("a.flac", "one", ""),
        ("b.mp3", "two", ""),
    ]


def test_a_folder_without_sounds_and_sounds_without_captions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no sounds. Trainyard reads .wav, .flac"):
        read_sound_folder(folder(tmp_path, a__png=""))
    folder(tmp_path, a__wav="", b__wav="", b__txt=" ", c__wav="", c__txt="a bell")
    with pytest.raises(ValueError, match=r"2 of 3 sounds have no caption: a.wav, b.wav. Write .* into a.txt"):
        read_sound_folder(tmp_path)


def test_a_caption_that_is_no_text_is_refused(tmp_path):
    folder(tmp_path, a__wav="")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.txt is no text in UTF-8"):
        read_sound_folder(tmp_path)


def test_a_changed_text_is_noticed(tmp_path):
    folder(tmp_path, a__wav="", a__txt="one")
    before = describe_sound_folder_state(tmp_path)
    folder(tmp_path, a__txt="another")
    assert describe_sound_folder_state(tmp_path) != before
