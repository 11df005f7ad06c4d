"""The figures of docs/reliability.md.

python -m tests.faults.figures           the matrix, as a table
python -m tests.faults.figures --soak    runs the long soak, minutes
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults.matrix import FAULTS
from tests.faults.modes import CELLS
from tests.faults.soak import Soak
from tests.faults.test_soak import LONG, ROUNDS, SETTINGS, quarters
from tests.faults.trial import ALL, PHASES, Outcome


def words(outcome: Outcome) -> str:
    """An outcome in a few words."""
    parts = []
    for number, attempt in enumerate(outcome.attempts, 1):
        if attempt is None:
            parts.append(f"round {number} given up")
        elif attempt:
            parts.append(f"round {number} again")
    if outcome.extended:
        parts.append("extended")
    parts += ["left out of " + ", ".join(map(str, rounds)) for rounds in outcome.missed.values()]
    if outcome.late.get("folded"):
        parts.append(f"{outcome.late['folded']} late")
    if lost(outcome):
        parts.append(f"**{lost(outcome)} lost**")
    if outcome.left_out:
        parts.append("half left out")
    if outcome.fallbacks:
        parts.append(f"{outcome.fallbacks} by the exit")
    if outcome.silent:
        parts.append("no answers" if len(outcome.silent) == 1 else "nobody's answers")
    if outcome.failures:
        parts.append(f"started {outcome.failures}×")
    return ", ".join(parts) or "·"


def lost(outcome: Outcome) -> int:
    """Batches that were made and are in no model."""
    return outcome.expired + sum(outcome.discarded.values()) + outcome.unfolded


def matrix() -> Iterator[str]:
    """The lines of the table."""
    yield "| | " + " | ".join(PHASES) + " |"
    yield "|---" * (1 + len(PHASES)) + "|"
    for fault in FAULTS:
        cells = (words(fault.outcomes[phase]) for phase in PHASES)
        yield f"| {fault.name} | " + " | ".join(cells) + " |"


def summary() -> str:
    """The sentence below it."""
    outcomes = [fault.outcomes[phase] for fault in FAULTS for phase in PHASES]
    total = sum(map(lost, outcomes))
    clean = sum(not lost(outcome) for outcome in outcomes)
    return (
        f"{len(outcomes)} cells tried, {len(outcomes)} survived; in {clean} no batch was lost, in "
        f"the others {total} of {ALL * (len(outcomes) - clean)}. {len(CELLS)} more cells in other "
        f"modes, {len(CELLS)} survived."
    )


def soak() -> Iterator[str]:
    """The lines of the soak's table, each once it has run."""
    yield "| mode | seed | rounds closed | given up | faults | batches made | lost | objects |"
    yield "|---" * 8 + "|"
    for mode, seed in LONG:
        with tempfile.TemporaryDirectory() as folder:
            run = Soak(Path(folder), seed=seed, rounds=ROUNDS, **SETTINGS[mode])
            run.run()
            figures = run.figures
        second, last = quarters(run)
        yield (
            f"| {mode} | {seed} | {figures['rounds']} | {figures['abandoned']} | "
            f"{figures['faults']} | {figures['produced']} | {figures['lost']} | "
            f"{second:.0f} → {last:.0f} |"
        )


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true")
    logging.disable(logging.CRITICAL)
    lines = soak() if parser.parse_args().soak else [*matrix(), "", summary()]
    for line in lines:
        print(line, flush=True)  # noqa: T201 that is its purpose


if __name__ == "__main__":
    main()
