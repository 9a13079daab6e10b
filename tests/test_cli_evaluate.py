from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Shell = Callable[..., tuple[int, str, str]]
FEW = "--eval-size 8 --reward-workers 0"


def test_a_model_is_evaluated_in_a_table_in_json_and_by_completion(shell: Shell, tmp_path: Path) -> None:
    code, out, _ = shell(f"evaluate embedded {FEW} --output answers.jsonl")
    assert code == 0
    assert out.startswith("embedded on arithmetic: 8 held-out prompts, 1 completion each, greedily")
    assert "standard error" in out
    assert "arithmetic_accuracy" in out
    assert "tokens on average" in out
    assert out.endswith("wrote answers.jsonl\n")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    code, out, _ = shell(f"evaluate embedded {FEW} --json")
    assert code == 0
    found = json.loads(out)
    assert found["reward"]["mean"] == sum(line["reward"] for line in lines) / 8
    assert list(tmp_path.iterdir()) == [tmp_path / "answers.jsonl"], "an evaluation leaves no run behind"


def test_reward_calls_that_fail_are_told(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "careless.py").write_text("def score(completions, **columns):\n    return 1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = f"evaluate embedded {FEW} --reward-funcs careless:score --reward-on-error none"
    told = "reward function 'score' raised ZeroDivisionError: division by zero"
    code, out, _ = shell(line)
    assert code == 0
    assert "unknown" in out, "no completion has a reward"
    assert f"note: {told}" in " ".join(out.split())
    code, out, _ = shell(f"{line} --json")
    assert code == 0
    [problem] = json.loads(out)["problems"]
    assert problem.startswith(told)
