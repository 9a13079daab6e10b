from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_fast.tasks.stream import PromptStream
from grpo_fast.types import Prompt


def make(count: int) -> list[Prompt]:
    return [Prompt(index=index, prompt=str(index), token_ids=(index, index + 1)) for index in range(count)]


def indices(prompts: list[Prompt]) -> list[int]:
    return [prompt.index for prompt in prompts]


@given(
    size=st.integers(1, 40), seed=st.integers(0, 2**40), draws=st.lists(st.integers(0, 50), max_size=12), shuffle=st.booleans()
)
def test_each_epoch_holds_every_prompt_once(size: int, seed: int, draws: list[int], shuffle: bool) -> None:
    stream = PromptStream(make(size), seed=seed, shuffle=shuffle)
    drawn = [index for count in draws for index in indices(stream.take(count))]
    assert len(drawn) == sum(draws)
    for start in range(0, len(drawn), size):
        epoch = drawn[start : start + size]
        assert max(Counter(epoch).values()) == 1
        if len(epoch) == size:
            assert sorted(epoch) == list(range(size))
    assert stream.epoch == pytest.approx(len(drawn) / size)


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 99),
    before=st.integers(0, 100),
    after=st.integers(0, 100),
    shuffle=st.booleans(),
)
def test_resumes_at_the_very_prompt(size: int, seed: int, before: int, after: int, shuffle: bool) -> None:
    straight = PromptStream(make(size), seed=seed, shuffle=shuffle)
    straight.take(before)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = PromptStream(make(size), seed=seed, shuffle=shuffle)
    resumed.take(7)
    resumed.load_state_dict(state)
    assert resumed.epoch == straight.epoch
    assert indices(resumed.take(after)) == indices(straight.take(after))
    assert resumed.state_dict() == straight.state_dict()


def test_order_depends_on_seed_and_epoch_and_not_on_the_size_of_draws() -> None:
    size = 50
    one, other = PromptStream(make(size), seed=3), PromptStream(make(size), seed=3)
    drawn = indices(one.take(2 * size))
    assert [index for _ in range(20) for index in indices(other.take(5))] == drawn
    assert drawn[:size] != drawn[size:]
    assert indices(PromptStream(make(size), seed=4).take(size)) != drawn[:size]


def test_without_shuffling_the_order_is_the_datasets() -> None:
    assert indices(PromptStream(make(3), seed=0, shuffle=False).take(7)) == [0, 1, 2, 0, 1, 2, 0]


def test_refuses_to_stream_nothing() -> None:
    with pytest.raises(ValueError, match="no prompts to train on"):
        PromptStream([], seed=0)
    with pytest.raises(ValueError, match="count=-1"):
        PromptStream(make(1), seed=0).take(-1)


def test_refuses_the_state_of_another_stream() -> None:
    state = PromptStream(make(4), seed=0).state_dict()
    with pytest.raises(ValueError, match="num_prompts was 4 and is 5"):
        PromptStream(make(5), seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        PromptStream(make(4), seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="shuffle was True and is False"):
        PromptStream(make(4), seed=0, shuffle=False).load_state_dict(state)
    with pytest.raises(ValueError, match="prompts_crc32"):
        PromptStream(make(5)[1:], seed=0).load_state_dict(state)
    for damaged in ({"position": 4}, {"position": None}, {"pass": -1}):
        with pytest.raises(ValueError, match="not a position in 4 prompts"):
            PromptStream(make(4), seed=0).load_state_dict(state | damaged)
