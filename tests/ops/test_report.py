from __future__ import annotations

import copy
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.charts import share_range, thinned, ticks
from ops.errors import DiskTrouble
from ops.report import mean_sweep, write_report
from ops.units import byte_size, seconds, short_size

SVG = "svg"
WANTED_KEYS = {
    "strategy",
    "feedback",
    "dataset",
    "seed",
    "rounds",
    "wall_seconds",
    "samples",
    "samples_per_second",
    "server_accuracy",
    "bytes_up",
    "bytes_down",
    "bytes_up_per_sample",
    "devices",
    "exit_sweep",
}
WANTED_DEVICE_KEYS = {
    "device",
    "cut",
    "samples",
    "exit_accuracy",
    "server_accuracy",
    "exit_rate",
    "activation_bits",
    "activation_levels",
    "bytes_up",
    "bytes_down",
    "rounds",
}


def answers(exits: int, correct: int) -> dict[str, Any]:
    return {
        "version": 2,
        "threshold": 0.7,
        "images": 100,
        "exits": exits,
        "offloads": 100 - exits,
        "answered": 97 - exits,
        "refused": 1,
        "timeouts": 2,
        "correct": correct,
        "exit_correct": 60,
        "bytes_up": 1000,
        "bytes_down": 100,
        "exit_ms": 0.5,
        "offload_ms": 160.0,
    }


def closed_round(number: int, accuracy: float) -> dict[str, Any]:
    account = {"produced": 11, "applied": 9, "discarded": {"not_finite": 1}, "expired": 1}
    return {
        "round": number,
        "version": number,
        "attempt": 0,
        "seconds": 20.0,
        "learning_rate": 0.05,
        "train_loss": {"2": 0.5, "4": 0.7},
        "train_accuracy": {"2": 0.8, "4": 0.7},
        "server_accuracy": accuracy,
        "server_loss": 0.6,
        "exit_accuracy": {"2": accuracy - 0.2, "4": accuracy - 0.1},
        "bytes": {"up/activation": 3000, "down/gradient": 2000, "up/parameter": 100},
        "devices": {
            name: {
                "cut": cut,
                "samples": 300,
                "finished": True,
                "account": account,
                "reported": {
                    "activation_bytes": 1000 * number,
                    "activation_values": 4000,
                    "activation_levels": 16.0 * number if cut == 2 else None,
                },
            }
            for name, cut in (("d0", 2), ("d1", 4))
        },
    }


def device(name: str, cut: int, exits: int, rates: tuple[float, float]) -> dict[str, Any]:
    return {
        "device": name,
        "cut": cut,
        "samples": 600,
        "rounds": 2,
        "inference": answers(exits, 80),
        "exit_accuracy": 0.65,
        "server_accuracy": 0.82,
        "exit_sweep": [
            {"threshold": 0.0, "exit_rate": 1.0, "accuracy": 0.65},
            {"threshold": 0.7, "exit_rate": rates[0], "accuracy": rates[1]},
        ],
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "run": "20260101-000000-abcd",
        "settings": {
            "fleet": "fleet",
            "network": {"name": "resnet18", "width": 16},
            "strategy": "averaging",
            "feedback": "gradient",
            "codec": "int8+zstd",
            "dataset": "fashion-mnist-small",
            "seed": 3,
            "threshold": 0.7,
            "inference": True,
            "threads": None,
        },
        "rounds": 2,
        "version": 2,
        "history": [closed_round(1, 0.5), closed_round(2, 0.8125)],
        "traffic": {
            "up/activation/d0": 4000,
            "up/activation/d1": 2000,
            "down/gradient/d0": 3000,
            "down/gradient/d1": 1000,
            "up/parameter/d0": 200,
            "down/parameter/cut-2": 70,
            "down/parameter/d1": 30,
            "up/feature/d0": 500,
            "down/prediction/d0": 50,
            "up/control/d1": 9,
            "down/control/all": 4,
        },
        "devices": [device("d0", 2, 20, (0.25, 0.75)), device("d1", 4, 40, (0.75, 0.85))],
    }


def write(folder: Path, result: dict[str, Any]) -> tuple[dict[str, Any], ET.Element, str]:
    """The summary, the page as a tree, and the page's text."""
    page = write_report(folder, result, wall_seconds=50.0)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    markup = page.read_text("utf-8")
    tree = ET.fromstring(markup)  # noqa: S314 our own file; raises unless it is well-formed
    return summary, tree, " ".join("".join(tree.itertext()).split())


def pictures(tree: ET.Element) -> dict[str, ET.Element]:
    return {str(svg.get("aria-label")): svg for svg in tree.iter(SVG)}


def rows(tree: ET.Element, title: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    for section in tree.iter("section"):
        if any(heading.text == title for heading in section.iter("h3")):
            return [["".join(cell.itertext()) for cell in row] for row in section.iter("tr")]
    raise AssertionError(f"there is no table {title!r}")


def test_the_summary_has_what_was_promised(tmp_path: Path, result: dict[str, Any]) -> None:
    summary, _, _ = write(tmp_path, result)
    assert set(summary) >= WANTED_KEYS
    assert [entry["device"] for entry in summary["devices"]] == ["d0", "d1"]
    assert all(set(entry) >= WANTED_DEVICE_KEYS for entry in summary["devices"])


def test_the_summary_agrees_with_the_result(tmp_path: Path, result: dict[str, Any]) -> None:
    summary, _, _ = write(tmp_path, result)
    assert summary["rounds"] == 2
    assert summary["seed"] == 3
    assert summary["samples"] == 1200
    assert summary["samples_per_second"] == 1200 / 40.0
    assert summary["wall_seconds"] == 50.0
    assert summary["server_accuracy"] == 0.8125
    assert summary["bytes_up_per_sample"] == 6000 / 1200
    assert summary["bytes_up"] == 6709
    assert summary["bytes_down"] == 4154


def test_a_device_has_the_bits_and_levels_it_reported(
    tmp_path: Path, result: dict[str, Any]
) -> None:
    del result["history"][1]["devices"]["d1"]["reported"]
    summary, tree, _ = write(tmp_path, result)
    rates = [(d["activation_bits"], d["activation_levels"]) for d in summary["devices"]]
    assert rates == [(3.0, 24.0), (2.0, None)]
    head, *table = rows(tree, "What each device trained")
    assert [row[head.index("bits")] for row in table] == ["3.00", "2.00"]


def test_a_device_that_reported_nothing(tmp_path: Path, result: dict[str, Any]) -> None:
    for record in result["history"]:
        del record["devices"]["d0"]["reported"]
    summary, tree, _ = write(tmp_path, result)
    assert summary["devices"][0]["activation_bits"] is None
    head, row, _ = rows(tree, "What each device trained")
    assert row[head.index("bits")] == "–"


def test_parameters_and_evaluation_are_apart(tmp_path: Path, result: dict[str, Any]) -> None:
    summary, _, _ = write(tmp_path, result)
    assert summary["bytes_by_purpose"] == {
        "training": {"up": 6000, "down": 4000},
        "parameters": {"up": 200, "down": 100},
        "evaluation": {"up": 500, "down": 50},
        "control": {"up": 9, "down": 4},
    }
    assert summary["bytes_by_role"]["up/activation"] == 6000
    assert sum(summary["bytes_by_role"].values()) == summary["bytes_up"] + summary["bytes_down"]


def test_a_device_receives_the_broadcasts_meant_for_it(
    tmp_path: Path, result: dict[str, Any]
) -> None:
    summary, _, _ = write(tmp_path, result)
    first, second = summary["devices"]
    assert first["bytes_up"] == 4000 + 200 + 500
    assert first["bytes_down"] == 3000 + 50 + 70 + 4
    assert second["bytes_down"] == 1000 + 30 + 4


def test_inference_is_told_by_device_and_in_all(tmp_path: Path, result: dict[str, Any]) -> None:
    summary, _, _ = write(tmp_path, result)
    assert [entry["exit_rate"] for entry in summary["devices"]] == [0.2, 0.4]
    assert summary["devices"][0]["inference"]["timeouts"] == 2
    total = summary["inference"]
    assert total["images"] == 200
    assert total["exits"] + total["answered"] + total["refused"] + total["timeouts"] == 200
    assert total["exit_rate"] == 0.3
    assert total["accuracy"] == 0.8
    assert total["offload_ms"] == 160.0


def test_inference_is_told_by_cut(tmp_path: Path, result: dict[str, Any]) -> None:
    summary, tree, _ = write(tmp_path, result)
    assert sum(cut["images"] for cut in summary["inference_by_cut"].values()) == 200
    title = "What each device answered"
    assert "cut 2" not in {row[0] for row in rows(tree, title)}, "its device's row says it"
    for device in result["devices"]:
        device["cut"] = 2
    summary, tree, _ = write(tmp_path, result)
    assert summary["inference_by_cut"] == {"2": summary["inference"]}
    assert "cut 2" in {row[0] for row in rows(tree, title)}


def test_the_sweep_is_the_mean_over_devices(tmp_path: Path, result: dict[str, Any]) -> None:
    summary, _, _ = write(tmp_path, result)
    assert summary["exit_sweep"] == [
        {"threshold": 0.0, "exit_rate": 1.0, "accuracy": 0.65},
        {"threshold": 0.7, "exit_rate": 0.5, "accuracy": pytest.approx(0.8)},
    ]


def test_a_threshold_that_one_device_lacks_is_left_out() -> None:
    point = {"threshold": 0.5, "exit_rate": 0.5, "accuracy": 0.5}
    assert mean_sweep([[point, {**point, "threshold": 0.6}], [point]]) == [point]
    assert mean_sweep([]) == []


def test_the_page_needs_nothing_else(tmp_path: Path, result: dict[str, Any]) -> None:
    _, tree, _ = write(tmp_path, result)
    markup = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"https?://|@import|url\(|src=|href=", markup)
    tags = {element.tag for element in tree.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "audio", "video"}
    policy = [meta.get("content", "") for meta in tree.iter("meta") if meta.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_is_made_for_light_dark_and_phones(tmp_path: Path, result: dict[str, Any]) -> None:
    _, tree, _ = write(tmp_path, result)
    style = "".join(element.text or "" for element in tree.iter("style"))
    assert "prefers-color-scheme: dark" in style
    assert "@media (max-width" in style
    assert any(meta.get("name") == "viewport" for meta in tree.iter("meta"))
    used = {name for e in tree.iter() for name in (e.get("class") or "").split()}
    assert {name for name in used if f".{name}" not in style} == set()


def test_the_page_has_its_four_pictures(tmp_path: Path, result: dict[str, Any]) -> None:
    _, tree, text = write(tmp_path, result)
    assert set(pictures(tree)) == {
        "Accuracy over rounds",
        "Bytes per round, by role",
        "Exit rate by threshold",
        "Accuracy by threshold",
    }
    assert "exit at cut 4 (d1)" in text
    assert "fleet mean" in text


def test_the_accuracy_picture_shows_every_round_and_line(
    tmp_path: Path, result: dict[str, Any]
) -> None:
    _, tree, _ = write(tmp_path, result)
    picture = pictures(tree)["Accuracy over rounds"]
    told = {title.text for title in picture.iter("title")}
    assert "full network, round 2: 81.25 %" in told
    assert "exit at cut 2 (d0), round 1: 30 %" in told
    assert len(told) == 6
    heights = {
        str(dot.find("title").text): float(str(dot.get("cy")))  # type: ignore[union-attr]
        for dot in picture.iter("circle")
    }
    best = min(heights, key=lambda name: heights[name])
    assert best == "full network, round 2: 81.25 %"


def test_bars_are_as_high_as_their_bytes(tmp_path: Path, result: dict[str, Any]) -> None:
    result["history"][1]["bytes"]["up/activation"] = 6000
    _, tree, _ = write(tmp_path, result)
    heights = {
        str(bar.find("title").text): float(str(bar.get("height")))  # type: ignore[union-attr]
        for bar in pictures(tree)["Bytes per round, by role"].iter("rect")
    }
    first = heights["activations, round 1: 3.00 kB"]
    assert heights["activations, round 2: 6.00 kB"] == pytest.approx(2 * first, abs=0.02)
    assert heights["gradients, round 1: 2.00 kB"] == pytest.approx(first * 2 / 3, abs=0.02)


def test_the_tables_agree_with_the_summary(tmp_path: Path, result: dict[str, Any]) -> None:
    _, tree, _ = write(tmp_path, result)
    trained = rows(tree, "What each device trained")
    assert trained[1] == ["d0", "2", "600", "2", "65.0 %", "82.0 %", "3.00", "4.70 kB", "3.12 kB"]
    answered = rows(tree, "What each device answered")
    assert answered[-1][:7] == ["fleet", "200", "30.0 %", "134", "2", "4", "80.0 %"]
    books = rows(tree, "Every round, with its books")
    assert books[2][:8] == ["2", "1", "20 s", "2 of 2", "22", "18", "2", "2"]
    assert books[2][8] == "0.600"
    settings = {
        str(name.text): value.text for name, value in pairwise(tree.iter()) if name.tag == "dt"
    }
    assert settings["network.width"] == "16"
    assert settings["threads"] == "–"


def test_a_run_without_evaluation_or_inference_has_a_report(
    tmp_path: Path, result: dict[str, Any]
) -> None:
    result["settings"]["dataset"] = None
    for record in result["history"]:
        for key in ("server_accuracy", "server_loss", "exit_accuracy", "bytes"):
            del record[key]
    for entry in result["devices"]:
        entry["inference"] = None
        for key in ("exit_accuracy", "server_accuracy", "exit_sweep"):
            del entry[key]
    summary, tree, text = write(tmp_path, result)
    assert summary["server_accuracy"] is None
    assert summary["inference"] is None
    assert summary["exit_sweep"] == []
    assert summary["devices"][0]["exit_rate"] is None
    assert summary["samples_per_second"] == 30.0
    assert pictures(tree) == {}
    assert text.count("The coordinator had no test images") == 3
    assert "No device answered test images in this run" in text
    assert "no byte counts by round" in text


def test_a_run_of_which_no_round_closed_has_a_report(
    tmp_path: Path, result: dict[str, Any]
) -> None:
    result["history"], result["devices"], result["traffic"] = [], [], {}
    summary, tree, text = write(tmp_path, result)
    assert summary["rounds"] == 0
    assert summary["rounds_abandoned"] == 2
    assert summary["samples_per_second"] == 0
    assert summary["bytes_up_per_sample"] == 0
    assert pictures(tree) == {}
    assert "No round was closed" in text


def test_a_single_round_is_drawn(tmp_path: Path, result: dict[str, Any]) -> None:
    result["history"] = result["history"][:1]
    _, tree, _ = write(tmp_path, result)
    assert len(list(pictures(tree)["Accuracy over rounds"].iter("circle"))) == 3


def test_numbers_that_are_none_are_null(tmp_path: Path, result: dict[str, Any]) -> None:
    result["history"][1]["server_loss"] = math.nan
    result["history"][1]["train_loss"]["2"] = math.inf
    result["devices"][0]["exit_accuracy"] = math.nan
    summary, _, text = write(tmp_path, result)
    assert summary["devices"][0]["exit_accuracy"] is None
    assert "nan" not in text.lower().split()


def test_names_cannot_become_markup(tmp_path: Path, result: dict[str, Any]) -> None:
    evil = 'image-folder:/a<script>"&b'
    result["settings"]["dataset"] = evil
    result["devices"][0]["device"] = "<b>d0"
    summary, tree, text = write(tmp_path, result)
    assert summary["dataset"] == evil
    assert evil in text
    assert not list(tree.iter("script"))


def test_a_long_run_of_many_devices_stays_small(tmp_path: Path, result: dict[str, Any]) -> None:
    result["history"] = [closed_round(n, 0.5 + 0.3 * n / 3000) for n in range(1, 3001)]
    result["devices"] = [device(f"device-{n}", 2 + n % 2, 20, (0.5, 0.8)) for n in range(500)]
    _, tree, text = write(tmp_path, result)
    assert (tmp_path / "report.html").stat().st_size < 500_000
    assert len(list(pictures(tree)["Bytes per round, by role"].iter("rect"))) <= 48 * 3
    assert "Each bar is the mean of several rounds" in text
    assert "exit at cut 2 (device-0, device-2 and 248 more)" in text


def test_the_input_is_left_as_it_was(tmp_path: Path, result: dict[str, Any]) -> None:
    before = copy.deepcopy(result)
    write(tmp_path, result)
    assert result == before


def test_a_folder_that_cannot_be_written_is_said_plainly(
    tmp_path: Path, result: dict[str, Any]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(DiskTrouble, match="cannot be written") as caught:
        write_report(blocked / "run", result, wall_seconds=1.0)
    assert caught.value.exit_code == 5


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-3, 1e7),
    wanted=st.integers(1, 12),
)
def test_ticks_lie_within_the_range_and_are_evenly_spaced(
    low: float, span: float, wanted: int
) -> None:
    high = low + span
    marks = ticks(low, high, wanted)
    assert len(marks) <= wanted + 1
    assert all(low - 1e-6 * span <= mark <= high + 1e-6 * span for mark in marks)
    steps = [b - a for a, b in pairwise(marks)]
    assert steps == pytest.approx(steps[:1] * len(steps), rel=1e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_range_of_shares_holds_them_all(values: list[float]) -> None:
    low, high = share_range(values)
    assert 0 <= low < high <= 1
    assert low - 1e-9 <= min(values) <= max(values) <= high + 1e-9


@given(st.integers(1, 2000), st.integers(2, 50))
def test_thinning_keeps_both_ends_and_the_order(count: int, limit: int) -> None:
    points = [(float(n), 0.0) for n in range(count)]
    kept = thinned(points, limit)
    assert len(kept) <= limit
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert list(kept) == sorted(set(kept))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1234, "1.23 kB"),
        (45_678, "45.7 kB"),
        (456_789, "457 kB"),
        (999_999, "1.00 MB"),
        (3_200_000_000, "3.20 GB"),
        (None, "–"),
    ],
)
def test_bytes_have_three_digits(size: float | None, text: str) -> None:
    assert byte_size(size) == text


def test_ticks_of_bytes_are_short() -> None:
    assert [short_size(size) for size in (0, 2_500_000, 50_000_000)] == ["0", "2.5 MB", "50 MB"]


@pytest.mark.parametrize(
    ("duration", "text"),
    [(3.14, "3.1 s"), (59.6, "1 min 0 s"), (97.7, "1 min 38 s"), (7260, "2 h 1 min")],
)
def test_durations_are_readable(duration: float, text: str) -> None:
    assert seconds(duration) == text
