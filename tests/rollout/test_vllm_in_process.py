from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from grpo_fast.rollout import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.sync_probe import NUM_CHOICES, NUM_PLACES, SyncProbe, compare
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings
from grpo_fast.rollout.vllm_sample import PROBE_PARAMS, SCORE_PARAMS
from grpo_fast.types import Completion

pytestmark = pytest.mark.vllm


class Beside(NamedTuple):
    """An engine in a process of its own, and all that it started."""

    engine: VLLMEngine
    started: set[psutil.Process]


@pytest.fixture(scope="module")
def beside(embedded: Any) -> Iterator[Beside]:
    """An engine in a process of its own, which the last test kills."""
    model, tokenizer, _ = embedded
    before = set(psutil.Process().children(recursive=True))
    settings = VLLMSettings(
        own_process=True, pause_mode="keep", bucket_bytes=300_000, sync_deadline_s=60, request_deadline_s=120
    )
    engine = VLLMEngine(model, tokenizer, settings=settings)
    started = set(psutil.Process().children(recursive=True)) - before
    yield Beside(engine, {each for each in started if "resource_tracker" not in " ".join(each.cmdline())})  # Python's own
    engine.close()


@pytest.fixture
def probe(embedded: Any) -> SyncProbe:
    return SyncProbe.build(
        vocabulary=64,
        block_size=embedded.engine._vllm.block_size,
        context_length=128,
        engine_dtype=torch.float32,
        autocast_dtype=None,
    )


def test_both_scorings_of_the_probe_are_the_policys(embedded: Any, probe: SyncProbe) -> None:
    target = embedded.engine._vllm
    own = probe.score(embedded.model).logprobs
    for choices in (*target.answer(probe.prompts), *target.score(probe.prompt)):
        assert [len(each) >= NUM_CHOICES for each in choices] == [True] * NUM_PLACES
        assert compare(own, choices).largest < 5e-5


def test_the_probe_reads_the_prefix_cache_and_the_other_scoring_does_not(embedded: Any, probe: SyncProbe) -> None:
    """Otherwise keys and values of older weights would pass, or would be mistaken for weights that did not arrive."""
    from vllm import SamplingParams

    target = embedded.engine._vllm
    assert target.reset_prefix_cache()
    cached = [
        target._run([prompt], [SamplingParams(**params)], lambda output: output.num_cached_tokens)[0]
        for prompt, params in (*((prompt, PROBE_PARAMS) for prompt in probe.prompts), (probe.prompt, SCORE_PARAMS))
    ]
    assert cached == [0, len(probe.prompts[1]) - 1, 0]


def test_versions_are_numbers(embedded: Any) -> None:
    target = embedded.engine._vllm
    assert target.weight_version() == 0
    target._llm.update_weight_version("someone else's")
    assert target.weight_version() is None


def test_leaving_an_update_that_never_began_is_harmless(embedded: Any) -> None:
    embedded.engine._vllm.undo()
    embedded.engine.sync_weights(embedded.model, 3)
    assert embedded.engine._vllm.weight_version() == 3


@contextmanager
def failing_step(embedded: Any, number: int) -> Iterator[None]:
    """Has vLLM's model fail in the middle of one step, as it would for want of memory."""
    worker = embedded.engine._vllm._llm.llm_engine.model_executor.driver_worker.worker
    steps = itertools.count(1)

    def fail(*_: Any) -> None:
        if next(steps) == number:
            raise MemoryError("no room for a layer")

    layer = next(module for name, module in worker.model_runner.model.named_modules() if name.endswith("layers.2"))
    handle = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("step", [1, 4])
def test_a_step_that_fails_leaves_nothing_behind(embedded: Any, probe: SyncProbe, step: int) -> None:
    """Not even keys and values: vLLM takes those of the failed step for computed, which a prompt of two blocks would read."""
    engine, sampling = embedded.engine, SamplingParams(max_tokens=12)
    prompts = [probe.prompt, [1, 4, 5, 6]]
    engine.sync_weights(embedded.model, 4)
    whole = engine.generate(prompts, sampling, num_generations=4, seed=1)
    assert engine._vllm.reset_prefix_cache()
    failed = pytest.raises(
        RolloutError, match=r"vLLM failed with MemoryError: no room for a layer; its [12] requests were dropped"
    )
    with failing_step(embedded, step), failed as caught:
        engine.generate(prompts, sampling, num_generations=4, seed=1)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert engine.generate(prompts, sampling, num_generations=4, seed=1) == whole
    assert engine.sync_weights(embedded.model, 5)["sync/probe_kl"] < 1e-8


def test_a_step_that_fails_ends_the_requests_of_every_thread(embedded: Any) -> None:
    sampling = SamplingParams(max_tokens=24)

    def ask(seed: int) -> Any:
        return embedded.engine.generate([[1, 4, 5, 6]], sampling, num_generations=4, seed=seed)

    with failing_step(embedded, 3), ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, seed) for seed in (1, 2)]
        errors = [each.exception() for each in asked]
    assert any(isinstance(error, RolloutError) for error in errors)
    assert all(error is None or "MemoryError" in str(error) for error in errors)
    assert embedded.engine.sync_weights(embedded.model, 6)["sync/version"] == 6


def test_a_step_that_hangs_does_not_hold_up_the_end_for_ever(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = embedded.engine._vllm
    monkeypatch.setattr(target, "_step_s", 0.1)
    with target._turn, pytest.raises(RolloutError, match=r"vLLM's step did not end within 0\.1 s \(sync_deadline_s\)"):
        target.close()
    target.resume()


def test_after_an_interrupt_the_cache_is_emptied_before_the_next_request(
    embedded: Any, probe: SyncProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at once: Ctrl-C would wait for an engine that hangs."""
    engine, target = embedded.engine, embedded.engine._vllm
    engine.sync_weights(embedded.model, 7)
    whole = engine.generate([probe.prompt], SamplingParams(max_tokens=4), num_generations=2, seed=1)
    asked = []

    def interrupted() -> None:
        raise KeyboardInterrupt  # no signal: a test run that was started in the background ignores it

    with monkeypatch.context() as patch:
        patch.setattr(target._llm.llm_engine, "step", interrupted)
        patch.setattr(target._llm, "reset_prefix_cache", lambda **_: asked.append("reset"))
        with pytest.raises(KeyboardInterrupt):
            engine.generate([probe.prompt], SamplingParams(max_tokens=4), num_generations=2, seed=1)
        with pytest.raises(RolloutError, match="cache could not be emptied after an earlier failure; sync the weights again"):
            engine.generate([probe.prompt], SamplingParams(max_tokens=4), num_generations=2, seed=1)
    assert asked == ["reset"]
    assert engine.generate([probe.prompt], SamplingParams(max_tokens=4), num_generations=2, seed=1) == whole


def test_what_vllm_itself_refuses_leaves_no_request_behind(embedded: Any) -> None:
    target = embedded.engine._vllm
    params = [{"max_tokens": 4}, {"max_tokens": 4, "logit_bias": {10_000: 1.0}}]
    with pytest.raises(RolloutError, match=r"vLLM failed with \w+: .*10000"):
        target.sample([[1, 4], [1, 5]], params)
    target.pause()


def test_another_process_cannot_read_weights_where_they_are(embedded: Any) -> None:
    with pytest.raises(ValueError, match="'direct' cannot reach an engine in its own process"):
        VLLMEngine(embedded.model, embedded.tokenizer, settings=VLLMSettings(own_process=True, transport="direct"))


@pytest.mark.usefixtures("untraced")
def test_a_process_of_its_own_takes_no_step_while_weights_change_under_requests_that_it_keeps(
    embedded: Any, beside: Beside, perturb: Callable[..., None]
) -> None:
    """Left alone it steps whenever it has requests, also between two buckets: on a CPU it meets layers without weights."""
    model, engine = embedded.model, beside.engine
    prompts = [[1] + [3 + (7 * (number + place)) % 50 for place in range(20)] for number in range(16)]
    sampling = SamplingParams(max_tokens=100, temperature=1.5)
    seeds, synced = itertools.count(), threading.Event()

    def generate() -> list[tuple[list[int], Completion]]:
        groups = engine.generate(prompts, sampling, num_generations=16, seed=next(seeds))
        return [(prompt, each) for prompt, group in zip(prompts, groups, strict=True) for each in group]

    def generate_until_synced() -> list[tuple[list[int], Completion]]:
        """How many requests are over before a sync is a question of how fast the machine is: others come after them."""
        found = []
        while not synced.is_set():
            found += generate()
        return found + generate()

    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(generate_until_synced)
        try:
            for version in (1, 2, 3):
                while not engine._vllm._running and not kept.done():
                    time.sleep(0.01)
                perturb(model, seed=version, scale=0.02)
                assert engine.sync_weights(model, version)["sync/probe_kl"] < 1e-8
        finally:
            synced.set()
        answers = kept.result(timeout=120)
    assert not engine._vllm._llm.llm_engine.is_sleeping()
    assert max(len(set(completion.weight_versions)) for _, completion in answers) > 1, "no sync met a request that ran"
    worst = 0.0
    for prompt, completion in answers:
        own = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1].detach() / 1.5
        told = own.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        for here, there, version in zip(told.tolist(), completion.logprobs, completion.weight_versions, strict=False):
            worst = max(worst, abs(here - there)) if version == 3 else worst
    assert 0 < worst < 5e-5, "what was sampled since the last sync is the last weights'"


@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
def test_an_engine_in_a_process_of_its_own_takes_two_hundred_syncs_and_no_memory(
    embedded: Any, beside: Beside, perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    model, engine, started = embedded.model, *beside
    assert started
    assert not hasattr(engine._vllm._llm.llm_engine, "model_executor"), "it is where the engine before it was"
    processes = [psutil.Process(), *started]

    def resident_mib() -> list[float]:
        return [process.memory_info().rss / 2**20 for process in processes]

    prompts, sampling = [[1, 4, 5, 6], [1, 9]], SamplingParams(max_tokens=8)
    for version in range(1, 201):
        perturb(model, seed=version, scale=1e-3)
        engine.sync_weights(model, version)
        if version <= 20:
            answers = engine.generate(prompts, sampling, num_generations=2, seed=version)
            assert measure_errors(model, prompts, answers, 1.0).agrees
        if version == 60:
            held = resident_mib()
    weights = sum(weight.nbytes for weight in model.parameters()) / 2**20
    assert all(now - then < 4 * weights for then, now in zip(held, resident_mib(), strict=True))
    for process in started:
        process.kill()
    with pytest.raises(RolloutError, match=r"vLLM failed with (EngineDeadError|EOFError|RolloutError): .*dropped"):
        engine.generate(prompts, sampling, num_generations=2, seed=0)
    with pytest.raises(WeightSyncError, match=r"the engine's process has ended|EngineDead"):
        engine.sync_weights(model, 201)
    engine.close()
    assert not psutil.wait_procs(started, timeout=20)[1]
