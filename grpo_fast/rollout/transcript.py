"""The host's record of a batch that is being sampled: tokens so far, which sequences have ended, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rollout.stop_strings import StopScanner, cut_at_stop, decode
from grpo_fast.types import Completion

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from grpo_fast.rollout.engine import SamplingParams


class Transcript:
    """Sampled tokens of N sequences.

    Args:
        limits: [N], longest length of each, in tokens.
        sampling: gives the greatest such limit and the stop strings.
        is_end: [V], whether a token ends a sequence.
        tokenizer: decodes.
    """

    def __init__(
        self,
        limits: NDArray[np.int64],
        sampling: SamplingParams,
        *,
        is_end: NDArray[np.bool_],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        num_sequences = len(limits)
        self._limits = limits
        self._tokens = np.zeros((num_sequences, sampling.max_tokens), dtype=np.int64)
        self._logprobs = np.zeros((num_sequences, sampling.max_tokens), dtype=np.float32)
        self._lengths = np.zeros(num_sequences, dtype=np.int64)
        self._open = np.ones(num_sequences, dtype=bool)
        self._stopped = np.zeros(num_sequences, dtype=bool)
        self._kept: list[list[NDArray[np.int32]]] = [[] for _ in range(num_sequences)]
        self._stop = sampling.stop
        self._is_end = is_end
        self._tokenizer = tokenizer
        self._scanners = [StopScanner(tokenizer, sampling.stop) for _ in range(num_sequences)] if sampling.stop else []

    def record(
        self, sequences: NDArray[np.int64], start: int, tokens: NDArray[np.int64], logprobs: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Takes what some sequences sampled at positions ``start`` to ``start + j``; drops what lies past an end.

        Args:
            sequences: [n], which sequences, none twice.
            start: first position.
            tokens: [j, n].
            logprobs: [j, n].

        Returns:
            [n], whether each sequence has ended, now or before.

        Raises:
            FloatingPointError: a log-probability that counts is not finite.
        """
        stop = start + len(tokens)
        was_open = self._open[sequences]
        running = sequences[was_open]
        limits = self._limits[running]
        self._tokens[running, start:stop] = tokens.T[was_open]
        self._logprobs[running, start:stop] = logprobs.T[was_open]
        self._lengths[running] = np.minimum(stop, limits)
        self._open[running] = stop < limits
        within = np.arange(start, stop) < limits[:, None]
        ends = self._is_end[self._tokens[running, start:stop]] & within
        ended = ends.any(axis=1)
        self._close(running[ended], start + 1 + ends[ended].argmax(axis=1))
        if self._scanners:
            self._scan(running, start)
        valid = np.arange(start, stop) < self._lengths[running, None]
        if not np.isfinite(self._logprobs[running, start:stop][valid]).all():
            raise FloatingPointError(
                f"the model's logits are not finite within the first {stop} tokens of a completion; "
                "its weights have diverged, or its dtype overflows"
            )
        return ~self._open[sequences]

    def record_kept(self, sequences: NDArray[np.int64], kept: NDArray[np.int32]) -> None:
        """Takes what the next position of some sequences was drawn from; comes before :meth:`record`.

        Args:
            sequences: [n], which sequences, none twice.
            kept: [m, 2], row (of n, ascending) and token of each pair that was kept.
        """
        borders = np.searchsorted(kept[:, 0], np.arange(1, len(sequences)))
        for sequence, tokens in zip(sequences, np.split(kept[:, 1], borders), strict=True):
            if self._open[sequence]:
                self._kept[sequence].append(tokens)

    def _close(self, sequences: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._lengths[sequences] = lengths
        self._open[sequences] = False
        self._stopped[sequences] = True

    def _scan(self, sequences: NDArray[np.int64], start: int) -> None:
        for sequence in sequences:
            fresh = self._tokens[sequence, start : self._lengths[sequence]].tolist()
            count = self._scanners[sequence].feed(fresh)
            if count is not None:
                self._close(sequence[None], np.array([start + count]))

    def completions(self, weight_version: int) -> list[Completion]:
        """All N sequences as they stand, decoded."""
        return [self._completion(sequence, weight_version) for sequence in range(len(self._lengths))]

    def _completion(self, sequence: int, weight_version: int) -> Completion:
        length = int(self._lengths[sequence])
        tokens = self._tokens[sequence, :length].tolist()
        return Completion(
            token_ids=tuple(tokens),
            logprobs=tuple(self._logprobs[sequence, :length].tolist()),
            finish_reason="stop" if self._stopped[sequence] else "length",
            text=cut_at_stop(decode(self._tokenizer, tokens), self._stop),
            weight_version=weight_version,
            kept=KeptTokens.of(tokens, self._kept[sequence][:length]) if self._kept[sequence] else None,
        )
