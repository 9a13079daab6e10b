from __future__ import annotations

from grpo_fast.rollout.vllm_sample import token_versions


def test_spans_become_one_version_a_token() -> None:
    assert token_versions([("3", 0, 2), ("11", 2, 3)]) == (3, 3, 11)
    assert token_versions([]) == ()


def test_a_version_that_no_sync_gave_is_none() -> None:
    assert token_versions([("default", 0, 2)]) == ()
    assert token_versions([("3", 0, 1), ("default", 1, 2)]) == ()
