"""How prompts and completions are cut into batches changes no token, and neither does global random state."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo_fast.rollout import SamplingParams, decode_batch
from grpo_fast.rollout.transformers_engine import TransformersEngine
from tests.rollout.transformers_engine.tiny import PROMPTS, build, flat, forward_logprobs


def test_same_call_same_tokens_and_no_global_random_state(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer)
    params = SamplingParams(max_tokens=9)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, params, num_generations=3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert engine.generate(PROMPTS, params, num_generations=3, seed=7) == first
    other = engine.generate(PROMPTS, params, num_generations=3, seed=8)
    assert [c.token_ids for c in flat(other)] != [c.token_ids for c in flat(first)]


@pytest.mark.parametrize("impl", ["fused", "module"])
@pytest.mark.parametrize(("budget", "every"), [(1, 1), (40, 3), (10_000, 5), (10_000, 100)])
def test_cut_order_and_looks_change_nothing(
    budget: int, every: int, impl: str, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ends = [2, 5, 11, 17, 23, 29]
    params = SamplingParams(max_tokens=16)
    plain = TransformersEngine(llama, tokenizer, impl=impl, eos_token_ids=ends).generate(
        PROMPTS, params, num_generations=4, seed=2
    )
    lengths = {len(completion.token_ids) for completion in flat(plain)}
    assert len(lengths) > 3, "rows must end at different steps for this test to say anything"
    engine = TransformersEngine(llama, tokenizer, impl=impl, eos_token_ids=ends, max_batch_tokens=budget, check_every=every)
    for one, other in zip(flat(plain), flat(engine.generate(PROMPTS, params, num_generations=4, seed=2)), strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_fewer_generations_are_a_prefix_of_more(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer)
    few = engine.generate(PROMPTS[:2], SamplingParams(max_tokens=5), num_generations=2, seed=2)
    more = engine.generate(PROMPTS, SamplingParams(max_tokens=9), num_generations=5, seed=2)
    for short, long in zip(few, more, strict=False):
        for one, other in zip(short, long, strict=False):
            assert one.token_ids == other.token_ids[: len(one.token_ids)]


def test_prefill_in_parts(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(llama, tokenizer)
    whole = engine.generate(PROMPTS, SamplingParams(max_tokens=6), num_generations=2, seed=2)
    monkeypatch.setattr(decode_batch, "_PREFILL_TOKENS", 15)
    for one, other in zip(
        flat(engine.generate(PROMPTS, SamplingParams(max_tokens=6), num_generations=2, seed=2)), flat(whole), strict=True
    ):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_context_can_be_filled_to_the_last_position(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer, eos_token_ids=[])
    (completion,) = flat(engine.generate([[4] * 54], SamplingParams(max_tokens=10), num_generations=1, seed=0))
    assert len(completion.token_ids) == 10


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_row_near_the_end_of_the_context_is_not_carried_past_it(
    name: str, every: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(name)
    engine = TransformersEngine(model, tokenizer, eos_token_ids=[], check_every=every)
    prompts, limits = [[4] * 57, *[[5, 6, 7]] * 20], [4, *[50] * 20]  # one is closed long before it is worth a move
    groups = engine.generate(prompts, SamplingParams(max_tokens=50), num_generations=1, seed=1, max_tokens=limits)
    assert [len(completion.token_ids) for completion in flat(groups)] == limits
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logprobs).double(), forward_logprobs(model, prompt, completion, 1.0), rtol=0, atol=1e-5
        )
