"""The command line: thin, no logic of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, ArgumentCollection, CycloptsError, Group, Parameter, Token
from cyclopts import config as cyclopts_config
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from grpo_fast import __version__
from grpo_fast.config import Config, ConfigError, explain, read_toml
from grpo_fast.recipes import recipe_values
from grpo_fast.types import TrainingError

_SOURCE = Group("Where the configuration comes from", sort_key=0)
_FAILED = 1


def _fill(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills what the command line leaves open: from the run to resume, or else from a recipe and a TOML file."""
    if commands != ("train",):
        return

    def given(name: str) -> str | None:
        tokens = arguments[name].tokens
        return tokens[-1].value if tokens else None

    recipe, file, resume = given("--recipe"), given("--config"), given("--resume")
    if resume is not None:
        if recipe is not None or file is not None:
            raise ConfigError("--resume uses the run's own configuration; leave out --recipe and --config")
        values = read_toml(Path(resume) / "config.toml")
    else:
        bare = file is None and given("--model") is None
        values = recipe_values(recipe or "embedded") if recipe is not None or bare else {}
        values |= read_toml(file) if file is not None else {}
    Config.parse(values)
    # under the command's name: a bare "report" would be taken for the command of that name and be left out
    cyclopts_config.Dict({"train": values}, source="the configuration")(app, commands, arguments)
    for key, value in values.items():
        argument = arguments[f"--{key.replace('_', '-')}"]
        if value == [] and not argument.tokens:  # an empty list makes no tokens, and would leave the default
            argument.append(Token(keyword=argument.name, source="the configuration", implicit_value=()))


app = App(
    name="grpo-fast",
    version=__version__,
    help="Train reasoning models with GRPO, meter the compute, and stop when the law sees the plateau.",
    help_format="restructuredtext",
    default_parameter=Parameter(negative_iterable=()),
    config=(_fill,),
    result_action="return_value",
)


@app.command
def train(
    *,
    recipe: Annotated[str | None, Parameter(group=_SOURCE)] = None,
    config: Annotated[Path | None, Parameter(group=_SOURCE)] = None,
    resume: Annotated[Path | None, Parameter(group=_SOURCE)] = None,
    settings: Annotated[Config, Parameter(name="*")] = Config(),  # noqa: B008 (frozen)
) -> int:
    """Train a model with GRPO.

    Settings come from a recipe, then a TOML file, then the flags below; the last one wins. Without any of them, and without
    ``--model``, the embedded model is trained.

    Args:
        recipe: A named configuration of the package, such as ``embedded``.
        config: A TOML file of the settings below (underscores in place of hyphens).
        resume: Go on with this run, from its newest checkpoint; its own configuration is used, and flags may change its limits.
        settings: The configuration.
    """
    del recipe, config  # already in the settings
    from grpo_fast.train import GRPOTrainer  # noqa: PLC0415 (--help must not wait for torch)

    with GRPOTrainer.resume(resume, config=settings) if resume is not None else GRPOTrainer(settings) as trainer:
        summary = trainer.train()
        run = trainer.config.output_dir
    console = Console()
    console.print(f"[bold]{escape(summary['reason'])}[/]", highlight=False, soft_wrap=True)
    return report(run) if settings.report else 0


@app.command
def report(run: Path) -> int:
    """Write ``report.html`` and its pictures for a run, finished or not.

    Args:
        run: Directory of the run.
    """
    from grpo_fast.report import write_report  # noqa: PLC0415 (matplotlib is slow to import)

    Console().print(f"wrote {write_report(run)}")
    return 0


@app.command
def doctor() -> int:
    """Say what is installed, what is missing for which feature, and how to mend it."""
    from grpo_fast.report.doctor import doctor as examine  # noqa: PLC0415 (each command imports what it needs)

    return examine(Console())


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors that the user can mend are one message without a traceback, exit code 1."""
    try:
        sys.exit(app(arguments, exit_on_error=False, print_error=False))
    except CycloptsError as error:
        cause = error.__cause__
        found = "\n".join(map(explain, cause.errors())) if isinstance(cause, ValidationError) else str(error)
        _fail(found)
    except (ValueError, OSError, TrainingError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped at once; `grpo-fast train --resume RUN` goes on from the newest checkpoint")


def _fail(message: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(_FAILED)
