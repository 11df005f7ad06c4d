"""Settings: how to reach the broker, and how every component reads its own.

`load_settings` merges a section of a TOML file, environment variables and command-line flags, in
rising precedence, into one frozen object, or raises one ConfigError that names the key, the value,
where it came from, and what is allowed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from broker.errors import ConfigError
from broker.logs import redact_urls

ENVIRONMENT_PREFIX = "SPLITFLEET"
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}

Model = TypeVar("Model", bound=BaseModel)


class BrokerConfig(BaseModel):
    """How to reach the MQTT broker; durations in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url: str = "mqtt://127.0.0.1:1883"
    """mqtt://HOST[:PORT], or mqtts://HOST[:PORT] for TLS."""
    username: str | None = None
    """For brokers that ask for it; in a fleet of `fleet init` the certificate says it."""
    password: SecretStr | None = None
    ca_file: Path | None = None
    """The certificates to trust with mqtts; the system's when not set."""
    cert_file: Path | None = None
    key_file: Path | None = None
    """Unencrypted private key of `cert_file`."""
    keepalive_s: int = Field(default=30, ge=5, le=65_535)
    session_expiry_s: int = Field(default=3600, ge=1, le=4_294_967_294)
    """How long the broker keeps subscriptions and messages for a client that is away."""
    receive_maximum: int = Field(default=64, ge=1, le=64)
    """How many QoS 1 packets the broker may send before the first is acknowledged.

    The embedded broker stalls at 100, and no broker here gets faster above 20.
    """
    max_packet_size: int = Field(default=131_072, ge=1024, le=268_435_455)
    """Largest whole packet to send or take; AWS IoT Core's limit by default."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    publish_timeout_s: float = Field(default=30.0, gt=0)
    """How long a publish or a subscription may stay unacknowledged."""
    backoff_initial_s: float = Field(default=0.5, gt=0)
    backoff_max_s: float = Field(default=30.0, gt=0)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise ValueError("give mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
        if parts.username is not None or parts.password is not None:
            raise ValueError("credentials do not belong in the URL; set username and password")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError("nothing may follow the port")
        if parts.port == 0:  # reading .port raises ValueError above 65535
            raise ValueError("the port must be 1 to 65535")
        return url

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        files = (self.ca_file, self.cert_file, self.key_file)
        if not self.tls and any(files):
            raise ValueError("ca_file, cert_file and key_file need an mqtts:// url")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together; set both or neither")
        if self.password is not None and self.username is None:
            raise ValueError("a password needs a username")
        if self.backoff_max_s < self.backoff_initial_s:
            raise ValueError("backoff_max_s must not be below backoff_initial_s")
        return self

    @property
    def tls(self) -> bool:
        return urlsplit(self.url).scheme == "mqtts"

    @property
    def host(self) -> str:
        host = urlsplit(self.url).hostname
        assert host is not None
        return host

    @property
    def port(self) -> int:
        parts = urlsplit(self.url)
        return parts.port or DEFAULT_PORTS[parts.scheme]


def load_settings(
    model: type[Model],
    *,
    section: str,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Model:
    """Build `model` from `[section]` of a TOML file < environment < flags.

    The variable of field `keepalive_s` in section `broker` is SPLITFLEET_BROKER_KEEPALIVE_S. A flag
    that is None was not given. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in _read_section(file, section).items():
        values[key], origins[key] = value, str(file)
    prefix = f"{ENVIRONMENT_PREFIX}_{section.upper()}_"
    for name, text in (environ or {}).items():
        if name.startswith(prefix):
            key = name.removeprefix(prefix).lower()
            values[key], origins[key] = text, f"the environment variable {name}"
    for key, value in (flags or {}).items():
        if value is not None:
            values[key], origins[key] = value, f"the flag --{key.replace('_', '-')}"
    try:
        return model(**values)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, model, section, origins)) from None


def _read_section(file: Path | None, section: str) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot read the settings file {file}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the settings file {file} is not valid TOML: {exc}") from exc
    values = content.get(section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"in {file}, {section!r} must be a table: write [{section}] above it")
    return values


def _explain(
    exc: ValidationError, model: type[BaseModel], section: str, origins: Mapping[str, str]
) -> str:
    error = exc.errors(include_url=False)[0]
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return f"the settings of [{section}] do not fit together: {message}"
    key = str(error["loc"][0])
    place = ".".join([section, *map(str, error["loc"])])
    origin = f" (from {origins[key]})" if key in origins else ""
    if error["type"] == "missing":
        return f"{place} is missing; set it in [{section}], by environment or by flag"
    if error["type"] == "extra_forbidden":
        known = ", ".join(sorted(model.model_fields))
        return f"{place}{origin} is not a setting; known are {known}"
    field = model.model_fields.get(key)
    secret = field is not None and "Secret" in str(field.annotation)
    value = "(hidden)" if secret else redact_urls(repr(error["input"]))
    return f"{place} = {value}{origin} is not allowed: {message}"
