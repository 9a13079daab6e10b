from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from grpo_fast.ops import Kept, LMHead, kept_logprob, token_logprob
from grpo_fast.rollout import RolloutEngine, SamplingParams, decode_batch
from grpo_fast.rollout.transformers_engine import TransformersEngine
from grpo_fast.types import Completion

VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1)),
    "mistral-windowed": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
}
FUSED = ["llama", "llama-biased", "qwen2", "qwen3"]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [5, 6, 7, 8, 9, 10, 12], [30, 31, 32, 33, 34]]


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BUILDERS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key or "norm" in key or "ln_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokens 3 and up spell ``a``, ``b``, ... and some pairs of them."""
    letters = [chr(ord("a") + number) for number in range(26)]
    pieces = ["<pad>", "<s>", "</s>", *letters, *map("".join, pairwise(letters))][:VOCABULARY]
    core = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<pad>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def forward_logprobs(model: PreTrainedModel, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """An independent full forward, as a trainer does it: right-padded, causal."""
    ids = torch.tensor([[*prompt, *completion.token_ids, 0, 0, 0]])
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=mask).logits[0, len(prompt) - 1 : -4]
    chosen = torch.tensor(completion.token_ids)
    return (logits.double() / temperature).log_softmax(-1).gather(1, chosen[:, None])[:, 0]


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


def test_modes_are_restored_module_by_module_and_training_goes_on(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    engine = TransformersEngine(model, tokenizer)
    engine.generate(PROMPTS, SamplingParams(max_tokens=4), num_generations=2, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    model(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_samples_from_the_weights_of_the_moment(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    engine = TransformersEngine(model, tokenizer)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    before = engine.generate(PROMPTS, params, num_generations=1, seed=0)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert engine.sync_weights(model, 3) == {}
    after = engine.generate(PROMPTS, params, num_generations=1, seed=0)
    assert {completion.weight_version for completion in flat(before)} == {0}
    assert {completion.weight_version for completion in flat(after)} == {3} == {engine.weight_version}
    assert [c.token_ids for c in flat(before)] != [c.token_ids for c in flat(after)]
    for prompt, (completion,) in zip(PROMPTS, after, strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logprobs).double(), forward_logprobs(model, prompt, completion, 1.0), rtol=0, atol=1e-5
        )


def test_weights_of_its_own_change_by_a_sync_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    engine, shared = TransformersEngine(model, tokenizer, own_weights=True), TransformersEngine(model, tokenizer)
    params = SamplingParams(max_tokens=6)

    def sample(each: TransformersEngine) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in flat(each.generate(PROMPTS, params, num_generations=2, seed=0))]

    before = sample(engine)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert sample(engine) == before
    engine.sync_weights(model, 1)
    assert sample(engine) == sample(shared) != before


def test_of_a_model_with_adapters_those_alone_are_copied(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), model)
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name)
    engine = TransformersEngine(model, tokenizer, own_weights=True)
    for (name, weight), own in zip(model.named_parameters(), engine._model.parameters(), strict=True):
        assert (own is weight) == (".lora_" not in name)
    params = SamplingParams(max_tokens=6)
    before = engine.generate(PROMPTS, params, num_generations=2, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.mul_(-3)
    assert engine.generate(PROMPTS, params, num_generations=2, seed=0) == before
    engine.sync_weights(model, 0)
    assert engine.generate(PROMPTS, params, num_generations=2, seed=0) != before


def test_sync_takes_a_wrapper_and_refuses_a_stranger(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer)
    wrapper = torch.nn.Module()
    wrapper.module = llama
    engine.sync_weights(wrapper, 5)
    assert engine.weight_version == 5
    with pytest.raises(ValueError, match="samples from the module it was given"):
        engine.sync_weights(build("qwen2"), 6)
    assert engine.weight_version == 5


@pytest.mark.parametrize(
    ("prompts", "generations", "message"),
    [
        ([], 2, "prompts is empty"),
        ([[3], []], 2, "prompt 1 is empty"),
        ([[3], [4] * 55], 2, r"prompt 1 has 55 tokens.*max_tokens=10.*context of 64"),
        ([[3, 48]], 2, "token ids from 3 to 48.*0 to 47"),
        ([[3, -1]], 2, "token ids from -1 to 3"),
        ([[3]], 0, "num_generations must be at least 1, got 0"),
    ],
)
def test_refuses_before_computing(
    prompts: list[list[int]],
    generations: int,
    message: str,
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = TransformersEngine(llama, tokenizer)
    monkeypatch.setattr(LlamaForCausalLM, "forward", None)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, SamplingParams(max_tokens=10), num_generations=generations, seed=0)


def test_the_context_can_be_filled_to_the_last_position(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer, eos_token_ids=[])
    (completion,) = flat(engine.generate([[4] * 54], SamplingParams(max_tokens=10), num_generations=1, seed=0))
    assert len(completion.token_ids) == 10


@pytest.mark.parametrize("changes", [{"max_batch_tokens": 0}, {"check_every": 0}])
def test_refuses_sizes_below_one(changes: dict[str, int], llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} must be at least 1.*got 0"):
        TransformersEngine(llama, tokenizer, **changes)


def test_refuses_models_it_cannot_run(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder"):
        TransformersEngine(encoder, tokenizer)
    model = build("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layers of type linear_attention"):
        TransformersEngine(model, tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "mistral-windowed"])
def test_fused_is_refused_where_it_does_not_fit(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="impl='fused' does not fit this"):
        TransformersEngine(build(name), tokenizer, impl="fused")


def test_an_interrupt_leaves_the_model_as_it_was(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.train()
    engine = TransformersEngine(model, tokenizer)
    params = SamplingParams(max_tokens=6)
    expected = engine.generate(PROMPTS, params, num_generations=2, seed=0)
    calls = 0
    original = decode_batch.sample

    def interrupted(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(decode_batch, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, params, num_generations=2, seed=0)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert engine.generate(PROMPTS, params, num_generations=2, seed=0) == expected


def test_diverged_weights_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(FloatingPointError, match="not finite within the first 1 tokens"):
        TransformersEngine(model, tokenizer).generate(PROMPTS, SamplingParams(max_tokens=3), num_generations=1, seed=0)


def test_close_twice(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(llama, tokenizer)
    engine.close()
    engine.close()
