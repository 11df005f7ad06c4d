"""``splitfleet bench inference`` on a real Mosquitto, for a few seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.bench_inference import run_bench
from ops.bench_inference_fleet import CUTS, Asks, Load, Served, ask_all, saturate, serving
from ops.errors import SettingsWrong
from tests.mosquitto_process import Mosquitto


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_image_of_an_open_loop_is_answered_by_the_server(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    served = Served(mosquitto.url, str(tmp_path), width=4, answer_batch=64)
    with serving(served):
        asks = [
            Asks(served.url, served.folder, f"asks-{cut}", cut, rate=10, seconds=3, seed=cut)
            for cut in CUTS[:2]
        ]
        found = ask_all(asks)
        loaded = saturate(Load(served, devices=3, outstanding=4, seconds=2))
    for device in found:
        assert device["by"]["server"] == len(device["answers"]) > 5
        assert device["unanswered"] == 0
        assert device["bytes_up"] > device["bytes_down"] > 0
        for answer in device["answers"]:
            parts = answer["server_queue"] + answer["server_forward"]
            assert 0 < parts < answer["round_trip"] < answer["total"] <= answer["since_due"]
    assert loaded["answered_per_s"] > 0
    assert loaded["refused"] == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_writes_a_row(mosquitto: Mosquitto, tmp_path: Path) -> None:
    rows = tmp_path / "rows.md"
    found = run_bench(
        ["latency"],
        width=4,
        rate=20,
        seconds=2,
        pairs=1,
        broker=mosquitto.url,
        append=rows,
        quiet=True,
    )
    cells = rows.read_text(encoding="utf-8").strip("| \n").split(" | ")
    assert cells == [str(value) for value in found["latency"].values()]
    assert found["latency"]["by server"] == "100.0 %"


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(SettingsWrong, match="latency and batching"):
        run_bench(
            ["speed"],
            width=4,
            rate=1,
            seconds=1,
            pairs=1,
            broker=None,
            append=None,
            quiet=True,
        )
