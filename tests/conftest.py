"""Fixtures for all tests: coroutine tests, brokers, seeds."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from broker.embedded import EmbeddedBroker
from tests.mosquitto_process import Mosquitto

SEED = int(os.environ.get("SPLITFLEET_TEST_SEED") or random.SystemRandom().randrange(2**32))
COROUTINE_TIMEOUT_S = 280.0

# How long an example takes, and making one, is the machine's affair. All else is as Hypothesis has
# it; in a CI job that is the same examples every time, whatever the seed.
hypothesis.settings.register_profile(
    "splitfleet", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("splitfleet")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header() -> str:
    return f"seed: SPLITFLEET_TEST_SEED={SEED} (set it to repeat this run)"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests, bounded; what asyncio would only log makes them fail."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, c: complaints.append(c))
        async with asyncio.timeout(COROUTINE_TIMEOUT_S):
            await pyfuncitem.obj(**arguments)
        gc.collect()  # an exception nobody retrieved is reported when its future goes
        await asyncio.sleep(0)

    asyncio.run(main())
    assert not complaints, f"asyncio complained: {complaints}"
    return True


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """A test that runs a command within this process leaves the loggers as they were."""
    before = {logger: logger.level for logger in _our_loggers()}
    yield
    for logger in _our_loggers():
        logger.setLevel(before.get(logger, logging.NOTSET))


def _our_loggers() -> list[logging.Logger]:
    known = logging.Logger.manager.loggerDict
    names = [name for name in known if name.partition(".")[0] == "splitfleet"]
    return [logging.getLogger(name) for name in (None, *names)]


@pytest.fixture
def rng() -> random.Random:
    """Randomness of this run's seed."""
    return random.Random(SEED)


@pytest.fixture
def mosquitto() -> Iterator[Mosquitto]:
    """A real Mosquitto on a free port that lets everybody do everything."""
    with Mosquitto("allow_anonymous true") as running:
        yield running


@pytest.fixture
def embedded_broker() -> Iterator[EmbeddedBroker]:
    """The embedded broker on a free port."""
    with EmbeddedBroker() as running:
        yield running
