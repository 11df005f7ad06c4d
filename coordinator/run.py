"""One run of a fleet: its rounds one after another, and what they come to.

    gathering ─enough devices→ training ⟲ rounds ─last round→ inference ─all answered→ finished

Decisions are pure functions in ``coordinator.rounds``; what they are asked with is kept here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from broker.envelopes import Envelope
from broker.fields import RunPhase
from broker.training_messages import Activations, DeviceParameters, FeatureGradients, Report
from coordinator import orders
from coordinator.aggregation import Model
from coordinator.evaluation import Evaluator
from coordinator.history import History
from coordinator.label_counts import LabelCounts
from coordinator.observer import Observer
from coordinator.open_rounds import OpenRounds
from coordinator.placement import Placement
from coordinator.published import Published
from coordinator.registry import Device, Registry
from coordinator.replies import refusal
from coordinator.results import device_results, round_scores
from coordinator.rounds import (
    Verdict,
    Work,
    judge,
    judge_buffer,
    quorum_of,
    sample_devices,
)
from coordinator.server_momentum import carry_over
from coordinator.serving_version import ServingVersion
from coordinator.settings import CoordinatorSettings
from coordinator.snapshot import Standing
from coordinator.store import Checkpoint
from coordinator.traffic import TrafficLog
from coordinator.training import RoundInProgress
from coordinator.workload import Workload
from tensors.codecs import parse_codec

log = logging.getLogger("splitfleet.coordinator")

SAY_AGAIN_S = 1.0
"""The announcement is not said again to devices that ask for an old round more often than that."""
REPORTS_S = 2.0
"""How long the result of a run without inference waits for the devices' last accounts."""


class Keeper(Protocol):
    """Where checkpoints go; ``coordinator.store.Store`` is the one on disk."""

    def announce(self, round_number: int, attempt: int) -> None: ...

    def announced(self) -> tuple[int, int]: ...

    def save(self, checkpoint: Checkpoint) -> None: ...

    def newest(self) -> tuple[int, float] | None: ...

    def save_result(self, result: dict[str, Any]) -> None: ...

    def result_version(self) -> int | None: ...


class Run:
    """Opens, closes, extends and abandons rounds, and sends what they merge to."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        name: str,
        checkpoint: Checkpoint,
        *,
        registry: Registry,
        new_round: Callable[[Model, float], RoundInProgress],
        serving: ServingVersion,
        evaluator: Evaluator | None,
        placement: Placement,
        store: Keeper,
        observer: Observer,
        traffic: Callable[[], dict[str, int]],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._new_round = new_round
        self._evaluator = evaluator
        self._placement = placement
        self._store = store
        self._observer = observer
        self._clock = clock
        self._barrier = settings.aggregation == "rounds"
        # An attempt announced before a crash is never announced again: its round gets a new one.
        self._number = max(checkpoint.round, store.announced()[0] - 1)
        self._attempt = 0
        self._returning_until = clock() + settings.return_wait_s if checkpoint.registry else None
        self._tell_of_checkpoint()
        if checkpoint.history:
            observer.resumed(checkpoint.history[-1])
        self._history = History(name, checkpoint.history, recent=max(1, settings.staleness) + 1)
        self._traffic = TrafficLog(checkpoint.traffic, traffic)
        self._workload = Workload(settings, checkpoint.scheduler)
        self._rounds = OpenRounds(settings, observer)
        self._phase: RunPhase = "gathering"
        observer.phase(self._phase)
        self._due: float | None = None
        self._away_since: float | None = None
        self._said_again = -math.inf
        self._turned_away: dict[str, None] = {}
        """Without a barrier: devices that wait for room, in order."""
        self._deadline_s = settings.round_deadline_s
        self.name = name
        self.published = Published(
            name,
            checkpoint.version,
            checkpoint.model,
            set(checkpoint.trained_cuts),
            parse_codec(settings.parameter_codec),
            checkpoint.residual,
            placement.classifier,
        )
        self._serving = serving

    # -- what devices say -------------------------------------------------------------------------

    def join(self, device: Device, stamp: tuple[str, int, int]) -> list[Envelope]:
        """A device wants to take part in a round."""
        current = self._rounds.current
        if current is None or stamp != current.stamp:
            self._observer.message_dropped("stale_join")
            if self._clock() < self._said_again + SAY_AGAIN_S:
                return []  # many ask at once when a round begins; one answer reaches them all
            self._said_again = self._clock()
            return [self.announcement()]
        if not self._barrier and not self._admit(device, current):
            self._turned_away[device.name] = None
        return [current.join(device.name)]

    def _admit(self, device: Device, current: RoundInProgress) -> bool:
        """Without a barrier: let a device in if the broker's queue has room for its batches."""
        if device.cut is None:
            return False
        ready = self._registry.ready
        room = self._placement.room(d.cut or 1 for d in ready)
        others = self._rounds.at_work - {device.name}
        taken = sum(self._rounds.credits(name) for name in others if self._registry[name].online)
        if taken >= room:
            return False
        current.admit(device.name, self._work(device), devices=len(ready), most=room - taken)
        return True

    def _call_in(self) -> list[Envelope]:
        """Tell devices that were turned away when there is room."""
        current, out = self._rounds.current, list[Envelope]()
        while self._turned_away and current is not None:
            name = next(iter(self._turned_away))
            device = self._registry[name]
            if device.online and not self._admit(device, current):
                break
            del self._turned_away[name]
            if device.online:
                out.append(current.join(name))
        return out

    def activations(self, device: Device, message: Activations) -> list[Envelope]:
        """A batch of this run, or of one that nobody knows any more."""
        found = self._rounds.find(message.stamp)
        if found is not None and self._rounds.trains(found):
            out = found.activations(device.name, message)
            self._note(found, device)
            return out
        ours = message.run == self.name
        self._observer.batch_discarded("stale_attempt" if ours else "foreign_run")
        # With a barrier the announcement ends the attempt, and what was learnt so far comes still.
        return [refusal(device.name, message.stamp)] if ours and not self._barrier else []

    def gradients(self, device: Device, message: FeatureGradients) -> list[Envelope]:
        """The gradient of a batch's last features, from the device that has the labels."""
        found = self._rounds.find(message.stamp)
        if found is not None and self._rounds.trains(found):
            out = found.gradients(device.name, message)
            self._note(found, device)
            return out
        self._observer.message_dropped("stale_attempt")
        ours = message.run == self.name
        return [refusal(device.name, message.stamp)] if ours and not self._barrier else []

    def parameters(self, device: Device, message: DeviceParameters) -> list[Envelope]:
        """What a device has learnt, in this round or in an earlier one."""
        found = self._rounds.find(message.stamp)
        if found is None:
            self._observer.message_dropped("stale_attempt")
            return [refusal(device.name, message.stamp)] if message.run == self.name else []
        brought, out = found.parameters(device.name, message)
        if brought is not None:
            self._rounds.take(brought, self.published.version)
        self._note(found, device)
        return out

    def expel(self, device: str) -> list[Envelope]:
        """A device is in quarantine: it has no part any more in the rounds that are open."""
        self._turned_away.pop(device, None)
        return [said for each in self._rounds for said in each.expel(device)]

    def report(self, device: Device, report: Report) -> None:
        """A device's own account of an attempt."""
        current = self._rounds.current
        running = current is not None and current.stamp == report.stamp
        self._history.report(device.name, report, open_round=running)

    # -- time -------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the last round and the devices' answers are behind us."""
        return self._phase == "finished"

    @property
    def has_work(self) -> bool:
        """Whether batches wait to be trained on together."""
        return self._rounds.current is not None and self._rounds.current.gathered

    def work(self) -> list[Envelope]:
        """Train on batches that have waited for each other."""
        current = self._rounds.current
        return [] if current is None else current.train_gathered()

    def tick(self) -> list[Envelope]:
        """Receipts that have waited for company, and the end of waiting after a restart."""
        if self._returning_until is not None and self._clock() >= self._returning_until:
            self._returning_until = None
        return self._rounds.receipts()

    @property
    def next_tick(self) -> float | None:
        """When something is due, on the clock."""
        due = [self._returning_until, self._rounds.receipts_due]
        if self._away_since is None:
            due.append(self._due)
        return min((time for time in due if time is not None), default=None)

    def advance(self) -> list[Envelope]:
        """Open, close, extend or abandon a round, or end the run, if it is time."""
        if self._phase == "gathering":
            return self._gather()
        if self._phase == "inference":
            return self._await_answers()
        current = self._rounds.current
        if self._phase != "training" or current is None:
            return []
        verdict = self._verdict(current)
        if verdict is Verdict.WAIT:
            return self._call_in()
        if verdict is Verdict.EXTEND:
            current.extended = True
            self._due = self._clock() + self._deadline_s
            self._observer.round_ended(self._number, "extended", {})
            log.warning("round %d is below quorum at its deadline: extended", self._number)
            return []
        return self._end_round(current, closed=verdict is Verdict.CLOSE)

    @property
    def number(self) -> int:
        """Of the round that runs, or the last one."""
        return self._number

    def standing(self) -> Standing:
        """Where it is; may be asked for in any thread."""
        due, away = self._due, self._away_since
        return Standing(
            run=self.name,
            phase=self._phase,
            version=self.published.version,
            rounds=self._rounds,
            rounds_wanted=self._settings.rounds,
            due_s=None if due is None or away is not None else due - self._clock(),
            records=self._history.records,
            traffic=self._traffic.totals(),
        )

    def announcement(self) -> Envelope:
        """What the fleet is doing now."""
        return orders.announcement(
            self._settings,
            (self.name, self._number, self._attempt),
            self._phase,
            self.published.version,
            self._deadline_s,
        )

    def assignment(self, device: Device) -> Envelope:
        """What a device has to do in this run."""
        grant = self._placement.credits(device.cut or 1, len(self._registry.devices))
        return orders.assignment(self._settings, self.name, device, grant)

    def connected(self) -> list[Envelope]:
        """The broker is there (again), maybe without its retained messages: say them all."""
        if self._away_since is not None and self._due is not None:
            self._due += self._clock() - self._away_since
        self._away_since = None
        self.published.say_again()
        said = [*self._manifests(), *self._serving.say_again(), self.announcement()]
        return said + self.advance()

    def disconnected(self) -> None:
        """Nobody can be heard: the time until the connection is back is nobody's fault."""
        if self._away_since is None:
            self._away_since = self._clock()

    # -- rounds -----------------------------------------------------------------------------------

    def _verdict(self, current: RoundInProgress) -> Verdict:
        overdue = self._overdue
        if not self._barrier:
            return judge_buffer(
                contributions=len(current.added),
                wanted=self._settings.buffer_size,
                overdue=overdue,
            )
        taking_part = len(current.participants) - len(current.expelled)
        if not taking_part:
            return Verdict.ABANDON
        return judge(
            participants=taking_part,
            finished=current.finished,
            quorum=quorum_of(taking_part, self._settings.quorum),
            overdue=overdue,
            extended=current.extended,
        )

    def _gather(self) -> list[Envelope]:
        if self._number >= self._settings.rounds:
            return self._begin_inference()
        needed = self._settings.min_devices
        if self._number or self._registry.quarantined:
            needed = quorum_of(needed, self._settings.quorum)
        if self._registry.online < needed:
            return []
        ready = self._registry.ready
        if len(ready) < needed:
            return []
        if self._returning_until is not None and len(ready) < len(self._registry.devices):
            return []  # after a restart the devices come back one by one
        self._returning_until = None
        return self._open_round(ready)

    def _open_round(self, ready: Sequence[Device]) -> list[Envelope]:
        settings = self._settings
        self._number += 1
        last_number, last_attempt = self._store.announced()
        self._attempt = last_attempt + 1 if last_number == self._number else 0
        self._store.announce(self._number, self._attempt)
        work: dict[str, Work] = {}
        if self._barrier:
            room = self._placement.room(device.cut or 1 for device in ready)
            if settings.participation * len(ready) > room:
                log.warning(
                    "only %d of %d devices take part at a time: more batches would not fit the "
                    "broker's queue; raise max_queued_messages there and queue_chunks here",
                    room,
                    len(ready),
                )
            chosen = sample_devices(
                [device.name for device in ready],
                settings.participation,
                most=room,
                seed=settings.seed,
                round_number=self._number,
                attempt=self._attempt,
            )
            work = {name: self._work(self._registry[name]) for name in chosen}
        self._deadline_s = self._workload.deadline(work.values())
        rate = orders.server_rate(settings, self._number, len(work))
        current = self._new_round(self.published.model, rate)
        current.open(
            (self.name, self._number, self._attempt),
            self.published.version,
            work,
            first_server_block=min(device.cut or 1 for device in ready),
        )
        self._history.begin()
        self._set_phase("training")
        self._due = self._clock() + self._deadline_s
        self._observer.round_opened(
            self._number, settings.rounds, self._attempt, sum(w.quota for w in work.values())
        )
        self._rounds.begin(current)
        return [self.announcement()]

    def _end_round(self, current: RoundInProgress, *, closed: bool) -> list[Envelope]:
        self._rounds.current = self._due = None
        self._turned_away.clear()
        changed = self._workload.note(current, self._registry, self._deadline_s, closed=closed)
        for device in changed:
            self._observer.work_changed(device.name, device.cut or 0, device.load.share)
        if not closed:
            self._rounds.give_up(current)
            self._observer.round_ended(self._number, "abandoned", {})
            log.warning("round %d stayed below quorum: abandoned", self._number)
            self._set_phase("gathering")
            return self.advance() or [self.announcement()]
        if missing := current.unfinished:
            log.warning("round %d closes without %s", self._number, some_of(missing))
        out: list[Envelope] = []
        while current.gathered:
            out += current.train_gathered()
        model = carry_over(
            self._settings.server_momentum,
            self.published.model,
            current.merge(),
            outer=self._settings.outer_momentum,
        )
        self.published.replace(model, current.trained_cuts, self._cuts())
        self._rounds.remember(current, self.published.version)
        record = self._record(current)
        for folded in current.added:
            device = self._registry[folded.device]
            device.rounds += 1
            device.samples += folded.samples
        policies = self._serving.close(self.published)
        self._store.save(self._checkpoint(record, policies))
        self._tell_of_checkpoint()
        self._serving.publish()
        self._observer.round_ended(self._number, "closed", record)
        self._set_phase("gathering")
        out += self._manifests()
        if self._barrier:  # without one devices ask when they have finished what they are at
            out += [self.published.broadcast(cut) for cut in self._cuts()]
        out += self._serving.news()
        # Another cut layer ends what a late device is at, which the broadcast lets it bring first.
        out += [self.assignment(device) for device in changed]
        return out + (self.advance() or [self.announcement()])

    def _work(self, device: Device) -> Work:
        assert device.cut is not None
        known = self._settings.labels == "server"
        if self._settings.label_skew != "none" and known and device.labels is None:
            device.labels = LabelCounts([0] * self._settings.network.classes)
        quota = orders.quota(self._settings, device)
        return Work(device.cut, quota, device.labels, device.frozen)

    # -- the end ----------------------------------------------------------------------------------

    def _begin_inference(self) -> list[Envelope]:
        self._rounds.end()
        if self._store.result_version() == self.published.version:  # before a restart
            return self._end()
        if not self._settings.inference:
            if self._due is None:
                self._due = self._clock() + REPORTS_S
            return [] if self._history.unreported and not self._overdue else self._finish()
        self._set_phase("inference")
        self._due = self._clock() + self._settings.inference_deadline_s
        return [self.announcement()]

    def _await_answers(self) -> list[Envelope]:
        ready = self._registry.ready
        waiting = [d for d in ready if d.inference is None and d.hello and d.hello.test_samples]
        if (waiting or not ready) and not self._overdue:
            return []
        return self._finish()

    def _finish(self) -> list[Envelope]:
        self._due = None
        self._store.save_result(self._result())
        return self._end()

    def _end(self) -> list[Envelope]:
        self._set_phase("finished")
        return [self.announcement()]

    # -- small parts ------------------------------------------------------------------------------

    @property
    def _overdue(self) -> bool:
        away = self._away_since is not None
        return self._due is not None and not away and self._clock() >= self._due

    def _note(self, found: RoundInProgress, device: Device) -> None:
        """The record of a round that has closed keeps up with what its devices still do."""
        if found is not self._rounds.current and device.name in found.participants:
            self._history.update(found.stamp, device.name, found.entry(device.name))

    def _record(self, current: RoundInProgress) -> dict[str, Any]:
        record = current.record(self._clock())
        record["round"], record["version"] = self._number, self.published.version
        record["learning_rate"] = orders.rate(self._settings, self._number)
        record["deadline_s"] = self._deadline_s
        record["bytes"] = self._traffic.since_mark()
        record |= round_scores(self.published, self._evaluator)
        self._history.close(record)
        return record

    def _checkpoint(self, record: dict[str, Any], policies: dict[str, Any]) -> Checkpoint:
        return Checkpoint(
            version=self.published.version,
            round=self._number,
            model=self.published.model,
            trained_cuts=sorted(self.published.trained),
            history=self._history.records,
            registry=self._registry.dump(),
            traffic=self._traffic.totals(),
            residual=self.published.residual,
            scheduler=self._workload.dump(),
            score=record.get("server_accuracy"),
            policies=policies,
        )

    def _result(self) -> dict[str, Any]:
        return {
            "run": self.name,
            "settings": self._settings.model_dump(mode="json"),
            "rounds": self._number,
            "version": self.published.version,
            "history": self._history.records,
            "traffic": self._traffic.totals(),
            "devices": device_results(
                self._registry, self.published, self._evaluator, self._settings
            ),
        }

    def _tell_of_checkpoint(self) -> None:
        newest = self._store.newest()
        if newest is not None:
            size, written = newest
            self._observer.checkpoint(size, written=written)

    def _manifests(self) -> list[Envelope]:
        return [manifest for cut in self._cuts() for manifest in self.published.news(cut)]

    def _cuts(self) -> list[int]:
        return sorted({d.cut for d in self._registry.devices.values() if d.cut is not None})

    def _set_phase(self, phase: RunPhase) -> None:
        if phase != self._phase:
            self._phase = phase
            self._observer.phase(phase)


def some_of(names: Sequence[str]) -> str:
    """A few names for a line of the log."""
    few = ", ".join(names[:5])
    return few if len(names) <= 5 else f"{few} and {len(names) - 5} more"
