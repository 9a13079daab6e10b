from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grpo_fast.integrations.logs import LogError, read_log


def csv(path: Path, *rows: tuple[object, ...], header: str = "step,reward") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


def rising(steps: range, start: float = 0.0) -> list[tuple[object, ...]]:
    return [(step, start + step / 100) for step in steps]


def test_a_clean_log(tmp_path: Path) -> None:
    rows = [(step, step / 100, 0.3, 1e-6 * step, 0.9) for step in range(1, 21)]
    log = read_log(csv(tmp_path / "log.csv", *rows, header="step,reward,reward_std,learning_rate,eval_reward"))
    assert log.steps.tolist() == list(range(1, 21))
    assert log.rewards.tolist() == [step / 100 for step in range(1, 21)]
    assert log.reward_std is not None
    assert log.reward_std.tolist() == [0.3] * 20
    assert log.learning_rate is not None
    assert log.learning_rate[-1] == pytest.approx(2e-5)
    assert (log.source, log.reward_column, log.step_column, log.max_steps) == ("CSV", "reward", "step", None)
    assert log.last_reward == 0.2
    assert log.notes == []


def test_evaluation_rows_of_a_trainer_state_are_passed_over(tmp_path: Path) -> None:
    history = [{"reward": step / 20, "learning_rate": 1e-6, "step": step} for step in range(1, 13)]
    history.insert(3, {"eval_reward": 0.9, "step": 3})
    history.append({"train_loss": 0.1, "step": 12})
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"max_steps": 40, "log_history": history}), encoding="utf-8")
    log = read_log(path)
    assert log.steps.tolist() == list(range(1, 13))
    assert (log.max_steps, log.notes) == (40, [])


def test_nan_and_gaps_are_told(tmp_path: Path) -> None:
    rows = rising(range(1, 31))
    rows[4], rows[5] = (5, "nan"), (6, "inf")
    del rows[10:13]
    log = read_log(csv(tmp_path / "log.csv", *rows))
    assert np.isnan(log.rewards[[4, 5]]).all()
    assert log.notes == [
        "1 reward is infinite and counts as missing",
        "2 of 27 rewards are NaN and count as missing",
        "3 steps are missing between step 1 and step 30",
    ]
    every_tenth = read_log(csv(tmp_path / "tenth.csv", *rising(range(10, 200, 10))))
    assert every_tenth.notes == [], "logging every tenth step leaves no gap"


def test_repeated_steps_the_later_wins(tmp_path: Path) -> None:
    log = read_log(csv(tmp_path / "log.csv", *rising(range(1, 13)), (12, 0.7), (13, 0.8)))
    assert log.rewards[-2:].tolist() == [0.7, 0.8]
    assert log.notes == ["1 step was written again; the later row was used"]


def test_a_resumed_run(tmp_path: Path) -> None:
    log = read_log(csv(tmp_path / "log.csv", *rising(range(1, 31)), *rising(range(21, 26), start=0.5)))
    assert log.steps.tolist() == list(range(1, 26)), "what came after the checkpoint is forgotten"
    assert log.rewards[19:21].tolist() == [0.2, 0.71]
    assert log.notes == ["the run was resumed once, at step 21; of repeated steps the later row was used"]


def test_two_runs_in_a_file(tmp_path: Path) -> None:
    log = read_log(csv(tmp_path / "log.csv", *rising(range(1, 31)), *rising(range(1, 16), start=0.5)))
    assert log.steps.tolist() == list(range(1, 16))
    assert log.rewards[0] == 0.51
    assert log.notes == ["the file contains 2 runs one after the other; the last one is used"]


def test_rows_out_of_order(tmp_path: Path) -> None:
    log = read_log(csv(tmp_path / "log.csv", *reversed(rising(range(1, 21)))))
    assert log.steps.tolist() == list(range(1, 21))
    assert log.notes == ["the rows were not in the order of their steps and were sorted"]


def test_steps_that_are_none(tmp_path: Path) -> None:
    log = read_log(csv(tmp_path / "log.csv", (-1, 0.5), (0.5, 0.5), ("", 0.5), *rising(range(20))))
    assert log.steps.tolist() == list(range(1, 21))
    assert log.rewards[1] == 0.01
    assert log.notes == [
        "1 reward has no step and was left out",
        "2 rows have a step that is negative or not a whole number and were left out",
        "steps count from 0 in this log; 1 is added to each",
    ]
    counted = read_log(csv(tmp_path / "bare.csv", *((step / 50,) for step in range(1, 21)), header="reward"))
    assert (counted.steps[-1], counted.step_column) == (20, None)
    assert counted.notes == ["the log has no column of steps; its rows are counted, from 1"]


def test_few_constant_and_wide(tmp_path: Path) -> None:
    few = read_log(csv(tmp_path / "few.csv", (1, 0.5), (2, 0.5)))
    assert few.notes == ["only 2 rewards: too few to say much", "the reward is 0.5 throughout"]
    wide = read_log(csv(tmp_path / "wide.csv", *((step, 4 * step) for step in range(1, 21))))
    assert wide.notes == ["rewards run from 4 to 80: no range is assumed"]
    one = read_log(csv(tmp_path / "one.csv", (1, 0.5)))
    assert one.notes == ["only 1 reward: too few to say much"]


def test_a_reward_beyond_all_reason(tmp_path: Path) -> None:
    rows = rising(range(1, 61))
    rows[40] = (41, -1e9)
    log = read_log(csv(tmp_path / "log.csv", *rows))
    assert np.isnan(log.rewards[40])
    assert log.notes[0] == "1 reward is a hundred times beyond all others and counts as missing: -1e+09"
    sparse = read_log(csv(tmp_path / "sparse.csv", *((step, float(step == 50)) for step in range(1, 61))))
    assert sparse.rewards[49] == 1, "the first success after many failures is no mistake"


def test_what_steps_cost(tmp_path: Path) -> None:
    rows = [(step, step / 100, 1000 * step, 60.0 + 2 * step, 5.0, step / 20) for step in range(1, 21)]
    header = "step,reward,tokens,wall_s,money,frac_reward_all_wrong"
    log = read_log(csv(tmp_path / "log.csv", *rows, header=header))
    assert log.tokens is not None
    assert log.tokens.tolist() == [1000 * step for step in range(1, 21)]
    assert log.device_seconds is not None
    assert log.device_seconds[-1] == 100
    assert (log.money, log.all_wrong) == (None, None), "what they mean is known in runs of grpo_fast alone"
    assert log.notes == ["hours are wall-clock hours, from 'wall_s': they are device hours if the run used one device"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokens", [4096.0] * 20),
        ("tokens", [4000.0 + 10 * step for step in range(20)]),
        ("tokens", [100.0 * step for step in range(1, 10)]),
        ("num_tokens", [100.0, 200.0, 150.0, 300.0]),
        ("gpu_seconds", [-1.0, 200.0, 250.0, 300.0]),
    ],
    ids=["the same a step", "growing a step", "too few to tell", "falling", "negative"],
)
def test_columns_that_are_no_sums(tmp_path: Path, name: str, values: list[float]) -> None:
    rows = [(step, step / 100, value) for step, value in enumerate(values, 1)]
    log = read_log(csv(tmp_path / "log.csv", *rows, header=f"step,reward,{name}"))
    assert (log.tokens, log.device_seconds) == (None, None)
    assert f"{name!r} is not a running total since the first step; it is not used for costs" in log.notes


def test_what_steps_of_our_own_cost(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("max_steps = 9\n", encoding="utf-8")
    rows = [
        {"step": step, "reward": 0.5, "gpu_seconds": 7.0 * step, "money": step / 4, "frac_reward_all_wrong": 0.25}
        for step in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    log = read_log(tmp_path)
    found = [None if values is None else values.tolist() for values in (log.device_seconds, log.money, log.all_wrong)]
    assert found == [[7.0, 14.0, 21.0], [0.25, 0.5, 0.75], [0.25] * 3]
    assert not any("hours" in note for note in log.notes)


def test_runs_side_by_side(tmp_path: Path) -> None:
    rows = [(name, step, level) for step in range(1, 13) for name, level in (("a", 0.01 * step), ("b", 0.02 * step))]
    path = csv(tmp_path / "log.csv", *rows, header="run,step,reward")
    log = read_log(path)
    assert log.rewards[-1] == 0.24
    assert log.notes == ["the file contains 2 runs (a, b); b, the last one, is used. Choose with --run"]
    chosen = read_log(path, run="a")
    assert (chosen.rewards[-1], chosen.notes) == (0.12, [])
    with pytest.raises(LogError, match="the log has no run 'c'; it contains a, b"):
        read_log(path, run="c")
    with pytest.raises(LogError, match="no column separates runs"):
        read_log(csv(tmp_path / "one.csv", *rising(range(1, 5))), run="a")


def test_evaluations_in_rows_of_their_own(tmp_path: Path) -> None:
    rows: list[tuple[object, ...]] = []
    for step in range(1, 21):
        rows.append((step, "train", step / 100))
        if step % 5 == 0:
            rows.append((step, "validation", 0.9))
    log = read_log(csv(tmp_path / "log.csv", *rows, header="step,split,reward"))
    assert log.rewards.tolist() == [step / 100 for step in range(1, 21)]
    assert log.notes == ["4 rows of an evaluation were left out"]
    alone = read_log(
        csv(tmp_path / "eval.csv", *((step, "test", step / 50) for step in range(1, 21)), header="step,split,reward")
    )
    assert (alone.steps.size, alone.notes) == (20, []), "evaluations are all there is"


def test_exports_leave_blanks_for_evaluations(tmp_path: Path) -> None:
    rows: list[dict[str, float | None]] = []
    for step in range(1, 21):
        rows.append({"train/global_step": step, "train/reward": step / 100, "eval/reward": None})
        if step % 5 == 0:
            rows.append({"train/global_step": step, "train/reward": None, "eval/reward": 0.9})
    (tmp_path / "history.json").write_text(json.dumps(rows), encoding="utf-8")
    log = read_log(tmp_path / "history.json")
    assert log.rewards.tolist() == [step / 100 for step in range(1, 21)]
    assert log.notes == []


def test_steps_of_other_rows_place_no_reward(tmp_path: Path) -> None:
    rows = [line for step in range(1, 13) for line in ({"reward": step / 20}, {"step": step, "train/loss": 0.1})]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    log = read_log(tmp_path / "log.jsonl")
    assert (log.step_column, log.steps.size, log.last_reward) == (None, 12, 0.6)


@pytest.mark.parametrize(("memory", "few", "many"), [(0.0, 0, 1), (0.9, 8, 10)])
def test_a_smoothed_log_is_told(tmp_path: Path, memory: float, few: int, many: int) -> None:
    told = "the rewards look smoothed; raw rewards tell more of the end"
    steps = np.arange(1, 121)
    count = 0
    for seed in range(10):
        rewards = 0.7 - 0.5 * np.exp(-steps / 30) + np.random.default_rng(seed).normal(0, 0.05, steps.size)
        levels = itertools.accumulate(rewards, lambda level, reward: memory * level + (1 - memory) * reward)
        count += told in read_log(csv(tmp_path / "log.csv", *zip(steps, levels, strict=True))).notes
    assert few <= count <= many


def test_a_log_that_begins_late(tmp_path: Path) -> None:
    log = read_log(csv(tmp_path / "log.csv", *rising(range(5001, 5101))))
    assert "the log begins at step 5001; earlier steps are unknown" in log.notes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "log"])
def test_a_million_lines(tmp_path: Path, kind: str) -> None:
    pairs = [(step, f"{0.5 + 0.4 * math.sin(step / 1e5):.5f}") for step in range(1, 1_000_001)]
    line = {
        "csv": "{0},{1},0.1,0.2,300.5,0.01",
        "jsonl": '{{"step": {0}, "reward": {1}, "kl": 0.1, "entropy": 0.2, "loss": 0.01}}',
        "log": "(TaskRunner pid=1) step:{0} - actor/kl:0.1 - critic/rewards/mean:{1} - timing_s/step:3.2",
    }[kind]
    path = tmp_path / f"log.{kind}"
    head = "step,reward,kl,entropy,length,loss\n" if kind == "csv" else ""
    path.write_text(head + "\n".join(line.format(*pair) for pair in pairs) + "\n", encoding="utf-8")
    begun = time.process_time()
    log = read_log(path)
    took = time.process_time() - begun
    assert log.steps.size == 1_000_000
    assert log.rewards[-1] == float(pairs[-1][1])
    assert took < 60, "seconds of one core; about 4, 6 and 8 on a quiet one"


def test_other_columns_are_told(tmp_path: Path) -> None:
    rows = [(step, step / 100, 0.9, 0) for step in range(1, 13)]
    path = csv(tmp_path / "log.csv", *rows, header="step,reward,accuracy,lr")
    log = read_log(path)
    assert log.notes == ["other columns that could be meant: accuracy"]
    assert log.learning_rate is None, "a rate that was rounded to zero says nothing"
    assert read_log(path, reward_column="accuracy").rewards.tolist() == [0.9] * 12


def test_a_budget_that_the_log_outran(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    rows = [{"reward": step / 40, "step": step} for step in range(1, 21)]
    path.write_text(json.dumps({"max_steps": 10, "log_history": rows}), encoding="utf-8")
    log = read_log(path)
    assert log.max_steps is None
    assert log.notes == ["the log continues to step 20, past its 10 planned steps"]


def test_our_run_knows_its_column(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval_reward": 0.1}, *({"step": step, "reward": 0.1, "rewards/a/mean": 0.2} for step in range(1, 12))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "config.toml").write_text("max_steps = 30", encoding="utf-8")
    log = read_log(tmp_path)
    assert (log.source, log.reward_column, log.max_steps, log.steps[0]) == ("grpo_fast run", "reward", 30, 1)
    assert read_log(tmp_path, reward_column="rewards/a/mean").rewards[0] == 0.2


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("step,loss", (1, 0.5), r"log.csv \(CSV\): no column is known to be a reward"),
        ("step,reward,train/reward", (1, 0.5, 0.5), "more than one column may be the reward"),
        ("step,reward", (1, "nan"), "column 'reward' has no number at a known step"),
        ("step,reward", (0.5, 1), "column 'reward' has no number at a known step"),
    ],
)
def test_nothing_to_forecast_from(tmp_path: Path, header: str, row: tuple[object, ...], message: str) -> None:
    with pytest.raises(LogError, match=message):
        read_log(csv(tmp_path / "log.csv", row, header=header))


def test_reading_needs_neither_torch_nor_transformers(imported_by: Callable[[str], set[str]]) -> None:
    code = "import grpo_fast.integrations.logs, grpo_fast.integrations as found; found.read_log, found.forecast_log"
    assert not {"torch", "transformers", "matplotlib", "tensorboard", "pydantic"} & imported_by(code)


def test_real_curves_are_read(shared_data: Path) -> None:
    files = sorted((shared_data / "reward_curves").glob("*.csv"))
    files = [file for file in files if file.name != "index.csv"][:40]
    for file in files:
        log = read_log(file, reward_column="reward")
        assert np.all(np.diff(log.steps) > 0), file
        assert np.isfinite(log.rewards).any(), file


CURVE = [round(0.2 + 0.5 * (1 - math.exp(-step / 20)), 4) for step in range(1, 61)]


LINES = {
    "metrics.jsonl": '{{"step": {0}, "progress": 0.5, "reward": {1}}}',
    "verl console": (
        "\x1b[36m(TaskRunner pid=7)\x1b[0m step:{0} - actor/lr:1e-06 - critic/rewards/mean:{1} - critic/rewards/max:1.0\n"
        "\x1b[36m(TaskRunner pid=7)\x1b[0m Training Progress:  9%|#| {0}/90 [00:45<1:00, 31.2s/it]"
    ),
    "verl JSON lines": (
        '{{"step": {0}, "data": {{"actor/lr": 1e-6, "critic/rewards/mean": {1}, "val-core/openai/gsm8k/reward/mean@1": 0.3}}}}'
    ),
    "OpenRLHF console": "2025-05-01 10:00:00,12 INFO trainer.py:120 ✨ Global step {0}: {{'act_loss': -0.01, 'reward': {1}}}",
    "OpenRLHF bars": "Episode [1/1]:  9%|█▏ | {0}/90 [01:23<10:11,  6.95s/it, act_loss=-.0123, reward={1}, actor_lr=5e-7]",
    "wandb-history.jsonl": '{{"train/loss": 0.1, "train/reward": {1}, "train/global_step": {0}, "_step": 3}}',
    "W&B export": '"{0}","{1}","{1}","{1}"',
    "TensorBoard export": "1.7e9,{0},{1}",
    "TRL console": "{{'loss': '0.01', 'reward': '{1}', 'reward_std': '0.3', 'epoch': '0.{0:02d}'}}",
    "TRL console and bar": (
        "  9%|#     | {0}/90 [01:10<9:11,  8.3s/it]\r          \r{{'loss': '0.01', 'reward': '{1}', 'epoch': '0.1'}}"
    ),
    "ms-swift": '{{"loss": 0.0, "reward": {1}, "epoch": 0.1, "global_step/max_steps": "{0}/90", "percentage": "9%"}}',
    "slime": (
        "(RolloutManager pid=1) [2026-08-01 10:00:00] rollout.py:321 - rollout {0}: {{'rollout/raw_reward': {1}}}\n"
        "(TrainActor pid=3) [2026-08-01 10:00:09] model.py:500 - step {0}: {{'train/loss': 0.01, 'train/step': {0}}}"
    ),
}
HEADS = {
    "verl console": "(TaskRunner pid=7) {'actor': {'clip_ratio': 0.2}}\n(TaskRunner pid=7) Total training steps: 90\n",
    "W&B export": '"train/global_step","cat-7 - train/reward","cat-7 - train/reward__MIN","cat-7 - train/reward__MAX"\n',
    "TensorBoard export": "Wall time,Step,Value\n",
}


def as_written_by(tool: str) -> str:
    """Sixty steps of one run as a tool writes them."""
    numbered = list(enumerate(CURVE, 1))
    if tool == "trainer_state.json":
        row = {"loss": 0.01, "grad_norm": 0.3, "completions/mean_length": 200.0, "rewards/accuracy_reward/mean": 0.9}
        history = [row | {"reward": value, "reward_std": 0.3, "epoch": step / 60, "step": step} for step, value in numbered]
        return json.dumps({"max_steps": 90, "log_history": [*history, {"train_runtime": 9.0, "step": 60}]}, indent=2)
    return HEADS.get(tool, "") + "\n".join(LINES[tool].format(*pair) for pair in numbered)


@pytest.mark.parametrize(
    ("tool", "name", "column", "max_steps"),
    [
        ("trainer_state.json", "trainer_state.json", "reward", 90),
        ("metrics.jsonl", "metrics.jsonl", "reward", None),
        ("verl console", "run.log", "critic/rewards/mean", 90),
        ("verl JSON lines", "exp.jsonl", "critic/rewards/mean", None),
        ("OpenRLHF console", "train.log", "reward", None),
        ("OpenRLHF bars", "stderr.txt", "reward", 90),
        ("wandb-history.jsonl", "wandb-history.jsonl", "train/reward", None),
        ("W&B export", "wandb_export.csv", "cat-7 - train/reward", None),
        ("TensorBoard export", "run-.-tag-reward.csv", "Value", None),
        ("TRL console", "stdout.txt", "reward", None),
        ("TRL console and bar", "both.txt", "reward", 90),
        ("ms-swift", "logging.jsonl", "reward", 90),
        ("slime", "ray.log", "rollout/raw_reward", None),
    ],
)
def test_logs_as_tools_write_them(tmp_path: Path, tool: str, name: str, column: str, max_steps: int | None) -> None:
    (tmp_path / name).write_text(as_written_by(tool), encoding="utf-8")
    log = read_log(tmp_path / name)
    assert (log.reward_column, log.max_steps) == (column, max_steps)
    assert log.steps.tolist() == list(range(1, 61))
    assert log.rewards.tolist() == CURVE


def test_seeds_interleaved_and_one_after_the_other_are_the_same_runs(tmp_path: Path) -> None:
    rows = [(seed, step, seed + step / 100) for step in range(1, 21) for seed in (7, 8, 9)]
    header = "Seed,Global Step,Mean Reward"
    mixed = read_log(csv(tmp_path / "mixed.csv", *rows, header=header))
    apart = read_log(csv(tmp_path / "apart.csv", *sorted(rows), header=header))
    for log in (mixed, apart):
        assert log.rewards.tolist() == [9 + step / 100 for step in range(1, 21)]
        assert any("the file contains 3 runs (7, 8, 9); 9, the last one, is used" in note for note in log.notes)
    assert read_log(tmp_path / "mixed.csv", run="7").rewards[0] == read_log(tmp_path / "apart.csv", run="7").rewards[0] == 7.01
