"""Everything about tensors that device and coordinator share. No network traffic, no clock."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tensors.averaging import Averager
from tensors.calibration import Curve, for_accuracy, for_offload_rate, offload_curve
from tensors.codecs import Codec, encode_exact, parse_codec
from tensors.decoding import decode, decode_torch
from tensors.deltas import apply_delta, encode_delta
from tensors.errors import (
    AveragingError,
    CodecError,
    DataError,
    ExitRuleError,
    FormatError,
    NetworkError,
    ProgramError,
    TensorsError,
)
from tensors.exit_rules import ExitRule, confidence, exits, softmax
from tensors.format import Header, Limits, read_header
from tensors.parameters import pack_parameters, unpack_parameters
from tensors.partition import partition
from tensors.rate import RateController

if TYPE_CHECKING:
    from tensors.batches import BatchStream
    from tensors.datasets import Dataset, load_dataset
    from tensors.networks import CutNetwork, NetworkSpec, build_network

__all__ = [
    "Averager",
    "AveragingError",
    "BatchStream",
    "Codec",
    "CodecError",
    "Curve",
    "CutNetwork",
    "DataError",
    "Dataset",
    "ExitRule",
    "ExitRuleError",
    "FormatError",
    "Header",
    "Limits",
    "NetworkError",
    "NetworkSpec",
    "ProgramError",
    "RateController",
    "TensorsError",
    "apply_delta",
    "build_network",
    "confidence",
    "decode",
    "decode_torch",
    "encode_delta",
    "encode_exact",
    "exits",
    "for_accuracy",
    "for_offload_rate",
    "load_dataset",
    "offload_curve",
    "pack_parameters",
    "parse_codec",
    "partition",
    "read_header",
    "softmax",
    "unpack_parameters",
]

# Modules that need torch, or more than numpy, load when one of their names is first asked for.
_LAZY = {
    "BatchStream": "tensors.batches",
    "CutNetwork": "tensors.networks",
    "Dataset": "tensors.datasets",
    "NetworkSpec": "tensors.networks",
    "build_network": "tensors.networks",
    "load_dataset": "tensors.datasets",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
