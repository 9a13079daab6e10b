"""The phases over a second copy of a model that samples by itself, so that each phase can be made to fail or to hang."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast.rollout import WeightSyncError
from grpo_fast.rollout.sync_probe import Choices, SyncProbe
from grpo_fast.rollout.weight_sync import WeightSync

PHASES = ["pause", "wake_weights", "send", "finish", "weight_version"]
PHASES += ["reset_prefix_cache", "wake_kv_cache", "resume", "answer"]


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2))


PROBE = SyncProbe.build(vocabulary=40, block_size=4, context_length=64, engine_dtype=torch.float32, autocast_dtype=None)


class SecondCopy:
    """An engine with weights of its own; ``faults`` are called at the start of a phase."""

    def __init__(self, policy: LlamaForCausalLM) -> None:
        self.policy = policy
        self.model = LlamaForCausalLM(policy.config)
        self.cached: LlamaForCausalLM | None = None
        self.version: int | None = None
        self.calls: list[str] = []
        self.faults: dict[str, Callable[[], None]] = {}
        self.others: list[list[Choices]] = []
        self.silent = ""

    def _enter(self, phase: str) -> None:
        self.calls.append(phase)
        self.faults.get(phase, lambda: None)()

    def pause(self) -> None:
        self._enter("pause")

    def resume(self) -> None:
        self._enter("resume")

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self._enter(f"wake_{part}")

    def send(self) -> int:
        sent = 0
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for number, (name, weight) in enumerate(self.policy.named_parameters()):
                if number == len(own) // 2:
                    self._enter("send")
                own[name].copy_(weight)
                sent += weight.nbytes
        return sent

    def finish(self, version: int) -> None:
        self._enter("finish")
        self.version = version

    def weight_version(self) -> int | None:
        self._enter("weight_version")
        return self.version

    def undo(self) -> None:
        self._enter("undo")

    def waits_for(self) -> str:
        return self.silent

    def reset_prefix_cache(self) -> bool:
        self._enter("reset_prefix_cache")
        self.cached = None
        return True

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[Choices]]:
        self._enter("answer")
        assert prompts == PROBE.prompts
        return [likeliest(self.cached or self.model), *self.others]

    def score(self, prompt: Sequence[int]) -> list[list[Choices]]:
        self._enter("score")
        return [likeliest(self.model)]


def likeliest(model: LlamaForCausalLM) -> list[Choices]:
    found = PROBE.score(model).logprobs.topk(20)
    return [dict(zip(*row, strict=True)) for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


@pytest.fixture
def policy() -> LlamaForCausalLM:
    return build_model()


@pytest.fixture
def target(policy: LlamaForCausalLM) -> SecondCopy:
    return SecondCopy(policy)


def fail(times: int) -> Callable[[], None]:
    left = [times]

    def fault() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("the wire broke")

    return fault


def test_the_phases_come_in_order_and_the_weights_arrive(policy: LlamaForCausalLM, target: SecondCopy) -> None:
    metrics = WeightSync(target, PROBE).run(policy, 7)
    assert target.calls == PHASES
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), target.model.parameters(), strict=True))
    assert metrics["sync/version"] == 7
    assert metrics["sync/bytes"] == sum(weight.nbytes for weight in policy.parameters())
    assert metrics["sync/gbps"] == pytest.approx(metrics["sync/bytes"] / metrics["sync/seconds"] / 1e9)
    assert 0 <= metrics["sync/probe_kl"] < 1e-12
    assert metrics["sync/probe_max"] < 1e-6


def test_the_policy_computes_its_part_beside_the_phases_and_once(
    policy: LlamaForCausalLM, target: SecondCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, passes, forward = WeightSync(target, PROBE), [], policy.forward
    began = threading.Event()

    def counted(*args: object, **kwargs: object) -> object:
        passes.append(threading.current_thread().name)
        began.set()
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy, "forward", functools.wraps(forward)(counted))
    target.faults["pause"] = lambda: pytest.fail("it waits for the engine") if not began.wait(20) else None
    sync.run(policy, 1)
    passes.clear()
    sync.run(policy, 2)
    assert passes == ["weight sync: policy"]


def test_weights_that_are_gathered_are_so_by_one_thread_at_a_time(
    policy: LlamaForCausalLM, target: SecondCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.lm_head.weight.full_tensor = lambda: None
    order, forward = [], policy.forward

    def slow(*args: object, **kwargs: object) -> object:
        time.sleep(0.1)
        order.append("policy")
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy, "forward", functools.wraps(forward)(slow))
    target.faults["pause"] = lambda: order.append("engine")
    WeightSync(target, PROBE).run(policy, 1)
    assert order.index("engine") == len(order) - 1


def test_every_engine_must_pass(policy: LlamaForCausalLM, target: SecondCopy) -> None:
    good = likeliest(policy)
    for place in range(2):
        off = [dict(choices) for choices in good]
        off[place][next(iter(off[place]))] += 0.01
        target.others = [good, off, good]
        with pytest.raises(WeightSyncError, match=r"differ by up to 0\.01 nats"):
            WeightSync(target, PROBE).run(policy, 1)


def test_a_policy_that_fails_ends_the_sync_in_its_probe(
    policy: LlamaForCausalLM, target: SecondCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(input_ids: torch.Tensor, use_cache: bool) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(policy, "forward", broken)
    with pytest.raises(WeightSyncError, match="version 1 failed in its phase 'probe': no room"):
        WeightSync(target, PROBE).run(policy, 1)
    assert target.calls == [*PHASES, "pause"]


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_a_phase_that_fails_once_is_undone_and_all_of_it_done_again(
    phase: str, policy: LlamaForCausalLM, target: SecondCopy, caplog: pytest.LogCaptureFixture
) -> None:
    target.faults[phase] = fail(1)
    WeightSync(target, PROBE).run(policy, 1)
    name = {"weight_version": "finish"}.get(phase, phase)
    assert caplog.messages == [f"the sync of version 1 failed in its phase '{name}': the wire broke; it is begun anew"]
    assert target.calls == [*PHASES[: PHASES.index(phase) + 1], "undo", *PHASES]
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), target.model.parameters(), strict=True))


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_a_phase_that_fails_again_ends_the_sync_before_anything_is_sampled(
    phase: str, policy: LlamaForCausalLM, target: SecondCopy
) -> None:
    target.faults[phase] = fail(2)
    name = {"weight_version": "finish"}.get(phase, phase)
    message = rf"version 3 failed in its phase '{name}': the wire broke \(attempt 2 of 2\); nothing was sampled"
    with pytest.raises(WeightSyncError, match=message):
        WeightSync(target, PROBE).run(policy, 3)
    assert target.calls[-1] == "undo"
    assert "answer" not in target.calls


def hung_with(deadline_s: float, phase: str, policy: LlamaForCausalLM) -> tuple[str, list[str]]:
    """Says what a sync whose phase hangs ended with, and which phases it had begun."""
    target, let_go = SecondCopy(policy), threading.Event()
    target.faults[phase] = lambda: let_go.wait(60) and None
    try:
        with pytest.raises(WeightSyncError) as caught:
            WeightSync(target, PROBE, deadline_s=deadline_s).run(policy, 1)
    finally:
        let_go.set()
    return str(caught.value), target.calls


def test_no_sync_begins_beside_what_an_earlier_one_left_behind(policy: LlamaForCausalLM, target: SecondCopy) -> None:
    """It may come to life again, and send the weights of then."""
    let_go, sync = threading.Event(), WeightSync(target, PROBE, deadline_s=1)
    target.faults["send"] = lambda: let_go.wait(60) and None
    target.silent = "the second copy"
    with pytest.raises(WeightSyncError, match=r"hung in its phase 'send', .*: the second copy did not answer$"):
        sync.run(policy, 1)
    calls = list(target.calls)
    with pytest.raises(WeightSyncError, match="an earlier sync still hangs in 'weight sync: send'"):
        sync.run(policy, 2)
    assert target.calls == calls
    let_go.set()
    [left] = [thread for thread in threading.enumerate() if thread.name == "weight sync: send"]
    left.join(10)
    sync._deadline_s = 60.0
    assert sync.run(policy, 3)["sync/version"] == 3


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_that_hangs_is_named_and_left_behind(phase: str, policy: LlamaForCausalLM) -> None:
    name = {"weight_version": "finish", "answer": "probe"}.get(phase, phase)
    expected = [*PHASES[: PHASES.index(phase) + 1], *(["pause"] if phase == "answer" else [])]
    for deadline_s in (0.1, 1, 10):  # on a busy machine other phases may take longer than the first
        message, calls = hung_with(deadline_s, phase, policy)
        if calls == expected:
            break
    assert calls == expected
    assert f"hung in its phase '{name}', not done after {deadline_s:g} s" in message


def test_a_probe_that_is_not_answered_ends_the_sync_with_requests_held_up(policy: LlamaForCausalLM, target: SecondCopy) -> None:
    target.faults["answer"] = fail(1)
    with pytest.raises(WeightSyncError, match="version 1 failed in its phase 'probe': the wire broke"):
        WeightSync(target, PROBE).run(policy, 1)
    assert target.calls == [*PHASES, "pause"]


def test_an_update_that_cannot_be_left_ends_the_sync(policy: LlamaForCausalLM, target: SecondCopy) -> None:
    target.faults |= {"send": fail(1), "undo": fail(1)}
    with pytest.raises(WeightSyncError, match="the wire broke; the unfinished update could not be cancelled either: the wire"):
        WeightSync(target, PROBE).run(policy, 1)


def test_another_version_in_force_is_refused(policy: LlamaForCausalLM, target: SecondCopy) -> None:
    target.faults["weight_version"] = lambda: setattr(target, "version", 8)
    with pytest.raises(WeightSyncError, match="phase 'finish': the engine reports version 8 instead"):
        WeightSync(target, PROBE).run(policy, 9)


def test_a_refused_reset_is_a_failure(policy: LlamaForCausalLM, target: SecondCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "reset_prefix_cache", lambda: False)
    with pytest.raises(WeightSyncError, match="phase 'reset_prefix_cache': the engine refused to reset its prefix cache"):
        WeightSync(target, PROBE).run(policy, 1)
    assert "answer" not in target.calls


def test_weights_that_did_not_arrive_are_found_by_the_probe(
    policy: LlamaForCausalLM, target: SecondCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.model.load_state_dict(policy.state_dict())
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    monkeypatch.setattr(target, "send", lambda: 1)
    with pytest.raises(WeightSyncError, match=r"version 2 the engine does not match the policy: .*some weights did not arrive"):
        WeightSync(target, PROBE).run(policy, 2)
    assert target.calls[-2:] == ["score", "pause"]


def test_a_cache_of_older_weights_is_found_by_the_probe(
    policy: LlamaForCausalLM, target: SecondCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = WeightSync(target, PROBE)
    sync.run(policy, 1)
    target.cached = copy.deepcopy(target.model)
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    monkeypatch.setattr(target, "reset_prefix_cache", lambda: True)
    with pytest.raises(WeightSyncError, match="so that cache still holds keys and values of older weights"):
        sync.run(policy, 2)


def test_weights_that_are_not_numbers_do_not_pass(policy: LlamaForCausalLM, target: SecondCopy) -> None:
    with torch.no_grad():
        policy.model.norm.weight[0] = torch.nan
    with pytest.raises(WeightSyncError, match="differ by up to nan nats"):
        WeightSync(target, PROBE).run(policy, 1)
