from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fast.async_code import AsyncCode
from grpo_fast.rewards.call import (
    GIVEN,
    InvalidRewardError,
    RewardFunction,
    await_reward,
    call_reward,
    check_columns,
    describe_failure,
    resolve_reward,
    reward_name,
)
from grpo_fast.types import Scored, TrainerState

STATE = TrainerState(epoch=0.5, global_step=3, max_steps=10)
ARGUMENTS: dict[str, Any] = {
    "prompts": ["p", "q"],
    "completions": ["a", "bb"],
    "completion_ids": [[1], [1, 2]],
    "completion_openings": ["", ""],
    "environment_rewards": [None, 0.5],
    "answer": ["a", "b"],
    "trainer_state": STATE,
}


def scored(function: Any, arguments: dict[str, Any] | None = None) -> Scored:
    with contextlib.closing(AsyncCode()) as loop:
        return call_reward(RewardFunction("f", function), ARGUMENTS if arguments is None else arguments, loop)


def call(function: Any, arguments: dict[str, Any] | None = None) -> list[float | None]:
    return scored(function, arguments).values


@pytest.mark.parametrize("name", ["accuracy", "exact_match", "format", "boxed_format", "environment"])
def test_built_in_rewards_are_found_by_name(name: str) -> None:
    reward = resolve_reward(name)
    assert reward.name == name
    assert len(call(reward.function)) == 2


def test_unknown_built_in_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'mine.py:right' names a file; a function of it is 'mine:right'"):
        resolve_reward("mine.py:right")
    with pytest.raises(ValueError, match=r"unknown reward 'acuracy'; did you mean 'accuracy'\?"):
        resolve_reward("acuracy")
    with pytest.raises(ValueError, match="'module:function'"):
        resolve_reward(":f")


def test_module_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "class Box:\n    @staticmethod\n    def inner(completions):\n        return [2.0] * len(completions)\nnumber = 3\n"
    (tmp_path / "rewards_for_call.py").write_text(source)
    (tmp_path / "broken_for_call.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert call(resolve_reward("rewards_for_call:Box.inner").function) == [2.0, 2.0]
    assert reward_name("rewards_for_call:Box.inner") == "inner"
    with pytest.raises(ValueError, match=r"'rewards_for_call' has no 'numbr'; did you mean 'number'\?"):
        resolve_reward("rewards_for_call:numbr")
    with pytest.raises(TypeError, match="is 3, which is not a function"):
        resolve_reward("rewards_for_call:number")
    with pytest.raises(TypeError, match=r"Box.*which is not a function"):
        resolve_reward("rewards_for_call:Box")
    with pytest.raises(ValueError, match=r"cannot import 'absent_module'.*PYTHONPATH"):
        resolve_reward("absent_module:f")
    with pytest.raises(ValueError, match="no_such_module_anywhere"):
        resolve_reward("broken_for_call:f")


def test_callables_are_named_by_their_name() -> None:
    class Scorer:
        def __call__(self, completions: list[str]) -> list[float]:
            return [float(len(text)) for text in completions]

    def by_length(completions: list[str], scale: float) -> list[float]:
        return [scale * len(text) for text in completions]

    assert reward_name(by_length) == "by_length"
    assert reward_name(functools.partial(by_length, scale=2.0)) == "by_length"
    assert reward_name(Scorer()) == "Scorer"
    assert call(resolve_reward(Scorer()).function) == [1.0, 2.0]
    assert call(functools.partial(by_length, scale=2.0)) == [2.0, 4.0]
    with pytest.raises(TypeError, match="not 3"):
        resolve_reward(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Scorer"):
        resolve_reward(Scorer)


def test_models_are_no_reward_functions() -> None:
    class Scorer:
        def __call__(self, completions: list[str]) -> list[float]: ...

        def forward(self) -> None: ...

        def parameters(self) -> None: ...

    with pytest.raises(TypeError, match=r"Scorer is a model; give RewardModel\(model"):
        reward_name(Scorer())


def test_what_reads_environments_without_naming_them_is_told_how() -> None:
    with pytest.raises(KeyError) as caught:
        call(lambda **columns: columns["environments"])
    assert describe_failure(caught.value).endswith("; what reads environments must name them in its signature")


def test_a_function_is_given_what_its_signature_takes() -> None:
    seen: dict[str, Any] = {}

    def everything(**columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0, 0.0]

    def some(completions: list[str], *, answer: list[str], scale: float = 3.0) -> list[float]:
        return [scale * (text == right) for text, right in zip(completions, answer, strict=True)]

    call(everything)
    assert {name: seen[name] for name in ARGUMENTS} == ARGUMENTS
    assert set(seen) == {*GIVEN, "answer"}
    assert call(some) == [3.0, 0.0]
    assert call(lambda: [1.0, 1.0]) == [1.0, 1.0]


def test_a_function_without_readable_signature_is_given_everything() -> None:
    with pytest.raises(TypeError, match="max"):  # it takes no such keywords; what matters is that it was called with them
        call(max)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(InvalidRewardError, match="needs a dataset column 'solution'; the dataset has answer"):
        call(lambda completions, solution: [0.0])
    bare = {name: ARGUMENTS[name] for name in ARGUMENTS if name != "answer"}
    with pytest.raises(
        InvalidRewardError,
        match="no column but the prompt; answers in a column of another name: set answer_column",
    ):
        call(resolve_reward("accuracy").function, bare)
    with pytest.raises(InvalidRewardError, match="; environments are there with tools or an environment_factory"):
        call(lambda environments: [0.0])
    with pytest.raises(InvalidRewardError, match=r"'judge' needs a dataset column 'page'; the dataset has answer$"):
        check_columns(RewardFunction("judge", lambda environments, page: [0.0]), ["answer", "environments"])


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ((True, None), [1.0, None]),
        ([math.nan, 1.0], [None, 1.0]),
        (np.array([1.0, 2.0], dtype=np.float32), [1.0, 2.0]),
        ([np.float32(0.5), np.int64(2)], [0.5, 2.0]),
        ((value for value in (1.0, 2.0)), [1.0, 2.0]),
    ],
)
def test_numbers_of_every_kind(result: Any, expected: list[float | None]) -> None:
    values = call(lambda: result)
    assert values == expected
    assert all(value is None or type(value) is float for value in values)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, 1.0, 1.0], "returned 3 values for 2 completions"),
        (["1", "2"], r"returned '1' \(str\) for completion 0"),
        ([1.0, "x" * 100], r"\.\.\. \(str\) for completion 1"),
        ([1.0, [2.0]], r"returned \[2.0\] \(list\) for completion 1"),
        ([1.0, math.inf], r"returned inf \(float\) for completion 1"),
        ([1.0, -math.inf], r"returned -inf \(float\) for completion 1"),
        ([1e39, 1.0], r"returned 1e\+39 \(float\) for completion 0; .*finite number of float32"),
        ([10**400, 1.0], r"returned 1000.* \(int\) for completion 0"),
        ([10**5000, 1.0], r"returned a value that cannot be written \(int\) for completion 0"),
        ("ab", r"returned 'ab' \(str\); it must return a list"),
        ({"a": 1, "b": 2}, "must return a list"),
        (None, r"returned None \(NoneType\)"),
        (1.0, r"returned 1.0 \(float\)"),
    ],
)
def test_results_that_are_refused(result: Any, message: str) -> None:
    with pytest.raises(InvalidRewardError, match=message):
        call(lambda: result)


def test_a_function_may_change_its_lists_and_no_other_sees_it() -> None:
    def takes_all(completions: list[str], answer: list[str]) -> list[float]:
        answer.clear()
        return [float(len(completions.pop(0))) for _ in range(len(completions))]

    def loses_all(completions: list[str]) -> list[float]:
        completions.clear()
        return [float(len(text)) for text in completions]

    for _ in range(2):
        assert call(takes_all) == [1.0, 2.0]
        with pytest.raises(InvalidRewardError, match="returned 0 values for 2 completions"):
            call(loses_all)


def test_async_functions_are_awaited() -> None:
    async def later(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def failing() -> list[float]:
        raise KeyError("inside")

    assert call(later) == [1.0, 2.0]

    async def in_a_notebook() -> tuple[list[float | None], str]:
        try:
            call(failing)
        except KeyError as error:
            return call(later), str(error)
        return [], ""

    assert asyncio.run(in_a_notebook()) == ([1.0, 2.0], "'inside'")


def logs(*, metrics: Any = (), extra: Any = ()) -> Any:
    def function(completions: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        for name, value in metrics:
            log_metric(name, value)
        for column, values in extra:
            log_extra(column=column, values=values)
        return [0.0] * len(completions)

    return function


def test_what_trl_gives_is_given_and_what_is_logged_comes_back_in_plain_values() -> None:
    def all_of_it(completions: list[str], trainer_state: TrainerState, log_metric: Any, **columns: Any) -> list[float]:
        log_metric("share", np.float32(0.5))
        log_metric("share", np.array([2]))
        log_metric(name="steps", value=trainer_state.global_step)
        columns["log_extra"]("length", np.array([1, 2]))
        columns["log_extra"]("parsed", [Fraction(1, 2), None])
        for text in completions:
            columns["log_extra"]("one by one", [text])
        return [1.0] * len(completions)

    expected = Scored(
        [1.0, 1.0],
        {"share": [0.5, 2.0], "steps": [3.0]},
        {"length": [1, 2], "parsed": ["1/2", None], "one by one": ["a", "bb"]},
    )
    found = scored(all_of_it)
    assert found == expected
    assert all(type(value) is int for value in found.extra["length"])
    assert all(type(value) is float for values in found.metrics.values() for value in values)
    check_columns(RewardFunction("f", all_of_it), [])

    async def later(completions: list[str], log_metric: Any) -> list[float]:
        await asyncio.sleep(0)
        log_metric("share", 1)
        return [1.0, 1.0]

    assert asyncio.run(await_reward(RewardFunction("f", later), ARGUMENTS)) == Scored([1.0, 1.0], {"share": [1.0]})
    assert scored(later).metrics == {"share": [1.0]}
    assert scored(lambda: [1.0, 1.0]) == Scored([1.0, 1.0])


@pytest.mark.parametrize(
    ("logged", "message"),
    [
        ({"metrics": [("share", "high")]}, r"logged 'high' \(str\) as the metric 'share'; log_metric takes one number"),
        ({"metrics": [("share", [1.0])]}, r"logged \[1.0\] \(list\) as the metric 'share'"),
        ({"metrics": [(3, 1.0)]}, r"logged under the name 3 \(int\)"),
        ({"metrics": [("", 1.0)]}, "a text that is not empty"),
        ({"extra": [("parsed", ["a"])]}, "logged 1 values in the column 'parsed' for 2 completions; log_extra takes one each"),
        ({"extra": [("parsed", ["a", "b"])] * 2}, "logged 4 values in the column 'parsed' for 2"),
        ({"extra": [("parsed", "abc")]}, "logged 3 values in the column 'parsed' for 2"),
    ],
)
def test_what_cannot_be_logged_is_refused(logged: Any, message: str) -> None:
    with pytest.raises(InvalidRewardError, match=message):
        scored(logs(**logged))


def test_failures_are_described_by_exception_and_line() -> None:
    def broken() -> list[float]:
        return [1 / 0]

    with pytest.raises(ZeroDivisionError) as caught:
        call(broken)
    text = describe_failure(caught.value)
    assert text.startswith("raised ZeroDivisionError: division by zero (")
    assert "in broken: return [1 / 0])" in text
    assert describe_failure(KeyError("k")) == "raised KeyError: 'k'"
    assert describe_failure(InvalidRewardError("returned nothing")) == "returned nothing"
