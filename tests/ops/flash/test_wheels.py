from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ops.cli import main
from ops.errors import SettingsWrong
from ops.flash.classes import device_class
from ops.flash.wheels import choose_wheels, requirements
from tests.ops.flash.wheels import write_wheel


def test_pip_chooses_for_the_device_and_not_for_this_machine(wheelhouse: Path) -> None:
    wheels = choose_wheels(wheelhouse, device_class("zero2"))
    assert sorted(one.path.name for one in wheels) == [
        "numpy-1.0-cp313-cp313-manylinux_2_28_aarch64.whl",
        "onnxruntime-1.0-cp313-cp313-manylinux_2_28_aarch64.whl",
        "pip-26.0-py3-none-any.whl",
        "splitfleet-0.1.0-py3-none-any.whl",
    ]
    for wheel in wheels:
        assert wheel.sha256 == hashlib.sha256(wheel.path.read_bytes()).hexdigest()
        assert f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}" in requirements(wheels)


def test_what_is_missing_is_said_with_how_to_get_it(wheelhouse: Path) -> None:
    with pytest.raises(SettingsWrong, match=r"torch.*splitfleet wheelhouse .* --python 3\.11"):
        choose_wheels(wheelhouse, device_class("pi4", python="3.11"))


def test_a_pip_that_looks_at_its_own_python_is_to_be_updated(
    wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "ERROR: Package 'numpy' requires a different Python: 3.11.7 not in '>=3.12'"
    failed = subprocess.CompletedProcess([], 1, "", told)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SettingsWrong, match=r"pip install --upgrade pip"):
        choose_wheels(wheelhouse, device_class("zero2"))


def test_a_folder_that_is_not_there_is_no_wheelhouse(tmp_path: Path) -> None:
    with pytest.raises(SettingsWrong, match="is no folder"):
        choose_wheels(tmp_path / "none", device_class("pi4"))


def test_a_wheelhouse_that_cannot_be_made_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["wheelhouse", str(tmp_path / "file"), "--class", "pi4"])
    assert ended.value.code == 5
    assert "cannot make the folder" in capsys.readouterr().err


@pytest.fixture
def pip_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what this machine has set up for pip."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.mark.usefixtures("pip_alone")
def test_a_wheelhouse_is_fetched_for_a_class(
    wheelhouse: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / "of zero2"
    with pytest.raises(SystemExit) as ended:
        main(["wheelhouse", str(folder), "--class", "zero2", "--from", str(wheelhouse)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("4 wheels")
    assert len(list(folder.iterdir())) == 4


@pytest.mark.usefixtures("pip_alone")
def test_torch_is_fetched_from_its_own_index(
    wheelhouse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours"
    for name in ("splitfleet", "pip"):
        (wheel,) = wheelhouse.glob(f"{name}-*")
        shutil.copy(wheel, make_folder(ours))
    tag = "cp313-cp313-manylinux_2_28_aarch64"
    write_wheel(make_folder(tmp_path / "web/all/numpy"), "numpy", tag=tag)
    with_cuda = make_folder(tmp_path / "web/all/torch")
    write_wheel(with_cuda, "torch", tag=tag, requires=["nvidia-cublas"])
    write_wheel(make_folder(tmp_path / "web/all/nvidia-cublas"), "nvidia_cublas")
    write_wheel(make_folder(tmp_path / "web/cpu/torch"), "torch", "1.0+cpu", tag=tag)
    with served(tmp_path / "web") as url:
        folder, torchs = tmp_path / "of pi4", f"{url}/cpu"
        command = ["wheelhouse", str(folder), "--class", "pi4", "--from", str(ours)]
        command += ["--index", f"{url}/all", "--torch-index", torchs]
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0, capsys.readouterr().err
        names = {path.name.partition("-cp313")[0] for path in folder.iterdir()}
        assert names >= {"torch-1.0+cpu", "numpy-1.0"}
        assert len(names) == 4  # nothing of CUDA
        shutil.rmtree(tmp_path / "web/cpu")
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 1
        assert "--torch-index ''" in capsys.readouterr().err


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder over HTTP, on a port of its own."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
