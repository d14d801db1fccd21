"""Random generators on the CPU: the same seed, or the same parts, give the same numbers on every machine."""

from __future__ import annotations

import hashlib

import torch


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def derive_generator(*parts) -> torch.Generator:
    """A generator seeded by a hash of the parts, such as a run's seed and a step: it depends on nothing that was drawn
    before."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return make_generator(int.from_bytes(digest, "big") >> 1)
