from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tensors.datasets import load_dataset
from tensors.errors import DataError

rng = np.random.default_rng(0)


def pixels(*shape: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, shape).astype(np.uint8)


def save(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_image_folder_with_splits(tmp_path: Path) -> None:
    save(tmp_path / "train" / "dog" / "a.png", (255, 0, 0))
    save(tmp_path / "train" / "cat" / "b.PNG", (0, 255, 0))
    save(tmp_path / "train" / "cat" / "c.png", (0, 0, 255), (30, 400))
    save(tmp_path / "test" / "dog" / "d.png", (9, 9, 9))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / ".thumbnails").mkdir()
    train, test = (
        load_dataset(f"image-folder:{tmp_path}", split, size=16) for split in ("train", "test")
    )
    assert train.classes == test.classes == ("cat", "dog")
    assert train.images.shape == (3, 16, 16, 3)
    assert train.labels.tolist() == [0, 0, 1]
    assert train.images[:, 8, 8].tolist() == [[0, 255, 0], [0, 0, 255], [255, 0, 0]]
    assert test.labels.tolist() == [1]


def test_image_folder_without_splits_holds_out_a_fifth_of_every_class(tmp_path: Path) -> None:
    for name, count in (("cat", 10), ("dog", 5), ("eel", 1)):
        for number in range(count):
            save(tmp_path / name / f"{number}.png", (number, 0, 0), (8, 8))
    splits = {s: load_dataset(f"image-folder:{tmp_path}", s, size=8) for s in ("train", "test")}
    assert np.bincount(splits["train"].labels).tolist() == [8, 4, 1]
    assert np.bincount(splits["test"].labels).tolist() == [2, 1]
    cats = [d.images[d.labels == 0][:, 0, 0, 0].tolist() for d in splits.values()]
    assert sorted(cats[0] + cats[1]) == list(range(10))
    again = load_dataset(f"image-folder:{tmp_path}", "test", size=8)
    np.testing.assert_array_equal(again.images, splits["test"].images)


def test_pictures_are_fitted_to_64_pixels_with_the_middle_kept(tmp_path: Path) -> None:
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 255  # the middle square is white
    (tmp_path / "a").mkdir()
    for kind in ("jpg", "png"):
        Image.fromarray(picture).save(tmp_path / "a" / f"wide.{kind}", quality=95)
    dataset = load_dataset(f"image-folder:{tmp_path}", "train")
    assert dataset.images.shape[1:] == (64, 64, 3)
    assert dataset.images[:, :, 2:-2].min() > 240


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "x.jpg", exif=exif, quality=95)
    image = load_dataset(f"image-folder:{tmp_path}", "train", size=32).images[0]
    assert image[:, 20:].min() > 200
    assert image[:, :12].max() < 50


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    Image.new(mode, (20, 20)).save(tmp_path / "a" / ("x.jpg" if mode == "CMYK" else "x.png"))
    assert load_dataset(f"image-folder:{tmp_path}", "train").images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_damaged_pictures_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a" / f"bad.{kind}"
    path.parent.mkdir()
    Image.fromarray(pixels(60, 60, 3)).save(path)
    good = path.read_bytes()
    for bad in (b"", b"not a picture", good[: len(good) // 2], good[:12] + bytes(20) + good[32:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"bad\.{kind} is not a readable picture"):
            load_dataset(f"image-folder:{tmp_path}", "train")


def test_image_folders_that_are_not_laid_out_right_say_so(tmp_path: Path) -> None:
    def refuse(message: str, split: str = "train") -> None:
        with pytest.raises(DataError, match=message):
            load_dataset(f"image-folder:{tmp_path / 'root'}", split)

    refuse("root is not a folder")
    (tmp_path / "root").mkdir()
    refuse("has no class folders")
    (tmp_path / "root" / "cat").mkdir()
    refuse(r"cat has no pictures \(\.jpeg")
    save(tmp_path / "root" / "cat" / "a.png", (0, 0, 0))
    refuse("has no pictures for the test split", "test")
    save(tmp_path / "root" / "train" / "cat" / "a.png", (0, 0, 0))
    refuse("test is missing", "test")
    save(tmp_path / "root" / "test" / "dog" / "a.png", (0, 0, 0))
    refuse("dog is a class that the train folder does not have", "test")
