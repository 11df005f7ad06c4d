"""What an assignment gives a device: its half of the network, and what it does with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np

from broker.envelopes import Envelope, up
from broker.errors import MessageError
from broker.messages import Assignment, Request
from broker.serving_messages import Serving
from broker.training_messages import DeviceParameters, Receipt, Report, Round
from edge_agent.answer_meters import enter_counts
from edge_agent.attempt import Attempt
from edge_agent.encoding import ActivationEncoder
from edge_agent.exit_policy import measuring_policy_of
from edge_agent.holding import Holding, SnapshotStore
from edge_agent.learning import Data, Learner, Stream
from edge_agent.meters import Meters
from edge_agent.offline import OfflineLimits
from edge_agent.predictor import InferenceRun
from edge_agent.privacy import Release, ReleasedStream
from edge_agent.quota import quota_of
from tensors.codecs import parse_codec

log = logging.getLogger("splitfleet.agent")


class Workplace:
    """A device under one assignment: how it enters a round, leaves it or stays, and answers images.

    What it counts goes into ``meters``; ``cpu_clock`` is processor time of the thread it runs in.
    Features leave as ``release`` lets them.
    Raises ``TensorsError`` for an assignment that cannot be followed.
    """

    def __init__(
        self,
        device: str,
        assignment: Assignment,
        learner: Learner,
        data: Data,
        *,
        uplink: Callable[[], float],
        snapshots: SnapshotStore,
        clock: Callable[[], float],
        offline: OfflineLimits,
        meters: Meters,
        cpu_clock: Callable[[], float],
        release: Release | None = None,
    ) -> None:
        self.holding = Holding(assignment, learner, snapshots)
        self.attempt: Attempt | None = None
        self.inference: InferenceRun | None = None
        self._learner = learner
        self._data = data
        self._device = device
        self._assignment = assignment
        stream = data.stream(assignment, device)
        self._stream: Stream = stream if release is None else ReleasedStream(stream, release)
        self._release = release
        self._clock = clock
        self._offline = offline
        self._meters = meters
        self._cpu_clock = cpu_clock
        self._encoder = ActivationEncoder(
            assignment, uplink=uplink, encode=learner.encode, release=release
        )
        self._settled: tuple[str, int, int] | None = None
        if assignment.label_skew == "calibrated":
            learner.calibrate(data.label_counts(assignment.network.classes))

    @property
    def held(self) -> tuple[int, Mapping[str, np.ndarray]] | None:
        """The version its rounds start from, and its parameters, which nobody changes."""
        version = self.holding.version
        return None if version is None else (version, self._learner.start.state)

    # -- rounds -----------------------------------------------------------------------------------

    def stays(self, announced: Round) -> bool:
        """Whether this announcement changes nothing for now.

        It is of the attempt that the device has entered or has nothing more to do in; or it calls
        for later work, and the attempt under way is to be finished first.
        """
        if announced.phase == "training" and announced.stamp == self._settled:
            return True
        return self.attempt is not None and not self.attempt.barrier and self.is_over(announced)

    def join(self, announced: Round) -> Envelope:
        """The request to take part in this attempt."""
        run, number, attempt = announced.stamp
        return up(self._device, Request(what="join", run=run, round=number, attempt=attempt))

    def admits(self, announced: Round, receipt: Receipt) -> bool:
        """Whether a receipt can be the answer to :meth:`join`.

        A final one is not: it answers the upload of an earlier leg. Unless it is a refusal.
        """
        return (
            announced.phase == "training"
            and receipt.stamp == announced.stamp
            and receipt.complete
            and not (receipt.final and receipt.participant)
        )

    def enter(self, announced: Round, receipt: Receipt) -> bool:
        """Begin what the answer to a join says; False if there is nothing to do.

        Raises ``MessageError`` for an answer that is absurd.
        """
        self._settled = None
        done = receipt.next_batch >= quota_of(self._assignment, receipt)
        if not receipt.participant or (done and not announced.barrier):
            self._settled = announced.stamp
            return False
        self.attempt = Attempt(
            self._device,
            self._assignment,
            announced,
            receipt,
            self._learner,
            self._stream,
            encoder=self._encoder,
            clock=self._clock,
            offline=self._offline,
            meters=self._meters,
        )
        self._settled = announced.stamp
        return True

    def finish(self, receipt: Receipt) -> bool:
        """Enter a receipt; whether it ends the attempt under way."""
        attempt = self.attempt
        if attempt is None or receipt.stamp != attempt.stamp:
            return False
        try:
            attempt.receipt(receipt)
        except MessageError as exc:
            log.warning("a receipt makes no sense: %s", exc)
            return False
        if not receipt.final and receipt.participant:
            return False
        if not attempt.barrier:
            self._settled = None
            if receipt.participant:
                self.holding.delivered()
        return True

    def upload(self) -> Envelope:
        """What was learnt in the attempt under way, as it stands."""
        attempt = self.attempt
        assert attempt is not None
        run, number, tried = attempt.stamp
        state, base = self.holding.upload()
        return up(
            self._device,
            DeviceParameters(
                run=run,
                round=number,
                attempt=tried,
                version=attempt.version,
                produced=attempt.produced,
                base=base,
                state=state,
            ),
        )

    def is_over(self, announced: Round) -> bool:
        """Whether the fleet has left the round under way behind, not merely begun it anew."""
        if self.attempt is None:
            return False
        run, number, _ = self.attempt.stamp
        return (
            announced.run == run
            and announced.phase in ("gathering", "training")
            and (announced.round > number or announced.version > self.attempt.version)
        )

    def follow(self, announced: Round) -> list[Envelope]:
        """End the attempt under way for what is announced; an earlier one may come again then."""
        self._settled = None
        return self.leave(late=self.is_over(announced))

    def leave(self, *, late: bool = False) -> list[Envelope]:
        """End the attempt under way: its report, and if it is ``late`` first what was learnt."""
        attempt = self.attempt
        if attempt is None:
            return []
        out = [self.upload()] if late and attempt.learnt else []
        self.attempt = None
        return [*out, up(self._device, attempt.report())]

    # -- inference --------------------------------------------------------------------------------

    def start_answering(self, announced: Round, serving: Serving) -> None:
        """Begin to answer the test images, as it is served."""
        assignment = self._assignment
        assert assignment.cut is not None
        self.inference = InferenceRun(
            self._learner.predictor(),
            parse_codec(assignment.activation_codec),
            self._data.test_batches(assignment.batch_size),
            measuring_policy_of(serving, assignment.cut),
            run=announced.run,
            version=announced.version,
            clock=self._clock,
            cpu_clock=self._cpu_clock,
            release=self._release,
            classifies=assignment.classifier is not None,
        )

    def meter(self, meters: Meters) -> None:
        """Enter what the answers under way have come to so far, and how it is now."""
        if self.inference is not None:
            enter_counts(meters, self.inference.counts)
        if self.attempt is not None:
            self.attempt.meter(meters)
        if self.holding.version is not None:
            meters.gauge("held_version", self.holding.version)

    def stop_answering(self) -> None:
        """No more of that, whether or not all are answered; what was counted stays counted."""
        if self.inference is not None:
            enter_counts(self._meters, self.inference.counts)
        self.inference = None

    def end_answering(self, announced: Round) -> Envelope:
        """All are answered: the report."""
        assert self.inference is not None
        run, number, attempt = announced.stamp
        result = self.inference.result()
        self.stop_answering()
        return up(self._device, Report(run=run, round=number, attempt=attempt, inference=result))
