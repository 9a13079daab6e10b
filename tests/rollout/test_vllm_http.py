"""Two real vLLM servers with worker processes of their own; the last tests kill them. Started again: test_vllm_adapters."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grpo_fast import Config, GRPOTrainer
from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.vllm_adapters import AdapterVersion
from grpo_fast.rollout.vllm_client import Calls, VLLMServer
from grpo_fast.rollout.vllm_engine import VLLMServerEngine, VLLMSettings
from grpo_fast.rollout.vllm_needs import Needs
from grpo_fast.rollout.vllm_sample import Telling
from grpo_fast.types import Completion

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    # vLLM and what it imports use deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

SHARED = [1] + [3 + (7 * position) % 50 for position in range(75)]
PROMPTS = [[*SHARED, 5, 6], [*SHARED, 7], [1, 4, 5, 6], [1, 9]]
SAMPLING = SamplingParams(max_tokens=12, temperature=0.7)


class Served(NamedTuple):
    model: PreTrainedModel
    engine: VLLMServerEngine


@pytest.fixture(scope="module")
def served(servers: Any) -> Iterator[Served]:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(bucket_bytes=1_200_000, sync_deadline_s=60, request_deadline_s=60)
    engine = VLLMServerEngine(model, tokenizer, urls=[server.url for server in servers], settings=settings)
    yield Served(model, engine)
    engine.close()


def flat(answers: list[list[Completion]]) -> list[Completion]:
    return [completion for group in answers for completion in group]


def test_twenty_syncs_and_the_logprobs_are_the_policys_after_each(
    served: Served, perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    model, engine = served
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=0)
    for version in range(1, 21):
        perturb(model, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).engine > 1e-3
        metrics = engine.sync_weights(model, version)
        answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
        assert {completion.weight_version for completion in flat(answers)} == {version}
        assert metrics["sync/bytes"] == sum(weight.nbytes for weight in model.parameters())


@pytest.mark.usefixtures("served")
def test_what_fills_shared_memory_up_cannot_end_a_server(servers: Any) -> None:
    assert [server.queues() for server in servers] == [set(), set()], "without a worker there is no queue to it"


def test_keys_and_values_of_older_weights_are_found_where_the_cache_is_not_reset(
    served: Served, perturb: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = served
    perturb(model, seed=50)
    with monkeypatch.context() as patch:
        patch.setattr(engine._vllm, "reset_prefix_cache", lambda: True)
        with pytest.raises(WeightSyncError, match="so that cache still holds keys and values of older weights"):
            engine.sync_weights(model, 2)
    engine.sync_weights(model, 2)


def test_the_same_call_gives_the_same_answer(served: Served) -> None:
    first = served.engine.generate(PROMPTS, SAMPLING, num_generations=3, seed=4)
    assert [[c.token_ids for c in g] for g in served.engine.generate(PROMPTS, SAMPLING, num_generations=3, seed=4)] == [
        [c.token_ids for c in g] for g in first
    ]
    assert served.engine.generate(PROMPTS, SAMPLING, num_generations=3, seed=5) != first


def test_servers_penalise_too(served: Served, penalty_error: Callable[..., float]) -> None:
    served.engine.sync_weights(served.model, 30)
    sampling = replace(SAMPLING, repetition_penalty=1.3, other={"presence_penalty": 0.7, "min_tokens": 5})
    answers = served.engine.generate(PROMPTS, sampling, num_generations=2, seed=3)
    assert penalty_error(served.model, PROMPTS, answers, served.engine._end_tokens) < 1e-4


@pytest.mark.parametrize("cut", [{"top_k": 7, "top_p": 0.9}, {"top_p": 0.9}])
def test_the_policy_over_what_servers_kept_has_their_log_probabilities(
    served: Served, cut: dict[str, float], misses_support: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.engine._vllm, "telling", Telling(2, 1))  # so that most positions are asked for again
    sampling = SamplingParams(max_tokens=6, temperature=1.6, **cut)
    answers = served.engine.generate(PROMPTS, sampling, num_generations=2, seed=3)
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for completion in group:
            assert completion.kept is not None
            with torch.no_grad():
                logits = served.model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1] / 1.6
            supports = completion.kept.to_lists()
            assert not misses_support(supports, logits, sampling)
            expected = [
                (row[support[0]] - row[support].logsumexp(0)).item() for row, support in zip(logits, supports, strict=True)
            ]
            assert completion.logprobs == pytest.approx(expected, abs=5e-5)
    with pytest.raises(
        RolloutError,
        match=r"returns fewer than the 1000000 log-probabilities per token that top_p, top_k or min_p need; start it with",
    ):
        served.engine._vllm.sample([PROMPTS[3]], [{"max_tokens": 1, "logprobs": 10**6}])


def test_servers_sleep_until_the_sync_wakes_them(
    served: Served, perturb: Callable[..., None], measure_errors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU their workers keep their memory, but vLLM's engine sleeps and wakes by the same rules."""
    model, engine = served
    target = engine._vllm

    def states() -> list[bool]:
        return [bool(answer["is_sleeping"]) for answer in target.everywhere(lambda server: server.get("/is_sleeping"))]

    monkeypatch.setattr(engine, "_level", 2)
    engine.sleep()
    assert states() == [True, True]
    perturb(model, seed=51)
    engine.sync_weights(model, 3)
    assert states() == [False, False]
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees


def test_a_sync_that_breaks_off_half_way_is_done_again_whole(
    served: Served,
    perturb: Callable[..., None],
    measure_errors: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, engine = served
    perturb(model, seed=61)
    client = engine._vllm._sender.client
    update = client.update_weights
    buckets: list[Any] = []

    def break_off(info: dict[str, Any]) -> None:
        buckets.append(info)
        if len(buckets) == 2:
            raise ConnectionError("the wire broke")
        update(info)

    monkeypatch.setattr(client, "update_weights", break_off)
    engine.sync_weights(model, 30)
    assert len(buckets) == 2  # the second attempt opened a connection of its own
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees


def until_running(engine: VLLMServerEngine) -> None:
    """Until every server works on requests."""
    for _ in range(1000):
        pages = engine._vllm.everywhere(lambda server: server.call("GET", "/metrics"))
        if all(re.search(r"^vllm:num_requests_running\{[^}]*\} [1-9]", page, re.MULTILINE) for page in pages):
            return
        time.sleep(0.01)
    raise TimeoutError


def test_a_server_that_another_trainer_left_asleep_is_woken(served: Served, measure_errors: Callable[..., Any]) -> None:
    """As one that was killed between a step's rollouts and its sync leaves it."""
    urls = [server.url for server in served.engine._vllm.servers]
    served.engine._vllm.servers[1].post("/sleep?level=1&mode=wait")
    engine = VLLMServerEngine(served.model, served.engine._tokenizer, urls=urls, settings=VLLMSettings(sync_deadline_s=60))
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(served.model, PROMPTS, answers, SAMPLING.temperature).agrees
    engine.close()


def test_weights_of_another_run_are_never_sampled_from(served: Served, measure_errors: Callable[..., Any]) -> None:
    """Both may be at the same version, by their own count."""
    served.engine.sync_weights(served.model, 5)
    urls = [server.url for server in served.engine._vllm.servers]
    other = VLLMServerEngine(copy.deepcopy(served.model), served.engine._tokenizer, urls=urls[1:])
    other.sync_weights(other._model, 5)
    with pytest.raises(RolloutError, match=f"{urls[1]} sampled from weights that this run did not send"):
        served.engine.generate(PROMPTS, SAMPLING, num_generations=1, seed=0)
    other.close()
    served.engine.sync_weights(served.model, 6)
    answers = served.engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    assert measure_errors(served.model, PROMPTS, answers, SAMPLING.temperature).agrees


def test_a_server_of_other_settings_is_refused_with_all_of_them_named(served: Served) -> None:
    needs = Needs(torch.bfloat16, "sparse", context_length=200, sleeps=True)
    with pytest.raises(RolloutError) as caught:
        served.engine._vllm.check(needs)
    assert str(caught.value).endswith(
        "cannot be used for training: it computes in float32, the trainer in bfloat16; start it with --dtype bfloat16; it "
        "receives weights by 'grpo_fast_shm', not 'grpo_fast_sparse'; start it with `grpo-fast serve --transport sparse`; it "
        "takes 128 tokens, but prompt and completion may have 200; start it with --max-model-len 200; it cannot sleep; start "
        "it with `grpo-fast serve --enable-sleep-mode`"
    )


def test_a_server_of_another_model_is_refused_before_weights_are_sent(served: Served) -> None:
    config = copy.deepcopy(served.model.config)
    layers = config.num_hidden_layers
    config.num_hidden_layers = layers + 1
    larger = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    [url, _] = [server.url for server in served.engine._vllm.servers]
    told = rf"another model than the policy \(num_hidden_layers {layers} and not {layers + 1}\); start it with the policy's"
    with pytest.raises(RolloutError, match=told):
        VLLMServerEngine(larger, served.engine._tokenizer, urls=[url], settings=VLLMSettings(sync_deadline_s=60))


@pytest.mark.usefixtures("ssh_machine")
def test_one_server_by_two_names_is_told_before_weights_are_sent(served: Served, servers: Any) -> None:
    """Each bucket would be loaded twice."""
    urls = [servers[0].url, servers[1].url, f"ssh://far:{servers[0].port}"]
    with pytest.raises(RolloutError, match=rf"^{urls[0]} and {urls[2]} lead to the same server; name each once$"):
        VLLMServerEngine(served.model, served.engine._tokenizer, urls=urls, settings=VLLMSettings(sync_deadline_s=60))
    served.engine.sync_weights(served.model, 3)


def test_stop_strings_are_looked_for_in_the_policys_text_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = replace(SAMPLING, stop=("9",))
    with monkeypatch.context() as patch:
        patch.setattr(served.engine._tokenizer, "decode", lambda ids: "other text")
        with pytest.raises(RolloutError, match=r"has another tokeniser than the policy.*instead of 'other text'"):
            served.engine.generate(PROMPTS, sampling, num_generations=1, seed=0)
    stopped = flat(served.engine.generate(PROMPTS, sampling, num_generations=8, seed=0))
    assert any(completion.finish_reason == "stop" for completion in stopped)
    assert not any("9" in completion.text for completion in stopped)


def test_where_one_request_fails_it_is_told_at_once_and_no_other_runs_on(served: Served) -> None:
    """Neither on a server, where the next sync would wait for it, nor in a thread, for which Python would wait at its end."""
    target = served.engine._vllm
    endless = {"max_tokens": 100, "n": 64, "seed": 0, "ignore_eos": True, "temperature": 1.0}
    prompts = [[1, 3 + number % 50] for number in range(60)]
    begin = time.monotonic()
    with pytest.raises(RolloutError, match="returns fewer than the 1000000 log-probabilities"):
        target.sample([*prompts, [1, 9]], [*[endless] * len(prompts), {"max_tokens": 1, "logprobs": 10**6}])
    assert not target._requests._running
    served.engine.sync_weights(served.model, 32)
    assert time.monotonic() < begin + 30  # all of it would take minutes
    answers = served.engine.generate(PROMPTS, SAMPLING, num_generations=1, seed=0)
    assert {completion.weight_version for completion in flat(answers)} == {32}


def test_requests_that_are_kept_go_on_by_the_new_weights(
    served: Served, perturb: Callable[..., None], measure_errors: Callable[..., Any]
) -> None:
    model = copy.deepcopy(served.model)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # flat, so that the end token is one of 64 and requests run long
    settings = VLLMSettings(sync_deadline_s=120, request_deadline_s=240, pause_mode="keep")
    urls = [server.url for server in served.engine._vllm.servers]
    engine = VLLMServerEngine(model, served.engine._tokenizer, urls=urls, settings=settings)
    before = copy.deepcopy(model)
    prompts = [[1, 3 + number % 50, 5 + number % 7] for number in range(150)]  # more than are asked at once: all those are kept
    sampling = SamplingParams(max_tokens=110, temperature=2.0)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.generate, prompts, sampling, num_generations=4, seed=5)
        until_running(engine)
        perturb(model, seed=1, scale=0.02)
        engine.sync_weights(model, 1)
        answers = running.result()
    mixed = [
        (prompt, completion)
        for prompt, group in zip(prompts, answers, strict=True)
        for completion in group
        if completion.weight_versions
    ]
    assert len(mixed) > 3  # how many had begun when the update came is a matter of timing
    for prompt, completion in mixed[:20]:
        change = completion.weight_versions.index(1)
        assert completion.weight_versions == (0,) * change + (1,) * (len(completion.token_ids) - change)
        first, last = (
            replace(completion, token_ids=completion.token_ids[part], logprobs=completion.logprobs[part])
            for part in (slice(0, change), slice(change, None))
        )
        assert measure_errors(before, [prompt], [[first]], 2.0).agrees
        assert measure_errors(model, [[*prompt, *first.token_ids]], [[last]], 2.0).agrees
    engine.close()
    served.engine.sync_weights(served.model, 31)


def test_the_server_that_a_sync_waits_for_is_named(served: Served, servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = served.engine._sync
    servers[1].suspend()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sync, "_deadline_s", 3.0)
            told = rf"hung in its phase 'pause', not done after 3 s \(sync_deadline_s\): .*{servers[1].url} did not answer"
            with pytest.raises(WeightSyncError, match=told):
                served.engine.sync_weights(served.model, 33)
    finally:
        servers[1].resume()
    assert sync._left is not None
    sync._left.join(60)
    served.engine.sync_weights(served.model, 33)


def test_requests_without_the_key_are_refused(served: Served, servers: Any) -> None:
    stranger = VLLMServer(servers[0].url, api_key="another", deadline_s=10)
    with pytest.raises(RolloutError, match=r"refused /v1/models with status 401.*set VLLM_API_KEY to the key"):
        _ = stranger.context_length
    assert served.engine._vllm.servers[0].context_length == 128


def test_a_server_that_lost_the_adapters_is_told_of_as_restarted(served: Served, servers: Any) -> None:
    server = VLLMServer(servers[0].url, api_key="a key of the tests", deadline_s=30)
    server.adapter = "policy-1"
    with pytest.raises(RolloutError, match=rf"{server.url} no longer has the adapters of the last sync: it was restarted"):
        server.sample([1, 9], {"max_tokens": 1}, Calls())


def test_a_server_that_was_not_started_for_adapters_says_how(served: Served, tmp_path: Path) -> None:
    server = served.engine._vllm.servers[0]
    with pytest.raises(RolloutError, match="accepts no adapters; start it with `grpo-fast serve --max-lora-rank"):
        server.load_adapter(AdapterVersion("policy", 1, tmp_path, 0))
    assert server.adapter is None


@pytest.mark.usefixtures("untraced")
def test_ranks_that_hold_shards_send_them_to_servers(servers: Any, tmp_path: Path) -> None:
    program = shutil.which("grpo-fast", path=Path(sys.executable).parent)
    assert program is not None
    run = tmp_path / "run"
    settings = {
        "recipe": "embedded",
        "device": "cpu",
        "fsdp": "full_shard",
        "rollout": "vllm-http",
        "vllm_server_urls": servers[0].url,
        "prompts_per_step": 4,
        "max_staleness": 1,
        "max_steps": 2,
        "eval_steps": 0,
        "baseline_probe": 0,
        "forecast": "off",
        "reward_workers": 0,
        "output_dir": run,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*launcher, program, "train", *flags, "--no-report"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["sync/version"] for row in rows] == [1, 2]
    assert [row["sample/staleness_mean"] for row in rows] == [0, 1]
    assert all(row["sync/probe_kl"] < 1e-8 for row in rows)
    saved = AutoModelForCausalLM.from_pretrained(run / "checkpoint-2", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    assert {row["sync/bytes"] for row in rows} == {sum(weight.nbytes for weight in start.parameters())}
    assert not any(torch.equal(one, other) for one, other in zip(saved.parameters(), start.parameters(), strict=True))


@pytest.mark.usefixtures("untraced")
def test_a_run_over_servers_ends_with_a_checkpoint_where_one_dies_and_waits_for_it_when_resumed(
    servers: Any, tmp_path: Path, embedded_config: Callable[..., Config]
) -> None:
    config = embedded_config(
        output_dir=tmp_path,
        rollout="vllm-http",
        vllm_server_urls=[server.url for server in servers],
        prompts_per_step=4,
        max_steps=10,
        eval_steps=0,
        baseline_probe=0,
    )
    with GRPOTrainer(config) as trainer:
        steps = trainer.steps()
        first, second = next(steps), next(steps)
        assert [step.metrics["sync/version"] for step in (first, second)] == [1, 2]
        assert second.metrics["sampling/sampling_logp_difference/max"] < 1e-4
        servers[1].kill()
        with pytest.raises(RolloutError, match=f"vLLM's server {servers[1].url} is gone"):
            next(steps)
    assert (tmp_path / "checkpoint-2" / "manifest.json").exists()
    with GRPOTrainer.resume(tmp_path, config=config.replace(vllm_server_urls=(servers[0].url,))) as trainer:
        third = next(trainer.steps())
        assert (third.step, third.metrics["sync/version"]) == (3, 3)
    servers[1].start()  # and does not take connections for some time
    with GRPOTrainer.resume(tmp_path, config=config) as trainer:
        fourth = next(trainer.steps())
        assert (fourth.step, fourth.metrics["sync/version"]) == (4, 4)
    seen = [group.prompt.index for step in (first, second, third, fourth) for group in step.groups]
    with GRPOTrainer(config.replace(rollout="transformers", vllm_server_urls=(), output_dir=tmp_path / "straight")) as trainer:
        steps = trainer.steps()
        assert seen == [group.prompt.index for _ in range(4) for group in next(steps).groups], "lost or repeated prompts"


def test_a_server_that_dies_in_a_rollout_is_named_at_once(servers: Any) -> None:
    """The other server may be dead already, so this asks for none of what needs both."""
    server = servers[0]
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    settings = VLLMSettings(sync_deadline_s=60, request_deadline_s=60)
    engine = VLLMServerEngine(model, AutoTokenizer.from_pretrained(embedded_model_dir()), urls=[server.url], settings=settings)
    prompts = [[1, 4 + number % 40, 5] for number in range(400)]
    killer = threading.Timer(0.5, server.kill)
    killer.start()
    begin = time.monotonic()
    with pytest.raises(RolloutError, match=f"vLLM's server {server.url} is gone"):
        engine.generate(prompts, SamplingParams(max_tokens=100), num_generations=8, seed=0)
    with pytest.raises(WeightSyncError, match=r"failed in its phase 'pause': vLLM's server .* is gone"):
        engine.sync_weights(model, 1)
    assert time.monotonic() < begin + 20
    killer.join()
    engine.close()


def test_a_server_whose_engine_dies_owing_an_answer_ends_and_nobody_waits_for_it(servers: Any) -> None:
    process = servers[1]
    [engine] = [child for child in process.processes() if "EngineCor" in child.name()]
    engine.suspend()
    server = VLLMServer(process.url, api_key="a key of the tests", deadline_s=600)
    with ThreadPoolExecutor(1) as pool:
        owed = pool.submit(server.post, "/pause?mode=wait&clear_cache=false")
        while not server.owes_answer:
            time.sleep(0.01)
        time.sleep(1.0)  # until the engine owes it too
        engine.kill()
        with pytest.raises(RolloutError, match=rf"vLLM's server {process.url} (is gone|cannot be reached|refused)"):
            owed.result(120)
    assert process.wait(120) == 1
