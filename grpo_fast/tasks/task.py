"""The protocol of a task: prompts to train on, prompts held out, and how answers are rewarded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

if TYPE_CHECKING:
    from datasets import Dataset


FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
"""Reader of ``datasets`` by the ending of a file's name."""


class Rows(Protocol):
    """A table read by row: a ``datasets.Dataset`` or a list of mappings. Every row has a ``prompt``."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Row ``index`` as a mapping from column to value."""
        ...


def is_table(rows: Any) -> TypeGuard[Dataset]:
    """Whether rows are a ``datasets.Dataset``, which nothing is before that library was imported: it takes half a second."""
    if "datasets" not in sys.modules:
        return False
    from datasets import Dataset  # noqa: PLC0415 (see above)

    return isinstance(rows, Dataset)


@dataclass(frozen=True)
class Task:
    """Prompts and the rewards that go with them."""

    name: str
    train: Rows
    """Rows trained on."""
    eval: Rows
    """Rows held out; may be empty."""
    reward_funcs: tuple[str, ...]
    """Names the reward pool resolves (built-in or ``module:function``), used where the user names none."""
    eval_reward: str
    """The reward whose mean on held-out rows is the task's accuracy; empty if the training rewards measure held-out rows
    too."""
    train_numbers: Sequence[int] | None = None
    """Numbers of ``train``'s rows in the table that they were taken from, for errors; ``None`` where they are its own."""
    eval_numbers: Sequence[int] | None = None
    """The same of ``eval``'s."""
    reward_range: tuple[float, float] | None = None
    """Least and greatest reward of each of ``reward_funcs``, where known; that of built-in ones always is."""
