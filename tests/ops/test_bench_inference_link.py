from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ops import bench_link_fleet
from ops.bench_inference_link import (
    Setup,
    about_pictures,
    curves,
    make_rows,
    parse_thresholds,
    picture_sizes,
    run_link,
)
from ops.bench_link_devices import Measured, OfDevice, Task, shares
from ops.bench_link_fleet import TrainedRun
from ops.errors import OpsError, SettingsWrong
from tensors.datasets import BUNDLED
from tests.fleet_processes import Fleet
from tests.mosquitto_process import Mosquitto
from tests.ops.test_network_link import needs_links
from tests.tiny import make_dataset

SETTINGS = {"fleet": "f", "dataset": BUNDLED, "network": {"name": "resnet18"}}
PICTURES = {"PNG": 500.0, "JPEG": 700.0}


def of_device(by: list[str], right: list[bool], **changes: Any) -> OfDevice:
    fields: dict[str, Any] = {
        "cut": 2,
        "seconds": [0.1 if who == "server" else 0.01 for who in by],
        "by": by,
        "reasons": {},
        "right": right,
        "exit_right": sum(right),
        "offloads": by.count("server") + by.count("fallback"),
        "bytes_up": 100 * by.count("server"),
        "bytes_down": 10 * by.count("server"),
    }
    return OfDevice(**(fields | changes))


def measured(*devices: OfDevice) -> Measured:
    asked = sum(device.offloads for device in devices)
    return Measured(devices=list(devices), bytes_up=150 * asked, bytes_down=20 * asked)


def three() -> dict[float, Measured]:
    """Never, half and always asking, about 40 images; the exit gets half of them right."""
    edge = [True, False] * 20
    return {
        -1.0: measured(of_device(["exit"] * 40, edge)),
        0.5: measured(of_device(["exit", "server"] * 20, [True] * 40)),
        1.0: measured(of_device(["server"] * 40, [True] * 40)),
    }


def test_rows_are_of_all_devices_and_compare_image_by_image() -> None:
    edge, half, cloud = make_rows(three())
    assert (edge["threshold"], half["threshold"], cloud["threshold"]) == (-1.0, 0.5, 1.0)
    assert (edge["accuracy"], half["accuracy"], cloud["accuracy"]) == (0.5, 1.0, 1.0)
    assert (edge["offloaded"], half["offloaded"], cloud["offloaded"]) == (0.0, 0.5, 1.0)
    assert half["mean_ms"] == pytest.approx(55.0)
    assert cloud["p99_ms"] == pytest.approx(100.0)
    assert (half["bytes_up"], half["bytes_down"]) == (75.0, 10.0)
    assert half["tensor_bytes_up"] == 50.0
    assert half["against_edge"] == pytest.approx(50.0)
    assert 0 < half["half_edge"] < 50
    assert half["against_cloud"] == half["half_cloud"] == 0.0
    assert [row["beats"] for row in (edge, half, cloud)] == [False, True, False]
    assert half["cuts"][2]["accuracy"] == 1.0


def test_what_is_not_seen_to_be_better_does_not_beat_both() -> None:
    found = three()
    right = [True, False] * 20
    right[1] = True  # one image of 40
    found[0.5] = measured(of_device(["exit", "server"] * 20, right))
    assert [row["beats"] for row in make_rows(found)] == [False, False, False]


def test_fallbacks_and_images_that_nobody_answered_are_counted() -> None:
    found = three()
    by = ["fallback"] * 10 + ["nobody"] * 2 + ["exit"] * 28
    found[0.5] = measured(of_device(by, [False] * 40, reasons={"timeout": 10}))
    half = make_rows(found)[1]
    assert half["fallbacks"] == 0.25
    assert half["accuracy"] == 0.0


def test_curves_are_one_svg_with_a_panel_each_for_accuracy_latency_and_bytes() -> None:
    root = ET.fromstring(curves(make_rows(three()), PICTURES))  # noqa: S314 our own
    panels = [child for child in root if child.tag.endswith("svg")]
    assert len(panels) == 3
    lines = [child for panel in panels for child in panel if child.tag.endswith("polyline")]
    assert len(lines) == 3 + 4 + 4
    titles = [child.text for child in root if child.tag.endswith("text")]
    assert titles == ["accuracy", "latency, ms", "bytes an image, on the link"]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_weighed_as_files(channels: int) -> None:
    data = make_dataset(8)
    images = np.repeat(data.images, channels, axis=3)
    data = dataclasses.replace(data, images=images, mean=(0.3,) * channels, std=(0.2,) * channels)
    sizes = picture_sizes(data, np.arange(8))
    assert all(8 * 8 * channels / 10 < size < 2000 for size in sizes.values())
    said = about_pictures(sizes, Setup(delay_s=0.02, bits_per_s=1e6))
    assert f"PNG {sizes['PNG']:.0f} bytes, {40 + sizes['PNG'] * 0.008:.1f} ms" in said


def test_what_the_devices_are_told_and_say_goes_through_json() -> None:
    task = Task(
        url="mqtts://192.0.2.1:8883",
        fleet="fleet",
        names=("cut-2", "cut-3"),
        identities=("fleet/cut-2", "fleet/cut-3"),
        cuts=(2, 3),
        state_dir="/tmp/x",  # noqa: S108 not used
        dataset=BUNDLED,
        data_root=None,
        networks=(),
        images=3,
        images_per_s=1.0,
        threshold=0.5,
        interface="slow0",
    )
    assert Task.read(json.dumps(dataclasses.asdict(task))) == task
    found = three()[0.5]
    assert Measured.read(json.dumps(dataclasses.asdict(found))) == found


def test_every_device_is_asked_about_images_of_its_own() -> None:
    parts = shares(make_dataset(64), 3, 10)
    assert [len(part) for part in parts] == [10, 10, 10]
    assert len(set(np.concatenate(parts).tolist())) == 30


# -- what is wrong --------------------------------------------------------------------------------


def bench(state_dir: Path, setup: Setup | None = None, **given: Any) -> list[dict[str, Any]]:
    options = {"thresholds": (), "data_root": None, "append": None, "plot": None, "quiet": True}
    return run_link(state_dir, setup or Setup(), **(options | given))


@pytest.mark.parametrize("threshold", [-1.1, 1.01, float("nan")])
def test_a_threshold_where_no_confidence_can_lie_is_refused(
    tmp_path: Path, threshold: float
) -> None:
    with pytest.raises(SettingsWrong, match="thresholds"):
        bench(tmp_path, thresholds=[threshold])


def test_thresholds_are_numbers() -> None:
    assert parse_thresholds("0.5, 0.7,") == [0.5, 0.7]
    with pytest.raises(SettingsWrong, match=r"'0\.5;0\.7'.*write numbers"):
        parse_thresholds("0.5;0.7")


@pytest.mark.parametrize(
    "changes", [{"images": 0}, {"images_per_s": -1.0}, {"delay_s": 0.0}, {"bits_per_s": 0.0}]
)
def test_a_link_or_a_load_that_cannot_be_is_refused(tmp_path: Path, changes: Any) -> None:
    with pytest.raises(SettingsWrong, match="above 0"):
        bench(tmp_path, Setup(**changes))


def test_a_folder_without_a_trained_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpsError, match="is not there"):
        bench(tmp_path / "none")
    with pytest.raises(OpsError, match="no round was closed"):
        bench(tmp_path)
    assert not list(tmp_path.iterdir())


# -- for real -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_links
def test_a_trained_fleet_answers_over_a_slow_link(mosquitto: Mosquitto, tmp_path: Path) -> None:
    settings = {"dataset": BUNDLED, "rounds": 1, "batches_per_round": 4, "calibration_images": 0}
    with Fleet(tmp_path, mosquitto.url, cuts=(1, 3), coordinator=settings) as fleet:
        fleet.start()
        fleet.finish()
    before = {path: path.read_bytes() for path in fleet.state.rglob("*") if path.is_file()}
    rows = bench(
        fleet.state,
        Setup(images=20, images_per_s=20.0, delay_s=0.005, bits_per_s=20e6),
        append=tmp_path / "rows.md",
        plot=tmp_path / "curves.svg",
    )
    edge, cloud = rows
    assert (edge["offloaded"], cloud["offloaded"]) == (0.0, 1.0)
    assert edge["fallbacks"] == cloud["fallbacks"] == 0.0
    assert edge["images"] == cloud["images"] == 40
    assert edge["exit_accuracy"] == cloud["exit_accuracy"], "the same exit, the same images"
    assert edge["bytes_up"] < cloud["tensor_bytes_up"] < cloud["bytes_up"]
    assert set(cloud["cuts"]) == {1, 3}
    assert len((tmp_path / "rows.md").read_text().splitlines()) == 2
    ET.parse(tmp_path / "curves.svg")  # noqa: S314 our own
    after = {path: path.read_bytes() for path in fleet.state.rglob("*") if path.is_file()}
    assert after == before, "the folder is copied, not changed"


@pytest.mark.slow
@needs_links
def test_a_coordinator_that_cannot_start_is_named_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = TrainedRun(tmp_path, "run", SETTINGS, 1, (2,))
    monkeypatch.setattr(TrainedRun, "read", lambda _: run)
    (tmp_path / "current").write_text("gone")
    with pytest.raises(OpsError, match=r"(?s)does not serve.*names the run 'gone'"):
        bench(tmp_path)


@pytest.mark.slow
@needs_links
def test_a_broker_that_ends_is_named_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = TrainedRun(tmp_path, "run", SETTINGS, 1, (2,))
    monkeypatch.setattr(TrainedRun, "read", lambda _: run)
    monkeypatch.setattr(bench_link_fleet, "_BROKER", "echo out of luck")
    with pytest.raises(OpsError, match=r"(?s)does not serve.*broker: out of luck"):
        bench(tmp_path)
