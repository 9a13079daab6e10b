from __future__ import annotations

from grpo_fast.tasks.wording import ask, tagged_answer


def test_asks_in_messages_or_in_text() -> None:
    assert ask("Why?", chat=True) == [{"role": "user", "content": "Why?"}]
    assert ask("Why?", chat=False) == "Why?\n\nSolution:"


def test_the_last_answer_counts() -> None:
    assert tagged_answer("<answer>1</answer> no, <answer>\n 2 </answer> yes") == "2"
    assert tagged_answer("<answer>") is None
    assert tagged_answer("</answer><answer>") is None
    assert tagged_answer("2") is None
    assert tagged_answer("<answer></answer>") == ""
