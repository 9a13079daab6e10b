"""Requests over several servers that answer when the test lets them; vLLM's own servers are in the tests of ``vllm_http``."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from grpo_fast.rollout import RolloutError
from grpo_fast.rollout.vllm_client import VLLMServer
from grpo_fast.rollout.vllm_requests import Requests

LIMIT_S = 60.0
"""After which a test fails that would otherwise hang; none waits that long where it passes."""


class Stub(ThreadingHTTPServer):
    """Answers a prompt with its own tokens, once ``work`` returns."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, work: Callable[[list[int]], bool]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.work = work
        self.lock = threading.Lock()
        self.answered: list[list[int]] = []
        self.under_way = self.most_under_way = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, prompt: list[int]) -> bool:
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        fine = self.work(prompt)
        with self.lock:
            self.under_way -= 1
            self.answered.append(prompt)
        return fine


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fine = self.server.answer(asked["token_ids"])
        choices = [
            {
                "index": index,
                "token_ids": asked["token_ids"],
                "logprobs": {"content": []},
                "finish_reason": "stop",
                "weight_versions": None,
            }
            for index in range(asked["sampling_params"]["n"])
        ]
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200 if fine else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # nobody may wait for it any more
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def requests_to(*works: Callable[[list[int]], bool], places: int) -> Iterator[tuple[Requests, list[Stub]]]:
    with contextlib.ExitStack() as stack:
        stubs = [stack.enter_context(Stub(work)) for work in works]
        for stub in stubs:
            threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(stub.shutdown)
        requests = Requests([VLLMServer(stub.url, api_key=None, deadline_s=LIMIT_S) for stub in stubs], places=places)
        stack.callback(requests.close)
        yield requests, stubs


def test_a_slow_server_holds_up_what_it_has_and_no_more() -> None:
    prompts = [[number] for number in range(40)]
    rest_is_answered, arrivals = threading.Event(), itertools.count(1)

    def slow(prompt: list[int]) -> bool:
        return rest_is_answered.wait(LIMIT_S)

    def fast(prompt: list[int]) -> bool:
        if next(arrivals) == len(prompts) - 2:
            rest_is_answered.set()
        return True

    with requests_to(slow, fast, places=2) as (requests, stubs):
        answers = requests.sample(prompts, [{"n": 3}] * len(prompts))
        assert [[sample.token_ids for sample in group] for group in answers] == [[tuple(prompt)] * 3 for prompt in prompts]
        assert len(stubs[0].answered) <= 2
        assert sorted(prompt for stub in stubs for prompt in stub.answered) == prompts, "all completions of a prompt from one"
        assert not requests._running


def test_all_places_of_every_server_are_filled_and_none_holds_more() -> None:
    """Nobody answers before every place is taken."""
    all_there = threading.Barrier(3 * 4)

    def together(prompt: list[int]) -> bool:
        all_there.wait(LIMIT_S)
        return True

    with requests_to(together, together, together, places=4) as (requests, stubs):
        requests.sample([[number] for number in range(24)], [{"n": 1}] * 24)
        assert [stub.most_under_way for stub in stubs] == [4, 4, 4]


def test_few_prompts_are_spread_over_the_servers() -> None:
    both_there = threading.Barrier(2)

    def together(prompt: list[int]) -> bool:
        both_there.wait(LIMIT_S)
        return True

    with requests_to(together, together, places=64) as (requests, stubs):
        requests.sample([[1], [2]], [{"n": 1}] * 2)
        assert [len(stub.answered) for stub in stubs] == [1, 1]


def test_one_that_fails_ends_those_that_run_on_other_servers() -> None:
    over, there = threading.Event(), threading.Event()

    def hangs(prompt: list[int]) -> bool:
        there.set()
        return over.wait(LIMIT_S)

    def fails(prompt: list[int]) -> bool:
        there.wait(LIMIT_S)
        return False

    with requests_to(hangs, fails, places=1) as (requests, stubs):
        with pytest.raises(RolloutError, match=f"{stubs[1].url} refused /inference/v1/generate with status 500"):
            requests.sample([[1], [2]], [{"n": 1}] * 2)
        assert not requests._running
        over.set()
        assert [len(group) for group in requests.sample([[3]], [{"n": 1}])] == [1], "its place is free again"


def test_what_is_ended_is_told_so() -> None:
    over, there = threading.Event(), threading.Event()

    def hangs(prompt: list[int]) -> bool:
        there.set()
        return over.wait(LIMIT_S)

    with requests_to(hangs, places=1) as (requests, _):

        def end() -> None:
            there.wait(LIMIT_S)
            requests.end()

        ender = threading.Thread(target=end)
        ender.start()
        with pytest.raises(RolloutError, match=r"is gone|cannot be reached"):
            requests.sample([[1]], [{"n": 1}])
        ender.join()
        over.set()
