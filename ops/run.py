"""Running one service in this process: settings, signals, errors as exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from broker.config import BrokerConfig, load_settings
from broker.errors import (
    BrokerError,
    ConfigError,
    ConnectRefused,
    EmbeddedBrokerError,
    PortTaken,
    TopicError,
)
from broker.transport import Transport, Will
from coordinator.errors import CoordinatorError, IdentityError, ResumeError, StoreError
from edge_agent.errors import AgentError, ListenError, StateError
from edge_agent.errors import IdentityError as DeviceIdentityError
from ops.errors import (
    BrokerUnreachable,
    DataMissing,
    DiskTrouble,
    FleetFailed,
    OpsError,
    PortInUse,
    SettingsWrong,
)
from tensors.errors import CodecError, DataError, NetworkError, TensorsError

Model = TypeVar("Model", bound=BaseModel)


def settings_of(
    model: type[Model], section: str, file: Path | None, flags: Mapping[str, Any]
) -> Model:
    """A component's settings from file, environment and flags, in rising precedence."""
    return load_settings(model, section=section, file=file, environ=os.environ, flags=flags)


def parse_assignments(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` flags as a mapping. Raises :class:`SettingsWrong`."""
    flags: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise SettingsWrong(f"--set {pair!r}: write --set key=value")
        flags[key.strip().replace("-", "_")] = value.strip()
    return flags


def with_assignments(pairs: list[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags`` of their own, None if not given, and beside them what ``--set`` says.

    Raises :class:`SettingsWrong` for what both say.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    assigned = parse_assignments(pairs)
    for key in assigned.keys() & given.keys():
        raise SettingsWrong(f"--set {key}: another flag gives {key} already; leave one of them out")
    return assigned | given


def transport_for(broker: BrokerConfig, client_id: str, will: Will) -> Transport:
    """The MQTT transport; the name is also the user name unless one is configured."""
    from broker.mqtt import MqttTransport

    return MqttTransport(broker, client_id, will=will)


class Stop(asyncio.Event):
    """Set when a service shall end; ``interrupted`` if somebody at a keyboard wants it."""

    interrupted = False


@contextlib.contextmanager
def stop_signals(*, until_eof: bool = False) -> Iterator[Stop]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C ends the process at once.

    With ``until_eof`` the end of standard input sets it too, so that a child that was given a pipe
    ends with its parent, however that ended.
    """
    loop = asyncio.get_running_loop()
    stop = Stop()

    def request_stop(number: int) -> None:
        if stop.is_set():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        stop.interrupted |= number == signal.SIGINT
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, request_stop, number)
    if until_eof:

        def watch() -> None:
            while os.read(0, 4096):
                pass
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=watch, name="stdin", daemon=True).start()
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the packages' errors into :class:`OpsError` with the exit code for it."""
    try:
        yield
    except OpsError:
        raise
    except (ConfigError, TopicError, NetworkError, CodecError, ResumeError) as exc:
        raise SettingsWrong(str(exc)) from exc
    except (IdentityError, DeviceIdentityError) as exc:
        raise SettingsWrong(str(exc)) from exc
    except DataError as exc:
        raise DataMissing(str(exc)) from exc
    except (StoreError, StateError) as exc:
        raise DiskTrouble(str(exc)) from exc
    except (PortTaken, ListenError) as exc:
        raise PortInUse(str(exc)) from exc
    except (ConnectRefused, EmbeddedBrokerError) as exc:
        raise BrokerUnreachable(str(exc)) from exc
    except AgentError as exc:
        raise FleetFailed(str(exc)) from exc
    except (BrokerError, CoordinatorError, TensorsError) as exc:
        raise OpsError(str(exc)) from exc
