"""A launch that leaves an option to Triton's changing default, for the tests of ``benchmarks/aot.py``."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.aot_examples import square


def aot_calls() -> dict[str, Callable[[], object]]:
    return {"careless": square}
