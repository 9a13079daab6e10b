"""Triton's interpreter in little more than half its time.

With each call of a function within a kernel it searches all of Triton's language for what it has to replace. The launch, or the
first such call within it, has replaced the same already.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any


def install() -> None:
    """Makes every launch of this process replace each module of the language once."""
    from triton.runtime import interpreter

    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced: set[str] = set()

    @functools.cache
    def languages(kernel: Any) -> frozenset[str]:
        modules = {value.__name__ for value in kernel.__globals__.values() if isinstance(value, ModuleType)}
        return frozenset(modules & {"triton.language", "triton.language.core"})

    def launch_anew(executor: Any, *arguments: Any, **options: Any) -> Any:
        replaced.clear()
        return launch(executor, *arguments, **options)

    def replace_once(kernel: Any) -> Any:
        if replaced and replaced >= languages(kernel):
            return None
        replaced.update(languages(kernel))
        return replace(kernel)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = replace_once
