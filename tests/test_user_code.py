from __future__ import annotations

import functools
import linecache
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fast.user_code import (
    accepted_arguments,
    describe_failure,
    import_object,
    is_async,
    name_of,
    number_of,
    pickled_function,
    shown,
)


def test_names_are_those_of_what_is_called_in_the_end() -> None:
    class Machine:
        def __call__(self) -> None: ...

    def plain(scale: float) -> None: ...

    assert name_of(functools.partial(functools.partial(plain, scale=1.0))) == "plain"
    assert name_of(Machine()) == "Machine"
    assert name_of(Machine) == "Machine"


def test_objects_are_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_along.py").write_text("class Box:\n    inner = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_object("brought_along:Box.inner", kind="thing") == 3
    with pytest.raises(ValueError, match=r"thing 'brought_along:Bax': 'brought_along' has no 'Bax'; did you mean 'Box'\?"):
        import_object("brought_along:Bax", kind="thing")
    with pytest.raises(
        ValueError, match=r"thing 'absent_module:f': cannot import 'absent_module' \(ModuleNotFoundError.*PYTHONPATH"
    ):
        import_object("absent_module:f", kind="thing")


def test_a_function_gets_what_it_names() -> None:
    given = {"prompt": "p", "answer": "a", "level": 3}

    def some(prompt: str, *, answer: str, scale: float = 1.0) -> None: ...

    def everything(prompt: str, **columns: Any) -> None: ...

    def other(solution: str) -> None: ...

    assert accepted_arguments(some, given, always=("prompt",)) == {"prompt": "p", "answer": "a"}
    assert accepted_arguments(everything, given, always=("prompt",)) == given
    assert accepted_arguments(max, given, always=("prompt",)) == given, "its signature cannot be read"
    with pytest.raises(LookupError, match="needs a dataset column 'solution'; the dataset has answer, level"):
        accepted_arguments(other, given, always=("prompt",))
    with pytest.raises(LookupError, match="the dataset has no column but the prompt"):
        accepted_arguments(other, {"prompt": "p"}, always=("prompt",))


def test_async_functions_are_told_by_what_is_called_in_the_end() -> None:
    class Machine:
        async def __call__(self) -> None: ...

    async def later(scale: float) -> None: ...

    def plain() -> None: ...

    assert all(map(is_async, (later, functools.partial(functools.partial(later, scale=1.0)), Machine())))
    assert not any(map(is_async, (plain, functools.partial(plain), max, functools.partial)))


def test_failures_tell_where_they_happened_and_are_not_endless() -> None:
    def broken() -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        broken()
    assert describe_failure(caught.value).endswith("in broken: return 1 / 0)")
    assert describe_failure(KeyError("k")) == "raised KeyError: 'k'"
    assert len(describe_failure(ValueError("x" * 5000))) < 1100


def test_numbers_are_those_of_float32_and_all_values_can_be_shown() -> None:
    largest = float(np.finfo(np.float32).max)
    assert [number_of(value) for value in (True, 3, np.float64(0.5), np.array([[2]]), largest)] == [1.0, 3.0, 0.5, 2.0, largest]
    assert [number_of(value) for value in (10**400, -(10**400), 2 * largest)] == [math.inf, -math.inf, math.inf]
    assert [number_of(value) for value in (None, "1", np.zeros(2), 1j)] == [None] * 4
    assert math.isnan(number_of(math.nan) or 0.0)

    class Broken:
        def __repr__(self) -> str:
            raise KeyError

    assert [shown(value) for value in (1.5, 10**5000)] == ["1.5 (float)", "a value that cannot be written (int)"]
    assert shown(Broken()) == "a value that cannot be written (Broken)"


def test_another_process_shows_the_line_of_a_cell_that_failed(tmp_path: Path) -> None:
    """A notebook keeps the text of its cells under names of files that are not there."""
    cell = "class Rule:\n    def __call__(self):\n        return 1 / 0\n\n\ndef rule():\n    return 2 / 0\n"
    cell += "\n\ndef outer():\n    def inner():\n        return 3 / 0\n\n    return inner()\n"
    place = str(tmp_path / "cell-1.py")
    linecache.cache[place] = (len(cell), None, cell.splitlines(keepends=True), place)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(cell, place, "exec"), names)
    script = (
        "import pickle, sys\nfrom grpo_fast.user_code import describe_failure\n"
        "function = pickle.loads(sys.stdin.buffer.read())\n"
        "try:\n    function()\nexcept ZeroDivisionError as error:\n    print(describe_failure(error))\n"
    )

    def told(sent: bytes) -> str:
        done = subprocess.run([sys.executable, "-c", script], input=sent, capture_output=True, check=True)
        return done.stdout.decode().partition(" (")[2].rstrip()

    assert told(pickled_function(names["rule"])) == f"{place}:7, in rule: return 2 / 0)"
    assert told(pickled_function(functools.partial(names["rule"]))) == f"{place}:7, in rule: return 2 / 0)"
    assert told(pickled_function(names["Rule"]())) == f"{place}:3, in __call__: return 1 / 0)"
    assert told(pickled_function(names["outer"])) == f"{place}:12, in inner: return 3 / 0)", "also what stands inside of it"
    assert pickle.loads(pickled_function(max)) is max
