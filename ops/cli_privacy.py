"""The command ``splitfleet privacy``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ops.errors import SettingsWrong

NOT_COVERED = "labels, exit decisions and uploaded parameters are not covered"


def register(app: typer.Typer) -> None:
    """Add it to the command line."""
    app.command()(privacy)


def privacy(
    state_dir: Annotated[Path, typer.Argument(help="an agent's state_dir")] = Path("agent-state"),
    *,
    delta: Annotated[float, typer.Option(help="δ of (ε, δ)-differential privacy")] = 1e-5,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What a device's images have been released with; the agent may be running meanwhile."""
    from edge_agent.privacy_account import read_summary
    from tensors.privacy import epsilon_of

    if not 0 < delta < 1:
        raise SettingsWrong(f"--delta {delta:g}: must be above 0 and below 1")
    found = read_summary(state_dir)
    epsilon = epsilon_of(found.rho_max, delta)
    if as_json:
        # JSON has no infinity: where an image left without noise there is no ρ.
        finite = found.without_noise == 0
        account = {
            "since": found.since,
            "images": found.images,
            "releases": found.releases,
            "rho_max": found.rho_max if finite else None,
            "epsilon_max": epsilon if finite else None,
            "delta": delta,
            "without_noise": found.without_noise,
            "not_covered": NOT_COVERED,
        }
        print(json.dumps(account, indent=1))
        return
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.since))
    print(f"since {since}: {found.releases} releases of {found.images} images")
    print(f"the most released image: ρ = {found.rho_max:.6g}, ε = {epsilon:.6g} at δ = {delta:g}")
    print(f"the median image: ρ = {found.rho_median:.6g}")
    if found.without_noise:
        print(f"{found.without_noise} images were released without noise since then")
    print(f"{NOT_COVERED}; releases before the account was begun are not in it")
