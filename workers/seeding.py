"""Seeds of random numbers, by what the numbers are for: the same on any worker, in any layout, whatever came before."""

from __future__ import annotations

import hashlib


def seed_of(*purpose: object) -> int:
    """64 bits for a generator of torch's. `purpose`: the run's seed, then names and numbers; slashes are put between.

    seed_of(3, "model.layers.0.mlp")
    """
    digest = hashlib.blake2b("/".join(map(str, purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
