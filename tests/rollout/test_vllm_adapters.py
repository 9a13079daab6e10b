"""Adapter versions over the embedded model, in this process and over a server; transformers with the same ones is the truth."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grpo_fast import Config, GRPOTrainer
from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.sync_probe import compare
from grpo_fast.rollout.vllm_adapters import AdapterVersion, AdapterVersions, lora_options, policy_options
from grpo_fast.rollout.vllm_client import VLLMServer
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMServerEngine, VLLMSettings

# vLLM and what it imports use deprecated parts of torch; peft asks transformers under a name that is going.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHARED = [1] + [3 + (7 * position) % 50 for position in range(75)]
PROMPTS = [[*SHARED, 5, 6], [*SHARED, 7], [1, 4, 5, 6]]
SAMPLING = SamplingParams(max_tokens=12, temperature=0.7)


def adapted_model() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    stir(model, seed=0)
    return model


@torch.no_grad()
def stir(model: torch.nn.Module, seed: int) -> None:
    """New adapters, far enough from the last ones for stale ones to be seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))


def adapter_bytes(model: torch.nn.Module) -> int:
    return sum(weight.nbytes for name, weight in model.named_parameters() if ".lora_" in name)


def base_bytes(model: torch.nn.Module) -> int:
    return sum(weight.nbytes for name, weight in model.named_parameters() if ".lora_" not in name)


def directories(engine: VLLMEngine) -> list[Path]:
    """Versions on disk."""
    target: Any = engine._vllm
    return list(Path(target._versions._directory.path).iterdir())


def test_a_version_is_what_peft_reads(tmp_path: Path) -> None:
    model = adapted_model()
    versions = AdapterVersions(model)
    first = versions.write()
    stir(model, seed=1)
    second = versions.write()
    assert len({(first.name, second.name), (first.number, second.number), (first.path, second.path)}) == 3
    assert first.name != second.name
    assert second.num_bytes == adapter_bytes(model)
    assert (second.path / "adapter_model.safetensors").stat().st_size >= second.num_bytes
    base = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(second.path))
    with torch.no_grad():
        assert torch.equal(theirs(torch.tensor(PROMPTS[:1])).logits, model(torch.tensor(PROMPTS[:1])).logits)
    versions.remove(first)
    assert not first.path.exists()
    versions.close()
    assert not second.path.exists()


def test_ranks_are_those_that_vllm_has_room_for() -> None:
    assert policy_options(adapted_model()) == lora_options(
        4, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    )
    assert policy_options(torch.nn.Linear(2, 2)) is None
    assert [lora_options(rank, [])["max_lora_rank"] for rank in (1, 8, 9, 64, 257)] == [8, 8, 16, 64, 320]
    with pytest.raises(ValueError, match="vLLM supports adapters up to rank 512, not 513; lower lora_r"):
        lora_options(513, [])


class Adapted(NamedTuple):
    model: PreTrainedModel
    engine: VLLMEngine


@pytest.fixture(scope="module")
def adapted() -> Iterator[Adapted]:
    model = adapted_model()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    engine = VLLMEngine(model, tokenizer, settings=VLLMSettings(sync_deadline_s=60))
    yield Adapted(model, engine)
    home = directories(engine)[0].parent
    engine.close()
    assert not home.exists(), "nothing is left behind"


@pytest.mark.vllm
def test_twenty_versions_without_a_reset_and_the_logprobs_are_the_policys_after_each(
    adapted: Adapted, measure_errors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = adapted
    host: Any = engine._vllm._host
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=0)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
    monkeypatch.setattr(host, "reset_prefix_cache", lambda: pytest.fail("the cache was reset"))
    monkeypatch.setattr(host, "send", lambda: pytest.fail("the base was sent"))
    for version in range(1, 21):
        stir(model, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).engine > 1e-3  # stale ones would be seen
        metrics = engine.sync_weights(model, version)
        answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
        assert {completion.weight_version for group in answers for completion in group} == {version}
        assert metrics["sync/bytes"] == adapter_bytes(model)
        assert metrics["sync/probe_kl"] < 1e-9
        assert len(directories(engine)) == len(host._llm.llm_engine.list_loras()) == 1


@pytest.mark.vllm
def test_both_scorings_of_the_probe_are_those_of_the_adapters(adapted: Adapted) -> None:
    target: Any = adapted.engine._vllm
    probe = adapted.engine._sync._probe
    own = probe.score(adapted.model).logprobs
    for choices in (*target.answer(probe.prompts), *target.score(probe.prompt)):
        assert compare(own, choices).largest < 5e-5


@pytest.mark.vllm
def test_an_older_version_that_stays_in_force_is_found_by_the_probe(
    adapted: Adapted, measure_errors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = adapted
    target: Any = engine._vllm
    stir(model, seed=30)
    with monkeypatch.context() as patch:
        for host, name in ((target._host, "load_adapter"), (target._host, "unload_adapter"), (target._versions, "remove")):
            patch.setattr(host, name, lambda adapter: None)
        with pytest.raises(WeightSyncError, match="some weights did not arrive"):
            engine.sync_weights(model, 30)
    with pytest.raises(WeightSyncError, match="the last weight sync failed"):
        engine.generate(PROMPTS, SAMPLING, num_generations=1, seed=0)
    engine.sync_weights(model, 31)
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees


@pytest.mark.vllm
def test_a_sync_that_breaks_off_brings_the_base_too_when_it_is_done_again(
    adapted: Adapted, measure_errors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = adapted
    host: Any = engine._vllm._host
    load, tries = host.load_adapter, []

    def break_off(adapter: AdapterVersion) -> None:
        tries.append(adapter)
        if len(tries) == 1:
            raise ConnectionError("the wire broke")
        load(adapter)

    stir(model, seed=40)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.01)  # a base that moved: what only the whole can bring
    monkeypatch.setattr(host, "load_adapter", break_off)
    metrics = engine.sync_weights(model, 40)
    assert metrics["sync/bytes"] == base_bytes(model) + adapter_bytes(model)
    assert len(tries) == 2
    assert not tries[0].path.exists()
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
def test_a_run_over_vllm_begins_from_saved_adapters(embedded_config: Callable[..., Config], tmp_path: Path) -> None:
    """What it samples before the first update is already theirs: they are version 0."""
    model: Any = adapted_model()
    stir(model, seed=1)
    stirred = {name: weight.clone() for name, weight in model.named_parameters() if ".lora_" in name}
    versions = AdapterVersions(model)
    shutil.copytree(versions.write().path, tmp_path / "saved")
    versions.close()
    config = embedded_config(
        model=str(tmp_path / "saved"),
        rollout="vllm",
        use_peft=True,
        beta=0.01,
        learning_rate=1e-2,
        warmup_steps=0,
        prompts_per_step=8,
        max_steps=2,
        eval_steps=0,
        baseline_probe=0,
        reward_workers=0,
    )
    with GRPOTrainer(config) as trainer:
        begun = dict(trainer.policy.model.named_parameters())
        assert all(torch.equal(begun[name], weight) for name, weight in stirred.items())
        steps = list(trainer.steps())
    assert [step.metrics["sync/version"] for step in steps] == [1, 2]
    assert all(step.metrics["sampling/sampling_logp_difference/max"] < 1e-4 for step in steps)
    assert [step.metrics["sync/bytes"] for step in steps] == [adapter_bytes(model)] * 2
    assert steps[0].metrics["kl"] < 1e-6 < steps[1].metrics["kl"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.usefixtures("untraced")
def test_a_run_over_vllm_trains_and_samples_the_same_adapters_over_four_bits(embedded_config: Callable[..., Config]) -> None:
    """Over whole weights the run above does."""
    config = embedded_config(
        rollout="vllm",
        use_peft=True,
        load_in_4bit=True,
        learning_rate=1e-2,
        warmup_steps=0,
        prompts_per_step=8,
        max_steps=3,
        eval_steps=0,
        baseline_probe=0,
        reward_workers=0,
    )
    with GRPOTrainer(config) as trainer:
        steps = list(trainer.steps())
    assert [step.metrics["sync/version"] for step in steps] == [1, 2, 3]
    assert all(step.metrics["sampling/sampling_logp_difference/max"] < 1e-4 for step in steps)
    assert len({step.metrics["sync/bytes"] for step in steps}) == 1
    assert steps[0].metrics["sync/bytes"] < 1e6


@pytest.mark.vllm
@pytest.mark.slow
def test_versions_over_a_server_which_then_forgets_them(adapter_server: Any, measure_errors: Callable[..., Any]) -> None:
    model = adapted_model()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(sync_deadline_s=60, request_deadline_s=60, transport="sparse")
    engine = VLLMServerEngine(model, tokenizer, urls=[adapter_server.url], settings=settings)

    def check(version: int, num_bytes: int) -> None:
        stir(model, seed=version)
        assert engine.sync_weights(model, version)["sync/bytes"] == num_bytes
        answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
        assert {completion.weight_version for group in answers for completion in group} == {version}

    for version in (1, 2, 3):
        check(version, adapter_bytes(model))
    server = VLLMServer(adapter_server.url, api_key=None, deadline_s=30)
    assert len(server.get("/v1/models")["data"]) == 2, "the base and the last version"
    server.call("POST", "/update_weight_version", {"new_version": "default"})  # as one says that was started again
    check(4, adapter_bytes(model))  # of the base nothing changed, and the worker says that it has it
    check(5, adapter_bytes(model))
    home = directories(engine)[0].parent
    engine.close()
    assert not home.exists()
    assert len(server.get("/v1/models")["data"]) == 1


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_that_hangs_does_not_hold_up_the_end(adapter_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    engine = VLLMServerEngine(model, tokenizer, urls=[adapter_server.url], settings=VLLMSettings(transport="sparse"))
    home = directories(engine)[0].parent
    monkeypatch.setattr(import_module("grpo_fast.rollout.vllm_http"), "_HANG_UP_S", 1.0)
    adapter_server.suspend()
    try:
        begin = time.monotonic()
        engine.close()
        assert time.monotonic() < begin + 10
    finally:
        adapter_server.resume()
    assert not home.exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_what_changed_goes_to_a_server_which_then_opens_another_trainers_memory(
    adapter_server: Any, measure_errors: Callable[..., Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(sync_deadline_s=60, request_deadline_s=60, transport="sparse", bucket_bytes=300_000)
    engine = VLLMServerEngine(model, tokenizer, urls=[adapter_server.url], settings=settings)
    for version in range(1, 21):
        changed = change_some(model, seed=version)
        assert engine.sync_weights(model, version)["sync/bytes"] == changed
        check_logprobs(engine, model, measure_errors, version)
    other = VLLMServerEngine(copy.deepcopy(model), tokenizer, urls=[adapter_server.url], settings=settings)
    other.close()
    change_some(model, seed=21)
    assert engine.sync_weights(model, 21)["sync/bytes"] == base_bytes(model)
    check_logprobs(engine, model, measure_errors, 21)
    engine.close()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
def test_versions_and_what_changed_of_the_base_go_to_an_engine_in_a_process_of_its_own(
    measure_errors: Callable[..., Any],
) -> None:
    model = adapted_model()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(own_process=True, transport="sparse", bucket_bytes=300_000, sync_deadline_s=60)
    engine = VLLMEngine(model, tokenizer, settings=settings)
    target: Any = engine._vllm
    try:
        for version in range(1, 26):
            stir(model, seed=version)
            changed = 0
            if version > 5:
                changed = change_some(model, seed=version)
                target._in_force = None  # as after a sync that failed: the base goes too
            assert engine.sync_weights(model, version)["sync/bytes"] == changed + adapter_bytes(model)
            check_logprobs(engine, model, measure_errors, version)
            assert len(directories(engine)) == 1
            assert list(target._host._llm.llm_engine.list_loras()) == [target._current.number]
        home = directories(engine)[0].parent
        engine._sync._deadline_s = 2.0
        processes = target._host._watch._tree
        processes[0].suspend()
        with pytest.raises(WeightSyncError, match=r"hung in its phase '\w+', not done after 2 s"):
            engine.sync_weights(model, 26)
    finally:
        begin = time.monotonic()
        engine.close()
    assert time.monotonic() < begin + 30
    assert not any(process.is_running() and process.status() != "zombie" for process in processes)
    assert not home.exists()


@torch.no_grad()
def change_some(model: torch.nn.Module, seed: int) -> int:
    """Moves one in sixteen of the base's values; returns the bytes that tell so."""
    changed = 0
    for name, weight in model.named_parameters():
        if ".lora_" not in name:
            place = weight.view(-1)[seed % 16 :: 16]
            before = place.clone()
            place.mul_(1.05)
            changed += int((place != before).sum())
    return 8 * changed


def check_logprobs(engine: VLLMEngine, model: PreTrainedModel, measure_errors: Callable[..., Any], version: int) -> None:
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=version)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
    assert {completion.weight_version for group in answers for completion in group} == {version}


@pytest.mark.vllm
@pytest.mark.slow
def test_a_file_that_is_none_is_told(adapter_server: Any, tmp_path: Path) -> None:
    server = VLLMServer(adapter_server.url, api_key=None, deadline_s=30)
    with pytest.raises(RolloutError, match=r"/v1/load_lora_adapter with status"):
        server.load_adapter(AdapterVersion("none", 1, tmp_path / "nowhere", 0))
    assert server.adapter is None


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_that_was_killed_and_started_again_gets_everything_and_one_that_dies_in_a_sync_is_named(
    adapter_server: Any, measure_errors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs last: the server is gone then."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(sync_deadline_s=60, request_deadline_s=60, transport="sparse", bucket_bytes=300_000)
    engine = VLLMServerEngine(model, tokenizer, urls=[adapter_server.url], settings=settings)
    assert engine.sync_weights(model, 1)["sync/bytes"] == 0
    adapter_server.kill()
    with pytest.raises(RolloutError, match=f"vLLM's server {adapter_server.url} is gone"):
        engine.generate(PROMPTS, SAMPLING, num_generations=1, seed=0)

    adapter_server.start()
    adapter_server.wait_until_ready()
    change_some(model, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(engine._vllm, "undo", lambda: None)  # what has the next attempt begin with everything
        with pytest.raises(WeightSyncError, match=r"before the trainer's shared memory was opened.*attempt 2 of 2"):
            engine.sync_weights(model, 2)
    assert engine.sync_weights(model, 2)["sync/bytes"] == base_bytes(model)
    check_logprobs(engine, model, measure_errors, 2)
    changed = change_some(model, seed=4)
    assert engine.sync_weights(model, 4)["sync/bytes"] == changed
    check_logprobs(engine, model, measure_errors, 4)

    client = engine._vllm._sender.client
    update = client.update_weights
    monkeypatch.setattr(client, "update_weights", lambda info: (update(info), adapter_server.kill()))
    change_some(model, seed=5)
    begin = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"vLLM's server .* is gone"):
        engine.sync_weights(model, 5)
    assert time.monotonic() < begin + 20
    with pytest.raises(WeightSyncError, match="the last weight sync failed"):
        engine.generate(PROMPTS, SAMPLING, num_generations=1, seed=0)
