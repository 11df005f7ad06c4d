"""The generated configuration on a real Mosquitto, with authorities of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker.config import BrokerConfig
from broker.mosquitto import (
    CERTIFICATE,
    CLAIMS_CA,
    CLAIMS_CRL,
    FLEET_CA,
    FLEET_CRL,
    KEY,
    BrokerLimits,
    write_mosquitto_config,
)
from broker.topics import COORDINATOR
from coordinator.identity.authority import CLAIM, SIDES, Authority, Side
from coordinator.identity.keys import certificate_from_pem, key_to_pem, new_key, to_pem
from tests.mosquitto_process import Mosquitto, free_port

FLEET = "lab"
DAY_S = 86_400.0
AGE_DAYS = 30.0
"""How long ago the authority was made: nothing it signs can be older."""
LIMITS = BrokerLimits()


class GuardedBroker(Mosquitto):
    """Mosquitto with what ``write_mosquitto_config`` writes, started by its ``run.sh``.

    Clients get their certificates from :meth:`client`, :meth:`claim` and :meth:`revoke` them here.
    """

    def __init__(
        self, *, limits: BrokerLimits = LIMITS, loopback: bool = False, fleet: str = FLEET
    ) -> None:
        super().__init__()
        self.claims_port = free_port()
        self.loopback_port = free_port() if loopback else None
        self.broker = self.folder / "a folder"
        self._files = write_mosquitto_config(
            self.broker,
            fleet,
            host=self.host,
            port=self.port,
            claims_port=self.claims_port,
            loopback_port=self.loopback_port,
            limits=limits,
        )
        past = time.time() - AGE_DAYS * DAY_S
        Authority.create(self.folder / "authority", fleet, clock=lambda: past)
        self.authority = Authority.open(self.folder / "authority")
        self._revoked: dict[Side, dict[int, float]] = {side: {} for side in SIDES}
        self._key = new_key()
        self._write(self.broker / KEY, key_to_pem(self._key))
        self.renew()
        self._write(self.broker / FLEET_CA, to_pem(self.authority.ca("fleet")))
        self._write(self.broker / CLAIMS_CA, to_pem(self.authority.ca("claims")))
        self._write_lists()

    def command(self) -> list[str]:
        return [str(self._files.start)]

    def start(self) -> None:
        super().start()
        for port in (self.claims_port, self.loopback_port):
            if port is not None:
                self.wait_for(port)

    @property
    def url(self) -> str:
        return f"mqtts://{self.host}:{self.port}"

    def client(
        self,
        name: str,
        *,
        authority: Authority | None = None,
        days: float = 1.0,
        days_ago: float = 0.0,
        **settings: Any,
    ) -> BrokerConfig:
        """How ``name`` connects: by a certificate for ``days``, made ``days_ago``."""
        authority = authority or self.authority
        if days_ago:
            clock = time.time() - days_ago * DAY_S
            authority = Authority.open(self.folder / "authority", clock=lambda: clock)
        key = new_key()
        if name == COORDINATOR:
            certificate = authority.issue_coordinator(key.public_key(), days)
        else:
            certificate = authority.issue_device(name, key.public_key(), days)
        return self._config(name, self.url, key_to_pem(key), to_pem(certificate), settings)

    def claim(self, claim_id: str, **settings: Any) -> BrokerConfig:
        """How the holder of a claim connects, on the listener for claims."""
        key = new_key()
        certificate = self.authority.issue_claim(claim_id, key.public_key(), days=1)
        url = f"mqtts://{self.host}:{self.claims_port}"
        name = CLAIM + claim_id
        return self._config(name, url, key_to_pem(key), to_pem(certificate), settings)

    def revoke(self, config: BrokerConfig) -> None:
        """Put the certificate of a client or of a claim on the list."""
        assert config.cert_file is not None
        pem = config.cert_file.read_bytes()
        certificate = certificate_from_pem(pem, str(config.cert_file))
        ours = certificate.issuer == self.authority.ca("fleet").subject
        self._revoked["fleet" if ours else "claims"][certificate.serial_number] = time.time()
        self._write_lists()

    def renew(self) -> None:
        """A new certificate for the broker."""
        names = ["localhost", self.host]
        certificate = self.authority.issue_broker(names, self._key.public_key(), days=1)
        self._write(self.broker / CERTIFICATE, to_pem(certificate))

    def _write_lists(self) -> None:
        for side, file in zip(SIDES, (FLEET_CRL, CLAIMS_CRL), strict=True):
            revoked = self.authority.revocation_list(side, self._revoked[side])
            self._write(self.broker / file, to_pem(revoked))

    def _config(
        self, name: str, url: str, key: bytes, certificate: bytes, settings: Mapping[str, Any]
    ) -> BrokerConfig:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        files = {"key_file": folder / "key.pem", "cert_file": folder / "cert.pem"}
        self._write(files["key_file"], key)
        self._write(files["cert_file"], certificate)
        return BrokerConfig(
            url=url, ca_file=self.broker / FLEET_CA, **files, **{"backoff_max_s": 1.0, **settings}
        )

    def _write(self, file: Path, content: bytes) -> None:
        new = file.with_suffix(".new")
        new.write_bytes(content)
        new.replace(file)
