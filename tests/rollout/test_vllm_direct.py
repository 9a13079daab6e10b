"""An engine that reads the policy's own parameters: what a user of ``rollout='vllm'`` has."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings
from grpo_fast.types import Completion

pytestmark = pytest.mark.vllm

PROMPTS = [[1] + [3 + (7 * position) % 50 for position in range(75)], [1, 4, 5, 6]]
SAMPLING = SamplingParams(max_tokens=12, temperature=0.7)


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(sync_deadline_s=60, engine_args={"max_num_seqs": 3})
    engine = VLLMEngine(model, tokenizer, settings=settings)
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


def test_arguments_of_vllms_engine_reach_it(engine: VLLMEngine) -> None:
    assert engine._vllm._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 3
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=0)
    assert [len(group) for group in answers] == [4, 4], "the others wait their turn"


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
                with pytest.raises(
                    WeightSyncError, match=r"phase 'send': the gathering broke \(attempt 2 of 2\); nothing was sampled"
                ):
                    engine.sync_weights(model, version)
                assert engine.weight_version is None
        assert len(tries) == 2
    engine.sync_weights(model, 42)
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees


@pytest.fixture
def long_requests() -> dict[str, Any]:
    """Requests that run for a hundred steps, where a policy is flat and the end token one of 64."""
    prompts = [[1, 3 + number % 50, 5 + number % 7] for number in range(48)]
    return {"prompts": prompts, "sampling": SamplingParams(max_tokens=110, temperature=2.0), "num_generations": 4, "seed": 5}


def test_requests_that_run_refuse_a_sync_that_waits_for_none(
    engine: VLLMEngine, long_requests: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flatten(engine._model)
    engine.sync_weights(engine._model, 49)
    slow_down(engine, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.generate, **long_requests | {"prompts": long_requests["prompts"][:4]})
        until_running(engine)
        with pytest.raises(WeightSyncError, match="phase 'pause': vLLM still has unfinished requests"):
            engine.sync_weights(engine._model, 50)
        running.result()
    engine.sync_weights(engine._model, 50)


def test_requests_that_are_kept_go_on_by_the_new_weights(
    perturb: Callable[..., None],
    measure_errors: Callable[..., Any],
    long_requests: dict[str, Any],
    engine: VLLMEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs last: another engine takes the place of the module's."""
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    flatten(model)
    keeping = VLLMEngine(model, tokenizer, settings=VLLMSettings(sync_deadline_s=60, pause_mode="keep"))
    slow_down(keeping, monkeypatch)
    policies = [copy.deepcopy(model)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(keeping.generate, **long_requests)
        until_running(keeping)
        for version in (1, 2):
            time.sleep(0.1)
            perturb(model, seed=version, scale=0.02)
            keeping.sync_weights(model, version)
            policies.append(copy.deepcopy(model))
        assert not running.done()
        answers = running.result()
    mixed = [completion for group in answers for completion in group if completion.weight_versions]
    assert len(mixed) > 50
    assert {version for completion in mixed for version in completion.weight_versions} == {0, 1, 2}
    for prompt, group in zip(long_requests["prompts"][:16], answers, strict=False):
        for completion in group:
            assert_each_token_is_of_its_version(policies, prompt, completion, long_requests["sampling"].temperature)
    after = keeping.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, after, SAMPLING.temperature).agrees

    running = ThreadPoolExecutor(1).submit(keeping.generate, **long_requests)
    until_running(keeping)
    keeping.close()
    with pytest.raises(RolloutError, match="the engine was closed while requests ran"):
        running.result(timeout=20)


@torch.no_grad()
def flatten(model: Any) -> None:
    model.lm_head.weight.mul_(0.1)


def slow_down(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of such a model are over so soon that all would be done before a thread that changes weights has its turn."""
    inside = engine._vllm._llm.llm_engine
    step = inside.step

    def slow() -> Any:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(inside, "step", slow)


def until_running(engine: VLLMEngine) -> None:
    for _ in range(1000):
        if engine._vllm._llm.llm_engine.has_unfinished_requests():
            return
        time.sleep(0.005)
    raise TimeoutError


@torch.no_grad()
def assert_each_token_is_of_its_version(
    policies: list[Any], prompt: list[int], completion: Completion, temperature: float
) -> None:
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logits = [policy(ids).logits[0, len(prompt) - 1 : -1] / temperature for policy in policies]
    scores = [each.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0] for each in logits]
    own = torch.tensor(completion.logprobs)
    versions = torch.tensor(completion.weight_versions or [completion.weight_version] * len(own))
    assert versions.diff().ge(0).all()
    errors = (torch.stack(scores) - own).abs()
    positions = torch.arange(len(own))
    assert errors[versions, positions].max() < 1e-5
    if len(own) > 20:
        assert errors[(versions + 1) % 3, positions].max() > 1e-4, "another version's would be seen"
