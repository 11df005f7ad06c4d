"""Where one map, bfloat16 or a range without clipping is treated apart, nothing comes out apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensors import CodecError
from tensors.affine import Affine, fit, values_of
from tensors.affine_torch import values_of as values_of_tensor
from tests.tensors.arrays import torch_layouts


def ends(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


any_float32 = st.floats(width=32)
near_zero = st.sampled_from([2.0**-10, 2.0**-123]).flatmap(lambda x: st.floats(-x, x, width=32))


@given(low=any_float32 | near_zero, high=any_float32 | near_zero, top=st.integers(1, 255))
def test_one_map_is_fitted_as_many_are(low: float, high: float, top: int) -> None:
    lows, highs = ends(*[min(low, high)] * 2), ends(*[max(low, high)] * 2)
    try:
        expected = fit(lows, highs, top)
    except CodecError:
        with pytest.raises(CodecError):
            fit(lows[:1], highs[:1], top)
        return
    got = fit(lows[:1], highs[:1], top)
    assert got.offset.tobytes() == expected.offset[:1].tobytes()
    assert got.scale.tobytes() == expected.scale[:1].tobytes()
    assert got.inverse().tobytes() == expected.inverse()[:1].tobytes()
    assert (got.offset.dtype, got.scale.dtype) == (np.float32, np.float32)


@given(offset=any_float32, scale=any_float32 | near_zero, top=st.integers(1, 255))
def test_one_map_is_valid_where_each_of_two_is(offset: float, scale: float, top: int) -> None:
    one, two = (Affine(ends(*[offset] * n), ends(*[scale] * n), top, clips=False) for n in (1, 2))
    assert one.is_valid() == two.is_valid()


@given(low=st.floats(-1e6, 0, width=32), high=st.floats(0, 1e6, width=32), top=st.integers(2, 255))
def test_where_nothing_is_clipped_nothing_lies_beyond_the_levels(
    low: float, high: float, top: int
) -> None:
    affine = fit(ends(low), ends(high), top)
    x = np.linspace(low, high, 1000, dtype=np.float32).clip(low, high)
    clipping = dataclasses.replace(affine, clips=True)
    values = values_of(x)
    plain, clipped = (values.quantize(a, None, channel_major=False) for a in (affine, clipping))
    np.testing.assert_array_equal(plain, clipped)


@given(
    bits=hnp.arrays(np.uint16, st.tuples(*[st.integers(1, 3)] * 4)),
    per_channel=st.booleans(),
)
def test_the_range_of_bfloat16_is_that_of_its_float32(
    bits: npt.NDArray[np.uint16], per_channel: bool
) -> None:
    t = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    expected = values_of(t.float().numpy()).range(per_channel=per_channel)
    for same in torch_layouts(t):
        found = values_of_tensor(same).range(per_channel=per_channel)
        if t.isnan().any():  # which end says so is not defined
            assert np.isnan(np.concatenate(found)).any()
        else:
            np.testing.assert_array_equal(found, expected)
