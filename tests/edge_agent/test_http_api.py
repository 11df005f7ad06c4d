from __future__ import annotations

import asyncio
import json
import socket
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.errors import ConfigError
from edge_agent import http_server
from edge_agent.errors import (
    AgentError,
    InputError,
    ListenError,
    NotReady,
    Overloaded,
    StateError,
    Stopped,
)
from edge_agent.http_api import Limits
from edge_agent.http_server import is_loopback, listen, parse_address, read_token
from tests.http_agent import FakeAnswerer, multipart, picture, request, serving

TOKEN = "0123456789abcdef"
SMALL = Limits(body_bytes=20_000, pictures=3)
QUICK = Limits(body_s=0.3, answer_s=0.3, grace_s=0.1)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that")


class TestAnswers:
    async def test_a_picture_goes_in_and_the_answer_comes_out(self) -> None:
        async with serving(FakeAnswerer()) as port:
            reply = await request(port, picture(255))
        assert reply.status == 200
        assert reply.json["run"] == "run-1"
        assert reply.json["version"] == 7
        (answer,) = reply.json["predictions"]
        assert (answer["label"], answer["name"], answer["by"]) == (2, "bright", "exit")
        assert answer["confidence"] == pytest.approx(0.9)
        assert [entry["name"] for entry in answer["top"]] == ["bright", "dark", "grey"]
        assert answer["top"][0]["probability"] == pytest.approx(0.8)
        assert answer["milliseconds"] == pytest.approx({"queue": 1, "exit": 2, "total": 4})

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("told", ["image/whatever", "application/octet-stream", None])
    async def test_what_a_picture_is_its_bytes_say(self, kind: str, told: str | None) -> None:
        async with serving(FakeAnswerer()) as port:
            reply = await request(port, picture(0, kind=kind, mode="RGB"), kind=told)
        assert reply.json["predictions"][0]["name"] == "dark"

    async def test_several_are_answered_in_their_order_together(self) -> None:
        answerer = FakeAnswerer()
        body, kind = multipart(("a.png", picture(128)), ("b.jpg", picture(255, kind="JPEG")))
        async with serving(answerer) as port:
            reply = await request(port, body, kind=kind)
        found = [(one["file"], one["name"], one["by"]) for one in reply.json["predictions"]]
        assert found == [("a.png", "grey", "fallback"), ("b.jpg", "bright", "exit")]
        assert reply.json["predictions"][0]["reason"] == "timeout"
        assert answerer.asked == [(2, pytest.approx(30.0, abs=5))]

    async def test_of_several_the_bad_ones_have_an_error(self) -> None:
        body, kind = multipart(("a", b"no picture"), ("b", picture(255)), ("c", b""))
        async with serving(FakeAnswerer()) as port:
            reply = await request(port, body, kind=kind)
        assert reply.status == 200
        first, second, third = reply.json["predictions"]
        assert "JPEG, PNG or WebP" in first["error"]
        assert second["name"] == "bright"
        assert "empty" in third["error"]

    async def test_how_many_classes_and_how_long_can_be_said(self) -> None:
        answerer = FakeAnswerer()
        async with serving(answerer) as port:
            reply = await request(port, picture(), path="/predict?top=1&timeout_s=25")
        assert len(reply.json["predictions"][0]["top"]) == 1
        ((_, within_s),) = answerer.asked
        assert within_s is not None
        assert 0 < within_s < 25, "decoding took some of it"

    async def test_time_that_decoding_took_is_not_waited_for_again(self) -> None:
        answerer = FakeAnswerer()
        async with serving(answerer) as port:
            reply = await request(port, picture(), path="/predict?timeout_s=1e-9")
        assert reply.status == 504
        assert answerer.asked == []

    async def test_health(self) -> None:
        answerer = FakeAnswerer()
        async with serving(answerer, token=TOKEN) as port:
            well = await request(port, method="GET", path="/healthz")
            answerer.ready = False
            ill = await request(port, method="GET", path="/healthz")
            answerer.error = Stopped("it stops")
            gone = await request(port, method="GET", path="/healthz")
        assert (well.status, ill.status, gone.status) == (200, 503, 503)
        assert (well.json["version"], well.json["online"], well.json["asked"]) == (7, True, 2)
        assert (well.json["threshold"], well.json["threshold_in_force"]) == (0.5, 0.75)
        assert ill.json["ready"] is False

    async def test_it_describes_itself(self) -> None:
        async with serving(FakeAnswerer()) as port:
            reply = await request(port, method="GET", path="/openapi.json")
        assert reply.status == 200
        operation = reply.json["paths"]["/predict"]["post"]
        assert set(operation["requestBody"]["content"]) == {
            "image/*",
            "application/octet-stream",
            "multipart/form-data",
        }
        assert {"200", "401", "413", "422", "429", "503", "504"} <= set(operation["responses"])
        assert reply.json["openapi"].startswith("3.")
        text = json.dumps(reply.json)
        named = {word.split('"')[0] for word in text.split("#/components/schemas/")[1:]}
        assert named <= set(reply.json["components"]["schemas"])


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 10,000 times 10,000 pixels."""
    whole = bytearray(picture(size=1))
    whole[16:24] = (10_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


class TestBadInput:
    @pytest.mark.parametrize(
        ("body", "kind", "status", "words"),
        [
            (b"", "image/png", 422, "empty"),
            (b"not a picture", "image/png", 422, "JPEG, PNG or WebP"),
            (b"GIF89a" + bytes(50), "image/gif", 422, "JPEG, PNG or WebP"),
            (picture()[:45], "image/png", 422, "JPEG, PNG or WebP"),
            (bomb(), "image/png", 422, "pixels"),
            (picture(), "text/plain", 415, "multipart/form-data"),
            (picture(), "application/json", 415, "multipart/form-data"),
            (b"", "multipart/form-data", 422, "no multipart"),
            (b"rubbish", "multipart/form-data; boundary=x", 422, "no multipart"),
            (b"--x\r\nrubbish", "multipart/form-data; boundary=x", 422, "its end is missing"),
            (multipart(("a", picture()))[0][:-9], multipart()[1], 422, "its end is missing"),
            (b"--x--", "multipart/form-data; boundary=x", 422, "no picture in this request"),
            (bytes(21_000), "image/png", 413, "20000 bytes"),
        ],
    )
    async def test_is_refused_with_a_reason(
        self, body: bytes, kind: str, status: int, words: str
    ) -> None:
        answerer = FakeAnswerer()
        async with serving(answerer, limits=SMALL) as port:
            reply = await request(port, body, kind=kind)
            well = await request(port, picture())
        assert reply.status == status
        assert words in reply.json["error"]
        assert well.status == 200
        assert len(answerer.asked) == 1

    async def test_a_form_of_the_wrong_parts(self) -> None:
        forms = {
            "Too many files": multipart(*[(f"{i}", picture()) for i in range(4)]),
            "fields": multipart((None, b"text")),
            "no picture in this request": multipart(),
            "none of these is a picture: a: ": multipart(("a", b"x"), ("b", b"")),
        }
        async with serving(FakeAnswerer(), limits=SMALL) as port:
            for words, (body, kind) in forms.items():
                reply = await request(port, body, kind=kind)
                assert reply.status == 422, words
                assert words in reply.json["error"]

    async def test_a_body_that_grows_beyond_all_bounds_is_cut_off(self) -> None:
        async with serving(FakeAnswerer(), limits=SMALL) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + (b"4000\r\n" + bytes(0x4000) + b"\r\n") * 2
            )
            assert b" 413 " in await reader.readline()
            writer.close()

    async def test_a_body_that_does_not_come_is_not_waited_for(self) -> None:
        answerer = FakeAnswerer()
        async with serving(answerer, limits=QUICK) as port:
            reply = await request(port, b"x", Content_Length="900")
        assert reply.status == 408
        assert answerer.asked == []

    @pytest.mark.parametrize(
        "path",
        ["/predict?top=0", "/predict?top=101", "/predict?timeout_s=0", "/predict?timeout_s=nan",
         "/predict?timeout_s=x"],
    )  # fmt: skip
    async def test_parameters_that_cannot_be(self, path: str) -> None:
        async with serving(FakeAnswerer()) as port:
            reply = await request(port, picture(), path=path)
        assert reply.status == 422
        assert path[9:].partition("=")[0] in reply.json["error"]

    async def test_other_paths_and_methods(self) -> None:
        async with serving(FakeAnswerer()) as port:
            wrong = await request(port, method="GET")
            nowhere = await request(port, path="/")
        assert (wrong.status, wrong.headers["allow"], nowhere.status) == (405, "POST", 404)
        assert wrong.json["error"]
        assert nowhere.json["error"]

    async def test_what_is_not_http(self) -> None:
        async with serving(FakeAnswerer()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x00\xff\r\n\r\n")
            assert b" 400 " in await reader.readline()
            writer.close()
            assert (await request(port, picture())).status == 200

    @pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"])
    @pytest.mark.parametrize("said", [b"", b"POST /pred"])
    async def test_who_says_nothing_or_half_of_it_is_sent_away(
        self, before: bytes, said: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_server, "HEAD_S", 0.5)
        async with serving(FakeAnswerer()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(before)
                if before:
                    assert b" 200 " in await reader.readline()
                writer.write(said)
                async with asyncio.timeout(60):
                    await reader.read()
            finally:
                writer.close()
            monkeypatch.undo()
            assert (await request(port, picture())).status == 200

    async def test_a_body_may_take_longer_than_a_head(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_server, "HEAD_S", 0.5)
        body = picture()
        head = (
            "POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        async with serving(FakeAnswerer()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode())
                await asyncio.sleep(0.8)
                writer.write(body)
                assert b" 200 " in await reader.read()
            finally:
                writer.close()


class TestTrouble:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (NotReady("no parameters yet"), 503),
            (Overloaded("too much"), 429),
            (Stopped("it stops"), 503),
            (InputError("wrong shape"), 422),
            (AgentError("something"), 500),
        ],
    )
    async def test_every_error_has_its_status(self, error: AgentError, status: int) -> None:
        async with serving(FakeAnswerer(error=error)) as port:
            reply = await request(port, picture())
        assert reply.status == status
        assert reply.json["error"] == str(error)
        assert ("retry-after" in reply.headers) == (status in (429, 503))

    async def test_no_answer_in_time(self) -> None:
        answerer = FakeAnswerer(gate=asyncio.Event())
        async with serving(answerer, limits=QUICK) as port:
            assert (await request(port, picture())).status == 504
            shorter = await request(port, picture(), path="/predict?timeout_s=0.01")
        assert shorter.status == 504
        assert answerer.cancelled == len(answerer.asked)

    async def test_too_many_at_once_are_told_to_come_back(self) -> None:
        gate = asyncio.Event()
        answerer = FakeAnswerer(gate=gate)
        limits = Limits(requests=2)
        async with serving(answerer, limits=limits) as port:
            waiting = [asyncio.create_task(request(port, picture())) for _ in range(2)]
            await until(lambda: len(answerer.asked) == 2)
            third = await request(port, picture())
            gate.set()
            assert [(await one).status for one in waiting] == [200, 200]
            assert (await request(port, picture())).status == 200
        assert third.status == 429
        assert third.headers["retry-after"] == "1"

    async def test_a_client_that_goes_away_takes_its_request_with_it(self) -> None:
        answerer = FakeAnswerer(gate=asyncio.Event())
        async with serving(answerer) as port:
            gone = asyncio.create_task(request(port, picture()))
            await until(lambda: bool(answerer.asked))
            gone.cancel()
            await until(lambda: answerer.cancelled == 1)

    async def test_the_end_of_the_agent_ends_requests(self) -> None:
        answerer = FakeAnswerer(gate=asyncio.Event())
        async with serving(answerer) as port:
            waiting = asyncio.create_task(request(port, picture()))
            await until(lambda: bool(answerer.asked))
        reply = await asyncio.wait_for(waiting, 60)
        assert (reply.status, answerer.cancelled) == (503, 1)
        assert "stops" in reply.json["error"]
        with pytest.raises(OSError, match=r"[Cc]onnect"):
            await asyncio.open_connection("127.0.0.1", port)


class TestWhoMay:
    @pytest.mark.parametrize(
        "given", [None, "", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xe9", TOKEN]
    )
    async def test_without_the_token_nobody(self, given: str | None) -> None:
        answerer = FakeAnswerer()
        headers = {} if given is None else {"Authorization": given}
        async with serving(answerer, token=TOKEN) as port:
            reply = await request(port, picture(), **headers)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert not answerer.asked

    async def test_with_the_token_under_any_name(self) -> None:
        async with serving(FakeAnswerer(), token=TOKEN) as port:
            reply = await request(
                port, picture(), Authorization=f"Bearer {TOKEN}", Host="cam-1.example:80"
            )
        assert reply.status == 200

    @pytest.mark.parametrize(
        ("host", "status"),
        [("localhost", 200), ("[::1]:1", 200), ("[::1]", 200), ("127.0.0.1:80", 200),
         ("evil.example", 403), ("evil.example:8470", 403), ("127.0.0.1.evil.example", 403)],
    )  # fmt: skip
    async def test_a_page_in_a_browser_does_not_reach_it_by_a_name_of_its_own(
        self, host: str, status: int
    ) -> None:
        async with serving(FakeAnswerer()) as port:
            assert (await request(port, picture(), Host=host)).status == status
            well = await request(port, method="GET", path="/healthz", Host=host)
            assert well.status == status


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "address"),
        [("127.0.0.1:8470", ("127.0.0.1", 8470)), ("[::1]:0", ("::1", 0)), ("a.b:9", ("a.b", 9))],
    )
    def test_are_read(self, text: str, address: tuple[str, int]) -> None:
        assert parse_address(text) == address

    @pytest.mark.parametrize(
        "text",
        ["", "8470", ":8470", "a:", "a:x", "a:65536", "a:-1", "::1:80", "a:²", "a:" + "9" * 99],
    )
    def test_or_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"HOST:PORT|port must be|brackets"):
            parse_address(text)

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
         ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil", False)],
    )  # fmt: skip
    def test_which_of_them_only_this_machine_reaches(self, host: str, loopback: bool) -> None:
        assert is_loopback(host) is loopback

    def test_a_port_that_is_taken_or_a_host_that_is_not_there(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(ListenError, match="choose another address"):
                listen("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"agent\.http.*no\.such\.host\.invalid"):
            listen("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"x" * 600, b"\xff" * 32, b"two words of enough letters", b"a\nb" * 9],
)
def test_a_token_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(StateError, match="token"):
        read_token(path)
    with pytest.raises(StateError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_a_token_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert read_token(tmp_path / "token") == TOKEN
