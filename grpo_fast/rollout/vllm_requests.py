"""How the prompts of a step are dealt out to several vLLM servers.

Each server has a number of places. As soon as one is free, the next prompt goes to the server with the fewest taken, so that a
slow server holds up what it has and no more. All completions of a prompt come from one server, whose prefix cache serves them.
The seed goes with the prompt, so it makes no difference which server that is.

Nothing here imports vLLM.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import Any

from grpo_fast.rollout.vllm_client import Calls, VLLMServer
from grpo_fast.rollout.vllm_sample import Sample

_HANG_UP_S = 10.0


class Requests:
    """Requests for completions to servers that hold the same weights.

    Args:
        servers: that answer.
        places: prompts that one server works on at a time.
    """

    def __init__(self, servers: Sequence[VLLMServer], *, places: int = 64) -> None:
        self._servers = list(servers)
        self._taken = [0] * len(self._servers)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(places * len(self._servers), thread_name_prefix="vLLM request")
        self._running: set[Calls] = set()

    def sample(self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[list[Sample]]:
        """Runs requests to their end.

        Args:
            prompts: P token-id sequences.
            params: [P], vLLM's sampling parameters of each.

        Returns:
            P lists of samples, in the order of ``prompts``.

        Raises:
            RolloutError: a server is gone, or did not answer in time; all requests that run on any are ended.
        """
        calls = Calls()
        self._running.add(calls)
        requests = [self._pool.submit(self._sample, prompt, each, calls) for prompt, each in zip(prompts, params, strict=True)]
        try:
            for request in as_completed(requests):
                request.result()  # the first that failed says so at once
        except BaseException:
            for request in requests:
                request.cancel()
            calls.end()
            wait(requests, timeout=_HANG_UP_S)
            raise
        finally:
            self._running.discard(calls)
        return [request.result() for request in requests]

    def _sample(self, prompt: Sequence[int], params: dict[str, Any], calls: Calls) -> list[Sample]:
        with self._place() as server:
            return server.sample(prompt, params, calls)

    @contextlib.contextmanager
    def _place(self) -> Iterator[VLLMServer]:
        """The server with the fewest places taken; there are as many threads as places, so it has one free."""
        with self._lock:
            number = self._taken.index(min(self._taken))
            self._taken[number] += 1
        try:
            yield self._servers[number]
        finally:
            with self._lock:
                self._taken[number] -= 1

    def end(self) -> None:
        """Ends all requests that run; whoever waits for them is told so."""
        for calls in list(self._running):
            calls.end()

    def close(self) -> None:
        """Takes no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
