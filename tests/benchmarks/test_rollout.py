"""The benchmarks of rollouts run in miniature, and the page says what they found."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.ops import store
from benchmarks.rollout import few_rows, report
from grpo_fast.ops.decoder_layer import problem


def test_the_page_holds_each_case_with_its_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"layout": "Qwen2.5-7B", "layers": 1, "layers_whole": 28, "num_bytes": 2.6e9, "engine": "server", "probe_ms": 900.0}
    case |= {"transport": "shared memory", "rows": {"grpo_fast": {"p50_ms": 2500.0}, "safetensors": {"p50_ms": 3100.0}}}
    content = {"device": "a CPU", "cores": 2, "versions": {"torch": "2.13.0"}, "cases": [case]}
    tokens = {
        "model": "embedded",
        "engine": "server",
        "prompts": 16,
        "generations": 8,
        "max_tokens": 32,
        "torch_threads": 1,
        "rounds": 9,
    }
    tokens |= {"tokens_per_cpu_s": {"grpo_fast": 970.4, "plain vLLM": 1000.0}}
    tokens |= {"share_of_plain": {"wall": [0.98, 0.95, 1.01], "processor": [0.97, 0.96, 0.99]}}
    tokens |= {"processor_share_outside_vllm": {"grpo_fast": 0.014, "plain vLLM": 0.006}}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "sync.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "cpu" / "rollout_tokens.json").write_text(json.dumps({"cases": [tokens]}), encoding="utf-8")
    short = {"tokens_short": {"64": 0.25, "1024": 0.0}, "completions_short": {"64": 0.5, "1024": 0.0}}
    support = {"temperature": 0.7, "top_p": 0.9, "tokens": 4000, "mean": 20.6, "median": 4.0, "p99": 254.9, "widest": 1491}
    cost = {"temperature": 1.0, "min_p": 0.05, "cpu_us_per_token": {"cut alone": 2000.0, "64": 2100.0}}
    cut = {"model": "a model", "device": "a CPU", "max_tokens": 64, "cases": [support | short], "in process": [cost]}
    (tmp_path / "cpu" / "cut_supports.json").write_text(json.dumps(cut), encoding="utf-8")
    few = {"model": "a model", "device": "a CPU", "torch_threads": 2, "machine": "quiet", "versions": {"torch": "2.13.0"}}
    few |= {"cases": [{"rows": 8, "ours_ms": 28.0, "onednn_ms": 46.0, "torch_ms": 68.0, "reading_ms": 25.0}]}
    (tmp_path / "cpu" / "few_rows.json").write_text(json.dumps(few), encoding="utf-8")
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    page = report.section()
    assert "a model, a CPU, 2 threads, quiet, torch 2.13.0:\n" in page
    assert "| 8 | 28 ms | 46 ms | 68 ms | 25 ms |" in page
    assert "| 0.7 | top_p 0.9 | 4,000 | 20.6 | 4 | 255 | 1,491 | 25.0% (50%) | 0.0% (0%) |" in page
    assert "| in process, temperature 1 | cut alone | 64 told |\n|---|---|---|\n| min_p 0.05 | 2 ms | 2.1 ms |" in page
    assert "| Qwen2.5-7B, 1 of 28 layers | 2.60 GB | server, shared memory | 2.5 s | 900 ms |  | 3.1 s |" in page
    rates = "970 | 1,000 | 0.970 (0.960 to 0.990) | 0.980 (0.950 to 1.010) | 0.8 % |"
    assert f"| embedded, server | 16 prompts x 8, up to 32 tokens, threads: 1, rounds: 9 | {rates}" in page


@pytest.mark.skipif(bool(problem()), reason=problem())
def test_products_of_few_rows_are_measured_in_miniature() -> None:
    sizes = few_rows.Sizes("miniature", 2, ((24, 16), (16, 24)), (64, 16))
    found = few_rows.measure([1, 8], 2, sizes)
    assert [case["rows"] for case in found] == [1, 8]
    assert all(case[f"{name}_ms"] > 0 for case in found for name in ("ours", "torch", "onednn", "reading", "packing"))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("untraced")
def test_a_sync_is_measured_beside_its_rivals_in_miniature() -> None:
    from benchmarks.rollout.sync import measure

    found = measure("miniature", None, host="in", transport="auto", rounds=2)
    assert found["rows"].keys() == {"grpo_fast", "reload_weights", "safetensors"}
    assert found["failures"].keys() == {"load_weights"}
    assert found["probe_ms"] < found["rows"]["grpo_fast"]["p50_ms"]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("host", ["in", "server"])
@pytest.mark.usefixtures("untraced")
def test_tokens_are_measured_beside_plain_vllm_on_the_same_requests(host: str) -> None:
    from benchmarks.rollout.tokens import measure

    found = measure("miniature", None, Namespace(host=host, prompts=2, generations=2, max_tokens=4, rounds=3))
    median, low, high = found["share_of_plain"]["processor"]
    assert low <= median <= high
    outside = found["processor_share_outside_vllm"]
    assert 0 < outside["plain vLLM"] < 1
    assert 0 < outside["grpo_fast"] < 1
    if host == "in":  # over HTTP the two differ by less than such a short run tells
        assert outside["plain vLLM"] < outside["grpo_fast"]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("untraced")
def test_supports_are_measured_whole_however_many_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.rollout import supports
    from benchmarks.rollout.models import LAYOUTS, any_tokenizer
    from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings
    from grpo_fast.rollout.vllm_sample import Telling

    engine = VLLMEngine(LAYOUTS["miniature"].build(1), any_tokenizer(), settings=VLLMSettings(max_length=512))
    given = Namespace(temperatures=[1.0], max_tokens=3, generations=2, timed_prompts=1, rounds=1)
    try:
        found = []
        for told in (2, 300):
            monkeypatch.setattr(engine._vllm, "telling", Telling(told, 1))
            found.append(supports.widths(engine, [[1, 5], [7]], given))
        costs = supports.timed(engine, [[1, 5], [7]], given, time.process_time)
    finally:
        engine.close()
    assert found[0] == found[1]
    assert {case["tokens"] for case in found[0]} == {12}
    assert max(case["widest"] for case in found[0]) > 200
    assert all(min(case["cpu_us_per_token"].values()) > 0 for case in costs)
