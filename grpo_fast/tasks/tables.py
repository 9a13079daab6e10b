"""Reads one split of a dataset through the ``datasets`` library, and says in one sentence why it cannot."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)

from grpo_fast.config import ConfigError
from grpo_fast.hub import out_of_reach
from grpo_fast.tasks.task import FILE_BUILDERS

_DIGITS_OF_64_BITS = 20
_PART_BYTES = 1 << 20
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_OTHER_SEPARATORS = (";", "\t", ",", "|")


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
    unreached = out_of_reach()
    try:
        with contextlib.nullcontext() if unreached is None else _cached_alone():
            return load_dataset(repository, name=name, split=split)
    except Exception as error:
        reason = _reason(error) if unreached is None else f"{unreached}, and no copy of it is in the cache"
        raise ConfigError(
            f"cannot read the hub dataset {repository!r} (configuration {name!r}, split {split!r}): {reason}. "
            f"Without the hub, {instead}"
        ) from error


def read_files(files: Mapping[str, Path], *, split: str) -> Dataset:
    """Reads a split of local files, all of one kind.

    Args:
        files: one ``.parquet``, ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file by the name of its split.
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
    first = next(iter(files.values()))
    builder = FILE_BUILDERS[first.suffix]
    paths = {name: str(path) for name, path in files.items()}
    try:
        for path in files.values() if builder == "json" else ():
            _check_encoding(path)
        with _quiet():
            return load_dataset(builder, data_files=paths, split=split, **_text_options(first))
    except Exception as error:
        texts = files.values() if builder == "json" and not isinstance(error, UnicodeDecodeError) else ()
        wrong = filter(None, map(_wrong_line, texts))
        raise ConfigError(f"cannot read split {split!r} of {shown}: {next(wrong, _reason(error))}") from error


def _check_encoding(path: Path) -> None:
    """Raises a UnicodeDecodeError for JSON that is not in UTF-8, which its reader takes, to fail at the cell that is read."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            decoder.decode(part)
    decoder.decode(b"", final=True)


def _wrong_line(path: Path) -> str:
    """Which line of JSON cannot be read, and why; empty if each can."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    is_array = path.suffix == ".json" and text.lstrip().startswith("[")
    for before, part in enumerate([text] if is_array else text.split("\n")):
        try:
            if part.strip():
                json.loads(part, parse_int=_within_64_bits)
        except json.JSONDecodeError as error:
            return f"JSON parse error in line {before + error.lineno}: {error.msg} (character {error.colno})"
        except ValueError as error:
            return str(error) if is_array else f"{error} (line {before + 1})"
    return ""


def _within_64_bits(digits: str) -> int:
    if len(digits) > _DIGITS_OF_64_BITS or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the number {digits[:_DIGITS_OF_64_BITS]}... has more than 64 bits; write it as text, in quotes")
    return int(digits)


def _text_options(path: Path) -> dict[str, Any]:
    """Reader options for tables of text: every cell stays text, since a guessed type would turn the answer 007 into 7."""
    separator = _SEPARATORS.get(path.suffix)
    if separator is None:
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        heads = next(csv.reader(file, delimiter=separator), [])
    twice = [head for head in dict.fromkeys(heads) if heads.count(head) > 1]
    if twice:
        raise ValueError(f"it has the column {twice[0]!r} twice; rename one")
    other = next((mark for mark in _OTHER_SEPARATORS if len(heads) == 1 and mark != separator and mark in heads[0]), None)
    if other is not None:
        ending = "a .tsv file, or with commas" if other == "\t" else f"with {'commas' if separator == ',' else 'tabs'}"
        raise ValueError(f"its first line, {heads[0]!r:.60}, separates columns by {other!r}; write it {ending}")
    return {"sep": separator, "keep_default_na": False, "features": Features({head: Value("string") for head in heads})}


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
                return _chosen(saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}, split)
            for path in directory.rglob("*"):
                if FILE_BUILDERS.get(path.suffix) == "json":
                    _check_encoding(path)
            return load_dataset(str(directory.resolve()), name=name, split=split, **_options_of(directory))
    except Exception as error:
        raise ConfigError(f"cannot read split {split!r} of the directory {directory}: {_reason(error)}") from error


def _options_of(directory: Path) -> dict[str, Any]:
    """Reader options for a directory that holds tables of text, all with the same columns, and no other data."""
    paths = [path for path in directory.rglob("*") if path.suffix in FILE_BUILDERS]
    options = [_text_options(path) for path in paths]
    return options[0] if options and all(option == options[0] for option in options) else {}


def evenly(size: int, count: int) -> Sequence[int]:
    """Numbers of at most ``count`` of ``size`` rows, spread evenly and in order: a sorted table is represented too."""
    return range(size) if size <= count else [row * size // count for row in range(count)]


def _chosen(saved: Mapping[str, Dataset], split: str) -> Dataset:
    """A split of what was saved; a single table is the training split, whatever it was called."""
    if split in saved:
        return saved[split]
    if len(saved) == 1 and split == "train" and not isinstance(saved, DatasetDict):
        return next(iter(saved.values()))
    raise ValueError(f"there is no split {split!r}; it has {', '.join(saved)}")


def _reason(error: Exception) -> str:
    """The first line of the exception that says most."""
    if isinstance(error, IndexError):  # what `load_from_disk` makes of a saved table without shards
        return f"it seems to have no rows ({error})"
    told = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    if "corresponds to no data" in str(told):  # what `datasets` makes of a file of blank lines
        return "it has no rows"
    if "column names don't match" in str(told):
        return "its files differ in their columns; give all the same, or name one file"
    if isinstance(told, UnicodeDecodeError):
        return f"it is not in UTF-8 ({told.reason}); save it in that encoding"
    lines = str(told).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(told).__name__


@contextlib.contextmanager
def _cached_alone() -> Iterator[None]:
    """Lets ``datasets`` use only what was read from the hub before."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


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
