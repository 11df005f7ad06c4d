from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import service
from coordinator.aggregation import Model
from coordinator.checkpoint import Checkpoint
from coordinator.evaluation import CutAnswers, Evaluator
from coordinator.store import Store
from ops import exits
from ops.cli import main
from ops.exit_report import CURVE_POINTS
from ops.exits import ExitSettings, judge_exits
from tensors.calibration import share_interval
from tensors.datasets import Dataset
from tensors.errors import DataError, NetworkError
from tensors.networks import State, build_network, read_state
from tests.tiny import CLASSES, SPEC, make_dataset, make_settings

STATE = read_state(build_network(SPEC, seed=5))
IMAGES = make_dataset(120, name="fashion-mnist-small")


def answers(*, exit_right: float, server_right: float, images: Dataset = IMAGES) -> CutAnswers:
    """An exit that is right where it is sure, a server that is right by chance; both repeatable."""
    rng = np.random.default_rng(0)
    count = len(images)

    def rows(sure: Any, right: Any) -> Any:
        p = np.repeat(((1 - sure) / (CLASSES - 1))[:, None], CLASSES, axis=1)
        p[np.arange(count), np.where(right, images.labels, (images.labels + 1) % CLASSES)] = sure
        return p

    surest = rng.permutation(np.linspace(0.3, 0.99, count))
    wrong = surest < np.quantile(surest, 1 - exit_right)
    return CutAnswers(
        rows(surest, ~wrong), rows(np.full(count, 0.9), rng.random(count) < server_right)
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> CutAnswers:
    """What every cut is seen to answer, instead of a network that can do nothing."""
    fixed = answers(exit_right=0.6, server_right=0.95)
    monkeypatch.setattr(Evaluator, "cut_answers", lambda *_: fixed)
    return fixed


def table(**changes: Any) -> dict[str, Any]:
    (found,) = judge_exits(STATE, SPEC, [2], IMAGES, "fp32", settings=ExitSettings(**changes))
    return found.row


class TestTable:
    def test_judges_with_images_that_were_not_calibrated_on(
        self, seen: CutAnswers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = table(accuracy=0.9)
        _, second = exits._split(len(IMAGES), ExitSettings())
        for probabilities in (seen.exit, seen.server):  # all of the test part is answered wrongly
            probabilities[second] = np.roll(probabilities[second], 1, axis=1)
        after = table(accuracy=0.9)
        chosen = [key for key in before if key.startswith("calibration_")]
        for key in [*chosen, "threshold", "temperature", "ensemble_weight", "offload_rate"]:
            assert after[key] == before[key], key
        for key in ("accuracy", "exit_accuracy", "server_accuracy", "ece"):
            assert after[key] != before[key], key

    def test_counts_what_a_device_and_the_server_would_get_right(self, seen: CutAnswers) -> None:
        row = table(offload=0.4, rule="max_softmax")
        _, second = exits._split(len(IMAGES), ExitSettings())
        sure = (seen.exit[second].max(axis=1) - 1 / CLASSES) / (1 - 1 / CLASSES)
        asked = sure <= row["threshold"]
        own, server = (p[second].argmax(axis=1) for p in (seen.exit, seen.server))
        right = np.where(asked, server, own) == IMAGES.labels[second]
        assert row["offload_rate"] == pytest.approx(asked.mean())
        assert row["accuracy"] == pytest.approx(right.mean())
        interval = share_interval(int(right.sum()), len(second))
        assert (row["accuracy_low"], row["accuracy_high"]) == interval
        assert row["server_accuracy"] == pytest.approx((server == IMAGES.labels[second]).mean())
        assert row["calibration_offload_rate"] <= 0.4
        assert row["calibration_images"] + row["test_images"] == len(IMAGES)

    def test_without_a_wish_it_stays_a_point_below_the_server(self, seen: CutAnswers) -> None:
        row = table()
        first, _ = exits._split(len(IMAGES), ExitSettings())
        server = (seen.server.argmax(axis=1) == IMAGES.labels)[first].mean()
        assert row["wanted_value"] == pytest.approx(server - 0.01)
        assert row["calibration_accuracy"] >= row["wanted_value"]
        assert row["reached"]
        assert 0 < row["offload_rate"] < 1

    def test_an_ensemble_helps_where_the_server_is_poor(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        poor = answers(exit_right=0.8, server_right=0.3)
        monkeypatch.setattr(Evaluator, "cut_answers", lambda *_: poor)
        row = table(offload=1.0)
        assert row["offload_rate"] == 1
        assert row["ensemble_weight"] > 0.5
        assert row["ensemble_gain"] > row["ensemble_gain_half"] > 0
        assert row["ensemble_accuracy"] == pytest.approx(row["accuracy"] + row["ensemble_gain"])

    def test_where_nothing_is_offloaded_an_ensemble_changes_nothing(self, seen: CutAnswers) -> None:
        row = table(offload=0.0)
        assert (row["offload_rate"], row["ensemble_gain"], row["ensemble_weight"]) == (0, 0, 0)

    def test_what_cannot_be_reached_is_marked(self, seen: CutAnswers) -> None:
        row = table(accuracy=1.0)
        assert not row["reached"]
        assert row["calibration_accuracy"] < 1
        assert not table(accuracy=0.95, level=0.95)["reached"]
        assert table(accuracy=0.7, level=0.95)["reached"]

    def test_the_seed_decides_the_split(self, seen: CutAnswers) -> None:
        assert table(seed=1) == table(seed=1)
        assert table(seed=1) != table(seed=2)

    def test_a_real_network_has_a_row_for_every_cut(self) -> None:
        judged = judge_exits(STATE, SPEC, [1, 5], IMAGES, "int4")
        assert [found.row["cut"] for found in judged] == [1, 5]
        assert judged[0].row != judged[1].row
        for found in judged:
            assert found.curve.samples == found.row["test_images"]
            assert all(
                isinstance(value, str | bool | int | float | None) for value in found.row.values()
            )
            assert found.curve.accuracy[0] == found.row["server_accuracy"]
            assert found.curve.accuracy[-1] == found.row["exit_accuracy"]

    def test_one_image_cannot_be_split(self) -> None:
        one = replace(IMAGES, images=IMAGES.images[:1], labels=IMAGES.labels[:1])
        with pytest.raises(DataError, match="cannot be split"):
            judge_exits(STATE, SPEC, [2], one, "fp32")

    def test_two_images_can(self) -> None:
        two = replace(IMAGES, images=IMAGES.images[:2], labels=IMAGES.labels[:2])
        (found,) = judge_exits(STATE, SPEC, [2], two, "fp32", settings=ExitSettings(accuracy=0.0))
        row = found.row
        assert (row["calibration_images"], row["test_images"]) == (1, 1)

    def test_a_cut_that_is_none_is_refused(self) -> None:
        with pytest.raises(NetworkError, match="cuts 1 to 9"):
            judge_exits(STATE, SPEC, [10], IMAGES, "fp32")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A coordinator's folder: version 0 untrained, versions 1 and 2 with exits at 2 and 5."""
    monkeypatch.setattr(service, "load_dataset", lambda *_, **__: IMAGES)
    root = tmp_path / "state"
    identity = make_settings(dataset="fashion-mnist-small").identity()
    store = Store(root)
    store.create("a-run", identity, checkpoint(0, STATE, [], score=None))
    store.save(checkpoint(1, read_state(build_network(SPEC, seed=6)), [2, 5], score=0.9))
    store.save(checkpoint(2, STATE, [2, 5], score=0.5))
    return root


def checkpoint(
    version: int, state: State, trained: Sequence[int], score: float | None
) -> Checkpoint:
    return Checkpoint(version, version, Model(state, {}), trained_cuts=list(trained), score=score)


def splitfleet(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


class TestCommand:
    def test_json_has_the_rows_of_the_table_and_the_curves(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert splitfleet("exits", folder, "--accuracy", 0.2, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["run"], result["version"], result["codec"]) == ("a-run", 2, "fp32")
        settings = ExitSettings(accuracy=0.2)
        judged = judge_exits(STATE, SPEC, [2, 5], IMAGES, "fp32", settings=settings)
        for found, wanted in zip(result["cuts"], judged, strict=True):
            curve = found.pop("curve")
            assert found == wanted.row
            rates = [point["offload_rate"] for point in curve]
            assert rates == sorted(rates, reverse=True)
            assert (rates[0], rates[-1]) == (1, 0)
            assert curve[0]["accuracy"] == wanted.row["server_accuracy"]
            assert len(curve) <= CURVE_POINTS

    @pytest.mark.parametrize(("asked", "found"), [("latest", 2), ("best", 1), ("1", 1), ("2", 2)])
    def test_versions(
        self, folder: Path, asked: str, found: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert splitfleet("exits", folder, "--version", asked, "--cuts", 5, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["version"] == found
        assert [row["cut"] for row in result["cuts"]] == [5]

    def test_the_chart_shows_every_cut_and_its_threshold(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chart = tmp_path / "curves.svg"
        assert splitfleet("exits", folder, "--plot", chart, "--offload", 0.5) == 0
        shown = capsys.readouterr().out
        root = ET.fromstring(chart.read_text("utf-8"))  # noqa: S314
        space = {"svg": "http://www.w3.org/2000/svg"}
        assert len(root.findall("svg:polyline", space)) == 4  # two curves, two points
        words = " ".join(text.text or "" for text in root.findall("svg:text", space))
        for cut in (2, 5):
            assert f"cut {cut}: τ = " in words
            assert f"│ {cut} " in shown
        assert "an offload rate of at most 50.0 %" in shown

    def test_what_cannot_be_had_is_said_and_is_no_failure(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert splitfleet("exits", folder, "--accuracy", 1.0, "--level", 0.95) == 0
        said = capsys.readouterr().err
        assert "cut 2: an accuracy of 100.0 % cannot be promised at 0.95 from 60 images" in said

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (["--cuts", "3"], 2, "that exit is not trained; version 2 has those at 2, 5"),
            (["--cuts", "12"], 2, "there is no such cut"),
            (["--cuts", "2,x"], 2, "write cut layers"),
            (["--version", "7"], 2, "no such checkpoint; kept are 0, 1, 2"),
            (["--version", "last"], 2, "write a number, best or latest"),
            (["--version", "0"], 2, "no exit that was trained"),
            (["--accuracy", "1.5"], 2, "(from the flag --accuracy)"),
            (["--offload", "nan"], 2, "(from the flag --offload)"),
            (["--accuracy", "0.5", "--offload", "0.5"], 2, "exclude each other"),
            (["--level", "0.9"], 2, "give one of them too"),
            (["--rule", "energy"], 2, "'entropy', 'max_softmax' or 'margin'"),
            (["--plot", "/nowhere/chart.svg"], 5, "choose another file"),
        ],
    )
    def test_what_is_wrong_is_one_line(
        self,
        arguments: list[str],
        code: int,
        words: str,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert splitfleet("exits", folder, *arguments) == code
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1

    def test_a_folder_without_a_run_is_left_as_it_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert splitfleet("exits", tmp_path / "none") == 2
        assert "holds no run" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()

    def test_images_of_another_shape_or_none_are_refused(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        large = replace(IMAGES, images=np.zeros((120, 9, 9, 1), np.uint8))
        monkeypatch.setattr(service, "load_dataset", lambda *_, **__: large)
        assert splitfleet("exits", folder) == 4
        assert "choose a data set that fits" in capsys.readouterr().err
        Store(folder).create(
            "second", make_settings().identity(), checkpoint(0, STATE, [2], score=None)
        )
        assert splitfleet("exits", folder) == 2
        assert "give --dataset" in capsys.readouterr().err

    def test_a_run_of_another_version_is_refused(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        identity = make_settings().identity() | {"antenna": 5}
        Store(folder).create("second", identity, checkpoint(0, STATE, [2], score=None))
        assert splitfleet("exits", folder) == 2
        said = capsys.readouterr().err
        assert "run.json: antenna" in said
        assert said.count("\n") == 1

    def test_a_damaged_checkpoint_is_said(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "a-run" / "checkpoints" / "000001" / "model.safetensors").write_bytes(b"rubbish")
        assert splitfleet("exits", folder, "--version", 1) == 5
        assert "checksum" in capsys.readouterr().err
