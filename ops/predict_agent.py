"""Asking an agent's HTTP API, see ``edge_agent.http_api``."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.logs import redact_urls
from edge_agent.answer_json import PictureAnswer, PictureError, Predictions
from edge_agent.errors import InputError
from ops.errors import AgentUnreachable
from ops.http_place import Place, parse_place

DEFAULT_PORT = 8470
MOST_BYTES = 1 << 20
"""Of a reply."""
_PICTURE_STATUS = (413, 415, 422)
_BUSY = (429, 503)
_LONGEST_PAUSE_S = 5.0
GRACE_S = 3.0
"""How much later than promised an answer may come: at the last moment it is the exit's."""


class PredictSettings(BaseModel):
    """Section ``[predict]``: where agents are found."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    agents: dict[str, str] = Field(default_factory=dict)
    """Name → URL. A name that is not here is that of a machine, on port 8470."""
    timeout_s: float = Field(default=30.0, gt=0, le=600)
    """How long a picture may take, pauses included that a busy agent asks for."""


def find_agent(name: str, agents: Mapping[str, str]) -> Place:
    """A URL, a name of the settings, or a machine. Raises :class:`SettingsWrong`."""
    return parse_place(
        agents.get(name, name), flag=f"--agent {redact_urls(name)}", default_port=DEFAULT_PORT
    )


@dataclass(frozen=True, slots=True)
class Agent:
    """Asks one picture at a time; an agent that is busy is asked again until the time is over."""

    place: Place
    top: int
    timeout_s: float
    token: str | None = None
    clock: Callable[[], float] = field(default=time.monotonic)
    sleep: Callable[[float], None] = field(default=time.sleep)

    def __call__(self, name: str, data: bytes) -> tuple[str, int, PictureAnswer]:
        """See ``ops.predict.Ask``. Raises :class:`AgentUnreachable` too."""
        end = self.clock() + self.timeout_s
        while True:
            status, headers, body = self._post(data, max(0.1, end - self.clock()))
            if status == 200:
                return self._read(name, body)
            error = _problem(body) or f"it answers with status {status}"
            if status in _PICTURE_STATUS:
                raise InputError(error)
            pause = _pause(headers)
            if status not in _BUSY or self.clock() + pause >= end:
                raise AgentUnreachable(f"{self.place.url} does not answer: {error}")
            self.sleep(pause)

    def _post(self, data: bytes, timeout_s: float) -> tuple[int, Mapping[str, str], bytes]:
        place = self.place
        connection = place.connect(timeout_s + GRACE_S)
        query = urlencode({"top": self.top, "timeout_s": f"{min(timeout_s, 600):.3f}"})
        headers = {"Content-Type": "application/octet-stream", "Accept": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            connection.request("POST", f"{place.path}/predict?{query}", data, headers)
            with connection.getresponse() as response:
                return (
                    response.status,
                    {k.lower(): v for k, v in response.headers.items()},
                    response.read(MOST_BYTES),
                )
        except (OSError, http.client.HTTPException) as exc:
            why = str(exc) or type(exc).__name__
            raise AgentUnreachable(
                f"no agent answers at {place.url} ({why}): start it with splitfleet agent --http "
                "HOST:PORT, or correct --agent"
            ) from exc
        finally:
            connection.close()

    def _read(self, name: str, body: bytes) -> tuple[str, int, PictureAnswer]:
        try:
            found = Predictions.model_validate_json(body)
            (answer,) = found.predictions
        except (ValidationError, ValueError) as exc:
            raise AgentUnreachable(
                f"{self.place.url} answers with something else than predictions: is that an agent "
                "of this version?"
            ) from exc
        if isinstance(answer, PictureError):
            raise InputError(answer.error)
        return found.run, found.version, answer.model_copy(update={"file": name})


def _problem(body: bytes) -> str | None:
    try:
        data = json.loads(body[:4096])
    except (ValueError, RecursionError):
        return None
    error = data.get("error") if isinstance(data, dict) else None
    return error[:500] if isinstance(error, str) else None


def _pause(headers: Mapping[str, str]) -> float:
    text = headers.get("retry-after", "1")
    return min(float(text), _LONGEST_PAUSE_S) if text.isascii() and text.isdecimal() else 1.0
