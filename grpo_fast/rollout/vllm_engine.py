"""Rollouts by vLLM in the trainer's own process, with the policy's weights proven to be in it.

The engine starts from the architecture alone and gets its weights from the policy, through vLLM's own weight transfer
(:mod:`~grpo_fast.rollout.vllm_transport`) and the phases of :mod:`~grpo_fast.rollout.weight_sync`, before the first request and
after every update; of a policy with LoRA adapters only those, after the first (:mod:`~grpo_fast.rollout.vllm_adapters`).
Nothing of vLLM is patched. Log-probabilities are those of the distribution that tokens were sampled from. Not covered: several
GPUs for one engine, quantised engines, speculative decoding, models with code of their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from grpo_fast.compute.memory import cached_values
from grpo_fast.rollout.end_tokens import end_token_ids
from grpo_fast.rollout.engine import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.model_sizes import model_sizes
from grpo_fast.rollout.request import check_request
from grpo_fast.rollout.shared_memory import check_room
from grpo_fast.rollout.stop_strings import cut_at_stop, decode
from grpo_fast.rollout.sync_probe import SyncProbe
from grpo_fast.rollout.transports import Delivery, Host, Transport, choose_transport, sync_attempts
from grpo_fast.rollout.vllm_adapters import AdapterTarget, AdapterVersions, policy_options
from grpo_fast.rollout.vllm_addresses import check_addresses
from grpo_fast.rollout.vllm_directory import model_directory
from grpo_fast.rollout.vllm_environment import (
    CPU_BLOCK_SIZE,
    LOCK_BYTES,
    NO_WORKER,
    load_beside_vllm,
    multiply_whole,
    require_vllm,
    undisturbed,
    vllm_environment,
)
from grpo_fast.rollout.vllm_memory import cpu_cache_bytes, memory_arguments
from grpo_fast.rollout.vllm_needs import Needs
from grpo_fast.rollout.vllm_sample import Sample, num_likeliest, sample_whole
from grpo_fast.rollout.vllm_sleep import check_segments, sleep_level
from grpo_fast.rollout.weight_sync import WeightSync
from grpo_fast.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPARED_TOKENS = 256
_SHORTEST_CONTEXT = 512
"""Room for the proof of a sync, whatever the block size."""


@dataclass(frozen=True, slots=True)
class VLLMSettings:
    """Settings of the engine."""

    gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory for weights and cache of the engine; the trainer needs the rest."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values; ``None``: what the share above leaves, and on a CPU what 256 sequences need, up to 2 GiB."""
    max_length: int | None = None
    """Longest prompt and completion together, in tokens; ``None`` takes the model's context."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments of vLLM's engine, such as ``enforce_eager``; see
    :func:`~grpo_fast.rollout.vllm_arguments.check_engine_args`."""
    sync_deadline_s: float = 300.0
    """Longest time of each phase of a weight sync."""
    request_deadline_s: float = 1800.0
    """Longest time that a server may take for the completions of one prompt, and an engine's own process for one step."""
    own_process: bool = False
    """Run the engine in a process of its own, where the trainer's Python does not hold it up; weights go through shared
    memory."""
    transport: Transport = "auto"
    """How weights reach the engine, see :mod:`~grpo_fast.rollout.transports`."""
    pause_mode: Literal["wait", "keep"] = "wait"
    """Treatment of running requests at a sync: wait for their end, or keep them, so that they continue on the new weights."""
    bucket_bytes: int = 256 * 2**20
    """Weights on the way at a time, through shared memory."""
    enable_sleep_mode: bool = False
    """Whether :meth:`VLLMEngine.sleep` frees memory; on a GPU only."""


def _deadlines(settings: VLLMSettings) -> dict[str, float]:
    return {name: getattr(settings, name) for name in ("request_deadline_s", "sync_deadline_s")}


class VLLMEngine:
    """Implements :class:`~grpo_fast.rollout.engine.RolloutEngine` with vLLM.

    Args:
        model: the policy; its architecture is built in vLLM, its weights are sent there at once.
        tokenizer: decodes completions.
        autocast_dtype: what the policy computes in under autocast, and vLLM then too; ``None`` is the type of the weights.
        settings: memory and deadlines.
        device: where the policy computes; ``None`` is where its weights lie.

    Raises:
        RolloutError: vLLM is missing or too old.
        WeightSyncError: the policy's weights did not arrive whole.
        ValueError: the policy's context is too short for the proof of a sync, the transport does not lead to the engine, or it
            is to sleep without a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        autocast_dtype: torch.dtype | None = None,
        settings: VLLMSettings | None = None,
        device: torch.device | None = None,
    ) -> None:
        version = require_vllm()
        settings = settings or VLLMSettings()
        self._model = model
        self._tokenizer = tokenizer
        self._end_tokens = sorted(end_token_ids(model, tokenizer))
        config = model.config.get_text_config(decoder=True)
        self._context = int(config.max_position_embeddings)
        if settings.max_length is not None:
            self._context = min(self._context, max(settings.max_length, _SHORTEST_CONTEXT))
        self._vocabulary = int(config.vocab_size)
        self._version: int | None = None
        dtype = autocast_dtype or next(model.parameters()).dtype
        self._device = device or next(model.parameters()).device
        on_gpu = self._device.type == "cuda"
        host, num_engines = self._host(settings)
        transport = choose_transport(settings.transport, host, on_gpu=on_gpu, num_engines=num_engines)
        self._delivery = Delivery(transport, settings.bucket_bytes, settings.pause_mode)
        options = policy_options(model)
        self._level = 0
        if settings.enable_sleep_mode:
            self._level = sleep_level(on_gpu=on_gpu, has_adapters=options is not None)
            if not host.startswith("server"):
                check_segments(version, os.environ)
        self._sleeps = False
        self._vllm: Any = self._build(settings, dtype, options or {})
        try:
            if options is not None:
                self._vllm = AdapterTarget(self._vllm, AdapterVersions(model))
            self._context = min(self._context, self._vllm.context_length)
            probe = SyncProbe.build(
                vocabulary=self._vocabulary,
                block_size=self._vllm.block_size,
                context_length=self._context,
                engine_dtype=dtype,
                autocast_dtype=autocast_dtype,
            )
            self._sync = WeightSync(self._vllm, probe, deadline_s=settings.sync_deadline_s, attempts=sync_attempts(transport))
            self.sync_weights(model, 0)
        except BaseException:
            self.close()
            raise

    @property
    def weight_version(self) -> int | None:
        """Version of the weights that the next :meth:`generate` samples from; ``None`` after a failed sync."""
        return self._version

    def _host(self, settings: VLLMSettings) -> tuple[Host, int]:
        """Where the engine runs, and the number of engines."""
        return ("own process" if settings.own_process else "in process"), 1

    def _build(self, settings: VLLMSettings, dtype: torch.dtype, options: dict[str, Any]) -> Any:
        on_cpu = self._device.type == "cpu"
        arguments: dict[str, Any] = {
            **memory_arguments(
                settings.gpu_memory_utilization,
                settings.kv_cache_bytes,
                on_gpu=not on_cpu,
                cpu_bytes=self._cpu_cache_bytes(dtype),
            ),
            "max_model_len": self._context,
            "enforce_eager": on_cpu,
            "seed": 0,
            "enable_sleep_mode": settings.enable_sleep_mode,
        }
        if on_cpu:
            arguments["block_size"] = CPU_BLOCK_SIZE
            arguments["distributed_executor_backend"] = NO_WORKER
            # A seeded request whose prompt is read in parts ends the engine: generators of a CPU have no offset to put back.
            arguments["enable_chunked_prefill"] = False
        check_room(LOCK_BYTES, "vLLM's locks")
        multiply_whole(dtype)
        own = settings.own_process
        environment = vllm_environment(own_process=own, transport=self._delivery.transport, device=self._device)
        with model_directory(self._model, self._tokenizer) as directory, undisturbed(), environment:
            inside = load_beside_vllm("grpo_fast.rollout.vllm_in_process")
            return inside.InProcessVLLM(
                self._model,
                dtype=dtype,
                delivery=self._delivery,
                own_process=own,
                deadlines=_deadlines(settings),
                arguments={"model": str(directory), **arguments, **options, **settings.engine_args},
            )

    def _cpu_cache_bytes(self, dtype: torch.dtype) -> int:
        return cpu_cache_bytes(cached_values(self._model.config.get_text_config(decoder=True)) * dtype.itemsize, self._context)

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """Brings ``policy``'s weights into vLLM and proves that they are in force.

        Returns:
            ``sync/...`` metrics, see :meth:`~grpo_fast.rollout.weight_sync.WeightSync.run`.

        Raises:
            WeightSyncError: they are not; :meth:`generate` refuses until a sync succeeds.
            ValueError: ``policy`` is another module than the one the engine was built over.
        """
        if policy is not self._model and getattr(policy, "module", None) is not self._model:
            raise ValueError(
                f"the engine was built with another module and cannot take the weights of this {type(policy).__name__}"
            )
        try:
            metrics = self._sync.run(policy, version)
        except BaseException:
            self._version = None
            raise
        self._version, self._sleeps = version, False
        return metrics

    def sleep(self) -> None:
        """Puts vLLM to sleep until the next sync, where ``settings.enable_sleep_mode`` allows it.

        Raises:
            RolloutError: vLLM failed, or requests run.
        """
        if self._level:
            self._sleeps = True
            try:
                self._vllm.sleep(self._level)
            except Exception as error:
                raise RolloutError(f"vLLM could not be put to sleep: {error}") from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        num_generations: int,
        seed: int,
        first_prompt: int = 0,
        max_tokens: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples ``num_generations`` completions for each prompt, all in one continuous batch.

        Args:
            prompts: P token-id sequences, none empty.
            sampling: how to sample. At temperature 0 log-probabilities are those of the plain softmax.
            num_generations: G.
            seed: decides every random draw; no global random state is read or changed.
            first_prompt: place of the first prompt in a larger call of which this is a part.
            max_tokens: [P], longest completion of each prompt where they differ.

        Returns:
            P lists of G completions, in the order of ``prompts``. An end token is part of its completion.

        Raises:
            ValueError: no prompts, an empty or overlong prompt, or an unknown token. Raised before anything is computed.
            WeightSyncError: the last sync failed, or vLLM sleeps.
            RolloutError: vLLM failed, or ended a request without finishing it; nothing of the call is left there. Or a server
                decodes otherwise than the policy, and there are stop strings.
            FloatingPointError: the model gave log-probabilities that are not finite.
        """
        if self._version is None:
            raise WeightSyncError("the last weight sync failed, so nothing can be sampled; sync again")
        if self._sleeps:
            raise WeightSyncError("vLLM sleeps until the next weight sync, so nothing can be sampled")
        limits = check_request(
            prompts,
            sampling,
            num_generations=num_generations,
            context_length=self._context,
            vocabulary=self._vocabulary,
            max_tokens=max_tokens,
        )
        if sampling.stop:
            self._check_decoding()
        params = self._params(sampling, num_generations, seed, first_prompt, limits)
        answers = sample_whole(self._vllm.sample, prompts, params, self._vocabulary)
        return [[self._completion(sample, sampling) for sample in samples] for samples in answers]

    def _check_decoding(self) -> None:
        """Does nothing: this engine's vLLM has the policy's own tokeniser."""

    def _params(
        self, sampling: SamplingParams, num_generations: int, seed: int, first_prompt: int, limits: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Of vLLM's ``SamplingParams``, for the prompts of a call, of which each has its own longest completion."""
        common = {
            "n": num_generations,
            "temperature": sampling.temperature,
            "stop": list(sampling.stop),
            "detokenize": bool(sampling.stop),
            "ignore_eos": True,
            "stop_token_ids": self._end_tokens,
            **sampling.changes_of_logits,
        }
        if likeliest := num_likeliest(sampling, self._vocabulary, self._vllm.telling, len(limits) * num_generations):
            common |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p, "logprobs": likeliest}
        seeds = np.random.SeedSequence(seed).generate_state(first_prompt + len(limits), np.uint32).tolist()[first_prompt:]
        # vLLM gives the G completions consecutive seeds; those of two prompts stay apart
        return [common | {"max_tokens": limit, "seed": each << 20} for limit, each in zip(limits, seeds, strict=True)]

    def _completion(self, sample: Sample, sampling: SamplingParams) -> Completion:
        tokens, versions = sample.token_ids, sample.versions
        if sample.finish_reason not in {"stop", "length"}:
            raise RolloutError(f"vLLM ended a request unfinished, with {sample.finish_reason!r} after {len(tokens)} tokens")
        if not math.isfinite(sum(sample.logprobs)):
            raise FloatingPointError("the model's logits are not finite; its weights have diverged, or its dtype overflows")
        if not len(versions) == len(sample.logprobs) == len(tokens):
            raise RolloutError(
                f"of {len(tokens)} tokens vLLM returned the weight version of {len(versions)} and the log-probability of "
                f"{len(sample.logprobs)}; please report the vLLM version"
            )
        if sample.kept is not None and len(sample.kept) != len(tokens):
            raise RolloutError(
                f"vLLM returned the sampling support of {len(sample.kept)} of {len(tokens)} tokens; please report its version"
            )
        return Completion(
            token_ids=tokens,
            logprobs=sample.logprobs,
            finish_reason="stop" if sample.finish_reason == "stop" else "length",
            text=cut_at_stop(decode(self._tokenizer, tokens), sampling.stop),
            weight_version=versions[0],
            weight_versions=versions if len(set(versions)) > 1 else (),
            kept=sample.kept,
        )

    def close(self) -> None:
        """Ends vLLM and frees its memory."""
        self._version = None
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None


class VLLMServerEngine(VLLMEngine):
    """Implements :class:`~grpo_fast.rollout.engine.RolloutEngine` with vLLM servers, on this machine or, by ssh, on others.

    Args:
        model: the policy; its weights are sent at once, whatever the servers held.
        tokenizer: decodes completions.
        urls: of the servers, such as ``http://127.0.0.1:8000`` or ``ssh://node2:8000``; ``grpo-fast serve`` starts one. They
            must serve the policy's architecture in its type.
        autocast_dtype: what the policy computes in under autocast; the servers must compute in it too.
        settings: deadlines.
        device: where the policy computes; ``None`` is where its weights lie, as they do but for shards in host memory.

    Raises:
        RolloutError: vLLM is missing or too old, or a server is gone.
        WeightSyncError: the policy's weights did not arrive whole.
        ValueError: a server twice, or none, a transport it cannot take, a context too short for a sync's proof, a bad key.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        urls: Sequence[str],
        autocast_dtype: torch.dtype | None = None,
        settings: VLLMSettings | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._where = check_addresses(urls)
        self._urls = tuple(urls)
        self._decodes_alike = False
        super().__init__(model, tokenizer, autocast_dtype=autocast_dtype, settings=settings, device=device)

    def _host(self, settings: VLLMSettings) -> tuple[Host, int]:
        return self._where, len(self._urls)

    def _build(self, settings: VLLMSettings, dtype: torch.dtype, options: dict[str, Any]) -> Any:
        del options  # the server's own affair: it refuses adapters that it was not started for
        with undisturbed(), vllm_environment():
            inside = load_beside_vllm("grpo_fast.rollout.vllm_http")
        target = inside.HTTPVLLM(
            self._model,
            dtype=dtype,
            device=self._device,
            delivery=self._delivery,
            urls=self._urls,
            deadlines=_deadlines(settings),
        )
        length = min(self._context, settings.max_length or 1)
        sizes = model_sizes(self._model.config)
        needs = Needs(dtype, self._delivery.transport, context_length=length, sleeps=self._level > 0, sizes=sizes)
        try:
            target.check(needs)
        except BaseException:
            target.close()
            raise
        return target

    def _check_decoding(self) -> None:
        """The first time that there are stop strings, servers must decode as the policy does."""
        if not self._decodes_alike:
            ids = range(0, self._vocabulary, max(1, self._vocabulary // _COMPARED_TOKENS))
            self._vllm.check_decoding(ids, self._tokenizer.decode(list(ids)))
            self._decodes_alike = True
