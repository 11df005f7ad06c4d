"""Damage: small, random changes to bytes and to MessagePack values."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

INTERESTING = [
    *(0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 31, 32, 63, 64, 100, 127, 128, 129, 255, 256, 257, 999, 1000),
    *(1001, 4095, 4096, 4097, 2**15, 2**16 - 1, 2**16, 2**16 + 1, 2**20, 2**26, 2**26 + 1),
    *(2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**48, 2**53, 2**53 + 1, 2**63, 2**64 - 1),
]
HEADER_BYTES = 48
"""Half of all changes hit these first bytes, where the fields are."""
MOST_BYTES = 20_000


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """``data`` with one change or a few; ``others`` are what it may be spliced with."""
    changed = bytearray(data)
    while True:
        rng.choice(_CHANGES)(changed, rng, others)
        if rng.random() < 0.6 or len(changed) > MOST_BYTES:
            return bytes(changed[:MOST_BYTES])


def below(limit: int, rng: random.Random) -> int:
    """A number from 0 to ``limit`` - 1, or 0; faster than the library's."""
    return int(rng.random() * limit)


def _place(data: bytearray, rng: random.Random) -> int:
    return below(min(len(data), HEADER_BYTES) if rng.random() < 0.5 else len(data), rng)


def _flip(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if data:
        data[_place(data, rng)] ^= 1 << below(8, rng)


def _set(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if data:
        data[_place(data, rng)] = below(256, rng)


def _number(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if not data:
        return
    at, width = _place(data, rng), rng.choice((1, 2, 4, 8))
    number = rng.choice(INTERESTING) % (1 << 8 * width)
    data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))


def _count(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    if data:
        at = _place(data, rng)
        data[at] = (data[at] + rng.choice((-1, 1))) % 256


def _cut(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    del data[_place(data, rng) :]


def _drop(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    at = _place(data, rng)
    del data[at : at + 1 + below(16, rng)]


def _repeat(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    at = _place(data, rng)
    part = data[at : at + 1 + below(64, rng)]
    data[at:at] = part * (1 + below(3, rng))


def _insert(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    at = _place(data, rng)
    data[at:at] = rng.randbytes(1 + below(8, rng))


def _append(data: bytearray, rng: random.Random, _others: Sequence[bytes]) -> None:
    data += rng.randbytes(1 + below(8, rng))


def _splice(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    data[_place(data, rng) :] = other[below(len(other), rng) :]


_CHANGES: list[Callable[[bytearray, random.Random, Sequence[bytes]], None]] = [
    *(_flip, _flip, _set, _number, _number, _count, _count),
    *(_cut, _drop, _repeat, _insert, _append, _splice),
]


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """Something MessagePack can say."""
    kind = below(11 if depth < 3 else 8, rng)
    if kind == 8:
        return {str(i): any_value(rng, depth + 1) for i in range(below(4, rng))}
    if kind > 8:
        return [any_value(rng, depth + 1) for _ in range(below(5, rng))]
    if kind == 7:
        return rng.randbytes(below(40, rng))
    return rng.choice(_SCALARS[kind])


_SCALARS: list[list[Any]] = [
    [None, False, True],
    *(INTERESTING, INTERESTING, INTERESTING),
    [-1, -32, -33, -128, -129, -(2**31), -(2**63)],
    [0.0, -0.0, 0.5, -1.0, 1e308, float("nan"), float("inf"), float("-inf")],
    ["", "a", "run", "online", "x" * 64, "x" * 300, "two words", "ä", "../etc", "0" * 64],
]
