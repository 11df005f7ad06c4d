"""``splitfleet bench codec``: bits, error and speed of every codec, beside a plain encoder.

The tensors are activations and gradients at the cuts of a network trained here. Speeds are those of
one thread, beside two copies: of the same tensor, measured in turn, most of it within the cache;
and of a buffer that no cache holds, at the speed of the memory.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from ops import bench_rows
from ops.bench_codec_tables import append_tables, draw, speed_verdicts, tables
from ops.bench_reference import (
    REFERENCE_BITS,
    Point,
    compare,
    decode_reference,
    encode_reference,
    entropy,
    relative_error,
)
from ops.codec_samples import Sample, collect
from ops.errors import SettingsWrong
from tensors.bit_planes import unpack
from tensors.codecs import Codec, parse_codec
from tensors.decoding import decode_torch, nonzero
from tensors.format import CodecId, read_body, read_header

CUTS = (1, 2, 3, 4, 5, 6, 7)
RATES = ("levels3", "int2", "int3", "int4", "int5", "int6", "int8")
"""What rate–error curves are drawn through, each with the lossless stage."""
CODECS = (
    *("fp16", "bf16", "int8", "int4", "int3", "int2", "int8+channel", "int4+channel"),
    *("fp16+zstd", "bf16+zstd"),
    *(f"{name}+zstd" for name in reversed(RATES)),
    *(f"{name}+channel+zstd" for name in reversed(RATES)),
)
STOCHASTIC = tuple(f"int{bits}+stochastic{zstd}" for zstd in ("", "+zstd") for bits in (8, 4, 3, 2))
"""For gradients, beside the others."""
MEMORY_COPY_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One codec on one tensor, with what it made of it."""

    sample: Sample
    codec: Codec
    keep: npt.NDArray[np.bool_] | None
    """Which entries are sent, bool, of the tensor's shape; None for all."""
    data: bytes

    @property
    def label(self) -> str:
        """The codec's name, and whether entries are left out."""
        return self.codec.name + (", masked" if self.keep is not None else "")


def run_bench(
    codecs: Sequence[str] | None = None,
    *,
    cuts: Sequence[int] = CUTS,
    dataset: str = "fashion-mnist-small",
    data_root: Path | None = None,
    width: int = 16,
    train_batches: int = 3000,
    batch_size: int = 32,
    repetitions: int = 15,
    seed: int = 0,
    append: Path | None = None,
    plot: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure every codec (default: all) on activations and gradients at ``cuts``.

    The result, ready for JSON: where and on what it was measured, ``rows`` (one per tensor and
    codec), ``reference`` (one per tensor and number of bits), ``comparisons`` (the same, with the
    bits our curves take at that error) and ``speeds`` (the wanted ones). Printed to standard error
    unless ``quiet``; appended to ``append`` as Markdown, drawn to ``plot`` as SVG, if given.

    Raises:
        SettingsWrong: a number is too small.
        CodecError, NetworkError, DataError: a codec, cut or data set that does not exist.
        DiskTrouble: a file cannot be written.
    """
    if min(train_batches, repetitions) < 1 or batch_size < 2:
        raise SettingsWrong(
            "--train-batches and --repetitions must be at least 1, --batch-size at least 2"
        )
    wide = Console(stderr=True, quiet=quiet)
    console = wide if wide.is_terminal else Console(stderr=True, quiet=quiet, width=150)
    chosen = [parse_codec(name) for name in (codecs or CODECS)]
    for_gradients = [*chosen, *(parse_codec(name) for name in STOCHASTIC if codecs is None)]

    def progress(batch: int, loss: float) -> None:
        if (batch + 1) % 500 == 0:
            console.print(f"batch {batch + 1}/{train_batches}, loss {loss:.3f}")

    trained = collect(
        dataset=dataset,
        data_root=data_root,
        width=width,
        train_batches=train_batches,
        cuts=cuts,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    console.print(f"accuracy on the test images {trained.accuracy:.3f}; {trained.compute}")
    rows: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    with _one_thread():
        memory_copy = _memory_copy(repetitions)
        for sample in trained.samples:
            cases = list(_cases(sample, chosen if sample.kind == "activation" else for_gradients))
            speeds = _speeds(sample, cases, repetitions)
            rows += [
                _quality(case) | speed | {"memory_copy": memory_copy}
                for case, speed in zip(cases, speeds, strict=True)
            ]
            references += [_reference(sample, bits) for bits in REFERENCE_BITS]
            console.print(f"{sample.kind} at cut {sample.cut}: {len(cases)} codecs")
    result: dict[str, Any] = {
        "date": bench_rows.today(),
        "machine": bench_rows.machine(),
        "commit": bench_rows.commit(),
        "network": f"resnet18, width {width}",
        "dataset": dataset,
        "train_batches": train_batches,
        "batch_size": batch_size,
        "compute": trained.compute,
        "accuracy": trained.accuracy,
        "rows": rows,
        "reference": references,
        "comparisons": _comparisons(rows, references),
        "speeds": speed_verdicts(rows),
    }
    for title, header, cells in tables(result):
        bench_rows.show(title, header, cells, console)
    if append is not None:
        append_tables(append, result)
    if plot is not None:
        draw(plot, result)
    return result


def parse_cuts(text: str) -> tuple[int, ...]:
    """``1,2,3`` → (1, 2, 3), in rising order; raises ``SettingsWrong``."""
    try:
        return tuple(sorted({int(cut) for cut in text.split(",")}))
    except ValueError:
        raise SettingsWrong(f"--cuts {text!r}: write cut layers like 1,2,3") from None


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cases(sample: Sample, codecs: Sequence[Codec]) -> Iterator[Case]:
    """Every codec; a gradient also without what lies behind activations that decode to zero."""
    for codec in codecs:
        yield Case(sample, codec, None, codec.encode(sample.tensor))
        if sample.kind == "gradient" and codec.kind is CodecId.AFFINE and not codec.per_channel:
            plain = dataclasses.replace(codec, stochastic=False)
            keep = nonzero(plain.encode(sample.activation))
            yield Case(sample, codec, keep, codec.encode(sample.tensor, keep=keep))


def _quality(case: Case) -> dict[str, Any]:
    """What does not depend on the clock; sizes count header and maps."""
    sample, header = case.sample, read_header(case.data)
    x = sample.plain().numpy()
    decoded = decode_torch(case.data, keep=case.keep).numpy()
    whole = by_channel = None
    if header.codec is CodecId.AFFINE:
        levels = unpack(read_body(case.data, header), header.values, header.bits)
        index = np.arange(x.shape[1]).reshape(-1, *(1,) * (x.ndim - 2))
        channel = np.broadcast_to(index, x.shape)
        channel = channel.reshape(-1) if case.keep is None else channel[case.keep]
        share = header.values / x.size
        whole, by_channel = share * entropy(levels), share * entropy(levels, channel)
    return {
        "kind": sample.kind,
        "cut": sample.cut,
        "codec": case.codec.name,
        "masked": case.keep is not None,
        "label": case.label,
        "sent": header.values / x.size,
        "bits": 8 * len(case.data) / x.size,
        "error": relative_error(x, decoded),
        "error_behind_relu": _error_behind_relu(sample, decoded),
        "entropy": whole,
        "entropy_channel": by_channel,
    }


def _error_behind_relu(sample: Sample, decoded: npt.NDArray[Any]) -> float | None:
    """Of a gradient: the error where the activation is not zero; the rest has no effect."""
    if sample.kind == "activation":
        return None
    matters = (sample.activation != 0).numpy()
    return relative_error(sample.plain().numpy(), decoded, matters)


def _reference(sample: Sample, bits: int) -> dict[str, Any]:
    x = sample.plain().numpy()
    data = encode_reference(x, bits)
    decoded = decode_reference(data, x.shape, bits)
    return {
        "kind": sample.kind,
        "cut": sample.cut,
        "reference_bits": bits,
        "bits": 8 * len(data) / x.size,
        "error": relative_error(x, decoded),
        "error_behind_relu": _error_behind_relu(sample, decoded),
    }


def _memory_copy(repetitions: int) -> float:
    """GB/s of a copy of `MEMORY_COPY_BYTES`; median."""
    source = np.ones(MEMORY_COPY_BYTES, np.uint8)
    target = np.ones_like(source)
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return source.nbytes / statistics.median(seconds) / 1e9


def _speeds(sample: Sample, cases: Sequence[Case], repetitions: int) -> list[dict[str, float]]:
    """GB/s of the values as float32, for each case; the copy is that of the same float32 bytes.

    Each repetition times everything once, right after a call that is not timed; medians.
    ``encode`` is from the memory layout and precision of training, ``encode_plain`` from contiguous
    float32; ``decode`` is into the layout of training, ``decode_plain`` into contiguous float32.
    """
    plain = sample.plain()
    source, target = plain.numpy(), np.empty_like(plain.numpy())
    in_order = sample.tensor.is_contiguous()
    calls: list[Callable[[], Any]] = [lambda: np.copyto(target, source)]
    for case in cases:
        calls += _calls(case, plain, channels_last=not in_order)
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repetitions):
        for call, measured in zip(calls, seconds, strict=True):
            call()
            started = time.perf_counter()
            call()
            measured.append(time.perf_counter() - started)
    copy, *rest = (source.nbytes / statistics.median(measured) / 1e9 for measured in seconds)
    names = ("encode", "encode_plain", "decode", "decode_plain")
    return [
        dict(zip(names, rest[4 * index : 4 * index + 4], strict=True)) | {"copy": copy}
        for index in range(len(cases))
    ]


def _calls(case: Case, plain: torch.Tensor, *, channels_last: bool) -> list[Callable[[], Any]]:
    codec, keep, data = case.codec, case.keep, case.data
    return [
        lambda: codec.encode(case.sample.tensor, keep=keep),
        lambda: codec.encode(plain, keep=keep),
        lambda: decode_torch(data, keep=keep, channels_last=channels_last),
        lambda: decode_torch(data, keep=keep),
    ]


def _comparisons(
    rows: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Our bits at each reference point's error: of whole tensors, and of gradients masked.

    A masked gradient is compared by the error behind the ReLU.
    """
    found = []
    for reference in references:
        kind, cut = reference["kind"], reference["cut"]
        here = [row for row in rows if (row["kind"], row["cut"]) == (kind, cut)]
        for masked in (False, True) if kind == "gradient" else (False,):
            error = "error_behind_relu" if masked else "error"
            suffixes = ("+zstd",) if masked else ("+zstd", "+channel+zstd")
            curves = [
                [
                    Point(row["bits"], row[error])
                    for row in here
                    if row["masked"] is masked and row["codec"] in {n + suffix for n in RATES}
                ]
                for suffix in suffixes
            ]
            if not any(curves):
                continue
            compared = compare(curves, Point(reference["bits"], reference[error]))
            found.append(
                {
                    "kind": kind,
                    "cut": cut,
                    "masked": masked,
                    "reference_bits": reference["reference_bits"],
                    "reference": reference["bits"],
                    "error": reference[error],
                    "ours": compared.bits,
                    "ratio": compared.ratio,
                    "fewer": compared.fewer,
                    "note": compared.note,
                }
            )
    return found
