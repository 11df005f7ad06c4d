from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for torchvision: tells whether its operators' schemas were there when it was imported.
STUB = """
import torch
DEFINED = [hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms")]
"""


def run(program: str, *paths: Path) -> str:
    """Run a program in an interpreter of its own: what torch has been told cannot be taken back."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def stub_package(folder: Path) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(STUB)
    return package


def test_installed_torchvision_imports_and_builds_resnet18() -> None:
    program = """
from tensors.torchvision_compat import torchvision_module
torchvision = torchvision_module()
assert torchvision_module() is torchvision
print(sum(p.numel() for p in torchvision.models.resnet18().parameters()))
print(torchvision.datasets.CIFAR10.base_folder)
"""
    assert run(program).split() == ["11689512", "cifar-10-batches-py"]


def test_operators_work_or_fail_with_torchvisions_own_explanation() -> None:
    program = """
import torch
from tensors.torchvision_compat import torchvision_module
torchvision = torchvision_module()
boxes, scores = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0])
try:
    print(torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0])
except RuntimeError as exc:
    print("Couldn't load custom C++ ops" in str(exc))
"""
    assert run(program) == "True"


def test_many_threads_get_the_same_module() -> None:
    program = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from tensors.torchvision_compat import torchvision_module
barrier = Barrier(8)
def get(_):
    barrier.wait(timeout=30)
    return torchvision_module()
with ThreadPoolExecutor(8) as pool:
    modules = set(pool.map(get, range(8)))
print(len(modules), modules.pop().models.resnet18.__name__)
"""
    assert run(program) == "1 resnet18"


SHOW_DEFINED = """
from tensors.torchvision_compat import torchvision_module
torchvision_module()
print(*torchvision_module().DEFINED)
"""


def test_schemas_are_defined_when_the_extension_cannot_load(tmp_path: Path) -> None:
    package = stub_package(tmp_path)
    (package / f"_C{EXTENSION_SUFFIXES[-1]}").write_bytes(b"no library")
    assert run(SHOW_DEFINED, tmp_path) == "True True"


def test_schemas_are_defined_when_there_is_no_extension(tmp_path: Path) -> None:
    stub_package(tmp_path)
    assert run(SHOW_DEFINED, tmp_path) == "True True"


def test_schemas_are_left_alone_when_the_extension_loads(tmp_path: Path) -> None:
    package = stub_package(tmp_path)
    any_library = find_spec("numpy._core._multiarray_umath")
    assert any_library is not None
    assert any_library.origin is not None
    shutil.copy(any_library.origin, package / f"_C{EXTENSION_SUFFIXES[-1]}")
    assert run(SHOW_DEFINED, tmp_path) == "False False"


def test_schemas_that_exist_already_are_no_obstacle(tmp_path: Path) -> None:
    stub_package(tmp_path)
    program = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
    assert run(program + SHOW_DEFINED, tmp_path) == "True True"


def test_missing_torchvision_is_an_import_error_that_says_what_to_install() -> None:
    program = """
import sys
sys.modules["torchvision"] = None
from tensors.torchvision_compat import torchvision_module
try:
    torchvision_module()
except ImportError as exc:
    print(exc)
"""
    assert "pip install torchvision" in run(program)


@pytest.mark.parametrize("package", ["tensors", "broker", "edge_agent", "coordinator", "ops"])
def test_nothing_else_imports_torchvision(package: str) -> None:
    importers = {
        path.name
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(("import torchvision", "from torchvision"))
    }
    assert importers <= {"torchvision_compat.py"}
