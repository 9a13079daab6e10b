"""The page of results shows what is right with its times, and everything else with its reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.ops import report, store

ERRORS = {"logprobs_max_nat": 3e-5, "dhidden_relative": 2e-6, "dweight_relative": 4e-6}


def row(name: str, **options: Any) -> dict[str, Any]:
    base = {"contender": name, "role": "rival", "package": name, "version": "1.2", "settings": "", "errors": ERRORS}
    return base | options


def timed(name: str, milliseconds: float, **options: Any) -> dict[str, Any]:
    times = {"p50_ms": milliseconds, "p20_ms": 0.9 * milliseconds, "p80_ms": 1.1 * milliseconds, "times_floor": 1.5}
    return row(name, status="ok", fraction_of_gemm=0.5, peak_extra_bytes=3 * 2**30, **times, **options)


@pytest.fixture
def content() -> dict[str, Any]:
    rows = [
        timed("slow", 2500.0),
        timed("fast", 0.25),
        row("wrong one", status="wrong", reason="dhidden_relative is off by 0.5"),
        row("absent", status="missing", reason="No module named 'absent'", version=None),
        row("narrow", status="refused", reason="no weights per token"),
    ]
    record = {"case": "a case", "kind": "head", "commit": "abc", "date": "2026-11-25", "rows": rows}
    return {
        "format": store.FORMAT,
        "device": {"kind": "cuda", "name": "a GPU"},
        "ceilings": {"gemm_flops": {"bfloat16": 7.5e14}, "copy_bytes_per_s": 3e12},
        "contenders": [{"package": "fast", "version": "1.2"}, {"package": "absent", "version": None}],
        "machine": "",
        "tests": {"summary": "12 passed", "failed": []},
        "cases": [record | {"inputs": {"mean_logprob_nat": -0.31}, "seconds": 3.0}],
        "left_out": [{"case": "another case", "reason": "about 9 s, 3 s of the budget were left"}],
    }


def test_a_page_tells_everything(content, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    (tmp_path / "a-gpu").mkdir()
    (tmp_path / "a-gpu" / "ops.json").write_text(json.dumps(content), encoding="utf-8")
    page = report.page()
    assert page.index("| fast |") < page.index("| slow |")
    assert "| slow | 1.2 | 2.5 s (2.25 s to 2.75 s) | 1.50 | 50% | 3.00 GiB | 4e-06 |" in page
    for text in (
        "750 TFLOP/s in bfloat16",
        "3e+03 GB/s",
        "12 passed",
        "Missing: absent",
        "mean log-probability -0.31 nat",
        "- wrong one: wrong, dhidden_relative is off by 0.5",
        "- absent: missing, No module named 'absent'",
        "- not for this case: narrow",
        "- another case: about 9 s",
        "results/a-gpu/ops.png",
    ):
        assert text in page, text
    assert "| wrong one |" not in page


def test_the_console_tells_what_failed(content) -> None:
    line = report.one_line(content["cases"][0])
    assert line == "a case (3.0 s): fast 250 us, slow 2.5 s; wrong one wrong"


def test_units() -> None:
    assert [report.duration(x) for x in (0.0123, 0.5, 1.234, 999.0, 1234.5)] == [
        "12.3 us",
        "500 us",
        "1.23 ms",
        "999 ms",
        "1.23 s",
    ]
    assert [report.size(x) for x in (None, 0, 5 * 2**20, 3 * 2**29)] == ["", "0 MiB", "5 MiB", "1.50 GiB"]
    assert report.error({"logprobs_max_nat": 2e-5}) == "2e-05 nat"
    assert report.error({}) == ""
