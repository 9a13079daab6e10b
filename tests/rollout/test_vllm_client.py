"""Requests to a server that is slow; vLLM's own server is in the tests of ``vllm_http``."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from grpo_fast.rollout import RolloutError, vllm_client
from grpo_fast.rollout.vllm_client import Calls, VLLMServer, wait_until_up
from grpo_fast.rollout.vllm_environment import held_port
from grpo_fast.rollout.vllm_needs import Needs


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections, as the kernel does for a process that is stopped, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_named_after_the_deadline_of_the_request(silent: str) -> None:
    server = VLLMServer(silent, api_key=None, deadline_s=0.4, control_deadline_s=0.2)
    with pytest.raises(RolloutError, match=rf"{silent} did not answer /pause within 0\.2 s \(sync_deadline_s\)"):
        server.post("/pause")
    with pytest.raises(RolloutError, match=r"did not answer /inference/v1/generate within 0\.4 s \(request_deadline_s\)"):
        server.sample([1], {}, Calls())


def test_what_went_over_a_slow_link_is_told(silent: str) -> None:
    """The kernel takes what fits its buffers, as a link takes little at a time."""
    server = VLLMServer(silent, api_key=None, deadline_s=0.5)
    assert server.told_sent == ""
    with pytest.raises(RolloutError, match=r"did not answer /memory within 0\.5 s"):
        server.put("/memory", memoryview(bytearray(64 * 2**20)))
    assert 0 < server.sent_bytes < 64 * 2**20
    sent = f"{server.sent_bytes / 1e6:.1f}"
    assert server.told_sent == f" ({sent} MB went over; raise sync_deadline_s if only its link is slow)"


@pytest.mark.parametrize("calls", [None, Calls()])
def test_an_answer_that_a_server_owes_when_it_ends_is_not_waited_for(
    calls: Calls | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does vLLM's where its engine has died in a sync: it listens no more, and waits for its clients to go."""
    monkeypatch.setattr(vllm_client, "_LOOK_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = VLLMServer(url, api_key=None, deadline_s=600)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.call, "POST", "/update_weights", calls=calls)
            kept, _ = listening.accept()
            with kept:
                kept.recv(2**16)
                assert not waiting.done()
                listening.close()
                with pytest.raises(RolloutError, match=rf"{url} .* \(ConnectionRefusedError at /update_weights\)"):
                    waiting.result(60)


def test_what_is_ended_ends_at_once_and_nothing_else_does(silent: str) -> None:
    """Python waits for a pool's threads when it exits: one that waited for a server would hold it up."""
    server, calls, others = VLLMServer(silent, api_key=None, deadline_s=60), Calls(), Calls()
    with ThreadPoolExecutor(3) as pool:
        ended, kept = (pool.submit(server.sample, [1], {}, each) for each in (calls, others))
        control = pool.submit(server.post, "/pause")
        while not (calls._connections and others._connections and server._control._connections):
            time.sleep(0.01)
        begin = time.monotonic()
        calls.end()
        assert isinstance(ended.exception(20), RolloutError)
        assert not kept.done()
        assert not control.done()
        server.close()
        assert isinstance(control.exception(20), RolloutError)
        others.end()
        assert isinstance(kept.exception(20), RolloutError)
        assert time.monotonic() < begin + 20
        for work in (lambda: server.post("/resume"), lambda: server.sample([1], {}, calls)):
            with pytest.raises(RolloutError, match="ConnectionAbortedError"):
                work()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_says_what_mends_it(status: int) -> None:
    hints = {401: "; set VLLM_API_KEY", 403: "; start it with `grpo-fast serve`, or with --enable-scale-out", 404: ""}
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(2**16)
                body = json.dumps({"detail": "Not Found" if status == 404 else "Forbidden"}).encode()
                connection.sendall(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

        thread = threading.Thread(target=answer)
        thread.start()
        server = VLLMServer(f"http://127.0.0.1:{listening.getsockname()[1]}", api_key=None, deadline_s=20)
        message = "has no routes that receive weights" if status == 404 else f"refused .* with status {status}.*{hints[status]}"
        with pytest.raises(RolloutError, match=message):
            server.check(Needs(torch.float32, "shared_memory", context_length=100, sleeps=False))
        thread.join()


class _Up(BaseHTTPRequestHandler):
    """Answers everything alike, as vLLM's server answers the question for its models."""

    body = b'{"data": [{"max_model_len": 128}]}'

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class _Busy(_Up):
    """Is busy for the first two requests of each path, or for ever."""

    for_ever = False
    status = 503

    def setup(self) -> None:
        self.asked: list[str] = self.server.asked  # type: ignore[attr-defined]
        super().setup()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.for_ever or self.asked.count(self.path) < 3:
            self.send_error(self.status, "Overloaded")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.do_GET()


@contextlib.contextmanager
def busy(**kind: Any) -> Iterator[tuple[str, list[Any]]]:
    """The address of a server that is busy, and what it was asked."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("_Kind", (_Busy,), kind)) as up:
        up.asked = asked = []  # type: ignore[attr-defined]
        threading.Thread(target=up.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{up.server_address[1]}", asked
        finally:
            up.shutdown()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(vllm_client, "_REST_S", 0.01)
    with busy(status=status) as (url, asked):
        server = VLLMServer(url, api_key=None, deadline_s=60)
        assert server.post("/start", {"some": "body"}) == json.loads(_Up.body)
        assert server.post("/sample", {}, calls=Calls()) == json.loads(_Up.body)
        assert asked == [{"some": "body"}, "/start"] * 3 + [{}, "/sample"] * 3
        wait_until_up([url], timeout_s=60, deadline_s=60)
        assert asked[-3:] == ["/v1/models"] * 3
    told = [message for message in caplog.messages if "busy" in message]
    assert told[0] == f"vLLM's server {url} is busy (status {status} at /start) and is asked again"
    assert len(told) == 2, "each server once"


def test_a_server_that_stays_busy_is_told_after_the_deadline_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "_REST_S", 0.01)
    with busy(for_ever=True) as (url, asked):
        server = VLLMServer(url, api_key=None, deadline_s=0.4, control_deadline_s=0.2)
        with pytest.raises(
            RolloutError, match=rf"{url} was too busy for /pause for 0\.2 s \(sync_deadline_s\), with status 503:"
        ):
            server.post("/pause", {})
        assert 4 <= len(asked) <= 12, "ever more rarely"
        with pytest.raises(RolloutError, match=r"too busy for /inference/v1/generate for 0\.4 s \(request_deadline_s\)"):
            server.sample([1], {}, Calls())


def test_the_rest_between_two_tries_ends_with_the_calls_and_the_server_owes_an_answer_till_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = threading.Event()
    monkeypatch.setattr(vllm_client, "_REST_S", 600)
    monkeypatch.setattr(vllm_client._log, "warning", lambda *_: told.set())
    with busy(for_ever=True) as (url, _), ThreadPoolExecutor(1) as pool:
        server = VLLMServer(url, api_key=None, deadline_s=6000)
        waiting = pool.submit(server.post, "/pause", {})
        assert told.wait(20)
        assert server.owes_answer
        server.close()
        assert "ConnectionAbortedError at /pause" in str(waiting.exception(20))
        assert not server.owes_answer


def test_a_server_that_is_being_started_is_waited_for_and_one_that_goes_again_is_called_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_client, "_POLL_S", 0.01)
    refused = threading.Event()
    with held_port() as port:
        url = f"http://127.0.0.1:{port}"
        server = VLLMServer(url, api_key=None, deadline_s=60)
        with pytest.raises(RolloutError, match=rf"{url} cannot be reached \(ConnectionRefusedError.*; start it with"):
            server.get("/v1/models")
        monkeypatch.setattr(vllm_client._log, "warning", lambda *_: refused.set())
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(wait_until_up, [url], timeout_s=120, deadline_s=60)
            assert refused.wait(60), "the wait is told"
            assert not waiting.done()
            with ThreadingHTTPServer(("127.0.0.1", port), _Up) as up:
                threading.Thread(target=up.serve_forever).start()
                assert waiting.result(60) is None
                assert server.context_length == 128
                up.shutdown()
        with pytest.raises(RolloutError, match=rf"{url} is gone \(ConnectionRefusedError.*; restart it with"):
            server.get("/v1/models")


def test_a_server_that_does_not_come_up_is_named_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "_POLL_S", 0.01)
    with held_port() as port:
        told = rf"http://127.0.0.1:{port} was not up within 0.05 s \(vllm_server_timeout\); start it with `grpo-fast serve`"
        with pytest.raises(RolloutError, match=told):
            wait_until_up([f"http://127.0.0.1:{port}"], timeout_s=0.05, deadline_s=60)


def test_a_server_that_takes_connections_and_says_nothing_is_not_waited_for(silent: str) -> None:
    with pytest.raises(RolloutError, match=r"did not answer /v1/models within 0\.2 s \(sync_deadline_s\)"):
        wait_until_up([silent], timeout_s=600, deadline_s=0.2)


@pytest.mark.parametrize(
    "body",
    [b"<!DOCTYPE html><title>Notebooks</title>", b"\xff\xfe", b"{}", b'{"data": []}', b'{"data": [{"id": "llama"}]}', b"[]"],
)
def test_what_is_no_vllm_is_told_before_the_model_is_loaded(body: bytes) -> None:
    handler = type("_Other", (_Up,), {"body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as up:
        threading.Thread(target=up.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{up.server_address[1]}"
        try:
            with pytest.raises(
                RolloutError, match=rf"what listens at {url} is not vLLM's server: it answers /v1/models with .*port"
            ):
                wait_until_up([url], timeout_s=60, deadline_s=60)
        finally:
            up.shutdown()
