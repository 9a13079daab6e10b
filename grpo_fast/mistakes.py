"""Error messages for a wrong command line: one sentence that names the value and the fix."""

from __future__ import annotations

from cyclopts import CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnknownOptionError, UnusedCliTokensError
from pydantic import ValidationError

from grpo_fast.config import Config
from grpo_fast.explain import explain
from grpo_fast.trl_names import HERE

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
    if isinstance(cause, ValidationError):
        return "\n".join(explain(item, known=Config.model_fields) for item in cause.errors())
    if isinstance(error, UnknownOptionError) and error.token is not None:
        name = (error.token.keyword or "").lstrip("-").replace("-", "_")
        if name in HERE:
            return f"Unknown option: {error.token.keyword}, a TRL name; here it corresponds to {HERE[name]}"
        if error.command_chain == ("serve",):
            return _not_of_serve(error, error.token.value)
    if isinstance(error, UnusedCliTokensError):
        return _unused(error.unused_tokens or [])
    if isinstance(error, MissingArgumentError) and error.tokens_so_far:
        return f"{error} Separate values by spaces; given was {' '.join(error.tokens_so_far)!r}."
    return str(error)


def of_file(error: OSError) -> str:
    """The message for a file that cannot be read or written: its name, and the system's reason."""
    return str(error) if error.filename is None or not error.strerror else f"{error.filename}: {error.strerror}"


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
