from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fast.config import Config
from grpo_fast.integrations.law_fit import fit_law
from grpo_fast.integrations.logs import LogError
from grpo_fast.law import Prior, RunFacts
from grpo_fast.law.beliefs import RISES
from grpo_fast.law.shapes import CLASSES

Write = Callable[..., Path]


def rewards_of(seed: int, *, size: int = 80, rise: float = 0.7, middle: float = 0.25) -> np.ndarray:
    """An S-shaped rise, early in the run."""
    x = np.arange(1, size + 1) / size
    rng = np.random.default_rng(seed)
    return np.clip(0.1 + rise / (1 + np.exp(-(x - middle) / 0.04)) + rng.normal(0, 0.015, size), 0, 1)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a log as CSV; relative to the test's directory."""

    def make(name: str, rewards: np.ndarray) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"{step},{reward:.5f}" for step, reward in enumerate(rewards.tolist(), 1)]
        path.write_text("\n".join(["step,reward", *rows]), encoding="utf-8")
        return path

    return make


@pytest.fixture
def own(tmp_path: Path) -> Write:
    """Writes the directory of a run of grpo_fast, as far as its rewards go."""

    def make(name: str, rewards: np.ndarray, *, stopped_by: str | None = "max_steps", **settings: Any) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        config = Config.parse({"max_steps": len(rewards), "reward_range": (0.0, 1.0), "prompts_per_step": 32} | settings)
        (path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        facts = {"size_b": 1.5, "start": 0.11, "start_error": 0.02}
        (path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        rows = [
            {"step": step, "progress": step / config.max_steps, "reward": reward, "reward_std": 0.3, "learning_rate": 1e-6}
            for step, reward in enumerate(rewards.tolist(), 1)
        ]
        (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        if stopped_by is not None:
            summary = {"stopped_by": stopped_by, "step": len(rewards)}
            (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return path

    return make


def test_runs_that_are_alike_teach_what_they_have_in_common(write: Write) -> None:
    logs = [write(f"{seed}.csv", rewards_of(seed)) for seed in range(5)]
    found = fit_law(logs)
    assert (found.num_used, found.num_sources) == (5, 5)
    for table, names in ((found.rises, RISES), (found.shapes, CLASSES)):
        assert list(table) == list(names)
        assert [sum(pair[place] for pair in table.values()) for place in (0, 1)] == pytest.approx([1.0, 1.0])
    assert found.shapes["S-shaped, early"][1] > found.shapes["S-shaped, early"][0] + 0.1
    assert found.rises["by more than 0.6"][1] > found.rises["by more than 0.6"][0]
    assert set(found.errors) == set(found.coverage) == {0.2, 0.4, 0.6, 0.8}
    assert found.errors[0.2][1] < found.errors[0.2][0], "after a fifth of a run, what the others did is worth knowing"
    assert "smaller" in found.verdict()
    assert all("S-shaped, early" in run.said for run in found.runs)
    assert found.base is Prior.default()


def test_the_prior_is_written_with_its_story(write: Write, tmp_path: Path) -> None:
    found = fit_law([write("a.csv", rewards_of(0))])
    assert found.errors == {}
    assert found.verdict().startswith("1 source: ")
    found.prior.save(tmp_path / "mine.json")
    again = Prior.load(tmp_path / "mine.json")
    assert again.about["fitted_on"] == json.loads(json.dumps(found.to_dict()))
    assert again.about["fitted_on"]["runs"][0]["used"] is True
    more = fit_law([write("b.csv", rewards_of(1))], base=again)
    assert more.shapes["S-shaped, early"][0] == pytest.approx(found.shapes["S-shaped, early"][1], abs=0.1)


def test_a_directory_counts_as_one(write: Write, tmp_path: Path) -> None:
    for seed in range(3):
        write(f"many/{seed}.csv", rewards_of(seed))
    alone = write("alone.csv", rewards_of(9, rise=0.3))
    found = fit_law([tmp_path / "many", alone])
    assert (found.num_used, found.num_sources) == (4, 2)
    assert [run.source for run in found.runs] == [str(tmp_path / "many")] * 3 + [str(alone)]


def test_what_runs_of_ones_own_tell_is_used(own: Write, tmp_path: Path) -> None:
    own("runs/a", rewards_of(0))
    own("runs/b", rewards_of(1)[:40], stopped_by="forecast", max_steps=80)
    found = fit_law([tmp_path / "runs"], facts=RunFacts(lora=True))
    assert found.num_sources == 1
    whole, stopped = (run.curve for run in found.runs)
    assert whole is not None
    assert stopped is not None
    assert whole.facts == RunFacts(size_b=1.5, start=0.11, start_error=0.02, lora=True)
    assert (whole.num_prompts, whole.num_generations, whole.reward_range, whole.horizon) == (32, 8, (0.0, 1.0), 80)
    assert stopped.progress[-1] == pytest.approx(0.5)
    assert "logged up to 50% of the budget" in found.runs[1].said


def test_what_is_no_finished_run_is_left_out_and_told(own: Write, write: Write) -> None:
    half = rewards_of(0)[:40]
    paths = [
        own("fine", rewards_of(0)),
        own("going_on", half, stopped_by=None, max_steps=80),
        own("interrupted", half, stopped_by="interrupt", max_steps=80),
        own("collapsed", rewards_of(0), stopped_by="collapse"),
        write("short.csv", rewards_of(0)[:12]),
    ]
    paths.append(paths[-1].with_name("notes.txt"))
    paths[-1].write_text("nothing in here\n", encoding="utf-8")
    found = fit_law(paths)
    assert [run.curve is not None for run in found.runs] == [True] + 5 * [False]
    reasons = [run.left_out for run in found.runs]
    assert reasons[1:5] == [
        "it is unfinished: 50% of its steps are logged",
        "it was interrupted",
        "it collapsed",
        "it has 12 rewards; at least 20 are needed",
    ]
    assert "notes.txt" in reasons[5]
    assert [words[2] for words in found.run_words()][3] == "left out: it collapsed"
    with pytest.raises(LogError, match=r"no run can be used:\n  .*short\.csv: it has 12 rewards"):
        fit_law([paths[4]])
    with pytest.raises(LogError, match="nowhere does not exist"):
        fit_law([Path("nowhere")])


def test_neither_torch_nor_transformers_is_needed(write: Write, imported_by: Callable[[str], set[str]]) -> None:
    log = write("a.csv", rewards_of(0))
    code = (
        "from grpo_fast.cli import main\n"
        f"try:\n    main(['law', 'fit', {str(log)!r}, '--output', {str(log.with_suffix('.json'))!r}])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
    )
    assert not {"torch", "transformers", "matplotlib"} & imported_by(code)
