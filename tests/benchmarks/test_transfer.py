"""The extension's benchmarks run in miniature, compare what they time, and say in the page what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.ops import store
from benchmarks.transfer import report, speed
from benchmarks.transfer.change import letters, measure, part
from grpo_fast.assets import embedded_model_dir
from grpo_fast.ops import native


@pytest.fixture(autouse=True)
def native_library() -> None:
    if problem := native.load():
        pytest.skip(problem)


def test_every_case_runs_in_miniature() -> None:
    records = list(speed.measure(torch.device("cpu"), smoke=True, rounds=2))
    assert len(records) == 8
    assert len({record["case"] for record in records}) == 8
    for record in records:
        assert record["rows"]["native"]["p50_ms"] > 0
        if record["num_bytes"]:
            assert {"copy_", "memmove"} < record["rows"].keys()
            assert record["share_of_copy"] > 0


def test_what_was_measured_is_kept_whatever_becomes_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, seen, real = tmp_path / "of" / "a device" / "transfer.json", list[str](), speed.run

    def known() -> list[str]:
        return [record["case"] for record in json.loads(path.read_text(encoding="utf-8"))["cases"]]

    def breaks(name: str, *rest: Any) -> dict[str, Any]:
        seen.append(name)
        if "0.1%" in name:
            raise torch.OutOfMemoryError("no room")
        if "10.0%" in name:
            assert known() == [case for case in seen[:-1] if "0.1%" not in case], "before the next case begins"
        return real(name, *rest)

    small = speed.cases(torch.device("cpu"), smoke=True)
    monkeypatch.setattr(speed, "cases", lambda device, smoke: {name: small[name] for name in small if "delta" in name})
    monkeypatch.setattr(speed, "run", breaks)
    arguments = ["--rounds", "2", "--output", str(path)]
    assert speed.main(arguments) == 1
    assert "OutOfMemoryError: no room" in capsys.readouterr().out
    assert len(known()) == 2
    assert speed.main([*arguments, "--budget", "-1"]) == 1
    assert "left out" in capsys.readouterr().out
    monkeypatch.setattr(speed, "run", real)
    assert speed.main([*arguments, "--only", "0.1%"]) == 0
    assert sorted(known()) == sorted(name for name in small if "delta" in name)


def test_copies_move_every_byte() -> None:
    source = torch.arange(1001).to(torch.uint8)
    targets = {name: torch.zeros_like(source) for name in speed.copies(source, source)}
    for name, target in targets.items():
        speed.copies(source, target)[name]()
        assert torch.equal(target, source), name
    assert len(targets) == 2


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.1-8B"])
def test_parameter_lists_are_those_of_the_models(name: str) -> None:
    ours = next(model for model in speed.MODELS if model.name.startswith(name))
    config = AutoConfig.for_model(
        "qwen2" if ours.attention_bias else "llama", vocab_size=ours.vocab_size, hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size, num_hidden_layers=ours.num_layers, tie_word_embeddings=True,
        num_attention_heads=ours.hidden_size // 64, num_key_value_heads=ours.kv_size // 64,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sorted(ours.shapes()) == sorted(tuple(weight.shape) for weight in model.parameters())


@pytest.mark.slow
def test_a_step_changes_more_at_a_higher_rate() -> None:
    path = str(embedded_model_dir())
    low, high = (measure("embedded", path, learning_rate=rate, num_steps=2) for rate in (1e-6, 1e-4))
    assert 0 < low["changed"] < 0.05 < high["changed"]
    assert low["num_steps"] == 2
    assert low["delta_bytes"] < 3.1 * low["changed"]
    assert {"embeddings", "norms", "layer 0 attn", "layer 0 mlp"} <= low["by_part"].keys()


def test_parameters_are_sorted_into_parts() -> None:
    assert part("model.layers.11.self_attn.q_proj.weight") == "layer 11 attn"
    assert part("model.layers.0.mlp.up_proj.weight") == "layer 0 mlp"
    assert part("model.layers.0.input_layernorm.weight") == part("model.norm.weight") == "norms"
    assert part("model.embed_tokens.weight") == "embeddings"
    rewards = letters(["", ""], ["111", "xyz"])
    assert rewards[0] > rewards[1] - 0.1
    assert len(set(rewards)) == 2


def test_the_page_names_every_case_that_was_measured() -> None:
    text = report.section()
    for path in store.RESULTS.glob("*/transfer.json"):
        for record in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            assert f"| {record['case']} |" in text
