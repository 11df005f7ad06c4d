"""Encoded tensors and parameter packs, with what they decode to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tensors.codecs import encode_exact, parse_codec
from tensors.decoding import decode
from tensors.deltas import apply_delta, encode_delta, fingerprint
from tensors.format import DTYPES, CodecId, Header, Lossless, read_header
from tensors.parameters import pack_parameters, unpack_parameters

Array = npt.NDArray[Any]
Vector = dict[str, Any]

FLOATS = ["fp32", "fp16", "bf16"]
LEVELS = ["int8", "int7", "int6", "int5", "int4", "int3", "int2", "levels12", "levels3"]
IMAGES = (2, 3, 5, 5)
DTYPE_NAMES = ("f4", "f2", "f8", "i8", "i4", "i2", "i1", "u1")


def bits_of(array: Array) -> list[str]:
    """The bits of each element in C order, most significant digit first."""
    size = array.dtype.itemsize
    big = np.ascontiguousarray(array).reshape(-1).astype(array.dtype.newbyteorder(">"))
    text = big.tobytes().hex()
    return [text[at : at + 2 * size] for at in range(0, len(text), 2 * size)]


def from_bits(bits: list[str], dtype: str, shape: list[int]) -> Array:
    """The array that `bits_of` was given."""
    raw = np.frombuffer(bytes.fromhex("".join(bits)), np.dtype(dtype).newbyteorder(">"))
    return raw.astype(dtype).reshape(shape)


def mask_of(keep: str, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """The mask of a vector's `keep`."""
    return np.array([digit == "1" for digit in keep], np.bool_).reshape(shape)


def values(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Float32 values on both sides of zero, the same everywhere."""
    numbers = np.arange(math.prod(shape), dtype=np.int64) * 7919 % 251
    return ((numbers - 100) / np.float32(32)).astype(np.float32).reshape(shape)


def sparse(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The same behind a ReLU, most of them zero."""
    x = np.maximum(values(shape), 0)
    x.reshape(-1)[np.arange(x.size) % 8 != 0] = 0
    return x


def vector(
    name: str,
    encoded: bytes,
    *,
    codec: str | None = None,
    given: Array | None = None,
    keep: Array | None = None,
) -> Vector:
    """An entry of tensors.json."""
    decoded = decode(encoded, keep=keep)
    return {
        "name": name,
        "codec": codec,
        "zstd": read_header(encoded).lossless is Lossless.ZSTD,
        "shape": list(decoded.shape),
        "dtype": DTYPE_NAMES[DTYPES.index(decoded.dtype)],
        "keep": None if keep is None else "".join("01"[int(bit)] for bit in keep.reshape(-1)),
        "encoded": encoded.hex(),
        "decoded": bits_of(decoded),
        "input": None if given is None else bits_of(given),
    }


def by_codec(name: str, codec: str, x: Array, keep: Array | None = None) -> Vector:
    """An entry that a codec made; float32 in."""
    encoded = parse_codec(codec).encode(x, keep=keep)
    return vector(f"{name}, {codec}", encoded, codec=codec, given=x, keep=keep)


def by_hand(
    top: int, shape: tuple[int, ...], side: list[float], body: bytes, **fields: Any
) -> bytes:
    """An affine tensor as no codec here makes it."""
    header = Header(
        codec=CodecId.AFFINE,
        shape=shape,
        values=fields.pop("values", math.prod(shape)),
        body_bytes=len(body),
        top=top,
        **fields,
    )
    return header.pack(np.array(side, "<f4").tobytes(), body)


def tensors() -> list[Vector]:
    """tensors.json."""
    return [*_exact(), *_codecs(), *_masked(), *_odd()]


def _exact() -> Iterator[Vector]:
    for name, dtype in zip(DTYPE_NAMES, DTYPES, strict=True):
        if dtype.kind == "f":
            x = np.array([[0, -0.0, 1.5], [-2.25, 6e4, 1 / 3]]).astype(dtype)
        else:
            ends = np.iinfo(dtype)
            x = np.array([[0, 1, 2], [ends.max, ends.min, 100]]).astype(dtype)
        yield vector(f"exact {name}", encode_exact(x))
    special = ["7f800000", "ff800000", "7fc00000", "7f800001", "80000000", "00000001", "7f7fffff"]
    yield vector("exact, special values", encode_exact(from_bits(special, "f4", [7])))
    yield vector("exact, 0-d counter", encode_exact(np.array(12345678901, np.int64)))
    for ndim in range(9):
        shape = (2, 1, 3, 2, 1, 1, 2, 1)[:ndim]
        yield vector(f"exact, ndim {ndim}", encode_exact(values(shape)))
    for shape in ((0,), (2, 0, 3), (0, 4)):
        yield vector(f"exact, empty {list(shape)}", encode_exact(values(shape)))


def _codecs() -> Iterator[Vector]:
    for codec in [*FLOATS, *LEVELS]:
        yield by_codec("both signs", codec, values(IMAGES))
        yield by_codec("behind a ReLU", f"{codec}+zstd", sparse(IMAGES))
    for codec in LEVELS:
        yield by_codec("both signs", f"{codec}+channel", values(IMAGES))
    yield by_codec("behind a ReLU", "int4+channel+zstd", sparse(IMAGES))
    yield by_codec("behind a ReLU", "int8+zstd:19", sparse(IMAGES))
    yield by_codec("both signs", "int4+stochastic", values(IMAGES))
    yield by_codec("both signs", "int3+channel+stochastic", values(IMAGES))
    for shape in ((), (7,), (3, 5), (2, 3, 4)):
        for codec in ("bf16", "int4", "int3+channel"):
            yield by_codec(f"ndim {len(shape)}", codec, values(shape))
    for shape in ((0,), (2, 0, 3), (0, 4)):
        for codec in ("fp16", "int8", "int4+channel", "int8+zstd"):
            yield by_codec(f"empty {list(shape)}", codec, values(shape))
    for codec in ("int8", "int2+channel"):
        yield by_codec("constant", codec, np.full((2, 3), -1.25, np.float32))
        yield by_codec("all zero", codec, np.zeros((2, 3), np.float32))
        yield by_codec("all positive", codec, np.abs(values((2, 3))) + 5)
    tiny = from_bits(["00000001", "807fffff", "00800000", "3f800000"], "f4", [4])
    for codec in ("int8", "fp16", "bf16"):
        yield by_codec("subnormal values", codec, tiny)


def _masked() -> Iterator[Vector]:
    x, keep = values(IMAGES), sparse(IMAGES) != 0
    for codec in LEVELS:
        yield by_codec("masked", codec, x, keep)
    yield by_codec("masked", "int4+stochastic", x, keep)
    mostly = values(IMAGES) > -3
    yield by_codec("masked", "int8+zstd", sparse(IMAGES), mostly)
    yield by_codec("masked", "int3+zstd", sparse(IMAGES), mostly)
    yield by_codec("masked, nothing kept", "int4", x, np.zeros(IMAGES, np.bool_))
    yield by_codec("masked, all kept", "int4", x, np.ones(IMAGES, np.bool_))
    yield by_codec("masked, all negative", "int4", -np.abs(x) - 1, keep)
    yield by_codec("masked, 0-d", "int4", values(()), np.ones((), np.bool_))


def _odd() -> Iterator[Vector]:
    yield vector("one bit", by_hand(1, (11,), [-1.0, 2.0], b"\xa5\x05"))
    yield vector("three bits, by hand", by_hand(7, (5,), [0.0, 0.25], b"\xb1\x02\x15"))
    yield vector(
        "per channel, one dimension", by_hand(3, (3,), [0.5, 1.0], b"\x24", per_channel=True)
    )
    yield vector("per channel, no channel", by_hand(3, (3, 0), [], b"", per_channel=True))
    # 254 · 0.1 and the sum with 0.3 are both rounded: a fused multiply-add gives other bits.
    yield vector("two roundings", by_hand(255, (4,), [0.3, 0.1], b"\x07\x31\xab\xfe"))
    yield vector("subnormal scale", by_hand(255, (3,), [0.0, 1e-42], b"\x00\x01\xff"))
    yield vector("scale zero", by_hand(255, (3,), [-3.5, 0.0], b"\x00\x01\xff"))
    keep = mask_of("0110100", (7,))
    masked = by_hand(3, (7,), [-0.5, 0.5], b"\x38", values=3, masked=True)
    yield vector("masked, by hand", masked, keep=keep)


def described(state: Mapping[str, Array]) -> list[Vector]:
    """Named arrays as parameters.json has them."""
    return [
        {
            "name": name,
            "dtype": DTYPE_NAMES[DTYPES.index(array.dtype)],
            "shape": list(array.shape),
            "decoded": bits_of(array),
        }
        for name, array in state.items()
    ]


def half(step: int = 0) -> dict[str, Array]:
    """A device's blocks and head; those of another step are a little different."""
    change = np.float32(0.01 * step)
    return {
        "blocks.0.conv.weight": values((2, 1, 3, 3)) * (1 + change),
        "blocks.0.norm.weight": np.ones(2, np.float32),
        "blocks.0.norm.bias": np.zeros(2, np.float32) - change,
        "blocks.0.norm.running_mean": values((2,)),
        "blocks.0.norm.running_var": np.array([0.5, 2.0], np.float32),
        "blocks.0.norm.num_batches_tracked": np.array(17 + step, np.int64),
        "heads.1.0.fc.weight": values((3, 2)) + change,
        "heads.1.0.fc.bias": values((3,)),
    }


def parameters() -> list[Vector]:
    """parameters.json."""
    packs = [(f"a device's half, {c}", pack_parameters(half(), codec=c)) for c in ("fp32", "int8")]
    packs.append(("half precision", pack_parameters(half(), codec="bf16")))
    packs.append(("empty", pack_parameters({})))
    packs.append(("names beyond ASCII", pack_parameters({"größe": values((2,)), "": values(())})))
    vectors = [_pack(name, pack, None) for name, pack in packs]
    for codec in ("int8", "int3+channel", "fp16"):
        delta = encode_delta(half(1), half(), parse_codec(codec), {})
        vectors.append(_pack(f"a delta, {codec}", delta.pack(), half()))
        again = encode_delta(half(2), delta.state, parse_codec(codec), delta.residual)
        vectors.append(_pack(f"the next delta, {codec}", again.pack(), delta.state))
    return vectors


def _pack(name: str, pack: bytes, base: Mapping[str, Array] | None) -> Vector:
    records = unpack_parameters(pack)
    state = records if base is None else apply_delta(base, pack)
    return {
        "name": name,
        "encoded": pack.hex(),
        "records": described(records),
        "base": None if base is None else described(base),
        "state": described(state),
        "sha256": fingerprint(state),
    }
