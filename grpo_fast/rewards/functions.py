r"""The built-in reward functions: is the final answer right, and does the completion keep to a format.

All have TRL's signature and read the ``answer`` column where they need a right answer. The final answer of a completion is
looked for where instruction-tuned models put it: after ``</think>``, inside the last ``<answer>``, then the last ``\boxed{}``,
then what follows ``####``; without any of these marks, in its last characters. Where the prompt itself opens the thought, as
chat templates of reasoning models do, ``completion_openings`` tells so.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

_TAIL_CHARACTERS = 2000
_PARSE_TIMEOUT_S = 2
_VERIFY_TIMEOUT_S = 1
_CACHE_SIZE = 4096

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))")
_LATEX_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mbox|mathrm)\s*\{[^{}]*\}")
_WORD = re.compile(r"[A-Za-z]{2,}")
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
_THOUGHT_ANSWER = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def accuracy(
    completions: Sequence[Any], answer: Sequence[Any], completion_openings: Sequence[str] | None = None, **columns: Any
) -> list[float | None]:
    """1.0 where math-verify finds the final answer equal to the right one, else 0.0.

    The right answer may be plain (``18``, ``1/2``), LaTeX, or a GSM8K solution that ends in ``#### 18``. An expression that
    takes longer than a second to compare counts as wrong; that limit needs a main thread, which a worker process has.

    Args:
        completions: N texts, or N message lists.
        answer: N right answers.
        completion_openings: N texts with which prompts began the answer; ``None`` for none.
        columns: Not read.

    Returns:
        N rewards; ``None`` where the right answer cannot be parsed as mathematics (``exact_match`` compares words).

    Source: https://github.com/huggingface/Math-Verify
    """
    return [
        _mathematically_equal(gold_answer(right), final_answer(text))
        for text, right in zip(_whole_texts(completions, completion_openings), answer, strict=True)
    ]


def exact_match(
    completions: Sequence[Any], answer: Sequence[Any], completion_openings: Sequence[str] | None = None, **columns: Any
) -> list[float | None]:
    """1.0 where the final answer reads the same as the right one, else 0.0.

    Case, surrounding spaces, dollar signs and a full stop at the end are ignored, and so is how a number is written
    (``1,234.0`` is ``1234``). Where the right answer is a number and the completion marks no final answer, its last number is
    taken.

    Args:
        completions: N texts, or N message lists.
        answer: N right answers, plain or ending in ``#### 18``.
        completion_openings: N texts with which prompts began the answer; ``None`` for none.
        columns: Not read.

    Returns:
        N rewards; ``None`` where the right answer is empty.
    """
    return [
        _reads_equal(gold_answer(right), final_answer(text))
        for text, right in zip(_whole_texts(completions, completion_openings), answer, strict=True)
    ]


def reasoning_format(
    completions: Sequence[Any], completion_openings: Sequence[str] | None = None, **columns: Any
) -> list[float | None]:
    """1.0 for ``<think>...</think><answer>...</answer>``, each tag once, nothing but space around; else 0.0.

    Args:
        completions: N texts, or N message lists.
        completion_openings: N texts with which prompts began the answer; ``None`` for none.
        columns: Not read.

    Returns:
        N rewards.

    Source: DeepSeek-R1 (arXiv:2501.12948), section 2.2.2, format rewards.
    """
    return [float(_has_reasoning_format(text)) for text in _whole_texts(completions, completion_openings)]


def boxed_format(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1.0 where a ``\boxed{}`` with something in it is opened and closed, else 0.0.

    Args:
        completions: N texts, or N message lists.
        columns: Not read.

    Returns:
        N rewards.
    """
    return [float(bool(last_boxed(completion_text(completion)))) for completion in completions]


def environment(environment_rewards: Sequence[float | None], **columns: Any) -> list[float | None]:
    """The environment's own reward of an episode (its ``get_reward``).

    Args:
        environment_rewards: N rewards, ``None`` where it said nothing.
        columns: Not read.

    Returns:
        They.
    """
    return list(environment_rewards)


BUILT_IN: Mapping[str, Callable[..., list[float | None]]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "format": reasoning_format,
    "boxed_format": boxed_format,
    "environment": environment,
}
"""Reward functions by the name a configuration calls them."""

BOUNDS: Mapping[str, tuple[float, float]] = dict.fromkeys(BUILT_IN.keys() - {"environment"}, (0.0, 1.0))
"""Least and greatest reward of those where that is known."""


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of its last message.

    Raises:
        TypeError: neither a string nor a list of messages.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        return str(completion[-1].get("content") or "")
    raise TypeError(f"a completion is a string or a list of messages, not {completion!r}")


def _whole_texts(completions: Sequence[Any], openings: Sequence[str] | None) -> list[str]:
    """Answers from where prompts began them."""
    texts = map(completion_text, completions)
    return list(texts) if openings is None else [opening + text for opening, text in zip(openings, texts, strict=True)]


def gold_answer(answer: Any) -> str:
    """The right answer as text: what follows the last ``####`` (GSM8K) or all of it; empty for ``None``."""
    return "" if answer is None else str(answer).rpartition("####")[2].strip()


def final_answer(text: str) -> tuple[str, bool]:
    r"""The part of a completion that holds its final answer.

    Args:
        text: the completion.

    Returns:
        The part, and whether it was marked as the answer (``<answer>``, ``\boxed{}``, ``####``). Empty where a ``<think>`` is
        never closed.
    """
    thought, closed, rest = text.rpartition("</think>")
    if not closed and "<think>" in thought + rest:
        return "", False
    _, tagged, inside = rest.rpartition("<answer>")
    region = inside.partition("</answer>")[0] if tagged else rest
    boxed = last_boxed(region)
    if boxed is not None:
        return boxed, True
    _, hashed, after = region.rpartition("####")
    if hashed:
        return after.strip().partition("\n")[0], True
    return region.strip()[-_TAIL_CHARACTERS:], bool(tagged)


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed ``\boxed{...}``, or ``None`` if there is none."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : position].strip()
        end = start
    return None


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _mathematically_equal(gold: str, found: tuple[str, bool]) -> float | None:
    # Imported late: sympy takes a quarter of a second, which other rewards need not pay.
    import math_verify  # noqa: PLC0415

    expected = _parsed_gold(gold)
    if not expected:
        return None
    text, marked = found
    parsed = _parsed(text, as_formula=marked and not _is_prose(text))
    return float(math_verify.verify(list(expected), parsed, timeout_seconds=_timeout(_VERIFY_TIMEOUT_S)))


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _parsed_gold(gold: str) -> tuple[Any, ...]:
    return tuple(_parsed(gold, as_formula=not _is_prose(gold)))


def _parsed(text: str, *, as_formula: bool) -> list[Any]:
    """What math-verify reads in a text; ``as_formula`` takes all of it as one formula where no delimiter says otherwise."""
    import math_verify  # noqa: PLC0415

    # Its warnings quote whole completions. Called outside a main thread it cannot set its alarm, and warns of that too.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    targets = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]
    timeout = _timeout(_PARSE_TIMEOUT_S)
    if as_formula and text and not _DELIMITED.search(text):
        formula = text.replace("%", "\\%") if "\\%" not in text else text
        parsed = math_verify.parse(f"\\boxed{{{formula}}}", targets, parsing_timeout=timeout)
        if any(not isinstance(value, str) for value in parsed):
            return list(parsed)
    return list(math_verify.parse(text, targets, parsing_timeout=timeout))


def _timeout(seconds: int) -> int | None:
    return seconds if threading.current_thread() is threading.main_thread() else None


def _is_prose(text: str) -> bool:
    return _WORD.search(_LATEX_COMMAND.sub(" ", _LATEX_TEXT.sub(" ", text))) is not None


def _reads_equal(gold: str, found: tuple[str, bool]) -> float | None:
    expected = _normalised(gold)
    if expected == "":
        return None
    text, marked = found
    if not marked and isinstance(expected, Fraction):
        numbers = [match.group() for match in _NUMBER.finditer(text) if match.group()]
        text = numbers[-1] if numbers else ""
    return float(_normalised(text) == expected)


def _normalised(text: str) -> str | Fraction:
    """A number as such; any other text without what does not change its meaning."""
    text = " ".join(text.replace("$", " ").replace("\\%", "%").split()).rstrip(".").strip()
    if text and _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    return text.casefold()


def _has_reasoning_format(text: str) -> bool:
    match = _THOUGHT_ANSWER.fullmatch(text)
    return match is not None and not any(tag in part for part in match.groups() for tag in _TAGS)
