"""Importance weights against the sampler by hand, and what is measured of the gap."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_fast.metrics import MetricSums
from grpo_fast.train.mismatch import add_mismatch, add_weights, effective_sample_size, importance_weights

RATIOS = [2.0, 0.5, 4.0, 0.25, 8.0]
SEQUENCES = torch.tensor([0, 0, 2, 2, 2])
"""The first sequence's product is 1, the other's 8 with a geometric mean of 2; none of the tokens is of sequence 1."""


def weights(mode: str, low: float | None = None, high: float | None = None) -> list[float]:
    found = importance_weights(torch.tensor(RATIOS).log(), SEQUENCES, num_sequences=3, mode=mode, bounds=(low, high))
    assert found.dtype == torch.float32
    return found.tolist()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [2.0, 0.5, 3.0, 0.49, 3.0]),
        ("token_mask", [2.0, 0.5, 0.0, 0.0, 0.0]),
        ("sequence_truncate", [1.0, 1.0, 3.0, 3.0, 3.0]),
        ("sequence_mask", [1.0, 1.0, 0.0, 0.0, 0.0]),
        ("geometric_truncate", [1.0, 1.0, 2.0, 2.0, 2.0]),
        ("geometric_mask", [1.0, 1.0, 2.0, 2.0, 2.0]),
    ],
)
def test_weights_by_hand(mode: str, expected: list[float]) -> None:
    assert weights(mode, 0.49, 3.0) == pytest.approx(expected)


def test_a_bound_that_is_none_bounds_nothing() -> None:
    assert weights("token_truncate") == pytest.approx(RATIOS)
    assert weights("token_mask", low=0.4) == pytest.approx([2.0, 0.5, 4.0, 0.0, 8.0])
    assert weights("geometric_mask", high=1.9) == pytest.approx([1.0, 1.0, 0.0, 0.0, 0.0])


def test_no_tokens_have_no_weights() -> None:
    none = torch.zeros(0)
    assert importance_weights(none, none.long(), num_sequences=1, mode="sequence_mask", bounds=(None, 3.0)).shape == (0,)


def test_the_gap_is_measured_over_all_parts() -> None:
    sums = MetricSums()
    for part in (RATIOS[:2], RATIOS[2:]):
        add_mismatch(sums, torch.tensor(part).log())
    found = sums.compute()
    kl = sum(ratio - 1 - math.log(ratio) for ratio in RATIOS) / 5
    assert found["sampling/kl"] == pytest.approx(kl, rel=1e-6)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(8.0))
    share = sum(RATIOS) ** 2 / 5 / sum(ratio**2 for ratio in RATIOS)
    assert effective_sample_size(found) == {"sampling/effective_sample_size": pytest.approx(share, rel=1e-6)}
    assert effective_sample_size({}) == {}


def test_what_the_weights_leave_out_is_told() -> None:
    sums = MetricSums()
    add_weights(sums, torch.tensor([0.0, 1.0]))
    add_weights(sums, torch.tensor([2.0, 0.0]))
    found = sums.compute()
    assert found["sampling/importance_weight/mean"] == pytest.approx(0.75)
    assert found["sampling/importance_weight/masked_fraction"] == pytest.approx(0.5)
