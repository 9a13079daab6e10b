"""Reads one split of a dataset through the ``datasets`` library, and says in one sentence why it cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)

from grpo_fast.config import ConfigError

FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
"""Reader of ``datasets`` by the ending of a file's name."""


def read_hub(repository: str, *, name: str | None, split: str, instead: str) -> Dataset:
    """Reads a split of a hub dataset, from the local cache where there is no network (or ``HF_HUB_OFFLINE=1``).

    Args:
        repository: ``owner/name``.
        name: named configuration of the dataset.
        split: a split, also a part of one (``train[:1000]``).
        instead: what to do without the hub, for the error message.

    Raises:
        ConfigError: it cannot be fetched, or has no such configuration or split.
    """
    try:
        return load_dataset(repository, name=name, split=split)
    except Exception as error:
        raise ConfigError(
            f"cannot read the hub dataset {repository!r} (configuration {name!r}, split {split!r}): {_reason(error)}. "
            f"Without the hub, {instead}"
        ) from error


def read_files(files: Mapping[str, Path], *, split: str) -> Dataset:
    """Reads a split of local files, all of one kind.

    Args:
        files: one ``.parquet``, ``.jsonl`` or ``.json`` file by the name of its split.
        split: one of them, or a part of one.

    Raises:
        ConfigError: a file is missing, of another kind, broken or empty, or there is no such split.
    """
    for path in files.values():
        if path.suffix not in FILE_BUILDERS:
            raise ConfigError(f"dataset file {path} is none of {', '.join(FILE_BUILDERS)}; convert it to one of these")
        if not path.is_file():
            raise ConfigError(f"there is no dataset file {path}; check the path")
        if path.stat().st_size == 0:
            raise ConfigError(f"the dataset file {path} is empty; give one with rows")
    shown = ", ".join(str(path) for path in files.values())
    builder = FILE_BUILDERS[next(iter(files.values())).suffix]
    try:
        with _quiet():
            return load_dataset(builder, data_files={name: str(path) for name, path in files.items()}, split=split)
    except Exception as error:
        raise ConfigError(f"cannot read split {split!r} of {shown}: {_reason(error)}") from error


def read_directory(directory: Path, *, name: str | None, split: str) -> Dataset:
    """Reads a split of a directory: written by ``save_to_disk``, or holding parquet or JSONL files.

    Args:
        directory: where it is.
        name: named configuration, where the directory declares any.
        split: a split; a part of one only where the directory holds parquet or JSONL files.

    Raises:
        ConfigError: it holds no data, broken data, or has no such split.
    """
    try:
        with _quiet():
            if (directory / "dataset_dict.json").exists() or (directory / "state.json").exists():
                saved = load_from_disk(str(directory))
                return saved[split] if isinstance(saved, DatasetDict) else _only_split(saved, split)
            return load_dataset(str(directory.resolve()), name=name, split=split)
    except Exception as error:
        raise ConfigError(f"cannot read split {split!r} of the directory {directory}: {_reason(error)}") from error


def evenly(table: Dataset, count: int) -> Dataset:
    """At most ``count`` rows, spread evenly and in order, so that a sorted table is represented too."""
    size = len(table)
    return table if size <= count else table.select([row * size // count for row in range(count)])


def _only_split(saved: Dataset, split: str) -> Dataset:
    own = str(saved.split or "train")
    if split not in {own, "train"}:
        raise ValueError(f'Unknown split "{split}". Should be one of {[own]}')
    return saved


def _reason(error: Exception) -> str:
    """The first line of the exception that says most."""
    if isinstance(error, IndexError):  # what `load_from_disk` makes of a saved table without shards
        return f"it seems to have no rows ({error})"
    if isinstance(error, KeyError):
        return f"there is no {error}"
    told = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    lines = str(told).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(told).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: local files are read in a moment, and the console is the run's."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
