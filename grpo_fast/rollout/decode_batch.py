"""One batch of sequences on the device: prompts read once, completions grown in step, ended rows moved out of the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from transformers import DynamicCache

from grpo_fast.ops.products import rounded_rows
from grpo_fast.rollout.kv_cache import PreallocatedCache, cache_argument
from grpo_fast.rollout.llama_step import LlamaStep
from grpo_fast.rollout.native_step import NativeStep, takes
from grpo_fast.rollout.sampling import Draw, sample
from grpo_fast.rollout.shared_prefix import SharedPrefixCache

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from grpo_fast.rollout.engine import SamplingParams
    from grpo_fast.rollout.transcript import Transcript

Stepping: TypeAlias = Literal["shared", "fused", "masked", "plain"]
_Cache: TypeAlias = PreallocatedCache | SharedPrefixCache

_PREFILL_TOKENS = 8192
"""Padded prompt tokens of one prefill forward; bounds its activations."""

_COMPACT_SHARE = 16
"""Rows are moved once one in so many can be dropped: each move costs a few small copies a layer."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Facts about N sequences that are known before sampling."""

    source: NDArray[np.int64]
    """[N], ascending: which prompt each continues."""
    limits: NDArray[np.int64]
    """[N], longest completion of each, in tokens."""
    draws: NDArray[np.float64]
    """[max_tokens, N], uniform numbers."""


class DecodeBatch:
    """N sequences that are sampled together.

    Args:
        model: the policy, in evaluation mode.
        prompts: U distinct prompts.
        rows: the N sequences.
        sampling: how to sample; its ``max_tokens`` is no less than any limit.
        stepping: ``shared`` and ``fused`` step with :class:`LlamaStep`, over prompts kept once or copied; over prompts kept
            once a few rows step with :class:`NativeStep` where it :func:`takes` them. ``masked`` steps with the module, given a
            finished mask; ``plain`` with the module, which builds its mask from the padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        rows: Rows,
        *,
        sampling: SamplingParams,
        stepping: Stepping,
    ) -> None:
        weight = next(model.parameters())
        self._model, self._device, self._dtype = model, weight.device, weight.dtype
        self._prompts, self._source, self._sampling = prompts, rows.source, sampling
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._width = int(self._lengths.max())
        self._seen = self._width
        self._draws = torch.from_numpy(rows.draws).to(self._device)
        lengths = self._lengths[rows.source]
        self._positions = torch.from_numpy(lengths).to(self._device)
        self._last_positions = torch.from_numpy(lengths + rows.limits - 1).to(self._device)
        longest, limit = self._width + sampling.max_tokens, sampling.max_tokens
        self._native_step = self._llama_step = None
        if stepping == "shared" and takes(model, len(lengths)):
            self._native_step = NativeStep(model, longest)
        elif stepping in {"shared", "fused"}:
            self._llama_step = LlamaStep(model, longest, num_rows=len(lengths), num_steps=limit)
        self._stepping, self._cache_argument = stepping, cache_argument(model)
        self._mask = self._decode_mask()
        self._present: torch.Tensor | None = None
        """Tokens that each sequence holds already, [n, V], where repetition is penalised."""
        self._rows = np.arange(len(lengths))

    def _decode_mask(self) -> torch.Tensor | None:
        if (self._lengths == self._width).all() or self._stepping == "shared":
            return None
        columns = np.arange(self._width + self._sampling.max_tokens)
        seen = torch.from_numpy(columns >= self._width - self._lengths[self._source, None]).to(self._device)
        if self._stepping == "plain":
            return seen.long()
        blocked = torch.finfo(self._dtype).min
        return torch.zeros_like(seen, dtype=self._dtype).masked_fill_(~seen, blocked)[:, None, None, :]

    def run(self, transcript: Transcript, check_every: int) -> None:
        """Samples until every sequence has ended or is as long as allowed."""
        cache, logits = self._prefill()
        if self._sampling.repetition_penalty != 1:
            self._present = self._tokens_of_prompts(logits.shape[-1])
        pending: list[Draw] = []
        limit = self._sampling.max_tokens
        for step in range(1, limit + 1):
            pending.append(sample(logits, self._sampling, self._draws[step - 1], self._present))
            tokens = pending[-1].tokens
            if self._present is not None:
                self._present.scatter_(1, tokens[:, None], value=True)
            if step % check_every == 0 or step == limit:
                ended = self._report(transcript, pending, step)
                if step == limit or ended.all():
                    return
                pending = []
                count = rounded_rows(int((~ended).sum()), self._device)
                if (len(ended) - count) * _COMPACT_SHARE >= len(ended):
                    tokens = self._compact(cache, tokens, ended, count)
            logits = self._step(cache, tokens)

    def _tokens_of_prompts(self, vocabulary: int) -> torch.Tensor:
        held = np.zeros((len(self._prompts), vocabulary), dtype=bool)
        for row, prompt in zip(held, self._prompts, strict=True):
            row[list(prompt)] = True
        return torch.from_numpy(held[self._source]).to(self._device)

    def _report(self, transcript: Transcript, pending: list[Draw], step: int) -> NDArray[np.bool_]:
        tokens = torch.stack([draw.tokens for draw in pending]).cpu().numpy()
        logprobs = torch.stack([draw.logprobs for draw in pending]).cpu().numpy()
        for draw in pending:
            if draw.kept is not None:
                transcript.record_kept(self._rows, draw.kept.nonzero().to("cpu", torch.int32).numpy())
        return transcript.record(self._rows, step - len(pending), tokens, logprobs)

    def _prefill(self) -> tuple[_Cache, torch.Tensor]:
        """Reads each prompt once.

        Returns:
            The cache of N sequences and the logits [N, V] of the first completion token.
        """
        cache: _Cache | None = None
        logits = []
        count = max(1, _PREFILL_TOKENS // self._width)
        for first in range(0, len(self._prompts), count):
            prompts = slice(first, first + count)
            prefilled, last = self._read(prompts)
            cache = cache or self._new_cache(prefilled)
            rows = slice(*np.searchsorted(self._source, [first, first + count]).tolist())
            index = torch.from_numpy(self._source[rows] - first).to(self._device)
            if isinstance(cache, SharedPrefixCache):
                cache.fill(prompts, prefilled)
            else:
                cache.fill(rows, prefilled, index)
            logits.append(last[index])
        assert cache is not None
        return cache, torch.cat(logits)

    def _new_cache(self, like: DynamicCache) -> _Cache:
        room = self._sampling.max_tokens
        if self._stepping == "shared":
            return SharedPrefixCache(self._source, self._width - self._lengths, max_tokens=room, like=like)
        return PreallocatedCache(len(self._source), self._width + room, like)

    def _read(self, prompts: slice) -> tuple[DynamicCache, torch.Tensor]:
        lengths = self._lengths[prompts, None]
        ids = np.zeros((len(lengths), self._width), dtype=np.int64)
        for row, prompt in zip(ids, self._prompts[prompts], strict=True):
            row[self._width - len(prompt) :] = prompt
        positions = np.arange(self._width) - (self._width - lengths)
        padded = bool((positions < 0).any())
        cache = DynamicCache()
        given = (torch.from_numpy(ids).to(self._device), torch.from_numpy(positions.clip(min=0)).to(self._device))
        mask = torch.from_numpy(positions >= 0).to(self._device).long() if padded else None
        return cache, self._logits(cache, *given, mask)

    def _step(self, cache: _Cache, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token to every row and returns the logits [n, V] of the next."""
        self._seen += 1
        mask = None if self._mask is None else self._mask[..., : self._seen]
        # Rows that have ended go on until they are moved out: past its last position a model may have no embedding.
        positions, self._positions = self._positions, torch.minimum(self._positions + 1, self._last_positions)
        if self._native_step is not None and isinstance(cache, SharedPrefixCache):
            return self._native_step(cache, tokens, positions)
        if self._llama_step is not None:
            return self._llama_step(cache, tokens, positions, mask)
        return self._logits(cache, tokens[:, None], positions[:, None], mask)

    def _logits(
        self, cache: _Cache | DynamicCache, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Has the module read tokens [n, S] into the cache; returns the logits [n, V] after the last."""
        logits: torch.Tensor = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **{self._cache_argument: cache},
        ).logits
        return logits[:, -1]

    def _compact(self, cache: _Cache, tokens: torch.Tensor, ended: NDArray[np.bool_], count: int) -> torch.Tensor:
        """Moves open rows from the end of the batch into the places of ended ones and drops all but ``count``."""
        movers = count + np.flatnonzero(~ended[count:])
        holes = np.flatnonzero(ended[:count])[: len(movers)]
        self._rows = self._rows.copy()
        self._rows[holes] = self._rows[movers]
        self._rows = self._rows[:count]
        target, source = (torch.from_numpy(index).to(self._device) for index in (holes, movers))
        cache.move(source, target, count)
        order = torch.arange(count, device=self._device).index_copy_(0, target, source)
        self._positions = self._positions[order]
        self._last_positions = self._last_positions[order]
        self._draws = self._draws[:, order]
        if self._mask is not None:
            self._mask = self._mask[order]
        if self._present is not None:
            self._present = self._present[order]
        return tokens[order]
