from __future__ import annotations

import numpy as np

from grpo_fast.integrations.logs.row_order import Rows, one_run

NAN = float("nan")


def rows(*pairs: tuple[int, float]) -> Rows:
    steps, rewards = np.array(pairs).T
    return Rows(steps.astype(np.int64), rewards, {"lr": steps / 10})


def test_rows_in_order_are_left_alone() -> None:
    notes: list[str] = []
    given = rows((1, 0.1), (2, NAN), (5, 0.3))
    assert one_run(given, notes) is given
    empty = rows((1, 0.1)).at(np.array([], dtype=np.int64))
    assert one_run(empty, notes) is empty
    assert notes == []


def test_rows_that_share_steps_are_averaged() -> None:
    notes: list[str] = []
    found = one_run(rows((1, 0.1), (1, 0.3), (2, NAN), (2, 0.5), (3, NAN), (3, NAN)), notes)
    assert found.steps.tolist() == [1, 2, 3]
    assert found.rewards[:2].tolist() == [0.2, 0.5]
    assert np.isnan(found.rewards[2])
    assert found.others["lr"].tolist() == [0.1, 0.2, 0.3]
    assert notes == ["5 rows share 3 steps and were averaged"]


def test_rows_without_a_reward_beside_those_of_their_step_that_have_one() -> None:
    notes: list[str] = []
    found = one_run(rows((1, 0.1), (1, NAN), (2, NAN), (2, 0.2), (2, NAN), (3, NAN), (4, 0.4)), notes)
    assert found.steps.tolist() == [1, 2, 3, 4]
    assert found.rewards[[0, 1, 3]].tolist() == [0.1, 0.2, 0.4]
    assert np.isnan(found.rewards[2]), "the only row of its step"
    assert notes == []


def test_a_step_that_was_written_again() -> None:
    notes: list[str] = []
    found = one_run(rows((1, 0.1), (2, 0.2), (3, 0.3), (3, 0.9), (4, 0.4)), notes)
    assert found.rewards.tolist() == [0.1, 0.2, 0.9, 0.4]
    assert found.others["lr"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert notes == ["1 step was written again; the later row was used"]


def test_resumed_begun_anew_and_backwards() -> None:
    notes: list[str] = []
    found = one_run(rows((1, 0), (2, 0), (3, 0), (4, 0), (3, 1), (4, 1), (5, 1)), notes)
    assert found.rewards.tolist() == [0, 0, 1, 1, 1]
    found = one_run(rows((0, 0), (1, 0), (2, 0), (0, 1), (1, 1)), notes)
    assert (found.steps.tolist(), found.rewards.tolist()) == ([1, 2], [1, 1])
    found = one_run(rows((3, 0.3), (2, 0.2), (1, 0.1)), notes)
    assert found.rewards.tolist() == [0.1, 0.2, 0.3]
    assert notes == [
        "the run was resumed once, at step 3; of repeated steps the later row was used",
        "the file contains 2 runs one after the other; the last one is used",
        "steps count from 0 in this log; 1 is added to each",
        "the rows were not in the order of their steps and were sorted",
    ]
