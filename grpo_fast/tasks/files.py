"""A user's own data: a file, a directory, or a dataset of the hub, read by the ``datasets`` library."""

from __future__ import annotations

import difflib
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks.task import Task

BUILT_IN = ("arithmetic", "countdown", "gsm8k", "reasoning_gym:TASK")
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_MAX_HELD_OUT = 0.2


def file_task(config: Config) -> Task:
    """Reads ``config.dataset`` and holds rows out.

    Held-out rows are ``eval_split`` where it is named, otherwise ``eval_size`` rows (at most a fifth) drawn from the training split.

    Raises:
        ConfigError: nothing there, no rows, no ``prompt`` column, or no reward named and no ``answer`` to check.
    """
    train = _read(config, config.dataset_split)
    _check(train, config)
    if config.eval_split is not None:
        held_out = _read(config, config.eval_split)
        _check(held_out, config)
    elif config.eval_steps:
        parts = train.train_test_split(test_size=_held_out_rows(len(train), config.eval_size), seed=config.seed)
        train, held_out = parts["train"], parts["test"]
    else:
        held_out = train.select([])
    rewards = config.reward_funcs or ("accuracy",)
    return Task(config.dataset, train, held_out, reward_funcs=rewards, eval_reward=rewards[0])


def read_hub(name: str, subset: str | None, split: str) -> Dataset:
    """A split of a dataset on the hub.

    Raises:
        ConfigError: it does not exist or cannot be reached.
    """
    try:
        return load_dataset(name, subset, split=split)
    except Exception as error:  # datasets raises whatever its readers and the network raise
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        lines = str(error).strip().splitlines()
        raise ConfigError(
            f"cannot load dataset {name!r}: {lines[0] if lines else type(error).__name__}.{hint} Give {', '.join(BUILT_IN)}, a hub id "
            "that this machine can reach, or a directory, parquet or JSONL file."
        ) from error


def _read(config: Config, split: str) -> Dataset:
    path = Path(config.dataset)
    if path.suffix in _FORMATS:
        if not path.is_file():
            raise ConfigError(f"dataset {path} does not exist")
        return _read_files(_FORMATS[path.suffix], [path])
    if not path.is_dir():
        return read_hub(config.dataset, config.dataset_config, split)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        saved = load_from_disk(str(path))
        return _pick(saved, split, path) if isinstance(saved, DatasetDict) else saved
    for suffix, form in _FORMATS.items():
        files = sorted(path.rglob(f"*{suffix}"))
        of_split = [file for file in files if split in file.stem.split("-") + [file.parent.name]]
        if files:
            return _read_files(form, of_split or files)
    raise ConfigError(f"dataset {path} holds neither a saved dataset nor parquet, JSONL or CSV files")


def _read_files(form: str, files: list[Path]) -> Dataset:
    try:
        return load_dataset(form, data_files=[str(file) for file in files], split="train")
    except Exception as error:
        raise ConfigError(f"cannot read {', '.join(map(str, files))} as {form}: {str(error).strip() or error!r}") from error


def _pick(saved: DatasetDict, split: str, path: Path) -> Dataset:
    if split not in saved:
        raise ConfigError(f"dataset {path} has no split {split!r}; it has {', '.join(map(repr, saved))}")
    return saved[split]


def _check(rows: Dataset, config: Config) -> None:
    if len(rows) == 0:
        raise ConfigError(f"dataset {config.dataset} is empty")
    if "prompt" not in rows.column_names:
        columns = ", ".join(map(repr, rows.column_names))
        raise ConfigError(
            f"dataset {config.dataset} has no column 'prompt'; it has {columns}. Rename the one that holds the prompts"
        )
    if not config.reward_funcs and "answer" not in rows.column_names:
        raise ConfigError(
            f"dataset {config.dataset} has no column 'answer' to check, so no reward can be chosen; name reward_funcs, such as "
            "'module:function'"
        )


def _held_out_rows(available: int, wanted: int) -> int:
    return max(1, min(wanted, int(available * _MAX_HELD_OUT)))
