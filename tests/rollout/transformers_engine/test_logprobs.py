"""What is sampled has the log-probabilities of the model: of whole and cut supports, in every architecture."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, RepetitionPenaltyLogitsProcessor

from grpo_fast.ops import Kept, LMHead, kept_logprob, token_logprob
from grpo_fast.rollout import RolloutEngine, SamplingParams
from grpo_fast.rollout.transformers_engine import TransformersEngine
from tests.rollout.transformers_engine.tiny import BUILDERS, FUSED, PROMPTS, build, flat, forward_logprobs


@pytest.mark.parametrize("impl", ["auto", "module"])
@pytest.mark.parametrize("name", BUILDERS)
def test_logprobs_equal_an_independent_forward(name: str, impl: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(name)
    engine = TransformersEngine(model, tokenizer, impl=impl)
    params = SamplingParams(max_tokens=12, temperature=0.8)
    groups = engine.generate(PROMPTS, params, num_generations=3, seed=1)
    assert [len(group) for group in groups] == [3] * len(PROMPTS)
    assert len({completion.token_ids for completion in groups[0]}) == 3
    assert {completion.finish_reason for completion in flat(groups)} == {"stop", "length"} or name == "gpt2"
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = forward_logprobs(model, prompt, completion, 0.8)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_module_steps_sample_the_same(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(name)
    params = SamplingParams(max_tokens=12)
    fused, module = (
        flat(TransformersEngine(model, tokenizer, impl=impl).generate(PROMPTS, params, num_generations=4, seed=3))
        for impl in ("fused", "module")
    )
    for one, other in zip(fused, module, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations(attention: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("qwen2")
    model.set_attn_implementation(attention)
    for impl in ("fused", "module"):
        engine = TransformersEngine(model, tokenizer, impl=impl)
        for prompt, group in zip(
            PROMPTS, engine.generate(PROMPTS, SamplingParams(max_tokens=6), num_generations=2, seed=1), strict=True
        ):
            for completion in group:
                expected = forward_logprobs(model, prompt, completion, 1.0)
                torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_stays_near_its_own_forward(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(name).bfloat16()
    reference = build(name)
    reference.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    engine = TransformersEngine(model, tokenizer, impl="fused")
    for prompt, group in zip(
        PROMPTS, engine.generate(PROMPTS, SamplingParams(max_tokens=8), num_generations=2, seed=1), strict=True
    ):
        for completion in group:
            truth = forward_logprobs(reference, prompt, completion, 1.0)
            own = forward_logprobs(model, prompt, completion, 1.0)
            error = (torch.tensor(completion.logprobs) - truth).abs().max()
            assert error <= 4 * (own - truth).abs().max() + 0.05


def test_greedy_equals_transformers_generate(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer)
    assert isinstance(engine, RolloutEngine)
    groups = engine.generate(PROMPTS, SamplingParams(max_tokens=10, temperature=0.0), num_generations=2, seed=0)
    for prompt, (first, second) in zip(PROMPTS, groups, strict=True):
        expected = llama.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=10
        )
        assert list(first.token_ids) == expected[0, len(prompt) :].tolist()
        assert first == second
        torch.testing.assert_close(
            torch.tensor(first.logprobs).double(), forward_logprobs(llama, prompt, first, 1.0), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_filtered_logprobs_are_renormalised_over_the_kept_support(
    filters: dict[str, float], llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    params = SamplingParams(max_tokens=1, temperature=1.4, **filters)
    group = TransformersEngine(llama, tokenizer).generate([PROMPTS[0]], params, num_generations=400, seed=0)[0]
    seen = {completion.token_ids[0]: completion.logprobs[0] for completion in group}
    with torch.no_grad():
        probs = (llama(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.4).softmax(-1)
    order = probs.argsort(descending=True).tolist()
    sizes = {
        "top_k": 3,
        "top_p": int((probs[order].cumsum(0) < 0.7).sum()) + 1,
        "min_p": int((probs >= 0.2 * probs.max()).sum()),
    }
    support = order[: sizes[next(iter(filters))]]
    assert set(seen) == set(support)
    for token, logprob in seen.items():
        assert logprob == pytest.approx(math.log(probs[token] / probs[support].sum()), abs=1e-5)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "min_p": 0.1}])
def test_the_policy_over_what_was_kept_has_the_engines_log_probabilities(
    filters: dict[str, float], every: int, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rows end at different steps and change places; what was kept has to follow them."""
    params = SamplingParams(max_tokens=12, temperature=1.4, **filters)
    engine = TransformersEngine(llama, tokenizer, eos_token_ids=[2, 9, 17, 30], check_every=every)
    answers = engine.generate(PROMPTS, params, num_generations=5, seed=1)
    assert len({len(completion.token_ids) for completion in flat(answers)}) > 2
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for completion in group:
            assert completion.kept is not None
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                hidden = llama.base_model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
            kept = Kept(torch.from_numpy(completion.kept.token_ids).long(), torch.from_numpy(completion.kept.sizes).long())
            found, _ = kept_logprob(hidden, LMHead(llama.lm_head.weight.detach(), temperature=1.4), kept=kept)
            assert found.tolist() == pytest.approx(completion.logprobs, abs=1e-5)
            if "top_k" in filters:
                assert max(completion.kept.sizes) <= filters["top_k"]
            full, _ = token_logprob(
                hidden, LMHead(llama.lm_head.weight.detach(), temperature=1.4), targets=torch.tensor(completion.token_ids)
            )
            assert (found >= full - 1e-6).all()
    assert all(
        completion.kept is None
        for completion in flat(engine.generate(PROMPTS, SamplingParams(max_tokens=2), num_generations=1, seed=1))
    )


@pytest.mark.parametrize("impl", ["auto", "module"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-windowed"])
def test_repetition_is_penalised_over_prompt_and_completion(name: str, impl: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(name)
    engine = TransformersEngine(model, tokenizer, impl=impl)
    params = SamplingParams(max_tokens=20, temperature=0.8, repetition_penalty=1.7)
    groups = engine.generate(PROMPTS, params, num_generations=4, seed=1)
    assert len({len(completion.token_ids) for completion in flat(groups)}) > 3, "rows leave the batch on the way"
    plain, without = 0.0, flat(engine.generate(PROMPTS, replace(params, repetition_penalty=1.0), num_generations=4, seed=1))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            tokens = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[0].double()
            for place, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
                end = len(prompt) + place
                row = RepetitionPenaltyLogitsProcessor(1.7)(tokens[:, :end], logits[None, end - 1].clone())[0] / 0.8
                assert logprob == pytest.approx(row.log_softmax(-1)[token].item(), abs=1e-5)
                plain = max(plain, abs(logprob - (logits[end - 1] / 0.8).log_softmax(-1)[token].item()))
    assert plain > 0.1
    assert [one.token_ids for one in without] != [one.token_ids for one in flat(groups)]


def test_greedy_with_a_penalty_equals_transformers_generate(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer)
    params = SamplingParams(max_tokens=10, temperature=0.0, repetition_penalty=1.8)
    groups = engine.generate(PROMPTS, params, num_generations=1, seed=0)
    plain = engine.generate(PROMPTS, replace(params, repetition_penalty=1.0), num_generations=1, seed=0)
    assert [group[0].token_ids for group in groups] != [group[0].token_ids for group in plain]
    for prompt, [completion] in zip(PROMPTS, groups, strict=True):
        wanted = llama.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=10, repetition_penalty=1.8, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :]
        assert list(completion.token_ids) == wanted.tolist()


def test_what_the_engine_does_not_know_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="does not know presence_penalty; sample with vLLM"):
        TransformersEngine(llama, tokenizer).generate(
            PROMPTS, SamplingParams(max_tokens=2, other={"presence_penalty": 1.0}), num_generations=1, seed=0
        )
