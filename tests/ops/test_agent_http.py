"""``splitfleet agent --http`` and ``splitfleet predict --agent`` as processes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.messages import Network
from broker.serving_messages import CutPolicy, Serving
from edge_agent.served import DiskServed, Served
from ops.cli import main
from tensors.networks import NetworkSpec, build_network, read_state
from tests.fleet_processes import wait_until
from tests.http_agent import picture
from tests.mosquitto_process import free_port
from tests.tiny import RUN, make_assignment

SPEC = NetworkSpec(width=4, channels=1, size=28, classes=10, head="linear")
NETWORK = Network(width=4, channels=1, size=28, classes=10, head="linear")
TOKEN = "0123456789abcdef"
Output = pytest.CaptureFixture[str]


def keep_version(folder: Path, *, threshold: float) -> None:
    """What a device answered with in an earlier life."""
    state = read_state(build_network(SPEC, seed=1).device_half(2))
    serving = Serving(
        run=RUN,
        version=3,
        exit_rule="entropy",
        offload_timeout_s=5.0,
        cuts={"2": CutPolicy(threshold=threshold)},
    )
    assignment = make_assignment(network=NETWORK, cut=2)
    DiskServed(folder).save(Served(assignment, serving, state))


@contextlib.contextmanager
def agent(state_dir: Path, *told: str) -> Iterator[int]:
    """An agent that finds no broker; its port."""
    port = free_port()
    log = state_dir.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ops.cli", "agent", "--device", "cam-1", "--until-eof",
             "--state-dir", str(state_dir), "--broker", "mqtt://127.0.0.1:1", "--threads", "1",
             "--http", f"127.0.0.1:{port}", *told],
            stdin=subprocess.PIPE, stdout=out, stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or status(port) is not None, "the API")
        assert process.poll() is None, log.read_text()
        yield port
    finally:
        process.communicate(b"", timeout=100)  # the end of its input ends it
    assert process.returncode == 0, log.read_text()
    with pytest.raises(OSError, match=r"[Cc]onnect"):
        socket.create_connection(("127.0.0.1", port), 5).close()


def status(port: int) -> int | None:
    """Of /healthz; None if nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as exc:
        exc.close()
        return exc.code
    except OSError:
        return None


def predict(*told: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["predict", *map(str, told), "--json"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_device_that_restarts_without_a_network_answers_pictures(
    tmp_path: Path, capsys: Output
) -> None:
    keep_version(tmp_path / "agent", threshold=1.0)
    token, path = tmp_path / "token", tmp_path / "a.png"
    token.write_text(TOKEN)
    path.write_bytes(picture(size=28))
    with agent(tmp_path / "agent", "--http-token-file", str(token)) as port:
        wait_until(lambda: status(port) == 200, "parameters")
        told: list[str | Path] = [path, "--agent", f"127.0.0.1:{port}"]
        assert predict(*told) == 8
        capsys.readouterr()
        assert predict(*told, "--token-file", token) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    (answer,) = found["predictions"]
    assert (found["run"], found["version"]) == (RUN, 3)
    assert (answer["by"], answer["reason"]) == ("fallback", "offline")
    assert answer["name"] == answer["top"][0]["name"]
    assert answer["name"] in {"Bag", "Coat", "Dress", "Shirt", "Trouser", "Sandal", "Sneaker"} | {
        "T-shirt/top",
        "Pullover",
        "Ankle boot",
    }


def test_a_device_that_was_never_trained_says_so(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(size=28))
    with agent(tmp_path / "agent") as port:
        assert status(port) == 503
        assert predict(path, "--agent", f"127.0.0.1:{port}", "--timeout-s", "1.5") == 8
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "code", "words"),
    [
        (["--http", "8470"], 2, "HOST:PORT"),
        (["--http", "0.0.0.0:8470"], 2, "http_token_file"),
        (["--http", "camera.example:8470"], 2, "http_token_file"),
        (["--http-token-file", "x"], 2, "needs http"),
        (["--http", "127.0.0.1:8470", "--http-token-file", "/nowhere"], 5, "/nowhere"),
        (["--http", "127.0.0.1:{taken}"], 6, "choose another address"),
        (["--http", "192.0.2.1:8470", "--http-token-file", "{token}"], 6, "cannot listen"),
    ],
)
def test_what_a_user_got_wrong_is_said_before_anything_starts(
    tmp_path: Path, told: list[str], code: int, words: str, capsys: Output
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = [text.format(taken=port, token=tmp_path / "token") for text in told]
        with pytest.raises(SystemExit) as ended:
            main(["agent", "--device", "a", "--state-dir", str(tmp_path / "agent"), *arguments])
    assert ended.value.code == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "agent").exists()


def test_without_the_libraries_it_says_what_to_install(tmp_path: Path) -> None:
    told = ["agent", "--device", "a", "--http", "127.0.0.1:0", "--state-dir", str(tmp_path)]
    code = "import sys; sys.modules['fastapi'] = None; from ops.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *told],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "splitfleet[http]" in done.stderr
    assert "Traceback" not in done.stderr
