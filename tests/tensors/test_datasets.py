from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensors.datasets import (
    BUNDLED,
    FASHION_CLASSES,
    Dataset,
    default_root,
    load_dataset,
)
from tensors.errors import DataError
from tensors.image_packs import read_packed, write_packed

BUNDLED_FOLDER = Path(__file__).parents[2] / "tensors" / "data"
REAL_DATA = Path(os.environ.get("SPLITFLEET_DATA") or Path(__file__).parents[2] / "../shared/data")

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def empty_default_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("default-root")
    monkeypatch.setenv("SPLITFLEET_DATA", str(root))
    return root


def pixels(*shape: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, shape).astype(np.uint8)


# The bundled set


@pytest.mark.parametrize(("split", "per_class"), [("train", 1200), ("test", 200)])
def test_bundled_set_is_balanced_and_whole(split: str, per_class: int) -> None:
    dataset = load_dataset(BUNDLED, split)
    assert dataset.images.shape == (10 * per_class, 28, 28, 1)
    assert np.bincount(dataset.labels).tolist() == [per_class] * 10
    assert dataset.classes == FASHION_CLASSES
    assert dataset.images.mean() / 255 == pytest.approx(dataset.mean[0], abs=0.005)
    assert dataset.images.std() / 255 == pytest.approx(dataset.std[0], abs=0.005)


def test_bundled_set_fits_its_budget_and_carries_its_licence() -> None:
    files = list(BUNDLED_FOLDER.glob("*.npz"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) < 7_000_000
    assert "Zalando SE" in (BUNDLED_FOLDER / "LICENSE").read_text(encoding="utf-8")


def test_bundled_set_has_the_official_pixels() -> None:
    dataset = load_dataset(BUNDLED, "test")
    digest = hashlib.sha256(dataset.images.tobytes() + dataset.labels.astype("<i8").tobytes())
    assert digest.hexdigest() == "788913f16e63dd2807d7a60f72996ed9cdc8fc22d87d149006ad2cfc58281d8c"


# Packed files


def write_stl10(root: Path, *, folds: bool) -> NDArray[np.uint8]:
    """50 images, the first fold being the even ones of the first 20."""
    images = pixels(50, 8, 8, 3)
    path = root / "stl10-train.npz"
    write_packed(path, images, np.arange(50) % 10, tuple("abcdefghij"), images_per_strip=7)
    if folds:
        with np.load(path) as archive:
            arrays = dict(archive)
        np.savez(path, folds=np.stack([np.arange(0, 20, 2), np.arange(10)]), **arrays)
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_packed_files_come_back_exactly(tmp_path: Path, channels: int) -> None:
    images = pixels(10, 8, 8, channels)
    labels = np.arange(10)
    path = tmp_path / "any.npz"
    write_packed(path, images, labels, tuple("abcdefghiä"), images_per_strip=4)
    packed = read_packed(path)
    np.testing.assert_array_equal(packed.images, images)
    np.testing.assert_array_equal(packed.labels, labels)
    assert packed.classes == tuple("abcdefghiä")
    assert packed.folds is None


def test_packed_step_scales_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "any.npz"
    images = pixels(3, 8, 8, 3) // 3
    write_packed(path, images, np.zeros(3, np.int64), ("a",), images_per_strip=3)
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, step=np.int64(3), **arrays)
    np.testing.assert_array_equal(read_packed(path).images, images * 3)


def test_damaged_packed_files_are_named(tmp_path: Path) -> None:
    good = (BUNDLED_FOLDER / f"{BUNDLED}-test.npz").read_bytes()
    path = tmp_path / "cifar10-test.npz"
    array = io.BytesIO()
    np.save(array, pixels(3))
    for bad in (
        b"",
        b"nonsense",
        array.getvalue(),
        good[: len(good) // 2],
        good[:5000] + bytes(500) + good[5500:],
    ):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"cifar10-test\.npz is not a readable packed"):
            load_dataset("cifar10", "test", root=tmp_path)


@pytest.mark.parametrize("change", ["labels", "webp", "offsets", "strip"])
def test_packed_parts_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "any.npz"
    images = pixels(6, 8, 8, 3)
    write_packed(path, images, np.zeros(6, np.int64), ("a",), images_per_strip=3)
    with np.load(path) as archive:
        arrays = dict(archive)
    if change == "labels":
        arrays["labels"] = arrays["labels"][:-1]
    elif change == "strip":
        arrays["side"] = np.int64(7)
    elif change == "offsets":
        arrays["offsets"] = arrays["offsets"][:-1]
    else:
        del arrays["webp"]
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="not a readable packed image set"):
        read_packed(path)


def test_packed_labels_outside_the_classes_are_refused(tmp_path: Path) -> None:
    write_packed(
        tmp_path / "cifar10-test.npz",
        pixels(2, 32, 32, 3),
        np.array([0, 2]),
        ("a", "b"),
        images_per_strip=2,
    )
    with pytest.raises(DataError, match=r"cifar10: labels must lie in 0\.\.1"):
        load_dataset("cifar10", "test", root=tmp_path)


def test_packed_stl10_is_split_by_its_first_fold(tmp_path: Path) -> None:
    images = write_stl10(tmp_path, folds=True)
    train, test = (load_dataset("stl10", split, root=tmp_path) for split in ("train", "test"))
    np.testing.assert_array_equal(test.images, images[0:20:2])
    np.testing.assert_array_equal(test.labels, np.arange(0, 20, 2) % 10)
    np.testing.assert_array_equal(train.images, np.delete(images, np.arange(0, 20, 2), axis=0))


def test_packed_stl10_without_folds_has_no_test_split(tmp_path: Path) -> None:
    write_stl10(tmp_path, folds=False)
    assert len(load_dataset("stl10", "train", root=tmp_path)) == 50
    with pytest.raises(DataError, match="no folds to take a test split from"):
        load_dataset("stl10", "test", root=tmp_path)


def test_packed_stl10_with_a_test_file_keeps_its_training_split(tmp_path: Path) -> None:
    write_stl10(tmp_path, folds=True)
    write_packed(
        tmp_path / "stl10-test.npz",
        pixels(5, 8, 8, 3),
        np.arange(5),
        tuple("abcdefghij"),
        images_per_strip=5,
    )
    assert len(load_dataset("stl10", "train", root=tmp_path)) == 50
    assert len(load_dataset("stl10", "test", root=tmp_path)) == 5


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar_has_the_counts_and_statistics_it_should(name: str, classes: int) -> None:
    if not (REAL_DATA / f"{name}-test.npz").is_file():
        pytest.skip(f"{name}-test.npz is missing: set SPLITFLEET_DATA to the folder that has it")
    dataset = load_dataset(name, "test", root=REAL_DATA)
    assert dataset.images.shape == (10000, 32, 32, 3)
    assert np.bincount(dataset.labels).tolist() == [10000 // classes] * classes
    scaled = dataset.images / 255
    np.testing.assert_allclose(scaled.mean(axis=(0, 1, 2)), dataset.mean, atol=0.01)
    np.testing.assert_allclose(scaled.std(axis=(0, 1, 2)), dataset.std, atol=0.01)


# Fashion-MNIST's idx files


def idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes((0, 0, 8, array.ndim))
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_fashion(folder: Path, *, zipped: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = pixels(12, 28, 28), (np.arange(12) % 10).astype(np.uint8)
    for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        data = idx(array)
        file = folder / (f"t10k-{name}.gz" if zipped else f"t10k-{name}")
        file.write_bytes(gzip.compress(data) if zipped else data)
    return images, labels


@pytest.mark.parametrize(("place", "zipped"), [(".", True), (".", False), ("FashionMNIST/raw", 0)])
def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path, place: str, zipped: bool) -> None:
    images, labels = write_fashion(tmp_path / place, zipped=zipped)
    dataset = load_dataset("fashion-mnist", "test", root=tmp_path)
    np.testing.assert_array_equal(dataset.images[..., 0], images)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert dataset.classes == FASHION_CLASSES


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    write_fashion(tmp_path, zipped=False)
    file = tmp_path / "t10k-images-idx3-ubyte"
    good = file.read_bytes()
    for bad in (b"", good[:3], good[:10], good[:-1], good + b"x", b"\x00\x00\x0d" + good[3:]):
        file.write_bytes(bad)
        with pytest.raises(DataError, match="t10k-images-idx3-ubyte"):
            load_dataset("fashion-mnist", "test", root=tmp_path)
    file.unlink()
    zipped = file.with_name(file.name + ".gz")
    for bad in (good, gzip.compress(good)[:-20], b""):
        zipped.write_bytes(bad)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz"):
            load_dataset("fashion-mnist", "test", root=tmp_path)


# torchvision's layouts, in miniature: its check sums are replaced by those of the small files


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    from tensors.torchvision_compat import torchvision_module

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    images = pixels(6, 32, 32, 3)
    data = images.transpose(0, 3, 1, 2).reshape(6, -1)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw, usedforsecurity=False).hexdigest()]

    first = write("data_batch_1", {"data": data[:2], "labels": [3, 1]})
    second = write("data_batch_2", {"data": data[2:4], "labels": [0, 9]})
    test = write("test_batch", {"data": data[4:], "labels": [7, 8]})
    names = write("batches.meta", {"label_names": list("abcdefghij")})
    reader = torchvision_module().datasets.CIFAR10
    monkeypatch.setattr(reader, "train_list", [first, second])
    monkeypatch.setattr(reader, "test_list", [test])
    monkeypatch.setattr(
        reader, "meta", {"filename": names[0], "md5": names[1], "key": "label_names"}
    )
    return images


def test_cifar10_is_read_from_torchvisions_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_cifar10(tmp_path, monkeypatch)
    train, test = (load_dataset("cifar10", split, root=tmp_path) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, images[:4])
    np.testing.assert_array_equal(test.images, images[4:])
    assert train.labels.tolist() == [3, 1, 0, 9]
    assert train.classes == tuple("abcdefghij")
    assert train.images.flags.c_contiguous


def test_damage_in_torchvisions_layout_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="cifar10 is incomplete or damaged in"):
        load_dataset("cifar10", "test", root=tmp_path)


def test_stl10_is_read_from_torchvisions_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensors.torchvision_compat import torchvision_module

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = pixels(4, 96, 96, 3)
    lists: dict[str, list[list[str]]] = {"train": [], "test": []}
    for split, part in (("train", images[:3]), ("test", images[3:])):
        columns_first = part.transpose(0, 3, 2, 1).tobytes()
        labels = bytes(range(1, len(part) + 1))
        for name, raw in ((f"{split}_X.bin", columns_first), (f"{split}_y.bin", labels)):
            (folder / name).write_bytes(raw)
            lists[split].append([name, hashlib.md5(raw, usedforsecurity=False).hexdigest()])
    reader = torchvision_module().datasets.STL10
    monkeypatch.setattr(reader, "train_list", lists["train"])
    monkeypatch.setattr(reader, "test_list", lists["test"])
    with pytest.raises(DataError, match="lacks its class names"):
        load_dataset("stl10", "train", root=tmp_path)
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    train, test = (load_dataset("stl10", split, root=tmp_path) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, images[:3])
    np.testing.assert_array_equal(test.images, images[3:])
    assert train.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_download_goes_through_torchvision_into_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from tensors.torchvision_compat import torchvision_module

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("network is unreachable")

    datasets = torchvision_module().datasets
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", offline)
    with pytest.raises(DataError, match=f"{name} could not be downloaded to .*: check"):
        load_dataset(name, "train", root=tmp_path / "new", download=True)


# Which data


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "fashion-mnist"])
def test_missing_data_says_what_to_do(name: str, empty_default_root: Path) -> None:
    with pytest.raises(DataError, match=f"{name} is not in {empty_default_root}: add --download"):
        load_dataset(name)


def test_root_comes_from_the_environment(empty_default_root: Path) -> None:
    write_fashion(empty_default_root, zipped=True)
    assert default_root() == empty_default_root
    assert len(load_dataset("fashion-mnist", "test")) == 12


def test_root_has_a_place_in_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SPLITFLEET_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "splitfleet" / "data"


def test_unknown_names_splits_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'mnist' is unknown: allowed are cifar10, cifar100, fash"):
        load_dataset("mnist")
    with pytest.raises(DataError, match="allowed are train and test"):
        load_dataset(BUNDLED, "valid")
    with pytest.raises(DataError, match="size is for image-folder:PATH only"):
        load_dataset(BUNDLED, size=32)
    with pytest.raises(DataError, match="size 0: must be at least 1 pixel"):
        load_dataset(f"image-folder:{tmp_path}", size=0)


def test_a_dataset_that_contradicts_itself_is_refused() -> None:
    images, labels = pixels(2, 4, 4, 1), np.array([0, 1])
    good: dict[str, Any] = {
        "name": "made",
        "images": images,
        "labels": labels,
        "classes": ("a", "b"),
        "mean": (0.5,),
        "std": (0.5,),
    }
    assert len(Dataset(**good)) == 2
    for change in (
        {"images": images[0]},
        {"images": images.astype(np.int64)},
        {"labels": labels[:1]},
        {"labels": labels.astype(np.int32)},
        {"labels": labels - 1},
        {"classes": ("a",)},
        {"images": images[:0], "labels": labels[:0]},
        {"mean": (0.5, 0.5)},
    ):
        with pytest.raises(DataError, match="made: "):
            Dataset(**{**good, **change})
