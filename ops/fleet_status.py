"""``splitfleet status``: how a fleet is, as its coordinator says at ``/status``."""

from __future__ import annotations

import http.client
import json

from pydantic import ValidationError
from rich.console import Console

from coordinator.status import FleetStatus
from ops.errors import CoordinatorSilent
from ops.fleet_order import Order
from ops.fleet_table import show
from ops.http_place import Place

DEFAULT_PORT = 9464
TIMEOUT_S = 10.0
MOST_BYTES = 16 << 20
"""Of a reply; a thousand devices take less than one MiB."""


def fetch(place: Place) -> bytes:
    """What the coordinator there says. Raises :class:`CoordinatorSilent`."""
    connection = place.connect(TIMEOUT_S)
    try:
        connection.request("GET", f"{place.path}/status", headers={"Accept": "application/json"})
        with connection.getresponse() as reply:
            status, body = reply.status, reply.read(MOST_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        why = str(exc) or type(exc).__name__
        raise CoordinatorSilent(
            f"no coordinator answers at {place.url} ({why}): start it with splitfleet coordinator "
            f"--metrics-port {place.port}, or correct --url"
        ) from exc
    finally:
        connection.close()
    if status == 503:
        raise CoordinatorSilent(f"the coordinator at {place.url} is not ready: {_problem(body)}")
    if status != 200:
        raise CoordinatorSilent(
            f"{place.url} answers with status {status}: is that a coordinator's --metrics-port?"
        )
    return body


def read(place: Place) -> FleetStatus:
    """How the fleet is. Raises :class:`CoordinatorSilent`."""
    try:
        return FleetStatus.model_validate_json(fetch(place))
    except ValidationError as exc:
        raise CoordinatorSilent(
            f"{place.url} answers with something else than a status: is that a coordinator of "
            "this version?"
        ) from exc


def status(place: Place, *, order: Order, as_json: bool) -> None:
    """Print it. Raises :class:`CoordinatorSilent`."""
    found = read(place)
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=1))
    else:
        show(found, Console(), order=order)


def _problem(body: bytes) -> str:
    try:
        problem = json.loads(body)["problem"]
    except (ValueError, RecursionError, KeyError, TypeError):
        problem = None
    return problem if isinstance(problem, str) else "ask again later"
