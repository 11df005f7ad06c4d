"""Alert drill: what breaks makes the right alert fire and, once repaired, resolve.

Through a real Prometheus, a real Alertmanager and its webhook; see ``tests.fleet.alert_drill``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from broker.envelopes import encode_message
from broker.frames import split
from broker.link import DEFAULT_CHUNK_BYTES
from tensors.codecs import encode_exact
from tensors.decoding import decode
from tests.fleet.alert_drill import FASTER, Drill, start_drill
from tests.fleet_processes import FLEET

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

QUOTA = 1000


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder: Path = tmp_path_factory.mktemp("drill")
    with start_drill(
        folder,
        cuts=(1, 3, 1, 3),
        coordinator={
            "rounds": 1000,
            "batches_per_round": QUOTA,
            "round_deadline_s": 120,
            "breach_window_s": 60 / FASTER,
            "quarantine_s": 60 / FASTER,
            "quarantine_max_s": 3600 / FASTER,
        },
        agent={"will_delay_s": 1},
        broker={"keepalive_s": 5, "connect_timeout_s": 3},
    ) as running:
        yield running


def test_broker_stops(drill: Drill) -> None:
    with drill.only("SplitfleetBrokerDown/critical"):
        drill.broker.stop()
        drill.fires("SplitfleetBrokerDown/critical")
        drill.broker.start()
        drill.resolves("SplitfleetBrokerDown/critical")


def test_device_freezes(drill: Drill) -> None:
    with drill.only("SplitfleetDevicesOffline/warning"):
        drill.fleet.freeze("device-1")
        drill.fires("SplitfleetDevicesOffline/warning")
        drill.fleet.thaw("device-1")
        drill.resolves("SplitfleetDevicesOffline/warning")


def test_device_sends_nan(drill: Drill) -> None:
    with drill.only("SplitfleetNaN/warning"):
        numbers = iter(range(QUOTA - 1, 0, -1))

        def fires() -> bool:
            send_nan(drill, "device-0", next(numbers))
            return "SplitfleetNaN/warning" in drill.told.firing

        drill.wait(fires, "SplitfleetNaN to fire")
        drill.resolves("SplitfleetNaN/warning")


def test_device_breaks_rules(drill: Drill) -> None:
    with drill.only("SplitfleetDevicesQuarantined/warning"):

        def fires() -> bool:
            for _ in range(30):
                drill.fleet.hears.publish(activations_of("device-0"), b"no frame")
            return "SplitfleetDevicesQuarantined/warning" in drill.told.firing

        drill.wait(fires, "SplitfleetDevicesQuarantined to fire")
        drill.resolves("SplitfleetDevicesQuarantined/warning")


def test_coordinator_dies(drill: Drill) -> None:
    with drill.only("SplitfleetCoordinatorDown/critical"):
        drill.fleet.kill("coordinator")
        drill.fires("SplitfleetCoordinatorDown/critical")
        drill.fleet.start_coordinator()
        drill.resolves("SplitfleetCoordinatorDown/critical")


def send_nan(drill: Drill, device: str, batch: int) -> None:
    """Publish as ``device`` a batch of its round whose activations are no numbers."""
    hears = drill.fleet.hears
    good = hears.last_batch[device]
    tensor = encode_exact(np.full_like(decode(good.tensor), np.nan))
    bad = encode_message(good.model_copy(update={"batch": batch, "tensor": tensor}))
    for frame in split(bad, random.getrandbits(32), DEFAULT_CHUNK_BYTES):
        hears.publish(activations_of(device), frame)


def activations_of(device: str) -> str:
    return f"splitfleet/{FLEET}/device/{device}/up/activations"
