"""What an attacker gets of an image, and how alike two images are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ops.bench_reconstruction import Setup, run_bench
from ops.errors import SettingsWrong
from ops.reconstruction import reconstruct, total_variation
from ops.similarity import ssim
from tensors.datasets import Dataset

Y, X = np.mgrid[0:24, 0:20]
STRIPES = (X * 7 + Y * 13) % 32 / 31
WAVES = np.clip(0.8 * STRIPES + 0.1 + 0.1 * np.cos(X * Y), 0, 1)


def as_image(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[None, None]


def naive(a: np.ndarray, b: np.ndarray) -> float:
    """The paper's formulas, window by window."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (v[top : top + 11, left : left + 11] for v in (a, b))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            both = (weights * (x - mx) * (y - my)).sum()
            found.append(
                (2 * mx * my + 0.0001)
                * (2 * both + 0.0009)
                / ((mx**2 + my**2 + 0.0001) * (vx + vy + 0.0009))
            )
    return float(np.mean(found))


# By scikit-image 0.26.0: structural_similarity(…, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False, data_range=1.0).
@pytest.mark.parametrize(
    ("other", "known"), [(WAVES, 0.940294451242), (1 - STRIPES, -0.981900537708), (STRIPES, 1.0)]
)
def test_similarity_is_that_of_the_paper(other: np.ndarray, known: float) -> None:
    found = ssim(as_image(STRIPES), as_image(other)).item()
    assert found == pytest.approx(known, abs=1e-9)
    assert found == pytest.approx(naive(STRIPES, other), abs=1e-9)


def test_similarity_of_flat_images_is_that_of_their_brightness() -> None:
    a, b = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 0.0001) / (0.2**2 + 0.6**2 + 0.0001)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-6)


def test_channels_count_alike_and_images_one_by_one() -> None:
    pair = torch.cat([as_image(STRIPES), as_image(WAVES)])
    both = torch.cat([pair, pair.flip(0)], dim=1)
    alone = ssim(as_image(STRIPES), as_image(WAVES))
    torch.testing.assert_close(ssim(both, both.flip(1)), torch.cat([alone, alone]))


def test_total_variation_is_the_mean_step_between_neighbours() -> None:
    image = torch.tensor([[0.0, 1.0], [0.0, 0.5]])[None, None]
    assert total_variation(image).item() == pytest.approx((0 + 0.5) / 2 + (1 + 0.5) / 2)


def test_what_can_be_inverted_is_found() -> None:
    """Features that are a rotation of the image hide nothing."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(144, 144, generator=generator)).Q
    truth = torch.rand(3, 1, 12, 12, generator=generator)

    def features_of(images: Tensor) -> Tensor:
        features: Tensor = images.flatten(1) @ rotation
        return features

    found = reconstruct(
        features_of,
        features_of(truth),
        torch.full_like(truth, 0.5),
        rate=0.05,
        weight=0.0,
        steps=150,
    )
    assert ssim(found, truth).min() > 0.99


def test_the_bench_has_a_row_for_each_cut_and_way_of_sending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 1)).astype(np.uint8)
    small = Dataset("small", images, np.arange(40) % 4, ("a", "b", "c", "d"), (0.3,), (0.25,))
    monkeypatch.setattr("ops.bench_reconstruction.load_dataset", lambda *_, **__: small)
    out = tmp_path / "rows.md"
    setup = Setup(
        cuts=(1, 3), noise=(100.0,), width=4, train_batches=2, tune_batches=1, images=2, steps=3
    )
    found = run_bench(setup, append=out, quiet=True)
    rows = found["rows"]
    assert [(row["cut"], row["sent"]) for row in rows] == [
        (cut, sent) for cut in (1, 3) for sent in ("fp32", "int4+zstd", "noise 100, int4+zstd")
    ]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert -1 <= row["ssim"] <= 1
    noisy = rows[2]
    assert noisy["rho"] == pytest.approx(2 * (noisy["clip"] / noisy["std"]) ** 2)
    assert noisy["std"] == pytest.approx(100 * noisy["clip"] / (4 * 12 * 12) ** 0.5)
    assert out.read_text().count("\n| ") == 1 + len(rows)
    json.dumps(found)


@pytest.mark.parametrize(
    ("changes", "words"), [({"steps": 0}, "at least 1"), ({"noise": (0.0,)}, "above 0")]
)
def test_numbers_that_make_no_sense(changes: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsWrong, match=words):
        run_bench(Setup(**changes), quiet=True)  # type: ignore[arg-type]
