"""The machine that answers images on a device, beside the one that trains: see ``broker.drive``.

It follows what the coordinator announces as served: takes that version's parameters from the
training half when that holds them, and asks for them otherwise. It goes on answering with what it
has while it waits, while there is no connection, and from its disk after a restart. It asks the
coordinator about images only as long as both mean the same network: run and cut as announced.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from broker.drive import Effect
from broker.envelopes import Envelope, up
from broker.messages import Assignment, Coordinator, Manifest, Parameters, Request
from broker.serving_messages import Prediction, Serving
from edge_agent.answer_meters import enter_counts
from edge_agent.answers import Answers, Predictor
from edge_agent.asking import Question
from edge_agent.enquiries import Enquiry, Health
from edge_agent.errors import AgentError, NotReady, StateError
from edge_agent.exit_policy import ExitPolicy, policy_of
from edge_agent.meters import Meters
from edge_agent.privacy import Privacy
from edge_agent.served import Served, ServedStore
from tensors.codecs import parse_codec
from tensors.deltas import fingerprint
from tensors.errors import FormatError, TensorsError
from tensors.parameters import unpack_parameters

log = logging.getLogger("splitfleet.agent")

GRACE_S = 2.0
"""The training half may come to hold a version by itself; after so long it is asked for."""
SAVE_WITHIN_S = 10.0
"""What serves is saved when there is nothing to answer, or after so long."""
HANDED = 3
"""Versions of the training half that are kept in case they come to serve."""

State = Mapping[str, np.ndarray]
Key = tuple[str, int, int]
"""Run, cut and version."""
Build = Callable[[Assignment, State], Predictor]


class ServingMachine:
    """Answers enquiries; ``build`` makes a predictor from parameters, in the machine's thread.

    ``privacy`` says what may leave of the images it asks about.
    """

    def __init__(
        self,
        device: str,
        answers: Answers,
        policy: ExitPolicy,
        *,
        build: Build,
        store: ServedStore,
        clock: Callable[[], float],
        privacy: Privacy | None = None,
    ) -> None:
        self._privacy = privacy or Privacy()
        self._device = device
        self._answers = answers
        self._policy = policy
        self._build = build
        self._store = store
        self._clock = clock
        self._enquiries: dict[int, Enquiry] = {}
        self._started = False
        self._connected = False
        self._coordinator_online = True
        self._online = True
        self._assignment: Assignment | None = None
        self._serving: Serving | None = None
        self._manifest: tuple[int | None, Manifest] | None = None
        self._handed: dict[Key, State] = {}
        self._served: Served | None = None
        self._predictor: Predictor | None = None
        self._refused: Key | None = None
        self._question = Question(clock)
        self._asks_for: Key | None = None
        self._ask_at: float | None = None
        self._save_at: float | None = None

    # -- of the device ----------------------------------------------------------------------------

    def ask(self, enquiry: Enquiry) -> list[Effect]:
        """Answer it as soon as it is its turn."""
        self._start()
        if enquiry.cancelled:
            return []
        try:
            enquiry.ticket = self._answers.ask(
                enquiry.images, enquiry.labels, enquiry.deadline_s, asked=enquiry.asked
            )
        except AgentError as exc:
            enquiry.done(exc)
            return []
        self._enquiries[enquiry.ticket] = enquiry
        return self._delivered()

    def cancel(self, enquiry: Enquiry) -> list[Effect]:
        """Nobody waits for it any more."""
        if enquiry.ticket in self._enquiries:
            del self._enquiries[enquiry.ticket]
            self._answers.cancel(enquiry.ticket)
        return self._delivered()

    def handed(self, assignment: Assignment, version: int, state: State) -> list[Effect]:
        """The training half holds this version; ``state`` must not change any more."""
        self._start()
        assert assignment.cut is not None
        self._handed[assignment.run, assignment.cut, version] = state
        while len(self._handed) > HANDED:
            del self._handed[next(iter(self._handed))]
        return self._follow()

    def health(self) -> Health:
        """How it goes."""
        self._start()
        served = self._served
        run, cut, version = (None, None, None) if served is None else served.key
        return Health(
            run=run,
            version=version,
            cut=cut,
            online=self._online,
            waiting=self._answers.waiting,
            open=self._answers.open,
            threshold=None if served is None else self._policy.policy.threshold,
            threshold_in_force=None if served is None else self._policy.threshold_in_force,
            drift=None if served is None else self._policy.drift,
            expected_round_trip_s=self._policy.round_trip.expected_s,
            counts=copy.deepcopy(self._answers.counts),
        )

    def meter(self, meters: Meters) -> None:
        """Enter what was counted, and how it is now. May be called from any thread."""
        enter_counts(meters, self._answers.counts)
        if self._served is not None:
            meters.gauge("exit_threshold", self._policy.threshold_in_force)
            meters.gauge("drifting_devices", self._policy.drifting)

    # -- of the connection ------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Never by itself: it ends with the agent."""
        return False

    def connected(self) -> list[Effect]:
        """The broker is there (again)."""
        self._start()
        self._connected = True
        self._set_online()
        return self._delivered(list(self._question.open))

    def disconnected(self) -> list[Effect]:
        """The broker is gone: the exit answers alone."""
        self._start()
        self._connected = False
        self._set_online()
        return self._delivered()

    def receive(self, envelope: Envelope) -> list[Effect]:
        """A message from the coordinator."""
        self._start()
        message, out = envelope.message, list[Effect]()
        match message:
            case Prediction():
                self._answers.answer(message)
            case Serving():
                self._serving = message
                out = self._follow()
            case Assignment():
                self._assignment = message
                out = self._follow()
            case Parameters() if envelope.address.scope == "device":
                out = self._parameters(message)
            case Manifest():
                self._manifest = envelope.address.layer, message
            case Coordinator():
                self._coordinator_online = message.state == "online"
                self._set_online()
        return self._delivered(out)

    def tick(self) -> list[Effect]:
        """Time has passed: overdue answers, and parameters that nobody handed over."""
        self._start()
        self._answers.tick()
        out = list[Effect]()
        if self._ask_at is not None and self._clock() >= self._ask_at and self._asks_for:
            self._ask_at = None
            wanted = Request(what="parameters", version=self._asks_for[2])
            out += self._question.ask(up(self._device, wanted))
        return self._delivered(out + list[Effect](self._question.tick()))

    @property
    def next_tick(self) -> float | None:
        """When :meth:`tick` has something to do, on the clock."""
        times = self._answers.deadline, self._question.due, self._ask_at
        return min((time for time in times if time is not None), default=None)

    @property
    def has_work(self) -> bool:
        """Whether there is something to answer, or to save."""
        return not self._started or self._answers.has_work or self._save_at is not None

    def work(self) -> list[Effect]:
        """Answer what waits; when nothing does, save what serves."""
        self._start()
        overdue = self._save_at is not None and self._clock() >= self._save_at
        if self._answers.has_work and not overdue:
            asked = self._answers.work()
            return self._delivered([up(self._device, features) for features in asked])
        if self._save_at is not None:
            self._save()
        return []

    # -- what serves ------------------------------------------------------------------------------

    def _start(self) -> None:
        """Answer with what is on the disk. In the machine's thread, where predictors are made."""
        if self._started:
            return
        self._started = True
        try:
            served = self._store.load()
            if served is not None:
                self._adopt(served)
                self._save_at = None
        except (StateError, AgentError, TensorsError) as exc:
            log.warning("cannot answer with what was kept: %s", exc)
        self._set_online()

    def _follow(self) -> list[Effect]:
        """Come to answer with what is announced."""
        wanted = self._wanted()
        if wanted is None or wanted == self._refused:
            self._stop_asking()
        elif self._served is not None and wanted == self._served.key:
            self._stop_asking()
            assert self._serving is not None
            assert self._assignment is not None
            served = Served(self._assignment, self._serving, self._served.state)
            before = self._served.serving, self._served.assignment
            if (served.serving, served.assignment) != before:
                self._use(served)
        elif wanted in self._handed:
            self._take(self._handed[wanted])
        elif wanted != self._asks_for:
            self._question.close()
            self._asks_for, self._ask_at = wanted, self._clock() + GRACE_S
        self._set_online()
        return self._delivered()

    def _wanted(self) -> Key | None:
        """What is announced for this device; None if that is nothing it can answer with."""
        serving, assignment = self._serving, self._assignment
        if serving is None or assignment is None or assignment.cut is None:
            return None
        if serving.run != assignment.run or policy_of(serving, assignment.cut) is None:
            return None
        return serving.run, assignment.cut, serving.version

    def _parameters(self, message: Parameters) -> list[Effect]:
        key = message.run, message.cut, message.version
        if message.base is not None or key != self._asks_for or key != self._wanted():
            return []
        try:
            state = unpack_parameters(message.state)
        except FormatError as exc:
            log.warning("parameters version %d cannot serve: %s", message.version, exc)
            return []
        layer, manifest = self._manifest or (None, None)
        if (
            manifest is not None
            and (manifest.run, layer, manifest.version) == key
            and manifest.sha256 != fingerprint(state)
        ):
            log.warning("parameters version %d do not match their checksum", message.version)
            return []
        self._take(state)
        return []

    def _take(self, state: State) -> None:
        assert self._serving is not None
        assert self._assignment is not None
        served = Served(self._assignment, self._serving, state)
        self._stop_asking()
        try:
            self._adopt(served)
        except NotReady as exc:
            log.info("version %d does not serve yet: %s", served.serving.version, exc)
            self._asks_for, self._ask_at = served.key, self._clock() + GRACE_S
        except (AgentError, TensorsError) as exc:
            self._refused = served.key
            log.warning("version %d cannot serve: %s", served.serving.version, exc)
        self._set_online()

    def _adopt(self, served: Served) -> None:
        """Raises ``AgentError`` or ``TensorsError`` for what cannot answer."""
        _check_finite(served.state)
        self._predictor = self._build(served.assignment, served.state)
        self._use(served)

    def _use(self, served: Served) -> None:
        run, cut, version = served.key
        policy, network = policy_of(served.serving, cut), served.assignment.network
        assert policy is not None
        assert self._predictor is not None
        before = self._served
        if before is not None and before.key[:2] != (run, cut):
            self._answers.disconnected()  # what is out is of another network
            self._online = False
        self._answers.use(
            run,
            version,
            self._predictor,
            policy,
            parse_codec(served.assignment.activation_codec),
            shape=(network.channels, network.size, network.size),
            message_images=served.assignment.batch_size,
            release=self._privacy.release(served.assignment),
            classifies=served.assignment.classifier is not None,
        )
        self._served = served
        if self._save_at is None:
            self._save_at = self._clock() + SAVE_WITHIN_S

    def _save(self) -> None:
        self._save_at = None
        assert self._served is not None
        try:
            self._store.save(self._served)
        except StateError as exc:
            log.warning("after a restart this device has to fetch what it answers with: %s", exc)

    def _stop_asking(self) -> None:
        self._question.close()
        self._asks_for = self._ask_at = None

    # -- small parts ------------------------------------------------------------------------------

    def _set_online(self) -> None:
        """Ask the coordinator, or do not: only if it is there and means the same network."""
        served, serving, assignment = self._served, self._serving, self._assignment
        online = (
            self._connected
            and self._coordinator_online
            and served is not None
            and serving is not None
            and assignment is not None
            and (serving.run, assignment.run, assignment.cut) == (served.key[0], *served.key[:2])
        )
        if online != self._online:
            self._online = online
            if online:
                self._answers.connected()
            else:
                self._answers.disconnected()

    def _delivered(self, effects: list[Any] | None = None) -> list[Effect]:
        for ticket, answer in self._answers.take():
            enquiry = self._enquiries.pop(ticket, None)
            if enquiry is not None:
                enquiry.done(answer)
        return effects or []


def _check_finite(state: State) -> None:
    for name, values in state.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise AgentError(f"parameter {name} is not finite: the training diverged")
