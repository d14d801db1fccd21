"""A score model as one safetensors file: the weights of every member, and its info as JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..files import (
    ALTERED_METADATA,
    HASH_KEY,
    is_metadata_altered,
    read_safetensors,
    seal_metadata,
    tensor_hash,
    write_safetensors,
)
from .networks import ScoreModelInfo, ScorerEnsemble, build_scorer, call_with_seed

SCORE_MODEL_KEY, SCORE_MODEL_VERSION = "trainyard.score_model", "1"


def score_model_tensors(model: ScorerEnsemble) -> dict[str, torch.Tensor]:
    """The weights as the file holds them: "<member number>.<name in the network>"."""
    return {
        f"{number}.{name}": value.detach().cpu().clone()
        for number, network in enumerate(model.networks)
        for name, value in network.state_dict().items()
    }


def score_model_identity(model: ScorerEnsemble) -> str:
    """A hash that tells score models apart: of the weights, or the model's own `identity` where the weights belong to
    loaded models."""
    return getattr(model, "identity", None) or tensor_hash(score_model_tensors(model))


def write_score_model(path, model: ScorerEnsemble, extra: dict[str, str] | None = None) -> None:
    """Write the file atomically. ValueError for weights that are NaN or infinite."""
    tensors = score_model_tensors(model)
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise ValueError(
            f"This score model holds NaN or infinite values ({len(bad)} tensors, first {bad[0]}); it is not saved. "
            "Train it with a lower learning rate."
        )
    info = json.dumps(model.info.to_dict(), sort_keys=True, allow_nan=False)
    spec = {
        "modelspec.title": f"score model ({model.info.backbone}, {model.info.task})",
        HASH_KEY: f"0x{tensor_hash(tensors)}",
    }
    metadata = {SCORE_MODEL_KEY: SCORE_MODEL_VERSION, "about": info, **spec, **(extra or {})}
    write_safetensors(path, tensors, seal_metadata(metadata, tensors))


def read_score_model(path, trunk: Callable[[ScoreModelInfo], nn.Module] | None = None) -> ScorerEnsemble:
    """The model as it was saved. `trunk(info)` builds the trunk of backbones on a loaded model.

    Raises ValueError for files of another kind or a newer version, and for weights that do not fit the file's own
    info."""
    tensors, metadata = read_safetensors(path)
    check_score_model_metadata(tensors, metadata, path)
    info = parse_score_model_info(metadata, Path(path).name)
    networks = [call_with_seed(0, lambda: build_scorer(info, trunk and trunk(info))) for _ in range(info.members)]
    for number, network in enumerate(networks):
        own = {
            name.removeprefix(f"{number}."): value for name, value in tensors.items() if name.startswith(f"{number}.")
        }
        try:
            network.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(
                f"{Path(path).name} does not hold the weights that it says it holds: "
                f"{str(error).splitlines()[-1].strip()} It may be damaged; save it again, or fetch it again."
            ) from error
        network.eval().requires_grad_(False)
    check_score_model_hash(tensors, metadata, path)
    return ScorerEnsemble(networks, info)


def check_score_model_hash(tensors, metadata: dict[str, str], path) -> None:
    """ValueError unless the values are those that were saved."""
    written = metadata.get(HASH_KEY)
    if written is not None and written != f"0x{tensor_hash(tensors)}":
        raise ValueError(
            f"{path} is damaged: its values are not those that were saved ({HASH_KEY} differs). Save it again, or "
            "fetch it again."
        )


def check_score_model_metadata(tensors, metadata: dict[str, str], path) -> None:
    """ValueError unless the metadata, which says what the weights mean, is what was saved."""
    if is_metadata_altered(metadata, tensors):
        raise ValueError(f"{path}: {ALTERED_METADATA}. Save it again, or fetch it again.")


def is_whole_score_model(path, *keys: str) -> bool:
    """Whether the file is an undamaged score model that has these keys in its metadata."""
    try:
        tensors, metadata = read_safetensors(path)
        check_score_model_metadata(tensors, metadata, path)
        parse_score_model_info(metadata, Path(path).name)
        check_score_model_hash(tensors, metadata, path)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return set(keys) <= metadata.keys()


def parse_score_model_info(metadata: dict[str, str], name: str) -> ScoreModelInfo:
    """The info in a file's metadata; `name` is the file's name for the error."""
    if SCORE_MODEL_KEY not in metadata:
        raise ValueError(f"{name} is not a score model of Trainyard. Load a file that Save Score Model wrote.")
    if metadata[SCORE_MODEL_KEY] != SCORE_MODEL_VERSION:
        raise ValueError(
            f"{name} is a score model of version {metadata[SCORE_MODEL_KEY]}, and this Trainyard reads version "
            f"{SCORE_MODEL_VERSION}. Update Trainyard."
        )
    return ScoreModelInfo.from_dict(json.loads(metadata["about"]))


def score_file_matches(model: ScorerEnsemble, path) -> bool:
    """Whether the file holds exactly this model: equal weights and info."""
    try:
        tensors, metadata = read_safetensors(path)
        info = parse_score_model_info(metadata, "").to_dict()
    except ValueError:
        return False
    ours = score_model_tensors(model)
    equal = tensors.keys() == ours.keys() and all(torch.equal(tensors[k], v) for k, v in ours.items())
    return equal and json.dumps(info, sort_keys=True) == json.dumps(model.info.to_dict(), sort_keys=True)


def check_score_latent_format(info: ScoreModelInfo, latent_format: str, channels: int) -> None:
    """ValueError unless the model scores latents of this format. Where the format is unknown (""), only the channels
    are compared."""
    if info.channels != channels or (latent_format and info.latent_format and latent_format != info.latent_format):
        raise ValueError(
            f"This score model reads latents of {info.latent_format or 'an unnamed format'} ({info.channels} "
            f"channels), and these are of {latent_format or 'an unnamed format'} ({channels} channels). Each kind "
            "of latent needs a score model of its own: train or distil one for it."
        )
