"""A coordinator's state machine driven by hand, on a store in a temporary folder."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from broker.envelopes import Envelope, up
from broker.fields import Message
from broker.messages import Status
from broker.serving_messages import Features, Inference
from broker.training_messages import Report, Round
from coordinator.checkpoint import Checkpoint
from coordinator.core import CoordinatorCore
from coordinator.observer import Observer
from coordinator.service import build_core
from coordinator.store import Store
from coordinator.telemetry import Gain
from tests.server_side import make_activations, make_upload
from tests.tiny import RUN, Clock, make_hello, make_settings

M = TypeVar("M", bound=Message)
_FOLDERS = Path(tempfile.mkdtemp(prefix="splitfleet-tests-"))
atexit.register(shutil.rmtree, _FOLDERS, ignore_errors=True)


class Counting(Observer):
    def __init__(self) -> None:
        self.discarded: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.outcomes: list[tuple[int, str]] = []
        self.phases: list[str] = []
        self.states: dict[str, int] = {}
        self.known: Mapping[str, object] = {}
        self.answers: list[tuple[int, int, str | None]] = []
        self.gains: list[Gain] = []
        self.coded: Counter[str] = Counter()
        self.checkpoints: list[int] = []
        self.up: list[bool] = []
        self.late: list[tuple[str, int]] = []
        self.changed: list[tuple[str, int, float]] = []

    def codec_took(self, stage: str, seconds: float) -> None:
        self.coded[stage] += 1

    def checkpoint(self, size: int, *, written: float) -> None:
        self.checkpoints.append(size)

    def connection(self, *, up: bool) -> None:
        self.up.append(up)

    def telemetry(self, gain: Gain) -> None:
        self.gains.append(gain)

    def late_work(self, outcome: str, samples: int) -> None:
        self.late.append((outcome, samples))

    def work_changed(self, device: str, cut: int, share: float) -> None:
        self.changed.append((device, cut, share))

    def batch_discarded(self, reason: str) -> None:
        self.discarded[reason] += 1

    def message_dropped(self, reason: str) -> None:
        self.dropped[reason] += 1

    def round_ended(self, number: int, outcome: str, record: dict[str, object]) -> None:
        self.outcomes.append((number, outcome))

    def resumed(self, record: Mapping[str, object]) -> None:
        self.known = record

    def devices(self, by_state: dict[str, int]) -> None:
        self.states = by_state

    def phase(self, phase: str) -> None:
        self.phases.append(phase)

    def features_answered(self, cut: int, images: int, refused: str | None) -> None:
        self.answers.append((cut, images, refused))


class Harness:
    """One life of a coordinator; another one on the same ``folder`` is a restart."""

    def __init__(self, folder: Path | None = None, *, fresh: bool = False, **settings: Any) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(dir=_FOLDERS))
        self.settings = make_settings(state_dir=self.folder, **settings)
        self.clock = Clock()
        self.observer = Counting()
        self.core: CoordinatorCore = build_core(
            self.settings,
            observer=self.observer,
            traffic=lambda: {"up/activation/a": 7},
            boot="boot",
            clock=self.clock,
            fresh=fresh,
            name=lambda: "afresh" if fresh else RUN,
        )
        self.cuts: dict[str, int] = {}
        self.said: list[Envelope] = []
        self.announced: Round | None = None
        self._note(self.core.connected())

    def _note(self, envelopes: list[Envelope]) -> list[Envelope]:
        self.said += envelopes
        for envelope in envelopes:
            if isinstance(envelope.message, Round):
                self.announced = envelope.message
        return envelopes

    @property
    def round(self) -> Round:
        assert self.announced is not None
        return self.announced

    def checkpoint(self) -> Checkpoint:
        """The last closed round as a restart would find it."""
        store = Store(self.folder)
        assert store.current() is not None
        found = store.latest()
        assert found is not None
        return found

    def hear(self, device: str, *messages: Message) -> list[Envelope]:
        out: list[Envelope] = []
        for message in messages:
            if isinstance(message, Features):
                out += self._note(self._ask(up(device, message)))
            else:
                out += self._note(self.core.receive(up(device, message)))
        return out

    def _ask(self, question: Envelope) -> list[Envelope]:
        """As the answering machine does beside the one that trains, without waiting for others."""
        answering = self.core.answering
        out = answering.receive(question)
        while answering.next_tick is not None:
            self.clock.now = max(self.clock.now, answering.next_tick)
            out += answering.tick()
        return out

    def wait(self, seconds: float) -> list[Envelope]:
        """Let time pass, from one tick that is due to the next."""
        out: list[Envelope] = []
        end = self.clock.now + seconds
        for _ in range(1000):
            due = self.core.next_tick
            if due is None or due > end:
                self.clock.now = end
                return out
            self.clock.now = max(self.clock.now, due)
            out += self._note(self.core.tick())
            due = self.core.next_tick
            assert due is None or due > self.clock.now, "it would be called again and again"
        raise AssertionError("too many ticks")

    def reconnect(self) -> list[Envelope]:
        """The broker is back, maybe without its memory."""
        return self._note(self.core.connected())

    # -- what devices do --------------------------------------------------------------------------

    def online(self, device: str, connection: str = "c1") -> list[Envelope]:
        return self.hear(device, Status(state="online", connection=connection))

    def offline(self, device: str, connection: str = "c1") -> list[Envelope]:
        return self.hear(device, Status(state="offline", connection=connection))

    def join(self, device: str, cut: int, **hello: Any) -> list[Envelope]:
        self.cuts[device] = cut
        return self.online(device) + self.hear(device, make_hello(cut=cut, **hello))

    def send(self, device: str, *batches: int, **changes: Any) -> list[Envelope]:
        """Batches of the round as it is announced."""
        out: list[Envelope] = []
        for batch in batches:
            fields = {"version": self.round.version} | changes
            out += self.hear(
                device,
                make_activations(self.round.stamp, batch, cut=self.cuts[device], **fields),
            )
        return out

    def upload(self, device: str, **changes: Any) -> list[Envelope]:
        fields = {"version": self.round.version, "produced": 3} | changes
        return self.hear(device, make_upload(self.round.stamp, cut=self.cuts[device], **fields))

    def train(self, *devices: str) -> list[Envelope]:
        """A whole round."""
        out: list[Envelope] = []
        for device in devices:
            out += self.send(device, 0, 1, 2)
        announced = self.round
        for device in devices:
            assert self.round == announced
            out += self.upload(device)
        return out


def every(kind: type[M], envelopes: list[Envelope], device: str | None = None) -> list[M]:
    """All messages of this kind, for this device."""
    return [
        envelope.message
        for envelope in envelopes
        if isinstance(envelope.message, kind)
        and (device is None or envelope.address.device == device)
    ]


def only(kind: type[M], envelopes: list[Envelope], device: str | None = None) -> M:
    """The one message of this kind, for this device."""
    (found,) = every(kind, envelopes, device)
    return found


def inference_report(server: Harness, **changes: Any) -> Report:
    fields: dict[str, Any] = dict.fromkeys(
        [name for name, field in Inference.model_fields.items() if name != "threshold"], 0
    )
    fields |= {"version": server.round.version, "threshold": 0.5, "images": 4, "exits": 4}
    run, number, attempt = server.round.stamp
    return Report(run=run, round=number, attempt=attempt, inference=Inference(**fields | changes))
