"""Where completions end."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.transformers_engine import TransformersEngine
from tests.rollout.transformers_engine.tiny import PROMPTS, flat


@pytest.mark.parametrize("every", [1, 4])
def test_stop_string_across_tokens_cuts_text_and_keeps_tokens(
    every: int, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    free = TransformersEngine(llama, tokenizer, eos_token_ids=[]).generate(
        [PROMPTS[0]], SamplingParams(max_tokens=14), num_generations=6, seed=5
    )[0]
    assert {completion.finish_reason for completion in free} == {"length"}
    stop = free[2].text[5:8]
    engine = TransformersEngine(llama, tokenizer, eos_token_ids=[], check_every=every)
    held = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=14, stop=("never", stop)), num_generations=6, seed=5)[0]
    assert held[2].finish_reason == "stop"
    for one, other in zip(held, free, strict=True):
        at = other.text.find(stop)
        assert one.text == (other.text[:at] if at >= 0 else other.text)
        assert one.finish_reason == ("stop" if at >= 0 else "length")
        count = len(one.token_ids)
        assert one.token_ids == other.token_ids[:count]
        assert len(one.logprobs) == count
        if at >= 0:
            decode = tokenizer.decode
            assert stop in decode(list(one.token_ids), skip_special_tokens=True)
            assert stop not in decode(list(one.token_ids[:-1]), skip_special_tokens=True)


def test_end_tokens_are_kept_and_text_is_without_them(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer, eos_token_ids=[4, 9, 20])
    completions = flat(engine.generate(PROMPTS, SamplingParams(max_tokens=30), num_generations=6, seed=0))
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    assert {completion.token_ids[-1] for completion in stopped} == {4, 9, 20}
    for completion in completions:
        assert not {4, 9, 20} & set(completion.token_ids[:-1])
        assert completion.truncated == (completion not in stopped)
        assert completion.text == tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
    own = flat(TransformersEngine(llama, tokenizer).generate(PROMPTS, SamplingParams(max_tokens=30), num_generations=6, seed=0))
    assert any(completion.token_ids[-1] == 2 and "</s>" not in completion.text for completion in own)
