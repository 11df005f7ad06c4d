from __future__ import annotations

import numpy as np

from ops.bench_labels import Seen, attack, leak_auc


def test_the_area_under_the_curve() -> None:
    positive = np.array([True, True, False, False])
    assert leak_auc(np.array([3.0, 2.0, 1.0, 0.0]), positive) == 1
    assert leak_auc(np.array([0.0, 1.0, 2.0, 3.0]), positive) == 1, "either way round"
    assert leak_auc(np.array([3.0, 1.0, 2.0, 0.0]), positive) == 0.75
    assert leak_auc(np.ones(4), positive) == 0.5


def test_exact_gradients_of_a_linear_classifier_give_every_label_away() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 12))
    labels = rng.integers(0, 5, 300)
    p = rng.dirichlet(np.ones(5), 300)
    gradients = (p - np.eye(5)[labels]) @ weight / 300
    row = attack(Seen(gradients, labels[::-1].copy(), labels), weight, "fp32", 1)
    assert row.decoded == 1
    assert row.cosine > 0.9
    assert row.nearest > 0.7
    guessed = attack(Seen(rng.standard_normal((300, 12)), labels, labels), weight, "fp32", 1)
    assert guessed.answers == 1
    for leak in (guessed.norm, guessed.cosine):
        assert leak < 0.65
    for share in (guessed.nearest, guessed.decoded):
        assert share < 0.35
