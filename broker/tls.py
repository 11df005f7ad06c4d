"""TLS of a client: its settings as a context, and what went wrong in words.

With TLS 1.3 a client is done before the server has looked at its certificate, so a refusal comes
with the first bytes that are read, and the MQTT library takes it for a lost connection.
"""

from __future__ import annotations

import ssl
import time

from broker.config import BrokerConfig
from broker.errors import ConfigError

_REFUSALS = {
    "CERTIFICATE_EXPIRED": "it has ended",
    "CERTIFICATE_REVOKED": "it is revoked",
    "UNKNOWN_CA": "it is of another fleet",
    "CERTIFICATE_REQUIRED": "there is none: set cert_file and key_file",
}


class ClientSocket(ssl.SSLSocket):
    """A socket that remembers why the server ended the connection."""

    alert: ssl.SSLError | None = None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """What has arrived, decrypted."""
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as exc:
            self.alert = exc
            raise


def tls_context(config: BrokerConfig) -> ssl.SSLContext:
    """The context to connect with, from the files as they are now.

    Raises ConfigError when they cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.cert_file is not None:
            context.load_cert_chain(config.cert_file, config.key_file)
    except (OSError, ssl.SSLError) as exc:
        files = [str(f) for f in (config.ca_file, config.cert_file, config.key_file) if f]
        raise ConfigError(
            f"cannot use the TLS files {', '.join(files)}: {exc}; "
            "give PEM files that this user may read"
        ) from exc
    context.sslsocket_class = ClientSocket
    return context


def why_lost(sock: ssl.SSLSocket | None, *, answered: bool) -> str:
    """Why a connection ended, as far as TLS says; ``answered``: after the broker had accepted it.

    The network may have lost what the broker said about it.
    """
    alert = sock.alert if isinstance(sock, ClientSocket) else None
    if alert is not None:
        reason = alert.reason or str(alert)
        for ending, meaning in _REFUSALS.items():
            if reason.endswith(ending):
                return f"the broker refuses this client's certificate: {meaning}"
        return f"the broker ended TLS: {reason}"
    if sock is not None and not answered:
        return (
            "the broker ended the connection before it answered; it may refuse this client's "
            "certificate: ended, revoked, or of another fleet"
        )
    return "the connection was lost"


def explain_tls(exc: ssl.SSLError) -> str:
    """Why a handshake failed, and what to do."""
    if not isinstance(exc, ssl.SSLCertVerificationError):
        return f"no TLS is spoken there as this client needs it ({exc.reason or exc})"
    why = exc.verify_message.rstrip(".")
    if "not yet valid" in why or "expired" in why:
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        return f"the broker's certificate does not hold: {why}; here it is {now}, is that right?"
    return (
        f"the broker's certificate does not hold: {why}; check the broker's name in the url, and "
        "that ca_file is its fleet's"
    )
