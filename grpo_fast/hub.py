"""Checks whether the hub can be reached before anything is read from it.

``huggingface_hub`` tries every file six times over half a minute where there is no network, and has no setting for it. If the
hub is out of reach, only its cache is read. A network that is slow, or a hub that answers with an error, counts as reached.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import constants, get_session
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

READ_ERRORS = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)
"""Errors of transformers where a model cannot be read."""
WHERE_MODELS_ARE = "Give a directory with config.json, safetensors and tokenizer, or a hub id that this machine can reach"

_CONNECT_S = 10.0
_TRIES_S = (0.0, 1.0, 2.0)  # waits before each: a resolver may fail once
_NO_WAY = {"ConnectError", "ConnectTimeout"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where transformers finds a model: a directory, or the hub, of which only the cache is read if it is out of reach."""

    name: str
    """Directory or hub id."""
    revision: str | None = None
    unreached: str | None = None
    """Why the hub cannot be asked; ``None`` if it can be, or need not be."""

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> Self:
        """The place of a name; the hub is tried unless it is a directory."""
        return cls(name, revision, None if Path(name).is_dir() else out_of_reach())

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained``."""
        return {
            "pretrained_model_name_or_path": self.name,
            "revision": self.revision,
            "local_files_only": self.unreached is not None,
        }


def out_of_reach() -> str | None:
    """The reason why the hub cannot be reached; ``None`` if it can be, or if ``HF_HUB_OFFLINE`` forbids asking."""
    if constants.HF_HUB_OFFLINE:
        return None
    reason = None
    begin = time.monotonic()
    for wait_s in _TRIES_S:
        if time.monotonic() - begin >= _CONNECT_S:  # a firewall that answers nothing takes all of it the first time
            break
        time.sleep(wait_s)
        reason = _try()
        if reason is None:
            return None
    return f"{constants.ENDPOINT} cannot be reached ({reason})"


def why_unread(error: Exception, unreached: str | None) -> str:
    """The reason why transformers could not read a model, in a sentence.

    Args:
        error: what it raised.
        unreached: what :func:`out_of_reach` said, where only the cache was read.
    """
    told = str(error.__cause__ if isinstance(error, StrictDataclassError) else error).strip().splitlines()
    reason = told[0] if told else type(error).__name__
    if unreached is None:
        return reason
    lacking = "couldn't connect" in reason or "couldn't find" in reason
    return f"{unreached}, and {'no copy of it is in the cache.' if lacking else f'its copy says: {reason}'}"


def _try() -> str | None:
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_S)
    except Exception as error:  # the client is httpx's or its successor's, by the version of huggingface_hub
        if type(error).__name__ in _NO_WAY:
            return str(error) or type(error).__name__
    return None
