"""One attempt on a desk: its learner, its clock, and what it makes, without a state machine."""

from __future__ import annotations

from typing import Any

from broker.training_messages import Activations, Gradients, Report
from edge_agent.attempt import Attempt
from edge_agent.encoding import ActivationEncoder
from edge_agent.meters import Meters
from edge_agent.offline import OfflineLimits
from tensors.decoding import decode
from tests.fake_device import DEVICE, GRADIENT, FakeLearner, PositionStream, receipt_of
from tests.tiny import RUN, Clock, make_assignment, make_round

LIMITS = OfflineLimits()


class Desk:
    """An attempt, with its learner and clock."""

    def __init__(
        self,
        *,
        number: int = 1,
        receipt: dict[str, Any] | None = None,
        learner: FakeLearner | None = None,
        encoder: ActivationEncoder | None = None,
        offline: OfflineLimits = LIMITS,
        announced: dict[str, Any] | None = None,
        **assignment: Any,
    ) -> None:
        self.clock = Clock()
        self.uplink = 0.0
        self.meters = Meters()
        self.learner = learner or FakeLearner()
        self.stream = PositionStream()
        self.online = True
        self.round = make_round(number, **(announced or {}))
        given = make_assignment(**assignment)
        self.encoder = encoder or ActivationEncoder(given, uplink=lambda: self.uplink)
        self.attempt = Attempt(
            DEVICE,
            given,
            self.round,
            receipt_of(self.round, **(receipt or {})),
            self.learner,
            self.stream,
            encoder=self.encoder,
            clock=self.clock,
            offline=offline,
            meters=self.meters,
        )

    def produce(self) -> list[Activations]:
        """All batches that may go out now."""
        out = []
        while self.attempt.can_produce(online=self.online):
            for envelope in self.attempt.produce(online=self.online):
                assert isinstance(envelope.message, Activations)
                out.append(envelope.message)
        return out

    def answer(self, batch: int, tensor: bytes = GRADIENT) -> None:
        self.attempt.gradient(answer_to(batch, tensor))
        while self.attempt.can_learn:
            self.attempt.learn()

    def interrupt(self) -> None:
        """The coordinator cannot be reached from now on."""
        self.online = False
        self.attempt.interrupted()

    def receipt(self, **fields: Any) -> None:
        self.attempt.receipt(receipt_of(self.round, **fields))

    @property
    def report(self) -> Report:
        return self.attempt.report()


def answer_to(batch: int, tensor: bytes = GRADIENT) -> Gradients:
    return Gradients(run=RUN, round=1, attempt=0, batch=batch, loss=1.0, correct=1, tensor=tensor)


def batches(messages: list[Activations]) -> list[int]:
    return [message.batch for message in messages]


def positions(messages: list[Activations]) -> list[int]:
    return [int(decode(message.tensor)[0, 0]) for message in messages]


def balanced(report: Report) -> bool:
    return report.produced == report.applied + sum(report.discarded.values()) + report.expired
