from __future__ import annotations

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.transcript import Transcript

END = 9


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate("abcdefghi")} | {"</s>": END}, "a"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def transcript(
    tokenizer: PreTrainedTokenizerFast, count: int, *, limits: list[int] | None = None, **sampling: object
) -> Transcript:
    params = SamplingParams(**({"max_tokens": 6} | sampling))
    return Transcript(np.array(limits or [6] * count), params, is_end=np.arange(10) == END, tokenizer=tokenizer)


def block(*columns: list[int]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array(columns).T
    return tokens, -tokens.astype(np.float32)


def test_ends_within_a_block_and_drops_what_lies_past_it(tokenizer: PreTrainedTokenizerFast) -> None:
    notes = transcript(tokenizer, 3)
    assert notes.record(np.arange(3), 0, *block([1, END, 5, 5], [1, 2, 3, 4], [END, END, 0, 0])).tolist() == [True, False, True]
    assert notes.record(np.arange(3), 4, *block([7, 7], [5, END], [7, 7])).tolist() == [True, True, True]
    first, second, third = notes.completions(4)
    assert (first.token_ids, first.text, first.finish_reason) == ((1, END), "b", "stop")
    assert (second.token_ids, second.text, second.finish_reason) == ((1, 2, 3, 4, 5, END), "bcdef", "stop")
    assert (third.token_ids, third.text, third.weight_version) == ((END,), "", 4)
    assert second.logprobs == (-1, -2, -3, -4, -5, -END)


def test_rows_may_stand_in_any_order(tokenizer: PreTrainedTokenizerFast) -> None:
    notes = transcript(tokenizer, 3)
    notes.record(np.arange(3), 0, *block([1], [END], [3]))
    notes.record(np.array([2, 0]), 1, *block([4], [2]))
    assert [completion.token_ids for completion in notes.completions(0)] == [(1, 2), (END,), (3, 4)]
    assert [completion.finish_reason for completion in notes.completions(0)] == ["length", "stop", "length"]


def test_end_token_before_the_stop_string_wins(tokenizer: PreTrainedTokenizerFast) -> None:
    notes = transcript(tokenizer, 2, stop=("cd",))
    assert notes.record(np.arange(2), 0, *block([1, END, 2, 3], [1, 2, 3, END])).tolist() == [True, True]
    assert [(c.token_ids, c.text) for c in notes.completions(0)] == [((1, END), "b"), ((1, 2, 3), "b")]


def test_each_sequence_has_a_limit_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    notes = transcript(tokenizer, 5, limits=[2, 3, 4, 6, 6], stop=("cd",))
    block_of_four = block([1, 2, 3, END], [1, 1, END, 1], [5, 6, 7, 8], [1, 2, 3, 4], [1, 1, 1, 1])
    assert notes.record(np.arange(5), 0, *block_of_four).tolist() == [True, True, True, True, False]
    assert notes.record(np.array([4, 0]), 4, *block([1, 1], [8, 8])).tolist() == [True, True]
    found = [(c.token_ids, c.finish_reason) for c in notes.completions(0)]
    # past the limit neither an end nor a stop string counts; at it both do
    assert found == [
        ((1, 2), "length"),
        ((1, 1, END), "stop"),
        ((5, 6, 7, 8), "length"),
        ((1, 2, 3), "stop"),
        ((1,) * 6, "length"),
    ]


def test_only_log_probabilities_that_count_must_be_finite(tokenizer: PreTrainedTokenizerFast) -> None:
    notes = transcript(tokenizer, 1)
    tokens, logprobs = block([END, 3, 3])
    logprobs[2] = math.nan
    assert notes.record(np.arange(1), 0, tokens, logprobs).all()
    fresh = transcript(tokenizer, 1)
    logprobs[0] = math.nan
    with pytest.raises(FloatingPointError, match="weights have diverged"):
        fresh.record(np.arange(1), 0, tokens, logprobs)
