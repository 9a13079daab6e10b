from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.recipes import recipe
from grpo_fast.train.plan_facts import ASSUMED_MFU, PlanInputs, gather
from grpo_fast.train.policy_source import PolicySource

SMALL: dict[str, Any] = {"prompts_per_step": 4, "num_generations": 4, "dataset_size": 64, "eval_size": 8, "reward_workers": 0}


def small(**changes: Any) -> Config:
    return recipe("embedded", **SMALL | changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probe": 1}, "probe=1 must be at least 2 prompts"),
        ({"probe": 8, "model_size": 7.0}, "a probe needs the model itself"),
        ({"probe": 8, "start_reward": 0.1}, "probe measures the start reward"),
        ({"probe": 8, "gpu": "RTX 4090"}, "a probe times this machine"),
        ({"seconds_per_step": 3.0, "mfu": 0.2}, "give one"),
        ({"mfu": 1.5}, "mfu=1.5 must be a share"),
        ({"gpu": "A100"}, r"unknown gpu='A100'; did you mean 'A100-SXM4-80GB' or .*\? Choose one, or time a step"),
        ({"gpu": "GTX 1080"}, "unknown gpu='GTX 1080'; did you mean"),
        (
            {"gpu": "Abacus"},
            "unknown gpu='Abacus'; choose one of GB200, .*RTX 3060, .*, or time a step and give",
        ),
        ({"gpu": "RTX 4060 Laptop"}, r"depends on the power that the laptop gives it\); choose one of"),
        ({"model_size": -1.0}, "model_size=-1.0 must be a positive number"),
        ({"completion_tokens": float("nan")}, "completion_tokens=nan must be a positive number"),
    ],
)
def test_contradictions_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanInputs(**values)


def test_sizes_are_read_without_weights() -> None:
    known = gather(small(), PlanInputs())
    model = PolicySource(small()).load().model
    assert known.facts.size_b == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e9)
    assert known.work.shape.head_params == model.get_output_embeddings().weight.numel()
    assert known.num_prompts == 64
    assert known.checkpoint_bytes == sum(p.numel() for p in model.parameters()) * (4 + 8), "weights and both moments"
    assert known.sources == {
        "start_reward": "unknown",
        "model_size": "read",
        "completion_tokens": "assumed",
        "num_prompts": "read",
        "seconds_per_step": "unknown",
    }
    assert known.facts.start is None
    assert known.completion_tokens.most == 32
    told = " ".join(known.notes)
    assert "half of max_completion_length=32" in told
    assert "time and money are unknown" in told


def test_a_plan_without_model_and_data() -> None:
    inputs = PlanInputs(model_size=7.0, prompt_tokens=100.0, data_size=5000, gpu="H100 80GB HBM3", num_devices=8, lora=True)
    known = gather(Config(dataset="nowhere.jsonl"), inputs)
    assert known.dataset == "data of that size", "the plan adds the number"
    assert (known.num_prompts, known.work.prompt_tokens, known.facts.size_b, known.facts.lora) == (5000, 100.0, 7.0, True)
    assert known.work.shape.body_params == 7e9
    assert known.work.shape.lora_params == 7e7
    assert known.pace.mfu is not None
    assert (known.pace.mfu.value, known.pace.peak_flops, known.pace.num_devices) == (ASSUMED_MFU, 989.4e12, 8)
    assert gather(Config(), PlanInputs(model_size=1.0)).work.prompt_tokens == pytest.approx(2.5, abs=1.5), "characters by four"
    with pytest.raises(ConfigError, match="there is no dataset file"):
        gather(Config(dataset="nowhere.jsonl"), PlanInputs(model_size=7.0))
    with pytest.raises(ConfigError, match="completion_tokens=999 exceeds max_completion_length=256"):
        gather(Config(), PlanInputs(model_size=7.0, completion_tokens=999.0))


def test_passes_over_completions_without_gradient_are_counted() -> None:
    known = PlanInputs(model_size=0.5)
    assert gather(Config(), known).work.idle_passes == 0
    both = Config(top_entropy_quantile=0.2, keep_dead_rows_for_metrics=True, num_iterations=3)
    assert gather(both, known).work.idle_passes == 4


def test_a_device_that_no_table_holds_is_planned_for_by_its_time_per_step() -> None:
    known = gather(Config(), PlanInputs(model_size=0.5, gpu="RTX 4060 Laptop", seconds_per_step=5.0))
    assert known.device == "RTX 4060 Laptop"
    assert known.pace.seconds is not None
    assert (known.pace.seconds.value, known.pace.watts) == (5.0, None)


def test_a_named_device_without_bfloat16_is_not_asked_to_be_named() -> None:
    (told,) = [note for note in gather(Config(), PlanInputs(model_size=0.5, gpu="T4")).notes if "time and money" in note]
    assert "T4 has no bfloat16 and computes in float32" in told
    assert "--gpu" not in told
    assert "--seconds-per-step" in told


def test_float32_is_not_timed_by_the_peak_of_bfloat16() -> None:
    inputs = PlanInputs(model_size=7.0, gpu="H100 80GB HBM3")
    known = gather(Config(dtype="float32"), inputs)
    assert (known.pace.mfu, known.pace.peak_flops, known.sources["seconds_per_step"]) == (None, None, "unknown")
    (told,) = [note for note in known.notes if "time and money" in note]
    assert "H100 80GB HBM3 is known in bfloat16 alone, and dtype is 'float32'; leave dtype at 'auto'" in told
    assert gather(Config(dtype="bfloat16"), inputs).pace.peak_flops == 989.4e12
    assert "T4 has no bfloat16" in " ".join(gather(Config(dtype="float32"), PlanInputs(model_size=7.0, gpu="T4")).notes)
    timed = gather(Config(dtype="float32"), PlanInputs(model_size=7.0, gpu="H100 80GB HBM3", seconds_per_step=4.0))
    assert timed.pace.seconds is not None


def test_no_share_of_the_peak_foretells_steps_that_wait_for_launches() -> None:
    tiny = gather(recipe("embedded"), PlanInputs(gpu="RTX 4090"))
    assert (tiny.sources["seconds_per_step"], tiny.pace.mfu) == ("unknown", None)
    assert "launching kernels takes longer than computing" in tiny.notes[-1]
    assert not any("no step was timed" in note for note in tiny.notes)
    trusted = gather(recipe("embedded"), PlanInputs(gpu="RTX 4090", mfu=0.01))
    assert trusted.sources["seconds_per_step"] == "assumed"
    whole = gather(recipe("embedded", prompts_per_step=2048, num_generations=64), PlanInputs(gpu="RTX 4090"))
    assert whole.sources["seconds_per_step"] == "assumed", "more sequences take no more launches"


def test_adapters_of_the_configuration_are_counted_not_assumed() -> None:
    inputs = PlanInputs(prompt_tokens=8.0, data_size=64)
    plain, adapted = gather(small(), inputs), gather(small(use_peft=True, lora_r=2), inputs)
    assert (plain.facts.lora, adapted.facts.lora) == (False, True)
    assert adapted.facts.size_b == plain.facts.size_b
    layers = [(128, 128)] * 4 + [(128, 256)] * 3
    assert adapted.work.shape == replace(plain.work.shape, lora_params=4 * sum(2 * (a + b) for a, b in layers))
    assert not any("adapters are assumed" in note for note in adapted.notes)


def test_a_probe_measures_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = gather(small(eval_steps=20, price_per_gpu_hour=2.0), PlanInputs(probe=16))
    assert list(tmp_path.iterdir()) == []
    assert set(known.sources.values()) == {"measured", "read"}
    assert known.facts.start is not None
    assert 0.0 <= known.facts.start <= 1.0
    assert known.held_out is not None
    assert known.pace.seconds is not None
    assert 0.001 < known.pace.seconds.value < 60
    assert known.pace.at_tokens == pytest.approx(4 * 4 * (known.work.prompt_tokens + known.completion_tokens.value))
    assert 1 < known.completion_tokens.value <= 32
    assert 0 < known.trained_share.value <= 1
    assert known.pace.price_per_gpu_hour == 2.0
    assert known.checkpoint_bytes == gather(small(), PlanInputs()).checkpoint_bytes
    again = gather(small(eval_steps=20), PlanInputs(probe=16))
    assert (again.facts, again.completion_tokens, again.trained_share) == (
        known.facts,
        known.completion_tokens,
        known.trained_share,
    ), "the probe does not train: equal questions get equal answers"


def test_a_probe_tells_of_rewards_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def judge(completions, **columns):\n    raise ValueError('the judge is gone')\n"
    (tmp_path / "a_failing_judge.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    failing = {"reward_funcs": ("a_failing_judge:judge",), "reward_on_error": "none", "reward_range": (0.0, 1.0)}
    known = gather(small(eval_steps=20, **failing), PlanInputs(probe=8))
    assert sum("the judge is gone" in note for note in known.notes) == 1
