"""A vLLM engine that this process owns: how it is built, and what the weight sync asks of it.

Importing this imports vLLM; :mod:`~grpo_fast.rollout.vllm_engine` does so when an engine is built.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import InvalidStateError
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np
import torch
from vllm import LLM
from vllm import SamplingParams as VLLMSamplingParams
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.envs import disable_envs_cache
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rollout.engine import RolloutError
from grpo_fast.rollout.sync_probe import Choices
from grpo_fast.rollout.transports import BACKENDS, Delivery
from grpo_fast.rollout.vllm_adapters import AdapterVersion
from grpo_fast.rollout.vllm_layerwise import PolicyWeights
from grpo_fast.rollout.vllm_sample import (
    IN_PROCESS,
    PROBE_PARAMS,
    SCORE_PARAMS,
    Sample,
    kept_tokens,
    token_versions,
    version_name,
    version_number,
)
from grpo_fast.rollout.vllm_senders import WeightSender, json_safe
from grpo_fast.rollout.vllm_sleep import Part, Sleeper
from grpo_fast.rollout.vllm_transport import register

_T = TypeVar("_T")
REQUEST_PARAMS: dict[str, Any] = {"logprobs": 0, "flat_logprobs": True}
"""What a request asks for where it says nothing else: the log-probability of each sampled token alone, in one list, not in an
object a token."""
_SHUTDOWN_S = 10.0


class InProcessVLLM:
    """Implements :class:`~grpo_fast.rollout.weight_sync.SyncTarget` over an ``LLM``.

    Args:
        policy: whose weights are sent.
        dtype: what the engine computes in.
        delivery: how weights come; a pause that waits refuses requests that run.
        own_process: whether the environment has vLLM put its engine into a process of its own.
        arguments: of ``LLM``, beside those that the sync needs.
    """

    telling = IN_PROCESS

    def __init__(
        self,
        policy: torch.nn.Module,
        *,
        dtype: torch.dtype,
        delivery: Delivery,
        own_process: bool,
        arguments: dict[str, Any],
    ) -> None:
        register()
        self._owns_groups = not own_process and not torch.distributed.is_initialized()
        self._weights = PolicyWeights(policy, dtype)
        self._delivery = delivery
        self._run_name = uuid.uuid4().hex
        self._turn = threading.Lock()
        """Held while the engine takes one step."""
        self._go = threading.Event()
        """Cleared while it may take none; a lock alone would be taken again by the thread that steps."""
        self._go.set()
        self._names = map(str, itertools.count())
        self._running: dict[str, Callable[[Any], Any]] = {}
        """Requests, with what reads vLLM's output of them."""
        self._finished: dict[str, Any] = {}
        """What came of requests that run no more: what was read, or the error that ended them."""
        self._cache_is_broken = False
        self._sender: WeightSender | None = None
        self._adapter: LoRARequest | None = None
        disable_envs_cache()  # with it an engine would run where the first one of this process did
        others = set(multiprocessing.active_children())
        self._llm = LLM(
            **arguments,
            dtype=str(dtype).removeprefix("torch."),
            load_format="dummy",
            weight_transfer_config={"backend": BACKENDS[delivery.transport]},
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,  # what a cut support keeps may be all
            enable_prefix_caching=True,
            # A step that is still under way when the next is planned would read weights that change between the two.
            **({"async_scheduling": False} if delivery.pause_mode == "keep" else {}),
        )
        self._sleeper = Sleeper(lambda level: self._llm.sleep(level=level), lambda part: self._llm.wake_up(tags=[part]))
        self._processes = set(multiprocessing.active_children()) - others
        if self._processes:
            watch = (self._processes, self._llm.llm_engine.engine_core)
            threading.Thread(target=_tell_of_death, args=watch, name="vLLM process watch", daemon=True).start()

    @property
    def block_size(self) -> int:
        """Tokens of a block of the prefix cache."""
        return int(self._llm.llm_engine.vllm_config.cache_config.block_size)

    @property
    def context_length(self) -> int:
        """Longest sequence, in tokens."""
        return int(self._llm.llm_engine.vllm_config.model_config.max_model_len)

    def sample(self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[list[Sample]]:
        """Runs requests to their end, all in one continuous batch.

        Args:
            prompts: token ids.
            params: of vLLM's ``SamplingParams``, one each; log-probabilities are always asked for.

        Raises:
            RolloutError: vLLM failed; none of its requests is left, and it can be asked anew.
        """
        return self._run(prompts, [VLLMSamplingParams(**REQUEST_PARAMS | each) for each in params], self._samples)

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[VLLMSamplingParams], read: Callable[[Any], _T]
    ) -> list[_T]:
        """Steps the engine until these requests are done; threads that do so at once serve each other's requests.

        ``LLM.generate`` would run to its end without a moment in which weights may change. What vLLM says is read as soon as it
        is whole: likeliest tokens in its lists take 24 times the memory that the kept ones of them do in an array.
        """
        names = list(itertools.islice(self._names, len(prompts)))
        with torch.random.fork_rng():  # vLLM draws from the global state before it puts the seeded draws in place
            with self._turn, self._dropped_if_broken():
                self._running |= dict.fromkeys(names, read)
                if self._cache_is_broken:
                    raise RuntimeError("after a failure before, its cache could not be emptied; sync its weights again")
                for name, prompt, each in zip(names, prompts, params, strict=True):
                    each.output_kind = RequestOutputKind.FINAL_ONLY
                    self._engine().add_request(name, tokens_input(list(prompt)), each, lora_request=self._adapter)
            while not self._running.keys().isdisjoint(names):
                self._go.wait()
                with self._turn, self._dropped_if_broken():
                    if self._go.is_set() and not self._running.keys().isdisjoint(names):
                        for output in self._engine().step():
                            if output.finished:
                                self._finished[output.request_id] = self._running[output.request_id](output)
                                del self._running[output.request_id]
        answers = [self._finished.pop(name) for name in names]
        for answer in answers:
            if isinstance(answer, RolloutError):
                raise RolloutError(str(answer)) from answer.__cause__
        return answers

    def _samples(self, output: Any) -> list[Sample]:
        """The completions of one request."""
        return [
            Sample(
                tuple(answer.token_ids),
                tuple(map(answer.logprobs.logprobs.__getitem__, answer.logprobs.start_indices)),
                str(answer.finish_reason),
                token_versions(((span.version, span.start, span.end) for span in answer.weight_versions or ()), self._run_name),
                *(_kept(answer.logprobs) if len(answer.logprobs.logprobs) > len(answer.token_ids) else ()),
            )
            for answer in output.outputs
        ]

    def _is_alive(self) -> bool:
        """Whether every process of the engine runs; vLLM (0.32) would wait for one that does not for ever."""
        # not by ``is_alive``, which errs where another thread asks for the exit code at that moment, as vLLM's does
        return not self._processes or not wait([process.sentinel for process in self._processes], timeout=0)

    def _engine(self) -> Any:
        if self._llm is None:
            raise RolloutError("the engine was closed while requests ran")
        if not self._is_alive():
            raise RolloutError("the engine's process has ended")
        return self._llm.llm_engine

    @contextlib.contextmanager
    def _dropped_if_broken(self) -> Iterator[None]:
        """Ends all requests where vLLM fails: it takes positions for computed, and caches them, before they are."""
        try:
            yield
        except BaseException as error:
            if self._llm is None:
                raise
            names = list(self._running)
            failed = RolloutError(
                f"vLLM broke off with {type(error).__name__}: {error}; its {len(names)} requests were dropped"
            )
            failed.__cause__ = error
            self._finished |= dict.fromkeys(names, failed)
            self._running.clear()
            self._cache_is_broken = True
            if self._is_alive():
                with contextlib.suppress(Exception):  # it may be dead all the same, or fail again
                    self._llm.llm_engine.abort_request(names)
                    self._cache_is_broken = not self._llm.reset_prefix_cache()
            if not isinstance(error, Exception):
                raise

    def close(self) -> None:
        """Ends the engine, between two steps, and frees its memory; requests that run fail."""
        self._go.clear()
        with self._turn:
            core = self._llm.llm_engine.engine_core
            core.shutdown()
            if self._processes:  # vLLM leaves its sockets to the collector
                core.output_queue_thread.join(_SHUTDOWN_S)
                core.ctx.destroy(linger=0)
            self._llm = self._sender = None
        self._go.set()
        if self._owns_groups:
            destroy_model_parallel()
            destroy_distributed_environment()
        gc.collect()

    def pause(self) -> None:
        """Checks that nothing runs, as nothing does between two calls of ``generate``; or lets no request take a step."""
        if self._delivery.pause_mode == "wait":
            if self._engine().has_unfinished_requests():
                raise RuntimeError("requests are running")
        else:
            self._go.clear()
            with self._turn:  # a step that is under way
                pass

    def resume(self) -> None:
        """Lets requests that were kept go on."""
        self._go.set()

    def sleep(self, level: int) -> None:
        """Puts the engine to sleep, at vLLM's level.

        Raises:
            RuntimeError: requests are running; vLLM would end them.
        """
        with self._turn:
            if self._engine().has_unfinished_requests():
                raise RuntimeError("requests are running")
            self._sleeper.sleep(level)

    def wake(self, part: Part) -> None:
        """Wakes a part of its memory, where it sleeps."""
        self._sleeper.wake(part)

    def send(self) -> int:
        """Gives the engine all weights; returns how many bytes went over."""
        if self._delivery.transport == "direct":
            self._llm.init_weight_transfer_engine({"init_info": {}})
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": {"weights": self._weights}})
            return self._weights.num_bytes
        if self._sender is None:
            self._sender = WeightSender(
                self._delivery.transport,
                client=_Client(self._llm),
                source=self._weights,
                bucket_bytes=self._delivery.bucket_bytes,
            )
        return self._sender.send_weights()

    def finish(self, version: int) -> None:
        """Puts them in force."""
        self._llm.finish_weight_update(version_name(version, self._run_name))

    def weight_version(self) -> int | None:
        """The version in force; ``None`` before the first."""
        return version_number(self._llm.get_weight_version(), self._run_name)

    def announce(self, version: int) -> None:
        """Gives what is in force a version's number."""
        self._llm.update_weight_version(version_name(version, self._run_name))

    def load_adapter(self, adapter: AdapterVersion) -> None:
        """Reads a LoRA adapter; requests are answered with it from then on."""
        request = LoRARequest(adapter.name, adapter.number, str(adapter.path))
        if not self._llm.llm_engine.add_lora(request):
            raise RuntimeError(f"vLLM did not take the adapter {adapter.name}")
        self._adapter = request

    def unload_adapter(self, adapter: AdapterVersion) -> None:
        """Forgets one."""
        self._llm.llm_engine.remove_lora(adapter.number)

    def undo(self) -> None:
        """Leaves an update that began: one that a worker cannot read ends it, by vLLM's own rule."""
        self._sender = None
        if not self._is_alive():
            return
        with contextlib.suppress(ValueError, RuntimeError):
            self._llm.update_weights({"update_info": {"undo": True}})

    def reset_prefix_cache(self) -> bool:
        """Forgets cached keys and values, those of requests that are kept too: they are computed anew."""
        done = bool(self._llm.reset_prefix_cache(reset_running_requests=self._delivery.pause_mode == "keep"))
        self._cache_is_broken = self._cache_is_broken and not done
        return done

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[Choices]]:
        """What comes next: of one prompt after the other, so that the second reads what the first left in the cache."""
        params = [VLLMSamplingParams(**PROBE_PARAMS)]
        return [[self._run([prompt], params, lambda output: _choices(output.outputs[0].logprobs[0]))[0] for prompt in prompts]]

    def score(self, prompt: Sequence[int]) -> list[list[Choices]]:
        """The same of a prompt and of all of it but its last token; a request for those of its prompt reads no cache."""

        def read(output: Any) -> list[Choices]:
            return [_choices(entry) for entry in output.prompt_logprobs[: len(prompt) - 2 : -1]]

        return self._run([[*prompt, prompt[0]]], [VLLMSamplingParams(**SCORE_PARAMS)], read)


def _tell_of_death(processes: Collection[BaseProcess], core: Any) -> None:
    """Wakes who waits for an answer of the engine when a process of it has ended; vLLM (0.32) lets them wait for ever."""
    wait([process.sentinel for process in processes])
    core.outputs_queue.put_nowait(EOFError("the engine's process has ended"))
    while not core.resources.engine_dead:  # until vLLM has seen it too, it lets more calls wait
        time.sleep(0.01)
    for call in list(core.utility_results.values()):
        with contextlib.suppress(InvalidStateError):
            call.set_exception(EOFError("the engine's process has ended"))


class _Client:
    """vLLM's protocol of a weight sync client."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": json_safe(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Does nothing: the sync finishes in a phase of its own, under the version's number."""


def _kept(flat: Any) -> tuple[KeptTokens, tuple[int, ...]]:
    sizes = np.subtract(flat.end_indices, flat.start_indices)
    return kept_tokens(flat.token_ids, flat.logprobs, flat.start_indices, sizes.tolist())


def _choices(entry: Mapping[int, Any]) -> Choices:
    return {token: told.logprob for token, told in entry.items()}
