"""What fuzzing starts from: real encodings and messages, and whatever failed once.

``tests/fuzz/corpus/`` holds a folder of each kind. ``python -m tests.fuzz.seeds``, from the root of
the repository, writes the files named ``made-*`` again, after a change of the format; all others
are past failures and stay. In a folder ``messages`` a file begins with its topic and a line feed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tensors.codecs import encode_exact, parse_codec
from tensors.format import DTYPES
from tensors.parameters import pack_parameters
from tests.vectors.make import read

FOLDER = Path(__file__).parent / "corpus"
CODECS = (
    *("fp32", "fp16", "bf16", "int8", "int4", "int3", "int2", "levels3", "levels100"),
    *("int8+channel", "int4+channel", "levels5+channel"),
)
SHAPES: tuple[tuple[int, ...], ...] = ((2, 3, 4, 4), (7,), (), (0, 5), (3, 40))


def corpus(kind: str) -> list[bytes]:
    """All files of a kind: ``tensors``, ``packs`` or ``messages``."""
    return [file.read_bytes() for file in sorted((FOLDER / kind).iterdir())]


def _tensors() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        x = np.asarray(np.maximum(rng.standard_normal(shape), 0), np.float32)
        sizes = "x".join(map(str, shape)) or "scalar"
        for name in CODECS:
            yield f"{sizes}-{name}", parse_codec(name).encode(x)
        if len(shape) == 4:
            for name in CODECS:
                yield f"{sizes}-{name}-zstd", parse_codec(name + "+zstd").encode(np.round(x))
        for name in ("int8", "int3+zstd"):
            data = parse_codec(name).encode(
                np.asarray(x - np.float32(0.5)), keep=np.asarray(x != 0)
            )
            yield f"{sizes}-{name}-masked", data
    for dtype in DTYPES:
        yield f"exact-{dtype.name}", encode_exact(np.arange(6).astype(dtype).reshape(2, 3))


def _packs() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(1)
    state = {
        "blocks.0.conv.weight": rng.standard_normal((2, 3, 3, 3)).astype(np.float32),
        "blocks.0.norm.running_mean": np.zeros(4, np.float32),
        "blocks.0.norm.num_batches_tracked": np.array(9),
    }
    for name in ("fp32", "fp16", "int8+channel", "int4+zstd"):
        yield name, pack_parameters(state, codec=name)
    yield "empty", pack_parameters({})
    yield "one", pack_parameters({"ä": np.zeros((0, 2), np.float32)})


def _messages() -> Iterator[tuple[str, bytes]]:
    for vector in read("messages"):
        name = vector["name"].replace("/", "-").replace(", ", "-").replace(" ", "_")
        yield name, vector["topic"].encode() + b"\n" + bytes.fromhex(vector["encoded"])


if __name__ == "__main__":
    for kind, made in (("tensors", _tensors()), ("packs", _packs()), ("messages", _messages())):
        (FOLDER / kind).mkdir(parents=True, exist_ok=True)
        for old in (FOLDER / kind).glob("made-*"):
            old.unlink()
        for name, data in made:
            (FOLDER / kind / f"made-{name}").write_bytes(data)
