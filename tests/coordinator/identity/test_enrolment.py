"""The machine that answers requests for certificates, over a fleet's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker.envelopes import Envelope, decode_message, encode_message, up
from broker.identity_messages import Certificate, Enrol, Renew
from broker.messages import Status
from broker.topics import Address
from coordinator.errors import IdentityError
from coordinator.identity.authority import common_name
from coordinator.identity.enrolment import REFRESH_S, Enrolment, open_enrolment
from coordinator.identity.keys import Key, certified_key, new_key
from coordinator.identity.registration import DAY_S, Lifetimes, life_left
from coordinator.identity.standing import Standing
from coordinator.observer import Observer
from coordinator.settings import CoordinatorSettings
from ops.identity import FleetFolder, init_fleet
from tests.coordinator.identity.requests import csr

START = 1_800_000_000.0


class Watcher(Observer):
    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.standing: Standing | None = None
        self.dropped: list[str] = []

    def certificate_asked(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def identity(self, standing: Standing) -> None:
        self.standing = standing

    def message_dropped(self, reason: str) -> None:
        self.dropped.append(reason)


class Bench:
    """A folder, its machine, and a clock for both."""

    def __init__(self, folder: Path) -> None:
        self.now = START
        self.folder: FleetFolder = init_fleet(
            folder,
            "plant",
            broker_names=["broker.example"],
            lifetimes=Lifetimes(device_days=30),
            clock=lambda: self.now,
        )
        self.watcher = Watcher()
        self.machine = Enrolment(
            self.folder.fleet,
            observer=self.watcher,
            clock=lambda: self.now,
            wall=lambda: self.now,
        )

    def token(self, uses: int = 2, days: float = 7) -> str:
        pem = self.folder.token(uses, days)
        return common_name(x509.load_pem_x509_certificates(pem)[1])

    def ask(self, claim: str, message: Enrol) -> Certificate:
        return self._answer(
            Envelope(Address("claim", "enrol", device=claim, direction="up"), message),
            Address("claim", "certificate", device=claim, direction="down"),
        )

    def renew(self, device: str, message: Renew) -> Certificate:
        address = Address("device", "certificate", device=device, direction="down")
        return self._answer(up(device, message), address)

    def _answer(self, question: Envelope, where: Address) -> Certificate:
        (effect,) = self.machine.receive(question)
        assert effect.address == where
        again = decode_message(where, b"".join(encode_message(effect.message)))
        assert isinstance(again, Certificate)
        return again


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "fleet")
    yield bench
    bench.folder.close()


def enrol(key: Key, name: str = "cam-1") -> Enrol:
    return Enrol(nonce="n1", wanted=name, csr=csr(key), serial="1000", device_class="pi4")


def issued(answer: Certificate) -> x509.Certificate:
    assert answer.refused is None
    assert answer.certificate is not None
    return x509.load_pem_x509_certificate(bytes(answer.certificate))


def test_a_claim_is_answered_with_certificates_and_the_time(bench: Bench) -> None:
    key = new_key()
    answer = bench.ask(bench.token(), enrol(key))
    assert (answer.nonce, answer.device, answer.now) == ("n1", "cam-1", START)
    certificate = issued(answer)
    assert common_name(certificate) == "cam-1", "not what the request says"
    assert certified_key(certificate) == key.public_key()
    assert answer.return_certificate is not None
    coming_back = x509.load_pem_x509_certificate(bytes(answer.return_certificate))
    assert common_name(coming_back) == "back.cam-1"
    assert answer.ca is not None
    ca = x509.load_pem_x509_certificate(bytes(answer.ca))
    certificate.verify_directly_issued_by(ca)
    assert bench.watcher.outcomes == ["enrolled"]
    (member,) = bench.folder.fleet.roster.devices()
    assert (member.serial, member.device_class) == ("1000", "pi4")


def test_what_a_device_says_of_itself_cannot_steer_a_terminal(bench: Bench) -> None:
    message = Enrol(nonce="n", wanted="cam-1", csr=csr(new_key()), serial="1\x1b[2J\r\n[red]0")
    issued(bench.ask(bench.token(), message))
    (member,) = bench.folder.fleet.roster.devices()
    assert member.serial == "1[2J[red]0"


def test_a_question_that_is_repeated_has_the_same_answer(bench: Bench) -> None:
    claim, question = bench.token(uses=1), enrol(new_key())
    assert bench.ask(claim, question) == bench.ask(claim, question)


def test_a_device_renews_and_comes_back(bench: Bench) -> None:
    key = new_key()
    first = issued(bench.ask(bench.token(), enrol(key)))
    bench.now += 21 * DAY_S
    second = issued(bench.renew("cam-1", Renew(nonce="n2", csr=csr(key))))
    assert second.not_valid_after_utc > first.not_valid_after_utc
    bench.now += 365 * DAY_S
    third = issued(bench.ask("back.cam-1", enrol(key)))
    assert third.not_valid_after_utc > second.not_valid_after_utc
    assert bench.watcher.outcomes == ["enrolled", "renewed", "came_back"]


def test_who_comes_back_can_only_be_itself(bench: Bench) -> None:
    key = new_key()
    bench.folder.add_device("cam-2")
    bench.ask(bench.token(), enrol(key))
    answer = bench.ask("back.cam-1", enrol(key, "cam-2"))
    assert answer.certificate is None
    assert bench.watcher.outcomes[-1] == "bad_name"


def test_refusals_say_why(bench: Bench) -> None:
    claim = bench.token()
    bench.ask(claim, enrol(new_key()))
    cases: dict[str, tuple[str, Enrol]] = {
        "other_key": (claim, enrol(new_key())),
        "bad_claim": ("claim.nobody", enrol(new_key(), "cam-2")),
        "bad_name": (claim, enrol(new_key(), "coordinator")),
        "unknown": ("back.cam-7", enrol(new_key(), "cam-7")),
    }
    for expected, (asking, question) in cases.items():
        answer = bench.ask(asking, question)
        assert answer.refused
        assert answer.certificate is None
        assert bench.watcher.outcomes[-1] == expected
    assert bench.ask(claim, enrol(new_key(), "x" * 60)).refused
    assert [m.name for m in bench.folder.fleet.roster.devices()] == ["cam-1"]


def rubbish() -> dict[str, bytes]:
    good = csr(new_key())
    return {
        "nothing": b"",
        "no request": b"rubbish" * 20,
        "cut off": good[:-10],
        "another signature": good[:-2] + bytes([good[-2] ^ 1, good[-1]]),
        "a large key": csr(rsa.generate_private_key(65537, 2048)),
        "another curve": csr(ec.generate_private_key(ec.SECP384R1())),
    }


@pytest.mark.parametrize("what", list(rubbish()))
def test_a_request_that_is_none_is_refused(bench: Bench, what: str) -> None:
    message = Enrol(nonce="n1", wanted="cam-1", csr=rubbish()[what])
    assert bench.ask(bench.token(), message).certificate is None
    assert bench.watcher.outcomes == ["bad_request"]


def test_what_is_not_for_it_is_dropped(bench: Bench) -> None:
    assert bench.machine.receive(up("cam-1", Status(state="online", connection="c"))) == []
    assert bench.watcher.dropped == ["unexpected_topic"]


def test_it_follows_what_a_command_does(bench: Bench) -> None:
    bench.machine.tick()
    with FleetFolder.open(bench.folder.folder, clock=lambda: bench.now) as command:
        command.add_device("cam-1")
        command.add_device("cam-2")
        command.retire("cam-1")
        command.revoke("cam-2")
    assert bench.machine.retired == frozenset()
    bench.now = bench.machine.next_tick
    bench.machine.tick()
    assert bench.machine.retired == {"cam-1"}
    assert bench.watcher.standing is not None
    assert bench.watcher.standing.devices["revoked"] == 1
    crl = x509.load_pem_x509_crl((bench.folder.broker_dir / "fleet-crl.pem").read_bytes())
    assert len(crl) == 2


def test_it_signs_anew_what_comes_near_its_end(bench: Bench) -> None:
    bench.machine.tick()
    before = bench.watcher.standing
    bench.now += 31 * DAY_S
    bench.machine.tick()
    after = bench.watcher.standing
    assert before is not None
    assert after is not None
    for name in ("broker", "coordinator"):
        assert after.expiry.certificates[name] > before.expiry.certificates[name]
    for side in ("fleet", "claims"):
        assert after.expiry.lists[side] > before.expiry.lists[side]
    key = (bench.folder.broker_dir / "broker-key.pem").read_bytes()
    broker = x509.load_pem_x509_certificate((bench.folder.broker_dir / "broker.pem").read_bytes())
    private = serialization.load_pem_private_key(key, None)
    assert private.public_key() == broker.public_key()
    bench.now += 29 * DAY_S
    bench.machine.tick()
    again = x509.load_pem_x509_certificate((bench.folder.broker_dir / "broker.pem").read_bytes())
    assert again == broker  # every new one costs a restart


def test_devices_are_counted_by_what_is_left_of_their_certificates(bench: Bench) -> None:
    for number in range(3):
        bench.folder.add_device(f"cam-{number}")
        bench.now += 13 * DAY_S
    bench.folder.reset("cam-1")
    bench.machine.tick()
    standing = bench.watcher.standing
    assert standing is not None
    assert standing.devices == {"valid": 1, "ending": 0, "ended": 1, "awaited": 1, "revoked": 0}
    bench.now += 13 * DAY_S
    bench.machine.tick()
    assert bench.watcher.standing is not None
    assert bench.watcher.standing.devices["ending"] == 1


def test_a_broker_folder_that_is_gone_stops_nothing_but_is_told(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.folder.broker_dir.rename(bench.folder.folder / "elsewhere")
    for _ in range(3):
        bench.machine.tick()
        bench.now += REFRESH_S
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1
    bench.now += 31 * DAY_S
    bench.machine.tick()
    own = bench.folder.folder / "coordinator" / "coordinator.pem"
    certificate = x509.load_pem_x509_certificate(own.read_bytes())
    assert life_left(certificate, bench.now) > 0.9, "what can be done is done"
    issued(bench.ask(bench.token(), enrol(new_key())))


# -- in a coordinator -----------------------------------------------------------------------------


def test_a_coordinator_opens_the_folder_its_settings_name(bench: Bench) -> None:
    def opened(**settings: object) -> Enrolment | None:
        chosen = CoordinatorSettings.model_validate(settings)
        return open_enrolment(chosen, {}, bench.watcher)

    assert opened() is None
    with pytest.raises(IdentityError, match="of fleet 'plant'"):
        opened(fleet_dir=bench.folder.folder)
    machine = opened(fleet="plant", fleet_dir=bench.folder.folder)
    assert machine is not None
    assert bench.watcher.standing is not None
    machine.close()


def test_encrypted_authorities_want_their_passphrase(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    init_fleet(folder, "plant", broker_names=["b"], passphrase="seven words").close()
    settings = CoordinatorSettings(fleet="plant", fleet_dir=folder)
    with pytest.raises(IdentityError, match="SPLITFLEET_CA_PASSPHRASE"):
        open_enrolment(settings, {}, Observer())
    (tmp_path / "secret").write_text("seven words\n")
    for environ in (
        {"SPLITFLEET_CA_PASSPHRASE": "seven words"},
        {"SPLITFLEET_CA_PASSPHRASE_FILE": str(tmp_path / "secret")},
    ):
        machine = open_enrolment(settings, environ, Observer())
        assert machine is not None
        machine.close()
    with pytest.raises(IdentityError, match="cannot read"):
        open_enrolment(settings, {"SPLITFLEET_CA_PASSPHRASE_FILE": "/nowhere"}, Observer())
