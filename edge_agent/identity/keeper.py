"""What an agent needs of its identity: a name, a connection, and that both go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from functools import partial

from broker.config import BrokerConfig
from broker.errors import ConfigError, TopicError
from broker.topics import ClaimTopics, check_device
from broker.transport import Transport
from edge_agent.errors import AgentError
from edge_agent.identity.claimant import Claimant
from edge_agent.identity.clock import ClockFloor
from edge_agent.identity.folder import Credentials, IdentityFolder
from edge_agent.identity.keys import common_name, valid_until
from edge_agent.identity.names import read_board
from edge_agent.identity.renewal import Renewal
from edge_agent.readings import LinkMeters
from edge_agent.service import software
from edge_agent.settings import AUTO, AgentSettings, check_broker_of_identity
from edge_agent.systemd import KeepAlive, Nobody, Supervisor

log = logging.getLogger("splitfleet.identity")

ASTRAY_S = 600.0
"""Without a connection for so long, a device tries the way back even if its certificate should
hold: its clock may be wrong."""
LOOK_S = 5.0


def with_name(settings: AgentSettings) -> AgentSettings:
    """The settings with the device's own name: its certificate's, else its board's if ``auto``.

    Raises ``ConfigError`` if the settings say another than the certificate, and
    :class:`IdentityError` if there is no telling.
    """
    if settings.identity_dir is not None:
        certificate = IdentityFolder(settings.identity_dir).certificate()
        if certificate is not None:
            name = common_name(certificate)
            if settings.device not in (AUTO, name):
                raise ConfigError(
                    f"agent.device = {settings.device!r}, but the identity in "
                    f"{settings.identity_dir} is of {name!r}: write device = {AUTO!r}, or put the "
                    "right identity there"
                )
            return settings.model_copy(update={"device": name})
    if settings.device != AUTO:
        return settings
    name = read_board().device_name(settings.device_prefix)
    try:
        return settings.model_copy(update={"device": check_device(name)})
    except TopicError as exc:
        raise ConfigError(f"agent.device_prefix = {settings.device_prefix!r}: {exc}") from None


class IdentityKeeper:
    """The identity of the device that ``settings`` name (:func:`with_name`), in their folder.

    Before there is a connection, ``ensure`` enrols the device if it has to be. While there is one,
    ``machine`` renews the certificate, and ``watch`` gets a device back in that has slept past the
    end of one.

    Raises ``ConfigError`` if ``broker`` and the folder do not go together.
    """

    def __init__(
        self,
        settings: AgentSettings,
        broker: BrokerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        assert settings.identity_dir is not None
        check_broker_of_identity(broker)
        self._folder = folder = IdentityFolder(settings.identity_dir)
        self._clock = clock
        self._floor = ClockFloor(folder)
        self._broker = broker.model_copy(
            update={
                "ca_file": folder.ca_file,
                "cert_file": folder.device_file,
                "key_file": folder.key_file,
            }
        )
        self.machine = Renewal(settings.device, folder, self._floor, clock=clock, rng=rng)
        self._claimant = Claimant(
            settings.device,
            folder,
            self._floor,
            partial(_claims_transport, self._broker, settings.claims_port),
            ClaimTopics(settings.fleet),
            observer=LinkMeters(),
            clock=clock,
            serial=_serial(),
            device_class=settings.device_class,
            software=software(),
            rng=rng,
        )

    @property
    def ended(self) -> bool:
        """Whether the device has no certificate, or one that has ended."""
        certificate = self._folder.certificate()
        return certificate is None or self._floor.now() >= valid_until(certificate)

    async def ensure(
        self, stop: asyncio.Event, supervisor: Supervisor | None = None
    ) -> BrokerConfig | None:
        """How to connect to the fleet, once the device is enrolled; None if ``stop`` came before.

        That may take long: the ``supervisor`` is told that the agent has started, and lives.

        Raises :class:`IdentityError` or :class:`StateError` if it cannot be.
        """
        if self._folder.enrolled:
            self._folder.wipe_claim()
        if not self.ended:
            return self._broker
        supervisor = supervisor or Nobody()
        supervisor.ready()
        living = asyncio.create_task(KeepAlive(supervisor).run(), name="keep-alive")
        try:
            return self._broker if await self._claimant.enrol(stop) else None
        finally:
            living.cancel()

    async def watch(self, connected: Callable[[], bool]) -> None:
        """Get the device back in whenever it needs to be, until cancelled.

        ``connected``: whether there is a connection to the fleet now.
        """
        lost = self._clock()
        while True:
            await asyncio.sleep(LOOK_S)
            now = self._clock()
            if connected():
                lost = now
            elif self.ended or now - lost > ASTRAY_S:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ASTRAY_S):
                        await self._claimant.enrol(asyncio.Event())
                lost = self._clock()


def _claims_transport(broker: BrokerConfig, port: int, credentials: Credentials) -> Transport:
    from broker.mqtt import MqttTransport

    host = f"[{broker.host}]" if ":" in broker.host else broker.host
    door = broker.model_copy(
        update={
            "url": f"mqtts://{host}:{port}",
            "cert_file": credentials.cert_file,
            "key_file": credentials.key_file,
            "session_expiry_s": 1,
        }
    )
    return MqttTransport(door, credentials.name)


def _serial() -> str:
    try:
        return read_board().serial
    except AgentError:
        return ""
