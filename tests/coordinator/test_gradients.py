from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from broker.training_messages import Activations
from coordinator.gradients import GradientEncoder
from tensors.codecs import parse_codec
from tensors.decoding import decode, nonzero
from tensors.format import read_header
from tensors.rate import TOLERANCE

SHAPE = (8, 8, 6, 6)
CODEC = parse_codec("int8+zstd")


def answered(seed: int = 0, *, codec: str = "int8+zstd") -> Activations:
    """Behind a ReLU, so that half of them are zero."""
    features = np.maximum(np.random.default_rng(seed).standard_normal(SHAPE), 0)
    return Activations(
        run="r",
        round=1,
        attempt=0,
        batch=seed,
        version=0,
        labels=[0] * SHAPE[0],
        tensor=parse_codec(codec).encode(features.astype(np.float32)),
    )


def gradient(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 1e-3


def answer(
    encoder: GradientEncoder, device: str, gradient: torch.Tensor, message: Activations
) -> bytes:
    return bytes(encoder.encode(device, gradient, message))


def top(data: bytes) -> int:
    return read_header(data).top


def test_without_a_budget_the_codec_is_used_as_it_is() -> None:
    encoder = GradientEncoder(CODEC, masked=False)
    assert answer(encoder, "a", gradient(), answered()) == CODEC.encode(gradient())


@pytest.mark.parametrize("masked", [True, False])
def test_a_gradient_keeps_to_its_bytes_per_sample(masked: bool) -> None:
    encoder = GradientEncoder(CODEC, masked=masked, bytes_per_sample=60)
    for seed in range(6):
        message = answered(seed)
        data = answer(encoder, "a", gradient(seed), message)
        assert len(data) <= 8 * 60 * (1 + TOLERANCE)
        assert read_header(data).masked is masked
        keep = nonzero(message.tensor) if masked else np.ones(SHAPE, np.bool_)
        received = decode(data, keep=keep if masked else None)
        assert not received[~keep].any()
        sent = gradient(seed).numpy()[keep]
        assert np.corrcoef(received[keep], sent)[0, 1] > 0.6


def test_behind_a_link_a_gradient_is_no_larger_than_what_it_answers() -> None:
    encoder = GradientEncoder(CODEC, masked=False, follow_link=True)
    for codec, levels in (("int2+zstd", 8), ("int8", 256)):
        message = answered(codec=codec)
        data = answer(encoder, "a", gradient(), message)
        assert len(data) <= len(message.tensor) * (1 + TOLERANCE)
        assert top(data) < levels


def test_the_smaller_of_two_budgets_counts() -> None:
    encoder = GradientEncoder(CODEC, masked=False, follow_link=True, bytes_per_sample=100)
    assert len(answer(encoder, "a", gradient(), answered(codec="int8"))) <= 800 * (1 + TOLERANCE)
    small = answered(codec="int2+zstd")
    assert len(small.tensor) < 800
    assert len(answer(encoder, "a", gradient(), small)) <= len(small.tensor) * (1 + TOLERANCE)


def test_a_gradient_without_levels_for_it_goes_exactly() -> None:
    encoder = GradientEncoder(CODEC, masked=True, bytes_per_sample=100)
    hostile = torch.full(SHAPE, float("inf"))
    np.testing.assert_array_equal(decode(answer(encoder, "a", hostile, answered())), hostile)


def test_devices_and_threads_do_not_disturb_each_other() -> None:
    encoder = GradientEncoder(CODEC, masked=True, bytes_per_sample=60)

    def encode(number: int) -> tuple[str, bytes]:
        device = f"d{number % 3}"
        return device, answer(encoder, device, gradient(number), answered(number))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(encode, range(30)))
    assert all(len(data) <= 8 * 60 * (1 + TOLERANCE) for _, data in made)
