from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensors.bit_planes import pack, packed_bytes, parts, unpack

counts = st.integers(0, 70) | st.sampled_from([1023, 1024, 1025])


def reference(levels: list[int], bits: int) -> bytes:
    """Bit by bit, as the top of bit_planes.py says it."""
    packed, shift = bytearray(), 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        plane = bytearray(-(-len(levels) * width // 8))
        for index, level in enumerate(levels):
            for bit in range(width):
                at = index * width + bit
                plane[at // 8] |= (level >> (shift + bit) & 1) << at % 8
        packed += plane
        shift += width
    return bytes(packed)


@pytest.mark.parametrize("bits", range(1, 9))
@given(count=counts, seed=st.integers(0, 2**32 - 1))
def test_packing_is_the_documented_one_bit_by_bit(bits: int, count: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 2**bits, count, np.uint8)
    packed = pack(levels, bits)
    assert packed.tobytes() == reference(levels.tolist(), bits)
    assert packed.nbytes == packed_bytes(count, bits)
    for given_bytes in (packed, unaligned(packed), frozen(packed)):
        unpacked = unpack(given_bytes, count, bits)
        assert unpacked.dtype == np.uint8
        assert unpacked.tolist() == levels.tolist()
    assert pack(unaligned(levels), bits).tobytes() == packed.tobytes()


@pytest.mark.parametrize(
    ("bits", "levels", "packed"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], "8d 01"),
        (2, [1, 2, 3, 0, 3], "39 03"),
        (3, [0b101, 0b010, 0b111], "39 05"),
        (4, [1, 2, 3], "21 03"),
        (5, [0b10001, 0b01111, 0b11111], "f1 0f 05"),
        (6, [0b100001, 0b111111], "f1 0e"),
        (7, [0b1100001, 0b0011111], "f1 06 01"),
        (8, [7, 255], "07 ff"),
    ],
)
def test_packing_by_hand(bits: int, levels: list[int], packed: str) -> None:
    assert pack(np.array(levels, np.uint8), bits).tobytes() == bytes.fromhex(packed)


def test_a_level_is_cut_by_the_binary_decomposition_of_its_width() -> None:
    assert [parts(bits) for bits in range(1, 9)] == [
        (1,),
        (2,),
        (2, 1),
        (4,),
        (4, 1),
        (4, 2),
        (4, 2, 1),
        (8,),
    ]


@pytest.mark.parametrize("bits", range(1, 9))
@given(count=st.integers(1, 40))
def test_padding_is_zero_when_written_and_ignored_when_read(bits: int, count: int) -> None:
    levels = np.full(count, 2**bits - 1, np.uint8)
    packed = pack(levels, bits)
    assert int(np.unpackbits(packed).sum()) == count * bits
    start = 0
    for width in parts(bits):
        stop = start + -(-count * width // 8)
        if count * width % 8:
            packed[stop - 1] |= 0xFF << count * width % 8 & 0xFF
        start = stop
    assert unpack(packed, count, bits).tolist() == levels.tolist()


def unaligned(x: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:]


def frozen(x: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(x.tobytes(), np.uint8)
