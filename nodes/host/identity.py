"""Fingerprints of loaded models, from samples of their weights."""

from __future__ import annotations

import hashlib

import torch

# CLIP-L of SD1.5 and SDXL has no projection in its file; the host leaves that tensor as uninitialised memory, another
# at every load.
UNINITIALISED_WEIGHTS = ("text_projection.weight",)


def hash_patched_weights(patcher, *more) -> str:
    """A hash that changes with the weights or the patches on them, without reading gigabytes: shapes and a sample of
    values."""
    digest = hashlib.blake2b(repr(more).encode(), digest_size=16)
    backup = {
        k: b.weight for k, b in patcher.backup.items()
    }  # originals of weights that patches are baked into at the moment
    for name, value in sorted(patcher.model.state_dict().items()):
        if not name.endswith(UNINITIALISED_WEIGHTS):
            hash_tensor_sample(digest, name, backup.get(name, value))
    for name, patches in sorted(patcher.patches.items()):
        for patch in patches:
            digest.update(repr((name, patch[0], patch[2])).encode())
            for tensor in iter_patch_tensors(patch[1]):
                hash_tensor_sample(digest, name, tensor)
    return digest.hexdigest()


def hash_model_and_schedule(model) -> str:
    """hash_patched_weights of a MODEL with its schedule: a ModelSampling node changes what is learnt."""
    ms = model.get_model_object("model_sampling")
    kinds = [cls.__name__ for cls in type(ms).__mro__[:3]]
    return hash_patched_weights(
        model, kinds, float(ms.sigma_min), float(ms.sigma_max), float(getattr(ms, "shift", 0.0))
    )


def hash_tensor_sample(digest, name, tensor, count=64):
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    flat = tensor.detach().reshape(-1)
    if flat.numel() and flat.device.type != "meta":
        index = torch.arange(min(count, flat.numel()), device=flat.device) * max(1, flat.numel() // count)
        digest.update(flat[index].float().cpu().numpy().tobytes())


def iter_patch_tensors(value):
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from iter_patch_tensors(v)
    elif hasattr(value, "weights"):
        yield from iter_patch_tensors(value.weights)
