from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from grpo_fast.cli import app
from grpo_fast.config import Config, ConfigError
from grpo_fast.recipes import recipe, recipe_names


def settings(*arguments: str, command: str = "train") -> Config:
    """The configuration that the command would get."""
    _, bound, _ = app.parse_args([command, *arguments], exit_on_error=False, print_error=False)
    found: Config = bound.arguments.get("settings", Config())
    return found


def test_where_settings_come_from_and_who_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('model = "here"\nseed = 3\nnum_generations = 5\n', encoding="utf-8")
    assert settings() == recipe("embedded"), "nothing given: the embedded model"
    assert settings("--seed", "7") == recipe("embedded", seed=7)
    assert settings("--recipe", "embedded", "--seed", "7") == recipe("embedded", seed=7)
    assert settings("--config", str(file)) == Config(model="here", seed=3, num_generations=5)
    assert settings("--config", str(file), "--seed", "7") == Config(model="here", seed=7, num_generations=5)
    both = settings("--recipe", "embedded", "--config", str(file))
    assert both == recipe("embedded", model="here", seed=3, num_generations=5)
    assert settings("--model", "there") == Config(model="there"), "another model does not get the recipe's settings"
    named = ("--recipe", "embedded"), ("--config", str(file)), ("--model", "embedded")
    assert all("model" in settings(*given).model_fields_set for given in named)
    assert "model" not in settings().model_fields_set, "train says that nobody named one"


@pytest.mark.parametrize(
    "values",
    [
        {
            "system_prompt": 'Say "yes",\nor --no: [it] is = "1"',
            "reward_funcs": ["accuracy", "my.module:score"],
            "reward_weights": [1.0, 1e-7 / 3],
            "reward_range": [-0.5, 1.1],
            "stop": ["</answer>", "\n\n", "--stop", "a,b"],
            "learning_rate": 1e-6 / 3,
            "max_tokens": 1e18,
            "sinks": ["console", "tensorboard"],
            "output_dir": "runs/some where",
            "chat_template_kwargs": {"thinking": False, "level": "3", "share": 0.5, "tools": [{"name": "a", "of": [1, 2]}]},
        },
        {"sinks": [], "shuffle": False, "report": False, "seed": 0, "log_completions": 0, "stop": ["1", "true"]},
        {"reward_funcs": "accuracy", "sinks": "tensorboard", "stop": "a b, [c]"},
    ],
    ids=["much", "nothing", "alone"],
)
def test_a_file_means_the_same_as_in_python(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    assert settings("--config", str(file)) == Config.from_toml(file) == Config.parse(values)


@pytest.mark.parametrize(
    "line", ["--reward-funcs accuracy format --seed 3", "--reward-funcs accuracy --seed 3 --reward-funcs format"]
)
def test_several_values_stand_behind_one_flag_or_behind_one_each(line: str) -> None:
    found = settings(*line.split())
    assert (found.reward_funcs, found.seed) == (("accuracy", "format"), 3)


def test_lists_and_switches_on_the_command_line() -> None:
    found = settings("--stop", "a", "--stop", "b", "--no-shuffle", "--reward-range", "0", "1", "--sinks", "tensorboard")
    assert found == recipe("embedded", stop=("a", "b"), shuffle=False, reward_range=(0.0, 1.0), sinks=("tensorboard",))


def test_every_recipe_is_a_configuration() -> None:
    assert "embedded" in recipe_names()
    for name in recipe_names():
        assert settings("--recipe", name) == recipe(name)


def test_objects_are_json_on_the_command_line_and_take_the_place_of_a_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("chat_template_kwargs = {level = 3, thinking = true}\n", encoding="utf-8")
    assert settings("--config", str(file)).chat_template_kwargs == {"level": 3, "thinking": True}
    given = settings("--config", str(file), "--chat-template-kwargs", '{"thinking": false}')
    assert given.chat_template_kwargs == {"thinking": False}
    file.write_text("[chat_template_kwargs]\ndate_string = 2024-07-26\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r'^chat_template_kwargs: holds the date .* put it in quotes: "2024-07-26"'):
        settings("--config", str(file))
    with pytest.raises(ConfigError, match=r"""^--chat-template-kwargs.a-b: .* --chat-template-kwargs '{"a_b": \.\.\.}'$"""):
        settings("--chat-template-kwargs.a-b", "false")


def test_a_checkpoint_is_evaluated_with_its_runs_settings_and_any_other_model_with_none(tmp_path: Path) -> None:
    def of(*arguments: str) -> Config:
        return settings(*arguments, command="evaluate")

    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    own = Config(model="base", seed=3, eval_size=7)
    (run / "config.toml").write_text(own.to_toml(), encoding="utf-8")
    assert of(str(run / "checkpoint-2")) == of(str(run)) == own
    assert of(str(run), "--eval-size", "9") == own.replace(eval_size=9)
    with pytest.raises(ConfigError, match=rf"leave out --model, or .* `grpo-fast evaluate other --config {run}/config.toml`$"):
        of(str(run / "checkpoint-2"), "--model", "other")
    adapters = own.replace(use_peft=True)
    (run / "config.toml").write_text(adapters.to_toml(), encoding="utf-8")
    assert of(str(run), "--model", "elsewhere") == adapters.replace(model="elsewhere"), "their base, which has moved"
    assert of("embedded") == recipe("embedded")
    assert of("owner/name", "--dataset", "countdown") == Config(model="owner/name", dataset="countdown")
    file = tmp_path / "mine.toml"
    file.write_text('model = "here"\nseed = 3\n', encoding="utf-8")
    assert of("embedded", "--config", str(file)) == Config(model="embedded", seed=3)
    assert of("owner/name", "--recipe", "embedded") == recipe("embedded", model="owner/name")
    with pytest.raises(ConfigError, match="is evaluated with its run's configuration; leave out --recipe"):
        of(str(run), "--recipe", "embedded")
    with pytest.raises(ConfigError, match="--model b: the model to evaluate is the argument, a; leave out --model"):
        of("a", "--model", "b")
