"""vLLM servers: what the weight sync asks of all of them.

All servers get the same weights, through one shared file or copies of it (:mod:`~grpo_fast.rollout.vllm_copies`).
:mod:`~grpo_fast.rollout.vllm_requests` deals out the prompts. The routes that change weights are vLLM's own for training; they
know no API key, which is why servers listen on the loopback interface, and those of other machines are reached by ssh.

Importing this imports vLLM; :mod:`~grpo_fast.rollout.vllm_engine` does so when an engine is built.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from grpo_fast.rollout.engine import RolloutError
from grpo_fast.rollout.sync_probe import Choices
from grpo_fast.rollout.transports import Delivery
from grpo_fast.rollout.vllm_adapters import AdapterVersion
from grpo_fast.rollout.vllm_addresses import api_key
from grpo_fast.rollout.vllm_client import VLLMServer
from grpo_fast.rollout.vllm_copies import AdapterCopies, Copies
from grpo_fast.rollout.vllm_layerwise import PolicyWeights
from grpo_fast.rollout.vllm_needs import Needs
from grpo_fast.rollout.vllm_requests import Requests
from grpo_fast.rollout.vllm_sample import OVER_HTTP, Sample, version_name, version_number
from grpo_fast.rollout.vllm_senders import WeightSender, json_safe
from grpo_fast.rollout.vllm_sleep import Part, Sleeper
from grpo_fast.rollout.vllm_watch import LATER, Setting

_T = TypeVar("_T")
_HANG_UP_S = 10.0


class HTTPVLLM:
    """Implements :class:`~grpo_fast.rollout.weight_sync.SyncTarget` over servers that take the same weights.

    Args:
        policy: whose weights are sent.
        dtype: what the servers compute in.
        device: where weights are brought before they are sent: shards may lie in the host's memory.
        delivery: how weights come; the servers must have been started for its transport.
        urls: of the servers.
        deadlines: longest times of one prompt's completions and of a phase of the sync, in seconds.

    Raises:
        ValueError: an address that is none, or a key that no request can carry.
        RolloutError: a server cannot be reached.
    """

    telling = OVER_HTTP

    def __init__(
        self,
        policy: torch.nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device,
        delivery: Delivery,
        urls: Sequence[str],
        deadlines: Mapping[Setting, float],
    ) -> None:
        key, self._run_name = api_key(), uuid.uuid4().hex
        longest = {
            "deadline_s": deadlines["request_deadline_s"],
            "control_deadline_s": LATER * deadlines["sync_deadline_s"],
        }
        self.servers = [VLLMServer(url, api_key=key, run=self._run_name, **longest) for url in urls]
        self._weights = PolicyWeights(policy, dtype, device)
        self._delivery = delivery
        self._sender: WeightSender | None = None
        self._needs: Needs | None = None
        self._is_in_doubt = False
        self._adapters = AdapterCopies()
        self._sleeper = Sleeper(
            lambda level: self.everywhere(lambda server: server.post(f"/sleep?level={level}&mode=wait")),
            lambda part: self.everywhere(lambda server: server.post(f"/wake_up?tags={part}")),
        )
        self._requests = Requests(self.servers)
        # Threads of their own: a sync that keeps requests would wait for ever behind those that it keeps.
        self._control = ThreadPoolExecutor(len(self.servers), thread_name_prefix="vLLM control")
        try:
            self.context_length = min(self.everywhere(lambda server: server.context_length))
            """Longest sequence that every server takes, in tokens."""
            self.block_size = max(self.everywhere(lambda server: server.block_size))
            """Tokens of the largest block of a prefix cache."""
        except BaseException:
            for server in self.servers:
                server.close()
            raise

    def everywhere(self, ask: Callable[[VLLMServer], _T]) -> list[_T]:
        """Asks all servers at once; raises what the first that failed raised."""
        return list(self._control.map(ask, self.servers))

    def sample(self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[list[Sample]]:
        """Runs requests to their end; see :meth:`~grpo_fast.rollout.vllm_requests.Requests.sample`."""
        return self._requests.sample(prompts, params)

    def close(self, adapter: AdapterVersion | None = None) -> None:
        """Lets go of the servers, which run on; requests that run are ended, and those that a sync kept.

        They forget the adapter. One that hangs is not waited for.
        """
        self._sender = None
        self._requests.end()

        def leave(server: VLLMServer) -> None:
            if self._delivery.pause_mode == "keep":
                server.post("/pause?mode=abort&clear_cache=false")
                server.post("/resume")
            if adapter is not None:
                self._forget(server, adapter)

        leaving = ThreadPoolExecutor(len(self.servers), thread_name_prefix="vLLM end")  # the others may all hang
        wait([leaving.submit(leave, server) for server in self.servers], timeout=_HANG_UP_S)
        for server in self.servers:
            server.close()
        self._requests.close()
        for pool in (self._control, leaving):
            pool.shutdown(wait=False, cancel_futures=True)

    def waits_for(self) -> str:
        """The servers that have not answered a request of the sync yet, and how much went over to each."""
        return " and ".join(f"vLLM's server {server.url}{server.told_sent}" for server in self.servers if server.owes_answer)

    def pause(self) -> None:
        """Lets running requests end, or keeps them, and holds new ones up; the cache is reset in a phase of its own."""
        for server in self.servers:
            server.sent_bytes = 0
        self.everywhere(lambda server: server.post(f"/pause?mode={self._delivery.pause_mode}&clear_cache=false"))

    def resume(self) -> None:
        """Lets requests run again."""
        self.everywhere(lambda server: server.post("/resume"))

    def check(self, needs: Needs) -> None:
        """Checks that every server was started as the trainer needs it, and is no other one by another name.

        One that another trainer left asleep is woken by the next sync.

        Raises:
            RolloutError: one was not, or is.
        """
        self._check_settings(needs)
        self._needs = needs
        self._tell_apart()
        if any(self.everywhere(lambda server: bool(server.get("/is_sleeping")["is_sleeping"]))):
            self._sleeper.found_asleep()

    def _check_settings(self, needs: Needs) -> None:
        self.everywhere(lambda server: server.check(needs))

    def _tell_apart(self) -> None:
        """Each server in turn calls its weights by a name of its own, which the others must not know then."""
        seen: dict[str, VLLMServer] = {}
        for number, server in enumerate(self.servers if len(self.servers) > 1 else []):
            found = str(server.get("/weight_info")["weight_version"])
            if found in seen:
                raise RolloutError(f"{seen[found].url} and {server.url} lead to the same server; name each once")
            name = f"server {number}@{self._run_name}"
            server.call("POST", "/update_weight_version", {"new_version": name})
            seen[name] = server

    def check_decoding(self, token_ids: Sequence[int], text: str) -> None:
        """Checks that every server's tokeniser makes this text of tokens: it is what finds stop strings.

        Raises:
            RolloutError: one makes another.
        """
        for server, found in zip(self.servers, self.everywhere(lambda server: server.decode(token_ids)), strict=True):
            if found != text:
                raise RolloutError(
                    f"vLLM's server {server.url} has another tokeniser than the policy, and would look for stop strings in "
                    f"other text ({found[:40]!r} instead of {text[:40]!r}); start it with the policy's model or --tokenizer"
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
            if self._is_in_doubt and self._needs is not None:  # one may run anew, and otherwise, which no probe needs to show
                self._check_settings(self._needs)
            self._is_in_doubt = False
            self._sender = WeightSender(
                self._delivery.transport,
                client=_Client(self),
                source=self._weights,
                bucket_bytes=self._delivery.bucket_bytes,
                machine=self.servers[0].machine,
                num_workers=sum(self.everywhere(lambda server: int(server.get("/get_world_size")["world_size"]))),
            )
        return self._sender.send_weights()

    def finish(self, version: int) -> None:
        """Puts them in force."""
        name = version_name(version, self._run_name)
        self.everywhere(lambda server: server.post("/finish_weight_update", {"weight_version": name}))
        if self._sender is not None:
            self._sender.release()

    def weight_version(self) -> int | None:
        """The version in force on every server; ``None`` where they differ, or hold no weights of this run."""
        names = set(self.everywhere(lambda server: str(server.get("/weight_info")["weight_version"])))
        name = names.pop()
        return None if names else version_number(name, self._run_name)

    def announce(self, version: int) -> None:
        """Gives what is in force a version's number."""
        name = version_name(version, self._run_name)
        self.everywhere(lambda server: server.call("POST", "/update_weight_version", {"new_version": name}))

    def load_adapter(self, adapter: AdapterVersion) -> None:
        """Has every server read a LoRA adapter; copies that were made for one that does not are removed."""
        try:
            self.everywhere(lambda server: server.load_adapter(self._adapters.bring(server, adapter)))
        except BaseException:
            for server in self.servers:
                with contextlib.suppress(RolloutError):
                    self._adapters.remove(server, adapter)
            raise

    def unload_adapter(self, adapter: AdapterVersion) -> None:
        """Has every server forget one; a server that was started again never knew it."""
        for server in self.servers:
            with contextlib.suppress(RolloutError):
                self._forget(server, adapter)

    def _forget(self, server: VLLMServer, adapter: AdapterVersion) -> None:
        try:
            server.unload_adapter(adapter)
        finally:
            self._adapters.remove(server, adapter)

    def undo(self) -> None:
        """Leaves an update that began: one that a worker cannot read ends it, by vLLM's own rule.

        The file is made anew for the next: a server that was started again has not opened this one.
        """
        self._sender, self._is_in_doubt = None, True
        for server in self.servers:
            with contextlib.suppress(RolloutError):
                server.post("/update_weights", {"update_info": {"undo": True}})

    def reset_prefix_cache(self) -> bool:
        """Forgets cached keys and values on every server, those of requests that are kept too: they are computed anew."""
        running = str(self._delivery.pause_mode == "keep").lower()
        path = f"/reset_prefix_cache?reset_running_requests={running}"
        return all(self.everywhere(lambda server: bool(server.post(path)["success"])))

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[Choices]]:
        """Every server's log-probabilities of the next token, for one prompt after the other."""
        return self.everywhere(lambda server: [server.answer(prompt) for prompt in prompts])

    def score(self, prompt: Sequence[int]) -> list[list[Choices]]:
        """The same of a prompt and of all of it but its last token, computed without the prefix cache."""
        return self.everywhere(lambda server: server.score(prompt))


class _Client:
    """vLLM's protocol of a weight sync client, for all servers as one."""

    def __init__(self, target: HTTPVLLM) -> None:
        self._target = target
        self._copies: Copies | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if "path" in init_info:
            self._copies = Copies(self._target.servers, init_info["path"], init_info["num_bytes"])

        def start(server: VLLMServer) -> None:
            server.post("/init_weight_transfer_engine", {"init_info": self._as_seen(server, init_info)})

        self._target.everywhere(start)

    def bring(self, place: int, num_bytes: int) -> None:
        """Brings a part of the shared file to the servers that do not see it."""
        copies = self._copies
        assert copies is not None
        self._target.everywhere(lambda server: copies.bring(server, place, num_bytes))

    def _as_seen(self, server: VLLMServer, info: dict[str, Any]) -> dict[str, Any]:
        return info if self._copies is None else info | {"path": self._copies.path(server)}

    def start_weight_update(self) -> None:
        self._target.everywhere(lambda server: server.post("/start_weight_update"))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = json_safe(update_info)
        self._target.everywhere(lambda server: server.post("/update_weights", {"update_info": self._as_seen(server, info)}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Does nothing: the sync finishes in a phase of its own, under the version's number."""
