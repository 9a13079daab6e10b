"""The command ``grpo-fast evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter
from rich.console import Console
from rich.markup import escape

from grpo_fast.cli_files import ToWrite
from grpo_fast.cli_tables import print_json, print_notes, print_table, print_written
from grpo_fast.config import Config

if TYPE_CHECKING:
    from grpo_fast.train.evaluate_model import Estimate, Evaluation

_SOURCE = Group("Where the configuration comes from", sort_key=0)
_EVALUATE = Group("Evaluate", sort_key=0.5)


def evaluate(
    source: str,
    /,
    *,
    recipe: Annotated[str | None, Parameter(group=_SOURCE)] = None,
    config: Annotated[Path | None, Parameter(group=_SOURCE)] = None,
    output: Annotated[ToWrite | None, Parameter(group=_EVALUATE)] = None,
    json: Annotated[bool, Parameter(group=_EVALUATE, negative="")] = False,
    settings: Annotated[Config, Parameter(name="*")] = Config(),  # noqa: B008 (frozen)
) -> int:
    """Measure the rewards of a checkpoint, or of any model, on held-out prompts.

    Settings are those of ``train``. For a run or one of its checkpoints they come from the run, so that the prompts are those
    that it never trained on; else from a recipe, a TOML file and the flags below. ``--eval-size`` sets the number of prompts,
    ``--eval-split`` where they come from, ``--num-generations-eval`` and ``--eval-temperature`` how they are answered: by
    default once each, and greedily.

    Args:
        source: A run, a checkpoint of one, the directory of a model or of adapters, a hub id, or ``embedded``.
        recipe: A named configuration of the package, such as ``embedded``.
        config: A TOML file of the settings below.
        output: Write all completions with their rewards to this JSON lines file.
        json: Print one JSON object instead of the table.
        settings: The configuration.
    """
    del recipe, config  # already in the settings
    from grpo_fast.train.evaluate_model import evaluate_model  # noqa: PLC0415 (--help must not wait for torch)

    found = evaluate_model(settings, source)
    if output is not None:
        found.write_completions(output)
    if json:
        print_json(found.to_dict())
        return 0
    console = Console()
    _tell(console, found)
    print_notes(console, found.problems)
    print_written(console, output)
    return 0


def _tell(console: Console, found: Evaluation) -> None:
    each = len(found.lengths) // len(found.groups)
    answered = f"{each} completion{'' if each == 1 else 's'} each"
    sampled = f"at temperature {found.temperature:g}" if found.temperature else "greedily"
    prompts = f"{len(found.groups)} held-out prompt{'' if len(found.groups) == 1 else 's'}"
    console.print(
        f"[bold]{escape(found.model)}[/] on {escape(found.dataset)}: {prompts}, {answered}, {sampled}",
        highlight=False,
        soft_wrap=True,
    )
    rows = [(name, *_row(estimate)) for name, estimate in {"reward": found.reward, **found.rewards}.items()]
    print_table(console, ("", "mean", "standard error", "completions with a value"), rows)
    console.print(
        f"completions have {sum(found.lengths) / len(found.lengths):.1f} tokens on average, {max(found.lengths)} at most; "
        f"{found.truncated_share:.0%} were cut at {found.max_completion_length}",
        highlight=False,
        soft_wrap=True,
    )


def _row(estimate: Estimate) -> tuple[str, str, str]:
    mean, error = ("unknown" if math.isnan(value) else f"{value:.4f}" for value in (estimate.mean, estimate.error))
    return mean, error, str(estimate.num_values)
