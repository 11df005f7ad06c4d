from __future__ import annotations

import subprocess
import sys

import pytest

import tensors

NUMPY_ONLY = [
    "tensors",
    "tensors.affine",
    "tensors.averaging",
    "tensors.calibration",
    "tensors.clipping",
    "tensors.codecs",
    "tensors.deltas",
    "tensors.errors",
    "tensors.exit_rules",
    "tensors.floats",
    "tensors.format",
    "tensors.lossless",
    "tensors.bit_planes",
    "tensors.parameters",
    "tensors.partition",
    "tensors.probabilities",
]


def test_public_names_are_sorted_and_resolve() -> None:
    assert tensors.__all__ == sorted(tensors.__all__)
    assert len(set(tensors.__all__)) == len(tensors.__all__)
    for name in tensors.__all__:
        assert getattr(tensors, name).__name__ == name or name == "ExitRule"


def test_partition_is_the_function_whichever_is_imported_first() -> None:
    program = "import tensors.partition, tensors; from tensors import partition; partition.__code__"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tensors.nothing  # noqa: B018


@pytest.mark.parametrize("module", NUMPY_ONLY)
def test_a_device_without_torch_can_import(module: str) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        f"import {module}\n"
        "import numpy as np\n"
        "from tensors import decode, parse_codec\n"
        "assert decode(parse_codec('int3+channel+zstd').encode(np.ones((2, 3)))).all()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
