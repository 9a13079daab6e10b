from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from grpo_fast.compute import (
    ModelShape,
    backward_flops,
    causal_pairs,
    decode_flops,
    forward_flops,
    prefill_flops,
    reference_flops,
)
from grpo_fast.rollout.kv_cache import cache_argument

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 200, "max_position_embeddings": 512}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)
QWEN = Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
WIDE = Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=48, tie_word_embeddings=False)
REAL = pytest.mark.parametrize("config", [LLAMA, QWEN, WIDE], ids=["llama", "qwen2-gqa-tied", "qwen2-wide-heads"])

TINY = ModelShape(body_params=1000, head_params=100, attention_layers=2, attention_dim=8, hidden_size=8, vocab_size=12)


def build(config: PretrainedConfig) -> torch.nn.Module:
    # Eager attention is plain matrix products; PyTorch's counter does not know the CPU's fused attention at all.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").train()


def dense_surplus(shape: ModelShape, length: int) -> int:
    """What eager attention spends beyond the causal mask in one forward: the masked half of the scores."""
    return 4 * shape.attention_layers * shape.attention_dim * (length * length - causal_pairs([length]))


def test_shape_of_llama_by_hand() -> None:
    shape = ModelShape.from_model(build(LLAMA))
    assert shape == ModelShape(
        body_params=4 * (4 * 64 * 64 + 3 * 64 * 160),
        head_params=64 * 200,
        attention_layers=4,
        attention_dim=64,
        hidden_size=64,
        vocab_size=200,
    )


def test_grouped_keys_shrink_projections_and_not_scores() -> None:
    shape = ModelShape.from_model(build(QWEN))
    assert shape.body_params == 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert shape.attention_dim == 64
    assert shape.head_params == 64 * 200, "a tied head is a matrix product all the same"
    wide = ModelShape.from_model(build(WIDE))
    assert wide.attention_dim == 4 * 48


def test_layers_that_are_no_linear_count() -> None:
    gpt2 = ModelShape.from_model(build(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)))
    assert (gpt2.body_params, gpt2.head_params, gpt2.attention_dim) == (2 * 12 * 32 * 32, 32 * 50, 32)


def test_experts_count_by_the_active_share() -> None:
    config = MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)
    shape = ModelShape.from_model(build(config))
    assert shape.body_params == 4 * (2 * 64 * 64 + 2 * 64 * 32 + 8 * 64 + 2 * 3 * 64 * 160)


def test_experts_in_a_list_count_by_the_active_share() -> None:
    class Listed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = MixtralConfig(**SIZES, num_attention_heads=4, num_local_experts=8, num_experts_per_tok=2)
            self.embed = torch.nn.Embedding(200, 64)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 160) for _ in range(8))
            self.shared_experts = torch.nn.Linear(64, 10)
            self.head = torch.nn.Linear(64, 200)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    assert ModelShape.from_model(Listed()).body_params == 2 * 64 * 160 + 64 * 10


def test_sliding_windows_are_read() -> None:
    mistral = MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    shape = ModelShape.from_model(build(mistral))
    assert (shape.attention_layers, shape.sliding_layers, shape.sliding_window) == (0, 4, 16)
    mixed = Qwen2Config(**SIZES, num_attention_heads=4, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    shape = ModelShape.from_model(build(mixed))
    assert (shape.attention_layers, shape.sliding_layers, shape.sliding_window) == (3, 1, 8)


def test_latent_attention_takes_the_mean_of_score_and_value_heads() -> None:
    model = build(LLAMA)
    for name, value in {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}.items():
        setattr(model.config, name, value)
    assert ModelShape.from_model(model).attention_dim == 4 * (24 + 8 + 16) // 2


def test_a_model_without_head_or_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no output embeddings"):
        ModelShape.from_model(torch.nn.Linear(2, 2))
    model = build(LLAMA)
    model.config = PretrainedConfig()
    with pytest.raises(ValueError, match="has none of num_hidden_layers; build ModelShape by hand"):
        ModelShape.from_model(model)


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 50))
def test_pairs_are_those_of_the_mask(lengths: list[int], window: int) -> None:
    def seen(query: int) -> int:
        return min(query + 1, window) if window else query + 1

    assert causal_pairs(lengths, window=window) == sum(seen(q) for n in lengths for q in range(n))


def test_flops_by_hand() -> None:
    attention = 4 * 8 * 2 * (3 * 4 // 2 + 5 * 6 // 2)
    assert forward_flops(TINY, [3, 5], 4) == 2 * 1000 * 8 + 2 * 100 * 4 + attention
    assert backward_flops(TINY, [3, 5], 4) == 2 * forward_flops(TINY, [3, 5], 4)
    assert reference_flops(TINY, [3, 5], 4) == forward_flops(TINY, [3, 5], 4)
    assert prefill_flops(TINY, [3, 5]) == forward_flops(TINY, [3, 5], 2)
    checkpointed = backward_flops(TINY, [3, 5], 4, checkpointing=True) - backward_flops(TINY, [3, 5], 4)
    assert checkpointed == forward_flops(TINY, [3, 5], 0)
    # A prompt of 3: the second of two completion tokens sees 4 keys; one-token and empty completions need no pass.
    assert decode_flops(TINY, [3, 9], [[2, 1, 0], []]) == 2 * 1100 + 4 * 8 * 2 * 4


def test_leading_terms_are_those_of_the_papers() -> None:
    shape = ModelShape(7 * 10**9, 5 * 10**8, 32, 4096, 4096, 128_000)
    n, attention, prompt, completion = 7.5e9, 2.0 * 32 * 4096, 1000, 30_000
    total = prompt + completion
    assert decode_flops(shape, [prompt], [[completion]]) == pytest.approx(
        2 * n * completion + attention * (total**2 - prompt**2), rel=1e-3
    )
    both = forward_flops(shape, [total], total) + backward_flops(shape, [total], total)
    assert both == pytest.approx(6 * n * total + 3 * attention * total**2, rel=1e-3)
    lora = ModelShape(7 * 10**9, 5 * 10**8, 32, 4096, 4096, 128_000, lora_params=40_000_000)
    both = forward_flops(lora, [total], total) + backward_flops(lora, [total], total)
    assert both == pytest.approx(4 * n * total + 6 * 4e7 * total + 3 * attention * total**2, rel=1e-3)


def test_sliding_layers_see_their_window_only() -> None:
    sliding = ModelShape(1000, 100, 1, 8, 8, 12, sliding_layers=1, sliding_window=2)
    assert forward_flops(TINY, [5], 0) - forward_flops(sliding, [5], 0) == 4 * 8 * (15 - 9)


@REAL
def test_profiler_agrees_on_forward_and_backward(config: PretrainedConfig) -> None:
    model, length = build(config), 128
    shape = ModelShape.from_model(model)
    tokens = torch.randint(0, 200, (2, length))
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, labels=tokens).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    surplus = 2 * dense_surplus(shape, length)
    lengths, rows = [length] * 2, 2 * length
    assert surplus > 0.05 * forward.get_total_flops(), "attention must be large enough to be checked"
    assert forward_flops(shape, lengths, rows) + surplus == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert backward_flops(shape, lengths, rows) + 2 * surplus == pytest.approx(backward.get_total_flops(), rel=0.01)


@REAL
def test_profiler_agrees_on_prefill_and_decode(config: PretrainedConfig) -> None:
    model, prompt, completion = build(config).eval(), 60, 70
    shape = ModelShape.from_model(model)
    tokens = torch.randint(0, 200, (1, prompt + completion))
    with torch.no_grad():
        with FlopCounterMode(display=False) as prefill:
            cache = model(tokens[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
        with FlopCounterMode(display=False) as decode:
            for start, end in pairwise(range(prompt, prompt + completion)):
                cache = model(tokens[:, start:end], use_cache=True, **{cache_argument(model): cache}).past_key_values
    expected = prefill_flops(shape, [prompt]) + dense_surplus(shape, prompt)
    assert expected == pytest.approx(prefill.get_total_flops(), rel=0.01)
    # One query over its true keys at a time: here the counter itself counts the causal mask, with nothing to add.
    assert decode_flops(shape, [prompt], [[completion]]) == pytest.approx(decode.get_total_flops(), rel=0.01)


def test_profiler_agrees_that_only_scored_rows_pass_the_head() -> None:
    model = build(LLAMA)
    shape = ModelShape.from_model(model)
    tokens, rows = torch.randint(0, 200, (1, 64)), torch.arange(40, 63)
    with FlopCounterMode(display=False) as counter:
        model.lm_head(model.model(tokens).last_hidden_state[0, rows]).logsumexp(-1).sum().backward()
    surplus = 3 * dense_surplus(shape, 64)
    ours = forward_flops(shape, [64], 23) + backward_flops(shape, [64], 23) + surplus
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("early_stop", "tolerance"), [(False, 0.01), (True, 0.05)])
def test_profiler_agrees_on_checkpointing(early_stop: bool, tolerance: float) -> None:
    # PyTorch stops recomputing once the last saved tensor is back, which spares each layer's last product.
    model = build(LLAMA)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # transformers renamed it
    shape = ModelShape.from_model(model)
    tokens = torch.randint(0, 200, (1, 64))
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(early_stop):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    ours = forward_flops(shape, [64], 64) + backward_flops(shape, [64], 64, checkpointing=True)
    assert ours + 4 * dense_surplus(shape, 64) == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_profiler_agrees_on_active_experts() -> None:
    config = MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model = build(config).eval()
    model.set_experts_implementation("eager")  # the counter does not know grouped matrix products
    shape = ModelShape.from_model(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 200, (1, 64)))
    assert forward_flops(shape, [64], 64) + dense_surplus(shape, 64) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT still asks by the old name
def test_profiler_agrees_on_lora() -> None:
    model = get_peft_model(build(LLAMA), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    shape = ModelShape.from_model(model)
    assert shape.lora_params == 8 * 4 * (4 * 128 + 3 * 224)
    assert shape.body_params == 4 * (4 * 64 * 64 + 3 * 64 * 160)
    tokens = torch.randint(0, 200, (1, 96))
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=tokens, labels=tokens).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    surplus = dense_surplus(shape, 96)
    assert forward_flops(shape, [96], 96) + surplus == pytest.approx(forward.get_total_flops(), rel=0.05)
    assert backward_flops(shape, [96], 96) + 2 * surplus == pytest.approx(backward.get_total_flops(), rel=0.05)
