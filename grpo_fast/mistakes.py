"""Error messages for a wrong command line: one sentence that names the value and the fix."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb

from cyclopts import CycloptsError, Token
from cyclopts.exceptions import (
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)
from pydantic import ValidationError as ConfigValidationError
from rich.console import Console

from grpo_fast.config import Config
from grpo_fast.explain import explain
from grpo_fast.trl_names import here

_FOR_SYNCS = "`grpo-fast serve` sets it, as weight syncs need it"
SET_BY_SERVE = {
    "host": "the server listens on 127.0.0.1 alone, because vLLM's routes that change weights know no API key",
    "load_format": _FOR_SYNCS,
    "weight_transfer_config": "`grpo-fast serve --transport` sets it",
    "enable_scale_out": _FOR_SYNCS,
    "logprobs_mode": _FOR_SYNCS,
    "max_logprobs": _FOR_SYNCS,
}
"""Options of vLLM's server that are refused behind ``--`` too, and why."""
_SWITCH_VALUES = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def in_words(error: CycloptsError) -> str:
    """The message for a command line that could not be read.

    Args:
        error: what cyclopts found.
    """
    cause = error.__cause__
    if isinstance(cause, ConfigValidationError):
        return "\n".join(explain(item, known=Config.model_fields) for item in cause.errors())
    if isinstance(error, UnknownOptionError) and error.token is not None:
        return _unknown(error, error.token)
    if isinstance(error, UnknownCommandError) and error.unused_tokens and error.unused_tokens[0].startswith("-"):
        return f"{error.unused_tokens[0]} belongs behind a command, as in `grpo-fast train {error.unused_tokens[0]} ...`"
    if isinstance(error, ValidationError) and error.argument is not None:
        return f"{error.argument.name} {error.argument.value}: {error.exception_message}"
    if isinstance(error, MissingArgumentError) and error.tokens_so_far:
        return f"{error} Separate values by spaces; given was {' '.join(error.tokens_so_far)!r}."
    return _unused(error.unused_tokens or []) if isinstance(error, UnusedCliTokensError) else str(error)


def of_file(error: OSError) -> str:
    """The message for a file that cannot be read or written: its name, the system's reason, and the fix where one is known."""
    name = error.filename if error.filename is not None else _stream_of(error)
    named = f"{name}: {error.strerror}" if name is not None and error.strerror else str(error)
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"{named}; make room on that disk, then repeat the command: what was written before is whole"
    if error.errno == errno.EROFS:
        return f"{named}; name a place on another one"
    closed = _closed(Path(error.filename)) if error.errno == errno.EACCES and isinstance(error.filename, str) else None
    return named if closed is None else f"{named}; {closed}"


def _stream_of(error: OSError) -> str | None:
    """The console that failed to print, and the file that it is: errors of standard streams name none."""
    for frame, _ in walk_tb(error.__traceback__):
        console = frame.f_locals.get("self")
        if isinstance(console, Console):
            place = ""
            with suppress(OSError):  # there may be no /proc
                place = f" ({Path(f'/proc/self/fd/{2 if console.stderr else 1}').readlink()})"
            return f"standard {'error' if console.stderr else 'output'}{place}"
    return None


def _closed(path: Path) -> str | None:
    """The outermost place on the way to a file that this user may not enter or use, and how to open it."""
    whole, is_there = path.absolute(), os.path.exists  # Path.exists raises in a closed directory
    needs = [(place, os.X_OK) for place in reversed(whole.parents)] + [(whole, os.R_OK | os.W_OK), (whole.parent, os.W_OK)]
    place = next((place for place, need in needs if is_there(place) and not os.access(place, need)), None)
    if place is None:
        return None
    if place.stat().st_uid != os.geteuid():
        return f"{place} belongs to another user, who may open it; or name another place"
    return f"open {place} with `chmod u+rwX {place}`, or name another place"


def _unknown(error: UnknownOptionError, token: Token) -> str:
    told = here((token.keyword or "").lstrip("-").replace("-", "_"))
    if told:
        return f"Unknown option: {token.keyword}{told}"
    return _not_of_serve(error, token.value) if error.command_chain == ("serve",) else str(error)


def _not_of_serve(error: UnknownOptionError, option: str) -> str:
    reason = SET_BY_SERVE.get(option.partition("=")[0].lstrip("-").replace("-", "_"))
    if reason is not None:
        return f"{option} is refused: {reason}; leave it out"
    return f"{error} Options of vLLM itself go after --: grpo-fast serve MODEL -- {option} ..."


def _unused(tokens: list[str]) -> str:
    first = tokens[0] if tokens else ""
    if first.lower() in _SWITCH_VALUES:
        return f"{first!r} belongs to no option: a switch takes no value; write --NAME, or --no-NAME for the opposite"
    listed = ", ".join(map(repr, tokens))
    return f"{listed} {'belongs' if len(tokens) == 1 else 'belong'} to no option; quote a value that has spaces in it"
