"""Parameter updates as differences to a version that the receiver holds, with error feedback.

A delta is a parameter pack (`tensors.parameters`) whose records lie in order of their names:

- `+NAME`: the difference of array NAME, in any codec: the receiver adds it to what it holds, in
  float32. Floating point arrays of two or more dimensions go like this, where the codec can carry
  their difference.
- `NAME`: the array itself, exact. Everything else goes like this: biases, BatchNorm's parameters
  and statistics, integers.

Every array of the receiver's part is in the pack exactly once. What quantization took from a
difference, the residual, is added to the next one (error feedback; Seide et al. 2014,
Interspeech, "1-bit stochastic gradient descent"), so the errors of many updates do not add up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tensors.codecs import Codec, encode_exact, parse_codec
from tensors.decoding import decode
from tensors.errors import CodecError, FormatError
from tensors.format import Buffer, Limits
from tensors.parameters import join_records, pack_parameters, unpack_parameters

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

DIFFERENCE = "+"
"""Begins the name of a record that is a difference."""

_FP32 = parse_codec("fp32")


@dataclass(frozen=True, slots=True)
class Delta:
    """An update, encoded."""

    records: dict[str, bytes]
    """Encoded tensors by record name, in order of the arrays' names."""
    state: dict[str, Array]
    """What `apply_delta` makes of it; what went whole may share memory with the caller's."""
    residual: dict[str, Array]
    """What quantization lost, float32, by array name; for the next `encode_delta`."""

    def pack(self, names: Container[str] | None = None) -> bytes:
        """The pack, of these arrays only if they are given."""
        return join_records(
            {
                record: tensor
                for record, tensor in self.records.items()
                if names is None or record.removeprefix(DIFFERENCE) in names
            }
        )


def sends_deltas(codec: Codec) -> bool:
    """Whether parameters go as differences in this codec; in `fp32` they go whole and exact."""
    return codec.name.partition("+")[0] != "fp32"


def encode_delta(new: Arrays, base: Arrays, codec: Codec, residual: Arrays) -> Delta:
    """The update from `base` to `new`, of the same names, shapes and dtypes.

    `residual` is the last delta's, or empty. An array whose difference the codec cannot carry (NaN,
    infinity, out of range) goes whole, and nothing of it is lost. Raises CodecError for an array
    that cannot be sent at all, naming it.
    """
    records: dict[str, bytes] = {}
    state: dict[str, Array] = {}
    left: dict[str, Array] = {}
    for name in sorted(new):
        value, held, lost = new[name], base[name], residual.get(name)
        assert value.shape == held.shape
        assert not name.startswith(DIFFERENCE)
        tensor = _encode_difference(value, held, lost, codec)
        if tensor is not None:
            records[DIFFERENCE + name] = tensor
            state[name] = _add(held, decode(tensor))
            left[name] = _difference(value, state[name], lost)
            continue
        if lost is not None:
            value = (value + lost).astype(value.dtype)
        try:
            records[name] = _FP32.encode(value) if value.dtype.kind == "f" else encode_exact(value)
        except CodecError as error:
            raise CodecError(f"parameter {name}: {error}") from error
        state[name] = value
    return Delta(records, state, left)


def apply_delta(base: Arrays, pack: Buffer) -> dict[str, Array]:
    """What `base` becomes, with its names, shapes and dtypes.

    Raises FormatError, with nothing applied: the reasons of `unpack_parameters`, `bad_name` (an
    array that `base` does not have, one that is missing or comes twice), `wrong_shape` and
    `wrong_dtype` (floating point must come as float32, all else as it is, and not as a difference).
    """
    state: dict[str, Array] = {}
    names = base.keys() | {DIFFERENCE + name for name in base}
    for record, value in unpack_parameters(pack, limits=_limits(base), names=names).items():
        name = record.removeprefix(DIFFERENCE)
        held = base.get(name)
        if held is None or name in state:
            what = "comes twice" if name in state else "is not among those held"
            raise FormatError("bad_name", f"parameter {name!r} {what}")
        if value.shape != held.shape:
            raise FormatError(
                "wrong_shape", f"parameter {name!r} has shape {value.shape}, not {held.shape}"
            )
        is_float, is_difference = held.dtype.kind == "f", record != name
        wanted = np.dtype(np.float32) if is_float else held.dtype
        if value.dtype != wanted or (is_difference and not is_float):
            raise FormatError(
                "wrong_dtype", f"record {record!r} has dtype {value.dtype}, parameter {held.dtype}"
            )
        state[name] = _add(held, value) if is_difference else value.astype(held.dtype, copy=False)
    if missing := sorted(base.keys() - state.keys()):
        raise FormatError("bad_name", f"missing parameters: {', '.join(missing[:3])}")
    return state


def whole_pack(state: Arrays) -> bytes:
    """The one pack that stands for a state: every array exact, in order of their names."""
    return pack_parameters({name: state[name] for name in sorted(state)})


def fingerprint(state: Arrays) -> str:
    """SHA-256 of the state's `whole_pack`, in hexadecimal: the same however the state arrived."""
    return hashlib.sha256(whole_pack(state)).hexdigest()


def _encode_difference(value: Array, held: Array, lost: Array | None, codec: Codec) -> bytes | None:
    """None for what goes whole."""
    if value.dtype.kind != "f" or value.ndim < 2:
        return None
    try:
        return codec.encode(_difference(value, held, lost))
    except CodecError:
        return None


def _difference(value: Array, held: Array, lost: Array | None) -> Array:
    """value − held + lost, float32, C-contiguous."""
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.subtract(_float32(value), _float32(held), order="C")
        if lost is not None:
            difference += lost
    return difference


def _add(held: Array, difference: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(_float32(held) + difference).astype(held.dtype, copy=False)


def _float32(values: Array) -> npt.NDArray[np.float32]:
    return values.astype(np.float32, copy=False)


def _limits(base: Arrays) -> Limits:
    # A decoder takes no dimension to be less than one.
    sizes = [math.prod(max(dim, 1) for dim in values.shape) for values in base.values()]
    widths = [max(values.itemsize, 4) for values in base.values()]
    return Limits(
        max_elements=sum(sizes),
        max_bytes=sum(size * width for size, width in zip(sizes, widths, strict=True)),
    )
