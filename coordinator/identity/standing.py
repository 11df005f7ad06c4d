"""How a fleet's identity is: for metrics, and whoever else watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

IDENTITY = "identity"
"""The machine that gives devices their certificates."""

Condition = Literal["valid", "ending", "ended", "awaited", "revoked"]
"""What a device on the roster is, by its newest certificate and the roster's word."""
CONDITIONS: tuple[Condition, ...] = get_args(Condition)

OUTCOMES = (
    "enrolled",
    "came_back",
    "renewed",
    "bad_claim",
    "bad_name",
    "bad_request",
    "other_key",
    "other_name",
    "revoked",
    "unavailable",
    "unknown",
    "used_up",
)
"""What asking for a certificate can come to: the first three get one."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """When what all depends on ends, unix seconds.

    ``certificates``: of ``broker``, ``coordinator``, ``fleet-ca`` and ``claims-ca``; ``lists``: of
    ``fleet`` and ``claims``.
    """

    certificates: Mapping[str, float]
    lists: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Standing:
    """``devices``: how many are in each of ``CONDITIONS``."""

    expiry: Expiry
    devices: Mapping[Condition, int]
