"""A case is checked before it is timed, and whatever becomes of a contender is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.ops import suite
from benchmarks.ops.cases import AdvantageCase, HeadCase, LossCase, Model
from benchmarks.ops.contenders.contender import Contender, HeadResult, only_cross_entropy
from benchmarks.ops.contenders.pytorch import from_logprobs as whole_case
from benchmarks.ops.contenders.pytorch import full_logits
from benchmarks.ops.measure import Ceilings, Clock

CPU = torch.device("cpu")
CASE = HeadCase(Model("a small head", 48, 701), 64, dtype="float32")


@pytest.fixture
def bench() -> Iterator[suite.Bench]:
    torch.compiler.set_stance("force_eager")
    yield suite.Bench(CPU, Clock(CPU), Ceilings({"float32": 1e11}, 1e10), 0.0, min_rounds=2, max_rounds=3, tidy=False)
    torch.compiler.set_stance("default")


def halved(problem: Any, option: Any) -> Any:
    call = whole_case(problem, full_logits)

    def run() -> HeadResult:
        found = call()
        return found._replace(gradients=tuple(x / 2 for x in found.gradients))

    return run


def raises(problem: Any, option: Any) -> Any:
    def run() -> HeadResult:
        raise RuntimeError("out of\n memory")

    return run


def absent(problem: Any, option: Any) -> Any:
    raise ModuleNotFoundError("No module named 'nowhere'")


def by_option(problem: Any, option: str) -> Any:
    if option == "breaks":
        raise ValueError("not this size")
    return halved(problem, None) if option == "wrong" else whole_case(problem, full_logits)


def run_with(monkeypatch, bench: suite.Bench, *contenders: Contender, case: Any = CASE) -> dict[str, dict[str, Any]]:
    monkeypatch.setattr(suite, "contenders_of", lambda _: list(contenders))
    record = suite.run_case(bench, case)
    return {row["contender"]: row for row in record["rows"]}


@pytest.mark.slow
def test_every_outcome_is_told_and_only_what_is_right_gets_a_time(monkeypatch, bench) -> None:
    bench.tidy = True
    rows = run_with(
        monkeypatch,
        bench,
        Contender("right", "head", lambda problem, _: whole_case(problem, full_logits), "plain"),
        Contender("wrong", "head", halved, "half the gradient"),
        Contender("broken", "head", raises, "runs out of memory"),
        Contender("absent", "head", absent, "not there", package="nowhere"),
        Contender("broken package", "head", absent, "there, with a dependency that is not"),
        Contender("narrow", "head", halved, "something else", refuses=only_cross_entropy),
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "broken": "failed",
        "absent": "missing",
        "broken package": "failed",
        "narrow": "refused",
    }
    assert [name for name, row in rows.items() if "p50_ms" in row] == ["right"]
    assert rows["wrong"]["errors"]["dhidden_relative"] == pytest.approx(0.5, abs=1e-3)
    assert "dhidden_relative is off by 0.5" in rows["wrong"]["reason"]
    assert rows["broken"]["reason"] == "RuntimeError: out of memory"
    assert rows["absent"]["version"] is None
    assert rows["right"]["p20_ms"] <= rows["right"]["p50_ms"] <= rows["right"]["p80_ms"]
    assert rows["right"]["peak_extra_bytes"] >= 0


def test_what_a_trial_takes_beyond_its_products_is_remembered(monkeypatch, bench) -> None:
    def compiles(problem: Any, option: Any) -> Any:
        time.sleep(0.1)
        return whole_case(problem, full_logits)

    run_with(monkeypatch, bench, Contender("compiled", "head", compiles, ""), Contender("plain", "head", raises, ""))
    assert bench.overheads_s["compiled"] > 0.1
    assert bench.overheads_s["plain"] < 0.1
    assert bench.trial_s(CASE, Contender("", "head", raises, "", options=(1, 2))) == pytest.approx(6 * CASE.num_flops / 1e11)


def test_a_setting_that_breaks_or_is_wrong_is_not_the_best(monkeypatch, bench) -> None:
    options = ("breaks", "wrong", "right")
    assert run_with(monkeypatch, bench, Contender("some", "head", by_option, "", options=options))["some"]["option"] == "right"
    rows = run_with(monkeypatch, bench, Contender("none", "head", by_option, "", options=options[:2]))
    assert rows["none"]["status"] == "wrong"


def test_this_projects_ops_are_right_in_every_kind_of_case(bench) -> None:
    for case in (CASE, LossCase(512, num_sequences=8), AdvantageCase(30, 4)):
        rows = {row["contender"]: row for row in suite.run_case(bench, case)["rows"]}
        assert rows["grpo_fast"]["status"] == "ok"
        assert rows["torch eager"]["status"] == "ok"
        assert ("fraction_of_gemm" if case is CASE else "fraction_of_copy") in rows["grpo_fast"]
    assert rows["grpo_fast"]["p50_ms"] < 1000


def test_dead_rows_are_dropped_and_the_gradients_stay_exact(bench) -> None:
    case = HeadCase(CASE.model, 64, dead_share=0.5, dtype="float32")
    rows = {row["contender"]: row for row in suite.run_case(bench, case)["rows"]}
    for name in ("grpo_fast", "grpo_fast, every row"):
        assert rows[name]["status"] == "ok"
        assert rows[name]["errors"]["dweight_relative"] < 1e-5
    assert "logprobs_max_nat" in rows["grpo_fast, every row"]["errors"]


def test_rows_are_shared_by_cases_of_the_same_sizes(bench) -> None:
    first = bench.rows(CASE)
    assert bench.rows(HeadCase(CASE.model, 64, "forward", dtype="float32")) is first
    assert bench.rows(HeadCase(CASE.model, 80, dtype="float32")) is not first
