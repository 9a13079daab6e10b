"""A vLLM engine that this process owns: how it is built, and what the weight sync asks of it.

Importing this imports vLLM; :mod:`~grpo_fast.rollout.vllm_engine` does so when an engine is built.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from grpo_fast.rollout.vllm_watch import ProcessWatch, Setting

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
        deadlines: longest times that one answer of such a process may take, in seconds; it is killed then.
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
        deadlines: Mapping[Setting, float],
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
        self._step_s = deadlines["sync_deadline_s"]
        self._sender: WeightSender | None = None
        self._adapter: LoRARequest | None = None
        disable_envs_cache()  # with it an engine would run where the first one of this process did
        others = set(multiprocessing.active_children())
        if not own_process:
            gc.collect()
            gc.freeze()  # as vLLM does when it has loaded, but it looks three times through all of Python first, for 0.5 s each
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
        self._sleeper = Sleeper(self._fall_asleep, self._wake_up)
        processes = set(multiprocessing.active_children()) - others
        self._watch = ProcessWatch(processes, self._llm.llm_engine.engine_core, deadlines)

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
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[VLLMSamplingParams],
        read: Callable[[Any], _T],
        *,
        deadline: Setting = "request_deadline_s",
    ) -> list[_T]:
        """Steps the engine until these requests are done; threads that do so at once serve each other's requests.

        ``LLM.generate`` would run to its end without a moment in which weights may change. What vLLM says is read as soon as it
        is whole: likeliest tokens in its lists take 24 times the memory that the kept ones of them do in an array.
        """
        names = list(itertools.islice(self._names, len(prompts)))
        with torch.random.fork_rng():  # vLLM draws from the global state before it puts the seeded draws in place
            with self._turn, self._dropped_if_broken(), self._asked(deadline) as llm:
                self._running |= dict.fromkeys(names, read)
                if self._cache_is_broken:
                    self._cache_is_broken = not llm.reset_prefix_cache()
                if self._cache_is_broken:
                    raise RuntimeError("vLLM's cache could not be emptied after an earlier failure; sync the weights again")
                for name, prompt, each in zip(names, prompts, params, strict=True):
                    each.output_kind = RequestOutputKind.FINAL_ONLY
                    llm.llm_engine.add_request(name, tokens_input(list(prompt)), each, lora_request=self._adapter)
            while not self._running.keys().isdisjoint(names):
                self._go.wait()
                with self._turn, self._dropped_if_broken(), self._asked(deadline) as llm:
                    if self._go.is_set() and not self._running.keys().isdisjoint(names):
                        for output in llm.llm_engine.step():
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

    @contextlib.contextmanager
    def _asked(self, deadline: Setting) -> Iterator[LLM]:
        """Gives vLLM, whose answer to what is asked inside has a deadline where it may be none.

        Raises:
            RolloutError: it was closed, or its process has ended.
        """
        if self._llm is None:
            raise RolloutError("the engine was closed while requests ran")
        with self._watch.waiting(deadline):
            yield self._llm

    @contextlib.contextmanager
    def _dropped_if_broken(self) -> Iterator[None]:
        """Ends all requests where vLLM fails: it takes positions for computed, and caches them, before they are."""
        try:
            yield
        except BaseException as error:
            if self._llm is None:
                raise
            names = list(self._running)
            failed = RolloutError(f"vLLM failed with {type(error).__name__}: {error}; its {len(names)} requests were dropped")
            failed.__cause__ = error
            self._finished |= dict.fromkeys(names, failed)
            self._running.clear()
            self._cache_is_broken = True  # emptied before the next request: one that hangs would not let go of Ctrl-C
            with contextlib.suppress(Exception):  # it may be dead, or fail again
                self._llm.llm_engine.abort_request(names)
            if not isinstance(error, Exception):
                raise

    def close(self, adapter: AdapterVersion | None = None) -> None:
        """Ends the engine, between two steps, and frees its memory, adapters too; requests that run fail.

        Raises:
            RolloutError: a step in this process, which nothing can end, has not ended within the deadline of a sync's phase.
        """
        del adapter
        self._go.clear()
        if not self._turn.acquire(timeout=_SHUTDOWN_S if self._watch else self._step_s):
            if not self._watch:
                raise RolloutError(f"vLLM's step did not end within {self._step_s:g} s (sync_deadline_s) and still runs")
            self._watch.kill("was closed before it answered")
            self._turn.acquire()
        try:
            core = self._llm.llm_engine.engine_core
            core.shutdown()
            if self._watch:  # vLLM leaves its sockets to the collector
                core.output_queue_thread.join(_SHUTDOWN_S)
                core.ctx.destroy(linger=0)
            self._llm = self._sender = None
        finally:
            self._turn.release()
        self._go.set()
        if self._owns_groups:
            destroy_model_parallel()
            destroy_distributed_environment()
        gc.collect()

    def pause(self) -> None:
        """Checks that nothing runs, as nothing does between two calls of ``generate``; or lets no request take a step."""
        if self._delivery.pause_mode == "wait":
            self._check_idle()
        else:
            self._go.clear()
            with self._turn:  # a step that is under way
                self._hold()

    def _check_idle(self) -> None:
        with self._asked("sync_deadline_s") as llm:
            if llm.llm_engine.has_unfinished_requests():
                raise RuntimeError("vLLM still has unfinished requests; wait for generate() to return")

    def _hold(self) -> None:
        """Has an engine in a process of its own take no step, as it does unasked while it has requests; nothing sleeps."""
        if self._watch:
            with self._asked("sync_deadline_s") as llm:
                llm.sleep(level=0, mode="keep")

    def resume(self) -> None:
        """Lets requests that were kept go on."""
        if self._watch and self._delivery.pause_mode == "keep":
            with self._asked("sync_deadline_s") as llm:
                llm.wake_up(tags=["scheduling"])
        self._go.set()

    def waits_for(self) -> str:
        """Nothing is named: there is one engine."""
        return ""

    def sleep(self, level: int) -> None:
        """Puts the engine to sleep, at vLLM's level.

        Raises:
            RuntimeError: requests are running; vLLM would end them.
        """
        with self._turn:
            self._check_idle()
            self._sleeper.sleep(level)

    def _fall_asleep(self, level: int) -> None:
        with self._asked("sync_deadline_s") as llm:
            llm.sleep(level=level)

    def wake(self, part: Part) -> None:
        """Wakes a part of its memory, where it sleeps."""
        self._sleeper.wake(part)

    def _wake_up(self, part: Part) -> None:
        with self._asked("sync_deadline_s") as llm:
            llm.wake_up(tags=[part])

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
                client=_Client(self._asked),
                source=self._weights,
                bucket_bytes=self._delivery.bucket_bytes,
            )
        return self._sender.send_weights()

    def finish(self, version: int) -> None:
        """Puts them in force."""
        with self._asked("sync_deadline_s") as llm:
            llm.finish_weight_update(version_name(version, self._run_name))
        if self._sender is not None:
            self._sender.release()

    def weight_version(self) -> int | None:
        """The version in force; ``None`` before the first."""
        with self._asked("sync_deadline_s") as llm:
            return version_number(llm.get_weight_version(), self._run_name)

    def announce(self, version: int) -> None:
        """Gives what is in force a version's number."""
        with self._asked("sync_deadline_s") as llm:
            llm.update_weight_version(version_name(version, self._run_name))

    def load_adapter(self, adapter: AdapterVersion) -> None:
        """Reads a LoRA adapter; requests are answered with it from then on."""
        request = LoRARequest(adapter.name, adapter.number, str(adapter.path))
        with self._asked("sync_deadline_s") as llm:
            if not llm.llm_engine.add_lora(request):
                raise RuntimeError(f"vLLM did not take the adapter {adapter.name}")
        self._adapter = request

    def unload_adapter(self, adapter: AdapterVersion) -> None:
        """Forgets one."""
        with self._asked("sync_deadline_s") as llm:
            llm.llm_engine.remove_lora(adapter.number)

    def undo(self) -> None:
        """Leaves an update that began: one that a worker cannot read ends it, by vLLM's own rule."""
        self._sender = None
        with contextlib.suppress(ValueError, RuntimeError, RolloutError), self._asked("sync_deadline_s") as llm:
            llm.update_weights({"update_info": {"undo": True}})

    def reset_prefix_cache(self) -> bool:
        """Forgets cached keys and values, those of requests that are kept too: they are computed anew."""
        with self._asked("sync_deadline_s") as llm:
            done = bool(llm.reset_prefix_cache(reset_running_requests=self._delivery.pause_mode == "keep"))
        self._cache_is_broken = self._cache_is_broken and not done
        return done

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[Choices]]:
        """What comes next: of one prompt after the other, so that the second reads what the first left in the cache."""
        params = [VLLMSamplingParams(**PROBE_PARAMS)]

        def read(output: Any) -> Choices:
            return _choices(output.outputs[0].logprobs[0])

        return [[self._run([prompt], params, read, deadline="sync_deadline_s")[0] for prompt in prompts]]

    def score(self, prompt: Sequence[int]) -> list[list[Choices]]:
        """The same of a prompt and of all of it but its last token; a request for those of its prompt reads no cache."""

        def read(output: Any) -> list[Choices]:
            return [_choices(entry) for entry in output.prompt_logprobs[: len(prompt) - 2 : -1]]

        asked, params = [*prompt, prompt[0]], VLLMSamplingParams(**SCORE_PARAMS)
        return self._run([asked], [params], read, deadline="sync_deadline_s")


class _Client:
    """vLLM's protocol of a weight sync client."""

    def __init__(self, asked: Callable[[Setting], contextlib.AbstractContextManager[LLM]]) -> None:
        self._asked = asked

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        with self._asked("sync_deadline_s") as llm:
            llm.init_weight_transfer_engine({"init_info": init_info})

    def bring(self, place: int, num_bytes: int) -> None:
        """Does nothing: the engine's processes read the trainer's own file."""

    def start_weight_update(self) -> None:
        with self._asked("sync_deadline_s") as llm:
            llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with self._asked("sync_deadline_s") as llm:
            llm.update_weights({"update_info": json_safe(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Does nothing: the sync finishes in a phase of its own, under the version's number."""


def _kept(flat: Any) -> tuple[KeptTokens, tuple[int, ...]]:
    sizes = np.subtract(flat.end_indices, flat.start_indices)
    return kept_tokens(flat.token_ids, flat.logprobs, flat.start_indices, sizes.tolist())


def _choices(entry: Mapping[int, Any]) -> Choices:
    return {token: told.logprob for token, told in entry.items()}
