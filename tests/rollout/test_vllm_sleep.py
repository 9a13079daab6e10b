from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast import recipe
from grpo_fast.assets import embedded_model_dir
from grpo_fast.metrics import PhaseTimer
from grpo_fast.rewards import RewardPool
from grpo_fast.rollout import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings
from grpo_fast.rollout.vllm_sleep import Sleeper, check_segments, sleep_level
from grpo_fast.tasks.stream import PromptStream
from grpo_fast.train.collect import Collector
from grpo_fast.train.episodes import OneTurn
from grpo_fast.types import Prompt

PROMPTS = [[1] + [3 + (7 * place) % 50 for place in range(75)], [1, 4, 5, 6]]
SAMPLING = SamplingParams(max_tokens=8)


def test_the_level_follows_what_the_next_sync_brings() -> None:
    assert sleep_level(on_gpu=True, has_adapters=False) == 2
    assert sleep_level(on_gpu=True, has_adapters=True) == 1
    with pytest.raises(ValueError, match=r"sleep mode works on GPUs only; set vllm_enable_sleep_mode=False"):
        sleep_level(on_gpu=False, has_adapters=False)


def test_expandable_segments_that_vllm_would_not_see_are_refused() -> None:
    expandable = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:True"}
    with pytest.raises(
        ValueError, match=r"expandable_segments:True'.*vLLM 0\.31\.2 disables.*set that variable, or install vLLM 0\.32"
    ):
        check_segments(Version("0.31.2"), expandable)
    check_segments(Version("0.32.0"), expandable)
    check_segments(Version("0.28.0"), {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    check_segments(Version("0.28.0"), {"PYTORCH_ALLOC_CONF": "expandable_segments:False"})


def test_a_part_is_woken_once_and_only_where_it_sleeps() -> None:
    calls: list[Any] = []
    sleeper = Sleeper(calls.append, calls.append)
    sleeper.wake("weights")
    sleeper.sleep(2)
    sleeper.sleep(2)
    sleeper.wake("weights")
    sleeper.wake("weights")
    sleeper.wake("kv_cache")
    assert calls == [2, "weights", "kv_cache"]


def test_what_could_not_be_put_to_sleep_is_woken_all_the_same() -> None:
    woken: list[str] = []

    def fail(level: int) -> None:
        raise ConnectionError(f"one server took level {level}, and the next is gone")

    sleeper = Sleeper(fail, woken.append)
    with pytest.raises(ConnectionError):
        sleeper.sleep(1)
    sleeper.wake("kv_cache")
    assert woken == ["kv_cache"]


@pytest.mark.vllm
def test_the_sync_wakes_vllm_part_by_part(
    embedded: Any, perturb: Callable[..., None], measure_errors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU vLLM's workers keep their memory, but its engine sleeps and wakes by the same rules."""
    model, _, engine = embedded
    target = engine._vllm
    llm = target._llm
    monkeypatch.setattr(engine, "_level", 2)
    before = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, before, 1.0).agrees
    engine.sleep()
    assert llm.llm_engine.is_sleeping()
    with pytest.raises(WeightSyncError, match="vLLM sleeps until the next weight sync"):
        engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    perturb(model, seed=1)
    asleep: dict[str, set[str]] = {}

    def seen(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            asleep[name] = set(llm.llm_engine.model_executor.sleeping_tags)
            return work(*given)

        return run

    for name in ("send", "finish", "reset_prefix_cache", "resume", "answer"):
        monkeypatch.setattr(target, name, seen(name, getattr(target, name)))
    assert engine.sync_weights(model, 1)["sync/probe_kl"] < 1e-8
    assert asleep == {"send": {"kv_cache"}, "finish": {"kv_cache"}, "reset_prefix_cache": {"kv_cache"}} | {
        "resume": set(),
        "answer": set(),
    }
    assert not llm.llm_engine.is_sleeping()
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, answers, 1.0).agrees


@pytest.mark.vllm
def test_a_step_puts_vllm_to_sleep_when_all_its_rollouts_are_made(
    embedded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tokenizer, engine = embedded
    monkeypatch.setattr(engine, "_level", 2)
    calls = count(1)
    sample = engine._vllm.sample

    def counted(*given: Any) -> Any:
        next(calls)
        return sample(*given)

    monkeypatch.setattr(engine._vllm, "sample", counted)
    prompts = [Prompt(number, f"{number}+1=", tuple(tokenizer(f"{number}+1=").input_ids)) for number in range(8)]
    settings = {"rollout": "vllm", "vllm_enable_sleep_mode": True, "refill_rounds": 1}
    config = recipe("embedded", output_dir=tmp_path, prompts_per_step=2, num_generations=2, **settings)
    rewards = RewardPool([lambda prompts, completions, **_: [1.0] * len(completions)], workers=0)
    collector = Collector(config, sampler=OneTurn(engine), stream=PromptStream(prompts, seed=0, shuffle=False), rewards=rewards)
    for step in (1, 2):
        collector.collect(step, PhaseTimer())
        assert next(calls) == 3 * step, "groups without variance were not refilled"
        assert engine._vllm._llm.llm_engine.is_sleeping()
        engine.sync_weights(model, step)


@pytest.mark.vllm
def test_requests_that_run_keep_vllm_awake(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams as VLLMSamplingParams

    engine = embedded.engine
    monkeypatch.setattr(engine, "_level", 2)
    core = engine._vllm._llm.llm_engine
    name = core.add_request("running", {"prompt_token_ids": [1, 4]}, VLLMSamplingParams(max_tokens=4))
    with pytest.raises(RolloutError, match="vLLM could not be put to sleep: vLLM still has unfinished requests"):
        engine.sleep()
    core.abort_request([name], internal=True)
    engine.sync_weights(embedded.model, 2)


@pytest.mark.vllm
def test_an_engine_without_a_gpu_is_refused_before_it_is_built(embedded: Any) -> None:
    with pytest.raises(ValueError, match="sleep mode works on GPUs only"):
        VLLMEngine(embedded.model, embedded.tokenizer, settings=VLLMSettings(enable_sleep_mode=True))


@pytest.mark.vllm
def test_vllm_refuses_to_sleep_on_a_cpu(embedded: Any) -> None:
    """What the rule above rests on; where it fails, vLLM has learnt to."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM found a GPU")
    assert not current_platform.is_sleep_mode_available()


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("own_process", [False, True])
def test_a_sleeping_engine_gives_its_memory_back(own_process: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32).cuda()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(enable_sleep_mode=True, kv_cache_bytes=2 * 2**30, own_process=own_process, sync_deadline_s=60)
    engine = VLLMEngine(model, tokenizer, settings=settings)
    try:
        awake, _ = torch.cuda.mem_get_info()
        for version in (1, 2):
            engine.sleep()
            asleep, _ = torch.cuda.mem_get_info()
            assert asleep - awake > 1.5 * 2**30
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(2e-3 * torch.randn_like(weight))
            assert engine.sync_weights(model, version)["sync/version"] == version
            assert engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=version)[0][0].weight_version == version
    finally:
        engine.close()
