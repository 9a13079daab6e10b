from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.decode_batch import DecodeBatch, Rows, Stepping


class Recorder:
    """Ends sequence i after ``limits[i]`` tokens, whatever they are."""

    def __init__(self, limits: list[int]) -> None:
        self.limits = np.array(limits)
        self.tokens: list[list[int]] = [[] for _ in limits]
        self.widths: list[int] = []

    def record(self, sequences: np.ndarray, start: int, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        assert tokens.shape == logprobs.shape == (len(tokens), len(sequences))
        self.widths.append(len(sequences))
        for sequence, column in zip(sequences, tokens.T, strict=True):
            assert len(self.tokens[sequence]) == start
            self.tokens[sequence].extend(column.tolist())
        return start + len(tokens) >= self.limits[sequences]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("stepping", ["shared", "fused", "masked", "plain"])
@torch.no_grad()
def test_rows_leave_when_they_end_and_the_others_go_on_undisturbed(stepping: Stepping, model: LlamaForCausalLM) -> None:
    prompts, source = [[4, 5, 6], [7], [8, 9]], np.array([0, 0, 1, 1, 1, 2])
    draws = np.random.default_rng(0).random((9, 6))
    sampling = SamplingParams(max_tokens=9)

    def run(limits: list[int]) -> Recorder:
        recorder = Recorder(limits)
        rows = Rows(source, np.array(limits), draws)
        batch = DecodeBatch(model, prompts, rows, sampling=sampling, stepping=stepping)
        batch.run(recorder, 1)
        return recorder

    whole, early = run([9] * 6), run([2, 9, 1, 4, 9, 3])
    assert whole.widths == [6] * 9
    assert early.widths == [6, 5, 4, 3, 2, 2, 2, 2, 2]
    for tokens, reference, limit in zip(early.tokens, whole.tokens, early.limits, strict=True):
        assert tokens == reference[:limit]
