from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.rewards.functions import (
    accuracy,
    boxed_format,
    completion_text,
    exact_match,
    final_answer,
    gold_answer,
    last_boxed,
    reasoning_format,
)


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        ("She has 3 * 6 = <<3*6=18>>18.\n#### 18", "so she has 18 eggs.", 1.0),
        ("She has 3 * 6 = <<3*6=18>>18.\n#### 18", "so she has 19 eggs.", 0.0),
        ("#### 1,234", "\\boxed{1234}", 1.0),
        ("18", "The answer is $18.00", 1.0),
        ("18", "\\boxed{18\\text{ dollars}}", 1.0),
        ("18", "\\boxed{17}, no: \\boxed{18}", 1.0),
        ("17", "\\boxed{17}, no: \\boxed{18}", 0.0),
        ("18", "#### 18", 1.0),
        ("18", "<think>It could be 7.</think><answer>18</answer>", 1.0),
        ("7", "<think>It could be 7.</think><answer>18</answer>", 0.0),
        ("18", "<think>It must be 18", 0.0),
        ("18", "", 0.0),
        ("18", "\\boxed{}", 0.0),
        ("-5", "\\boxed{5}", 0.0),
        ("0", "\\boxed{0}", 1.0),
        (18, "\\boxed{18}", 1.0),
        (0.5, "\\boxed{\\frac12}", 1.0),
        ("1/2", "\\boxed{\\frac{1}{2}}", 1.0),
        ("\\frac{1}{2}", "0.5", 1.0),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", 0.0),
        ("\\sqrt{2}", "\\boxed{\\sqrt2}", 1.0),
        ("\\sqrt{2}", "<answer>\\sqrt{2}</answer>", 1.0),
        ("3", "\\boxed{2\\sqrt{3}\\text{ cm}}", 0.0),
        ("2\\sqrt{3}", "\\boxed{2\\sqrt{3}\\text{ cm}}", 1.0),
        ("x^2+1", "\\boxed{1+x^2}", 1.0),
        ("$x=5$", "\\boxed{5}", 1.0),
        ("50%", "<answer>50%</answer>", 1.0),
        ("(1,2)", "\\boxed{(1,2)}", 1.0),
        ("A", "\\boxed{A}", 1.0),
        ("A", "\\boxed{B}", 0.0),
        ("apple", "apple", None),
        ("", "3", None),
        (None, "3", None),
    ],
)
def test_accuracy_truth_table(gold: Any, completion: str, expected: float | None) -> None:
    assert accuracy([completion], [gold]) == [expected]


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        ("#### 18", "first 3, then 18.", 1.0),
        ("#### 18", "first 18, then 3.", 0.0),
        ("1,234", "It is 1234.0", 1.0),
        ("4", "a range of 3-4", 1.0),
        ("-4", "minus: -4", 1.0),
        ("0", "0", 1.0),
        ("0", "no number", 0.0),
        ("50%", "\\boxed{50\\%}", 1.0),
        ("Paris", "<answer> paris. </answer>", 1.0),
        ("Paris", "It is Paris", 0.0),
        ("New  York", "new york", 1.0),
        ("12:30", "12:30", 1.0),
        ("\\frac{1}{2}", "0.5", 0.0),
        ("", "x", None),
        (None, "x", None),
    ],
)
def test_exact_match_truth_table(gold: Any, completion: str, expected: float | None) -> None:
    assert exact_match([completion], [gold]) == [expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a\nb</think>\n<answer>\nc\n</answer>\n", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_reasoning_format(completion: str, expected: float) -> None:
    assert reasoning_format([completion]) == [expected]


@pytest.mark.parametrize(
    ("opening", "completion", "expected"),
    [
        ("<think>\n", "so</think><answer>2</answer>", (1.0, 1.0, 1.0)),
        ("<think>\n", "it is 2", (0.0, 0.0, 0.0)),
        ("<think>\n\n</think>\n\n", "<answer>2</answer>", (1.0, 1.0, 1.0)),
        ("<think>\n\n</think>\n\n", "it is 2", (1.0, 1.0, 0.0)),
        ("", "it is 2", (1.0, 1.0, 0.0)),
    ],
)
def test_a_thought_that_the_prompt_opened_belongs_to_the_answer(
    opening: str, completion: str, expected: tuple[float, ...]
) -> None:
    texts, openings = [completion, [{"role": "assistant", "content": completion}]], [opening, opening]
    found = (
        accuracy(texts, ["2", "2"], completion_openings=openings),
        exact_match(texts, ["2", "2"], completion_openings=openings),
        reasoning_format(texts, completion_openings=openings),
    )
    assert found == tuple([each, each] for each in expected)


def test_boxed_format() -> None:
    assert boxed_format(["\\boxed{1}", "\\boxed{\\frac{1}{2}}", "\\boxed{", "\\boxed{ }", "1", ""]) == [1, 1, 0, 0, 0, 0]


def test_last_boxed_falls_back_to_the_last_closed_one() -> None:
    assert last_boxed("\\boxed{1} and \\boxed{\\frac{2}{3}") == "1"
    assert last_boxed("\\boxed{{a}b} c") == "{a}b"


def test_chat_completions_are_read_by_their_last_message() -> None:
    chat = [[{"role": "assistant", "content": "\\boxed{18}"}], [{"role": "assistant", "content": None}]]
    assert accuracy(chat, ["18", "18"]) == [1.0, 0.0]
    assert completion_text(chat[1]) == ""
    with pytest.raises(TypeError, match="not 3"):
        completion_text(3)


def test_the_final_answer_of_a_long_completion_is_sought_at_its_end() -> None:
    text, marked = final_answer("1 " * 5000 + "end")
    assert text.endswith("end")
    assert len(text) == 2000
    assert not marked


def test_as_many_answers_as_completions() -> None:
    with pytest.raises(ValueError, match="zip"):
        accuracy(["1", "2"], ["1"])


def test_an_expression_that_never_ends_counts_as_wrong() -> None:
    start = time.monotonic()
    assert accuracy(["\\boxed{9^{9^{9^9}}}"], ["18"]) == [0.0]
    assert time.monotonic() - start < 60


def test_accuracy_outside_the_main_thread() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(accuracy(["\\boxed{271828}", "3"], ["271828", "4"])))
    thread.start()
    thread.join()
    assert results == [1.0, 0.0]


def test_every_gsm8k_solution_is_its_own_right_answer(shared_data: Path) -> None:
    import json

    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]]
    answers = [row["answer"] for row in rows]
    boxed = [f"We think.\n\\boxed{{{gold_answer(answer)}}}" for answer in answers]
    wrong = [f"We think.\n\\boxed{{{gold_answer(answer)}7}}" for answer in answers]
    for reward in (accuracy, exact_match):
        assert reward(boxed, answers) == [1.0] * len(rows)
        assert reward(answers, answers) == [1.0] * len(rows)
        assert sum(value or 0.0 for value in reward(wrong, answers)) == 0
