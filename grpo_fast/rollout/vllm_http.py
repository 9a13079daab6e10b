"""vLLM servers on this machine: how requests reach them, and what the weight sync asks of them.

All servers get the same weights, through one shared file. Prompts are dealt out in turn, each with all its completions, so that
a server's prefix cache serves them. The routes that change weights are vLLM's own for training; they know no API key, which is
why only servers on the loopback interface are taken.

Importing this imports vLLM; :mod:`~grpo_fast.rollout.vllm_engine` does so when an engine is built.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import socket
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Literal, TypeVar

import torch

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rollout.engine import RolloutError
from grpo_fast.rollout.sync_probe import Choices
from grpo_fast.rollout.transports import Delivery
from grpo_fast.rollout.vllm_adapters import AdapterVersion
from grpo_fast.rollout.vllm_layerwise import PolicyWeights
from grpo_fast.rollout.vllm_sample import OVER_HTTP, PROBE_PARAMS, SCORE_PARAMS, Sample, kept_tokens, token_versions
from grpo_fast.rollout.vllm_senders import WeightSender, json_safe
from grpo_fast.rollout.vllm_sleep import Part, Sleeper

_T = TypeVar("_T")
_CONCURRENT_REQUESTS = 64
_HANG_UP_S = 10.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class VLLMServer:
    """One server.

    Args:
        url: where it listens, on this machine.
        api_key: what it demands of requests; ``None`` where it demands nothing.
        deadline_s: longest time of one request.

    Raises:
        ValueError: the server is on another machine, or the URL is none.
    """

    def __init__(self, url: str, *, api_key: str | None, deadline_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            raise ValueError(f"{url!r} is no server's address; give one such as http://127.0.0.1:8000")
        if parts.hostname not in _LOOPBACK:
            raise ValueError(
                f"{url} is on another machine: weights go through shared memory, and the routes that change them know no API "
                "key; give a server on 127.0.0.1"
            )
        self.url = url
        self._host, self._port = parts.hostname, parts.port
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._deadline_s = deadline_s
        self._sampling: set[http.client.HTTPConnection] = set()
        """Connections of requests for completions that run."""
        self.adapter: str | None = None
        """Name of the LoRA adapter that answers requests; ``None`` for the model as it is."""

    def call(self, method: Literal["GET", "POST"], path: str, body: Any = None, *, may_hang_up: bool = False) -> str:
        """Sends one request, which :meth:`hang_up` may end.

        Returns:
            The body of the answer.

        Raises:
            RolloutError: the server cannot be reached, does not answer in time, or answers with an error.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._deadline_s)
        try:
            if may_hang_up:
                self._sampling.add(connection)
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except TimeoutError:
            raise RolloutError(f"vLLM's server {self.url} did not answer {path} within {self._deadline_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise RolloutError(
                f"vLLM's server {self.url} is gone ({type(error).__name__} at {path}); start it again with `grpo-fast serve`"
            ) from error
        finally:
            self._sampling.discard(connection)
            connection.close()
        if answer.status != http.client.OK:
            raise RolloutError(f"vLLM's server {self.url} refused {path} with status {answer.status}: {text[:300]}")
        return text

    def hang_up(self) -> None:
        """Ends all requests for completions: vLLM drops those whose client is gone, and whoever waits for one is told so."""
        for connection in list(self._sampling):
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # it has just ended by itself
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def post(self, path: str, body: Any = None) -> Any:
        """Posts ``body`` as JSON and returns what the answer's JSON holds."""
        return json.loads(self.call("POST", path, body))

    def get(self, path: str) -> Any:
        """Gets a path and returns what its JSON holds."""
        return json.loads(self.call("GET", path))

    @property
    def context_length(self) -> int:
        """Longest sequence, in tokens."""
        return int(self.get("/v1/models")["data"][0]["max_model_len"])

    @property
    def block_size(self) -> int:
        """Tokens of a block of the prefix cache."""
        found = re.search(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"', self.call("GET", "/metrics"))
        if found is None:
            raise RolloutError(f"vLLM's server {self.url} does not tell its cache's block size under /metrics")
        return int(found[1])

    def sample(self, prompt: Sequence[int], params: dict[str, Any]) -> list[Sample]:
        """Runs one request to its end."""
        try:
            choices = self._generate(list(prompt), {"logprobs": 0} | params)["choices"]
        except RolloutError as error:
            if "sample logprobs" not in str(error):
                raise
            raise RolloutError(
                f"vLLM's server {self.url} does not tell the {params['logprobs']} likeliest tokens that a cut support needs; "
                f"start it with `grpo-fast serve`, or with --max-logprobs {params['logprobs']}"
            ) from error
        return [
            Sample(
                tuple(choice["token_ids"]),
                tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
                str(choice["finish_reason"]),
                token_versions((span["version"], span["start"], span["end"]) for span in choice["weight_versions"] or ()),
                *(_kept(choice["logprobs"]["content"]) if params.get("logprobs") else ()),
            )
            for choice in sorted(choices, key=lambda choice: int(choice["index"]))
        ]

    def answer(self, prompt: Sequence[int]) -> Choices:
        """Log-probabilities of what comes after a prompt of the probe."""
        [choice] = self._generate(list(prompt), PROBE_PARAMS)["choices"]
        [entry] = choice["logprobs"]["content"]
        return {told["token_id"]: told["logprob"] for told in entry["top_logprobs"]}

    def score(self, prompt: Sequence[int]) -> list[Choices]:
        """The same of a prompt and of all of it but its last token, computed without the prefix cache."""
        entries = self._generate([*prompt, prompt[0]], SCORE_PARAMS)["prompt_logprobs"][: len(prompt) - 2 : -1]
        return [{int(token): told["logprob"] for token, told in entry.items()} for entry in entries]

    def _generate(self, token_ids: list[int], params: dict[str, Any]) -> Any:
        answered_by = {} if self.adapter is None else {"model": self.adapter}
        body = {"token_ids": token_ids, "sampling_params": params} | answered_by
        return json.loads(self.call("POST", "/inference/v1/generate", body, may_hang_up=True))

    def load_adapter(self, adapter: AdapterVersion) -> None:
        """Has the server read a LoRA adapter; requests are answered with it from then on.

        Raises:
            RolloutError: it cannot, for want of room, or because it was not started to.
        """
        try:
            self.call("POST", "/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": str(adapter.path)})
        except RolloutError as error:
            if '"Not Found"' not in str(error):  # there is no such route; a file that is not there is told in other words
                raise
            raise RolloutError(
                f"vLLM's server {self.url} takes no adapters; start it with `grpo-fast serve --max-lora-rank`, at least lora_r"
            ) from error
        self.adapter = adapter.name


class HTTPVLLM:
    """Implements :class:`~grpo_fast.rollout.weight_sync.SyncTarget` over servers that take the same weights.

    Args:
        policy: whose weights are sent.
        dtype: what the servers compute in.
        delivery: how weights come; the servers must have been started for its transport.
        urls: of the servers.
        deadline_s: longest time of one request. ``VLLM_API_KEY`` is read from the environment, as vLLM's server does.

    Raises:
        ValueError: a server that is not on this machine.
        RolloutError: a server cannot be reached.
    """

    telling = OVER_HTTP

    def __init__(
        self,
        policy: torch.nn.Module,
        *,
        dtype: torch.dtype,
        delivery: Delivery,
        urls: Sequence[str],
        deadline_s: float,
    ) -> None:
        key = os.environ.get("VLLM_API_KEY")
        self.servers = [VLLMServer(url, api_key=key, deadline_s=deadline_s) for url in urls]
        self._weights = PolicyWeights(policy, dtype)
        self._delivery = delivery
        self._sender: WeightSender | None = None
        self._sleeper = Sleeper(
            lambda level: self.everywhere(lambda server: server.post(f"/sleep?level={level}&mode=wait")),
            lambda part: self.everywhere(lambda server: server.post(f"/wake_up?tags={part}")),
        )
        self._requests = ThreadPoolExecutor(_CONCURRENT_REQUESTS, thread_name_prefix="vLLM request")
        # Threads of their own: a sync that keeps requests would wait for ever behind those that it keeps.
        self._control = ThreadPoolExecutor(len(self.servers), thread_name_prefix="vLLM control")
        self.context_length = min(self.everywhere(lambda server: server.context_length))
        """Longest sequence that every server takes, in tokens."""
        self.block_size = max(self.everywhere(lambda server: server.block_size))
        """Tokens of the largest block of a prefix cache."""

    def everywhere(self, ask: Callable[[VLLMServer], _T]) -> list[_T]:
        """Asks all servers at once; raises what the first that failed raised."""
        return list(self._control.map(ask, self.servers))

    def sample(self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[list[Sample]]:
        """Runs requests to their end, up to 64 prompts at a time.

        Raises:
            RolloutError: a server is gone, or did not answer in time; all requests that run on any are ended.
        """
        requests = [
            self._requests.submit(self.servers[number % len(self.servers)].sample, prompt, each)
            for number, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        try:
            done, _ = wait(requests, return_when=FIRST_EXCEPTION)
            for request in done:
                request.result()
            return [request.result() for request in requests]
        except BaseException:
            for request in requests:
                request.cancel()
            end = time.monotonic() + _HANG_UP_S
            while wait(requests, timeout=0.05).not_done and time.monotonic() < end:  # some may only be about to connect
                for server in self.servers:
                    server.hang_up()
            raise

    def close(self) -> None:
        """Lets go of the servers, which run on; requests that run are ended, and those that a sync kept."""
        self._sender = None
        for server in self.servers:
            server.hang_up()
        if self._delivery.pause_mode == "keep":
            for server in self.servers:
                with contextlib.suppress(RolloutError):
                    server.post("/pause?mode=abort&clear_cache=false")
                    server.post("/resume")
        for pool in (self._requests, self._control):
            pool.shutdown(wait=False, cancel_futures=True)

    def pause(self) -> None:
        """Lets running requests end, or keeps them, and holds new ones up; the cache is reset in a phase of its own."""
        self.everywhere(lambda server: server.post(f"/pause?mode={self._delivery.pause_mode}&clear_cache=false"))

    def resume(self) -> None:
        """Lets requests run again."""
        self.everywhere(lambda server: server.post("/resume"))

    def require_sleep_mode(self) -> None:
        """Checks that every server was started so that its memory can be taken back.

        Raises:
            RolloutError: one was not; told to sleep it would keep all.
        """
        for server in self.servers:
            if not server.get("/server_info?config_format=json")["vllm_config"]["model_config"]["enable_sleep_mode"]:
                raise RolloutError(
                    f"vLLM's server {server.url} cannot sleep; start it with `grpo-fast serve --enable-sleep-mode`"
                )

    def sleep(self, level: int) -> None:
        """Puts every server to sleep, at vLLM's level, when its requests have ended."""
        self._sleeper.sleep(level)

    def wake(self, part: Part) -> None:
        """Wakes a part of every server's memory, where they sleep."""
        self._sleeper.wake(part)

    def send(self) -> int:
        """Sends all weights to all servers at once; returns how many bytes went over."""
        if self._sender is None:
            self._sender = WeightSender(
                self._delivery.transport,
                client=_Client(self),
                source=self._weights,
                bucket_bytes=self._delivery.bucket_bytes,
                num_workers=sum(self.everywhere(lambda server: int(server.get("/get_world_size")["world_size"]))),
            )
        return self._sender.send_weights()

    def finish(self, version: int) -> None:
        """Puts them in force."""
        self.everywhere(lambda server: server.post("/finish_weight_update", {"weight_version": str(version)}))

    def weight_version(self) -> int | None:
        """The version in force on every server; ``None`` where they differ, or before the first."""
        versions = set(self.everywhere(lambda server: str(server.get("/weight_info")["weight_version"])))
        version = versions.pop()
        return None if versions or not version.isdecimal() else int(version)

    def announce(self, version: int) -> None:
        """Gives what is in force a version's number."""
        self.everywhere(lambda server: server.call("POST", "/update_weight_version", {"new_version": str(version)}))

    def load_adapter(self, adapter: AdapterVersion) -> None:
        """Has every server read a LoRA adapter."""
        self.everywhere(lambda server: server.load_adapter(adapter))

    def unload_adapter(self, adapter: AdapterVersion) -> None:
        """Has every server forget one; a server that was started again never knew it."""
        for server in self.servers:
            with contextlib.suppress(RolloutError):
                server.call("POST", "/v1/unload_lora_adapter", {"lora_name": adapter.name})

    def undo(self) -> None:
        """Leaves an update that began: one that a worker cannot read ends it, by vLLM's own rule.

        The file is made anew for the next: a server that was started again has not opened this one.
        """
        self._sender = None
        for server in self.servers:
            with contextlib.suppress(RolloutError):
                server.post("/update_weights", {"update_info": {"undo": True}})

    def reset_prefix_cache(self) -> bool:
        """Forgets cached keys and values on every server, those of requests that are kept too: they are computed anew."""
        running = str(self._delivery.pause_mode == "keep").lower()
        path = f"/reset_prefix_cache?reset_running_requests={running}"
        return all(self.everywhere(lambda server: bool(server.post(path)["success"])))

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[Choices]]:
        """What every server says comes next: of one prompt after the other."""
        return self.everywhere(lambda server: [server.answer(prompt) for prompt in prompts])

    def score(self, prompt: Sequence[int]) -> list[list[Choices]]:
        """The same of a prompt and of all of it but its last token, computed without the prefix cache."""
        return self.everywhere(lambda server: server.score(prompt))


def _kept(content: list[dict[str, Any]]) -> tuple[KeptTokens, tuple[int, ...]]:
    sizes = [1 + len(entry["top_logprobs"]) for entry in content]
    told = [each for entry in content for each in (entry, *entry["top_logprobs"])]
    firsts = [0, *itertools.accumulate(sizes[:-1])] if sizes else []
    return kept_tokens([each["token_id"] for each in told], [each["logprob"] for each in told], firsts, sizes)


class _Client:
    """vLLM's protocol of a weight sync client, for all servers as one."""

    def __init__(self, target: HTTPVLLM) -> None:
        self._target = target

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._target.everywhere(lambda server: server.post("/init_weight_transfer_engine", {"init_info": init_info}))

    def start_weight_update(self) -> None:
        self._target.everywhere(lambda server: server.post("/start_weight_update"))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        body = {"update_info": json_safe(update_info)}
        self._target.everywhere(lambda server: server.post("/update_weights", body))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Does nothing: the sync finishes in a phase of its own, under the version's number."""
