from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from broker.config import BrokerConfig
from broker.errors import ConfigError
from edge_agent.errors import IdentityError
from edge_agent.identity import keeper
from edge_agent.identity.folder import IdentityFolder
from edge_agent.identity.keeper import IdentityKeeper, with_name
from edge_agent.identity.names import Board
from edge_agent.settings import AgentSettings
from tests.device_identity import Issuer
from tests.tiny import Clock

BROKER = BrokerConfig(url="mqtts://broker.example:8883")


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path / "authority")


@pytest.fixture(autouse=True)
def _board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "read_board", lambda: Board("0042", from_board=True))


def settings(folder: Path, device: str = "auto") -> AgentSettings:
    return AgentSettings(device=device, identity_dir=folder)


# -- the name -----------------------------------------------------------------------------------


def test_a_new_device_is_called_by_its_board(tmp_path: Path, issuer: Issuer) -> None:
    IdentityFolder(tmp_path / "d").put_token(issuer.token())
    assert with_name(settings(tmp_path / "d")).device == "device-0042"
    assert with_name(AgentSettings(device="auto", device_prefix="pi_")).device == "pi_0042"


def test_an_enrolled_device_is_called_by_its_certificate(tmp_path: Path, issuer: Issuer) -> None:
    issuer.enrolled(tmp_path / "d", "garden-3")
    assert with_name(settings(tmp_path / "d")).device == "garden-3"
    assert with_name(settings(tmp_path / "d", "garden-3")).device == "garden-3"


def test_a_name_in_the_settings_counts_before_there_is_a_certificate(tmp_path: Path) -> None:
    assert with_name(settings(tmp_path, "garden-3")).device == "garden-3"
    assert with_name(AgentSettings(device="d")).device == "d"


def test_the_identity_of_another_is_told(tmp_path: Path, issuer: Issuer) -> None:
    issuer.enrolled(tmp_path / "d", "garden-3")
    with pytest.raises(ConfigError, match=r"garden-4.*garden-3"):
        with_name(settings(tmp_path / "d", "garden-4"))


def test_a_reserved_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "read_board", lambda: Board("monitor", from_board=True))
    with pytest.raises(ConfigError, match="device_prefix"):
        with_name(AgentSettings(device="auto", device_prefix=""))


# -- the connection -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broker",
    [
        BrokerConfig(),
        BrokerConfig(url="mqtts://b", ca_file=Path("ca.pem")),
        BrokerConfig(url="mqtts://b", cert_file=Path("c.pem"), key_file=Path("k.pem")),
        BrokerConfig(url="mqtts://b", username="d"),
    ],
)
def test_the_identity_takes_the_place_of_other_credentials(
    tmp_path: Path, issuer: Issuer, broker: BrokerConfig
) -> None:
    issuer.enrolled(tmp_path / "d", "d")
    with pytest.raises(ConfigError, match="mqtts://HOST"):
        IdentityKeeper(settings(tmp_path / "d", "d"), broker)


async def test_an_enrolled_device_connects_with_its_files(tmp_path: Path, issuer: Issuer) -> None:
    identity = issuer.enrolled(tmp_path / "d", "d")
    broker = await IdentityKeeper(settings(tmp_path / "d", "d"), BROKER).ensure(asyncio.Event())
    assert broker is not None
    assert broker.url == BROKER.url
    assert (broker.ca_file, broker.cert_file) == (identity.ca_file, identity.device_file)
    assert broker.key_file == identity.key_file


async def test_a_claim_that_a_dying_process_left_is_removed(tmp_path: Path, issuer: Issuer) -> None:
    identity = issuer.enrolled(tmp_path / "d", "d")
    identity.put_token(issuer.token())
    await IdentityKeeper(settings(tmp_path / "d", "d"), BROKER).ensure(asyncio.Event())
    assert not identity.claim_file.exists()
    assert not identity.claim_key_file.exists()


async def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    made = IdentityKeeper(settings(tmp_path, "d"), BROKER)
    with pytest.raises(IdentityError, match="fleet token"):
        await made.ensure(asyncio.Event())


async def test_a_device_that_waits_to_be_enrolled_has_started_and_lives(
    tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or systemd would start it again and again while the coordinator is away."""
    IdentityFolder(tmp_path / "d").put_token(issuer.token())
    made, told = IdentityKeeper(settings(tmp_path / "d", "d"), BROKER), Supervising()

    async def enrol(stop: asyncio.Event) -> bool:
        await told.lives.wait()
        return True

    monkeypatch.setattr(made._claimant, "enrol", enrol)
    assert await made.ensure(asyncio.Event(), told) is not None
    assert told.heard[:2] == ["ready", "alive"]


class Supervising:
    """Whoever watches the service, and what it heard."""

    watchdog_s: float | None = 8.0

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.lives = asyncio.Event()

    def ready(self) -> None:
        self.heard.append("ready")

    def alive(self) -> None:
        self.heard.append("alive")
        self.lives.set()

    def stopping(self) -> None:
        self.heard.append("stopping")


@pytest.mark.parametrize("host", ["broker.example", "[2001:db8::7]"])
def test_the_door_for_claims_is_on_the_same_host(tmp_path: Path, issuer: Issuer, host: str) -> None:
    identity = IdentityFolder(tmp_path)
    identity.put_token(issuer.token())
    broker = BrokerConfig(url=f"mqtts://{host}:1", ca_file=identity.ca_file)
    transport = keeper._claims_transport(broker, 8884, identity.for_enrolment())
    assert transport.client_id == "claim.t"
    door = transport._config  # type: ignore[attr-defined]
    assert (door.url, door.cert_file) == (f"mqtts://{host}:8884", identity.claim_file)


# -- while it runs ------------------------------------------------------------------------------


class _Over(Exception):
    """The test has seen enough."""


class Watched:
    """A keeper whose device enrols at once, and the times at which it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, identity: Path) -> None:
        self.clock = Clock()
        self.connected = True
        self.enrolled: list[float] = []
        self.keeper = IdentityKeeper(settings(identity, "d"), BROKER, clock=self.clock)
        self._looks = 0

        async def enrol(stop: asyncio.Event) -> bool:
            self.enrolled.append(self.clock())
            return True

        monkeypatch.setattr(self.keeper._claimant, "enrol", enrol)
        monkeypatch.setattr(keeper, "LOOK_S", 0.0)

    async def watch(self, seconds: float) -> None:
        """Let so much time pass, a second a look."""
        end = self.clock() + seconds

        def connected() -> bool:
            self.clock.advance(1.0)
            if self.clock() >= end:
                raise _Over
            return self.connected

        with pytest.raises(_Over):
            await self.keeper.watch(connected)


async def test_a_device_with_a_connection_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Issuer(tmp_path / "past", wall=lambda: time.time() - 3600.0).enrolled(
        tmp_path / "d", "d", days=0.01
    )
    watched = Watched(monkeypatch, tmp_path / "d")
    assert watched.keeper.ended
    await watched.watch(2000)
    assert watched.enrolled == []


async def test_a_device_that_slept_past_the_end_goes_the_way_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Issuer(tmp_path / "past", wall=lambda: time.time() - 3600.0).enrolled(
        tmp_path / "d", "d", days=0.01
    )
    watched = Watched(monkeypatch, tmp_path / "d")
    watched.connected = False
    await watched.watch(3)
    assert watched.enrolled


async def test_a_device_that_cannot_connect_tries_the_way_back_now_and_then(
    tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock may be wrong, so that its certificate has ended for all others."""
    issuer.enrolled(tmp_path / "d", "d")
    watched = Watched(monkeypatch, tmp_path / "d")
    watched.connected = False
    await watched.watch(3 * keeper.ASTRAY_S)
    assert len(watched.enrolled) == 2
