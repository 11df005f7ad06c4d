from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.config import BrokerConfig
from broker.embedded import EmbeddedBroker
from broker.mqtt import MqttTransport
from broker.transport import Connected, Packet
from ops import doctor
from ops.doctor import (
    Subject,
    check_dataset,
    check_disk,
    check_python,
    check_state_dir,
    check_torch,
    check_torchvision,
    examine,
    show,
    with_identity,
)
from ops.doctor_broker import examine_broker
from ops.finding import Finding
from tests.guarded_broker import FLEET, GuardedBroker
from tests.mosquitto_process import Mosquitto, free_port


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def found(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.mark.parametrize(("section", "name"), [("coordinator", "garden"), ("agent", "shed")])
def test_what_is_examined_is_what_the_service_will_use(
    section: str, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "fleet.toml"
    settings = f'fleet = "{name}"\ndataset = "cifar10"\ndata_root = "/srv/data"\nthreads = 2\n'
    file.write_text(f"[{section}]\n{settings}")
    found = Subject.resolve(file, {"dataset": None, "state_dir": tmp_path})
    assert (found.fleet, found.dataset) == (name, "cifar10")
    assert (found.data_root, found.state_dir) == (Path("/srv/data"), tmp_path)
    assert Subject.resolve(file, {"dataset": "stl10"}).dataset == "stl10"
    assert Subject.resolve(None, {}).dataset == "fashion-mnist-small"


async def test_a_good_machine_with_the_embedded_broker_passes(tmp_path: Path) -> None:
    findings = await examine(None, dataset="fashion-mnist-small", state_dir=tmp_path / "new")
    assert states(findings) == dict.fromkeys(
        (
            "Python",
            "torch",
            "torchvision",
            "data set",
            "state folder",
            "disk space",
            "broker",
            "MQTT 5",
            "packet size",
            "retained message",
        ),
        "ok",
    )


async def test_a_real_mosquitto_passes(mosquitto: Mosquitto) -> None:
    findings = await examine_broker(BrokerConfig(url=mosquitto.url), fleet="lab")
    assert set(states(findings).values()) == {"ok"}
    assert "131072 bytes" in found(findings, "packet size").detail


async def test_the_retained_message_is_cleared(mosquitto: Mosquitto) -> None:
    config = BrokerConfig(url=mosquitto.url)
    await examine_broker(config, fleet="lab")
    async with MqttTransport(config, "late") as late:
        assert isinstance(await late.receive(), Connected)
        await late.publish("end", b"end", qos=1, retain=True)
        await late.subscribe("splitfleet/#", "end")
        packet = await late.receive()
        assert isinstance(packet, Packet)
        assert packet.topic == "end"


async def test_nobody_listening_ends_the_checks_with_advice() -> None:
    config = BrokerConfig(url=f"mqtt://127.0.0.1:{free_port()}")
    (finding,) = await examine_broker(config, fleet="lab")
    assert (finding.name, finding.state) == ("broker", "failed")
    assert "start the broker" in finding.advice


async def test_a_broker_that_takes_only_small_packets_fails() -> None:
    with Mosquitto("allow_anonymous true", "max_packet_size 65536") as small:
        findings = await examine_broker(BrokerConfig(url=small.url), fleet="lab")
    assert states(findings) == {
        "broker": "ok",
        "MQTT 5": "ok",
        "packet size": "failed",
        "retained message": "ok",
    }
    assert "65536" in found(findings, "packet size").detail
    assert "max_packet_size" in found(findings, "packet size").advice


async def test_a_broker_that_keeps_no_messages_fails() -> None:
    with Mosquitto("allow_anonymous true", "retain_available false") as forgetful:
        findings = await examine_broker(BrokerConfig(url=forgetful.url), fleet="lab")
    assert states(findings)["retained message"] == "failed"
    assert states(findings)["packet size"] == "ok"


async def test_the_coordinator_may_check_everything() -> None:
    with GuardedBroker() as broker:
        findings = await examine_broker(broker.client("coordinator", days=30), fleet=FLEET)
    assert states(findings) == {
        "broker": "ok",
        "TLS": "warning",
        "certificate": "ok",
        "MQTT 5": "ok",
        "packet size": "ok",
        "retained message": "ok",
    }
    assert "TLSv1.3" in found(findings, "TLS").detail
    assert "coordinator" in found(findings, "TLS").advice, "it is the test's for a day only"
    assert "CN=coordinator, for 30 days" in found(findings, "certificate").detail


async def test_what_a_device_may_not_do_is_a_warning() -> None:
    with GuardedBroker() as broker:
        findings = await examine_broker(broker.client("d1", days=30), fleet=FLEET)
    assert states(findings) == {
        "broker": "ok",
        "TLS": "warning",
        "certificate": "ok",
        "MQTT 5": "ok",
        "packet size": "warning",
        "retained message": "warning",
    }
    assert "131072" in found(findings, "packet size").detail


async def test_a_certificate_that_has_ended_is_named_as_that() -> None:
    with GuardedBroker() as broker:
        findings = await examine_broker(broker.client("d1", days_ago=5), fleet=FLEET)
    assert states(findings) == {
        "broker": "ok",
        "TLS": "warning",
        "certificate": "failed",
        "MQTT 5": "failed",
    }
    assert "CN=d1, ended 4 days ago" in found(findings, "certificate").detail
    assert "not ended" in found(findings, "MQTT 5").advice


async def test_a_broker_whose_certificate_is_not_trusted_is_named_as_that() -> None:
    with GuardedBroker() as broker:
        stranger = BrokerConfig(url=broker.url)
        findings = await examine_broker(stranger, fleet=FLEET)
    assert states(findings) == {"broker": "ok", "TLS": "failed"}
    assert "ca_file" in found(findings, "TLS").advice


async def test_a_port_without_tls_is_named_as_that(mosquitto: Mosquitto) -> None:
    config = BrokerConfig(url=mosquitto.url.replace("mqtt:", "mqtts:"))
    findings = await examine_broker(config, fleet="lab")
    assert states(findings) == {"broker": "ok", "TLS": "failed"}
    assert "TLS port" in found(findings, "TLS").advice


def test_an_agent_s_settings_name_its_identity(tmp_path: Path) -> None:
    broker = BrokerConfig(url="mqtts://broker.example")
    settings = tmp_path / "agent.toml"
    settings.write_text('[agent]\nidentity_dir = "/var/lib/x"\n')
    assert with_identity(broker, settings).cert_file == Path("/var/lib/x/device.pem")
    assert with_identity(broker, None) is broker


@contextlib.asynccontextmanager
async def answering(reply: bytes) -> AsyncIterator[str]:
    """A server that answers the first packet with ``reply`` and closes; its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            if await reader.read(1024):
                writer.write(reply)
                await writer.drain()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(bytes([0x20, 2, 0, 1]), id="MQTT 3.1.1 says unacceptable version"),
        pytest.param(bytes([0x20, 3, 0, 0x84, 0]), id="MQTT 5 says unsupported version"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="a web server"),
    ],
)
async def test_a_broker_without_mqtt_5_is_named_as_that(reply: bytes) -> None:
    async with answering(reply) as url:
        findings = await examine_broker(BrokerConfig(url=url), fleet="lab")
    assert states(findings) == {"broker": "ok", "MQTT 5": "failed"}
    assert "MQTT 5" in found(findings, "MQTT 5").advice


async def test_an_embedded_broker_that_does_not_start_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedBroker() as other:
        monkeypatch.setattr(doctor, "EmbeddedBroker", lambda: EmbeddedBroker(other.port))
        findings = await examine(None, dataset="fashion-mnist-small", state_dir=tmp_path)
    assert found(findings, "embedded broker").state == "failed"
    assert str(other.port) in found(findings, "embedded broker").detail


def test_an_old_python_fails() -> None:
    assert check_python((3, 10)).state == "failed"
    assert "3.11" in check_python((3, 10)).advice
    assert check_python((3, 14)).state == "ok"


def test_missing_torch_fails_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    finding = check_torch()
    assert finding.state == "failed"
    assert "pip install" in finding.advice


def test_onnxruntime_is_enough_for_a_device_that_does_not_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnxruntime", reason="needs splitfleet[lite]")
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = check_torch()
    assert finding.state == "warning"
    assert "--lite" in finding.detail


def test_another_torch_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = importlib.import_module("torch")
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    finding = check_torch()
    assert finding.state == "warning"
    assert "2.10.0" in finding.detail


def test_missing_torchvision_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensors.torchvision_compat", None)
    finding = check_torchvision()
    assert finding.state == "warning"
    assert "pip install" in finding.advice


def test_a_missing_data_set_fails_with_what_to_do(tmp_path: Path) -> None:
    finding = check_dataset("cifar10", tmp_path)
    assert finding.state == "failed"
    assert "cifar10 is not in" in finding.detail
    assert "download" in finding.advice


def test_an_unknown_data_set_names_the_known_ones() -> None:
    finding = check_dataset("cifar11", None)
    assert finding.state == "failed"
    assert "cifar10" in finding.advice


def test_a_state_folder_that_is_a_file_fails(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_text("")
    finding = check_state_dir(file)
    assert finding.state == "failed"
    assert "--state-dir" in finding.advice


def test_checking_the_state_folder_leaves_nothing(tmp_path: Path) -> None:
    assert check_state_dir(tmp_path / "a" / "b").state == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "state"), [(10**10, "ok"), (10**9, "warning"), (10**8, "failed")])
def test_disk_space_is_judged_by_what_is_free(tmp_path: Path, free: int, state: str) -> None:
    finding = check_disk(tmp_path, lambda _: free)
    assert finding.state == state
    assert f"{free / 1e9:.1f} GB" in finding.detail


FINDINGS = [
    Finding("Python", "ok", "3.13.1"),
    Finding("broker", "failed", "nobody there", "start the broker"),
]


def test_findings_are_shown_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    show(FINDINGS, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False
    assert printed["checks"][1] == {
        "name": "broker",
        "state": "failed",
        "detail": "nobody there",
        "advice": "start the broker",
    }
    show(FINDINGS[:1], as_json=True)
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_findings_are_shown_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show(FINDINGS, as_json=False)
    printed = capsys.readouterr().out
    assert "✓" in printed
    assert "✗" in printed
    assert "start the broker" in printed
