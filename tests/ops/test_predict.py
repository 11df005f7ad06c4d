from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from broker.messages import Network
from edge_agent.answers import Answer
from edge_agent.errors import Overloaded
from edge_agent.http_api import Limits
from ops.cli import main
from ops.errors import AgentUnreachable, SettingsWrong
from ops.http_place import Place
from ops.model_file import CutCard, ModelCard, write_model
from ops.predict_agent import Agent, find_agent
from tensors.exit_rules import confidence, softmax
from tensors.networks import Exits, NetworkSpec, build_network, read_state
from tests.http_agent import FakeAnswerer, picture, serving_in_thread

SPEC = NetworkSpec(width=4, channels=1, size=28, classes=3, head="linear")
NETWORK = Network(width=4, channels=1, size=28, classes=3, head="linear")
CLASSES = ("cat", "dog", "bird")
TOKEN = "0123456789abcdef"
Output = pytest.CaptureFixture[str]


def make_card(**changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "run": "run-1",
        "version": 4,
        "dataset": "pets",
        "score": 0.5,
        "network": NETWORK,
        "classes": CLASSES,
        "mean": (0.5,),
        "std": (0.25,),
        "exit_rule": "entropy",
        "cuts": {2: CutCard(threshold=0.0), 3: CutCard(threshold=1.0)},
    }
    return ModelCard(**(fields | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose exit at cut 2 is always sure and whose exit at cut 3 never is; pictures."""
    root = tmp_path_factory.mktemp("pictures")
    write_model(root / "model", make_card(), read_state(build_network(SPEC, seed=1)))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (28, 28)).astype(np.uint8)
    Image.fromarray(pixels).save(root / "a.png")
    Image.fromarray(np.stack([pixels.T] * 3, axis=2)).resize((60, 40)).save(root / "b.jpg")
    return root


def splitfleet(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["predict", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def answers(capsys: Output, *arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert splitfleet(*arguments, "--json") == code
    found = json.loads(capsys.readouterr().out)
    predictions: list[dict[str, Any]] = found["predictions"]
    return predictions


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


class TestModel:
    @pytest.mark.parametrize(("cut", "by"), [(2, "exit"), (3, "network")])
    def test_the_exit_answers_where_it_is_sure_the_network_elsewhere(
        self, folder: Path, cut: int, by: str, capsys: Output
    ) -> None:
        (found,) = answers(
            capsys, folder / "a.png", "--model", folder / "model", "--cut", str(cut), "--top", "3"
        )
        network = build_network(SPEC, seed=1).eval()
        pixels = np.asarray(Image.open(folder / "a.png"), np.float32)
        image = torch.from_numpy((pixels / 255 - 0.5) / 0.25)[None, None]
        with torch.inference_mode():
            own = softmax(Exits(network.device_half(cut))(image)[1].numpy())
            whole = softmax(network(image).numpy())
        wanted = own if by == "exit" else whole
        assert found["by"] == by
        assert found["label"] == int(wanted.argmax())
        assert found["name"] == CLASSES[found["label"]]
        assert found["confidence"] == pytest.approx(float(confidence(own)[0]), abs=1e-5)
        shares = {entry["label"]: entry["probability"] for entry in found["top"]}
        assert [shares[i] for i in range(3)] == pytest.approx(list(wanted[0]), abs=1e-5)
        stages = {"read", "exit", "total"} | ({"network"} if by == "network" else set())
        times = found["milliseconds"]
        assert set(times) == stages
        assert times["total"] == pytest.approx(sum(times.values()) - times["total"], abs=0.01)

    def test_the_threshold_can_be_given_and_the_shallowest_exit_is_the_default(
        self, folder: Path, capsys: Output
    ) -> None:
        told: list[str | Path] = [folder / "a.png", "--model", folder / "model"]
        assert answers(capsys, *told)[0]["by"] == "exit"
        assert answers(capsys, *told, "--threshold", "1")[0]["by"] == "network"
        assert answers(capsys, *told, "--cut", "3", "--threshold", "0")[0]["by"] == "exit"

    def test_a_table_for_people(self, folder: Path, capsys: Output) -> None:
        assert splitfleet(folder / "a.png", folder / "b.jpg", "--model", folder / "model") == 0
        out = capsys.readouterr().out
        assert "version 4 of run-1" in out
        assert "exit" in out
        assert sum(out.count(name) for name in CLASSES) >= 2

    @pytest.mark.parametrize("name", ["photo [copy].png", "d[/red].png"])
    def test_brackets_in_a_name_are_part_of_it(
        self, name: str, folder: Path, tmp_path: Path, capsys: Output
    ) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((folder / "a.png").read_bytes())
        assert splitfleet(path, "--model", folder / "model") == 0
        assert name in capsys.readouterr().out

    def test_without_a_trained_exit_the_whole_network_answers(
        self, folder: Path, tmp_path: Path, capsys: Output
    ) -> None:
        path = tmp_path / "m"
        write_model(path, make_card(cuts={}), read_state(build_network(SPEC, seed=1)))
        assert answers(capsys, folder / "a.png", "--model", path)[0]["by"] == "network"

    def test_a_network_of_the_user_must_be_allowed(
        self, folder: Path, tmp_path: Path, capsys: Output
    ) -> None:
        name = "tests.tiny:linear_blocks"
        spec = NetworkSpec(name=name, width=4, channels=1, size=28, classes=3, head="linear")
        card = make_card(network=NETWORK.model_copy(update={"name": name}), cuts={})
        path = tmp_path / "m"
        write_model(path, card, read_state(build_network(spec)))
        told: list[str | Path] = [folder / "a.png", "--model", path]
        assert splitfleet(*told) == 2
        assert f"--network {name}" in capsys.readouterr().err
        assert answers(capsys, *told, "--network", name)[0]["by"] == "network"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "--model FILE or --agent NAME"),
            (["--model", "{model}", "--agent", "x"], "one of them"),
            (["--model", "/nowhere"], "/nowhere cannot be used"),
            (["--model", "{picture}"], "cannot be used"),
            (["--model", "{model}", "--cut", "1"], "trained are 2, 3"),
            (["--model", "{model}", "--threshold", "2"], "between 0 and 1"),
            (["--model", "{model}", "--top", "0"], "--top"),
            (["--model", "{model}", "--token-file", "x"], "belong to --agent"),
            (["--agent", "x", "--cut", "2"], "belong to --model"),
            (["--agent", "ftp://x"], "http(s)"),
            (["--agent", "http://x:99999"], "--agent"),
            (["--agent", "x", "--timeout-s", "0"], "timeout_s"),
            (["--agent", "x", "--config", "/nowhere"], "cannot read"),
        ],
    )
    def test_what_a_user_got_wrong(
        self, folder: Path, arguments: list[str], words: str, capsys: Output
    ) -> None:
        told = [a.format(model=folder / "model", picture=folder / "a.png") for a in arguments]
        assert splitfleet(folder / "a.png", *told) == 2
        assert words in capsys.readouterr().err

    def test_no_picture_at_all(self, folder: Path, capsys: Output) -> None:
        assert splitfleet("--model", folder / "model") == 2
        assert "IMAGES" in capsys.readouterr().err.upper()


@pytest.fixture
def rubbish(tmp_path: Path) -> list[tuple[Path, str]]:
    """Paths that are no pictures, with what is said of them."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    whole = picture(size=64)
    (tmp_path / "cut.png").write_bytes(whole[:60])
    with (tmp_path / "huge.png").open("wb") as huge:
        huge.truncate(1 << 40)  # sparse
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    return [
        (tmp_path / "empty.png", "empty"),
        (tmp_path / "text.png", "JPEG, PNG or WebP"),
        (tmp_path / "cut.png", "JPEG, PNG or WebP"),
        (tmp_path / "huge.png", "too many"),
        (tmp_path / "pipe.png", "no file"),
        (tmp_path / "deep.png", "8 bits"),
        (tmp_path, "no file"),
        (tmp_path / "missing.png", "cannot be read"),
        (Path("/dev/zero"), "no file"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ]


class TestBadPictures:
    def test_each_has_its_error_and_the_others_their_answer(
        self, folder: Path, rubbish: list[tuple[Path, str]], capsys: Output
    ) -> None:
        paths = [folder / "a.png", *[path for path, _ in rubbish], folder / "b.jpg"]
        found = answers(capsys, *paths, "--model", folder / "model", code=4)
        assert [entry["file"] for entry in found] == [str(path) for path in paths]
        assert found[0]["name"] in CLASSES
        assert found[-1]["name"] in CLASSES
        for (path, words), entry in zip(rubbish, found[1:-1], strict=True):
            assert words in entry["error"], path

    def test_people_see_them_after_the_table(
        self, folder: Path, rubbish: list[tuple[Path, str]], capsys: Output
    ) -> None:
        path, words = rubbish[1]
        assert splitfleet(path, folder / "a.png", "--model", folder / "model") == 4
        out, error = capsys.readouterr()
        assert "a.png" in out
        assert f"{path}: " in error
        assert words in error
        assert "1 of 2 pictures" in error


class TestAgent:
    def test_answers_and_errors_of_an_agent(
        self, folder: Path, rubbish: list[tuple[Path, str]], capsys: Output, tmp_path: Path
    ) -> None:
        config = tmp_path / "fleet.toml"
        bright = tmp_path / "bright.png"
        bright.write_bytes(picture(255))
        with serving_in_thread(FakeAnswerer()) as port:
            config.write_text(f'[predict.agents]\ncam-1 = "http://127.0.0.1:{port}/"\n')
            told: list[str | Path] = ["--agent", "cam-1", "--config", config, "--top", "1"]
            paths = [bright, *[path for path, _ in rubbish]]
            found = answers(capsys, *paths, *told, code=4)
            assert splitfleet(bright, "--agent", f"127.0.0.1:{port}") == 0
            assert "bright 80.0%" in capsys.readouterr().out
        assert found[0]["file"] == str(bright)
        assert (found[0]["name"], found[0]["by"], len(found[0]["top"])) == ("bright", "exit", 1)
        for (path, words), entry in zip(rubbish, found[1:], strict=True):
            assert words in entry["error"], path

    def test_a_picture_that_the_agent_finds_too_long(self, tmp_path: Path, capsys: Output) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(picture() + bytes(5000))
        with serving_in_thread(FakeAnswerer(), limits=Limits(body_bytes=4000)) as port:
            (found,) = answers(capsys, path, "--agent", f"127.0.0.1:{port}", code=4)
        assert "4000 bytes" in found["error"]

    def test_a_token_is_shown(self, folder: Path, tmp_path: Path, capsys: Output) -> None:
        right, wrong = tmp_path / "right", tmp_path / "wrong"
        right.write_text(TOKEN)
        wrong.write_text(TOKEN[::-1])
        with serving_in_thread(FakeAnswerer(), token=TOKEN) as port:
            told: list[str | Path] = [folder / "a.png", "--agent", f"127.0.0.1:{port}"]
            assert splitfleet(*told, "--token-file", right) == 0
            for more in (list[str | Path](), ["--token-file", wrong]):
                assert splitfleet(*told, *more) == 8
                assert "show the token" in capsys.readouterr().err
            assert splitfleet(*told, "--token-file", tmp_path / "none") == 5

    def test_nobody_there(self, folder: Path, capsys: Output) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            assert splitfleet(folder / "a.png", "--agent", f"127.0.0.1:{port}") == 8
        assert "splitfleet agent --http" in capsys.readouterr().err

    def test_one_that_stays_busy_is_given_up(self, folder: Path, capsys: Output) -> None:
        with serving_in_thread(FakeAnswerer(error=Overloaded("too much"))) as port:
            told = ["--agent", f"127.0.0.1:{port}", "--timeout-s", "0.5"]
            assert splitfleet(folder / "a.png", *told) == 8
        assert "too much" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "reply",
        [
            b"",
            b"SSH-2.0-OpenSSH\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n{}",
            b'HTTP/1.1 200 OK\r\n\r\n{"run": "r", "version": 1, "predictions": []}',
            b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 2_000_000,
            b"HTTP/1.1 500 No\r\n\r\n" + b"[" * 5000,
            b'HTTP/1.1 403 No\r\n\r\n{"error": 3}',
            b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
        ],
    )
    def test_something_else_that_listens_there(
        self, folder: Path, reply: bytes, capsys: Output
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 20)
                    connection.sendall(reply)

            thread = threading.Thread(target=answer)
            thread.start()
            port = server.getsockname()[1]
            code = splitfleet(folder / "a.png", "--agent", f"127.0.0.1:{port}", "--timeout-s", "9")
            thread.join(100)
        assert code == 8
        error = capsys.readouterr().err
        assert f"http://127.0.0.1:{port}" in error
        assert len(error) < 1000

    def test_an_answer_at_the_last_moment_is_one(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
    ) -> None:
        late = FakeAnswerer()
        predict = late.predict

        async def at_the_end(images: Any, *, deadline_s: float | None = None) -> Answer:
            await asyncio.sleep(2.2)
            return await predict(images, deadline_s=deadline_s)

        monkeypatch.setattr(late, "predict", at_the_end)
        with serving_in_thread(late) as port:
            told = ["--agent", f"127.0.0.1:{port}", "--timeout-s", "2"]
            assert splitfleet(folder / "a.png", *told) == 0

    def test_pauses_that_a_busy_agent_asks_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now, pauses = [0.0], list[float]()

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            now[0] += seconds

        agent = Agent(Place("x", 1, False, ""), 3, 10.0, clock=lambda: now[0], sleep=sleep)
        replies = [(429, {"retry-after": value}, b"") for value in ("2", "x", "99")]
        busy = (503, dict[str, str](), b"")
        monkeypatch.setattr(Agent, "_post", lambda *_: replies.pop(0) if replies else busy)
        with pytest.raises(AgentUnreachable, match="status 503"):
            agent("a", b"")
        assert pauses == [2.0, 1.0, 5.0, 1.0]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("cam-1", "http://cam-1:8470"),
        ("127.0.0.1:9", "http://127.0.0.1:9"),
        ("[::1]:9", "http://[::1]:9"),
        ("https://x/api/", "https://x:443/api"),
        ("http://x", "http://x:8470"),
        ("known", "http://elsewhere:1"),
    ],
)
def test_names_of_agents(name: str, url: str) -> None:
    assert find_agent(name, {"known": "elsewhere:1"}).url == url


@pytest.mark.parametrize("name", ["", "http://", "x:y", "http://u:p@x", "http://x?y", "mqtt://x"])
def test_names_of_nobody(name: str) -> None:
    with pytest.raises(SettingsWrong, match="--agent"):
        find_agent(name, {})
