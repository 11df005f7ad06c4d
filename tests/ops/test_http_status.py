from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from coordinator.health import Vitals
from ops.errors import PortInUse, SettingsWrong
from ops.http_status import AT_ONCE, FleetPages, HttpServer, serve_http


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("splitfleet_round", "The round", registry=registry).set(4)
    return registry


@pytest.fixture
def vitals() -> Vitals:
    return Vitals(("training",), bound_s=60, clock=lambda: 0.0)


@pytest.fixture
def server(registry: CollectorRegistry, vitals: Vitals) -> Iterator[HttpServer]:
    pages = FleetPages(vitals)() | {"/broken": _broken}
    with serve_http(registry, pages, "127.0.0.1", 0) as server:
        yield server


def _broken() -> tuple[bool, str]:
    raise RuntimeError("some bug")


def ask(server: HttpServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.headers["Content-Type"], reply.read().decode()
    finally:
        connection.close()


def test_metrics_are_served(server: HttpServer) -> None:
    status, kind, text = ask(server, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert "splitfleet_round 4.0" in text.splitlines()


def test_health_is_503_until_the_coordinator_runs_with_its_broker(
    server: HttpServer, vitals: Vitals
) -> None:
    status, kind, text = ask(server, "/healthz")
    assert (status, kind) == (503, "application/json")
    assert "starting" in json.loads(text)["problem"]
    assert ask(server, "/status")[0] == 503, "there is nothing to tell yet"
    vitals.look({"training": lambda run: bool(run) or True}, broker_connected=True)
    status, _, text = ask(server, "/healthz")
    assert status == 200
    assert json.loads(text)["ok"] is True


def test_other_paths_and_methods_are_refused_plainly(server: HttpServer) -> None:
    status, _, text = ask(server, "/nothing")
    assert status == 404
    assert "/metrics\n/healthz\n/status" in text
    assert ask(server, "/")[0] == 200
    assert ask(server, "/metrics", "POST")[0] == 405
    assert ask(server, "/metrics", "HEAD") == (200, ask(server, "/metrics")[1], "")


def test_a_page_that_fails_is_logged_and_the_server_goes_on(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(server, "/broken")[0] == 500
    assert "/broken cannot be answered" in caplog.text
    assert ask(server, "/metrics")[0] == 200


def test_clients_that_say_nothing_take_no_more_room_than_there_is(server: HttpServer) -> None:
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(AT_ONCE)]
    one_more = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    assert one_more.recv(1) == b"", "sent away"
    assert threading.active_count() <= before + AT_ONCE
    for connection in (*silent, one_more):
        connection.close()


def test_a_port_taken_is_said_plainly(server: HttpServer, registry: CollectorRegistry) -> None:
    with pytest.raises(PortInUse, match=rf"{server.port}.*metrics_port") as caught:
        serve_http(registry, {}, "127.0.0.1", server.port)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 64, "192.0.2.1"])
def test_a_host_that_is_not_this_machine_is_a_wrong_setting(
    registry: CollectorRegistry, host: str
) -> None:
    with pytest.raises(SettingsWrong, match=f"metrics_host = '{host}'"):
        serve_http(registry, {}, host, 0)
