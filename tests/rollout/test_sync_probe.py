from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast.rollout.sync_probe import NUM_PLACES, Choices, Scores, SyncProbe, compare


def build_probe(block_size: int = 4, context_length: int = 64, dtype: torch.dtype = torch.float32) -> SyncProbe:
    return SyncProbe.build(
        vocabulary=40,
        block_size=block_size,
        context_length=context_length,
        engine_dtype=dtype,
        autocast_dtype=None if dtype == torch.float32 else dtype,
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        )
    )


def likeliest(logprobs: torch.Tensor, count: int = 20) -> list[Choices]:
    found = logprobs.topk(count)
    return [dict(zip(*row, strict=True)) for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def test_the_prompt_is_longer_than_two_blocks_and_always_the_same() -> None:
    assert len(build_probe(block_size=16).prompt) > 32
    assert build_probe() == build_probe()
    assert len(set(build_probe(block_size=16).prompt)) > 20


def test_a_context_without_room_for_two_blocks_is_refused() -> None:
    length = len(build_probe(block_size=8).prompt) + 1
    build_probe(block_size=8, context_length=length)
    with pytest.raises(ValueError, match=f"two cache blocks of 8 tokens does not fit the context of {length - 1}"):
        build_probe(block_size=8, context_length=length - 1)


def test_scores_are_the_models_own(model: LlamaForCausalLM) -> None:
    probe = build_probe()
    scores = probe.score(model).logprobs
    assert scores.dtype == torch.float64
    assert scores.shape == (NUM_PLACES, 40)
    double = LlamaForCausalLM(model.config).double()
    double.load_state_dict(model.state_dict())
    for prompt, row in zip(probe.prompts, scores, strict=True):
        logits = double(torch.tensor([prompt])).logits[0, -1]
        assert torch.allclose(row, logits.log_softmax(-1), atol=2e-6, rtol=0)


def test_the_second_prompt_needs_one_token_beside_two_whole_blocks() -> None:
    first, second = build_probe(block_size=16).prompts
    assert len(second) == 2 * 16 + 1
    assert first[:-1] == second


def test_the_divergence_is_that_of_the_formula() -> None:
    q = [{3: math.log(0.5), 8: math.log(0.1)}, {0: math.log(0.2), 9: math.log(0.6)}]
    own = torch.full((2, 10), -50.0, dtype=torch.float64)
    shifts = [{3: 0.3, 8: -0.1}, {0: 0.0, 9: 0.02}]
    for row, choices, shift in zip(own, q, shifts, strict=True):
        for token, logprob in choices.items():
            row[token] = logprob + shift[token]
    found = compare(own, q)
    k3 = [{token: math.exp(d) - 1 - d for token, d in shift.items()} for shift in shifts]
    expected = ((0.5 * k3[0][3] + 0.1 * k3[0][8]) / 0.6 + (0.2 * k3[1][0] + 0.6 * k3[1][9]) / 0.8) / 2
    assert found.kl == pytest.approx(expected, rel=1e-12)
    assert found.largest == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("side", ["own", "theirs"])
def test_what_is_no_number_is_found(side: str) -> None:
    own, theirs = torch.full((1, 4), -1.5, dtype=torch.float64), [{0: -1.5, 2: -1.5}]
    if side == "own":
        own[0, 2] = math.nan
    else:
        theirs[0][0] = math.nan
    found = compare(own, theirs)
    assert math.isnan(found.kl)
    assert math.isnan(found.largest)


def test_the_gate_lets_rounding_through_and_one_small_update_not(model: LlamaForCausalLM) -> None:
    probe = build_probe()
    own = probe.score(model)
    logprobs = own.logprobs
    rounded = logprobs.float() + torch.linspace(-2e-5, 2e-5, logprobs.numel()).view_as(logprobs)
    assert compare(logprobs, likeliest(rounded)).kl <= probe.allowed(own)
    moved = LlamaForCausalLM(model.config)
    moved.load_state_dict({name: weight + 1e-3 * weight.sign() for name, weight in model.state_dict().items()})
    assert compare(probe.score(moved).logprobs, likeliest(logprobs)).kl > probe.allowed(own)


def test_one_weight_of_one_layer_is_enough(model: LlamaForCausalLM) -> None:
    """As where a single tensor did not arrive."""
    probe = build_probe()
    own = probe.score(model)
    logprobs = own.logprobs
    for name, _ in model.named_parameters():
        moved = LlamaForCausalLM(model.config)
        moved.load_state_dict(model.state_dict())
        with torch.no_grad():
            moved.get_parameter(name).mul_(1.01)
        assert compare(probe.score(moved).logprobs, likeliest(logprobs)).kl > probe.allowed(own), name


@pytest.mark.parametrize(("largest", "spacing"), [(16.0, 0.125), (31.9, 0.125), (32.0, 0.25), (63.0, 0.25), (100.0, 0.5)])
def test_the_gate_grows_with_the_spacing_of_an_engines_logits(largest: float, spacing: float) -> None:
    held = torch.tensor(largest, dtype=torch.bfloat16)
    assert (torch.nextafter(held, torch.tensor(torch.inf, dtype=torch.bfloat16)) - held).item() == spacing
    scores = Scores(torch.empty(0), largest)
    assert build_probe(dtype=torch.bfloat16).allowed(scores) == max(5e-3, spacing**2 / 4)
    assert build_probe(dtype=torch.bfloat16).allowed(Scores(torch.empty(0), 9.0)) == 5e-3
    assert build_probe().allowed(scores) == 1e-8, "float32 rounds nothing that could be seen"


@pytest.mark.parametrize("offset", [4.0, 40.0, 90.0])
def test_large_logits_that_an_engine_rounds_pass_and_other_weights_do_not(model: LlamaForCausalLM, offset: float) -> None:
    """An engine that errs in nothing but its last rounding; with this policy's own rounding beside it 5e-3 was not enough."""
    probe = build_probe(dtype=torch.bfloat16)
    large = copy.deepcopy(model)
    with torch.no_grad():
        hidden = large.model(torch.tensor([probe.prompt])).last_hidden_state[0, -NUM_PLACES:].mean(0)
        large.lm_head.weight.add_(offset * hidden / hidden.square().sum())
        logits = large(torch.tensor([probe.prompt])).logits[0, -NUM_PLACES:].flip(0)
    own = probe.score(large)
    assert own.largest_logit == pytest.approx(logits.topk(20).values.abs().max().item(), rel=2e-2)
    rounded = likeliest(logits.bfloat16().double().log_softmax(-1))
    assert compare(own.logprobs, rounded).kl <= probe.allowed(own)
    with torch.no_grad():
        large.model.layers[1].mlp.down_proj.weight.mul_(3.0)
    assert compare(probe.score(large).logprobs, rounded).kl > probe.allowed(own)


def test_of_a_short_type_the_head_alone_is_computed_in_float32(model: LlamaForCausalLM) -> None:
    probe = build_probe(dtype=torch.bfloat16)
    ids = torch.tensor([probe.prompt])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(ids).last_hidden_state[0, -NUM_PLACES:].bfloat16()
        short = model(ids).logits[0, -NUM_PLACES:]
    exact = (hidden.double() @ model.lm_head.weight.bfloat16().double().T).log_softmax(-1).flip(0)
    assert short.dtype == torch.bfloat16
    assert (short.double().log_softmax(-1).flip(0) - exact).abs().max() > 1e-3
    assert (probe.score(model).logprobs - exact).abs().max() < 1e-5
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids).logits[0, -NUM_PLACES:].equal(short), "the policy is left as it was"
