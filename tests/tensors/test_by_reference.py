from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensors.by_reference import TensorReference, encode_by_reference
from tensors.codecs import parse_codec
from tensors.decoding import decode, decode_torch, nonzero, relu_mask
from tensors.errors import CodecError, FormatError
from tensors.format import Limits, read_header

FP32 = parse_codec("fp32")
SHAPES = st.lists(st.integers(0, 5), max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def make(shape: list[int], dtype: torch.dtype, *, channels_last: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator).relu().to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


@given(SHAPES, DTYPES, st.booleans(), st.booleans())
def test_it_is_the_bytes_that_the_codec_makes(
    shape: list[int], dtype: torch.dtype, channels_last: bool, wanted: bool
) -> None:
    x = make(shape, dtype, channels_last=channels_last)
    data, reference = FP32.encode(x), encode_by_reference(FP32, x)
    assert isinstance(reference, TensorReference)
    assert bytes(reference) == data
    assert len(reference) == len(data)
    assert read_header(reference) == read_header(data)
    np.testing.assert_array_equal(decode(reference), decode(data))
    np.testing.assert_array_equal(nonzero(reference), nonzero(data))
    mask, expected = relu_mask(reference), relu_mask(data)
    assert mask is not None
    assert expected is not None
    np.testing.assert_array_equal(mask, expected)
    opened = decode_torch(reference, channels_last=wanted)
    from_bytes = decode_torch(data, channels_last=wanted)
    assert torch.equal(opened.float(), from_bytes)
    laid_out = torch.channels_last if wanted and x.dim() == 4 else torch.contiguous_format
    assert opened.is_contiguous(memory_format=laid_out)


def test_it_is_opened_at_no_cost() -> None:
    x = make([2, 3, 4, 4], torch.bfloat16, channels_last=True)
    opened = decode_torch(encode_by_reference(FP32, x), channels_last=True)
    assert opened.data_ptr() == x.data_ptr()
    assert opened.dtype is torch.bfloat16


def test_nothing_that_is_learnt_flows_through_it() -> None:
    x = make([2, 2], torch.float32).requires_grad_()
    assert not decode_torch(encode_by_reference(FP32, x)).requires_grad


@pytest.mark.parametrize("name", ["fp16", "bf16", "int4+zstd", "fp32+zstd"])
def test_what_loses_something_is_really_encoded(name: str) -> None:
    x, codec = make([2, 3], torch.float32), parse_codec(name)
    assert encode_by_reference(codec, x, seed=3) == codec.encode(x, seed=3)


def test_arrays_and_masked_tensors_are_really_encoded() -> None:
    x, codec = make([2, 3], torch.float32), parse_codec("int4")
    keep = (x > 0).numpy()
    assert encode_by_reference(FP32, x.numpy()) == FP32.encode(x)
    assert encode_by_reference(codec, x, keep=keep) == codec.encode(x, keep=keep)
    assert encode_by_reference(codec, x, keep=keep) != codec.encode(x)


def test_limits_hold_for_it_too() -> None:
    reference = encode_by_reference(FP32, make([4, 4], torch.float32))
    for limits in (Limits(max_elements=15), Limits(max_bytes=63), Limits(max_ndim=1)):
        with pytest.raises(FormatError):
            decode_torch(reference, limits=limits)


def test_what_cannot_be_sent_cannot_be_referred_to() -> None:
    for x in (torch.zeros(2, dtype=torch.int64), torch.zeros([1] * 9)):
        with pytest.raises(CodecError):
            encode_by_reference(FP32, x)
