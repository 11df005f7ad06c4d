from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensors import CodecError, FormatError, Limits, decode, pack_parameters, unpack_parameters
from tensors.codecs import encode_exact, parse_codec

STATE: dict[str, npt.NDArray[Any]] = {
    "blocks.0.conv.weight": np.linspace(-1, 1, 54, dtype=np.float32).reshape(2, 3, 3, 3),
    "blocks.0.bn.num_batches_tracked": np.array(2**53 + 1, np.int64),
    "heads.1.größe": np.array([], np.float32),
}


def record(name: bytes, tensor: bytes) -> bytes:
    return struct.pack("<H", len(name)) + name + struct.pack("<Q", len(tensor)) + tensor


def pack(*records: bytes, count: int | None = None) -> bytes:
    return struct.pack("<I", len(records) if count is None else count) + b"".join(records)


def reason(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        unpack_parameters(data, limits=limits or Limits())
    return caught.value.reason


ONE = encode_exact(np.ones(4, np.float32))

states = st.dictionaries(
    st.text(max_size=20).filter(lambda s: s.isprintable()),
    st.one_of(
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)),
        hnp.arrays(np.int64, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)),
    ),
    max_size=5,
)


@given(states, st.sampled_from(["fp32", "fp32+zstd"]))
def test_fp32_pack_comes_back_bit_for_bit_in_order(
    state: dict[str, npt.NDArray[Any]], codec: str
) -> None:
    back = unpack_parameters(pack_parameters(state, codec=codec))
    assert list(back) == list(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert back[name].tobytes() == value.tobytes()
        assert back[name].flags.writeable


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "int8+zstd"])
def test_lossy_pack_keeps_integers_and_decodes_like_the_codec(codec: str) -> None:
    back = unpack_parameters(memoryview(pack_parameters(STATE, codec=codec)))
    counter = back["blocks.0.bn.num_batches_tracked"]
    assert (counter.dtype, counter.shape, int(counter)) == (np.dtype(np.int64), (), 2**53 + 1)
    weight = STATE["blocks.0.conv.weight"]
    np.testing.assert_array_equal(
        back["blocks.0.conv.weight"], decode(parse_codec(codec).encode(weight))
    )


def test_error_names_the_parameter_that_cannot_be_sent() -> None:
    with pytest.raises(CodecError, match=r"blocks\.3\.w: int8: .* not finite"):
        pack_parameters({"blocks.3.w": np.array([np.nan])}, codec="int8")
    with pytest.raises(CodecError, match=r"blocks\.3\.w: .* dtype"):
        pack_parameters({"blocks.3.w": np.array(["text"])})
    with pytest.raises(CodecError, match="70000"):
        pack_parameters({"n" * 70_000: np.zeros(1)})


def test_every_truncation_is_refused() -> None:
    data = pack_parameters(STATE)
    assert {reason(data[:cut]) for cut in range(len(data))} == {"truncated"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (pack(record(b"a", ONE)) + b"\0", "trailing_bytes"),
        (pack(record(b"a", ONE), record(b"a", ONE)), "bad_name"),
        (pack(record(b"\xff\xfe", ONE)), "bad_name"),
        (pack(record(b"a", ONE), count=2**32 - 1), "truncated"),
        (pack(record(b"a", ONE), count=0), "trailing_bytes"),
        (pack(record(b"a", ONE + b"\0")), "trailing_bytes"),
        (pack(record(b"a", b"")), "truncated"),
        (pack(b"\1\0a" + b"\xff" * 8 + ONE), "truncated"),
    ],
)
def test_hostile_pack_is_refused_with_its_reason(data: bytes, expected: str) -> None:
    assert reason(data) == expected


def test_limits_hold_for_all_tensors_together() -> None:
    data = pack(*(record(bytes([65 + i]), ONE) for i in range(3)))
    assert len(unpack_parameters(data, limits=Limits(12, 48))) == 3
    assert reason(data, Limits(11, 48)) == "too_large"
    assert reason(data, Limits(12, 47)) == "too_large"


def test_pack_of_many_small_bombs_is_refused_within_the_limit() -> None:
    zeros = parse_codec("int8+zstd").encode(np.zeros((1, 1, 250_000), np.float32))
    assert len(zeros) < 200
    data = pack(*(record(str(i).encode(), zeros) for i in range(100)))
    tracemalloc.start()
    try:
        assert reason(data, Limits(max_elements=1_000_000)) == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()
