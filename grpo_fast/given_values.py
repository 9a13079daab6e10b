"""What is made of values as people give them, before the configuration holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

BUILT_IN_DATASETS = ("arithmetic", "countdown", "gsm8k", "reasoning_gym")
"""Names that stand for a task of ours; a local directory of that name is given as ``./NAME``."""
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def _several(value: Any) -> Any:
    several = (value,) if isinstance(value, str) else value
    if isinstance(several, list | tuple) and "" in several:
        raise ValueError("an empty string stands for nothing; leave it out")
    return several


ONE_OR_SEVERAL = BeforeValidator(_several)
"""Of a field that holds several strings: one may stand alone; an empty one is refused."""


def _foreseeable(name: Any) -> Any:
    """A schedule's name, not of one that goes by what a run shows.

    Raises:
        ValueError: it does.
    """
    if name in _BY_METRIC:
        raise ValueError(
            "goes by a metric as it comes, and the forecast counts in learning rate spent, which must be known beforehand; "
            "take another, such as 'cosine' or 'warmup_stable_decay' (what a plateau does is forecast's to say)"
        )
    return name


SchedulerType = Annotated[
    Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
    ],
    BeforeValidator(_foreseeable),
]
"""Schedules of transformers, by its names, whose rates are known before the first step; ``constant`` warms up too."""


def expanded(path: Path) -> Path:
    """The path with ``~`` as the home directory.

    Raises:
        ValueError: nobody of that name has one.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(str(error).rstrip(".")) from None


def model_anywhere(name: str) -> str:
    """A model's directory as it is found from any folder; another name, as of a hub model, as it is."""
    return name if name == "embedded" else _anywhere(name, of_directory=True)


def dataset_anywhere(name: str) -> str:
    """The same of a dataset's file or directory, also of that in ``gsm8k:DIRECTORY``."""
    kind, colon, argument = name.partition(":")
    if kind not in BUILT_IN_DATASETS:
        return _anywhere(name)
    return kind + colon + _anywhere(argument, of_directory=True) if kind == "gsm8k" and argument else name


def _anywhere(name: str, *, of_directory: bool = False) -> str:
    path = expanded(Path(name))
    return str(path.absolute()) if name and (path.is_dir() if of_directory else path.exists()) else name


def refuse_switches(values: Any, fields: Mapping[str, FieldInfo]) -> Any:
    """The values, none of which is True or False for a number: Python would take them for 1 and 0.

    Args:
        values: by the name of their field, as given.
        fields: all there are.

    Raises:
        ValueError: one is; it is named.
    """
    for name, value in values.items() if isinstance(values, Mapping) else ():
        kinds = {int, float} & {fields[name].annotation, *get_args(fields[name].annotation)} if name in fields else set()
        if isinstance(value, bool) and kinds:
            raise ValueError(f"{name}={value!r} is no number; give one, such as {name}={fields[name].default or 1}")
    return values
