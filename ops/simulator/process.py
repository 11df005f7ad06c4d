"""One process of the fleet: a state machine with its inbox, its connection, and its misfortunes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from broker.config import BrokerConfig
from broker.drive import FAREWELL_S, Effect, Event, Machine, Subscribe
from broker.envelopes import Envelope
from broker.link import Arrival, Framing
from broker.transport import Capabilities, Connected, Disconnected
from coordinator.errors import CoordinatorError
from edge_agent.errors import AgentError
from ops.simulator.broker import Broker
from ops.simulator.by_reference import ReferenceFraming
from ops.simulator.connection import Connection
from ops.simulator.dialer import Dialer
from ops.simulator.link import IDEAL, LinkProfile, Packet
from ops.simulator.program import Killed, Life, Meter, Program, Tally
from ops.simulator.receiver import Receiver
from ops.simulator.sender import Sender, Wire
from ops.simulator.world import Event as Due
from ops.simulator.world import World

CAPABILITIES = Capabilities(max_packet_size=BrokerConfig().max_packet_size)


class Process:
    """Drives a machine as ``broker.drive`` does: messages first, then time, then work.

    A step takes the virtual time that is charged to ``meter``; what it wants sent leaves at its
    end, and no other begins before that is on its way. ``over`` says that the machine has finished,
    ``failure`` of which error the process died; ``ended`` is called for both. With
    ``by_reference`` it sends messages as they are; see ``by_reference``.
    """

    def __init__(
        self,
        world: World,
        broker: Broker,
        program: Program,
        profile: LinkProfile = IDEAL,
        *,
        wire: Wire | None = None,
        by_reference: bool = False,
        watch: Callable[[Envelope], None] | None = None,
        ended: Callable[[Process], None] | None = None,
    ) -> None:
        self.name = program.name
        self.profile = profile
        self.program = program
        self.meter = Meter()
        self.tally = Tally()
        self.alive = self.frozen = self.partitioned = self.over = False
        self.failure: Exception | None = None
        self.machine: Machine | None = None
        self._world = world
        self._broker = broker
        self._wire = wire
        self._new_framing = ReferenceFraming if by_reference else Framing
        self._watch = watch
        self._ended = ended
        self._offset = 0.0
        self._life: Life | None = None
        self._framing: Framing | None = None
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        self._dialer: Dialer | None = None
        self._resumes = False
        self._unsaid = False
        self._leaves_at: float | None = None
        self._filters: tuple[str, ...] = ()
        self._inbox: deque[Event] = deque()
        self._outbox: deque[Effect] = deque()
        self._busy: Due | None = None
        self._step_due: Due | None = None
        self._alarm: tuple[float, Due] | None = None
        self._postponed: list[Callable[[], None]] = []

    # -- what may happen to it --------------------------------------------------------------------

    def start(self) -> None:
        """Begin a life: the machine is built, and connects."""
        assert not self.alive, f"{self.name} is running"
        number = self.tally.lives
        self.tally.lives += 1
        self.alive, self.over, self.failure = True, False, None
        rng = self._world.rng(f"{self.name}/{number}")
        self._framing = self._new_framing(
            self._broker.topics,
            observer=self.program.observer(),
            clock=self.clock,
            first_id=rng.getrandbits(32),
        )
        self._receiver = Receiver(
            self._world, self._broker, self._framing, self.tally, self._is_frozen
        )
        self._dialer = Dialer(
            self._world,
            self._broker,
            self.profile,
            rng,
            cut_off=lambda: self.partitioned,
            is_frozen=self._is_frozen,
            connected=self._attach,
            refused=self._refused,
        )
        self._life = Life(number, self.clock, self.meter, self._uplink)
        self._resumes, self._filters = False, ()
        self._unsaid, self._leaves_at = False, None
        try:
            self.machine = self.program.build(self._life)
        except Killed:
            self.kill()
            return
        except (AgentError, CoordinatorError) as exc:
            self._fail(exc)
            return
        self.meter.spent = 0.0
        self._dialer.start()
        self._look()

    def kill(self, *, power_cut: bool = False) -> None:
        """Die at once: only its disk stays. After a power cut not even the broker is told."""
        if self._sender is not None:
            self._sender.connection.abandon(seen=not power_cut)
        self._forget()

    def restart(self) -> None:
        """A new life; the old one, if there is one, ends as by :meth:`kill`."""
        if self.alive:
            self.kill()
        self.start()

    def freeze(self) -> None:
        """Stand still, as after SIGSTOP: nothing is computed, read or sent."""
        if self.alive and not self.frozen:
            self.frozen = True
            if self._sender is not None:
                self._sender.connection.silence("client")

    def thaw(self) -> None:
        """Go on; a connection that was given up meanwhile is found to be."""
        if not self.frozen:
            return
        self.frozen = False
        if self._sender is not None:
            self._sender.connection.sign_of_life("client")
        postponed, self._postponed = self._postponed, []
        for action in postponed:
            action()
        self._read()

    def partition(self) -> None:
        """Its network fails without a sound."""
        self.partitioned = True
        if self._sender is not None:
            self._sender.connection.partition()

    def heal(self) -> None:
        """Its network is back."""
        self.partitioned = False
        if self._sender is not None:
            self._sender.connection.heal()
            self._flush()

    def drop_connection(self) -> None:
        """The connection breaks, and both ends see it."""
        if self._sender is not None:
            self._sender.connection.end("the connection was cut")

    def slow(self, factor: float) -> None:
        """What is computed from now on takes ``factor`` times as long as normally."""
        self.meter.slowness = factor

    def jump_clock(self, seconds: float) -> None:
        """Its clock is suddenly so much ahead, for good."""
        self._offset += seconds
        self._look()

    # -- to look at -------------------------------------------------------------------------------

    def clock(self) -> float:
        """The process's own time in seconds; during a step it passes as that is charged."""
        return self._world.now + self._offset + self.meter.spent

    @property
    def connected(self) -> bool:
        """Whether it believes that it is."""
        return self._sender is not None

    @property
    def received_bytes(self) -> int:
        """What was sent to it, on the wire, over all its lives."""
        now = self._sender.connection.down.bytes if self._sender is not None else 0
        return self.tally.received_bytes + now

    @property
    def waiting(self) -> int:
        """Messages that wait for its machine or to be sent."""
        arrived = len(self._receiver) if self._receiver is not None else 0
        return arrived + len(self._inbox) + len(self._outbox)

    # -- its connection ---------------------------------------------------------------------------

    def _refused(self) -> None:
        if not (self._inbox and isinstance(self._inbox[-1], Disconnected)):
            self._take(Disconnected("the broker cannot be reached"))
        assert self._dialer is not None
        self._dialer.back_off()

    def _attach(self) -> None:
        assert self._life is not None
        assert self._framing is not None
        assert self._receiver is not None
        connection = Connection(
            self._broker,
            self.name,
            self.profile,
            lambda packet: self._arrive(packet, connection),
            self._lost,
        )
        self._sender = Sender(
            self._world, connection, self._framing, self._flush, self._wire, self.tally.sent_bytes
        )
        self._framing.connected(CAPABILITIES.max_packet_size)
        filters = (*self.program.filters, *self._filters)
        will = self.program.will(self._life)
        resumed = self._broker.attach(connection, filters, will, clean=not self._resumes)
        self._resumes = True
        self.tally.connections += 1
        if resumed:
            self._receiver.resume()
        self._take(Connected(resumed, CAPABILITIES))

    def _lost(self, reason: str) -> None:
        if self._is_frozen(lambda: self._lost(reason)):
            return
        assert self._dialer is not None
        self._leave()
        self._take(Disconnected(reason))
        self._dialer.back_off()
        self._flush()

    def _leave(self) -> None:
        if self._sender is not None:
            self._unsaid = self._unsaid or not self._sender.idle
            self.tally.received_bytes += self._sender.connection.down.bytes
            self._sender = None

    def _is_frozen(self, action: Callable[[], None]) -> bool:
        if self.frozen:
            self._postponed.append(action)
        return self.frozen

    # -- what comes in ----------------------------------------------------------------------------

    def _arrive(self, packet: Packet, connection: Connection) -> None:
        assert self._receiver is not None
        if self._receiver.arrive(packet, connection) and not self.frozen:
            self._read()

    def _read(self) -> None:
        if self._receiver is not None:
            self._receiver.read(self._inbox)
        self._look()

    def _take(self, event: Event) -> None:
        self._inbox.append(event)
        self._look()

    # -- steps ------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Plan the next step: now if there is something to do, else when it is time."""
        machine = self.machine
        if machine is None or self.frozen or self._busy or self._step_due or self._outbox:
            return
        if machine.finished:
            self._take_leave(machine)
            return
        if self._inbox:
            self._step_due = self._world.after(0.0, self._step)
            return
        due = machine.next_tick
        if machine.has_work or (due is not None and self.clock() >= due):
            self._step_due = self._world.after(0.0, self._step)
        elif due is not None:
            # A sum of floats may be a little less than its parts were.
            time = max(due - self._offset, math.nextafter(self._world.now, math.inf))
            if self._alarm is not None:
                if self._alarm[0] <= time:
                    return
                self._alarm[1].cancel()
            self._alarm = time, self._world.at(time, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._look()

    def _step(self) -> None:
        self._step_due = None
        if self._is_frozen(self._look):
            return
        started = self.clock()
        try:
            effects = self._next_step()
        except Killed:
            self.kill()
            return
        except (AgentError, CoordinatorError) as exc:
            self._fail(exc)
            return
        machine, seconds = self.machine, self.meter.spent
        self.meter.spent = 0.0
        self.tally.steps += 1
        self.tally.busy_s += seconds
        assert machine is not None
        self.program.stepped(machine, started, seconds)
        if seconds:
            self._busy = self._world.after(seconds, lambda: self._done(effects))
        else:
            self._done(effects)

    def _next_step(self) -> Sequence[Effect]:
        machine = self.machine
        assert machine is not None
        if self._inbox:
            event = self._inbox.popleft()
            if self._receiver:
                self._receiver.read(self._inbox)  # the next step is planned when this one is over
            match event:
                case Connected():
                    self._unsaid = False
                    return machine.connected()
                case Disconnected():
                    return machine.disconnected()
                case Arrival(envelope):
                    return machine.receive(envelope)
        due = machine.next_tick
        if due is not None and self.clock() >= due:
            return machine.tick()
        return machine.work() if machine.has_work else ()

    def _done(self, effects: Sequence[Effect]) -> None:
        self._busy = None
        if self._is_frozen(lambda: self._done(effects)):
            return
        self._outbox.extend(effects)
        self.tally.most_outbox = max(self.tally.most_outbox, len(self._outbox))
        self._flush()

    def _flush(self) -> None:
        """Send what has a slot; what finds no connection is lost."""
        while self._outbox and not self.frozen:
            effect = self._outbox[0]
            sender = self._sender
            if sender is not None and not sender.ready:
                sender.wait()
                return
            self._outbox.popleft()
            if isinstance(effect, Subscribe):
                drop = tuple(topic for topic in self._filters if topic not in effect.filters)
                self._filters = effect.filters
                if sender is not None:
                    sender.subscribe(effect.filters, drop)
                continue
            envelope = Envelope(effect.address, effect.message)  # a deferred one is made here
            if self._watch is not None:
                self._watch(envelope)
            if sender is None:
                self.tally.unsent += 1
                self._unsaid = True
            else:
                sender.send(envelope)
        self._look()

    # -- the end ----------------------------------------------------------------------------------

    def _take_leave(self, machine: Machine) -> None:
        """As ``broker.drive``: what was lost with a connection is said again on the next."""
        now = self._world.now
        if self._leaves_at is None:
            self._leaves_at = now + FAREWELL_S
        while self._inbox:
            if isinstance(self._inbox.popleft(), Connected):
                self._unsaid = False
                self._done(machine.connected())
                return
        sender = self._sender
        if now < self._leaves_at and (self._unsaid or not (sender is None or sender.idle)):
            if self._alarm is None:
                self._alarm = self._leaves_at, self._world.at(self._leaves_at, self._ring)
            if sender is not None:
                sender.wait()
            return
        self._finish(machine)

    def _finish(self, machine: Machine) -> None:
        try:
            goodbye = self.program.goodbye(machine)
        except AgentError as exc:
            self._fail(exc)
            return
        if self._sender is not None:
            if goodbye is not None:
                self._sender.send(goodbye)
            self._sender.connection.leave()
        self._forget()
        self.over = True
        self._tell()

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.tally.failures.append(f"{type(error).__name__}: {error}")
        if self._sender is not None:
            self._sender.connection.leave()
        self._forget()
        self._tell()

    def _tell(self) -> None:
        if self._ended is not None:
            self._ended(self)

    def _forget(self) -> None:
        self._leave()
        alarm = self._alarm[1] if self._alarm is not None else None
        for due in (self._busy, self._step_due, alarm):
            if due is not None:
                due.cancel()
        self._busy = self._step_due = self._alarm = None
        if self._receiver is not None:
            self._receiver.close()
        if self._dialer is not None:
            self._dialer.stop()
        for waiting in (self._inbox, self._outbox, self._postponed):
            waiting.clear()
        self.meter.spent = 0.0
        self.machine = self._framing = self._life = self._receiver = self._dialer = None
        self.alive = self.frozen = False

    def _uplink(self) -> float:
        if self._sender is not None:
            self._sender.settle()
        return self._framing.uplink_bytes_per_s if self._framing is not None else 0.0
