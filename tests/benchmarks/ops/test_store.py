"""Results are whole after every case and say which commit they are of."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from benchmarks.ops import store
from grpo_fast.device import device_facts


def test_a_file_is_whole_after_every_case(tmp_path) -> None:
    path = tmp_path / "results" / "ops.json"
    kept = store.Store(path, {"machine": "quiet"}, keep=[{"case": "a", "seconds": 1}, {"case": "b", "seconds": 1}])
    assert kept.done == {"a", "b"}
    kept.leave_out("c", "no time")
    kept.add({"case": "b", "seconds": 2}, of={"commit": "x"})
    content = store.read(path)
    assert content["cases"] == [{"case": "a", "seconds": 1}, {"case": "b", "seconds": 2, "commit": "x"}]
    assert content["left_out"] == [{"case": "c", "reason": "no time"}]
    assert content["machine"] == "quiet"
    assert [file.name for file in path.parent.iterdir()] == ["ops.json"]


def test_what_is_not_finite_is_null(tmp_path) -> None:
    kept = store.Store(tmp_path / "ops.json", {})
    kept.add({"case": "a", "rows": [{"errors": {"one": math.nan, "other": 0.5}, "ratios": (math.inf, 1)}]}, of={})
    text = (tmp_path / "ops.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["cases"] == [{"case": "a", "rows": [{"errors": {"one": None, "other": 0.5}, "ratios": [None, 1]}]}]


def test_every_device_has_its_folder() -> None:
    facts = device_facts("cpu")
    assert store.default_path(facts) == store.RESULTS / "cpu" / "ops.json"


def test_a_commit_is_marked_where_code_differs_and_not_where_results_do(tmp_path, monkeypatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(store, "RESULTS", results)
    assert store.commit() is None
    for file in (tmp_path / "code.py", results / "ops.json"):
        file.write_text("1", encoding="utf-8")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    name = git("rev-parse", "--short=10", "HEAD")
    (results / "ops.json").write_text("2", encoding="utf-8")
    assert store.commit() == name
    Path(tmp_path / "code.py").write_text("2", encoding="utf-8")
    assert store.commit() == f"{name}-dirty"


def test_another_format_is_refused(tmp_path) -> None:
    path = tmp_path / "ops.json"
    path.write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(ValueError, match="format 99"):
        store.read(path)
