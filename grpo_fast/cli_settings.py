"""Settings of a command from their sources: its flags, else a run to resume, else a recipe and a TOML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts import config as cyclopts_config

from grpo_fast.config import Config, ConfigError, read_toml
from grpo_fast.recipes import recipe_values
from grpo_fast.run_dir import CONFIG_FILE, no_run, run_of


def fill(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills settings that the command line does not give, from the run to resume, or from a recipe and a TOML file.

    Args:
        app: the command line.
        commands: the command that was given.
        arguments: its arguments, which are filled.

    Raises:
        ConfigError: the sources contradict each other, cannot be read or are invalid; an object is not given as JSON.
    """
    if commands not in {("train",), ("plan",), ("evaluate",)}:
        return

    def given(name: str) -> str | None:
        tokens = arguments[name].tokens
        return tokens[-1].value if tokens else None

    for keyed in (token.keyword for argument in arguments for token in argument.tokens if token.keys):
        # The value would be text, and "false" is true to a chat template.
        name, _, key = str(keyed).partition(".")
        raise ConfigError(f"""{keyed}: give an object as JSON: {name} '{{"{key.replace("-", "_")}": ...}}'""")
    recipe, file = given("--recipe"), given("--config")
    resume = given("--resume") if commands == ("train",) else None
    if resume is not None:
        if recipe is not None or file is not None:
            raise ConfigError("--resume uses the run's own configuration; leave out --recipe and --config")
        output = given("--output-dir")
        if output is not None and Path(output).absolute() != Path(resume).absolute():
            raise ConfigError(
                f"--resume {resume} with --output-dir {output}: a run is resumed in its own directory; leave --output-dir out "
                "(to keep the original, copy the directory and resume the copy)"
            )
        if not (Path(resume) / CONFIG_FILE).exists():
            raise ConfigError(no_run(Path(resume)))
        values = read_toml(Path(resume) / CONFIG_FILE)
    elif commands == ("evaluate",):
        values = _to_evaluate(given("SOURCE"), recipe, file, model=given("--model"))
    else:
        bare = file is None and given("--model") is None and (commands == ("train",) or given("--model-size") is None)
        values = recipe_values(recipe or "embedded") if recipe is not None or bare else {}
        if recipe is None:
            values.pop("model", None)  # the default; left out, so that the command can tell that nobody named a model
        values |= read_toml(file) if file is not None else {}
    Config.parse(values)
    # Values of a table would all become text. Under the command's name: a bare "report" would be taken for that command.
    texts = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}
    cyclopts_config.Dict({commands[0]: texts}, source="the configuration")(app, commands, arguments)


def _to_evaluate(source: str | None, recipe: str | None, file: str | None, *, model: str | None) -> dict[str, Any]:
    """Settings to evaluate a model with: its run's, else those of a recipe and a file."""
    run = None if source is None else run_of(Path(source))
    if run is not None:
        if recipe is not None or file is not None:
            raise ConfigError(f"{source} is evaluated with its run's configuration; leave out --recipe and --config")
        values = read_toml(run / CONFIG_FILE)
        if model is not None and not values.get("use_peft"):  # of adapters it is the base, which may have moved
            raise ConfigError(
                f"--model {model}: the model to evaluate is the argument, {source}; leave out --model, or evaluate another "
                f"model with this run's settings by `grpo-fast evaluate {model} --config {run / CONFIG_FILE}`"
            )
        return values
    if model is not None:
        raise ConfigError(f"--model {model}: the model to evaluate is the argument, {source}; leave out --model")
    if recipe is None and file is None and source == "embedded":
        recipe = "embedded"
    values = recipe_values(recipe) if recipe is not None else {}
    return values | (read_toml(Path(file)) if file is not None else {}) | ({} if source is None else {"model": source})
