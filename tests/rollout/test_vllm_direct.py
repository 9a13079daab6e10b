"""An engine that reads the policy's own parameters: what a user of ``rollout='vllm'`` has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import SamplingParams, WeightSyncError
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings

pytestmark = pytest.mark.vllm

PROMPTS = [[1] + [3 + (7 * position) % 50 for position in range(75)], [1, 4, 5, 6]]
SAMPLING = SamplingParams(max_tokens=12, temperature=0.7)


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    engine = VLLMEngine(model, tokenizer, settings=VLLMSettings(sync_deadline_s=60))
    yield engine
    engine.close()


def test_twenty_syncs_and_the_logprobs_are_the_policys_after_each(
    engine: VLLMEngine, perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    model = engine._model
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    for version in range(1, 21):
        perturb(model, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).engine > 1e-3
        metrics = engine.sync_weights(model, version)
        answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
        assert metrics["sync/bytes"] == sum(weight.nbytes for weight in model.parameters())


def test_the_engine_keeps_its_weights_while_the_policy_moves_on(
    engine: VLLMEngine, perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    """Weights that need no conversion are handed over as they are; the engine must have copied them all the same."""
    model = engine._model
    engine.sync_weights(model, 30)
    before = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=3)
    perturb(model, seed=30, scale=0.05)
    assert engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=3) == before
    engine.sync_weights(model, 31)
    assert engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=3) != before


def test_a_sync_that_breaks_off_half_way_is_done_again_whole(
    engine: VLLMEngine, perturb: Callable[..., None], measure_errors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_fast.rollout.vllm_layerwise import PolicyWeights

    model, uncast = engine._model, PolicyWeights.uncast
    for times, version in ((1, 40), (2, 41)):
        perturb(model, seed=version)
        tries: list[int] = []

        def break_off(own: PolicyWeights, tries: list[int] = tries, times: int = times) -> Iterator[tuple[str, torch.Tensor]]:
            tries.append(1)
            for number, pair in enumerate(uncast(own)):
                if number == 9 and len(tries) <= times:
                    raise ConnectionError("the gathering broke")
                yield pair

        with monkeypatch.context() as patch:
            patch.setattr(PolicyWeights, "uncast", break_off)
            if times == 1:
                engine.sync_weights(model, version)
            else:
                with pytest.raises(WeightSyncError, match="phase 'send': the gathering broke; 2 attempts were made"):
                    engine.sync_weights(model, version)
                assert engine.weight_version is None
        assert len(tries) == 2
    engine.sync_weights(model, 42)
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
