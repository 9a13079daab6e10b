"""Normalises values as people write them, before they enter the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

BUILT_IN_DATASETS = ("arithmetic", "countdown", "gsm8k", "reasoning_gym")
"""Names of the built-in tasks; write ``./NAME`` for a local directory of the same name."""
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def _several(value: Any) -> Any:
    several = (value,) if isinstance(value, str) else value
    if isinstance(several, list | tuple) and "" in several:
        raise ValueError("an empty string has no meaning; leave it out")
    return several


ONE_OR_SEVERAL = BeforeValidator(_several)
"""Validator of fields that hold several strings: a single one needs no list; an empty one is refused."""


def _foreseeable(name: Any) -> Any:
    """The name of a schedule; refuses schedules that depend on a metric of the run.

    Raises:
        ValueError: the schedule does.
    """
    if name in _BY_METRIC:
        raise ValueError(
            "depends on a metric of the run, but the forecast needs the learning rates beforehand; choose another, such as "
            "'cosine' or 'warmup_stable_decay' (the setting forecast decides what a plateau does)"
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
        ValueError: there is no home directory for that user name.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(str(error).rstrip(".")) from None


def model_anywhere(name: str) -> str:
    """The absolute path of a model's directory; any other name, such as a hub id, unchanged."""
    return name if name == "embedded" else _anywhere(name, of_directory=True)


def dataset_anywhere(name: str) -> str:
    """The absolute path of a dataset's file or directory, also in ``gsm8k:DIRECTORY``; any other name unchanged."""
    kind, colon, argument = name.partition(":")
    if kind not in BUILT_IN_DATASETS:
        return _anywhere(name)
    return kind + colon + _anywhere(argument, of_directory=True) if kind == "gsm8k" and argument else name


def _anywhere(name: str, *, of_directory: bool = False) -> str:
    path = expanded(Path(name))
    return str(path.absolute()) if name and (path.is_dir() if of_directory else path.exists()) else name


def refuse_misread(values: Any, fields: Mapping[str, FieldInfo]) -> Any:
    """Returns the values, and refuses those that Python would take for others.

    True and False would be the numbers 1 and 0, and an empty name, as of an unset shell variable, the current folder.

    Args:
        values: as given, by field name.
        fields: all fields of the configuration.

    Raises:
        ValueError: there is such a value; the message names it.
    """
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if name in {"model", "dataset", "output_dir"} and isinstance(value, str) and not value.strip():
            raise ValueError(f"{name}={value!r} names nothing; give a name (a shell variable may be unset), or leave it out")
        kinds = {int, float} & {fields[name].annotation, *get_args(fields[name].annotation)} if name in fields else set()
        if isinstance(value, bool) and kinds:
            raise ValueError(f"{name}={value!r} is not a number; give one, such as {name}={fields[name].default or 1}")
    return values
