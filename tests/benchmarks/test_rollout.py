"""The benchmarks of rollouts run in miniature, and the page says what they found."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.ops import store
from benchmarks.rollout import report


def test_the_page_holds_each_case_with_its_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"layout": "Qwen2.5-7B", "layers": 1, "layers_whole": 28, "num_bytes": 2.6e9, "engine": "server", "probe_ms": 900.0}
    case |= {"transport": "shared memory", "rows": {"grpo_fast": {"p50_ms": 2500.0}, "safetensors": {"p50_ms": 3100.0}}}
    content = {"device": "a CPU", "cores": 2, "versions": {"torch": "2.13.0"}, "cases": [case]}
    tokens = {"model": "embedded", "prompts": 16, "generations": 8, "max_tokens": 32, "torch_threads": 1, "rounds": 9}
    tokens |= {"tokens_per_cpu_s": {"grpo_fast": 970.4, "plain vLLM": 1000.0}}
    tokens |= {"share_of_plain": {"wall": [0.98, 0.95, 1.01], "processor": [0.97, 0.96, 0.99]}}
    tokens |= {"processor_share_outside_vllm": {"grpo_fast": 0.014, "plain vLLM": 0.006}}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "sync.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "cpu" / "rollout_tokens.json").write_text(json.dumps({"cases": [tokens]}), encoding="utf-8")
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    page = report.section()
    assert "| Qwen2.5-7B, 1 of 28 layers | 2.60 GB | server, shared memory | 2.5 s | 900 ms |  | 3.1 s |" in page
    rates = "970 | 1,000 | 0.970 (0.960 to 0.990) | 0.980 (0.950 to 1.010) | 0.8 % |"
    assert f"| embedded | 16 prompts x 8, up to 32 tokens, threads: 1, rounds: 9 | {rates}" in page


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_sync_is_measured_beside_its_rivals_in_miniature() -> None:
    from benchmarks.rollout.sync import measure

    found = measure("miniature", None, host="in", transport="auto", rounds=2)
    assert found["rows"].keys() == {"grpo_fast", "reload_weights", "safetensors"}
    assert found["failures"].keys() == {"load_weights"}
    assert found["probe_ms"] < found["rows"]["grpo_fast"]["p50_ms"]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_tokens_are_measured_beside_plain_vllm_on_the_same_requests() -> None:
    from benchmarks.rollout.tokens import measure

    found = measure("miniature", None, Namespace(prompts=2, generations=2, max_tokens=4, rounds=3))
    median, low, high = found["share_of_plain"]["processor"]
    assert low <= median <= high
    assert 0 < found["processor_share_outside_vllm"]["plain vLLM"] < found["processor_share_outside_vllm"]["grpo_fast"] < 1
