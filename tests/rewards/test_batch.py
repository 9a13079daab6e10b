from __future__ import annotations

import pickle
import threading
from dataclasses import replace
from typing import Any

import pytest

from grpo_fast.rewards.batch import call_arguments, column_names, pickled
from grpo_fast.rewards.call import GIVEN
from grpo_fast.types import Completion, Episode, Group, Prompt, TrainerState


def group(prompt: Any, *texts: str, opening: str = "", **columns: Any) -> Group:
    completions = [Completion(tuple(range(len(text))), (0.0,) * len(text), "stop", text) for text in texts]
    return Group(Prompt(0, prompt, (1,), columns, opening), completions)


def test_arguments_are_aligned_with_completions() -> None:
    chat = [{"role": "user", "content": "q"}]
    groups = [group("p", "a", "bb", answer="1"), group(chat, "c", opening="<think>", answer="2", level=3)]
    state = TrainerState(global_step=3)
    assert call_arguments(groups, column_names(groups), state) == {
        "prompts": ["p", "p", chat],
        "completions": ["a", "bb", [{"role": "assistant", "content": "c"}]],
        "completion_ids": [[0], [0, 1], [0]],
        "completion_openings": ["", "", "<think>"],
        "environment_rewards": [None, None, None],
        "answer": ["1", "1", "2"],
        "level": [None, None, 3],
        "trainer_state": state,
    }


def test_an_episode_is_given_whole_and_with_its_reward() -> None:
    said = ({"role": "assistant", "content": "6*7"}, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "c"})
    chat, plain = group([{"role": "user", "content": "q"}], "all of it"), group("q", "6*7 42 c")
    for each, messages, reward in ((chat, said, 0.5), (plain, (), None)):
        episode = Episode((True,) * 9, messages, 2, reward)
        each.completions = [replace(completion, episode=episode) for completion in each.completions]
    found = call_arguments([chat, plain], [], TrainerState())
    assert found["completions"] == [list(said), "6*7 42 c"]
    assert found["environment_rewards"] == [0.5, None]
    assert found["prompts"] == [[{"role": "user", "content": "q"}], "q"]
    asked = ({"role": "user", "content": "q: the board is empty"},)
    chat.completions = [
        replace(each, episode=replace(each.episode, asked=asked)) for each in chat.completions if each.episode is not None
    ]
    found = call_arguments([chat, plain], [], TrainerState())
    assert found["prompts"] == [list(asked), "q"]


@pytest.mark.parametrize("name", GIVEN)
def test_a_column_may_not_hide_an_argument(name: str) -> None:
    with pytest.raises(ValueError, match=f"column '{name}'.*rename it"):
        column_names([group("p", "a", **{name: 1})])


def test_pickled_names_the_column_that_cannot_be_sent() -> None:
    assert pickle.loads(pickled({"completions": ["a"]})) == {"completions": ["a"]}
    with pytest.raises(TypeError, match="column 'lock' cannot be sent"):
        pickled({"completions": ["a"], "lock": [threading.Lock()]})
