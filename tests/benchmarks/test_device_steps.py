"""Whole steps of every case in miniature, by every trainer that is installed, and what is said of the targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed; the comparison needs it")

from benchmarks import device
from benchmarks.system import device_steps, needed, real_run
from benchmarks.system.device_cases import CASES, StepCase, targets
from benchmarks.system.device_steps import in_a_process, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),  # rivals'
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def smoke(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    path = tmp_path_factory.mktemp("steps") / "steps.json"
    code = device.main(["steps", "--smoke", "--models", str(models), "--output", str(path)])
    return code, json.loads(path.read_text(encoding="utf-8"))


def case(name: str) -> StepCase:
    return next(case for case in CASES if case.name == name)


def test_every_case_runs_in_miniature(smoke: tuple[int, dict[str, Any]]) -> None:
    code, content = smoke
    assert code == 0
    assert [record["case"] for record in content["cases"]] == [case.name for case in CASES]
    for record in content["cases"]:
        assert record["tokens"] == 4 * (4 + 6)
        for trainer in ("grpo_fast", "trl"):
            row = record["rows"][trainer]
            assert row["status"] == "ok"
            assert 0 < row["train_s"] <= row["step_s"]
            assert row["tokens_per_s"] == pytest.approx(record["tokens"] / row["step_s"])
            assert row["weights"] == "random"
        assert 0 < record["rows"]["grpo_fast"]["planned_gib"] < 1
        assert record["rows"]["unsloth"]["status"] == "missing"
        assert record["rows"]["unsloth"]["reason"]
        assert all(target["met"] is None for target in record["targets"]), "miniatures say nothing of targets"


def test_a_trainer_has_a_process_of_its_own_and_its_end_is_told(models: Path) -> None:
    row = in_a_process(case("8b-qlora"), "grpo_fast", models, timeout_s=240, smoke=True)
    assert row["status"] == "ok"
    assert row["peak_gib"] > 0.1
    assert in_a_process(case("8b-qlora"), "grpo_fast", models, timeout_s=0.5, smoke=True) == {
        "status": "failed",
        "reason": "not done after the 0 s that the budget left",
    }


def test_what_a_case_needs_and_is_not_there_is_told_before_a_process_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_steps, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    found = {name: missing(case(name), "grpo_fast", smoke=False) for name in ("0.5b-update", "8b-lora", "8b-qlora")}
    assert found == {"0.5b-update": "", "8b-lora": "", "8b-qlora": "not installed: pip install bitsandbytes"}
    monkeypatch.setattr(needed, "find_spec", lambda name: None if name in {"pydantic", "math_verify", "PIL"} else object())
    assert missing(case("0.5b-update"), "trl", smoke=False) == "not installed: pip install pydantic pillow math-verify"
    with pytest.raises(SystemExit, match="not installed: pip install pydantic pillow math-verify"):
        real_run.main(["runs/real"])


def test_targets_are_met_or_not() -> None:
    rows = {"grpo_fast": {"train_s": 1.0, "peak_gib": 20.0}, "trl": {"train_s": 1.7, "peak_gib": 41.0}}
    assert [(target["value"], target["met"]) for target in targets(case("1.5b-update"), rows)] == [
        (pytest.approx(1.7), False),
        (pytest.approx(20 / 41), True),
    ]
    assert targets(case("8b-qlora"), rows)[0]["met"] is True
    assert targets(case("8b-qlora"), {"grpo_fast": {"status": "failed"}})[0]["met"] is None
    assert {target["met"] for target in targets(case("1.5b-update"), {"grpo_fast": rows["grpo_fast"]})} == {None}


def test_cases_are_the_sizes_that_targets_are_about() -> None:
    update, qlora = case("1.5b-update"), case("8b-qlora")
    assert update.tokens == 16 * 1024
    assert (qlora.prompts * qlora.generations, qlora.completion_tokens) == (8, 4096)
    with pytest.raises(SystemExit, match=r"no case 9b; there are: 1\.5b-update"):
        device.main(["steps", "--cases", "9b"])
