"""The lossless stage: one zstd frame, made and opened within stated bounds."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import zstandard

from tensors.errors import FormatError

DEFAULT_LEVEL = 1
MAX_LEVEL = 19


BLOCK_BYTES = 16 << 10


def compress(body: npt.NDArray[np.uint8], level: int, *, alike: bool) -> bytes:
    """One zstd frame of a C-contiguous array, stating its content size.

    Unless the whole body is `alike`, every `BLOCK_BYTES` get an entropy code of their own, which
    pays where the channels of a tensor, each in one piece, differ.
    """
    compressor = _compressor(level)
    data = memoryview(body.data).cast("B")
    if alike or len(data) <= BLOCK_BYTES:
        return compressor.compress(data)
    stream = compressor.compressobj(size=len(data))
    parts = []
    for start in range(0, len(data), BLOCK_BYTES):
        if start:
            parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        parts.append(stream.compress(data[start : start + BLOCK_BYTES]))
    parts.append(stream.flush())
    return b"".join(parts)


def decompress(frame: memoryview, raw_bytes: int) -> npt.NDArray[np.uint8]:
    """The content of `frame`, shape (raw_bytes,), read-only; it must be exactly so long.

    Raises FormatError `bad_body`; a frame that states another size is refused before memory is
    taken.
    """
    try:
        stated = zstandard.get_frame_parameters(frame).content_size
        if stated != raw_bytes:
            raise FormatError(
                "bad_body", f"zstd frame states {stated} bytes, the shape needs {raw_bytes}"
            )
        raw = _decompressor().decompress(
            frame, max_output_size=raw_bytes, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise FormatError("bad_body", f"corrupt zstd frame: {error}") from error
    if len(raw) != raw_bytes:
        raise FormatError("bad_body", f"zstd frame held {len(raw)} of {raw_bytes} bytes")
    return np.frombuffer(raw, np.uint8)


# zstandard's objects cost more to make than a small tensor to compress, and are not thread-safe.
_per_thread = threading.local()


def _compressor(level: int) -> zstandard.ZstdCompressor:
    known: dict[int, zstandard.ZstdCompressor] = _per_thread.__dict__.setdefault("compressors", {})
    if level not in known:
        parameters = zstandard.ZstdCompressionParameters.from_level(level)
        if level == DEFAULT_LEVEL:
            # Levels repeat by chance more often than by structure: to search for matches costs time
            # and bytes, so it is all but turned off. Measured in docs/benchmarks.md.
            parameters = zstandard.ZstdCompressionParameters.from_level(
                level, min_match=7, hash_log=6
            )
        known[level] = zstandard.ZstdCompressor(compression_params=parameters)
    return known[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    if "decompressor" not in _per_thread.__dict__:
        _per_thread.decompressor = zstandard.ZstdDecompressor()
    known: zstandard.ZstdDecompressor = _per_thread.decompressor
    return known
