"""Processes that begin with vLLM and the trainer imported, which takes each of them 15 s of processor time otherwise."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOADED = "tests.rollout.preloaded"
_LIMIT_S = 400
"""A rank that takes longer hangs: it ends, and says where it was."""


def start(work: Callable[..., None], *arguments: Any, log: Path) -> BaseProcess:
    """Starts a fork of the fork server, which the first call starts; what it prints goes to ``log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    process = context.Process(target=_run, args=(log, work, arguments))
    process.start()
    return process


def _run(log: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    assert _PRELOADED in sys.modules, "the fork server could not import it"
    work(*arguments)


def ranks(number: int, words: list[str]) -> None:
    """``grpo-fast`` in several ranks, which torchrun's agent starts in forks of this process."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, number, max_restarts=0, start_method="fork", run_id="ranks", **where)
    elastic_launch(config, _rank)(words)


def _rank(words: list[str]) -> None:
    from grpo_fast.cli import main

    faulthandler.enable()
    faulthandler.dump_traceback_later(_LIMIT_S, exit=True)
    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise
