from __future__ import annotations

import math

import pytest

from grpo_fast.integrations.logs.raw_log import Names, RawLog
from grpo_fast.integrations.logs.text_tables import is_header_alone, read_table

ROWS = [{"step": 1.0, "reward": 0.1}, {"step": 2.0, "reward": 0.2}]
PERCENT = "values with a percent sign are read as hundredths: 50 % is 0.5"
COMMA = "numbers are read with a decimal comma"
THOUSANDS = "thousands separators were removed from numbers"


def read(text: str) -> RawLog:
    found = read_table(text, Names())
    assert found is not None
    return found


def test_plain() -> None:
    found = read("step,reward,name\n1,0.1,x\n2,,y\n3,nan,z\n")
    assert (found.source, found.runs) == ("CSV", None)
    assert found.rows[:2] == [{"step": 1, "reward": 0.1}, {"step": 2}]
    assert math.isnan(found.rows[2]["reward"])
    for mark in (";", "\t", "  "):
        assert read(f"step{mark}reward\r\n1{mark}0.1\r\n2{mark}0.2\r\n").rows == ROWS
    assert read("# step reward\n1.0 0.1\n2.0 0.2\n").rows == ROWS, "as numpy writes it"
    assert read("step,reward\n1,0.1\n# a remark, with a comma\n2,0.2\n").rows == ROWS
    assert read("step,reward,kl\n1,0.1\n2,0.2,3,4,5\n").rows == ROWS, "rows may be short or long"


def test_exports() -> None:
    wandb = '"Step","run - train/reward","run - train/reward__MIN","run - train/reward__MAX"\n"0","0.5","0.5","0.5"\n'
    found = read(wandb)
    assert (found.source, found.rows[0]["run - train/reward"]) == ("W&B CSV export", 0.5)
    assert read(",_step,train/reward\n0,1,0.5\n").rows == [{"_step": 1, "train/reward": 0.5}], "as its interface gives it"
    found = read("Wall time,Step,Value\n1.7e9,1,0.1\n")
    assert (found.source, found.reward_column, found.rows) == ("TensorBoard CSV export", "Value", [{"Step": 1, "Value": 0.1}])


def test_without_a_header() -> None:
    found = read("1,0.1\n2,0.2\n")
    assert (found.rows, found.notes) == (ROWS, ["the file has no header; its columns are taken as step and reward"])
    assert read("0.1\n0.2\n").rows == [{"reward": 0.1}, {"reward": 0.2}]
    assert read_table("1,2,3\n4,5,6\n", Names()) is None


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("step,reward\n1,10%\n2,20 %\n", [PERCENT]),
        ("step;reward\n1;0,1\n2;0,2\n", [COMMA]),
        ('step,reward\n"1","0,1"\n"2","0,2"\n', [COMMA]),
        ("step;reward\n1;10,0 %\n2;20,0\u00a0%\n", [PERCENT, COMMA]),
    ],
)
def test_numbers_as_people_write_them(text: str, notes: list[str]) -> None:
    found = read(text)
    assert [row["reward"] for row in found.rows] == pytest.approx([0.1, 0.2])
    assert found.notes == notes


def test_thousands() -> None:
    found = read('step,reward\n"1,000",0.1\n"1,002,000","-1,234.5"\n')
    assert found.rows == [{"step": 1000, "reward": 0.1}, {"step": 1002000, "reward": -1234.5}]
    assert found.notes == [THOUSANDS]
    found = read("step;reward\n1.000;0,1\n1.002.000;1.234,5\n")
    assert found.rows == [{"step": 1000, "reward": 0.1}, {"step": 1002000, "reward": 1234.5}]
    assert found.notes == [COMMA, THOUSANDS]


def test_a_name_that_stands_twice() -> None:
    found = read("step,reward,reward\n1,0.1,9\n2,0.2,9\n")
    assert found.rows == ROWS
    assert found.notes == ["1 column occurs more than once: reward; the first is read"]


def test_runs_are_told_apart() -> None:
    assert read("run,step,reward\na,1,0.1\nb,1,0.2\n").runs == ["a", "b"]
    assert read("step,Split,reward\n1,train,0.1\n1,eval,0.2\n").splits == ["train", "eval"]


def test_what_is_no_table() -> None:
    for text in ("", "Once upon a time,\nthere was a reward.\n", "a,b\nc,d\n", "alone\n"):
        assert read_table(text, Names()) is None
    assert is_header_alone("step,reward\n")
    assert not is_header_alone("step,reward\n1,2\n")
    assert not is_header_alone("hello\n")
