from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
from cryptography import x509

from broker.config import BrokerConfig, load_settings
from broker.mqtt import MqttTransport
from broker.topics import Topics
from broker.transport import Connected, Packet
from coordinator.errors import IdentityError
from coordinator.identity.fleet import authority_dir
from edge_agent.identity.keys import issued_by
from ops.identity import FleetFolder, init_fleet
from ops.identity_files import complete
from tests.mosquitto_process import Mosquitto, free_port

TOPICS = Topics("lab")


class FleetBroker(Mosquitto):
    """What ``splitfleet fleet init`` makes, started as it says."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = init_fleet(
            self.folder / "fleet",
            "lab",
            broker_names=[self.host],
            port=self.port,
            claims_port=free_port(),
            loopback_port=free_port(),
        )

    def command(self) -> list[str]:
        return [str(self.fleet.broker_dir / "run.sh")]


async def test_a_new_fleet_s_broker_coordinator_and_devices_find_each_other() -> None:
    with FleetBroker() as broker, broker.fleet as fleet:
        own = fleet.add_device("d1")
        coordinator_config = load_settings(
            BrokerConfig, section="broker", file=fleet.coordinator_config
        )
        files = {"ca": own / "fleet-ca.pem", "cert": own / "device.pem", "key": own / "key.pem"}
        device_config = BrokerConfig(
            url=fleet.fleet.settings.broker_url,
            ca_file=files["ca"],
            cert_file=files["cert"],
            key_file=files["key"],
        )
        async with (
            MqttTransport(coordinator_config, "") as coordinator,
            MqttTransport(device_config, "") as device,
        ):
            await coordinator.subscribe(*TOPICS.coordinator_filters())
            assert isinstance(await coordinator.receive(), Connected)
            assert isinstance(await device.receive(), Connected)
            await device.publish(TOPICS.up("d1", "hello"), b"1", qos=1)
            event = await coordinator.receive()
            assert isinstance(event, Packet)
            assert event.topic == TOPICS.up("d1", "hello")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_fleet(tmp_path / "fleet", "lab", broker_names=["localhost"]).close()
    return tmp_path / "fleet"


def finish(folder: Path) -> None:
    with FleetFolder.open(folder) as fleet:
        complete(fleet.fleet)


def test_what_is_good_stays_as_it_is(folder: Path) -> None:
    parts = (folder / "broker", folder / "coordinator")
    before = [contents(part) for part in parts]
    finish(folder)
    assert [contents(part) for part in parts] == before


@pytest.mark.parametrize("lost", ["broker", "coordinator/coordinator-key.pem"])
def test_what_is_lost_is_made_again(folder: Path, lost: str) -> None:
    before = [contents(folder / part).keys() for part in ("broker", "coordinator")]
    if (folder / lost).is_dir():
        shutil.rmtree(folder / lost)
    else:
        (folder / lost).unlink()
    finish(folder)
    assert [contents(folder / part).keys() for part in ("broker", "coordinator")] == before


def test_what_another_authority_has_signed_is_replaced(folder: Path, tmp_path: Path) -> None:
    """As when the coordinator's state comes from a backup, and the rest does not."""
    init_fleet(tmp_path / "backup", "lab", broker_names=["localhost"]).close()
    shutil.rmtree(authority_dir(folder))
    shutil.copytree(authority_dir(tmp_path / "backup"), authority_dir(folder))
    finish(folder)
    ca = x509.load_pem_x509_certificate((authority_dir(folder) / "fleet-ca.pem").read_bytes())
    for file in ("broker/broker.pem", "coordinator/coordinator.pem"):
        certificate = x509.load_pem_x509_certificate((folder / file).read_bytes())
        assert issued_by(certificate, ca)
    crl = x509.load_pem_x509_crl((folder / "broker" / "fleet-crl.pem").read_bytes())
    key = ca.public_key()
    assert crl.is_signature_valid(key)  # type: ignore[arg-type]
    assert (folder / "broker" / "fleet-ca.pem").read_bytes() == (
        authority_dir(folder) / "fleet-ca.pem"
    ).read_bytes()


def test_settings_of_the_coordinator_stay(folder: Path) -> None:
    settings = folder / "coordinator" / "coordinator.toml"
    settings.write_text(settings.read_text() + "rounds = 7\n")
    finish(folder)
    assert tomllib.loads(settings.read_text())["coordinator"]["rounds"] == 7


def test_a_damaged_key_of_the_broker_is_named(folder: Path) -> None:
    (folder / "broker" / "broker-key.pem").write_text("rubbish")
    with pytest.raises(IdentityError, match=r"broker-key\.pem cannot be read"):
        finish(folder)


def test_an_address_in_another_form_is_the_same(tmp_path: Path) -> None:
    made = init_fleet(tmp_path / "plant", "plant", broker_names=["2001:DB8::0001"])
    made.close()
    key = tmp_path / "plant" / "broker" / "broker-key.pem"
    before = key.read_bytes()
    finish(tmp_path / "plant")
    assert key.read_bytes() == before


def test_another_name_of_the_broker_is_certified(folder: Path) -> None:
    settings = folder / "fleet.toml"
    settings.write_text(settings.read_text().replace('"localhost"', '"broker.example", "::1"'))
    finish(folder)
    pem = (folder / "broker" / "broker.pem").read_bytes()
    names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert list(map(str, names.value.get_values_for_type(x509.IPAddress))) == ["::1"]
