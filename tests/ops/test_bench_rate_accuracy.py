from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.envelopes import Envelope
from broker.training_messages import Activations
from ops import bench_rate_accuracy, rate_accuracy
from ops.bench_rate_accuracy import make_rows, parse_pair, run_bench
from ops.cli import main
from ops.errors import DiskTrouble, SettingsWrong
from ops.experiments.images import balanced
from ops.paired import NOT_RESOLVED, Difference, difference
from ops.rate_accuracy import Case, Setup, load_images, run_case
from tensors.datasets import Dataset, load_dataset
from tensors.decoding import decode
from tensors.errors import CodecError, DataError
from tests.tiny import make_dataset

SETUP = Setup("tiny", train_images=128, rounds=2, width=4)
FP32 = ("fp32", "fp32")


@pytest.fixture(autouse=True)
def tiny_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str, *, root: Path | None) -> Dataset:
        if name != "tiny":
            return load_dataset(name, split, root=root)
        return make_dataset(160, seed=1) if split == "train" else make_dataset(40, seed=2)

    monkeypatch.setattr(rate_accuracy, "load_dataset", load)
    load_images.cache_clear()


def bench(out: Path, codecs: tuple[str, ...] = ("int8",), **changes: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = {
        "seeds": 2,
        "jobs": 1,
        "data_root": None,
        "out": out,
        "append": None,
        "plot": None,
        "quiet": True,
    }
    return run_bench(codecs, SETUP, **(options | changes))


class TestOneRun:
    def test_the_same_case_gives_the_same_result(self) -> None:
        case = Case(SETUP, "int8", "bf16", 1)
        first, again = run_case(case, None), run_case(case, None)
        del first["seconds"], again["seconds"]
        assert first == again
        assert first["samples"] == 128 * SETUP.rounds
        assert first["discarded"] == 0
        assert first["test_images"] == 40 + (160 - 128)  # what is not trained on is tested on

    def test_codecs_of_a_seed_start_alike_and_see_the_same_batches(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Envelope] = []
        monkeypatch.setattr(rate_accuracy._Books, "see", lambda _, envelope: seen.append(envelope))

        def batches(activation: str, seed: int) -> dict[Any, Activations]:
            seen.clear()
            run_case(Case(SETUP, activation, "fp32", seed), None)
            return {
                (e.address.device, e.message.round, e.message.batch): e.message
                for e in seen
                if isinstance(e.message, Activations)
            }

        plain, coded, other = batches("fp32", 0), batches("bf16", 0), batches("fp32", 1)
        assert {key: m.labels for key, m in plain.items()} == {
            key: m.labels for key, m in coded.items()
        }
        first = next(iter(plain))
        exact = decode(plain[first].tensor)
        np.testing.assert_allclose(decode(coded[first].tensor), exact, rtol=2**-8)
        assert not np.array_equal(decode(other[first].tensor), exact)

    def test_images_are_taken_evenly_and_always_the_same(self) -> None:
        labels = np.repeat(np.arange(4), [30, 20, 10, 5]).astype(np.int64)
        rows = balanced(labels, 18, "key")
        assert np.bincount(labels[rows]).tolist() == [5, 5, 4, 4]
        assert len(set(rows.tolist())) == 18
        np.testing.assert_array_equal(rows, balanced(labels, 18, "key"))
        for count in (24, 3, 0, -4):
            with pytest.raises(DataError, match="--train-images"):
                balanced(labels, count, "--train-images")


class TestAllRuns:
    def test_a_finished_run_is_not_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = bench(tmp_path)
        files = sorted(tmp_path.iterdir())
        assert len(files) == 4
        made: list[Case] = []

        def run(case: Case, root: Path | None) -> dict[str, Any]:
            made.append(case)
            return run_case(case, root)

        monkeypatch.setattr(bench_rate_accuracy, "run_case", run)
        assert bench(tmp_path) == rows
        assert not made
        lost = Case(SETUP, "int8", "int8", 1)
        (tmp_path / lost.file).unlink()
        assert bench(tmp_path) == rows
        assert made == [lost]

    def test_an_interrupted_benchmark_keeps_what_it_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(case: Case, root: Path | None) -> dict[str, Any]:
            if case.seed == 1:
                raise KeyboardInterrupt
            return run_case(case, root)

        monkeypatch.setattr(bench_rate_accuracy, "run_case", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            Case(SETUP, codec, codec, 0).file for codec in ("fp32", "int8")
        )

    def test_results_of_another_setup_are_not_taken(self) -> None:
        case = Case(SETUP, *FP32, 0)
        others = [
            Case(Setup("tiny", 128, 2, 8), *FP32, 0),
            Case(Setup("tiny", 124, 2, 4), *FP32, 0),
            Case(SETUP, "fp32", "fp16", 0),
            Case(SETUP, *FP32, 1),
        ]
        assert case.file not in {other.file for other in others}

    def test_a_damaged_result_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / Case(SETUP, *FP32, 0).file
        path.write_text("{")
        with pytest.raises(DiskTrouble, match=r"seed0.*remove it"):
            bench(tmp_path)

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            (lambda out: bench(out, seeds=0), SettingsWrong),
            (lambda out: bench(out, jobs=0), SettingsWrong),
            (lambda out: bench(out, ("int99",)), CodecError),
            (lambda out: bench(out, ("fp32/int99",)), CodecError),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_runs(
        self, tmp_path: Path, wrong: Callable[[Path], object], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            wrong(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_the_command_trains_in_workers_and_writes_rows_and_plot(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        table, plot = tmp_path / "table.md", tmp_path / "plot.svg"
        command = "bench rate-accuracy --codecs int8/bf16 --seeds 1 --train-images 80 --rounds 1"
        options = ["--width", "4", "--jobs", "2", "--out", str(tmp_path / "out"), "--json"]
        files = ["--append", str(table), "--plot", str(plot)]
        with pytest.raises(SystemExit) as exit_:
            main([*command.split(), *options, *files])
        assert exit_.value.code == 0
        fp32, coded = json.loads(capfd.readouterr().out)
        assert (fp32["codec"], fp32["seeds"], fp32["verdict"]) == ("fp32", 1, None)
        assert coded["codec"] == "int8/bf16"
        assert coded["activation_factor"] > 3.5
        assert 1.9 < coded["gradient_factor"] < 2.1
        lines = table.read_text().splitlines()
        assert len(lines) == 2
        assert all("tested on 10,000" in line for line in lines)
        assert len({line.count("|") for line in lines}) == 1
        picture = plot.read_text()
        assert ET.fromstring(picture).tag.endswith("svg")  # noqa: S314 made here
        assert "int8/bf16" in picture


class TestStatistics:
    def test_difference_is_students_interval(self) -> None:
        found = difference([1.0, 2.0, 3.0])  # standard deviation 1, t(2) = 4.303
        assert found.mean == 2.0
        assert found.half == pytest.approx(4.303 / 3**0.5)
        five = difference([-0.3, 0.1, 0.0, -0.2, 0.4])  # mean 0, squares sum to 0.3, t(4) = 2.776
        assert five.mean == pytest.approx(0.0, abs=1e-12)
        assert five.half == pytest.approx(2.776 * (0.3 / 4 / 5) ** 0.5)
        assert difference([1.5]) == Difference(1.5, None)
        forty = difference([1.0, -1.0] * 20)
        assert forty.half == pytest.approx(2.042 * (40 / 39 / 40) ** 0.5)

    @pytest.mark.parametrize(
        ("mean", "half", "verdict"),
        [
            (0.0, 0.5, "within 0.5"),
            (-0.2, 0.3, "within 0.5"),
            (3.0, 0.1, "within 0.5"),
            (0.0, 0.51, NOT_RESOLVED),
            (-9.0, 0.6, NOT_RESOLVED),
            (-0.4, 0.3, NOT_RESOLVED),
            (-0.9, 0.3, "worse"),
            (0.0, None, NOT_RESOLVED),
        ],
    )
    def test_verdicts(self, mean: float, half: float | None, verdict: str) -> None:
        assert Difference(mean, half).verdict(0.5) == verdict

    def test_rows_pair_runs_by_seed_and_compare_bytes_with_fp32(self) -> None:
        def run(accuracy: float, up: int, down: int) -> dict[str, Any]:
            return {
                "accuracy": accuracy,
                "server_accuracy": accuracy,
                "exit_accuracy": 0.5,
                "samples": 100,
                "activation_bytes": up,
                "gradient_bytes": down,
                "discarded": 0,
                "test_images": 40,
                "train_images": 50,
                "commit": "abc",
            }

        rows = make_rows(
            {
                FP32: [run(0.50, 4000, 4000), run(0.60, 4000, 4000)],
                ("int8", "int4"): [run(0.49, 1000, 500), run(0.60, 1100, 500)],
            }
        )
        assert [row["codec"] for row in rows] == ["fp32", "int8/int4"]
        fp32, coded = rows
        assert fp32["difference"] is None
        assert coded["activation_factor"] == pytest.approx(4000 / 1050)
        assert coded["gradient_factor"] == pytest.approx(8.0)
        assert coded["bytes_per_sample"] == pytest.approx(10.5 + 5)
        assert coded["accuracy"] == pytest.approx(0.545)
        assert coded["differences"] == pytest.approx([-1.0, 0.0])
        assert coded["difference"] == pytest.approx(-0.5)
        assert coded["half_interval"] == pytest.approx(12.706 * 0.5**0.5 / 2**0.5)
        assert coded["verdict"] == NOT_RESOLVED

    def test_codecs_are_given_as_one_name_or_two(self) -> None:
        assert parse_pair("int8+zstd") == ("int8+zstd", "int8+zstd")
        assert parse_pair(" int8/bf16+zstd ") == ("int8", "bf16+zstd")
