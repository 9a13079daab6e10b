"""One vLLM server as the trainer speaks to it: requests with deadlines that can be ended, and how it must be started.

Nothing here imports vLLM.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import logging
import re
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rollout.engine import RolloutError
from grpo_fast.rollout.model_sizes import differences, served_sizes
from grpo_fast.rollout.ssh_tunnel import Tunnel, is_hung_up
from grpo_fast.rollout.sync_probe import Choices
from grpo_fast.rollout.vllm_adapters import AdapterVersion
from grpo_fast.rollout.vllm_addresses import api_key, server_address
from grpo_fast.rollout.vllm_needs import Needs, misfits
from grpo_fast.rollout.vllm_sample import PROBE_PARAMS, SCORE_PARAMS, Sample, kept_tokens, token_versions

_log = logging.getLogger(__name__)
_GENERATE = "/inference/v1/generate"
_LOOK_S = 2.0
_POLL_S = 1.0
_TELL_S = 30.0
_BUSY = frozenset({http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE})
"""What a server, or a proxy before it, answers while it starts, scales or has too much to do: nothing was done."""
_REST_S, _LONGEST_REST_S = 0.25, 5.0
_PART_BYTES = 2**20
_HINTS = {
    401: "set VLLM_API_KEY to the key that it was started with",
    403: "start it with `grpo-fast serve`, or with --enable-scale-out",
}


Method = Literal["GET", "POST", "PUT", "DELETE"]
"""Of HTTP."""


class Calls:
    """Requests that run and can be ended together; one that begins afterwards ends at once."""

    def __init__(self) -> None:
        self._connections: set[http.client.HTTPConnection] = set()
        self.ended = threading.Event()
        """Whether all were ended."""

    def open(self, connection: http.client.HTTPConnection) -> None:
        """Connects, so that :meth:`end` reaches it.

        Raises:
            ConnectionAbortedError: all were ended.
            OSError: nothing listens there.
        """
        self._connections.add(connection)
        connection.connect()
        if self.ended.is_set():  # asked after the socket is there: whoever ended them since has seen it
            raise ConnectionAbortedError

    def drop(self, connection: http.client.HTTPConnection) -> None:
        """Forgets a connection and closes it."""
        self._connections.discard(connection)
        connection.close()

    @property
    def are_running(self) -> bool:
        """Whether any is not answered yet."""
        return bool(self._connections)

    def end(self) -> None:
        """Ends all: vLLM drops requests whose client is gone, and whoever waits for one is told so."""
        self.ended.set()
        for connection in list(self._connections):
            with contextlib.suppress(OSError, AttributeError):  # it has just ended by itself, or has no socket yet
                connection.sock.shutdown(socket.SHUT_RDWR)


class VLLMServer:
    """One server.

    Args:
        url: where it listens, on this machine or, by ``ssh://``, on another.
        api_key: what it demands of requests, from :func:`api_key`; ``None`` where it demands nothing.
        deadline_s: longest time of one request for completions.
        control_deadline_s: longest time of any other; ``None`` is the same.
        run: name of the run whose weights it is given; see :func:`~grpo_fast.rollout.vllm_sample.version_name`.

    Raises:
        ValueError: the URL is not that of a server.
    """

    def __init__(
        self, url: str, *, api_key: str | None, deadline_s: float, control_deadline_s: float | None = None, run: str = ""
    ) -> None:
        self._host, self._port, machine = server_address(url)
        self._tunnel = None if machine is None else Tunnel(machine, self._port)
        self.url = url
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._deadline_s = deadline_s
        self._control_deadline_s = deadline_s if control_deadline_s is None else control_deadline_s
        self._run = run
        self._control = Calls()
        self._has_answered = self._busy_told = False
        self._looking = threading.Lock()
        self._next_look = 0.0
        self.adapter: str | None = None
        """Name of the LoRA adapter that answers requests; ``None`` for the model as it is."""
        self.sent_bytes = 0
        """Bytes that were put; whoever counts them sets it back."""

    @property
    def machine(self) -> str | None:
        """What ``ssh`` calls the machine where it runs; ``None`` for this one."""
        return None if self._tunnel is None else self._tunnel.host

    def call(self, method: Method, path: str, body: Any = None, *, calls: Calls | None = None) -> str:
        """Sends one request, again and again within its deadline where the server is busy.

        Args:
            method: of HTTP.
            path: with its query.
            body: sent as JSON, or as it is if it is bytes.
            calls: with which the request for completions may be ended; without it, :meth:`close` may.

        Returns:
            The body of the answer.

        Raises:
            RolloutError: the server cannot be reached, does not answer in time, or answers with an error.
        """
        deadline_s, setting = (
            (self._control_deadline_s, "sync_deadline_s") if calls is None else (self._deadline_s, "request_deadline_s")
        )
        port = self._port if self._tunnel is None else self._tunnel.open()
        connection = http.client.HTTPConnection(self._host, port, timeout=deadline_s)
        calls, until, rest_s = calls or self._control, time.monotonic() + deadline_s, _REST_S
        try:
            while True:
                status, text = self._tried(connection, method, path, body, calls=calls, until=until)
                if status not in _BUSY:
                    break
                if not self._busy_told:
                    self._busy_told = True
                    _log.warning("vLLM's server %s is busy (status %d at %s) and is asked again", self.url, status, path)
                if time.monotonic() + rest_s >= until:
                    busy = f"was too busy for {path} for {deadline_s:g} s ({setting}), with status {status}: {text[:300]}"
                    raise RolloutError(f"vLLM's server {self.url} {busy}")
                calls.ended.wait(rest_s)
                rest_s = min(2 * rest_s, _LONGEST_REST_S)
        except TimeoutError:
            raise RolloutError(f"vLLM's server {self.url} did not answer {path} within {deadline_s:g} s ({setting})") from None
        except (OSError, http.client.HTTPException) as error:
            if self._tunnel is not None and (words := self._tunnel.why_ended()):
                raise RolloutError(f"the ssh connection to vLLM's server {self.url} has ended: {words}") from error
            if self._tunnel is not None and self._tunnel.is_forbidden:
                raise RolloutError(
                    f"{self._tunnel.host} lets ssh log in, but forbids it to lead to a port (administratively prohibited), "
                    f"so vLLM's server {self.url} cannot be reached; its sshd must allow it to this key (AllowTcpForwarding)"
                ) from None
            state, again = ("is gone", "restart it") if self._has_answered else ("cannot be reached", "start it")
            raise RolloutError(
                f"vLLM's server {self.url} {state} ({type(error).__name__} at {path}); {again} with `grpo-fast serve`"
            ) from error
        finally:
            calls.drop(connection)
        if status != http.client.OK:
            hint = f"; {_HINTS[status]}" if status in _HINTS else ""
            raise RolloutError(f"vLLM's server {self.url} refused {path} with status {status}: {text[:300]}{hint}")
        return text

    def _tried(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any, *, calls: Calls, until: float
    ) -> tuple[int, str]:
        """Sends a request once; returns the status and the body of the answer."""
        connection.close()
        calls.open(connection)
        if isinstance(body, (bytes, memoryview)):
            connection.request(method, path, self._parts(body), self._headers | {"Content-Length": str(len(body))})
        else:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
        self._await_answer(connection.sock, until)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        self._has_answered = True
        return answer.status, text

    def _parts(self, data: bytes | memoryview) -> Iterator[memoryview]:
        """In parts, so that it is known how far a slow link has come."""
        whole = memoryview(data)
        for first in range(0, len(whole), _PART_BYTES):
            part = whole[first : first + _PART_BYTES]
            yield part
            self.sent_bytes += len(part)

    @property
    def told_sent(self) -> str:
        """What went over to it and can be done about it, for an error; empty where nothing was put."""
        sent = f"{self.sent_bytes / 1e6:.1f} MB went over; raise sync_deadline_s if only its link is slow"
        return f" ({sent})" if self.sent_bytes else ""

    def _await_answer(self, connection: socket.socket, until: float) -> None:
        """Waits as long as the server listens: one whose engine has died ends, and owes answers for ever (vLLM 0.32).

        Raises:
            TimeoutError: there is no answer in time.
            ConnectionRefusedError: the server takes no connections any more.
        """
        ready = select.poll()
        ready.register(connection, select.POLLIN)
        while not ready.poll(1000 * max(0.0, min(_LOOK_S, until - time.monotonic()))):
            if time.monotonic() >= until:
                raise TimeoutError
            if self._looking.acquire(blocking=False):  # one look serves all requests that wait
                try:
                    if time.monotonic() >= self._next_look:
                        self._next_look = time.monotonic() + _LOOK_S
                        self._look(connection)
                finally:
                    self._looking.release()

    def _look(self, waiting: socket.socket) -> None:
        try:
            probe = socket.create_connection(waiting.getpeername()[:2], timeout=_LOOK_S)
        except ConnectionRefusedError:
            raise
        except OSError:  # says nothing of the server, or that it is slow
            return
        with probe:
            if self._tunnel is not None and is_hung_up(probe, beside=waiting):
                raise ConnectionRefusedError

    def close(self) -> None:
        """Ends whatever request still runs but those for completions, and the way to the server; no further one is sent."""
        self._control.end()
        if self._tunnel is not None:
            self._tunnel.close()

    @property
    def owes_answer(self) -> bool:
        """Whether a request runs that is none for completions."""
        return self._control.are_running

    def post(self, path: str, body: Any = None, *, calls: Calls | None = None) -> Any:
        """Posts ``body`` as JSON and returns what the answer's JSON holds."""
        return self._parsed(path, self.call("POST", path, body, calls=calls))

    def put(self, path: str, data: bytes | memoryview) -> Any:
        """Puts bytes and returns what the answer's JSON holds."""
        return self._parsed(path, self.call("PUT", path, data))

    def get(self, path: str) -> Any:
        """Gets a path and returns what its JSON holds."""
        return self._parsed(path, self.call("GET", path))

    def _parsed(self, path: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise self._stranger(path, text) from None

    def _stranger(self, path: str, text: str) -> RolloutError:
        return RolloutError(
            f"what listens at {self.url} is not vLLM's server: it answers {path} with {text[:80]!r}; check the port"
        )

    @property
    def context_length(self) -> int:
        """Longest sequence, in tokens."""
        told = self.get("/v1/models")
        try:
            return int(told["data"][0]["max_model_len"])
        except (LookupError, TypeError, ValueError):
            raise self._stranger("/v1/models", json.dumps(told)) from None

    @property
    def block_size(self) -> int:
        """Tokens of a block of the prefix cache."""
        found = re.search(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"', self.call("GET", "/metrics"))
        if found is None:
            raise RolloutError(
                f"vLLM's server {self.url} does not report its cache's block size at /metrics; start it with `grpo-fast serve`"
            )
        return int(found[1])

    def check(self, needs: Needs) -> None:
        """Checks that the server was started as the trainer needs it.

        Raises:
            RolloutError: it was not; every difference is named, with the option that fixes it.
        """
        try:
            settings = self.get("/server_info?config_format=json")["vllm_config"]
        except RolloutError as error:
            if '"Not Found"' not in str(error):
                raise
            raise RolloutError(
                f"vLLM's server {self.url} has no routes that receive weights; start it with `grpo-fast serve`, or with "
                "VLLM_SERVER_DEV_MODE=1"
            ) from error
        problems = misfits(settings, self.get("/version")["version"], needs)
        if other := differences(served_sizes(settings["model_config"]), needs.sizes):
            problems.insert(0, f"it has another model than the policy ({other}); start it with the policy's")
        if problems:
            raise RolloutError(f"vLLM's server {self.url} cannot be used for training: {'; '.join(problems)}")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that the server's tokeniser makes of tokens."""
        return str(self.post("/detokenize", {"tokens": list(token_ids)})["prompt"])

    def sample(self, prompt: Sequence[int], params: dict[str, Any], calls: Calls) -> list[Sample]:
        """Runs one request to its end.

        Raises:
            RolloutError: the request failed, or another run's weights sampled.
        """
        try:
            choices = self._generate(list(prompt), {"logprobs": 0} | params, calls)["choices"]
        except RolloutError as error:
            if f"The model `{self.adapter}` does not exist" in str(error):
                raise self._not_synced("no longer has the adapters of the last sync") from error
            if "sample logprobs" not in str(error):
                raise
            raise RolloutError(
                f"vLLM's server {self.url} returns fewer than the {params['logprobs']} log-probabilities per token that top_p, "
                f"top_k or min_p need; start it with `grpo-fast serve`, or with --max-logprobs {params['logprobs']}"
            ) from error
        return [
            Sample(
                tuple(choice["token_ids"]),
                tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
                str(choice["finish_reason"]),
                self._versions(choice["weight_versions"] or ()),
                *(_kept(choice["logprobs"]["content"]) if params.get("logprobs") else ()),
            )
            for choice in sorted(choices, key=lambda choice: int(choice["index"]))
        ]

    def _versions(self, spans: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        found = token_versions(((span["version"], span["start"], span["end"]) for span in spans), self._run)
        if spans and not found:
            raise self._not_synced("sampled from weights that this run did not send")
        return found

    def _not_synced(self, what: str) -> RolloutError:
        return RolloutError(
            f"vLLM's server {self.url} {what}: it was restarted after the last sync, or another run uses it too; give each run "
            "its own servers"
        )

    def answer(self, prompt: Sequence[int]) -> Choices:
        """Log-probabilities of what comes after a prompt of the probe."""
        [choice] = self._generate(list(prompt), PROBE_PARAMS)["choices"]
        [entry] = choice["logprobs"]["content"]
        return {told["token_id"]: told["logprob"] for told in entry["top_logprobs"]}

    def score(self, prompt: Sequence[int]) -> list[Choices]:
        """The same of a prompt and of all of it but its last token, computed without the prefix cache."""
        entries = self._generate([*prompt, prompt[0]], SCORE_PARAMS)["prompt_logprobs"][: len(prompt) - 2 : -1]
        return [{int(token): told["logprob"] for token, told in entry.items()} for entry in entries]

    def _generate(self, token_ids: list[int], params: dict[str, Any], calls: Calls | None = None) -> Any:
        answered_by = {} if self.adapter is None else {"model": self.adapter}
        return self.post(_GENERATE, {"token_ids": token_ids, "sampling_params": params} | answered_by, calls=calls)

    def load_adapter(self, adapter: AdapterVersion) -> None:
        """Makes the server load a LoRA adapter and answer requests with it from then on.

        Raises:
            RolloutError: it cannot, because it has no room for it or was not started with adapters enabled.
        """
        try:
            self.call("POST", "/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": str(adapter.path)})
        except RolloutError as error:
            if '"Not Found"' not in str(error):  # there is no such route; a file that is not there is told in other words
                raise
            raise RolloutError(
                f"vLLM's server {self.url} accepts no adapters; start it with `grpo-fast serve --max-lora-rank N`, N >= lora_r"
            ) from error
        self.adapter = adapter.name

    def unload_adapter(self, adapter: AdapterVersion) -> None:
        """Makes the server unload a LoRA adapter."""
        self.call("POST", "/v1/unload_lora_adapter", {"lora_name": adapter.name})


def wait_until_up(urls: Sequence[str], *, timeout_s: float, deadline_s: float) -> None:
    """Waits until all servers answer: one that is being started refuses connections until its model is loaded.

    Args:
        urls: of the servers.
        timeout_s: longest wait for all of them.
        deadline_s: longest time of an answer of one that takes connections.

    Raises:
        RolloutError: one still refuses them after ``timeout_s``, does not answer, or does not take the key.
    """
    begin = time.monotonic()
    tell = begin
    key = api_key()
    for url in urls:
        with contextlib.closing(VLLMServer(url, api_key=key, deadline_s=deadline_s)) as server:
            while True:
                try:
                    server.context_length  # noqa: B018 (an answer that only vLLM's server gives)
                    break
                except RolloutError as error:
                    if not isinstance(error.__cause__, ConnectionError):
                        raise
                    now = time.monotonic()
                    left = begin + timeout_s - now
                    if left <= 0:
                        raise RolloutError(
                            f"vLLM's server {url} was not up within {timeout_s:g} s (vllm_server_timeout); start it with "
                            "`grpo-fast serve`, or raise vllm_server_timeout if it needs longer"
                        ) from error
                if now >= tell:
                    _log.warning("waiting for vLLM's server %s: %.0f s left (vllm_server_timeout)", url, left)
                    tell = now + _TELL_S
                time.sleep(min(_POLL_S, left))


def _kept(content: list[dict[str, Any]]) -> tuple[KeptTokens, tuple[int, ...]]:
    sizes = [1 + len(entry["top_logprobs"]) for entry in content]
    told = [each for entry in content for each in (entry, *entry["top_logprobs"])]
    firsts = [0, *itertools.accumulate(sizes[:-1])] if sizes else []
    return kept_tokens([each["token_id"] for each in told], [each["logprob"] for each in told], firsts, sizes)
