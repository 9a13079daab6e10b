"""How a command ends: what it says then, and its exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from cyclopts import CycloptsError
from rich.console import Console
from rich.markup import escape

from grpo_fast.mistakes import in_words, of_file
from grpo_fast.run_dir import CONFIG_FILE
from grpo_fast.types import TrainingError


def tell_outcome(run: Path, summary: Mapping[str, Any], *, has_adapters: bool) -> None:
    """Prints why a run ended, and the model to use.

    Args:
        run: the run's directory.
        summary: of the run.
        has_adapters: whether these were trained.
    """
    console = Console()
    console.print(f"[bold]{escape(summary['reason'])}[/]", highlight=False, soft_wrap=True)
    if summary["use"] is not None:
        use = summary["use"]
        told = f"the model to use: {run / use['checkpoint']} ({use['by']} {use['reward']:.3f})"
        if has_adapters:
            told += f"; its adapters are merged by `grpo-fast export {run} --output DIRECTORY`"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


def after_end(run: Path, *, has_step: bool) -> str:
    """What a signal means that came when the run was over."""
    return f"the run in {run} had ended and is saved" + (f"; `grpo-fast report {run}` writes its report" if has_step else "")


def after_interrupt(run: Path, *, older: int | None) -> str:
    """What a signal means that came before the end.

    Args:
        run: the run's directory.
        older: :func:`begun_at` of a run there that was to be overwritten.
    """
    begun = begun_at(run)
    if begun is None:
        return f"the run in {run} had not started"
    if begun == older:
        return f"the run in {run} had not started, and the one that it was to overwrite is as it was"
    return f"`grpo-fast train --resume {run}` continues from its newest checkpoint, or from the start if it has none"


def begun_at(run: Path) -> int | None:
    """When the run began, by its configuration's file; ``None`` where there is none."""
    return (run / CONFIG_FILE).stat().st_mtime_ns if (run / CONFIG_FILE).exists() else None


@contextmanager
def telling() -> Iterator[None]:
    """Ends the process with one message where something inside fails that the user can fix."""
    try:
        yield
    except CycloptsError as error:
        fail(in_words(error))
    except (ValueError, OSError, FloatingPointError, TrainingError) as error:
        if hasattr(error, "told_elsewhere") and os.environ.get("LOCAL_RANK") != "0":
            sys.exit(1)  # another rank tells it, and the first one of each node
        fail(of_file(error) if isinstance(error, OSError) else str(error))


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Ends the process with a message."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


def code_of(number: signal.Signals) -> int:
    """The exit code of a command that a signal has ended, as a shell reports it."""
    return 128 + number
