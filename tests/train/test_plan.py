from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor
from transformers import Qwen3MoeConfig

from grpo_fast.assets import embedded_model_dir
from grpo_fast.config import Config, ConfigError
from grpo_fast.law import OnlinePredictor, Prior, RunFacts
from grpo_fast.sinks.quantities import binary
from grpo_fast.train import GRPOTrainer, compiled, liger, quantised
from grpo_fast.train.plan import SHARES, Plan, make_plan
from grpo_fast.train.plan_facts import PlanInputs

BARE = PlanInputs(model_size=7.0, prompt_tokens=100.0, data_size=5000, seconds_per_step=36.0)
NAMES = ("low", "low50", "median", "high50", "high")


def big(**changes: Any) -> Config:
    return Config.parse({"max_steps": 100, "reward_range": (0.0, 1.0), "price_per_gpu_hour": 2.0} | changes)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(big(), BARE)


def test_the_plan_is_what_training_would_believe_before_its_first_step(plan: Plan) -> None:
    law = OnlinePredictor(100, epsilon=0.01, reward_range=(0.0, 1.0), facts=RunFacts(size_b=7.0))
    assert plan.forecast == law.forecast()
    last = plan.trajectory[-1]
    assert (last["low"], last["median"], last["high"]) == pytest.approx(
        (plan.forecast.low, plan.forecast.median, plan.forecast.high)
    )


def test_numbers_are_whole_and_in_order(plan: Plan) -> None:
    found = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert [row["share"] for row in found["trajectory"]] == list(SHARES)
    assert [row["step"] for row in found["trajectory"]] == [0, 10, 20, 40, 60, 80, 100]
    for row in [
        *found["trajectory"],
        found["plateau"]["level"],
        found["costs"]["tokens"]["run"],
        found["costs"]["money"]["run"],
    ]:
        values = [row[name] for name in NAMES]
        assert values == sorted(values)
    assert sum(found["outcomes"].values()) == pytest.approx(1.0)
    assert 0 <= found["plateau"]["probability_within_budget"] <= 1
    assert found["plateau"]["x80"]["probability"] >= found["plateau"]["x95"]["probability"]
    assert found["plateau"]["x80"]["step"]["low"] <= found["plateau"]["x95"]["step"]["low"]
    assert found["unknown"] == ["start_reward"]
    assert set(found["path"]) == {"step", *NAMES}
    assert found["budget"]["ended_by"] == "max_steps"
    assert found["budget"]["epochs"] == pytest.approx(100 * 16 / 5000)
    assert found["costs"]["money"]["run"]["median"] == pytest.approx(100 * 36 / 3600 * 2.0, rel=0.05)


@pytest.mark.parametrize("limit", ["max_tokens", "max_flops", "max_gpu_hours", "max_wall_hours", "max_money", "max_energy_kwh"])
def test_a_budget_is_turned_into_the_step_at_which_it_ends(limit: str, plan: Plan) -> None:
    costs = {"max_gpu_hours": "device_hours"}.get(limit, limit.removeprefix("max_"))
    step = plan.costs[costs]
    assert step is not None
    half = make_plan(big(**{limit: 50 * step["step"]["median"]}), BARE)
    assert half.ended_by == limit
    assert half.end["median"] == pytest.approx(50, abs=1)
    assert half.end["low"] < 50 < half.end["high"]
    assert half.trajectory[-1]["step"] == half.end["median"]
    assert half.p_plateau < plan.p_plateau
    assert half.epochs == pytest.approx(plan.epochs / 2, rel=0.03)
    spent = half.costs[costs]
    assert spent is not None
    assert spent["run"]["high"] == pytest.approx(50 * step["step"]["median"], rel=0.05)


def test_what_is_known_matters(tmp_path: Path) -> None:
    unknown, known = (make_plan(big(), PlanInputs(**vars(BARE) | {"start_reward": start})) for start in (None, 0.3))
    for name in ("low", "high"):
        assert abs(known.trajectory[0][name] - 0.3) < 0.2 < abs(unknown.trajectory[0][name] - 0.3)
    assert "the start reward is unknown" in " ".join(unknown.notes)
    assert "the start reward is unknown" not in " ".join(known.notes)
    logits = Prior.default().part_logits.copy()
    logits[0, 0] += 50.0
    Prior(logits, Prior.default().class_logits).save(tmp_path / "flat.json")
    flat = make_plan(big(forecast_prior=tmp_path / "flat.json"), PlanInputs(**vars(BARE) | {"start_reward": 0.3}))
    assert flat.ways["hardly moves"] > known.ways["hardly moves"] + 0.2
    assert flat.prior == str(tmp_path / "flat.json")


def test_what_cannot_be_foretold_is_an_error() -> None:
    blind = PlanInputs(model_size=7.0, prompt_tokens=100.0, data_size=5000)
    with pytest.raises(ConfigError, match=r"max_gpu_hours=3 cannot be turned into steps.*--seconds-per-step"):
        make_plan(big(max_gpu_hours=3, device="cpu"), blind)
    with pytest.raises(ConfigError, match="needs price_per_gpu_hour above 0"):
        make_plan(big(max_money=3, price_per_gpu_hour=0), BARE)
    with pytest.raises(ValueError, match=r"reward=1\.5 at the start is outside reward_range"):
        make_plan(big(), PlanInputs(**vars(BARE) | {"start_reward": 1.5}))
    assert make_plan(big(device="cpu"), blind).cost_words()[-1] == ("wall-clock time", *["unknown"] * 4)


def test_the_schedule_is_minded() -> None:
    warm = make_plan(big(lr_scheduler_type="linear", max_tokens=1e6), BARE)
    assert any("to complete the schedule" in told for told in warm.notes)
    slow, fast = (make_plan(big(warmup_steps=steps), BARE) for steps in (80, 0))
    assert slow.rises[0.8]["step"]["median"] > fast.rises[0.8]["step"]["median"]


def test_the_size_of_a_checkpoint_is_told_where_the_model_is_known(plan: Plan) -> None:
    config = Config(model="embedded", max_steps=10, max_completion_length=32, device="cpu", dataset_size=64, eval_size=8)
    found = make_plan(config, PlanInputs(seconds_per_step=1.0))
    size = found.facts.checkpoint_bytes
    assert size is not None
    assert found.to_dict()["checkpoint_bytes"] == size
    assert found.to_words()["a checkpoint"] == f"{binary(size)} on disk"
    assert "a checkpoint" not in plan.to_words()
    assert plan.to_dict()["checkpoint_bytes"] is None


@pytest.mark.slow
def test_a_run_goes_as_planned(embedded_config: Callable[..., Config]) -> None:
    """The plan is made before, the run is done after; nine of ten intervals may be asked to hold, not each."""
    config = embedded_config(
        max_steps=12,
        prompts_per_step=8,
        num_generations=4,
        dataset_size=128,
        eval_steps=0,
        reward_workers=0,
        forecast="warn",
    )
    foretold = make_plan(config, PlanInputs(probe=64))
    with GRPOTrainer(config) as trainer:
        rewards = [step.metrics["reward"] for step in trainer.steps()]
        compute = trainer.summary["compute"]
    path = foretold.path
    noise = 0.1  # of a step's 32 answers to 8 prompts
    held = [
        np.interp(step, path["step"], path["low"]) - noise <= reward <= np.interp(step, path["step"], path["high"]) + noise
        for step, reward in enumerate(rewards, 1)
    ]
    assert np.mean(held) >= 0.8
    for name in ("tokens", "flops"):
        run = foretold.costs[name]
        assert run is not None
        assert run["run"]["low"] / 1.3 < compute[name] < run["run"]["high"] * 1.3, name


def test_a_gpu_that_is_named_computes_in_its_own_arithmetic() -> None:
    def peak(gpu: str, **changes: Any) -> int:
        config = Config(model="embedded", max_steps=10, max_completion_length=32, **changes)
        memory = make_plan(config, PlanInputs(gpu=gpu, start_reward=0.1, seconds_per_step=1.0)).memory
        assert memory is not None
        return memory.peak_bytes

    assert peak("T4") == peak("T4", dtype="float32") == peak("L4", dtype="float32") > peak("L4") == peak("L4", dtype="bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda"},
        {"use_liger_kernel": True},
        {"torch_compile": True},
        {"use_peft": True, "load_in_4bit": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_mode": "offload"},
        {"fsdp": "full_shard", "fsdp_offload_params": True},
    ],
)
def test_neither_a_gpu_that_is_named_nor_what_it_needs_has_to_be_here(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (liger, compiled, quantised):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    config = Config.parse({"model": "embedded", "max_steps": 10, "max_completion_length": 32} | changes)
    known = {"start_reward": 0.1, "seconds_per_step": 1.0, "num_devices": 2}
    found = make_plan(config, PlanInputs(gpu="L4", **known))
    assert found.memory is not None
    assert found.memory.fits
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(ConfigError):
        make_plan(config, PlanInputs(**known))


def test_the_memory_of_a_gpu_that_no_table_holds_is_not_this_machines() -> None:
    config = Config(model="embedded", max_steps=10, max_completion_length=32)
    found = make_plan(config, PlanInputs(gpu="RTX 4060 Laptop", start_reward=0.1, seconds_per_step=1.0))
    assert found.memory is None
    assert "whether the run fits is unknown, because the memory of RTX 4060 Laptop is not known" in found.notes
    assert found.to_dict()["costs"]["wall_hours"]["run"]["median"] == pytest.approx(10 / 3600, rel=0.2)


def test_a_model_whose_memory_cannot_be_counted_is_planned_without(tmp_path: Path) -> None:
    shutil.copytree(
        embedded_model_dir(), tmp_path, ignore=shutil.ignore_patterns("config.json", "*.safetensors"), dirs_exist_ok=True
    )
    Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ).save_pretrained(tmp_path)
    found = make_plan(big(model=str(tmp_path)), PlanInputs(**vars(BARE) | {"model_size": None}))
    assert found.memory is None
    assert found.to_dict()["memory"] is None
    assert any(note.startswith("the memory that the run needs is unknown: passes of qwen3_moe") for note in found.notes)


def test_the_size_of_a_node_is_assumed_aloud() -> None:
    for num_devices, fsdp, told in ((16, "hybrid_shard", True), (8, "hybrid_shard", False), (16, "full_shard", False)):
        plan = make_plan(big(fsdp=fsdp), PlanInputs(**vars(BARE) | {"num_devices": num_devices}))
        assert ("nodes are taken to have 8 devices" in " ".join(plan.notes)) == told
