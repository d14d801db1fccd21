"""A folder of sounds, with a caption and lyrics beside each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .metadata import format_first_names

SOUND_ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
CAPTION_ENDINGS = (".txt", ".caption.txt", "_prompt.txt")  # the last is that of ACE-Step's own trainer, as its lyrics'
LYRICS_ENDINGS = (".lyrics.txt", "_lyrics.txt")
MOST_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class SoundFile:
    """One sound. Texts are stripped; lyrics may be empty, a caption is not."""

    path: Path
    caption: str
    lyrics: str = ""


def read_sound_folder(root: Path) -> list[SoundFile]:
    """The sounds in a folder, by name. Raises ValueError for a folder without any, and for sounds without a caption."""
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in SOUND_ENDINGS and path.is_file())
    if not files:
        raise ValueError(f"{root.name} holds no sounds. Trainyard reads {', '.join(SOUND_ENDINGS)}.")
    found = [SoundFile(path, read_text(path, CAPTION_ENDINGS), read_text(path, LYRICS_ENDINGS)) for path in files]
    if bare := [sound.path.name for sound in found if not sound.caption]:
        first = Path(bare[0]).stem
        raise ValueError(
            f"{len(bare)} of {len(found)} sounds have no caption: {format_first_names(bare)}. Write what is heard into "
            f"{first}.txt, beside the sound (lyrics into {first}.lyrics.txt)."
        )
    return found


def read_text(sound: Path, endings: tuple[str, ...]) -> str:
    """The first text of these endings beside a sound, or ''. Raises ValueError for one that is no UTF-8 text."""
    for ending in endings:
        path = sound.with_name(sound.stem + ending)
        if path.is_file():
            if path.stat().st_size > MOST_TEXT_BYTES:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes, which is no caption. Shorten it.")
            try:
                return path.read_text("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path.name} is no text in UTF-8 ({error}). Save it as UTF-8.") from None
    return ""


def describe_sound_folder_state(root: Path) -> list[tuple[str, int, int]]:
    """What changes when a sound or a text of the folder does: (name, bytes, time of the last change)."""
    about = ((path.name, path.stat()) for path in sorted(root.iterdir()) if path.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in about]
