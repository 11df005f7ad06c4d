from __future__ import annotations

from typing import Any

import pytest

from broker.config import load_settings
from broker.errors import ConfigError
from broker.messages import Assignment
from coordinator.orders import assignment
from coordinator.registry import Registry
from coordinator.settings import CoordinatorSettings
from tests.tiny import make_hello, make_settings


def load(**flags: Any) -> CoordinatorSettings:
    return load_settings(CoordinatorSettings, section="coordinator", flags=flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"bytes_per_sample": 100, "codec": "fp16"}, ["bytes_per_sample", "codec = fp16", "int8"]),
        ({"noise_std": 1.0}, ["clip_norm", "go together"]),
        ({"noise_std": 1.0, "clip_norm": 1.0}, ["network.norm = group", "BatchNorm"]),
        ({"follow_link": True, "codec": "fp32+zstd"}, ["follow_link", "codec = fp32+zstd"]),
        (
            {"follow_link": True, "codec": "int8", "gradient_codec": "bf16"},
            ["follow_link", "gradient_codec = bf16"],
        ),
        ({"bytes_per_sample": 0}, ["bytes_per_sample", "greater than 0"]),
        ({"bytes_per_sample": "inf"}, ["bytes_per_sample", "finite"]),
    ],
)
def test_a_budget_that_cannot_be_kept(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**flags)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["momentum", "learning_rate", "quarantine_s"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"coordinator\.{key}.*finite"):
        load(**{key: value})


def test_floats_are_fine_without_a_budget() -> None:
    assert load(codec="fp32").bytes_per_sample is None
    both = load(codec="int4+zstd", bytes_per_sample=100, follow_link=True)
    assert both.follow_link


def test_devices_are_told_their_budgets() -> None:
    settings = make_settings(codec="int8+zstd", bytes_per_sample=120.5, follow_link=True)
    device = Registry(1).get("a")
    assert device is not None
    device.hello, device.cut = make_hello(), 2
    message = assignment(settings, "run", device, 2).message
    assert isinstance(message, Assignment)
    assert (message.bytes_per_sample, message.follow_link) == (120.5, True)


@pytest.mark.parametrize(
    ("codec", "own", "expected"),
    [
        ("int4+zstd", None, "int6+zstd"),
        ("levels12+channel", None, "levels48+channel"),
        ("int7", None, "int8"),
        ("fp16+zstd", None, "fp16+zstd"),
        ("int4+zstd", "int3+stochastic", "int3+stochastic"),
    ],
)
def test_gradients_have_four_times_the_levels_unless_told(
    codec: str, own: str | None, expected: str
) -> None:
    settings = CoordinatorSettings(codec=codec, gradient_codec=own)
    assert settings.codec_of_gradients.name == expected


def test_the_demo_has_the_coordinators_codec() -> None:
    from ops.demo import DemoSettings

    assert DemoSettings.model_fields["codec"].default == CoordinatorSettings().codec
