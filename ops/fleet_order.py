"""What the devices of a fleet are sorted by."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.status import DeviceStatus
    from ops.fleet_rates import Rates


class Order(StrEnum):
    """Names and states from A to Z, cuts from the first, of other numbers the largest first."""

    name = "name"
    state = "state"
    cut = "cut"
    heard = "heard"
    samples = "samples"
    loss = "loss"
    bytes = "bytes"
    breaches = "breaches"


def ordered(
    devices: Sequence[DeviceStatus], order: Order, rates: Rates | None
) -> list[DeviceStatus]:
    """Samples and bytes count per second if there are ``rates``; what is not known comes last."""

    def key(device: DeviceStatus) -> tuple[bool, float, str, str]:
        text = device.state if order is Order.state else ""
        number = _number(device, order, rates)
        return number is None, number or 0.0, text, device.name

    return sorted(devices, key=key)


def _number(device: DeviceStatus, order: Order, rates: Rates | None) -> float | None:
    """What comes first is smallest."""
    largest: float | None
    match order:
        case Order.cut:
            return device.cut
        case Order.heard:
            largest = device.heard_s
        case Order.loss:
            largest = device.exit_loss
        case Order.samples if rates is not None:
            largest = rates.of(device.name).samples
        case Order.samples:
            largest = device.samples + device.open_samples
        case Order.bytes if rates is not None:
            largest = rates.of(device.name).bytes
        case Order.bytes:
            largest = device.bytes_up + device.bytes_down
        case Order.breaches:
            largest = device.breaches
        case Order.name | Order.state:
            return 0.0
    return None if largest is None else -largest
