"""The doctor's checks of TLS: who the broker is, and how long this client is itself."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

from cryptography import x509

from broker.config import BrokerConfig
from broker.errors import ConfigError
from broker.sockets import open_socket, secure
from broker.tls import explain_tls, tls_context
from ops.finding import Finding, State

DAY_S = 86_400.0
SHORT_S = 3 * DAY_S
"""Less is left of a certificate only if nobody renews it."""


async def check_tls(config: BrokerConfig) -> Finding:
    """The broker shows a certificate for its name that this client trusts."""
    name = "TLS"
    advice = (
        "give the fleet's CA (ca_file, or identity_dir of an agent), and the broker by a name that "
        "is in its certificate (broker_names in fleet.toml)"
    )
    try:
        context = tls_context(config)
        sock = await open_socket(config.host, config.port)
        secured = await asyncio.to_thread(
            secure, sock, context, config.host, config.connect_timeout_s
        )
    except ConfigError as exc:
        return Finding(name, "failed", str(exc), "correct the TLS settings")
    except ssl.SSLCertVerificationError as exc:
        return Finding(name, "failed", explain_tls(exc), advice)
    except (OSError, TimeoutError) as exc:
        detail = explain_tls(exc) if isinstance(exc, ssl.SSLError) else f"{config.url}: {exc}"
        return Finding(name, "failed", detail, "use the broker's TLS port, or mqtt:// without TLS")
    with secured:
        shown = secured.getpeercert() or {}
        left_s = ssl.cert_time_to_seconds(str(shown["notAfter"])) - time.time()
        detail = f"{secured.version()}; the broker's certificate is for {left_s / DAY_S:.0f} days"
    return _judge(name, detail, left_s, "start the coordinator, which signs it anew")


def check_certificate(file: Path, now: float | None = None) -> Finding:
    """This client's own certificate is good for a while. ``now``: unix seconds."""
    name = "certificate"
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as exc:
        advice = "give the file that splitfleet fleet init, or fleet add, has made"
        return Finding(name, "failed", f"{file}: {exc}", advice)
    left_s = certificate.not_valid_after_utc.timestamp() - (time.time() if now is None else now)
    subject = certificate.subject.rfc4514_string()
    detail = f"{subject}, for {left_s / DAY_S:.0f} days"
    if left_s < 0:
        detail = f"{subject}, ended {-left_s / DAY_S:.0f} days ago"
    advice = (
        "run the agent, which renews it and comes back when it has ended; the coordinator's is "
        "signed anew by splitfleet coordinator"
    )
    return _judge(name, detail, left_s, advice)


def _judge(name: str, detail: str, left_s: float, advice: str) -> Finding:
    state: State = "ok" if left_s >= SHORT_S else "warning" if left_s > 0 else "failed"
    return Finding(name, state, detail, "" if state == "ok" else advice)
