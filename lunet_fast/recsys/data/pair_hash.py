"""Which rows are tested: no draw, but a property of the pair.

With 64-bit arithmetic and the finaliser of SplitMix64,

    mix(z) = z4, where z1 = z + 0x9E3779B97F4A7C15, z2 = (z1 ^ (z1 >> 30)) 0xBF58476D1CE4E5B9,
                       z3 = (z2 ^ (z2 >> 27)) 0x94D049BB133111EB, z4 = z3 ^ (z3 >> 31),

the row of user u and item i is tested if mix(mix(h(u) ^ 1) ^ mix(h(i) ^ 2) ^ mix(seed)) < test_share 2^64. h
of an id that is a plain 64-bit integer, also as a text, is that integer, and of another text the first 8
bytes of its BLAKE2b, little-endian. So the split needs no memory and depends neither on the order of the
rows, nor on how they are spread over files, nor on the other rows.
"""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

USER, ITEM = 1, 2


def mix(z: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64, of each number."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def salted(hashes: UInt64Array, salt: int) -> UInt64Array:
    """mix(h ^ salt) of each hash; ``salt`` is USER or ITEM."""
    return mix(hashes ^ np.uint64(salt))


def is_tested(pair: UInt64Array, test_share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Of rows, bool ``[n]``, by ``pair`` ``[n]``: the salted hash of the user ^ that of the item."""
    of_seed = mix(np.array([seed % 2**64], dtype=np.uint64))
    return mix(pair ^ of_seed) < np.uint64(int(test_share * 2.0**64))


def text_hash(text: str) -> int:
    """h of an id that is a text."""
    # A plain integer is what Python writes it as: no "007", no "+5", no digits of other scripts.
    if text[-1].isdigit() and len(text) <= 20:
        with contextlib.suppress(ValueError):
            number = int(text)
            if str(number) == text and -(2**63) <= number < 2**63:
                return number % 2**64
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "little")
