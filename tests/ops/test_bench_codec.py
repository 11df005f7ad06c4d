from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ops import codec_samples
from ops.bench_codec import parse_cuts, run_bench
from ops.bench_codec_tables import speed_verdicts, tables
from ops.bench_reference import (
    Point,
    compare,
    decode_reference,
    encode_reference,
    entropy,
    relative_error,
)
from ops.errors import DiskTrouble, SettingsWrong
from tensors.datasets import Dataset
from tests.tiny import make_dataset


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
        elements=st.floats(-100, 100, width=32),
    ),
    st.sampled_from([2, 3, 4, 8]),
)
def test_the_reference_is_within_half_a_level_of_each_channels_range(
    x: np.ndarray, bits: int
) -> None:
    decoded = decode_reference(encode_reference(x, bits), x.shape, bits)
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    span = x.max(axes, keepdims=True) - x.min(axes, keepdims=True)
    assert (np.abs(decoded - x) <= span / (2**bits - 1) * 0.5 + 1e-4).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_reference_packs_without_gaps(bits: int) -> None:
    noise = np.random.default_rng(0).random((16, 4, 32, 32), np.float32)
    size = 8 * len(encode_reference(noise, bits)) / noise.size
    assert bits - 0.3 < size < bits + 0.05, "noise has nothing that zstd could remove"


def test_the_reference_counts_its_side_data() -> None:
    constant = np.ones((1, 1000, 1), np.float32)
    assert len(encode_reference(constant, 2)) > 8 * 1000


@pytest.mark.parametrize(
    ("levels", "bits"),
    [([7] * 9, 0.0), ([0, 1], 1.0), ([0, 0, 0, 255], 0.811278), ([0, 1, 2, 3] * 5, 2.0), ([], 0.0)],
)
def test_entropy_of_known_distributions(levels: list[int], bits: float) -> None:
    assert entropy(np.array(levels, np.uint8)) == pytest.approx(bits, abs=1e-6)


def test_entropy_by_group_is_the_mean_of_the_groups() -> None:
    levels = np.array([0, 1, 0, 1, 5, 5], np.uint8)
    groups = np.array([0, 0, 0, 0, 3, 3])
    assert entropy(levels, groups) == pytest.approx(4 / 6)
    assert entropy(levels, np.zeros(6, np.int64)) == pytest.approx(entropy(levels))


def test_relative_error_is_over_the_entries_that_count() -> None:
    x, decoded = np.array([3.0, 4.0, 0.0]), np.array([3.0, 3.0, 9.0])
    assert relative_error(x, decoded, np.array([True, True, False])) == pytest.approx(1 / 25)
    assert relative_error(x, x) == 0
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.zeros(2), np.ones(2)) == math.inf


CURVE = [Point(1, 1e-1), Point(2, 1e-2), Point(4, 1e-4)]


@pytest.mark.parametrize(
    ("error", "bits", "note"),
    [
        (1e-2, 2.0, ""),
        (10**-1.5, 1.5, ""),
        (1e-3, 3.0, ""),
        (1e-1, 1.0, ""),
        (0.5, 1.0, "with less error"),
        (0.95e-4, 4 - math.log10(0.95), "carried on"),
        (0.8e-4, None, "finer than the finest setting"),
    ],
)
def test_bits_at_an_error(error: float, bits: float | None, note: str) -> None:
    found = compare([CURVE], Point(4, error))
    assert (found.bits, found.note) == (None if bits is None else pytest.approx(bits), note)
    assert found.ratio == (None if bits is None else pytest.approx(bits / 4))
    assert found.fewer is (bits is not None and bits < 4)


def test_the_better_curve_counts_and_points_that_others_beat_do_not() -> None:
    beaten = [*CURVE, Point(3, 2e-2), Point(2, 5e-2)]
    assert compare([beaten], Point(9, 1e-3)).bits == pytest.approx(3)
    better = [Point(1, 1e-2), Point(3, 1e-4)]
    assert compare([CURVE, better], Point(9, 1e-3)).bits == pytest.approx(2)
    assert compare([CURVE, better], Point(9, 0.5e-1)).note == "with less error"
    assert compare([[], []], Point(9, 1e-3)).bits is None


def test_wanted_speeds_are_judged_by_the_slowest_tensor() -> None:
    row = {"kind": "activation", "codec": "int8", "masked": False}
    row |= {"copy": 10.0, "memory_copy": 5.0, "decode": 5.0}
    rows: list[dict[str, Any]] = [
        {**row, "cut": 1, "encode": 2.0},
        {**row, "cut": 2, "encode": 0.9},
        {**row, "cut": 3, "encode": 0.1, "masked": True},
    ]
    encode, decode, encode_by_memory, decode_by_memory = speed_verdicts(rows)
    assert (encode["slowest"], encode["reached"]) == (pytest.approx(0.09), False)
    assert encode["slowest_at"] == "activation at cut 2"
    assert decode["reached"]
    assert decode_by_memory["reached"]
    assert (encode_by_memory["slowest"], encode_by_memory["reached"]) == (0.18, True)
    assert encode["unit"] != encode_by_memory["unit"]


@pytest.fixture
def tiny_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str = "train", *, root: Path | None = None) -> Dataset:
        return make_dataset(16, seed=len(split))

    monkeypatch.setattr(codec_samples, "load_dataset", load)


@pytest.mark.usefixtures("tiny_images")
def test_a_small_run_end_to_end(tmp_path: Path) -> None:
    report, picture = tmp_path / "report.md", tmp_path / "curves.svg"
    codecs = ["fp16", "int8", "int4+channel", "int8+zstd", "int4+zstd", "int4+stochastic+zstd"]
    result = run_bench(
        codecs,
        cuts=(2, 3),
        width=4,
        train_batches=3,
        batch_size=4,
        repetitions=1,
        append=report,
        plot=picture,
        quiet=True,
    )
    assert json.loads(json.dumps(result)) == result
    assert 0 <= result["accuracy"] <= 1
    rows = result["rows"]
    plain = [row for row in rows if not row["masked"]]
    masked = [row for row in rows if row["masked"]]
    assert {(row["kind"], row["cut"], row["codec"]) for row in plain} == {
        (kind, cut, codec)
        for kind in ("activation", "gradient")
        for cut in (2, 3)
        for codec in codecs
    }
    assert {row["codec"] for row in masked} == set(codecs) - {"fp16", "int4+channel"}
    assert all(row["kind"] == "gradient" and row["sent"] < 1 for row in masked)
    for row in rows:
        assert all(row[way] > 0 for way in ("encode", "encode_plain", "decode", "decode_plain"))
        assert row["copy"] > 0
        assert row["memory_copy"] > 0
        assert (row["entropy"] is None) == (row["codec"] == "fp16")
        assert (row["error_behind_relu"] is None) == (row["kind"] == "activation")
        if row["entropy"] is not None:
            assert row["entropy_channel"] <= row["entropy"] + 1e-9
    int8 = next(row for row in plain if row["codec"] == "int8")
    assert 8 < int8["bits"] < 9, "header and map count too"
    assert int8["error"] < 1e-3
    assert int8["sent"] == 1
    assert len(result["reference"]) == 2 * 2 * 4
    assert len(result["comparisons"]) == 2 * 4 + 2 * 2 * 4, "gradients also masked"
    assert [row["codec"] for row in result["speeds"]] == ["int8"] * 4 + ["int4+zstd"] * 2
    written = report.read_text("utf-8")
    for title, header, cells in tables(result):
        assert title[1:] in written
        assert all(len(line) == len(header) for line in cells)
    assert f"| {result['date']} | {result['machine']} | {result['commit']} | int8 |" in written
    charts = ET.parse(picture).getroot().findall("{http://www.w3.org/2000/svg}svg")  # noqa: S314
    assert len(charts) == 4, "two tensors at two cuts"


@pytest.mark.usefixtures("tiny_images")
def test_what_a_user_got_wrong_is_said(tmp_path: Path) -> None:
    assert parse_cuts("3,1,3") == (1, 3)
    with pytest.raises(SettingsWrong, match="--cuts"):
        parse_cuts("1,x")
    wrongs: list[dict[str, Any]] = [{"repetitions": 0}, {"train_batches": 0}, {"batch_size": 1}]
    for wrong in wrongs:
        with pytest.raises(SettingsWrong, match="at least"):
            run_bench(["int8"], **wrong)
    with pytest.raises(DiskTrouble, match="another file"):
        run_bench(
            ["int8"],
            cuts=(8,),
            width=4,
            train_batches=1,
            batch_size=2,
            repetitions=1,
            plot=tmp_path / "none" / "curves.svg",
            quiet=True,
        )
