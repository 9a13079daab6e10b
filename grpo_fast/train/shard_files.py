"""Directories of ``torch.distributed.checkpoint``: each rank writes its part, and any number of ranks reads them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from grpo_fast.types import TrainingError


class ShardsError(TrainingError):
    """A rank cannot write or read its part; the message names rank and cause."""


def save_shards(state: dict[str, Any], directory: Path, *, alone: bool = False) -> None:
    """Writes what every rank holds.

    Args:
        state: tensors, shards among them, and plain values, in dictionaries.
        directory: the same for all ranks.
        alone: whether this rank writes all of it, and the others do not call this.

    Raises:
        ShardsError: a rank could not; raised on all.
    """
    with _in_plain_words():
        save(state, checkpoint_id=directory, no_dist=alone)


def load_shards(state: dict[str, Any], directory: Path) -> None:
    """Puts back what any number of ranks wrote, in place; every rank has to call it.

    Raises:
        ShardsError: a rank could not; raised on all.
    """
    with _in_plain_words():
        load(state, checkpoint_id=directory, no_dist=not dist.is_initialized())


def missing_shards(directory: Path) -> list[str]:
    """Names of files that what is saved in a directory consists of, and that are not in it; none where nothing is saved."""
    if not directory.is_dir():
        return []
    parts = {stored.relative_path for stored in FileSystemReader(directory).read_metadata().storage_data.values()}
    return sorted(name for name in parts if not (directory / name).is_file())


@contextlib.contextmanager
def _in_plain_words() -> Iterator[None]:
    """Torch's own error, which all ranks raise, holds the tracebacks of those that failed, and is no ``Exception``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may well read what several wrote
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise ShardsError(f"rank {rank}: {type(cause).__name__}: {cause}") from error
