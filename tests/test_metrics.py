from __future__ import annotations

import math
import time

import pytest
import torch

from grpo_fast.metrics import PHASES, MetricSums, PhaseTimer, mean_known


def test_sums_minima_and_maxima_over_parts() -> None:
    sums = MetricSums()
    for value in (3.0, -1.0, 2.0):
        sums.add("total", torch.tensor(value))
        sums.add("least", torch.tensor(value), reduction="min")
        sums.add("greatest", torch.tensor(value), reduction="max")
    assert sums.compute() == {"total": 4.0, "least": -1.0, "greatest": 3.0}


def test_mean_weighs_parts_by_their_size() -> None:
    sums = MetricSums()
    for total, count in ((10.0, 1), (2.0, 3)):
        sums.add("entropy", torch.tensor(total), weight="_tokens")
        sums.add("_tokens", torch.tensor(count))
    assert sums.compute() == {"entropy": 3.0, "_tokens": 4.0}


def test_mean_over_nothing_is_nan() -> None:
    sums = MetricSums()
    sums.add("kl", torch.tensor(0.0), weight="_tokens")
    sums.add("_tokens", torch.tensor(0))
    assert math.isnan(sums.compute()["kl"])


def test_nothing_added_is_nothing() -> None:
    assert MetricSums().compute() == {}


def test_sum_of_zero_stays_zero() -> None:
    sums = MetricSums()
    sums.add("loss", torch.tensor(0.0))
    assert sums.compute() == {"loss": 0.0}


def test_gradients_are_let_go_of() -> None:
    sums = MetricSums()
    leaf = torch.tensor(2.0, requires_grad=True)
    sums.add("loss", leaf * leaf)
    assert sums.compute() == {"loss": 4.0}
    assert not any(value.requires_grad for _, _, value in sums._values.values())


def test_half_precision_parts_are_summed_in_float32() -> None:
    sums = MetricSums()
    for _ in range(300):
        sums.add("tokens", torch.tensor(1.0, dtype=torch.bfloat16))
    assert sums.compute() == {"tokens": 300.0}  # bfloat16 would stop at 256


def test_phases_are_charged_and_the_rest_is_other() -> None:
    timer = PhaseTimer()
    time.sleep(0.02)
    with timer.phase("rollout"):
        time.sleep(0.03)
    with timer.phase("train"):
        time.sleep(0.04)
    seconds = timer.lap()
    assert set(seconds) == set(PHASES)
    assert seconds["other"] >= 0.02
    assert seconds["rollout"] >= 0.03
    assert seconds["train"] >= 0.04
    assert seconds["reward"] == seconds["score"] == seconds["sync"] == 0.0


def test_phases_sum_to_wall_time() -> None:
    outer = time.perf_counter()
    timer = PhaseTimer()
    inner = time.perf_counter()
    for _ in range(3):
        with timer.phase("score"):
            time.sleep(0.005)
        time.sleep(0.005)
    least = time.perf_counter() - inner
    total = sum(timer.lap().values())
    most = time.perf_counter() - outer
    assert least - 1e-9 <= total <= most + 1e-9


def test_the_clock_waits_for_a_gpu_only_where_one_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        PhaseTimer().lap()
        assert len(waits) == in_use


def test_lap_starts_anew() -> None:
    timer = PhaseTimer()
    with timer.phase("reward"):
        time.sleep(0.02)
    begin = time.perf_counter()
    assert timer.lap()["reward"] >= 0.02
    second = timer.lap()
    assert second["reward"] == 0.0
    assert 0.0 <= second["other"] <= time.perf_counter() - begin


def test_a_phase_that_fails_is_charged_too() -> None:
    timer = PhaseTimer()

    def fail() -> None:
        with timer.phase("reward"):
            time.sleep(0.02)
            raise RuntimeError("no reward")

    with pytest.raises(RuntimeError, match="no reward"):
        fail()
    time.sleep(0.01)
    seconds = timer.lap()
    assert seconds["reward"] >= 0.02
    assert seconds["other"] >= 0.01


def test_the_mean_leaves_out_what_is_not_known() -> None:
    assert mean_known([1.0, math.nan, 2.0]) == 1.5
    assert math.isnan(mean_known([math.nan]))
    assert math.isnan(mean_known([]))


def test_ranks_are_reduced_as_micro_batches_are() -> None:
    whole, ranks = MetricSums(), [MetricSums(), MetricSums(), MetricSums()]
    parts = [{"n": 2.0, "sum": 3.0, "low": 4.0, "high": 1.0}, {"n": 5.0, "sum": -1.0, "low": 0.5, "high": 9.0}]
    for sums, part in [(whole, part) for part in parts] + list(zip(ranks, parts, strict=False)):  # the last rank has nothing
        sums.add("n", torch.tensor(part["n"]))
        sums.add("mean", torch.tensor(part["sum"]), weight="n")
        sums.add("low", torch.tensor(part["low"]), reduction="min")
        sums.add("high", torch.tensor(part["high"]), reduction="max")
    everywhere = [sums.compute(lambda own: [rank._held() for rank in ranks]) for sums in ranks]
    assert everywhere == [whole.compute()] * 3
    assert everywhere[0] == {"n": 7.0, "mean": pytest.approx(2 / 7), "low": 0.5, "high": 9.0}
    ranks[2].add("low", torch.tensor(math.nan), reduction="min")
    assert math.isnan(ranks[0].compute(lambda own: [rank._held() for rank in ranks])["low"])
