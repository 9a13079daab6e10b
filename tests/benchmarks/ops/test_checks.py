"""The tests that precede a GPU's timings: counts, names of what failed, and an end when time is up."""

from __future__ import annotations

import pytest

from benchmarks.ops import checks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    return tmp_path / "tests" / "ops"


def test_counts_and_names(folder) -> None:
    (folder / "test_a.py").write_text("def test_right(): pass\ndef test_wrong(): assert 0", encoding="utf-8")
    found = checks.run_gpu_tests(60.0)
    assert found["failed"] == ["tests/ops/test_a.py::test_wrong"]
    assert found["summary"].startswith("1 failed, 1 passed")


def test_time_is_up(folder) -> None:
    (folder / "test_a.py").write_text("import time\ndef test_slow(): time.sleep(60)", encoding="utf-8")
    found = checks.run_gpu_tests(6.0)
    assert "stopped after 6 s" in found["summary"]
    assert found["failed"] == []


def test_without_pytest_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert checks.run_gpu_tests(1.0) == {"summary": "not run: pytest is not installed", "failed": []}
