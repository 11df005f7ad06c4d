"""One run of a fleet: its rounds one after another, and what they come to.

    gathering ─enough devices→ training ⟲ rounds ─last round→ inference ─all answered→ finished

Decisions are pure functions in ``coordinator.rounds``; what they are asked with is kept here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from broker.envelopes import Envelope
from broker.fields import RunPhase
from broker.training_messages import Activations, DeviceParameters, FeatureGradients, Report
from coordinator import orders
from coordinator.aggregation import Model
from coordinator.checkpoint import Checkpoint
from coordinator.deadline import Deadline
from coordinator.observer import Observer
from coordinator.open_rounds import OpenRounds
from coordinator.participation import Participation
from coordinator.placement import Placement
from coordinator.published import Published
from coordinator.registry import Device, Registry
from coordinator.replies import refusal
from coordinator.rounds import Verdict, judge, judge_buffer, quorum_of
from coordinator.run_records import RunRecords
from coordinator.server_momentum import carry_over
from coordinator.serving_version import ServingVersion
from coordinator.settings import CoordinatorSettings
from coordinator.snapshot import Standing
from coordinator.training import RoundInProgress
from coordinator.workload import Workload
from tensors.codecs import parse_codec

log = logging.getLogger("splitfleet.coordinator")

SAY_AGAIN_S = 1.0
"""The announcement is not said again to devices that ask for an old round more often than that."""
REPORTS_S = 2.0
"""How long the result of a run without inference waits for the devices' last accounts."""


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
        records: RunRecords,
        placement: Placement,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._new_round = new_round
        self._records = records
        self._placement = placement
        self._observer = observer
        self._clock = clock
        self._barrier = settings.aggregation == "rounds"
        self._number = records.last_round(checkpoint.round)
        self._attempt = 0
        self._workload = Workload(settings, checkpoint.scheduler)
        self._rounds = OpenRounds(settings, observer)
        self._phase: RunPhase = "gathering"
        observer.phase(self._phase)
        self._deadline = Deadline(clock)
        self._said_again = -math.inf
        self._participation = Participation(
            settings,
            registry,
            placement,
            self._rounds,
            restarted=bool(checkpoint.registry),
            clock=clock,
        )
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
        if not self._barrier:
            self._participation.ask(device, current)
        return [current.join(device.name)]

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
        self._participation.expel(device)
        return [said for each in self._rounds for said in each.expel(device)]

    def report(self, device: Device, report: Report) -> None:
        """A device's own account of an attempt."""
        current = self._rounds.current
        running = current is not None and current.stamp == report.stamp
        self._records.report(device.name, report, open_round=running)

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
        self._participation.tick()
        return self._rounds.receipts()

    @property
    def next_tick(self) -> float | None:
        """When something is due, on the clock."""
        due = [self._participation.due, self._rounds.receipts_due, self._deadline.due]
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
            return self._participation.call_in(current)
        if verdict is Verdict.EXTEND:
            current.extended = True
            self._deadline.begin(self._deadline_s)
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
        return Standing(
            run=self.name,
            phase=self._phase,
            version=self.published.version,
            rounds=self._rounds,
            rounds_wanted=self._settings.rounds,
            due_s=self._deadline.left_s,
            records=self._records.rounds,
            traffic=self._records.traffic(),
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
        self._deadline.resume()
        self.published.say_again()
        said = [*self._manifests(), *self._serving.say_again(), self.announcement()]
        return said + self.advance()

    def disconnected(self) -> None:
        """Nobody can be heard: the time until the connection is back is nobody's fault."""
        self._deadline.pause()

    # -- rounds -----------------------------------------------------------------------------------

    def _verdict(self, current: RoundInProgress) -> Verdict:
        overdue = self._deadline.overdue
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
        ready = self._participation.gathered(first=not self._number)
        return self._open_round(ready) if ready else []

    def _open_round(self, ready: Sequence[Device]) -> list[Envelope]:
        settings = self._settings
        self._number += 1
        self._attempt = self._records.begin_attempt(self._number)
        stamp = (self.name, self._number, self._attempt)
        work = self._participation.draw(ready, stamp) if self._barrier else {}
        self._deadline_s = self._workload.deadline(work.values())
        rate = orders.server_rate(settings, self._number, len(work))
        current = self._new_round(self.published.model, rate)
        first = min(device.cut or 1 for device in ready)
        current.open(stamp, self.published.version, work, first_server_block=first)
        self._records.begin_round()
        self._set_phase("training")
        self._deadline.begin(self._deadline_s)
        self._observer.round_opened(
            self._number, settings.rounds, self._attempt, sum(w.quota for w in work.values())
        )
        self._rounds.begin(current)
        return [self.announcement()]

    def _end_round(self, current: RoundInProgress, *, closed: bool) -> list[Envelope]:
        self._rounds.current = None
        self._deadline.end()
        self._participation.end_round()
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
        record = self._records.close_round(current, self.published, self._deadline_s)
        for folded in current.added:
            device = self._registry[folded.device]
            device.rounds += 1
            device.samples += folded.samples
        policies = self._serving.close(self.published)
        self._records.save(
            record, self.published, policies=policies, scheduler=self._workload.dump()
        )
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

    # -- the end ----------------------------------------------------------------------------------

    def _begin_inference(self) -> list[Envelope]:
        self._rounds.end()
        if self._records.has_result(self.published.version):  # before a restart
            return self._end()
        if not self._settings.inference:
            if not self._deadline.running:
                self._deadline.begin(REPORTS_S)
            waits = self._records.unreported and not self._deadline.overdue
            return [] if waits else self._finish()
        self._set_phase("inference")
        self._deadline.begin(self._settings.inference_deadline_s)
        return [self.announcement()]

    def _await_answers(self) -> list[Envelope]:
        ready = self._registry.ready
        waiting = [d for d in ready if d.inference is None and d.hello and d.hello.test_samples]
        if (waiting or not ready) and not self._deadline.overdue:
            return []
        return self._finish()

    def _finish(self) -> list[Envelope]:
        self._deadline.end()
        self._records.save_result(self._number, self.published)
        return self._end()

    def _end(self) -> list[Envelope]:
        self._set_phase("finished")
        return [self.announcement()]

    # -- small parts ------------------------------------------------------------------------------

    def _note(self, found: RoundInProgress, device: Device) -> None:
        if found is not self._rounds.current:
            self._records.update(found, device.name)

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
