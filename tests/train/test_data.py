from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.environments import Environments
from grpo_fast.tasks.task import Task
from grpo_fast.train.data import (
    Data,
    check_episodes,
    check_rows,
    choose_data,
    choose_environments,
    choose_replies,
    encoded_task,
    reward_range,
    unheard,
)
from grpo_fast.train.policy_source import PolicySource
from tests.test_tools import Guessing, add


class Silent:
    """An environment with nothing to say."""

    def reset(self, prompt: str) -> None: ...

    def step(self, completion: str) -> None: ...


def chosen(config: Config, given: dict[str, Any]) -> Environments | None:
    return choose_environments(config, given, opened=contextlib.ExitStack())


ROWS = [{"prompt": f"{letter}=", "answer": letter} for letter in "abcdefghij"]


def short(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


@pytest.mark.parametrize("functions", [short, [short], "format", ["format", short]])
def test_rewards_that_are_given_win_and_one_may_stand_alone(functions: Any, letters: Task) -> None:
    data = choose_data(Config(reward_funcs=("boxed_format",)), {"task": letters, "reward_funcs": functions}, chat=False)
    assert data.reward_funcs == (functions if isinstance(functions, list) else [functions])
    assert list(choose_data(Config(reward_funcs=("format",)), {"task": letters}, chat=False).reward_funcs) == ["format"]
    assert list(choose_data(Config(), {"task": letters}, chat=False).reward_funcs) == ["exact_match"]


@pytest.mark.parametrize(
    ("functions", "settings", "found"),
    [
        (["own:task"], {}, (-1.0, 2.0)),
        (["accuracy"], {}, (0.0, 1.0)),
        (["accuracy", "format", "own:task"], {"reward_weights": (1.0, 0.5, 2.0)}, (-2.0, 5.5)),
        (["accuracy", "format"], {"reward_weights": (1.0, -0.5)}, (-0.5, 1.0)),
        (["accuracy"], {"reward_weights": (0.0,)}, None),
        (["accuracy", short], {}, None),
        (["environment"], {}, None),
        (["own:other"], {}, None),
        ([short], {"reward_range": (-9.0, 0.0)}, (-9.0, 0.0)),
        (["accuracy"], {"reward_range": (0.0, 0.5)}, (0.0, 0.5)),
    ],
)
def test_the_range_of_the_reward_follows_from_the_rewards(functions: Any, settings: Any, found: Any) -> None:
    task = Task("own", ROWS, [], ("own:task",), "", reward_range=(-1.0, 2.0))
    assert reward_range(Config(**settings), task, functions) == found


def test_an_environment_that_rates_is_the_reward_where_no_other_is_named(letters: Task) -> None:
    class Rating(Silent):
        def get_reward(self) -> float:
            return 1.0

    silent, rating = (chosen(Config(), {"environment_factory": kind}) for kind in (Silent, Rating))
    given = {"task": letters}
    assert list(choose_data(Config(), given, chat=False, environments=rating).reward_funcs) == ["environment"]
    assert list(choose_data(Config(), given, chat=False, environments=silent).reward_funcs) == ["exact_match"]
    both = Config(reward_funcs=("environment", "format"))
    assert list(choose_data(both, given, chat=False, environments=rating).reward_funcs) == ["environment", "format"]
    assert choose_data(both.replace(reward_funcs=()), given, chat=False).measure == "exact_match"
    assert choose_data(Config(), given, chat=False, environments=rating).measure == "", "a task's own reads one answer"
    choose_data(Config(), {"train_dataset": [{"prompt": "a"}]}, chat=False, environments=rating)  # no answer is needed
    with pytest.raises(ConfigError, match="get_reward of an environment, but 'Silent' has none; add it"):
        choose_data(both, given, chat=False, environments=silent)
    assert chosen(Config(), {}) is None


def test_rows_in_hand_take_the_place_of_the_dataset(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(eval_size=3)
    data = choose_data(config, {"train_dataset": ROWS, "eval_dataset": ROWS[:3]}, chat=False)
    prompts, held_out = encoded_task(config, data, PolicySource(config))
    assert [prompt.prompt for prompt in prompts] == [row["prompt"] for row in ROWS]
    assert [prompt.prompt for prompt in held_out] == ["a=", "b=", "c="]
    assert list(data.reward_funcs) == ["accuracy"]
    assert len(choose_data(config, {"train_dataset": ROWS}, chat=False).task.eval) == 2, "a fifth is held out"
    everything = choose_data(config.replace(eval_size=0), {"train_dataset": ROWS}, chat=False).task
    assert (len(everything.train), len(everything.eval)) == (len(ROWS), 0)
    with pytest.raises(ConfigError, match="has no 'answer' column"):
        choose_data(config, {"train_dataset": [{"prompt": "a"}]}, chat=False)
    choose_data(config, {"train_dataset": [{"prompt": "a"}], "reward_funcs": short}, chat=False)


def test_a_prompt_that_cannot_be_used_is_named_by_its_row_in_the_table(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    source = PolicySource(config)
    for number in range(len(ROWS)):  # of which some are held out
        rows = [*ROWS[:number], {"prompt": "", "answer": ""}, *ROWS[number + 1 :]]
        task = choose_data(config, {"train_dataset": rows}, chat=False).task
        with pytest.raises(ConfigError, match=f"the prompt of row {number} is empty"):
            encoded_task(config, Data(task, ()), source)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eval_dataset": ROWS}, "eval_dataset is given without train_dataset; give both"),
        ({"train_dataset": ROWS, "task": None}, "train_dataset and task are both given"),
    ],
)
def test_rows_come_from_one_source(given: dict[str, Any], message: str) -> None:
    check_rows({"train_dataset": ROWS, "eval_dataset": ROWS, "reward_funcs": short})
    with pytest.raises(ConfigError, match=message):
        check_rows(given)


def test_a_run_goes_on_with_the_data_and_rewards_that_it_was_begun_with(
    letters: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Data(letters, ["format", short])
    begun.check_names(tmp_path)
    begun.write_names(tmp_path)
    begun.check_names(tmp_path)
    with pytest.raises(ConfigError, match=r"reward_funcs \['format', 'short'\], but now .* GRPOTrainer.resume .*/checkpoint-N"):
        Data(letters, [short, "format"]).check_names(tmp_path)
    other = choose_data(Config(), {"train_dataset": ROWS}, chat=False).task
    with pytest.raises(ConfigError, match=r"started with dataset 'letters', but now dataset is 'train_dataset'"):
        Data(other, ["format", short]).check_names(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "a"}\n' * 5, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Data(dataclasses.replace(letters, name="rows.jsonl"), ["format"]).write_names(tmp_path)  # as older runs have it
    choose_data(Config(dataset="rows.jsonl", reward_funcs="format"), {}, chat=False).check_names(tmp_path)  # type: ignore[arg-type]
    (tmp_path / "letters").mkdir()  # what is given in Python has a name, and no place on the disk
    begun.write_names(tmp_path)
    begun.check_names(tmp_path)
    told = "started with environment_factory None, but now environment_factory is 'Silent'"
    with Environments(Silent) as environments, pytest.raises(ConfigError, match=told):
        Data(letters, ["format", short], environments).check_names(tmp_path)


def test_tools_are_chosen_as_given_or_configured() -> None:
    assert chosen(Config(), {}) is None
    assert chosen(Config(), {"tools": ()}) is None
    for given in (add, [add]):
        found = chosen(Config(environment_factory="missing:Game"), {"tools": given, "environment_factory": None})
        assert found is not None
        assert found.tool_names == ["add"]
    found = chosen(Config(tools="tests.test_tools:add"), {"environment_factory": Guessing})  # type: ignore[arg-type]
    assert found is not None
    assert found.tool_names == ["add", "guess"]
    with pytest.raises(ConfigError, match=r"tool 3 \(int\) is no function"):
        chosen(Config(), {"tools": [3]})
    with pytest.raises(ConfigError, match="makes no environments; give a class"):
        chosen(Config(), {"environment_factory": {"game": Guessing}})


def test_a_get_reward_that_counts_for_nothing_is_told(letters: Task) -> None:
    class Rating(Silent):
        def get_reward(self) -> float:
            return 1.0

    def reads(environment_rewards: list[float], **columns: Any) -> list[float]:
        return environment_rewards

    def judges(environments: list[Rating]) -> list[float]:
        return [each.get_reward() for each in environments]

    def told(functions: Any, kind: type = Rating) -> list[str]:
        environments = chosen(Config(), {"environment_factory": kind})
        given = {"task": letters, "reward_funcs": functions}
        return unheard(choose_data(Config(), given, chat=False, environments=environments))

    [remark] = told([short, "format"])
    assert remark.startswith(
        "environment 'Rating' has a get_reward, which counts for nothing here: reward_funcs are short, format;"
    )
    assert told(["environment", short]) == told([reads, short]) == told(judges) == told(short, Silent) == []


def test_rewards_that_read_environments_are_set_apart_and_held_against_the_columns(letters: Task, tiny_model: Path) -> None:
    def score(environments: list[Any], solution: list[str]) -> list[float]:
        return [0.0 for _ in environments]

    config = Config(model=str(tiny_model), max_completion_length=20)
    source = PolicySource(config)
    environments = chosen(config, {"environment_factory": Silent})
    data = choose_data(config, {"task": letters, "reward_funcs": [score, short]}, chat=False, environments=environments)
    assert [judge.function for judge in data.judges] == [score]
    assert data.reward_funcs[1] is short
    prompts, _ = encoded_task(config, Data(letters, ()), source)
    replies = choose_replies(config, environments, source)
    with pytest.raises(ConfigError, match="reward function 'score' needs a dataset column 'solution'; the dataset has answer"):
        check_episodes(data, prompts, replies)
    assert choose_data(config, {"task": letters, "reward_funcs": [score]}, chat=False).judges == ()
