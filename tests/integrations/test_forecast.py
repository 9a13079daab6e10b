from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fast import integrations
from grpo_fast.integrations import forecast
from grpo_fast.integrations.forecast import forecast_log, progress_of
from grpo_fast.integrations.logs import LogError, RewardLog, read_log
from grpo_fast.law import OnlinePredictor, Prior, RunFacts, Spending, StoppingRule
from grpo_fast.recipes import recipe
from grpo_fast.train import GRPOTrainer

COMMAND = str(Path(sys.executable).with_name("grpo-fast"))
Shell = Callable[..., tuple[int, str, str]]


def s_curve(num_steps: int = 75, *, rise: int = 15, scale: float = 1.0) -> np.ndarray:
    """Rises around the step ``rise`` and rests at 0.85."""
    steps = np.arange(1, num_steps + 1)
    clean = 0.1 + 0.75 / (1 + np.exp(-(steps - rise) * 30 / (7 * rise)))
    return scale * np.clip(clean + np.random.default_rng(0).normal(0, 0.02, num_steps), 0, 1)


def log_of(rewards: np.ndarray, **values: Any) -> RewardLog:
    settings: dict[str, Any] = {
        "steps": np.arange(1, len(rewards) + 1),
        "rewards": np.asarray(rewards, dtype=float),
        "reward_std": None,
        "learning_rate": None,
        "max_steps": None,
        "source": "CSV",
        "reward_column": "reward",
        "step_column": "step",
        "notes": [],
    }
    return RewardLog(**settings | values)


def test_numbers_are_those_of_the_law_online() -> None:
    rewards = s_curve()
    law, rule = OnlinePredictor(100, reward_range=(0.0, 1.0)), StoppingRule()
    decisions = []
    for step, reward in enumerate(rewards, 1):
        belief = law.observe(step, step / 100, reward, num_prompts=8, num_generations=4)
        decisions.append((rule.update(belief), belief))
    found = forecast_log(log_of(rewards), max_steps=100, num_prompts=8, num_generations=4)
    assert found.forecast == belief
    decision, then = next(item for item in decisions if item[0].stop)
    assert (found.stop_step, found.stop_reason, found.stop_forecast) == (then.step, decision.reason, then)
    assert 20 < then.step < 75
    assert belief.low < 0.85 < belief.high


def test_what_is_assumed_is_told() -> None:
    found = forecast_log(log_of(s_curve(20)))
    assert found.horizon == 20
    assert found.reward_range == (0.0, 1.0)
    assert [note.split(";")[0].split(",")[0] for note in found.notes] == [
        "the log does not contain the number of planned steps",
        "all rewards are between 0 and 1",
    ]
    told = forecast_log(log_of(s_curve(20), max_steps=30), reward_range=(-1, 1), epsilon=0.02)
    assert (told.horizon, told.reward_range, told.epsilon, told.notes) == (30, (-1, 1), 0.02, [])


def test_rewards_in_percent() -> None:
    whole = forecast_log(log_of(s_curve(50), max_steps=75), epsilon=0.01, reward_range=None)
    percent = forecast_log(log_of(s_curve(50, scale=100.0), max_steps=75))
    assert percent.reward_range is None
    assert percent.epsilon == pytest.approx(0.8, abs=0.2)
    assert "epsilon is" in percent.notes[0]
    assert percent.forecast.median == pytest.approx(100 * whole.forecast.median, abs=3)


def test_an_epsilon_that_most_of_a_curve_hides_in_is_told() -> None:
    tiny = forecast_log(log_of(s_curve(40, scale=0.02), max_steps=60))
    assert tiny.epsilon == 0.01
    assert "the rewards span 0.015, and a gain below 0.01 counts as none; choose another limit with --epsilon" in tiny.notes
    assert not any("--epsilon" in note for note in forecast_log(log_of(s_curve(40, scale=0.02)), epsilon=0.001).notes)


@pytest.mark.parametrize("spike", [-60.0, 40.0])
def test_a_spike_is_told_and_no_measure_of_a_gain(spike: float) -> None:
    rewards = 2 * s_curve(60)
    rewards[40] = spike
    found = forecast_log(log_of(rewards, max_steps=80))
    assert found.epsilon == 0.01, "the others span less than 3"
    told = f"1 reward is far from all others: {spike:g}. Such outliers make intervals wider; remove errors from the log"
    assert found.notes[0] == told
    sparse, steep = (forecast_log(log_of(curve, max_steps=80)) for curve in (np.eye(60)[50], s_curve(60, rise=1)))
    assert not any("alone" in note for note in (*sparse.notes, *steep.notes)), "a success after many failures is none"


def test_a_share_in_percent_has_its_range() -> None:
    found = forecast_log(log_of(s_curve(40, scale=100.0), max_steps=50, reward_column="train/accuracy"))
    assert found.reward_range == (0.0, 100.0)
    assert "'train/accuracy' is between 0 and 100, as percentages are" in found.notes[1]


def test_the_history_of_beliefs() -> None:
    found = forecast_log(log_of(s_curve(30), max_steps=60))
    rows = found.rows()
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["median"] == found.forecast.median
    assert sum(rows[-1]["phase_probabilities"]) == pytest.approx(1)
    assert {row["veto"] for row in rows} <= {"", "min_steps", "not identifiable", "inflection ahead", "rising slope"}
    assert (found.prior_row()["step"], found.prior_row()["veto"]) == (0, "")
    assert found.prior.high - found.prior.low > 2 * (found.forecast.high - found.forecast.low)


def test_steps_by_the_billion_take_no_memory() -> None:
    steps = np.arange(1, 41) * 10**9
    found = forecast_log(log_of(s_curve(40), steps=steps, learning_rate=np.full(40, 1e-6)), max_steps=100 * 10**9)
    assert found.forecast.step == 40 * 10**9
    assert found.forecast.median == pytest.approx(forecast_log(log_of(s_curve(40)), max_steps=100).forecast.median, abs=0.01)


def test_a_constant_reward_and_hardly_any() -> None:
    constant = forecast_log(log_of(np.full(60, 0.5), max_steps=80))
    assert constant.reward_range is None
    assert constant.forecast.median == pytest.approx(0.5, abs=0.05)
    few = forecast_log(log_of(np.array([0.1, 0.2]), max_steps=80))
    assert not few.forecast.identifiable
    assert few.to_words()["identifiable"].startswith("no: only 2 rewards so far")
    assert few.stop_step is None
    assert "unknown" in few.to_words()["80 % of the rise"]


def test_a_long_log_is_told_something_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = s_curve(50)
    whole = forecast_log(log_of(rewards, max_steps=75))
    monkeypatch.setattr(forecast, "_MAX_FORECASTS", 20)
    thinned = forecast_log(log_of(rewards, max_steps=75))
    assert [row["step"] for row in thinned.rows()] == list(range(2, 51, 3)), "the last reward always"
    assert thinned.forecast == whole.forecast
    assert list(thinned.history) == list(whole.history)[1::3]
    assert thinned.stop_step is not None
    assert whole.stop_step is not None
    assert 0 <= thinned.stop_step - whole.stop_step < 6
    assert "50 rewards: a forecast is made after every 3 of them" in thinned.notes
    for each in (
        forecast_log(log_of(rewards, max_steps=75, source="grpo_fast run")),
        forecast_log(log_of(rewards), patience=4),
    ):
        assert len(each.history) == 50, "its own run's forecasts, and those that a patience counts, are all there"


@pytest.mark.slow
def test_missing_rewards_and_long_logs() -> None:
    rewards = s_curve(2500)
    rewards[:40:4] = np.nan
    rewards[100:102] = np.nan
    found = forecast_log(log_of(rewards, steps=np.arange(1, 2501), max_steps=3000))
    assert "2500 rows: the forecast is made from means of 2 neighbouring rows" in found.notes
    assert found.forecast.num_observations == 1249, "a pair without any number is skipped"
    assert found.forecast.step == 2500
    assert found.forecast.low < 0.85 < found.forecast.high


def test_our_own_spread_is_used_and_others_are_not() -> None:
    values: dict[str, Any] = {"reward_std": np.full(30, 0.02), "max_steps": 50}
    plain, ours = (forecast_log(log_of(s_curve(30), source=name, **values)) for name in ("CSV", "grpo_fast run"))
    without = forecast_log(log_of(s_curve(30), max_steps=50))
    assert plain.forecast == without.forecast
    assert ours.forecast != without.forecast


def a_prior(path: Path) -> Prior:
    prior = replace(Prior.default(), drift_median=0.1, about={"curves": 3})
    prior.save(path)
    return prior


def test_a_run_of_our_own_gets_its_own_numbers(tmp_path: Path) -> None:
    facts = RunFacts(size_b=0.5, start=0.1, start_error=0.02)
    prior = a_prior(tmp_path / "mine.json")
    law = OnlinePredictor(60, epsilon=0.02, reward_range=(0.0, 1.0), facts=facts, prior=prior)
    rule = StoppingRule(0.02, confidence=0.7, patience=3, min_steps=20, warmup_steps=6)
    rows, beliefs, decisions = [], [], []
    for step, reward in enumerate(s_curve(50, rise=8).tolist(), 1):
        progress = 1 - (1 - step / 60) ** 2
        row = {"step": step, "progress": progress, "learning_rate": 1e-6, "reward": reward, "reward_std": 0.2}
        cost = {"num_tokens": 1000.0 * step, "gpu_seconds": 1800.0 * step, "money": 0.25 * step}
        still = max(0, step - 20)
        rows.append(row | cost | {"frac_reward_all_wrong": 0.9 if step < 40 else 0.0, "steps_without_variance": still})
        spent = Spending(1000.0 * step, 0.5 * step, 0.25 * step)
        beliefs.append(law.observe(step, progress, reward, num_prompts=8, num_generations=4, reward_std=0.2, spent=spent))
        decisions.append(rule.update(beliefs[-1], all_wrong=rows[-1]["frac_reward_all_wrong"], still=still))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = "max_steps = 60\nprompts_per_step = 8\nnum_generations = 4\nreward_range = [0.0, 1.0]\nwarmup_steps = 0.1\n"
    law_settings = "forecast_epsilon = 0.02\nforecast_confidence = 0.7\nforecast_patience = 3\nforecast_min_steps = 20\n"
    origin = f'forecast_prior = "{(tmp_path / "mine.json").as_posix()}"\n'
    (tmp_path / "config.toml").write_text(config + law_settings + origin, encoding="utf-8")
    (tmp_path / "facts.json").write_text(json.dumps(asdict(facts)), encoding="utf-8")
    found = forecast_log(read_log(tmp_path))
    assert list(found.history) == beliefs
    assert list(found.vetoes) == [decision.veto for decision in decisions]
    assert "all wrong" in found.vetoes, "what kept the run from stopping is seen"
    assert found.stop_step == next(step for step, decision in enumerate(decisions, 1) if decision.stop)
    assert found.notes == []
    assert found.prior_origin == f"{(tmp_path / 'mine.json').as_posix()}; curves 3"
    assert forecast_log(read_log(tmp_path), num_prompts=1).forecast != beliefs[-1], "what is given wins"
    assert forecast_log(read_log(tmp_path), max_steps=70).horizon == 70
    shipped = forecast_log(read_log(tmp_path), prior=Prior.default(), facts=RunFacts(lora=True))
    assert shipped.prior_origin is None
    assert shipped.facts == replace(facts, lora=True), "what is not told is taken from the run"
    told = forecast_log(read_log(tmp_path), facts=RunFacts(start=0.2)).facts
    assert (told.start, told.start_error) == (0.2, None), "a told start has its own error"
    (tmp_path / "mine.json").unlink()
    with pytest.raises(LogError, match=r"the prior of this run cannot be read .*mine\.json"):
        forecast_log(read_log(tmp_path))
    (tmp_path / "facts.json").write_text('{"size": 3}', encoding="utf-8")
    with pytest.raises(LogError, match=r"facts.json of this run cannot be used .*'size'"):
        forecast_log(read_log(tmp_path))


@pytest.mark.slow
def test_a_real_run_gets_the_forecasts_that_it_wrote(tmp_path: Path) -> None:
    a_prior(tmp_path / "mine.json")
    run = tmp_path / "run"
    settings: dict[str, Any] = {"max_steps": 12, "prompts_per_step": 4, "num_generations": 2, "max_completion_length": 4}
    settings |= {"warmup_steps": 0.2, "baseline_probe": 8, "eval_steps": 0, "report": False, "price_per_gpu_hour": 2.0}
    settings |= {"forecast": "warn", "forecast_min_steps": 5, "forecast_prior": tmp_path / "mine.json"}
    with GRPOTrainer(recipe("embedded", output_dir=run, **settings)) as trainer:
        trainer.train()
    written = [json.loads(line) for line in (run / "forecasts.jsonl").read_text(encoding="utf-8").splitlines()]
    found = forecast_log(read_log(run))
    assert found.facts.start is not None
    assert found.facts.size_b == 672_896 / 1e9
    rows = json.loads(json.dumps(found.rows()))
    assert len(rows) == len(written) == 12
    for row, own in zip(rows, written, strict=True):
        assert {name: value for name, value in row.items() if name != "phase_probabilities"} == {
            name: value for name, value in own.items() if name not in {"stop", "stop_count", "phase_probabilities"}
        }
    assert rows[-1]["spent"]["money"] == pytest.approx(2 * rows[-1]["spent"]["device_hours"])


def test_a_value_of_reward_stops_a_run_that_costs_too_much() -> None:
    rewards = s_curve(60, rise=30)
    log = log_of(rewards, max_steps=100, source="grpo_fast run", money=5.0 * np.arange(1, 61))
    settings: dict[str, Any] = {"reward_range": (0.0, 1.0), "confidence": 0.999, "patience": 3}
    dear, cheap = (forecast_log(log, reward_value=value, **settings) for value in (0.01, 1e9))
    assert dear.stop_step is not None
    assert "no further training is worth its cost" in dear.stop_reason
    assert cheap.stop_step is None or cheap.stop_step > dear.stop_step


def test_a_trainer_state_tells_its_rise_in_tokens(tmp_path: Path) -> None:
    history = [{"reward": reward, "num_tokens": 5000.0 * step, "step": step} for step, reward in enumerate(s_curve(60), 1)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"max_steps": 80, "log_history": history}), encoding="utf-8")
    found = forecast_log(read_log(tmp_path))
    now = found.forecast
    assert now.x80 is not None
    assert 15 < now.x80 < 25, "at step 20 it has come to 0.71 of 0.85"
    assert now.x80_spending == Spending(tokens=pytest.approx(5000 * now.x80))
    assert now.end_spending == Spending(tokens=pytest.approx(5000 * 80))
    assert f"step {now.x80} (90 % interval" in found.to_words()["80 % of the rise"]
    assert found.to_words()["80 % of the rise"].endswith(f"for {5000 * now.x80} tokens")


def test_the_rules_own_defaults_hold() -> None:
    found, rule = forecast_log(log_of(s_curve(40), max_steps=60)), StoppingRule()
    assert found.confidence == rule.confidence
    assert found.rule == {name: getattr(rule, name) for name in ("patience", "min_steps", "warmup_steps", "reward_value")}


def test_a_start_outside_the_rewards_seen_widens_the_range() -> None:
    assert forecast_log(log_of(s_curve(40), max_steps=60), facts=RunFacts(start=-0.5)).reward_range is None
    inside = forecast_log(log_of(s_curve(40), max_steps=60), facts=RunFacts(start=0.05, start_error=0.001))
    assert inside.reward_range == (0.0, 1.0)
    assert inside.prior.band.median[0] == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(
    ("name", "share", "told"),
    [
        ("constant", np.ones_like, 0),
        ("linear", lambda done: 1 - done, 1),
        ("cosine", lambda done: 0.5 * (1 + np.cos(np.pi * done)), 1),
    ],
)
@pytest.mark.parametrize("seen", [60, 100])
def test_progress_is_summed_learning_rate(name: str, share: Any, told: int, seen: int) -> None:
    warm = np.minimum(np.arange(1, 101) / 5, 1.0)
    rate = 1e-6 * np.where(warm < 1, warm, share(np.clip((np.arange(100) - 4) / 96, 0, 1)))
    notes: list[str] = []
    progress = progress_of(log_of(np.zeros(seen), learning_rate=rate[:seen]), 100, notes)
    truth = (rate.cumsum() / rate.sum())[:seen]
    assert np.abs(progress - truth).max() < 0.01
    assert len(notes) == (told if seen < 100 else 0)
    assert all(name in note for note in notes)


def test_progress_in_steps_where_the_schedule_is_unknown() -> None:
    steps = np.arange(1, 41)
    notes: list[str] = []
    assert progress_of(log_of(np.zeros(40)), 80, notes).tolist() == (steps / 80).tolist()
    assert notes == []
    for rate in (1e-6 * steps, 1e-6 * (1 + (steps < 20))):
        notes = []
        assert progress_of(log_of(np.zeros(40), learning_rate=rate), 80, notes).tolist() == (steps / 80).tolist()
        assert notes == ["the learning rate follows no known schedule; progress is counted in steps"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 20}, "max_steps=20 is below the log's last step, 30"),
        ({"reward_range": (0.2, 0.5)}, "outside reward_range"),
        ({"reward_range": (1.0, 0.0)}, "must be the lowest possible reward, then the highest"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"confidence": 0.2}, "confidence=0.2"),
        ({"patience": 0}, "patience=0"),
        ({"reward_value": -1.0}, "reward_value=-1.0"),
        ({"reward_range": (0.0, 1.0), "facts": RunFacts(start=1.5)}, "reward=1.5 at the start is outside"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises((LogError, ValueError), match=message):
        forecast_log(log_of(s_curve(30)), **options)


def test_names_of_the_package() -> None:
    assert set(integrations.__all__) <= set(dir(integrations))
    assert integrations.forecast_log is forecast_log
    with pytest.raises(AttributeError, match="nonsense"):
        _ = integrations.nonsense


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / "curve.csv"
    rows = [f"{step},{reward:.4f}" for step, reward in enumerate(s_curve(), 1)]
    path.write_text("\n".join(["step,reward", *rows]), encoding="utf-8")
    return path


def test_the_installed_command_prints_a_table(curve: Path) -> None:
    done = subprocess.run(
        [COMMAND, "forecast", str(curve), "--max-steps", "100"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    found = forecast_log(read_log(curve), max_steps=100)
    printed = " ".join(done.stdout.split())
    for name, words in found.to_words().items():
        assert " ".join(f"{name} {words}".split()[:4]) in printed
    assert f"would have stopped at step {found.stop_step}," in printed
    assert printed.count("note:") == len(found.notes) == 1


def test_the_command_prints_json_and_draws(curve: Path, shell: Shell, tmp_path: Path) -> None:
    code, out, err = shell(f"forecast {curve} --max-steps 100 --json --plot forecast.png --num-prompts 8 --epsilon 0.02")
    assert (code, err) == (0, "")
    found = json.loads(out)
    expected = forecast_log(read_log(curve), max_steps=100, num_prompts=8, epsilon=0.02).to_dict()
    assert found == json.loads(json.dumps(expected))
    assert found["stop"]["would_stop"]
    assert found["stop"]["saved"] == pytest.approx(1 - found["stop"]["step"] / 100)
    assert len(found["forecast"]["band"]["step"]) == 25
    assert (tmp_path / "forecast.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "none.csv does not exist"),
        (["{curve}", "--reward-column", "rewards"], "no column 'rewards'; did you mean 'reward'?"),
        (["{curve}", "--max-steps", "10"], "max_steps=10 is below the log's last step, 75"),
        (["{curve}", "--max-steps", "0"], "Must be >= 1"),
        (["{curve}", "--num-prompts", "0"], "Must be >= 1"),
        (["{curve}", "--plot", "picture.jpg"], "picture.jpg: it must end in .png"),
        ([], "requires an argument"),
    ],
)
def test_a_mistake_is_one_message(curve: Path, shell: Shell, arguments: list[str], message: str) -> None:
    code, _, err = shell("forecast", *(argument.format(curve=curve) for argument in arguments))
    assert code == 1
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_json_has_no_nan(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,reward\n1,0.5\n2,nan\n", encoding="utf-8")
    code, out, err = shell("forecast log.csv --json")
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["last_reward"] == 0.5
    assert math.isfinite(found["forecast"]["median"])


def test_a_run_resumed_with_a_longer_budget_has_its_progress_counted_anew() -> None:
    steps = np.arange(1, 26)
    logged = np.concatenate([steps[:20] / 20, steps[20:] / 25])
    notes: list[str] = []
    found = progress_of(log_of(np.zeros(25), progress=logged, learning_rate=np.full(25, 1e-4), max_steps=25), 25, notes)
    assert found == pytest.approx(steps / 25)
    assert "longer budget" in notes[0]


@pytest.mark.slow
def test_real_curves_get_a_forecast(shared_data: Path) -> None:
    files = sorted(file for file in (shared_data / "reward_curves").glob("*.csv") if file.name != "index.csv")
    for file in files[:: len(files) // 20]:
        found = forecast_log(read_log(file, reward_column="reward"))
        finite = found.log.rewards[np.isfinite(found.log.rewards)]
        assert found.forecast.low <= found.forecast.median <= found.forecast.high, file
        assert finite.min() - 1 <= found.forecast.median <= finite.max() + 1, file
        json.dumps(found.to_dict(), allow_nan=False)
