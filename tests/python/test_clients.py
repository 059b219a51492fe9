"""triptych.Client and AsyncClient against a server that fails on demand: retries, silence, leases, cancels, TLS."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from triptych import TLS, AsyncClient, BatchError, Client, Delta, ErrorKind, TriptychError
from triptych.python_models.contract.tensors import STAGES


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_server", Path(__file__).with_name("fake_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up there
    sys.modules["fake_server"] = module
    spec.loader.exec_module(module)
    return module


fake = _load()
TEXT_STAGES = {"preprocess", "language_model"}


def overloaded() -> TriptychError:
    return TriptychError(ErrorKind.OVERLOADED, "too many", stage="language_model")


def test_calls() -> None:
    def script(asked: Any, number: int) -> Iterator[Any]:
        messages = asked.request.get("messages")
        yield from fake.answer(messages[0]["content"] if messages else asked.request["prompt"]["text"])

    with fake.FakeServer(script) as server, Client(server.url, max_in_flight=3) as client:
        answer = client.chat("hello", temperature=0)
        assert (answer.text, answer.finish_reason, answer.usage.completion_tokens) == ("hello", "stop", 5)
        assert [delta.text for delta in client.stream_chat("hey")] == ["h", "e", "y", ""]
        assert client.generate("Once").text == "Once"
        assert [answer.text for answer in client.chat(list("abcdefgh"))] == list("abcdefgh")
        assert server.most_running <= 3
        assert server.asked[0].request["sampling"] == {"temperature": 0.0}
        client.probe("preprocess")


@pytest.mark.parametrize(
    "failure", [grpc.StatusCode.UNAVAILABLE, TriptychError(ErrorKind.STAGE_DEAD, "gone"), overloaded()], ids=str
)
def test_a_request_is_sent_again_until_its_first_token(failure: Any) -> None:
    def script(asked: Any, number: int) -> Iterator[Any]:
        yield Delta()
        if number < 2:
            yield failure
        yield from fake.answer()

    with fake.FakeServer(script) as server, Client(server.url) as client:
        assert client.chat("hello").text == "ok"
        assert len({asked.request_id for asked in server.asked}) == 3


@pytest.mark.parametrize("failure", [grpc.StatusCode.UNAVAILABLE, overloaded()], ids=str)
def test_but_never_after_it(failure: Any) -> None:
    def script(asked: Any, number: int) -> Iterator[Any]:
        yield Delta("a", (1,))
        yield failure

    with fake.FakeServer(script) as server, Client(server.url) as client:
        stream = client.stream_chat("hello")
        assert next(stream).text == "a"
        with pytest.raises(TriptychError) as caught:
            next(stream)
        assert caught.value.kind in (ErrorKind.STAGE_DEAD, ErrorKind.OVERLOADED)
        with pytest.raises(TriptychError):
            stream.result()
        assert len(server.asked) == 1


def test_what_will_not_pass_is_not_sent_again() -> None:
    def script(asked: Any, number: int) -> Iterator[Any]:
        yield TriptychError(ErrorKind.INVALID_REQUEST, "messages[0]: no", "messages[0]")

    with fake.FakeServer(script) as server:
        with Client(server.url) as client, pytest.raises(TriptychError) as caught:
            client.chat("hello")
        assert (caught.value.param, len(server.asked)) == ("messages[0]", 1)
        server.script = lambda asked, number: iter([overloaded()])
        with Client(server.url, retry_s=0) as client, pytest.raises(TriptychError, match="too many"):
            client.chat("hello")
        assert len(server.asked) == 2


def test_a_server_that_comes_back() -> None:
    with fake.FakeServer(lambda asked, number: fake.endless(asked)) as server:
        client = Client(server.url, retry_s=60)
        stream = client.stream_chat("hello")
        next(stream)
        port = server.port
    # what has been answered in part is lost, and says so
    with pytest.raises(TriptychError) as caught:
        list(stream)
    assert caught.value.kind in (ErrorKind.STAGE_DEAD, ErrorKind.CANCELLED)
    waiting = client.stream_chat("hello")
    with fake.FakeServer(lambda asked, number: iter(fake.answer()), port=port), client:
        assert waiting.result().text == "ok"


def test_silence() -> None:
    def script(asked: Any, number: int) -> Iterator[Any]:
        if number:
            yield Delta("a", (1,))
        yield from fake.silent(asked)

    with fake.FakeServer(script) as server:
        with Client(server.url, start_timeout_s=0.5) as client, pytest.raises(TriptychError) as caught:
            client.chat("hello")
        assert caught.value.kind is ErrorKind.TIMEOUT
        with Client(server.url, silence_timeout_s=0.5) as client, pytest.raises(TriptychError) as caught:
            client.chat("hello")
        assert caught.value.kind is ErrorKind.STAGE_DEAD
        for asked in server.asked:
            fake.wait_until(lambda asked=asked: ("language_model", asked.request_id) in server.cancels)


def test_an_engine_that_dies_is_noticed_by_its_leases() -> None:
    with fake.FakeServer(lambda asked, number: fake.silent_after_acceptance(asked)) as server:
        with Client(server.url, lease_s=0.5, retry_s=0) as client:
            stream = client.stream_chat("hello")
            fake.wait_until(lambda: server.renewals)
            server.dead = True
            with pytest.raises(TriptychError, match="gone") as caught:
                next(stream)
        assert caught.value.kind is ErrorKind.STAGE_DEAD


def test_leases_are_renewed_and_cancels_reach_every_stage() -> None:
    with fake.FakeServer(lambda asked, number: fake.endless(asked)) as server:
        with Client(server.url, lease_s=0.5) as client:
            stream = client.stream_chat("hello")
            next(stream)
            assert server.asked[0].request["lease_s"] == 0.5
            fake.wait_until(lambda: server.renewals.count(stream.request_id) > 2)
            request_id = stream.request_id
            stream.close()
            fake.wait_until(lambda: {s for s, i in server.cancels if i == request_id} >= TEXT_STAGES)
            assert list(stream) == []
            for _ in client.stream_chat([{"role": "user", "content": [{"type": "image", "image": b"x"}]}]):
                break
            gc.collect()
            last = server.asked[-1].request_id
            fake.wait_until(lambda: {s for s, i in server.cancels if i == last} == set(STAGES))
            left = client.stream_chat("hello")
            next(left)
        # closing the client ended it
        assert server.asked[-1].cancelled.is_set()
        with pytest.raises(TriptychError, match="closed"):
            client.chat("hello")


def test_asyncio() -> None:
    def script(asked: Any, number: int) -> Iterator[Any]:
        text = asked.request["messages"][0]["content"]
        yield from fake.endless(asked) if text == "endless" else fake.answer(text)

    async def run(server: Any) -> None:
        async with AsyncClient(server.url, max_in_flight=2) as client:
            assert (await client.chat("hello")).text == "hello"
            assert [delta.text async for delta in await client.stream_chat("hey")] == ["h", "e", "y", ""]
            assert [answer.text for answer in await client.chat(list("abcde"))] == list("abcde")
            assert server.most_running <= 2
            await client.probe("language_model")
            tasks = [asyncio.create_task(client.chat("endless")), asyncio.create_task(client.chat(["endless"] * 4))]
            await asyncio.to_thread(fake.wait_until, lambda: server.running == 3)
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
            await asyncio.to_thread(fake.wait_until, lambda: server.running == 0)
            async for _ in await client.stream_chat("endless"):
                break
            gc.collect()
            await asyncio.to_thread(fake.wait_until, lambda: server.running == 0)
            stream = await client.stream_chat("endless")
            await anext(stream)
        assert server.asked[-1].cancelled.is_set()

    with fake.FakeServer(script) as server:
        asyncio.run(asyncio.wait_for(run(server), 120))


def test_one_bad_item_of_a_batch() -> None:
    def script(asked: Any, number: int) -> Iterator[Any]:
        text = asked.request["messages"][0]["content"]
        yield from [TriptychError(ErrorKind.INVALID_REQUEST, "no", "x")] if text == "b" else fake.answer(text)

    with fake.FakeServer(script) as server, Client(server.url) as client:
        with pytest.raises(BatchError, match="1 of 3 items failed; item 1: no") as caught:
            client.chat(list("abc"))
        assert [result and result.text for result in caught.value.results] == ["a", None, "c"]


def test_tls_and_headers(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=inner"]
    files = ["-addext", "subjectAltName=DNS:inner", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command + files, check=True, capture_output=True)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    with fake.FakeServer(lambda asked, number: iter(fake.answer()), credentials) as server:
        tls = TLS(root_certificates=certificate, server_name="inner")
        with Client(server.url, tls=tls, headers={"Triptych-Key": "secret"}) as client:
            assert client.chat("hello").text == "ok"
            assert server.metadata["triptych-key"] == "secret"
        # whom it does not know it does not trust
        with Client(f"grpcs://{server.url}", retry_s=0) as client, pytest.raises(TriptychError) as caught:
            client.chat("hello")
        assert caught.value.kind is ErrorKind.STAGE_DEAD
        assert len(server.asked) == 1
