"""Sounds as latents, and their captions and lyrics as conditionings, by the host's own nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import comfy.model_management as mm
import torch

from ...trainers.data.encoded import EncodedDataset
from ...trainers.data.sounds import SoundFile
from .context import enable_gradients
from .encoders import CaptionTokenizer, check_clip, check_vae, encode_tokens
from .progress import raise_if_interrupted

LYRICS_READERS = ("comfy.text_encoders.ace", "comfy.text_encoders.ace15")  # modules of tokenizers that take lyrics


def reads_lyrics(clip) -> bool:
    return type(clip.tokenizer).__module__ in LYRICS_READERS


def load_sound(sound: SoundFile, seconds: float) -> tuple[dict, float]:
    """(AUDIO of the first so many seconds, 0 all of it; seconds of the whole file). Two channels, as the host's
    autoencoders have. Raises ValueError for a file that cannot be read."""
    from comfy_extras import nodes_audio

    try:
        waveform, rate = nodes_audio.load(str(sound.path))
    except MemoryError:
        raise
    except Exception as error:  # av raises errors of its own for broken files
        raise ValueError(f"{sound.path.name} cannot be read as sound: {error}.") from error
    if waveform.shape[0] > 2:
        raise ValueError(f"{sound.path.name} has {waveform.shape[0]} channels; mix it down to one or two.")
    whole = waveform.shape[1] / rate
    if seconds:
        waveform = waveform[:, : round(seconds * rate)]
    return {"waveform": waveform.expand(2, -1)[None], "sample_rate": rate}, whole


def encode_sound(vae, sound: SoundFile, seconds: float) -> tuple[dict, float]:
    """(LATENT, seconds of the whole file)"""
    from comfy_extras import nodes_audio

    audio, whole = load_sound(sound, seconds)
    with torch.no_grad():
        return nodes_audio.VAEEncodeAudio.execute(vae, audio).args[0], whole


def encode_sound_text(clip, caption: str, lyrics: str, heard: float, whole: float) -> list:
    """CONDITIONING of a caption, read literally, and of lyrics where the text encoder takes them. `heard`, `whole`:
    seconds that are trained on, and of the file. No codes are generated: the sound itself is learnt."""
    options = dict(lyrics=lyrics, duration=heard, generate_audio_codes=False) if reads_lyrics(clip) else {}
    with torch.no_grad():
        cond = encode_tokens(clip, CaptionTokenizer(clip)(caption, **options))
    about = {} if reads_lyrics(clip) else {"seconds_start": 0.0, "seconds_total": whole}  # read by Stable Audio
    return [[cond["cross_attn"], {**{k: v for k, v in cond.items() if k != "cross_attn"}, **about}]]


def encode_sounds(
    sounds: list[SoundFile], vae, clip, seconds: float, dropout: float, report: Callable[[int, int, str], None]
) -> EncodedDataset:
    """The sounds as latents and conditionings, in memory. Nothing of vae and clip stays on the device."""
    check_vae(vae)
    check_clip(clip)
    latents, conds = [], []
    with contextlib.ExitStack() as borrowed, enable_gradients():  # tensors made here must be ordinary ones
        for patcher in (vae.patcher, clip.patcher):
            borrowed.callback(mm.unload_model_and_clones, patcher)
        times = []
        for number, sound in enumerate(sounds):
            raise_if_interrupted()
            latent, whole = encode_sound(vae, sound, seconds)
            latents.append(latent)
            times.append((min(whole, seconds or whole), whole))
            report(number + 1, 2 * len(sounds), sound.path.name)
        for number, (sound, (heard, whole)) in enumerate(zip(sounds, times, strict=True)):
            raise_if_interrupted()
            conds.append(encode_sound_text(clip, sound.caption, sound.lyrics, heard, whole))
            report(len(sounds) + number + 1, 2 * len(sounds), sound.path.name)
        empty = encode_sound_text(clip, "", "", *times[0]) if dropout else None
        return EncodedDataset.from_core(latents, conds, empty, dropout)
