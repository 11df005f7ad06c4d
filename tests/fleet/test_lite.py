"""Devices without torch in a fleet: in memory, and as a process that cannot have it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from broker.embedded import EmbeddedBroker
from broker.memory import MemoryBroker
from coordinator import service
from edge_agent.snapshots import DiskSnapshots
from tests.fleet_in_process import Fleet, in_memory
from tests.tiny import CLASSES, SPEC, assert_same, differs, make_device_data

pytest.importorskip("onnxscript", reason="needs splitfleet[export]")

ROOT = Path(__file__).parents[2]
CUT = 2
MEMORY_MIB = 150
"""What a device of 512 MB has left for its agent."""

WITHOUT_TORCH = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "onnx", "onnxscript"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from ops.cli import main
try:
    main(sys.argv[1:])
finally:
    with open("/proc/self/status") as status:
        print(status.read())
"""


@pytest.fixture
def program_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensors.programs import onnx_program

    made = onnx_program(SPEC, CUT)

    def begin(cut: int) -> Future[dict[str, Any]]:
        assert cut == CUT
        future: Future[dict[str, Any]] = Future()
        future.set_result({"graph": made.graph, "parameters": made.parameters})
        return future

    monkeypatch.setattr(service, "make_in_child", lambda spec: begin)


@pytest.mark.usefixtures("program_in_process")
@pytest.mark.parametrize("parameter_codec", ["fp32", "int8"])
async def test_beside_one_that_trains(tmp_path: Path, parameter_codec: str) -> None:
    fleet = Fleet(
        tmp_path,
        in_memory(MemoryBroker()),
        {"full": CUT, "small": CUT},
        lambda name: make_device_data(48, seed=ord(name[0]), tests=10),
        codec="int8+zstd",
        rounds=2,
        batches_per_round=4,
        feedback="gradient",
        inference=True,
        parameter_codec=parameter_codec,
    )
    fleet.start_coordinator()
    fleet.start_agent("full")
    fleet.start_agent("small", engine="onnxruntime")
    result = await fleet.finish()
    for record in result["history"]:
        for name in ("full", "small"):
            entry = record["devices"][name]
            assert entry["finished"]
            assert entry["account"] == {
                "produced": 4,
                "applied": 4,
                "discarded": {},
                "expired": 0,
            }
    for name in ("full", "small"):
        told = fleet.watcher.inference[name].inference
        assert told is not None
        assert told.images == 10
        assert told.version == 2
    # Both hold the same version, which is the one's that trains.
    (run,) = (path.name for path in (tmp_path / "coordinator").iterdir() if path.is_dir())
    held = {}
    for name in ("full", "small"):
        kept = DiskSnapshots(tmp_path / name).load(run, CUT)
        assert kept is not None
        version, held[name] = kept
        assert version == 2
    assert_same(held["small"].state, held["full"].state)
    assert held["small"].momentum == {}
    assert differs(held["full"].state, {n: 0 * v for n, v in held["full"].state.items()})


def make_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 160), ("test", 32)):
        for number in range(count):
            label = number % CLASSES
            place = folder / split / f"class-{label}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (32, 32, 3)).astype(np.uint8)
            pixels[:, 8 * label : 8 * label + 8] += 100
            Image.fromarray(pixels).save(place / f"{number}.png")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's figures")
def test_a_process_without_torch_in_150_mib(tmp_path: Path) -> None:
    """With 32 images of 32 px at a cut behind 64 channels; the whole agent, its data included."""
    make_pictures(tmp_path / "pictures")
    config = tmp_path / "fleet.toml"
    config.write_text(
        '[coordinator.network]\nname = "tests.tiny:wide_stem"\nwidth = 64\nsize = 32\n'
        "[coordinator]\nrounds = 2\nbatches_per_round = 10\nbatch_size = 32\n"
        'precision = "fp32"\nmemory_format = "contiguous"\n'
        "[agent]\nimage_size = 32\ncut = 1\nthreads = 1\nexit_when_finished = true\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with EmbeddedBroker() as broker:
        told = [
            *("--broker", broker.url, "--config", str(config)),
            *("--dataset", f"image-folder:{tmp_path / 'pictures'}"),
        ]
        server = [sys.executable, "-m", "ops.cli", "coordinator", "--quiet", *told]
        state = ["--state-dir", str(tmp_path / "coordinator"), "--min-devices", "1"]
        device = ["agent", "--lite", "--device", "small", *told]
        with subprocess.Popen([*server, *state], env=environment, cwd=ROOT) as coordinator:
            try:
                agent = subprocess.run(
                    [sys.executable, "-c", WITHOUT_TORCH, *device],
                    env=environment,
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    text=True,
                    timeout=300,
                    check=True,
                )
                assert coordinator.wait(timeout=100) == 0
            finally:
                coordinator.kill()
    (path,) = (tmp_path / "coordinator").glob("*/result.json")
    history = json.loads(path.read_text())["history"]
    assert [record["devices"]["small"]["samples"] for record in history] == [320, 320]
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", agent.stdout)
    assert int(peak) / 1024 < MEMORY_MIB
