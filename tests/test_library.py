from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import grpo_fast
from grpo_fast.assets import embedded_model_dir
from grpo_fast.device import device_facts, energy_source


def test_importing_the_library_costs_nothing(imported_by: Callable[[str], set[str]]) -> None:
    assert not {"torch", "transformers", "numpy", "pydantic"} & imported_by("import grpo_fast")


def test_the_law_needs_numpy_and_scipy_alone(tmp_path: Path) -> None:
    """In a folder that holds nothing else, an interpreter without site-packages forecasts from a list of rewards."""
    for name in ("numpy", "scipy", "grpo_fast"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        home = Path(next(iter(spec.submodule_search_locations or ())))
        (tmp_path / name).symlink_to(home)
        if (libraries := home.with_name(f"{name}.libs")).is_dir():
            (tmp_path / libraries.name).symlink_to(libraries)
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(tmp_path)!r})
for name in ("torch", "transformers", "pydantic", "matplotlib", "pip", "cyclopts", "rich"):
    assert importlib.util.find_spec(name) is None, name
from grpo_fast import OnlinePredictor
import grpo_fast.law
predictor = OnlinePredictor(100, reward_range=(0.0, 1.0))
for step in range(1, 41):
    reward = 0.8 - 0.6 * 0.9**step + 0.02 * (-1) ** step
    forecast = predictor.observe(step, step / 100, reward, num_prompts=8, num_generations=4)
assert grpo_fast.law.StoppingRule().update(forecast).reason
print(forecast.low, forecast.median, forecast.high)
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    low, median, high = map(float, done.stdout.split())
    assert low < 0.8 < high
    assert 0.7 < median < 0.9


def test_there_are_few_names() -> None:
    assert 8 <= len(grpo_fast.__all__) <= 18
    assert sorted(grpo_fast.__all__) == sorted(set(grpo_fast.__all__))
    assert set(dir(grpo_fast)) == set(grpo_fast.__all__)


@pytest.mark.parametrize("name", grpo_fast.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(grpo_fast, name)
    assert getattr(grpo_fast, name) is value
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__
        assert value.__module__.startswith("grpo_fast.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'grpo_fast' has no attribute 'Trainer'"):
        _ = grpo_fast.Trainer
    assert not hasattr(grpo_fast, "nothing")


def test_version_is_that_of_the_package() -> None:
    assert grpo_fast.__version__ == importlib.metadata.version("grpo-fast")


def test_the_meter_and_the_budget_serve_a_loop_of_ones_own() -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir())
    facts = device_facts("cpu")
    shape = grpo_fast.ModelShape.from_model(model)
    meter = grpo_fast.ComputeMeter(shape, power=energy_source(facts), price_per_gpu_hour=2.0, peak_flops=facts.peak_bf16_flops)
    budget = grpo_fast.Budget(tokens=1000)
    for step in (1, 2, 3):
        meter.add_rollout([20, 25], [[90, 120], [80, 75]])  # tokens of two prompts, and of two completions of each
        meter.add_train([110, 140, 105, 100], 365)
        meter.add_seconds({"rollout": 6.0, "train": 3.0})
        if reached := budget.check(meter.usage(step)):
            break
    assert reached is not None
    assert reached.reason == "max_tokens=1,000 is reached: 1,365 tokens are used."
    assert meter.metrics()["money"] == pytest.approx(3 * 9 / 3600 * 2)
