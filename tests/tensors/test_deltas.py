from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensors.codecs import encode_exact, parse_codec
from tensors.deltas import apply_delta, encode_delta, fingerprint, sends_deltas, whole_pack
from tensors.errors import CodecError, FormatError
from tensors.parameters import join_records, pack_parameters, unpack_parameters
from tests.tiny import assert_same

Array = npt.NDArray[Any]
CODECS = ["int8", "int8+zstd", "fp16", "bf16", "bf16+zstd"]
FP32, INT8 = parse_codec("fp32"), parse_codec("int8+zstd")
LEVELS = 255


def make_state(seed: int, scale: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "blocks.0.conv.weight": (scale * rng.standard_normal((4, 3, 3, 3))).astype(np.float32),
        "blocks.0.bn.weight": rng.standard_normal(4).astype(np.float32),
        "blocks.0.bn.num_batches_tracked": np.array(seed + 2**40),
        "heads.1.fc.weight": (scale * rng.standard_normal((5, 4))).astype(np.float32),
        "heads.1.empty": np.zeros((0, 4), np.float32),
    }


BASE, NEW = make_state(0), make_state(1)
MATRICES = {name for name, values in BASE.items() if values.ndim >= 2}


def assert_identical(actual: dict[str, Array], expected: dict[str, Array]) -> None:
    assert_same(actual, expected)
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype, name
        assert actual[name].tobytes() == values.tobytes(), name


floats = hnp.arrays(
    np.float32,
    (2, 3),
    elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False),
)


@given(
    new=floats,
    base=floats,
    lost=st.none() | floats,
    whole=hnp.arrays(np.float32, 3, elements=st.floats(width=32)),
    count=hnp.arrays(np.int64, ()),
    codec=st.sampled_from(CODECS),
)
def test_both_ends_come_to_the_same_bits(
    new: Array, base: Array, lost: Array | None, whole: Array, count: Array, codec: str
) -> None:
    held = {"b": base, "a": np.ones(3, np.float32), "n": np.array(0)}
    residual = {} if lost is None else {"b": lost}
    delta = encode_delta({"n": count, "b": new, "a": whole}, held, parse_codec(codec), residual)
    state = apply_delta(held, delta.pack())
    assert_identical(state, delta.state)
    assert fingerprint(state) == fingerprint(delta.state)
    assert state["a"].tobytes() == whole.tobytes(), "exact, NaN too"
    assert state["n"] == count


@pytest.mark.parametrize("codec", CODECS)
def test_matrices_go_as_differences_and_all_else_whole(codec: str) -> None:
    delta = encode_delta(NEW, BASE, parse_codec(codec), {})
    assert list(delta.records) == [
        "blocks.0.bn.num_batches_tracked",
        "blocks.0.bn.weight",
        "+blocks.0.conv.weight",
        "+heads.1.empty",
        "+heads.1.fc.weight",
    ]
    assert delta.residual.keys() == MATRICES
    state = apply_delta(BASE, delta.pack())
    for name in NEW.keys() - MATRICES:
        np.testing.assert_array_equal(state[name], NEW[name])
    for name in MATRICES:
        np.testing.assert_allclose(state[name] + delta.residual[name], NEW[name], atol=1e-6)
        np.testing.assert_allclose(state[name], NEW[name], atol=0.05)


@pytest.mark.parametrize("codec", ["int8+zstd", "bf16"])
def test_the_errors_of_many_updates_do_not_add_up(codec: str) -> None:
    """Twenty updates on what the receiver holds: it is off by the last one's error alone."""
    rng = np.random.default_rng(0)
    held = {"w": rng.standard_normal((16, 8)).astype(np.float32)}
    truth, residual = held["w"].astype(np.float64), dict[str, Array]()
    lossy = held["w"].copy()
    for _ in range(20):
        update = (0.1 * rng.standard_normal((16, 8))).astype(np.float32)
        truth += update
        delta = encode_delta({"w": held["w"] + update}, held, parse_codec(codec), residual)
        step = float(np.ptp(update + residual.get("w", 0)) / LEVELS)
        held, residual = apply_delta(held, delta.pack()), delta.residual
        lossy = lossy + (apply_delta({"w": 0 * lossy}, delta_of(update, codec))["w"])
        np.testing.assert_allclose(held["w"] + residual["w"], truth, atol=2e-5)
        if codec.startswith("int8"):
            assert np.abs(residual["w"]).max() <= 0.51 * step
    assert np.linalg.norm(held["w"] - truth) < 0.5 * np.linalg.norm(lossy - truth)


def delta_of(update: Array, codec: str) -> bytes:
    """Without error feedback."""
    return encode_delta({"w": update}, {"w": 0 * update}, parse_codec(codec), {}).pack()


def test_a_residual_is_sent_even_if_nothing_else_changed() -> None:
    first = encode_delta(NEW, BASE, INT8, {})
    second = encode_delta(first.state, first.state, INT8, first.residual)
    for name in MATRICES - {"heads.1.empty"}:
        before = np.abs(first.state[name] - NEW[name]).max()
        assert np.abs(second.state[name] - NEW[name]).max() < before / 50


def test_parts_of_a_delta_are_made_of_the_same_records() -> None:
    delta = encode_delta(NEW, BASE, INT8, {})
    block = {name: values for name, values in BASE.items() if name.startswith("blocks.")}
    part = apply_delta(block, delta.pack(block))
    assert_identical(part, {name: delta.state[name] for name in block})


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e5])
def test_an_array_whose_difference_the_codec_cannot_carry_goes_whole(poison: float) -> None:
    new = make_state(1)
    new["heads.1.fc.weight"][0, 0] = poison
    residual = {name: np.full(BASE[name].shape, 0.25, np.float32) for name in MATRICES}
    delta = encode_delta(new, BASE, parse_codec("fp16"), residual)
    assert "heads.1.fc.weight" in delta.records
    assert "+blocks.0.conv.weight" in delta.records
    assert "heads.1.fc.weight" not in delta.residual, "it owes nothing any more"
    state = apply_delta(BASE, delta.pack())
    assert_identical(state, delta.state)
    np.testing.assert_array_equal(state["heads.1.fc.weight"], new["heads.1.fc.weight"] + 0.25)


def test_an_array_whose_difference_is_beyond_float32_goes_whole() -> None:
    huge = np.full((2, 2), 3e38, np.float32)
    delta = encode_delta({"w": huge}, {"w": -huge}, INT8, {})
    assert list(delta.records) == ["w"]
    np.testing.assert_array_equal(apply_delta({"w": -huge}, delta.pack())["w"], huge)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_point_dtypes_stay_what_they_are(dtype: type) -> None:
    base: dict[str, Array] = {
        "w": np.linspace(0, 1, 6, dtype=dtype).reshape(2, 3),
        "b": np.ones(2, dtype),
    }
    new: dict[str, Array] = {name: (values * 1.5).astype(dtype) for name, values in base.items()}
    delta = encode_delta(new, base, INT8, {})
    state = apply_delta(base, delta.pack())
    assert_identical(state, delta.state)
    assert state["w"].dtype == state["b"].dtype == dtype


def test_strides_do_not_matter() -> None:
    strided = {n: np.asarray(values, order="F") for n, values in NEW.items()}
    delta = encode_delta(strided, BASE, INT8, {})
    assert delta.pack() == encode_delta(NEW, BASE, INT8, {}).pack()
    assert all(values.flags.c_contiguous for values in delta.residual.values())


def test_what_has_no_wire_dtype_is_named() -> None:
    state = {"mask": np.ones(3, bool)}
    with pytest.raises(CodecError, match="mask"):
        encode_delta(state, state, INT8, {})


def test_only_fp32_sends_no_deltas() -> None:
    assert not sends_deltas(parse_codec("fp32"))
    assert not sends_deltas(parse_codec("fp32+zstd"))
    assert all(sends_deltas(parse_codec(codec)) for codec in CODECS)


def test_the_fingerprint_is_of_the_whole_state_whatever_the_order() -> None:
    backwards = dict(reversed(NEW.items()))
    assert whole_pack(backwards) == pack_parameters({name: NEW[name] for name in sorted(NEW)})
    assert fingerprint(backwards) == hashlib.sha256(whole_pack(NEW)).hexdigest()
    assert fingerprint(NEW) != fingerprint(BASE)


# -- what strangers send --------------------------------------------------------------------------


def reason(pack: bytes) -> str:
    with pytest.raises(FormatError) as caught:
        apply_delta(BASE, pack)
    return caught.value.reason


def altered(changes: dict[str, bytes | None]) -> bytes:
    """A good delta with records replaced, added or left out."""
    records: dict[str, bytes | None] = dict(encode_delta(NEW, BASE, INT8, {}).records)
    records |= changes
    return join_records({name: tensor for name, tensor in records.items() if tensor is not None})


GOOD = encode_delta(NEW, BASE, INT8, {}).pack()
BAD: dict[str, tuple[dict[str, bytes | None], str]] = {
    "one less": ({"+heads.1.fc.weight": None}, "bad_name"),
    "one more": ({"blocks.9.x": FP32.encode(np.ones(1))}, "bad_name"),
    "a difference to nothing": ({"+blocks.9.x": FP32.encode(np.ones((1, 1)))}, "bad_name"),
    "a difference of a difference": ({"++heads.1.empty": FP32.encode(np.ones(0))}, "bad_name"),
    "both ways": ({"heads.1.empty": FP32.encode(BASE["heads.1.empty"])}, "bad_name"),
    "another shape": ({"+heads.1.fc.weight": FP32.encode(np.ones((4, 5)))}, "wrong_shape"),
    "a flat one": ({"+heads.1.fc.weight": FP32.encode(np.ones(20))}, "wrong_shape"),
    "half precision": (
        {"+heads.1.fc.weight": encode_exact(np.ones((5, 4), np.float16))},
        "wrong_dtype",
    ),
    "whole numbers for real ones": (
        {"blocks.0.bn.weight": encode_exact(np.ones(4, np.int32))},
        "wrong_dtype",
    ),
    "real numbers for whole ones": (
        {"blocks.0.bn.num_batches_tracked": FP32.encode(np.ones(()))},
        "wrong_dtype",
    ),
    "a difference of whole numbers": (
        {
            "blocks.0.bn.num_batches_tracked": None,
            "+blocks.0.bn.num_batches_tracked": encode_exact(np.array(1)),
        },
        "wrong_dtype",
    ),
    "far more than there is": (
        {"blocks.0.bn.num_batches_tracked": encode_exact(np.ones(10_000, np.int8))},
        "too_large",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_delta_that_does_not_fit_is_refused_with_its_reason(what: str) -> None:
    changes, expected = BAD[what]
    before = {name: values.copy() for name, values in BASE.items()}
    assert reason(altered(changes)) == expected
    assert_identical(BASE, before)


def test_a_delta_is_no_whole_state_by_mistake() -> None:
    assert unpack_parameters(GOOD).keys() != NEW.keys()


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_a_damaged_delta_is_refused_or_another_state(position: int, bit: int) -> None:
    damaged = bytearray(GOOD)
    damaged[position] ^= 1 << bit
    for pack in (bytes(damaged), GOOD[:position]):
        try:
            state = apply_delta(BASE, pack)
        except FormatError:
            continue
        assert state.keys() == BASE.keys()
        assert pack != GOOD


def test_a_delta_may_send_everything_whole() -> None:
    assert_identical(apply_delta(BASE, whole_pack(NEW)), NEW)
