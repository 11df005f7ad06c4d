"""What became of the rounds of a run, also what is learnt of them after they closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker.training_messages import Report
from coordinator.ledger import Stamp


class History:
    """The records of closed rounds, oldest first; of the last ``recent`` more may become known."""

    def __init__(self, run: str, records: Sequence[Mapping[str, Any]], *, recent: int) -> None:
        self._run = run
        self._recent = recent
        self._reports: dict[str, Report] = {}
        self.records: list[dict[str, Any]] = [dict(record) for record in records]

    def begin(self) -> None:
        """A round opens; its devices have not reported yet."""
        self._reports.clear()

    def close(self, record: dict[str, Any]) -> None:
        """Enter the round that has closed, with what its devices have reported so far."""
        for device, report in self._reports.items():
            _enter(record, device, report)
        self.records.append(record)

    @property
    def unreported(self) -> bool:
        """Whether a device that finished the last round has not given its account of it."""
        devices = self.records[-1]["devices"].values() if self.records else ()
        return any(entry["finished"] and "reported" not in entry for entry in devices)

    def report(self, device: str, report: Report, *, open_round: bool) -> None:
        """A device's own account of an attempt; ``open_round``: of the one that is running."""
        if open_round:
            self._reports[device] = report
        for record in self._of(report.stamp):
            _enter(record, device, report)

    def update(self, stamp: Stamp, device: str, entry: Mapping[str, Any]) -> None:
        """A device has done more in a round that has closed."""
        for record in self._of(stamp):
            record["devices"].setdefault(device, {}).update(entry)

    def _of(self, stamp: Stamp) -> list[dict[str, Any]]:
        return [
            record
            for record in self.records[-self._recent :]
            if (self._run, record["round"], record["attempt"]) == stamp
        ]


def _enter(record: dict[str, Any], device: str, report: Report) -> None:
    """A device's own account beside the coordinator's."""
    entry = record["devices"].get(device)
    if entry is not None:
        entry["reported"] = {
            "produced": report.produced,
            "applied": report.applied,
            "discarded": dict(report.discarded),
            "expired": report.expired,
            "timeouts": report.timeouts,
            "late_gradients": report.late_gradients,
            "activation_bytes": report.activation_bytes,
            "activation_values": report.activation_values,
            "activation_levels": report.activation_levels,
        }
