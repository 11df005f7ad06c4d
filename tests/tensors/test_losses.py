from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tensors.losses import cross_entropy, distillation, log_prior

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


# -- calibration ----------------------------------------------------------------------------------

LABELS = torch.tensor([1, 0])
COUNTS = np.array([7, 0, 1])


def test_without_a_prior_it_is_the_plain_cross_entropy() -> None:
    plain = F.cross_entropy(LOGITS, LABELS)
    assert torch.equal(cross_entropy(LOGITS, LABELS), plain)
    even = cross_entropy(LOGITS, LABELS, log_prior(np.array([5, 5, 5])))
    assert even.item() == pytest.approx(plain.item(), rel=1e-6)


def test_with_one_every_class_counts_as_often_as_it_was_seen() -> None:
    """Balanced softmax: exp(z) of a class times how many images it has, and one more."""
    raised = np.exp(LOGITS.double().numpy()) * (COUNTS + 1)
    expected = -np.log(raised[[0, 1], LABELS] / raised.sum(1)).mean()
    assert cross_entropy(LOGITS, LABELS, log_prior(COUNTS)).item() == pytest.approx(expected)


def test_trained_on_unlike_labels_the_logits_are_even() -> None:
    """What knows nothing of an image learns how frequent labels are, unless that is accounted for:
    then nothing moves it from answering that all are alike."""
    labels = torch.tensor([0] * 90 + [1] * 9)
    gradients = []
    for prior in (None, log_prior(np.array([89, 8]))):
        logits = torch.zeros(2, requires_grad=True)
        cross_entropy(logits.expand(99, 2), labels, prior).backward()
        assert logits.grad is not None
        gradients.append(logits.grad.abs().max().item())
    assert gradients[0] > 0.4
    assert gradients[1] == pytest.approx(0, abs=1e-6)


def test_a_class_that_was_never_seen_has_a_prior_too() -> None:
    prior = log_prior(COUNTS)
    assert prior.dtype is torch.float32
    np.testing.assert_allclose(prior, np.log([8 / 11, 1 / 11, 2 / 11]), rtol=1e-6)
