from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tensors.losses import distillation

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
TEACHER = torch.tensor([[1.0, 1.5, -2.0], [4.0, 0.0, 0.0]])


def probabilities(logits: torch.Tensor, temperature: float) -> np.ndarray:
    raised = np.exp(logits.double().numpy() / temperature)
    shares: np.ndarray = raised / raised.sum(1, keepdims=True)
    return shares


@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.5])
def test_distillation_is_the_divergence_of_softened_answers(temperature: float) -> None:
    p, q = probabilities(TEACHER, temperature), probabilities(LOGITS, temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert distillation(LOGITS, TEACHER, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_the_same_answers_are_no_distance_apart() -> None:
    assert distillation(LOGITS, LOGITS + 5, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_its_gradient_is_as_large_at_every_temperature_about() -> None:
    """At T = 1 it is that of the cross entropy with the teacher's answers as labels."""
    sizes = []
    for temperature in (1.0, 20.0):
        x = LOGITS.clone().requires_grad_()
        distillation(x, TEACHER, temperature).backward()
        assert x.grad is not None
        sizes.append(x.grad)
    x = LOGITS.clone().requires_grad_()
    F.cross_entropy(x, TEACHER.softmax(1)).backward()
    assert x.grad is not None
    torch.testing.assert_close(sizes[0], x.grad)
    assert 0.2 < (sizes[1].norm() / sizes[0].norm()).item() < 5
