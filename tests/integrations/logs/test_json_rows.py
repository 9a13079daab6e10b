from __future__ import annotations

import json
import math

from grpo_fast.integrations.logs.json_rows import number, numbers_of, read_json, read_json_lines
from grpo_fast.integrations.logs.raw_log import Names, RawLog

ROWS = [{"reward": 0.1, "step": 1.0}, {"reward": 0.2, "step": 2.0}]


def lines(*objects: object) -> str:
    return "\n".join(json.dumps(item) for item in objects) + "\n"


def read(text: str, names: Names | None = None) -> RawLog:
    found = read_json(text, names or Names()) or read_json_lines(text, names or Names())
    assert found is not None
    return found


def test_what_trainers_save() -> None:
    state = {"max_steps": 50, "log_history": [*ROWS, {"train_runtime": 3.0, "step": 2}]}
    found = read(json.dumps(state))
    assert (found.rows[:2], found.max_steps, found.source) == (ROWS, 50, "transformers trainer_state.json")
    assert read(json.dumps(state | {"max_steps": -1})).max_steps is None


def test_lists_columns_and_tensorboard() -> None:
    assert read(json.dumps(ROWS)).rows == ROWS
    assert read(json.dumps({"step": [1, 2], "reward": [0.1, 0.2]})).rows == ROWS
    assert read(json.dumps({"step": {"0": 1, "1": 2}, "reward": {"0": 0.1, "1": 0.2}})).rows == ROWS, "as pandas writes it"
    found = read(json.dumps([[1.7e9, 1, 0.1], [1.7e9, 2, 0.2]]))
    assert (found.source, found.reward_column) == ("TensorBoard JSON export", "value")
    assert [(row["step"], row["value"]) for row in found.rows] == [(1, 0.1), (2, 0.2)]
    for text in ("{}", '{"a": [1], "b": [1, 2]}', '{"a": [1], "b": 3}', "[1", "3"):
        assert read_json(text, Names()) is None


def test_lines() -> None:
    verl = lines({"step": 1, "data": {"critic/rewards/mean": 0.5, "train": {"lr": 1e-6}, "loss": 3, "note": "x"}})
    names = Names()
    found = read(verl * 2, names)
    assert found.source == "verl JSON lines"
    assert found.rows[0] == {"step": 1, "critic/rewards/mean": 0.5, "train/lr": 1e-6}
    assert names.all() == ["step", "critic/rewards/mean", "train/lr", "loss"], "what is not read is remembered"
    text = lines({"global_step": 3, "reward": None, "lr": "NaN", "ok": True}) + "oops\n" + lines(*ROWS) + '{"step": 4, "rew'
    found = read(text)
    assert found.source == "JSON lines"
    assert len(found.rows) == 3
    assert found.rows[0].keys() == {"global_step", "reward", "lr"}
    assert math.isnan(found.rows[0]["reward"])
    assert found.notes == ["1 of 5 lines are no JSON objects and were left out"], "a half-written last line is nothing to tell"
    assert read_json_lines("prose\n{not json}\n", Names()) is None
    assert read_json_lines("{not json}\n{nor this}\n", Names()) is None


def test_runs_are_told_apart() -> None:
    rows = [{"run_id": "a", **ROWS[0]}, {"run_id": "b", **ROWS[0]}]
    assert read(lines(*rows)).runs == ["a", "b"]
    assert read(json.dumps(rows)).runs == ["a", "b"]
    for text in (lines(rows[0], ROWS[1]), json.dumps([rows[0], ROWS[1]])):
        assert read(text).runs == ["a", "a"], "a row without a name belongs to the run before it"
    assert read(lines(*ROWS)).runs is None


def test_seeds_tell_runs_apart() -> None:
    rows = [{"seed": seed, **row} for seed in (0, 1) for row in (*ROWS, *ROWS)]
    seeds = [str(row["seed"]) for row in rows]
    assert read(lines(*rows)).runs == read(json.dumps(rows)).runs == seeds
    assert read(lines(*({"Run ID": "a", **row} for row in rows))).runs == [f"a, seed {seed}" for seed in seeds]


def test_rows_of_an_evaluation_are_told_apart() -> None:
    rows = [{"mode": "train", **ROWS[0]}, {"mode": "eval", **ROWS[0]}]
    assert read(lines(*rows)).splits == ["train", "eval"]
    assert read(json.dumps(rows)).splits == ["train", "eval"]
    assert read(lines({"phase": 2, **ROWS[0]})).splits is None, "a number is no word"


def test_a_step_beside_all_that_are_planned() -> None:
    rows = [
        {"reward": value, "global_step/max_steps": f"{step}/400", "percentage": "1%"} for step, value in ((5, 0.1), (10, 0.2))
    ]
    for text in (lines(*rows), json.dumps(rows)):
        found = read(text)
        assert found.rows == [{"reward": 0.1, "global_step": 5}, {"reward": 0.2, "global_step": 10}]
        assert found.max_steps == 400


def test_numbers() -> None:
    assert number("1e-3") == 0.001
    assert all(math.isnan(number(value)) for value in (None, True, "x", [1], 10**400))
    assert numbers_of([{"reward": {"total": 1}, "score": [2], "acc": "x"}, 3], Names()) == [{"reward/total": 1.0}]
    assert math.isnan(numbers_of([{"reward": float("nan")}], Names())[0]["reward"])
