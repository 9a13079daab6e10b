from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from grpo_fast.rewards.batch import call_arguments, column_names, pickled
from grpo_fast.types import Completion, Group, Prompt


def group(prompt: Any, *texts: str, opening: str = "", **columns: Any) -> Group:
    completions = [Completion(tuple(range(len(text))), (0.0,) * len(text), "stop", text) for text in texts]
    return Group(Prompt(0, prompt, (1,), columns, opening), completions)


def test_arguments_are_aligned_with_completions() -> None:
    chat = [{"role": "user", "content": "q"}]
    groups = [group("p", "a", "bb", answer="1"), group(chat, "c", opening="<think>", answer="2", level=3)]
    assert call_arguments(groups, column_names(groups)) == {
        "prompts": ["p", "p", chat],
        "completions": ["a", "bb", [{"role": "assistant", "content": "c"}]],
        "completion_ids": [[0], [0, 1], [0]],
        "completion_openings": ["", "", "<think>"],
        "answer": ["1", "1", "2"],
        "level": [None, None, 3],
    }


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "completion_openings"])
def test_a_column_may_not_hide_an_argument(name: str) -> None:
    with pytest.raises(ValueError, match=f"column '{name}'.*rename it"):
        column_names([group("p", "a", **{name: 1})])


def test_pickled_names_the_column_that_cannot_be_sent() -> None:
    assert pickle.loads(pickled({"completions": ["a"]})) == {"completions": ["a"]}
    with pytest.raises(TypeError, match="column 'lock' cannot be sent"):
        pickled({"completions": ["a"], "lock": [threading.Lock()]})
