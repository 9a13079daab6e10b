from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from grpo_fast.tasks.encoded import EncodedPrompts, token_ids_of

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "answer": 1},
    {"prompt": "left out"},
    {"prompt": [{"role": "user", "content": "b"}], "hint": "x"},
    {"prompt": "c", "answer": 3},
]
TOKENS = {0: [5, 6], 2: [7], 3: [8, 9, 10]}


def ask(row: Any, number: int) -> Any:
    return row["prompt"]


def encoded() -> EncodedPrompts:
    found = EncodedPrompts(ROWS, ask)
    for number, token_ids in TOKENS.items():
        found.add(number, ROWS[number], ROWS[number]["prompt"], token_ids, opening="<think>" if number == 2 else "")
    return found


def test_prompts_are_made_of_the_rows_that_were_kept() -> None:
    found = encoded()
    assert [prompt.index for prompt in found] == [0, 2, 3]
    assert [prompt.token_ids for prompt in found] == [(5, 6), (7,), (8, 9, 10)]
    assert [prompt.prompt for prompt in found] == ["a", ROWS[2]["prompt"], "c"]
    assert [prompt.columns for prompt in found] == [{"answer": 1}, {"hint": "x"}, {"answer": 3}]
    assert [prompt.opening for prompt in found] == ["", "<think>", ""]
    assert found[-1] == found[2] == found[1:][1]
    with pytest.raises(IndexError):
        _ = found[3]


def test_a_prompt_is_found_by_its_row() -> None:
    found = encoded()
    assert [found.of_row(number).token_ids for number in (3, 0, 2)] == [(8, 9, 10), (5, 6), (7,)]
    for number in (1, 4, -1):
        with pytest.raises(KeyError):
            found.of_row(number)


def test_facts_of_all_prompts_need_no_row() -> None:
    found = encoded()
    found._rows = []
    assert found.columns == ["answer", "hint"]
    assert (len(found), found.num_plain, found.longest, found.mean_length) == (3, 2, 3, 2.0)
    assert list(map(list, token_ids_of(found))) == list(TOKENS.values())
    assert EncodedPrompts([], ask).longest == 0


def test_a_prompt_takes_no_more_than_its_tokens() -> None:
    count, length = 20_000, 50
    row, token_ids = ROWS[0], list(range(1000, 1000 + length))
    tracemalloc.start()
    found = EncodedPrompts([row] * count, ask)
    for number in range(count):
        found.add(number, row, "a", token_ids)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1.2 * count * (4 * length + 8 + 24), "as tuples of numbers it would be eightfold"
