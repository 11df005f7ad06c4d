from __future__ import annotations

from pathlib import Path

import pytest

from ops.identity import init_fleet
from tests.ops.flash.wheels import write_wheelhouse


@pytest.fixture(scope="session")
def fleet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet with the device cam-1 and, in token.pem, a join token."""
    folder = tmp_path_factory.mktemp("flash") / "fleet"
    with init_fleet(folder, "lab", broker_names=["10.0.2.2"], port=18883, claims_port=18884) as it:
        it.add_device("cam-1")
        (folder / "token.pem").write_bytes(it.token(50, 7))
    return folder


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheelhouse(tmp_path_factory.mktemp("wheels") / "house of wheels")
