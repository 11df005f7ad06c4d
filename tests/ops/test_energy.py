from __future__ import annotations

from pathlib import Path

import pytest

from ops.energy import EnergyRates, load_energy_table
from ops.errors import SettingsWrong

GOOD = """
[device.board]
idle_watts = 1.0
load_watts = 5.0
cores = 4
source = "a test"
[radio.air]
joules_per_byte = 1e-6
source = "a test"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "energy.toml"
    path.write_text(text)
    return path


def test_the_bundled_table_has_a_source_for_everything() -> None:
    table = load_energy_table()
    assert {"raspberry-pi-4"} <= table.device.keys()
    assert {"wifi"} <= table.radio.keys()
    sources = [board.source for board in table.device.values()]
    sources += [radio.source for radio in table.radio.values()]
    assert all(sources)
    assert table.device["raspberry-pi-4"].watts_per_core == pytest.approx((6.4 - 2.7) / 4)


def test_joules_are_core_seconds_and_bytes(tmp_path: Path) -> None:
    table = load_energy_table(written(tmp_path, GOOD))
    rates = table.rates("board", "air", slower=10)
    assert rates == EnergyRates(watts_per_core=1.0, joules_per_byte=1e-6, slower=10)
    assert rates.joules(0.5, 2_000_000) == pytest.approx(0.5 * 10 * 1.0 + 2.0)
    assert rates.joules(0, 0) == 0


def test_a_class_or_radio_that_is_not_there_is_named_with_those_that_are() -> None:
    table = load_energy_table()
    with pytest.raises(SettingsWrong, match=r"--device-class toaster.*raspberry-pi-4"):
        table.rates("toaster", "wifi")
    with pytest.raises(SettingsWrong, match=r"--radio smoke.*wifi"):
        table.rates("raspberry-pi-4", "smoke")
    with pytest.raises(SettingsWrong, match=r"--slower 0"):
        table.rates("raspberry-pi-4", "wifi", slower=0)
    with pytest.raises(SettingsWrong, match=r"--slower inf"):
        table.rates("raspberry-pi-4", "wifi", slower=float("inf"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[device", "energy-table"),
        (GOOD.replace("cores = 4", "cores = 0"), r"device\.board\.cores = 0"),
        (GOOD.replace('source = "a test"\n[radio', "[radio"), r"device\.board\.source"),
        (GOOD.replace("load_watts = 5.0", "load_watts = 0.5"), r"load_watts = 0\.5.*1\.0"),
        (GOOD.replace("joules_per_byte = 1e-6", "joules_per_byte = -1"), r"joules_per_byte = -1"),
        (GOOD.replace("load_watts = 5.0", "load_watts = inf"), r"load_watts = inf.*finite"),
        (GOOD + "price = 3", "price"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsWrong, match=said):
        load_energy_table(written(tmp_path, text))


def test_a_missing_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsWrong, match=r"nothing\.toml"):
        load_energy_table(tmp_path / "nothing.toml")
